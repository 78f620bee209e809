"""What every method is: a way to turn a step's rows into gradients.

A step's rows are those of the current task and the replayed ones. The loss is a weighted sum over rows, CE(current) +
tau CE(replayed), each a mean over its own rows; a mixed row has the weight of the row it was made from.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradmix.criteria import Alignment
from gradmix.processes import Group, size_of, sum_over
from gradmix.replay.buffer import BufferRows, ReplayBuffer
from gradmix.replay.sources import SampleSource
from gradmix.training.clock import Clock
from gradmix.training.config import MixConfig, ReplayConfig, TrainConfig
from gradmix.training.sharding import Share

Part: TypeAlias = "slice | Tensor"
"""Some of a step's rows: a slice of them, or their places."""


@dataclass(frozen=True)
class StepRows:
    """The rows of one step.

    Attributes:
        x: (N, ...) inputs, the current task's first unless they come in one shuffled stream.
        y: (N,) int64 class indices.
        weight: (N,) weight of each row's loss.
        candidates: (x, y) where partners may come from; None: the step's own rows.
        replayed: (N,) bool, the rows that come from the buffer; None: nobody has told them apart.
        share: which of the rows this process trains on, where several make the step together; None: all of them.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    candidates: tuple[Tensor, Tensor] | None = None
    replayed: Tensor | None = None
    share: Share | None = None


@dataclass(frozen=True)
class Pixels:
    """What turns inputs back into pixels in [0, 1]: ``x * std + mean``; values by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class Context:
    """What a method is built from.

    Attributes:
        model: the network in training; another wrapper of the same one takes its place where its head has grown.
        buffer: the replay buffer, filled after each task.
        num_classes: width of the model's output, in the end.
        mix: the mixing settings.
        generator: source of the method's randomness.
        clock: times the sections ``selection`` and, where a method draws or augments rows itself, ``data``.
        replay: the replay settings.
        counts: (num_classes,) int64, the rows of each class that the current task's training draws from: all of the
            current classes', those in the buffer of the old ones. Kept up to date by the trainer.
        draw_replayed: draws another batch of replayed rows, apart from the step's own and augmented as they are; None
            while the buffer is empty.
        pixels: what the inputs were normalised by; None: they are pixels in [0, 1], or no images.
        source: what is read for the reference gradient, if that is not the buffer itself: the rows whose numbers it
            holds.
        autocast: makes the context in which forward passes of the loss are made.
        scaler: scales the loss before its backward pass.
        accumulate: forward and backward passes that a step's rows are trained on in, each of a part of them.
        group: the processes that make every step together, each on its share of the rows; None: this one alone.
        growing: whether the model's output is widened as classes arrive, to ``num_classes`` in the end.
    """

    model: nn.Module
    buffer: ReplayBuffer
    num_classes: int
    mix: MixConfig
    generator: torch.Generator
    clock: Clock
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    draw_replayed: Callable[[], BufferRows | None] = lambda: None
    pixels: Pixels | None = None
    source: SampleSource | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    accumulate: int = 1
    group: Group = None
    growing: bool = False


