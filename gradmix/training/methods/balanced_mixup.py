"""Balanced-MixUp: the step's samples mixed with class-balanced ones."""

from __future__ import annotations

import numpy as np
import torch

from gradmix.model.head import HeadOutput
from gradmix.training.methods.base import Needs, StepSamples
from gradmix.training.methods.mixing_space import Mixture
from gradmix.training.methods.mixup import LinearMixing

ALPHA = 0.2
"""The parameter of Beta(alpha, 1): the larger of the two values the paper settles on, 0.1 and 0.2."""

_SEED_LIMIT = 1 << 62


class BalancedMixup(LinearMixing):
    """Balanced-MixUp (Galdran et al. 2021): x~ = (1 - lam) x + lam x', one lam ~ Beta(alpha, 1) a step.

    x is a sample of the step, x' one of a class-balanced draw from the current task and the buffer; labels likewise.
    The weight falls on the sample with 1 / (1 + alpha) on average, so alpha has another meaning than Mixup's: it is
    :data:`ALPHA`, not ``mix.alpha``. Departing from the paper, whose first stream is a plain data set, a step's samples
    are current and replayed ones.

    Raises:
        ValueError: a step brings no balanced samples, or fewer than its own.
    """

    needs = Needs(balanced=True, whole_step=True)

    def mixture(self, samples: StepSamples, outputs: HeadOutput | None) -> Mixture:
        if samples.candidates is None or len(samples.candidates[1]) < len(samples.y):
            got = "none" if samples.candidates is None else len(samples.candidates[1])
            raise ValueError(
                f"candidates: got {got}, expected {len(samples.y)} class-balanced samples for balanced-mixup"
            )
        lam = draw_balanced_lam(ALPHA, self.context.generator)
        other_x, index, other_y = self.draw(samples)
        y = (1 - lam) * self.one_hot(samples.y) + lam * self.one_hot(other_y)
        return Mixture(other_x, index, 1 - lam, y)


def draw_balanced_lam(alpha: float, generator: torch.Generator) -> float:
    """One weight of the balanced sample from Beta(alpha, 1), drawn as :func:`gradmix.mixing_weight.draw_lam` draws."""
    seed = int(torch.randint(_SEED_LIMIT, (1,), generator=generator, device=generator.device))
    return float(np.random.default_rng(seed).beta(alpha, 1.0))
