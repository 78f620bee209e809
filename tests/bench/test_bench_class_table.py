"""The benchmark of class tables beside an epoch: it runs, and does what it says. No time is judged."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bench_modules import load

from gradmix.class_table import TABLE_SAMPLES
from gradmix.estimators import feature


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "class_table")


def test_a_run_reports_what_it_measured(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "STEPS", 2)
    options = ["--classes", "4", "20", "--per-class", "90", "--kept", "30", "--repeats", "1"]
    assert bench.main([*options, "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    few, many = result["cases"]
    assert (few["case"]["classes"], few["steps"], few["rounds"]) == (4, 3, 1)
    for found in (few, many):
        assert found["tables_per_epoch"] >= 1 and found["tables_seconds"]["p50"] > 0
        # Three steps of which two are timed: their time without the tables counts one and a half times.
        assert found["gradmix_epoch_seconds"]["p50"] > found["tables_seconds"]["p50"]
        assert set(found["former_tables_share"]) == {"feature", "mixed"}
    assert "before, mixed" in capsys.readouterr().out


def test_samples_of_a_step_have_their_labels(bench: ModuleType) -> None:
    loop = bench.Loop(bench.Case(20, 70, 3, 64, 400), torch.device("cpu"), 0)
    centres = torch.stack([loop.buffer[0][loop.buffer[1] == c].mean(0) for c in range(18)])
    for x, y in loop.steps():
        new = y >= 18
        assert new.sum() == (y >= 18)[: new.sum()].sum() and (~new).sum() == 64
        assert torch.equal(torch.cdist(x[~new], centres).argmin(1), y[~new])
        known = torch.stack([loop.x[: bench.DISTINCT].mean(0), loop.x[bench.DISTINCT :].mean(0)])
        assert torch.equal(torch.cdist(x[new], known).argmin(1) + 18, y[new])


def test_the_former_table_is_of_all_pairs_and_leaves_the_setting(bench: ModuleType) -> None:
    loop = bench.Loop(bench.Case(40, 20, 20, 64, 8), torch.device("cpu"), 0)
    assert set(loop.former_tables()) == {"feature", "mixed"}
    assert vars(feature)["TABLE_SAMPLES"] == TABLE_SAMPLES
