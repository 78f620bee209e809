"""Locks: one holder at a time, none that outlives its process, and one command in a folder of runs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradmix import cli
from gradmix.runtime.locks import acquire, holder, try_lock
from gradmix.training.runs.results import LOCK, load_runs

FEW = ("--methods", "er", "--seeds", "0", "--epochs", "1", "--tasks", "2", "--rows-per-class", "20")


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert holder(path) is None
    with try_lock(path) as mine, try_lock(path) as again:
        assert mine and not again
        assert holder(path) == f"process {os.getpid()}"
        assert acquire(path) is None
    assert not path.exists()
    lock = acquire(path)
    assert lock is not None and lock.is_held and acquire(path) is None
    lock.release()
    lock.release()
    assert acquire(path) is not None, "and given back when it is gone"
    assert acquire(path) is not None


def test_shared_locks_keep_only_others_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with try_lock(path, shared=True) as one:
        with try_lock(path, shared=True) as other, try_lock(path) as alone:
            assert one and other and not alone
        assert path.exists(), "the first still has it"
        assert holder(path) is not None
    assert not path.exists()
    with try_lock(path) as alone, try_lock(path, shared=True) as other:
        assert alone and not other


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_holds_no_lock_of_a_killed_process(tmp_path: Path) -> None:
    # A process takes the lock, forks a worker as a DataLoader does, and is killed; the worker lives on.
    path = tmp_path / "lock"
    code = (
        "import multiprocessing, os, signal, sys, time\nfrom pathlib import Path\n"
        "from gradmix.runtime.locks import try_lock\n"
        "def wait(pipe):\n    pipe.recv()\n"
        f"with try_lock(Path({str(path)!r})) as mine:\n"
        "    assert mine\n"
        "    here, there = multiprocessing.get_context('fork').Pipe()\n"
        "    worker = multiprocessing.get_context('fork').Process(target=wait, args=(there,))\n"
        "    worker.start()\n"
        "    print(worker.pid, flush=True)\n"
        "    sys.stdin.read(1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    worker = int(process.stdout.readline())
    try:
        assert holder(path) == f"process {process.pid}"
        process.stdin.write("x")
        process.stdin.close()
        assert process.wait() == -signal.SIGKILL
        os.kill(worker, 0)
        with try_lock(path) as mine:
            assert mine
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADMIX_DEBUG", raising=False)
    return tmp_path


def test_a_folder_in_use_is_refused_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *FEW, "--output", "out"]) == 0
    assert not (here / "out" / LOCK).exists()
    kept = {path: path.stat().st_mtime_ns for path in (here / "out").rglob("*")}
    capsys.readouterr()
    (here / "new").mkdir()
    specification = "{title: t, arms: [{name: er, method: er}]}"
    (here / "e.yaml").write_text(specification)
    for folder in ("out", "new"):
        with try_lock(here / folder / LOCK) as mine:
            assert mine
            for command in (
                ["train", *FEW, "--output", folder],
                ["train", "--resume", folder],
                ["train", "--resume", str(here / folder)],
                ["experiment", "e.yaml", "--output", folder],
            ):
                assert cli.main(command) == 2
                said = capsys.readouterr()
                assert f"is in use: process {os.getpid()} is at work in it" in said.err and not said.out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    # As the message says, it is to be had once the other has ended.
    assert cli.main(["train", "--resume", "out"]) == 0
    assert len(load_runs("out")) == 1


def test_training_and_experiments_keep_out_of_each_others_way(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *FEW, "--output", "out"]) == 0
    with try_lock(here / "out" / LOCK, shared=True):
        assert cli.main(["train", "--resume", "out"]) == 2
    assert "is in use" in capsys.readouterr().err


def test_what_a_killed_command_left_is_no_obstacle(here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / LOCK).write_text("1\n")
    assert cli.main(["train", *FEW, "--output", "out"]) == 0
    assert not (here / "out" / LOCK).exists()


def test_a_file_system_without_locks_is_no_obstacle(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    # With a checkpoint after every step.
    assert cli.main(["train", *FEW, "--checkpoint", "1e-9", "--output", "out"]) == 0
    assert [result.status for result in load_runs(here / "out").values()] == ["complete"]
    assert not any(path.name.endswith(".pt") for path in here.rglob("*"))
