"""``torchrun ... gradmix train``: one run folder and one voice, and what becomes of others when one process ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import Ended, Forked, Started, start_script
from patience import PATIENCE
from small_pictures import draw_small_pictures

from gradmix import cli
from gradmix.cli import launch
from gradmix.cli.launch import Processes, explain_lost_process
from gradmix.training.config import load_config
from gradmix.training.loop.reading import default_workers
from gradmix.training.runs.results import RunResult, load_runs

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SCRIPT = Path(__file__).parents[1] / "one_of_several.py"
SHORT = ("--epochs", "1", "--tasks", "2", "--samples-per-class", "60", "--threads", "1")
TRAIN = ("train", "--methods", "gradmix-sample", "--seeds", "0", "1", *SHORT, "--checkpoint", "0.001")


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "GRADMIX_DEBUG"}
    return kept | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"} | more


def by_two(folder: Path, *args: str, happens: str = "") -> list[Forked | Started]:
    """Two processes as torchrun starts them, but nobody who ends one when the other has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start_script(SCRIPT, *args, cwd=folder, environment=environment(**shared, **place, HAPPENS=happens))
        for place in places
    ]


def runs_of(folder: Path) -> dict[int, RunResult]:
    return {result.seed: result for result in load_runs(folder).values()}


def same(one: RunResult, other: RunResult) -> bool:
    return bool((one.accuracy == other.accuracy).all()) and one.mixed_share[1] == other.mixed_share[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Ended, dict[int, RunResult]]:
    """A run by two processes that nothing happens to."""
    first, second = (process.wait() for process in by_two(folder, *TRAIN, "--output", "whole"))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    return Ended(0, first.stdout + second.stdout, first.stderr + second.stderr), runs_of(folder / "whole")


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_small_pictures(monkeypatch)


@pytest.mark.slow
def test_two_processes_leave_the_folder_of_one(
    whole: tuple[Ended, dict[int, RunResult]], folder: Path, monkeypatch: pytest.MonkeyPatch, few_pictures: None
) -> None:
    said, runs = whole
    for line in ("seed 0  task 1 of 2", "seed 1  task 2 of 2", "Run folder: whole"):
        assert said.stdout.count(line) == 1, "one process prints"
    assert "gradmix:" not in said.stderr
    monkeypatch.chdir(folder)
    assert cli.main([*TRAIN, "--output", "alone"]) == 0
    alone = runs_of(Path("alone"))
    for seed in (0, 1):
        assert same(runs[seed], alone[seed])
        assert runs[seed].environment["processes"] == 2 and runs[seed].environment["batch_per_process"] == 8
        assert "processes" not in alone[seed].environment
    files = {name: sorted(p.relative_to(name) for p in Path(name).rglob("*")) for name in ("whole", "alone")}
    assert files["whole"] == files["alone"]
    assert load_config("whole/config.yaml").optim.batch == 16, "the batch is that of all processes"


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_resuming_is_exact(
    whole: tuple[Ended, dict[int, RunResult]], folder: Path
) -> None:
    processes = by_two(folder, *TRAIN, "--output", "killed", happens="1 1 9 kill")
    first, second = (process.wait() for process in processes)
    assert second.returncode == -signal.SIGKILL and first.returncode == 2, first.stderr
    (error,) = (line for line in first.stderr.splitlines() if line.startswith("gradmix: "))
    assert error.startswith("gradmix: error: process 0 of 2: another process has ended or cannot be reached (")
    assert error.endswith("go on with: torchrun --nproc-per-node 2 -m gradmix.cli train --resume killed")
    assert "Traceback" not in first.stderr
    assert list(runs_of(folder / "killed")) == [0] and "Run folder: killed" in first.stdout
    assert [p.name for p in (folder / "killed/.checkpoints").iterdir()] == ["gradmix-sample-seed-1.pt"]
    first, second = (process.wait() for process in by_two(folder, "train", "--resume", "killed"))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    runs = runs_of(folder / "killed")
    assert runs[1].status == "complete" and all(same(runs[seed], whole[1][seed]) for seed in (0, 1))
    assert not (folder / "killed/.checkpoints").exists()


