"""Steps of samples that are read from files, with a buffer that keeps the replayed ones as they were read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradmix.runtime.transfer import to_device_async
from gradmix.training.data.batch_reader import ReadBatch
from gradmix.training.data.samples import Samples, StoredSamples
from gradmix.training.loop.sampler import ResidentSampler
from gradmix.training.loop.sharding import Share
from gradmix.training.methods import StepSamples

SHOWN_SAMPLES = 256
"""Samples that the buffer is shown at a time at the end of a task."""


class KeepingSampler(ResidentSampler):
    """Draws steps whose current samples are read ahead by worker processes, and whose replayed ones lie in the buffer.

    The buffer may change from step to step, as it does online: what it is asked for is not drawn ahead, but read by a
    thread while the step before is computed, where it lies on disk and does not change.

    Raises:
        ValueError: a task is turned to with class-balanced candidates or one shuffled stream, which need the task's
            samples at hand.
    """

    _train: StoredSamples

    def _turn_to(self, train: Samples) -> None:
        assert isinstance(train, StoredSamples)
        for what, asked in (
            ("mix.candidates 'balanced'", self._balanced and not self._online),
            ("replay.stream 'shuffled'", self._shuffled),
        ):
            if asked:
                raise ValueError(
                    f"replay.storage: got samples that are read from files and kept, with {what}, expected nothing: "
                    "the buffer then holds which samples they are"
                )
        self._train = train

    def start_epoch(self, order: Tensor, done: int) -> None:
        self._batches, self._done = order.split(self._batch), done
        self._read(self._train.items, [self._train.at[self._read_here(index)] for index in self._batches[done:]])

    def _read_here(self, samples: Tensor) -> Tensor:
        """Those of a step's or part's samples that this process is to read."""
        return samples if self._group is None else samples[self._share(len(samples)).mine]

    def _share(self, count: int) -> Share:
        return Share.of([count], self._group, torch.device("cpu"))

    def _current(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self._gather(next(self._batches_read), self._train.y[index])
        return x.to(self._device, non_blocking=True), to_device_async(y, self._device)

    def _gather(self, read: ReadBatch, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the samples that all processes have read of a batch with labels ``y (n,)``, and their labels."""
        x, kept = read
        if self._group is None:
            return x, y if kept is None else y[kept]
        share, x = self._share(len(y)), x.to(self._device, non_blocking=True)
        if not self._reading.skips_damaged:
            return share.gather(x), y
        x, kept = share.gather_partial(x, kept)
        return x, y if kept is None else y[kept]

    def samples(self) -> StepSamples:
        made = super().samples()
        if self._replays and len(self._buffer) and not self._online:
            self._buffer.prefetch(self._replay_batch)
        return made

    def own_samples(self) -> Iterable[tuple[Tensor, Tensor]]:
        self.close()
        batches = torch.arange(len(self._train)).split(SHOWN_SAMPLES)
        to_read = [self._train.at[self._read_here(part)] for part in batches]
        with self._reading.reader(self._train.items, to_read) as reader:
            for part, read in zip(batches, reader, strict=True):
                yield self._gather(read, self._train.y[part])
