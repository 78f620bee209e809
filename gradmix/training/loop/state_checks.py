"""Checks of the state in a checkpoint, before any of it is restored.

A digest says that a file is as it was written, not by whom. So every part is held against what it is to take the place
of: the same keys, types, shapes and dtypes, and numbers within their ranges. What is refused is a ValueError that names
the part; a missing key is a KeyError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def require_like(value: Any, like: Any, key: str) -> None:
    """Refuse a state of another form than a known one.

    Args:
        value: The state.
        like: The known one: dictionaries of the same keys, lists and tuples of the same lengths, tensors of the same
            shapes and dtypes, and values of the same types, of whatever content.
        key: What to call it in errors.
    """
    if type(value) is not type(like) and not (isinstance(value, Tensor) and isinstance(like, Tensor)):
        raise ValueError(f"{key}: got {type(value).__name__}, expected {type(like).__name__}")
    if isinstance(like, Mapping):
        for name in like:
            if name not in value:
                raise KeyError(name)
        if len(value) != len(like):
            raise ValueError(f"{key}: got the keys {_list_keys(value)}, expected {_list_keys(like)}")
        for name in like:
            require_like(value[name], like[name], f"{key}.{name}")
    elif isinstance(like, (list, tuple)):
        if len(value) != len(like):
            raise ValueError(f"{key}: got {len(value)} entries, expected {len(like)}")
        for place, (one, known) in enumerate(zip(value, like, strict=True)):
            require_like(one, known, f"{key}[{place}]")
    elif isinstance(like, Tensor):
        require_tensor(value, like.dtype, tuple(like.shape), key)
    elif type(like) is int:
        require_number(value, -(2**63), 2**63 - 1, key)


def require_tensor(value: Any, dtype: torch.dtype, shape: tuple[int | None, ...], key: str) -> Tensor:
    """Refuse anything but a tensor of that dtype and shape; None is any length that the tensor has memory for."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{key}: got {type(value).__name__}, expected a tensor")
    fits = value.ndim == len(shape) and all(want in (None, got) for got, want in zip(value.shape, shape, strict=True))
    if value.dtype != dtype or not fits:
        raise ValueError(f"{key}: got {value.dtype} of shape {tuple(value.shape)}, expected {dtype} of shape {shape}")
    if None in shape and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{key}: got a tensor of shape {tuple(value.shape)} that repeats its entries")
    return value


def require_number(value: Any, low: float, high: float, key: str) -> None:
    """Refuse anything but an int from ``low`` to ``high``."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{key}: got {value!r:.80}, expected an integer from {low} to {high}")


def require_order(value: Any, samples: int, key: str) -> None:
    """Refuse anything but an order of so many samples."""
    order = require_tensor(value, torch.int64, (samples,), key)
    if not torch.equal(order.sort().values, torch.arange(samples)):
        raise ValueError(f"{key}: got another tensor than an order of {samples} samples")


def _list_keys(keys: Any) -> str:
    return ", ".join(sorted(map(repr, keys)))[:200] or "none"
