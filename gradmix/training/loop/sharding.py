"""The split of a step's samples over several processes, and their gathering."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradmix.runtime.collectives import Group, all_gather_samples, rank_of, size_of
from gradmix.runtime.transfer import to_device_async


@dataclass(frozen=True)
class Share:
    """This process's samples of a step that several processes take together.

    Every part of a step (current samples, replayed ones) is shared out by itself, as evenly as can be.

    Attributes:
        mine: ``(n,)`` int64, the places of this process's samples among the step's N.
        everyone: ``(N,)`` int64, the places of all processes' samples, one process after the other.
        counts: Samples of each process.
        group: The processes.
    """

    mine: Tensor
    everyone: Tensor
    counts: tuple[int, ...]
    group: Group

    @staticmethod
    def of(sizes: list[int], group: Group, device: torch.device) -> Share:
        """The share in a step of so many samples of each part."""
        count = size_of(group)
        places: list[list[int]] = [[] for _ in range(count)]
        start = 0
        for size in sizes:
            for rank in range(count):
                places[rank].extend(range(start + size * rank // count, start + size * (rank + 1) // count))
            start += size
        everyone = torch.tensor([place for own in places for place in own], dtype=torch.int64)
        mine = torch.tensor(places[rank_of(group)], dtype=torch.int64)
        return Share(to_device_async(mine, device), to_device_async(everyone, device), tuple(map(len, places)), group)

    def gather(self, samples: Tensor) -> Tensor:
        """All N samples ``(N, ...)`` in their order, of this process's ``(n, ...)`` and the others'."""
        received = all_gather_samples(samples, self.group, self.counts)
        ordered = torch.empty_like(received)
        ordered[to_device_async(self.everyone, received.device)] = received
        return ordered

    def gather_partial(self, samples: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same of samples of which some may be missing, in any process.

        Args:
            samples: ``(k, ...)``, those of this process's n that it has.
            kept: ``(n,)`` bool on the CPU, which these are; None: all.

        Returns:
            The samples that any process has, in their order, and ``(N,)`` bool on the CPU, which these are; None: all.
        """
        mine = torch.ones(len(self.mine), dtype=torch.bool) if kept is None else kept
        # Samples that are missing travel as zeros, so that the others keep their places.
        whole = samples.new_zeros(len(mine), *samples.shape[1:])
        whole[mine.to(samples.device)] = samples
        came = self.gather(mine.to(samples.device)).cpu()
        everything = self.gather(whole)
        return (everything, None) if bool(came.all()) else (everything[came.to(samples.device)], came)
