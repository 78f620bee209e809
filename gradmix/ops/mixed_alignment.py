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

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.ops import _triton
from gradmix.ops.backends import Backend, Operator
from gradmix.ops.capsules import as_capsules
from gradmix.ops.dtypes import exact_dtype, work_dtype
from gradmix.ops.labels import check_labels, class_of, dense_labels
from gradmix.ops.registration import register
from gradmix.runtime.deferred_checks import can_sync

SCALE = 2.0**27
"""Of A and of B. Sums of scaled squares, up to 2^108 a class, stay finite in float32 up to 2^19 classes."""

UNDERFLOW = 1e-20
"""Pairs whose R (relative to its own largest possible term) is below this are recomputed if R matters.

What is lost first is the square of a single exponential, below 2^-126 / SCALE^2 = 2^-180. Relative to R^2 that is less
than 2^-47 here, far below float32's own rounding."""

NEGLIGIBLE = 20.0
"""R does not matter below exp(-NEGLIGIBLE) of the labels' own terms."""

CANCELLED = 1 / 16
"""Pairs whose ||r||^2 is below this share of its parts' are recomputed: label vectors that the rows fit well."""

MODERATE_LOGITS = 40.0
"""Logits that mix to a range up to this have exponentials whose products float32 can hold: no logarithm is needed."""

CLOSE = 1e-6
"""D from such products is refused if a pair's residual is below this share: float64 leaves it 1e-8 of itself."""

MODERATE = 1e6
"""Features and references of entries up to this, or down to its inverse, are left in their units."""

LEAST = {torch.float32: 1e-32, torch.float64: 1e-150}
"""Gradients are held at this size: the residual at this, divided by the largest entry of U."""

CLASSES_AT_A_TIME = 1 << 24
"""Elements of a temporary of rows by classes; more classes are taken in parts (64 MiB of float32)."""

CACHED = 1 << 16
"""Elements of a temporary in float64 that stays in a processor's cache."""

EXACT_ELEMENTS = 1 << 22
"""Elements of the largest temporary while pairs are recomputed (32 MiB of float64)."""

LOST_ELEMENTS = 1 << 20
"""Pairs times classes that are recomputed in float64 where the host may not look how many there are.

So many pairs are always recomputed there, and more than these become NaN: not evaluated."""

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
    return (inner / norm / reference_norm).masked_fill_(zero, 0).clamp_(-1.0, 1.0)


def length(vector: Tensor) -> Tensor:
    """Euclidean norm, (), of a tensor of any shape and size: no square leaves the dtype's range."""
    largest = largest_of(vector)
    norm: Tensor = largest * torch.linalg.vector_norm(vector / torch.where(largest == 0, 1, largest))
    return norm


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
    """The formula, pair by pair, in float64; slow. Arguments and result as :func:`mixed_alignment`."""
    dtype = work_dtype(features_a.dtype)
    mu = 1.0 - lam
    least = in_range(features_a, features_b, reference, dtype)[-1].least
    h_a, h_b = (_append_one(features.double(), reference) for features in (features_a, features_b))
    z_a, z_b = logits_a.double(), logits_b.double()
    grad_reference = reference.double()
    inner = h_a.new_empty(len(h_a), len(h_b))
    norm = torch.empty_like(inner)
    for i in range(len(h_a)):
        for j in range(len(h_b)):
            h = lam * h_a[i] + mu * h_b[j]
            z = lam * z_a[i] + mu * z_b[j]
            r = mixed_residual(z[None], labels_a[i : i + 1], labels_b[j : j + 1], lam, least)[0]
            gradient = torch.outer(r, h)
            inner[i, j] = (gradient * grad_reference).sum()
            norm[i, j] = length(gradient)
    return MixedAlignment(inner.to(dtype), norm.to(dtype))


