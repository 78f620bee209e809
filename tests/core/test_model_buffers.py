"""Buffers that a forward pass in evaluation mode writes are put back, by every function and also after an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import rows
from no_looking import behind_the_host
from test_launches import Launches
from test_promises import CALLS
from torch import Tensor, nn

import gradmix
from gradmix.model.unchanged import leave_unchanged


class Writing(nn.Module):
    """A network that writes its buffers in every forward pass, in the way it was told to."""

    def __init__(self, write: Callable[[Writing], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Tanh()), nn.Linear(8, 5)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("cache", torch.zeros(5, 8), persistent=False)
        self.register_buffer("wide", torch.zeros(1, 8).expand(5, 8))
        self.register_buffer("nothing", None)
        self.inner = nn.BatchNorm1d(8)
        self.filled, self.write, self.fails = 0, write, False
        self(rows(3)[0])

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        self.h = h.detach()
        self.write(self)
        del self.h
        if self.fails:
            raise RuntimeError("out of luck")
        return self.fc(self.inner(h) if not self.training else h)


def appended(m: Writing) -> None:
    m.cache[m.filled % 5] = m.h[0]
    m.filled += 1


def grown(m: Writing) -> None:
    m.cache = torch.cat([m.cache, m.h[:1]])
    m.filled = len(m.cache)


def registered(m: Writing) -> None:
    if "late" not in m._buffers:
        m.register_buffer("late", m.h.mean(0), persistent=False)
        m.has_late = True
    assert m.has_late


def deleted(m: Writing) -> None:
    if "cache" in m._buffers:
        del m.cache


WRITES: dict[str, Callable[[Writing], None]] = {
    "nothing": lambda m: None,
    "a counter in place": lambda m: m.steps.add_(1),
    "a counter in place of another": lambda m: setattr(m, "steps", m.steps + 1),
    "an average in place": lambda m: m.mean.mul_(0.9).add_(m.h.mean(0), alpha=0.1),
    "an average through data": lambda m: m.mean.data.mul_(0.9).add_(m.h.mean(0), alpha=0.1),
    "an average through a detached view": lambda m: m.mean.detach()[2:4].add_(1),
    "an average by new data": lambda m: setattr(m.mean, "data", m.mean + m.h.mean(0)),
    "an average of parameters": lambda m: m.mean.lerp_(m.fc.weight[0], 0.1),
    "a cache appended to": appended,
    "a cache that grows": grown,
    "a cache that grows in place": lambda m: m.cache.resize_(len(m.cache) + 1, 8).fill_(3.0),
    "a buffer registered": registered,
    "a buffer deleted": deleted,
    "a buffer instead of none": lambda m: setattr(m, "nothing", m.h.mean(0)),
    "an expanded buffer": lambda m: m.wide[:1].data.add_(1),
    "statistics of a layer inside": lambda m: m.inner.running_mean.add_(m.h.mean(0)),
    "a layer inside in training": lambda m: (m.inner.train(), m.inner(m.h)) if len(m.h) > 1 else None,
}


def snapshot(model: Writing) -> dict:
    return {
        "buffers": {name: (id(b), None if b is None else b.clone()) for name, b in all_buffers(model).items()},
        "requires grad": [b.requires_grad for b in model.buffers()],
        "state": list(model.state_dict()),
        "filled": model.filled,
        "late": hasattr(model, "has_late"),
        "training": [m.training for m in model.modules()],
    }


def all_buffers(model: nn.Module) -> dict[str, Tensor | None]:
    return {f"{at}.{name}": b for at, m in model.named_modules() for name, b in m._buffers.items()}


def assert_same(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    assert before["buffers"].keys() == after["buffers"].keys()
    for name, (identity, value) in before["buffers"].items():
        found, other = after["buffers"][name]
        assert found == identity, name
        assert (value is None) == (other is None) and (value is None or torch.equal(value, other)), name
    assert {k: v for k, v in before.items() if k != "buffers"} == {k: v for k, v in after.items() if k != "buffers"}


def written(name: str) -> Writing:
    model = Writing(lambda m: None).eval()
    model.write = WRITES[name]
    return model


@pytest.mark.parametrize("name", [name for name in WRITES if name != "nothing"], ids=str)
def test_the_writes_below_do_happen(name: str) -> None:
    model = written(name)
    before = snapshot(model)
    with torch.no_grad():
        model(rows(3)[0])
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", WRITES, ids=str)
def test_what_a_forward_pass_writes_is_put_back(name: str, fails: bool) -> None:
    model = written(name)
    model.fails = fails
    before = snapshot(model)
    for grad in (False, True):
        try:
            with leave_unchanged(model), torch.set_grad_enabled(grad):
                for _ in range(2):
                    model(rows(3)[0])
        except RuntimeError as error:
            assert fails and str(error) == "out of luck"
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("name", ["an average in place", "an average through data", "a cache that grows"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_function_puts_buffers_back(call: str, name: str) -> None:
    model = written(name)
    before = snapshot(model)
    CALLS[call](model, rows(8, 2), rows(6, 1))
    assert_same(before, snapshot(model))


def test_buffers_that_were_only_read_are_not_written() -> None:
    """A graph of the caller's that kept them would be refused by autograd otherwise."""
    model = Writing(lambda m: None).eval()
    versions = [b._version for b in model.buffers()]
    loss = model(rows(3)[0]).sum()
    gradmix.class_gradients(model, rows(6, 1), rank=2)
    assert [b._version for b in model.buffers()] == versions
    loss.backward()


def test_plain_attributes_stay_where_no_buffer_was_written() -> None:
    """They are the model's own affair, unless they may say how far a buffer is filled."""
    model = Writing(lambda m: setattr(m, "filled", m.filled + 1)).eval()
    before = model.filled
    gradmix.class_gradients(model, rows(6, 1), rank=2)
    assert model.filled > before


def test_buffers_on_meta_and_lazy_ones_are_left_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d(), nn.LazyLinear(3))
    model.register_buffer("shape_only", torch.zeros(3, device="meta"))
    with leave_unchanged(model):
        model(rows(3)[0])
    assert model[1].running_mean is not None and model.shape_only.is_meta


def test_buffers_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = Writing(WRITES["nothing"]).eval()
    model.write = torch.inference_mode()(WRITES["an average in place"])
    before = model.mean.clone()
    with leave_unchanged(model):
        model(rows(3)[0])
        assert not torch.equal(model.mean, before)
    assert model.mean.is_inference() and torch.equal(model.mean, before)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.register_buffer("steps", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1.0)
        return self.fc(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated by the newest versions
def test_buffers_of_a_compiled_module() -> None:
    model = torch.jit.script(Counting())
    with leave_unchanged(model):
        model(rows(3)[0])
        assert model.steps.tolist() == [1.0, 1.0]
    assert model.steps.tolist() == [0.0, 0.0]
    gradmix.class_gradients(nn.Sequential(model, nn.Linear(5, 5)), rows(6, 1), layers=["1"])
    assert model.steps.tolist() == [0.0, 0.0]


def test_the_number_of_calls_does_not_grow_with_the_number_of_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a launch on a GPU, and a ResNet-50 has 159 buffers."""
    behind_the_host(monkeypatch)
    counts = []
    for number in (2, 20):
        model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(number)))
        with Launches() as launches, leave_unchanged(model):
            pass
        counts.append(launches.counts.total())
    assert counts == [4, 4]  # to and fro, of float32 and int64
