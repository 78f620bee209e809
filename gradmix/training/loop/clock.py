"""The time that the parts of a training step take, measured without slowing a GPU down."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

_FLUSH = 4096


class Clock:
    """Seconds spent in named sections, summed.

    On a GPU a section is timed by a pair of events in the current stream, which are read later: nothing waits for the
    device inside a step. Elsewhere the wall clock is read.

    >>> clock = Clock(torch.device("cpu"))
    >>> with clock("step"):
    ...     pass
    >>> clock.seconds("step") >= 0.0
    True
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        """Time the body as part of ``section``."""
        if not self._cuda:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[section] += time.perf_counter() - start
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        try:
            yield
        finally:
            last.record()
            self._pending.append((section, first, last))
            if len(self._pending) >= _FLUSH:
                self._read()

    def seconds(self, section: str) -> float:
        """Seconds spent in ``section`` so far; 0 if it was never entered."""
        self._read()
        return self._seconds[section]

    def state_dict(self) -> dict[str, float]:
        """Seconds of every section so far."""
        self._read()
        return dict(self._seconds)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a state of :meth:`state_dict`."""
        self._pending.clear()
        self._seconds = defaultdict(float, state)

    def _read(self) -> None:
        for section, first, last in self._pending:
            last.synchronize()
            self._seconds[section] += first.elapsed_time(last) / 1000.0
        self._pending.clear()