def mixed_residual(logits: Tensor, labels_a: Tensor, labels_b: Tensor, lam: Weight, least: Weight = 0.0) -> Tensor:
    """softmax(z) - lam y_a - mu y_b without cancellation, (K, C), of pairs whose mixed logits are known.

    Args:
        logits: (K, C) z, float64 (or :func:`exact_dtype`).
        labels_a: (K,) class indices or (K, C) label vectors.
        labels_b: likewise.
        lam: weight of ``labels_a``.
        least: residuals whose largest entry would be smaller are made as large as this.
    """
    mu = 1.0 - lam
    own, other = class_of(labels_a)[:, None], class_of(labels_b)[:, None]
    rest = logits.scatter(1, own, -math.inf).scatter_(1, other, -math.inf)
    top = rest.amax(1, keepdim=True)
    top = torch.where(top == -math.inf, 0, top)  # no other class is there
    exponential = torch.exp(rest - top)
    total = exponential.sum(1, keepdim=True)
    at_own, at_other = (logits.gather(1, y).sub_(top) for y in (own, other))
    terms = _terms(at_own, at_other, 0.0, total, (own != other).to(logits.dtype), lam)
    r = exponential.mul_(terms.scale)
    r = r.scatter_(1, own, terms.own).scatter_add_(1, other, terms.other)
    r = r.mul_(terms.size.clamp_(min=torch.finfo(r.dtype).tiny))
    for labels, weight in ((labels_a, lam), (labels_b, mu)):
        if labels.is_floating_point():
            r = _plus(r, beside_one_hot(labels.to(logits.dtype)), weight)
    largest = r.abs().amax(1, keepdim=True)
    return r.mul_((least / largest.masked_fill_(largest == 0, 1)).clamp_(min=1))


def beside_one_hot(labels: Tensor) -> Tensor:
    """(N, C) t = e - y: what label vectors lack to the one-hot vectors of their largest entries."""
    return dense_labels(class_of(labels), labels.shape[1], labels.dtype).sub_(labels)


class _Terms(NamedTuple):
    """Residuals of pairs, divided by ``size``; all of one shape.

    Attributes:
        own: of the first label's class. If that is the second's too, it is the sum of both.
        other: of the second label's class; 0 if that is the first's.
        scale: what the other classes' exponentials are multiplied by to give theirs.
        size: the unit: about the larger of the labels' part and the other classes' probability.
    """

    own: Tensor
    other: Tensor
    scale: Tensor
    size: Tensor


def _terms(log_own: Tensor, log_other: Tensor, log_unit: float, rest: Tensor, different: Tensor, lam: Weight) -> _Terms:
    """The residuals of any pairs without cancellation, with ``size`` in float64; the two logarithms are used up.

    Args:
        log_own: logarithm of the first label's exponential, in float64.
        log_other: of the second label's.
        log_unit: of the unit that ``rest`` is in.
        rest: R, the sum of the other classes' exponentials.
        different: 0 where both labels are one class, else 1.
        lam: weight of the first label.
    """
    mu, dtype = 1.0 - lam, rest.dtype
    apart = different.to(log_own.dtype).log()
    first, second = log_own + _log(mu), log_other + _log(lam)
    # D = mu exp(own) - lam exp(other): its larger term times 1 - exp(-|the logarithm of their ratio|), and a sign.
    larger = torch.maximum(first, second).add_(apart)
    ratio = first.sub_(second).to(dtype)
    # A unit may be rounded; what is measured in it may not.
    unit = torch.maximum(larger, rest.log().to(log_own.dtype).add_(log_unit)).clamp_(min=-1e30)
    difference = ratio.abs().neg_().expm1_().mul_(ratio.sign_()).mul_(larger.sub_(unit).to(dtype).exp_())
    # Without other classes, or of an R that is lost, it is no number.
    scale = (log_unit - unit).exp_().clamp_(max=1e35).to(dtype)
    share = rest * scale
    size = log_own.sub_(unit).exp_().add_(log_other.sub_(unit).add_(apart).exp_()).add_(share).reciprocal_()
    other = _plus(difference, share * different, -mu)
    return _Terms((share + other).neg_(), other, scale, size)


