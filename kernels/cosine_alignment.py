"""All pairs of two batches of vectors: cosines, or norms and inner products of their mixtures: ``cosine_alignment``.

A program has a tile of pairs and walks once over the vectors' entries, for the product of the tile's rows and, beside
it, the rows' own squares (and, for mixtures, their products with the reference): what is in registers for the product
anyway. Cosines come from rows scaled beforehand, by the power of two next to their largest entry, so that no square
leaves float32's range. The scales are found by a row kernel: it reads the vectors once, where the product reads them
once for every tile, and a scale that changes on the way would have to be applied to the whole tile at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from gradmix.kernels import Variant, unit_of
from torch import Tensor


@triton.jit
def _scales(x, scales, rows, width, layer_stride, row_stride, BLOCK: tl.constexpr):
    """For each row of x (L, P, K) the power of two that brings its largest entry to [1, 2), as far as there is one."""
    row = tl.program_id(0).to(tl.int64)
    x += (row // rows) * layer_stride + (row % rows) * row_stride
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(x + k, mask=k < width, other=0.0).to(tl.float32)))
    exponent = tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23
    power = tl.minimum(tl.maximum(254 - exponent, 1), 254)
    tl.store(scales + row, (power << 23).to(tl.float32, bitcast=True))


_SIZES = ("rows", "columns", "width", "x_layer", "x_row", "y_layer", "y_row", "reference_layer")
"""Numbers for which Triton must not compile anew where they are 1 or multiples of 16."""


@triton.jit(do_not_specialize=_SIZES)
def _pairs(
    x,
    y,
    scales_x,
    scales_y,
    reference,
    lam,
    out,
    norm,
    rows,
    columns,
    width,
    x_layer,
    x_row,
    y_layer,
    y_row,
    reference_layer,
    MIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The width and the strides of the inputs are in units.
    width *= UNIT
    x_layer *= UNIT
    x_row *= UNIT
    y_layer *= UNIT
    y_row *= UNIT
    reference_layer *= UNIT
    layer = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_p, in_q = p < rows, q < columns
    x += layer * x_layer + p.to(tl.int64)[:, None] * x_row
    y += layer * y_layer + q.to(tl.int64)[:, None] * y_row
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    square_x = tl.zeros((ROWS, BLOCK), tl.float32)
    square_y = tl.zeros((COLUMNS, BLOCK), tl.float32)
    if MIXED:
        inner_x = tl.zeros((ROWS, BLOCK), tl.float32)
        inner_y = tl.zeros((COLUMNS, BLOCK), tl.float32)
        reference += layer * reference_layer
    else:
        scale_x = tl.load(scales_x + layer * rows + p, mask=in_p, other=0.0)[:, None]
        scale_y = tl.load(scales_y + layer * columns + q, mask=in_q, other=0.0)[:, None]
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        in_k = (k < width)[None, :]
        a = tl.load(x + k[None, :], mask=in_p[:, None] & in_k, other=0.0).to(tl.float32)
        b = tl.load(y + k[None, :], mask=in_q[:, None] & in_k, other=0.0).to(tl.float32)
        if MIXED:
            g = tl.load(reference + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
            inner_x += a * g
            inner_y += b * g
        else:
            a = a * scale_x
            b = b * scale_y
        square_x += a * a
        square_y += b * b
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    sum_x, sum_y = tl.sum(square_x, 1)[:, None], tl.sum(square_y, 1)[None, :]
    at = layer * rows * columns + p.to(tl.int64)[:, None] * columns + q[None, :]
    inside = in_p[:, None] & in_q[None, :]
    if MIXED:
        weight = tl.load(lam)
        mu = (1.0 - weight).to(tl.float32)
        weight = weight.to(tl.float32)
        square = weight * weight * sum_x + 2.0 * weight * mu * product + mu * mu * sum_y
        square = tl.where(square < 0.0, 0.0, square)  # which leaves a NaN a NaN
        inner = weight * tl.sum(inner_x, 1)[:, None] + mu * tl.sum(inner_y, 1)[None, :]
        tl.store(out + at, inner, mask=inside)
        tl.store(norm + at, tl.sqrt(square), mask=inside)
    else:
        length = tl.sqrt(sum_x) * tl.sqrt(sum_y)
        cosine = tl.where(length == 0.0, 0.0, product / tl.where(length == 0.0, 1.0, length))
        cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
        tl.store(out + at, cosine, mask=inside)


class Configuration(NamedTuple):
    """The tiling of the pairs.

    Attributes:
        tile: rows, and columns, of a tile.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
    """

    tile: int
    num_warps: int
    num_stages: int


CONFIGURATIONS = (Configuration(32, 4, 3), Configuration(64, 8, 3))
"""Small tiles, and large ones for where there are enough of them."""

BLOCK = 16
"""Entries of a step, the same in all configurations: it is the order of summation."""

SCALE_BLOCK = 1024
"""Entries of a step of the row kernel."""

PROGRAMS = 256
"""Tiles, two for each multiprocessor of a large GPU, from which on they are large ones."""


def configuration(layers: int, rows: int, columns: int) -> Configuration:
    """The tile for so many pairs."""
    large = CONFIGURATIONS[1]
    many = layers * triton.cdiv(rows, large.tile) * triton.cdiv(columns, large.tile)
    return large if many >= PROGRAMS else CONFIGURATIONS[0]


def cosine_alignment(x: Tensor, y: Tensor, precision: str) -> Tensor:
    """Cosines (L, P, Q) float32 of the rows of x (L, P, K) and y (L, Q, K); nothing is waited for."""
    same = x is y
    x = _rows_of(x)
    y = x if same else _rows_of(y)
    out = torch.empty(x.shape[0], x.shape[1], y.shape[1], dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(x):
        scales_x = _scales_of(x)
        scales_y = scales_x if same else _scales_of(y)
        # Of the arguments that only mixtures have, any pointer will do: none is read.
        _launch(x, y, scales_x, scales_y, x, scales_x, out, out, False, precision)
    return out


def mixed_gram_alignment(x: Tensor, y: Tensor, reference: Tensor, lam: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Inner products and norms (L, P, Q) float32 of lam x + (1 - lam) y; one launch, nothing waited for.

    Args:
        x: (L, P, K) float32, bfloat16 or float16.
        y: (L, Q, K).
        reference: (L, K).
        lam: (1,) float64, on the device.
        precision: ``"ieee"``, ``"tf32x3"`` or ``"tf32"``.
    """
    same = x is y
    x = _rows_of(x)
    y = x if same else _rows_of(y)
    reference = reference if reference.stride(1) == 1 else reference.contiguous()
    inner = torch.empty(x.shape[0], x.shape[1], y.shape[1], dtype=torch.float32, device=x.device)
    norm = torch.empty_like(inner)
    if inner.numel() > 0:
        with torch.cuda.device_of(x):
            _launch(x, y, norm, norm, reference, lam, inner, norm, True, precision)
    return inner, norm


