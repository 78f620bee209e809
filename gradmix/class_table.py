"""Class tables: the alignment of pairs of classes as a function of the mixing weight, kept for many steps."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmix.criteria import Alignment, ClassMeans, PairScores
from gradmix.labelled_samples import HeadSamples
from gradmix.mixing_weight import beta_quadrature
from gradmix.ops.labels import class_of
from gradmix.ops.mixed_alignment import Weight, cosine
from gradmix.runtime.collectives import Group, broadcast

TABLE_LAMS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Mixing weights at which a class table is evaluated; between them it is interpolated.

Whether a pair of classes may be mixed depends on the weight: near 1 on the sample's own class, near 0 on the partner's.
One decision for all weights, by their mean, is worse on MNIST (docs/results/settings.md)."""

AVERAGE_NODES = 8
"""Quadrature nodes of a class table's average over Beta(alpha, alpha), for display."""

TABLE_SAMPLES = 512
"""Most samples of which a class table takes all pairs; of more it takes some, as
:mod:`gradmix.estimators.sampled_table` says."""

MANY_MIXTURES = 100_000
"""Mixtures that a class table forwards without a warning: two passes over CIFAR-10, at 58 classes and 32 mixtures for
each pair of them."""


class TableTensors(NamedTuple):
    """The tensors of a :class:`ClassTable`."""

    inner: Tensor
    norm: Tensor
    reference_norm: Tensor
    classes: Tensor

    def take(self, index: Tensor) -> TableTensors:
        """Return the table of the classes at ``index`` (K,) int64, ascending."""
        inner, norm = (value.index_select(1, index).index_select(2, index) for value in (self.inner, self.norm))
        return TableTensors(inner, norm, self.reference_norm, self.classes[index])


