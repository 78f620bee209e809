"""Alignment of the last-layer gradient of mixed rows with a reference gradient, for all pairs of rows.

Row i has features h_i, logits z_i and label y_i. Mixed in feature space with weight lam (mu = 1 - lam), the pair (i, j)
has features h = lam h_i + mu h_j, logits z = lam z_i + mu z_j and label y = lam y_i + mu y_j. The cross-entropy
gradient with respect to the last layer's weight and bias is g = r [h; 1]^T with r = softmax(z) - y, and what is wanted
is

    inner[i, j] = <g, G>        norm[i, j] = ||g||

for a reference gradient G. :func:`mixed_alignment_reference` says exactly this, pair by pair.

The factorised form rests on exp(lam z_i + mu z_j) = exp(lam z_i) exp(mu z_j): with A = exp(lam z_a), B = exp(mu z_b)
and U = [h; 1] G^T, every sum over classes is a matrix product, so that no N x M x C tensor is formed:

    sum_c p_c        ~  A B^T                      sum_c p_c u_c  ~  lam (A*U_a) B^T + mu A (B*U_b)^T
    sum_c p_c^2      ~  A^2 (B^2)^T                all divided by Z = sum_c A B (squared for the last)

It is exact. Two things keep it so in float32 where rows are well fitted and softmax(z) - y all but vanishes:

- The two labels' own classes a and b are left out of the products (their entries of A and B are zero). With R the sum
  of the other classes' exponentials, their residuals are (D - lam R) / Z and -(D + mu R) / Z, where
  D = mu exp(z_a) - lam exp(z_b) is formed from its logarithms by expm1. There is no p - y in it. Two rows of one class
  have the residual -R / Z there.
- All of r is computed in units of its own size, and that size in the log domain. A size below what float32 can hold is
  held at its edge (:data:`LEAST`), so that the sign of the inner product and the cosine outlive it.

Label vectors y are their largest entry's one-hot vector e minus t = e - y, which is zero for one-hot vectors and small
for smoothed labels: r = (p - lam e_i - mu e_j) + lam t_i + mu t_j, of which the first part is the above. Pairs where
the two parts all but cancel are recomputed from their mixed logits in float64.

A product of two exponentials can underflow where the rows favour different classes by a large margin. Such pairs are
found by their R and recomputed too. Both exponentials are scaled by 2^27, a power of two, which leaves their digits
alone and postpones the underflow: pairs are lost only where lam and mu times the two margins come to more than 46.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.calibration.lookup import CalibratedWorth
from gradmix.ops import _triton
from gradmix.ops.backends import Backend, Operator
from gradmix.ops.dtypes import work_dtype
from gradmix.ops.labels import check_labels
from gradmix.ops.mixed_alignment.factorised import mixed_alignment_torch
from gradmix.ops.mixed_alignment.native import (
    TRITON_AXES,
    cpp_can_run,
    mixed_alignment_cpp,
    mixed_alignment_triton,
    triton_can_run,
    triton_extent,
)
from gradmix.ops.mixed_alignment.reference import mixed_alignment_reference, run_reference
from gradmix.ops.mixed_alignment.residuals import beside_one_hot, mixed_residual
from gradmix.ops.mixed_alignment.scaling import in_range, unit_of
from gradmix.ops.mixed_alignment.sides import Side, accept_tensors, on_sides
from gradmix.ops.mixed_alignment.values import (
    MixedAlignment,
    Precision,
    Weight,
    as_lams,
    check_features_and_logits,
    check_lam,
    check_precision,
    check_reference,
    cosine,
    has_bias,
    largest_of,
    length,
    project,
)
from gradmix.ops.registration import register

__all__ = [
    "OPERATOR",
    "MixedAlignment",
    "Precision",
    "Side",
    "Weight",
    "accept_tensors",
    "as_lams",
    "beside_one_hot",
    "check_features_and_logits",
    "check_lam",
    "check_precision",
    "check_reference",
    "cosine",
    "cpp_can_run",
    "has_bias",
    "in_range",
    "largest_of",
    "length",
    "mixed_alignment",
    "mixed_alignment_cpp",
    "mixed_alignment_op",
    "mixed_alignment_reference",
    "mixed_alignment_torch",
    "mixed_residual",
    "on_sides",
    "project",
    "unit_of",
]

OPERATOR = Operator(
    "mixed_alignment",
    (
        Backend(
            "triton",
            on_sides(mixed_alignment_triton),
            can_run=triton_can_run,
            worth=CalibratedWorth("mixed_alignment", "triton", TRITON_AXES, triton_extent),
            available=_triton.unavailable_reason,
        ),
        Backend("cpp", on_sides(mixed_alignment_cpp), can_run=cpp_can_run, available=_extension.unavailable_reason),
        Backend("torch", on_sides(mixed_alignment_torch)),
        Backend("reference", on_sides(run_reference)),
    ),
)


def _fake(features_a: Tensor, logits_a: Tensor, labels_a: Tensor, features_b: Tensor, *rest: Any) -> MixedAlignment:
    lams, norms = rest[3], rest[4]
    shape, dtype = (lams.shape[0], features_a.shape[0], features_b.shape[0]), work_dtype(features_a.dtype)
    inner = features_a.new_empty(shape, dtype=dtype)
    return MixedAlignment(inner, torch.empty_like(inner) if norms else inner.new_empty(0))


mixed_alignment_op = register(
    OPERATOR,
    "(Tensor features_a, Tensor logits_a, Tensor labels_a, Tensor features_b, Tensor logits_b, Tensor labels_b, "
    "Tensor reference, Tensor lams, bool norms, str precision, str backend) -> (Tensor, Tensor)",
    _fake,
)
"""The registered operator, which checks nothing: ``lams`` (L,) float64, results (L, N, M).

