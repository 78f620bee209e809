"""The methods' definitions, one by one, each against plain loops over rows."""

from __future__ import annotations

import copy
import hashlib
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import thinning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmix.replay.buffer import BufferSamples, ReplayBuffer
from gradmix.training.config import DataConfig, MixConfig, OptimConfig, ReplayConfig, TrainConfig, from_dict
from gradmix.training.loop.clock import Clock
from gradmix.training.loop.trainer import train_one
from gradmix.training.method_names import PRESETS
from gradmix.training.methods import (
    METHODS,
    Context,
    Finetune,
    Mixup,
    Passes,
    Pixels,
    StepSamples,
    a_gem,
    balanced_mixup,
    composition,
    cutmix,
    dark_replay,
    manifold_mixup,
    policies,
    remix,
)
from gradmix.training.models import build_model
from gradmix.training.streams.benchmarks import make_stream

CLASSES = 5
IMAGE = (1, 6, 5)


def make_rows(n: int, shape: tuple[int, ...] = IMAGE, seed: int = 0, candidates: int = 0) -> StepSamples:
    g = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        return torch.rand(count, *shape, generator=g), torch.randint(CLASSES, (count,), generator=g)

    x, y = draw(n)
    weight = torch.rand(n, generator=g)
    return StepSamples(x, y, weight, draw(candidates) if candidates else None)


def make_context(shape: tuple[int, ...] = IMAGE, name: str = "mlp", **changes) -> Context:
    context = Context(
        model=build_model(name, shape, CLASSES),
        buffer=ReplayBuffer(4),
        num_classes=CLASSES,
        mix=MixConfig(),
        generator=torch.Generator().manual_seed(3),
        clock=Clock(torch.device("cpu")),
        counts=torch.tensor([90, 30, 10, 29, 31]),
    )
    return replace(context, **changes)


def set_lam(monkeypatch: pytest.MonkeyPatch, module, lam: float) -> None:
    monkeypatch.setattr(module, "draw_lam", lambda alpha, generator: lam)


def one_hot(label: int) -> list[float]:
    return [float(c == label) for c in range(CLASSES)]


def partners_of(method: Mixup, rows: StepSamples) -> tuple[Tensor, Tensor]:
    """The partners that ``method`` would draw next, without drawing them."""
    state = method.context.generator.get_state()
    partners = method.draw_partners(rows)
    method.context.generator.set_state(state)
    return partners


def soft_cross_entropy(logits: Tensor, y: list[list[float]], weight: Tensor) -> float:
    """sum_n w_n sum_c -y_nc log p_nc, row by row in float64."""
    total = 0.0
    for z, target, w in zip(logits.detach().double(), y, weight.double(), strict=True):
        log_p = z - z.exp().sum().log()
        total += float(w) * sum(-t * float(lp) for t, lp in zip(target, log_p, strict=True))
    return total


LAMS = {"half": 0.5, "little of the row": 0.07, "nothing of the row": 0.0, "all of the row": 1.0, "most": 0.93}
ROWS = {"one row": 1, "odd": 7, "two": 2}


# ------------------------------------------------------------------------------------------------------ Manifold Mixup


def by_stage(model: nn.Module, x: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """The parts of an MLP between its mixing layers."""
    return [lambda h: F.relu(model.fc1(h.flatten(1))), lambda h: F.relu(model.fc2(h)), model.head]


@pytest.mark.parametrize("lam", LAMS.values(), ids=LAMS)
@pytest.mark.parametrize("n", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("candidates", [0, 9], ids=["own samples", "candidates"])
def test_manifold_mixup_mixes_at_one_layer(monkeypatch, lam: float, n: int, layer: int, candidates: int) -> None:
    rows = make_rows(n, candidates=candidates)
    context = make_context()
    set_lam(monkeypatch, manifold_mixup, lam)
    set_lam(monkeypatch, sys.modules[Mixup.__module__], lam)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([layer]))
    method = METHODS["manifold-mixup"](context)
    other_x, other_y = partners_of(method, rows)
    loss = method.loss(rows)
    parts = by_stage(context.model, rows.x)
    expected = []
    for i in range(n):
        own, other = rows.x[i : i + 1], other_x[i : i + 1]
        for part in parts[:layer]:
            own, other = part(own), part(other)
        h = lam * own + (1 - lam) * other
        for part in parts[layer:]:
            h = part(h)
        expected.append(h[0])
    y = [
        [lam * a + (1 - lam) * b for a, b in zip(one_hot(int(own)), one_hot(int(other)), strict=True)]
        for own, other in zip(rows.y, other_y, strict=True)
    ]
    assert loss.item() == pytest.approx(soft_cross_entropy(torch.stack(expected), y, rows.weight), rel=1e-5)
    assert not any(module._forward_pre_hooks for module in context.model.modules())


def test_manifold_mixup_draws_every_layer() -> None:
    method = METHODS["manifold-mixup"](make_context())
    mixed_at: set[str] = set()
    original = manifold_mixup.mixed_forward

    def noted(model, stage, *rest):
        mixed_at.add(next(name for name, module in model.named_modules() if module is stage))
        return original(model, stage, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifold_mixup, "mixed_forward", noted)
        for _ in range(30):
            method.loss(make_rows(3))
    assert mixed_at == {"fc2", "head"}


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
@pytest.mark.parametrize("stage", [0, 1])
def test_manifold_mixup_in_a_resnet_with_lam_1_is_the_plain_pass(name: str, stage: int) -> None:
    model = build_model(name, (3, 8, 8), CLASSES)
    x, partner = torch.rand(4, 3, 8, 8), torch.tensor([3, 2, 0, 1])
    plain = copy.deepcopy(model)(x)
    torch.testing.assert_close(manifold_mixup.mixed_forward(model, model.hidden_stages[stage], x, partner, 1.0), plain)
    mixed = manifold_mixup.mixed_forward(model, model.hidden_stages[stage], x, partner, 0.4)
    assert (mixed - plain).abs().max() > 1e-4


def test_manifold_mixup_with_originals(monkeypatch) -> None:
    rows = make_rows(5)
    set_lam(monkeypatch, manifold_mixup, 0.3)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([1]))
    context = make_context()
    mixed = METHODS["manifold-mixup"](context).loss(rows)
    context = replace(context, mix=MixConfig(originals=True), generator=torch.Generator().manual_seed(3))
    both = METHODS["manifold-mixup"](context).loss(rows)
    plain = METHODS["er"](context).loss(rows)
    torch.testing.assert_close(both, 0.5 * (mixed + plain))


