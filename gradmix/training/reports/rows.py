"""The rows of tables: an arm or a method over its seeds, and paired differences between two of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from gradmix.training.reports.significance import LEVEL, holm, paired_p_value
from gradmix.training.runs import metrics
from gradmix.training.runs.experiments import label_of
from gradmix.training.runs.metrics import Interval
from gradmix.training.runs.results import METRIC_LABELS, R_MEANING


@dataclass(frozen=True)
class Row:
    """An arm over its complete runs.

    Attributes:
        arm: The arm's name.
        by_seed: The metrics of each run, accuracies in [0, 1], by training seed.
        values: The varied settings' values.
    """

    arm: str
    by_seed: Mapping[int, Mapping[str, float]]
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The arm and the varied values."""
        return label_of(self.arm, self.values)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The training seeds."""
        return tuple(self.by_seed)

    @cached_property
    def metrics(self) -> dict[str, Interval]:
        """Mean, standard deviation and half of the 95 % t-interval of each metric."""
        return {name: metrics.mean_interval([run[name] for run in self.by_seed.values()]) for name in METRIC_LABELS}


@dataclass(frozen=True)
class Difference:
    """One row minus another, paired over the seeds that both have.

    Attributes:
        arm: The first.
        minus: The second.
        seeds: The shared seeds.
        metrics: Mean, standard deviation and half of the 95 % t-interval of each metric's differences.
        values: The varied settings' values, which are the same in both.
        p: Two-sided p-value of the paired t-test for average accuracy; NaN with fewer than two seeds.
        holm: The same, adjusted by Holm's method for all the differences of the table.
    """

    arm: str
    minus: str
    seeds: tuple[int, ...]
    metrics: Mapping[str, Interval]
    values: Mapping[str, Any] = field(default_factory=dict)
    p: float = math.nan
    holm: float = math.nan

    @property
    def label(self) -> str:
        """Both arms and the varied values."""
        return label_of(f"{self.arm} − {self.minus}", self.values)

    @property
    def significant(self) -> bool:
        """Whether the difference of average accuracy is significant among all those of the table."""
        return self.holm < LEVEL


def compare(pairs: Iterable[tuple[Row, Row]]) -> list[Difference]:
    """Compute the difference of each pair of rows that share a seed, the first minus the second."""
    found = []
    for a, b in pairs:
        seeds = tuple(seed for seed in a.seeds if seed in b.seeds)
        if seeds:
            by_metric = {
                name: metrics.paired_difference(
                    [a.by_seed[seed][name] for seed in seeds], [b.by_seed[seed][name] for seed in seeds]
                )
                for name in METRIC_LABELS
            }
            p = paired_p_value(by_metric["average_accuracy"], len(seeds))
            found.append(Difference(a.arm, b.arm, seeds, by_metric, a.values, p))
    adjusted = holm([difference.p for difference in found])
    return [replace(difference, holm=q) for difference, q in zip(found, adjusted, strict=True)]


def to_plain(row: Row | Difference) -> dict[str, Any]:
    """Return what a row and a difference have in common as plain values."""
    plain = {name: interval._asdict() for name, interval in row.metrics.items()}
    return {"label": row.label, "seeds": list(row.seeds), "metrics": plain}


def formulas() -> dict[str, Any]:
    """Return what the plain values of rows and differences mean; ``half_width`` is half of the 95 % t-interval."""
    return {
        "confidence": 0.95,
        "formulas": {name: metrics.FORMULAS[name] for name in METRIC_LABELS},
        "formula_terms": R_MEANING,
    }
