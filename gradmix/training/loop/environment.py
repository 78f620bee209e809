"""The device of a run, and the record of machine and versions."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

import gradmix
from gradmix.calibration.summary import record_of
from gradmix.doctor import processor_name
from gradmix.training.config import TrainConfig


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


def pick_threads(config: TrainConfig, device: torch.device) -> int | None:
    """CPU threads for torch in a run of ``config``, a complete one; None: torch's own choice.

    The perceptron takes one on a CPU, unless the configuration or OMP_NUM_THREADS gives a number. Its step is many
    short calls, from which several threads gain nothing. And they wait for each other at the end of each call, which
    takes long where other programs use the same cores: a run took five times as long on two busy ones.
    """
    if config.threads is not None:
        return config.threads
    is_small = config.optim.model == "mlp" and device.type == "cpu"
    return 1 if is_small and "OMP_NUM_THREADS" not in os.environ else None


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
