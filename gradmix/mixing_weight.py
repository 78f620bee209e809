"""The mixing weight: its draw, and integrals over its distribution."""

from __future__ import annotations

import numpy as np
import torch

_SEED_LIMIT = 1 << 62


def draw_lam(alpha: float, generator: torch.Generator) -> float:
    """Draw one mixing weight from Beta(alpha, alpha).

    torch's Beta takes no generator, so numpy draws, seeded by one number from ``generator``.
    """
    seed = int(torch.randint(_SEED_LIMIT, (1,), generator=generator, device=generator.device))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def beta_quadrature(alpha: float, nodes: int) -> tuple[list[float], list[float]]:
    """Return the Gauss quadrature of expectations over Beta(alpha, alpha): nodes in (0, 1), and weights with sum 1.

    Exact for polynomials up to degree 2 ``nodes`` - 1. Golub and Welsch, "Calculation of Gauss quadrature rules"
    (1969), with the three-term recurrence of the Gegenbauer polynomials, whose weight is the symmetric Beta density
    moved to [-1, 1].

    >>> nodes, weights = beta_quadrature(1.0, 2)
    >>> [round(v, 6) for v in nodes], [round(v, 6) for v in weights]
    ([0.211325, 0.788675], [0.5, 0.5])
    """
    k = np.arange(1, nodes, dtype=np.float64)
    a = alpha - 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = k * (k + 2 * a) / ((2 * k + 2 * a + 1) * (2 * k + 2 * a - 1))
    if nodes > 1:
        squares[0] = 1.0 / (2 * a + 3)  # the general term is 0/0 here for alpha = 1/2
    off = np.sqrt(squares)
    values, vectors = np.linalg.eigh(np.diag(off, 1) + np.diag(off, -1))
    return ((values + 1) / 2).tolist(), (vectors[0] ** 2).tolist()


def check_alpha(alpha: float) -> None:
    """Raise unless ``alpha`` is a positive finite number."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha: got {type(alpha).__name__}, expected a number > 0")
    if not 0.0 < alpha < float("inf"):
        raise ValueError(f"alpha: got {alpha}, expected a number > 0, the parameter of Beta(alpha, alpha)")
