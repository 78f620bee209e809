"""The tables over runs in a few sentences: what selection gained over methods without it, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradmix.training.reports import cells
from gradmix.training.reports.rows import Difference, compare

if TYPE_CHECKING:
    from gradmix.training.reports.tables import MethodRow

_METRIC = "average_accuracy"


def verdict(rows: Sequence[MethodRow]) -> list[str]:
    """Compare each method that selects pairs with each that does not.

    A difference is called one only if its 95 % t-interval leaves out 0. Holm's p, adjusted for all of these
    comparisons, is given where it is 0.05 or above.

    Returns:
        Sentences; none if there is nothing to compare.
    """
    selecting = [row for row in rows if row.selection_share > 0]
    others = [row for row in rows if not row.selection_share > 0]
    differences = compare((row, other) for row in selecting for other in others)
    if not differences:
        return []
    if all(math.isnan(d.metrics[_METRIC].half_width) for d in differences):
        return ["One seed tells nothing of chance: give several, as --seeds 0 1 2.", _cost(selecting)]
    said = [_of_row([d for d in differences if d.arm == row.arm]) for row in selecting]
    return [*filter(None, said), _cost(selecting)]


def _of_row(differences: Sequence[Difference]) -> str:
    differing = [_difference(d) for d in differences if d.metrics[_METRIC].excludes_zero]
    others = [d for d in differences if not d.metrics[_METRIC].excludes_zero]
    alike = [f"{d.minus} ({cells.difference(d.metrics[_METRIC])})" for d in others]
    parts = [f"is {_join(differing)}"] if differing else []
    parts += [f"does not differ significantly from {_join(alike)}"] if alike else []
    return f"{differences[0].arm} {', and '.join(parts)} in average accuracy." if parts else ""


def _difference(d: Difference) -> str:
    mean, _, half = d.metrics[_METRIC]
    alone = "" if d.holm < 0.05 else f" (Holm's p = {cells.probability(d.holm)})"
    return f"{abs(mean):.3f} ± {half:.3f} {'above' if mean > 0 else 'below'} {d.minus}{alone}"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _cost(rows: Sequence[MethodRow]) -> str:
    shares = _join([f"{cells.percent(row.selection_share)} ({row.arm})" for row in rows])
    return (
        f"Selection took {shares} of the steps' time here. The larger the network, the smaller the share: "
        "docs/how-it-works.md has it beside a ResNet-18."
    )
