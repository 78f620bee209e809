"""Draws from a replay buffer: which of the samples held are drawn, from a generator."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_uniform(held: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw samples uniformly: without replacement if ``n <= held``, with replacement otherwise.

    Args:
        held: Samples to draw from; at least 1 unless ``n`` is 0.
        n: Samples to draw.
        generator: Source of randomness, on any device.

    Returns:
        (n,) int64 on the CPU, places in order of arrival.
    """
    if n <= held:
        return torch.randperm(held, generator=generator, device=generator.device)[:n].cpu()
    return torch.randint(held, (n,), generator=generator, device=generator.device).cpu()


def draw_balanced(labels: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw samples class-balanced: each of the P classes gets ``n // P`` or one more of the samples, in random order.

    Args:
        labels: (R,) int64 on the CPU, the labels of the samples to draw from; at least one unless ``n`` is 0.
        n: Samples to draw.
        generator: Source of randomness, on any device.

    Returns:
        (n,) int64 on the CPU, places among ``labels``.
    """
    device = generator.device
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    classes, counts = torch.unique(labels, return_counts=True)
    # A random order within every class: sorted by label, shuffled beforehand.
    shuffled = torch.randperm(len(labels), generator=generator, device=device).cpu()
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    starts = torch.cumsum(counts, 0) - counts
    # Draw number d goes to class d mod P of a random order of classes, as that class's draw number d div P.
    draws = torch.arange(n, device="cpu")
    which = torch.randperm(len(classes), generator=generator, device=device).cpu()[draws % len(classes)]
    places = by_class[starts[which] + (draws // len(classes)) % counts[which]]
    return places[torch.randperm(n, generator=generator, device=device).cpu()]
