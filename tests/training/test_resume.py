"""Runs that are interrupted and taken up again: to the last bit what they would have been."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import heads
import pytest
import torch
from forked import run_code, run_script
from patience import PATIENCE
from resuming import StopAt, assert_same_result, goes_on_to_the_bit
from torch import nn

from gradmix.training.config import DataConfig, MixConfig, OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.loop import checkpoint, run_state
from gradmix.training.loop.checkpoint import CheckpointError
from gradmix.training.loop.trainer import Progress, train_one
from gradmix.training.methods import METHODS
from gradmix.training.streams import TaskStream, class_incremental
from gradmix.training.streams.benchmarks import make_stream

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "kill_and_resume.py"
ROWS, BATCH, EPOCHS, TASKS = 12, 7, 2, 3
# Two classes a task; the last batch of an epoch is a small one.
STEPS_PER_EPOCH = -(-2 * ROWS // BATCH)
STEPS_PER_TASK = EPOCHS * STEPS_PER_EPOCH
STEPS = TASKS * STEPS_PER_TASK
OPTIM = OptimConfig(epochs=EPOCHS, batch=BATCH, lr=0.05, momentum=0.9, weight_decay=1e-4, lr_milestones=(0.5,))
BASE = TrainConfig(
    data=DataConfig(tasks=TASKS, samples_per_class=ROWS),
    optim=OPTIM,
    replay=ReplayConfig(size=5, batch=6, stream="dual"),
    threads=1,
)


@pytest.fixture(scope="module")
def stream() -> TaskStream:
    return make_stream("split-digits", tasks=TASKS, samples_per_class=ROWS)


def assert_goes_on_to_the_bit(
    config: TrainConfig, method: str, stream: TaskStream, folder: Path, stops: list[int] | None = None
) -> None:
    # The first step, within an epoch, before and after the last step of an epoch and of a task, the last of all.
    awkward = [1, 2, STEPS_PER_EPOCH, STEPS_PER_TASK - 1, STEPS_PER_TASK, STEPS_PER_TASK + 1, STEPS - 3, STEPS]
    goes_on_to_the_bit(config, method, stream, folder, stops or awkward)


NO_KORNIA = pytest.mark.skipif(importlib.util.find_spec("kornia") is None, reason="kornia is not installed")
NEED_KORNIA = {"autoaugment", "randaugment", "trivialaugment"}


@pytest.mark.parametrize("method", [pytest.param(m, marks=[NO_KORNIA] * (m in NEED_KORNIA)) for m in METHODS])
def test_every_method_goes_on_to_the_bit(method: str, stream: TaskStream, tmp_path: Path) -> None:
    assert_goes_on_to_the_bit(BASE, method, stream, tmp_path)


MIX = {
    "originals": MixConfig(originals=True),
    "refresh 3": MixConfig(refresh=3),
    "best": MixConfig(policy="best"),
    "permute": MixConfig(policy="permute"),
    "balanced candidates": MixConfig(candidates="balanced"),
    "feature": MixConfig(estimator="feature", refresh=2),
    "mixed": MixConfig(estimator="mixed", refresh=2),
    "random": MixConfig(control="random", refresh=2),
    "anti": MixConfig(control="anti"),
    "small gradient": MixConfig(control="small-gradient", refresh=0),
    "large gradient": MixConfig(control="large-gradient", refresh=3),
}


@pytest.mark.parametrize("method", ["gradmix-class", "gradmix-sample"])
@pytest.mark.parametrize("case", MIX)
def test_every_way_to_select_goes_on_to_the_bit(case: str, method: str, stream: TaskStream, tmp_path: Path) -> None:
    config = replace(BASE, mix=MIX[case])
    assert_goes_on_to_the_bit(config, method, stream, tmp_path, [2, STEPS_PER_TASK + 2, STEPS_PER_TASK + 5, STEPS])


# torch compiles the rules of forward-mode differentiation by a function of its own that it has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["jvp", "sketch"])
def test_estimators_over_all_parameters_go_on_to_the_bit(estimator: Any, stream: TaskStream, tmp_path: Path) -> None:
    config = replace(BASE, mix=MixConfig(estimator=estimator, refresh=2))
    assert_goes_on_to_the_bit(config, "gradmix-sample", stream, tmp_path, [STEPS_PER_TASK + 3, STEPS])


def averaged(num_classes: int) -> nn.Module:
    return heads.Averaged()


def tempered(num_classes: int) -> nn.Module:
    return heads.LearntTemperature()


@pytest.mark.parametrize("method", ["gradmix-class", "gradmix-sample"])
@pytest.mark.parametrize("model", [averaged, tempered])
def test_heads_that_are_no_single_layer_go_on_to_the_bit(model: Any, method: str, tmp_path: Path) -> None:
    # Their gradients have the shape of no parameter.
    y = torch.arange(60) % heads.CLASSES
    x = torch.randn(60, 10, generator=torch.Generator().manual_seed(0))
    config = replace(BASE, optim=replace(OPTIM, model=f"test_resume:{model.__name__}"), mix=MixConfig(refresh=3))
    goes_on_to_the_bit(config, method, class_incremental((x, y), (x, y), tasks=3), tmp_path, [10, 18])


SETTINGS = {
    "reservoir": replace(BASE, replay=replace(BASE.replay, policy="reservoir", size=9, batch=5)),
    "balanced buffer, tau": replace(BASE, replay=replace(BASE.replay, policy="balanced", size=13, batch=20, tau=0.5)),
    "augmented": replace(BASE, optim=replace(OPTIM, augment="crop-flip")),
    "bf16": replace(BASE, optim=replace(OPTIM, amp="bf16")),
    "one epoch, one batch": replace(BASE, optim=replace(OPTIM, epochs=1, batch=64)),
}


@pytest.mark.parametrize("method", ["er", "gradmix-class"])
@pytest.mark.parametrize("case", SETTINGS)
def test_settings_go_on_to_the_bit(case: str, method: str, stream: TaskStream, tmp_path: Path) -> None:
    config = SETTINGS[case]
    stops = [1, 2, 3] if config.optim.epochs == 1 else [3, STEPS_PER_TASK, STEPS_PER_TASK + 1, STEPS]
    assert_goes_on_to_the_bit(config, method, stream, tmp_path, stops)


@pytest.mark.parametrize("method", ["er", "gradmix-sample"])
def test_one_shuffled_stream_goes_on_to_the_bit(method: str, stream: TaskStream, tmp_path: Path) -> None:
    # The buffer's rows make later tasks longer.
    config = replace(BASE, replay=replace(BASE.replay, stream="shuffled"))
    end = train_one(config, method, 1, stream=stream).timing.steps
    assert end > STEPS
    assert_goes_on_to_the_bit(config, method, stream, tmp_path, [STEPS_PER_TASK, STEPS_PER_TASK + 1, end - 2, end])


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolutional_network_goes_on_to_the_bit(channels_last: bool, stream: TaskStream, tmp_path: Path) -> None:
    """BatchNorm has running statistics besides its weights; channels-last tensors have strides of their own."""
    optim = replace(OPTIM, model="resnet8", channels_last=channels_last, augment="crop-flip")
    stops = [1, STEPS_PER_TASK + 1, STEPS]
    assert_goes_on_to_the_bit(replace(BASE, optim=optim), "gradmix-sample", stream, tmp_path, stops)


def test_a_checkpoint_after_every_step_changes_nothing(stream: TaskStream, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    expected = train_one(BASE, "gradmix-class", 1, stream=stream)
    steps: list[int | None] = []

    def look(progress: Progress) -> None:
        steps.append(checkpoint.load(path)["steps"] if path.is_file() else None)

    result = train_one(BASE, "gradmix-class", 1, stream=stream, on_step=look, checkpoint=path, checkpoint_seconds=0)
    assert_same_result(result, expected)
    assert steps == [None, *range(1, STEPS)] and checkpoint.load(path)["steps"] == STEPS


def test_no_checkpoint_is_due_before_its_time(stream: TaskStream, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    assert train_one(BASE, "er", 1, stream=stream, checkpoint=path, checkpoint_seconds=3600).status == "complete"
    assert not path.exists()


def test_what_went_before_is_counted(stream: TaskStream, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train_one(BASE, "gradmix-class", 1, stream=stream, on_step=StopAt([STEPS - 1]), checkpoint=path)
    before = checkpoint.load(path)
    timing = train_one(BASE, "gradmix-class", 1, stream=stream, checkpoint=path).timing
    assert timing.steps == STEPS and timing.peak_memory_bytes >= before["peak_memory"] > 0
    assert timing.seconds_total > before["seconds_total"] > before["clock"]["step"] > 0
    assert timing.seconds_step > before["clock"]["step"]
    assert timing.seconds_selection >= before["clock"]["selection"] > 0
    # Left out are the first step, the first one that selects, and the first one after the interruption.
    assert timing.steady.steps == STEPS - 3


def test_a_checkpoint_without_times_of_steps_goes_on(
    stream: TaskStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.pt"
    complete = run_state.state_dict
    with monkeypatch.context() as patch:
        patch.setattr(
            run_state, "state_dict", lambda run: {k: v for k, v in complete(run).items() if k != "step_times"}
        )
        train_one(BASE, "er", 1, stream=stream, on_step=StopAt([5]), checkpoint=path)
    result = train_one(BASE, "er", 1, stream=stream, checkpoint=path)
    assert_same_result(result, train_one(BASE, "er", 1, stream=stream))
    assert result.timing.steady.steps == STEPS - 6


# -------------------------------------------------------------------------------------------------- what goes wrong

OTHER = {
    "seed": (BASE, "er", 2, "the checkpoint has 'seed: 1'; this run has 'seed: 2'"),
    "method": (BASE, "mixup", 1, "the checkpoint has 'method: er'; this run has 'method: mixup'"),
    "setting": (replace(BASE, replay=replace(BASE.replay, size=6)), "er", 1, "'replay.size: 5'; .*'replay.size: 6'"),
    "rate": (replace(BASE, optim=replace(OPTIM, lr=0.01)), "er", 1, "'optim.lr: 0.05'; this run has 'optim.lr: 0.01'"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_checkpoint_of_another_run_is_refused(case: str, stream: TaskStream, tmp_path: Path) -> None:
    config, method, seed, message = OTHER[case]
    path = tmp_path / "run.pt"
    train_one(BASE, "er", 1, stream=stream, on_step=StopAt([5]), checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"run.pt: belongs to another run: .*{message}"):
        train_one(config, method, seed, stream=stream, checkpoint=path)
    assert path.read_bytes() == before


def test_where_and_how_a_run_is_made_makes_no_other_run(stream: TaskStream, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train_one(BASE, "er", 1, stream=stream, on_step=StopAt([5]), checkpoint=path)
    elsewhere = replace(
        BASE, device="cpu", output=tmp_path, checkpoint=1.0, data=replace(BASE.data, data_dir=tmp_path), seeds=(1, 2)
    )
    expected = train_one(BASE, "er", 1, stream=stream)
    assert_same_result(train_one(elsewhere, "er", 1, stream=stream, checkpoint=path), expected)


@pytest.mark.parametrize("key", ["width", "sampler", "generators.candidate augmentation"])
def test_a_checkpoint_that_lacks_what_is_kept_now_is_refused(
    key: str, stream: TaskStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.pt"
    complete = run_state.state_dict

    def former(self: Any) -> dict[str, Any]:
        state = complete(self)
        *sections, name = key.split(".")
        del (state[sections[0]] if sections else state)[name]
        return state

    monkeypatch.setattr(run_state, "state_dict", former)
    train_one(BASE, "er", 1, stream=stream, on_step=StopAt([5]), checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"run\.pt: whole, but of an earlier version .* '{key.split('.')[-1]}'"):
        train_one(BASE, "er", 1, stream=stream, checkpoint=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "spoil",
    [lambda b: b[:-1], lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:], lambda b: b""],
    ids=["cut", "bit", "empty"],
)
def test_a_damaged_checkpoint_is_refused_and_kept(spoil: Any, stream: TaskStream, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train_one(BASE, "er", 1, stream=stream, on_step=StopAt([5]), checkpoint=path)
    damaged = spoil(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"run\.pt: .*(damaged|cut off|empty).*; remove the file to start"):
        train_one(BASE, "er", 1, stream=stream, checkpoint=path)
    assert path.read_bytes() == damaged


def test_a_full_disk_ends_the_run_and_the_previous_checkpoint_goes_on(
    stream: TaskStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.pt"
    write = Path.write_bytes

    def until_full(path: Path, data: bytes) -> int:
        if not room.pop():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    room = [False, *[True] * 9]
    monkeypatch.setattr(Path, "write_bytes", until_full)
    with pytest.raises(
        CheckpointError, match=r"run\.pt: .*\(No space left on device\); the previous checkpoint is int"
    ):
        train_one(BASE, "gradmix-class", 1, stream=stream, checkpoint=path, checkpoint_seconds=0)
    monkeypatch.undo()
    assert checkpoint.load(path)["steps"] == 9 and os.listdir(tmp_path) == ["run.pt"]
    result = train_one(BASE, "gradmix-class", 1, stream=stream, checkpoint=path)
    assert_same_result(result, train_one(BASE, "gradmix-class", 1, stream=stream))


# ---------------------------------------------------------------------------------------------------------- killing


# The children share what the parent imported, so that a kill costs no second start of Python.
KILLED = """
import os, signal, time
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from gradmix.training.loop import checkpoint
from gradmix.training.streams.benchmarks import make_stream
from gradmix.training.config import OptimConfig, TrainConfig
from gradmix.training.loop.trainer import train_one

