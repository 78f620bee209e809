"""Class tables of many classes in feature space: few pairs of samples for each pair of classes, and room to grow.

The samples of each class are divided in two halves, A and B. With S(i, j; lam) the score of the mixture
lam i + (1 - lam) j, which is S(j, i; 1 - lam), the entry of the classes a and b is

    table[lam, a, b] = mean of S(i, j; lam) over i in A_a, j in B_b               for lam <= 1/2,
    table[lam, a, b] = table[1 - lam, b, a]                                       for lam > 1/2,
    table[1, a, b] = table[0, b, a] = mean of S(i, i; 1) over i in A_a and B_a.

The only sample of a class is in both halves. A half has at most :data:`HALF` samples, or one of each class if there are
more classes, so that with P classes and C outputs the products cost 16 max(HALF, P)^2 C flops, whatever the number of
samples. A class that comes later adds its row and its column (:func:`add_classes`); nothing else is computed again, and
no sample is forwarded again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradmix.class_table import TABLE_LAMS, ClassTable
from gradmix.criteria import class_index
from gradmix.labelled_samples import HeadSamples, concatenate_samples
from gradmix.ops.labels import class_of
from gradmix.ops.mixed_alignment import as_lams, mixed_alignment_op
from gradmix.references import ClassQuota

HALF = 512
"""Most samples of one half, over all classes."""

LOWER, UPPER = slice(1, len(TABLE_LAMS) // 2 + 1), slice(len(TABLE_LAMS) // 2 + 1, -1)
"""Mixing weights above 0 up to 1/2, at which pairs are scored, and those above it up to 1."""


def make_sampled_table(
    samples: HeadSamples, gradient: Tensor, reference_norm: Tensor, per_class: int, backend: str
) -> ClassTable:
    """Return the table of all classes of ``samples``, with the samples that it was made of.

    Args:
        samples: the first of each class are taken.
        gradient: the reference, (C, d + 1) or (C, d).
        reference_norm: its norm, ().
        per_class: most samples of each class.
        backend: of the operator ``mixed_alignment``.
    """
    classes = torch.unique(class_of(samples.y))
    limit = min(per_class, 2 * max(1, HALF // len(classes)))
    nothing = gradient.new_empty(len(TABLE_LAMS), 0, 0)
    empty = ClassTable(TABLE_LAMS, nothing, nothing, reference_norm, classes[:0])
    return _add(empty, classes, samples.take(ClassQuota(limit).admit(samples.y)), gradient, backend)


def add_classes(table: ClassTable, samples: HeadSamples, gradient: Tensor, backend: str) -> ClassTable:
    """Return the table with those classes of ``samples`` that it does not contain.

    Args:
        table: of :func:`make_sampled_table`.
        samples: other samples of the same model.
        gradient: the table's reference.
        backend: as :func:`make_sampled_table`.
    """
    assert table.samples is not None
    labels = class_of(samples.y)
    fresh = samples.take((class_index(table.classes, labels) < 0).nonzero()[:, 0])
    found = torch.unique(class_of(fresh.y))
    if len(found) == 0:
        return table
    limit = 2 * max(1, HALF // (len(table.classes) + len(found)))
    fresh = fresh.take(ClassQuota(limit).admit(fresh.y))
    kept = concatenate_samples([table.samples, fresh], samples.logits.shape[1])
    return _add(table, found, kept, gradient, backend)


def _add(table: ClassTable, found: Tensor, samples: HeadSamples, gradient: Tensor, backend: str) -> ClassTable:
    """Return the table with the classes ``found``; ``samples`` are of all its classes."""
    classes, order = torch.cat([table.classes, found]).sort()
    given = torch.argsort(order)  # the known classes, then the new ones, by their places in the table
    old, new = given.split([len(table.classes), len(found)])
    first, second = _halves(class_index(classes, class_of(samples.y)), len(classes))
    rows = _mean_scores(samples, first[new], second, gradient, backend)
    columns = _mean_scores(samples, first[old], second[new], gradient, backend)
    own = _own_scores(samples, found, gradient, backend)

    def join(known: Tensor, row: Tensor, column: Tensor, one: Tensor) -> Tensor:
        whole = row.new_empty(len(TABLE_LAMS), len(classes), len(classes))
        # Whole rows and columns are moved: to write the known block in its places takes several times as long.
        lower = torch.cat([torch.cat([known[LOWER], column], 2), row.index_select(2, given)], 1)
        whole[LOWER] = lower.index_select(1, order).index_select(2, order)
        whole[UPPER] = whole[LOWER].flip(0).mT[1:]
        ends = torch.cat([known[-1].diagonal(), one])[order]
        whole[-1], whole[0] = ends[:, None], ends
        return whole

    parts = zip((table.inner, table.norm), rows, columns, own, strict=True)
    inner, norm = (join(*part) for part in parts)
    return ClassTable(TABLE_LAMS, inner, norm, table.reference_norm, classes, samples.without_inputs())


class _Scores(NamedTuple):
    """Means of inner products and of norms, (L, P, Q) or (P,), both."""

    inner: Tensor
    norm: Tensor


def _halves(index: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the samples of each class in turn in two halves, both (P, n) int64, with -1 where a class has fewer.

    The only sample of a class is in both.

    Args:
        index: (N,) int64, the class of each sample, 0 to P - 1.
        classes: P.
    """
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=classes)
    place = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[index[order]]
    width = 2 * max(1, (int(counts.max()) + 1) // 2)
    grid = index.new_full((classes, width), -1)
    grid[index[order], place] = order
    first, second = grid[:, ::2], grid[:, 1::2].clone()
    second[:, 0] = torch.where(counts == 1, first[:, 0], second[:, 0])
    return first, second


def _mean_scores(samples: HeadSamples, own: Tensor, partners: Tensor, gradient: Tensor, backend: str) -> _Scores:
    """Return mean scores (L, P, Q) of the samples ``own`` (P, n), as indices, with ``partners`` (Q, m).

    They are those at the weights :data:`LOWER`.
    """
    sides, shares = [], []
    for index in (own, partners):
        # What pads a row is a copy of a sample, and counts for nothing.
        part = samples.take(index.clamp(min=0).flatten())
        sides += [part.features, part.logits, part.y]
        shares.append((index >= 0) / (index >= 0).sum(1, keepdim=True))
    weights = as_lams(torch.tensor(TABLE_LAMS[LOWER], dtype=torch.float64, device="cpu"), gradient.device)
    scores = mixed_alignment_op(*sides, gradient, weights, True, "tf32x3", backend)
    left, right = (share.to(scores[0].dtype) for share in shares)
    shape = (len(weights), *own.shape, *partners.shape)
    # One axis after the other: a sum over both at once takes several times as long.
    halves = (torch.einsum("lpnk,pn->lpk", value.view(*shape[:3], partners.numel()), left) for value in scores)
    return _Scores(*(torch.einsum("lpqm,qm->lpq", value.view(*shape[:2], *shape[3:]), right) for value in halves))


def _own_scores(samples: HeadSamples, classes: Tensor, gradient: Tensor, backend: str) -> _Scores:
    """Return the mean scores (P,) of the samples of each of these classes, not mixed."""
    samples = samples.take((class_index(classes, class_of(samples.y)) >= 0).nonzero()[:, 0])
    one = samples.take(torch.zeros(1, dtype=torch.int64, device=samples.y.device))
    sides = [value for side in (samples, one) for value in (side.features, side.logits, side.y)]
    scores = mixed_alignment_op(*sides, gradient, as_lams(1.0, gradient.device), True, "tf32x3", backend)
    index = class_index(classes, class_of(samples.y))
    counts = torch.bincount(index, minlength=len(classes))
    sums = [value.new_zeros(len(classes)).index_add_(0, index, value[0, :, 0]) for value in scores]
    return _Scores(*(total / counts for total in sums))
