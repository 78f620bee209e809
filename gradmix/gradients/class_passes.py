"""Sums of gradients by class, from a forward and a backward pass for each class over its samples alone.

Where norms of single samples are not needed, this takes P passes, also through layers without a rule, whose gradients
of single samples may take N passes (:mod:`gradmix.gradients.exact`). Whether samples influence each other is checked by
further passes, over groups of samples that were not together before: logits, losses and the sum of all gradients must
be the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor

from gradmix.gradients.chunk import Chunk
from gradmix.gradients.exact import LossGradients, agree, tolerances, total_norm
from gradmix.gradients.exceptions import CoupledSamplesError
from gradmix.gradients.sample_check import tolerance_of
from gradmix.model.inputs import take
from gradmix.model.unchanged import require_finite, without_compilation
from gradmix.ops.dtypes import work_dtype

MOST_CLASSES = 4
"""Classes in a chunk up to which a pass per class is as fast as layer rules, or faster, for sums without a sketch."""

LEAST_SAMPLES = 4
"""Samples of a class, on average, from which on a pass per class is as fast as one per sample, or faster."""


def class_sums(
    gradients: LossGradients, chunk: Chunk, labels: Tensor, seed: int, *, all_samples: bool
) -> Iterator[list[Tensor]]:
    """Yield the gradients of each class's summed losses, in the order of the classes; after the last one, check them.

    Args:
        gradients: computes the gradients of some samples.
        chunk: the samples.
        labels: (N,) int64, in which each of 0, ..., P - 1 occurs.
        seed: of the choice of the samples that are checked.
        all_samples: whether to check all samples, and the sum of their gradients; otherwise logits and losses of two.

    Raises:
        CoupledSamplesError: samples influence each other, or the model's output is a matter of chance.
        ValueError: a NaN, logits or losses of another shape, or an error of the loss.
    """
    passes = _Passes(gradients, chunk, keeps_sum=all_samples)
    for index in labels.argsort(stable=True).split(labels.bincount().tolist()):
        yield passes.run(index)
    logits, losses = passes.outputs()
    require_finite(chunk.start, **{"the model's logits": logits, "the loss": losses})
    if len(chunk) == 1:
        return  # as by layer rules
    again = _Passes(gradients, chunk, keeps_sum=all_samples)
    if all_samples:
        for index in _groups(labels, seed):
            again.run(index)
    else:
        pair = torch.tensor(random.Random(seed).sample(range(len(chunk)), 2), device=labels.device)
        again.forward(pair if bool(labels[pair[0]] != labels[pair[1]]) else pair[:1])
    passes.require_same(again)


def _groups(labels: Tensor, seed: int) -> list[Tensor]:
    """Return at least two samples in about sqrt(N) groups, over which every class is spread.

    No group has as many samples as a class: a pass over it may depend on that number alone.
    """
    count, sizes = len(labels), set(labels.bincount().tolist())
    groups = next(q for q in range(max(2, isqrt(count)), 0, -1) if not sizes & {count // q, -(-count // q)})
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu").to(labels.device)
    shuffled = shuffled[labels[shuffled].argsort(stable=True)]
    return [shuffled[first::groups] for first in range(groups)]


class _Passes:
    """Passes over parts of a chunk, and what they gave.

    Args:
        gradients, chunk: as :func:`class_sums`.
        keeps_sum: whether to keep the sum of the gradients.
    """

    def __init__(self, gradients: LossGradients, chunk: Chunk, *, keeps_sum: bool) -> None:
        self._gradients, self._chunk, self._keeps_sum = gradients, chunk, keeps_sum
        self._indices: list[Tensor] = []
        self._found: list[tuple[Tensor, Tensor]] = []
        self._of_logits: list[Tensor] = []
        self._sum: list[Tensor] = []
        self._norm = 0.0

    def forward(self, index: Tensor) -> None:
        """Make a forward pass over the samples at ``index``."""
        x, y = take(self._chunk.x, index), take(self._chunk.y, index)
        self._indices.append(index)
        # With autograd on, as in the other passes: torch's fast paths compute padded positions otherwise.
        with torch.enable_grad(), without_compilation():
            logits, losses = self._gradients.forward(x, y, self._gradients.loss)
        self._found.append((logits.detach(), losses.detach()))

    def run(self, index: Tensor) -> list[Tensor]:
        """Make a forward and a backward pass over the samples at ``index``; return the gradients."""
        x, y = take(self._chunk.x, index), take(self._chunk.y, index)
        logits, losses, (*found, of_logits) = self._gradients.batch(x, y, self._gradients.loss)
        self._indices.append(index)
        self._found.append((logits, losses))
        if self._keeps_sum:
            self._of_logits.append(of_logits)
            self._norm += total_norm([g[None] for g in found])
            wide = [g.to(work_dtype(g.dtype)) for g in found]
            self._sum = [a + b for a, b in zip(self._sum, wide, strict=True)] if self._sum else wide
        return found

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Return the logits (N, ...) and the losses (N,) of all samples, in the order of the chunk."""
        place = torch.cat(self._indices).argsort()
        logits, losses = (torch.cat(parts)[place] for parts in zip(*self._found, strict=True))
        return logits, losses

    def require_same(self, other: _Passes) -> None:
        """Check other passes over some or all of the samples.

        Raises:
            CoupledSamplesError: they gave something else.
        """
        logits, losses = self.outputs()
        # A loss is a difference of logits, and rounds as they do.
        sizes = logits.abs().amax(), torch.maximum(losses.abs().amax(), logits.abs().amax().to(losses.dtype))
        tolerance = tolerance_of([logits])
        for index, found in zip(other._indices, other._found, strict=True):
            for mine, its, size in zip((logits, losses), found, sizes, strict=True):
                if not bool(((mine[index] - its).abs() <= tolerance * size).all()):
                    raise CoupledSamplesError("logits or losses depend on the samples around")
        if other._sum:
            relative, rounding = tolerances(logits, torch.cat(self._of_logits))
            if not agree(other._sum, self._sum, relative * (self._norm + other._norm) + rounding):
                raise CoupledSamplesError("gradients depend on the samples around")
