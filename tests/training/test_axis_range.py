"""The range of an axis: outliers do not squash what lies together, and an arrow says that they are there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from synthetic_runs import make_result

from gradmix.training.reports import plots
from gradmix.training.reports.axis_range import inner_range
from gradmix.training.runs.metrics import Interval

NAN = float("nan")
CLOSE = [(0.90, 0.91), (0.92, 0.94), (0.93, 0.95)]


@pytest.mark.parametrize(
    ("extents", "ends", "expected"),
    [
        ([(0.18, 0.20), *CLOSE], "below", (0.90, 0.95)),
        ([(0.18, 0.20), (0.55, 0.60), *CLOSE], "below", (0.90, 0.95)),
        ([(0.18, 0.20), *CLOSE, (NAN, NAN)], "below", (0.90, 0.95)),
        ([(0.10, 1.00), *CLOSE], "below", (0.90, 1.00)),
        ([(0.10, 1.00), *CLOSE], "both", (0.90, 0.95)),
        ([(0.00, 0.71), (-0.02, 0.01), (0.00, 0.04)], "both", (-0.02, 0.04)),
        # A third as long an axis is not worth an arrow.
        ([(0.75, 0.76), *CLOSE], "below", None),
        # The best arm is never an outlier.
        ([*[(0.18, 0.20)] * 3, (0.90, 0.91)], "below", None),
        # Two alike make no outlier of a third, and of two none is one.
        ([(0.70, 0.70), (0.9000, 0.9000), (0.9001, 0.9001)], "below", None),
        ([(0.18, 0.20), (0.90, 0.91)], "below", None),
        # Half of the arms are no outliers.
        ([(0.18, 0.20), (0.19, 0.21), (0.90, 0.91), (0.91, 0.92)], "below", None),
        ([], "both", None),
    ],
)
def test_the_range_of_all_but_a_few_far_away(extents: Any, ends: Any, expected: Any) -> None:
    for order in (extents, extents[::-1]):
        assert inner_range(order, ends) == expected


def arrows(axes: Any) -> list[tuple[float, float]]:
    """The tips of the arrows in axes."""
    return [text.xy for text in axes.texts if getattr(text, "arrow_patch", None) is not None and not text.get_text()]


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_text()]


def test_an_accuracy_far_below_the_others_is_an_arrow_beside_its_figure() -> None:
    values = [[0.18, 0.19, 0.20], [0.90, 0.905, 0.91], [0.92, 0.925, 0.93], [0.95, 0.955, 0.96]]
    axes = plots.dots(["finetune", "er", "mixup", "gradmix"], values, "accuracy", [None, 0.3, 0.92, None]).axes[0]
    low, high = axes.get_xlim()
    # The interval of er begins at 0.905 - 4.303 * 0.005 / sqrt(3), and that of gradmix ends at 0.955 + as much.
    assert 0.87 < low < 0.8926 and 0.9674 < high < 0.98
    assert arrows(axes) == [(low, 0), (low, 1)], "of the arm, and of a published figure"
    assert {"0.190", "0.300"} <= set(texts(axes)) and "arrow" in axes.get_xlabel()


def test_accuracies_without_an_outlier_have_no_arrow() -> None:
    axes = plots.dots(["er", "mixup", "gradmix"], [[0.5, 0.51], [0.6, 0.61], [0.8, 0.81]], "accuracy").axes[0]
    assert arrows(axes) == [] and axes.get_xlabel() == "accuracy"


def test_a_wide_interval_is_cut_at_both_ends_and_0_stays() -> None:
    close, wide = Interval(0.02, 0.01, 0.01), Interval(0.01, 0.3, 0.5)
    axes = plots.forest(["a", "b", "c"], [close, wide, replace_mean(close, 0.03)], "difference").axes[0]
    low, high = axes.get_xlim()
    assert low <= 0 and 0.04 <= high < 0.1
    assert arrows(axes) == [(low, 1), (high, 1)]


def replace_mean(interval: Interval, mean: float) -> Interval:
    return interval._replace(mean=mean)


def lines(*ends: float) -> dict[str, np.ndarray]:
    """Two seeds of an accuracy that falls over four tasks, for each end."""
    return {f"arm {end}": np.stack([np.linspace(0.99, end + shift, 4) for shift in (-0.002, 0.002)]) for end in ends}


def test_a_line_that_leaves_the_axes_says_where_it_goes() -> None:
    axes = plots.after_tasks(lines(0.19, 0.93, 0.94, 0.95)).axes[0]
    low, high = axes.get_ylim()
    assert 0.9 < low < 0.93 and 0.99 <= high < 1.0
    assert arrows(axes) == [(3.0, low)]
    # The second point is at 0.99 - 0.8 / 3.
    assert {"arm 0.19 0.19 to 0.72", "arm 0.19  0.190"} <= set(texts(axes))
    assert np.asarray(axes.lines[0].get_ydata())[-1] == pytest.approx(0.19), "nothing is changed in the line"
    assert arrows(plots.after_tasks(lines(0.8, 0.93, 0.94, 0.95)).axes[0]) == []


def test_two_lines_that_leave_the_axes_have_two_arrows_apart() -> None:
    axes = plots.after_tasks(lines(0.19, 0.20, 0.93, 0.94, 0.95)).axes[0]
    assert [x for x, _ in arrows(axes)] == [2.0, 4.0]


def test_the_comparison_of_runs_names_the_outlier() -> None:
    runs = [make_result(method, 0, level=0.99) for method in ("er", "mixup", "remix")]
    fallen = make_result("finetune", 0)
    accuracy = np.where(np.eye(3) > 0, 0.98, 0.0)
    axes = plots.compare([replace(fallen, accuracy=accuracy), *runs]).axes[0]
    # Means over the tasks seen: 0.98, then a half and a third of it.
    assert texts(axes) == ["finetune 0.33 to 0.49"] and len(arrows(axes)) == 1


def test_a_sweep_leaves_out_failures_below_and_what_is_forgotten_above() -> None:
    def panel(*levels: float) -> dict[str, list[Interval]]:
        return {f"arm {k}": [Interval(level, 0.01, 0.01)] * 2 for k, level in enumerate(levels)}

    panels = {"average accuracy": panel(0.19, 0.93, 0.95), "forgetting": panel(0.9, 0.05, 0.03)}
    accuracy, forgetting = plots.sweep("replay.size", [2, 4], panels).axes
    assert texts(accuracy) == ["arm 0 0.19"] and texts(forgetting) == ["arm 0 0.90"]
    assert arrows(accuracy)[0][1] == accuracy.get_ylim()[0] > 0.8
    assert arrows(forgetting)[0][1] == forgetting.get_ylim()[1] < 0.2
