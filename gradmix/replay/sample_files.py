"""Rows in files of a folder, one file a column, at numbered slots: what a replay buffer that exceeds memory lies in.

Rows are read and written by their place in the file, not through a map of it: a full disk is then an error and not the
end of the process, and what was read does not count as memory of the process. Reads are in the order of the slots.

Every row written gets a stamp, a number of its own, which lies in a file beside it. Whoever keeps slots and stamps, as
a buffer's state does, can tell later whether these rows are still there.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmix.locks import Lock, acquire

FORMAT = 1
"""Version of what a folder holds. A reader refuses a later one."""

DESCRIPTION, LOCK, STAMPS = "buffer.json", "lock", "stamps.bin"
_PART = DESCRIPTION + ".part"

SPARE = 8
"""A file that must grow gets so much more room: one row for every so many."""


@dataclass(frozen=True)
class Column:
    """What the rows of one column are like.

    Attributes:
        shape: of a row.
        dtype: of its entries.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, rows: Tensor) -> Column:
        """That of rows (N, ...)."""
        return cls(tuple(rows.shape[1:]), rows.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Column:
        """What :meth:`plain` told."""
        return cls(tuple(values["shape"]), getattr(torch, values["dtype"]))


STAMP = Column((), torch.int64)


class RowFiles:
    """The files of one buffer. Only one of these may have a folder open at a time; it has it until it is gone.

    Args:
        folder: a new or empty folder, or one that holds a buffer's rows, which are then taken up by :meth:`adopt`.

    Attributes:
        folder: that folder.
        identity: text that no other buffer has.

    Raises:
        ValueError: there is something else in the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.identity = secrets.token_hex(16)
        self._columns: dict[str, Column] = {}
        self._files: dict[str, _File] = {}
        self._stamps: _File | None = None
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
    def columns(self) -> dict[str, Column]:
        """The columns by name; empty before :meth:`create` or :meth:`adopt`."""
        return dict(self._columns)

    @property
    def room(self) -> int:
        """Slots that the files have room for."""
        return self._room

    # ------------------------------------------------------------------------------------------------------- opening it

    def create(self, columns: Mapping[str, Column]) -> None:
        """Begin files for these columns.

        Raises:
            ValueError: the folder holds another buffer, or is in use.
            OSError: the folder cannot be made or written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._acquire()
        found = self._described()
        if found is not None and found["identity"] != self.identity:
            self._release()
            raise ValueError(
                f"folder: {self.folder} holds the rows of another buffer, expected a new or empty folder; to go on "
                "with that buffer load its state first"
            )
        if found is None or self._columns_of(found) != dict(columns):
            self._describe(columns)
        self._open(columns)

    def adopt(self, identity: str, columns: Mapping[str, Column], slots: Tensor, stamps: Tensor) -> None:
        """Take up the rows of a buffer's state, which were written here earlier, maybe by another process.

        Args:
            identity: of the buffer.
            columns: its columns; none: it had no rows yet.
            slots, stamps: (R,) int64: where its rows are, and which.

        Raises:
            ValueError: the folder lacks these rows, holds another buffer, or is in use.
            OSError: it cannot be read.
        """
        opened_before = self._lock is not None
        if not opened_before and (self.folder / DESCRIPTION).exists():
            self._acquire()
        try:
            self._check_adopted(identity, columns, slots, stamps)
        except BaseException:
            if not opened_before:
                self._release()
            raise
        self.identity = identity

    def _check_adopted(self, identity: str, columns: Mapping[str, Column], slots: Tensor, stamps: Tensor) -> None:
        found = self._described()
        if found is None:
            if columns:
                raise ValueError(f"folder: {self.folder} does not hold the rows that the state speaks of")
            return
        if found["identity"] != identity:
            raise ValueError(f"folder: {self.folder} holds the rows of another buffer than the state's")
        if not columns:
            return
        if self._columns_of(found) != dict(columns):
            raise ValueError(f"folder: {self.folder} holds other columns than the state speaks of")
        self._open(columns)
        highest = int(slots.max()) + 1 if len(slots) else 0
        if highest > self._room:
            raise ValueError(
                f"folder: {self.folder} has room for {self._room} rows, expected at least {highest} as the state has it"
            )
        assert self._stamps is not None
        lost = int((self._stamps.read(slots, pin=False) != stamps).sum())
        if lost:
            raise ValueError(
                f"folder: {lost} of the state's {len(slots)} rows in {self.folder} have been overwritten since; the "
                "two latest states that were taken can be loaded"
            )

    def _open(self, columns: Mapping[str, Column]) -> None:
        if self._files and self._columns == dict(columns):
            return
        self._files = {
            name: _File(self.folder / f"column-{k}.bin", column) for k, (name, column) in enumerate(columns.items())
        }
        self._stamps = _File(self.folder / STAMPS, STAMP)
        self._columns = dict(columns)
        sizes = [file.rows() for file in (*self._files.values(), self._stamps)]
        self._room = min(size for size in sizes if size is not None)

    def _described(self) -> dict[str, Any] | None:
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
        return {entry["name"]: Column.from_plain(entry) for entry in found["columns"]}

    def _describe(self, columns: Mapping[str, Column]) -> None:
        """Say what the folder holds, before it holds anything."""
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "columns": [{"name": name, **column.plain()} for name, column in columns.items()],
        }
        part = self.folder / _PART
        text = json.dumps(content, indent=1) + "\n"
        try:
            part.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _no_room(error, part, len(text)) from error
        os.replace(part, self.folder / DESCRIPTION)

    def _acquire(self) -> None:
        if self._lock is not None:
            return
        self._lock = acquire(self.folder / LOCK)
        if self._lock is None:
            raise ValueError(f"folder: {self.folder} is in use by another buffer, expected one of its own")

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def close(self) -> None:
        """Close the files and give the folder free for others; :meth:`adopt` opens them again."""
        self._files, self._stamps = {}, None
        self._release()

    def _need_files(self) -> None:
        if not self._files:
            raise ValueError(f"folder: the buffer in {self.folder} has been closed")

    # --------------------------------------------------------------------------------------------------------- using it

    def reserve(self, rows: int) -> None:
        """Make room for so many slots, and some more.

        Raises:
            OSError: there is no room on the disk; the message has the path and the bytes wanted.
        """
        self._need_files()
        if rows <= self._room:
            return
        assert self._stamps is not None
        room = rows + rows // SPARE
        for file in (*self._files.values(), self._stamps):
            file.grow(room)
        self._room = room

    def write(self, slots: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """Write rows at slots that there is room for.

        Args:
            slots: (R,) int64, each once.
            columns: (R, ...) on the CPU, by name.

        Returns:
            (R,) int64, their stamps.
        """
        assert self._stamps is not None
        generator = torch.Generator("cpu").manual_seed(secrets.randbits(63))
        stamps = torch.randint(1, 2**63 - 1, (len(slots),), generator=generator, device="cpu")
        self._changed = True
        # First: a slot whose row is half written must not pass for the row that was there before.
        self._stamps.write(slots, stamps)
        for name, rows in columns.items():
            self._files[name].write(slots, rows)
        return stamps

    def read(self, slots: Tensor, *, names: Sequence[str] | None = None, pin: bool = False) -> dict[str, Tensor]:
        """The rows at ``slots`` (n,), copied, by name of the column.

        Args:
            slots: int64, on the CPU, in any order, and any of them more than once.
            names: the columns wanted; None: all.
            pin: whether to read into page-locked memory.

        Raises:
            ValueError: the files were closed.
        """
        self._need_files()
        return {name: self._files[name].read(slots, pin=pin) for name in names or self._files}

    def mapped(self, name: str, rows: int) -> Tensor:
        """The rows at the first so many slots, mapped from the file; what is written to them stays in memory."""
        self._need_files()
        return self._files[name].mapped(rows)

    def flush(self) -> None:
        """Have everything written reach the disk before this returns."""
        if not self._changed:
            return
        self._need_files()
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


class _File:
    """One column's file."""

    def __init__(self, path: Path, column: Column) -> None:
        self.path, self.column = path, column
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def rows(self) -> int | None:
        """Rows that there is room for; None: any number, as they take none."""
        size = self.column.row_bytes
        return os.fstat(self.descriptor).st_size // size if size else None

    def grow(self, rows: int) -> None:
        wanted = rows * self.column.row_bytes
        there = os.fstat(self.descriptor).st_size
        if wanted <= there:
            return
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.descriptor, there, wanted - there)
            else:
                os.ftruncate(self.descriptor, wanted)
        except OSError as error:
            raise _no_room(error, self.path, wanted - there) from error

    def write(self, slots: Tensor, rows: Tensor) -> None:
        source = _bytes_of(rows.to(self.column.dtype).contiguous())
        size = self.column.row_bytes
        for place, slot, count in _runs(slots, size):
            part, at = source[place * size : (place + count) * size], slot * size
            while part:
                try:
                    done = os.pwrite(self.descriptor, part, at)
                except OSError as error:
                    raise _no_room(error, self.path, len(part)) from error
                part, at = part[done:], at + done

    def read(self, slots: Tensor, *, pin: bool) -> Tensor:
        out = torch.empty((len(slots), *self.column.shape), dtype=self.column.dtype, device="cpu", pin_memory=pin)
        target = _bytes_of(out)
        size = self.column.row_bytes
        for place, slot, count in _runs(slots, size):
            part, at = target[place * size : (place + count) * size], slot * size
            while part:
                done = _read_into(self.descriptor, part, at)
                if done == 0:
                    raise OSError(errno.EIO, f"the file ends before row {slot}", str(self.path))
                part, at = part[done:], at + done
        return out

    def mapped(self, rows: int) -> Tensor:
        shape, length = (rows, *self.column.shape), rows * self.column.row_bytes
        if length == 0:
            return torch.empty(shape, dtype=self.column.dtype, device="cpu")
        # A copy is made of a page that is written to, so that nobody can spoil the file by what it was given to read.
        pages = mmap.mmap(self.descriptor, length, access=mmap.ACCESS_COPY)
        return torch.frombuffer(pages, dtype=torch.uint8).view(self.column.dtype).view(shape)


def _runs(slots: Tensor, row_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Place among ``slots``, slot and number of rows that follow each other in both, in the order of the slots."""
    if row_bytes == 0 or len(slots) == 0:
        return
    order = slots.argsort(stable=True)
    pairs: Iterable[tuple[int, int]] = zip(order.tolist(), slots[order].tolist(), strict=True)
    first_place = first_slot = count = 0
    for place, slot in pairs:
        if count and place == first_place + count and slot == first_slot + count:
            count += 1
            continue
        if count:
            yield first_place, first_slot, count
        first_place, first_slot, count = place, slot, 1
    yield first_place, first_slot, count


def _bytes_of(rows: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to read from or write to."""
    return rows.reshape(-1).view(torch.uint8).numpy().data


def _read_into(descriptor: int, target: memoryview, at: int) -> int:
    """Bytes read to the beginning of ``target``."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], at)
    content = os.pread(descriptor, len(target), at)
    target[: len(content)] = content
    return len(content)


def _no_room(error: OSError, path: Path, wanted: int) -> OSError:
    """The system's error with the path and the bytes wanted."""
    return OSError(
        error.errno, f"{error.strerror or error}; {wanted} bytes more were wanted for replayed rows", str(path)
    )