Without ``norms``, the second result is empty (0,)."""


@accept_tensors("_a", "_b")
def mixed_alignment(
    a: Side,
    b: Side,
    reference: Tensor,
    lam: float | Tensor,
    *,
    precision: Precision = "tf32x3",
    backend: str = "auto",
) -> MixedAlignment:
    """Inner products with a reference gradient, and norms, of the last-layer gradients of all mixed pairs.

    For every i < N and j < M the features, logits and labels of row i of ``a`` and row j of ``b`` are mixed with weight
    ``lam``; g = (softmax(z) - y) [h; 1]^T is the cross-entropy gradient of that mixture. See the
    module for the formula.

    Args:
        a: N samples: their features, logits and labels, which errors call ``features_a``, ``logits_a``, ``labels_a``.
        b: M samples, of as many features and classes.
        reference: (C, d + 1), weight and bias columns, or (C, d) for a last layer without bias.
        lam: the weight of the row of ``a``, in [0, 1]; or a tensor of one weight (), or of L of them (L,), which
            share what does not depend on the weight.
        precision: of the Triton body's products: ``"ieee"``, ``"tf32x3"`` (about as precise, on the matrix units) or
            ``"tf32"`` (ten bits). The torch body follows ``torch.backends.cuda.matmul``.
        backend: ``"auto"``, ``"triton"``, ``"cpp"``, ``"torch"`` or ``"reference"``.

    Returns:
        :class:`MixedAlignment` of two (N, M) tensors, or (L, N, M) for L weights, float64 for float64 features and
        float32 otherwise. On a GPU the torch body has room to recompute a limited number of underflowing pairs
        (:data:`LOST_ELEMENTS`); what goes beyond is NaN.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes that do not fit, labels or ``lam`` out of range, or an unknown precision or backend. Under
            torch.compile, and of a ``lam`` on a GPU, values are not looked at.
        RuntimeError: the backend named cannot run these tensors or is not available.

    >>> import torch
    >>> from gradmix.ops.mixed_alignment import Side, mixed_alignment
    >>> batch = Side(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    >>> G = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> mixed_alignment(batch, batch, G, lam=0.5).inner
    tensor([[-0.5000,  0.0000],
            [ 0.0000,  1.0000]])
    """
    _check_side("a", a)
    if not isinstance(b, Side) or not a.is_same(b):
        _check_side("b", b)
    classes, width = a.logits.shape[1], a.features.shape[1]
    if b.features.shape[1] != width:
        raise ValueError(f"features_b: got {b.features.shape[1]} features a row, expected {width} as features_a")
    if b.logits.shape[1] != classes:
        raise ValueError(f"logits_b: got {b.logits.shape[1]} classes, expected {classes} as logits_a")
    check_reference(reference, classes, width)
    check_precision(precision)
    lams = as_lams(lam, a.features.device)
    inner, norm = mixed_alignment_op(*a, *b, reference, lams, True, precision, backend)
    if isinstance(lam, Tensor) and lam.ndim == 1:
        return MixedAlignment(inner, norm)
    return MixedAlignment(inner[0], norm[0])


def _check_side(name: str, side: Side) -> None:
    if not isinstance(side, Side):
        raise TypeError(f"{name}: got {type(side).__name__}, expected a Side of features, logits and labels")
    check_features_and_logits(side.features, side.logits, f"_{name}")
    check_labels(f"labels_{name}", side.labels, len(side.features), side.logits.shape[1])
