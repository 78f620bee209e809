"""Estimator ``feature``: mixes samples at the head's input, so that no mixture is forwarded.

With features h = lam h_a + mu h_b, logits z = lam z_a + mu z_b and labels y = lam y_a + mu y_b, mu = 1 - lam, the
gradient of the last layer is (softmax(z) - y) [h; 1]^T. All pairs follow from a few matrix products
(:mod:`gradmix.ops.mixed_alignment`).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradmix.class_table import TABLE_LAMS, TABLE_SAMPLES, ClassTable
from gradmix.criteria import PairScores, class_index
from gradmix.estimators.base import Screening
from gradmix.estimators.last_layer import LastLayerEstimator
from gradmix.estimators.sampled_table import add_classes, make_sampled_table
from gradmix.labelled_samples import HeadSamples
from gradmix.mixtures import Mixtures
from gradmix.ops.class_pairs import class_pair_alignment
from gradmix.ops.labels import class_of
from gradmix.ops.mixed_alignment import Side, Weight, as_lams, mixed_alignment_op
from gradmix.references import ClassQuota


class Feature(LastLayerEstimator):
    """The estimator ``feature`` of one network."""

    name = "feature"
    mixes_inputs: ClassVar[bool] = False
    is_pure: ClassVar[bool] = True

    def score(
        self, mixtures: Mixtures[HeadSamples], gradient: Tensor, pairs: Tensor | None, norms: bool = True
    ) -> PairScores:
        """Score all pairs at once; ``pairs`` is ignored."""
        self.check_fits(mixtures, gradient)
        backend = self.network.backend
        return feature_scores(mixtures.batch, mixtures.partners, gradient, mixtures.lam, backend, norms=norms)

    def class_table(
        self,
        mixtures: Mixtures[HeadSamples],
        gradient: Tensor,
        per_class: int,
        threshold: float,
        generator: torch.Generator,
    ) -> tuple[ClassTable, Screening | None]:
        """The table of up to ``per_class`` samples of each class: of all pairs, or of many classes of some."""
        reference_norm, admitted = self.reference_norm(gradient), ClassQuota(per_class).admit(mixtures.batch.y)
        if len(admitted) > TABLE_SAMPLES:
            return make_sampled_table(mixtures.batch, gradient, reference_norm, per_class, self.network.backend), None
        samples = mixtures.batch.take(admitted)
        classes = torch.unique(class_of(samples.y))
        inner, norm = class_pair_alignment(
            Side(samples.features, samples.logits, samples.y),
            class_index(classes, class_of(samples.y)),
            len(classes),
            gradient,
            torch.tensor(TABLE_LAMS, dtype=torch.float64, device="cpu"),
            backend=self.network.backend,
        )
        return ClassTable(TABLE_LAMS, inner, norm, reference_norm, classes), None

    def extend_table(self, table: ClassTable, samples: HeadSamples, gradient: Tensor) -> ClassTable:
        """The table with the samples' classes, which are scored with the samples that it was made of."""
        return add_classes(table, samples, gradient, self.network.backend)


def feature_scores(
    batch: HeadSamples,
    partners: HeadSamples,
    gradient: Tensor,
    lam: Weight,
    backend: str = "auto",
    *,
    norms: bool = True,
) -> PairScores:
    """Return the scores (N, M) of all pairs, mixed in feature space; without checks.

    Args:
        batch: N samples.
        partners: M samples.
        gradient: the reference, (C, d + 1) or (C, d).
        lam: weight of the batch's sample.
        backend: of the operator ``mixed_alignment``.
        norms: whether norms are computed.
    """
    sides = [value for side in (batch, partners) for value in (side.features, side.logits, side.y)]
    weights = as_lams(lam, batch.features.device)
    inner, norm = mixed_alignment_op(*sides, gradient, weights, norms, "tf32x3", backend)
    return PairScores(inner[0], norm[0] if norms else None)
