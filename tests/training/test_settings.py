"""Which settings tell runs apart, and how nested ones are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradmix.training.config import MixConfig, OptimConfig, TrainConfig
from gradmix.training.runs.settings import RUNTIME_FIELDS, flatten, settings_of

BASE = TrainConfig()


@pytest.mark.parametrize(
    ("nested", "flat"),
    [
        ({}, []),
        ({"a": {}}, []),
        ({"a": {"b": {"c": 1}}, "d": None}, [("a.b.c", 1), ("d", None)]),
        ({"a": [{"b": 1}]}, [("a", [{"b": 1}])]),
    ],
    ids=["nothing", "an empty section", "deep", "a list stays"],
)
def test_flatten(nested: dict[str, Any], flat: list[tuple[str, Any]]) -> None:
    assert flatten(nested) == flat


CHANGED = {
    "methods": replace(BASE, methods=("mixup",)),
    "seeds": replace(BASE, seeds=(7,)),
    "output": replace(BASE, output=Path("x")),
    "device": replace(BASE, device="cuda:0"),
    "threads": replace(BASE, threads=5),
    "checkpoint": replace(BASE, checkpoint=0.0),
    "data.workers": replace(BASE, data=replace(BASE.data, workers=3)),
    "data.data_dir": replace(BASE, data=replace(BASE.data, data_dir=Path("elsewhere"))),
    "optim.lr": replace(BASE, optim=OptimConfig(lr=0.5)),
    "mix.originals": replace(BASE, mix=MixConfig(originals=not BASE.mix.originals)),
}


@pytest.mark.parametrize("key", CHANGED)
def test_circumstances_tell_nothing_apart(key: str) -> None:
    found, base = settings_of(CHANGED[key]), settings_of(BASE)
    assert [k for k in base if found[k] != base[k]] == ([] if key in RUNTIME_FIELDS else [key])


def test_every_circumstance_is_a_case_and_none_is_left_in() -> None:
    assert set(RUNTIME_FIELDS) <= set(CHANGED)
    assert not set(RUNTIME_FIELDS) & set(settings_of(BASE)) and "mix.alpha" in settings_of(BASE)
