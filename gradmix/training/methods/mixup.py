"""Mixup, and what the methods share that mix inputs: the loss on mixed rows and, if asked for, on the originals."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from gradmix.graphs import sent
from gradmix.head import HeadOutput
from gradmix.mixing import draw_lam
from gradmix.ops.labels import dense_labels
from gradmix.training.methods.base import Method, StepRows, weighted_cross_entropy


class Mixing(Method):
    """What the mixing methods share: the loss on mixed rows and, if asked for, on the originals, each by half."""

    def loss(self, rows: StepRows) -> Tensor:
        model = self.context.model
        if not self.context.mix.originals:
            x, y = self.mixed(rows, None)
            return weighted_cross_entropy(model(x), y, rows.weight)
        logits, outputs = self.originals(rows.x)
        x, y = self.mixed(rows, outputs)
        return 0.5 * (
            weighted_cross_entropy(logits, rows.y, rows.weight) + weighted_cross_entropy(model(x), y, rows.weight)
        )

    def originals(self, x: Tensor) -> tuple[Tensor, HeadOutput | None]:
        """Logits of the original rows, and what of their forward pass is of use to :meth:`mixed`."""
        return self.context.model(x), None

    @abstractmethod
    def mixed(self, rows: StepRows, outputs: HeadOutput | None) -> tuple[Tensor, Tensor]:
        """Mixed inputs and label vectors; ``outputs`` as :meth:`originals` gave them."""

    def drawn_partners(self, rows: StepRows) -> tuple[Tensor, Tensor]:
        """A random partner for every row, ``x (N, ...)`` and ``y (N,)``: a permutation of the rows or candidates.

        Of candidates that are fewer than the rows, each row draws one by itself.
        """
        generator = self.context.generator
        x, y = (rows.x, rows.y) if rows.candidates is None else rows.candidates
        if len(y) >= len(rows.y):
            drawn = torch.randperm(len(y), generator=generator, device=generator.device)[: len(rows.y)]
        else:
            drawn = torch.randint(len(y), (len(rows.y),), generator=generator, device=generator.device)
        index = sent(drawn, rows.x.device)
        return x[index], y[index]

    def one_hot(self, y: Tensor) -> Tensor:
        """Label vectors (N, C) float32 of class indices (N,)."""
        return dense_labels(y, self.context.num_classes, torch.float32)


class Mixup(Mixing):
    """Mixup (Zhang et al. 2018): every row is mixed with a random one, with one lam ~ Beta(alpha, alpha) a step."""

    def mixed(self, rows: StepRows, outputs: HeadOutput | None) -> tuple[Tensor, Tensor]:
        lam = draw_lam(self.context.mix.alpha, self.context.generator)
        other_x, other_y = self.drawn_partners(rows)
        return lam * rows.x + (1 - lam) * other_x, lam * self.one_hot(rows.y) + (1 - lam) * self.one_hot(other_y)
