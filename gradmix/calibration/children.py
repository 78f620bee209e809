"""Measurements of one operator in a process of its own, which a kernel may crash, hang or leave without a device.

A fault of a kernel can end the process (a signal), or spoil the device's context for every later call of the process
(an illegal access). Either loses the operator that is measured, and no other.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gradmix.calibration.verdicts import Cell, Measurement

PATIENCE = 180.0
"""Seconds that a cell may take, compilation included. Then its kernel is taken to hang."""

START_METHOD = "spawn"
"""Of the processes: a device's context does not survive a fork."""

_START = 120.0
"""Seconds more that a process has to import torch and to find its device."""

Target = Callable[[Connection, str, str, list[dict[str, Any]]], None]
"""Function of the process: where it reports, the file of its output, the device, and the cells."""


class Lost(RuntimeError):
    """The process ended early, or was ended.

    Attributes:
        crash: the measurement of the cell at fault.
    """

    def __init__(self, crash: Measurement) -> None:
        super().__init__(f"crashed at {crash.cell}: {crash.reason}")
        self.crash = crash


def work(connection: Connection, output: str, device: str, cells: list[dict[str, Any]]) -> None:
    """Measure cells of one operator, and send each measurement, as plain values; the function of the process.

    The process ends early if the device is lost.
    """
    from gradmix.calibration.measuring import CudaTimer
    from gradmix.runtime.deferred_checks import ENVIRONMENT_VARIABLE

    os.environ[ENVIRONMENT_VARIABLE] = "later"  # as in training: torch's implementation does not wait
    place = torch.device(device)
    redirect_output(output)
    torch.cuda.set_device(place)
    measure_all(connection, place, CudaTimer(place), cells)


def measure_all(
    connection: Connection, device: torch.device, timer: Any, cells: list[dict[str, Any]], **how: Any
) -> None:
    """Measure cells and send each measurement; keywords as :func:`gradmix.calibration.measuring.measure`."""
    from gradmix.calibration.measuring import measure

    for values in cells:
        found = measure(Cell(**values), device, timer, **how)
        connection.send(found.as_values())
        if found.status == "crashed":
            # After an illegal access every call fails: this one then raises, and ends the process.
            torch.zeros(1, device=device).item()


def redirect_output(file: str) -> None:
    """Write what this process and its libraries print to a file; the terminal belongs to the parent."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def run(
    device: str, cells: Sequence[Cell], *, target: Target = work, patience: float = PATIENCE, start: float = _START
) -> Iterator[Measurement]:
    """Measure the cells of one operator in a process of its own, in their order.

    Args:
        device: name of the device, with its number.
        cells: of one operator and implementation.
        target: function of the process.
        patience: seconds that a cell may take.
        start: seconds more that the first one may take.

    Yields:
        A measurement of each cell.

    Raises:
        Lost: the process ended before it had measured all cells, or a cell took too long.
    """
    context: Any = get_context(START_METHOD)
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="gradmix-calibrate-") as folder:
        output = Path(folder, "output.txt")
        values = [asdict(cell) | {"sizes": dict(cell.sizes)} for cell in cells]
        process = context.Process(target=target, args=(sender, str(output), device, values), daemon=True)
        process.start()
        sender.close()  # so that the end of the process ends the reading
        grace, last = 0.0, None
        try:
            for at, cell in enumerate(cells):
                limit = patience + (start if at == 0 else 0)
                if not receiver.poll(limit):
                    raise Lost(Measurement(cell, "crashed", f"no answer in {limit:.0f} s"))
                try:
                    found: Mapping[str, Any] = receiver.recv()
                except EOFError:
                    process.join()
                    if last is not None and last.status == "crashed":
                        # It took the device along.
                        raise Lost(replace(last, reason=f"{last.reason}; the device was lost")) from None
                    reason = f"{_end_of(process.exitcode)}{_last_line(output)}"
                    raise Lost(Measurement(cell, "crashed", reason)) from None
                last = Measurement.from_values(found)
                yield last
            grace = 5.0
        finally:
            receiver.close()
            process.join(grace)
            process.kill()
            process.join()


def _end_of(status: int | None) -> str:
    if status is not None and status < 0:
        try:
            return f"the process was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"the process was ended by signal {-status}"
    return f"the process ended with status {status}"


def _last_line(output: Path) -> str:
    """Return the last line that a process printed, as the end of a sentence."""
    try:
        lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return f" ({lines[-1].strip()[:200]})" if lines else ""
