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

It is exact. For class indices as labels, the two labels' own classes are left out of the products (their entries of A
and B are zero) and added afterwards, pair by pair, in the log domain. This costs nothing, and it removes the
cancellation in softmax(z) - y: the residual of a well-fitted pair keeps its relative accuracy in float32, and a label's
logit, however large, can neither overflow nor drown the others.

A product of two exponentials can underflow where the rows favour different classes by a large margin. Such pairs are
found by their Z and recomputed from their logits in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gradmix.ops.backends import Backend, Operator
from gradmix.ops.dtypes import work_dtype
from gradmix.ops.labels import check_labels, dense_labels

UNDERFLOW = 1e-12
"""Pairs whose Z (relative to its own largest possible term) is below this are recomputed in float64.

Products below float32's smallest number, 1e-38, are lost; relative to Z^2 (the scale of the squared probabilities) that
is at most 1e-14 here, far below float32's own rounding."""

EXACT_ELEMENTS = 1 << 22
"""Elements of the largest temporary while pairs are recomputed (32 MiB of float64)."""


class MixedAlignment(NamedTuple):
    """Inner products and gradient norms of all pairs.

    Attributes:
        inner: (N, M), the inner product of each pair's mixed gradient with the reference gradient.
        norm: (N, M), the Euclidean norm of each pair's mixed gradient.
    """

    inner: Tensor
    norm: Tensor


def cosine(inner: Tensor, norm: Tensor, reference_norm: Tensor) -> Tensor:
    """Cosine of gradients from their inner product with the reference and the two norms.

    It is 0 where a gradient is zero, and NaN where the inner product or the norm is.

    Args:
        inner: any shape, inner products with the reference.
        norm: same shape, norms of the gradients.
        reference_norm: scalar tensor, norm of the reference.
    """
    scale = norm * reference_norm
    return torch.where(scale == 0, torch.zeros_like(inner), inner / scale).clamp_(-1.0, 1.0)


# ------------------------------------------------------------------------------------------------------------ reference


def mixed_alignment_reference(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lam: float,
) -> MixedAlignment:
    """The formula, pair by pair; slow. Arguments and result as :func:`mixed_alignment`."""
    dtype = work_dtype(features_a.dtype)
    classes = logits_a.shape[1]
    mu = 1.0 - lam
    h_a, h_b = _append_one(features_a.to(dtype), reference), _append_one(features_b.to(dtype), reference)
    z_a, z_b = logits_a.to(dtype), logits_b.to(dtype)
    y_a, y_b = dense_labels(labels_a, classes, dtype), dense_labels(labels_b, classes, dtype)
    grad_reference = reference.to(dtype)
    inner = h_a.new_empty(len(h_a), len(h_b))
    norm = torch.empty_like(inner)
    for i in range(len(h_a)):
        for j in range(len(h_b)):
            h = lam * h_a[i] + mu * h_b[j]
            z = lam * z_a[i] + mu * z_b[j]
            y = lam * y_a[i] + mu * y_b[j]
            gradient = torch.outer(torch.softmax(z, 0) - y, h)
            inner[i, j] = (gradient * grad_reference).sum()
            norm[i, j] = gradient.norm()
    return MixedAlignment(inner, norm)


# ----------------------------------------------------------------------------------------------------------- factorised


