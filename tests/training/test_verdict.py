"""The sentences under the tables: nothing is called a difference that an interval does not leave 0 out of."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gradmix.training.reports.tables import MethodRow
from gradmix.training.reports.verdict import verdict

METRICS = ("average_accuracy", "final_accuracy", "forgetting", "learning_accuracy", "backward_transfer")


def row(name: str, accuracies: Sequence[float], share: float = float("nan")) -> MethodRow:
    metrics = {name: 0.0 for name in (*METRICS, "forward_transfer")}
    by_seed = {seed: metrics | {"average_accuracy": value} for seed, value in enumerate(accuracies)}
    return MethodRow(name, by_seed, method=name, step_ms=1.0, selection_share=share, data_share=0.1)


ER = row("er", [0.50, 0.51, 0.52])
MIXUP = row("mixup", [0.60, 0.50, 0.55], share=0.0)
SELECTING = row("gradmix-sample", [0.60, 0.61, 0.63], share=0.25)


def test_what_is_told_apart_and_what_is_not() -> None:
    sentence, cost = verdict([ER, MIXUP, SELECTING])
    # Differences to er: 0.10, 0.10, 0.11; mean 0.1033, standard deviation 0.00577, and t = 4.3027.
    assert sentence == (
        "gradmix-sample is 0.103 ± 0.014 above er, and does not differ significantly from mixup (+0.063 ± 0.141) in "
        "average accuracy."
    )
    assert cost.startswith("Selection took 25.0 % (gradmix-sample) of the steps' time here.")


def test_the_order_of_rows_turns_no_sign() -> None:
    assert verdict([SELECTING, MIXUP, ER])[0].count("0.103 ± 0.014 above er") == 1


def test_below_is_said_as_plainly_as_above() -> None:
    worse = row("gradmix-class", [0.40, 0.41, 0.42], share=0.5)
    assert "gradmix-class is 0.100 ± 0.000 below er in" in verdict([ER, worse])[0]


def test_a_difference_that_holds_by_itself_only_has_its_p() -> None:
    # Differences of 0.02, 0.03 and 0.04: t = 5.2 with two degrees of freedom, p = 0.035; two comparisons.
    close = row("mixup", [0.595, 0.600, 0.610])
    far = row("er", [0.58, 0.58, 0.59])
    assert "is 0.030 ± 0.025 above er (Holm's p = 0.070), and" in verdict([far, close, SELECTING])[0]


def test_one_seed_is_no_evidence() -> None:
    first, _ = verdict([row("er", [0.1]), row("gradmix-sample", [0.9], share=0.3)])
    assert first == "One seed tells nothing of chance: give several, as --seeds 0 1 2."


@pytest.mark.parametrize("rows", [[], [ER], [ER, MIXUP], [SELECTING]], ids=["none", "one", "no selection", "alone"])
def test_nothing_is_said_without_a_comparison(rows: list[MethodRow]) -> None:
    assert verdict(rows) == []
