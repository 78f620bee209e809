"""Asynchronous copies of tensors to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device_async(host: Tensor, device: torch.device) -> Tensor:
    """Copy ``host`` to ``device`` without a wait; the caller must not change it afterwards."""
    if device.type == "cuda" and host.device.type == "cpu":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
