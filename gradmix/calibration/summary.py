"""Tables in words: for the terminal, for ``gradmix doctor``, and for the record of a run."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gradmix.calibration import lookup
from gradmix.calibration.lookup import State
from gradmix.calibration.table import SHIPPED, Table
from gradmix.calibration.verdicts import LEAST_SPEEDUP, Measurement


class Line(NamedTuple):
    """The verdict about an implementation in one dtype.

    Attributes:
        operator: name of the operator.
        backend: name of the implementation.
        dtype: of the inputs.
        on: number of measured sizes at which it is used.
        text: the verdict, in words.
    """

    operator: str
    backend: str
    dtype: str
    on: int
    text: str


def lines_of(table: Table) -> list[Line]:
    """Return the verdicts of a table, in the order in which they were measured."""
    names = [(m.cell.operator, m.cell.backend, m.cell.dtype) for m in table.verdicts.measurements]
    known = {name[:2] for name in names}
    lost = [(*pair.split(" "), "any dtype") for pair in table.verdicts.lost if tuple(pair.split(" ")) not in known]
    return [_line(table, operator, backend, dtype) for operator, backend, dtype in dict.fromkeys([*names, *lost])]


def _line(table: Table, operator: str, backend: str, dtype: str) -> Line:
    fault = table.verdicts.fault(operator, backend, dtype)
    measurements = table.verdicts.of(operator, backend, dtype)
    timed = [m.speedup for m in measurements if m.speedup is not None]
    faster = [speedup for speedup in timed if speedup.low >= LEAST_SPEEDUP]
    on = 0
    if fault is not None:
        text = f"off: {fault}"
    elif faster:
        on = len(faster)
        medians = [speedup.median for speedup in faster]
        text = f"on at {on} of {len(timed)} sizes: {min(medians):.2f} to {max(medians):.2f} times as fast as torch"
    elif timed:
        medians = [speedup.median for speedup in timed]
        text = f"off: right, and {min(medians):.2f} to {max(medians):.2f} times as fast as torch"
    else:
        skipped = next((m.reason for m in measurements if m.status == "skipped"), None)
        text = f"off: not measured: {skipped}" if skipped else "off: right, and not timed in this dtype"
    return Line(operator, backend, dtype, on, text)


def faults_of(table: Table) -> list[Measurement]:
    """Return the measurements that switch an implementation off."""
    return [m for m in table.verdicts.measurements if m.is_faulty]


def origin_of(state: State) -> str:
    """Return where the table that counts for a device comes from, or why there is none, in words."""
    table, path = state.found.table, state.found.path
    if table is None:
        return state.refusal or "no kernel is used"
    extent = f"{len(table.verdicts.measurements)} calls{' (quick)' if table.quick else ''}"
    if path is None:
        place = "from the first process"
    else:
        place = f"shipped with gradmix: {path.name}" if path.parent == SHIPPED else str(path)
    return f"{extent}, measured {table.measured}, {place}"


def record_of(device: torch.device) -> str | None:
    """Return the verdicts on record for a run on a device, in one line; None where there are no kernels to judge."""
    if not lookup.has_kernels(device):
        return None
    state = lookup.state_of(device)
    if state.table is None:
        return f"none: {state.refusal}"
    lines = lines_of(state.table)
    on = ", ".join(f"{line.operator} ({line.backend}, {line.dtype}, {line.on} sizes)" for line in lines if line.on)
    off = ", ".join(f"{line.operator} ({line.backend}, {line.dtype})" for line in lines if not line.on)
    return f"measured {state.table.measured}; on: {on or 'none'}; off: {off or 'none'}"
