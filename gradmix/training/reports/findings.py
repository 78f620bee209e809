"""The findings of an experiment in words: each sentence follows from an interval, and none goes beyond it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradmix.training.reports.cells import percent, probability, with_sign
from gradmix.training.reports.significance import Ratio, ratio_interval, t_quantile
from gradmix.training.runs.experiments import label_of
from gradmix.training.runs.metrics import mean_interval

if TYPE_CHECKING:
    from gradmix.training.reports.arms import ArmRow
    from gradmix.training.reports.rows import Difference

_METRIC = "average_accuracy"
_CONTROL = ("mix.control", "mix.control_rate")
# What selection has and Mixup does not: Mixup of the same settings may differ in it.
_SELECTION = {f"mix.{key}" for key in ("estimator", "policy", "threshold", "refresh", "class_samples", "reference")}
# Shares of samples mixed that differ by less count as one rate.
_SAME_RATE = 0.01


def divergence_note(seeds: Sequence[int], of: int) -> str:
    """Say that some of an arm's runs have diverged, and which.

    Example:
        >>> divergence_note([3], 5)
        '1 of 5 seeds diverged (3): the loss was not finite; in no mean, interval, difference or plot'
    """
    listed = ", ".join(map(str, seeds))
    return (
        f"{len(seeds)} of {of} seeds diverged ({listed}): the loss was not finite; in no mean, interval, difference or "
        "plot"
    )


def comparisons(differences: Sequence[Difference]) -> dict[str, list[str]]:
    """A sentence for each difference, under one of three headings, as far as there is a difference for it.

    The headings: significant (:attr:`Difference.significant`); not significant though its interval leaves out 0;
    neither.
    """
    tests = sum(not math.isnan(d.p) for d in differences)
    heads = {
        "among": "Significant:",
        "alone": f"Not significant among the {tests} comparisons, though its own interval leaves out 0:",
        "not": "Not significant:",
    }
    found: dict[str, list[str]] = {head: [] for head in heads.values()}
    for d in differences:
        kind = "among" if d.significant else "alone" if d.metrics[_METRIC].excludes_zero else "not"
        found[heads[kind]].append(_comparison(d, kind))
    return {head: said for head, said in found.items() if said}


def controls(values: Mapping[str, Any], rows: Sequence[ArmRow], differences: Sequence[Difference]) -> list[str]:
    """A sentence for each control: the share that it keeps of what its method gains over Mixup.

    A control is an arm that sets ``mix.control``; its method the arm of the same settings without; the gain is spoken
    of if the method's difference to Mixup of the same settings is one of the experiment's.

    Args:
        values: Those of ``results.json``.
        rows: Its rows.
        differences: Its differences.
    """
    arms = {arm["name"]: arm for arm in values["arms"]}
    found = []
    for name, arm in arms.items():
        if arm["settings"].get(_CONTROL[0], "none") == "none":
            continue
        for gain in differences:
            method, least = arms[gain.arm], arms[gain.minus]
            plain = not set(_CONTROL) & set(method["settings"])
            if plain and _identity(method) == _identity(arm) and _is_mixup_of(least, method):
                found += _share_of_gain(name, gain, rows)
    return found


def caveats(values: Mapping[str, Any], rows: Sequence[ArmRow]) -> list[str]:
    """The caveats of the figures: what the intervals are over, how few seeds there are, and what was chosen."""
    found = [
        "The intervals are over training seeds: how far another initialisation, other batches and another buffer would "
        "move the figures. They say nothing of other data, settings or orders of the classes."
    ]
    fewest = min(len(row.runs) for row in rows)
    if fewest == 1:
        found.append("One seed says nothing about chance; some arms have no more.")
    elif fewest < 10:
        found.append(
            f"Seeds are few: with {fewest} of them a 95 % interval reaches {t_quantile(fewest):.1f} standard errors to "
            "either side, with many 2.0, and it takes the figures to be normally distributed."
        )
    if len(rows) > 2 and not values["vary"] and fewest > 1:
        best = max(rows, key=lambda row: row.metrics[_METRIC].mean)
        interval = best.metrics[_METRIC]
        found.append(
            f"The highest average accuracy is that of {_quote(best.label)}, {interval.mean:.3f} ± "
            f"{interval.half_width:.3f}. Being the highest of {len(rows)}, that mean owes some of its height to chance."
        )
    if values["protocol"].get("data.validation") == 0:
        found.append(
            "Accuracies are of test samples; settings that were chosen by them would make them look better than they "
            "are."
        )
    return found


def _comparison(d: Difference, kind: str) -> str:
    mean, _, half = d.metrics[_METRIC]
    first, second = _quote(d.arm), _quote(d.minus)
    where = f", {_at(d.values)}" if d.values else ""
    if math.isnan(mean):
        return f"{first} and {second}{where}: no figure."
    if math.isnan(half):
        return f"{first} and {second}{where}: {with_sign(mean)} with one seed, which says nothing about chance."
    seeds = f"{len(d.seeds)} seeds"
    if kind == "not":
        low, high = with_sign(mean - half), with_sign(mean + half)
        return f"{first} and {second}{where}: {with_sign(mean)} ± {half:.3f} ({seeds}), anything from {low} to {high}."
    # By itself only: so Holm's p is known, and 0.05 or above.
    p = f", Holm's p = {probability(d.holm)}" if kind == "alone" else ""
    return (
        f"{first} is {'above' if mean > 0 else 'below'} {second} by {abs(mean):.3f} ± {half:.3f} ({seeds}{where}{p})."
    )


def _quote(arm: str) -> str:
    # A name with a comma in it would run into the sentence.
    return f"“{arm}”" if "," in arm else arm


def _at(values: Mapping[str, Any]) -> str:
    return label_of("", values).removeprefix(", ")


def _identity(arm: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return arm["method"], {key: value for key, value in arm["settings"].items() if key not in _CONTROL}


def _is_mixup_of(least: Mapping[str, Any], method: Mapping[str, Any]) -> bool:
    of_mixup = {key: value for key, value in method["settings"].items() if key not in _SELECTION}
    return bool(least["method"] == "mixup" and least["settings"] == of_mixup)


def _share_of_gain(control: str, gain: Difference, rows: Sequence[ArmRow]) -> list[str]:
    names = (gain.arm, gain.minus, control)
    at = {row.arm: row for row in rows if dict(row.values) == dict(gain.values) and row.arm in names}
    if len(at) < 3:
        return []
    of = [{run["seed"]: run["metrics"][_METRIC] for run in at[name].runs} for name in names]
    seeds = [seed for seed in of[0] if all(one.get(seed) is not None for one in of)]
    if len(seeds) < 2:
        return []
    whole, part = [of[0][s] - of[1][s] for s in seeds], [of[2][s] - of[1][s] for s in seeds]
    kept: Ratio = ratio_interval(part, whole)
    mean, _, half = mean_interval(whole)
    where = f", {_at(gain.values)}" if gain.values else ""
    gained = (
        f"{_quote(gain.arm)}'s {with_sign(mean)} ± {half:.3f} over {_quote(gain.minus)} ({len(seeds)} seeds{where})"
    )
    if math.isnan(kept.ratio):
        return [f"{_quote(control)}: {gained}: its interval holds 0, so no share of it can be given."]
    share = f"{_share(kept.ratio)} (95 %: {_share(kept.low)} to {_share(kept.high)})"
    return [f"{_quote(control)} keeps {share} of {gained}.{_rates(at[control], at[gain.arm])}"]


def _rates(control: ArmRow, method: ArmRow) -> str:
    """State the share that either mixed: a control that mixes another share of the samples controls for less."""
    if math.isnan(control.mixed_share) or math.isnan(method.mixed_share):
        return ""
    mixed, others = percent(control.mixed_share), percent(method.mixed_share)
    if mixed == others:
        return f" Both mixed {mixed} of the samples."
    if abs(control.mixed_share - method.mixed_share) < _SAME_RATE:
        return f" It mixed {mixed} of the samples, as good as {others}."
    return f" It mixed {mixed} of the samples, not {others}."


def _share(value: float) -> str:
    return f"{100 * value:.0f} %".replace("-", "−")
