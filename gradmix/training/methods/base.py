"""What every method is: a way to turn a step's rows into gradients.

A step's rows are those of the current task and the replayed ones. The loss is a weighted sum over rows, CE(current) +
tau CE(replayed), each a mean over its own rows; a mixed row has the weight of the row it was made from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmix.alignment import Alignment
from gradmix.buffers import BufferRows, ReplayBuffer
from gradmix.training.clock import Clock
from gradmix.training.config import MixConfig, ReplayConfig, TrainConfig


@dataclass(frozen=True)
class StepRows:
    """The rows of one step.

    Attributes:
        x: (N, ...) inputs, the current task's first unless they come in one shuffled stream.
        y: (N,) int64 class indices.
        weight: (N,) weight of each row's loss.
        candidates: (x, y) where partners may come from; None: the step's own rows.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    candidates: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Pixels:
    """What turns inputs back into pixels in [0, 1]: ``x * std + mean``; values by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Context:
    """What a method is built from.

    Attributes:
        model: the network in training.
        buffer: the replay buffer, filled after each task.
        num_classes: width of the model's output.
        mix: the mixing settings.
        generator: source of the method's randomness.
        clock: times the sections ``selection`` and, where a method draws or augments rows itself, ``data``.
        replay: the replay settings.
        counts: (num_classes,) int64, the rows of each class that the current task's training draws from: all of the
            current classes', those in the buffer of the old ones. Kept up to date by the trainer.
        draw_replayed: draws another batch of replayed rows, apart from the step's own and augmented as they are; None
            while the buffer is empty.
        pixels: what the inputs were normalised by; None: they are pixels in [0, 1], or no images.
        autocast: makes the context in which forward passes of the loss are made.
        scaler: scales the loss before its backward pass.
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
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))


class Method(ABC):
    """A way to learn from a step's rows.

    Attributes:
        replays: whether a step holds replayed rows at all.
        wants_balanced: whether a step must hold class-balanced ``candidates`` whatever the settings.
    """

    replays = True
    wants_balanced = False

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def loss(self, rows: StepRows) -> Tensor:
        """The step's loss, a scalar with a graph."""

    def backward(self, rows: StepRows) -> Tensor:
        """Leave the step's gradients, scaled by the context's scaler, in the parameters' empty ``.grad``.

        Returns:
            The loss, detached and unscaled.
        """
        with self.context.autocast():
            loss = self.loss(rows)
        self.context.scaler.scale(loss).backward()
        return loss.detach()

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


def weighted_cross_entropy(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """sum_n weight_n CE(logits_n, y_n), for class indices or label vectors y."""
    return (F.cross_entropy(logits, y, reduction="none") * weight).sum()


class ER(Method):
    """Experience replay: cross-entropy on the current and the replayed rows."""

    def loss(self, rows: StepRows) -> Tensor:
        """CE(current) + tau CE(replayed)."""
        return weighted_cross_entropy(self.context.model(rows.x), rows.y, rows.weight)


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

    @classmethod
    def settled(cls, config: TrainConfig) -> TrainConfig:
        return cls.inner.settled(config)

    def loss(self, rows: StepRows) -> Tensor:
        return self._inner.loss(rows)

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
