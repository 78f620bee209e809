"""Run folders: what is written comes back, whole or not at all; and the tables over them."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import make_result

from gradmix.training.config import MixConfig, TrainConfig, load_config
from gradmix.training.reports import tables
from gradmix.training.reports.saving import save_run, save_summary
from gradmix.training.runs import results
from gradmix.training.runs.results import (
    AlignmentRecord,
    NoRunError,
    RunResult,
    SteadySteps,
    Timing,
    load_run,
    load_runs,
    metric_values,
    refuse_occupied,
    save_config,
    task_names,
    tasks_reached,
    to_json,
)

CASES: dict[str, Any] = {
    "gradmix-class": {},
    "no alignments": {"method": "er"},
    "interrupted": {"reached": 2},
    "interrupted at once": {"reached": 0, "steps": 0},
    "one task": {"tasks": 1},
    "awkward names": {"tasks": 1, "class_names": ("a,b", 'Zoë "q"')},
}


def assert_same(a: RunResult, b: RunResult) -> None:
    for name in ("benchmark", "method", "seed", "status", "class_names", "task_classes", "timing", "environment"):
        assert repr(getattr(a, name)) == repr(getattr(b, name)), name  # from Python 3.13 on a NaN makes them unequal
    np.testing.assert_array_equal(a.accuracy, b.accuracy)
    np.testing.assert_array_equal(a.mixed_share, b.mixed_share)
    assert len(a.alignments) == len(b.alignments)
    for x, y in zip(a.alignments, b.alignments, strict=True):
        assert (x.task, x.threshold) == (y.task, y.threshold)
        for name in ("classes", "cosine", "helpful"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))
            assert getattr(x, name).dtype == getattr(y, name).dtype


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_saved_run_comes_back(case: dict[str, Any], tmp_path: Path) -> None:
    result = make_result(**case)
    folder = save_run(result, tmp_path / "deep" / "run")
    back = load_run(folder)
    assert_same(back, result)
    assert back.config == result.config
    pictures = {"curve.png", "heatmap.png"} | ({"alignment.png"} if result.alignments else set())
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "metrics.json", "accuracy_matrix.csv"} | pictures
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


def test_files_hold_what_they_should(tmp_path: Path) -> None:
    result = make_result(reached=2)
    folder = save_run(result, tmp_path / "run")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    saved = json.loads((folder / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert saved["accuracy"][2] == [None, None, None]
    assert saved["status"] == "interrupted" and saved["tasks_reached"] == 2
    assert saved["timing"]["step_ms"] == pytest.approx(2.0)
    assert saved["timing"]["mean_step_ms"] == pytest.approx(2.5)
    assert saved["timing"]["selection_share"] == pytest.approx(0.4)
    for name, value in metric_values(result).items():
        entry = saved["metrics"][name]
        assert "R[" in entry["formula"] and entry["name"]
        assert entry["value"] == (None if math.isnan(value) else value)
    with (folder / "accuracy_matrix.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["accuracy after", *(f"on {name}" for name in task_names(result))]
    assert float(rows[1][1]) == result.accuracy[0, 0] and rows[3][1:] == ["", "", ""]
    for name in ("curve.png", "heatmap.png", "alignment.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_saved_config_runs_again_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    result = make_result()
    result = replace(result, config=replace(result.config, output=tmp_path / "run"))
    config = load_config(save_run(result, tmp_path / "run") / "config.yaml")
    assert config.output is None
    assert config.data.data_dir == tmp_path / "data"
    assert (config.methods, config.seeds) == (("gradmix-class",), (0,))


@pytest.mark.parametrize("kind", ["folder with a file", "file"])
def test_taken_folder_is_refused_and_untouched(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "run"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"output: .*run"):
        save_run(make_result(), target)
    assert (target if kind == "file" else target / "notes").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    assert refuse_occupied(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    save_run(make_result("er"), tmp_path / "empty")
    assert load_run(tmp_path / "empty").method == "er"


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "_accuracy_csv", fail)
    with pytest.raises(KeyboardInterrupt):
        save_run(make_result(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("metrics.json", "{", r"metrics\.json: damaged"),
        ("metrics.json", "[]", r"metrics\.json: damaged"),
        ("metrics.json", "{}", r"metrics\.json: damaged.*missing"),
        ("config.yaml", "mix: 3", r"config\.yaml: mix"),
    ],
)
def test_damaged_run_is_refused_by_file(name: str, text: str, expected: str, tmp_path: Path) -> None:
    folder = save_run(make_result("er"), tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=expected):
        load_run(folder)


def test_wrong_shapes_in_a_file_are_refused(tmp_path: Path) -> None:
    folder = save_run(make_result("er"), tmp_path / "run")
    saved = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    saved["accuracy"] = saved["accuracy"][:2]
    (folder / "metrics.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"metrics\.json: damaged.*accuracy"):
        load_run(folder)


def test_missing_runs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such"):
        load_runs(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no finished run in it, expected config\.yaml, metrics\.json"):
        load_runs(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"metrics\.json is missing"):
        save_config(TrainConfig(), tmp_path)
        load_run(tmp_path)
    with pytest.raises(NoRunError, match=rf"go on with its runs: gradmix train --resume {tmp_path}$"):
        load_runs(tmp_path)
    with pytest.raises(NoRunError, match=r"config\.yaml: is a file, expected a run folder"):
        load_runs(tmp_path / "config.yaml")


def test_runs_below_a_folder_in_order(tmp_path: Path) -> None:
    for method, seed in (("gradmix-class", 10), ("gradmix-class", 2), ("er", 1)):
        save_run(make_result(method, seed), tmp_path / method / f"seed-{seed}")
    unfinished = tmp_path / "er" / ".seed-3-x"
    unfinished.mkdir()
    (unfinished / "metrics.json").write_text("{")
    assert [(r.method, r.seed) for r in load_runs(tmp_path).values()] == [
        ("er", 1),
        ("gradmix-class", 2),
        ("gradmix-class", 10),
    ]
    assert list(load_runs(tmp_path / "er" / "seed-1")) == [tmp_path / "er" / "seed-1"]


def test_summary_files(tmp_path: Path) -> None:
    results = [make_result(m, s) for m in ("er", "gradmix-class") for s in (0, 1)]
    for _ in range(2):
        save_summary(results, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"summary.json", "summary.md", "compare.png"}
    saved = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert [row["label"] for row in saved["rows"]] == ["er", "gradmix-class"]
    assert "| gradmix-class |" in (tmp_path / "summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": float("nan"), "b": [1, float("inf")]}, '{\n  "a": null,\n  "b": [1, null]\n}\n'),
        ({"m": np.array([[1.5, np.nan]])}, '{\n  "m": [\n    [1.5, null]\n  ]\n}\n'),
        ({"t": (np.True_, np.int64(3), "ü", None)}, '{\n  "t": [true, 3, "ü", null]\n}\n'),
        ({}, "{}\n"),
    ],
)
def test_json(value: Any, text: str) -> None:
    assert to_json(value) == text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"accuracy": np.zeros((2, 3))}, "accuracy: expected shape"),
        ({"status": "done"}, "status: got 'done', expected"),
        ({"mixed_share": (0.5,)}, "mixed_share: expected one value"),
    ],
)
def test_result_refuses_wrong_shapes(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        replace(make_result(), **changes)


@pytest.mark.parametrize(
    ("classes", "cosine", "helpful", "name"),
    [
        ((2, 2), (2, 2), (2, 2), "classes"),
        ((3,), (2, 2), (3, 3), "cosine"),
        ((3,), (3, 3), (3,), "helpful"),
    ],
)
def test_alignment_refuses_wrong_shapes(classes: Any, cosine: Any, helpful: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        AlignmentRecord(0, np.zeros(classes, int), np.zeros(cosine), np.zeros(helpful, bool))


def test_timing_without_a_step() -> None:
    timing = Timing(0, 1.0, 0.0, 0.0, 0.0)
    assert math.isnan(timing.step_ms) and math.isnan(timing.selection_share)


def test_the_warm_up_enters_no_figure_of_a_step() -> None:
    steady = SteadySteps(4, 0.002, 0.010, 0.004, 0.001)
    timing = Timing(5, 9.0, 5.010, 3.004, 0.5, 1.001, steady=steady)
    assert (timing.step_ms, timing.mean_step_ms) == pytest.approx((2.0, 2.5))
    shares = (timing.selection_share, timing.data_share, timing.forward_backward_share)
    assert shares == pytest.approx((0.4, 0.1, 0.5))


def test_selection_made_in_the_warm_up_alone_is_not_called_free() -> None:
    timing = Timing(3, 9.0, 5.0, 1.0, 0.5, 0.0, steady=SteadySteps(2, 0.002, 0.004))
    assert timing.selection_share == pytest.approx(0.2)


def test_a_run_of_a_version_that_timed_no_single_step_is_read(tmp_path: Path) -> None:
    folder = save_run(make_result("gradmix-class", 0), tmp_path / "run", pictures=False)
    file = folder / "metrics.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    del saved["timing"]["steady"]
    saved["timing"]["seconds_step"], saved["timing"]["seconds_selection"] = 0.7, 0.35
    file.write_text(json.dumps(saved), encoding="utf-8")
    back = load_run(folder)
    assert (back.timing.step_ms, back.timing.selection_share) == pytest.approx((7.0, 0.5))
    assert "not timed in 1 of the runs" in tables.to_text(tables.summarise([back]))
    assert "not timed" not in tables.to_text(tables.summarise([make_result("er", 0)]))


@pytest.mark.parametrize(("reached", "expected"), [(None, 3), (2, 2), (0, 0)])
def test_tasks_reached(reached: int | None, expected: int) -> None:
    assert tasks_reached(make_result(reached=reached)) == expected


def test_task_names_stay_short() -> None:
    result = make_result(tasks=2, per_task=10)
    assert task_names(result)[1] == "task 2 (digit 10 … digit 19)"
    assert task_names(make_result(tasks=1))[0] == "task 1 (digit 0, digit 1)"


# -------------------------------------------------------------------------------------------------------------- tables


def test_rows_are_means_over_seeds() -> None:
    results = [make_result("er", s) for s in range(3)] + [make_result("gradmix-class", s, level=0.95) for s in range(3)]
    summary = tables.summarise(results)
    assert [(r.label, r.seeds) for r in summary.rows] == [("er", (0, 1, 2)), ("gradmix-class", (0, 1, 2))]
    values = np.array([metric_values(r)["final_accuracy"] for r in results[:3]])
    interval = summary.rows[0].metrics["final_accuracy"]
    assert interval.mean == pytest.approx(values.mean())
    assert interval.std == pytest.approx(values.std(ddof=1))
    # 4.302653: the 97.5 % quantile of Student's t with two degrees of freedom.
    assert interval.half_width == pytest.approx(4.302653 * values.std(ddof=1) / math.sqrt(3), rel=1e-6)
    assert summary.rows[1].step_ms == pytest.approx(2.0)
    assert summary.rows[1].selection_share == pytest.approx(0.4)


def test_differences_are_paired_on_shared_seeds() -> None:
    er = [make_result("er", s) for s in (0, 1, 2)]
    mine = [make_result("gradmix-class", s, level=0.95) for s in (1, 2, 5)]
    (difference,) = tables.summarise(er + mine).differences
    assert (difference.arm, difference.minus, difference.seeds) == ("gradmix-class", "er", (1, 2))
    expected = [
        metric_values(a)["average_accuracy"] - metric_values(b)["average_accuracy"]
        for a, b in zip(mine[:2], er[1:], strict=True)
    ]
    assert difference.metrics["average_accuracy"].mean == pytest.approx(np.mean(expected))


def test_no_shared_seed_no_difference() -> None:
    assert tables.summarise([make_result("er", 0), make_result("mixup", 1)]).differences == ()


def test_interrupted_runs_enter_no_mean() -> None:
    summary = tables.summarise([make_result("er", 0), make_result("er", 1, reached=1, level=0.1)])
    assert summary.rows[0].seeds == (0,)
    assert "er, seed 1: interrupted after 1 of 3 tasks" in summary.notes[0]
    alone = tables.summarise([make_result("er", 1, reached=0, steps=0)])
    assert alone.rows == () and "No run is complete" in tables.to_text(alone)
    assert "interrupted after 0 of 3 tasks" in tables.to_markdown(alone)


def test_different_settings_get_rows_of_their_own() -> None:
    other = TrainConfig(mix=MixConfig(alpha=0.2, threshold=0.1))
    same = make_result("gradmix-class", 0).config
    results = [
        make_result("gradmix-class", 0),
        make_result("gradmix-class", 1),
        make_result("gradmix-class", 0, config=other),
    ]
    results.append(replace(make_result("er", 0), config=replace(same, methods=("er",))))
    labels = [row.label for row in tables.summarise(results).rows]
    assert labels == [
        "gradmix-class optim.lr=0.05 mix.alpha=1.0 mix.threshold=0.0",
        "gradmix-class optim.lr=None mix.alpha=0.2 mix.threshold=0.1",
        "er",
    ]


@pytest.mark.parametrize(
    "changes",
    [{"checkpoint": 0.0}, {"device": "cuda:0"}, {"threads": 3}, {"output": Path("x")}],
    ids=["checkpoints", "device", "threads", "folder"],
)
def test_circumstances_make_no_row_of_their_own(changes: dict[str, Any]) -> None:
    here, there = make_result("er", 0), make_result("er", 1)
    (row,) = tables.summarise([here, replace(there, config=replace(there.config, **changes))]).rows
    assert (row.label, row.seeds) == ("er", (0, 1))


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([], "no run"),
        ([make_result(), make_result(benchmark="split-mnist")], "different benchmarks.*split-digits, split-mnist"),
        ([make_result(), make_result()], "gradmix-class with seed 0 is there twice"),
    ],
    ids=["nothing", "two benchmarks", "the same twice"],
)
def test_what_cannot_be_compared_is_refused(results: list[RunResult], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        tables.summarise(results)


def test_text_fits_80_columns_and_names_formulae() -> None:
    methods = ("finetune", "er", "mixup", "gradmix-class", "gradmix-sample")
    results = [make_result(m, s, level=0.8 + 0.02 * i) for i, m in enumerate(methods) for s in (0, 1)]
    text = tables.to_text(tables.summarise(results))
    assert max(map(len, text.splitlines())) <= 80
    for part in ("split-digits", "mean over t of", "gradmix-sample", "ms/step:", "40.0 %", "Paired differences"):
        assert part in text
    assert text.count("95 %: ±") == 15


def test_many_rows_show_differences_to_the_first() -> None:
    configs = [TrainConfig(mix=MixConfig(alpha=0.1 * k)) for k in range(1, 9)]
    summary = tables.summarise([make_result("mixup", 0, config=c) for c in configs])
    assert {d.minus for d in summary.differences} == {summary.rows[0].label} and len(summary.differences) == 7
    assert "only the differences to the first" in summary.notes[0]


def test_markdown_columns_agree() -> None:
    text = tables.to_markdown(tables.summarise([make_result("er", s) for s in (0, 1)] + [make_result("mixup", 0)]))
    for block in (b for b in text.split("\n\n") if b.startswith("|")):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_star_marks_intervals_without_zero() -> None:
    low = [make_result("er", s, level=0.5) for s in range(3)]
    high = [make_result("mixup", s, level=0.9) for s in range(3)]
    rows = [line for line in tables.to_markdown(tables.summarise(low + high)).splitlines() if "mixup - er" in line]
    assert r" \*" in rows[0].split("|")[2]
    assert "*" not in rows[0].split("|")[4], "forgetting is alike in both"
