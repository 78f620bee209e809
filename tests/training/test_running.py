"""Running many runs: each once, in order, shared between commands, in one process or several."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import run_code
from patience import PATIENCE
from synthetic_runs import make_result

from gradmix.runtime.locks import try_lock
from gradmix.training.loop import trainer
from gradmix.training.runs import running
from gradmix.training.runs.experiments import Run, from_yaml
from gradmix.training.runs.results import RunResult, load_run
from gradmix.training.runs.running import RUNS_AT_A_TIME, Watcher, run_all, state_of

TINY = """
title: Tiny
seeds: [0, 1]
base:
  data: {benchmark: split-digits, tasks: 2, samples_per_class: 30}
  optim: {epochs: 1}
  threads: 1
arms: [{name: er, method: er}, {name: mixup, method: mixup}]
"""


@pytest.fixture
def runs() -> tuple[Run, ...]:
    return from_yaml(TINY, "tiny").runs()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Replaces training by made-up results of three steps; returns what was trained."""
    calls: list[tuple[str, int]] = []

    def train_one(config: Any, method: Any, seed: int, *, on_step: Callable[..., None], **_: Any) -> RunResult:
        calls.append((method, seed))
        try:
            for step in (1, 2, 3):
                on_step(trainer.Progress(method, seed, 1, 1, 1, 1, step, 3, None))
        except KeyboardInterrupt:
            return replace(make_result(method, seed, reached=0), config=config)
        return replace(make_result(method, seed), config=config)

    monkeypatch.setattr(trainer, "train_one", train_one)
    return calls


class Record(Watcher):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def start(self, run: Run) -> None:
        self.told.append(("start", run.arm, run.seed))

    def finish(self, run: Run, result: RunResult) -> None:
        assert (result.method, result.seed) == (run.method, run.seed)
        self.told.append(("finish", run.arm, run.seed))

    def fail(self, run: Run, reason: str) -> None:
        self.told.append(("fail", run.arm, run.seed, reason))

    def wait(self, runs: int) -> None:
        self.told.append(("wait", runs))


def test_each_is_run_once_and_in_order(trained: list[Any], runs: tuple[Run, ...], tmp_path: Path) -> None:
    record = Record()
    outcome = run_all(runs, tmp_path, watcher=record)
    assert not outcome.failed and not outcome.interrupted
    assert trained == [("er", 0), ("mixup", 0), ("er", 1), ("mixup", 1)]
    assert record.told == [(what, m, s) for m, s in trained for what in ("start", "finish")]
    assert all(state_of(run, tmp_path) == "complete" for run in runs)
    assert sorted(p.name for p in (tmp_path / runs[0].folder).iterdir()) == [
        "accuracy_matrix.csv", "config.yaml", "metrics.json",
    ]  # fmt: skip
    record.told.clear()
    assert run_all(runs, tmp_path, watcher=record) == running.Outcome()
    assert len(trained) == 4 and record.told == []
    assert not list((tmp_path / ".locks").iterdir())


