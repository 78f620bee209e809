"""The batch axis of a tensor of activations.

Most layers receive (N, ..., d). Sequence models also use (T, N, d), and attention folds positions and samples into one
axis, as (N T, d) or (T N, d). These cannot be distinguished by one shape. :mod:`gradmix.gradients.trace` finds the axis
by the entries that the logits of each sample depend on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BatchAxis:
    """One axis of a tensor that holds the samples, possibly folded with positions.

    Attributes:
        dim: index of the axis.
        positions_first: order of a folded axis: index = position * N + sample if true, else sample * T + position.
        positions: T, entries of the axis for each sample; 1 where nothing is folded.
    """

    dim: int
    positions_first: bool = False
    positions: int = 1

    def split(self, tensor: Tensor, samples: int) -> Tensor:
        """Move the samples to axis 0: (N, ...). Folded positions get an axis of their own after it."""
        positions = tensor.shape[self.dim] // samples
        if positions == 1:
            return tensor.movedim(self.dim, 0)
        sizes = (positions, samples) if self.positions_first else (samples, positions)
        unfolded: Tensor = tensor.unflatten(self.dim, sizes)
        return unfolded.movedim(self.dim + self.positions_first, 0)

    def by_position(self, tensor: Tensor, samples: int) -> Tensor:
        """Return (N, T, d) of activations (..., d): all axes except the samples and the last one become positions."""
        tensor = self.split(tensor, samples)
        return tensor.unsqueeze(1) if tensor.ndim == 2 else tensor.flatten(1, -2)


def possible_batch_axes(
    dependencies: Sequence[Tensor | None], shape: Sequence[int], dims: Sequence[int]
) -> set[BatchAxis]:
    """Find the axes of a tensor that may hold the samples.

    Args:
        dependencies: for each sample of the batch, the entries of the tensor that its logits depend on: bool, of the
            tensor's shape; None: no entry.
        shape: shape of the tensor.
        dims: candidates for the axis.
    """
    samples, axes = len(dependencies), set()
    for dim in dims:
        size = shape[dim]
        if size == 0 or size % samples:
            continue
        positions = size // samples
        indices = [
            None if mask is None else mask.movedim(dim, 0).reshape(size, -1).any(1).nonzero().flatten()
            for mask in dependencies
        ]
        for positions_first in (False, True) if positions > 1 else (False,):
            owners = [None if i is None else i % samples if positions_first else i // positions for i in indices]
            if all(o is None or bool((o == sample).all()) for sample, o in enumerate(owners)):
                axes.add(BatchAxis(dim, positions_first, positions))
    return axes