@dataclass(frozen=True)
class ClassTable:
    """Alignment of class pairs as a function of the mixing weight.

    Attributes:
        lams: L mixing weights from 0 to 1, ascending.
        inner: (L, P, P), mean inner products with the reference; NaN where no pair of samples was evaluated.
        norm: (L, P, P), mean gradient norms.
        reference_norm: scalar tensor, the reference gradient's norm.
        classes: (P,) int64, ascending; entry (a, b) is a sample of ``classes[a]`` with weight lam and a partner of
            ``classes[b]``.
        samples: the samples that the table was made of, with which classes that come later are scored; None: the table
            is made anew for them.
    """

    lams: tuple[float, ...]
    inner: Tensor
    norm: Tensor
    reference_norm: Tensor
    classes: Tensor
    samples: HeadSamples | None = None

    def at(self, lam: Weight) -> Alignment:
        """The alignment at one mixing weight, (P, P), interpolated linearly between the weights evaluated."""
        return interpolate(self.lams, self.tensors(), lam).alignment(self.reference_norm)

    def average(self, alpha: float) -> Alignment:
        """The mean over Beta(alpha, alpha), (P, P), for a picture of the table."""
        inner, norm = torch.zeros_like(self.inner[0]), torch.zeros_like(self.norm[0])
        for lam, weight in zip(*beta_quadrature(alpha, AVERAGE_NODES), strict=True):
            scores = interpolate(self.lams, self.tensors(), lam)
            inner += weight * scores.inner
            assert scores.norm is not None
            norm += weight * scores.norm
        return Alignment(inner, cosine(inner, norm, self.reference_norm), self.classes)

    def tensors(self) -> TableTensors:
        """The table without its weights."""
        return TableTensors(self.inner, self.norm, self.reference_norm, self.classes)

    def state_dict(self) -> dict[str, Any]:
        """Return the table as plain values and tensors, from which :meth:`from_state` makes it."""
        state = {name: value for name, value in vars(self).items() if value is not None}
        if self.samples is not None:
            state["samples"] = {name: value for name, value in vars(self.samples).items() if value is not None}
        return state | {"lams": list(self.lams)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ClassTable:
        """Make the table of a :meth:`state_dict`."""
        samples = state.get("samples")
        made = None if samples is None else HeadSamples(x=None, **samples)
        return cls(**{**state, "lams": tuple(state["lams"]), "samples": made})

    def of_first_process(self, group: Group) -> ClassTable:
        """Return the table of a group's first process; the others' tables differ by their draws and by rounding."""
        inner, norm = broadcast([self.inner, self.norm], group)
        return replace(self, inner=inner, norm=norm)


def interpolate(lams: Sequence[float], table: TableTensors, lam: Weight) -> PairScores:
    """Return the scores (P, P) at one mixing weight, a number or a scalar tensor that the host does not read."""
    if isinstance(lam, Tensor):
        # Filled one by one, as the host would wait for a copy.
        known = torch.stack([torch.full_like(lam, value) for value in lams])
        upper = torch.searchsorted(known, lam.reshape(1), right=True).clamp_(1, len(lams) - 1)
        low, high = known[upper - 1], known[upper]
        share = ((lam - low) / (high - low)).to(table.inner.dtype)
        inner, norm = (torch.lerp(v[upper - 1], v[upper], share[:, None, None])[0] for v in (table.inner, table.norm))
        return PairScores(inner, norm, classes=table.classes)
    above = min(bisect_right(lams, lam), len(lams) - 1)
    part = (lam - lams[above - 1]) / (lams[above] - lams[above - 1])
    inner, norm = (torch.lerp(v[above - 1], v[above], part) for v in (table.inner, table.norm))
    return PairScores(inner, norm, classes=table.classes)


def table_of(scores: Sequence[PairScores], reference_norm: Tensor) -> ClassTable:
    """Return the table of scores (P, P) of the same classes at each of :data:`TABLE_LAMS`."""
    classes = scores[0].classes
    assert classes is not None
    inner, norm = (torch.stack([getattr(part, name) for part in scores]) for name in ("inner", "norm"))
    return ClassTable(TABLE_LAMS, inner, norm, reference_norm, classes)


def sample_scores(
    score: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    y: Tensor,
    per_pair: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> list[PairScores]:
    """Return mean scores of random pairs of samples for each ordered pair of classes, at each of :data:`TABLE_LAMS`.

    Args:
        score: maps pairs (K, 2) of samples and a mixing weight to inner products and norms, both (K,).
        y: labels of the N samples.
        per_pair: pairs of samples for each pair of classes, divided among the weights; at least one for each weight.
        dtype: of the sums.
        generator: draws the pairs.
    """
    labels = class_of(y)
    classes = torch.unique(labels)
    positions = torch.arange(len(classes), device=labels.device)
    cells = torch.cartesian_prod(positions, positions).view(-1, 2)
    count = max(1, per_pair // len(TABLE_LAMS))
    mixtures = len(cells) * count * len(TABLE_LAMS)
    if mixtures > MANY_MIXTURES:
        warnings.warn(
            f"the class table of {len(classes)} classes forwards {mixtures:,} mixtures at each refresh, "
            f"{count * len(TABLE_LAMS)} for each pair of classes; estimator='feature' forwards none"
            + (", a smaller class_samples= fewer" if count > 1 else ""),
            stacklevel=2,
        )
    found = []
    for lam in TABLE_LAMS:
        pairs = draw_of_classes(cells, classes, (labels, labels), count, generator)
        means = ClassMeans(classes, dtype)
        means.add_pairs(*score(pairs, lam), labels[pairs[:, 0]], labels[pairs[:, 1]])
        found.append(means.scores())
    return found


def draw_of_classes(
    cells: Tensor, classes: Tensor, labels: tuple[Tensor, Tensor], count: int, generator: torch.Generator
) -> Tensor:
    """Draw ``count`` pairs of samples, with replacement, for each pair of classes in ``cells`` (K, 2).

    Args:
        cells: (K, 2) int64, positions in ``classes`` of the first and of the second class.
        classes: (P,) int64.
        labels: class labels (N,) of the samples of the first index, and (M,) of those of the second.
        count: draws for each pair of classes.
        generator: source of the draws.

    Returns:
        (K count, 2) int64, indices of samples.
    """
    device = labels[0].device
    drawn = torch.rand(2, len(cells), count, generator=generator, device=generator.device).to(device)
    columns = []
    for u, column, label in zip(drawn, cells.unbind(1), labels, strict=True):
        order = torch.argsort(label, stable=True)
        counts = (label[:, None] == classes).sum(0)
        first, size = (v[column, None] for v in (counts.cumsum(0) - counts, counts))
        columns.append(order[first + (u * size).long().clamp_(max=size - 1)].reshape(-1))
    return torch.stack(columns, 1)
