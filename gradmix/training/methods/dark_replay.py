"""DER++ around any method: a loss that keeps the logits of replayed samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmix.model.head import logits_of
from gradmix.model.unchanged import leave_unchanged, unwrap
from gradmix.runtime.collectives import all_reduce_sum, size_of
from gradmix.training.config import TrainConfig
from gradmix.training.methods.base import Context, Method, Needs, StepSamples, Wrapping

LOGITS = "logits"
"""Name under which the buffer keeps the logits."""

_SAMPLES = 1024  # of one forward pass when logits are kept


class DarkReplay(Wrapping):
    """DER++ (Buzzega et al. 2020) with any method as its cross-entropy: loss = inner loss + a MSE(model(x'), z').

    x' is a batch of replayed samples of its own and z' the logits kept with them; the mean is over samples and all
    classes, those to come included, for the head has all outputs from the start; where it grows instead, over those it
    had. The original's beta is ``replay.tau``.

    Departing from the original, whose reservoir keeps logits as samples pass by in training, augmented, logits are
    those of the model at the end of a sample's task, in evaluation mode and without augmentation. So all methods see
    the same buffer, and logits of a half-trained model are not held on to. Samples x' are augmented as all replayed
    samples are.
    """

    weight: ClassVar[float] = 0.5
    needs = Needs(second_batch=True, extras=True)

    def __init__(self, context: Context, inner: Method | None = None) -> None:
        super().__init__(context, inner)
        own = context.replay.distillation
        self._weight = self.weight if own is None else own

    @classmethod
    def resolve_config(cls, config: TrainConfig) -> TrainConfig:
        own = config.replay.distillation
        replay = replace(config.replay, distillation=cls.weight if own is None else own)
        return replace(config, replay=replay)

    def losses(self, samples: StepSamples) -> Iterator[Tensor]:
        yield from super().losses(samples)
        replayed = self.context.draw_replayed()
        if replayed is None:
            return
        if LOGITS not in replayed.extras:
            raise ValueError(f"draw_replayed: got samples without {LOGITS!r}, expected those kept with them")
        logits = logits_of(self.context.model(replayed.x))
        kept = replayed.extras[LOGITS].to(logits.device)
        group = self.context.passes.group
        if not self.context.growing and group is None and len(kept):
            yield self._weight * F.mse_loss(logits.float(), kept)
            return
        # Nothing was kept for classes without an output at that time, and some may have none yet.
        kept = kept[:, : logits.shape[1]]
        known = torch.isfinite(kept)
        error = (logits.float() - kept.masked_fill(~known, 0.0)).square().masked_fill(~known, 0.0)
        # Each process has its share, possibly none; the mean over processes must be the mean over all samples.
        (count,) = all_reduce_sum([known.sum()], group)
        yield self._weight * size_of(group) * error.sum() / count.clamp(min=1)

    def extras(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        model = unwrap(self.context.model)
        with leave_unchanged(model):
            logits = [logits_of(model(part)).float() for part in x.split(_SAMPLES)]
        kept = torch.cat(logits)
        if self.context.growing:
            kept = F.pad(kept, (0, self.context.num_classes - kept.shape[1]), value=math.nan)
        return super().extras(x, y) | {LOGITS: kept}
