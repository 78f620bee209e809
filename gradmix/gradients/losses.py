"""The loss of each sample, and the factor that scales it in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmix.ops.dtypes import work_dtype
from gradmix.ops.labels import dense_labels

Loss: TypeAlias = Callable[[Tensor, Any], Tensor]
"""Maps logits (N, ...) and y (N, ...) to the losses of the samples, (N,)."""

Scaler: TypeAlias = "float | torch.amp.GradScaler | None"

HALF_SCALE = 1024.0
"""Factor of the loss under float16 without a scaler: about the scale of a GradScaler for one sample."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy (N,) of each sample; y: (N,) class indices or (N, C) label vectors."""
    logits = logits.to(work_dtype(logits.dtype))
    if y.is_floating_point():
        y = dense_labels(y, logits.shape[1], logits.dtype)
    return F.cross_entropy(logits, y, reduction="none")


def check_losses(losses: object, samples: int) -> Tensor:
    """Return the losses if there is one for each sample.

    Raises:
        ValueError: the losses are reduced, or no tensor.
    """
    if isinstance(losses, Tensor) and losses.shape == (samples,):
        return losses
    came = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
    raise ValueError(f"loss: returned {came}, expected the {samples} samples' losses, ({samples},), not reduced")


def check_output(logits: Tensor, samples: int) -> Tensor:
    """Return the logits if they are (N, ...) with N = ``samples``.

    Raises:
        ValueError: the logits have another shape.
    """
    if logits.ndim == 0 or len(logits) != samples:
        raise ValueError(
            f"model: returned logits of shape {tuple(logits.shape)} for {samples} samples, expected ({samples}, C)"
        )
    return logits


def loss_scale(scaler: Scaler, device: torch.device) -> float:
    """Return the factor of the loss in the backward pass, by which the gradients are divided.

    Raises:
        TypeError, ValueError: ``scaler`` is neither a positive number nor a GradScaler.
    """
    if scaler is None:
        half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
        return HALF_SCALE if half else 1.0
    if isinstance(scaler, torch.amp.GradScaler):
        return float(scaler.get_scale())
    if isinstance(scaler, bool) or not isinstance(scaler, (int, float)):
        raise TypeError(f"scaler: got {type(scaler).__name__}, expected a positive number or a torch.amp.GradScaler")
    if not 0 < scaler < float("inf"):
        raise ValueError(f"scaler: got {scaler}, expected a positive number")
    return float(scaler)
