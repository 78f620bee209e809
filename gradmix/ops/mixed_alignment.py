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
found by their Z and recomputed from their mixed logits. Both exponentials are scaled by 2^27, a power of two, which
leaves their digits alone and postpones the underflow: pairs are lost only where lam and mu times the two margins come
to more than 46.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from gradmix.ops import _triton
from gradmix.ops.backends import Backend, Operator
from gradmix.ops.dtypes import exact_dtype, work_dtype
from gradmix.ops.labels import check_labels, dense_labels
from gradmix.ops.waiting import look_is_free

SCALE = 2.0**27
"""Of A and of B. Sums of scaled squares, up to 2^108 a class, stay finite in float32 up to 2^19 classes."""

UNDERFLOW = 1e-20
"""Pairs whose Z (relative to its own largest possible term) is below this are recomputed.

What is lost first is the square of a single exponential, below 2^-126 / SCALE^2 = 2^-180. Relative to Z^2, the scale of
the squared probabilities, that is less than 2^-47 here, far below float32's own rounding."""

CLASSES_AT_A_TIME = 1 << 24
"""Elements of a temporary of rows by classes; more classes are taken in parts (64 MiB of float32)."""

EXACT_ELEMENTS = 1 << 22
"""Elements of the largest temporary while pairs are recomputed (32 MiB of float64)."""

LOST_ELEMENTS = 1 << 20
"""Pairs times classes that are recomputed in float64 where the host may not look how many there are.

So many pairs are always recomputed there, and more than these become NaN: not evaluated."""

Precision = Literal["ieee", "tf32x3", "tf32"]
"""Of the products in the Triton body: float32, or TF32 on the matrix units, in three products or one."""

PRECISIONS = get_args(Precision)


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


Weight: TypeAlias = float | Tensor
"""A mixing weight: a number, or a scalar float64 tensor where the host may not look at it."""


class _Side(NamedTuple):
    """One side's rows, cast, with what does not depend on the mixing weight.

    Attributes:
        h: (N, d) features.
        z: (N, C) logits.
        u: (N, C) [h; 1] G^T.
        y: (N,) class indices or (N, C) label vectors.
        top: (N,), each row's largest logit among the classes that are not its label.
        square: (N,) ||h||^2.
    """

    h: Tensor
    z: Tensor
    u: Tensor
    y: Tensor
    top: Tensor
    square: Tensor


def mixed_alignment_torch(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lams: Tensor,
    precision: Precision = "tf32x3",
) -> MixedAlignment:
    """The factorised form in plain torch: four matrix products. Arguments and result as the operator's.

    The products are as precise as torch's own setting has them; ``precision`` is the Triton body's.
    """
    dtype = work_dtype(features_a.dtype)
    same_rows = features_a is features_b and logits_a is logits_b and labels_a is labels_b
    with torch.autocast(features_a.device.type, enabled=False):
        grad_reference = reference.to(dtype)
        if labels_a.is_floating_point() != labels_b.is_floating_point():
            classes = logits_a.shape[1]
            labels_a, labels_b = (dense_labels(y, classes, dtype) for y in (labels_a, labels_b))
        a = _side(features_a, logits_a, labels_a, grad_reference)
        b = a if same_rows else _side(features_b, logits_b, labels_b, grad_reference)
        gram = a.h @ b.h.T
        bias = float(has_bias(a.h, grad_reference))
        size = len(lams), len(a.z), len(b.z)
        inner, norm = a.z.new_empty(size), a.z.new_empty(size)
        for k, lam in enumerate(_weights(lams)):
            sums = _soft_labels if a.y.is_floating_point() else _hard_labels
            products, residual, z_sum = sums(a, b, lam)
            products, residual = _without_losses(products, residual, z_sum, a, b, lam)
            mu = 1.0 - lam
            # lam^2 |h_a|^2 + 2 lam mu <h_a, h_b> + mu^2 |h_b|^2, and 1 for the bias
            mixed = _plus((lam * lam * a.square + bias)[:, None] + mu * mu * b.square, gram, 2 * lam * mu)
            inner[k] = products
            torch.sqrt(residual.clamp_(min=0).mul_(mixed.clamp_(min=bias)), out=norm[k])
    return MixedAlignment(inner, norm)


def _weights(lams: Tensor) -> Sequence[Weight]:
    return lams.tolist() if look_is_free(lams.device) else lams.unbind()


