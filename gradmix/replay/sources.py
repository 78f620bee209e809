"""Sources of samples, read in chunks: an ``(x, y)`` pair, a replay buffer, a data set or a data loader.

A source is one of:

- a tuple ``(x, y)``, or a list of the two whose second entry is a tensor or an array: x a tensor, an array or a tree of
  them (:mod:`gradmix.model.inputs`), y the labels of all samples;
- a :class:`gradmix.ReplayBuffer`;
- a Dataset, or any object with ``__len__`` and ``__getitem__``, such as a list, whose items are ``(x, y)`` of a sample;
- an IterableDataset of such items, or a DataLoader of batches ``(x, y)``;
- a function without arguments that returns one of these, called at every read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias, Union

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from gradmix.model.inputs import check_inputs, map_tensors, num_samples, take
from gradmix.ops.labels import as_class_indices, check_labels
from gradmix.replay.buffer import ReplayBuffer
from gradmix.runtime.collectives import Group, local_share, rank_of, size_of

SampleSource: TypeAlias = Union[
    "tuple[Any, Any]", "list[Any]", ReplayBuffer, "DataLoader[Any]", "Callable[[], Any]", "Iterable[Any]", Any
]

CHUNK = 512
"""Default number of samples of one forward pass."""

EXPECTED = (
    "a ReplayBuffer, an (x, y) pair of tensors or arrays, a Dataset, a DataLoader, an object of (x, y) samples with "
    "__len__ and __getitem__, or a function that returns one of these"
)

PICKED = (
    "DataLoader(data, 256, collate_fn=lambda samples: default_collate([{} for sample in samples])) of torch.utils.data"
)
"""The advice for items that are no ``(x, y)``; the blank is the expression that makes ``(x, y)`` of one item."""


def as_pair(name: str, pair: object, *, any_targets: bool = False) -> tuple[Any, Any]:
    """Check a pair and return its tensors.

    Arrays become tensors that share their memory, and integer labels become int64.

    Args:
        name: Name of the argument in error messages.
        pair: A pair ``(x, y)`` of tensors, arrays or trees of them; or a buffer, for all of its samples.
        any_targets: Whether y may be a tree of tensors (N, ...) of any dtype.

    Returns:
        x, a tree of tensors (N, ...); and y, (N,) class indices or (N, C) label vectors, or that tree.

    Raises:
        TypeError: The value is no pair, a leaf is no tensor, or labels have a wrong dtype.
        ValueError: x and y differ in length, or labels have a wrong shape or are negative.
    """
    if isinstance(pair, ReplayBuffer):
        return pair.x, pair.y
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        kind = f"{type(pair).__name__} of {len(pair)}" if isinstance(pair, (tuple, list)) else type(pair).__name__
        raise TypeError(f"{name}: got {kind}, expected an (x, y) pair of tensors")
    x, y = pair
    labels, trees = (Tensor, np.ndarray), (Tensor, np.ndarray, Mapping, tuple, list)
    if not isinstance(x, trees) or not isinstance(y, trees if any_targets else labels):
        hint = "; torch.tensor(y) makes a tensor of labels in a list" if isinstance(y, (list, tuple)) else ""
        raise TypeError(
            f"{name}: got a pair of {type(x).__name__} and {type(y).__name__}, expected an (x, y) pair of tensors{hint}"
        )
    x, y = _tensors(f"{name} x", x), _tensors(f"{name} labels", y)
    if isinstance(x, Tensor) and x.ndim == 0:
        raise ValueError(f"{name}: x has no dimensions, expected samples (N, ...)")
    count = check_inputs(f"{name} x", x)
    if not any_targets:
        y = as_class_indices(f"{name} labels", y)
        check_labels(f"{name} labels", y, count, None)
    elif check_inputs(f"{name} labels", y) != count:
        raise ValueError(f"{name} labels: got {num_samples(y)} samples, expected {count} as in x")
    return x, y


def _tensors(name: str, tree: Any) -> Any:
    """Return the tree with tensors in place of arrays."""

    def tensor(value: object) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        if any(step < 0 for step in native.strides):
            native = native.copy()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of a read-only array; nothing writes to it
                return torch.from_numpy(native)
        except TypeError as error:
            raise TypeError(f"{name}: got an array of dtype {value.dtype}, expected numbers ({error})") from None

    return map_tensors(tensor, tree)


def chunks_of(name: str, source: object, chunk: int, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """Yield the samples of a source as pairs ``(x, y)``: see :func:`chunks_with_numbers`."""
    for _, x, y in chunks_with_numbers(name, source, chunk, device):
        yield x, y


def chunks_with_numbers(
    name: str, source: object, chunk: int, device: torch.device, group: Group = None, *, any_targets: bool = False
) -> Iterator[tuple[int, Any, Any]]:
    """Yield the samples of a source in chunks, each with the number of its first sample in the source.

    All processes of a group have the same samples, in the same order. Each process reads its own part of a pair, a
    buffer or a Dataset. A DataLoader or an IterableDataset can only be read as a whole: each process reads all batches,
    and yields those whose number modulo the size of the group is its rank.

    Args:
        name: Name of the argument in error messages.
        source: Any source of samples.
        chunk: Most samples at a time; a DataLoader's smaller batches stay as they are.
        device: Device of the chunks.
        group: Processes that share the source; this process gets its share.
        any_targets: Whether y may be any tree of tensors, see :func:`as_pair`.

    Yields:
        Number of the first sample, x and y.

    Raises:
        TypeError: The value is no source; or as :func:`as_pair`, for any of its batches.
        ValueError: As :func:`as_pair`.
    """
    source = _call_if_function(source)
    if isinstance(source, (DataLoader, IterableDataset)):
        batches = source if isinstance(source, DataLoader) else _batches(name, source, chunk)
        first = 0
        for turn, batch in enumerate(batches):
            _check_entries(f"{name}: batch {turn}", batch)
            x, y = as_pair(name, batch, any_targets=any_targets)
            if turn % size_of(group) == rank_of(group):
                yield from split(x, y, chunk, device, first)
            first += num_samples(x)
    elif _is_pair(source):
        x, y = as_pair(name, source, any_targets=any_targets)
        own = local_share(num_samples(x), group)
        x, y = (take(part, slice(own.start, own.stop)) for part in (x, y))
        yield from split(x, y, chunk, device, own.start)
    elif isinstance(source, ReplayBuffer):
        own = local_share(len(source), group)
        for start in range(own.start, own.stop, chunk):
            # In parts, as the buffer may exceed memory.
            yield from split(*source.part(start, min(start + chunk, own.stop)), chunk, device, start)
    elif _has_items(source):
        own = local_share(len(source), group)  # type: ignore[arg-type]
        for start in range(own.start, own.stop, chunk):
            samples = _items(source, range(start, min(start + chunk, own.stop)))
            x, y = as_pair(name, _collate(name, samples, start), any_targets=any_targets)
            yield from split(x, y, chunk, device, start)
    else:
        raise TypeError(f"{name}: got {type(source).__name__}, expected {EXPECTED}")


def has_samples(source: object) -> bool:
    """Return whether a source may have samples; True if its length is unknown."""
    source = _call_if_function(source)
    try:
        return (num_samples(source[0]) if _is_pair(source) else len(source)) > 0  # type: ignore[arg-type, index]
    except TypeError:
        return True


def _call_if_function(source: Any) -> object:
    """Return the source, or for a function the source that it returns now."""
    return source() if callable(source) and not isinstance(source, nn.Module) and not _has_items(source) else source


def _is_pair(source: object) -> bool:
    """Return whether the source is ``(x, y)`` of all samples; a list of two may also be two samples, each a pair."""
    if isinstance(source, list):
        return len(source) == 2 and isinstance(source[1], (Tensor, np.ndarray, Mapping))
    return isinstance(source, tuple)


def _has_items(source: object) -> bool:
    """Return whether samples are read by index."""
    if isinstance(source, (Tensor, np.ndarray, str, bytes, Mapping, type)):
        return False
    return hasattr(source, "__len__") and hasattr(source, "__getitem__")


def _items(source: Any, indices: range) -> list[Any]:
    """Read samples by index, several at once if the source can."""
    several = getattr(source, "__getitems__", None)
    return list(several(list(indices))) if several is not None else [source[index] for index in indices]


def _batches(name: str, samples: Iterable[Any], chunk: int) -> Iterator[Any]:
    """Yield batches of the samples of an IterableDataset."""
    iterator, start = iter(samples), 0
    while part := list(islice(iterator, chunk)):
        yield _collate(name, part, start)
        start += len(part)


def _collate(name: str, samples: list[Any], start: int) -> Any:
    """Stack samples, each an ``(x, y)``, to one ``(x, y)``; ``start`` is the index of the first."""
    for index, sample in enumerate(samples, start):
        _check_entries(f"{name}: sample {index}", sample)
    try:
        with torch.device("cpu"):  # numbers become tensors on the CPU, for any default device
            return default_collate(samples)
    except (TypeError, RuntimeError, ValueError, KeyError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise TypeError(
            f"{name}: samples {start} to {start + len(samples) - 1} cannot be stacked ({line}), expected (x, y) of "
            "tensors, arrays or numbers of one shape; images become tensors by a transform such as "
            "torchvision.transforms.ToTensor(), and a DataLoader with a collate_fn of its own serves anything else"
        ) from error


def _check_entries(what: str, value: object) -> None:
    """Raise unless a sample or a batch is a pair; other entries are not guessed."""
    if isinstance(value, Mapping):
        keys = ", ".join(map(repr, list(value)[:8]))
        raise TypeError(
            f"{what} is a {type(value).__name__} with the keys {keys}, expected (x, y), x maybe a mapping; with keys "
            f"and label those of x and y: {PICKED.format('({key: sample[key] for key in keys}, sample[label])')}"
        )
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{what} is of type {type(value).__name__}, expected (x, y)")
    if len(value) != 2:
        raise TypeError(
            f"{what} has {len(value)} entries, expected two, (x, y). Samples of (x, y, task), say, are read by "
            f"{PICKED.format('sample[:2]')}, samples of (index, x, y) with sample[1:]"
        )


def split(x: Any, y: Any, chunk: int, device: torch.device, first: int) -> Iterator[tuple[int, Any, Any]]:
    """Yield chunks of a pair on a device, each with the index of its first sample, counted from ``first``."""

    def move(leaf: Tensor) -> Tensor:
        return leaf.to(device, non_blocking=True)

    for start in range(0, num_samples(x), chunk):
        part = slice(start, start + chunk)
        yield first + start, map_tensors(move, take(x, part)), map_tensors(move, take(y, part))
