"""The methods compared: each turns a step's rows into a loss.

A step's rows are those of the current task, then the replayed ones. The loss is a weighted sum over rows, CE(current) +
tau CE(replayed), each a mean over its own rows; a mixed row has the weight of the row it was made from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmix.alignment import Alignment, Criterion, Estimator
from gradmix.buffers import ReplayBuffer
from gradmix.head import HeadCapture, HeadOutput
from gradmix.mixing import draw_lam
from gradmix.ops.labels import dense_labels
from gradmix.selection import GradMix
from gradmix.training.clock import Clock
from gradmix.training.config import MixConfig


@dataclass(frozen=True)
class StepRows:
    """The rows of one step.

    Attributes:
        x: (N, ...) inputs, the current task's first.
        y: (N,) int64 class indices.
        weight: (N,) weight of each row's loss.
        candidates: (x, y) where partners may come from; None: the step's own rows.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    candidates: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Context:
    """What a method is built from.

    Attributes:
        model: the network in training.
        buffer: the replay buffer, filled after each task.
        num_classes: width of the model's output.
        mix: the mixing settings.
        generator: source of the method's randomness.
        clock: times the section ``selection``.
    """

    model: nn.Module
    buffer: ReplayBuffer
    num_classes: int
    mix: MixConfig
    generator: torch.Generator
    clock: Clock


class Method(ABC):
    """A way to learn from a step's rows. ``replays``: whether the step holds replayed rows at all."""

    replays = True

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def loss(self, rows: StepRows) -> Tensor:
        """The step's loss, a scalar with a graph."""

    def start_epoch(self) -> None:  # noqa: B027 - most methods have nothing to do here
        """Called before every epoch."""

    @classmethod
    def settled(cls, mix: MixConfig) -> MixConfig:
        """``mix`` with the method's own values where it leaves them to the method."""
        return mix

    def mixed_rows(self) -> Tensor | None:
        """Number of rows of the last step that found a helpful partner; None where nothing is selected."""
        return None

    def class_table(self, rows: StepRows) -> Alignment | None:
        """The class-pair alignment in force, for the record; None where nothing is selected or the buffer is empty."""
        return None


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


class Mixing(Method):
    """What the mixing methods share: the loss on mixed rows and, if asked for, on the originals, each by half."""

    def loss(self, rows: StepRows) -> Tensor:
        model = self.context.model
        if not self.context.mix.originals:
            x, y = self.mixed(rows, None)
            return weighted_cross_entropy(model(x), y, rows.weight)
        capture = HeadCapture(model, example=rows.x[:1])
        with capture:
            logits = model(rows.x)
        x, y = self.mixed(rows, capture.output)
        return 0.5 * (
            weighted_cross_entropy(logits, rows.y, rows.weight) + weighted_cross_entropy(model(x), y, rows.weight)
        )

    @abstractmethod
    def mixed(self, rows: StepRows, outputs: HeadOutput | None) -> tuple[Tensor, Tensor]:
        """Mixed inputs and label vectors; ``outputs`` of the original rows if they were forwarded."""


class Mixup(Mixing):
    """Mixup (Zhang et al. 2018): every row is mixed with a random one, with one lam ~ Beta(alpha, alpha) a step."""

    def mixed(self, rows: StepRows, outputs: HeadOutput | None) -> tuple[Tensor, Tensor]:
        context = self.context
        lam = draw_lam(context.mix.alpha, context.generator)
        other_x, other_y = (rows.x, rows.y) if rows.candidates is None else rows.candidates
        drawn = torch.randperm(len(other_y), generator=context.generator, device=context.generator.device)
        partner = drawn[: len(rows.y)].to(rows.x.device)
        labels, other = (dense_labels(y, context.num_classes, torch.float32) for y in (rows.y, other_y[partner]))
        return lam * rows.x + (1 - lam) * other_x[partner], lam * labels + (1 - lam) * other


class SelectiveMixup(Mixing):
    """GradMix: a row is mixed only with one that keeps the mixture from pointing against the buffer's gradient."""

    criterion: Criterion
    default_estimator: Estimator
    default_refresh: int

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        mix = self.settled(context.mix)
        assert mix.estimator is not None
        self._mixup = GradMix(
            context.model,
            context.buffer,
            criterion=self.criterion,
            estimator=mix.estimator,
            alpha=mix.alpha,
            threshold=mix.threshold,
            policy=mix.policy,
            refresh=mix.refresh or "epoch",
            class_samples=mix.class_samples,
            num_classes=context.num_classes,
            generator=context.generator,
        )

    @classmethod
    def settled(cls, mix: MixConfig) -> MixConfig:
        return replace(
            mix,
            estimator=mix.estimator or cls.default_estimator,
            refresh=cls.default_refresh if mix.refresh is None else mix.refresh,
        )

    def start_epoch(self) -> None:
        self._mixup.start_epoch()

    def mixed(self, rows: StepRows, outputs: HeadOutput | None) -> tuple[Tensor, Tensor]:
        with self.context.clock("selection"):
            pairs = self._mixup.select(rows.x, rows.y, candidates=rows.candidates, outputs=outputs)
        return pairs.mix()

    def mixed_rows(self) -> Tensor | None:
        pairs = self._mixup.pairs
        return None if pairs is None else pairs.helpful.sum()

    def class_table(self, rows: StepRows) -> Alignment | None:
        table = self._mixup.table
        return None if table is None else table.average(self.context.mix.alpha)


class GradMixClass(SelectiveMixup):
    """GradMix with the paper's criterion: pairs of classes are judged, once per epoch."""

    criterion = "class"
    default_estimator = "mixed"
    default_refresh = 0


class GradMixSample(SelectiveMixup):
    """GradMix with every pair judged by itself, against a reference gradient computed every step."""

    criterion = "sample"
    default_estimator = "feature"
    default_refresh = 1

    def class_table(self, rows: StepRows) -> Alignment | None:
        # Nothing by class is kept, so the table of the model as it is now is made for the record.
        context = self.context
        by_class = GradMix(
            context.model,
            context.buffer,
            criterion="class",
            alpha=context.mix.alpha,
            class_samples=context.mix.class_samples,
            generator=torch.Generator().manual_seed(0),
        )
        by_class.select(rows.x, rows.y)
        return None if by_class.table is None else by_class.table.average(context.mix.alpha)


METHODS: dict[str, type[Method]] = {
    "finetune": Finetune,
    "er": ER,
    "mixup": Mixup,
    "gradmix": GradMixClass,
    "gradmix-sample": GradMixSample,
}
"""All methods by name."""
