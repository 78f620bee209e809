"""The factorised form of mixed_alignment in plain torch: four matrix products, and a few passes over the pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gradmix.ops.dtypes import exact_dtype, without_autocast, work_dtype
from gradmix.ops.mixed_alignment.residuals import (
    UNDERFLOW,
    log_weight,
    mixed_residual,
    moderate_terms,
    plus,
    products_beside,
    residual_terms,
    split_labels,
)
from gradmix.ops.mixed_alignment.scaling import Units, in_range
from gradmix.ops.mixed_alignment.sides import Side
from gradmix.ops.mixed_alignment.values import MixedAlignment, Precision, Weight, has_bias, project
from gradmix.runtime.deferred_checks import can_sync

SCALE = 2.0**27
"""Of A and of B. Sums of scaled squares, up to 2^108 a class, stay finite in float32 up to 2^19 classes."""

NEGLIGIBLE = 20.0
"""R does not matter below exp(-NEGLIGIBLE) of the labels' own terms."""

CANCELLED = 1 / 16
"""Pairs whose ||r||^2 is below this share of its parts' are recomputed: label vectors that the rows fit well."""

MODERATE_LOGITS = 40.0
"""Logits that mix to a range up to this have exponentials whose products float32 can hold: no logarithm is needed."""

CLASSES_AT_A_TIME = 1 << 24
"""Elements of a temporary of rows by classes; more classes are taken in parts (64 MiB of float32)."""

CACHED = 1 << 16
"""Elements of a temporary in float64 that stays in a processor's cache."""

EXACT_ELEMENTS = 1 << 22
"""Elements of the largest temporary while pairs are recomputed (32 MiB of float64)."""

LOST_ELEMENTS = 1 << 20
"""Pairs times classes that are recomputed in float64 where the host may not look how many there are.

So many pairs are always recomputed there, and more than these become NaN: not evaluated."""


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
    a: Side, b: Side, reference: Tensor, lams: Tensor, norms: bool = True, precision: Precision = "tf32x3"
) -> MixedAlignment:
    """The factorised form in plain torch: four matrix products. Arguments and result as the operator's.

    The products are as precise as torch's own setting has them; ``precision`` is the Triton body's.
    """
    dtype = work_dtype(a.features.dtype)
    with without_autocast(a.features.device):
        h_a, h_b, grad_reference, units = in_range(a.features, b.features, reference, dtype)
        split_a, split_b = split_labels(a.labels, b.labels, a.logits.shape[1], dtype)
        left = _side(h_a, a.logits, *split_a, grad_reference)
        right = left if a.is_same(b) else _side(h_b, b.logits, *split_b, grad_reference)
        mutual = _mutual(left, right)
        gram = h_a @ h_b.T if norms else None
        bias = units.one * units.one * has_bias(h_a, grad_reference)
        size = len(lams), len(h_a), len(h_b)
        inner, norm = h_a.new_empty(size), h_a.new_empty(size if norms else 0)
        for k, lam in enumerate(_weights(lams)):
            products, residual = _pairs(left, right, mutual, lam, units, norms)
            mu = 1.0 - lam
            inner[k] = products
            if gram is None:
                continue
            # lam^2 |h_a|^2 + 2 lam mu <h_a, h_b> + mu^2 |h_b|^2, and 1 for the bias
            mixed = plus((lam * lam * left.square + bias)[:, None] + mu * mu * right.square, gram, 2 * lam * mu)
            torch.mul(residual, mixed.clamp_(min=0).sqrt_(), out=norm[k])
        return MixedAlignment(inner, norm)


def _weights(lams: Tensor) -> Sequence[Weight]:
    return lams.tolist() if can_sync(lams.device) else lams.unbind()


