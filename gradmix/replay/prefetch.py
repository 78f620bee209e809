"""Prefetch: the samples of the next draw are copied in the background, while the caller computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from gradmix.replay.store import Columns


class _Pending(NamedTuple):
    """A draw made ahead.

    Attributes:
        n: Number of samples.
        before: State of the generator before the draw.
        columns: The samples, once they are copied.
    """

    n: int
    before: Tensor
    columns: Future[Columns]


class Prefetch:
    """At most one draw made ahead, and the thread that copies its samples.

    The draw itself is made at once; only the copy is made in the thread. A draw that is not used is undone: the
    generator returns to its state before the draw, so that results do not depend on draws made ahead.

    Args:
        generator: The generator of the draws.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._thread: ThreadPoolExecutor | None = None
        self._pending: _Pending | None = None

    def has(self, n: int) -> bool:
        """Return whether a draw of ``n`` samples was made ahead."""
        return self._pending is not None and self._pending.n == n

    def generator_state(self) -> Tensor:
        """Return a copy of the generator's state, as it is without the draw made ahead."""
        return self._generator.get_state() if self._pending is None else self._pending.before.clone()

    def start(self, n: int, draw: Callable[[], Callable[[], Columns]], *, in_thread: bool) -> None:
        """Make a draw ahead, in place of an earlier one.

        Args:
            n: Number of samples.
            draw: Draws by the generator and returns the function that copies the samples.
            in_thread: Whether to copy in the thread, and not at once.
        """
        self.undo()
        before = self._generator.get_state()
        copy = draw()
        if in_thread:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="gradmix replay buffer")
            columns = self._thread.submit(copy)
        else:
            columns = Future()
            columns.set_result(copy())
        self._pending = _Pending(n, before, columns)

    def take(self) -> Columns:
        """Return the samples of the draw made ahead; if they cannot be copied, raise and undo the draw."""
        assert self._pending is not None
        try:
            columns = self._pending.columns.result()
        except BaseException:
            self.undo()
            raise
        self._pending = None
        return columns

    def undo(self) -> None:
        """Undo the draw made ahead, if there is one; when this returns, nothing is being read."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._generator.set_state(pending.before)
            if not pending.columns.cancel():
                pending.columns.exception()

    def close(self) -> None:
        """Undo the draw made ahead and end the thread; a later :meth:`start` begins another one."""
        self.undo()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
