"""A device that is the CPU, with a clock that stands still but for the costs of what is called, and faulty kernels.

The operator ``gram`` has the inner products of all pairs of samples. Its implementation ``triton`` is torch's with a
fault to choose, and both implementations advance the clock by what they cost.
"""

from __future__ import annotations

import faulthandler
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import CAN_FORK
from torch import Tensor

from gradmix.calibration import agreement, children, lookup
from gradmix.calibration.key import COMPONENTS
from gradmix.calibration.lookup import CalibratedWorth, Extent
from gradmix.calibration.problems import Deviation, Problem
from gradmix.calibration.table import Table, path_of, write
from gradmix.calibration.verdicts import Cell, Measurement, Speedup, Verdicts
from gradmix.ops.backends import Backend, Operator

CPU = torch.device("cpu")
KEY = {name: f"some {name}" for name in COMPONENTS}
AXES = ("samples", "samples", "features")


class Clock:
    """Time that passes in calls alone; the timer of the stand-in device."""

    def __init__(self) -> None:
        self.now = 0.0

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        start = self.now
        for _ in range(calls):
            call()
        return (self.now - start) / calls


def extent(x: Tensor) -> Extent:
    return x.device, x.dtype, "", x.shape[0], x.shape[0], x.shape[1]


def costs(clock: Clock, seconds: float | Iterator[float]) -> None:
    clock.now += seconds if isinstance(seconds, float) else next(seconds)


# -------------------------------------------------------------------------------------------------------------- faults


def right(gram: Tensor) -> Tensor:
    return gram


def wrong(gram: Tensor) -> Tensor:
    return gram + 1e-3 * gram.abs().max()


def wrong_sign(gram: Tensor) -> Tensor:
    """Within the bound, and on the other side of zero for the pair that is made for it."""
    gram[0, 1] = -gram[0, 1]
    return gram


def nan(gram: Tensor) -> Tensor:
    gram[1, 0] = torch.nan
    return gram


def other_shape(gram: Tensor) -> Tensor:
    return gram[:-1]


