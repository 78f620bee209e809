"""The time that the parts of a training step take, measured without slowing a GPU down."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from gradmix.training.loop.step_times import StepTimes

_FLUSH = 4096


class Clock:
    """Seconds spent in named sections, summed, and the times of the single sections named ``step``.

    The first step, and the first one after each :meth:`warm_up`, is left out of the latter: in these, kernels are
    loaded, compiled and tuned, which can take a thousand times as long as a step.

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
        self._pending: list[tuple[str, bool, torch.cuda.Event, torch.cuda.Event]] = []
        self._warm_up = True
        self._steps = StepTimes()

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        """Time the body as part of ``section``."""
        if not self._cuda:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._add(section, self._end(section), time.perf_counter() - start)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        try:
            yield
        finally:
            last.record()
            self._pending.append((section, self._end(section), first, last))
            if len(self._pending) >= _FLUSH:
                self._read()

    def warm_up(self) -> None:
        """Leave the current step, or else the next one, out of :attr:`steps`: it does something for the first time."""
        self._warm_up = True

    @property
    def steps(self) -> StepTimes:
        """The times of the single steps so far."""
        self._read()
        return self._steps

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

    def _end(self, section: str) -> bool:
        """Whether a section that ends is a step of the warm-up; the warm-up ends with it."""
        if section != "step":
            return False
        ended, self._warm_up = self._warm_up, False
        return ended

    def _add(self, section: str, warm_up: bool, seconds: float) -> None:
        self._seconds[section] += seconds
        if section == "step":
            self._steps.end_step(seconds, warm_up=warm_up)
        else:
            self._steps.add_part(section, seconds)

    def _read(self) -> None:
        for section, warm_up, first, last in self._pending:
            last.synchronize()
            self._add(section, warm_up, first.elapsed_time(last) / 1000.0)
        self._pending.clear()
