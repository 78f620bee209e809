"""Figures and settings as text, as they stand in the cells of tables, beside plots and in sentences.

What is not known, a NaN, is a hyphen.
"""

from __future__ import annotations

import math
from typing import Any

from gradmix.training.runs.metrics import Interval


def interval(value: Interval, full: str, single: str = "{mean:.3f}", *, minus: str = "-") -> str:
    """A mean with its interval; a hyphen if there is no mean.

    Args:
        value: Mean, standard deviation and half of the interval.
        full: A format of ``mean``, ``std``, ``half``, ``low`` and ``high``, the interval's ends, and ``star``, which is
            `` *`` if the interval leaves out 0 and empty otherwise.
        single: The same for a mean of one value, which has no interval.
        minus: What stands for every hyphen that comes of the format.

    Example:
        >>> interval(Interval(-0.25, 0.5, 0.125), "{mean:.2f} [{low:.2f}, {high:.2f}]{star}", minus="−")
        '−0.25 [−0.38, −0.12] *'
    """
    mean, std, half = value
    if math.isnan(mean):
        return "-"
    star = " *" if value.excludes_zero else ""
    text = single if math.isnan(half) else full
    return text.format(mean=mean, std=std, half=half, low=mean - half, high=mean + half, star=star).replace("-", minus)


def difference(value: Interval) -> str:
    """A difference with half of its interval, and a star if that leaves out 0, as ``+0.020 ± 0.003 *``."""
    return interval(value, "{mean:+.3f} ± {half:.3f}{star}", "{mean:+.3f}", minus="−")


def with_sign(value: float) -> str:
    """A figure with its sign and three decimals, as ``+0.020`` or ``−0.003``."""
    return f"{value:+.3f}".replace("-", "−")


def probability(p: float) -> str:
    """A p-value with three decimals, as ``0.012`` or ``< 0.001``."""
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def percent(share: float) -> str:
    """A share, from 0 to 1, as ``12.5 %``."""
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def decimal(value: float) -> str:
    """A figure of at least 0 with three digits, two behind the point at most and none cut off before it.

    Example:
        >>> [decimal(value) for value in (0.125, 12.25, 1234.5)]
        ['0.12', '12.2', '1234']
    """
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def setting(value: Any, separator: str = ", ") -> str:
    """A setting's value as plain values have it: null is ``default``, a list its members, an empty one ``none``."""
    if value is None:
        return "default"
    return (separator.join(map(str, value)) or "none") if isinstance(value, list) else str(value)
