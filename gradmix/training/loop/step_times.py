"""The times of a run's single training steps, kept as counts so that a run of any length needs the same memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gradmix.training.loop.state_checks import require_like, require_number, require_tensor
from gradmix.training.runs.results import SteadySteps

_PER_OCTAVE = 64
"""Bins between a time and its double: a median is right to half a bin, which is 0.6 %."""
_SHORTEST = 2.0**-20
"""Lower end of the first bin in seconds, about a microsecond."""
_BINS = 38 * _PER_OCTAVE
"""The last bin ends at 2^18 seconds, three days."""
_PARTS = ("step", "selection", "data")


class StepTimes:
    """Steps after the warm-up: how many took how long, in bins of a logarithmic scale, and the sums of their parts.

    >>> times = StepTimes()
    >>> for seconds in (0.010, 0.011, 4.0):
    ...     times.end_step(seconds, warm_up=False)
    >>> f"{times.steady().median:.4f}"
    '0.0110'
    """

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS, dtype=np.int64)
        self._sums = dict.fromkeys(_PARTS, 0.0)
        self._parts = dict.fromkeys(_PARTS, 0.0)

    def add_part(self, part: str, seconds: float) -> None:
        """Count seconds of a part of the step that has not ended yet; parts without a sum are passed over."""
        if part in self._parts:
            self._parts[part] += seconds

    def end_step(self, seconds: float, *, warm_up: bool) -> None:
        """Count a step that took so many seconds, with its parts; one of the warm-up is left out."""
        if not warm_up:
            place = math.floor(_PER_OCTAVE * math.log2(max(seconds, _SHORTEST) / _SHORTEST))
            self._counts[min(place, _BINS - 1)] += 1
            self._parts["step"] = seconds
            for part, value in self._parts.items():
                self._sums[part] += value
        self._parts = dict.fromkeys(_PARTS, 0.0)

    def steady(self) -> SteadySteps:
        """Return the median and the sums."""
        steps = int(self._counts.sum())
        if not steps:
            return SteadySteps()
        place = int(np.searchsorted(np.cumsum(self._counts), (steps + 1) // 2))
        median = _SHORTEST * 2.0 ** ((place + 0.5) / _PER_OCTAVE)
        return SteadySteps(steps, median, *(self._sums[part] for part in _PARTS))

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and sums, as tensors and plain values."""
        return {"counts": torch.from_numpy(self._counts.copy()), "sums": dict(self._sums)}

    @staticmethod
    def check(state: Mapping[str, Any]) -> None:
        """Refuse anything but a state of :meth:`state_dict`."""
        require_like(state["sums"], dict.fromkeys(_PARTS, 0.0), "step_times.sums")
        counts = require_tensor(state["counts"], torch.int64, (_BINS,), "step_times.counts")
        require_number(int(counts.min()), 0, torch.iinfo(torch.int64).max, "step_times.counts")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`."""
        self._counts = state["counts"].numpy().copy()
        self._sums = dict(state["sums"])
