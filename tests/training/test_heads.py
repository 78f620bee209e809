"""Heads that grow: what stays to the bit, what is drawn from what, the optimiser's state, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradmix
from gradmix.model.head import HeadNotFoundError
from gradmix.training.models import build_model
from gradmix.training.models.growing_head import extend_state, grow_head


class Conv(nn.Module):
    """A network with a 1x1 convolution as its classifier."""

    def __init__(self, classes=3, bias=True):
        super().__init__()
        self.body = nn.Conv2d(1, 6, 3, padding=1)
        self.last = nn.Conv2d(6, classes, 1, bias=bias)

    def forward(self, x):
        return self.last(F.relu(self.body(x)).mean((2, 3), keepdim=True)).flatten(1)


def plain(bias=True, classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, classes, bias))


def transposed():
    model = plain()
    model[3].weight = nn.Parameter(model[3].weight.detach().T.contiguous().T)
    return model


MODELS = {
    "linear": (plain, "3"),
    "linear without bias": (lambda: plain(bias=False), "3"),
    "one class": (lambda: plain(classes=1), "3"),
    "float64": (lambda: plain().double(), "3"),
    "bfloat16": (lambda: plain().bfloat16(), "3"),
    "frozen weight": (lambda: frozen(plain()), "3"),
    "weight in columns": (transposed, "3"),
    "convolution": (Conv, "last"),
    "convolution without bias": (lambda: Conv(bias=False), "last"),
    "convolution, channels last": (lambda: Conv().to(memory_format=torch.channels_last), "last"),
    "evaluating": (lambda: plain().eval(), "3"),
}


def frozen(model):
    model[3].weight.requires_grad_(False)
    return model


def rows(model, n=5, seed=0):
    x = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return x.to(next(model.parameters()).dtype)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("by", ["name", "module", "example"])
def test_old_classes_stay_to_the_bit(case, by):
    build, name = MODELS[case]
    model = build()
    old = model.get_submodule(name)
    kept = copy.deepcopy(old)
    before_features = rows(model)
    global_state = torch.random.get_rng_state()
    how = {"name": {"head": name}, "module": {"head": old}, "example": {"example": before_features}}[by]
    new = grow_head(model, 7, **how)
    assert torch.equal(torch.random.get_rng_state(), global_state)
    assert model.get_submodule(name) is new and type(new) is type(old) and new is not old
    assert model(before_features).shape == (5, 7)
    before = len(kept.weight)
    assert [n for n, _ in new.named_parameters()] == [n for n, _ in kept.named_parameters()]
    for (label, wide), narrow in zip(new.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(wide[:before], narrow) and torch.equal(old.get_parameter(label), narrow)
        assert (wide.dtype, wide.device, wide.requires_grad) == (narrow.dtype, narrow.device, narrow.requires_grad)
        assert sorted(range(wide.ndim), key=wide.stride) == sorted(range(wide.ndim), key=narrow.stride)
        assert wide.shape == (7, *narrow.shape[1:]) and len(set(wide[before:].flatten().tolist())) > 1
        assert wide[before:].abs().max() <= 1 / math.sqrt(6) * 1.01
    assert new.training == kept.training
    shape = (new.out_features,) if isinstance(new, nn.Linear) else (new.out_channels,)
    assert shape == (7,) and new.extra_repr() == kept.extra_repr().replace(f"={before},", "=7,").replace(
        f"6, {before},", "6, 7,"
    )


@pytest.mark.parametrize("name", ["mlp", "resnet8", "vit-tiny"])
def test_own_models_need_no_example_and_old_classes_keep_their_logits(name):
    model = build_model(name, (1, 8, 8), 4).eval()
    x = torch.randn(3, 1, 8, 8)
    before = model(x)
    old = model.head
    new = grow_head(model, 6)
    after = model(x)
    # The parameters are the same to the bit; a matrix product of another shape may add in another order.
    assert torch.equal(new.weight[:4], old.weight) and torch.equal(new.bias[:4], old.bias)
    torch.testing.assert_close(after[:, :4], before, rtol=1e-6, atol=1e-6)
    assert after.shape == (3, 6)


def test_new_rows_are_those_of_torchs_layer():
    model = nn.Sequential(nn.Linear(4, 400), nn.Linear(400, 2))
    new = grow_head(model, 2002, head="1")
    drawn = new.weight[2:]
    assert drawn.abs().max().item() == pytest.approx(1 / 20, rel=1e-3)
    assert drawn.std().item() == pytest.approx(nn.Linear(400, 2000).weight.std().item(), rel=0.01)
    assert new.bias[2:].abs().max().item() == pytest.approx(1 / 20, rel=0.01)
    assert abs(drawn.mean().item()) < 1e-3


def test_new_rows_follow_the_seed_and_the_generator():
    def grown(**how):
        torch.manual_seed(0)
        model = plain()
        torch.rand(how.pop("elsewhere", 0))
        return grow_head(model, 5, head="3", **how).weight

    assert torch.equal(grown(seed=1), grown(seed=1, elsewhere=3)) and not torch.equal(grown(seed=1), grown(seed=2))
    first, again = (grown(generator=torch.Generator().manual_seed(4), seed=seed) for seed in (0, 1))
    assert torch.equal(first, again) and not torch.equal(first, grown())


def test_growing_twice_with_one_seed_draws_other_rows():
    model = plain(classes=2)
    grow_head(model, 4, head="3", seed=3)
    new = grow_head(model, 6, head="3", seed=3)
    assert not torch.equal(new.weight[2:4], new.weight[4:6])


def test_as_many_classes_change_nothing():
    model = plain()
    assert grow_head(model, 3, head="3") is model[3]


def test_a_head_in_two_places_stays_one():
    model = plain()
    model.add_module("alias", nn.Sequential(model[3]))
    new = grow_head(model, 5, head="3")
    assert model[3] is new and model.alias[0] is new


def test_selection_finds_the_new_head():
    model = plain()
    x, y = rows(model, 8), torch.arange(8) % 3
    gradmix.select_pairs(model, (x, y), (x, y))
    new = grow_head(model, 5)
    wider = torch.arange(8) % 5
    pairs = gradmix.select_pairs(model, (x, wider), (x, wider), generator=torch.Generator().manual_seed(0))
    named = gradmix.select_pairs(model, (x, wider), (x, wider), head=new, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pairs.alignment, named.alignment) and pairs.mix()[1].shape == (8, 5)


class Double(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    model = plain()
    model[3].register_forward_hook(lambda *_: None)
    return model


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    return model


def normed(wrap):
    model = plain()
    wrap(model[3])
    return model


def overridden():
    model = plain()
    model[3].forward = lambda x: x
    return model


REFUSED = {
    "fewer": (plain, 2, {"head": "3"}, ValueError, "num_classes: got 2, expected at least the 3 that the head has"),
    "none": (plain, 0, {"head": "3"}, ValueError, "num_classes: got 0"),
    "a float": (plain, 4.0, {"head": "3"}, TypeError, "num_classes: got float, expected an int"),
    "a bool": (plain, True, {"head": "3"}, TypeError, "num_classes: got bool"),
    "no such name": (plain, 5, {"head": "fc"}, HeadNotFoundError, "head: the model has no module 'fc'"),
    "no linear layer": (plain, 5, {"head": "2"}, HeadNotFoundError, "head: got ReLU"),
    "not known": (plain, 5, {}, HeadNotFoundError, "head: not known yet"),
    "not a head": (plain, 5, {"head": 3}, TypeError, "head: got int"),
    "hooks": (hooked, 5, {"head": "3"}, ValueError, "head: 3 has hooks"),
    "tied": (tied, 8, {"head": "1"}, ValueError, "head: its weight is tied to 0.weight"),
    "parametrised": (
        lambda: normed(nn.utils.parametrizations.spectral_norm),
        5,
        {"head": "3"},
        ValueError,
        "head: 3 has a parametrised weight",
    ),
    "forward of a class": (
        lambda: nn.Sequential(Double(6, 3)),
        5,
        {"head": "0"},
        ValueError,
        "head: 0 is a Double with a forward of its own, expected Linear",
    ),
    "forward of its own": (overridden, 5, {"head": "3"}, ValueError, "head: 3 is a Linear with a forward of its own"),
    "the model itself": (
        lambda: nn.Linear(6, 3),
        5,
        {"example": torch.ones(1, 6)},
        ValueError,
        "model: got the Linear",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_as_it_was(case):
    build, classes, how, kind, message = REFUSED[case]
    model = build()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    modules = [id(m) for m in model.modules()]
    with pytest.raises(kind, match=message):
        grow_head(model, classes, **how)
    assert [id(m) for m in model.modules()] == modules
    assert {name: id(p) for name, p in model.named_parameters()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())


# ------------------------------------------------------------------------------------------------ the optimiser's state


OPTIMISERS = {
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "groups": lambda p: torch.optim.SGD([{"params": q, "lr": 0.1 + n} for n, q in enumerate(p)], lr=1, momentum=0.9),
}


def step(model, optimiser, x, y):
    optimiser.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimiser.step()


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_optimisers_state_grows_with_the_head(name, stepped):
    model = plain()
    optimiser = OPTIMISERS[name](list(model.parameters()))
    x, y = rows(model, 6), torch.arange(6) % 3
    for _ in range(2 * stepped):
        step(model, optimiser, x, y)
    old = model[3]
    before = copy.deepcopy(optimiser.state_dict())
    new = grow_head(model, 5, head="3")
    extend_state(optimiser, old, new)
    after = optimiser.state_dict()
    assert after["param_groups"] == before["param_groups"] and after["state"].keys() == before["state"].keys()
    assert [id(p) for g in optimiser.param_groups for p in g["params"]] == [id(p) for p in model.parameters()]
    assert not {id(p) for p in optimiser.state} & {id(p) for p in old.parameters()}
    for key, values in before["state"].items():
        for label, value in values.items():
            found = after["state"][key][label]
            if key < 2 or not isinstance(value, torch.Tensor) or value.ndim == 0:
                assert found is value or torch.equal(torch.as_tensor(found), torch.as_tensor(value))
            else:
                assert torch.equal(found[:3], value) and found.shape[0] == 5 and not found[3:].any()
                assert found.stride() == list(model.parameters())[key].stride()
    losses = []
    for _ in range(20):
        losses.append(F.cross_entropy(model(x), torch.arange(6) % 5).item())
        step(model, optimiser, x, torch.arange(6) % 5)
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


def test_a_grown_head_that_is_told_nothing_of_new_classes_trains_as_the_old_one():
    """With the new logits masked out, momentum and all, the old classes learn as if nothing had been done."""
    models = [plain().double()]
    models.append(copy.deepcopy(models[0]))
    x, y = rows(models[0], 6), torch.arange(6) % 3
    optimisers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
    for n in range(6):
        if n == 3:
            old = models[1][3]
            extend_state(optimisers[1], old, grow_head(models[1], 5, head="3"))
        for model, optimiser in zip(models, optimisers, strict=True):
            optimiser.zero_grad()
            F.cross_entropy(model(x)[:, :3], y).backward()
            optimiser.step()
    torch.testing.assert_close(models[1](x)[:, :3], models[0](x))


def test_parameters_that_the_optimiser_did_not_have_stay_out():
    model = plain()
    optimiser = torch.optim.SGD([model[3].bias, model[1].weight], lr=0.1, momentum=0.9)
    old = model[3]
    new = grow_head(model, 5, head="3")
    extend_state(optimiser, old, new)
    assert [id(p) for p in optimiser.param_groups[0]["params"]] == [id(new.bias), id(model[1].weight)]


def test_a_head_that_did_not_grow_changes_nothing():
    model = plain()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    extend_state(optimiser, model[3], grow_head(model, 3, head="3"))
    assert [id(p) for p in optimiser.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def strange(model):
    """An optimiser whose state of the head is of a shape of its own, as factored moments are."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    optimiser.state[model[3].bias]["momentum_buffer"] = torch.ones(3)
    optimiser.state[model[3].weight]["row"] = torch.ones(3, 1)
    return optimiser


