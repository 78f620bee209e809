"""Labelled rows that are read by their places: tensors at hand, or items of a data set, read when they are wanted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Rows(ABC):
    """Labelled rows in a fixed order.

    Attributes:
        y: Their labels ``(N,)`` int64, on the CPU.
    """

    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one row as it is read."""

    @abstractmethod
    def read(self, places: Tensor) -> Tensor:
        """The rows at ``places (n,)`` int64: ``(n, ...)``, on the CPU."""

    @abstractmethod
    def take(self, places: Tensor, y: Tensor | None = None) -> Rows:
        """The rows at ``places (n,)`` as rows of their own, with the labels ``y (n,)``; None: those they have."""


class TensorRows(Rows):
    """Rows at hand in one tensor.

    Args:
        x: Inputs ``(N, ...)``.
        y: Labels ``(N,)`` int64.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        if len(x) != len(y):
            raise ValueError(f"x: got {len(x)} rows, expected {len(y)} as there are labels")
        self.x, self.y = x, y

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def read(self, places: Tensor) -> Tensor:
        return self.x[places]

    def take(self, places: Tensor, y: Tensor | None = None) -> TensorRows:
        return TensorRows(self.x[places], self.y[places] if y is None else y)


class StoredRows(Rows):
    """Rows that are items of a data set, each read (from a file, say) when it is wanted.

    Args:
        items: A map-style data set: ``items[i]`` is a tensor, all of one shape and dtype, uint8 images or float rows.
        y: Labels ``(N,)`` int64.
        at: Which items they are ``(N,)`` int64; None: all of them, in order.
    """

    def __init__(self, items: Any, y: Tensor, at: Tensor | None = None) -> None:
        self.items, self.y = items, y
        self.at = torch.arange(len(y)) if at is None else at
        if len(self.at) != len(y):
            raise ValueError(f"at: got {len(self.at)} items, expected {len(y)} as there are labels")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.items[int(self.at[0])].shape)

    def read(self, places: Tensor) -> Tensor:
        return torch.stack([self.items[int(item)] for item in self.at[places]])

    def take(self, places: Tensor, y: Tensor | None = None) -> StoredRows:
        return StoredRows(self.items, self.y[places] if y is None else y, self.at[places])


def rows_of(name: str, data: Any, labels: Any = None) -> Rows:
    """Rows of whatever holds inputs and labels.

    Args:
        name: What to call ``data`` in errors.
        data: An ``(x, y)`` pair of tensors or arrays; a ``TensorDataset`` of two; or a map-style data set whose items
            are ``(input, label)``, the input a tensor, an array or a Pillow image; or, with ``labels`` or an attribute
            of that name, whose items are inputs alone. Inputs of one shape.
        labels: ``(N,)`` integers, which spares reading every item for its label. None: the data set's attribute
            ``labels``, ``targets`` or ``y`` if it has one, else every item is read once.

    Raises:
        TypeError: ``data`` is nothing of the kind, or a label is no integer.
        ValueError: No rows, a negative label, or labels and rows differ in number.
    """
    tensors = getattr(data, "tensors", None)
    if isinstance(tensors, tuple) and len(tensors) == 2:
        data = tensors
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(v, (Tensor, np.ndarray)) for v in data):
        x, y = data
        x = _tensor_of(x) if isinstance(x, np.ndarray) else x
        rows: Rows = TensorRows(x, _labels(name, y if labels is None else labels, len(x)))
    elif (
        hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
        and not isinstance(data, (tuple, list, str, bytes, Mapping, Tensor, np.ndarray))
    ):
        if labels is None:
            kept = (getattr(data, key, None) for key in ("labels", "targets", "y"))
            labels = next((found for found in kept if _is_labels(found)), None)
        if labels is None:
            labels = [data[i][1] for i in range(len(data))]
        rows = StoredRows(Inputs(data), _labels(name, labels, len(data)))
    else:
        raise TypeError(
            f"{name}: got {type(data).__name__}, expected an (x, y) pair of tensors, or a data set with a length whose "
            "items are (input, label)"
        )
    if len(rows) == 0:
        raise ValueError(f"{name}: got no rows, expected at least one")
    return rows


class Inputs:
    """The inputs alone of a data set, as tensors; Pillow images become uint8 ``(C, H, W)``.

    Args:
        data: A map-style data set whose items are inputs, or tuples of an input and more.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        item = self.data[index]
        if isinstance(item, (tuple, list)):
            item = item[0]
        if isinstance(item, Tensor):
            return item
        if isinstance(item, np.ndarray):
            return _tensor_of(item)
        if hasattr(item, "getbands"):
            # A copy, as an array that shares memory with an image may not be written to.
            pixels = torch.from_numpy(np.array(item, dtype=np.uint8))
            return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
        raise TypeError(
            f"row {index}: got an input of type {type(item).__name__}, expected a tensor, an array or a Pillow image"
        )


def _tensor_of(array: np.ndarray) -> Tensor:
    """An array as a tensor, which shares its memory where it can."""
    if not array.flags.writeable or not array.dtype.isnative or min(array.strides, default=0) < 0:
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array)


def _is_labels(found: Any) -> bool:
    return isinstance(found, (Tensor, np.ndarray, Sequence)) and not isinstance(found, (str, bytes)) and len(found) > 0


def _labels(name: str, labels: Any, count: int) -> Tensor:
    """``labels`` as int64 on the CPU."""
    if isinstance(labels, Tensor):
        y = labels.cpu()
        integers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        found: Any = y.dtype
    else:
        array = np.asarray(labels)
        integers, found = array.dtype.kind in "iu" or array.size == 0, array.dtype
        y = torch.from_numpy(array.astype(np.int64)) if integers else torch.empty(array.shape, dtype=torch.int64)
    if y.ndim != 1 or len(y) != count:
        raise ValueError(f"{name}: got labels of shape {tuple(y.shape)}, expected ({count},), one for each row")
    if not integers:
        raise TypeError(f"{name}: got labels of dtype {found}, expected integers")
    if len(y) and int(y.min()) < 0:
        raise ValueError(f"{name}: got the label {int(y.min())}, expected integers of at least 0")
    return y.to(torch.int64)
