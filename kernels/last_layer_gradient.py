"""The sum over rows of (softmax(z) - y) [h; 1]^T, residuals formed inside the product: ``last_layer_gradient``.

A row kernel finds, for each row of logits, what turns a logit into a probability: the largest logit and the reciprocal
of the sum of exponentials; and minus the other classes' probability, which is the residual of a row's own class without
cancellation. Of label vectors the own class is that of the largest entry, and what they lack to its one-hot vector is
added. Then a program has a tile of classes x features and walks over the rows: it forms
the residuals of its classes from the logits and multiplies them into its features. The bias's column is a plain sum of
the residuals.

Where there are few classes and features, rows are shared out among several programs for each tile. Their sums are
written one beside the other and added afterwards in a fixed order, so that no atomic addition is needed and results are
the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from gradmix.kernels import Variant, unit_of
from torch import Tensor


@triton.jit(do_not_specialize=("rows", "classes", "stride"))
def _rows(logits, labels, stats, rows, classes, stride, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Compute for each row the largest logit, 1 / sum exp(z - largest), and the residual of its label (3, N).

    ``classes`` and ``stride`` are in units.
    """
    classes *= UNIT
    stride *= UNIT
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, classes, BLOCK):
        z = tl.load(logits + row * stride + start + lanes, mask=start + lanes < classes, other=-float("inf"))
        largest = tl.maximum(largest, z.to(tl.float32))
    top = tl.max(largest, 0)
    label = tl.load(labels + row)
    others = tl.zeros((BLOCK,), tl.float32)
    own = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        column = start + lanes
        z = tl.load(logits + row * stride + column, mask=column < classes, other=-float("inf"))
        e = tl.where(column < classes, tl.exp(z.to(tl.float32) - top), 0.0)
        others += tl.where(column == label, 0.0, e)
        own += tl.where(column == label, e, 0.0)
    rest = tl.sum(others, 0)
    inverse = 1.0 / (rest + tl.sum(own, 0))
    tl.store(stats + row, top)
    tl.store(stats + rows + row, inverse)
    tl.store(stats + 2 * rows + row, -rest * inverse)


_SIZES = (
    "rows", "classes", "width", "rows_each", "out_split", "out_stride", "features_stride", "logits_stride",
    "vectors_stride",
)  # fmt: skip
"""Numbers for which Triton must not compile anew where they are 1 or multiples of 16."""


@triton.jit(do_not_specialize=_SIZES)
def _tiles(
    out,
    features,
    logits,
    labels,
    vectors,
    stats,
    rows,
    classes,
    width,
    rows_each,
    out_split,
    out_stride,
    features_stride,
    logits_stride,
    vectors_stride,
    SOFT: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT_C: tl.constexpr,
    UNIT_D: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
):
    # Sizes and strides of the inputs are in units.
    classes *= UNIT_C
    logits_stride *= UNIT_C
    vectors_stride *= UNIT_C
    width *= UNIT_D
    features_stride *= UNIT_D
    c = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    f = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    first = tl.program_id(2) * rows_each
    last = tl.minimum(first + rows_each, rows)
    total = tl.zeros((CLASSES, FEATURES), tl.float32)
    residuals = tl.zeros((CLASSES, ROWS), tl.float32)
    for start in range(first, last, ROWS):
        n = start + tl.arange(0, ROWS)
        inside = n < last
        row = n.to(tl.int64)
        top = tl.load(stats + row, mask=inside, other=0.0)
        inverse = tl.load(stats + rows + row, mask=inside, other=0.0)
        both = (c < classes)[:, None] & inside[None, :]
        z = tl.load(logits + row[None, :] * logits_stride + c[:, None], mask=both, other=-float("inf"))
        r = tl.exp(z.to(tl.float32) - top[None, :]) * inverse[None, :]
        own = tl.load(stats + 2 * rows + row, mask=inside, other=0.0)
        label = tl.load(labels + row, mask=inside, other=-1)
        here = c[:, None] == label[None, :]
        r = tl.where(here, own[None, :], r)
        if SOFT:
            y = tl.load(vectors + row[None, :] * vectors_stride + c[:, None], mask=both, other=0.0).to(tl.float32)
            r += tl.where(here & both, 1.0 - y, -y)
        h = tl.load(
            features + row[:, None] * features_stride + f[None, :],
            mask=inside[:, None] & (f < width)[None, :],
            other=0.0,
        )
        residuals += r
        total = tl.dot(r, h.to(tl.float32), total, input_precision=PRECISION)
    out += tl.program_id(2).to(tl.int64) * out_split
    at = out + c.to(tl.int64)[:, None] * out_stride + f[None, :]
    mask = (c < classes)[:, None] & (f < width)[None, :]
    if ADD:
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(at, total, mask=mask)
    if BIAS:
        column = out + c.to(tl.int64) * out_stride + width
        mine = (c < classes) & (tl.program_id(1) == 0)
        bias = tl.sum(residuals, 1)
        if ADD:
            bias += tl.load(column, mask=mine, other=0.0)
        tl.store(column, bias, mask=mine)


class Configuration(NamedTuple):
    """The sizes of a tile.

    Attributes:
        classes: classes of a tile.
        features: features of a tile.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
    """

    classes: int
    features: int
    num_warps: int
    num_stages: int


CONFIGURATIONS = (Configuration(32, 64, 4, 2), Configuration(64, 128, 8, 2))
"""Small tiles, and large ones for where there are enough of them."""

ROWS = 16
"""Rows of a step, the same in all configurations: it is the order of summation."""

