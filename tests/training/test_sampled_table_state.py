"""A class table that grows in a method's state: it is resumed, and what does not fit the model is refused at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gradmix.estimators import feature
from gradmix.replay.buffer import ReplayBuffer
from gradmix.training.config import MixConfig
from gradmix.training.loop.clock import Clock
from gradmix.training.methods import METHODS, Context, StepSamples
from gradmix.training.models import build_model

CLASSES = 6


def method_after_a_step() -> Any:
    """gradmix-class with a table of three classes."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(12, 4, generator=generator), torch.arange(12) % 3
    buffer = ReplayBuffer(4)
    buffer.add(x, y)
    model = build_model("mlp", (4,), CLASSES, seed=0)
    context = Context(model, buffer, CLASSES, MixConfig(), generator, Clock(torch.device("cpu")))
    method = METHODS["gradmix-class"](context)
    method.backward(StepSamples(x, y, torch.full((12,), 1 / 12)))
    return method


@pytest.fixture(autouse=True)
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature, "TABLE_SAMPLES", 0)


def test_a_table_goes_on_growing_after_a_resume() -> None:
    method, other = method_after_a_step(), method_after_a_step()
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    later = StepSamples(torch.rand(4, 4), torch.tensor([5, 1, 5, 2]), torch.full((4,), 1 / 4))
    for one in (method, other):
        one.losses(later).__next__()
        assert one._mixup.table.classes.tolist() == [0, 1, 2, 5] and one._mixup.refreshes == 1
    assert torch.equal(method._mixup.table.inner, other._mixup.table.inner)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("features", torch.zeros(24, 255), "samples.features: got torch.float32 of shape"),
        ("features", torch.zeros(24, 256, dtype=torch.int64), "samples.features: got torch.int64, expected floats"),
        ("logits", torch.zeros(24, CLASSES + 1), "samples.logits: got torch.float32 of shape"),
        ("logits", torch.zeros(23, CLASSES), "samples.logits: got torch.float32 of shape"),
        ("y", torch.full((24,), CLASSES), "samples.y: got labels that are none of 6 classes"),
        ("y", torch.zeros(24, 2), "samples.y: got torch.float32 of shape"),
        ("y", [0] * 24, "samples.y: got list, expected a tensor"),
        ("appends_one", 1, "samples.appends_one: got int, expected a bool"),
    ],
)
def test_samples_that_do_not_fit_are_refused(name: str, value: Any, said: str) -> None:
    method = method_after_a_step()
    state = copy.deepcopy(method.state_dict())
    before = method._mixup.table
    state["mixup"]["table"]["samples"][name] = value
    with pytest.raises(ValueError, match=said):
        method.load_state_dict(state)
    assert method._mixup.table is before