class Method(ABC):
    """A way to learn from a step's rows.

    Attributes:
        replays: whether a step holds replayed rows at all.
        wants_balanced: whether a step must hold class-balanced ``candidates`` whatever the settings.
        draws_more: whether it draws another batch of replayed rows in every step.
        gathers: whether all processes that make a step need all its rows; otherwise each is given its share alone.
        keeps_more: whether it has something kept in the buffer besides the rows (:meth:`extras`).
        joins: whether several processes can make its steps together.
    """

    joins = True
    replays = True
    wants_balanced = False
    draws_more = False
    gathers = False
    keeps_more = False

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def losses(self, rows: StepRows) -> Iterator[Tensor]:
        """What the step's loss is the sum of, one after the other: scalars with graphs that share no activations."""

    def loss(self, rows: StepRows) -> Tensor:
        """The step's loss, a scalar with a graph."""
        return reduce(operator.add, self.losses(rows))

    def backward(self, rows: StepRows) -> Tensor:
        """Leave the step's gradients, scaled by the context's scaler, in the parameters' empty ``.grad``.

        Returns:
            The loss, detached and unscaled.
        """
        context = self.context
        if context.accumulate == 1:
            with context.autocast():
                loss = self.loss(rows)
            context.scaler.scale(loss).backward()
            return loss.detach()
        parts, total = iter(self.losses(rows)), torch.zeros((), device=rows.weight.device)
        part: Tensor | None
        model = context.model
        shared = model if isinstance(model, DistributedDataParallel) else None
        with nullcontext() if shared is None else shared.no_sync():
            while True:
                with context.autocast():
                    part = next(parts, None)
                if part is None:
                    break
                # Now, so that its activations are gone before the next one's are made.
                context.scaler.scale(part).backward()
                total += part.detach()
        if shared is not None:
            average_gradients(shared, context.group)
        return total

    def parts(self, rows: StepRows) -> list[Part]:
        """The parts in which this process's rows are trained on, as many as the context says."""
        count = len(rows.y) if rows.share is None else len(rows.share.mine)
        size = max(1, -(-count // self.context.accumulate))
        if rows.share is not None:
            return list(rows.share.mine.split(size))
        # One part at least: also a process without rows has gradients to be averaged with the others'.
        return [slice(start, start + size) for start in range(0, max(1, count), size)]

    def cross_entropies(self, rows: StepRows) -> Iterator[Tensor]:
        """The weighted cross-entropy of the model on the rows, part by part."""
        for part in self.parts(rows):
            yield weighted_cross_entropy(self.context.model(rows.x[part]), rows.y[part], rows.weight[part])

    def start_epoch(self) -> None:  # noqa: B027 - most methods have nothing to do here
        """Called before every epoch."""

    @classmethod  # noqa: B027 - as start_epoch
    def check_installed(cls) -> None:
        """Look for the packages the method needs besides those of training.

        Raises:
            ModuleNotFoundError: one is not installed; the message names the extra that brings it.
        """

    @classmethod
    def settled(cls, config: TrainConfig) -> TrainConfig:
        """``config`` with the method's own values where it leaves them to the method."""
        return config

    def mixed_rows(self) -> Tensor | None:
        """Number of rows of the last step that found a helpful partner; None where nothing is selected."""
        return None

    def class_table(self, rows: StepRows) -> Alignment | None:
        """The class-pair alignment in force, for the record; None where nothing is selected or the buffer is empty."""
        return None

    def extras(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What is to be kept in the buffer besides rows ``x (N, ...)`` and ``y (N,)`` shown to it: tensors (N, ...)."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers between steps, of tensors and plain values; the generator is not part of it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - as start_epoch
        """Take up a state of :meth:`state_dict`."""


def average_gradients(model: nn.Module, group: Group) -> None:
    """Replace the parameters' gradients by the mean over all processes."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for gradient, total in zip(gradients, sum_over(gradients, group), strict=True):
        gradient.copy_(total / size_of(group))


def weighted_cross_entropy(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """sum_n weight_n CE(logits_n, y_n), for class indices or label vectors y.

    Label vectors may be wider than the logits: classes for which the model has no output yet have no share in them.
    """
    if y.ndim == 2:
        y = y[:, : logits.shape[1]]
    return (F.cross_entropy(logits, y, reduction="none") * weight).sum()


class ER(Method):
    """Experience replay: cross-entropy on the current and the replayed rows."""

    def losses(self, rows: StepRows) -> Iterator[Tensor]:
        """CE(current) + tau CE(replayed)."""
        return self.cross_entropies(rows)


class Finetune(ER):
    """Cross-entropy on the current rows alone."""

    replays = False


class Wrapping(Method):
    """A method on top of another, ``inner``, which has the say in everything that is not overridden.

    Attributes:
        inner: the other method's class.
    """

    inner: ClassVar[type[Method]] = ER

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._inner = self.inner(context)
        self.replays, self.wants_balanced = self._inner.replays, self._inner.wants_balanced
        self.draws_more = self.draws_more or self._inner.draws_more
        self.keeps_more = self.keeps_more or self._inner.keeps_more
        self.gathers = self.gathers or self._inner.gathers

    @classmethod
    def settled(cls, config: TrainConfig) -> TrainConfig:
        return cls.inner.settled(config)

    def losses(self, rows: StepRows) -> Iterator[Tensor]:
        return self._inner.losses(rows)

    def start_epoch(self) -> None:
        self._inner.start_epoch()

    def mixed_rows(self) -> Tensor | None:
        return self._inner.mixed_rows()

    def class_table(self, rows: StepRows) -> Alignment | None:
        return self._inner.class_table(rows)

    def extras(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return self._inner.extras(x, y)

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._inner.load_state_dict(state)