ROW_BLOCK = 1024
"""Classes of a step of the row kernel."""

PROGRAMS = 256
"""Programs below which rows are shared out: two for each multiprocessor of a large GPU."""

PARTIAL = 1 << 22
"""Elements of the sums that are written side by side, at the most (16 MiB)."""


def configuration(classes: int, width: int) -> Configuration:
    """The tile for a result of that size."""
    large = CONFIGURATIONS[1]
    many = triton.cdiv(classes, large.classes) * triton.cdiv(width, large.features)
    return large if 2 * many >= PROGRAMS else CONFIGURATIONS[0]


def splits(rows: int, classes: int, width: int, tiles: int) -> int:
    """The number of programs that share the rows of each tile; from the sizes alone."""
    room = PARTIAL // (classes * (width + 1))
    return max(1, min(PROGRAMS // max(1, tiles), room, rows // (4 * ROWS)))


def last_layer_gradient(out: Tensor, features: Tensor, logits: Tensor, labels: Tensor, precision: str) -> None:
    """Add the sum to ``out`` (C, d + 1) or, without bias, (C, d), float32; nothing is waited for.

    Args:
        out: what is added to.
        features: (N, d) float32, bfloat16 or float16.
        logits: (N, C), likewise.
        labels: (N,) int64, or (N, C) of a floating-point dtype.
        precision: ``"ieee"``, ``"tf32x3"`` or ``"tf32"``.
    """
    (rows, width), classes = features.shape, logits.shape[1]
    if rows == 0:
        return
    soft = labels.is_floating_point()
    features, logits = _rows_of(features), _rows_of(logits)
    vectors = _rows_of(labels) if soft else labels
    labels = labels.argmax(1) if soft else labels.contiguous()
    result = _rows_of(out)
    stats = torch.empty(3, rows, dtype=torch.float32, device=out.device)
    chosen = configuration(classes, width)
    grid = triton.cdiv(classes, chosen.classes), max(1, triton.cdiv(width, chosen.features))
    parts = splits(rows, classes, width, grid[0] * grid[1])
    each = triton.cdiv(triton.cdiv(rows, parts), ROWS) * ROWS
    parts = triton.cdiv(rows, each)
    target = result if parts == 1 else torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
    vectors_stride = vectors.stride(0) if soft else 0
    unit_c, unit_d = unit_of(classes, logits.stride(0), vectors_stride), unit_of(width, features.stride(0))
    with torch.cuda.device_of(out):
        _rows[(rows,)](
            logits, labels, stats, rows, classes // unit_c, logits.stride(0) // unit_c, UNIT=unit_c,
            BLOCK=min(ROW_BLOCK, triton.next_power_of_2(classes)), num_warps=4,
        )  # fmt: skip
        _tiles[(*grid, parts)](
            target, features, logits, labels, vectors, stats, rows, classes // unit_c, width // unit_d, each,
            0 if parts == 1 else target.stride(0), target.stride(-2),
            features.stride(0) // unit_d, logits.stride(0) // unit_c, vectors_stride // unit_c,
            SOFT=soft, BIAS=out.shape[1] > width, ADD=parts == 1, PRECISION=precision, UNIT_C=unit_c, UNIT_D=unit_d,
            CLASSES=chosen.classes, FEATURES=chosen.features, ROWS=ROWS,
            num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
    if parts > 1:
        out += target.sum(0)
    elif result is not out:
        out.copy_(result)


def _rows_of(matrix: Tensor) -> Tensor:
    """The matrix, each row's entries next to each other in memory."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def variants() -> Iterator[Variant]:
    """The specialisations worth compiling ahead of time."""
    sizes = dict.fromkeys(("rows", "classes", "stride"), "i32")
    pointers = {"logits": "*fp32", "labels": "*i64", "stats": "*fp32"}
    yield Variant(
        "last_layer_gradient rows",
        _rows,
        {**pointers, **sizes, "UNIT": "constexpr", "BLOCK": "constexpr"},
        {"UNIT": 8, "BLOCK": ROW_BLOCK},
        4,
        3,
        max_registers=128,
    )
    constants = ("SOFT", "BIAS", "ADD", "PRECISION", "UNIT_C", "UNIT_D", "CLASSES", "FEATURES", "ROWS")
    for chosen in CONFIGURATIONS:
        for precision in ("tf32x3", "tf32", "ieee"):
            for hard, dtype in ((True, "fp32"), (True, "bf16"), (False, "fp32")):
                signature = {
                    "out": "*fp32",
                    "features": f"*{dtype}",
                    "logits": f"*{dtype}",
                    "labels": "*i64",
                    "vectors": "*i64" if hard else "*fp32",
                    "stats": "*fp32",
                    **dict.fromkeys(_SIZES, "i32"),
                    **dict.fromkeys(constants, "constexpr"),
                }
                values: dict[str, Any] = {
                    "SOFT": not hard,
                    "BIAS": True,
                    "ADD": True,
                    "PRECISION": precision,
                    "UNIT_C": 8,
                    "UNIT_D": 16,
                    "CLASSES": chosen.classes,
                    "FEATURES": chosen.features,
                    "ROWS": ROWS,
                }
                yield Variant(
                    f"last_layer_gradient {'hard' if hard else 'soft'} {dtype} {precision} "
                    f"{chosen.classes}x{chosen.features}",
                    _tiles,
                    signature,
                    values,
                    chosen.num_warps,
                    chosen.num_stages,
                    max_registers=232,
                )
