"""Arguments and results of the operator ``mixed_alignment``, their checks, and the cosine."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from gradmix.ops.dtypes import exact_dtype
from gradmix.runtime.deferred_checks import can_sync
from gradmix.runtime.validation import check_choice

Precision = Literal["ieee", "tf32x3", "tf32"]
"""Of the products in the Triton body: float32, or TF32 on the matrix units, in three products or one."""

PRECISIONS = get_args(Precision)

Weight: TypeAlias = float | Tensor
"""A mixing weight: a number, or a scalar float64 tensor where the host may not look at it."""


class MixedAlignment(NamedTuple):
    """Inner products and gradient norms of all pairs.

    Attributes:
        inner: (N, M), the inner product of each pair's mixed gradient with the reference gradient; or (L, N, M) for L
            mixing weights.
        norm: same shape, the Euclidean norm of each pair's mixed gradient.
    """

    inner: Tensor
    norm: Tensor


def cosine(inner: Tensor, norm: Tensor, reference_norm: Tensor) -> Tensor:
    """Cosine of gradients from their inner product with the reference and the two norms.

    It is 0 where a gradient is zero, and NaN where the inner product or the norm is. Neither the norms' product nor
    their squares are formed, which may leave the dtype's range where the norms do not.

    Args:
        inner: any shape, inner products with the reference.
        norm: same shape, norms of the gradients.
        reference_norm: scalar tensor, norm of the reference.
    """
    zero = (norm == 0) | (reference_norm == 0)
    return torch.div(inner, norm).div_(reference_norm).masked_fill_(zero, 0).clamp_(-1.0, 1.0)


def length(vector: Tensor) -> Tensor:
    """Euclidean norm, (), of a tensor of any shape and size: no square leaves the dtype's range."""
    largest = largest_of(vector)
    norm: Tensor = largest * torch.linalg.vector_norm(vector / torch.where(largest == 0, 1, largest))
    return norm


def largest_of(values: Tensor) -> Tensor:
    """Largest magnitude, (); 0 of nothing."""
    if values.numel() == 0:
        return values.new_zeros(())
    least, most = torch.aminmax(values)
    return torch.maximum(least.neg(), most)


def project(features: Tensor, reference: Tensor) -> Tensor:
    """U = [h; 1] G^T, (N, C)."""
    if has_bias(features, reference):
        return torch.addmm(reference[:, -1], features, reference[:, :-1].T)
    return features @ reference.T


def has_bias(features: Tensor, reference: Tensor) -> bool:
    """Whether a reference gradient has a bias column beside those of the features."""
    return reference.shape[1] == features.shape[1] + 1


def check_precision(precision: str) -> None:
    """Raise ValueError unless ``precision`` is one of :data:`PRECISIONS`."""
    check_choice("precision", precision, PRECISIONS)


def check_features_and_logits(features: Tensor, logits: Tensor, suffix: str = "") -> None:
    """Raise TypeError or ValueError unless both are floating-point matrices of one row for each sample.

    Args:
        features: (N, d), the inputs of the last layer.
        logits: (N, C), its outputs.
        suffix: of both arguments' names in errors.
    """
    for name, value in (("features", features), ("logits", logits)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}{suffix}: got {type(value).__name__}, expected a tensor")
        if value.ndim != 2:
            raise ValueError(f"{name}{suffix}: got shape {tuple(value.shape)}, expected two dimensions")
        if not value.is_floating_point():
            raise TypeError(f"{name}{suffix}: got dtype {value.dtype}, expected a floating-point dtype")
    if logits.shape[1] == 0:
        raise ValueError(f"logits{suffix}: got no classes, expected at least one")
    if len(features) != len(logits):
        raise ValueError(f"logits{suffix}: got {len(logits)} rows, expected {len(features)} as features{suffix}")


def check_reference(reference: Tensor, classes: int, width: int) -> None:
    """Raise ValueError unless a reference gradient is of a last layer of ``classes`` by ``width`` features."""
    if reference.ndim != 2 or reference.shape[0] != classes or reference.shape[1] not in (width, width + 1):
        raise ValueError(
            f"reference: got shape {tuple(reference.shape)}, expected ({classes}, {width + 1}), "
            f"or ({classes}, {width}) for a last layer without bias"
        )


def as_lams(lam: float | Tensor, device: torch.device) -> Tensor:
    """Checked mixing weights as (L,) on ``device``, in float64 where it has that.

    Raises:
        TypeError, ValueError: not a number, or not a floating-point tensor () or (L,), or a weight outside [0, 1].
    """
    dtype = exact_dtype(device)
    if not isinstance(lam, Tensor):
        check_lam(lam)
        # A fill takes the number along with its launch; a copy from the host would be waited for.
        return torch.full((1,), float(lam), dtype=dtype, device=device)
    if not lam.is_floating_point():
        raise TypeError(f"lam: got dtype {lam.dtype}, expected a floating-point dtype")
    if lam.ndim > 1 or lam.numel() == 0:
        raise ValueError(f"lam: got shape {tuple(lam.shape)}, expected () or (L,)")
    if not torch.compiler.is_compiling() and can_sync(lam.device):
        for value in lam.reshape(-1).tolist():
            check_lam(value)
    return lam.reshape(-1).to(device=device, dtype=dtype)


def check_lam(lam: float) -> None:
    """Raise unless ``lam`` is a number in [0, 1]."""
    if isinstance(lam, bool) or not isinstance(lam, (int, float)):
        raise TypeError(f"lam: got {type(lam).__name__}, expected a float in [0, 1]")
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam: got {lam}, expected a number in [0, 1]")
