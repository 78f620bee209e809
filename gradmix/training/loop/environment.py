"""The device of a run, and the record of machine and versions."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

import gradmix
from gradmix.calibration.summary import record_of
from gradmix.doctor import processor_name


def pick_device(name: str) -> torch.device:
    """The torch device called ``name``; for ``auto`` a GPU if there is one, else the CPU.

    Raises:
        ValueError: no such device, or it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: got {name!r}, expected auto, cpu or a device torch can use here ({reason})"
        ) from None
    return device


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, threads and date, as plain values; on a GPU also the kernels that are used."""
    kernels = record_of(device)
    return {
        "gradmix": gradmix.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "processor": processor_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **({} if kernels is None else {"kernels": kernels}),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
