"""A panel of the class-pair alignment: its colours, crosses and names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradmix.training.runs.results import AlignmentRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EMPTY = "#B8B8B8"
"""Colour of what hatches the cells without a value."""


def hatch(axes: Axes) -> None:
    """Hatch the ground, which shows where a cell without a value is left out of the picture."""
    axes.patch.set(facecolor="white", edgecolor=EMPTY, hatch="////", linewidth=0)


def find_spread(records: Sequence[AlignmentRecord]) -> tuple[float, str]:
    """Return how far the colours reach from the threshold, and the ends beyond which values are cut off."""
    apart = np.concatenate([(r.cosine - r.threshold)[np.isfinite(r.cosine)] for r in records])
    if not apart.size:
        return 1.0, "neither"
    # A few extreme pairs (a class with itself, mostly) would leave all the others pale.
    spread = max(float(np.quantile(np.abs(apart), 0.98)), 1e-3)
    above, below = bool((apart > spread).any()), bool((apart < -spread).any())
    return spread, "both" if above and below else "max" if above else "min" if below else "neither"


def draw_panel(axes: Axes, record: AlignmentRecord, class_names: Sequence[str], panel: float, norm: Any) -> Any:
    """Draw the cosines of a record, a cross on each pair that may not be mixed; return the image.

    Args:
        axes: Where they are drawn.
        record: The cosines.
        class_names: Names of all classes, indexed by label.
        panel: Side of the panel in inches.
        norm: Makes colours of cosines.
    """
    size = record.classes.size
    hatch(axes)
    image = axes.imshow(np.ma.masked_invalid(record.cosine), cmap="PuOr", norm=norm, zorder=1, interpolation="nearest")
    crossed = ~record.helpful & np.isfinite(record.cosine)
    # About a quarter of a panel's width goes to names; a cross that would be smaller than a dot is left out.
    cell = 0.72 * panel * 72 / max(size, 1)
    if cell >= 2.0 and crossed.any():
        row, column = np.nonzero(crossed)
        side = min(0.5 * cell, 7.0)
        stroke = min(1.0, 0.09 * cell + 0.15)
        axes.scatter(column, row, s=side**2, marker="x", color="black", linewidths=stroke, zorder=2)
    names = [class_names[c] for c in record.classes]
    step = max(1, math.ceil(size * 8.0 / (0.72 * panel * 72)))
    shown = range(0, size, step)
    font = 8.0 if step == 1 and cell >= 11 else 6.5
    labels = [shorten(names[i]) for i in shown]
    axes.set_xticks(list(shown), labels, fontsize=font, rotation=90 if max(map(len, labels), default=0) > 2 else 0)
    axes.set_yticks(list(shown), labels, fontsize=font)
    if cell >= 8:
        axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    return image


def shorten(name: str) -> str:
    """Cut a long name in its middle: the names of a data set often begin alike."""
    return name if len(name) <= 12 else f"{name[:6]}…{name[-5:]}"
