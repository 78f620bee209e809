"""The store in files: samples lie in a folder, and only slots, stamps and labels in memory.

The inputs and extras of a sample are read when it is drawn. Labels have no file: they are the ledger's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmix.model.inputs import leaves
from gradmix.replay.layout import LABELS, Column, Layout
from gradmix.replay.sample_files import SampleFiles
from gradmix.replay.state import FOLDER_VERSION, BufferState
from gradmix.replay.store import Columns
from gradmix.runtime.transfer import to_device_async

STATES_KEPT = 2
"""States whose samples are not overwritten: the one that was saved last, and the one being saved."""


class FileStore:
    """Samples in the files of a folder, at slots in any order.

    Slots that the states taken last refer to are not used again, so that each of these can be loaded after a crash.

    Args:
        folder: A new or empty folder, or one whose samples are taken over by :meth:`load`.
        device: Device of drawn samples; None: the CPU.

    Attributes:
        device: As given; None before the first samples.
        layout: Layout of the samples; None: there were no samples yet.

    Raises:
        ValueError: The folder contains other files.
    """

    in_folder = True
    copies_on_device = False

    def __init__(self, folder: str | Path, device: torch.device | None) -> None:
        self.device = device
        self.layout: Layout | None = None
        self._files = SampleFiles(folder)
        self._labels, self._slots, self._stamps = (torch.empty(0, dtype=torch.int64, device="cpu") for _ in range(3))
        self._state_slots: deque[Tensor] = deque(maxlen=STATES_KEPT)

    def open(self, layout: Layout, device: torch.device) -> None:
        """Create the files; drawn samples go to the CPU unless another device was given."""
        self.device = self.device or torch.device("cpu")
        self._files.create(layout.columns)
        self.layout = layout

    def update(self, kept: Tensor, new: Tensor, columns: Mapping[str, Tensor], labels: Tensor) -> None:
        """Drop samples and append others: see :meth:`gradmix.replay.store.Store.update`."""
        slots, stamps = self._slots[kept], self._stamps[kept]
        if len(new) > 0:
            new_slots = self._reserve(len(new))
            values = {
                name: given.detach().index_select(0, new.to(given.device)).cpu() for name, given in columns.items()
            }
            new_stamps = self._files.write(new_slots, values)
            slots, stamps = torch.cat([slots, new_slots]), torch.cat([stamps, new_stamps])
        self._slots, self._stamps, self._labels = slots, stamps, labels

    def _reserve(self, count: int) -> Tensor:
        """Return free slots (count,), after the files have grown if needed."""
        # Slots of samples that are dropped now are not free: if writing fails, these samples are still held.
        used = torch.cat([self._slots, *self._state_slots]).unique()
        self._files.reserve(len(used) + count)
        free = torch.ones(self._files.room, dtype=torch.bool, device="cpu")
        free[used] = False
        return free.nonzero().squeeze(1)[:count]

    def column(self, name: str) -> Tensor:
        """Return the labels on the device; others on the CPU, mapped from the file unless a sample was replaced."""
        if name == LABELS:
            return self._labels.to(self.device or "cpu")
        if torch.equal(self._slots, torch.arange(len(self._slots), device="cpu")):
            return self._files.map_column(name, len(self._slots))
        return self._files.read(self._slots, names=(name,))[name]

    def part(self, start: int, stop: int) -> Columns:
        """Return copies, read from the files."""
        places = torch.arange(len(self._slots), device="cpu")[start:stop]
        return self.deliver(self.reader(places)())

    def reader(self, places: Tensor) -> Callable[[], Columns]:
        """Return a function that reads samples from the files into memory, page-locked for a CUDA device."""
        files, slots, labels = self._files, self._slots[places], self._labels[places]
        pin = self.device is not None and self.device.type == "cuda"
        return lambda: {**files.read(slots, pin=pin), LABELS: labels}

    def deliver(self, columns: Columns) -> Columns:
        """Return the columns on the device."""
        if self.device is None or self.device.type == "cpu":
            return columns
        device = self.device
        return {name: to_device_async(values, device) for name, values in columns.items()}

    def to(self, device: torch.device) -> None:
        """Send samples that are drawn from now on to another device."""
        self.device = device

    def close(self) -> None:
        """Close the files and release the folder; :meth:`load` opens them again."""
        self._files.close()

    def state(self) -> dict[str, Any]:
        """Return where the samples lie; everything written has reached the disk."""
        self._files.flush()
        self._state_slots.append(self._slots.clone())
        columns, parts = ({}, "x") if self.layout is None else (self.layout.columns, self.layout.parts)
        return {
            "version": FOLDER_VERSION,
            LABELS: self._labels.clone(),
            "files": {
                "identity": self._files.identity,
                "columns": {name: column.to_dict() for name, column in columns.items()},
                "parts": parts,
                "slots": self._slots.clone(),
                "stamps": self._stamps.clone(),
            },
        }

    def load(self, state: BufferState) -> None:
        """Take over the samples of a state that lie in the folder: see :meth:`gradmix.replay.store.Store.load`."""
        places, held = state.files, len(state.ledger)
        try:
            slots, stamps = (places[name].to("cpu", torch.int64) for name in ("slots", "stamps"))
            columns = {str(name): Column.from_dict(column) for name, column in places["columns"].items()}
            identity, parts = str(places["identity"]), places.get("parts", "x")
            if columns and not {name for _, name in leaves(parts)} <= columns.keys():
                raise KeyError("parts")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"state: files does not say where the samples are ({error})") from error
        if slots.shape != (held,) or stamps.shape != (held,) or len(slots.unique()) < held or bool((slots < 0).any()):
            raise ValueError(f"state: files does not have a slot for each of the {held} samples held")
        self._files.adopt(identity, columns, slots, stamps)
        self._slots, self._stamps, self._labels = slots.clone(), stamps.clone(), state.ledger.labels
        self._state_slots.clear()
        self._state_slots.append(self._slots.clone())
        self.layout = Layout(parts, columns) if columns else None
        if columns:
            self.device = self.device or torch.device("cpu")
