"""Look-up of a call's verdict: the second answer that an operator's implementation gives under ``auto``.

The table of a device is read once in a process, by the first call that asks; after that a call costs the look-up of its
device, dtype, kind and sizes in a dictionary. Triton is not imported. On the CPU nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gradmix.calibration.key import key_of, with_index
from gradmix.calibration.table import Found, Table, find
from gradmix.calibration.verdicts import Call

NOT_MEASURED = "it has not been measured on this device (gradmix calibrate measures it)"

Extent = tuple[Any, ...]
"""Device, dtype, kind, and an extent for each axis name of an operator; axes of the same name make one range."""

_MOST_ANSWERS = 1 << 14
"""Calls of other sizes whose answers are kept; then all are looked up anew."""

_answers: dict[tuple[Any, ...], str | None] = {}
_states: dict[torch.device, State] = {}


class State(NamedTuple):
    """The table that counts for a device in this process.

    Attributes:
        found: the result of the search.
        refusal: the sentence for every call if no table counts, else None.
    """

    found: Found
    refusal: str | None

    @property
    def table(self) -> Table | None:
        """The table, or None."""
        return self.found.table


class CalibratedWorth:
    """The answer of an implementation that is used under ``auto`` only where it was measured.

    Args:
        operator: name of the operator.
        backend: name of the implementation.
        axes: names of the axes whose extents ``extent`` returns.
        extent: called with the operator's arguments; returns the device, the dtype, the kind and the extents.
    """

    def __init__(self, operator: str, backend: str, axes: tuple[str, ...], extent: Callable[..., Extent]) -> None:
        self.operator, self.backend, self.axes = operator, backend, axes
        self._name, self._extent = (operator, backend), extent

    def __call__(self, *arguments: Any) -> str | None:
        """Return None if the implementation is on for these arguments, else a sentence why not."""
        request = self._name, self._extent(*arguments)
        try:
            return _answers[request]
        except KeyError:
            return self._look_up(request)

    def call(self, extent: Extent) -> Call:
        """Return the call that has these extents."""
        _device, dtype, kind, *sizes = extent
        ranges: dict[str, tuple[int, int]] = {}
        for axis, size in zip(self.axes, sizes, strict=True):
            least, most = ranges.get(axis, (size, size))
            ranges[axis] = min(least, size), max(most, size)
        return Call(str(dtype).removeprefix("torch."), kind, ranges)

    def _look_up(self, request: tuple[Any, Extent]) -> str | None:
        extent = request[1]
        state = state_of(extent[0])
        answer = state.refusal
        if state.table is not None:
            answer = state.table.verdicts.refusal(self.operator, self.backend, self.call(extent))
        if len(_answers) >= _MOST_ANSWERS:
            _answers.clear()
        _answers[request] = answer
        return answer


def state_of(device: torch.device) -> State:
    """Return the table that counts for a device, read from its file on the first call."""
    state = _states.get(device)
    if state is None:
        if has_kernels(device):
            indexed = with_index(device)
            state = _states.get(indexed) or _as_state(find(key_of(indexed)))
            _states[indexed] = state
        else:
            state = _as_state(Found(None, None, None))
        _states[device] = state
    return state


def use(device: torch.device, table: Table | None, reason: str | None = None) -> None:
    """Have a table, or none for a reason, count for a device from now on in this process."""
    state = _as_state(Found(table, None, reason))
    _states[device] = _states[with_index(device)] = state
    _answers.clear()


def forget() -> None:
    """Have the tables read anew by the next call."""
    _states.clear()
    _answers.clear()


def has_kernels(device: torch.device) -> bool:
    """Whether a device is of a kind that is measured."""
    return device.type == "cuda"


def _as_state(found: Found) -> State:
    if found.table is not None:
        return State(found, None)
    if found.problem is None:
        return State(found, NOT_MEASURED)
    return State(found, f"its measurements are not used: {found.problem}: run gradmix calibrate")
