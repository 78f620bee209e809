"""How the rows of a step are shared out to several processes, and put together again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradmix.graphs import sent
from gradmix.processes import Group, gather_rows, rank_of, size_of


@dataclass(frozen=True)
class Share:
    """This process's rows of a step that several processes take together.

    Every part of a step (current rows, replayed ones) is shared out by itself, as evenly as can be.

    Attributes:
        mine: ``(n,)`` int64, the places of this process's rows among the step's N.
        everyone: ``(N,)`` int64, the places of all processes' rows, one process after the other.
        counts: Rows of each process.
        group: The processes.
    """

    mine: Tensor
    everyone: Tensor
    counts: tuple[int, ...]
    group: Group

    @staticmethod
    def of(sizes: list[int], group: Group, device: torch.device) -> Share:
        """The share in a step of so many rows of each part."""
        count = size_of(group)
        places: list[list[int]] = [[] for _ in range(count)]
        start = 0
        for size in sizes:
            for rank in range(count):
                places[rank].extend(range(start + size * rank // count, start + size * (rank + 1) // count))
            start += size
        everyone = torch.tensor([place for own in places for place in own], dtype=torch.int64)
        mine = torch.tensor(places[rank_of(group)], dtype=torch.int64)
        return Share(sent(mine, device), sent(everyone, device), tuple(map(len, places)), group)

    def gathered(self, rows: Tensor) -> Tensor:
        """All N rows ``(N, ...)`` in their order, of this process's ``(n, ...)`` and the others'."""
        received = gather_rows(rows, self.group, self.counts)
        ordered = torch.empty_like(received)
        ordered[sent(self.everyone, received.device)] = received
        return ordered

    def gathered_of(self, rows: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same of rows of which some may be missing, in any process.

        Args:
            rows: ``(k, ...)``, those of this process's n that it has.
            kept: ``(n,)`` bool on the CPU, which these are; None: all.

        Returns:
            The rows that any process has, in their order, and ``(N,)`` bool on the CPU, which these are; None: all.
        """
        mine = torch.ones(len(self.mine), dtype=torch.bool) if kept is None else kept
        # Rows that are missing travel as zeros, so that the others keep their places.
        whole = rows.new_zeros(len(mine), *rows.shape[1:])
        whole[mine.to(rows.device)] = rows
        came = self.gathered(mine.to(rows.device)).cpu()
        everything = self.gathered(whole)
        return (everything, None) if bool(came.all()) else (everything[came.to(rows.device)], came)
