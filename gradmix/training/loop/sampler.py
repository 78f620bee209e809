"""The samples of a training step: current, replayed, class-balanced, each drawn by a generator of its own purpose.

Indices are drawn on the CPU and sent to the device without waiting for it, so that the host runs ahead of a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gradmix.replay.buffer import BufferSamples, ReplayBuffer
from gradmix.runtime.collectives import Group, size_of
from gradmix.runtime.transfer import to_device_async
from gradmix.training.config import TrainConfig
from gradmix.training.data.batch_reader import BatchReader, ReadBatch
from gradmix.training.data.samples import Samples, TensorSamples
from gradmix.training.loop.clock import Clock
from gradmix.training.loop.preparation import Preparation
from gradmix.training.loop.reading import Reading
from gradmix.training.loop.sharding import Share
from gradmix.training.methods import Method, StepSamples
from gradmix.training.seeds import generator_for
from gradmix.training.streams import Task

PURPOSES = ("batches", "augmentation", "candidates", "candidate augmentation", "replay", "replay augmentation")
"""What samples are drawn for. A method that draws more for one leaves the others as they are.

Samples that are read are drawn ahead, by as many steps as there are workers for: what is drawn when they are there has
generators apart from those. Candidates in memory are augmented by the generator that draws them.
"""


class StepSampler(ABC):
    """Draws the samples of one run's steps, task by task.

    Args:
        config: the complete configuration of the run.
        buffer: the replay buffer; its own generator draws the replayed samples of a step.
        clock: times extra replayed samples as part of ``data``.
        preparation: makes samples as the model is to see them.
        reading: says how samples are read from files, where they are, and where they go.
        group: the processes that make every step together; None: this one alone.

    Attributes:
        generators: by :data:`PURPOSES`; their states are part of the run's.
    """

    def __init__(
        self,
        config: TrainConfig,
        buffer: ReplayBuffer,
        clock: Clock,
        preparation: Preparation,
        reading: Reading,
        group: Group = None,
    ) -> None:
        replay, optim = config.replay, config.optim
        assert optim.batch and replay.batch
        self.generators = {purpose: generator_for(config.seeds[0], purpose) for purpose in PURPOSES}
        self._batch, self._replay_batch, self._tau = optim.batch, replay.batch, replay.tau
        self._shuffled = replay.stream == "shuffled"
        self._candidates = config.mix.candidates
        # Where tasks pass over into each other in one pass, the order is the stream's own.
        self._in_order, self._online = config.data.online and config.data.blur is not None, config.data.online
        self._buffer, self._clock, self._preparation = buffer, clock, preparation
        self._reading, self._device, self._group = reading, reading.device, group
        self._reader: BatchReader | None = None
        self._batches_read: Iterator[ReadBatch] = iter(())
        self._batches: tuple[Tensor, ...] = ()
        self._replays = self._balanced = self._more = self._gathers = False
        self._samples = 0
        self._members: list[Tensor] = []

    def start_task(self, task: Task, method: Method) -> None:
        """Turn to a task's samples, for a method.

        Args:
            task: the task.
            method: says whether a step holds replayed samples (besides the task's own, or shuffled into one stream with
                them), whether :meth:`draw_replayed` will be called in every step, and whether every process needs all
                samples.
        """
        train = task.train
        self._replays, self._more = method.needs.replayed, method.needs.second_batch
        self._balanced = self._candidates == "balanced" or method.needs.balanced
        self._gathers = method.needs.whole_step
        self._samples = len(train)
        if self._mingles:
            self._samples += len(self._buffer)
        # On the CPU, where indices are drawn. The task's own samples come first, whatever is shuffled in with them.
        held = self._buffer.classes if self._replays else ()
        self._members = [
            (train.y == label).nonzero().squeeze(1) for label in torch.unique(train.y).tolist() if label not in held
        ]
        self._turn_to(train)

    @abstractmethod
    def _turn_to(self, train: Samples) -> None:
        """Make a task's samples the ones that steps are drawn from."""

    @property
    def _mingles(self) -> bool:
        """Whether the buffer's samples are shuffled in with the task's own."""
        return self._shuffled and self._replays and len(self._buffer) > 0

    def epoch_order(self) -> Tensor:
        """The order of the samples of one epoch, on the CPU: random, or that of a stream without boundaries."""
        if self._in_order:
            return torch.arange(self._samples)
        return torch.randperm(self._samples, generator=self.generators["batches"])

    def steps_of(self, order: Tensor) -> int:
        """Number of steps of an epoch in the given order."""
        return -(-len(order) // self._batch)

    @abstractmethod
    def start_epoch(self, order: Tensor, done: int) -> None:
        """Turn to an epoch whose samples come in the given order, of which ``done`` steps are done."""

    @abstractmethod
    def samples(self) -> StepSamples:
        """The next step's current samples, then its replayed ones, with the weights of their losses."""

    @abstractmethod
    def own_samples(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield the task's samples for the buffer, ``x (N, ...)`` and ``y (N,)``: all at once or in parts."""

    @abstractmethod
    def step_samples(self) -> tuple[Tensor, Tensor]:
        """Return those of the last step's current samples that the buffer is to be shown."""

    @abstractmethod
    def draw_replayed(self) -> BufferSamples | None:
        """Replayed samples besides the step's own, by generators of their own; None while the buffer is empty."""

    def _read(self, items: Any, plans: Iterable[Tensor]) -> None:
        """Have the planned batches of items read ahead, in place of those of before."""
        self.close()
        self._reader = self._reading.reader(items, plans)
        self._batches_read = iter(self._reader)

    def close(self) -> None:
        """Stop the processes that read samples, if there are any."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the rest of the run depends on, besides the generators."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have nothing to take up
        """Take up a state of :meth:`state_dict`."""

    def _weights(self, current: int, replayed: int) -> Tensor:
        """Weights of the samples' losses: CE(current) + tau CE(replayed), each a mean."""
        # Gradients are averaged over the processes, each of which sees its own samples alone.
        times = size_of(self._group)
        weight = torch.full((current,), times / max(1, current), device=self._device)
        if not replayed:
            return weight
        return torch.cat([weight, torch.full((replayed,), times * self._tau / replayed, device=self._device)])

    def _draw_places(self, count: int) -> tuple[Tensor, int]:
        """Class-balanced candidates: places among the task's own samples, and a number of samples from the buffer.

        Each of the ``count`` samples is of a class drawn uniformly from those seen; old classes' samples come from the
        buffer. Online, all do: which samples are still to come is not known.
        """
        if self._online:
            return torch.empty(0, dtype=torch.int64), count if len(self._buffer) else 0
        generator = self.generators["candidates"]
        old = len(self._buffer.classes) if self._replays else 0
        drawn = torch.randint(old + len(self._members), (count,), generator=generator)
        picked = [torch.empty(0, dtype=torch.int64)]
        for place, number in zip(*torch.unique(drawn[drawn >= old] - old, return_counts=True), strict=True):
            members = self._members[int(place)]
            picked.append(members[torch.randint(len(members), (int(number),), generator=generator)])
        return torch.cat(picked), int((drawn < old).sum())


class ResidentSampler(StepSampler):
    """Draws steps from samples that lie in tensors, all of a task's on the device."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._own = self._last = self._x, self._y = torch.empty(0), torch.empty(0, dtype=torch.int64)
        self._done = 0

    def _turn_to(self, train: Samples) -> None:
        assert isinstance(train, TensorSamples)
        self._own = self._x, self._y = train.x.to(self._device), train.y.to(self._device)
        if self._mingles:
            self._x = torch.cat([self._x, self._buffer.x])
            self._y = torch.cat([self._y, self._buffer.y])

    def start_epoch(self, order: Tensor, done: int) -> None:
        self._batches, self._done = to_device_async(order, self._device).split(self._batch), done

    def samples(self) -> StepSamples:
        index = self._batches[self._done]
        self._done += 1
        x, y = self._last = self._current(index)
        current = len(y)
        if self._replays and len(self._buffer) and not self._shuffled:
            replay_x, replay_y = self._buffer.sample(self._replay_batch)
            x, y = torch.cat([x, replay_x]), torch.cat([y, replay_y])
        replayed = index >= len(self._own[1]) if self._mingles else torch.arange(len(y), device=self._device) >= current
        x = self._as_seen(x, "augmentation")
        candidates = None
        if self._balanced:
            candidates = self._draw_candidates(len(y))
        elif self._candidates == "replayed" and len(y) > current:
            candidates = x[current:], y[current:]
        weight = self._weights(current, len(y) - current)
        if self._group is None:
            return StepSamples(x, y, weight, candidates, replayed)
        share = Share.of([current, len(y) - current], self._group, self._device)
        if self._gathers:
            return StepSamples(x, y, weight, candidates, replayed, share)
        mine = share.mine
        return StepSamples(x[mine], y[mine], weight[mine], candidates, replayed[mine])

    def _current(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The step's current samples, at ``index`` of the epoch's."""
        return self._x[index], self._y[index]

    def own_samples(self) -> Iterable[tuple[Tensor, Tensor]]:
        return [self._own]

    def step_samples(self) -> tuple[Tensor, Tensor]:
        return self._last

    def draw_replayed(self) -> BufferSamples | None:
        if not len(self._buffer):
            return None
        with self._clock("data"):
            samples = self._buffer.sample_with_extras(self._replay_batch, self.generators["replay"])
            samples = samples._replace(x=self._as_seen(samples.x, "replay augmentation"))
            if self._group is None:
                return samples
            mine = Share.of([len(samples.y)], self._group, self._device).mine
            return BufferSamples(
                samples.x[mine], samples.y[mine], {name: kept[mine] for name, kept in samples.extras.items()}
            )

    def _draw_candidates(self, count: int) -> tuple[Tensor, Tensor] | None:
        places, from_buffer = self._draw_places(count)
        if not len(places) and not from_buffer:
            return None
        index = to_device_async(places, self._device)
        x, y = self._x[index], self._y[index]
        if from_buffer:
            buffer_x, buffer_y = self._buffer.draw_balanced(from_buffer, self.generators["candidates"])
            x, y = torch.cat([x, buffer_x]), torch.cat([y, buffer_y])
        # Augmented by their own generator too: the step's samples are those of methods without candidates.
        return self._as_seen(x, "candidates"), y

    def _as_seen(self, x: Tensor, purpose: str) -> Tensor:
        return self._preparation.for_training(x, self.generators[purpose])
