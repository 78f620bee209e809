"""Scores of single pairs as a matrix: what the estimators share that forward each mixture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmix.criteria import PairScores
from gradmix.draw import all_pairs
from gradmix.mixtures import Mixtures


def pairs_of(mixtures: Mixtures[Any], pairs: Tensor | None) -> Tensor:
    """(K, 2) ``pairs``, or all of them."""
    count = (len(mixtures.batch), len(mixtures.partners))
    return all_pairs(*count, mixtures.batch.y.device) if pairs is None else pairs


def as_matrix(mixtures: Mixtures[Any], pairs: Tensor, inner: Tensor, norm: Tensor) -> PairScores:
    """The scores (K,) of ``pairs`` (K, 2) at their places in (N, M); NaN elsewhere."""
    count, at = (len(mixtures.batch), len(mixtures.partners)), pairs.unbind(1)
    filled = (torch.full(count, float("nan"), dtype=v.dtype, device=v.device).index_put_(at, v) for v in (inner, norm))
    return PairScores(*filled)