torch.set_num_threads(1)
path, moments = Path({path!r}), {moments!r}
config = TrainConfig(optim=OptimConfig(epochs=1, lr=0.05), threads=1)
stream = make_stream("split-digits")
for moment in moments:
    before = path.stat().st_ino if path.is_file() else None
    if (child := os.fork()) == 0:
        train_one(config, {method!r}, 3, stream=stream, checkpoint=path, checkpoint_seconds=0)
        os._exit(0)
    until = time.monotonic() + {patience}
    while (not path.is_file() or path.stat().st_ino == before) and time.monotonic() < until:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("killed" if killed == -9 else killed, checkpoint.load(path)["steps"])
resumed = train_one(config, {method!r}, 3, stream=stream, checkpoint=path)
whole = train_one(config, {method!r}, 3, stream=stream)
print(
    "same",
    resumed.status == "complete" and resumed.timing.steps == whole.timing.steps
    and np.array_equal(resumed.accuracy, whole.accuracy)
    and np.array_equal(resumed.mixed_share, whole.mixed_share, equal_nan=True)
    and [a.cosine.tobytes() for a in resumed.alignments] == [a.cosine.tobytes() for a in whole.alignments],
)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the run that is killed is in a forked process")
def test_a_process_killed_three_times_ends_as_one_left_in_peace(tmp_path: Path) -> None:
    moments, method = (0.0, 0.037, 0.011), "gradmix-sample"
    code = KILLED.format(path=str(tmp_path / "run.pt"), moments=moments, method=method, patience=PATIENCE)
    *kills, verdict = (line.split() for line in run_code(code, tmp_path))
    assert [word for word, _ in kills] == ["killed"] * 3
    steps = [int(step) for _, step in kills]
    assert 0 < steps[0] < steps[1] < steps[2], "each went on from where the one before was"
    assert verdict == ["same", "True"]