def _scales_of(x: Tensor) -> Tensor:
    layers, rows, width = x.shape
    scales = torch.empty(layers, rows, dtype=torch.float32, device=x.device)
    block = min(SCALE_BLOCK, triton.next_power_of_2(max(1, width)))
    _scales[(layers * rows,)](x, scales, rows, width, x.stride(0), x.stride(1), BLOCK=block, num_warps=4)
    return scales


def _launch(
    x: Tensor,
    y: Tensor,
    scales_x: Tensor,
    scales_y: Tensor,
    reference: Tensor,
    lam: Tensor,
    out: Tensor,
    norm: Tensor,
    mixed: bool,
    precision: str,
) -> None:
    (layers, rows, width), columns = x.shape, y.shape[1]
    chosen = configuration(layers, rows, columns)
    sizes = width, x.stride(0), x.stride(1), y.stride(0), y.stride(1), reference.stride(0) if mixed else 0
    unit = unit_of(*sizes)
    _pairs[(triton.cdiv(rows, chosen.tile), triton.cdiv(columns, chosen.tile), layers)](
        x, y, scales_x, scales_y, reference, lam, out, norm, rows, columns, *(size // unit for size in sizes),
        MIXED=mixed, PRECISION=precision, UNIT=unit, ROWS=chosen.tile, COLUMNS=chosen.tile, BLOCK=BLOCK,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip


def _rows_of(batch: Tensor) -> Tensor:
    """The batch, each row's entries next to each other in memory."""
    return batch if batch.stride(2) == 1 else batch.contiguous()


def variants() -> Iterator[Variant]:
    """The specialisations worth compiling ahead of time."""
    yield Variant(
        "cosine_alignment scales",
        _scales,
        {
            "x": "*fp32",
            "scales": "*fp32",
            **dict.fromkeys(("rows", "width", "layer_stride", "row_stride"), "i32"),
            "BLOCK": "constexpr",
        },
        {"BLOCK": SCALE_BLOCK},
        4,
        3,
        max_registers=64,
    )
    constants = ("MIXED", "PRECISION", "UNIT", "ROWS", "COLUMNS", "BLOCK")
    for chosen in CONFIGURATIONS:
        for mixed in (False, True):
            for precision, dtype in (("tf32x3", "fp32"), ("tf32x3", "bf16"), ("tf32", "fp32"), ("ieee", "fp32")):
                signature = {
                    **dict.fromkeys(("x", "y"), f"*{dtype}"),
                    **dict.fromkeys(("scales_x", "scales_y"), "*fp32"),
                    "reference": f"*{dtype}",
                    "lam": "*fp64" if mixed else "*fp32",
                    **dict.fromkeys(("out", "norm"), "*fp32"),
                    **dict.fromkeys(_SIZES, "i32"),
                    **dict.fromkeys(constants, "constexpr"),
                }
                values: dict[str, Any] = {
                    "MIXED": mixed,
                    "PRECISION": precision,
                    "UNIT": 8,
                    "ROWS": chosen.tile,
                    "COLUMNS": chosen.tile,
                    "BLOCK": BLOCK,
                }
                yield Variant(
                    f"cosine_alignment {'mixed' if mixed else 'cosine'} {dtype} {precision} {chosen.tile}",
                    _pairs,
                    signature,
                    values,
                    chosen.num_warps,
                    chosen.num_stages,
                    max_registers=208,
                )
