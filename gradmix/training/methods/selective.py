"""GradMix as a method of training, by class and by sample, with the controls it can be held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradmix.alignment import Alignment, Criterion, Estimator
from gradmix.head import HeadCapture, HeadOutput
from gradmix.probe import unwrap
from gradmix.selection import GradMix, Pairs
from gradmix.training.config import TrainConfig
from gradmix.training.methods.base import Context, StepRows
from gradmix.training.methods.controls import controlled
from gradmix.training.methods.mixup import Mixing


class SelectiveMixup(Mixing):
    """GradMix: a row is mixed only with one that keeps the mixture from pointing against the buffer's gradient."""

    criterion: Criterion
    default_estimator: Estimator
    default_refresh: int

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        mix = self.settled(TrainConfig(mix=context.mix)).mix
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
        self._pairs: Pairs | None = None

    @classmethod
    def settled(cls, config: TrainConfig) -> TrainConfig:
        mix = config.mix
        return replace(
            config,
            mix=replace(
                mix,
                estimator=mix.estimator or cls.default_estimator,
                refresh=cls.default_refresh if mix.refresh is None else mix.refresh,
            ),
        )

    def start_epoch(self) -> None:
        self._mixup.start_epoch()

    def originals(self, x: Tensor) -> tuple[Tensor, HeadOutput | None]:
        model = self.context.model
        if unwrap(model) is not model:
            # Compiled code passes by the hook that captures the head, so the selection makes a pass of its own.
            return super().originals(x)
        with HeadCapture(model, example=x[:1]) as capture:
            logits = model(x)
        return logits, capture.output

    def mixed(self, rows: StepRows, outputs: HeadOutput | None) -> tuple[Tensor, Tensor]:
        context = self.context
        with context.clock("selection"):
            pairs = self._mixup.select(rows.x, rows.y, candidates=rows.candidates, outputs=outputs)
            if context.mix.control != "none" and self._mixup.reference is not None:
                pairs = controlled(pairs, context.model, context.mix, context.generator, context.buffer.y)
        self._pairs = pairs
        return pairs.mix()

    def mixed_rows(self) -> Tensor | None:
        return None if self._pairs is None else self._pairs.helpful.sum()

    def class_table(self, rows: StepRows) -> Alignment | None:
        table = self._mixup.table
        return None if table is None else table.average(self.context.mix.alpha)

    def state_dict(self) -> dict[str, Any]:
        return {"mixup": self._mixup.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mixup.load_state_dict(state["mixup"])


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
