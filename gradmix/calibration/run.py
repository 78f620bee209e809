"""The whole of ``gradmix calibrate``: every operator in a process of its own, and the table of the results."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timezone

import torch

from gradmix.calibration import children
from gradmix.calibration.cells import cells as all_cells
from gradmix.calibration.key import key_of, with_index
from gradmix.calibration.problems import PROBLEMS
from gradmix.calibration.table import Table
from gradmix.calibration.verdicts import Cell, Measurement, Verdicts
from gradmix.ops import _triton

Implementation = tuple[str, str]
"""Names of an operator and of its implementation."""


def reason_not_to_measure(device: torch.device | None) -> str | None:
    """Return why there is nothing to measure, or None.

    Args:
        device: the device, or None for the current one.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        why = "torch sees no usable device or driver" if built else "this torch is built for the CPU only"
        return f"there is nothing to measure: the kernels are for GPUs, and {why}"
    if device is not None and device.type != "cuda":
        return f"there is nothing to measure on {device}: the kernels are for GPUs"
    if _triton.is_interpreted():
        return "there is nothing to measure: TRITON_INTERPRET is set, and kernels would be run by Triton's interpreter"
    if all(unavailable(pair) for pair in {(cell.operator, cell.backend) for cell in all_cells()}):
        reasons = dict.fromkeys(filter(None, (unavailable((c.operator, c.backend)) for c in all_cells())))
        return f"there is nothing to measure: {'; '.join(reasons)}"
    return None


def unavailable(pair: Implementation) -> str | None:
    """Return why an implementation cannot run on this machine, or None."""
    operator, backend = pair
    return dict(PROBLEMS[operator].operator.explain())[backend]


def calibrate(
    device: torch.device,
    *,
    quick: bool = False,
    on_result: Callable[[Measurement], None] = lambda _: None,
    on_operator: Callable[[Table, Implementation], None] = lambda *_: None,
    cells: Iterable[Cell] | None = None,
    target: children.Target = children.work,
) -> Table:
    """Measure all kernels on a device.

    Args:
        device: a CUDA or ROCm device.
        quick: whether to measure a dozen cells only.
        on_result: called with each measurement.
        on_operator: called with the table as it is after each operator, and with the operator.
        cells: what is measured, the cells of an operator in a row; None: all of :mod:`gradmix.calibration.cells`.
        target: function of the processes that measure.

    Returns:
        The table. It is not written.
    """
    device = with_index(device)
    start = time.perf_counter()
    table = Table(key_of(device), datetime.now(timezone.utc).isoformat(timespec="seconds"), 0.0, quick, Verdicts(()))
    chosen = all_cells(quick=quick) if cells is None else cells
    for pair, group in itertools.groupby(chosen, lambda cell: (cell.operator, cell.backend)):
        found: list[Measurement] = []
        lost = dict(table.verdicts.lost)
        wanted, reason = list(group), unavailable(pair)
        if reason is not None:
            found = [Measurement(cell, "skipped", reason) for cell in wanted]
        else:
            try:
                for measurement in children.run(str(device), wanted, target=target):
                    found.append(measurement)
                    on_result(measurement)
            except children.Lost as error:
                lost[" ".join(pair)] = str(error)
                found = [m for m in found if m.cell != error.crash.cell] + [error.crash]
        verdicts = Verdicts((*table.verdicts.measurements, *found), lost)
        table = replace(table, verdicts=verdicts, seconds=time.perf_counter() - start)
        on_operator(table, pair)
    return table
