"""``gradmix experiment``: what is run, what is written, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_pictures import draw_small_pictures
from synthetic_runs import make_result

from gradmix import cli
from gradmix.cli.experiment import _watcher
from gradmix.cli.progress import Reporter, figures
from gradmix.training.loop import trainer
from gradmix.training.reports.cells import with_sign
from gradmix.training.reports.saving import save_run
from gradmix.training.runs import experiments
from gradmix.training.runs.results import RunResult

TEXT = """
title: Mine
seeds: [0, 1]
base: {data: {benchmark: split-digits}, optim: {epochs: 1}, threads: 1}
arms: [{name: er, method: er}, {name: best, method: mixup}]
differences: [[best, er]]
"""


@pytest.fixture(autouse=True)
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Replaces training by made-up results of three steps, in a folder with a specification; returns the calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADMIX_DEBUG", raising=False)
    draw_small_pictures(monkeypatch)
    Path("mine.yaml").write_text(TEXT)
    calls: list[Any] = []

    def train_one(config: Any, method: Any, seed: int, *, on_step: Callable[..., None], **_: Any) -> RunResult:
        calls.append(config)
        try:
            for step in (1, 2, 3):
                on_step(trainer.Progress(method, seed, 1, 1, 1, 1, step, 3, None))
        except KeyboardInterrupt:
            return replace(make_result(method, seed, reached=0), config=config)
        return replace(make_result(method, seed, level=0.8 + 0.1 * (method == "mixup")), config=config)

    monkeypatch.setattr(trainer, "train_one", train_one)
    return calls


def run(*args: str) -> int:
    return cli.main(["experiment", *args])


def asked(calls: list[Any]) -> list[tuple[str, int]]:
    return [(config.methods[0], config.seeds[0]) for config in calls]


ALL = [("er", 0), ("mixup", 0), ("er", 1), ("mixup", 1)]


def test_an_experiment_from_start_to_report(trained: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("mine.yaml") == 0
    assert asked(trained) == ALL
    said = capsys.readouterr().out
    assert "Mine: 4 runs, 0 of them complete" in said and "[4/4] best  seed 1  average accuracy 0." in said
    assert said.splitlines()[-1] == "Report: runs/experiments/mine/report.html"
    folder = Path("runs/experiments/mine")
    assert "gradmix experiment mine.yaml" in (folder / "report.md").read_text(encoding="utf-8")
    stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert len(stored["runs"]) == 4 and stored["missing"] == []
    assert run("mine.yaml") == 0
    assert len(trained) == 4, "nothing is run twice"
    Path("other.yaml").write_text(TEXT.replace("[0, 1]", "[1, 2]").replace("Mine", "Other"))
    assert run("other.yaml") == 0
    assert asked(trained)[4:] == [("er", 2), ("mixup", 2)], "what another experiment has run is shared"


def test_narrowed_elsewhere_and_with_other_circumstances(trained: list[Any]) -> None:
    more = ("--arms", "best", "--output", "my out", "--data-dir", "d", "--device", "cpu")
    assert run("mine.yaml", "--seeds", "7", *more) == 0
    (config,) = trained
    assert asked(trained) == [("mixup", 7)]
    assert (config.data.data_dir, config.device, config.threads) == (Path("d"), "cpu", 1)
    text = Path("my out/mine/seeds-7-arms-best/report.md").read_text(encoding="utf-8")
    assert "gradmix experiment mine.yaml --seeds 7 --arms best\n" in text


@pytest.mark.parametrize(
    ("narrowed", "part", "missing"),
    [
        (("--seeds", "1"), "seeds-1", 0),
        (("--arms", "best"), "arms-best", 0),
        (("--seeds", "0", "1", "2"), "seeds-0-1-2", 2),
        (("--seeds", "1", "0", "--arms", "best", "er"), "", 0),
    ],
    ids=["fewer seeds", "fewer arms", "more seeds", "all, said otherwise"],
)
def test_a_narrowed_report_leaves_the_whole_one_alone(
    narrowed: tuple[str, ...], part: str, missing: int, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("mine.yaml") == 0
    whole = Path("runs/experiments/mine")
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    assert run("mine.yaml", "--report-only", *narrowed) == (1 if missing else 0)
    assert run("mine.yaml", *narrowed) == 0
    assert len(trained) == 4 + missing, "the runs are shared"
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {(whole / part / 'report.html').as_posix()}"
    stored = json.loads((whole / part / "results.json").read_text(encoding="utf-8"))
    assert " ".join(narrowed) in stored["command"] and len(stored["runs"]) == len(stored["arms"]) * len(stored["seeds"])
    after = {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()}
    assert after.keys() == before.keys() and (not part or after == before)
    # Without the runs each is made again from its own figures.
    Path("runs/experiments/runs").rename("gone")
    kept = (whole / part / "report.md").read_bytes()
    (whole / part / "report.md").unlink()
    assert run("mine.yaml", "--report-only", *narrowed) == 0
    assert (whole / part / "report.md").read_bytes() == kept


def test_a_dry_run_changes_nothing(trained: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("mine.yaml", "--dry-run") == 0
    assert trained == [] and [p.name for p in Path().iterdir()] == ["mine.yaml"]
    assert "4 runs: 0 complete, 0 unfinished, 4 absent" in capsys.readouterr().out
    assert run("mine.yaml", "--seeds", "0") == 0
    capsys.readouterr()
    assert run("mine.yaml", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "4 runs: 2 complete, 0 unfinished, 2 absent"
    assert [line.split()[3] for line in lines[:-1]] == ["complete", "complete", "absent", "absent"]


def test_a_failing_run_ends_with_1(
    trained: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = trainer.train_one

    def fails(config: Any, method: Any, seed: int, **others: Any) -> RunResult:
        if (method, seed) == ("mixup", 0):
            raise RuntimeError("out of memory")
        return good(config, method, seed, **others)

    monkeypatch.setattr(trainer, "train_one", fails)
    assert run("mine.yaml", "--output", "out") == 1
    said = capsys.readouterr()
    assert "best  seed 0  failed: RuntimeError: out of memory" in said.out and "1 of 4 runs are missing" in said.out
    assert "1 of 4 runs failed; try them again with: gradmix experiment mine.yaml --output out" in said.err
    assert "best, seed 0: failed: RuntimeError: out of memory" in Path("out/mine/report.md").read_text(encoding="utf-8")
    monkeypatch.setattr(trainer, "train_one", good)
    assert run("mine.yaml", "--output", "out") == 0
    assert "failed" not in Path("out/mine/report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted(
    number: int,
    status: int,
    trained: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = trainer.train_one

    def stopped(config: Any, method: Any, seed: int, **others: Any) -> RunResult:
        if (method, seed) == ("er", 1):
            os.kill(os.getpid(), number)
        return good(config, method, seed, **others)

    monkeypatch.setattr(trainer, "train_one", stopped)
    assert run("mine.yaml") == status
    assert "interrupted; go on with: gradmix experiment mine.yaml\n" in capsys.readouterr().err
    assert "2 of 4 runs are missing" in Path("runs/experiments/mine/report.md").read_text(encoding="utf-8")
    monkeypatch.setattr(trainer, "train_one", good)
    assert run("mine.yaml") == 0
    assert asked(trained) == [*ALL[:3], *ALL[2:]], "only what was not complete"


def test_going_on_takes_all_that_was_given(
    trained: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any, **__: Any) -> RunResult:
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("too late")

    monkeypatch.setattr(trainer, "train_one", stopped)
    given = ("mine.yaml", "--seeds", "3", "--arms", "er", "--output", "my out", "--data-dir", "d", "--device", "cpu")
    assert run(*given) == 130
    expected = "gradmix experiment mine.yaml --seeds 3 --arms er --output 'my out' --data-dir d --device cpu"
    assert f"go on with: {expected}\n" in capsys.readouterr().err


def test_differences_are_printed(trained: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("mine.yaml") == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("best − er")]
    stored = json.loads(Path("runs/experiments/mine/results.json").read_text(encoding="utf-8"))
    (difference,) = stored["summary"]["differences"]
    interval = difference["metrics"]["average_accuracy"]
    assert f"{with_sign(interval['mean'])} ± {interval['half_width']:.3f}" in line and line.endswith(" 2")
    assert f"{difference['p_holm']:.3f}" in line
    assert (" * " in line) == (abs(interval["mean"]) > interval["half_width"])


@pytest.mark.parametrize(
    ("jobs", "shown"), [(2, ["0 of 3 runs, 2 at a time", "2 of 3 runs, 1 at a time"]), (1, ["", ""])]
)
def test_the_bar_counts_the_runs_of_other_processes(
    jobs: int, shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.setattr(Console, "is_terminal", True)
    runs = experiments.load("mine.yaml").runs()
    reporter = Reporter(3, 4)
    assert reporter.bar is not None
    watcher = _watcher(reporter, runs[:3], jobs)
    found = [reporter.bar.tasks[0].description]
    watcher.finish(runs[0], make_result("er", 0))
    watcher.fail(runs[1], "out of memory")
    found.append(reporter.bar.tasks[0].description)
    assert found == shown
    assert "[2/3] best  seed 0  failed: out of memory" in capsys.readouterr().out


def test_a_long_name_leaves_every_line_whole_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "gradmix-sample with the gradient of the whole buffer"
    text = f"title: T\nseeds: [0, 1]\narms: [{{name: {name}, method: gradmix-sample}}, {{name: er, method: er}}]\n"
    Path("long.yaml").write_text(f"{text}differences: [[{name}, er]]\n", encoding="utf-8")
    made = experiments.load("long.yaml")
    for one in made.runs():
        result = replace(make_result(one.method, one.seed), config=one.config)
        save_run(result, Path("out/runs") / one.folder, pictures=False)
    assert run("long.yaml", "--report-only", "--output", "out") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    # Three lines for the name beside the figures, and two for the difference.
    assert (
        "gradmix-sample with the   0." in out
        and "\ngradient of the whole\nbuffer\n" in out
        and "\nbuffer − er\n" in out
    )


def test_what_is_too_long_for_a_terminal_stands_on_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.setenv("COLUMNS", "40")
    line, more = "[1/2] gradmix-sample  seed 0", "average accuracy 0.9"
    Reporter(1, 4).say(line, more)
    assert capsys.readouterr().out == f"{line}  {more}\n", "a file has no width"
    monkeypatch.setattr(Console, "is_terminal", True)
    reporter = Reporter(1, 4)
    reporter.say(line, more)
    reporter.say("[1/2] er", more)
    assert capsys.readouterr().out == f"{line}\n    {more}\n[1/2] er  {more}\n"


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("label", ["er", "gradmix-sample with the gradient of the whole buffer"])
def test_the_figures_of_a_run_fit_a_terminal(
    label: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both of ``gradmix train`` and of ``gradmix experiment``."""
    from rich.console import Console

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(Console, "is_terminal", True)
    run, result = replace(experiments.load("mine.yaml").runs()[0], arm=label), make_result("er", 0)
    reporter = Reporter(1, len(label))
    reporter.start(label, 0)
    reporter.finish(result)
    _watcher(reporter, [run], 1).finish(run, result)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    words = f"{label} seed 0 {figures(result)}".split()
    assert out.split() == [*words, "[1/1]", *words], "nothing is lost"


