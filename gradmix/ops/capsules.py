"""Tensors as DLPack capsules, for the extension: the export of a tensor itself takes ten times as long."""

from __future__ import annotations

from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]


def as_capsule(tensor: Tensor) -> object:
    """The capsule of a contiguous tensor without a gradient; it shares the tensor's memory, and is used once."""
    return to_dlpack(tensor)


def as_capsules(*tensors: Tensor | None) -> tuple[object, ...]:
    """Those of several tensors; None stays None."""
    return tuple(None if tensor is None else to_dlpack(tensor) for tensor in tensors)