def test_manifold_mixup_in_a_compiled_model_and_under_autocast(monkeypatch) -> None:
    rows = make_rows(5)
    set_lam(monkeypatch, manifold_mixup, 0.3)
    context = make_context()
    monkeypatch.setattr(manifold_mixup.torch, "randint", lambda *_, **__: torch.tensor([2]))
    plain = METHODS["manifold-mixup"](context).loss(rows)
    compiled = torch.compile(context.model, backend="eager")
    compiled_context = replace(context, model=compiled, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(METHODS["manifold-mixup"](compiled_context).loss(rows), plain, rtol=0, atol=0)
    cast_context = replace(
        context,
        generator=torch.Generator().manual_seed(3),
        passes=Passes(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    )
    loss = METHODS["manifold-mixup"](cast_context).backward(rows)
    assert loss.item() == pytest.approx(plain.item(), rel=0.02)
    assert all(torch.isfinite(p.grad).all() for p in context.model.parameters())


def test_hidden_stages_of_any_other_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 4), nn.ReLU(), nn.Linear(4, CLASSES))
    assert manifold_mixup.hidden_stages(model) == tuple(model)[1:]
    rows = make_rows(3)
    method = METHODS["manifold-mixup"](make_context(model=model))
    assert all(torch.isfinite(method.loss(rows)) for _ in range(8))
    with pytest.raises(ValueError, match="model: Linear has no hidden stages, expected at least two child modules"):
        manifold_mixup.hidden_stages(nn.Linear(2, 2))