@pytest.mark.slow
def test_the_script_kills_the_command_and_finds_the_same(tmp_path: Path) -> None:
    found = tmp_path / "kills.json"
    # A run that is faster than its kill is made anew, so this one is killed in the middle on any machine.
    short = ("--kills", "1", "--moments", "step", "--epochs", "1", "--tasks", "2", "--rows-per-class", "60")
    answer = run_script(SCRIPT, *short, "--json", str(found), cwd=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    result = json.loads(found.read_text(encoding="utf-8"))
    assert result["same"] and len(result["kills"]) == 1
    assert all(run["differing"] == [] for run in result["runs"])
    assert result["kills"][0]["kind"] == "step"
    assert result["kills"][0]["step"] is not None, "it found the run under way"
    assert "all the same" in answer.stdout


def test_the_script_sees_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import kill_and_resume

    a = {"accuracy": [[0.1, None]], "metrics": {"final": {"value": 0.30000000000000004}}, "steps": 3}
    assert kill_and_resume.differences(a, json.loads(json.dumps(a))) == []
    b = {"accuracy": [[0.1, 0.2]], "metrics": {"final": {"value": 0.3}}, "steps": 3.0, "more": 1}
    assert kill_and_resume.differences(a, b) == ["accuracy", "metrics.final.value", "steps", "more"]
