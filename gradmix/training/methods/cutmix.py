"""CutMix: a rectangle of one image pasted into another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradmix.mixing_weight import draw_lam
from gradmix.model.head import HeadOutput
from gradmix.training.methods.base import StepSamples
from gradmix.training.methods.mixup import Mixing


class CutMix(Mixing):
    """CutMix (Yun et al. 2019): one rectangle a step, taken from each sample's random partner.

    lam ~ Beta(alpha, alpha). The rectangle has 1 - lam of the image's area and its centre anywhere in the image; what
    would stick out is cut off. The label weight is the share of the image that the sample kept, counted in pixels. As
    the other mixing methods do here it mixes in every step; the authors' code for CIFAR does so in every other one.

    Raises:
        ValueError: the samples are no images (N, C, H, W).
    """

    def mix(self, samples: StepSamples, outputs: HeadOutput | None) -> tuple[Tensor, Tensor]:
        if samples.x.dim() != 4:
            raise ValueError(
                f"x: got samples of shape {tuple(samples.x.shape)}, expected images (N, C, H, W) for cutmix"
            )
        height, width = samples.x.shape[-2:]
        lam = draw_lam(self.context.mix.alpha, self.context.generator)
        top, bottom, left, right = draw_box(height, width, lam, self.context.generator)
        kept = 1 - (bottom - top) * (right - left) / (height * width)
        other_x, other_y = self.draw_partners(samples)
        x = samples.x.clone()
        x[:, :, top:bottom, left:right] = other_x[:, :, top:bottom, left:right]
        return x, kept * self.one_hot(samples.y) + (1 - kept) * self.one_hot(other_y)


def draw_box(height: int, width: int, lam: float, generator: torch.Generator) -> tuple[int, int, int, int]:
    """A box of about (1 - lam) height width pixels around a uniform centre, clipped: ``top, bottom, left, right``."""
    share = math.sqrt(1 - lam)
    bounds: list[int] = []
    for size in (height, width):
        centre = int(torch.randint(size, (1,), generator=generator, device=generator.device))
        extent = int(size * share)
        start = centre - extent // 2
        bounds += [max(start, 0), min(start + extent, size)]
    return bounds[0], bounds[1], bounds[2], bounds[3]
