"""Figures as text: signs, stars, what is not known, and where digits are cut."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gradmix.training.reports import cells
from gradmix.training.runs.metrics import Interval

NAN = math.nan
FULL = "{mean:.2f} ± {std:.2f} ({half:.2f}) [{low:.2f}, {high:.2f}]{star}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((0.5, 0.25, 0.125), "0.50 ± 0.25 (0.12) [0.38, 0.62] *"),
        ((-0.5, 0.25, 0.125), "−0.50 ± 0.25 (0.12) [−0.62, −0.38] *"),
        ((-0.5, 0.25, 0.75), "−0.50 ± 0.25 (0.75) [−1.25, 0.25]"),
        ((0.5, 0.25, 0.5), "0.50 ± 0.25 (0.50) [0.00, 1.00]"),
        ((0.5, 0.0, 0.0), "0.50 ± 0.00 (0.00) [0.50, 0.50] *"),
        ((0.0, 0.0, 0.0), "0.00 ± 0.00 (0.00) [0.00, 0.00]"),
        ((-0.0625, NAN, NAN), "−0.062"),
        ((NAN, NAN, NAN), "-"),
        ((NAN, 0.5, 0.5), "-"),
    ],
    ids=["apart", "below", "holds 0", "0 is its end", "a point", "a point at 0", "one seed", "nothing", "no mean"],
)
def test_interval(value: tuple[float, float, float], text: str) -> None:
    assert cells.interval(Interval(*value), FULL, minus="−") == text
    assert cells.interval(Interval(*value), FULL) == text.replace("−", "-")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((0.02, 0.01, 0.003), "+0.020 ± 0.003 *"),
        ((-0.02, 0.01, 0.03), "−0.020 ± 0.030"),
        ((-0.02, NAN, NAN), "−0.020"),
        ((0.0, NAN, NAN), "+0.000"),
        ((NAN, NAN, NAN), "-"),
    ],
    ids=["apart", "not", "one seed", "no difference", "nothing"],
)
def test_difference(value: tuple[float, float, float], text: str) -> None:
    assert cells.difference(Interval(*value)) == text


CASES: dict[str, tuple[Any, list[tuple[Any, str]]]] = {
    "signed": (cells.with_sign, [(0.02, "+0.020"), (-0.0031, "−0.003"), (0.0, "+0.000")]),
    "probability": (
        cells.probability,
        [(0.0, "< 0.001"), (0.00099, "< 0.001"), (0.001, "0.001"), (0.0495, "0.050"), (1.0, "1.000"), (NAN, "-")],
    ),
    "percent": (cells.percent, [(0.0, "0.0 %"), (0.1234, "12.3 %"), (1.0, "100.0 %"), (NAN, "-")]),
    "decimal": (
        cells.decimal,
        [(0.0, "0.00"), (9.99, "9.99"), (10.0, "10.0"), (99.9, "99.9"), (100.4, "100"), (12345.0, "12345"), (NAN, "-")],
    ),
    "setting": (
        cells.setting,
        [(None, "default"), ([0.5, 0.75], "0.5, 0.75"), ([], "none"), (0, "0"), (False, "False"), ("best", "best")],
    ),
}


@pytest.mark.parametrize(
    ("render", "value", "text"),
    [(render, *case) for render, listed in CASES.values() for case in listed],
    ids=[f"{name} {value}" for name, (_, listed) in CASES.items() for value, _ in listed],
)
def test_one_figure(render: Any, value: Any, text: str) -> None:
    assert render(value) == text


def test_a_list_within_a_list() -> None:
    assert cells.setting([0.5, 0.75], ",") == "0.5,0.75"
