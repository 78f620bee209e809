"""Labelled samples, alone (:class:`LabelledSamples`) or with the head's input and output (:class:`HeadSamples`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradmix.model.head_values import MASKED
from gradmix.model.inputs import concatenate, map_tensors, take
from gradmix.ops.labels import dense_labels
from gradmix.runtime.collectives import Group, all_gather_samples
from gradmix.runtime.deferred_checks import check_samples

AnySamples = TypeVar("AnySamples", bound="LabelledSamples")


@dataclass(frozen=True, eq=False)
class LabelledSamples:
    """Labelled samples.

    Attributes:
        x: inputs, a tensor or a tree of tensors (N, ...); None if only labels and features are kept.
        y: (N,) int64 class indices, or (N, C) label vectors.
    """

    x: Any
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def map(self: AnySamples, function: Any) -> AnySamples:
        """Apply ``function`` to every tensor (N, ...)."""
        x = None if self.x is None else map_tensors(function, self.x)
        return replace(self, x=x, y=function(self.y))

    def take(self: AnySamples, index: Tensor) -> AnySamples:
        """Return the samples at ``index``, (K,) int64 or (N,) bool."""
        return self.map(lambda value: take(value, index))

    def gather(self: AnySamples, group: Group) -> AnySamples:
        """Return the samples of all processes of a group, in the order of the ranks."""
        return self.map(lambda value: all_gather_samples(value, group))

    def without_inputs(self: AnySamples) -> AnySamples:
        """Return the samples without x, so that features kept between calls do not keep images alive."""
        return replace(self, x=None) if self.x is not None else self


@dataclass(frozen=True, eq=False)
class HeadSamples(LabelledSamples):
    """Samples with the head's input and output.

    Attributes:
        features: (N, d).
        logits: (N, C).
        appends_one: whether the features need a column of ones for the head's bias.
    """

    features: Tensor
    logits: Tensor
    appends_one: bool = True

    def map(self, function: Any) -> HeadSamples:
        """Apply ``function`` to every tensor (N, ...)."""
        return replace(super().map(function), features=function(self.features), logits=function(self.logits))


def concatenate_samples(parts: Sequence[AnySamples], num_classes: int) -> AnySamples:
    """Concatenate several parts; class indices beside label vectors become label vectors (N, num_classes).

    Raises:
        ValueError: the model masks other classes in one part than in another.
    """
    if len({part.y.is_floating_point() for part in parts}) > 1:
        parts = [replace(part, y=dense_labels(part.y, num_classes, torch.float32)) for part in parts]
    for part in parts[1:]:
        check_one_mask(parts[0], part)
    x = None if parts[0].x is None else concatenate([part.x for part in parts])
    tensors = [name for name in ("y", "features", "logits") if hasattr(parts[0], name)]
    return replace(parts[0], x=x, **{name: torch.cat([getattr(part, name) for part in parts]) for name in tensors})


def check_one_mask(samples: LabelledSamples, others: LabelledSamples) -> None:
    """Refuse samples of two passes in which the model masks different classes: their mixtures have no logits.

    Raises:
        ValueError: the masked classes differ; on a GPU, raised by the next call.
    """
    if not isinstance(samples, HeadSamples) or not isinstance(others, HeadSamples):
        return
    if len(samples) == 0 or samples.logits.shape[1] != others.logits.shape[1]:
        return
    masked = samples.logits[:1] <= MASKED
    check_samples(
        ((others.logits <= MASKED) != masked).any(1),
        lambda sample: ValueError(
            f"model: masks other classes for sample {sample} of a pass than in a pass before, expected one mask for "
            "all samples that are mixed with each other (of the batch, the candidates, and by class the buffer)"
        ),
    )