def mixed_alignment_torch(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lam: float,
) -> MixedAlignment:
    """The factorised form in plain torch: four matrix products. Arguments and result as :func:`mixed_alignment`."""
    dtype = work_dtype(features_a.dtype)
    same_rows = features_a is features_b and logits_a is logits_b
    with torch.autocast(features_a.device.type, enabled=False):
        grad_reference = reference.to(dtype)
        h_a = features_a.to(dtype)
        h_b = h_a if same_rows else features_b.to(dtype)
        z_a = logits_a.to(dtype)
        z_b = z_a if same_rows else logits_b.to(dtype)
        u_a = _project(h_a, grad_reference)
        u_b = u_a if same_rows else _project(h_b, grad_reference)
        if labels_a.is_floating_point() or labels_b.is_floating_point():
            classes = logits_a.shape[1]
            y_a, y_b = dense_labels(labels_a, classes, dtype), dense_labels(labels_b, classes, dtype)
            inner, residual, z_sum = _soft_labels(z_a, u_a, y_a, z_b, u_b, y_b, lam)
        else:
            y_a, y_b = labels_a, labels_b
            inner, residual, z_sum = _hard_labels(z_a, u_a, y_a, z_b, u_b, y_b, lam)
        lost = (z_sum < UNDERFLOW).nonzero()
        if len(lost):
            _recompute(inner, residual, lost, z_a, u_a, y_a, z_b, u_b, y_b, lam)
        norm = residual.clamp_(min=0).mul_(_mixed_square_norm(h_a, h_b, reference, lam)).sqrt_()
    return MixedAlignment(inner, norm)


