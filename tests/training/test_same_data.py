"""Runs on data of one's own are compared if the data are the same."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import make_result

from gradmix.training.config import DataConfig, TrainConfig
from gradmix.training.reports import tables
from gradmix.training.runs.results import RunResult


def of(method: str, path: str, benchmark: str = "arrays") -> RunResult:
    """A run on the data at ``path``."""
    return make_result(method, benchmark=benchmark, config=TrainConfig(data=DataConfig(benchmark, Path(path))))


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of arrays that differ in one value, copies of the first, and two folders of images."""
    monkeypatch.chdir(tmp_path)
    for folder in ("copy", "flowers", "old/flowers", "leaves"):
        Path(folder).mkdir(parents=True)
    for name, value in (("a.npz", 0.0), ("copy/arrays.npz", 0.0), ("b.npz", 1.0)):
        np.savez(name, x_train=np.array([value]))


@pytest.mark.parametrize(
    ("one", "other", "benchmark"),
    [
        ("a.npz", "b.npz", "arrays"),
        ("copy", "b.npz", "arrays"),
        ("a.npz", "gone/b.npz", "arrays"),
        ("gone/a.npz", "gone/b.npz", "arrays"),
        ("flowers", "leaves", "image-folder"),
        ("gone/flowers", "leaves", "text-folder"),
    ],
)
def test_runs_of_different_data_are_refused_with_both_names(one: str, other: str, benchmark: str) -> None:
    with pytest.raises(ValueError, match=f"different data cannot be compared: {re.escape(f'{one}, {other};')}"):
        tables.summarise([of("er", one, benchmark), of("mixup", one, benchmark), of("remix", other, benchmark)])


@pytest.mark.parametrize(
    ("one", "other", "benchmark"),
    [
        ("a.npz", "./a.npz", "arrays"),
        ("a.npz", "copy", "arrays"),
        ("a.npz", "/another/machine/a.npz", "arrays"),
        ("flowers", "old/flowers", "image-folder"),
        ("a.npz", "b.npz", "split-mnist"),
    ],
)
def test_the_same_data_at_another_place_are_compared(one: str, other: str, benchmark: str) -> None:
    rows = tables.summarise([of("er", one, benchmark), of("mixup", other, benchmark)]).rows
    assert [row.label for row in rows] == ["er", "mixup"]
