"""Scores of single pairs as a matrix, for the estimators that forward each mixture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmix.criteria import PairScores
from gradmix.draw import all_pairs
from gradmix.mixtures import Mixtures


def pairs_of(mixtures: Mixtures[Any], pairs: Tensor | None) -> Tensor:
    """Return ``pairs`` (K, 2), or for None all pairs."""
    count = (len(mixtures.batch), len(mixtures.partners))
    return all_pairs(*count, mixtures.batch.y.device) if pairs is None else pairs


def as_matrix(mixtures: Mixtures[Any], pairs: Tensor, inner: Tensor, norm: Tensor) -> PairScores:
    """Return the scores (K,) of ``pairs`` (K, 2) as (N, M), NaN for all other pairs."""
    count, at = (len(mixtures.batch), len(mixtures.partners)), pairs.unbind(1)
    filled = (torch.full(count, float("nan"), dtype=v.dtype, device=v.device).index_put_(at, v) for v in (inner, norm))
    return PairScores(*filled)
