"""Triton kernels for the tile-regular operators. This version ships none: GPUs are served by plain torch.

The package exists so that its place, its name and its report are settled: :func:`unavailable_reason` tells whether a
Triton kernel could run on this machine. It is kept in ``kernels/`` of the source tree and installed as
``gradmix.kernels``.
"""

from __future__ import annotations

import importlib.util

import torch


def unavailable_reason() -> str | None:
    """Why no Triton kernel can run on this machine, or None where one could.

    Triton itself is not imported: finding it is enough, and importing it takes long.

    >>> reason = unavailable_reason()
    >>> reason is None or isinstance(reason, str)
    True
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is visible to torch"
    return None
