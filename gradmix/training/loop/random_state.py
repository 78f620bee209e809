"""The global random number generators, as plain values that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

MERSENNE_WORDS = 624
"""Words of the state of NumPy's global generator."""


def rng_state(device: torch.device) -> dict[str, Any]:
    """Copy the states of the global generators: torch's on the CPU and on the GPU ``device``, NumPy's and Python's.

    Raises:
        ValueError: NumPy's global generator is not its Mersenne Twister, which alone has a state of known form.
    """
    numpy: Any = np.random.get_state(legacy=False)
    if numpy["bit_generator"] != "MT19937":
        raise ValueError(f"numpy.random: got the global generator {numpy['bit_generator']}, expected MT19937")
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "python": random.getstate(),
    }


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Set the global generators back to what :func:`rng_state` returned for ``device``.

    Raises:
        ValueError: the state was taken with a GPU and ``device`` is none, or the other way round; or it is damaged.
    """
    if (state["cuda"] is not None) != (device.type == "cuda"):
        taken = "without a GPU" if state["cuda"] is None else "with a GPU"
        raise ValueError(f"device: got {device}, but the state was taken {taken}")
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    numpy = state["numpy"]
    if not 0 <= numpy["pos"] <= MERSENNE_WORDS or numpy["key"].shape != (MERSENNE_WORDS,):
        # NumPy itself would read beyond its key.
        raise ValueError(f"numpy: got position {numpy['pos']} in a key of shape {tuple(numpy['key'].shape)}")
    key = numpy["key"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["pos"], numpy["has_gauss"], numpy["gauss"]))
    random.setstate(state["python"])
