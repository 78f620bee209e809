"""Passes of a single row through batch normalisation: no run ends by them, and no other pass changes."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradmix.training.config import DataConfig, OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.loop.trainer import Progress, train_one
from gradmix.training.models.single_sample import serve_single_samples
from gradmix.training.streams import TaskStream, class_incremental


def normalised(num_classes: int) -> nn.Module:
    """A small network with batch normalisation."""
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, num_classes))


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The network above by a name that a configuration may hold."""
    module = types.ModuleType("normalised_networks")
    module.build = normalised  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "normalised_networks", module)
    yield


def stream(*counts: int) -> TaskStream:
    """Two tasks of two classes with so many rows each."""
    y = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    x = torch.randn(len(y), 12, generator=torch.Generator().manual_seed(0))
    return class_incremental((x, y), (x, y), tasks=2)


class Items:
    """Rows that are read one by one, as from files."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.targets = x, y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.x[index], self.targets[index]


def config(**changes: Any) -> TrainConfig:
    """Small batches of that network, with changes by section."""
    optim = {"model": "normalised_networks:build", "epochs": 1, "batch": 8} | changes.get("optim", {})
    data = DataConfig(workers=0, **changes.get("data", {}))
    return TrainConfig(optim=OptimConfig(**optim), data=data, replay=changes.get("replay", ReplayConfig()))


@pytest.mark.parametrize(
    ("method", "counts", "changes"),
    [
        ("er", (9, 8, 8, 8), {}),
        ("finetune", (8, 8, 9, 8), {}),
        ("er", (9, 8, 8, 8), {"data": {"online": True}}),
        ("gradmix-sample", (9, 8, 9, 8), {"data": {"online": True}}),
        ("er", (1, 1, 8, 8), {"optim": {"batch": 1}}),
        ("er", (7, 7, 7, 7), {"optim": {"batch": 7, "accumulate": 3}}),
        ("a-gem", (9, 8, 8, 8), {"replay": ReplayConfig(size=1, batch=1)}),
        ("der++", (9, 8, 9, 8), {"replay": ReplayConfig(size=1, batch=1)}),
        ("gradmix-class", (9, 8, 9, 8), {"optim": {"growing_head": True}, "replay": ReplayConfig(size=1, batch=1)}),
        ("mixup", (9, 8, 9, 8), {"replay": ReplayConfig(size=1, batch=1)}),
    ],
)
def test_no_run_ends_by_a_single_row(method: str, counts: tuple[int, ...], changes: dict[str, Any]) -> None:
    result = train_one(config(**changes), method, 0, stream=stream(*counts))
    assert result.status == "complete" and bool((result.accuracy >= 0).all())


@pytest.mark.parametrize("storage", [None, "memory"], ids=["numbers", "rows"])
def test_nor_where_rows_are_read(storage: Any) -> None:
    given = stream(9, 8, 9, 8)
    x = torch.cat([task.train.x for task in given.tasks])  # type: ignore[attr-defined]
    y = torch.cat([task.train.y for task in given.tasks])
    tasks = class_incremental(Items(x, y), Items(x, y), tasks=2)
    assert tasks.is_read
    result = train_one(config(replay=ReplayConfig(storage=storage)), "er", 0, stream=tasks)
    assert result.status == "complete"
    assert result.accuracy.tolist() == train_one(config(), "er", 0, stream=given).accuracy.tolist()


def test_a_run_left_before_its_single_row_goes_on_to_the_bit(tmp_path: Path) -> None:
    tasks = stream(9, 8, 9, 8)
    whole = train_one(config(), "finetune", 0, stream=tasks)

    def leave(progress: Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    left = train_one(config(), "finetune", 0, stream=tasks, checkpoint=tmp_path / "c.pt", on_step=leave)
    assert left.status == "interrupted" and left.timing.steps == 2
    again = train_one(config(), "finetune", 0, stream=tasks, checkpoint=tmp_path / "c.pt")
    assert again.timing.steps == whole.timing.steps == 6
    assert again.accuracy.tolist() == whole.accuracy.tolist()


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_a_single_row_is_normalised_by_the_running_statistics(layer: Any) -> None:
    model = layer(3)
    serve_single_samples(model)
    shape = (1, 3) if layer is nn.BatchNorm1d else (1, 3, 1, 1)
    model(torch.randn(8, *shape[1:], generator=torch.Generator().manual_seed(0)) * 3 + 1)
    mean, variance = model.running_mean.clone(), model.running_var.clone()
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out = model(x.view(shape))
    expected = (x.double() - mean.double()) / (variance.double() + model.eps).sqrt()
    torch.testing.assert_close(out.double().flatten(), expected)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (variance + model.eps).rsqrt())
    assert model.training and torch.equal(model.running_mean, mean) and torch.equal(model.running_var, variance)
    assert int(model.num_batches_tracked) == 1


def test_without_running_statistics_the_bias_is_left() -> None:
    model = nn.BatchNorm1d(3, track_running_stats=False)
    serve_single_samples(model)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(model(torch.ones(1, 3)), torch.tensor([[1.0, 2.0, 3.0]]))
        assert model.training is training


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.BatchNorm1d(3), torch.arange(12.0).view(4, 3)),
        (nn.BatchNorm1d(3, track_running_stats=False), torch.arange(12.0).view(4, 3)),
        (nn.BatchNorm2d(3), torch.arange(12.0).view(1, 3, 2, 2)),
        (nn.BatchNorm1d(3), torch.arange(6.0).view(1, 3, 2)),
    ],
)
def test_no_other_pass_changes(layer: nn.Module, x: torch.Tensor) -> None:
    expected = layer(x)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    for module in layer.modules():
        module.reset_running_stats()  # type: ignore[operator]
    serve_single_samples(layer)
    assert torch.equal(layer(x), expected)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_an_error_leaves_the_layer_in_training() -> None:
    model = nn.BatchNorm1d(3)
    serve_single_samples(model)
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 4))
    assert model.training
