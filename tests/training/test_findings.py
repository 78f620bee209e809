"""Findings: every sentence says what its interval says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import make_result

from gradmix.training.reports import arms as of_arms
from gradmix.training.reports import findings
from gradmix.training.reports.saving import save_run
from gradmix.training.reports.significance import rule_of
from gradmix.training.runs.experiments import from_yaml

TEXT = """
title: Controls
seeds: [0, 1, 2, 3]
base: {data: {benchmark: split-digits}}
arms:
  - {name: mixup, method: mixup}
  - {name: "sample, plain", method: gradmix-sample}
  - {name: at random, method: gradmix-sample, mix: {control: random}}
  - {name: another refresh at random, method: gradmix-sample, mix: {control: random, refresh: 7}}
differences: [["sample, plain", mixup], ["sample, plain", at random], [at random, mixup]]
"""
# Two tasks of constant accuracy: the average accuracy is the level.
NOISE = (0.0, 0.001, -0.001, 0.0005)


def values_of(levels: dict[str, tuple[float, ...]], folder: Path, text: str = TEXT, mixed: float = 0.75) -> Any:
    """The report's values for runs of the given average accuracies, seed by seed; arms without any are missing."""
    experiment = from_yaml(text, "table")
    runs = experiment.runs()
    for run in runs:
        if run.seed < len(levels.get(run.arm, ())):
            result = make_result(run.method, run.seed, tasks=2)
            accuracy = np.full((2, 2), levels[run.arm][run.seed])
            share = (1.0, mixed if run.arm == "at random" else 0.75) if run.method != "mixup" else result.mixed_share
            made = replace(result, accuracy=accuracy, mixed_share=share, config=run.config)
            save_run(made, folder / run.folder, pictures=False)
    return of_arms.collect(experiment, runs, folder)


def around(level: float, *, times: float = 1.0) -> tuple[float, ...]:
    return tuple(level + times * noise for noise in NOISE)


def flat(level: float) -> tuple[float, ...]:
    return (level,) * 4


def said(values: Any) -> dict[str, list[str]]:
    return findings.comparisons(of_arms.summarise(values)[1])


AMONG = "Significant:"
ALONE = "Not significant among the 3 comparisons, though its own interval leaves out 0:"
NOT = "Not significant:"


def test_what_is_significant(tmp_path: Path) -> None:
    values = values_of(
        {"mixup": flat(0.8), "sample, plain": around(0.85), "at random": around(0.8, times=-1.0)}, tmp_path
    )
    found = said(values)
    assert found[AMONG] == [
        "“sample, plain” is above mixup by 0.050 ± 0.001 (4 seeds).",
        "“sample, plain” is above at random by 0.050 ± 0.003 (4 seeds).",
    ]
    (line,) = found[NOT]
    assert line == "at random and mixup: −0.000 ± 0.001 (4 seeds), anything from −0.001 to +0.001."
    assert list(found) == [AMONG, NOT]


def test_by_itself_only(tmp_path: Path) -> None:
    # Of three differences of the same size one is told by its own p, and none by Holm's.
    values = values_of(
        {
            "mixup": flat(0.8),
            "sample, plain": around(0.798, times=1.2),
            "at random": around(0.799, times=20.0),
        },
        tmp_path,
    )
    _, differences = of_arms.summarise(values)
    assert differences[0].p < 0.05 < differences[0].holm
    found = said(values)
    (line,) = found[ALONE]
    assert line.startswith("“sample, plain” is below mixup by 0.002 ± 0.00")
    assert line.endswith(f"(4 seeds, Holm's p = {differences[0].holm:.3f}).")
    assert len(found[NOT]) == 2


def test_one_seed_tells_nothing(tmp_path: Path) -> None:
    values = values_of({"mixup": (0.8,), "sample, plain": (0.9,)}, tmp_path)
    assert said(values) == {NOT: ["“sample, plain” and mixup: +0.100 with one seed, which says nothing about chance."]}
    rows, differences = of_arms.summarise(values)
    assert findings.controls(values, rows, differences) == []
    assert any("One seed says nothing about chance" in line for line in findings.caveats(values, rows))


