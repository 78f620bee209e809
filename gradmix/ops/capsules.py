"""Tensors as DLPack capsules, for the extension: the export of a tensor itself takes ten times as long."""

from __future__ import annotations

from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]


def as_capsules(*tensors: Tensor | None) -> tuple[object, ...]:
    """Return the capsules of tensors without a gradient; None stays None.

    Each shares its tensor's memory, and is used once.
    """
    return tuple([None if tensor is None else to_dlpack(tensor) for tensor in tensors])
