"""The files of one buffer's samples in a folder: one file for each column, and a description.

Every sample written gets a stamp, a random number of its own, which is stored in a separate file. With slots and
stamps, which a buffer's state contains, it can be checked later whether these samples are still there.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmix.replay.column_file import ColumnFile, no_room_error
from gradmix.replay.layout import Column
from gradmix.runtime.locks import Lock, acquire

FORMAT = 1
"""Version of a folder's content. Later versions are refused."""

DESCRIPTION, LOCK, STAMPS = "buffer.json", "lock", "stamps.bin"
_PART = DESCRIPTION + ".part"

SPARE = 8
"""A file that must grow gets one extra slot for every ``SPARE`` slots."""


STAMP = Column((), torch.int64)


class SampleFiles:
    """The files of one buffer. Only one object at a time may have a folder open, until it is closed or deleted.

    Args:
        folder: A new or empty folder, or one that holds a buffer's samples, which :meth:`adopt` then takes over.

    Attributes:
        folder: The folder.
        identity: Text that no other buffer has.

    Raises:
        ValueError: The folder contains other files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.identity = secrets.token_hex(16)
        self._columns: dict[str, Column] = {}
        self._files: dict[str, ColumnFile] = {}
        self._stamps: ColumnFile | None = None
        self._lock: Lock | None = None
        self._room = 0
        self._changed = False
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"folder: {self.folder} is a file, expected a folder")
        if self.folder.is_dir():
            names = {entry.name for entry in self.folder.iterdir()} - {LOCK, _PART}
            if names and DESCRIPTION not in names:
                raise ValueError(
                    f"folder: {self.folder} is not empty and holds no replay buffer, expected a new or empty folder"
                )

    @property
    def room(self) -> int:
        """Slots that all files have room for."""
        return self._room

    # ---------------------------------------------------------------------------------------------- opening and closing

    def create(self, columns: Mapping[str, Column]) -> None:
        """Create files for these columns.

        Raises:
            ValueError: The folder holds another buffer, or is in use.
            OSError: The folder cannot be created or written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._acquire()
        found = self._description()
        if found is not None and found["identity"] != self.identity:
            self._release()
            raise ValueError(
                f"folder: {self.folder} holds the samples of another buffer, expected a new or empty folder; to go on "
                "with that buffer load its state first"
            )
        if found is None or self._columns_of(found) != dict(columns):
            self._describe(columns)
        self._open(columns)

    def adopt(self, identity: str, columns: Mapping[str, Column], slots: Tensor, stamps: Tensor) -> None:
        """Take over the samples of a buffer's state, written earlier, possibly by another process.

        Args:
            identity: Identity of the buffer.
            columns: Columns of the buffer; none: it had no samples yet.
            slots: (R,) int64, slots of the samples.
            stamps: (R,) int64, stamps of the samples.

        Raises:
            ValueError: The folder lacks these samples, holds another buffer, or is in use.
            OSError: The folder cannot be read.
        """
        opened_before = self._lock is not None
        if not opened_before and (self.folder / DESCRIPTION).exists():
            self._acquire()
        try:
            self._check_samples(identity, columns, slots, stamps)
        except BaseException:
            if not opened_before:
                self._release()
            raise
        self.identity = identity

    def _check_samples(self, identity: str, columns: Mapping[str, Column], slots: Tensor, stamps: Tensor) -> None:
        """Open the files, and check that the samples of a state are in them."""
        found = self._description()
        if found is None:
            if columns:
                raise ValueError(f"folder: {self.folder} does not hold the samples that the state speaks of")
            return
        if found["identity"] != identity:
            raise ValueError(f"folder: {self.folder} holds the samples of another buffer than the state's")
        if not columns:
            return
        if self._columns_of(found) != dict(columns):
            raise ValueError(f"folder: {self.folder} holds other columns than the state speaks of")
        self._open(columns)
        highest = int(slots.max()) + 1 if len(slots) else 0
        if highest > self._room:
            raise ValueError(
                f"folder: {self.folder} has room for {self._room} samples, expected at least {highest} as the state "
                "has it"
            )
        assert self._stamps is not None
        lost = int((self._stamps.read(slots, pin=False) != stamps).sum())
        if lost:
            raise ValueError(
                f"folder: {lost} of the state's {len(slots)} samples in {self.folder} have been overwritten since; the "
                "two latest states that were taken can be loaded"
            )

    def _open(self, columns: Mapping[str, Column]) -> None:
        """Open the files of these columns, unless they are open."""
        if self._files and self._columns == dict(columns):
            return
        self._files = {
            name: ColumnFile(self.folder / f"column-{k}.bin", column)
            for k, (name, column) in enumerate(columns.items())
        }
        self._stamps = ColumnFile(self.folder / STAMPS, STAMP)
        self._columns = dict(columns)
        rooms = [file.room() for file in (*self._files.values(), self._stamps)]
        self._room = min(room for room in rooms if room is not None)

    def _description(self) -> dict[str, Any] | None:
        """Return the folder's description; None: there is none."""
        path = self.folder / DESCRIPTION
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            readable = found["format"] <= FORMAT and isinstance(found["identity"], str)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"folder: {path} does not describe a replay buffer ({error})") from error
        if not readable:
            raise ValueError(f"folder: {path} is of format {found['format']}, expected at most {FORMAT}")
        return found

    @staticmethod
    def _columns_of(found: Mapping[str, Any]) -> dict[str, Column]:
        """Return the columns of a description, by name."""
        return {entry["name"]: Column.from_dict(entry) for entry in found["columns"]}

    def _describe(self, columns: Mapping[str, Column]) -> None:
        """Write the description, before there are any samples."""
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "columns": [{"name": name, **column.to_dict()} for name, column in columns.items()],
        }
        part = self.folder / _PART
        text = json.dumps(content, indent=1) + "\n"
        try:
            part.write_text(text, encoding="utf-8")
        except OSError as error:
            raise no_room_error(error, part, len(text)) from error
        os.replace(part, self.folder / DESCRIPTION)

    def _acquire(self) -> None:
        """Lock the folder, unless it is locked by this object."""
        if self._lock is not None:
            return
        self._lock = acquire(self.folder / LOCK)
        if self._lock is None:
            raise ValueError(f"folder: {self.folder} is in use by another buffer, expected one of its own")

    def _release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def close(self) -> None:
        """Close the files and release the folder; :meth:`adopt` opens them again."""
        self._files, self._stamps = {}, None
        self._release()

    def _check_open(self) -> None:
        """Raise unless the files are open."""
        if not self._files:
            raise ValueError(f"folder: the buffer in {self.folder} has been closed")

    # ---------------------------------------------------------------------------------------------- reading and writing

    def reserve(self, slots: int) -> None:
        """Make room for at least ``slots`` slots.

        Raises:
            OSError: The disk has no room; the message has the path and the bytes wanted.
            ValueError: The files are closed.
        """
        self._check_open()
        if slots <= self._room:
            return
        assert self._stamps is not None
        room = slots + slots // SPARE
        for file in (*self._files.values(), self._stamps):
            file.grow(room)
        self._room = room

    def write(self, slots: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """Write samples to slots that there is room for.

        Args:
            slots: (n,) int64, each once.
            columns: Values (n, ...) on the CPU by column.

        Returns:
            (n,) int64, the stamps of the samples.
        """
        assert self._stamps is not None
        generator = torch.Generator("cpu").manual_seed(secrets.randbits(63))
        stamps = torch.randint(1, 2**63 - 1, (len(slots),), generator=generator, device="cpu")
        self._changed = True
        # The stamps come first: a slot that is half written must not pass for its former sample.
        self._stamps.write(slots, stamps)
        for name, values in columns.items():
            self._files[name].write(slots, values)
        return stamps

    def read(self, slots: Tensor, *, names: Sequence[str] | None = None, pin: bool = False) -> dict[str, Tensor]:
        """Return copies (n, ...) of the samples at ``slots``, by column.

        Args:
            slots: (n,) int64 on the CPU, in any order, any of them more than once.
            names: Columns to read; None: all.
            pin: Whether to read into page-locked memory.

        Raises:
            OSError: A file is too short or cannot be read.
            ValueError: The files are closed.
        """
        self._check_open()
        return {name: self._files[name].read(slots, pin=pin) for name in names or self._files}

    def map_column(self, name: str, count: int) -> Tensor:
        """Return a column's entries at the first ``count`` slots, mapped from the file; writes do not reach it."""
        self._check_open()
        return self._files[name].map_entries(count)

    def flush(self) -> None:
        """Wait until everything written has reached the disk."""
        if not self._changed:
            return
        self._check_open()
        assert self._stamps is not None
        for file in (*self._files.values(), self._stamps):
            os.fsync(file.descriptor)
        for path in (self.folder / DESCRIPTION, self.folder):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._changed = False
