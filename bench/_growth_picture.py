"""Draws how cost grows: one panel an axis, seconds over sizes, for light pages and dark ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _measure import machine_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_AXES = {
    "classes": "classes C",
    "rows": "rows N",
    "features": "features' width d",
    "buffer": "buffer's rows K",
    "table": "classes P of a class table",
}
_LABELS = {
    "alignment": "alignment of all pairs",
    "selection": "whole selection",
    "reference": "reference gradient",
    "table": "class table",
    "plain": "plain Mixup",
    "replayed": "reference of replayed rows",
    "interval": "refresh every {interval} steps",
    "each": "refresh in every step",
}
# Of Okabe and Ito's palette those that are seen on white and on black.
_COLOURS = {
    "alignment": "#56B4E9",
    "selection": "#D55E00",
    "reference": "#0072B2",
    "table": "#009E73",
    "plain": "#8A8A8A",
    "replayed": "#D55E00",
    "interval": "#0072B2",
    "each": "#CC79A7",
}
_MARKERS = dict(zip(_COLOURS, "os^Dovs^", strict=True))
_THEME = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"


def draw(path: Path, result: dict[str, Any]) -> None:
    """Write a result's picture as SVG, whose text follows the reader's theme, or as PNG; whole or not at all."""
    from matplotlib.figure import Figure

    from gradmix.training.reports import figures

    panels = list(_panels(result))
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.3 * columns, 3.3 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, name, curves) in zip(grid.flat, panels, strict=False):
        for curve, points in curves.items():
            _curve(axes, curve, points, result["interval"])
        axes.set(xscale="log", yscale="log", xlabel=_AXES[name], ylabel="seconds")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, framealpha=0.0)
    figure.supxlabel(machine_line(result["machine"]), fontsize=6)
    if path.suffix.lower() == ".png":
        figures.save(figure, path)
        return
    svg = figures.to_svg(figure, "cost_growth", themed=True)
    end = svg.index(">") + 1
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(svg[:end] + _THEME + svg[end:], encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _panels(result: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, list[tuple[int, dict[str, float]]]]]]:
    """Title, axis and curves of every panel, a curve being its points' sizes and quantiles of seconds."""
    for axis in result["alone"]:
        curves = {
            curve["name"]: [(point["value"], point["seconds"]) for point in curve["points"]] for curve in axis["curves"]
        }
        yield f"selection alone over {axis['axis']}", axis["axis"], curves
    for axis in result["step"]:
        curves = {
            way: [(point["value"], point["ways"][way]["seconds"]) for point in axis["points"] if point["ways"]]
            for way in ("plain", "replayed", "interval", "each")
        }
        yield f"training step over {axis['axis']}", axis["axis"], curves


def _curve(axes: Axes, name: str, points: Sequence[tuple[int, dict[str, float]]], interval: int) -> None:
    x = [value for value, _ in points]
    low, middle, high = ([seconds[level] for _, seconds in points] for level in ("p20", "p50", "p80"))
    label = _LABELS[name].format(interval=interval)
    axes.plot(x, middle, color=_COLOURS[name], marker=_MARKERS[name], markersize=4, linewidth=1.6, label=label)
    axes.fill_between(x, low, high, color=_COLOURS[name], alpha=0.18, linewidth=0)
