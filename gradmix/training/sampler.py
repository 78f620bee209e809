"""The rows of a training step: current, replayed, class-balanced, each drawn by a generator of its own purpose.

Indices are drawn on the CPU and sent to the device without waiting for it, so that the host runs ahead of a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmix.buffers import BufferRows, ReplayBuffer
from gradmix.graphs import sent
from gradmix.training.augment import random_crop_flip
from gradmix.training.benchmarks import Task
from gradmix.training.clock import Clock
from gradmix.training.config import TrainConfig
from gradmix.training.methods import StepRows
from gradmix.training.seeds import generator_for

PURPOSES = ("batches", "augmentation", "candidates", "replay", "replay augmentation")
"""What rows are drawn for. A method that draws more for one leaves the others as they are."""


class StepSampler:
    """Draws the rows of one run's steps, task by task.

    Args:
        config: the complete configuration of the run.
        seed: the training seed.
        buffer: the replay buffer; its own generator draws the replayed rows of a step.
        clock: times extra replayed rows as part of ``data``.
        device: where rows go.
        channels_last: whether images are to have that layout.

    Attributes:
        generators: by :data:`PURPOSES`; their states are part of the run's.
    """

    def __init__(
        self,
        config: TrainConfig,
        seed: int,
        buffer: ReplayBuffer,
        clock: Clock,
        device: torch.device,
        *,
        channels_last: bool,
    ) -> None:
        replay, optim = config.replay, config.optim
        assert optim.batch and replay.batch
        self.generators = {purpose: generator_for(seed, purpose) for purpose in PURPOSES}
        self._batch, self._replay_batch, self._tau = optim.batch, replay.batch, replay.tau
        self._shuffled = replay.stream == "shuffled"
        self._from_replayed = config.mix.candidates == "replayed"
        self._crop_flip, self._channels_last = optim.augment == "crop-flip", channels_last
        self._buffer, self._clock, self._device = buffer, clock, device
        self._x, self._y = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
        self._members: list[Tensor] = []
        self._replays = self._balanced = False

    def start_task(self, task: Task, *, replays: bool, balanced: bool) -> tuple[Tensor, Tensor]:
        """Bring a task's rows to the device.

        Args:
            task: the task.
            replays: whether a step holds replayed rows: besides the task's own, or shuffled into one stream with them.
            balanced: whether a step holds class-balanced candidates.

        Returns:
            The task's own rows ``x (N, ...)`` and ``y (N,)`` on the device.
        """
        own = task.train_x.to(self._device), task.train_y.to(self._device)
        self._x, self._y = own
        self._replays, self._balanced = replays, balanced
        if self._shuffled and replays and len(self._buffer):
            self._x, self._y = torch.cat([own[0], self._buffer.x]), torch.cat([own[1], self._buffer.y])
        # On the CPU, where indices are drawn. The task's own rows come first, whatever is shuffled in with them.
        self._members = [(task.train_y == label).nonzero().squeeze(1) for label in task.classes]
        return own

    def epoch_order(self) -> Tensor:
        """A random order of the rows of one epoch, on the CPU."""
        return torch.randperm(len(self._y), generator=self.generators["batches"])

    def batches(self, order: Tensor) -> tuple[Tensor, ...]:
        """The steps' indices, on the device, of an epoch in the given order."""
        batches: tuple[Tensor, ...] = sent(order, self._device).split(self._batch)
        return batches

    def rows(self, index: Tensor) -> StepRows:
        """The step's current rows at ``index``, then its replayed ones, with the weights of their losses."""
        x, y = self._x[index], self._y[index]
        current = len(y)
        weight = torch.full((current,), 1.0 / current, device=self._device)
        if self._replays and len(self._buffer) and not self._shuffled:
            replay_x, replay_y = self._buffer.sample(self._replay_batch)
            x, y = torch.cat([x, replay_x]), torch.cat([y, replay_y])
            replay_weight = torch.full((len(replay_y),), self._tau / len(replay_y), device=self._device)
            weight = torch.cat([weight, replay_weight])
        x = self._as_seen(x, "augmentation")
        candidates = None
        if self._balanced:
            candidates = self._draw_candidates(len(y))
        elif self._from_replayed and len(y) > current:
            candidates = x[current:], y[current:]
        return StepRows(x, y, weight, candidates)

    def replayed(self) -> BufferRows | None:
        """Replayed rows besides the step's own, by generators of their own; None while the buffer is empty."""
        if not len(self._buffer):
            return None
        with self._clock("data"):
            rows = self._buffer.sample_rows(self._replay_batch, self.generators["replay"])
            return rows._replace(x=self._as_seen(rows.x, "replay augmentation"))

    def _draw_candidates(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` rows, each of a class drawn uniformly from those seen; old classes' rows come from the buffer."""
        generator = self.generators["candidates"]
        old = len(self._buffer.classes) if self._replays else 0
        drawn = torch.randint(old + len(self._members), (count,), generator=generator)
        from_buffer = int((drawn < old).sum())
        picked = [torch.empty(0, dtype=torch.int64)]
        for place, number in zip(*torch.unique(drawn[drawn >= old] - old, return_counts=True), strict=True):
            members = self._members[int(place)]
            picked.append(members[torch.randint(len(members), (int(number),), generator=generator)])
        index = sent(torch.cat(picked), self._device)
        x, y = self._x[index], self._y[index]
        if from_buffer:
            buffer_x, buffer_y = self._buffer.draw_balanced(from_buffer, generator)
            x, y = torch.cat([x, buffer_x]), torch.cat([y, buffer_y])
        # Augmented by their own generator too: the step's rows are those of methods without candidates.
        return self._as_seen(x, "candidates"), y

    def _as_seen(self, x: Tensor, purpose: str) -> Tensor:
        """Rows as the model is to see them: augmented, in the layout asked for."""
        if self._crop_flip:
            x = random_crop_flip(x, generator=self.generators[purpose])
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x
