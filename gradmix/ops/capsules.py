"""Tensors as DLPack capsules, for the extension: the export of a tensor itself takes ten times as long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from gradmix import _extension
from gradmix.ops.registration import is_plain


def as_capsules(*tensors: Tensor | None) -> tuple[object, ...]:
    """Return the capsules of tensors without a gradient; None stays None.

    Each shares its tensor's memory, and is used once.
    """
    return tuple([None if tensor is None else to_dlpack(tensor) for tensor in tensors])


def extension_for(dtypes: tuple[torch.dtype, ...], *tensors: Tensor) -> Any | None:
    """Return the extension if it is there and can read these tensors' memory from end to end, else None.

    Args:
        dtypes: what the tensors may be of.
        tensors: without a gradient.
    """
    extension = _extension.load()
    if extension is None or not is_plain(*tensors):
        return None
    for value in tensors:
        array = value.layout == torch.strided and value.device.type == "cpu" and value.is_contiguous()
        if not array or value.dtype not in dtypes:
            return None
    return extension
