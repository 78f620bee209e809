"""The interface of all methods: from the samples of a step to gradients.

A step has samples of the current task and replayed ones. The loss is CE(current) + tau CE(replayed), each a mean over
its own samples. A mixed sample has the weight of the sample it was made from.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradmix._moved import alias_attribute
from gradmix.criteria import Alignment
from gradmix.replay.buffer import BufferSamples, ReplayBuffer
from gradmix.replay.sources import SampleSource
from gradmix.runtime.collectives import Group, all_reduce_sum, size_of
from gradmix.training.config import MixConfig, ReplayConfig, TrainConfig
from gradmix.training.loop.clock import Clock
from gradmix.training.loop.sharding import Share

Part: TypeAlias = "slice | Tensor"
"""A part of a step's samples: a slice, or their indices."""


@dataclass(frozen=True)
class StepSamples:
    """The samples of one step.

    Attributes:
        x: (N, ...) inputs, the current task's first unless they come in one shuffled stream.
        y: (N,) int64 class indices.
        weight: (N,) weight of each sample's loss.
        candidates: (x, y) from which partners are chosen; None: from the step's own samples.
        replayed: (N,) bool, the samples that come from the buffer; None: not known.
        share: the samples this process trains on, where several processes make the step together; None: all.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    candidates: tuple[Tensor, Tensor] | None = None
    replayed: Tensor | None = None
    share: Share | None = None


@dataclass(frozen=True)
class Pixels:
    """The constants, by channel, that turn inputs back into pixels in [0, 1]: ``x * std + mean``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Passes:
    """Settings of the forward and backward passes of a loss.

    Attributes:
        autocast: makes the context for the forward passes.
        scaler: scales the loss before its backward pass.
        accumulate: number of forward and backward passes in a step, each of a part of its samples.
        group: the processes that make every step together, each on its share of the samples; None: this one alone.
    """

    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    accumulate: int = 1
    group: Group = None


@dataclass
class Context:
    """The parts that a method is built from.

    Attributes:
        model: the network in training; replaced by another wrapper of the same network when its head has grown.
        buffer: the replay buffer, filled after each task.
        num_classes: number of classes of the whole stream.
        mix: the mixing settings.
        generator: source of the method's randomness.
        clock: times the sections ``selection`` and, where a method draws or augments samples itself, ``data``.
        replay: the replay settings.
        counts: (num_classes,) int64, the number of samples of each class that the current task's training draws from:
            all samples of current classes, the buffer's of old ones. The trainer keeps it up to date.
        draw_replayed: draws another batch of replayed samples, apart from the step's own and augmented in the same
            way; None while the buffer is empty.
        pixels: the constants by which the inputs were normalised; None: pixels in [0, 1], or no images.
        source: what is read for the reference gradient if the buffer holds numbers of samples and not the samples.
        passes: settings of the loss's forward and backward passes.
        growing: whether the model's head grows as classes arrive, up to ``num_classes``.
    """

    model: nn.Module
    buffer: ReplayBuffer
    num_classes: int
    mix: MixConfig
    generator: torch.Generator
    clock: Clock
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    draw_replayed: Callable[[], BufferSamples | None] = lambda: None
    pixels: Pixels | None = None
    source: SampleSource | None = None
    passes: Passes = field(default_factory=Passes)
    growing: bool = False


@dataclass(frozen=True)
class Needs:
    """The needs of a method, which the training loop meets; ``a | b`` are those of a method around another one.

    Attributes:
        replayed: a step holds replayed samples.
        balanced: a step holds class-balanced ``candidates``, whatever the settings.
        second_batch: another batch of replayed samples is drawn in every step.
        whole_step: all processes that make a step get all of its samples; otherwise each gets its share alone.
        extras: something is kept in the buffer beside the samples (:meth:`Method.extras`).
        one_process: steps cannot be made by several processes together.
    """

    replayed: bool = True
    balanced: bool = False
    second_batch: bool = False
    whole_step: bool = False
    extras: bool = False
    one_process: bool = False

    def __or__(self, other: Needs) -> Needs:
        either = {name: value or getattr(other, name) for name, value in vars(self).items()}
        return Needs(**either | {"replayed": self.replayed and other.replayed})


