"""Each sample mixed with its partner, or their labels: the kernel of ``mix_samples`` and ``mix_labels``.

A program has a block of one sample's values. Products and sums are rounded one by one, as torch rounds them, so the
bits are torch's; therefore the compiler may not fuse them (``enable_fp_fusion``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from gradmix.kernels import Variant, unit_of
from torch import Tensor


@triton.jit
def _one_hot(label, column, classes, dtype: tl.constexpr):
    """The entries of a one-hot vector; NaN of a label out of range, which nothing checks here."""
    entry = tl.where(label == column, 1.0, 0.0)
    return tl.where((label >= 0) & (label < classes), entry, float("nan")).to(dtype)


@triton.jit(do_not_specialize=("width",))
def _mix(
    own, other, partner, lam, mixed, width, UNIT: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute the mixtures (N, width); ``width`` is in units. With CLASSES the samples are class indices (N,)."""
    width *= UNIT
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    row_of_other = tl.load(partner + row)
    dtype: tl.constexpr = mixed.dtype.element_ty
    work: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    # By float32 on the way to a half, as torch converts.
    weight = tl.load(lam + row).to(work).to(dtype).to(work)
    if CLASSES:
        x = _one_hot(tl.load(own + row), column, width, work)
        z = _one_hot(tl.load(other + row_of_other), column, width, work)
    else:
        x = tl.load(own + row * width + column, mask=inside, other=0).to(work)
        z = tl.load(other + row_of_other * width + column, mask=inside, other=0).to(work).to(dtype).to(work)
    rest = (1 - weight).to(dtype).to(work)
    first = (weight * x).to(dtype).to(work)
    second = (rest * z).to(dtype).to(work)
    tl.store(mixed + row * width + column, (first + second).to(dtype), mask=inside)


CONFIGURATIONS = ((256, 2), (2048, 4))
"""(values of a block, warps), of which the first that holds a sample is taken, or the last."""


def mix_samples(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor, mixed: Tensor) -> None:
    """Write the mixtures, in one launch.

    Args:
        own: (N, W); or (N,) int64, class indices, which stand for their one-hot vectors. Contiguous.
        other: (M, W) or (M,) int64, likewise.
        partner: (N,) int64, in [0, M).
        lam: (N,).
        mixed: (N, W), contiguous; written.
    """
    width = mixed.shape[1]
    unit = unit_of(width)
    block, warps = next((c for c in CONFIGURATIONS if width <= c[0]), CONFIGURATIONS[-1])
    with torch.cuda.device_of(own):
        _mix[(len(own), triton.cdiv(width, block))](
            own, other, partner.contiguous(), lam.contiguous(), mixed, width // unit,
            UNIT=unit, CLASSES=own.ndim == 1, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def variants() -> Iterator[Variant]:
    """Return the specialisations worth compiling ahead of time."""
    for block, warps in CONFIGURATIONS:
        for name, values, weights, classes in (
            ("float32", "*fp32", "*fp32", False),
            ("bfloat16", "*bf16", "*fp32", False),
            ("labels", "*i64", "*fp32", True),
        ):
            signature = {"own": values, "other": values, "partner": "*i64", "lam": weights}
            signature |= {"mixed": weights if classes else values, "width": "i32"}
            signature |= dict.fromkeys(("UNIT", "CLASSES", "BLOCK"), "constexpr")
            constants: dict[str, Any] = {"UNIT": 16, "CLASSES": classes, "BLOCK": block}
            yield Variant(f"mix_samples {name} {block}", _mix, signature, constants, warps, 3, max_registers=64)
