"""The residual r = softmax(z) - y of mixtures, without the cancellation of well-fitted samples.

With R the sum of the exponentials of the classes that are neither label a nor b, the residuals at the labels are
(D - lam R) / Z and -(D + mu R) / Z, where D = mu exp(z_a) - lam exp(z_b) is formed from its logarithms by expm1.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradmix.ops.labels import class_of, dense_labels
from gradmix.ops.mixed_alignment.values import Weight
from gradmix.runtime.deferred_checks import can_sync

UNDERFLOW = 1e-20
"""Pairs whose R (relative to its own largest possible term) is below this are recomputed if R matters.

What is lost first is the square of a single exponential, below 2^-126 / SCALE^2 = 2^-180. Relative to R^2 that is less
than 2^-47 here, far below float32's own rounding."""

CLOSE = 1e-6
"""D from such products is refused if a pair's residual is below this share: float64 leaves it 1e-8 of itself."""


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
    terms = residual_terms(at_own, at_other, 0.0, total, (own != other).to(logits.dtype), lam)
    r = exponential.mul_(terms.scale)
    r = r.scatter_(1, own, terms.own).scatter_add_(1, other, terms.other)
    r = r.mul_(terms.size.clamp_(min=torch.finfo(r.dtype).tiny))
    for labels, weight in ((labels_a, lam), (labels_b, mu)):
        if labels.is_floating_point():
            r = plus(r, beside_one_hot(labels.to(logits.dtype)), weight)
    largest = r.abs().amax(1, keepdim=True)
    return r.mul_((least / largest.masked_fill_(largest == 0, 1)).clamp_(min=1))


def beside_one_hot(labels: Tensor) -> Tensor:
    """(N, C) t = e - y: what label vectors lack to the one-hot vectors of their largest entries."""
    return dense_labels(class_of(labels), labels.shape[1], labels.dtype).sub_(labels)


def products_beside(t_a: Tensor, u_a: Tensor, t_b: Tensor, u_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return what label vectors add to the products of pairs, t being what :func:`beside_one_hot` gives.

    Args:
        t_a, u_a: (N, C).
        t_b, u_b: (M, C); the very tensors of the first side where both sides are the same samples.

    Returns:
        <t_a, u_b> + <u_a, t_b> and 2 <t_a, t_b>, both (N, M).
    """
    across = t_a @ u_b.T
    same = t_a is t_b and u_a is u_b
    return across + (across.T if same else u_a @ t_b.T), (t_a @ t_b.T).mul_(2)


Split: TypeAlias = tuple[Tensor, Tensor, "Tensor | None"]


def split_labels(labels_a: Tensor, labels_b: Tensor, classes: int, dtype: torch.dtype) -> tuple[Split, Split]:
    """Split each side's labels into (y, labels, t); t is None for both or neither.

    y are class indices, of label vectors those of their largest entries; t is what label vectors lack to the one-hot
    vectors of y.

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


class Terms(NamedTuple):
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


def residual_terms(
    log_own: Tensor, log_other: Tensor, log_unit: float, rest: Tensor, different: Tensor, lam: Weight
) -> Terms:
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
    first, second = log_own + log_weight(mu), log_other + log_weight(lam)
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
    other = plus(difference, share * different, -mu)
    return Terms((share + other).neg_(), other, scale, size)


def moderate_terms(
    own: Tensor, other: Tensor, unit: float, rest: Tensor, different: Tensor, lam: float, classes: int
) -> Terms | None:
    """:func:`residual_terms` in float32 from exponentials, or None if a pair needs the logarithms; the host looks.

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
    return Terms(share.add_(other).neg_(), other, scale.mul_(unit), size)


def log_weight(weight: Weight) -> Weight:
    """Return its logarithm; minus infinity of 0."""
    if isinstance(weight, Tensor):
        return weight.log()
    return math.log(weight) if weight > 0 else -math.inf


def plus(base: Tensor, x: Tensor, weight: Weight) -> Tensor:
    """``base`` + weight x, in one pass."""
    if isinstance(weight, Tensor):
        return torch.addcmul(base, x, weight.to(x.dtype))
    return torch.add(base, x, alpha=weight)
