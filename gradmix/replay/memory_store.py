"""The store in memory: samples lie in tensors on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradmix.model.inputs import leaves, map_tensors
from gradmix.replay.layout import LABELS, Layout, no_samples
from gradmix.replay.state import VERSION, BufferState
from gradmix.replay.store import Columns
from gradmix.runtime.transfer import to_device_async


class MemoryStore:
    """Samples in tensors with spare room, at slots in any order.

    The samples held and drawn do not depend on slots and spare room, which are therefore not part of a state.

    Args:
        device: Device of the samples; None: that of the first ones.
        limit: Most samples that are ever held; None: unlimited.

    Attributes:
        device: As given, or that of the first samples.
        layout: Layout of the samples; None: there were no samples yet.
    """

    in_folder = False

    def __init__(self, device: torch.device | None, limit: int | None) -> None:
        self.device = device
        self.layout: Layout | None = None
        self._limit = limit
        self._columns: Columns = {}
        self._slots = torch.empty(0, dtype=torch.int64, device="cpu")

    @property
    def copies_on_device(self) -> bool:
        """Whether the device copies asynchronously, after the work queued on the caller's stream."""
        return self.device is not None and self.device.type != "cpu"

    def open(self, layout: Layout, device: torch.device) -> None:
        """Prepare columns without samples; room is added when it is needed."""
        if self.device is None:
            self.device = device
        self._columns = {
            name: torch.empty((0, *column.shape), dtype=column.dtype, device=self.device)
            for name, column in layout.columns.items()
        }
        self._columns[LABELS] = torch.empty(0, dtype=torch.int64, device=self.device)
        self.layout = layout

    def update(self, kept: Tensor, new: Tensor, columns: Mapping[str, Tensor], labels: Tensor) -> None:
        """Drop samples and append others: see :meth:`gradmix.replay.store.Store.update`."""
        slots = self._slots[kept]
        if len(new) > 0:
            new_slots = self._reserve(slots, len(new))
            for name, values in columns.items():
                self._write(name, new_slots, values.detach().index_select(0, new.to(values.device)))
            self._write(LABELS, new_slots, labels[len(slots) :])
            slots = torch.cat([slots, new_slots])
        self._slots = slots

    def _write(self, name: str, slots: Tensor, values: Tensor) -> None:
        """Write values (k, ...) to slots (k,) of a column."""
        column = self._columns[name]
        column.index_copy_(0, slots.to(column.device), values.to(column.device))

    def _reserve(self, used: Tensor, count: int) -> Tensor:
        """Return ``count`` slots outside ``used``, (count,), after the columns have been enlarged if needed."""
        room, needed = len(self._columns[LABELS]), len(used) + count
        if needed > room:
            # Doubling keeps the copying of many small calls linear; a total capacity is never exceeded.
            room = max(needed, 2 * room)
            if self._limit is not None:
                room = min(room, self._limit)
            self._columns = {name: _enlarge(column, room) for name, column in self._columns.items()}
        free = torch.ones(room, dtype=torch.bool, device="cpu")
        free[used] = False
        return free.nonzero().squeeze(1)[:count]

    def _sort(self) -> None:
        """Move the samples into order of arrival; done only for reading, so that adding moves no sample."""
        in_order = torch.arange(len(self._slots), device="cpu")
        if self.layout is not None and not torch.equal(self._slots, in_order):
            with torch.inference_mode(False):
                at = self._slots.to(self._columns[LABELS].device)
                self._columns = {name: column.index_select(0, at) for name, column in self._columns.items()}
                self._slots = in_order.clone()

    def column(self, name: str) -> Tensor:
        """Return a view of the column."""
        self._sort()
        return self._columns[name][: len(self._slots)]

    def part(self, start: int, stop: int) -> Columns:
        """Return views of all columns."""
        return {name: values[start:stop] for name, values in self._columns_in_order().items()}

    def _columns_in_order(self) -> Columns:
        """Return views of all columns, in order of arrival."""
        self._sort()
        return {name: column[: len(self._slots)] for name, column in self._columns.items()}

    def reader(self, places: Tensor) -> Callable[[], Columns]:
        """Return a function that copies samples from the device's memory to the same device."""
        columns = self._columns
        at = to_device_async(self._slots[places], columns[LABELS].device)
        return lambda: {name: column.index_select(0, at) for name, column in columns.items()}

    def deliver(self, columns: Columns) -> Columns:
        """Return the columns, which are on the device."""
        return columns

    def to(self, device: torch.device) -> None:
        """Move the samples."""
        self.device = device
        with torch.inference_mode(False):
            self._columns = {name: column.to(device) for name, column in self._columns.items()}

    def close(self) -> None:
        """Do nothing: samples in memory stay."""

    def state(self) -> dict[str, Any]:
        """Return copies of the samples."""
        x, y = no_samples(self.device)
        extras: dict[str, Tensor] = {}
        if self.layout is not None:
            columns = self._columns_in_order()
            x, y, extras = self.layout.inputs(columns), columns[LABELS], self.layout.extras(columns)
        return {
            "version": VERSION,
            "x": map_tensors(Tensor.clone, x),
            "y": y.clone(),
            "extras": {name: values.clone() for name, values in extras.items()},
        }

    def load(self, state: BufferState) -> None:
        """Replace what is held by copies of the state's samples, on this store's device."""
        self.layout, self._columns = None, {}
        if state.opened:
            inputs: Columns = dict(leaves(state.x))  # type: ignore[arg-type]
            given = {**inputs, **state.extras}
            self.open(Layout.of(state.x, given), next(iter(given.values())).device)
            given[LABELS] = state.y
            self._columns = {
                name: torch.cat([column, given[name].detach().to(column.device, column.dtype)])
                for name, column in self._columns.items()
            }
        self._slots = torch.arange(len(state.ledger), device="cpu")


def _enlarge(column: Tensor, room: int) -> Tensor:
    """Return a copy of a column with room for ``room`` samples."""
    larger = column.new_empty((room, *column.shape[1:]))
    larger[: len(column)] = column
    return larger