class Method(ABC):
    """A way to learn from a step's samples.

    Attributes:
        needs: what it needs of the loop.
    """

    needs: Needs = Needs()

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def losses(self, samples: StepSamples) -> Iterator[Tensor]:
        """Yield the terms of the step's loss: scalars with graphs that share no activations."""

    def loss(self, samples: StepSamples) -> Tensor:
        """Return the step's loss, a scalar with a graph."""
        return reduce(operator.add, self.losses(samples))

    def backward(self, samples: StepSamples) -> Tensor:
        """Compute the step's gradients, scaled by the context's scaler, into the parameters' empty ``.grad``.

        Returns:
            The loss, detached and unscaled.
        """
        context = self.context
        if context.passes.accumulate == 1:
            with context.passes.autocast():
                loss = self.loss(samples)
            context.passes.scaler.scale(loss).backward()
            return loss.detach()
        parts, total = iter(self.losses(samples)), torch.zeros((), device=samples.weight.device)
        part: Tensor | None
        model = context.model
        shared = model if isinstance(model, DistributedDataParallel) else None
        with nullcontext() if shared is None else shared.no_sync():
            while True:
                with context.passes.autocast():
                    part = next(parts, None)
                if part is None:
                    break
                # At once, so that its activations are freed before the next term makes its own.
                context.passes.scaler.scale(part).backward()
                total += part.detach()
        if shared is not None:
            average_gradients(shared, context.passes.group)
        return total

    def parts(self, samples: StepSamples) -> list[Part]:
        """Return the parts of this process's samples, ``context.passes.accumulate`` of them."""
        count = len(samples.y) if samples.share is None else len(samples.share.mine)
        size = max(1, -(-count // self.context.passes.accumulate))
        if samples.share is not None:
            return list(samples.share.mine.split(size))
        # At least one part: a process without samples also has gradients to be averaged with the others'.
        return [slice(start, start + size) for start in range(0, max(1, count), size)]

    def cross_entropies(self, samples: StepSamples) -> Iterator[Tensor]:
        """Yield the weighted cross-entropy of the model on the samples, part by part."""
        for part in self.parts(samples):
            yield weighted_cross_entropy(self.context.model(samples.x[part]), samples.y[part], samples.weight[part])

    def start_epoch(self) -> None:  # noqa: B027 - most methods have nothing to do here
        """Prepare for an epoch; called before each."""

    @classmethod  # noqa: B027 - as start_epoch
    def check_installed(cls) -> None:
        """Check that the packages are installed that the method needs besides those of training.

        Raises:
            ModuleNotFoundError: one is not installed; the message names the extra that brings it.
        """

    @classmethod
    def resolve_config(cls, config: TrainConfig) -> TrainConfig:
        """Return ``config`` with the method's own values in the fields that are left to the method."""
        return config

    def mixed_samples(self) -> Tensor | None:
        """Return the number of samples of the last step with a helpful partner; None if nothing is selected."""
        return None

    mixed_rows = alias_attribute("Method", "mixed_rows", "mixed_samples")

    def class_table(self, samples: StepSamples) -> Alignment | None:
        """Return the current alignment of class pairs; None if nothing is selected or the buffer is empty."""
        return None

    def extras(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return what the buffer keeps with the samples ``x (N, ...)``, ``y (N,)`` shown to it: tensors (N, ...)."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what the method keeps between steps, as tensors and plain values, without the generator."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - as start_epoch
        """Restore a state of :meth:`state_dict`."""


def average_gradients(model: nn.Module, group: Group) -> None:
    """Replace the parameters' gradients by the mean over all processes."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for gradient, total in zip(gradients, all_reduce_sum(gradients, group), strict=True):
        gradient.copy_(total / size_of(group))


def weighted_cross_entropy(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return sum_n weight_n CE(logits_n, y_n), for class indices or label vectors y.

    Label vectors may have more classes than the logits: those for which the model has no output yet have weight 0.
    """
    if y.ndim == 2:
        y = y[:, : logits.shape[1]]
    return (F.cross_entropy(logits, y, reduction="none") * weight).sum()


class ER(Method):
    """Experience replay: cross-entropy on the current and the replayed samples."""

    def losses(self, samples: StepSamples) -> Iterator[Tensor]:
        """CE(current) + tau CE(replayed)."""
        return self.cross_entropies(samples)


class Finetune(ER):
    """Cross-entropy on the current samples alone."""

    needs = Needs(replayed=False)


class Wrapping(Method):
    """A method around another one, which decides everything that is not overridden.

    ``resolve_config`` and ``check_installed`` are of the wrapper alone; a
    :class:`~gradmix.training.methods.composition.Composition` asks each layer.

    Args:
        context: what the method is built from.
        inner: the method inside; None: experience replay.
    """

    def __init__(self, context: Context, inner: Method | None = None) -> None:
        super().__init__(context)
        self._inner = ER(context) if inner is None else inner
        self.needs = type(self).needs | self._inner.needs

    def losses(self, samples: StepSamples) -> Iterator[Tensor]:
        return self._inner.losses(samples)

    def start_epoch(self) -> None:
        self._inner.start_epoch()

    def mixed_samples(self) -> Tensor | None:
        return self._inner.mixed_samples()

    def class_table(self, samples: StepSamples) -> Alignment | None:
        return self._inner.class_table(samples)

    def extras(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return self._inner.extras(x, y)

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._inner.load_state_dict(state)