STATES = {
    "not its head": (
        lambda model: torch.optim.SGD([model[1].weight], lr=0.1),
        lambda new: new,
        "old: the optimiser has none of its parameters",
    ),
    "factored": (strange, lambda new: new, r"optimiser: SGD's row of the head's weight is a tensor \(3, 1\)"),
    "narrower": (
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda new: nn.Linear(6, 2),
        r"new: its weight is \(2, 6\), expected \(3, 6\) with more rows",
    ),
    "other features": (
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda new: nn.Linear(5, 5),
        r"new: its weight is \(5, 5\)",
    ),
    "no bias": (
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda new: nn.Linear(6, 5, bias=False),
        "new: its bias is nothing",
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_refused_states_leave_the_optimiser_as_it_was(case):
    make, replace, message = STATES[case]
    model = plain()
    optimiser = make(model)
    before = [id(p) for p in optimiser.param_groups[0]["params"]]
    states = {id(p): dict(values) for p, values in optimiser.state.items()}
    old = model[3]
    new = grow_head(model, 5, head="3")
    with pytest.raises(ValueError, match=message):
        extend_state(optimiser, old, replace(new))
    assert [id(p) for p in optimiser.param_groups[0]["params"]] == before
    assert {id(p): dict(values) for p, values in optimiser.state.items()}.keys() == states.keys()
