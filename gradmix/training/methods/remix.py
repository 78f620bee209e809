"""Remix: Mixup whose labels favour the rarer class."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmix.mixing_weight import draw_lam
from gradmix.model.head import HeadOutput
from gradmix.ops.labels import dense_labels
from gradmix.training.methods.base import Context, StepSamples
from gradmix.training.methods.mixing_space import Mixture
from gradmix.training.methods.mixup import LinearMixing

KAPPA = 3.0
"""How many times as many samples a class must have to give way to another: the paper's."""
TAU = 0.5
"""The weight below which the more frequent class's input may be ignored in the label: the paper's."""


class Remix(LinearMixing):
    """Remix (Chou et al. 2020): inputs as in Mixup, labels by :func:`label_weight`.

    The class counts are those of what training draws from now: the current task's samples and the buffer's.

    Raises:
        ValueError: the context has no class counts.
    """

    def mixture(self, samples: StepSamples, outputs: HeadOutput | None) -> Mixture:
        lam = draw_lam(self.context.mix.alpha, self.context.generator)
        other_x, index, other_y = self.draw(samples)
        return Mixture(other_x, index, lam, remix_labels(self.context, lam, samples.y, other_y))


def remix_labels(context: Context, lam: Tensor | float, y: Tensor, other_y: Tensor) -> Tensor:
    """The label vectors (N, C) float32 of samples mixed with weight ``lam``, each with its partner.

    Args:
        context: The run, with the counts of classes.
        lam: The samples' weight in the mixed inputs, a number or (N,).
        y: (N,) int64, the samples' classes.
        other_y: (N,) int64, their partners' classes.

    Raises:
        ValueError: the context has no class counts.
    """
    counts = context.counts
    if counts.shape != (context.num_classes,):
        raise ValueError(f"counts: got shape {tuple(counts.shape)}, expected ({context.num_classes},) for remix")
    counts = counts.to(y.device)
    weight = label_weight(lam, counts[y], counts[other_y]).unsqueeze(1)
    own, other = (dense_labels(labels, context.num_classes, torch.float32) for labels in (y, other_y))
    return weight * own + (1 - weight) * other


def label_weight(lam: Tensor | float, count: Tensor, other: Tensor) -> Tensor:
    """The label weight of samples mixed with weight ``lam``.

    0 where n_i / n_j >= kappa and lam < tau; 1 where n_i / n_j <= 1 / kappa and 1 - lam < tau; else lam.

    Args:
        lam: the samples' weight in the mixed inputs, a number or (N,).
        count: (N,) samples n_i of each sample's own class; a class without any is taken to have one.
        other: (N,) samples n_j of its partner's class.

    Returns:
        (N,) float32.
    """
    count, other = count.clamp(min=1), other.clamp(min=1)
    weight = torch.as_tensor(lam, dtype=torch.float32, device=count.device).expand(count.shape)
    weight = weight.masked_fill((lam < TAU) & (count >= KAPPA * other), 0.0)
    return weight.masked_fill((1 - lam < TAU) & (KAPPA * count <= other), 1.0)