class _Mutual(NamedTuple):
    """Values of pairs of rows that do not depend on the mixing weight.

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
        return plus(self.own(lam), self.cross, lam * mu)

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
        toward, square = products_beside(a.t, a.u, b.t, b.u)
        beside = [
            _Mixed((a.t * a.u).sum(1), toward, (b.t * b.u).sum(1)),
            _Mixed(a.t.square().sum(1), square, b.t.square().sum(1)),
        ]
    return _Mutual(logits, vectors, different, beside)


def _vectors(a: _Side, b: _Side) -> list[tuple[Tensor, Tensor]]:
    return [(a.u, b.u)] if a.t is None or b.t is None else [(a.u, b.u), (a.t, b.t)]


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


def _add_product(total: Tensor, left: Tensor, right: Tensor, weight: Weight = 1.0) -> Tensor:
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
        _add_product(rest, e_a, e_b)
        for total, (v_a, v_b) in zip(totals, vectors, strict=True):
            _add_product(total, e_a * v_a[:, part], e_b, lam)
            _add_product(total, e_a, e_b * v_b[:, part], mu)
        if norms or mutual.beside:
            _add_product(rest_square, e_a.square_(), e_b.square_())

    # Logits of 1e4 leave float32 no digits for their differences, so these few (N, M) sums are taken in float64.
    log_own = plus((lam * mutual.logits.own_a)[:, None], mutual.logits.b_at_a, mu)
    log_other = plus(mu * mutual.logits.own_b, mutual.logits.a_at_b, lam)
    classes, different = a.z.shape[1], mutual.different
    terms = lost = None
    if (
        not isinstance(lam, Tensor)
        and dtype == torch.float32
        and units.features == units.reference == 1.0
        and lam * a.reach + mu * b.reach <= MODERATE_LOGITS
    ):
        terms = moderate_terms(log_own.exp(), log_other.exp(), SCALE**-2, rest, different, lam, classes)
    if terms is None:
        lost = _find_lost(rest, log_own, log_other, different, lam, classes)
        terms = residual_terms(log_own, log_other, -2 * math.log(SCALE), rest, different, lam)

    for total, at in zip(totals, mutual.vectors, strict=True):
        total.mul_(terms.scale).addcmul_(terms.own, plus((lam * at.own_a)[:, None], at.b_at_a, mu))
        total.addcmul_(terms.other, plus(mu * at.own_b, at.a_at_b, lam))
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
    inner = inner.mul_(_scale(size, units.product).to(dtype))
    residual = square.sqrt_().mul_(_scale(size, units.features).to(dtype))
    if again is None:
        return inner, residual
    return _recompute(inner, residual, again, lost, partial(_exact, a, b, lam, units), classes)


def _scale(x: Tensor, weight: Weight) -> Tensor:
    return x * weight if isinstance(weight, Tensor) or weight != 1.0 else x


def _find_lost(
    rest: Tensor, log_own: Tensor, log_other: Tensor, different: Tensor, lam: Weight, classes: int
) -> Tensor:
    """Whether R underflows and may yet be more than a rounding error beside the labels' terms; bool."""
    lost = rest < UNDERFLOW * SCALE**2
    if classes <= 2:
        lost &= different == 0 if classes == 2 else False
    if can_sync(lost.device) and not lost.any():
        return lost
    larger = torch.maximum(log_own + log_weight(1.0 - lam), log_other + log_weight(lam)).add_(different.log())
    return lost.logical_and_(larger < math.log(UNDERFLOW * classes) + NEGLIGIBLE)


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


def _recompute(
    inner: Tensor,
    residual: Tensor,
    again: Tensor,
    lost: Tensor | None,
    exact: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    classes: int,
) -> tuple[Tensor, Tensor]:
    """``inner`` and ``residual``, recomputed for the pairs ``again``; those of them ``lost`` have no other value.

    ``exact`` gives both of the pairs (i, j), two tensors (K,).
    """
    if lost is None or can_sync(lost.device):
        for chunk in again.nonzero().split(max(1, EXACT_ELEMENTS // classes)):
            i, j = chunk.unbind(1)
            inner[i, j], residual[i, j] = exact(i, j)
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
    i, j = (
        v.clamp(max=n - 1)
        for v, n in ((place // inner.shape[1], inner.shape[0]), (place % inner.shape[1], inner.shape[1]))
    )
    beyond = lost.flatten() & ~within
    result = []
    for old, new in zip((inner, residual), exact(i, j), strict=True):
        flat = torch.cat([old.flatten(), old.new_zeros(1)]).scatter_(0, place, new)[:total]
        result.append(flat.masked_fill_(beyond, math.nan).view_as(old))
    return result[0], result[1]


def _exact(a: _Side, b: _Side, lam: Weight, units: Units, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """<r, u> and ||r|| of the pairs (i, j), both (K,), as :func:`_pairs` has them, in float64."""
    exact = exact_dtype(a.z.device)
    z = plus(lam * a.z[i].to(exact), b.z[j].to(exact), 1.0 - lam)
    r = mixed_residual(z, a.labels[i], b.labels[j], lam, units.least)
    u = plus(lam * a.u[i].to(exact), b.u[j].to(exact), 1.0 - lam)
    largest = r.abs().amax(1)
    norm = torch.linalg.vector_norm(r / largest.masked_fill(largest == 0, 1)[:, None], dim=1) * largest
    return ((r * u).sum(1) * units.product).to(a.z.dtype), (norm * units.features).to(a.z.dtype)
