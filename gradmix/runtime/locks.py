"""Locks between processes: locked files, which the system unlocks when their process ends in any way.

A forked process holds no lock of its parent: a worker that outlives a killed process by a moment would otherwise block
the next one. Without advisory locks, as on some systems and file systems, every lock is granted.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class Lock:
    """A lock that is held until it is released or deleted."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        _held.add(self)

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock."""
        return self._descriptor is not None

    def release(self) -> None:
        """Release the lock; its file stays. In a process forked from the holder this has no effect on the holder."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def acquire(path: Path, *, shared: bool = False) -> Lock | None:
    """Acquire the lock of a file, which is created if it does not exist.

    Args:
        path: The file; its folder exists.
        shared: Whether to allow other shared locks of the file, and no exclusive one.

    Returns:
        The lock; None: another process, or another lock of this process, holds it.

    Raises:
        OSError: The file cannot be opened.
    """
    descriptor = _open(path, shared)
    return None if descriptor is None else Lock(descriptor)


@contextmanager
def try_lock(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold the lock of a file, which contains this process's number; yield False if it is held elsewhere.

    The file is created if it does not exist, and removed by the last holder.
    """
    descriptor = _open(path, shared)
    if descriptor is None:
        yield False
        return
    lock = Lock(descriptor)
    try:
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield True
    finally:
        # A forked process also comes here, where the descriptor is not its own.
        if lock.is_held and (not shared or _lock(descriptor, False)):
            path.unlink(missing_ok=True)
        lock.release()


def holder(path: Path, *, shared: bool = False) -> str | None:
    """Return the holder of the lock of a file, usually ``process 1234``; None: the lock is free."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        if _lock(descriptor, shared):
            return None
        number = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        return f"process {number}" if number.isdigit() else "another process"
    finally:
        os.close(descriptor)


def _open(path: Path, shared: bool) -> int | None:
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            mine = _lock(descriptor, shared)
            # Else a former holder has removed the file since it was opened here.
            there = _is_file_of(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        if mine and there:
            return descriptor
        os.close(descriptor)
        if not mine:
            return None


def _lock(descriptor: int, shared: bool) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _close_inherited() -> None:
    # Closed, not unlocked: unlocking would also unlock the parent's lock.
    for lock in tuple(_held):
        with suppress(OSError):
            lock.release()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