def _moderate_terms(
    own: Tensor, other: Tensor, unit: float, rest: Tensor, different: Tensor, lam: float, classes: int
) -> _Terms | None:
    """:func:`_terms` in float32 from exponentials, or None if a pair needs the logarithms; the host looks.

    Args:
        own: the first label's exponential, in float64; it is used up, as are ``other`` and ``rest`` but for None.
        other: the second label's.
        unit: of ``rest``.
        rest: R.
        different: 0 where both labels are one class, else 1.
        lam: weight of the first label.
        classes: C.
    """
    if classes < 2 or (classes > 2 and not float(rest.amin()) * unit >= UNDERFLOW):
        return None
    mu, dtype = 1.0 - lam, rest.dtype
    whole = torch.addcmul(own.to(dtype), other.to(dtype), different).add_(rest, alpha=unit)
    minus = other.mul_(lam).sub_(own, alpha=mu).to(dtype).mul_(different)  # -D
    share = rest * unit
    measure = torch.maximum(minus.abs(), share)
    size = torch.div(measure, whole, out=whole)
    if not float((size - different).amin()) >= CLOSE - 1:
        return None
    scale = measure.reciprocal_()
    share.mul_(scale)
    other = minus.mul_(scale).sub_(share * different, alpha=mu)
    return _Terms(share.add_(other).neg_(), other, scale.mul_(unit), size)


def _log(weight: Weight) -> Weight:
    if isinstance(weight, Tensor):
        return weight.log()
    return math.log(weight) if weight > 0 else -math.inf


# ----------------------------------------------------------------------------------------------------------- factorised


class _Side(NamedTuple):
    """One side's rows, cast and in range, with what does not depend on the mixing weight.

    Attributes:
        h: (N, d) features.
        z: (N, C) logits.
        u: (N, C) [h; 1] G^T.
        y: (N,) class indices; of label vectors those of their largest entries.
        labels: y, or (N, C) label vectors.
        t: (N, C) what label vectors lack to the one-hot vectors of y; None for class indices.
        top: (N,), each row's largest logit among the classes that are not y.
        square: (N,) ||h||^2.
        reach: the range of all logits; infinite where the host may not look.
    """

    h: Tensor
    z: Tensor
    u: Tensor
    y: Tensor
    labels: Tensor
    t: Tensor | None
    top: Tensor
    square: Tensor
    reach: float


def mixed_alignment_torch(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lams: Tensor,
    norms: bool = True,
    precision: Precision = "tf32x3",
) -> MixedAlignment:
    """The factorised form in plain torch: four matrix products. Arguments and result as the operator's.

    The products are as precise as torch's own setting has them; ``precision`` is the Triton body's.
    """
    dtype = work_dtype(features_a.dtype)
    same_rows = features_a is features_b and logits_a is logits_b and labels_a is labels_b
    with torch.autocast(features_a.device.type, enabled=False):
        h_a, h_b, grad_reference, units = in_range(features_a, features_b, reference, dtype)
        split_a, split_b = split_labels(labels_a, labels_b, logits_a.shape[1], dtype)
        a = _side(h_a, logits_a, *split_a, grad_reference)
        b = a if same_rows else _side(h_b, logits_b, *split_b, grad_reference)
        mutual = _mutual(a, b)
        gram = a.h @ b.h.T if norms else None
        bias = units.one * units.one * has_bias(a.h, grad_reference)
        size = len(lams), len(a.z), len(b.z)
        inner, norm = a.z.new_empty(size), a.z.new_empty(size if norms else 0)
        for k, lam in enumerate(_weights(lams)):
            products, residual = _pairs(a, b, mutual, lam, units, norms)
            mu = 1.0 - lam
            inner[k] = products
            if gram is None:
                continue
            # lam^2 |h_a|^2 + 2 lam mu <h_a, h_b> + mu^2 |h_b|^2, and 1 for the bias
            mixed = _plus((lam * lam * a.square + bias)[:, None] + mu * mu * b.square, gram, 2 * lam * mu)
            torch.mul(residual, mixed.clamp_(min=0).sqrt_(), out=norm[k])
        return MixedAlignment(inner, norm)