def _hard_labels(
    z_a: Tensor, u_a: Tensor, y_a: Tensor, z_b: Tensor, u_b: Tensor, y_b: Tensor, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    """<r, u>, ||r||^2 and Z for class indices; all (N, M).

    The products run over the classes that are neither row's label; ``own`` and ``other`` are the two labels' terms.
    """
    mu = 1.0 - lam
    dtype, exact = z_a.dtype, _exact_dtype(z_a)
    a, top_a = _exponentials(z_a, lam, y_a)
    b, top_b = _exponentials(z_b, mu, y_b)
    rest = a @ b.T
    rest_u = torch.addmm((a * u_a) @ b.T, a, (b * u_b).T, beta=lam, alpha=mu)
    rest_square = a.square() @ b.square().T

    # Logits of 1e4 leave float32 no digits for their differences, so these few (N, M) sums are taken in float64.
    same_rows = z_a is z_b and y_a is y_b
    z_own_a, z_a_at_b, z_b_at_a, z_own_b = (v.to(exact) for v in _at_labels(z_a, y_a, z_b, y_b, same_rows))
    log_own = (lam * z_own_a)[:, None] + mu * z_b_at_a
    log_other = lam * z_a_at_b + mu * z_own_b
    log_rest = (lam * top_a.to(exact))[:, None] + mu * top_b.to(exact)
    shift = torch.maximum(torch.maximum(log_own, log_other), log_rest)
    same = y_a[:, None] == y_b
    own = torch.exp((log_own - shift).to(dtype))
    other = torch.exp((log_other - shift).to(dtype)).masked_fill_(same, 0)
    scale = torch.exp((log_rest - shift).to(dtype))

    z_sum = scale * rest + own + other
    scale = scale / z_sum
    u_own_a, u_a_at_b, u_b_at_a, u_own_b = _at_labels(u_a, y_a, u_b, y_b, same_rows)
    u_own = (lam * u_own_a)[:, None] + mu * u_b_at_a
    u_other = lam * u_a_at_b + mu * u_own_b
    # Two rows of one class: p - 1 is minus the rest's probability, which has no cancellation.
    residual_own = torch.where(same, -scale * rest, own / z_sum - lam)
    residual_other = (other / z_sum - mu).masked_fill_(same, 0)

    inner = scale * rest_u + residual_own * u_own + residual_other * u_other
    residual = scale.square() * rest_square + residual_own.square() + residual_other.square()
    return inner, residual, z_sum


def _at_labels(
    v_a: Tensor, y_a: Tensor, v_b: Tensor, y_b: Tensor, same_rows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entries of v at labels: v_a[i, y_i] (N,), v_a[i, y_j] (N, M), v_b[j, y_i] (N, M), v_b[j, y_j] (M,)."""
    a_at_b = v_a.index_select(1, y_b)
    if same_rows:
        own = a_at_b.diagonal()
        return own, a_at_b, a_at_b.T, own
    own_a, own_b = v_a.gather(1, y_a[:, None])[:, 0], v_b.gather(1, y_b[:, None])[:, 0]
    return own_a, a_at_b, v_b.index_select(1, y_a).T, own_b


def _soft_labels(
    z_a: Tensor, u_a: Tensor, y_a: Tensor, z_b: Tensor, u_b: Tensor, y_b: Tensor, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    """<r, u>, ||r||^2 and Z for label vectors of any kind; all (N, M)."""
    mu = 1.0 - lam
    a, _ = _exponentials(z_a, lam)
    b, _ = _exponentials(z_b, mu)
    z_sum = a @ b.T
    p_u = torch.addmm((a * u_a) @ b.T, a, (b * u_b).T, beta=lam, alpha=mu) / z_sum
    p_square = (a.square() @ b.square().T) / z_sum.square()
    p_y = torch.addmm((a * y_a) @ b.T, a, (b * y_b).T, beta=lam, alpha=mu) / z_sum
    y_u = (
        (lam * lam * (y_a * u_a).sum(1))[:, None]
        + lam * mu * (y_a @ u_b.T + u_a @ y_b.T)
        + mu * mu * (y_b * u_b).sum(1)
    )
    y_square = (lam * lam * y_a.square().sum(1))[:, None] + 2 * lam * mu * (y_a @ y_b.T) + mu * mu * y_b.square().sum(1)
    return p_u - y_u, p_square - 2 * p_y + y_square, z_sum


def _exponentials(z: Tensor, weight: float, leave_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """exp(weight (z - top)) and each row's top; class ``leave_out[i]`` of row i is 0 and no candidate for the top."""
    if leave_out is None:
        top = z.amax(1)
        return torch.exp(weight * (z - top[:, None])), top
    label = leave_out[:, None]
    if z.shape[1] == 1:  # no other class
        return torch.zeros_like(z), torch.zeros_like(z[:, 0])
    top = z.scatter(1, label, -math.inf).amax(1)
    return torch.exp(weight * (z - top[:, None])).scatter_(1, label, 0.0), top


def _recompute(
    inner: Tensor,
    residual: Tensor,
    pairs: Tensor,
    z_a: Tensor,
    u_a: Tensor,
    y_a: Tensor,
    z_b: Tensor,
    u_b: Tensor,
    y_b: Tensor,
    lam: float,
) -> None:
    """Overwrite ``inner`` and ``residual`` at ``pairs`` (K, 2) by the softmax of the mixed logits, in float64."""
    mu = 1.0 - lam
    classes = z_a.shape[1]
    exact = _exact_dtype(z_a)
    for chunk in pairs.split(max(1, EXACT_ELEMENTS // classes)):
        i, j = chunk.unbind(1)
        p = torch.softmax(lam * z_a[i].to(exact) + mu * z_b[j].to(exact), 1)
        r = p - lam * dense_labels(y_a[i], classes, exact) - mu * dense_labels(y_b[j], classes, exact)
        u = lam * u_a[i].to(exact) + mu * u_b[j].to(exact)
        inner[i, j] = (r * u).sum(1).to(inner.dtype)
        residual[i, j] = r.square().sum(1).to(residual.dtype)


def _mixed_square_norm(h_a: Tensor, h_b: Tensor, reference: Tensor, lam: float) -> Tensor:
    """||lam [h_i; 1] + mu [h_j; 1]||^2 for all pairs, (N, M); the 1 only where the reference has a bias column."""
    mu = 1.0 - lam
    square_a = h_a.square().sum(1)
    square_b = square_a if h_a is h_b else h_b.square().sum(1)
    mixed = torch.addmm((lam * lam * square_a)[:, None] + mu * mu * square_b, h_a, h_b.T, alpha=2 * lam * mu)
    return mixed.clamp_(min=0) + float(_has_bias(h_a, reference))


def _project(features: Tensor, reference: Tensor) -> Tensor:
    """U = [h; 1] G^T, (N, C)."""
    if _has_bias(features, reference):
        return torch.addmm(reference[:, -1], features, reference[:, :-1].T)
    return features @ reference.T


def _has_bias(features: Tensor, reference: Tensor) -> bool:
    return reference.shape[1] == features.shape[1] + 1


def _append_one(features: Tensor, reference: Tensor) -> Tensor:
    return torch.nn.functional.pad(features, (0, 1), value=1.0) if _has_bias(features, reference) else features


def _exact_dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64  # MPS has no float64


# -------------------------------------------------------------------------------------------- dispatch and registration

OPERATOR = Operator(
    "mixed_alignment",
    (Backend("torch", mixed_alignment_torch), Backend("reference", mixed_alignment_reference)),
)


@torch.library.custom_op("gradmix::mixed_alignment", mutates_args=())
def _mixed_alignment_op(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lam: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (features_a, logits_a, labels_a, features_b, logits_b, labels_b, reference, lam)
    inner, norm = OPERATOR.choose(backend, *arguments).run(*arguments)
    return inner, norm


@_mixed_alignment_op.register_fake
def _(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lam: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (features_a.shape[0], features_b.shape[0])
    dtype = work_dtype(features_a.dtype)
    return features_a.new_empty(shape, dtype=dtype), features_a.new_empty(shape, dtype=dtype)


def mixed_alignment(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lam: float,
    *,
    backend: str = "auto",
) -> MixedAlignment:
    """Inner products with a reference gradient, and norms, of the last-layer gradients of all mixed pairs.

    For every i < N and j < M the features, logits and labels of row i of the first set and row j of the second are
    mixed with weight ``lam``; g = (softmax(z) - y) [h; 1]^T is the cross-entropy gradient of that mixture. See the
    module for the formula.

    Args:
        features_a: (N, d) float64, float32, float16 or bfloat16: the inputs of the last layer.
        logits_a: (N, C), finite: its outputs.
        labels_a: (N,) int64 class indices in [0, C), or (N, C) floating-point label vectors.
        features_b: (M, d).
        logits_b: (M, C).
        labels_b: (M,) int64 or (M, C) floating point.
        reference: (C, d + 1), weight and bias columns, or (C, d) for a last layer without bias.
        lam: the weight of the first set's row, in [0, 1].
        backend: ``"auto"``, ``"torch"`` or ``"reference"``.

    Returns:
        :class:`MixedAlignment` of two (N, M) tensors, float64 for float64 features and float32 otherwise.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes that do not fit, labels or ``lam`` out of range, or an unknown backend.

    >>> import torch
    >>> from gradmix.ops.mixed_alignment import mixed_alignment
    >>> h, z, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    >>> G = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> mixed_alignment(h, z, y, h, z, y, G, lam=0.5).inner
    tensor([[-0.5000,  0.0000],
            [ 0.0000,  1.0000]])
    """
    _check_rows("_a", features_a, logits_a, labels_a)
    _check_rows("_b", features_b, logits_b, labels_b)
    if features_b.shape[1] != features_a.shape[1]:
        raise ValueError(
            f"features_b: got {features_b.shape[1]} features a row, expected {features_a.shape[1]} as features_a"
        )
    if logits_b.shape[1] != logits_a.shape[1]:
        raise ValueError(f"logits_b: got {logits_b.shape[1]} classes, expected {logits_a.shape[1]} as logits_a")
    classes, width = logits_a.shape[1], features_a.shape[1]
    if reference.ndim != 2 or reference.shape[0] != classes or reference.shape[1] not in (width, width + 1):
        raise ValueError(
            f"reference: got shape {tuple(reference.shape)}, expected ({classes}, {width + 1}), "
            f"or ({classes}, {width}) for a last layer without bias"
        )
    check_lam(lam)
    return MixedAlignment(
        *_mixed_alignment_op(
            features_a, logits_a, labels_a, features_b, logits_b, labels_b, reference, float(lam), backend
        )
    )


def check_lam(lam: float) -> None:
    """Raise unless ``lam`` is a number in [0, 1]."""
    if isinstance(lam, bool) or not isinstance(lam, (int, float)):
        raise TypeError(f"lam: got {type(lam).__name__}, expected a float in [0, 1]")
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam: got {lam}, expected a number in [0, 1]")


def _check_rows(suffix: str, features: Tensor, logits: Tensor, labels: Tensor) -> None:
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
    check_labels(f"labels{suffix}", labels, len(features), logits.shape[1])
