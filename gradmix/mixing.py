"""The mixing weight: drawing it, and integrating over its distribution."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
import torch

_SEED_LIMIT = 1 << 62

_private: tuple[int, torch.Generator] | None = None


def default_generator() -> torch.Generator:
    """The CPU generator that draws where the caller gives none.

    It is the library's own, so that selecting pairs leaves the global generators alone, and it is seeded by
    ``torch.initial_seed()``: what follows a call of ``torch.manual_seed(s)`` is repeated by another such call.

    That the same seed was set again cannot be seen in the global generator, whose state may be that of before in
    either case. So from the first use on ``torch.manual_seed`` tells; of a seed set by another name, such as
    ``torch.default_generator.manual_seed``, only a change is noticed.
    """
    global _private
    _hear_of_seeds()
    seed = torch.initial_seed()
    if _private is None or _private[0] != seed:
        _private = (seed, torch.Generator("cpu").manual_seed(seed % _SEED_LIMIT))
    return _private[1]


def _hear_of_seeds() -> None:
    """Have ``torch.manual_seed`` restart the generator of the seed that is set."""
    original = torch.manual_seed
    if getattr(original, "heard_by", None) is _hear_of_seeds:
        return

    @wraps(original)
    def manual_seed(seed: Any) -> torch.Generator:
        global _private
        generator = original(seed)
        if _private is not None and _private[0] == torch.initial_seed():
            _private = None
        return generator

    manual_seed.heard_by = _hear_of_seeds  # type: ignore[attr-defined]
    torch.manual_seed = torch.random.manual_seed = manual_seed


def draw_lam(alpha: float, generator: torch.Generator) -> float:
    """One mixing weight from Beta(alpha, alpha).

    torch's Beta takes no generator, so numpy draws, seeded by one number from ``generator``.
    """
    seed = int(torch.randint(_SEED_LIMIT, (1,), generator=generator, device=generator.device))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def beta_quadrature(alpha: float, nodes: int) -> tuple[list[float], list[float]]:
    """Gauss quadrature for the expectation over Beta(alpha, alpha): nodes in (0, 1) and weights that sum to 1.

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