def _weights(lams: Tensor) -> Sequence[Weight]:
    return lams.tolist() if can_sync(lams.device) else lams.unbind()


class _Mutual(NamedTuple):
    """What pairs of rows have that does not depend on the mixing weight.

    Attributes:
        logits: both rows' at both labels, as :func:`_at_labels` gives them, above their row's ``top``, in float64.
        vectors: likewise of u, and of t where there is one.
        different: (N, M), 0 where the labels are one class, else 1.
        beside: <t, u> and <t, t> of the rows mixed, where there is a t.
    """

    logits: _AtLabels
    vectors: list[_AtLabels]
    different: Tensor
    beside: list[_Mixed]


class _Mixed(NamedTuple):
    """A product of two mixtures, lam^2 own_a + lam mu cross + mu^2 own_b: (N,), (N, M) and (M,)."""

    own_a: Tensor
    cross: Tensor
    own_b: Tensor

    def at(self, lam: Weight) -> Tensor:
        mu = 1.0 - lam
        return _plus(self.own(lam), self.cross, lam * mu)

    def own(self, lam: Weight) -> Tensor:
        """Without the cross term."""
        mu = 1.0 - lam
        return (lam * lam * self.own_a)[:, None] + mu * mu * self.own_b


def _mutual(a: _Side, b: _Side) -> _Mutual:
    exact = exact_dtype(a.z.device)
    own_a, a_at_b, b_at_a, own_b = (v.to(exact) for v in _at_labels(a.z, a.y, b.z, b.y, a is b))
    top_a, top_b = a.top.to(exact), b.top.to(exact)
    logits = _AtLabels(own_a - top_a, a_at_b - top_a[:, None], b_at_a - top_b, own_b - top_b)
    vectors = [_at_labels(v_a, a.y, v_b, b.y, a is b) for v_a, v_b in _vectors(a, b)]
    # In floating point, which holds class numbers up to 2^24: comparisons are slow.
    different = (a.y.to(a.z.dtype)[:, None] - b.y.to(a.z.dtype)).abs_().clamp_(max=1)
    beside = []
    if a.t is not None and b.t is not None:
        across = a.t @ b.u.T
        across = across + (across.T if a is b else a.u @ b.t.T)
        beside = [
            _Mixed((a.t * a.u).sum(1), across, (b.t * b.u).sum(1)),
            _Mixed(a.t.square().sum(1), (a.t @ b.t.T).mul_(2), b.t.square().sum(1)),
        ]
    return _Mutual(logits, vectors, different, beside)


def _vectors(a: _Side, b: _Side) -> list[tuple[Tensor, Tensor]]:
    return [(a.u, b.u)] if a.t is None or b.t is None else [(a.u, b.u), (a.t, b.t)]


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
        """What became of the 1 appended to the features."""
        return 1.0 / self.features

    @property
    def product(self) -> Weight:
        """Of the inner products."""
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


def largest_of(values: Tensor) -> Tensor:
    """Largest magnitude, (); 0 of nothing."""
    if values.numel() == 0:
        return values.new_zeros(())
    least, most = torch.aminmax(values)
    return torch.maximum(least.neg(), most)


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


Split: TypeAlias = tuple[Tensor, Tensor, "Tensor | None"]