def raising(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError(
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"
    )


def out_of_memory(gram: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("tried to allocate 99 GiB")


def aborting(gram: Tensor) -> Tensor:
    faulthandler.disable()
    os.write(2, b"terminate called without an active exception\n")  # as a library does, past Python
    os.abort()


class Unsteady:
    """Other bits in every call."""

    calls = 0

    def __call__(self, gram: Tensor) -> Tensor:
        self.calls += 1
        return gram * (1 + self.calls * 2**-23)


FAULTS = {
    "wrong": (wrong, "wrong", "inner product: got an error of"),
    "wrong sign": (wrong_sign, "wrong", "decisions differ from float64's"),
    "NaN": (nan, "wrong", "1 of 64 results are not finite as the truth is"),
    "other shape": (other_shape, "wrong", r"got shape \(7, 8\), expected \(8, 8\)"),
    "other bits": (Unsteady(), "wrong", "two calls with the same arguments gave different bits"),
    "raising": (raising, "crashed", "RuntimeError: CUDA error: an illegal memory access was encountered$"),
    "out of memory": (out_of_memory, "skipped", "memory does not suffice"),
}
"""Faults of a kernel, each with the status and the reason."""


# ------------------------------------------------------------------------------------------------------------- problem


def make_problem(
    fault: Callable[[Tensor], Tensor] = right,
    clock: Clock | None = None,
    kernel_seconds: float | Iterator[float] = 1e-3,
    torch_seconds: float | Iterator[float] = 2e-3,
    available: str | None = None,
) -> Problem:
    clock = clock or Clock()

    def by_torch(x: Tensor) -> Tensor:
        costs(clock, torch_seconds)
        return x @ x.T

    def by_kernel(x: Tensor) -> Tensor:
        costs(clock, kernel_seconds)
        return fault(x @ x.T)

    kernel = Backend(
        "triton", by_kernel, worth=CalibratedWorth("gram", "triton", AXES, extent), available=lambda: available
    )
    operator = Operator("gram", (kernel, Backend("torch", by_torch)))
    return Problem(operator, arguments, deviations, decides=True)


def arguments(cell: Cell, g: torch.Generator) -> tuple[Tensor]:
    x = torch.randn(cell.sizes["samples"], cell.sizes["features"], generator=g)
    # All but orthogonal: a share of 4e-6 of the largest inner product.
    x[1] = x[1] - x[0] * (x[0] @ x[1]) / x[0].square().sum()
    x[1] += 4e-6 * x[0] * (x @ x.T).abs().max() / x[0].square().sum()
    return (x.to(getattr(torch, cell.dtype)),)


def deviations(_arguments: Any, results: Any, truths: Any) -> list[Deviation]:
    error = (results[0].double() - truths[0]).abs().max()
    return [Deviation("inner product", error, 1e-5 * truths[0].abs().max())]


def make_cell(samples: int = 8, features: int = 5, **values: Any) -> Cell:
    return replace(Cell("gram", "triton", "", "float32", {"samples": samples, "features": features}), **values)


def choose(samples: int = 8, features: int = 5, backend: str = "auto", **how: Any) -> str:
    """Name of the implementation that is chosen for a call of the stand-in's operator."""
    return make_problem(**how).operator.choose(backend, torch.ones(samples, features)).name


# --------------------------------------------------------------------------------------------------------------- tables


def make_measurement(samples: int, features: int, low: float, **values: Any) -> Measurement:
    return Measurement(
        make_cell(samples, features),
        "right",
        None,
        0.1,
        1.0,
        2.0,
        1.0,
        Speedup(low, low + 0.1, low + 0.2),
        11,
        **values,
    )


def make_table(*measurements: Measurement, key: dict[str, str] = KEY, **values: Any) -> Table:
    table = Table(key, "2026-11-29T08:00:00+00:00", 61.5, False, Verdicts(measurements))
    return replace(table, **values)


def corners(low: float = 2.0) -> list[Measurement]:
    return [make_measurement(samples, features, low) for samples in (8, 64) for features in (5, 50)]


def install(monkeypatch: Any, tmp_path: Any) -> None:
    """Have the CPU pass for a device with kernels, with tables in a folder of its own."""
    monkeypatch.setenv("GRADMIX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GRADMIX_BACKEND", raising=False)
    monkeypatch.setattr("gradmix.ops.backends._preferred", None)
    monkeypatch.setattr(lookup, "has_kernels", lambda device: True)
    for module in ("key", "lookup", "agreement", "run"):
        monkeypatch.setattr(f"gradmix.calibration.{module}.key_of", lambda device: KEY)
    lookup.forget()


# ------------------------------------------------------------------------------------------------------------ processes


@contextmanager
def forks() -> Iterator[str]:
    """The method by which processes start quickly, if the system bears a fork, without a warning of threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield "fork" if CAN_FORK else "spawn"


def start_processes(function: Callable[..., None], arguments: tuple[Any, ...], number: int) -> Any:
    with forks() as method:
        return torch.multiprocessing.start_processes(function, arguments, number, join=False, start_method=method)


def write_often(rank: int, path: str) -> None:
    for number in range(60):
        write(make_table(*corners(), seconds=float(rank), measured=f"number {number}"), Path(path))


def agree(rank: int, folder: str) -> None:
    """Say what is chosen before and after two processes have agreed; the first one's kernel is the faster one."""
    install(pytest.MonkeyPatch(), Path(folder, str(rank)))
    write(make_table(*corners(2.0 if rank == 0 else 0.5)), path_of(KEY))
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    before = choose()
    agreement.agree(torch.distributed.group.WORLD, CPU)
    Path(folder, f"{rank}.txt").write_text(f"{before} {choose()}")
    torch.distributed.destroy_process_group()


def work(connection: Any, output: str, device: str, cells: list[dict[str, Any]], fault: Any = right) -> None:
    """Function of a process that measures the stand-in."""
    clock = Clock()
    children.redirect_output(output)
    problems = {"gram": make_problem(fault, clock)}
    children.measure_all(connection, torch.device(device), clock, cells, problems=problems)


def abort_at_64(connection: Any, output: str, device: str, cells: list[dict[str, Any]]) -> None:
    work(connection, output, device, cells, lambda gram: aborting(gram) if len(gram) == 64 else gram)


def abort_if_crashing(connection: Any, output: str, device: str, cells: list[dict[str, Any]]) -> None:
    """What each of the operators is, with the kernel of ``gram``."""
    function = abort_at_64 if cells[0]["operator"] == "crashing" else work
    function(connection, output, device, [cell | {"operator": "gram"} for cell in cells])


def raise_and_lose_the_device(connection: Any, output: str, device: str, cells: list[dict[str, Any]]) -> None:
    """After an illegal access whatever is called fails."""

    def lose(gram: Tensor) -> Tensor:
        torch.zeros = raising  # in this process
        return raising(gram)

    work(connection, output, device, cells, lose)
