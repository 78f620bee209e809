"""Whether a Triton body can run: the sentences that every operator's dispatch shares.

`gradmix.kernels` holds the kernels; they are imported by the call that launches one, since importing Triton takes long.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def unavailable_reason() -> str | None:
    """Why no Triton kernel can run on this machine, or None where one could; asked once."""
    try:
        from gradmix import kernels
    except ImportError:
        return "gradmix.kernels is not installed (a bare checkout does not have it)"
    return kernels.unavailable_reason()


def can_run(*tensors: Tensor) -> str | None:
    """None, or why Triton kernels cannot take these floating-point tensors."""
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            return f"it serves float32, bfloat16 and float16, and got {tensor.dtype}"
    return next(filter(None, (device_reason(tensor.device) for tensor in tensors)), None)


def device_reason(device: torch.device) -> str | None:
    """None, or why Triton kernels cannot take tensors on ``device``."""
    if device.type == "cuda" or (device.type == "cpu" and is_interpreted()):
        return None
    return f"it serves GPUs, and the tensors are on {device}"


@lru_cache(maxsize=1)
def is_interpreted() -> bool:
    """Whether Triton's kernels are run by its interpreter, on the CPU."""
    from gradmix import kernels

    return kernels.is_interpreted()
