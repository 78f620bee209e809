"""Whether tensors hold neither a NaN nor an infinity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.ops.capsules import as_capsules
from gradmix.ops.registration import is_plain

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def all_finite(*values: Tensor) -> bool:
    """Whether all entries are finite; the host waits for the device.

    On a GPU a False may be wrong: a sum can overflow.

    Args:
        values: tensors of floating-point dtypes.
    """
    extension: Any = _extension.load()
    values = tuple(value.detach() for value in values)
    if extension is not None and is_plain(*values) and all(map(_is_array, values)):
        finite: bool = extension.all_finite(as_capsules(*(v.view(-1) for v in values)), torch.get_num_threads())
        return finite
    # A sum is finite only if every entry is: one reduction for each tensor, and one wait.
    return bool(torch.isfinite(torch.stack([value.sum(dtype=torch.float32) for value in values]).sum()))


def _is_array(value: Tensor) -> bool:
    """Whether the extension can read a tensor's memory from end to end."""
    known = value.dtype in _DTYPES and value.layout == torch.strided and value.device.type == "cpu"
    return known and value.is_contiguous()
