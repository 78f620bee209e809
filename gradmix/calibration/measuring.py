"""Measurement of one cell: its truth, its repetition, and its time beside torch's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gradmix.calibration.problems import BAND, PROBLEMS, Arguments, Problem, Results
from gradmix.calibration.verdicts import Cell, Measurement, Speedup
from gradmix.ops.backends import Backend

SECONDS = 0.03
"""Time given to the rounds of a cell."""

LEAST_ROUNDS, MOST_ROUNDS = 11, 200
"""Rounds of a cell. With fewer, the lower quantile is the smallest ratio or the one above it."""

SAMPLE_SECONDS, MOST_CALLS = 2e-4, 20
"""Calls are timed back to back until they take so long: a single launch is as short as the clock's noise."""

WARM_UP = 3
"""Calls before the first round."""

POISON = 1 << 22
"""Elements of NaN that are left in free memory, where an implementation may read what it has not written (16 MiB)."""

_OutOfMemory: tuple[type[Exception], ...] = (torch.OutOfMemoryError,)


class Timer(Protocol):
    """A clock of a device."""

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """Return the time of one call: the mean of so many back to back, the device being idle before."""


class CudaTimer:
    """The clock of a CUDA or ROCm device: its own events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """See :class:`Timer`. The time that the host needs to queue the work counts, as the device was idle."""
        return self.seconds_ahead(call, calls, 0.0)

    def seconds_ahead(self, call: Callable[[], object], calls: int, ahead: float) -> float:
        """Return the time of one call, the host having ``ahead`` seconds to queue the work before the device begins."""
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if ahead:
                # No clock of today's devices is above 3 GHz, so the pause lasts at least so long.
                torch.cuda._sleep(int(3e9 * ahead))
            start.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / calls


def measure(cell: Cell, device: torch.device, timer: Timer, problems: Mapping[str, Problem] = PROBLEMS) -> Measurement:
    """Measure one cell.

    An exception of the implementation makes the status ``"crashed"``. Where the device's memory does not suffice, or
    the implementation cannot take the call, it is ``"skipped"``.

    Args:
        cell: what is called.
        device: where.
        timer: its clock.
        problems: the operators by name.
    """
    problem = problems[cell.operator]
    implementation = find(problem, cell.backend)
    try:
        arguments = make_arguments(problem, cell, device)
        reason = implementation.available() or implementation.can_run(*arguments)
        if reason is not None:
            return Measurement(cell, "skipped", reason)
        start = time.perf_counter()
        results = problem.run(implementation, arguments)
        _wait(device)
        compiled = time.perf_counter() - start
        found = _check(problem, implementation, cell, arguments, results)
        if not cell.timed or found.is_faulty:
            return replace(found, compile_seconds=compiled)
        return replace(found, compile_seconds=compiled, **_time(problem, implementation, arguments, timer))
    except _OutOfMemory:
        return Measurement(cell, "skipped", "the device's memory does not suffice")
    except Exception as error:
        line = (str(error).strip().splitlines() or ["no message"])[0]
        return Measurement(cell, "crashed", f"{type(error).__name__}: {line}")


def find(problem: Problem, backend: str) -> Backend:
    """Return the implementation of a name."""
    return next(body for body in problem.operator.backends if body.name == backend)


def make_arguments(problem: Problem, cell: Cell, device: torch.device) -> Arguments:
    """Return the arguments of a cell on a device: the same numbers on each, drawn on the CPU.

    Tensors that are the same before are the same after.
    """
    moved: dict[int, Tensor] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]

    made = problem.arguments(cell, torch.Generator().manual_seed(cell.seed))
    return tuple(move(value) for value in made)


def _check(
    problem: Problem, implementation: Backend, cell: Cell, arguments: Arguments, results: Results
) -> Measurement:
    """Compare results with the truth, and with those of a second call."""
    exact = arguments
    if problem.in_float64:
        exact = tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments)
    truths = problem.run(find(problem, "torch"), exact)
    reason, error = _compare(problem, exact, results, truths)
    if reason is None:
        torch.full((POISON,), math.nan, device=results[0].device)
        again = problem.run(implementation, arguments)
        if not all(_same_bits(a, b) for a, b in zip(results, again, strict=True)):
            reason = "two calls with the same arguments gave different bits"
    shown = error if error is not None and math.isfinite(error) else None
    return Measurement(cell, "right" if reason is None else "wrong", reason, shown)


def _compare(problem: Problem, exact: Arguments, results: Results, truths: Results) -> tuple[str | None, float | None]:
    """Return why results are wrong, or None, and the largest error as a share of its bound."""
    for result, truth in zip(results, truths, strict=True):
        if result.shape != truth.shape:
            return f"got shape {tuple(result.shape)}, expected {tuple(truth.shape)}", None
        unequal = (result != truth) if not truth.is_floating_point() else (result.isfinite() != truth.isfinite())
        if bool(unequal.any()):
            what = "integers differ from torch's" if not truth.is_floating_point() else "are not finite as the truth is"
            return f"{int(unequal.sum()):,} of {truth.numel():,} results {what}", None
    worst = 0.0
    for name, error, bound in problem.deviations(exact, results, truths):
        share = float(error / bound) if float(bound) > 0 else float(error > 0)
        if share > 1:
            return f"{name}: got an error of {float(error):.2g}, expected at most {float(bound):.2g}", share
        worst = max(worst, share)
    if problem.decides:
        truth = truths[0].nan_to_num()
        clear = truth.abs() > BAND * truth.abs().max()
        flipped = int(((results[0] >= 0) != (truths[0] >= 0))[clear].sum())
        if flipped:
            return f"{flipped:,} of {int(clear.sum()):,} decisions differ from float64's", worst
    return None, worst


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _time(problem: Problem, implementation: Backend, arguments: Arguments, timer: Timer) -> dict[str, Any]:
    """Return the fields of :class:`Measurement` that are times."""
    torchs = find(problem, "torch")
    calls: list[Callable[[], object]] = [lambda: torchs.run(*arguments), lambda: implementation.run(*arguments)]
    in_a_row, total = [], 0.0
    for call in calls:
        for _ in range(WARM_UP):
            call()
        one = max(timer.seconds(call, 1), 1e-9)
        in_a_row.append(max(1, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / one))))
        total += one * in_a_row[-1]
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / total)))
    times = np.empty((rounds, 2))
    for done in range(rounds):
        for at in (0, 1) if done % 2 else (1, 0):  # neither always finds what the other left in the caches
            times[done, at] = max(timer.seconds(calls[at], in_a_row[at]), 1e-9)
    low, median, high = (float(q) for q in np.quantile(times[:, 0] / times[:, 1], (0.2, 0.5, 0.8)))
    torch_ms, kernel_ms = (float(t) for t in 1e3 * np.median(times, axis=0))
    return {
        "torch_ms": torch_ms,
        "kernel_ms": kernel_ms,
        "speedup": Speedup(low, median, high),
        "rounds": rounds,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------- reproducing


def reproducer(measurement: Measurement) -> str:
    """Return Python that repeats the check of a cell; to be run on the device where it failed."""
    return (
        "import torch\n"
        "from gradmix.calibration.measuring import reproduce\n"
        "from gradmix.calibration.verdicts import Cell\n"
        f"reproduce({measurement.cell!r}, torch.device('cuda'))\n"
    )


def reproduce(cell: Cell, device: torch.device, problems: Mapping[str, Problem] = PROBLEMS) -> None:
    """Repeat the check of a cell, without catching exceptions, and print what is found."""
    problem = problems[cell.operator]
    implementation, arguments = find(problem, cell.backend), make_arguments(problem, cell, device)
    found = _check(problem, implementation, cell, arguments, problem.run(implementation, arguments))
    print(f"{cell.operator}, {cell.backend}, {cell}: {found.status}{f': {found.reason}' if found.reason else ''}")
