"""``gradmix calibrate``: check and time every kernel on this machine's device, and keep the verdicts for ``auto``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gradmix.cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from gradmix.calibration.table import Table
    from gradmix.calibration.verdicts import Measurement

FAULTY = 1
"""Exit status if a kernel is wrong or crashes on the device."""


def main(args: list[str]) -> int:
    """Measure, print what was found, and write the table.

    Returns:
        0; 1 if a kernel is wrong or crashes on this device.

    Raises:
        UsageError: there is nothing to measure.
        OSError: the table cannot be written; checked before anything is measured.
    """
    parser = argparse.ArgumentParser(
        prog="gradmix calibrate",
        description="Check every kernel on this machine's GPU against float64, time it beside plain torch, and keep "
        "the verdicts in the user's cache folder. From then on, the backend auto uses a kernel where it was right and "
        "faster. Takes two to three minutes; nothing else should use the GPU meanwhile.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cuda", help="the device (default: cuda, the current one)")
    parser.add_argument("--quick", action="store_true", help="a dozen calls only: well under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file too, as it grows")
    options = parser.parse_args(args)

    import torch

    from gradmix.calibration import run
    from gradmix.calibration.key import key_of, with_index
    from gradmix.calibration.table import check_writable, path_of, write

    device = _as_device(options.device)
    reason = run.reason_not_to_measure(device)
    if reason is not None:
        raise UsageError(reason)
    if device.index is not None and not 0 <= device.index < torch.cuda.device_count():
        raise UsageError(f"--device: got {options.device}, expected one of {torch.cuda.device_count()} devices")
    key = key_of(with_index(device))
    path = path_of(key)
    for file in filter(None, (path, options.json)):
        check_writable(file)
    print(f"{key['device']}: {'a dozen' if options.quick else 'all'} calls", flush=True)

    done = 0

    def on_result(_: Measurement) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r{done} calls ", end="", file=sys.stderr, flush=True)

    def on_operator(table: Table, pair: run.Implementation) -> None:
        if sys.stderr.isatty():
            print("\r" + " " * 20 + "\r", end="", file=sys.stderr, flush=True)
        _print_lines(table, pair)
        if options.json is not None:
            write(table, options.json)

    table = run.calibrate(device, quick=options.quick, on_result=on_result, on_operator=on_operator)
    _print_faults(table)
    _save(table, path)
    return FAULTY if _is_faulty(table) else 0


def _as_device(name: str) -> torch.device:
    import torch

    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device: got {name!r}, expected cuda or cuda:N") from None


def _is_faulty(table: Table) -> bool:
    from gradmix.calibration.summary import faults_of

    return bool(faults_of(table) or table.verdicts.lost)


def _print_lines(table: Table, pair: tuple[str, str]) -> None:
    from gradmix.calibration.summary import lines_of

    for line in lines_of(table):
        if (line.operator, line.backend) == pair:
            print(f"{line.operator:<20}  {line.backend:<6}  {line.dtype:<9}  {line.text}", flush=True)


def _print_faults(table: Table) -> None:
    """Print the first fault of every implementation and dtype, with the Python that repeats it."""
    from gradmix.calibration.measuring import reproducer
    from gradmix.calibration.summary import faults_of

    shown = set()
    for fault in faults_of(table):
        cell = fault.cell
        if (cell.operator, cell.backend, cell.dtype) not in shown:
            shown.add((cell.operator, cell.backend, cell.dtype))
            print(f"\n{cell.operator}, {cell.backend}, {cell}: {fault.status}: {fault.reason}. Repeat it by\n")
            print("    " + reproducer(fault).strip().replace("\n", "\n    "))
    if shown:
        print("\nThe kernel stays off on this device. Please report it, with this output and that of gradmix doctor.")


def _save(table: Table, path: Path) -> None:
    """Write the table, unless it is a quick one and a full one is valid."""
    from gradmix.calibration.table import find, write

    known = find(table.key)
    if table.quick and known.path == path and known.table is not None and not known.table.quick:
        print(f"\nNot kept: {path} has all calls, measured {known.table.measured}")
        return
    write(table, path)
    print(f"\n{table.seconds:.0f} s; kept in {path}")
