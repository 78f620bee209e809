"""GradMix(cuda_graph="auto"): captures where a device's table says that the graph is right and faster.

The CPU stands in for the device, and a replay calls again (:mod:`calibration_stand_in`, :mod:`graph_stand_in`).
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_stand_in import CPU, KEY, Clock, install, make_table
from graph_stand_in import Recorder, install_graphs
from models import CLASSES, MLP, rows

from gradmix import GradMix, captured_selection, doctor
from gradmix.calibration import lookup
from gradmix.calibration.cells import cells
from gradmix.calibration.measuring import measure
from gradmix.calibration.table import path_of, write
from gradmix.calibration.verdicts import Cell, Measurement, Speedup

SIZES = {"samples": 8, "classes": CLASSES, "features": MLP().fc.in_features}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    install(monkeypatch, tmp_path)
    for name in ("_kept", "_once"):
        monkeypatch.setattr(captured_selection._GRAPHS, name, OrderedDict())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with install_graphs(monkeypatch) as recorder:
        yield recorder
    lookup.forget()


def measured(low: float = 2.0, status: Any = "right", kind: str = "class indices", **sizes: int) -> Measurement:
    cell = Cell("selection", "cuda_graph", kind, "float32", SIZES | sizes)
    return Measurement(cell, status, None, None, 1.0, 2.0, 1.0, Speedup(low, low, low), 11)


def captures(recorder: Recorder, batch: Any = None, **how: Any) -> int:
    """Number of graphs that four steps capture: the decision with its checks, or none."""
    lookup.forget()
    before = recorder.captures
    mixup = GradMix(MLP(), rows(12, 3), refresh="epoch", **how)
    for _ in range(4):
        mixup(*(batch or rows(8, 1)))
    return recorder.captures - before


def test_without_a_table_selections_are_calls(recorder: Recorder) -> None:
    assert captures(recorder) == 0
    assert captures(recorder, cuda_graph=True) == 1
    assert captures(recorder, cuda_graph=False) == 0


@pytest.mark.parametrize(("low", "captured"), [(2.0, 1), (1.05, 1), (1.04, 0), (0.5, 0)])
def test_a_graph_must_be_faster(low: float, captured: int, recorder: Recorder) -> None:
    write(make_table(measured(low)), path_of(KEY))
    assert captures(recorder) == captured
    assert captures(recorder, cuda_graph=False) == 0


def test_and_right_at_every_size(recorder: Recorder) -> None:
    write(make_table(measured(), measured(samples=64)), path_of(KEY))
    assert captures(recorder) == 1
    write(make_table(measured(), measured(samples=64, status="wrong")), path_of(KEY))
    assert captures(recorder) == 0


def test_and_measured_at_the_sizes_and_for_the_kind(recorder: Recorder) -> None:
    write(make_table(measured(), measured(samples=64)), path_of(KEY))
    assert captures(recorder, rows(9, 1)) == 1
    assert captures(recorder, rows(7, 1)) == 0
    vectors = rows(8, 1)[0], torch.softmax(torch.randn(8, CLASSES), 1)
    assert captures(recorder, vectors) == 0
    write(make_table(measured(), measured(kind="label vectors")), path_of(KEY))
    assert captures(recorder, vectors) == 1


def test_a_named_backend_goes_before_the_table(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    write(make_table(measured()), path_of(KEY))
    assert captures(recorder, backend="torch") == 0
    assert captures(recorder, backend="torch", cuda_graph=True) == 1
    monkeypatch.setenv("GRADMIX_BACKEND", "torch")
    assert captures(recorder) == 0


@pytest.mark.parametrize("how", [{"estimator": "mixed"}, {"estimator": "jvp"}, {"criterion": "class"}], ids=str)
def test_what_was_not_measured_is_called(how: dict[str, Any], recorder: Recorder) -> None:
    """Passes of mixed inputs cannot be captured; look-ups in a class table have no features."""
    write(make_table(measured()), path_of(KEY))
    assert captures(recorder, **how) == 0


def test_the_same_pairs_either_way(recorder: Recorder) -> None:
    write(make_table(measured()), path_of(KEY))
    lookup.forget()
    model, buffer = MLP(), rows(12, 3)
    by_table, plain = (
        GradMix(model, buffer, generator=torch.Generator().manual_seed(0), cuda_graph=how) for how in ("auto", False)
    )
    for step in range(5):
        pairs, expected = (mixup.select(*rows(8, step)) for mixup in (by_table, plain))
        assert torch.equal(pairs.partner, expected.partner) and torch.equal(pairs.helpful, expected.helpful)
    assert recorder.replays > 0


# -------------------------------------------------------------------------------------------------------- measurements


CELLS = [cell for cell in cells() if cell.operator == "selection" and not cell.timed]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_graph_that_calls_again_is_right(cell: Cell, recorder: Recorder) -> None:
    found = measure(cell, CPU, Clock())
    assert (found.status, found.reason) == ("right", None)
    assert (recorder.captures, recorder.replays) == (1, 1)


def test_a_graph_that_reads_old_values_is_not(recorder: Recorder) -> None:
    recorder.stale = True
    found = measure(CELLS[0], CPU, Clock())
    assert (found.status, found.reason) == ("wrong", "two calls with the same arguments gave different bits")


def test_the_doctor_names_it() -> None:
    line = next(entry for entry in doctor.report()["operators"] if entry["name"] == "selection")
    assert [body["backend"] for body in line["bodies"]] == ["cuda_graph", "torch"] and line["auto"] == "torch"


def test_another_value_is_refused() -> None:
    with pytest.raises(TypeError, match="cuda_graph: got 'yes', expected True, False or 'auto'"):
        GradMix(MLP(), rows(12, 3), cuda_graph="yes")
