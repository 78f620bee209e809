"""Statistics of paired differences over seeds: p-values, their adjustment, and intervals of ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gradmix.training.runs.metrics import Interval

LEVEL = 0.05
"""A difference is significant if its p-value, by Holm's method adjusted for all comparisons, is below this."""


class Ratio(NamedTuple):
    """A ratio of two means, and the ends of its confidence interval."""

    ratio: float
    low: float
    high: float


def paired_p_value(interval: Interval, n: int) -> float:
    """The two-sided p-value of the paired t-test, from a :func:`~gradmix.training.runs.metrics.paired_difference`.

    With the statistic ``t = mean / (std / sqrt(n))`` and Student's t-distribution of n - 1 degrees of freedom it is
    P(abs(T) >= abs(t)). Differences that are all the same give 0, or 1 if they are 0.

    Args:
        interval: Mean and standard deviation of the differences.
        n: Number of differences.

    Returns:
        The p-value; NaN for fewer than two differences.

    Example:
        >>> round(paired_p_value(Interval(0.25, 0.125, math.nan), 4), 3)
        0.028
    """
    from scipy.special import stdtr

    if n < 2 or math.isnan(interval.std):
        return math.nan
    if interval.std == 0.0:
        return 1.0 if interval.mean == 0.0 else 0.0
    return float(2.0 * stdtr(n - 1, -(abs(interval.mean) / (interval.std / math.sqrt(n)))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: max over i <= k of min(1, (m - i) p[i]), with the m p-values ascending and i from 0.

    Calling those below a level significant keeps the probability of any false one below that level, however the tests
    depend on each other (Holm, 1979).

    Args:
        p_values: ``(m,)`` p-values. NaN ones are no test, and stay NaN.

    Returns:
        The adjusted ones, in the order given.

    Example:
        >>> holm([0.04, 0.01, 0.03])
        [0.06, 0.03, 0.06]
    """
    adjusted = [math.nan] * len(p_values)
    order = sorted((k for k, p in enumerate(p_values) if not math.isnan(p)), key=lambda k: p_values[k])
    highest = 0.0
    for i, k in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - i) * p_values[k]))
        adjusted[k] = highest
    return adjusted


def t_quantile(n: int) -> float:
    """Standard errors to either side of a mean of ``n`` values that its 95 % t-interval reaches.

    Example:
        >>> [round(t_quantile(n), 1) for n in (2, 5)]
        [12.7, 2.8]
    """
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.975))


def rule_of(tests: int) -> str:
    """State when one of so many comparisons is significant.

    Example:
        >>> rule_of(4)
        "Holm's p, adjusted for the 4 comparisons, is below 0.05"
    """
    which = "the p-value of the paired t-test" if tests == 1 else f"Holm's p, adjusted for the {tests} comparisons,"
    return f"{which} is below {LEVEL}"


def ratio_interval(
    part: Sequence[float] | npt.NDArray[np.float64],
    whole: Sequence[float] | npt.NDArray[np.float64],
    confidence: float = 0.95,
) -> Ratio:
    """The mean of ``part`` over the mean of ``whole``, paired over seeds, with Fieller's interval (1954).

    It holds the ratios r for which the t-interval of ``part - r * whole`` holds 0: with p and w the means, ``s`` the
    sample covariances and ``k = t^2 / n``, those between the roots of
    ``(w^2 - k s_ww) r^2 - 2 (p w - k s_pw) r + (p^2 - k s_pp)``. They are an interval if, and only if, the t-interval
    of ``whole`` leaves out 0.

    Args:
        part: ``(n,)`` values, one for each seed.
        whole: ``(n,)`` values for the same seeds in the same order.
        confidence: Probability of the interval, within (0, 1).

    Returns:
        ``(ratio, low, high)``. All are NaN if the t-interval of ``whole`` holds 0, or for fewer than two seeds.

    Raises:
        ValueError: The shapes differ, or are not ``(n,)``.

    Example:
        >>> ratio_interval([0.125, 0.25], [0.25, 0.5])
        Ratio(ratio=nan, low=nan, high=nan)
        >>> [round(v, 3) for v in ratio_interval([0.125, 0.25, 0.125], [0.5, 0.5, 0.5])]
        [0.333, -0.025, 0.692]
    """
    from scipy.special import stdtrit

    a, b = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"part: got shape {a.shape}, expected (n,) as whole has, which has {b.shape}")
    nothing = Ratio(math.nan, math.nan, math.nan)
    n = a.size
    if n < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return nothing
    p, w = float(a.mean()), float(b.mean())
    ((s_pp, s_pw), (_, s_ww)) = np.cov(a, b)
    k = float(stdtrit(n - 1, (1.0 + confidence) / 2.0)) ** 2 / n
    square, half, rest = w * w - k * s_ww, p * w - k * s_pw, p * p - k * s_pp
    if square <= 0.0:
        return nothing
    root = math.sqrt(max(half * half - square * rest, 0.0))
    return Ratio(p / w, float((half - root) / square), float((half + root) / square))
