"""The file of one column: samples' entries at numbered slots.

Entries are read and written by their position in the file, not through a memory map: a full disk is then an error and
does not end the process, and the entries read do not count as memory of the process. Reads are in the order of the
slots.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gradmix.replay.layout import Column


class ColumnFile:
    """A file of one column's entries, opened, and created if it does not exist.

    Args:
        path: The file.
        column: Shape and dtype of an entry.

    Attributes:
        path: The file.
        column: Shape and dtype of an entry.
        descriptor: The system's number of the open file.
    """

    def __init__(self, path: Path, column: Column) -> None:
        self.path, self.column = path, column
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def room(self) -> int | None:
        """Return the slots that the file has room for; None: any number, as entries take no bytes."""
        size = self.column.entry_bytes
        return os.fstat(self.descriptor).st_size // size if size else None

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` slots.

        Raises:
            OSError: The disk has no room; the message has the path and the bytes wanted.
        """
        wanted = slots * self.column.entry_bytes
        size = os.fstat(self.descriptor).st_size
        if wanted <= size:
            return
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.descriptor, size, wanted - size)
            else:
                os.ftruncate(self.descriptor, wanted)
        except OSError as error:
            raise no_room_error(error, self.path, wanted - size) from error

    def write(self, slots: Tensor, values: Tensor) -> None:
        """Write values (n, ...) on the CPU to slots (n,), each of them once."""
        source = _bytes_of(values.to(self.column.dtype).contiguous())
        size = self.column.entry_bytes
        for place, slot, count in _runs(slots, size):
            part, at = source[place * size : (place + count) * size], slot * size
            while part:
                try:
                    done = os.pwrite(self.descriptor, part, at)
                except OSError as error:
                    raise no_room_error(error, self.path, len(part)) from error
                part, at = part[done:], at + done

    def read(self, slots: Tensor, *, pin: bool) -> Tensor:
        """Return copies (n, ...) of the entries at slots (n,), in page-locked memory if ``pin``."""
        out = torch.empty((len(slots), *self.column.shape), dtype=self.column.dtype, device="cpu", pin_memory=pin)
        target = _bytes_of(out)
        size = self.column.entry_bytes
        for place, slot, count in _runs(slots, size):
            part, at = target[place * size : (place + count) * size], slot * size
            while part:
                done = _read_into(self.descriptor, part, at)
                if done == 0:
                    raise OSError(errno.EIO, f"the file ends before sample {slot}", str(self.path))
                part, at = part[done:], at + done
        return out

    def map_entries(self, count: int) -> Tensor:
        """Return the entries at the first ``count`` slots, mapped from the file; writes do not reach the file."""
        shape, length = (count, *self.column.shape), count * self.column.entry_bytes
        if length == 0:
            return torch.empty(shape, dtype=self.column.dtype, device="cpu")
        # A page is copied before it is written, so that no reader can change the file.
        pages = mmap.mmap(self.descriptor, length, access=mmap.ACCESS_COPY)
        return torch.frombuffer(pages, dtype=torch.uint8).view(self.column.dtype).view(shape)


def no_room_error(error: OSError, path: Path, wanted: int) -> OSError:
    """Return the system's error with the path and the bytes wanted."""
    return OSError(
        error.errno, f"{error.strerror or error}; {wanted} bytes more were wanted for replayed samples", str(path)
    )


def _runs(slots: Tensor, entry_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield place, slot and length of each run of slots that follow each other in both, in the order of the slots."""
    if entry_bytes == 0 or len(slots) == 0:
        return
    order = slots.argsort(stable=True)
    first_place = first_slot = count = 0
    for place, slot in zip(order.tolist(), slots[order].tolist(), strict=True):
        if count and place == first_place + count and slot == first_slot + count:
            count += 1
            continue
        if count:
            yield first_place, first_slot, count
        first_place, first_slot, count = place, slot, 1
    yield first_place, first_slot, count


def _bytes_of(values: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, to read from or write to."""
    return values.reshape(-1).view(torch.uint8).numpy().data


def _read_into(descriptor: int, target: memoryview, at: int) -> int:
    """Read bytes at ``at`` to the beginning of ``target`` and return how many there were."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], at)
    content = os.pread(descriptor, len(target), at)
    target[: len(content)] = content
    return len(content)
