"""Draws: the pairs that are proposed, and the choice of one helpful partner for each sample.

All random numbers come from the caller's generator, usually on the host, and are copied to the device without a wait.
A run therefore draws the same numbers on a CPU and on a GPU.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gradmix.ops.draw_partners import DrawnPartners, draw_partners_op
from gradmix.runtime.transfer import to_device_async

Policy = Literal["uniform", "permute", "best"]


class Proposal:
    """The draw of one partner for each sample; the policy ``permute`` makes it before pairs are scored.

    Args:
        policy: as :func:`gradmix.select_pairs`.
        count: N, samples.
        candidates: M.
        own: whether the candidates are the samples themselves.
        generator: source of the numbers.
        device: device of the numbers.
    """

    def __init__(
        self, policy: Policy, count: int, candidates: int, own: bool, generator: torch.Generator, device: torch.device
    ) -> None:
        self.generator = generator
        self._shape, self._own, self._device = (count, candidates), own, device
        self._permuted = self._permutation() if policy == "permute" else None

    def _permutation(self) -> Tensor:
        (count, candidates), source = self._shape, self.generator
        if candidates >= count:
            drawn = torch.randperm(candidates, generator=source, device=source.device)[:count]
        else:
            drawn = torch.randint(candidates, (count,), generator=source, device=source.device)
        return to_device_async(drawn, self._device)

    def pairs(self, itself: bool) -> Tensor | None:
        """Return the pairs to score, sample and candidate, (K, 2) int64, ordered by sample; None: all N x M.

        Args:
            itself: whether a sample may be its own partner.
        """
        others = self._own and not itself
        if self._permuted is None and not others:
            return None
        if self._permuted is not None:
            pairs = torch.stack([torch.arange(self._shape[0], device=self._device), self._permuted], 1)
        else:
            pairs = all_pairs(*self._shape, self._device)
        return pairs[pairs[:, 0] != pairs[:, 1]] if others else pairs

    def numbers(self) -> Tensor:
        """Return the random numbers (N,) of :func:`choose`; call it once."""
        if self._permuted is not None:
            return self._permuted
        source = self.generator
        drawn = torch.rand(self._shape[0], generator=source, device=source.device, dtype=torch.float64)
        return to_device_async(drawn, self._device)


def all_pairs(count: int, candidates: int, device: torch.device) -> Tensor:
    """Return all pairs, (count * candidates, 2) int64, ordered by sample."""
    places = (torch.arange(n, device=device) for n in (count, candidates))
    return torch.cartesian_prod(*places).view(-1, 2)


def choose(allowed: Tensor, score: Tensor | None, numbers: Tensor, policy: Policy, own: bool) -> DrawnPartners:
    """Choose one allowed partner for each sample.

    Args:
        allowed: (N, M) bool.
        score: (N, M), the larger the better; only the policy ``best`` reads it.
        numbers: (N,), from :meth:`Proposal.numbers`.
        policy: as :func:`gradmix.select_pairs`.
        own: whether the candidates are the samples themselves.
    """
    return DrawnPartners(*draw_partners_op(allowed, numbers, score, allowed.shape[1], policy, own, "auto"))


def choose_any(candidates: int, numbers: Tensor, policy: Policy, own: bool) -> DrawnPartners:
    """Choose a partner for each sample as :func:`choose` does, with every candidate allowed and all scores equal."""
    return DrawnPartners(*draw_partners_op(None, numbers, None, candidates, policy, own, "auto"))
