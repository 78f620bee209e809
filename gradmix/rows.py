"""Where rows come from: an ``(x, y)`` pair, a replay buffer, a data set or a data loader, read alike, in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, Union, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from gradmix.buffers import ReplayBuffer
from gradmix.inputs import check_inputs, map_tensors, num_samples, take
from gradmix.ops.labels import check_labels
from gradmix.processes import Group, rank_of, share, size_of

RowSource: TypeAlias = Union[
    "tuple[Tensor, Tensor]", ReplayBuffer, "Dataset[tuple[Tensor, Tensor]]", "DataLoader[tuple[Tensor, Tensor]]"
]

CHUNK = 512
"""Rows forwarded at a time unless the caller says otherwise."""

EXPECTED = "a ReplayBuffer, an (x, y) pair of tensors, a Dataset or a DataLoader"


def as_pair(name: str, rows: object, *, any_targets: bool = False) -> tuple[Any, Any]:
    """``rows`` as a checked pair: x, a tree of tensors (N, ...), and y, (N,) class indices or (N, C) label vectors.

    With ``any_targets``, y is a tree of tensors (N, ...) of any dtype.

    Raises:
        TypeError: not two tensors, or labels of a wrong dtype.
        ValueError: x and y differ in length, or labels of a wrong shape or negative.
    """
    if isinstance(rows, ReplayBuffer):
        return rows.x, rows.y
    if not isinstance(rows, (tuple, list)) or len(rows) != 2:
        came = f"{type(rows).__name__} of {len(rows)}" if isinstance(rows, (tuple, list)) else type(rows).__name__
        raise TypeError(f"{name}: got {came}, expected an (x, y) pair of tensors")
    x, y = rows
    trees = (Tensor, Mapping, tuple, list)
    if not isinstance(x, trees) or not isinstance(y, trees if any_targets else Tensor):
        raise TypeError(
            f"{name}: got a pair of {type(x).__name__} and {type(y).__name__}, expected an (x, y) pair of tensors"
        )
    if isinstance(x, Tensor) and x.ndim == 0:
        raise ValueError(f"{name}: x has no dimensions, expected rows (N, ...)")
    count = check_inputs(f"{name} x", x)
    if not any_targets:
        check_labels(f"{name} labels", cast(Tensor, y), count, None)
    elif check_inputs(f"{name} labels", y) != count:
        raise ValueError(f"{name} labels: got {num_samples(y)} samples, expected {count} as in x")
    return x, y


def chunks_of(name: str, source: object, chunk: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of ``source`` on ``device``, at most ``chunk`` at a time (a DataLoader keeps its own batch size).

    Raises:
        TypeError, ValueError: as :func:`as_pair`, for any source and any of its batches.
    """
    for _, x, y in numbered_chunks(name, source, chunk, device):
        yield x, y


def numbered_chunks(
    name: str, source: object, chunk: int, device: torch.device, group: Group = None, *, any_targets: bool = False
) -> Iterator[tuple[int, Any, Any]]:
    """:func:`chunks_of`, each with the number of its first row in the source; of a group, this process's share.

    With ``any_targets``, y is what :func:`as_pair` lets pass by that name.

    All processes hold the same rows, in the same order. Of a pair, a buffer or a Dataset each reads its own part; of a
    DataLoader or an IterableDataset, which can only be read as a whole, it takes every batch whose turn it is.
    """
    first = 0
    if isinstance(source, Dataset) and not isinstance(source, DataLoader):
        if not isinstance(source, IterableDataset):
            own = share(len(source), group)  # type: ignore[arg-type]
            if len(own) == 0:
                return
            if group is not None:
                # Its batches are this process's already.
                source, first, group = Subset(source, own), own.start, None
        source = DataLoader(source, batch_size=chunk)
    if isinstance(source, DataLoader):
        for turn, batch in enumerate(source):
            pair = tuple(batch[:2]) if isinstance(batch, (tuple, list)) else batch
            x, y = as_pair(name, pair, any_targets=any_targets)
            if turn % size_of(group) == rank_of(group):
                yield from _split(x, y, chunk, device, first)
            first += num_samples(x)
        return
    if not isinstance(source, (ReplayBuffer, tuple, list)):
        raise TypeError(f"{name}: got {type(source).__name__}, expected {EXPECTED}")
    if isinstance(source, ReplayBuffer):
        own = share(len(source), group)
        for start in range(own.start, own.stop, chunk):
            # Part by part: it may not fit into memory as a whole.
            yield from _split(*source.part(start, min(start + chunk, own.stop)), chunk, device, start)
        return
    x, y = as_pair(name, source, any_targets=any_targets)
    own = share(num_samples(x), group)
    mine = slice(own.start, own.stop)
    yield from _split(take(x, mine), take(y, mine), chunk, device, own.start)


def _split(x: Any, y: Any, chunk: int, device: torch.device, first: int) -> Iterator[tuple[int, Any, Any]]:
    def moved(tree: Any) -> Any:
        return map_tensors(lambda leaf: leaf.to(device, non_blocking=True), tree)

    for start in range(0, num_samples(x), chunk):
        part = slice(start, start + chunk)
        yield first + start, moved(take(x, part)), moved(take(y, part))
