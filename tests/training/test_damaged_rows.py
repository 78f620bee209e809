"""Runs over files of which some cannot be read: what is left out, and that a run goes on as if it had not stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import assert_same_result, goes_on_to_the_bit, interrupted_run
from torch import Tensor

from gradmix.training.config import DataConfig, OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.data.image_files import DamagedImageError
from gradmix.training.loop.run import Run
from gradmix.training.loop.trainer import train_one
from gradmix.training.streams import TaskStream, class_incremental

pytestmark = pytest.mark.filterwarnings("ignore:sample .* is left out")

CLASSES, PER_CLASS = 4, 12
ROWS = CLASSES * PER_CLASS


class Files:
    """Rows of numbers, some of which are damaged."""

    def __init__(self, seed: int, damaged: set[int]) -> None:
        self.labels = [n % CLASSES for n in range(ROWS)]
        noise = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(seed))
        self.x = 2 * torch.eye(5)[torch.tensor(self.labels)] + 0.5 * noise
        self.damaged = damaged

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Tensor:
        if index in self.damaged:
            raise DamagedImageError(f"{index}.jpg: cut short")
        return self.x[index]


def stream_of(train: set[int], test: set[int]) -> TaskStream:
    return class_incremental(Files(0, train), Files(1, test), tasks=2)


def config_of(epochs: int = 1, workers: int = 0, **replay: Any) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(skip_damaged=True, workers=workers),
        optim=OptimConfig(epochs=epochs, batch=5, lr=0.05, model="mlp"),
        replay=ReplayConfig(**{"size": 6, "batch": 4, **replay}),
        threads=1,
    )


CASES: dict[str, tuple[set[int], set[int], set[int]]] = {
    "none": (set(), set(), set(range(ROWS))),
    "training samples": ({3, 20, 41}, set(), set(range(ROWS)) - {3, 20, 41}),
    "test samples of the same numbers": (set(), {3, 20, 41}, set(range(ROWS))),
    "some of both": ({3, 22}, {22, 41}, set(range(ROWS)) - {3, 22}),
}


@pytest.mark.parametrize("storage", [None, "memory"])
@pytest.mark.parametrize("name", CASES)
def test_the_buffer_is_shown_what_can_be_read(name: str, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test, expected = CASES[name]
    runs: list[Any] = []
    learn = Run.learn
    monkeypatch.setattr(Run, "learn", lambda run, task: (runs.append(run), learn(run, task)))
    # Room for all rows.
    result = train_one(config_of(size=PER_CLASS, storage=storage), "er", 0, stream=stream_of(train, test))
    buffer = runs[0].buffer
    assert result.status == "complete" and buffer.seen == len(expected)
    if storage is None:
        assert sorted(buffer.x.tolist()) == sorted(expected)


@pytest.mark.parametrize("storage", [None, "memory"])
@pytest.mark.parametrize("method", ["er", "der++-gradmix-sample"])
def test_a_run_that_is_left_goes_on_to_the_bit(method: str, storage: Any, tmp_path: Path) -> None:
    """In one epoch a damaged row is met once: who goes on after it must have been told."""
    config = config_of(storage=storage)
    # 24 rows a task make five steps; the fifth step is the last of the first task.
    goes_on_to_the_bit(config, method, stream_of({3, 20, 41, 42}, {5}), tmp_path, [2, 4, 5, 8, 10])


def test_rows_drawn_ahead_go_on_to_the_bit(tmp_path: Path) -> None:
    goes_on_to_the_bit(config_of(2, workers=1), "mixup", stream_of({3, 20, 42}, set()), tmp_path, [3, 9, 12, 20])


def test_a_run_whose_buffer_lies_on_disk_goes_on(tmp_path: Path) -> None:
    """Not the states are compared, for folders have names of their own."""
    config, stream = config_of(storage="disk"), stream_of({3, 20, 41, 42}, {5})
    expected = train_one(config, "gradmix-sample", 1, stream=stream)
    result, _ = interrupted_run(config, "gradmix-sample", stream, tmp_path / "run.pt", [2, 5, 8])
    assert_same_result(result, expected)
