"""Runs whose loss is not finite: all methods end alike, marked as such, and are in no figure."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_runs import make_result
from torch import nn

from gradmix import cli
from gradmix.training.config import DataConfig, OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.loop.divergence import DivergedError, LossWatch
from gradmix.training.loop.evaluation import evaluate
from gradmix.training.loop.run import LOSS_EVERY
from gradmix.training.loop.trainer import train_one
from gradmix.training.methods import METHODS
from gradmix.training.reports import arms as of_arms
from gradmix.training.reports import plots, tables
from gradmix.training.reports.saving import save_run, save_summary
from gradmix.training.runs.experiments import from_yaml
from gradmix.training.runs.results import load_run
from gradmix.training.runs.running import run_all, state_of
from gradmix.training.streams import TaskStream, class_incremental


def stream(shape: tuple[int, ...] = (12,), rows: int = 40, times: float = 1.0) -> TaskStream:
    """Two tasks of two classes, of rows or of images."""
    y = torch.arange(rows) % 4
    x = torch.rand(rows, *shape, generator=torch.Generator().manual_seed(0)) / 2
    x += y.view(-1, *[1] * len(shape)) / 8
    x *= times
    return class_incremental((x, y), (x, y), tasks=2)


def config(lr: float, **optim: Any) -> TrainConfig:
    return TrainConfig(optim=OptimConfig(**{"model": "mlp", "epochs": 1, "batch": 8, "lr": lr} | optim))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_alike(method: str) -> None:
    images = method == "cutmix" or "augment" in method
    if images:
        pytest.importorskip("PIL")
    result = train_one(config(1e18), method, 0, stream=stream((3, 8, 8) if images else (12,)))
    assert result.status == "diverged"
    assert result.timing.steps < 6 and math.isnan(result.accuracy[1, 1])


@pytest.mark.parametrize("changes", [{"data": DataConfig(online=True)}, {"replay": ReplayConfig(stream="shuffled")}])
@pytest.mark.parametrize("method", ["er", "gradmix-class"])
def test_so_do_other_orders_of_steps(method: str, changes: dict[str, Any]) -> None:
    assert train_one(replace(config(1e18), **changes), method, 0, stream=stream()).status == "diverged"


def test_a_last_step_that_nothing_follows() -> None:
    # One step a task: its own loss is finite, and no other step sees the model that it leaves.
    result = train_one(config(3e38, batch=20), "er", 0, stream=stream())
    assert result.status == "diverged" and result.timing.steps == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_without_finite_outputs_has_no_accuracy(value: float) -> None:
    model = nn.Linear(12, 4)
    with torch.no_grad():
        model.bias.fill_(value)
    with pytest.raises(DivergedError, match="outputs for 20 test samples are not finite"):
        evaluate(model, stream(rows=20), torch.device("cpu"))


def test_classes_masked_by_minus_infinity_are_no_divergence() -> None:
    model = nn.Linear(12, 4)
    with torch.no_grad():
        model.bias[2:] = -math.inf
    tasks = stream()
    assert evaluate(model, tasks, torch.device("cpu"))[1] == 0.0


def test_on_a_gpu_a_loss_is_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradmix.training.loop.divergence.can_sync", lambda _: False)
    watch = LossWatch(torch.device("cpu"))
    watch.look()
    watch.note(torch.tensor(math.nan))
    watch.note(torch.tensor(1.0))
    assert watch.has_diverged()
    with pytest.raises(DivergedError):
        watch.look()
    # Within an epoch of more steps than lie between two looks, and within a shorter one.
    for rows, most in ((400, LOSS_EVERY), (40, 3)):
        result = train_one(config(1e18), "er", 0, stream=stream(rows=rows))
        assert result.status == "diverged" and result.timing.steps == most


def test_a_skipped_step_of_a_gradient_scaler_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # A scale beyond float16 makes the first gradients infinite; the scaler skips such steps, and halves it.
    real = torch.amp.GradScaler
    scalers = []

    def scaler(*args: Any, **named: Any) -> Any:
        scalers.append(real("cpu", init_scale=3e38, enabled=True))
        return scalers[-1]

    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    result = train_one(config(0.01), "er", 0, stream=stream(rows=200, times=10.0))
    assert result.status == "complete" and scalers[0].get_scale() < 3e38


# -------------------------------------------------------------------------------------------------- what is made of it


def diverged(method: str, seed: int) -> Any:
    return replace(make_result(method, seed, reached=1, level=0.1), status="diverged")


def test_in_no_mean_interval_difference_or_plot(tmp_path: Path) -> None:
    good = [make_result("er", s) for s in range(4)] + [make_result("mixup", s) for s in range(5)]
    summary = tables.summarise([*good, diverged("er", 4)])
    plain = tables.summarise(good)
    # As text: from Python 3.13 on a NaN makes two rows unequal.
    assert repr((summary.rows, summary.differences)) == repr((plain.rows, plain.differences))
    (note,) = summary.notes
    assert note.startswith("er: 1 of 5 seeds diverged (4)")
    for text in (tables.to_text(summary, 200), tables.to_markdown(summary)):
        assert note in text
    labels = [text.get_text() for text in plots.compare([*good, diverged("er", 4)]).legends[0].get_texts()]
    assert "(4 seeds)" in labels[0] and "(5 seeds)" in labels[1]
    save_summary(good, tmp_path)
    save_summary([diverged("er", 0)], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"summary.json", "summary.md"}, "the picture of others is gone"
    folder = save_run(diverged("er", 4), tmp_path / "run")
    assert load_run(folder).status == "diverged"
    assert not list(folder.glob("*.png"))


SPECIFICATION = """
title: One too fast
seeds: [0, 1]
base: {data: {benchmark: "own_for_diverged:stream"}, optim: {model: mlp, epochs: 1, batch: 8}, threads: 1}
arms: [{name: er, method: er}, {name: fast, method: er, optim: {lr: 1.0e+18}}, {name: mix, method: mixup}]
differences: [[fast, er], [mix, er]]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a stream of its own."""
    (tmp_path / "own_for_diverged.py").write_text(
        "import torch\nfrom gradmix.training.streams import class_incremental\n\ndef stream(_data):\n"
        "    y = torch.arange(40) % 4\n    samples = torch.randn(40, 12) + y[:, None], y\n"
        "    return class_incremental(samples, samples, tasks=2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("GRADMIX_DEBUG", raising=False)
    yield tmp_path
    sys.modules.pop("own_for_diverged", None)


def test_in_an_experiment_the_others_go_on(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("e.yaml").write_text(SPECIFICATION)
    assert cli.main(["experiment", "e.yaml", "--output", "out"]) == 1
    said = capsys.readouterr()
    assert "2 of 6 runs diverged" in said.err and "lower optim.lr" in said.err
    assert "fast: 2 of 2 seeds diverged (0, 1)" in said.out and "are missing" not in said.out
    values = json.loads(Path("out/e/results.json").read_text(encoding="utf-8"))
    assert {run["arm"] for run in values["runs"]} == {"er", "mix"} and len(values["runs"]) == 4
    assert [row["label"] for row in values["summary"]["rows"]] == ["er", "mix"]
    assert [d["label"] for d in values["summary"]["differences"]] == ["mix − er"]
    for name in ("report.md", "report.html"):
        text = Path("out/e", name).read_text(encoding="utf-8")
        assert "fast: 2 of 2 seeds diverged (0, 1)" in text and "2 of 6 runs diverged" in text
    assert of_arms.from_results("out/e/results.json")["missing"] == values["missing"]
    runs = from_yaml(SPECIFICATION, "e").runs()
    folder = Path("out/runs")
    assert [state_of(run, folder) for run in runs].count("diverged") == 2
    assert not list(folder.rglob("*.pt"))
    # They are not made again, unless their folder is removed, as the message says.
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("metrics.json")}
    assert cli.main(["experiment", "e.yaml", "--output", "out"]) == 1
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("metrics.json")} == before
    assert cli.main(["experiment", "e.yaml", "--output", "out", "--report-only"]) == 1
    word = said.err.split("such as ")[1].split()[0]
    shutil.rmtree(word)
    assert run_all(runs, folder).failed == [] and (Path(word) / "metrics.json").is_file()


def test_train_says_so_and_a_lower_rate_helps(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--benchmark", "own_for_diverged:stream", "--model", "mlp", "--epochs", "1", "--batch", "8")
    methods = ("--methods", "er", "gradmix-sample", "--seeds", "0")
    assert cli.main(["train", *flags, *methods, "--lr", "1e18", "--output", "out"]) == 1
    said = capsys.readouterr()
    assert "2 of 2 runs diverged (er, seed 0; gradmix-sample, seed 0)" in said.err and "lower --lr" in said.err
    assert "No run is complete" in said.out
    assert load_run("out/er/seed-0").status == load_run("out/gradmix-sample/seed-0").status == "diverged"
    assert not Path("out/.checkpoints").exists(), "they would diverge again"
    assert cli.main(["train", "--resume", "out"]) == 1
    said = capsys.readouterr()
    assert "all 2 runs of out have ended" in said.out and "2 of 2 runs diverged" in said.err
    assert cli.main(["compare", "out"]) == 0
    assert "1 of 1 seeds diverged (0)" in capsys.readouterr().out
    assert cli.main(["train", *flags, *methods, "--lr", "0.01", "--output", "slower"]) == 0
