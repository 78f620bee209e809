"""The sentences under the tables: nothing is called above or below that is not significant among all comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from synthetic_runs import make_result

from gradmix.training.config import DataConfig, OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.reports import tables
from gradmix.training.reports.advice import old_share
from gradmix.training.reports.tables import MethodRow
from gradmix.training.reports.verdict import verdict
from gradmix.training.runs.results import RunResult

METRICS = ("average_accuracy", "final_accuracy", "forgetting", "learning_accuracy", "backward_transfer")


def row(
    name: str,
    accuracies: Sequence[float],
    share: float = float("nan"),
    learning: Sequence[float] = (0.0,) * 5,
    **others: Any,
) -> MethodRow:
    metrics = {name: 0.0 for name in (*METRICS, "forward_transfer")}
    by_seed = {
        seed: metrics | {"average_accuracy": value, "learning_accuracy": learning[seed]}
        for seed, value in enumerate(accuracies)
    }
    return MethodRow(name, by_seed, method=name, step_ms=1.0, selection_share=share, data_share=0.1, **others)


ER = row("er", [0.50, 0.51, 0.52])
MIXUP = row("mixup", [0.60, 0.50, 0.55], share=0.0)
SELECTING = row("gradmix-sample", [0.60, 0.61, 0.63], share=0.25)


def test_what_is_significant_and_what_is_not() -> None:
    sentence, cost = verdict([ER, MIXUP, SELECTING])
    # Differences to er: 0.10, 0.10, 0.11; mean 0.1033, standard deviation 0.00577, and t = 4.3027.
    assert sentence == (
        "gradmix-sample is 0.103 ± 0.014 above er, and does not differ significantly from mixup (+0.063 ± 0.141) in "
        "average accuracy. A method is above or below another where their difference is significant: Holm's p, "
        "adjusted for the 2 comparisons, is below 0.05."
    )
    assert cost.startswith("Selection took 25.0 % (gradmix-sample) of the steps' time here.")


def test_the_order_of_rows_turns_no_sign() -> None:
    assert verdict([SELECTING, MIXUP, ER])[0].count("0.103 ± 0.014 above er") == 1


def test_below_is_said_as_plainly_as_above() -> None:
    worse = row("gradmix-class", [0.40, 0.41, 0.42], share=0.5)
    assert "gradmix-class is 0.100 ± 0.000 below er in" in verdict([ER, worse])[0]


def test_a_difference_that_holds_by_itself_only_is_not_significant_and_has_its_p() -> None:
    # Differences of 0.02, 0.03 and 0.04: t = 5.2 with two degrees of freedom, p = 0.035; two comparisons.
    close = row("mixup", [0.595, 0.600, 0.610])
    far = row("er", [0.58, 0.58, 0.59])
    first = verdict([far, close, SELECTING])[0]
    assert first.startswith(
        "gradmix-sample does not differ significantly from er (+0.030 ± 0.025, Holm's p = 0.070) and mixup (+0.012 ± "
    )
    assert "Holm's p = " in first and "above er" not in first
    alone = verdict([far, SELECTING])[0]
    assert alone.startswith("gradmix-sample is 0.030 ± 0.025 above er in"), "the only comparison"
    assert alone.endswith("the p-value of the paired t-test is below 0.05.")


def test_the_rule_stands_once() -> None:
    said = " ".join(verdict([ER, MIXUP, SELECTING, row("gradmix-class", [0.6, 0.62, 0.63], share=0.1)]))
    assert said.count("where their difference is significant: Holm's p, adjusted for the 4 comparisons,") == 1
    assert said.index("above er") < said.index("is significant: ") < said.index("gradmix-class is")


def test_one_seed_is_no_evidence() -> None:
    first, _ = verdict([row("er", [0.1]), row("gradmix-sample", [0.9], share=0.3)])
    assert first == "One seed says nothing about chance: give several, as --seeds 0 1 2 3 4."


def test_two_seeds_are_little_evidence() -> None:
    # Differences to er of −0.15 and −0.17: t = 16, p = 0.040, of two comparisons 0.079.
    rows = [row("er", [0.50, 0.51]), row("mixup", [0.4, 0.3]), row("gradmix-sample", [0.35, 0.34], share=0.3)]
    first, few, _ = verdict(rows)
    assert first.startswith(
        "gradmix-sample does not differ significantly from er (−0.160 ± 0.127, Holm's p = 0.079) and mixup (−0.005 ± "
    )
    assert few == (
        "Two seeds say little about chance: a 95 % interval reaches 12.7 standard errors to either side, that of five "
        "seeds 2.8. Give more, as --seeds 0 1 2 3 4."
    )
    assert not any(line.startswith("Two seeds") for line in verdict([ER, SELECTING]))


def test_a_method_with_one_seed_in_common_is_not_called_alike() -> None:
    first = verdict([ER, row("mixup", [0.5]), SELECTING])[0]
    assert first.startswith(
        "gradmix-sample is 0.103 ± 0.014 above er in average accuracy. gradmix-sample shares one seed with mixup "
        "(+0.100): it says nothing about chance. "
    )


# ------------------------------------------------------------------------------------------------- settings to look at

NO_GAIN = [0.50, 0.52, 0.51]


def look_at(*rows: MethodRow) -> list[str]:
    return [line for line in verdict(rows) if line.startswith("No significant gain")]


def test_rare_old_samples_suggest_the_shuffled_stream() -> None:
    assert look_at(ER, MIXUP, row("gradmix-sample", NO_GAIN, share=0.2, old_share=0.021)) == [
        "No significant gain over er or mixup was found. Settings to look at: --replay-stream shuffled, the protocol "
        "of gradmix train with nothing given (old samples would be 2.1 % of the last task's samples: where they are "
        "rare selection gains most over the others, and all methods are less accurate)."
    ]


def test_a_lower_learning_accuracy_suggests_the_originals() -> None:
    er = row("er", [0.50, 0.51, 0.52], learning=[0.90, 0.91, 0.92])
    # Differences of −0.10, −0.10 and −0.11.
    lower = {"share": 0.2, "learning": [0.80, 0.81, 0.81]}
    assert look_at(er, row("gradmix-sample", NO_GAIN, **lower)) == [
        "No significant gain over er was found. Settings to look at: --mix-originals (the learning accuracy of "
        "gradmix-sample is 0.103 ± 0.014 below er's)."
    ]
    (both,) = look_at(er, row("gradmix-sample", NO_GAIN, **lower, old_share=0.05))
    assert "--replay-stream shuffled" in both and "); --mix-originals (" in both


@pytest.mark.parametrize(
    "rows",
    [
        [ER, SELECTING],
        [ER, row("gradmix-sample", NO_GAIN, share=0.2)],
        [ER, row("gradmix-sample", NO_GAIN, share=0.2, old_share=0.3)],
        [ER, row("gradmix-sample", NO_GAIN, share=0.2, learning=[0.1, -0.1, 0.05])],
        [row("er", NO_GAIN, learning=[1.0] * 3), row("gradmix-sample", NO_GAIN, share=0.2, originals=True)],
        [row("remix", NO_GAIN), row("gradmix-sample", NO_GAIN, share=0.2, old_share=0.01)],
        [ER, row("mixup", NO_GAIN, old_share=0.01)],
    ],
    ids=["a gain", "shuffled", "many", "learning differs by chance", "originals", "no baseline", "no selection"],
)
def test_no_setting_is_named_without_its_reason(rows: list[MethodRow]) -> None:
    assert look_at(*rows) == []


def test_the_share_of_old_samples_comes_from_the_run() -> None:
    # Five tasks of 2 classes, 1,450 steps of 16 in 10 epochs: 464 samples a task; 8 old classes of 4 samples.
    def run(tasks: int = 5, **replay: Any) -> RunResult:
        config = TrainConfig(
            optim=OptimConfig(epochs=10, batch=16),
            replay=ReplayConfig(**{"policy": "class", "size": 4, "batch": 16, "stream": "dual"} | replay),
        )
        return make_result("er", tasks=tasks, steps=290 * tasks, config=config)

    assert old_share(run()) == pytest.approx(32 / (32 + 464))
    assert old_share(run(policy="balanced", size=100)) == pytest.approx(100 / 564)
    assert old_share(run(size=10_000)) == pytest.approx(4 / 5), "no more than there are"
    assert math.isnan(old_share(run(stream="shuffled"))) and math.isnan(old_share(run(tasks=1)))
    online = replace(run().config, data=DataConfig(online=True))
    assert math.isnan(old_share(replace(run(), config=online)))
    (line,) = tables.summarise([run()]).rows
    assert (line.old_share, line.originals) == (old_share(run()), False)


@pytest.mark.parametrize("rows", [[], [ER], [ER, MIXUP], [SELECTING]], ids=["none", "one", "no selection", "alone"])
def test_nothing_is_said_without_a_comparison(rows: list[MethodRow]) -> None:
    assert verdict(rows) == []
