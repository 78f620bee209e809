"""The dtypes that the operators compute and sum in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what sums of tensors of ``dtype`` are computed in, and returned as."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without it: of mixing weights, and of what must not lose digits."""
    return torch.float32 if device.type == "mps" else torch.float64


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off on a device; where it is off, at no cost."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
