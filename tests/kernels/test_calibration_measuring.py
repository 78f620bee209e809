"""Measurements: every fault is found, times are compared in pairs, and a crash loses one operator alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import calibration_processes
import pytest
import torch
from calibration_stand_in import (
    CPU,
    FAULTS,
    KEY,
    Clock,
    abort_at_64,
    abort_if_crashing,
    forks,
    install,
    make_cell,
    make_problem,
    raise_and_lose_the_device,
    right,
    work,
    wrong,
)
from torch import Tensor

from gradmix import doctor
from gradmix.calibration import children, run
from gradmix.calibration.cells import cells
from gradmix.calibration.children import Lost
from gradmix.calibration.lookup import CalibratedWorth
from gradmix.calibration.measuring import find, make_arguments, measure, reproduce, reproducer
from gradmix.calibration.problems import PROBLEMS
from gradmix.calibration.verdicts import Cell, Measurement

# ------------------------------------------------------------------------------------------------------------ one cell


def measured(cell: Cell | None = None, clock: Clock | None = None, **how: Any) -> Measurement:
    clock = clock or Clock()
    return measure(cell or make_cell(), CPU, clock, {"gram": make_problem(clock=clock, **how)})


def test_a_kernel_that_is_right_is_timed_beside_torch() -> None:
    found = measured(kernel_seconds=1e-3, torch_seconds=2.5e-3)
    assert (found.status, found.reason) == ("right", None) and found.error is not None and found.error < 0.1
    assert found.torch_ms == pytest.approx(2.5) and found.kernel_ms == pytest.approx(1.0)
    assert found.speedup == pytest.approx((2.5, 2.5, 2.5)) and found.rounds == 11
    assert not found.is_faulty and found.compile_seconds is not None


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found_and_no_faulty_kernel_is_timed(fault: str) -> None:
    kernel, status, reason = FAULTS[fault]
    found = measured(fault=kernel)
    assert found.status == status and found.speedup is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)
    assert found.is_faulty == (status != "skipped")
    found.from_values(found.as_values())


@pytest.mark.parametrize("share, status", [(0.9, "right"), (1.1, "wrong")])
def test_the_bound_divides_right_from_wrong(share: float, status: str) -> None:
    def off(gram: Tensor) -> Tensor:
        gram = gram.clone()
        gram[2, 2] += share * 1e-5 * gram.abs().max()
        return gram

    found = measured(fault=off)
    assert found.status == status and found.error == pytest.approx(share, abs=0.05)


def test_decisions_within_the_band_may_differ() -> None:
    def flip(gram: Tensor) -> Tensor:
        gram = gram.clone()
        gram[0, 1] *= -1 if gram[0, 1].abs() <= 1e-6 * gram.abs().max() else 1
        return gram

    tiny = make_problem(flip)

    def arguments(cell: Cell, g: torch.Generator) -> tuple[Tensor]:
        return (torch.tensor([[1.0, 0.0], [5e-7, 1.0]]),)

    found = measure(make_cell(timed=False), CPU, Clock(), {"gram": tiny._replace(arguments=arguments)})
    assert found.status == "right" and found.error == pytest.approx(0.1, abs=0.01)


def test_what_cannot_run_is_skipped_with_its_reason() -> None:
    found = measured(available="triton is not installed")
    assert (found.status, found.reason) == ("skipped", "triton is not installed")


def test_an_exception_without_a_message_is_named() -> None:
    def fail(gram: Tensor) -> Tensor:
        raise AssertionError

    assert measured(fault=fail).reason == "AssertionError: no message"


def test_the_lower_quantile_is_that_of_ratios_within_a_round() -> None:
    """Both become slower together in some rounds, which changes no ratio; in one of four the kernel alone does."""
    load = [1.0, 3.0, 1.0, 1.0]
    cost = {"kernel": 1e-3, "torch": 2e-3}
    counts: Counter[str] = Counter()

    def seconds(who: str) -> Any:
        # Compilation, repetition and warm-up come first, then a call to estimate by, then one a round.
        ahead = 2 + 3 + 1 if who == "kernel" else 1 + 3 + 1
        while True:
            at = counts[who] - ahead
            counts[who] += 1
            slow = 1.9 if who == "kernel" and at >= 0 and at % 4 == 2 else 1.0
            yield cost[who] * slow * (load[at % 4] if at >= 0 else 1.0)

    found = measured(kernel_seconds=seconds("kernel"), torch_seconds=seconds("torch"))
    assert found.rounds == 11 and counts == {"kernel": 17, "torch": 16}
    assert found.speedup == pytest.approx((2 / 1.9, 2.0, 2.0))


@pytest.mark.parametrize(
    ("kernel", "by_torch", "rounds"), [(1e-6, 2e-6, 200), (1e-3, 9e-4, 15), (1.0, 2.0, 11), (0.0, 0.0, 200)]
)
def test_a_cell_takes_its_time_and_not_more(kernel: float, by_torch: float, rounds: int) -> None:
    found = measured(kernel_seconds=kernel, torch_seconds=by_torch)
    assert found.rounds == rounds and found.speedup is not None


def test_a_cell_of_odd_sizes_is_checked_and_not_timed() -> None:
    clock = Clock()
    found = measured(make_cell(timed=False), clock)
    assert found.status == "right" and found.speedup is None and found.rounds == 0
    assert clock.now == pytest.approx(2 * 1e-3 + 2e-3)  # two calls and the truth


def test_a_fault_comes_with_python_that_repeats_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(fault=wrong)
    text = reproducer(found).replace("device('cuda')", "device('cpu')").replace("'))\n", "'), problems=stand_in)\n")
    exec(text, {"stand_in": {"gram": make_problem(wrong)}})
    assert capsys.readouterr().out == (f"gram, triton, float32, samples 8, features 5: wrong: {found.reason}\n")
    reproduce(found.cell, CPU, {"gram": make_problem(right)})
    assert capsys.readouterr().out == "gram, triton, float32, samples 8, features 5: right\n"


# --------------------------------------------------------------------------------------------------------------- cells


ALL = [*cells(), *cells(quick=True)]
JUDGED = {
    (operator.name, body.name)
    for operator in doctor.OPERATORS
    for body in operator.backends
    if isinstance(body.worth, CalibratedWorth)
}


def test_every_kernel_has_cells_and_cells_in_a_row() -> None:
    assert len(JUDGED) == 11
    for chosen in (cells(), cells(quick=True)):
        pairs = [pair for pair, _ in itertools.groupby(chosen, lambda cell: (cell.operator, cell.backend))]
        assert len(pairs) == len(set(pairs)) and set(pairs) <= JUDGED
    assert {(cell.operator, cell.backend) for cell in cells()} == JUDGED
    assert len(cells(quick=True)) == 14 and len({str((c.operator, c)) for c in cells()}) == len(cells())
    assert {(c.operator, c.dtype) for c in cells() if c.timed} <= {
        (c.operator, c.dtype) for c in cells() if not c.timed
    }


def is_small(cell: Cell) -> bool:
    return math.prod(size for axis, size in cell.sizes.items() if axis != "weights") < 3e6


SMALL = [cell for cell in ALL if is_small(cell)]


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: f"{cell.operator}: {cell}")
def test_a_call_of_a_cells_arguments_is_looked_up_under_the_cell(cell: Cell) -> None:
    """And torch's float32 keeps the bound that the kernel is held to, but for a margin."""
    problem = PROBLEMS[cell.operator]
    worth = find(problem, cell.backend).worth
    assert isinstance(worth, CalibratedWorth) and (worth.operator, worth.backend) == (cell.operator, cell.backend)
    call = worth.call(worth._extent(*make_arguments(problem, cell, CPU)))
    assert (call.dtype, call.kind, [*call.ranges]) == (cell.dtype, cell.kind, [*cell.sizes])
    if cell.timed:
        assert call.ranges == {axis: (size, size) for axis, size in cell.sizes.items()}
    found = measure(replace(cell, backend="torch", timed=False), CPU, Clock()) if not cell.timed else None
    assert found is None or (found.status == "right" and found.error is not None and found.error < 0.5)


