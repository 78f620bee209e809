"""``gradmix calibrate``: what it prints, where it writes, and its exit status."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_stand_in import CPU, KEY, Clock, choose, install, make_cell, make_problem, right, wrong
from torch import Tensor

from gradmix import cli
from gradmix.calibration import children, lookup, run
from gradmix.calibration.measuring import measure
from gradmix.calibration.table import path_of, read
from gradmix.calibration.verdicts import Cell, Measurement

Device = Callable[..., None]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Device]:
    """Makes a stand-in device with a kernel; measured in this process."""
    install(monkeypatch, tmp_path)
    monkeypatch.delenv("GRADMIX_DEBUG", raising=False)
    monkeypatch.setattr(run, "reason_not_to_measure", lambda device: None)
    for module in ("key", "run"):
        monkeypatch.setattr(f"gradmix.calibration.{module}.with_index", lambda device: CPU)
    monkeypatch.setattr(run, "unavailable", lambda pair: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def cells(*, quick: bool = False) -> list[Cell]:
        sizes = (8, 64) if quick else (8, 16, 64)
        return [make_cell(samples, features) for samples in sizes for features in (5, 50)]

    monkeypatch.setattr(run, "all_cells", cells)

    def make(fault: Callable[[Tensor], Tensor] = right, lost: bool = False, **how: Any) -> None:
        def run_here(_device: str, wanted: list[Cell], **_: Any) -> Iterator[Measurement]:
            clock = Clock()
            for cell in wanted:
                yield measure(cell, CPU, clock, {"gram": make_problem(fault, clock, **how)})
                if lost:
                    raise children.Lost(Measurement(wanted[1], "crashed", "the process was ended by SIGSEGV"))

        monkeypatch.setattr(children, "run", run_here)

    make()
    yield make
    lookup.forget()


def test_it_measures_keeps_the_table_and_auto_obeys_it(device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose() == "torch"
    assert cli.main(["calibrate"]) == 0
    path = path_of(KEY)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "some device: all calls"
    assert (
        lines[1] == "gram                  triton  float32    on at 6 of 6 sizes: 2.00 to 2.00 times as fast as torch"
    )
    assert lines[-1].endswith(f"kept in {path}") and len(read(path).verdicts.measurements) == 6
    assert choose() == "torch", "a process that runs already keeps its choice"
    lookup.forget()
    assert choose() == "triton" and choose(samples=7) == "torch"


def test_a_slow_kernel_is_no_error_and_stays_off(device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    device(kernel_seconds=3e-3)
    assert cli.main(["calibrate"]) == 0
    assert "off: right, and 0.67 to 0.67 times as fast as torch" in capsys.readouterr().out
    lookup.forget()
    assert choose() == "torch"


def test_a_wrong_kernel_is_reported_with_python_that_repeats_it(
    device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    device(wrong)
    assert cli.main(["calibrate"]) == 1
    out = capsys.readouterr().out
    assert "off: wrong at float32, samples 8, features 5: inner product: got an error of" in out
    assert out.count("Repeat it by") == 1 and "    reproduce(Cell(operator='gram', backend='triton'" in out
    assert "The kernel stays off on this device." in out
    lookup.forget()
    assert choose() == "torch" and path_of(KEY).is_file()


def test_a_lost_operator_is_reported(device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    device(lost=True)
    assert cli.main(["calibrate"]) == 1
    out = capsys.readouterr().out
    assert "off: crashed at float32, samples 8, features 50: the process was ended by SIGSEGV" in out
    assert out.count("Repeat it by") == 1 and "sizes={'samples': 8, 'features': 50}" in out
    lookup.forget()
    assert choose() == "torch"


def test_a_quick_table_does_not_take_the_place_of_a_full_one(
    device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    path = path_of(KEY)
    assert cli.main(["calibrate", "--quick"]) == 0
    assert read(path).quick and len(read(path).verdicts.measurements) == 4
    assert cli.main(["calibrate"]) == 0
    full = path.read_text()
    capsys.readouterr()
    assert cli.main(["calibrate", "--quick"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"Not kept: {path} has all calls, measured 20")
    assert path.read_text() == full


def test_the_table_goes_to_a_file_too_as_it_grows(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was measured before an interruption is there; the user's table is written at the end alone."""
    file = tmp_path / "table.json"
    two = [replace(make_cell(), operator=name) for name in ("gram", "later")]
    monkeypatch.setattr(run, "all_cells", lambda quick: two)

    def run_here(_device: str, wanted: list[Cell], **_: Any) -> Iterator[Measurement]:
        if wanted[0].operator == "later":
            raise KeyboardInterrupt
        yield measure(wanted[0], CPU, Clock(), {"gram": make_problem()})

    monkeypatch.setattr(children, "run", run_here)
    assert cli.main(["calibrate", "--json", str(file)]) == 130
    assert [m.cell.operator for m in read(file).verdicts.measurements] == ["gram"]
    assert not path_of(KEY).exists()


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(
    device: Device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADMIX_CACHE_DIR", os.devnull)
    monkeypatch.setattr(run, "calibrate", lambda *_, **__: pytest.fail("it was measured"))
    assert cli.main(["calibrate"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"gradmix: error: {path_of(KEY)}: Not a directory\n" and captured.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so there is something to measure")
def test_without_a_gpu_one_sentence_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gradmix: error: there is nothing to measure: the kernels are for GPUs, and ")


@pytest.mark.parametrize("given", ["gpu", "cuda:1"])
def test_a_device_that_is_not_there_is_refused(given: str, device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "--device", given]) == 2
    assert capsys.readouterr().err.startswith("gradmix: error: --device: got ")
