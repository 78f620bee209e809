"""Labelled samples that are read by their places: tensors at hand, or items of a data set, read when wanted."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from gradmix.training.data.image_files import DamagedImageError, ImageFiles
from gradmix.training.data.pixels import eight_bits


class Samples(ABC):
    """Labelled samples in a fixed order.

    Attributes:
        y: Their labels ``(N,)`` int64, on the CPU.
    """

    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample as it is read."""

    @abstractmethod
    def read(self, places: Tensor) -> Tensor:
        """The samples at ``places (n,)`` int64: ``(n, ...)``, on the CPU."""

    @abstractmethod
    def take(self, places: Tensor, y: Tensor | None = None) -> Samples:
        """The samples at ``places (n,)`` as samples of their own, with the labels ``y (n,)``; None: those they have."""


class TensorSamples(Samples):
    """Samples at hand in one tensor.

    Args:
        x: Inputs ``(N, ...)``.
        y: Labels ``(N,)`` int64.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        if len(x) != len(y):
            raise ValueError(f"x: got {len(x)} samples, expected {len(y)} as there are labels")
        self.x, self.y = x, y

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def read(self, places: Tensor) -> Tensor:
        return self.x[places]

    def take(self, places: Tensor, y: Tensor | None = None) -> TensorSamples:
        return TensorSamples(self.x[places], self.y[places] if y is None else y)


class StoredSamples(Samples):
    """Samples that are items of a data set, each read (from a file, say) when it is wanted.

    Args:
        items: A map-style data set: ``items[i]`` is a tensor, all of one shape and dtype, uint8 images or float
            samples.
        y: Labels ``(N,)`` int64.
        at: Which items they are ``(N,)`` int64; None: all of them, in order.
        shape: Shape of an item, where it is known already; None: that of the first, which is read for it.
    """

    def __init__(self, items: Any, y: Tensor, at: Tensor | None = None, shape: tuple[int, ...] | None = None) -> None:
        self.items, self.y, self._shape = items, y, shape
        self.at = torch.arange(len(y)) if at is None else at
        if len(self.at) != len(y):
            raise ValueError(f"at: got {len(self.at)} items, expected {len(y)} as there are labels")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.items[int(self.at[0])].shape) if self._shape is None else self._shape

    def read(self, places: Tensor) -> Tensor:
        return torch.stack([self.items[int(item)] for item in self.at[places]])

    def take(self, places: Tensor, y: Tensor | None = None) -> StoredSamples:
        return StoredSamples(self.items, self.y[places] if y is None else y, self.at[places], self._shape)


def samples_of(name: str, data: Any, labels: Any = None, *, tokens: bool = False) -> Samples:
    """Samples of whatever holds inputs and labels.

    Args:
        name: What to call ``data`` in errors.
        data: An ``(x, y)`` pair of tensors or arrays; a ``TensorDataset`` of two; or a map-style data set whose items
            are ``(input, label)``, the input a tensor, an array or a Pillow image (:class:`Inputs`), the label an
            integer or a tensor or array of one; or, with ``labels`` or an attribute of that name, whose items are
            inputs alone. Inputs of one shape.
        labels: ``(N,)`` integers, which spares reading every item for its label. None: the data set's attribute
            ``labels``, ``targets`` or ``y``, if items have no labels of their own or the same ones. A few items are
            read to see that, all of them where the data set has a ``target_transform``, the attribute is no such list,
            or it differs from a label read: then labels are those that items give.
        tokens: Whether inputs are numbers of tokens; integers of any width become int64 then.

    Raises:
        TypeError: ``data`` is nothing of the kind, its items are none, or a label is no integer.
        ValueError: No samples, a negative label, labels and samples differ in number, an image has its channels last,
            or samples at hand hold numbers that are not finite; of items it is found when they are read.
    """
    # Only where items are the tensors' samples: a class derived from it may make others of them.
    plain = isinstance(data, TensorDataset) and type(data).__getitem__ is TensorDataset.__getitem__
    if plain and len(data.tensors) == 2:
        data = data.tensors
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(v, (Tensor, np.ndarray)) for v in data):
        x, y = data
        x = _tensor_of(name, x) if isinstance(x, np.ndarray) else x
        x = _readable(name, x, x.ndim - 1, tokens)
        at = first_not_finite(x)
        if at is not None:
            raise ValueError(f"{name}: sample {at} holds {NOT_FINITE}")
        samples: Samples = TensorSamples(x, _labels(name, y if labels is None else labels, len(x)))
    elif (
        hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
        and not isinstance(data, (tuple, list, str, bytes, Mapping, Tensor, np.ndarray))
    ):
        inputs = Inputs(data, tokens=tokens)
        first = None if len(data) == 0 or type(data) is ImageFiles else _first(name, data)
        y = _labels_of(name, data, labels, first)
        samples = StoredSamples(inputs, y, shape=None if first is None else inputs.shape_of(0, first.input))
    else:
        raise TypeError(
            f"{name}: got {type(data).__name__}, expected an (x, y) pair of tensors, or a data set with a length whose "
            "items are (input, label)"
        )
    if len(samples) == 0:
        raise ValueError(f"{name}: got no samples, expected at least one")
    return samples


class Inputs:
    """The inputs alone of a data set, as tensors.

    Pillow images become uint8 ``(C, H, W)``, of 8 bits a channel as
    :func:`~gradmix.training.data.pixels.eight_bits` makes them. So do tensors and arrays of two dimensions or more that
    are of 16 unsigned bits, scaled from 65535 to 255; bool becomes 0 and 255. Bytes and floats stay as they are.

    Args:
        data: A map-style data set whose items are inputs, or ``(input, label)``.
        tokens: As :func:`samples_of`.
    """

    def __init__(self, data: Any, *, tokens: bool = False) -> None:
        self.data, self._tokens = data, tokens

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        """The input of an item.

        Raises:
            DamagedImageError: It is an image of values whose range is not known, or holds numbers that are not finite.
            TypeError: It is of another kind, or the item is none.
            ValueError: It is an image whose channels come last.
        """
        return self._tensor(index, _item(f"sample {index}", self.data[index]).input)

    def shape_of(self, index: int, value: Any) -> tuple[int, ...] | None:
        """Shape of an input, ``value`` as it was read; None: it is a damaged one."""
        try:
            return tuple(self._tensor(index, value).shape)
        except DamagedImageError:
            return None

    def _tensor(self, index: int, value: Any) -> Tensor:
        name = f"sample {index}"
        if isinstance(value, np.ndarray):
            value = _tensor_of(name, value)
        elif hasattr(value, "getbands"):
            try:
                # A copy, as an array that shares memory with an image may not be written to.
                pixels = torch.from_numpy(np.array(eight_bits(value)))
            except ValueError as error:
                raise DamagedImageError(f"{name}: the image {error}") from error
            value = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: got an input of type {type(value).__name__}, expected a tensor, an array or a Pillow image"
            )
        x = _readable(name, value, value.ndim, self._tokens)
        if first_not_finite(x.unsqueeze(0)) is not None:
            raise DamagedImageError(f"{name}: holds {NOT_FINITE}")
        return x


NOT_FINITE = "NaN, an infinity or a number beyond float32, expected finite numbers"
"""What an error says of a sample that :func:`first_not_finite` finds."""

INTEGERS_OF_TEXT = "names, integers = numpy.unique(labels, return_inverse=True) makes integers of text"
"""What an error about labels of text advises."""


def first_not_finite(x: Tensor) -> int | None:
    """The first sample of ``x (N, ...)`` that holds something else than finite numbers of float32, or None."""
    if not x.is_floating_point() or x.numel() == 0:
        return None
    most = torch.finfo(torch.float32).max

    def finite(values: Tensor) -> bool:
        # Both are NaN where one value is; nothing as large as the values is made.
        return all(-most <= float(end) <= most for end in torch.aminmax(values))

    return None if finite(x) else next(sample for sample, values in enumerate(x) if not finite(values))


def _readable(name: str, x: Tensor, dimensions: int, tokens: bool) -> Tensor:
    """Inputs of so many dimensions each, in a dtype whose values mean to the trainer what they mean here."""
    if x.is_floating_point() or x.is_complex():
        return x
    if dimensions == 3 and not tokens and x.shape[-1] in (1, 3, 4) and x.shape[-3] > 4:
        raise ValueError(
            f"{name}: got an image of shape {tuple(x.shape[-3:])}, expected its channels first, (C, H, W): move the "
            "last axis to the front, or give floats, which are taken as they are"
        )
    if x.dtype == torch.uint8 and not tokens:
        return x
    if tokens:
        return x.to(torch.int64)
    if x.dtype == torch.bool:
        return x.to(torch.uint8).mul_(255)
    if dimensions >= 2 and x.dtype == torch.uint16:
        return x.to(torch.int32).mul_(510).add_(65535).floor_divide_(131070).to(torch.uint8)  # rounded
    if dimensions >= 3:
        raise TypeError(
            f"{name}: got an image of {x.dtype}, of which nothing tells what is black and what is white, expected "
            "uint8, uint16, bool, or floats as the model is to see them"
        )
    return x.to(torch.int64)


def _tensor_of(name: str, array: np.ndarray) -> Tensor:
    """An array as a tensor, which shares its memory where it can."""
    if not array.flags.writeable or not array.dtype.isnative or min(array.strides, default=0) < 0:
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise TypeError(f"{name}: got an array of {array.dtype}, expected numbers") from error


# ------------------------------------------------------------------------------------------------------------- labels

_ASKED = 16
"""Items of different labels that are asked whether an attribute holds what they say."""


class _Item(NamedTuple):
    input: Any
    label: Any  # None: it has none


def _item(name: str, item: Any) -> _Item:
    """An item of a data set as input and label."""
    if isinstance(item, (tuple, list)):
        if len(item) not in (1, 2):
            raise TypeError(
                f"{name}: got an item of {len(item)} entries, expected (input, label): which of them these are is not "
                "known, so wrap the data set in one that returns the two"
            )
        return _Item(item[0], _number(item[1]) if len(item) == 2 else None)
    if isinstance(item, (Mapping, str, bytes)) or item is None:
        keys = f" with the keys {', '.join(map(repr, list(item)[:5]))}" if isinstance(item, Mapping) else ""
        raise TypeError(
            f"{name}: got an item of type {type(item).__name__}{keys}, expected (input, label): wrap the data set in "
            "one that returns the two"
        )
    return _Item(item, None)


def _number(label: Any) -> Any:
    """The number in a tensor or array of one; any other label as it is."""
    return label.item() if isinstance(label, (Tensor, np.ndarray)) and math.prod(label.shape) == 1 else label


def _first(name: str, data: Any) -> _Item | None:
    try:
        return _item(name, data[0])
    except DamagedImageError:
        return None


def _labels_of(name: str, data: Any, labels: Any, first: _Item | None) -> Tensor:
    """The labels that the items of a data set give, without reading all of them where that can be known."""
    count = len(data)
    if labels is not None or type(data) is ImageFiles or count == 0:
        return _labels(name, getattr(data, "labels", ()) if labels is None else labels, count)
    kept = (getattr(data, key, None) for key in ("labels", "targets", "y"))
    attribute = next((found for found in kept if _is_labels(found)), None)
    transformed = getattr(data, "target_transform", None) is not None
    if first is not None and first.label is None:
        if attribute is None:
            raise TypeError(f"{name}: got items without a label, expected (input, label), or labels for them")
        return _labels(name, attribute, count)
    if attribute is not None and not transformed:
        if first is not None and not _is_number(first.label):  # which the attribute is not to be compared with
            return _labels(name, attribute, count)
        with suppress(TypeError, ValueError):  # an attribute of another meaning
            found = _labels(name, attribute, count)
            if all(_agrees(name, data, index, int(found[index])) for index in _of_several_labels(found)):
                return found
    rest = (_item(name, data[index]).label for index in range(1, count))
    return _labels(name, [_item(name, data[0]).label if first is None else first.label, *rest], count)


def _of_several_labels(labels: Tensor) -> list[int]:
    """Places of the first samples of some labels, spread over all of them."""
    different = torch.unique(labels)
    spread = torch.linspace(0, len(different) - 1, min(_ASKED, len(different))).round().long()
    return [int((labels == label).nonzero()[0]) for label in different[spread]]


def _agrees(name: str, data: Any, index: int, label: int) -> bool:
    """Whether an item gives this label, or none that can be compared."""
    try:
        said = _item(name, data[index]).label
    except DamagedImageError:
        return True
    return not _is_number(said) or bool(said == label)


def _is_number(label: Any) -> bool:
    return isinstance(label, (Number, np.bool_))


def _is_labels(found: Any) -> bool:
    return isinstance(found, (Tensor, np.ndarray, Sequence)) and not isinstance(found, (str, bytes)) and len(found) > 0


def _labels(name: str, labels: Any, count: int) -> Tensor:
    """``labels`` as int64 on the CPU."""
    if isinstance(labels, Tensor):
        y = labels.detach().cpu()
        integers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        found: Any = y.dtype
    else:
        flags = isinstance(labels, Sequence) and any(isinstance(label, (bool, np.bool_)) for label in labels)
        try:
            array = np.asarray(labels)
        except ValueError as error:  # vectors of several lengths
            raise TypeError(f"{name}: got labels that are not numbers ({error}), expected integers") from error
        integers = (array.dtype.kind in "iu" and not flags) or array.size == 0
        found = np.dtype(bool) if flags else array.dtype
        if integers and array.size and int(array.max()) > torch.iinfo(torch.int64).max:
            raise ValueError(f"{name}: got the label {int(array.max())}, expected one of 64 signed bits")
        y = torch.from_numpy(array.astype(np.int64)) if integers else torch.empty(array.shape, dtype=torch.int64)
    if y.ndim == 2 and y.shape[1] == 1:  # a column
        y = y.squeeze(1)
    if y.ndim != 1 or len(y) != count:
        raise ValueError(f"{name}: got labels of shape {tuple(y.shape)}, expected ({count},), one for each sample")
    if not integers:
        advice = f": {INTEGERS_OF_TEXT}" if isinstance(found, np.dtype) and found.kind in "OUS" else ""
        raise TypeError(f"{name}: got labels of dtype {found}, expected integers{advice}")
    y = y.to(torch.int64)
    if len(y) and int(y.min()) < 0:
        raise ValueError(f"{name}: got the label {int(y.min())}, expected integers of at least 0")
    return y
