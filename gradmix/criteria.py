"""Criteria: the inner product that decides on a pair of samples, its own (``sample``) or its classes' mean (``class``).

One step of SGD on a mixture with gradient g changes the buffer's loss by about -lr <g, G>, with G the buffer's mean
gradient. A mixture is helpful if <g, G> >= 0, or if its cosine is at least a threshold (GradMix, arXiv 2505.08528,
which states this as an angle of at most 90 degrees).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradmix.ops.class_pairs import class_members, class_pair_sums
from gradmix.ops.labels import class_of
from gradmix.ops.mixed_alignment import cosine
from gradmix.runtime.deferred_checks import can_sync

Criterion = Literal["class", "sample"]


@dataclass(frozen=True)
class Alignment:
    """Alignment of mixtures with the reference gradient.

    Attributes:
        inner: (N, M) or, by class, (P, P): inner products with the reference; NaN where no pair was evaluated.
        cosine: same shape, in [-1, 1]. By class it is the mean of the pairs' cosines weighted by the norms of their
            gradients, which has the sign of ``inner``.
        classes: None, or (P,) int64 in ascending order: entry (a, b) is a mixture of a sample of ``classes[a]`` with
            weight lam and a sample of ``classes[b]`` with weight 1 - lam.
    """

    inner: Tensor
    cosine: Tensor
    classes: Tensor | None = None

    def compact(self) -> Alignment:
        """Return the alignment without the entries of :func:`classes_of` that are no class; the host waits."""
        if self.classes is None or can_sync(self.classes.device):
            return self
        at = (self.classes >= 0).nonzero()[:, 0]
        inner, angle = (v.index_select(0, at).index_select(1, at) for v in (self.inner, self.cosine))
        return Alignment(inner, angle, self.classes[at])

    def helpful(self, threshold: float = 0.0) -> Tensor:
        """Return bool of the same shape: whether a mixture is helpful; False where none was evaluated.

        At threshold 0 the sign of ``inner`` decides, which contains no rounding of norms.
        """
        return self.inner >= 0 if threshold == 0.0 else self.cosine >= threshold

    def by_pair(self, y: Tensor, other_y: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Return for each pair of samples whether it is helpful, and its cosine or that of its classes, both (N, M).

        A class that is not among ``classes`` has no helpful mixture; its cosine is NaN.
        """
        if self.classes is None:
            return self.helpful(threshold), self.cosine
        i, j = (class_index(self.classes, class_of(labels)) for labels in (y, other_y))
        known = (i >= 0)[:, None] & (j >= 0)
        i, j = i.clamp(min=0), j.clamp(min=0)
        helpful, score = (v.index_select(0, i).index_select(1, j) for v in (self.helpful(threshold), self.cosine))
        return helpful & known, score.masked_fill(~known, torch.nan)


@dataclass(frozen=True)
class PairScores:
    """An estimator's scores of pairs of samples, or of pairs of classes.

    Attributes:
        inner: (N, M) or (P, P), inner products of the mixtures' gradients with the reference; NaN if not evaluated.
        norm: same shape, norms of the mixtures' gradients; None: not computed, as no decision needs them.
        error: None, or same shape: the standard error of ``inner``.
        classes: None, or (P,) int64 in ascending order.
    """

    inner: Tensor
    norm: Tensor | None
    error: Tensor | None = None
    classes: Tensor | None = None

    def alignment(self, reference_norm: Tensor) -> Alignment:
        """Return the alignment; ``reference_norm`` () is the norm of the reference gradient."""
        assert self.norm is not None
        return Alignment(self.inner, cosine(self.inner, self.norm, reference_norm), self.classes)


def no_alignment(y: Tensor, other_y: Tensor, criterion: Criterion) -> Alignment:
    """Return an alignment of zeros, for use without a reference gradient."""
    classes = classes_of(torch.cat([class_of(y), class_of(other_y)])) if criterion == "class" else None
    shape = (len(y), len(other_y)) if classes is None else (len(classes), len(classes))
    zeros = torch.zeros(shape, dtype=torch.float32, device=y.device)
    return Alignment(zeros, zeros, classes)


def classes_of(labels: Tensor) -> Tensor:
    """Return the classes among labels (N,): (P,) int64, ascending.

    Where the host may not read their number, P is N, with -1 in place of repetitions.
    """
    if can_sync(labels.device):
        found: Tensor = torch.unique(labels)
        return found
    ordered = labels.sort().values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[1:] = ordered[1:] == ordered[:-1]
    return ordered.masked_fill(repeated, -1).sort().values


def class_index(classes: Tensor, labels: Tensor) -> Tensor:
    """Return the positions (N,) of ``labels`` among the ascending ``classes`` (P,); -1 for a class that is missing."""
    position = torch.searchsorted(classes, labels.contiguous()).clamp_(max=len(classes) - 1)
    return torch.where(classes[position] == labels, position, -1)


class ClassMeans:
    """Means over the pairs of samples of each pair of classes, summed over several calls.

    Args:
        classes: (P,) int64, ascending, as :func:`classes_of` returns them.
        dtype: of the sums.
    """

    def __init__(self, classes: Tensor, dtype: torch.dtype) -> None:
        self.classes = classes
        self._inner = torch.zeros(len(classes) ** 2, dtype=dtype, device=classes.device)
        self._norm, self._count = torch.zeros_like(self._inner), torch.zeros_like(self._inner)

    def add_matrix(self, scores: PairScores, y_a: Tensor, y_b: Tensor, own: bool) -> None:
        """Add all pairs of an (N, M) matrix except NaN and, if ``own``, a sample with itself.

        Args:
            scores: of the pairs of samples.
            y_a, y_b: (N,) and (M,) class labels.
            own: whether both are the same samples.
        """
        left, right = (class_members(y, self.classes, scores.inner.dtype) for y in (y_a, y_b))
        assert scores.norm is not None
        sums = class_pair_sums((scores.inner, scores.norm), left, right, own)
        for total, value in zip((self._inner, self._norm, self._count), sums, strict=True):
            total += value.flatten()

    def add_pairs(self, inner: Tensor, norm: Tensor, y_a: Tensor, y_b: Tensor) -> None:
        """Add single pairs: all arguments (K,), the labels among ``classes``."""
        left, right = (torch.searchsorted(self.classes, y.contiguous()) for y in (y_a, y_b))
        cell = left * len(self.classes) + right
        for total, value in ((self._inner, inner), (self._norm, norm), (self._count, torch.ones_like(inner))):
            total.index_add_(0, cell, value.to(total.dtype))

    def scores(self) -> PairScores:
        """Return the means (P, P); NaN where no pair was added."""
        shape = (len(self.classes),) * 2
        count = self._count.masked_fill(self._count == 0, float("nan"))
        return PairScores((self._inner / count).view(shape), (self._norm / count).view(shape), classes=self.classes)


def mean_by_class(scores: PairScores, y: Tensor, other_y: Tensor, own: bool, dtype: torch.dtype) -> PairScores:
    """Return the means (P, P) of ``scores`` (N, M) over the pairs of samples of each pair of classes.

    Args:
        scores: of pairs of samples.
        y, other_y: labels of the N samples and M partners.
        own: whether both are the same samples.
        dtype: of the sums.
    """
    y_a, y_b = class_of(y), class_of(other_y)
    means = ClassMeans(classes_of(y_a if own else torch.cat([y_a, y_b])), dtype)
    means.add_matrix(scores, y_a, y_b, own)
    return means.scores()