@pytest.mark.slow
def test_sigterm_to_the_launcher_stops_all_at_one_step_and_one_process_goes_on(
    whole: tuple[Ended, dict[int, RunResult]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    few_pictures: None,
) -> None:
    (folder / "at_step").unlink(missing_ok=True)
    # The second is slow, so that the first is ahead of it when the signal comes.
    words = (*TORCHRUN, str(SCRIPT), *TRAIN, "--output", "stopped")
    launcher = Started(words, folder, environment(HAPPENS="1 0 5 tell"))
    deadline = time.monotonic() + PATIENCE
    while not (folder / "at_step").exists() and launcher.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.process.send_signal(signal.SIGTERM)
    said = launcher.wait()
    assert said.returncode != 0
    assert said.stderr.count("gradmix: stopping after this step") == 1
    command = "torchrun --nproc-per-node 2 -m gradmix.cli train --resume stopped"
    assert said.stderr.count(f"gradmix: interrupted; the results so far are in stopped; go on with: {command}") == 1
    stopped = runs_of(folder / "stopped")[0]
    assert stopped.status == "interrupted" and stopped.timing.steps % 8 == 0
    monkeypatch.chdir(folder)
    assert cli.main(["train", "--resume", "stopped"]) == 0
    runs = runs_of(Path("stopped"))
    assert all(runs[seed].status == "complete" and same(runs[seed], whole[1][seed]) for seed in (0, 1))


@pytest.mark.slow
def test_an_error_in_one_process_and_an_error_of_all(tmp_path: Path) -> None:
    # At the same time, since starting them is what takes time.
    of_one = by_two(tmp_path, *TRAIN, "--output", "one", happens="1 0 3 error")
    of_all = by_two(tmp_path, *TRAIN, "--output", "all", "--device", "nonsense")
    first, second = (process.wait() for process in of_one)
    assert (first.returncode, second.returncode) == (2, 2)
    assert "gradmix: error: process 1 of 2: sample 7 is damaged" in second.stderr
    assert "gradmix: error: process 0 of 2: another process has ended" in first.stderr
    assert "Traceback" not in first.stderr + second.stderr
    first, second = (process.wait() for process in of_all)
    assert (first.returncode, second.returncode) == (2, 2)
    assert "gradmix: error: device: got 'nonsense'" in first.stderr and "gradmix" not in second.stderr
    assert not (tmp_path / "all").exists()


# ------------------------------------------------------------------------------------------- without other processes


def test_an_experiment_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launch, "_GRACE", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(["experiment", "--list"]) == 2
        said = capsys.readouterr()
        assert said.out == "" and (said.err == "") == (rank > 0)
        assert rank or "experiment: got 4 processes, started by torchrun, expected one: --jobs" in said.err


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "4"}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Processes(3, 4, 1, 2)),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: got 2 in the environment, expected less than 2"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE: got 'two' in the environment, expected a number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK: got '-1'"),
    ],
)
def test_what_the_environment_tells(
    variables: dict[str, str], expected: Processes | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            launch.processes_from_environment()
    else:
        assert launch.processes_from_environment() == expected


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("cpu", 8, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:1"),
        ("cuda", 4, "cuda:1"),
        ("auto", 1, "torch sees 1 GPUs"),
        ("cuda:0", 2, "each takes the GPU of its own number"),
    ],
)
def test_each_process_takes_its_own_gpu(name: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    processes = Processes(3, 4, 1, 2, group=object())  # type: ignore[arg-type]
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            processes.device(name)
    else:
        assert processes.device(name) == expected


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("[/src/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242. Typical."),
            "Connection closed by peer [127.0.0.1]:4242);",
        ),
        (torch.distributed.DistNetworkError("the server is gone\nC++ stack"), "(the server is gone);"),
        (RuntimeError("shapes do not match"), None),
        (ValueError("gloo"), None),
    ],
)
def test_a_lost_process_is_put_into_words(error: Exception, words: str | None) -> None:
    if words is None:
        with pytest.raises(type(error)) as kept, explain_lost_process(lambda: "again"):
            raise error
        assert kept.value is error
        return
    with pytest.raises(launch.LostProcessError) as made, explain_lost_process(lambda: "again"):
        raise error
    assert (
        words in str(made.value) and str(made.value).endswith("go on with: again") and "pair.cc" not in str(made.value)
    )


@pytest.mark.parametrize(
    ("timeout", "words"),
    [
        ("1", "process 1 of 2: the 2 processes have not met at 127.0.0.1:"),
        ("soon", "GRADMIX_TIMEOUT: got 'soon' in the environment, expected a number of seconds above 0"),
        ("0", "GRADMIX_TIMEOUT: got '0'"),
    ],
)
def test_processes_that_do_not_meet(
    timeout: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Exit(BaseException):
        pass

    def leave(status: int) -> None:
        raise Exit(status)

    # A process that fails ends without a way back, which a test needs.
    monkeypatch.setattr(os, "_exit", leave)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (places | {"GRADMIX_TIMEOUT": timeout}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exit, match="2"):
        cli.main(["train"])
    assert words in capsys.readouterr().err


def test_methods_for_one_process_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gradmix.cli.train import _plan

    monkeypatch.chdir(tmp_path)
    processes = Processes(0, 2, 0, 2, group=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="methods: got manifold-mixup with 2 processes, expected one process"):
        _plan(["--methods", "er", "manifold-mixup", "--output", "out"], processes, {})
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("cores", "told", "expected"), [(8, None, 7), (8, "2", 3), (8, "8", 0), (2, "4", 0), (64, "2", 16), (8, "x", 7)]
)
def test_reading_processes_share_the_machine(
    cores: int, told: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if told is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    assert default_workers() == expected
