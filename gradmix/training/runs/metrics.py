"""Measures of a class-incremental run, all from one accuracy matrix, and their intervals over seeds.

``R[i, j]`` is the accuracy on task j after training on task i; T tasks make a T x T matrix. Entries not measured are
NaN. Row t counts as reached if ``R[t, 0..t]`` are all there and every row before it was reached. A run that broke off
is measured over the n rows reached, that is, as if the stream had had n tasks. A measure without anything to average
(no row reached, or a single task where old tasks are asked for) is NaN.

All measures take R as a matrix ``(T, T)``, raise a ValueError if it is not square, and are in its unit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gradmix.training.extras import import_extra

FORMULAS: dict[str, str] = {
    "average_accuracy": "mean over t of mean_{j<=t} R[t,j]",
    "final_accuracy": "mean_j R[T,j]",
    "forgetting": "mean over j<T of max_{l<T} R[l,j] - R[T,j]",
    "learning_accuracy": "mean_j R[j,j]",
    "backward_transfer": "mean over j<T of R[T,j] - R[j,j]",
    "forward_transfer": "mean over i>1 of R[i-1,i] minus the accuracy of chance",
}
"""Formula of every measure, by name; R[i,j] = accuracy on task j after training on task i, of tasks 1 to T."""


class Interval(NamedTuple):
    """Mean of some values, their standard deviation, and half the width of the mean's confidence interval."""

    mean: float
    std: float
    half_width: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval; of what is not known, it is not."""
        return abs(self.mean) > self.half_width

    @property
    def ends(self) -> tuple[float, float]:
        """Lower and upper end of the interval; twice the mean where it has no width."""
        half = 0.0 if math.isnan(self.half_width) else self.half_width
        return self.mean - half, self.mean + half


def average_accuracy(R: npt.ArrayLike) -> float:
    """Average accuracy, the paper's measure: mean over t of mean_{j<=t} R[t, j].

    Example:
        >>> average_accuracy([[1.0, 0.0], [0.5, 0.75]])  # (1 + (0.5 + 0.75) / 2) / 2
        0.8125
        >>> average_accuracy([[1.0, 0.0], [float("nan"), float("nan")]])
        1.0
    """
    matrix, reached = _rows_reached(R)
    return _mean([float(matrix[t, : t + 1].mean()) for t in range(reached)])


def final_accuracy(R: npt.ArrayLike) -> float:
    """Final accuracy: mean_j R[T, j], of tasks 1 to T.

    Example:
        >>> final_accuracy([[1.0, 0.0], [0.5, 0.75]])
        0.625
    """
    matrix, n = _rows_reached(R)
    return _mean(matrix[n - 1, :n].tolist() if n else [])


def forgetting(R: npt.ArrayLike) -> float:
    """Forgetting: mean over j<T of max_{l<T} R[l, j] - R[T, j], of tasks 1 to T.

    The maximum passes over entries that were not measured (NaN above the diagonal).

    Example:
        >>> forgetting([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.75, 1.0]])  # ((1 - 0.25) + (1 - 0.75)) / 2
        0.5
    """
    matrix, n = _rows_reached(R)
    return _mean([float(np.nanmax(matrix[: n - 1, j]) - matrix[n - 1, j]) for j in range(n - 1)])


def learning_accuracy(R: npt.ArrayLike) -> float:
    """Learning accuracy: mean_j R[j, j], the accuracy on each task when it has just been learnt.

    What is won in forgetting may have been paid for here: final accuracy = learning accuracy + (T - 1) / T * backward
    transfer.

    Example:
        >>> learning_accuracy([[1.0, 0.0], [0.5, 0.75]])
        0.875
    """
    matrix, n = _rows_reached(R)
    return _mean([float(matrix[j, j]) for j in range(n)])


def backward_transfer(R: npt.ArrayLike) -> float:
    """Backward transfer (BWT): mean over j<T of R[T, j] - R[j, j], of tasks 1 to T.

    Example:
        >>> backward_transfer([[1.0, 0.0, 0.0], [0.5, 0.75, 0.0], [0.25, 1.0, 1.0]])  # ((0.25 - 1) + (1 - 0.75)) / 2
        -0.25
    """
    matrix, n = _rows_reached(R)
    return _mean([float(matrix[n - 1, j] - matrix[j, j]) for j in range(n - 1)])


def forward_transfer(R: npt.ArrayLike, chance: float) -> float:
    """Forward transfer (FWT): mean over i>1 of R[i-1, i] minus the accuracy of chance, of tasks 1 to T.

    Args:
        R: The matrix, with the entries just above the diagonal.
        chance: Accuracy of guessing, in the unit of ``R``.

    Returns:
        The measure over the tasks that follow a row reached; NaN if one of their entries was not measured, or with a
        single task.

    Example:
        >>> forward_transfer([[1.0, 0.75, 0.0], [0.5, 1.0, 0.25], [0.0, 0.0, 1.0]], chance=0.25)
        0.25
    """
    matrix, n = _rows_reached(R)
    return _mean([float(matrix[i - 1, i]) for i in range(1, min(n + 1, len(matrix)))]) - chance


def summary(R: npt.ArrayLike, chance: float) -> dict[str, float]:
    """All measures of :data:`FORMULAS`, by name and in that order.

    Example:
        >>> {name: round(value, 3) for name, value in summary([[1.0, 0.0], [0.5, 0.75]], chance=0.5).items()}
        {'average_accuracy': 0.812, 'final_accuracy': 0.625, 'forgetting': 0.5, 'learning_accuracy': 0.875, \
'backward_transfer': -0.5, 'forward_transfer': -0.5}
    """
    return {
        "average_accuracy": average_accuracy(R),
        "final_accuracy": final_accuracy(R),
        "forgetting": forgetting(R),
        "learning_accuracy": learning_accuracy(R),
        "backward_transfer": backward_transfer(R),
        "forward_transfer": forward_transfer(R, chance),
    }


def accuracy_on_seen(accuracy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute the mean accuracy on the tasks seen after each task: ``(T, T)`` to ``(T,)``, NaN where not reached.

    Example:
        >>> accuracy_on_seen(np.array([[1.0, 0.0], [0.5, 0.75]]))
        array([1.   , 0.625])
    """
    return np.array([accuracy[t, : t + 1].mean() for t in range(len(accuracy))])


