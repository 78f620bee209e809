"""p-values, their adjustment and intervals of ratios, against scipy and against what defines them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradmix.training.reports.significance import holm, paired_p_value, ratio_interval
from gradmix.training.runs.metrics import Interval, mean_interval, paired_difference


def test_p_values_agree_with_scipy() -> None:
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    for n in (2, 5, 30):
        a, b = rng.normal(0.9, 0.01, n), rng.normal(0.89, 0.01, n)
        assert paired_p_value(paired_difference(a, b), n) == pytest.approx(float(ttest_rel(a, b).pvalue), rel=1e-9)


@pytest.mark.parametrize(
    ("interval", "n", "expected"),
    [
        (Interval(0.1, 0.0, 0.0), 3, 0.0),
        (Interval(0.0, 0.0, 0.0), 3, 1.0),
        (Interval(0.1, math.nan, math.nan), 1, math.nan),
        (Interval(math.nan, math.nan, math.nan), 4, math.nan),
    ],
    ids=["all the same", "all 0", "one seed", "no values"],
)
def test_p_values_of_the_extremes(interval: Interval, n: int, expected: float) -> None:
    assert paired_p_value(interval, n) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([], []),
        ([0.2], [0.2]),
        ([0.01, 0.02, 0.03], [0.03, 0.04, 0.04]),
        ([0.03, 0.01, 0.02], [0.04, 0.03, 0.04]),
        ([0.5, 0.9, 0.6], [1.0, 1.0, 1.0]),
        ([0.02, math.nan, 0.02], [0.04, math.nan, 0.04]),
        ([0.0, 1.0], [0.0, 1.0]),
    ],
    ids=["none", "one", "monotone", "order kept", "at most 1", "a tie and a gap", "ends"],
)
def test_holm(p: list[float], expected: list[float]) -> None:
    assert holm(p) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("n", [2, 5, 30])
@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-6])
def test_ratio_ends_where_the_interval_touches_0(n: int, scale: float) -> None:
    rng = np.random.default_rng(n)
    whole = scale * rng.normal(1.0, 0.02, n)
    part = 0.4 * whole + scale * rng.normal(0.0, 0.02, n)
    ratio, low, high = ratio_interval(part, whole)
    assert low < ratio < high and ratio == pytest.approx(part.mean() / whole.mean(), rel=1e-12)
    for end in (low, high):
        interval = mean_interval(part - end * whole)
        assert abs(interval.mean) == pytest.approx(interval.half_width, rel=1e-6)
    for inside, outside in ((low + 1e-3 * (high - low), low - 1e-3 * (high - low)),):
        assert abs((m := mean_interval(part - inside * whole)).mean) < m.half_width
        assert abs((m := mean_interval(part - outside * whole)).mean) > m.half_width


@pytest.mark.parametrize(
    ("part", "whole"),
    [
        ([0.1, 0.2, 0.3], [0.1, -0.1, 0.02]),
        ([0.1], [0.2]),
        ([], []),
        ([0.1, math.nan], [0.2, 0.21]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
    ids=["no gain", "one seed", "none", "not measured", "all 0"],
)
def test_no_ratio_of_what_is_not_told_from_0(part: list[float], whole: list[float]) -> None:
    assert all(map(math.isnan, ratio_interval(part, whole)))


def test_ratio_of_the_extremes() -> None:
    whole = [0.2, 0.21, 0.19]
    assert ratio_interval(whole, whole) == pytest.approx((1.0, 1.0, 1.0))
    assert ratio_interval([0.0] * 3, whole) == pytest.approx((0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"part: got shape \(2,\), expected"):
        ratio_interval([0.1, 0.2], whole)


def test_ratio_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        whole = rng.normal(0.02, 0.004, 5)
        part = 0.5 * whole + rng.normal(0.0, 0.003, 5)
        _, low, high = ratio_interval(part, whole)
        # Where there is no interval, the set it stands for is unbounded or its complement; none is counted as held.
        held += low <= 0.5 <= high
    # 950 expected, less the few without an interval; five standard deviations are 34.
    assert 910 <= held <= 985
