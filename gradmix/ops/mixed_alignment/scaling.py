"""Powers of two that bring features and reference to a moderate size, so that no square or product leaves the range."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gradmix.ops.dtypes import exact_dtype
from gradmix.ops.mixed_alignment.values import Weight, has_bias, largest_of
from gradmix.runtime.deferred_checks import can_sync

MODERATE = 1e6
"""Features and references of entries up to this, or down to its inverse, are left in their units."""

LEAST = {torch.float32: 1e-32, torch.float64: 1e-150}
"""Gradients are held at this size: the residual at this, divided by the largest entry of U."""


class Units(NamedTuple):
    """Powers of two that features and reference were divided by, so that no square or product leaves the range.

    They are numbers where the host may look at them, and scalar float64 tensors elsewhere.

    Attributes:
        features: of the features.
        reference: of the reference.
        least: the size at which residuals are held (:data:`LEAST`).
    """

    features: Weight
    reference: Weight
    least: Weight

    @property
    def one(self) -> Weight:
        """The 1 appended to the features, in their unit."""
        return 1.0 / self.features

    @property
    def product(self) -> Weight:
        """Unit of the inner products."""
        return self.features * self.reference


def in_range(
    features_a: Tensor, features_b: Tensor, reference: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Units]:
    """Features of both sides and reference in ``dtype``, divided by powers of two, and these.

    Where the host may look, what is of moderate size is left as it is.

    Raises:
        ValueError: inner products leave the range of the dtype; where the host may not look they become infinite.
    """
    h_a = features_a.to(dtype)
    h_b = h_a if features_b is features_a else features_b.to(dtype)
    grad_reference = reference.to(dtype)
    bias = has_bias(h_a, grad_reference)
    largest = largest_of(h_a) if h_b is h_a else torch.maximum(largest_of(h_a), largest_of(h_b))
    if bias:
        largest = largest.clamp(min=1)
    largest_reference = largest_of(grad_reference)
    units = Units(unit_of(largest), unit_of(largest_reference), 0.0)
    # No entry of U is larger than this.
    most = largest.to(exact_dtype(largest.device)) * largest_reference * max(1, grad_reference.shape[1])
    least: Weight
    if can_sync(most.device):
        number = float(most)
        require_range(number, dtype)
        least = LEAST[dtype] / number if 0 < number < math.inf else 0.0
    else:
        least = torch.where((most > 0) & (most < math.inf), LEAST[dtype] / most, 0)
    units = units._replace(least=least)
    if isinstance(units.features, Tensor) or units.features != 1.0:
        h_b, h_a = (h_a * units.one,) * 2 if h_b is h_a else (h_b * units.one, h_a * units.one)
    if isinstance(units.product, Tensor) or units.features != 1.0 or units.reference != 1.0:
        grad_reference = grad_reference * (1.0 / units.reference)
        if bias:
            grad_reference[:, -1] *= units.one
    return h_a, h_b, grad_reference, units


def unit_of(largest: Tensor) -> Weight:
    """A power of two near ``largest`` where that is not of moderate size, else 1."""
    limit = 120 if largest.dtype == torch.float32 else 1000
    if can_sync(largest.device):
        number = float(largest)
        if number == 0 or not math.isfinite(number) or 1 / MODERATE <= number <= MODERATE:
            return 1.0
        return 2.0 ** max(-limit, min(limit, math.frexp(number)[1]))
    exponent = torch.frexp(largest).exponent.clamp(-limit, limit)
    unit = torch.ldexp(torch.ones_like(largest, dtype=exact_dtype(largest.device)), exponent)
    return torch.where((largest > 0) & (largest < math.inf), unit, 1)


def require_range(largest: float, dtype: torch.dtype) -> None:
    """Raise ValueError if inner products, ``largest`` of them, cannot be held in ``dtype``."""
    if torch.finfo(dtype).max < largest < math.inf:
        advice = "compute in float64, or scale the features" if dtype == torch.float32 else "scale the features"
        raise ValueError(
            f"features and reference: got entries of which inner products up to {largest:.0e} arise, expected them to "
            f"stay within the range of {str(dtype).removeprefix('torch.')}: {advice}"
        )