class Odd(nn.Module):
    """Calls its second layer with other rows, twice, or not at all."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second, self.way = nn.Linear(4, 4), nn.Linear(4, 4), way

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.way == "never":
            return h
        return self.second(h[:-1]) if self.way == "fewer samples" else self.second(self.second(h))


ODD = {
    "fewer samples": r"second was called with a tensor \(5, 4\), expected a tensor of 6 samples",
    "twice": r"second was called with a tensor \(3, 4\), expected a tensor of 6 samples",
    "never": "second was called 0 times in a forward pass, expected once",
}


@pytest.mark.parametrize("way", ODD)
def test_mixed_forward_refuses_stages_it_cannot_mix_at_and_leaves_no_hook(way: str) -> None:
    model = Odd(way)
    with pytest.raises(ValueError, match=f"model: {ODD[way]}"):
        manifold_mixup.mixed_forward(model, model.second, torch.rand(6, 4), torch.arange(3), 0.5)
    assert not model.second._forward_pre_hooks


# -------------------------------------------------------------------------------------------------------------- CutMix


@pytest.mark.parametrize("lam", LAMS.values(), ids=LAMS)
@pytest.mark.parametrize("n", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 1, 9), (2, 1, 1)], ids=str)
def test_cutmix_pastes_one_box_and_weighs_labels_by_it(monkeypatch, lam, n, shape) -> None:
    rows = make_rows(n, shape)
    context = make_context(shape)
    set_lam(monkeypatch, cutmix, lam)
    method = METHODS["cutmix"](context)
    boxes: list[tuple[int, int, int, int]] = []
    draw = cutmix.draw_box
    monkeypatch.setattr(cutmix, "draw_box", lambda *a: boxes.append(draw(*a)) or boxes[-1])
    partners: list[tuple[Tensor, Tensor]] = []
    drawn = method.draw_partners
    monkeypatch.setattr(method, "draw_partners", lambda r: partners.append(drawn(r)) or partners[-1])
    before = rows.x.clone()
    x, y = method.mix(rows, None)
    assert torch.equal(rows.x, before)
    (top, bottom, left, right), (other_x, other_y) = boxes[0], partners[0]
    inside = 0
    for row in range(shape[1]):
        for column in range(shape[2]):
            pasted = top <= row < bottom and left <= column < right
            inside += pasted
            assert torch.equal(x[:, :, row, column], (other_x if pasted else rows.x)[:, :, row, column])
    kept = 1 - inside / (shape[1] * shape[2])
    for i in range(n):
        own, other = one_hot(int(rows.y[i])), one_hot(int(other_y[i]))
        assert y[i].tolist() == pytest.approx([kept * a + (1 - kept) * b for a, b in zip(own, other, strict=True)])


def test_boxes_have_their_area_and_centres_everywhere() -> None:
    g = torch.Generator().manual_seed(0)
    assert cutmix.draw_box(8, 6, 1.0, g)[1] - cutmix.draw_box(8, 6, 1.0, g)[0] <= 0
    seen = torch.zeros(8, 6)
    areas = []
    for _ in range(400):
        top, bottom, left, right = cutmix.draw_box(8, 6, 0.75, g)
        assert 0 <= top < bottom <= 8 and 0 <= left < right <= 6
        seen[top:bottom, left:right] += 1
        areas.append((bottom - top) * (right - left))
    assert max(areas) == 4 * 3  # a quarter of 48: half of each side
    assert min(areas) < 12 and (seen > 0).all()


def test_cutmix_refuses_rows_that_are_no_images() -> None:
    with pytest.raises(
        ValueError, match=r"x: got samples of shape \(3, 7\), expected images \(N, C, H, W\) for cutmix"
    ):
        METHODS["cutmix"](make_context((7,))).loss(make_rows(3, (7,)))


# --------------------------------------------------------------------------------------------------------------- Remix


def remix_weight(lam: float, own: float, other: float) -> float:
    if own / other >= 3 and lam < 0.5:
        return 0.0
    if own / other <= 1 / 3 and 1 - lam < 0.5:
        return 1.0
    return lam


@pytest.mark.parametrize("lam", [0.0, 0.2, 0.4999, 0.5, 0.5001, 0.8, 1.0])
def test_remix_gives_the_label_to_the_rarer_class(monkeypatch, lam: float) -> None:
    context = make_context()
    set_lam(monkeypatch, remix, lam)
    rows = make_rows(40)
    method = METHODS["remix"](context)
    other_x, other_y = partners_of(method, rows)
    x, y = method.mix(rows, None)
    torch.testing.assert_close(x, lam * rows.x + (1 - lam) * other_x)
    counts = context.counts.tolist()
    weights = set()
    for i in range(40):
        weight = remix_weight(lam, counts[rows.y[i]], counts[other_y[i]])
        weights.add(weight)
        own, other = one_hot(int(rows.y[i])), one_hot(int(other_y[i]))
        expected = [weight * a + (1 - weight) * b for a, b in zip(own, other, strict=True)]
        assert y[i].tolist() == pytest.approx(expected, abs=1e-6)
    assert len(weights) == (1 if lam in (0.0, 0.5, 1.0) else 2)


def test_remix_at_the_very_ratio_and_without_counts() -> None:
    # 90/30 is kappa itself, 30/90 its inverse; 89/30 is not yet.
    own, other = torch.tensor([90, 30, 89, 0, 0]), torch.tensor([30, 90, 30, 0, 30])
    assert remix.label_weight(0.25, own, other).tolist() == [0.0, 0.25, 0.25, 0.25, 0.25]
    assert remix.label_weight(0.75, own, other).tolist() == [0.75, 1.0, 0.75, 0.75, 1.0]
    with pytest.raises(ValueError, match=r"counts: got shape \(0,\), expected \(5,\) for remix"):
        METHODS["remix"](make_context(counts=torch.zeros(0, dtype=torch.int64))).loss(make_rows(3))


@pytest.mark.parametrize("candidates", [0, 50])
@pytest.mark.parametrize("name", ["gradmix-class", "gradmix-sample"])
def test_selected_pairs_have_remix_s_labels_on_request(name: str, candidates: int) -> None:
    buffer, rows = ReplayBuffer(4), make_rows(40, candidates=candidates)
    kept = make_rows(20, seed=1)
    buffer.add(kept.x, kept.y)
    other = (rows.x, rows.y) if rows.candidates is None else rows.candidates
    changed = 0
    for seed in range(4):
        context = make_context(buffer=buffer, mix=MixConfig(remix_labels=True))
        method = METHODS[name](context)
        context.generator.manual_seed(seed)
        y = method.mixture(rows, None).y
        # The inputs are mixed elsewhere or here; the labels are the same.
        context.generator.manual_seed(seed)
        x, same = method.mix(rows, None)
        assert torch.equal(y, same)
        pairs, counts = method._pairs, context.counts.tolist()
        lam = pairs.lam.view(-1, 1, 1, 1)
        torch.testing.assert_close(x, lam * rows.x + (1 - lam) * other[0][pairs.partner])
        for i, weight in enumerate(pairs.lam.tolist()):
            mine, partner = int(rows.y[i]), int(other[1][pairs.partner[i]])
            given = remix_weight(weight, counts[mine], counts[partner])
            changed += given != weight and mine != partner
            expected = [given * a + (1 - given) * b for a, b in zip(one_hot(mine), one_hot(partner), strict=True)]
            assert y[i].tolist() == pytest.approx(expected, abs=1e-6)
    assert changed > 10


# ----------------------------------------------------------------------------------------------------- Balanced-MixUp


@pytest.mark.parametrize("lam", LAMS.values(), ids=LAMS)
@pytest.mark.parametrize("n", ROWS.values(), ids=ROWS)
def test_balanced_mixup_mixes_with_the_balanced_rows(monkeypatch, lam: float, n: int) -> None:
    rows = make_rows(n, candidates=n)
    monkeypatch.setattr(balanced_mixup, "draw_balanced_lam", lambda alpha, generator: lam)
    method = METHODS["balanced-mixup"](make_context())
    other_x, other_y = partners_of(method, rows)
    assert sorted(other_y.tolist()) == sorted(rows.candidates[1].tolist())
    x, y = method.mix(rows, None)
    for i in range(n):
        torch.testing.assert_close(x[i], (1 - lam) * rows.x[i] + lam * other_x[i])
        own, other = one_hot(int(rows.y[i])), one_hot(int(other_y[i]))
        assert y[i].tolist() == pytest.approx([(1 - lam) * a + lam * b for a, b in zip(own, other, strict=True)])


def test_balanced_mixup_draws_from_beta_alpha_1() -> None:
    assert METHODS["balanced-mixup"].needs.balanced and not METHODS["mixup"].needs.balanced
    g = torch.Generator().manual_seed(0)
    lams = np.array([balanced_mixup.draw_balanced_lam(0.2, g) for _ in range(4000)])
    # Beta(a, 1) has the distribution function t^a.
    for t in (0.01, 0.1, 0.5, 0.9):
        assert (lams <= t).mean() == pytest.approx(t**0.2, abs=0.03)


@pytest.mark.parametrize(("candidates", "got"), [(0, "none"), (2, "2")])
def test_balanced_mixup_needs_balanced_rows(candidates: int, got: str) -> None:
    with pytest.raises(
        ValueError, match=f"candidates: got {got}, expected 3 class-balanced samples for balanced-mixup"
    ):
        METHODS["balanced-mixup"](make_context()).loss(make_rows(3, candidates=candidates))


# --------------------------------------------------------------------------------------------------------------- A-GEM


def vector(tensors) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


PROJECTIONS = {
    "against": ([1.0, -2.0, 0.5], [-1.0, 1.0, 3.0], True),
    "straight against": ([1.0, 2.0, 3.0], [-2.0, -4.0, -6.0], True),
    "orthogonal": ([1.0, 1.0, 0.0], [1.0, -1.0, 0.0], False),
    "along": ([1.0, 1.0, 0.0], [1.0, 1.0, 5.0], False),
    "no reference": ([1.0, 1.0, 0.0], [0.0, 0.0, 0.0], False),
}


@pytest.mark.parametrize("case", PROJECTIONS)
@pytest.mark.parametrize("scale", [1.0, 2.0**16, 2.0**-20])
def test_projection(case: str, scale: float) -> None:
    g, r, against = PROJECTIONS[case]
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = scale * torch.tensor(g[:2]), scale * torch.tensor([[g[2]]])
    reference = [scale * torch.tensor(r[:2]), scale * torch.tensor([[r[2]]]), None]
    a_gem.project(parameters, reference)
    after = vector([parameters[0].grad, parameters[1].grad]) / scale
    assert parameters[2].grad is None
    g64, r64 = torch.tensor(g).double(), torch.tensor(r).double()
    if against:
        torch.testing.assert_close(after, g64 - (g64 @ r64) / (r64 @ r64) * r64, rtol=0, atol=1e-6)
        assert float(after @ r64) == pytest.approx(0, abs=1e-5)
    else:
        assert torch.equal(after, g64)


def test_projection_with_gradients_missing_and_not_finite() -> None:
    used, unused, other = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    used.grad, other.grad = torch.tensor([-2.0]), torch.tensor([7.0])
    a_gem.project([used, unused, other], [torch.tensor([1.0]), torch.tensor([1.0]), None])
    assert used.grad.tolist() == [-1.0] and unused.grad.tolist() == [1.0] and other.grad.tolist() == [7.0]
    a_gem.project([used], [None])
    assert used.grad.tolist() == [-1.0]
    for bad in (math.nan, math.inf):
        used.grad = torch.tensor([-2.0])
        a_gem.project([used], [torch.tensor([bad])])
        assert not torch.isfinite(used.grad).any()  # for the scaler to see


@pytest.mark.parametrize("scale", [None, 1024.0], ids=["plain", "scaled"])
@pytest.mark.parametrize("against", [True, False])
def test_a_gem_step(scale: float | None, against: bool) -> None:
    rows = make_rows(6)
    y = (rows.y + 1) % CLASSES if against else rows.y
    replayed = BufferSamples(rows.x, y, {})
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    context = make_context(draw_replayed=lambda: replayed, passes=Passes(scaler=scaler))
    calls = []
    context.model.register_forward_hook(lambda *_: calls.append(1))
    method = METHODS["a-gem"](context)
    loss = method.backward(rows)
    assert len(calls) == 2 and not method.needs.replayed
    plain = copy.deepcopy(context.model)
    parameters = list(plain.parameters())
    current = (F.cross_entropy(plain(rows.x), rows.y, reduction="none") * rows.weight).sum()
    g = vector(torch.autograd.grad(current, parameters))
    r = vector(torch.autograd.grad(F.cross_entropy(plain(rows.x), y), parameters))
    assert loss.item() == pytest.approx(current.item(), rel=1e-6)
    expected = g - min(float(g @ r), 0.0) / (r @ r) * r
    assert (float(g @ r) < 0) == against
    got = vector(p.grad for p in context.model.parameters()) / (scale or 1.0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert float(got @ r) >= -1e-6 * float(g.norm() * r.norm())


def test_a_gem_without_a_buffer_is_finetuning() -> None:
    rows, first, second = make_rows(6), make_context(), make_context()
    torch.testing.assert_close(METHODS["a-gem"](first).backward(rows), Finetune(second).backward(rows))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# ---------------------------------------------------------------------------------------------------------------- DER++

DARK = {
    "der++": "er",
    "der++-mixup": "mixup",
    "der++-gradmix-class": "gradmix-class",
    "der++-gradmix-sample": "gradmix-sample",
}


def filled(context: Context) -> Context:
    rows = make_rows(20, seed=8)
    logits = torch.randn(20, CLASSES, generator=torch.Generator().manual_seed(1))
    context.buffer.add(rows.x, rows.y, logits=logits)
    replayed = BufferSamples(rows.x[:3], rows.y[:3], {"logits": logits[:3]})
    return replace(context, draw_replayed=lambda: replayed)


@pytest.mark.parametrize("name", DARK)
@pytest.mark.parametrize("distillation", [None, 0.0, 0.2])
def test_dark_replay_adds_the_squared_error(name: str, distillation: float | None) -> None:
    rows = make_rows(5)
    replay = ReplayConfig(distillation=distillation)
    dark, plain = (filled(make_context(replay=replay)) for _ in range(2))
    method, inner = METHODS[name](dark), METHODS[DARK[name]](plain)
    for m in (method, inner):
        m.start_epoch()
    loss, expected = method.loss(rows), inner.loss(rows)
    replayed = dark.draw_replayed()
    squares = (dark.model(replayed.x).double() - replayed.extras["logits"].double()).square()
    weight = 0.5 if distillation is None else distillation
    assert loss.item() == pytest.approx(expected.item() + weight * squares.sum().item() / (3 * CLASSES), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in dark.model.parameters())
    counts = method.mixed_samples(), inner.mixed_samples()
    assert (counts[0] is None) == (counts[1] is None) and (counts[0] is None or int(counts[0]) == int(counts[1]))
    table, inner_table = method.class_table(rows), inner.class_table(rows)
    assert (table is None) == (inner_table is None)
    assert table is None or torch.equal(table.cosine, inner_table.cosine)


@pytest.mark.parametrize("name", DARK)
def test_dark_replay_state_is_the_inner_methods(name: str) -> None:
    rows = make_rows(5)
    context = filled(make_context())
    method = METHODS[name](context)
    method.start_epoch()
    method.loss(rows)
    state, generator = copy.deepcopy(method.state_dict()), context.generator.get_state()
    expected = method.loss(rows)
    again = filled(make_context())
    again.generator.set_state(generator)
    resumed = METHODS[name](again)
    resumed.load_state_dict(state)
    torch.testing.assert_close(resumed.loss(rows), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", DARK)
def test_dark_replay_settles_its_weight_and_the_inner_settings(name: str) -> None:
    config = METHODS[name].resolve_config(TrainConfig())
    assert config.replay.distillation == 0.5
    assert config.mix == METHODS[DARK[name]].resolve_config(TrainConfig()).mix
    own = TrainConfig(replay=ReplayConfig(distillation=0.0))
    assert METHODS[name].resolve_config(own).replay.distillation == 0.0
    assert METHODS[DARK[name]].resolve_config(TrainConfig()).replay.distillation is None


def test_dark_replay_keeps_logits_of_the_model_in_evaluation(monkeypatch) -> None:
    monkeypatch.setattr(dark_replay, "_SAMPLES", 4)
    shape = (3, 8, 8)
    context = make_context(shape, "resnet8")
    rows = make_rows(9, shape)
    method = METHODS["der++"](context)
    before = copy.deepcopy(context.model.state_dict())
    extras = method.extras(rows.x, rows.y)
    assert set(extras) == {"logits"} and not extras["logits"].requires_grad and context.model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), context.model.state_dict().values(), strict=True))
    model = copy.deepcopy(context.model).eval()
    torch.testing.assert_close(extras["logits"], torch.cat([model(x) for x in rows.x.split(1)]).detach())
    assert METHODS["er"](context).extras(rows.x, rows.y) == {}


def test_dark_replay_without_a_buffer_and_without_logits() -> None:
    rows, context = make_rows(5), make_context()
    torch.testing.assert_close(METHODS["der++"](context).loss(rows), METHODS["er"](context).loss(rows))
    bare = replace(context, draw_replayed=lambda: BufferSamples(rows.x, rows.y, {}))
    with pytest.raises(ValueError, match="draw_replayed: got samples without 'logits'"):
        METHODS["der++"](bare).loss(rows)


# ------------------------------------------------------------------------------------------------------------ policies

POLICIES = ("autoaugment", "randaugment", "trivialaugment")
COLOUR = (3, 9, 8)


def one_operation(name: str, strength: float, count: int, table=policies.STANDARD) -> policies.Drawn:
    shape = (count, 1)
    return policies.Drawn(
        torch.full(shape, list(table).index(name)),
        torch.full(shape, strength, dtype=torch.float64),
        torch.ones(shape, dtype=torch.float64),
        torch.ones(shape, dtype=torch.bool),
    )


IDENTITIES = {
    "identity": 0.7,
    "rotate": 0.0,
    "shear-x": 0.0,
    "shear-y": 0.0,
    "translate-x": 0.0,
    "translate-y": 0.0,
    "color": 0.5,
    "contrast": 0.5,
    "brightness": 0.5,
    "sharpness": 0.5,
    "posterize": 0.0,
    "solarize": 0.0,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_an_operation_without_strength_leaves_the_image(name: str) -> None:
    pytest.importorskip("kornia")
    image = torch.rand(3, *COLOUR) * 0.98
    drawn = one_operation(name, IDENTITIES[name], 3)
    torch.testing.assert_close(policies.apply_round(image, policies.STANDARD, drawn), image, rtol=0, atol=1e-6)


def grey_of(image: Tensor) -> Tensor:
    return (0.299 * image[:, 0] + 0.587 * image[:, 1] + 0.114 * image[:, 2]).unsqueeze(1)


def shifted(image: Tensor, by: int) -> Tensor:
    result = torch.zeros_like(image)
    result[..., by:] = image[..., :-by]
    return result


# Factors at strength 1 are 1.9; translation is by 150/331 of a width of 8: 3.6 pixels, to the nearest place.
OPERATIONS = {
    "brightness": lambda x: (1.9 * x).clamp(0, 1),
    "color": lambda x: (1.9 * x - 0.9 * grey_of(x)).clamp(0, 1),
    "contrast": lambda x: (1.9 * x - 0.9 * grey_of(x).mean(dim=(1, 2, 3), keepdim=True)).clamp(0, 1),
    "invert": lambda x: 1 - x,
    "solarize": lambda x: 1 - x,
    "posterize": lambda x: torch.floor(torch.floor(x * 255) / 16) * 16 / 255,
    "auto-contrast": lambda x: (x - x.amin((2, 3), True)) / (x.amax((2, 3), True) - x.amin((2, 3), True)),
    "translate-x": lambda x: shifted(x, 4),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_do_what_their_names_say(name: str) -> None:
    pytest.importorskip("kornia")
    image = 0.02 + 0.9 * torch.rand(3, *COLOUR, generator=torch.Generator().manual_seed(2))
    before = image.clone()
    got = policies.apply_round(image, policies.STANDARD, one_operation(name, 1.0, 3))
    torch.testing.assert_close(got, OPERATIONS[name](image), rtol=0, atol=1e-5)
    assert torch.equal(image, before)


@pytest.mark.parametrize("name", policies.STANDARD)
@pytest.mark.parametrize("strength", [0.1, 0.9])
def test_a_grey_image_becomes_what_three_equal_channels_become(name: str, strength: float) -> None:
    pytest.importorskip("kornia")
    image = torch.rand(4, 1, 9, 6, generator=torch.Generator().manual_seed(1))
    drawn = one_operation(name, strength, 4)
    colour = policies.apply_round(image.expand(-1, 3, -1, -1), policies.STANDARD, drawn)
    grey = policies.apply_round(image, policies.STANDARD, drawn)
    torch.testing.assert_close(grey.expand(-1, 3, -1, -1), colour, rtol=0, atol=1e-5)


def test_geometry_keeps_the_centre_and_turns_the_right_way() -> None:
    pytest.importorskip("kornia")
    image = torch.zeros(2, 3, 7, 7)
    image[:, :, 3, 3], image[:, :, 3, 6] = 1.0, 0.5
    drawn = one_operation("rotate", 2 / 3, 2, policies.WIDE)  # 90 degrees of 135
    drawn = drawn._replace(sign=torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
    got = policies.apply_round(image, policies.WIDE, drawn)[:, 0]
    assert got[:, 3, 3].tolist() == [1.0, 1.0]
    assert got[0, 6, 3] == 0.5 and got[1, 0, 3] == 0.5 and got.sum() == 3.0


def test_a_flat_channel_has_no_contrast_to_stretch() -> None:
    pytest.importorskip("kornia")
    image = torch.full((2, *COLOUR), 0.25)
    assert torch.equal(policies.apply_round(image, policies.STANDARD, one_operation("auto-contrast", 0.0, 2)), image)


def test_rows_that_are_not_drawn_stay() -> None:
    pytest.importorskip("kornia")
    image = torch.rand(4, *COLOUR)
    drawn = one_operation("invert", 0.0, 4)._replace(applied=torch.tensor([[True], [False], [False], [True]]))
    got = policies.apply_round(image, policies.STANDARD, drawn)
    assert torch.equal(got[1:3], image[1:3]) and torch.equal(got[[0, 3]], 1 - image[[0, 3]])


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", [(1, 8, 8), COLOUR, (3, 32, 32)], ids=str)
def test_policies_draw_for_every_image_by_the_generator_alone(name: str, shape: tuple[int, ...]) -> None:
    pytest.importorskip("kornia")
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(5)).expand(24, *shape)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first, again = (METHODS[name](make_context(shape)).augment(x) for _ in range(2))
    other = METHODS[name](make_context(shape, generator=torch.Generator().manual_seed(4))).augment(x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert torch.equal(first, again) and not torch.equal(first, other)
    distinct = {tuple(image.flatten().tolist()) for image in first}
    assert len(distinct) > 8  # one draw for the whole batch would leave one
    assert first.shape == x.shape and first.dtype == x.dtype and ((first >= 0) & (first <= 1)).all()


@pytest.mark.parametrize("candidates", [False, True])
def test_a_policy_comes_before_what_it_is_put_on(monkeypatch: pytest.MonkeyPatch, candidates: bool) -> None:
    """The method inside sees augmented rows, augmented candidates, and the labels and weights as they were."""
    pytest.importorskip("kornia")
    seen: list[StepSamples] = []

    class Inner(Mixup):
        def losses(self, rows: StepSamples) -> Iterator[torch.Tensor]:
            seen.append(rows)
            return super().losses(rows)

    monkeypatch.setitem(composition.MIXING, "mixup", Inner)
    x, y, weight = torch.rand(12, *COLOUR), torch.arange(12) % 4, torch.rand(12)
    other = (torch.rand(5, *COLOUR), torch.arange(5) % 4) if candidates else None
    context = make_context(COLOUR)
    METHODS["trivialaugment-mixup"](context).loss(StepSamples(x, y, weight, other)).backward()
    (rows,) = seen
    assert rows.x.shape == x.shape and not torch.equal(rows.x, x)
    assert torch.equal(rows.y, y) and torch.equal(rows.weight, weight)
    if other is None:
        assert rows.candidates is None
    else:
        assert not torch.equal(rows.candidates[0], other[0]) and torch.equal(rows.candidates[1], other[1])
    alone = METHODS["trivialaugment"](make_context(COLOUR)).augment(x)
    assert torch.equal(rows.x, alone)


@pytest.mark.parametrize("name", POLICIES)
def test_normalised_rows_are_augmented_as_pixels(name: str) -> None:
    pytest.importorskip("kornia")
    x = torch.rand(16, *COLOUR)
    pixels = Pixels((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pixels.mean, pixels.std))
    plain = METHODS[name](make_context(COLOUR)).augment(x)
    normalised = METHODS[name](make_context(COLOUR, pixels=pixels)).augment((x - mean) / std)
    # Rounding may take a pixel over a step of posterizing or equalizing, not more than a few of them.
    off = (normalised * std + mean - plain).abs() > 1e-5
    assert off.float().mean() < 0.01


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("normalised", [False, True])
def test_nothing_drawn_is_a_round_trip(monkeypatch, channels: int, normalised: bool) -> None:
    pytest.importorskip("kornia")
    x = torch.rand(5, channels, 6, 7).to(memory_format=torch.channels_last)
    pixels = Pixels((0.4,) * channels, (0.2,) * channels) if normalised else None
    method = METHODS["randaugment"](make_context((channels, 6, 7), pixels=pixels))
    monkeypatch.setattr(method, "draw", lambda n, c: one_operation("identity", 1.0, n))
    rows = (x - 0.4) / 0.2 if normalised else x
    got = method.augment(rows)
    torch.testing.assert_close(got, rows, rtol=0, atol=1e-6)
    assert got.stride() == rows.stride()


def test_autoaugment_draws_sub_policies_of_the_paper() -> None:
    pytest.importorskip("kornia")
    method = METHODS["autoaugment"](make_context())
    names = list(policies.STANDARD)
    # Digests of the papers' tables: another release of kornia is not to change them unseen.
    for channels, digest in ((3, "721a6a394493ab47"), (1, "a78f2be68520c0c1")):
        policy = policies.sub_policies(channels)
        assert len(policy) == 25 and hashlib.sha256(repr(policy).encode()).hexdigest()[:16] == digest
        drawn = method.draw(8000, channels)
        pairs = {tuple(pair) for pair in drawn.operation.tolist()}
        assert pairs == {tuple(names.index(name) for name, _, _ in pair) for pair in policy}
        mean_chance = np.mean([p for pair in policy for _, p, _ in pair])
        assert float(drawn.applied.double().mean()) == pytest.approx(mean_chance, abs=0.02)
        assert drawn.strength.min() >= 0 and drawn.strength.max() <= 0.9
        assert float(drawn.sign.mean()) == pytest.approx(0, abs=0.03)


def test_randaugment_and_trivialaugment_draw_uniformly() -> None:
    pytest.importorskip("kornia")
    for name, rounds in (("randaugment", 2), ("trivialaugment", 1)):
        method = METHODS[name](make_context())
        drawn = method.draw(14_000, 3)
        assert drawn.operation.shape == (14_000, rounds) and drawn.applied.all()
        counts = drawn.operation.flatten().bincount(minlength=14)
        assert len(counts) == 14 and (counts / (1000 * rounds) - 1).abs().max() < 0.15
        if name == "trivialaugment":
            levels = (drawn.strength * 30).round().long().flatten().bincount(minlength=31)
            assert len(levels) == 31 and levels.min() > 350
        else:
            assert (drawn.strength == 0.4).all()


@pytest.mark.parametrize("name", POLICIES)
def test_augmenting_counts_as_drawing_the_rows(name: str) -> None:
    pytest.importorskip("kornia")
    context = make_context()
    METHODS[name](context).loss(make_rows(7))
    assert context.clock.seconds("data") > 0
    plain = make_context()
    METHODS["er"](plain).loss(make_rows(7))
    assert plain.clock.seconds("data") == 0


@pytest.mark.parametrize("name", POLICIES)
def test_policy_loss_is_replay_on_augmented_rows(name: str) -> None:
    pytest.importorskip("kornia")
    rows = make_rows(7)
    augmented = METHODS[name](make_context()).augment(rows.x)
    context = make_context(passes=Passes(lambda: torch.autocast("cpu", dtype=torch.bfloat16)))
    loss = METHODS[name](make_context()).loss(rows)
    torch.testing.assert_close(loss, METHODS["er"](make_context()).loss(replace(rows, x=augmented)))
    assert METHODS[name](context).backward(rows).item() == pytest.approx(loss.item(), rel=0.02)


BAD_ROWS = {
    "flat": (torch.rand(3, 7), None, r"x: got samples of shape \(3, 7\), expected images"),
    "two channels": (torch.rand(3, 2, 4, 4), None, r"x: got samples of shape \(3, 2, 4, 4\), expected images"),
    "not pixels": (torch.randn(3, 1, 4, 4) - 2, None, r"x: got pixels from -.* to .*, expected \[0, 1\]"),
    "nan": (torch.full((3, 1, 4, 4), math.nan), None, "x: got pixels from nan to nan"),
    "wrong pixels": (torch.rand(3, 1, 4, 4), Pixels((0.1, 0.2, 0.3), (1.0, 1.0, 1.0)), "pixels: got 3 means"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_policies_refuse_other_rows(case: str) -> None:
    pytest.importorskip("kornia")
    x, pixels, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=message):
        METHODS["autoaugment"](make_context(pixels=pixels)).augment(x)


@pytest.mark.parametrize("name", POLICIES)
def test_missing_kornia_is_said_when_the_method_is_built(monkeypatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ModuleNotFoundError, match=r"need it: pip install 'gradmix\[policies\]'"):
        METHODS[name](make_context())


# --------------------------------------------------------------------------------------------------------- every method


@pytest.fixture(scope="module")
def runs():
    """Four epochs of two tasks by a method, made when a test first asks for it."""
    config = TrainConfig(
        data=DataConfig(tasks=2),
        optim=OptimConfig(epochs=4, lr=0.02),
        replay=ReplayConfig(size=8, stream="dual"),
        threads=1,
    )
    stream = make_stream("split-digits", tasks=2)
    pytest.importorskip("kornia")
    return cache(lambda name: train_one(config, name, 0, stream=stream))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(runs, name: str) -> None:
    result = runs(name)
    assert result.status == "complete" and result.accuracy.shape == (2, 2) and np.isfinite(result.accuracy).all()
    assert result.accuracy[0, 0] > 0.9 and result.accuracy[1, 1] > 0.5


def test_replay_keeps_what_finetuning_forgets(runs) -> None:
    for name in thinning.part(sorted(METHODS.keys() - {"finetune", "a-gem"}), 3):
        assert runs(name).accuracy[1, 0] > runs("finetune").accuracy[1, 0] + 0.3, name


def test_names_are_those_of_the_configuration() -> None:
    assert tuple(METHODS) == tuple(PRESETS)
    assert from_dict({"methods": list(METHODS)}).methods == tuple(METHODS)
