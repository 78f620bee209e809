"""Where the samples lie in a tensor of activations.

Most layers see (N, ..., d). Sequence models also have (T, N, d), and attention folds positions and samples into one
axis, as (N T, d) or (T N, d). Which of these a tensor is cannot be told from one shape, so it is found out by looking
at what the logits of each row depend on (:mod:`gradmix.gradients.plan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BatchAxis:
    """One axis of a tensor that holds the samples, maybe folded together with positions.

    Attributes:
        dim: the axis.
        minor: index = position * N + sample, instead of sample * positions + position.
    """

    dim: int
    minor: bool = False

    def split(self, tensor: Tensor, samples: int) -> Tensor:
        """The tensor with the samples first: (N, ...), positions folded with them in an axis of their own behind."""
        folded = tensor.shape[self.dim] // samples
        if folded == 1:
            return tensor.movedim(self.dim, 0)
        sizes = (folded, samples) if self.minor else (samples, folded)
        unfolded: Tensor = tensor.unflatten(self.dim, sizes)
        return unfolded.movedim(self.dim + self.minor, 0)


@dataclass(frozen=True)
class Place:
    """A sample axis, and how many entries of it belong to each sample."""

    axis: BatchAxis
    folded: int


def possible_places(reached: Sequence[Tensor | None], shape: Sequence[int], dims: Sequence[int]) -> set[Place]:
    """Where the samples of a batch may be, judged by what the logits of each of its rows depend on.

    Args:
        reached: for each row of the batch, which entries of the tensor its logits depend on, bool and of the tensor's
            shape; None: none.
        shape: the tensor's shape.
        dims: axes that may hold the samples at all.
    """
    rows, places = len(reached), set()
    for dim in dims:
        size = shape[dim]
        if size == 0 or size % rows:
            continue
        folded = size // rows
        where = [
            None if mask is None else mask.movedim(dim, 0).reshape(size, -1).any(1).nonzero().flatten()
            for mask in reached
        ]
        for minor in (False, True) if folded > 1 else (False,):
            owners = [None if i is None else i % rows if minor else i // folded for i in where]
            if all(o is None or bool((o == row).all()) for row, o in enumerate(owners)):
                places.add(Place(BatchAxis(dim, minor), folded))
    return places
