"""Runs that have diverged: their loss is no finite number any more, and nothing can be learnt by it."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmix.runtime.collectives import Group, any_rank
from gradmix.runtime.deferred_checks import can_sync


class DivergedError(ArithmeticError):
    """The loss, or the model's output for finite inputs, is not finite."""


class LossWatch:
    """Remembers whether a loss was not finite.

    On the CPU the step in which that happens raises. On a GPU, where a look would hold up every step, it is found by
    the next :meth:`look`. Infinite gradients under a gradient scaler do not count: it skips their step.

    Args:
        device: where losses are.
        group: processes whose losses count as one; all make the same calls.
    """

    def __init__(self, device: torch.device, group: Group = None) -> None:
        self._group, self._at_once = group, can_sync(device)
        self._found = torch.zeros(1, dtype=torch.bool, device=device)

    def has_diverged(self) -> bool:
        """Whether a loss noted so far was not finite; it is waited for."""
        return bool(self._found)

    def restore(self, found: bool) -> None:
        """Go on from what :meth:`has_diverged` returned."""
        self._found.fill_(found)

    def note(self, loss: Tensor) -> None:
        """Take note of a step's loss, a detached scalar; where a look is free, :meth:`look` at once."""
        self._found |= any_rank(~torch.isfinite(loss), self._group)
        if self._at_once:
            self.look()

    def look(self) -> None:
        """Wait for what was noted, and raise a :class:`DivergedError` if a loss was not finite."""
        if self.has_diverged():
            raise DivergedError("the loss is not finite")
