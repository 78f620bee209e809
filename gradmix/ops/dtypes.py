"""The dtypes that the operators compute and sum in."""

from __future__ import annotations

import torch


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what sums of tensors of ``dtype`` are computed in, and returned as."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without it: of mixing weights, and of what must not lose digits."""
    return torch.float32 if device.type == "mps" else torch.float64