def _side(features: Tensor, logits: Tensor, labels: Tensor, reference: Tensor) -> _Side:
    h, z, y = features.to(reference.dtype), logits.to(reference.dtype), labels
    if y.is_floating_point():
        y = y.to(reference.dtype)
        top = z.amax(1)
    elif z.shape[1] == 1:  # no class is left
        top = torch.zeros_like(z[:, 0])
    else:
        top = z.scatter(1, y[:, None], -math.inf).amax(1)
    return _Side(h, z, project(h, reference), y, top, h.square().sum(1))


def _parts(a: _Side, b: _Side) -> Iterator[slice]:
    """The classes, so many at a time that a temporary of rows by classes is not too large."""
    classes = a.z.shape[1]
    step = max(1, CLASSES_AT_A_TIME // max(1, len(a.z), len(b.z)))
    for start in range(0, classes, step):
        yield slice(start, min(start + step, classes))


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total`` + left right^T, in place."""
    return left @ right.T if total is None else total.addmm_(left, right.T)


def _hard_labels(a: _Side, b: _Side, lam: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """<r, u>, ||r||^2 and Z for class indices; all (N, M).

    The products run over the classes that are neither row's label; ``own`` and ``other`` are the two labels' terms.
    """
    mu = 1.0 - lam
    dtype, exact = a.z.dtype, exact_dtype(a.z.device)
    rest = rest_a = rest_b = rest_square = None
    for part in _parts(a, b):
        e_a, e_b = _exponentials(a, lam, part), _exponentials(b, mu, part)
        rest = _added(rest, e_a, e_b)
        rest_a = _added(rest_a, e_a * a.u[:, part], e_b)
        rest_b = _added(rest_b, e_a, e_b * b.u[:, part])
        rest_square = _added(rest_square, e_a.square_(), e_b.square_())
    assert rest is not None and rest_a is not None and rest_b is not None and rest_square is not None
    rest_u = _plus(rest_a.mul_(lam), rest_b, mu)

    # Logits of 1e4 leave float32 no digits for their differences, so these few (N, M) sums are taken in float64.
    same_rows = a is b
    z_own_a, z_a_at_b, z_b_at_a, z_own_b = (v.to(exact) for v in _at_labels(a.z, a.y, b.z, b.y, same_rows))
    log_own = _plus((lam * z_own_a)[:, None], z_b_at_a, mu)
    log_other = _plus(mu * z_own_b, z_a_at_b, lam)
    log_rest = (lam * a.top.to(exact))[:, None] + mu * b.top.to(exact)
    shift = torch.maximum(torch.maximum(log_own, log_other), log_rest)
    same = a.y[:, None] == b.y
    own = log_own.sub_(shift).to(dtype).exp_()
    other = log_other.sub_(shift).to(dtype).exp_().masked_fill_(same, 0)
    scale = log_rest.sub_(shift).to(dtype).exp_()

    z_sum = torch.addcmul(own + other, scale, rest, value=SCALE**-2)
    scale.div_(z_sum).mul_(SCALE**-2)
    u_own_a, u_a_at_b, u_b_at_a, u_own_b = _at_labels(a.u, a.y, b.u, b.y, same_rows)
    u_own = _plus((lam * u_own_a)[:, None], u_b_at_a, mu)
    u_other = _plus(mu * u_own_b, u_a_at_b, lam)
    # Two rows of one class: p - 1 is minus the rest's probability, which has no cancellation.
    residual_own = torch.where(same, rest.mul_(scale).neg_(), own.div_(z_sum).sub_(lam))
    residual_other = other.div_(z_sum).sub_(mu).masked_fill_(same, 0)

    inner = rest_u.mul_(scale).addcmul_(residual_own, u_own).addcmul_(residual_other, u_other)
    # By the root, since the scale of the squares, and a well-fitted pair's own, leave float32's range if squared first.
    residual = rest_square.sqrt_().mul_(scale).square_()
    residual.addcmul_(residual_own, residual_own).addcmul_(residual_other, residual_other)
    return inner, residual, z_sum


def _plus(base: Tensor, x: Tensor, weight: Weight) -> Tensor:
    """``base`` + weight x, in one pass."""
    if isinstance(weight, Tensor):
        return torch.addcmul(base, x, weight.to(x.dtype))
    return torch.add(base, x, alpha=weight)


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


def _soft_labels(a: _Side, b: _Side, lam: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """<r, u>, ||r||^2 and Z for label vectors of any kind; all (N, M)."""
    mu = 1.0 - lam
    z_sum = u_a = u_b = y_a = y_b = square = None
    for part in _parts(a, b):
        e_a, e_b = _exponentials(a, lam, part), _exponentials(b, mu, part)
        z_sum = _added(z_sum, e_a, e_b)
        u_a, u_b = _added(u_a, e_a * a.u[:, part], e_b), _added(u_b, e_a, e_b * b.u[:, part])
        y_a, y_b = _added(y_a, e_a * a.y[:, part], e_b), _added(y_b, e_a, e_b * b.y[:, part])
        square = _added(square, e_a.square_(), e_b.square_())
    assert z_sum is not None and u_a is not None and u_b is not None
    assert y_a is not None and y_b is not None and square is not None
    p_u = _plus(u_a.mul_(lam), u_b, mu) / z_sum
    p_y = _plus(y_a.mul_(lam), y_b, mu) / z_sum
    # The scale of the squares leaves float32's range if it is squared as a whole.
    p_square = square * z_sum.reciprocal().square_()
    y_u = (
        (lam * lam * (a.y * a.u).sum(1))[:, None]
        + lam * mu * (a.y @ b.u.T + a.u @ b.y.T)
        + mu * mu * (b.y * b.u).sum(1)
    )
    y_square = (lam * lam * a.y.square().sum(1))[:, None] + 2 * lam * mu * (a.y @ b.y.T) + mu * mu * b.y.square().sum(1)
    return p_u - y_u, p_square - 2 * p_y + y_square, z_sum.mul_(SCALE**-2)


def _exponentials(side: _Side, weight: Weight, part: slice) -> Tensor:
    """SCALE exp(weight (z - top)) of some classes; 0 for a row's label if that is a class index."""
    z = side.z[:, part]
    if side.y.is_floating_point():
        return z.sub(side.top[:, None]).mul_(weight).exp_().mul_(SCALE)
    width = z.shape[1]
    if width == side.z.shape[1]:
        label, room = side.y, 0
    else:
        # A label outside of these classes is written beside them.
        label, room = side.y - part.start, 1
        label = torch.where((label >= 0) & (label < width), label, width)
    e = z.new_empty(len(z), width + room)
    torch.sub(z, side.top[:, None], out=e[:, :width])
    # A label's logit may be so far above the others that its exponential is infinite, before it is put out.
    return e.mul_(weight).exp_().mul_(SCALE).scatter_(1, label[:, None], 0.0)[:, :width]


def _without_losses(
    inner: Tensor, residual: Tensor, z_sum: Tensor, a: _Side, b: _Side, lam: Weight
) -> tuple[Tensor, Tensor]:
    """``inner`` and ``residual``, recomputed where Z underflows."""
    lost = z_sum < UNDERFLOW
    classes = a.z.shape[1]
    if look_is_free(z_sum.device):
        pairs = lost.nonzero()
        for chunk in pairs.split(max(1, EXACT_ELEMENTS // classes)):
            i, j = chunk.unbind(1)
            inner[i, j], residual[i, j] = _exact(i, j, a, b, lam)
        return inner, residual
    # The first so many lost pairs, their number unknown to the host; the rest of ``place`` points one past the end.
    total = lost.numel()
    most = max(1, min(total, LOST_ELEMENTS // classes))
    lost = lost.flatten()
    slot = lost.cumsum(0).sub_(1)
    within = lost & (slot < most)
    number = torch.arange(total, device=lost.device)
    place = torch.full((most + 1,), total, device=lost.device)
    place = place.scatter_(0, torch.where(within, slot, most), torch.where(within, number, total))[:most]
    i, j = (v.clamp(max=n - 1) for v, n in ((place // len(b.z), len(a.z)), (place % len(b.z), len(b.z))))
    beyond = lost & ~within
    result = []
    for old, new in zip((inner, residual), _exact(i, j, a, b, lam), strict=True):
        flat = torch.cat([old.flatten(), old.new_zeros(1)]).scatter_(0, place, new)[:total]
        result.append(flat.masked_fill_(beyond, math.nan).view_as(old))
    return result[0], result[1]


def _exact(i: Tensor, j: Tensor, a: _Side, b: _Side, lam: Weight) -> tuple[Tensor, Tensor]:
    """<r, u> and ||r||^2 of the pairs (i, j), both (K,), by the softmax of the mixed logits, in float64."""
    mu = 1.0 - lam
    classes = a.z.shape[1]
    exact = exact_dtype(a.z.device)
    p = torch.softmax(lam * a.z[i].to(exact) + mu * b.z[j].to(exact), 1)
    r = p - lam * dense_labels(a.y[i], classes, exact) - mu * dense_labels(b.y[j], classes, exact)
    u = lam * a.u[i].to(exact) + mu * b.u[j].to(exact)
    return (r * u).sum(1).to(a.z.dtype), r.square().sum(1).to(a.z.dtype)


def project(features: Tensor, reference: Tensor) -> Tensor:
    """U = [h; 1] G^T, (N, C)."""
    if has_bias(features, reference):
        return torch.addmm(reference[:, -1], features, reference[:, :-1].T)
    return features @ reference.T


def has_bias(features: Tensor, reference: Tensor) -> bool:
    """Whether a reference gradient has a bias column beside those of the features."""
    return reference.shape[1] == features.shape[1] + 1


def _append_one(features: Tensor, reference: Tensor) -> Tensor:
    return torch.nn.functional.pad(features, (0, 1), value=1.0) if has_bias(features, reference) else features


# -------------------------------------------------------------------------------------------- dispatch and registration


def _run_reference(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lams: Tensor,
    precision: Precision = "tf32x3",
) -> MixedAlignment:
    """:func:`mixed_alignment_reference` for every mixing weight."""
    arguments = (features_a, logits_a, labels_a, features_b, logits_b, labels_b, reference)
    dtype = work_dtype(features_a.dtype)
    result = features_a.new_empty(2, len(lams), len(features_a), len(features_b), dtype=dtype)
    for k, lam in enumerate(lams.tolist()):
        result[0, k], result[1, k] = mixed_alignment_reference(*arguments, lam)
    return MixedAlignment(result[0], result[1])


def mixed_alignment_triton(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lams: Tensor,
    precision: Precision = "tf32x3",
) -> MixedAlignment:
    """The factorised form in one kernel, after U by torch. Arguments and result as the operator's."""
    from gradmix.kernels import mixed_alignment as kernel

    with torch.autocast(features_a.device.type, enabled=False):
        grad_reference = reference.float()
        bias = has_bias(features_a, reference)
        u_a = project(features_a.float(), grad_reference)
        u_b = u_a if features_a is features_b else project(features_b.float(), grad_reference)
    if labels_a.is_floating_point() != labels_b.is_floating_point():
        labels_a, labels_b = (dense_labels(y, logits_a.shape[1], torch.float32) for y in (labels_a, labels_b))
    return MixedAlignment(
        *kernel.mixed_alignment(
            features_a,
            logits_a,
            labels_a,
            u_a,
            features_b,
            logits_b,
            labels_b,
            u_b,
            lams,
            bias=bias,
            precision=precision,
        )
    )


def _triton_can_run(features_a: Tensor, logits_a: Tensor, *_rest: object) -> str | None:
    return _triton.can_run(features_a, logits_a)


OPERATOR = Operator(
    "mixed_alignment",
    (
        Backend(
            "triton",
            mixed_alignment_triton,
            can_run=_triton_can_run,
            worth=_triton.not_measured,
            available=_triton.unavailable_reason,
        ),
        Backend("torch", mixed_alignment_torch),
        Backend("reference", _run_reference),
    ),
)


@torch.library.custom_op("gradmix::mixed_alignment", mutates_args=())
def mixed_alignment_op(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lams: Tensor,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The registered operator, which checks nothing: ``lams`` (L,) float64, results (L, N, M)."""
    arguments = (features_a, logits_a, labels_a, features_b, logits_b, labels_b, reference, lams, precision)
    inner, norm = OPERATOR.choose(backend, *arguments).run(*arguments)
    return inner, norm


@mixed_alignment_op.register_fake
def _(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lams: Tensor,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (lams.shape[0], features_a.shape[0], features_b.shape[0])
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
    lam: float | Tensor,
    *,
    precision: Precision = "tf32x3",
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
        lam: the weight of the first set's row, in [0, 1]; or a tensor of one weight (), or of L of them (L,), which
            share what does not depend on the weight.
        precision: of the Triton body's products: ``"ieee"``, ``"tf32x3"`` (about as precise, on the matrix units) or
            ``"tf32"`` (ten bits). The torch body follows ``torch.backends.cuda.matmul``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

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
    check_reference(reference, classes, width)
    check_precision(precision)
    lams = as_lams(lam, features_a.device)
    inner, norm = mixed_alignment_op(
        features_a, logits_a, labels_a, features_b, logits_b, labels_b, reference, lams, precision, backend
    )
    if isinstance(lam, Tensor) and lam.ndim == 1:
        return MixedAlignment(inner, norm)
    return MixedAlignment(inner[0], norm[0])


def check_precision(precision: str) -> None:
    """Raise ValueError unless ``precision`` is one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(map(repr, PRECISIONS))}")


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
    if not torch.compiler.is_compiling() and not lam.is_cuda:
        for value in lam.reshape(-1).tolist():
            check_lam(value)
    return lam.reshape(-1).to(device=device, dtype=dtype)


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
