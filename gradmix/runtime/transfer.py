"""Copies of tensors to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device_async(host: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device`` of a tensor that was made for it, not waited for."""
    if device.type == "cuda" and host.device.type == "cpu":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
