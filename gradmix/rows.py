"""Where rows come from: an ``(x, y)`` pair, a replay buffer, a data set or a data loader, read alike, in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias, Union

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from gradmix.buffers import ReplayBuffer
from gradmix.ops.labels import check_labels

RowSource: TypeAlias = Union[
    "tuple[Tensor, Tensor]", ReplayBuffer, "Dataset[tuple[Tensor, Tensor]]", "DataLoader[tuple[Tensor, Tensor]]"
]

CHUNK = 512
"""Rows forwarded at a time unless the caller says otherwise."""

EXPECTED = "a ReplayBuffer, an (x, y) pair of tensors, a Dataset or a DataLoader"


def as_pair(name: str, rows: object) -> tuple[Tensor, Tensor]:
    """``rows`` as a checked pair: x (N, ...) and y, (N,) class indices or (N, C) label vectors.

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
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(
            f"{name}: got a pair of {type(x).__name__} and {type(y).__name__}, expected an (x, y) pair of tensors"
        )
    if x.ndim == 0:
        raise ValueError(f"{name}: x has no dimensions, expected rows (N, ...)")
    check_labels(f"{name} labels", y, len(x), None)
    return x, y


def chunks_of(name: str, source: object, chunk: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of ``source`` on ``device``, at most ``chunk`` at a time (a DataLoader keeps its own batch size).

    Raises:
        TypeError, ValueError: as :func:`as_pair`, for any source and any of its batches.
    """
    if isinstance(source, Dataset) and not isinstance(source, DataLoader):
        if not isinstance(source, IterableDataset) and len(source) == 0:  # type: ignore[arg-type]
            return
        source = DataLoader(source, batch_size=chunk)
    if isinstance(source, DataLoader):
        for batch in source:
            pair = as_pair(name, tuple(batch[:2]) if isinstance(batch, (tuple, list)) else batch)
            yield from _split(*pair, chunk, device)
        return
    if not isinstance(source, (ReplayBuffer, tuple, list)):
        raise TypeError(f"{name}: got {type(source).__name__}, expected {EXPECTED}")
    yield from _split(*as_pair(name, source), chunk, device)


def _split(x: Tensor, y: Tensor, chunk: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(x), chunk):
        stop = start + chunk
        yield x[start:stop].to(device, non_blocking=True), y[start:stop].to(device, non_blocking=True)
