"""Runs that are stopped and taken up again, for the tests that they end as if they had never been stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradmix.training.config import TrainConfig
from gradmix.training.loop import checkpoint, run_state
from gradmix.training.loop.run import Run
from gradmix.training.loop.trainer import Progress, train_one
from gradmix.training.runs.results import RunResult
from gradmix.training.streams import TaskStream

# Not to be resumed from: when and how long.
LEFT_OUT = ("clock", "step_times", "seconds_total", "peak_memory")


@dataclass
class StopAt:
    """Raises KeyboardInterrupt after given steps, each once."""

    steps: list[int]
    seen: list[int] = field(default_factory=list)

    def __call__(self, progress: Progress) -> None:
        self.seen.append(progress.step)
        if self.steps and progress.step == self.steps[0]:
            self.steps.pop(0)
            raise KeyboardInterrupt


def same(a: Any, b: Any, key: str = "") -> None:
    """Asserts that two nested values are equal to the bit."""
    assert type(a) is type(b), key
    if isinstance(a, dict):
        assert list(a) == list(b), key
        for name in a:
            same(a[name], b[name], f"{key}[{name!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), key
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            same(one, other, f"{key}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, key
        assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes(), key
        assert a.contiguous().view(-1).numpy(force=True).tobytes() == b.contiguous().view(-1).numpy().tobytes(), key
    else:
        assert a == b or (a != a and b != b), f"{key}: {a} and {b}"


def assert_same_result(result: RunResult, expected: RunResult) -> None:
    assert result.status == expected.status == "complete"
    assert result.timing.steps == expected.timing.steps
    assert np.array_equal(result.accuracy, expected.accuracy)
    assert np.array_equal(result.mixed_share, expected.mixed_share, equal_nan=True)
    assert len(result.alignments) == len(expected.alignments)
    for one, other in zip(result.alignments, expected.alignments, strict=True):
        assert one.task == other.task and np.array_equal(one.classes, other.classes)
        assert one.cosine.tobytes() == other.cosine.tobytes() and np.array_equal(one.helpful, other.helpful)


def state_at(path: Path) -> dict[str, Any]:
    return {name: value for name, value in checkpoint.load(path).items() if name not in LEFT_OUT}


def interrupted_run(
    config: TrainConfig, method: str, stream: TaskStream, path: Path, stops: list[int]
) -> tuple[RunResult, dict[str, Any]]:
    """Stops after each of ``stops``, each time in a run of its own; the completed run and its last checkpoint."""
    seen: list[int] = []
    for stop in stops:
        # Whatever the state of the process is when a run is taken up, it must not matter.
        torch.manual_seed(stop)
        stopper = StopAt([stop])
        result = train_one(config, method, 1, stream=stream, on_step=stopper, checkpoint=path)
        assert result.status == "interrupted" and result.timing.steps == stop
        seen += stopper.seen
    last, stopper = state_at(path), StopAt([])
    result = train_one(config, method, 1, stream=stream, on_step=stopper, checkpoint=path)
    assert seen + stopper.seen == list(range(1, result.timing.steps + 1)), "every step is taken once"
    return result, last


def undisturbed_run(
    config: TrainConfig, method: str, stream: TaskStream, path: Path, last: int
) -> tuple[RunResult, dict[str, Any]]:
    """A run without a checkpoint that nothing interrupts, and its state after the step ``last``, its last one.

    The state goes through the file ``path``, where those of interrupted runs have been.
    """
    report = Run.report

    def report_and_keep(run: Run, *args: Any) -> None:
        report(run, *args)
        if run.position.steps == last:
            checkpoint.save(run_state.state_dict(run), path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "report", report_and_keep)
        result = train_one(config, method, 1, stream=stream)
    assert result.timing.steps == last
    return result, state_at(path)


def goes_on_to_the_bit(config: TrainConfig, method: str, stream: TaskStream, folder: Path, stops: list[int]) -> None:
    """Asserts that a run stopped after ``stops``, the last step among them, ends as an undisturbed one."""
    expected, last = undisturbed_run(config, method, stream, folder / "undisturbed.pt", stops[-1])
    result, resumed_last = interrupted_run(config, method, stream, folder / "resumed.pt", stops)
    assert_same_result(result, expected)
    # Of what the accuracies of so few rows do not show: weights, momentum, buffer, random numbers, all of it.
    same(resumed_last, last, "state")