def split_labels(labels_a: Tensor, labels_b: Tensor, classes: int, dtype: torch.dtype) -> tuple[Split, Split]:
    """Of each side's labels (y, labels, t) as :class:`_Side` has them; t is None for both or neither.

    Where the host may look, one-hot vectors are taken for the class indices that they are.
    """
    if not (labels_a.is_floating_point() or labels_b.is_floating_point()):
        return (labels_a, labels_a, None), (labels_b, labels_b, None)
    y_a, y_b = class_of(labels_a), class_of(labels_b)
    vectors_a = dense_labels(labels_a, classes, dtype)
    vectors_b = vectors_a if labels_b is labels_a else dense_labels(labels_b, classes, dtype)
    t_a = beside_one_hot(vectors_a)
    t_b = t_a if labels_b is labels_a else beside_one_hot(vectors_b)
    if can_sync(t_a.device) and not (t_a.any() or t_b.any()):
        return (y_a, y_a, None), (y_b, y_b, None)
    return (y_a, vectors_a, t_a), (y_b, vectors_b, t_b)


def _side(h: Tensor, logits: Tensor, y: Tensor, labels: Tensor, t: Tensor | None, reference: Tensor) -> _Side:
    z = logits.to(h.dtype)
    top = z.scatter(1, y[:, None], -math.inf).amax(1) if z.shape[1] > 1 else torch.zeros_like(z[:, 0])
    reach = math.inf
    if can_sync(z.device) and z.numel():
        least, most = torch.aminmax(z)
        reach = float(most) - float(least)
    return _Side(h, z, project(h, reference), y, labels, t, top, h.square().sum(1), reach)