def mean_interval(values: Sequence[float] | npt.NDArray[np.float64], confidence: float = 0.95) -> Interval:
    """Mean, standard deviation and Student's t-interval of the mean, for values over seeds.

    The standard deviation is the sample's, with n - 1 below; half the interval is ``t * std / sqrt(n)`` with t the
    ``(1 + confidence) / 2`` quantile of Student's t-distribution of n - 1 degrees of freedom.

    Args:
        values: ``(n,)`` values, at least one.
        confidence: Probability of the interval, within (0, 1).

    Returns:
        ``(mean, std, half_width)``. For a single value the last two are NaN; a NaN among the values makes all NaN.

    Raises:
        ValueError: There is no value, or ``values`` is not one-dimensional, or ``confidence`` is out of range.
        ModuleNotFoundError: scipy is not installed.

    Example:
        >>> mean, std, half_width = mean_interval([0.5, 0.625, 0.75])
        >>> mean, std, round(half_width, 4)
        (0.625, 0.125, 0.3105)
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"values: got shape {array.shape}, expected (n,) with at least one value")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: got {confidence}, expected a probability within (0, 1)")
    mean, n = float(array.mean()), len(array)
    if n == 1 or math.isnan(mean):
        return Interval(mean, math.nan, math.nan)
    # Student's t: scipy.stats takes a second to import.
    stdtrit = import_extra("scipy.special", "the t-interval needs scipy").stdtrit
    std = float(array.std(ddof=1))
    return Interval(mean, std, float(stdtrit(n - 1, (1.0 + confidence) / 2.0)) * std / math.sqrt(n))


def mean_of_known(values: Sequence[float]) -> float:
    """The mean of those values that are not NaN; NaN if there is none.

    Example:
        >>> mean_of_known([0.5, math.nan, 1.0])
        0.75
    """
    known = without_nan(values)
    return sum(known) / len(known) if known else math.nan


def median_of_known(values: Iterable[float]) -> float:
    """The median of the values that are not NaN; NaN if there is none.

    Example:
        >>> median_of_known([1.0, float("nan"), 2.0, 9.0])
        2.0
    """
    return statistics.median(without_nan(values) or [math.nan])


def without_nan(values: Iterable[float]) -> list[float]:
    """The values that are not NaN."""
    return [v for v in values if not math.isnan(v)]


def paired_difference(
    a: Sequence[float] | npt.NDArray[np.float64],
    b: Sequence[float] | npt.NDArray[np.float64],
    confidence: float = 0.95,
) -> Interval:
    """The differences ``a[k] - b[k]`` of two methods on the same seeds: their :func:`mean_interval`.

    Pairing takes out what the seeds have in common, so the interval is narrower than that of two separate means.

    Args:
        a: ``(n,)`` values of one method, one for each seed.
        b: ``(n,)`` values of the other, for the same seeds in the same order.
        confidence: Probability of the interval, within (0, 1).

    Raises:
        ValueError: The lengths differ, or as in :func:`mean_interval`.

    Example:
        >>> mean, std, half_width = paired_difference([0.75, 0.875], [0.5, 0.625])
        >>> mean, std, half_width
        (0.25, 0.0, 0.0)
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"b: got shape {right.shape}, expected {left.shape} as in a, one value for each shared seed")
    return mean_interval(left - right, confidence)


def _rows_reached(R: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], int]:
    """The matrix, checked, and the number of its rows reached."""
    matrix = np.asarray(R, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"R: got shape {matrix.shape}, expected a square matrix (T, T)")
    rows = range(len(matrix))
    return matrix, next((t for t in rows if np.isnan(matrix[t, : t + 1]).any()), len(matrix))


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan
