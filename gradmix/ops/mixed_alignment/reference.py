"""The formula of mixed_alignment, pair by pair: what every other implementation is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmix.ops.dtypes import work_dtype
from gradmix.ops.mixed_alignment.residuals import mixed_residual
from gradmix.ops.mixed_alignment.scaling import in_range
from gradmix.ops.mixed_alignment.sides import Side
from gradmix.ops.mixed_alignment.values import MixedAlignment, Precision, has_bias, length


def mixed_alignment_reference(a: Side, b: Side, reference: Tensor, lam: float) -> MixedAlignment:
    """The formula, pair by pair, in float64; slow. Arguments and result as :func:`mixed_alignment`."""
    dtype = work_dtype(a.features.dtype)
    mu = 1.0 - lam
    least = in_range(a.features, b.features, reference, dtype)[-1].least
    h_a, h_b = (_append_one(features.double(), reference) for features in (a.features, b.features))
    z_a, z_b = a.logits.double(), b.logits.double()
    grad_reference = reference.double()
    inner = h_a.new_empty(len(h_a), len(h_b))
    norm = torch.empty_like(inner)
    for i in range(len(h_a)):
        for j in range(len(h_b)):
            h = lam * h_a[i] + mu * h_b[j]
            z = lam * z_a[i] + mu * z_b[j]
            r = mixed_residual(z[None], a.labels[i : i + 1], b.labels[j : j + 1], lam, least)[0]
            gradient = torch.outer(r, h)
            inner[i, j] = (gradient * grad_reference).sum()
            norm[i, j] = length(gradient)
    return MixedAlignment(inner.to(dtype), norm.to(dtype))


def _append_one(features: Tensor, reference: Tensor) -> Tensor:
    return torch.nn.functional.pad(features, (0, 1), value=1.0) if has_bias(features, reference) else features


def run_reference(
    a: Side, b: Side, reference: Tensor, lams: Tensor, norms: bool = True, precision: Precision = "tf32x3"
) -> MixedAlignment:
    """:func:`mixed_alignment_reference` for every mixing weight."""
    dtype = work_dtype(a.features.dtype)
    size = len(lams), len(a.features), len(b.features)
    # Two tensors of their own: what a registered operator returns must not share memory.
    inner, norm = a.features.new_empty(size, dtype=dtype), a.features.new_empty(size, dtype=dtype)
    for k, lam in enumerate(lams.tolist()):
        inner[k], norm[k] = mixed_alignment_reference(a, b, reference, lam)
    return MixedAlignment(inner, norm if norms else inner.new_empty(0))
