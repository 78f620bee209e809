"""Looking at a model without leaving a trace.

Whatever runs inside :func:`untouched` sees the model in evaluation mode and without autograd; afterwards, also after an
exception, training flags and the random number generators are as they were. In evaluation mode BatchNorm reads its
running statistics and does not update them, and dropout is off.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradmix.inputs import InputTree, leaves
from gradmix.ops.waiting import look_is_free, require


class ModelNotFiniteError(ValueError):
    """What a model makes of finite inputs is not finite: as a rule its training has diverged."""


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


def is_compiled(model: nn.Module) -> bool:
    """Whether :func:`unwrap` finds a module compiled by ``torch.compile`` on its way in."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            return True
        if not isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            return False
        model = model.module


def without_compilation() -> AbstractContextManager[Any]:
    """Run what is compiled inside a model, or in place, as it was written, where this torch can.

    Compiled code may skip hooks, and torch 2.5 may compile it anew for each call.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None else set_stance("force_eager")


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter (or buffer); the CPU for a model with neither."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the body with ``model`` in evaluation mode and without autograd, then restore everything.

    The flags are set on the modules themselves: ``train()`` and ``eval()`` are overridden by models that freeze or
    merge layers in them. Autocast keeps no half-precision copies of weights meanwhile: made without autograd, they
    would serve the caller's next forward pass too, which then had no gradient (seen with torch 2.5). What is made in
    the body are ordinary tensors also where the caller is in inference mode: they may be kept and used outside it.
    """
    training = [module for module in model.modules() if module.training]
    device = device_of(model)
    cached = torch.is_autocast_cache_enabled()
    with preserved_rng(device), torch.inference_mode(False), torch.no_grad():
        try:
            torch.set_autocast_cache_enabled(False)
            for module in training:
                module.training = False
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
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


def require_finite(first_row: int = 0, **named: InputTree) -> None:
    """Raise ValueError naming the argument and the first row of it that holds a NaN or an infinity.

    Where a look at values is free, the usual case costs one reduction a tensor (a sum is finite only if every entry
    is); where it is not, finite or not, the rows' largest entries are found (:mod:`gradmix.ops.waiting`).

    Args:
        first_row: index of row 0 in the whole argument, of which the tensors are a chunk.
        named: trees of tensors (N, ...) by the name that the error uses; underscores are shown as spaces.
    """
    floats = {
        path: value
        for name, tree in named.items()
        for path, value in leaves(tree, name.replace("_", " "))
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    }
    if not floats or _seen_finite(*floats.values()):
        return
    for name, value in floats.items():
        _require_rows(value, partial(_row_not_finite, name, first_row))


def require_finite_pairs(logits: Tensor, i: Tensor, j: Tensor) -> None:
    """The same for logits (K, C) of mixed rows ``i`` and ``j``, both (K,)."""
    if not _seen_finite(logits):
        _require_rows(logits, partial(_pair_not_finite, i, j))


def _seen_finite(*values: Tensor) -> bool:
    """Whether a look is free and finds everything finite, by one synchronisation."""
    if not all(look_is_free(value.device) for value in values):
        return False
    return bool(torch.isfinite(torch.stack([value.sum(dtype=torch.float32) for value in values]).sum()))


def _require_rows(value: Tensor, error: Callable[[int, str], ValueError]) -> None:
    """Require the rows of ``value`` to be finite; ``error`` is made of the first that is not, and what it holds."""
    # The largest entries: the question must not keep a batch of images alive until the next call.
    largest = torch.linalg.vector_norm(value.reshape(len(value), -1), torch.inf, dim=1)
    require(~torch.isfinite(largest), lambda row: error(row, "NaN" if torch.isnan(largest[row]) else "an infinity"))


def _row_not_finite(name: str, first_row: int, row: int, content: str) -> ValueError:
    kind = ModelNotFiniteError if name.startswith("the model") else ValueError
    return kind(f"{name}: row {first_row + row} holds {content}, expected finite values")


def _pair_not_finite(i: Tensor, j: Tensor, k: int, content: str) -> ValueError:
    return ModelNotFiniteError(
        f"the model's logits of mixed rows {int(i[k])} and {int(j[k])}: {content}, expected finite values"
    )
