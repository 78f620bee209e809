"""The range of an axis: a few arms far from all others do not decide it, and arrows at its edge show that they go on.

Values are accuracies, or differences of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Ends = Literal["below", "both"]
Span = tuple[float, float]

FACTOR = 6.0
"""Arms are left out of the range if the others would fill less than the sixth part of an axis with all of them."""
LEAST = 0.05
"""Least length of a range in that comparison: two arms that are alike by chance make no outlier of a third."""

_KEY = "arrow: beyond the axis"
# Of an arrow, in points.
_LENGTH = 16


@dataclass(frozen=True)
class Extent:
    """The part of a horizontal axis that a row takes up, or a line of a vertical one.

    Attributes:
        low: Lower end.
        high: Upper end.
        colour: What its arrows are drawn in.
        text: What stands beside them.
        row: Its place in a picture of rows.
        points: Of a line, ``(2, n)``: where its points are on the other axis, and on this one.
    """

    low: float
    high: float
    colour: str
    text: str = ""
    row: float = 0.0
    points: npt.NDArray[np.float64] | None = None


def of_line(
    x: npt.ArrayLike, y: npt.ArrayLike, around: npt.NDArray[np.float64], label: str, colour: str
) -> Extent | None:
    """The extent of a line with points at ``x`` and ``y``, and of all values ``around`` it; None if there are none."""
    known = around[np.isfinite(around)]
    points = np.array([x, y], dtype=np.float64)
    return Extent(float(known.min()), float(known.max()), colour, label, points=points) if known.size else None


def fit_rows(axes: Axes, extents: Sequence[Extent], ends: Ends) -> None:
    """Limit the horizontal axis of a picture of rows to those that are no outliers; arrows stand for what is cut."""
    span = inner_range([(e.low, e.high) for e in extents], ends)
    if span is None:
        return
    low, high = _with_margin(span, axes.get_xlim())
    axes.set_xlim(low, high)
    axes.set_xlabel(f"{axes.get_xlabel()} ({_KEY})")
    for extent in extents:
        if extent.low < low:
            _arrow(axes, (low, extent.row), (_LENGTH, 0), extent.colour)
            _text(axes, (low, extent.row), (_LENGTH + 3, 0), extent, "left")
        if extent.high > high:
            _arrow(axes, (high, extent.row), (-_LENGTH, 0), extent.colour)


def fit_lines(axes: Axes, extents: Sequence[Extent | None], ends: Ends) -> None:
    """Limit the vertical axis of a picture of lines to those that are no outliers; arrows stand where one leaves it."""
    known = [e for e in extents if e is not None]
    span = inner_range([(e.low, e.high) for e in known], ends)
    if span is None:
        return
    low, high = _with_margin(span, axes.get_ylim())
    axes.set_ylim(low, high)
    axes.set_ylabel(f"{axes.get_ylabel()}\n({_KEY})".strip())
    for edge, inwards in ((low, 1), (high, -1)):
        leaving = [e for e in known if (e.low < low if inwards > 0 else e.high > high)]
        for number, extent in enumerate(leaving):
            _mark_line(axes, extent, edge, inwards, (number, len(leaving)))


def inner_range(extents: Sequence[Span], ends: Ends = "both") -> Span | None:
    """Return the range of all extents but the outliers, or None if there is no outlier.

    Outliers are less than half of the extents. Without them, the axis would be shorter by :data:`FACTOR`.

    Args:
        extents: Lower and upper end of each arm; those with a NaN are passed over.
        ends: At which ends outliers are looked for: ``below``, where the failures are among accuracies, or both. The
            range reaches up to the highest of all extents in the first case.

    Example:
        >>> inner_range([(0.18, 0.20), (0.90, 0.92), (0.93, 0.95)])
        (0.9, 0.95)
        >>> inner_range([(0.70, 0.72), (0.90, 0.92), (0.93, 0.95)]) is None
        True
    """
    known = [extent for extent in extents if not any(map(math.isnan, extent))]
    kept: Sequence[Span] = known
    most = (len(known) - 1) // 2
    while (fewer := _without_fewest(kept, most, ends)) is not None:
        most -= len(kept) - len(fewer)
        kept = fewer
    if len(kept) == len(known):
        return None
    low, high = _span(kept)
    return low, _span(known)[1] if ends == "below" else high


def _without_fewest(extents: Sequence[Span], most: int, ends: Ends) -> Sequence[Span] | None:
    """Leave out as few extents as make the axis shorter by the factor; None if ``most`` do not."""
    by_length: Callable[[Sequence[Span]], float] = lambda kept: _length(_span(kept))  # noqa: E731
    for count in range(1, most + 1):
        splits = range(count + 1) if ends == "both" else (count,)
        best = min((_without(extents, below, count - below) for below in splits), key=by_length)
        if FACTOR * max(by_length(best), LEAST) <= by_length(extents):
            return best
    return None


def _without(extents: Sequence[Span], below: int, above: int) -> Sequence[Span]:
    """Leave out those that reach down furthest, then those that reach up furthest."""
    kept = sorted(extents)[below:]
    return sorted(kept, key=lambda extent: extent[1])[: len(kept) - above]


def _span(extents: Sequence[Span]) -> Span:
    return min(low for low, _ in extents), max(high for _, high in extents)


def _length(span: Span) -> float:
    return span[1] - span[0]


def _with_margin(span: Span, drawn: tuple[float, float]) -> Span:
    """Widen a range by a twentieth, not beyond what would be drawn of all arms."""
    margin = 0.05 * max(_length(span), LEAST)
    return max(span[0] - margin, drawn[0]), min(span[1] + margin, drawn[1])


def _mark_line(axes: Axes, extent: Extent, edge: float, inwards: int, place: tuple[int, int]) -> None:
    """Draw the arrow of a line that leaves the axes, and its range there; ``place``: its number, and of how many."""
    assert extent.points is not None
    x, y = extent.points
    beyond = np.nonzero(inwards * y < inwards * edge)[0]
    if not len(beyond):
        # Only what is around the line is cut.
        return
    number, count = place
    at = float(x[beyond[len(beyond) * (2 * number + 1) // (2 * count)]])
    tail = inwards * (_LENGTH + 12 * number)
    low, high = float(y[beyond].min()), float(y[beyond].max())
    text = f"{extent.text} {low:.2f}" + (f" to {high:.2f}" if f"{high:.2f}" != f"{low:.2f}" else "")
    _arrow(axes, (at, edge), (0, tail), extent.colour)
    side = "left" if axes.transData.transform((at, edge))[0] < axes.bbox.x0 + axes.bbox.width / 2 else "right"
    _text(axes, (at, edge), (4 if side == "left" else -4, tail), replace(extent, text=text), side)


def _arrow(axes: Axes, tip: Any, start: tuple[int, int], colour: str) -> None:
    """Draw an arrow to a point at the edge of the axes, from so many points beside it."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", tip, xytext=start, textcoords="offset points", arrowprops=style)


def _text(axes: Axes, tip: Any, start: tuple[float, float], extent: Extent, side: str) -> None:
    if extent.text:
        at: dict[str, Any] = {"xytext": start, "textcoords": "offset points", "va": "center", "ha": side}
        axes.annotate(extent.text, tip, fontsize=8, color=extent.colour, **at)
