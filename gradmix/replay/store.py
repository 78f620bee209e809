"""The protocol of a store, which holds the data of the samples in memory or in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from gradmix.replay.layout import Layout
from gradmix.replay.state import BufferState

Columns: TypeAlias = dict[str, Tensor]
"""Values (n, ...) of samples by column, the labels under ``y``."""


class Store(Protocol):
    """Data of the samples held. A sample is addressed by its place in order of arrival.

    Attributes:
        device: Device of drawn samples; None before the first samples.
        layout: Layout of the samples; None: there were no samples yet.
        in_folder: Whether a state refers to the samples in a folder and does not contain them.
    """

    device: torch.device | None
    layout: Layout | None
    in_folder: bool

    @property
    def copies_on_device(self) -> bool:
        """Whether a copy is only queued on a device, so that making it in a thread gains nothing."""
        ...

    def open(self, layout: Layout, device: torch.device) -> None:
        """Prepare for samples of this layout.

        Args:
            layout: Layout of the samples.
            device: Device of the first samples.

        Raises:
            OSError: The store cannot be written.
            ValueError: The folder belongs to another buffer.
        """
        ...

    def update(self, kept: Tensor, new: Tensor, columns: Mapping[str, Tensor], labels: Tensor) -> None:
        """Drop samples and append others.

        Args:
            kept: (R,) bool, which of the R samples held stay.
            new: (k,) int64 on the CPU, which of the given samples are appended.
            columns: Inputs and extras (N, ...) of the given samples by column, on any device.
            labels: (R',) int64 on the CPU, the labels of all samples held after the update, not to be changed.

        Raises:
            OSError: The samples cannot be written; the store holds what it held before.
        """
        ...

    def column(self, name: str) -> Tensor:
        """Return one column of all samples held, in order of arrival, without a copy if possible."""
        ...

    def part(self, start: int, stop: int) -> Columns:
        """Return all columns of the samples at places ``start`` to ``stop``, as a slice has them, on the device."""
        ...

    def reader(self, places: Tensor) -> Callable[[], Columns]:
        """Return a function that copies the samples at these places, as they are now.

        The function may be called in another thread, before the next call of :meth:`update`, :meth:`load`, :meth:`to`
        or :meth:`close`.

        Args:
            places: (n,) int64 on the CPU, in any order, any of them more than once.
        """
        ...

    def deliver(self, columns: Columns) -> Columns:
        """Return what a :meth:`reader` has copied, on the store's device."""
        ...

    def to(self, device: torch.device) -> None:
        """Use another device from now on."""
        ...

    def close(self) -> None:
        """Release the folder, if there is one."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the entries of a buffer's state that contain the data or its places; tensors are copies."""
        ...

    def load(self, state: BufferState) -> None:
        """Replace what is held by the samples of a checked state.

        Raises:
            OSError: The folder cannot be read.
            ValueError: The samples of the state are not in the folder; the store is unchanged.
        """
        ...