def test_no_case_of_small_cells_is_left_out() -> None:
    kinds = {(cell.operator, cell.kind, cell.dtype) for cell in ALL}
    assert {(cell.operator, cell.kind, cell.dtype) for cell in SMALL} == kinds


def test_a_batch_is_mixed_with_itself_and_odd_sizes_with_others() -> None:
    timed, odd = (next(c for c in cells() if c.operator == "mixed_alignment" and c.timed == timed) for timed in (1, 0))
    same = make_arguments(PROBLEMS["mixed_alignment"], timed, CPU)
    other = make_arguments(PROBLEMS["mixed_alignment"], odd, CPU)
    assert all(a is b for a, b in zip(same[:3], same[3:6], strict=True)) and len(other[3]) != len(other[0])


FEW = [
    next(cell for cell in cells() if cell.operator == name and not cell.timed)
    for name in ("mixed_alignment", "last_layer_gradient", "draw_partners", "mixed_gram_alignment")
]


@pytest.mark.parametrize("cell", FEW, ids=lambda cell: cell.operator)
def test_the_kernels_are_right_where_they_can_run(cell: Cell) -> None:
    """Compiled on a GPU, else by Triton's interpreter; in a tenth of the bound."""
    found = measure(cell, torch.device("cuda" if torch.cuda.is_available() else "cpu"), Clock())
    if found.status == "skipped":
        pytest.skip(str(found.reason))
    assert (found.status, found.reason) == ("right", None) and found.error is not None and found.error < 0.1