def test_a_failure_is_reported_and_the_others_go_on(
    trained: list[Any], runs: tuple[Run, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = trainer.train_one
    errors = {("mixup", 0): ValueError("two\nlines"), ("er", 1): RuntimeError("out of memory")}

    def fails(config: Any, method: Any, seed: int, **others: Any) -> RunResult:
        if (method, seed) in errors:
            raise errors[method, seed]
        return good(config, method, seed, **others)

    monkeypatch.setattr(trainer, "train_one", fails)
    record = Record()
    outcome = run_all(runs, tmp_path, watcher=record)
    assert [(r.arm, r.seed, why) for r, why in outcome.failed] == [
        ("mixup", 0, "two lines"),
        ("er", 1, "RuntimeError: out of memory"),
    ]
    assert ("finish", "mixup", 1) in record.told and ("fail", "mixup", 0, "two lines") in record.told
    assert [state_of(run, tmp_path) for run in runs] == ["complete", "absent", "absent", "complete"]
    errors.clear()
    assert run_all(runs, tmp_path).failed == []
    assert sorted(trained) == [("er", 0), ("er", 1), ("mixup", 0), ("mixup", 1)]


def test_stopping_ends_the_run_it_is_in(trained: list[Any], runs: tuple[Run, ...], tmp_path: Path) -> None:
    looks = iter(range(100))
    outcome = run_all(runs, tmp_path, stopping=lambda: next(looks) > 5)
    assert outcome.interrupted and len(trained) == 2
    assert [state_of(run, tmp_path) for run in runs] == ["complete", "absent", "absent", "absent"]


def test_an_interrupted_run_goes_on_from_its_checkpoint(runs: tuple[Run, ...], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_all(runs[:1], whole)
    seen: list[int] = []

    class Stop(Watcher):
        def step(self, progress: trainer.Progress) -> None:
            seen.append(progress.step)

    assert run_all(runs[:1], tmp_path, watcher=Stop(), stopping=lambda: len(seen) == 3).interrupted
    assert state_of(runs[0], tmp_path) == "unfinished" and seen == [1, 2, 3]
    assert not run_all(runs[:1], tmp_path, watcher=Stop()).interrupted
    assert seen[3] == 4 and state_of(runs[0], tmp_path) == "complete"
    a, b = (load_run(folder / runs[0].folder) for folder in (whole, tmp_path))
    assert (a.accuracy == b.accuracy).all()
    assert not list((tmp_path / ".checkpoints").iterdir())


def test_a_damaged_checkpoint_fails_its_run_only(trained: list[Any], runs: tuple[Run, ...], tmp_path: Path) -> None:
    file = running.checkpoint_of(runs[0], tmp_path)
    file.parent.mkdir()
    file.write_bytes(b"nothing")
    from gradmix.training.loop import checkpoint

    good = trainer.train_one

    def reads(config: Any, method: Any, seed: int, *, checkpoint: Any, **others: Any) -> RunResult:
        if checkpoint.is_file():
            load(checkpoint)
        return good(config, method, seed, **others)

    load, trainer.train_one = checkpoint.load, reads
    try:
        outcome = run_all(runs, tmp_path)
    finally:
        trainer.train_one = good
    ((run, reason),) = outcome.failed
    assert run is runs[0] and str(file) in reason and file.read_bytes() == b"nothing"
    assert len(trained) == 3


def test_what_another_command_is_at_is_left_to_it(trained: list[Any], runs: tuple[Run, ...], tmp_path: Path) -> None:
    mine, theirs = runs[1:], runs[0]
    record = Record()
    (tmp_path / ".locks").mkdir()
    with try_lock(tmp_path / ".locks" / f"{running._flat(theirs)}.lock") as held:
        assert held
        worker = threading.Thread(target=run_all, args=(runs, tmp_path), kwargs={"watcher": record})
        worker.start()
        until = time.monotonic() + PATIENCE
        while ("wait", 1) not in record.told and time.monotonic() < until:
            time.sleep(0.02)
        assert ("wait", 1) in record.told
        assert trained == [(run.method, run.seed) for run in mine]
    worker.join(PATIENCE)
    assert trained[-1] == (theirs.method, theirs.seed) and state_of(theirs, tmp_path) == "complete"


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom gradmix.runtime.locks import try_lock\n"
        f"with try_lock(Path({str(path)!r})) as held:\n"
        "    assert held\n    print(os.getpid(), flush=True)\n    os._exit(0)\n"
    )
    (pid,) = run_code(code, tmp_path)
    assert path.read_text() == f"{pid}\n", "it was left behind"
    with try_lock(path) as held:
        assert held
    assert not path.exists()


def test_several_processes_of_which_one_dies(
    runs: tuple[Run, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hired: list[Any] = []
    hire = running._hire

    def remembered(*args: Any) -> Any:
        hired.append(hire(*args))
        return hired[-1]

    monkeypatch.setattr(running, "_hire", remembered)
    kills: list[int] = []

    def stopping() -> bool:
        # Not before the process is alive and at a run of its own.
        if not kills and (tmp_path / ".locks").is_dir() and any((tmp_path / ".locks").iterdir()):
            holders = [int(p.read_text() or 0) for p in (tmp_path / ".locks").iterdir()]
            if holders[0]:
                kills.append(holders[0])
                os.kill(kills[0], signal.SIGKILL)
        return False

    long = [replace(run, config=replace(run.config, optim=replace(run.config.optim, epochs=20))) for run in runs]
    record = Record()
    outcome = run_all(long, tmp_path, jobs=2, watcher=record, stopping=stopping)
    ((failed, reason),) = outcome.failed
    assert reason == "its process ended with status -9" and len(hired) == 3
    assert not any(worker.process.is_alive() for worker in hired)
    others = [run for run in long if run.folder != failed.folder]
    assert sorted(record.told) == sorted(
        [("finish", run.arm, run.seed) for run in others] + [("fail", failed.arm, failed.seed, reason)]
    )
    alone = tmp_path / "alone"
    run_all(others[-1:], alone)
    a, b = (load_run(folder / others[-1].folder) for folder in (tmp_path, alone))
    assert (a.accuracy == b.accuracy).all(), "whichever process makes it"
    assert [run.environment[RUNS_AT_A_TIME] for run in (a, b)] == [2, 1]


def test_several_processes_stop_with_checkpoints(runs: tuple[Run, ...], tmp_path: Path) -> None:
    long = [replace(run, config=replace(run.config, optim=replace(run.config.optim, epochs=2000))) for run in runs]

    def stopping() -> bool:
        locks = tmp_path / ".locks"
        return locks.is_dir() and any(locks.iterdir())

    outcome = run_all(long, tmp_path, jobs=2, stopping=stopping)
    assert outcome.interrupted and not outcome.failed
    assert "unfinished" in [state_of(run, tmp_path) for run in long]


def test_jobs_are_counted_from_one(runs: tuple[Run, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs: got 0"):
        run_all(runs, tmp_path, jobs=0)
