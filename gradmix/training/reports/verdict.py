"""The tables over runs in a few sentences: what selection gained over methods without it, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradmix.training.reports import cells
from gradmix.training.reports.advice import advice
from gradmix.training.reports.rows import Difference, compare
from gradmix.training.reports.significance import rule_of, t_quantile

if TYPE_CHECKING:
    from gradmix.training.reports.tables import MethodRow

_METRIC = "average_accuracy"
_MORE_SEEDS = "as --seeds 0 1 2 3 4"


def verdict(rows: Sequence[MethodRow]) -> list[str]:
    """Compare each method that selects pairs with each that does not.

    A method is above or below another if the difference is significant (:attr:`Difference.significant`) among all of
    these comparisons. Where the 95 % t-interval of another leaves out 0, its Holm's p is given.

    Returns:
        Sentences; none if there is nothing to compare.
    """
    selecting = [row for row in rows if row.selection_share > 0]
    others = [row for row in rows if not row.selection_share > 0]
    differences = compare((row, other) for row in selecting for other in others)
    if not differences:
        return []
    tests = sum(not math.isnan(d.p) for d in differences)
    if not tests:
        return [f"One seed says nothing about chance: give several, {_MORE_SEEDS}.", _cost(selecting)]
    first, *more = filter(None, (_of_row([d for d in differences if d.arm == row.arm]) for row in selecting))
    rule = f"A method is above or below another where their difference is significant: {rule_of(tests)}."
    few = [_few_seeds()] if max(len(d.seeds) for d in differences) == 2 else []
    return [f"{first} {rule}", *more, *few, *advice(rows, differences), _cost(selecting)]


def _of_row(differences: Sequence[Difference]) -> str:
    significant = [_difference(d) for d in differences if d.significant]
    alike = [_not_significant(d) for d in differences if not d.significant and not math.isnan(d.p)]
    untested = [f"{d.minus} ({_figure(d)})" for d in differences if math.isnan(d.p)]
    parts = [f"is {_join(significant)}"] if significant else []
    parts += [f"does not differ significantly from {_join(alike)}"] if alike else []
    arm = differences[0].arm
    said = [f"{arm} {', and '.join(parts)} in average accuracy."] if parts else []
    said += [f"{arm} shares one seed with {_join(untested)}: it says nothing about chance."] if untested else []
    return " ".join(said)


def _difference(d: Difference) -> str:
    mean, _, half = d.metrics[_METRIC]
    return f"{abs(mean):.3f} ± {half:.3f} {'above' if mean > 0 else 'below'} {d.minus}"


def _not_significant(d: Difference) -> str:
    alone = f", Holm's p = {cells.probability(d.holm)}" if d.metrics[_METRIC].excludes_zero else ""
    return f"{d.minus} ({_figure(d)}{alone})"


def _figure(d: Difference) -> str:
    return cells.interval(d.metrics[_METRIC], "{mean:+.3f} ± {half:.3f}", "{mean:+.3f}", minus="−")


def _few_seeds() -> str:
    two, five = t_quantile(2), t_quantile(5)
    return (
        f"Two seeds say little about chance: a 95 % interval reaches {two:.1f} standard errors to either side, that of "
        f"five seeds {five:.1f}. Give more, {_MORE_SEEDS}."
    )


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _cost(rows: Sequence[MethodRow]) -> str:
    shares = _join([f"{cells.percent(row.selection_share)} ({row.arm})" for row in rows])
    return (
        f"Selection took {shares} of the steps' time here. The larger the network, the smaller the share: "
        "docs/how-it-works.md has it beside a ResNet-18."
    )
