"""Global memory, which knows the bounds of every argument, and the shared memory of a batch of blocks.

Shared memory that was not written is NaN in every format (all bits set), and so is what an asynchronous copy has not
brought yet. It also knows which warp wrote or read each byte since the last barrier: another warp that then reads what
was written, or writes anything else over what was read or written, has won or lost a race, whatever the order here.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from .formats import Array

POISON = 0xFF
SHARED_BASE = 0x1000
"""Where shared memory begins, so that zero is no address."""

_REGION = 40
"""Each argument's memory has 2^40 addresses of its own, so that none is next to another's."""


class AccessError(Exception):
    """An access that a device would not survive, or not notice."""


@cache
def _words(size: int) -> tuple[np.dtype, int]:
    """Accesses of ``size`` bytes go by words of 1 to 8: their type, and how many of them."""
    return np.dtype(f"u{min(size, 8)}"), max(1, size // 8)


@cache
def _repeat(mark: int, dtype: np.dtype) -> np.generic:
    """A word of ``mark`` in each byte."""
    return np.full(dtype.itemsize, mark, np.int8).view(dtype)[0]


def _places(offsets: Array, size: int) -> Array:
    """(n, words) indices of the words at (n,) offsets in bytes."""
    dtype, count = _words(size)
    first = offsets // dtype.itemsize
    return first[:, None] + np.arange(count) if count > 1 else first[:, None]


def _as_words(octets: Array, size: int) -> Array:
    """Memory as words; a rest that is shorter than one is left out."""
    dtype, _ = _words(size)
    return octets[: len(octets) // dtype.itemsize * dtype.itemsize].view(dtype)


class Region(NamedTuple):
    octets: Array  # (n,) uint8, the memory itself
    valid: Array  # (n,) bool: bytes that a kernel may touch
    shift: int  # the address of the first byte beyond a multiple of 2^40


class GlobalMemory:
    """The memory that a kernel's pointers lead to."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, octets: Array, valid: Array, shift: int = 0) -> int:
        """The address of the first of ``octets``, whose bytes are those of the caller, not copies.

        Args:
            octets: (n,) uint8.
            valid: (n,) bool, which of them may be touched.
            shift: the address modulo what alignment a kernel may rely on, a multiple of 16.
        """
        self.regions.append(Region(octets, valid, shift))
        return (len(self.regions) << _REGION) + shift

    def read(self, addresses: Array, size: int) -> Array:
        """(n, size) uint8 at (n,) addresses."""
        dtype, count = _words(size)
        result = np.empty((len(addresses), count), dtype)
        for lanes, region, at in self._find(addresses, size):
            result[lanes] = _as_words(region.octets, size)[at]
        return result.view(np.uint8)

    def write(self, addresses: Array, octets: Array) -> None:
        size = octets.shape[1]
        words = octets.view(_words(size)[0])
        for lanes, region, at in self._find(addresses, size):
            _as_words(region.octets, size)[at] = words[lanes]

    def _find(self, addresses: Array, size: int) -> list[tuple[Array | slice, Region, Array]]:
        check_alignment(addresses, size)
        numbers = (addresses >> np.uint64(_REGION)).astype(np.int64) - 1
        if not len(numbers):
            return []
        first = int(numbers[0])
        if (numbers == first).all():
            parts: list[tuple[int, Array | slice]] = [(first, slice(None))]
        else:
            parts = [(int(number), np.flatnonzero(numbers == number)) for number in np.unique(numbers)]
        return [(lanes, *self._within(number, addresses[lanes], size)) for number, lanes in parts]

    def _within(self, number: int, addresses: Array, size: int) -> tuple[Region, Array]:
        if not 0 <= number < len(self.regions):
            raise AccessError(f"global address {int(addresses[0]):#x} is in no argument")
        region = self.regions[number]
        offsets = (addresses & np.uint64((1 << _REGION) - 1)).astype(np.int64) - region.shift
        outside = (offsets < 0) | (offsets + size > len(region.octets))
        at = _places(np.where(outside, 0, offsets), size)
        dtype, _ = _words(size)
        if not outside.all():
            outside |= (_as_words(region.valid, size)[at] != _repeat(1, dtype)).any(1)
        if outside.any():
            raise AccessError(
                f"{size} bytes at byte {int(offsets[np.argmax(outside)])} of the memory of argument number {number} "
                f"({len(region.octets)} bytes) are not all its own"
            )
        return region, at


