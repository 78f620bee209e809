"""The reading of samples from files: the number of processes, and the treatment and record of damaged files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from gradmix.replay.buffer import ReplayBuffer
from gradmix.training.data.batch_reader import BatchReader
from gradmix.training.data.samples import Samples, StoredSamples, TensorSamples
from gradmix.training.loop.preparation import Preparation

MOST_WORKERS = 16
"""Processes that read, unless the user wants more: beyond, files and memory are the limit rather than decoding."""


def default_workers() -> int:
    """One for each processor but one, :data:`MOST_WORKERS` at most; processors are shared with others that train here.

    ``torchrun`` tells in ``LOCAL_WORLD_SIZE`` how many processes of a run there are on this machine.
    """
    spare = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    processes = max(1, int(told)) if told.isdecimal() else 1
    return max(0, min(MOST_WORKERS, spare // processes - 1))


class Reading:
    """Makes the readers of one run, and keeps what they found.

    Args:
        workers: Processes that read; 0: this one does. ``None``: :func:`default_workers`.
        skip_damaged: Whether samples that cannot be decoded are left out; otherwise the first one ends the run.
        device: Where samples go.
    """

    def __init__(self, workers: int | None, *, skip_damaged: bool, device: torch.device) -> None:
        self.workers = default_workers() if workers is None else workers
        self.device, self.skips_damaged = device, skip_damaged
        self._damaged: list[tuple[Any, dict[int, str]]] = []

    def faults_of(self, items: Any) -> dict[int, str]:
        """Number and fault of every one of ``items`` left out so far; training and test items count apart."""
        for known, found in self._damaged:
            if known is items:
                return found
        self._damaged.append((items, {}))
        return self._damaged[-1][1]

    def reader(self, items: Any, plans: Iterable[Tensor]) -> BatchReader:
        """A reader of the items planned."""
        reader = BatchReader(
            items,
            plans,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
            on_damage="skip" if self.skips_damaged else "stop",
        )
        # One record for all readers of these items: a sample is named once.
        reader.damaged = self.faults_of(items)
        return reader

    def batches(self, samples: Samples, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples ``(n, ...)`` with their labels ``(n,)``, in their order, at most ``size`` at a time."""
        for _, x, y in self.batches_of([samples], size):
            yield x, y

    def batches_of(self, parts: Sequence[Samples], size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The same of several parts of one data set, one after the other, with the number of the part."""
        stored = [part for part in parts if isinstance(part, StoredSamples)]
        if not stored:
            for number, part in enumerate(parts):
                assert isinstance(part, TensorSamples)
                for x, y in zip(part.x.split(size), part.y.split(size), strict=True):
                    yield number, x, y
            return
        assert len(stored) == len(parts) and all(part.items is stored[0].items for part in stored)
        plans = [
            (number, at, y)
            for number, part in enumerate(stored)
            for at, y in zip(part.at.split(size), part.y.split(size), strict=True)
            if len(at)
        ]
        # One reader for all of them: its processes are started once.
        with self.reader(stored[0].items, (at for _, at, _ in plans)) as reader:
            for (number, _, y), (x, kept) in zip(plans, reader, strict=True):
                yield number, x, y if kept is None else y[kept]


KEPT_AT_A_TIME = 256
"""Samples of a buffer that are made ready at a time."""


class KeptSamples(IterableDataset):  # type: ignore[type-arg]
    """The samples of a buffer made ready for the model, batch by batch; where it holds items' numbers, they are read.

    Args:
        buffer: A buffer of samples as they were read, or of items' numbers.
        preparation: Makes samples the model's input.
        reading: How items are read.
        items: The data set whose items they are; ``None``: the buffer holds the samples.
    """

    def __init__(self, buffer: ReplayBuffer, preparation: Preparation, reading: Reading, items: Any = None) -> None:
        self._buffer, self._preparation, self._items, self._reading = buffer, preparation, items, reading

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self._batches():
            yield self._preparation.for_testing(x), y

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        held = len(self._buffer)
        if self._items is not None and held:
            samples = StoredSamples(self._items, self._buffer.y, self._buffer.x)
            for x, y in self._reading.batches(samples, KEPT_AT_A_TIME):
                # As bytes, from page-locked memory: made floats on the host they would be four times as much.
                yield x.to(self._reading.device, non_blocking=True), y
        elif held:
            for start in range(0, held, KEPT_AT_A_TIME):
                yield self._buffer.part(start, min(start + KEPT_AT_A_TIME, held))

    def as_source(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The buffer as :class:`gradmix.GradMix` takes it."""
        # A generator of its own: a loader draws from it each time, which is not to move torch's global one.
        return DataLoader(self, batch_size=None, generator=torch.Generator())
