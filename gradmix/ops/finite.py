"""Whether tensors hold neither a NaN nor an infinity."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmix.ops.capsules import as_capsules, extension_for

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def all_finite(*values: Tensor) -> bool:
    """Whether all entries are finite; the host waits for the device.

    Where the extension does not look, a False may be wrong: a sum can overflow.

    Args:
        values: tensors of floating-point dtypes.
    """
    values = tuple(value.detach() for value in values)
    extension = extension_for(_DTYPES, *values)
    if extension is not None:
        finite: bool = extension.all_finite(as_capsules(*(v.view(-1) for v in values)), torch.get_num_threads())
        return finite
    # A sum is finite only if every entry is: one reduction for each tensor, and one wait.
    return bool(torch.isfinite(torch.stack([value.sum(dtype=torch.float32) for value in values]).sum()))
