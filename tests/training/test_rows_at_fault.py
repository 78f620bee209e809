"""Rows that no model can be trained on are named; a run is not said to have diverged because of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradmix.training.config import DataConfig, OptimConfig, TrainConfig
from gradmix.training.data.image_files import DamagedImageError
from gradmix.training.loop.trainer import train_one
from gradmix.training.streams import class_incremental

CONFIG = TrainConfig(data=DataConfig(workers=0), optim=OptimConfig(model="mlp", epochs=1, batch=8, lr=0.05), threads=1)
X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 4


class Items:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], int(self.y[index])


def with_a_fault(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    x = X.to(dtype, copy=True)
    x[17, 2] = value
    return x


@pytest.mark.parametrize("side", ["train", "test"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_at_hand_is_named(side: str, value: float) -> None:
    rows: dict[str, Any] = {"train": (X, Y), "test": (X, Y)} | {side: (with_a_fault(value), Y)}
    with pytest.raises(ValueError, match=rf"^{side}: sample 17 holds NaN, an infinity or .* expected finite numbers$"):
        class_incremental(**rows)


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_numbers_that_the_model_would_see_as_infinite(value: float) -> None:
    with pytest.raises(ValueError, match="train: sample 17 holds .* a number beyond float32"):
        class_incremental((with_a_fault(value, torch.float64).numpy(), Y), (X, Y))


@pytest.mark.parametrize("method", ["er", "gradmix-class"])
@pytest.mark.parametrize("side", ["train", "test"])
def test_an_item_is_named_when_it_is_read(side: str, method: str) -> None:
    rows: dict[str, Any] = {"train": Items(X, Y), "test": Items(X, Y)} | {side: Items(with_a_fault(float("nan")), Y)}
    stream = class_incremental(**rows)
    with pytest.raises(DamagedImageError, match="sample 17: holds NaN, an infinity or"):
        train_one(CONFIG, method, 0, stream=stream)


def test_an_item_may_be_left_out() -> None:
    stream = class_incremental(Items(with_a_fault(float("nan")), Y), Items(X, Y))
    config = replace(CONFIG, data=replace(CONFIG.data, skip_damaged=True))
    with pytest.warns(UserWarning, match="sample 17: holds NaN"):
        assert train_one(config, "er", 0, stream=stream).status == "complete"


@pytest.mark.parametrize("method", ["er", "der++", "gradmix-class", "gradmix-sample"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("stored", [False, True])
def test_floats_of_any_width_are_learnt_as_the_models(stored: bool, dtype: torch.dtype, method: str) -> None:
    # The same numbers, so the same run.
    x = X.to(torch.float16)
    runs = []
    for kind in (dtype, torch.float32):
        rows: Any = Items(x.to(kind), Y) if stored else (x.to(kind).numpy(), Y.numpy())
        runs.append(train_one(CONFIG, method, 0, stream=class_incremental(rows, rows)))
    assert runs[0].status == "complete"
    assert np.array_equal(runs[0].accuracy, runs[1].accuracy)
    assert np.array_equal(runs[0].mixed_share, runs[1].mixed_share, equal_nan=True)
