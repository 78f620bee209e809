"""Random crops and flips for a whole batch in one gather."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gradmix.graphs import sent


def random_crop_flip(x: Tensor, padding: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """Pads every image with zeros, cuts a random window of the old size, and mirrors it left to right half the time.

    Offsets are uniform in ``0..2*padding`` in both directions, drawn for every image apart. On normalised images the
    zeros of the border are the mean colour.

    Args:
        x: Images ``(N, C, H, W)`` of any dtype and layout, on any device.
        padding: Pixels added on every side, at least 0.
        generator: Source of randomness, on any device; ``None``: torch's global one on the CPU.

    Returns:
        New images ``(N, C, H, W)``, contiguous, with the dtype and device of ``x``.

    Raises:
        ValueError: ``x`` does not have four dimensions, or ``padding`` is negative.
    """
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected images (N, C, H, W)")
    if padding < 0:
        raise ValueError(f"padding: got {padding}, expected at least 0")
    n, channels, height, width = x.shape
    source = torch.device("cpu") if generator is None else generator.device
    span = 2 * padding + 1
    draws = torch.stack([torch.randint(limit, (n,), generator=generator, device=source) for limit in (span, span, 2)])
    draws = sent(draws, x.device)
    top, left, mirrored = draws.unsqueeze(2)
    rows = top + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device)
    columns = left + torch.where(mirrored == 1, width - 1 - columns, columns)
    places = rows.unsqueeze(2) * (width + 2 * padding) + columns.unsqueeze(1)  # (N, H, W)
    padded = F.pad(x, (padding,) * 4).flatten(2)
    index = places.reshape(n, 1, height * width).expand(n, channels, height * width)
    return padded.gather(2, index).reshape(x.shape)
