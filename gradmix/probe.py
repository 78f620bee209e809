"""Looking at a model without leaving a trace.

Whatever runs inside :func:`untouched` sees the model in evaluation mode and without autograd; afterwards, also after an
exception, training flags and the random number generators are as they were. In evaluation mode BatchNorm reads its
running statistics and does not update them, and dropout is off.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from gradmix.ops.waiting import look_is_free, require


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile`` and data-parallel wrappers.

    Forward passes made for selection go through it: compiled code may skip the hook that captures the head, and a
    data-parallel wrapper would synchronise with processes that make no such pass.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter (or buffer); the CPU for a model with neither."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the body with ``model`` in evaluation mode and without autograd, then restore everything.

    The flags are set on the modules themselves: ``train()`` and ``eval()`` are overridden by models that freeze or
    merge layers in them.
    """
    training = [module for module in model.modules() if module.training]
    device = device_of(model)
    with preserved_rng(device), torch.no_grad():
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def preserved_rng(device: torch.device | None = None) -> Iterator[None]:
    """Restore the global generators of torch (CPU and ``device``), numpy and Python afterwards.

    Data sets may draw from any of them in ``__getitem__``.
    """
    host = torch.get_rng_state()
    accelerator = torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None
    python, legacy_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(host)
        if accelerator is not None:
            assert device is not None
            torch.cuda.set_rng_state(accelerator, device)
        random.setstate(python)
        np.random.set_state(legacy_numpy)


def require_finite(first_row: int = 0, **named: Tensor) -> None:
    """Raise ValueError naming the argument and the first row of it that holds a NaN or an infinity.

    Where a look at values is free, the usual case costs one reduction a tensor (a sum is finite only if every entry
    is); where it is not, finite or not, the rows' largest entries are found (:mod:`gradmix.ops.waiting`).

    Args:
        first_row: index of row 0 in the whole argument, of which the tensors are a chunk.
        named: tensors (N, ...) by the name that the error uses; underscores are shown as spaces.
    """
    floats = {name: value for name, value in named.items() if value.is_floating_point() and value.numel()}
    if not floats:
        return
    free = all(look_is_free(value.device) for value in floats.values())
    if free and torch.isfinite(torch.stack([value.sum(dtype=torch.float32) for value in floats.values()]).sum()):
        return
    for name, value in floats.items():
        # The error must not keep a batch of images alive until the next call.
        largest = torch.linalg.vector_norm(value.reshape(len(value), -1), torch.inf, dim=1)
        require(~torch.isfinite(largest), partial(_not_finite, name.replace("_", " "), first_row, largest))


def _not_finite(name: str, first_row: int, largest: Tensor, row: int) -> ValueError:
    content = "NaN" if torch.isnan(largest[row]) else "an infinity"
    return ValueError(f"{name}: row {first_row + row} holds {content}, expected finite values")