def check_alignment(addresses: Array, size: int) -> None:
    if (addresses & addresses.dtype.type(size - 1)).any():
        raise AccessError(f"an access of {size} bytes is not aligned to them")


_NOBODY, _SEVERAL = -1, -2


class SharedMemory:
    """Shared memory of some blocks, ``size`` bytes of each.

    Args:
        blocks: how many blocks have such memory.
        size: bytes of each.
        check: whether to look for races.
    """

    def __init__(self, blocks: int, size: int, check: bool) -> None:
        self.size, self.check = size, check
        self.each = max(16, -(-size // 16) * 16)
        self.octets = np.full(blocks * self.each, POISON, np.uint8)
        # The warp that wrote or read a byte since the last barrier.
        self.writer = np.full(blocks * self.each, _NOBODY, np.int8)
        self.reader = np.full(blocks * self.each, _NOBODY, np.int8)

    def barrier(self, blocks: Array) -> None:
        """These blocks' warps have met."""
        for marks in (self.writer, self.reader):
            marks.reshape(-1, self.each)[blocks] = _NOBODY

    def read(self, warp: int, blocks: Array, addresses: Array, size: int) -> Array:
        """(n, size) uint8 at (n,) addresses of (n,) blocks, read by warp number ``warp`` of each."""
        at = self._at(blocks, addresses, size)
        if self.check:
            if (self._others(self.writer, warp, at, size)).any():
                raise AccessError("a read of what another warp wrote since the last barrier")
            marks, (dtype, _) = _as_words(self.reader, size), _words(size)
            # A word that several warps read in parts counts as read by several as a whole.
            known = (marks[at] == _repeat(_NOBODY, dtype)) | (marks[at] == _repeat(warp, dtype))
            marks[at] = np.where(known, _repeat(warp, dtype), _repeat(_SEVERAL, dtype))
        return _as_words(self.octets, size)[at].view(np.uint8)

    def write(self, warp: int, blocks: Array, addresses: Array, octets: Array) -> None:
        """Write (n, size) uint8."""
        size = octets.shape[1]
        at = self._at(blocks, addresses, size)
        dtype, _ = _words(size)
        words, values = _as_words(self.octets, size), octets.view(dtype)
        if self.check:
            if self._others(self.reader, warp, at, size).any():
                raise AccessError("a write over what another warp read since the last barrier")
            if (self._others(self.writer, warp, at, size) & (words[at] != values)).any():
                raise AccessError("a write over what another warp wrote since the last barrier")
            _as_words(self.writer, size)[at] = _repeat(warp, dtype)
        words[at] = values

    def _others(self, marks: Array, warp: int, at: Array, size: int) -> Array:
        """Whether a word has a mark of another warp, (n, words)."""
        dtype, _ = _words(size)
        found = _as_words(marks, size)[at]
        strange = (found != _repeat(_NOBODY, dtype)) & (found != _repeat(warp, dtype))
        if strange.any():  # some of their bytes may be this warp's, the others no warp's
            each = found[strange].view(np.int8).reshape(-1, dtype.itemsize)
            strange[strange] = ((each != _NOBODY) & (each != warp)).any(1)
        return strange

    def _at(self, blocks: Array, addresses: Array, size: int) -> Array:
        check_alignment(addresses, size)
        at = addresses.astype(np.int64) - SHARED_BASE
        if len(at) and (at.min() < 0 or at.max() + size > self.size):
            raise AccessError(f"{size} bytes at a shared address are outside of its {self.size} bytes")
        return _places(blocks * self.each + at, size)
