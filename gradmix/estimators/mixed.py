"""Estimator ``mixed``: forwards mixed inputs, one pass for each pair; exact for the last layer's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmix.class_table import ClassTable, sample_scores, table_of
from gradmix.criteria import PairScores
from gradmix.estimators.base import Screening
from gradmix.estimators.forwarded_pairs import as_matrix, pairs_of
from gradmix.estimators.last_layer import LastLayerEstimator
from gradmix.labelled_samples import HeadSamples, LabelledSamples
from gradmix.mixtures import Mixtures
from gradmix.model.head import HeadOutput
from gradmix.model.head_capture import forward_head
from gradmix.model.inputs import mix_trees, take
from gradmix.model.unchanged import require_finite_pairs
from gradmix.ops.dtypes import exact_dtype, without_autocast
from gradmix.ops.mixed_alignment import in_range, mixed_residual


class Mixed(LastLayerEstimator):
    """The estimator ``mixed`` of one network."""

    name = "mixed"

    def score(
        self, mixtures: Mixtures[HeadSamples], gradient: Tensor, pairs: Tensor | None, norms: bool = True
    ) -> PairScores:
        """Forward and score ``pairs``; None: all."""
        self.check_fits(mixtures, gradient)
        pairs = pairs_of(mixtures, pairs)
        samples = (mixtures.batch, mixtures.partners)
        return as_matrix(mixtures, pairs, *self._score_pairs(samples, gradient, pairs, float(mixtures.lam)))

    def class_table(
        self,
        mixtures: Mixtures[HeadSamples],
        gradient: Tensor,
        per_class: int,
        threshold: float,
        generator: torch.Generator,
    ) -> tuple[ClassTable, Screening | None]:
        """The table of ``per_class`` random mixtures for each pair of classes, divided among the mixing weights."""
        samples = mixtures.batch

        def score(pairs: Tensor, lam: float) -> tuple[Tensor, Tensor]:
            return self._score_pairs((samples, samples), gradient, pairs, lam)

        scores = sample_scores(score, samples.y, per_class, gradient.dtype, generator)
        return table_of(scores, self.reference_norm(gradient)), None

    def _score_pairs(
        self, samples: tuple[LabelledSamples, LabelledSamples], gradient: Tensor, pairs: Tensor, lam: float
    ) -> tuple[Tensor, Tensor]:
        """Return inner products and norms, both (K,), of ``pairs`` (K, 2) of the first and the second samples."""
        (own, other), network = samples, self.network
        inner, norm = [gradient.new_empty(0)], [gradient.new_empty(0)]
        for start in range(0, len(pairs), network.chunk_size):
            i, j = pairs[start : start + network.chunk_size].unbind(1)
            output = forward_head(network.model, network.head, mix_trees(take(own.x, i), other.x, j, lam))
            require_finite_pairs(output.logits, i, j)
            part = last_layer_scores(output, own.y[i], other.y[j], lam, gradient)
            inner.append(part[0])
            norm.append(part[1])
        return torch.cat(inner), torch.cat(norm)


def last_layer_scores(
    output: HeadOutput, y_a: Tensor, y_b: Tensor, lam: float, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Return <r [h; 1]^T, G> and ||r [h; 1]^T||, both (N,), with the residual r for the labels lam y_a + (1 - lam) y_b.

    Args:
        output: the head's input h (N, d) and logits (N, C) for the mixtures.
        y_a, y_b: labels of the N pairs.
        lam: weight of the first.
        gradient: the reference G, (C, d + 1) or (C, d).
    """
    features, logits = output
    dtype, exact = gradient.dtype, exact_dtype(gradient.device)
    with without_autocast(features.device):
        least = in_range(features, features, gradient, dtype)[-1].least
        h = features.to(exact)
        residual = mixed_residual(logits.to(exact), y_a, y_b, lam, least)
        toward = residual @ gradient.to(exact)  # (N, d + 1): G^T r
        inner = (toward[:, : h.shape[1]] * h).sum(1)
        square = h.square().sum(1)
        if gradient.shape[1] == h.shape[1] + 1:
            inner = inner + toward[:, -1]
            square = square + 1
        return inner.to(dtype), torch.linalg.vector_norm(residual, dim=1).mul(square.sqrt()).to(dtype)
