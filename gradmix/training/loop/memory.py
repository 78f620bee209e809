"""The most memory a run held at any time."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def start_peak_memory(device: torch.device) -> None:
    """Begin anew to look for the peak, as far as the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _RESET.write_text("5")  # Linux: the peak resident size becomes the present one


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors took up; elsewhere the process's peak resident size, 0 where unknown.

    Where :func:`start_peak_memory` could not begin anew (outside Linux), the peak is that of the process's whole life.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ModuleNotFoundError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
