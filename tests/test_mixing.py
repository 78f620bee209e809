"""The mixing weight: draws and quadrature."""

import numpy as np
import pytest
import torch

from gradmix.mixing import beta_quadrature, draw_lam


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