def test_a_log_has_a_line_now_and_then_of_a_long_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("gradmix.cli.experiment.time.monotonic", lambda: now)
    first, *_ = runs = experiments.load("mine.yaml").runs()
    watcher = _watcher(Reporter(4, 4), runs, 1)
    watcher.start(first)
    # From step 100 on, as after a checkpoint: two steps a second, and a line every ten minutes.
    for step in range(100, 5000):
        watcher.step(trainer.Progress("er", 0, 1 + step // 2000, 5, 1, 1, step, 10_000, None))
        now += 0.5
    assert capsys.readouterr().out.splitlines() == [
        "[0/4] er    seed 0  task 1 of 5, 13 % done  (72 min of this run to go)",
        "[0/4] er    seed 0  task 2 of 5, 25 % done  (62 min of this run to go)",
        "[0/4] er    seed 0  task 2 of 5, 37 % done  (52 min of this run to go)",
        "[0/4] er    seed 0  task 3 of 5, 49 % done  (42 min of this run to go)",
    ]


@pytest.mark.parametrize(("jobs", "minutes"), [(1, [6, 9, 7]), (2, [3, 4, 7])])
def test_the_time_to_go_is_that_of_the_arms_to_come(
    jobs: int, minutes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Arms take 2 and 7 minutes; of the second one nothing is known before its first run has ended."""
    runs = experiments.load("mine.yaml").runs()
    short, long = ([run for run in runs if run.label == label] for label in dict.fromkeys(run.label for run in runs))
    watcher = _watcher(Reporter(4, 4), runs, jobs)
    ends = (short[0], 120), (long[0], 420), (short[1], 120)
    for run, seconds in ends:
        result = make_result("er", 0)
        watcher.finish(run, replace(result, timing=replace(result.timing, seconds_total=float(seconds))))
    watcher.finish(long[1], make_result("er", 0))
    out = capsys.readouterr().out.splitlines()
    assert [re.findall(r"\((\d+) min to go\)", line) for line in out] == [*([str(m)] for m in minutes), []]


def test_the_report_alone(trained: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("mine.yaml", "--report-only") == 1
    assert "4 of 4 runs are missing" in capsys.readouterr().out and trained == []
    assert run("mine.yaml") == 0
    folder = Path("runs/experiments/mine")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / "report.md").unlink()
    assert run("mine.yaml", "--report-only") == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert run(str(folder / "results.json"), "--report-only", "--output", "again") == 0
    assert {p.name: p.read_bytes() for p in Path("again").iterdir()} == before
    Path("runs/experiments/runs").rename("gone")
    (folder / "report.html").unlink()
    assert run("mine.yaml", "--report-only") == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before, "the JSON is enough"
    assert len(trained) == 4


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("digits ") and "to try out" in line for line in lines)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["no name", "--list"]),
        (["nothing"], ["nothing", "digits"]),
        (["nothing.yaml"], ["nothing.yaml"]),
        (["bad.yaml"], ["bad.yaml: arms[0].method", "'erx'", "finetune, er"]),
        (["mine.yaml", "--arms", "ER"], ["arms", "'ER'", "'er', 'best'"]),
        (["mine.yaml", "--seeds", "1", "1"], ["seeds", "twice"]),
        (["mine.yaml", "--jobs", "0"], ["jobs", "0"]),
        (["mnist.yaml", "--data-dir", "nowhere"], ["nowhere"]),
        (["mine.yaml", "--device", "cuda:99"], ["device", "cuda:99"]),
        (["bad.json"], ["bad.json", "--report-only"]),
        (["bad.json", "--report-only"], ["bad.json", "damaged"]),
        (["bad.json", "--report-only", "--seeds", "1"], ["--seeds"]),
    ],
    ids=" ".join,
)
def test_errors_take_one_line(
    args: list[str], parts: list[str], trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.yaml").write_text(TEXT.replace("method: er", "method: erx"))
    Path("mnist.yaml").write_text(TEXT.replace("split-digits", "split-mnist"))
    Path("bad.json").write_text("{")
    before = {p.name for p in Path().iterdir()}
    assert run(*args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gradmix: error: ")
    for part in parts:
        assert part in line
    assert trained == [] and {p.name for p in Path().iterdir()} == before, "nothing is written"


def test_a_package_that_an_arm_needs_is_missed_before_anything_is_run(
    trained: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)  # as if it were not installed
    Path("mine.yaml").write_text(TEXT.replace("method: mixup", "method: trivialaugment-mixup"))
    assert run("mine.yaml", "--output", "out") == 2
    assert "pip install 'gradmix[policies]'" in capsys.readouterr().err
    assert trained == [] and not Path("out").exists()
