"""Estimator ``jvp``: forwards mixed inputs and takes the derivative of their loss along the reference; exact.

The reference is the buffer's gradient with respect to all parameters. The derivative of a mixture's loss along it is
the inner product of both gradients; the mixture's gradient is not formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradmix.class_table import ClassTable, sample_scores, table_of
from gradmix.criteria import PairScores
from gradmix.estimators.base import Screening
from gradmix.estimators.forwarded_pairs import as_matrix, pairs_of
from gradmix.estimators.full_network import FullGradient, FullNetworkEstimator, check_memory
from gradmix.gradients.layers import WithoutRule
from gradmix.gradients.losses import Scaler
from gradmix.labelled_samples import LabelledSamples
from gradmix.mixtures import Mixtures
from gradmix.references import dtype_of


@dataclass(frozen=True)
class JvpEstimator:
    """Settings of the estimator ``jvp``: exact alignment of mixed inputs, over all parameters.

    A mixture costs a forward pass, one more call of each layer, a backward pass without weight gradients, and about
    as much again for its gradient's norm.

    Attributes:
        layers, without_rule, scaler: as :func:`gradmix.class_gradients`.
        memory: approximate bytes that a pass may take; None: half of the free memory of a GPU, 4 GiB on a CPU.
    """

    layers: str | Sequence[str] = "all"
    without_rule: WithoutRule = "error"
    scaler: Scaler = None
    memory: int | None = None

    def __post_init__(self) -> None:
        check_memory(self.memory)


class Jvp(FullNetworkEstimator):
    """The estimator ``jvp`` of one network."""

    def score(
        self, mixtures: Mixtures[LabelledSamples], gradient: FullGradient, pairs: Tensor | None, norms: bool = True
    ) -> PairScores:
        """Forward and score ``pairs``; None: all."""
        pairs = pairs_of(mixtures, pairs)
        return as_matrix(mixtures, pairs, *self.score_pairs(mixtures, gradient, pairs))

    def class_table(
        self,
        mixtures: Mixtures[LabelledSamples],
        gradient: FullGradient,
        per_class: int,
        threshold: float,
        generator: torch.Generator,
    ) -> tuple[ClassTable, Screening | None]:
        """The table of ``per_class`` random mixtures for each pair of classes, divided among the mixing weights."""

        def score(pairs: Tensor, lam: float) -> tuple[Tensor, Tensor]:
            return self.score_pairs(replace(mixtures, lam=lam), gradient, pairs)

        scores = sample_scores(score, mixtures.batch.y, per_class, dtype_of(gradient), generator)
        return table_of(scores, self.reference_norm(gradient).to(scores[0].inner)), None
