"""Every measure against its formula written out as loops, and worked examples of the intervals."""

from __future__ import annotations

import math
import statistics
import warnings

import numpy as np
import pytest

from gradmix.training.runs import metrics

NAN = float("nan")


def by_loops(R: list[list[float]], chance: float) -> dict[str, float]:
    """The formulas, entry by entry, for a complete matrix."""
    T = len(R)
    averages = [sum(R[t][j] for j in range(t + 1)) / (t + 1) for t in range(T)]
    old = range(T - 1)
    drops = [max(R[i][j] for i in old) - R[T - 1][j] for j in old]
    return {
        "average_accuracy": sum(averages) / T,
        "final_accuracy": sum(R[T - 1]) / T,
        "forgetting": sum(drops) / (T - 1) if T > 1 else NAN,
        "learning_accuracy": sum(R[j][j] for j in range(T)) / T,
        "backward_transfer": sum(R[T - 1][j] - R[j][j] for j in old) / (T - 1) if T > 1 else NAN,
        "forward_transfer": sum(R[i - 1][i] for i in range(1, T)) / (T - 1) - chance if T > 1 else NAN,
    }


def same(a: dict[str, float], b: dict[str, float]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == pytest.approx(b[name], abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 10])
def test_complete_matrices(tasks):
    generator = np.random.default_rng(tasks)
    for _ in range(20):
        R = generator.random((tasks, tasks))
        same(metrics.summary(R, 0.1), by_loops(R.tolist(), 0.1))


def test_worked_example():
    R = [[0.9, 0.0, 0.2], [0.6, 0.8, 0.4], [0.3, 0.7, 1.0]]
    same(
        metrics.summary(R, chance=0.1),
        {
            "average_accuracy": (0.9 + 0.7 + 2.0 / 3) / 3,
            "final_accuracy": 2.0 / 3,
            "forgetting": ((0.9 - 0.3) + (0.8 - 0.7)) / 2,
            "learning_accuracy": (0.9 + 0.8 + 1.0) / 3,
            "backward_transfer": ((0.3 - 0.9) + (0.7 - 0.8)) / 2,
            "forward_transfer": (0.0 + 0.4) / 2 - 0.1,
        },
    )


def test_names_and_formulas_belong_together():
    assert list(metrics.summary(np.eye(2), 0.5)) == list(metrics.FORMULAS)
    for name, formula in metrics.FORMULAS.items():
        assert formula.replace(" ", "") in "".join((getattr(metrics, name).__doc__ or "").split()), name


@pytest.mark.parametrize("reached", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("future", ["measured", "not measured"])
def test_partial_runs_count_as_runs_of_the_tasks_reached(reached, future):
    full = np.random.default_rng(7).random((4, 4))
    R = full.copy()
    R[reached:] = NAN
    if future == "not measured":
        R[np.triu_indices(4, 1)] = NAN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = metrics.summary(R, 0.25)
    if reached == 0:
        assert all(math.isnan(value) for value in result.values())
        return
    expected = by_loops(full[:reached, :reached].tolist(), 0.25)
    ahead = [full[i - 1, i] for i in range(1, min(reached + 1, 4))]
    expected["forward_transfer"] = sum(ahead) / len(ahead) - 0.25 if future == "measured" else NAN
    if future == "not measured" and reached > 1:
        seen = np.where(np.triu(np.ones((4, 4)), 1) > 0, -np.inf, full)
        best = seen[: reached - 1, : reached - 1].max(axis=0)
        expected["forgetting"] = float((best - full[reached - 1, : reached - 1]).mean())
    same(result, expected)


def test_a_row_after_a_gap_is_not_reached():
    R = np.eye(3)
    R[1, 0] = NAN
    assert metrics.final_accuracy(R) == 1.0 and math.isnan(metrics.forgetting(R))


def test_matrix_is_left_alone_and_any_number_type_serves():
    R = np.array([[1, 0], [0, 1]], dtype=np.int32)
    before = R.copy()
    assert metrics.forgetting(R) == 1.0 and metrics.forgetting(R.T.astype(np.float32)) == 1.0
    assert np.array_equal(R, before)


@pytest.mark.parametrize("R", [np.zeros(3), np.zeros((2, 3)), 0.5, np.zeros((2, 2, 2))], ids=lambda R: str(np.shape(R)))
@pytest.mark.parametrize("name", list(metrics.FORMULAS))
def test_other_shapes_are_refused(R, name):
    arguments = (R, 0.1) if name == "forward_transfer" else (R,)
    with pytest.raises(ValueError, match="R: got shape"):
        getattr(metrics, name)(*arguments)


# Quantiles as printed in tables of Student's t: two-sided 95 % and 99 %, by degrees of freedom.
T_TABLE = {(2, 0.95): 12.706, (3, 0.95): 4.303, (5, 0.95): 2.776, (10, 0.95): 2.262, (5, 0.99): 4.604}


@pytest.mark.parametrize(("n", "confidence"), T_TABLE)
def test_interval_against_the_printed_table(n, confidence):
    values = np.random.default_rng(n).random(n)
    mean, std, half_width = metrics.mean_interval(values, confidence)
    assert mean == pytest.approx(statistics.fmean(values)) and std == pytest.approx(statistics.stdev(values))
    assert half_width * math.sqrt(n) / std == pytest.approx(T_TABLE[n, confidence], abs=5e-4)


def test_interval_of_one_value_and_of_nan():
    mean, std, half_width = metrics.mean_interval([0.5])
    assert mean == 0.5 and math.isnan(std) and math.isnan(half_width)
    assert all(math.isnan(value) for value in metrics.mean_interval([0.5, NAN, 0.25]))


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    trials = 400
    hits = 0
    for _ in range(trials):
        interval = metrics.mean_interval(generator.normal(size=4), 0.9)
        hits += abs(interval.mean) <= interval.half_width
    assert abs(hits / trials - 0.9) < 5 * math.sqrt(0.9 * 0.1 / trials)


def test_paired_difference_takes_out_what_seeds_share():
    shared = np.array([0.1, 0.5, 0.9, 0.3])
    gain = np.array([0.02, 0.03, 0.02, 0.03])
    paired = metrics.paired_difference(shared + gain, shared)
    assert paired.mean == pytest.approx(0.025) and paired.std == pytest.approx(statistics.stdev(gain))
    assert paired.half_width < 0.1 * metrics.mean_interval(shared).half_width
    assert paired == pytest.approx(metrics.mean_interval(gain))


BAD_VALUES = {
    "none": (lambda: metrics.mean_interval([]), "values: got shape"),
    "two dimensions": (lambda: metrics.mean_interval(np.zeros((2, 2))), "values: got shape"),
    "confidence 1": (lambda: metrics.mean_interval([1.0, 2.0], 1.0), "confidence: got 1.0"),
    "confidence 95": (lambda: metrics.mean_interval([1.0, 2.0], 95), "confidence: got 95"),
    "unequal lengths": (lambda: metrics.paired_difference([1.0, 2.0], [1.0]), r"b: got shape \(1,\), expected \(2,\)"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values(case):
    call, message = BAD_VALUES[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.5, NAN, 1.0], 0.75), ([0.0], 0.0), ([], NAN), ([NAN, NAN], NAN)],
    ids=["some known", "one", "none", "none known"],
)
def test_mean_of_known(values: list[float], expected: float) -> None:
    assert metrics.mean_of_known(values) == pytest.approx(expected, nan_ok=True)