def test_only_one_comparison_is_not_one_of_many(tmp_path: Path) -> None:
    values = values_of({"mixup": flat(0.8), "sample, plain": around(0.9)}, tmp_path)
    assert list(said(values)) == ["Significant:"]
    assert rule_of(1) == "the p-value of the paired t-test is below 0.05"


def test_varied_values_are_named(tmp_path: Path) -> None:
    text = TEXT + "vary: {replay.size: [2, 8]}\n"
    values = values_of({"mixup": flat(0.8), "sample, plain": around(0.9)}, tmp_path, text)
    (lines,) = said(values).values()
    assert [line.rpartition("(")[2] for line in lines] == [
        "4 seeds, replay.size 2).",
        "4 seeds, replay.size 8).",
    ]


def controls_of(values: Any) -> list[str]:
    return findings.controls(values, *of_arms.summarise(values))


def test_what_a_control_keeps(tmp_path: Path) -> None:
    levels = {"mixup": flat(0.8), "sample, plain": around(0.84), "at random": flat(0.81)}
    (line,) = controls_of(values_of(levels, tmp_path / "a", mixed=0.5))
    assert line.startswith("at random keeps 25 % (95 %: 24 % to 26 %) of “sample, plain”'s +0.040 ± 0.001 over mixup")
    assert line.endswith("(4 seeds). It mixed 50.0 % of the samples, not 75.0 %."), (
        "the other refresh is another method"
    )
    (line,) = controls_of(values_of(levels, tmp_path / "b"))
    assert line.endswith(" Both mixed 75.0 % of the samples.")
    (line,) = controls_of(values_of(levels, tmp_path / "c", mixed=0.745))
    assert line.endswith(" It mixed 74.5 % of the samples, as good as 75.0 %.")


def test_the_gain_is_over_mixup_of_the_same_settings(tmp_path: Path) -> None:
    # Selection's own settings are no matter; those that Mixup has too are.
    text = TEXT.replace("mixup}", "mixup}\n  - {name: weighted, method: mixup, replay: {tau: 2.0}}", 1)
    text = text.replace("[at random, mixup]", '["sample, plain", weighted]').replace(
        '"sample, plain", method: gradmix-sample', '"sample, plain", method: gradmix-sample, mix: {threshold: 0.1}'
    )
    text = text.replace("{control: random}", "{control: random, threshold: 0.1}")
    levels = {"mixup": flat(0.8), "weighted": flat(0.82), "sample, plain": around(0.84), "at random": flat(0.81)}
    (line,) = controls_of(values_of(levels, tmp_path, text))
    assert line.startswith("at random keeps 25 %") and " over mixup " in line


def test_no_share_of_a_gain_that_is_none(tmp_path: Path) -> None:
    levels = {"mixup": flat(0.8), "sample, plain": around(0.8), "at random": flat(0.81)}
    (line,) = controls_of(values_of(levels, tmp_path))
    assert "its interval holds 0, so no share of it can be given" in line


def test_only_seeds_that_all_three_have(tmp_path: Path) -> None:
    levels = {"mixup": flat(0.8), "sample, plain": around(0.84)[:3], "at random": (0.81, 0.81)}
    (line,) = controls_of(values_of(levels, tmp_path))
    assert "(2 seeds)" in line


@pytest.mark.parametrize(
    ("levels", "part"),
    [
        ({"mixup": flat(0.8), "sample, plain": around(0.9)}, "with 4 of them a 95 % interval reaches 3.2 standard"),
        ({"mixup": flat(0.8), "sample, plain": around(0.9), "at random": flat(0.7)}, "that of “sample, plain”, 0.9"),
        ({"mixup": flat(0.8)}, "Accuracies are of test samples"),
    ],
    ids=["few seeds", "the highest", "test samples"],
)
def test_caveats(levels: dict[str, tuple[float, ...]], part: str, tmp_path: Path) -> None:
    values = values_of(levels, tmp_path / "a")
    assert part in " ".join(findings.caveats(values, of_arms.summarise(values)[0]))


def test_validation_rows_are_no_test_rows(tmp_path: Path) -> None:
    text = TEXT.replace("split-digits}", "split-digits, validation: 0.2}")
    values = values_of({"mixup": flat(0.8)}, tmp_path, text)
    assert "test samples" not in " ".join(findings.caveats(values, of_arms.summarise(values)[0]))
