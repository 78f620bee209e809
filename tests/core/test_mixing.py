"""The mixing weight: draws and quadrature."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import MLP, rows

from gradmix import GradMix, select_pairs
from gradmix.mixing_weight import beta_quadrature, draw_lam
from gradmix.runtime.random import default_generator


@pytest.mark.parametrize("nodes", [1, 2, 4, 7])
@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.5])
def test_quadrature_has_the_moments_of_beta(alpha: float, nodes: int) -> None:
    points, weights = (np.array(v) for v in beta_quadrature(alpha, nodes))
    assert ((points > 0) & (points < 1)).all()
    moment = 1.0
    for k in range(2 * nodes):
        assert (weights * points**k).sum() == pytest.approx(moment, rel=1e-12)
        moment *= (alpha + k) / (2 * alpha + k)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_draws_follow_beta(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw_lam(alpha, generator) for _ in range(20000)], dtype=torch.float64)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    variance = 1 / (4 * (2 * alpha + 1))
    assert float(drawn.mean()) == pytest.approx(0.5, abs=5 * (variance / 20000) ** 0.5)
    assert float(drawn.var()) == pytest.approx(variance, rel=0.05)


def test_draws_come_from_the_generator_alone() -> None:
    a, b = (torch.Generator().manual_seed(3) for _ in range(2))
    state = torch.get_rng_state()
    assert [draw_lam(1.0, a) for _ in range(3)] == [draw_lam(1.0, b) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert draw_lam(1.0, a) != draw_lam(1.0, a)


# -------------------------------------------------------------------------------------------- draws without a generator


@pytest.fixture(autouse=True)
def _seed_restored() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def outcome(pairs: Any) -> tuple[list[float], list[int]]:
    return pairs.lam.tolist(), pairs.partner.tolist()


MODEL, BUFFER, BATCH = MLP(), rows(12, 3), rows(8, 1)
KEPT = GradMix(MODEL, BUFFER)
CALLS: dict[str, Callable[[], list[Any]]] = {
    "select_pairs": lambda: [outcome(select_pairs(MODEL, BUFFER, BATCH)) for _ in range(3)],
    "GradMix": lambda: [outcome(mixup.select(*BATCH)) for mixup in [GradMix(MODEL, BUFFER)] for _ in range(3)],
    "the same GradMix": lambda: [outcome(KEPT.select(*BATCH)) for _ in range(3)],
    "GradMix by class": lambda: [
        outcome(mixup.select(*BATCH))
        for mixup in [GradMix(MODEL, BUFFER, criterion="class", estimator="mixed", policy="permute")]
        for _ in range(3)
    ],
}


@pytest.mark.parametrize("between", [0, 1, 1000])
@pytest.mark.parametrize("call", CALLS)
def test_the_same_seed_gives_the_same_draws(call: str, between: int) -> None:
    runs = []
    for seed in (0, 0, 1, 0):
        torch.manual_seed(seed)
        torch.rand(between)  # others draw too
        state = torch.get_rng_state()
        runs.append(CALLS[call]())
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(between)
    assert runs[0] == runs[1] == runs[3] != runs[2]
    assert len({str(run) for run in runs[0]}) == 3  # one call after the other draws on


def test_without_a_seed_set_draws_go_on() -> None:
    torch.manual_seed(3)
    first = CALLS["select_pairs"]()
    torch.rand(5)
    state = torch.get_rng_state()
    second = CALLS["select_pairs"]()
    torch.set_rng_state(state)  # as for a part of a program that must not change what follows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        torch.rand(5)
    third = CALLS["select_pairs"]()
    assert len({str(run) for run in first + second + third}) == 9


def test_seeding_stays_what_it_was() -> None:
    default_generator()
    for seed in (torch.manual_seed, torch.random.manual_seed):
        assert seed.__name__ == "manual_seed" and seed(7) is torch.default_generator and torch.initial_seed() == 7
        drawn = torch.rand(3)
        assert torch.equal(torch.rand(3, generator=torch.Generator().manual_seed(7)), drawn)
        first = torch.rand(2, generator=default_generator())
        seed(7)
        assert torch.equal(torch.rand(2, generator=default_generator()), first)


def test_a_state_goes_on_with_its_draws_whatever_was_drawn_since() -> None:
    torch.manual_seed(0)
    mixup = GradMix(MODEL, BUFFER)
    mixup.select(*BATCH)
    state = mixup.state_dict()
    expected = [outcome(mixup.select(*BATCH)) for _ in range(2)]
    torch.manual_seed(0)
    other = GradMix(MODEL, BUFFER)
    other.load_state_dict(state)
    assert [outcome(other.select(*BATCH)) for _ in range(2)] == expected
