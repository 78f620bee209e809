"""Batch normalisation in passes of a single sample: a last batch, a task or a buffer of one sample, a part of a batch.

A sample alone has no statistics: torch refuses it in training mode, and the run would end. So it is normalised by the
running statistics, which it does not change; without running statistics the sample is its own mean, and what is left of
it is the bias. Every other pass is as it was, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def serve_single_samples(model: nn.Module) -> None:
    """Have the model's batch normalisation take passes of a single sample, from now on.

    What is normalised over the samples of several processes stays as it is: there a sample of one process is not alone.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            module.register_forward_pre_hook(_before)
            module.register_forward_hook(_after, always_call=True)


def _before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x = inputs[0] if inputs else None
    # One value for each channel, where there are no samples at all.
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[0] != 1 or x.numel() != x.shape[1]:
        return None
    if getattr(module, "running_mean", None) is None:
        module._single_sample = "twice"  # type: ignore[assignment]
        return (torch.cat([x, x]), *inputs[1:])
    if module.training:
        module.training = False
        module._single_sample = "running"  # type: ignore[assignment]
    return None


def _after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    how = module.__dict__.pop("_single_sample", None)
    if how == "running":
        module.training = True
    return output[:1] if how == "twice" and isinstance(output, Tensor) else None