def _parts(a: _Side, b: _Side) -> Iterator[slice]:
    """The classes, so many at a time that a temporary of rows by classes is not too large."""
    classes = a.z.shape[1]
    step = max(1, CLASSES_AT_A_TIME // max(1, len(a.z), len(b.z)))
    for start in range(0, classes, step):
        yield slice(start, min(start + step, classes))


def _added(total: Tensor, left: Tensor, right: Tensor, weight: Weight = 1.0) -> Tensor:
    """``total`` + weight left right^T, in place."""
    if isinstance(weight, Tensor):
        return total.addmm_(left * weight.to(left.dtype), right.T)
    return total.addmm_(left, right.T, alpha=weight)


def _pairs(a: _Side, b: _Side, mutual: _Mutual, lam: Weight, units: Units, norms: bool) -> tuple[Tensor, Tensor]:
    """<r, u> in the caller's units, and ||r|| times the features' unit, of no meaning without ``norms``; both (N, M).

    The products run over the classes that are neither row's label; ``terms`` are those of the two labels.
    """
    mu = 1.0 - lam
    dtype = a.z.dtype
    vectors = _vectors(a, b)
    rest, rest_square, *totals = (a.z.new_zeros(len(a.z), len(b.z)) for _ in range(2 + len(vectors)))
    for part in _parts(a, b):
        e_a, e_b = _exponentials(a, lam, part), _exponentials(b, mu, part)
        _added(rest, e_a, e_b)
        for total, (v_a, v_b) in zip(totals, vectors, strict=True):
            _added(total, e_a * v_a[:, part], e_b, lam)
            _added(total, e_a, e_b * v_b[:, part], mu)
        if norms or mutual.beside:
            _added(rest_square, e_a.square_(), e_b.square_())

    # Logits of 1e4 leave float32 no digits for their differences, so these few (N, M) sums are taken in float64.
    log_own = _plus((lam * mutual.logits.own_a)[:, None], mutual.logits.b_at_a, mu)
    log_other = _plus(mu * mutual.logits.own_b, mutual.logits.a_at_b, lam)
    classes, different = a.z.shape[1], mutual.different
    terms = lost = None
    if (
        not isinstance(lam, Tensor)
        and dtype == torch.float32
        and units.features == units.reference == 1.0
        and lam * a.reach + mu * b.reach <= MODERATE_LOGITS
    ):
        terms = _moderate_terms(log_own.exp(), log_other.exp(), SCALE**-2, rest, different, lam, classes)
    if terms is None:
        lost = _lost(rest, log_own, log_other, different, lam, classes)
        terms = _terms(log_own, log_other, -2 * math.log(SCALE), rest, different, lam)

    for total, at in zip(totals, mutual.vectors, strict=True):
        total.mul_(terms.scale).addcmul_(terms.own, _plus((lam * at.own_a)[:, None], at.b_at_a, mu))
        total.addcmul_(terms.other, _plus(mu * at.own_b, at.a_at_b, lam))
    # By the root, since the scale of the squares leaves float32's range if squared first.
    square = rest_square.sqrt_().mul_(terms.scale).square_()
    square.addcmul_(terms.own, terms.own).addcmul_(terms.other, terms.other)

    inner, size, again = totals[0], terms.size, lost
    if mutual.beside:
        # Both parts of r in units of the larger.
        toward, beside = mutual.beside
        size.clamp_(min=torch.finfo(size.dtype).tiny)
        most = torch.maximum(beside.own(lam).sqrt_().to(size.dtype), size)
        first = torch.div(size, most, out=size).to(dtype)
        inner = inner.mul_(first).add_(toward.at(lam).to(most.dtype).div_(most))
        square.mul_(first).mul_(first)
        whole = torch.addcmul(square, first, totals[1].div_(most), value=2.0)
        whole.add_(beside.at(lam).to(most.dtype).div_(most).div_(most))
        # The second part's square is at most 1, and 1 if it is the larger.
        left = torch.sub(whole, square, alpha=CANCELLED)
        if not (can_sync(left.device) and left.numel() and float(left.amin()) >= CANCELLED):
            again = left < CANCELLED if lost is None else (left < CANCELLED).logical_or_(lost)
        square, size = whole.clamp_(min=0), most
    size.clamp_(min=units.least)
    inner = inner.mul_(_times(size, units.product).to(dtype))
    residual = square.sqrt_().mul_(_times(size, units.features).to(dtype))
    return (inner, residual) if again is None else _again(inner, residual, again, lost, a, b, lam, units)


def _times(x: Tensor, weight: Weight) -> Tensor:
    return x * weight if isinstance(weight, Tensor) or weight != 1.0 else x


def _lost(rest: Tensor, log_own: Tensor, log_other: Tensor, different: Tensor, lam: Weight, classes: int) -> Tensor:
    """Whether R underflows and may yet be more than a rounding error beside the labels' terms; bool."""
    lost = rest < UNDERFLOW * SCALE**2
    if classes <= 2:
        lost &= different == 0 if classes == 2 else False
    if can_sync(lost.device) and not lost.any():
        return lost
    larger = torch.maximum(log_own + _log(1.0 - lam), log_other + _log(lam)).add_(different.log())
    return lost.logical_and_(larger < math.log(UNDERFLOW * classes) + NEGLIGIBLE)


def _plus(base: Tensor, x: Tensor, weight: Weight) -> Tensor:
    """``base`` + weight x, in one pass."""
    if isinstance(weight, Tensor):
        return torch.addcmul(base, x, weight.to(x.dtype))
    return torch.add(base, x, alpha=weight)


class _AtLabels(NamedTuple):
    """Entries of v at labels: v_a[i, y_i] (N,), v_a[i, y_j] (N, M), v_b[j, y_i] (N, M), v_b[j, y_j] (M,)."""

    own_a: Tensor
    a_at_b: Tensor
    b_at_a: Tensor
    own_b: Tensor


def _at_labels(v_a: Tensor, y_a: Tensor, v_b: Tensor, y_b: Tensor, same_rows: bool) -> _AtLabels:
    a_at_b = v_a.index_select(1, y_b)
    # Contiguous: what is read across its rows costs several times as much. Of few classes, all are the cheaper to turn.
    few = v_b.shape[1] < len(y_a)
    b_at_a = v_b.T.contiguous().index_select(0, y_a) if few else v_b.index_select(1, y_a).T.contiguous()
    if same_rows:
        own = a_at_b.diagonal()
        return _AtLabels(own, a_at_b, b_at_a, own)
    own_a, own_b = v_a.gather(1, y_a[:, None])[:, 0], v_b.gather(1, y_b[:, None])[:, 0]
    return _AtLabels(own_a, a_at_b, b_at_a, own_b)


def _exponentials(side: _Side, weight: Weight, part: slice) -> Tensor:
    """SCALE exp(weight (z - top)) of some classes, 0 for a row's label.

    In float64: the rounding of an exponent in float32 is up to 46 times that of its power.
    """
    exact = exact_dtype(side.z.device)
    z = side.z[:, part]
    width = z.shape[1]
    if width == side.z.shape[1]:
        label, room = side.y, 0
    else:
        # A label outside of these classes is written beside them.
        label, room = side.y - part.start, 1
        label = torch.where((label >= 0) & (label < width), label, width)
    e = z.new_empty(len(z), width + room)
    top = side.top.to(exact)[:, None]
    step = max(1, CACHED // width) if can_sync(z.device) else max(1, len(z))
    for start in range(0, len(z), step):
        rows = slice(start, start + step)
        e[rows, :width] = z[rows].to(exact, copy=True).sub_(top[rows]).mul_(weight).exp_()
    # A label's logit may be so far above the others that its exponential is infinite, before it is put out.
    return e.scatter_(1, label[:, None], 0.0)[:, :width].mul_(SCALE)


def _again(
    inner: Tensor,
    residual: Tensor,
    again: Tensor,
    lost: Tensor | None,
    a: _Side,
    b: _Side,
    lam: Weight,
    units: Units,
) -> tuple[Tensor, Tensor]:
    """``inner`` and ``residual``, recomputed for the pairs ``again``; those of them ``lost`` have no other value."""
    classes = a.z.shape[1]
    if lost is None or can_sync(lost.device):
        for chunk in again.nonzero().split(max(1, EXACT_ELEMENTS // classes)):
            i, j = chunk.unbind(1)
            inner[i, j], residual[i, j] = _exact(i, j, a, b, lam, units)
        return inner, residual
    # The first so many pairs, their number unknown to the host; the rest of ``place`` points one past the end.
    total = again.numel()
    most = max(1, min(total, LOST_ELEMENTS // classes))
    again = again.flatten()
    slot = again.cumsum(0).sub_(1)
    within = again & (slot < most)
    number = torch.arange(total, device=again.device)
    place = torch.full((most + 1,), total, device=again.device)
    place = place.scatter_(0, torch.where(within, slot, most), torch.where(within, number, total))[:most]
    i, j = (v.clamp(max=n - 1) for v, n in ((place // len(b.z), len(a.z)), (place % len(b.z), len(b.z))))
    beyond = lost.flatten() & ~within
    result = []
    for old, new in zip((inner, residual), _exact(i, j, a, b, lam, units), strict=True):
        flat = torch.cat([old.flatten(), old.new_zeros(1)]).scatter_(0, place, new)[:total]
        result.append(flat.masked_fill_(beyond, math.nan).view_as(old))
    return result[0], result[1]


def _exact(i: Tensor, j: Tensor, a: _Side, b: _Side, lam: Weight, units: Units) -> tuple[Tensor, Tensor]:
    """<r, u> and ||r|| of the pairs (i, j), both (K,), as :func:`_pairs` has them, in float64."""
    exact = exact_dtype(a.z.device)
    z = _plus(lam * a.z[i].to(exact), b.z[j].to(exact), 1.0 - lam)
    r = mixed_residual(z, a.labels[i], b.labels[j], lam, units.least)
    u = _plus(lam * a.u[i].to(exact), b.u[j].to(exact), 1.0 - lam)
    largest = r.abs().amax(1)
    norm = torch.linalg.vector_norm(r / largest.masked_fill(largest == 0, 1)[:, None], dim=1) * largest
    return ((r * u).sum(1) * units.product).to(a.z.dtype), (norm * units.features).to(a.z.dtype)


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
    norms: bool = True,
    precision: Precision = "tf32x3",
) -> MixedAlignment:
    """:func:`mixed_alignment_reference` for every mixing weight."""
    arguments = (features_a, logits_a, labels_a, features_b, logits_b, labels_b, reference)
    dtype = work_dtype(features_a.dtype)
    size = len(lams), len(features_a), len(features_b)
    # Two tensors of their own: what a registered operator returns must not share memory.
    inner, norm = features_a.new_empty(size, dtype=dtype), features_a.new_empty(size, dtype=dtype)
    for k, lam in enumerate(lams.tolist()):
        inner[k], norm[k] = mixed_alignment_reference(*arguments, lam)
    return MixedAlignment(inner, norm if norms else inner.new_empty(0))


def mixed_alignment_cpp(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lams: Tensor,
    norms: bool = True,
    precision: Precision = "tf32x3",
) -> MixedAlignment:
    """The extension's body, for the CPU. Arguments and result as the operator's.

    The products of whole matrices are torch's. The result is the same, to the bit, for every number of threads.
    """
    extension: Any = _extension.load()
    dtype = work_dtype(features_a.dtype)
    same = features_a is features_b and logits_a is logits_b and labels_a is labels_b
    with torch.autocast("cpu", enabled=False):
        h_a, z_a, grad_reference = (_plain(x, dtype) for x in (features_a, logits_a, reference))
        h_b, z_b = (h_a, z_a) if same else (_plain(x, dtype) for x in (features_b, logits_b))
        (y_a, _, t_a), (y_b, _, t_b) = split_labels(labels_a.detach(), labels_b.detach(), z_a.shape[1], dtype)
        y_a, y_b = y_a.contiguous(), y_b.contiguous()
        inner = h_a.new_empty(len(lams), len(h_a), len(h_b))
        # Of label vectors the norms tell where the inner products have lost their digits.
        wanted, norms, units = norms, norms or t_a is not None, None
        norm = torch.empty_like(inner) if norms else None
        while True:
            u_a = project(h_a, grad_reference)
            u_b = u_a if same else project(h_b, grad_reference)
            products: list[Tensor | None] = [h_a @ h_b.T if norms else None, None, None]
            if t_a is not None and t_b is not None:
                products[1:] = [torch.addmm(t_a @ u_b.T, u_a, t_b.T), (t_a @ t_b.T).mul_(2)]
            done = extension.mixed_alignment(
                as_capsules(h_a, z_a, y_a, u_a, t_a),
                as_capsules(h_b, z_b, y_b, u_b, t_b),
                *as_capsules(grad_reference, lams),
                as_capsules(*products),
                *as_capsules(inner, norm),
                units,
                torch.get_num_threads(),
            )
            if done:
                return MixedAlignment(inner, norm if wanted and norm is not None else inner.new_empty(0))
            h_a, h_b, grad_reference, found = in_range(h_a, h_b, grad_reference, dtype)
            units = tuple(found)


def _plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).contiguous()


def cpp_can_run(features_a: Tensor, *_rest: object) -> str | None:
    """None, or why the extension's body cannot take these features."""
    if features_a.device.type != "cpu":
        return f"it serves the CPU, and the tensors are on {features_a.device}"
    return None


def mixed_alignment_triton(
    features_a: Tensor,
    logits_a: Tensor,
    labels_a: Tensor,
    features_b: Tensor,
    logits_b: Tensor,
    labels_b: Tensor,
    reference: Tensor,
    lams: Tensor,
    norms: bool = True,
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
    inner, norm = kernel.mixed_alignment(
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
    return MixedAlignment(inner, norm if norms else inner.new_empty(0))


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
        Backend("cpp", mixed_alignment_cpp, can_run=cpp_can_run, available=_extension.unavailable_reason),
        Backend("torch", mixed_alignment_torch),
        Backend("reference", _run_reference),
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
        features_a, logits_a, labels_a, features_b, logits_b, labels_b, reference, lams, True, precision, backend
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