@pytest.mark.gpu
def test_a_device_is_measured_without_a_fault() -> None:
    table = run.calibrate(torch.device("cuda"), quick=True)
    assert table.verdicts.lost == {} and len(table.verdicts.measurements) == 14
    for found in table.verdicts.measurements:
        assert found.status == "right" and found.speedup is not None, found


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Any:
    with forks() as method:
        monkeypatch.setattr(children, "START_METHOD", method)
        yield


CELLS = [make_cell(samples) for samples in (8, 64, 32)]


def run_cells(target: Callable[..., None], **how: Any) -> tuple[list[int], str]:
    """Sizes that were measured, and the sentence of an early end."""
    done: list[int] = []
    try:
        for found in children.run("cpu", CELLS, target=target, **how):
            done.append(found.cell.sizes["samples"])
    except Lost as error:
        return done, str(error)
    return done, ""


def test_cells_are_measured_in_a_process_of_their_own(forked: None) -> None:
    assert run_cells(work) == ([8, 64, 32], "")


def test_a_crash_is_named_by_its_cell_its_signal_and_its_last_words(forked: None) -> None:
    done, why = run_cells(abort_at_64)
    assert done == [8]
    assert why == (
        "crashed at float32, samples 64, features 5: the process was ended by SIGABRT (terminate called without an "
        "active exception)"
    )


def test_a_device_that_is_lost_ends_the_process(forked: None) -> None:
    done, why = run_cells(raise_and_lose_the_device)
    assert done == [8] and why == (
        "crashed at float32, samples 8, features 5: RuntimeError: CUDA error: an illegal memory access was encountered"
        "; the device was lost"
    )


def test_a_process_that_leaves_or_hangs_is_named() -> None:
    """By the method that serves devices: a fresh process, which imports no torch here."""
    done, why = run_cells(calibration_processes.leave)
    assert done == [] and why == (
        "crashed at float32, samples 8, features 5: the process ended with status 3 (no kernel image is available for "
        "execution on the device)"
    )
    done, why = run_cells(calibration_processes.hang, patience=0.2, start=0.1)
    assert done == [] and why == "crashed at float32, samples 8, features 5: no answer in 0 s"


def test_a_crash_loses_one_operator_alone(forked: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path)
    monkeypatch.setattr(run, "unavailable", lambda pair: "not built" if pair[0] == "absent" else None)
    wanted = [replace(cell, operator=name) for name in ("crashing", "absent", "gram") for cell in CELLS]

    seen: list[Any] = []
    table = run.calibrate(
        CPU,
        cells=wanted,
        target=abort_if_crashing,
        on_result=seen.append,
        on_operator=lambda table, pair: seen.append(pair),
    )
    assert [m.status for m in table.verdicts.measurements] == ["right", "crashed", *["skipped"] * 3, *["right"] * 3]
    assert table.verdicts.lost == {"crashing triton": table.verdicts.lost["crashing triton"]}
    assert "SIGABRT" in table.verdicts.lost["crashing triton"]
    assert [pair[0] for pair in seen if isinstance(pair, tuple)] == ["crashing", "absent", "gram"]
    assert table.key == KEY and table.seconds > 0 and not table.quick


# ------------------------------------------------------------------------------------------- nothing to be measured


def test_why_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    why = str(run.reason_not_to_measure(None))
    assert why.startswith("there is nothing to measure: the kernels are for GPUs, and ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run.reason_not_to_measure(CPU) == "there is nothing to measure on cpu: the kernels are for GPUs"
    monkeypatch.setattr("gradmix.ops._triton.is_interpreted", lambda: True)
    assert "TRITON_INTERPRET" in str(run.reason_not_to_measure(torch.device("cuda")))
    monkeypatch.setattr("gradmix.ops._triton.is_interpreted", lambda: False)
    monkeypatch.setattr(run, "unavailable", lambda pair: {"triton": "no triton"}.get(pair[1], "no CUDA part"))
    assert run.reason_not_to_measure(None) == "there is nothing to measure: no triton; no CUDA part"
    monkeypatch.setattr(run, "unavailable", lambda pair: None if pair[0] == "class_sketch" else "no")
    assert run.reason_not_to_measure(None) is None
