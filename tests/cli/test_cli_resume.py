"""``gradmix train --resume``, and the ways in which a run is left: Ctrl-C, SIGTERM, twice, by an error, by SIGKILL."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_pictures import draw_small_pictures

from gradmix import cli
from gradmix.training.config import load_config
from gradmix.training.loop import trainer
from gradmix.training.runs.results import RunResult, load_run, load_runs

FEW = ("--epochs", "1", "--tasks", "2", "--samples-per-class", "40", "--threads", "1")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("GRADMIX_DEBUG", raising=False)
    draw_small_pictures(monkeypatch)
    return tmp_path


def run(*args: str) -> int:
    return cli.main(list(args))


def start(output: str, *more: str, seeds: tuple[str, ...] = ("0", "1")) -> int:
    return run("train", "--methods", "gradmix-sample", "--seeds", *seeds, *FEW, *more, "--output", output)


def at_step(monkeypatch: pytest.MonkeyPatch, seed: int, step: int, action: Callable[[], Any]) -> list[int]:
    """Lets ``action`` happen within a step of the run of that seed, once; returns the steps taken, of all runs."""
    real, steps = trainer.train_one, []
    happened: list[bool] = []

    def train_one(config: Any, method: Any, of_seed: int, *, on_step: Any, **others: Any) -> RunResult:
        def counted(progress: trainer.Progress) -> None:
            steps.append(progress.step)
            if of_seed == seed and progress.step == step and not happened:
                happened.append(True)
                action()
            on_step(progress)

        return real(config, method, of_seed, on_step=counted, **others)

    monkeypatch.setattr(trainer, "train_one", train_one)
    return steps


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_and_resumed_is_as_never_interrupted(
    number: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("whole") == 0
    whole = load_runs("whole")
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    steps = at_step(monkeypatch, 1, 7, kill(number))
    assert start("out") == status
    said = capsys.readouterr()
    assert "go on with: gradmix train --resume out" in said.err and "stopping after this step" in said.err
    assert "Run folder: out" in said.out
    assert {n: signal.getsignal(n) for n in before} == before
    assert {r.seed: r.status for r in load_runs("out").values()} == {0: "complete", 1: "interrupted"}
    assert [p.name for p in Path("out/.checkpoints").iterdir()] == ["gradmix-sample-seed-1.pt"]
    del steps[:]
    assert run("train", "--resume", "out") == 0
    assert steps[0] == 8, "it goes on where it stopped"
    resumed = load_runs("out")
    assert [r.status for r in resumed.values()] == ["complete", "complete"]
    for a, b in zip(whole.values(), resumed.values(), strict=True):
        assert (a.accuracy == b.accuracy).all() and a.mixed_share[1] == b.mixed_share[1]
        assert a.timing.steps == b.timing.steps
    assert not Path("out/.checkpoints").exists() and Path("out/compare.png").is_file()
    assert sorted(p.name for p in Path("out/gradmix-sample").iterdir()) == ["seed-0", "seed-1"]
    del steps[:]
    capsys.readouterr()
    assert run("train", "--resume", "out") == 0
    assert steps == [] and "Nothing is left to do: all 2 runs of out are complete" in capsys.readouterr().out


def test_a_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def twice() -> None:
        kill(signal.SIGINT)()
        kill(signal.SIGINT)()

    steps = at_step(monkeypatch, 0, 3, twice)
    assert start("out") == 130
    assert steps == [1, 2, 3] and "stopped at once" in capsys.readouterr().err
    assert not Path("out/gradmix-sample").exists() and not Path("out/summary.json").exists()
    assert run("train", "--resume", "out") == 0
    assert [r.status for r in load_runs("out").values()] == ["complete", "complete"]


def test_without_checkpoints_a_run_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = at_step(monkeypatch, 0, 3, kill(signal.SIGINT))
    assert start("out", "--checkpoint", "0", seeds=("0",)) == 130
    assert not Path("out/.checkpoints").exists()
    del steps[:]
    assert run("train", "--resume=out") == 0
    assert steps[0] == 1
    assert load_run("out/gradmix-sample/seed-0").status == "complete"


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(monkeypatch, 1, 3, kill(signal.SIGINT))
    assert start("out") == 130
    file = Path("out/.checkpoints/gradmix-sample-seed-1.pt")
    file.write_bytes(file.read_bytes()[:-1000])
    capsys.readouterr()
    assert run("train", "--resume", "out") == 2
    error = capsys.readouterr().err
    assert str(file) in error and "remove the file" in error and "Traceback" not in error
    assert {r.seed: r.status for r in load_runs("out").values()} == {0: "complete", 1: "interrupted"}
    file.unlink()
    assert run("train", "--resume", "out") == 0


def test_an_unfinished_folder_given_as_output_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(monkeypatch, 0, 3, kill(signal.SIGINT))
    assert start("my out", seeds=("0",)) == 130
    capsys.readouterr()
    assert start("my out", seeds=("0",)) == 2
    assert "1 unfinished runs; go on with them by: gradmix train --resume 'my out'" in capsys.readouterr().err
    assert run("train", "--resume", "my out") == 0
    capsys.readouterr()
    assert start("my out", seeds=("0",)) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_an_exchange_that_was_cut_off_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 0, 3, kill(signal.SIGINT))
    assert start("out", seeds=("0",)) == 130
    folder = Path("out/gradmix-sample/seed-0")
    folder.rename(folder.with_name(".seed-0-old"))
    assert run("train", "--resume", "out") == 0
    assert load_run(folder).status == "complete" and [p.name for p in folder.parent.iterdir()] == ["seed-0"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--resume", "out", "--lr", "0.1"], ["--lr", "--data-dir, --device and --threads"]),
        (["--resume=out", "--config=c.yaml"], ["--config", "its own settings"]),
        (["--resume", "out", "--seeds", "5"], ["--seeds"]),
        (["--resume", "out", "extra"], ["extra"]),
        (["--resume", "nowhere"], ["nowhere", "no such run folder"]),
        (["--resume", "empty"], ["config.yaml"]),
        (["--resume", "out/gradmix-sample/seed-0"], ["one run"]),
        (["--resume", "out", "--threads", "0"], ["threads", "at least 1"]),
    ],
    ids=" ".join,
)
def test_refused(args: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("out/gradmix-sample/seed-0").mkdir(parents=True)
    (Path("out") / "config.yaml").write_text("methods: [er]\n")
    for name in ("config.yaml", "metrics.json"):
        Path("out/gradmix-sample/seed-0", name).write_text("{}")
    assert run("train", *args) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for part in parts:
        assert part in error


def test_what_may_change_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    at_step(monkeypatch, 0, 3, kill(signal.SIGINT))
    assert start("out", seeds=("0",)) == 130
    real = trainer.train_one

    def train_one(config: Any, *args: Any, **others: Any) -> RunResult:
        seen.append(config)
        return real(config, *args, **others)

    monkeypatch.setattr(trainer, "train_one", train_one)
    capsys.readouterr()
    assert run("train", "--resume", "out", "--threads", "2", "--device", "cpu", "--data-dir", "elsewhere") == 0
    error = capsys.readouterr().err
    assert "threads 1 -> 2" in error and "device auto -> cpu" in error and "data-dir" in error
    assert "the same bits are no longer promised" in error
    (config,) = seen
    assert (config.threads, config.device, config.data.data_dir) == (2, "cpu", Path("elsewhere"))
    assert load_config("out/config.yaml").threads == 1, "the folder keeps its own"
