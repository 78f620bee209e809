"""Pictures of runs: accuracy over the tasks, the accuracy matrix, and which class pairs may be mixed.

Every function returns a matplotlib ``Figure`` of its own; none touches pyplot, or changes settings of matplotlib. Names
of classes and arms are drawn as they are, whatever signs they have in them. Colours differ for every kind of colour
vision, and never carry a meaning alone: lines differ in their markers too, and detrimental pairs are crossed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradmix.runtime import names
from gradmix.training.reports import axis_range, cells
from gradmix.training.reports.axis_range import Extent
from gradmix.training.reports.class_pairs import EMPTY, draw_panel, find_spread, hatch, shorten
from gradmix.training.reports.figures import DPI, as_text
from gradmix.training.runs.metrics import Interval, accuracy_on_seen, mean_interval
from gradmix.training.runs.results import RunResult, metric_values, task_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BANDS_UP_TO = 4
"""Number of lines up to which bands are drawn; those of more hide one another."""
# Of fewer seeds a standard deviation says little: their points are drawn.
_BANDS_FROM = 3

# Okabe and Ito's palette, with a violet for its yellow, which is too pale for lines on white.
_COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#5D3A9B")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_GREY = "#8A8A8A"
# Longer names are cut: they would leave a picture no room.
_NAME_UP_TO = 60


@as_text
def curve(result: RunResult) -> Figure:
    """Draw one run: mean accuracy on the tasks seen so far after each task, and each task's own accuracy behind it."""
    result = _legible(result)
    figure, axes = _over_tasks(6.4, 4.2, "accuracy")
    numbers = np.arange(1, result.tasks + 1)
    for task in range(result.tasks):
        axes.plot(
            numbers[task:],
            result.accuracy[task:, task],
            color="#9A9A9A",
            linewidth=0.9,
            marker=".",
            markersize=4,
            label="each task on its own, its number where it starts" if task == 0 else None,
        )
        if task and math.isfinite(result.accuracy[task, task]) and result.tasks <= 20:
            axes.annotate(
                str(task + 1),
                (task + 1, float(result.accuracy[task, task])),
                xytext=(-3, 2),
                textcoords="offset points",
                ha="right",
                fontsize=7,
                color="#6A6A6A",
            )
    mean = accuracy_on_seen(result.accuracy)
    axes.plot(numbers, mean, color="#0072B2", linewidth=2.2, marker="o", label="mean over tasks seen")
    axes.set_xlim(0.8, result.tasks + 0.2)
    axes.set_ylim(-0.02, 1.06)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    average = metric_values(result)["average_accuracy"]
    axes.set_title(f"{_title(result)}: average accuracy {average:.3f}", fontsize=11)
    return figure


@as_text
def compare(results: Sequence[RunResult]) -> Figure:
    """Draw a line for each method: mean over its complete runs, with a band of one standard deviation over seeds.

    Of two seeds there are points instead. Where no run is complete, the interrupted ones are drawn as far as they went;
    those that have diverged never are.

    Raises:
        ValueError: As :func:`~gradmix.training.reports.tables.group`; of no run but such as have diverged.
    """
    from gradmix.training.reports.tables import group

    chosen = [r for r in results if r.status == "complete"] or [r for r in results if r.status == "interrupted"]
    groups = group(chosen)
    figure, axes = _over_tasks(7.2, 4.6, "mean accuracy on the tasks seen")
    extents = []
    for index, (label, members) in enumerate(groups.items()):
        lines = np.stack([accuracy_on_seen(r.accuracy) for r in members])
        mean = lines.mean(axis=0)
        average = float(np.nanmean(mean)) if np.isfinite(mean).any() else math.nan
        seeds = f"{len(members)} seeds" if len(members) > 1 else "1 seed"
        text = f"{_label(label)}: {average:.3f} ({seeds})"
        extent = _over_seeds(axes, index, text, lines, band=True)
        extents.append(extent and replace(extent, text=_label(label)))
    axis_range.fit_lines(axes, extents, "below")
    # Below the axes, where it hides no line.
    figure.legend(title="average accuracy", loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    banded = any(len(members) >= _BANDS_FROM for members in groups.values())
    band_text = "  (band: ± one standard deviation over seeds)" if banded else ""
    axes.set_title(f"{_label(chosen[0].benchmark)}{band_text}", fontsize=11)
    return figure


@as_text
def heatmap(result: RunResult) -> Figure:
    """Draw the accuracy matrix: a row for each task learnt, a column for each task tested, numbers in the cells."""
    result = _legible(result)
    tasks = result.tasks
    side = min(max(3.0, 0.62 * tasks), 12.0)
    names = task_names(result)
    short = [name.split(" (", 1)[0].removeprefix("task ") for name in names]
    described = tasks <= 10 and max(map(len, names)) <= 30
    # About 0.08 inches a character, at the size of tick labels.
    figure, axes = _figure(side + (1.9 + 0.08 * max(map(len, names)) if described else 2.2), side + 1.3)
    hatch(axes)
    image = axes.imshow(np.ma.masked_invalid(result.accuracy), vmin=0.0, vmax=1.0, cmap="cividis", zorder=1)
    axes.set_xticks(range(tasks), short)
    axes.set_yticks(range(tasks), names if described else short)
    axes.set_xlabel("tested on task")
    axes.set_ylabel("after learning" if described else "after learning task")
    if tasks <= 20:
        for (row, column), value in np.ndenumerate(result.accuracy):
            if math.isfinite(value):
                colour = "black" if value > 0.55 else "white"
                size = 9 if tasks <= 10 else 7
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=size)
    figure.colorbar(image, ax=axes, label="accuracy", shrink=0.85)
    title = _title(result)
    if np.isnan(result.accuracy).any():
        title += "\nhatched: not measured"
    axes.set_title(title, fontsize=11)
    return figure


@as_text
def alignment(result: RunResult) -> Figure:
    """Draw the class-pair alignment at the last refresh of each task, one panel a task.

    Purple pairs are helpful, orange and crossed ones detrimental, hatched ones had no samples. The colours meet in
    white at the threshold.

    Raises:
        ValueError: The run has no alignments.
    """
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    result = _legible(result)
    records = result.alignments
    if not records:
        raise ValueError("result: got a run without alignments, expected one whose method selects pairs by class")
    threshold = records[0].threshold
    spread, clipped = find_spread(records)
    norm = Normalize(threshold - spread, threshold + spread)
    most = max(r.classes.size for r in records)
    columns = len(records) if len(records) <= 3 else min(3, math.ceil(math.sqrt(len(records))))
    rows = math.ceil(len(records) / columns)
    panel = 2.9 if most <= 12 else 3.8 if most <= 30 else 6.2
    # The key needs 6.6 inches.
    panel = max(panel, (6.6 - 1.5) / columns)
    # Names of more than two characters stand upright below a panel; 0.08 inches a character.
    longest = max(len(shorten(result.class_names[c])) for r in records for c in r.classes)
    below = 0.08 * longest if longest > 2 else 0.0
    size = (columns * (panel + below) + 1.5, rows * (panel + below + 0.35) + 1.0)
    figure = Figure(figsize=size, dpi=DPI, layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False)
    names = task_names(result)
    for number, (axes, record) in enumerate(zip(grid.flat, records, strict=False)):
        image = draw_panel(axes, record, result.class_names, panel, norm)
        name = names[record.task] if columns * len(names[record.task]) <= 100 else f"task {record.task + 1}"
        axes.set_title(name, fontsize=9)
        if number % columns == 0:
            axes.set_ylabel("class of the sample", fontsize=9)
        if number + columns >= len(records):
            axes.set_xlabel("class of its partner", fontsize=9)
    for axes in list(grid.flat)[len(records) :]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=list(grid.flat), shrink=0.9, aspect=22 * rows, pad=0.02, extend=clipped)
    bar.set_label("cosine of the mixed gradient with the buffer's", fontsize=9)
    bar.ax.axhline(threshold, color="black", linewidth=1.2)
    bar.ax.tick_params(labelsize=8)
    cross = Line2D([], [], linestyle="none", marker="x", color="black", markersize=5)
    helpful, detrimental = image.cmap(0.85), image.cmap(0.15)
    # Handles may be tuples, drawn on top of one another, which matplotlib's own types leave out.
    handles: list[Any] = [
        Patch(facecolor=helpful, edgecolor="0.4"),
        (Patch(facecolor=detrimental, edgecolor="0.4"), cross),
    ]
    meanings = [f"helpful (cosine ≥ {threshold:g})", f"detrimental (cosine < {threshold:g})"]
    if any(np.isnan(r.cosine).any() for r in records):
        handles.append(Patch(facecolor="white", edgecolor=EMPTY, hatch="////"))
        meanings.append("no samples of this pair")
    key = {"ncols": 3, "frameon": False, "fontsize": 9, "handler_map": {tuple: HandlerTuple(ndivide=1)}}
    figure.legend(handles, meanings, loc="outside lower center", **key)
    note = "as decided at the last refresh in each task"
    figure.suptitle(f"{_title(result)}: which classes may be mixed\n{note}", fontsize=10)
    return figure


@as_text
def dots(
    labels: Sequence[str], values: Sequence[Sequence[float]], name: str, marks: Sequence[float | None] = ()
) -> Figure:
    """Draw a row for each label: a dot for each accuracy, their mean, and its 95 % t-interval if there are two or more.

    ``name`` says what the values are. ``marks`` has for each row a figure from elsewhere, drawn as a star, or None. A
    few rows far below all others are cut off, with an arrow (:mod:`gradmix.training.reports.axis_range`).
    """
    figure, axes = _rows(labels, name, "mean")
    extents = []
    for place, row in enumerate(values):
        if not row:
            continue
        spread = np.linspace(-0.16, 0.16, len(row)) if len(row) > 1 else np.zeros(1)
        axes.scatter(row, place + spread, s=15, color=_GREY, alpha=0.9, linewidths=0, zorder=2)
        interval = mean_interval(row)
        _interval(axes, place, interval, "#0072B2")
        _beside(axes, place, f"{interval.mean:.3f}")
        low, high = interval.ends
        extents.append(Extent(max(min(low, *row), 0.0), min(max(high, *row), 1.0), "#0072B2", row=place))
    for place, mark in enumerate(marks):
        if mark is not None:
            axes.scatter([mark], [place], s=70, marker="*", color="#D55E00", linewidths=0, zorder=4)
            extents.append(Extent(mark, mark, "#D55E00", f"{mark:.3f}", place))
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -0.02), min(high, 1.02))  # no interval of accuracies goes beyond what they can be
    axis_range.fit_rows(axes, extents, "below")
    return figure


@as_text
def forest(
    labels: Sequence[str], intervals: Sequence[Interval], name: str, sure: Sequence[bool] | None = None
) -> Figure:
    """Draw a row for each difference: its mean and 95 % t-interval, and a line at 0; outliers are cut, with an arrow.

    Intervals that hold 0 are drawn hollow and grey. The others are blue above 0 and orange below, and full if they are
    sure.

    Args:
        labels: Names of the rows, from top to bottom.
        intervals: Their means and half widths.
        name: What the differences are of.
        sure: Whether each row's difference is significant among all of them; None: if its interval leaves out 0.
    """
    figure, axes = _rows(labels, name, "mean [95 % interval]")
    axes.axvline(0.0, color="black", linewidth=1.0, alpha=0.6)
    extents = []
    for place, interval in enumerate(intervals):
        outside = interval.excludes_zero
        colour = ("#0072B2" if interval.mean > 0 else "#D55E00") if outside else _GREY
        _interval(axes, place, interval, colour, outside and (sure is None or sure[place]))
        text = cells.interval(interval, "{mean:+.3f} [{low:+.3f}, {high:+.3f}]", "{mean:+.3f}", minus="−")
        _beside(axes, place, text)
        low, high = interval.ends
        extents.append(Extent(min(low, 0.0), max(high, 0.0), colour, row=place))
    axis_range.fit_rows(axes, extents, "both")
    return figure


@as_text
def after_tasks(lines: Mapping[str, npt.NDArray[np.float64]]) -> Figure:
    """Draw a line for each label: the mean over seeds of some measure after each task, its last value at its end.

    Up to :data:`BANDS_UP_TO` lines have a band of one standard deviation over seeds, of two seeds points.

    Args:
        lines: For each label ``(S, T)`` values: S seeds, T tasks.
    """
    figure, axes = _over_tasks(7.6, 4.4, "mean accuracy on the tasks seen")
    ends, extents = [], []
    for index, (label, values) in enumerate(lines.items()):
        numbers = np.arange(1, values.shape[1] + 1)
        mean = values.mean(axis=0)
        extents.append(_over_seeds(axes, index, _label(label), values, band=len(lines) <= BANDS_UP_TO))
        ends.append(
            (f"{_label(label)}  {mean[-1]:.3f}", float(numbers[-1]), float(mean[-1]), _COLOURS[index % len(_COLOURS)])
        )
    axes.spines[["top", "right"]].set_visible(False)
    axis_range.fit_lines(axes, extents, "below")
    _name_ends(figure, axes, ends)
    return figure


@as_text
def sweep(key: str, values: Sequence[Any], panels: Mapping[str, Mapping[str, Sequence[Interval]]]) -> Figure:
    """Draw a panel for each name: a line for each label over the values of a setting, with the 95 % t-interval.

    Args:
        key: The setting.
        values: Its values; numbers that span a factor of eight or more are spaced by their logarithm, anything but
            numbers evenly.
        panels: For each panel and label, an interval for each value; NaN where there is none.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    logarithmic = numeric and min(values) > 0 and max(values) >= 8 * min(values)
    places = np.array(values if numeric else range(len(values)), dtype=np.float64)
    order = np.argsort(places)
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.0 + 4.2 * columns, 0.5 + 3.4 * rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, lines) in zip(grid.flat, panels.items(), strict=False):
        extents = []
        for index, (label, intervals) in enumerate(lines.items()):
            mean = np.array([interval.mean for interval in intervals])[order]
            half = np.array([interval.half_width for interval in intervals])[order]
            band = half if np.isfinite(half).any() else None
            least = 0.0 if name.endswith("accuracy") else -1.0
            _line(axes, index, _label(label), places[order], mean, band, least)
            reach = np.nan_to_num(half)
            around = np.clip(np.array([mean - reach, mean + reach]), least, 1.0)
            colour = _COLOURS[index % len(_COLOURS)]
            extents.append(axis_range.of_line(places[order], mean, around, _label(label), colour))
        axis_range.fit_lines(axes, extents, "below" if "accuracy" in name else "both")
        if logarithmic:
            axes.set_xscale("log")
        axes.set_xticks(places, [_label(str(v)) for v in values])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(key)
        axes.set_title(_label(name), fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    # Below all panels, where it hides no line.
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * columns), frameon=False)
    return figure


def _rows(labels: Sequence[str], name: str, beside: str) -> tuple[Figure, Axes]:
    """A figure with a place for each label, the first on top, and a column of figures beside them."""
    figure, axes = _figure(7.6, 1.1 + 0.27 * max(len(labels), 2))
    axes.set_yticks(range(len(labels)), [_label(label) for label in labels], fontsize=9)
    axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    axes.set_xlabel(name)
    axes.grid(axis="x", alpha=0.25)
    # The eye follows a line from a name to its figures.
    axes.grid(axis="y", alpha=0.18, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _beside(axes, -0.85, beside)
    return figure, axes


def _beside(axes: Axes, place: float, text: str) -> None:
    axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), fontsize=8.5, va="center")


def _interval(axes: Axes, place: int, interval: Interval, colour: str, full: bool = True) -> None:
    half = None if math.isnan(interval.half_width) else [interval.half_width]
    axes.errorbar(
        [interval.mean],
        [place],
        xerr=half,
        fmt="D",
        markersize=5,
        color=colour,
        markerfacecolor=colour if full else "none",
        capsize=3,
        linewidth=1.5,
        zorder=3,
    )


def _over_seeds(axes: Axes, index: int, label: str, values: npt.NDArray[np.float64], *, band: bool) -> Extent | None:
    """Draw a line of the mean of ``(S, T)`` accuracies, with a band or, of few seeds, with their points."""
    numbers = np.arange(1, values.shape[1] + 1)
    banded = band and len(values) >= _BANDS_FROM
    mean, colour = values.mean(axis=0), _COLOURS[index % len(_COLOURS)]
    _line(axes, index, label, numbers, mean, values.std(axis=0, ddof=1) if banded else None)
    if band and 1 < len(values) < _BANDS_FROM:
        axes.scatter(np.tile(numbers, len(values)), values, s=9, color=colour, alpha=0.6)
    return axis_range.of_line(numbers, mean, values if band else mean, label, colour)


def _line(axes: Axes, index: int, label: str, x: Any, y: Any, band: Any, least: float = 0.0) -> None:
    colour = _COLOURS[index % len(_COLOURS)]
    if band is not None:
        low, high = np.maximum(y - band, least), np.minimum(y + band, 1.0)
        axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
    axes.plot(
        x,
        y,
        color=colour,
        marker=_MARKERS[index % len(_MARKERS)],
        linestyle=("-", "--", "-.")[index // len(_COLOURS) % 3],
        markersize=5,
        linewidth=1.6,
        # A legend leaves out names that begin with an underscore.
        label=f"{' ' if label.startswith('_') else ''}{label}",
    )


def _name_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write a text beside each point, in the order of their heights and far enough from one another to be read."""
    figure.draw_without_rendering()
    below, above = axes.get_ylim()
    points = float(axes.bbox.height) * 72.0 / figure.dpi
    axes.set_ylim(below, above)
    # The end of a line that leaves the axes is named where it would be, at their edge.
    ends = [(text, x, min(max(y, below), above), colour) for text, x, y, colour in ends]
    ordered = sorted(ends, key=lambda end: end[2])
    wanted = np.array([(y - below) / (above - below) * points for _, _, y, _ in ordered])
    line = {"arrowstyle": "-", "linewidth": 0.9, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
    for (text, x, y, colour), from_, to in zip(ordered, wanted, apart(wanted, 11.5), strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(18, float(to - from_)),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            arrowprops=line | {"color": colour},
        )


def apart(places: npt.NDArray[np.float64], gap: float) -> npt.NDArray[np.float64]:
    """Move ascending places ``(n,)`` by as little as possible, in squares, until neighbours are ``gap`` apart.

    Example:
        >>> apart(np.array([0.0, 1.0, 10.0]), 3.0)
        array([-1.,  2., 10.])
    """
    from scipy.optimize import isotonic_regression

    # With k * gap taken off the k-th place, neighbours are in the right order if they are far enough apart.
    steps = gap * np.arange(len(places))
    return isotonic_regression(places - steps).x + steps if len(places) else places


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def _over_tasks(width: float, height: float, name: str) -> tuple[Figure, Axes]:
    """A figure of some measure over the tasks learnt."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(width, height)
    axes.set_xlabel("tasks learnt")
    axes.set_ylabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    return figure, axes


def _title(result: RunResult) -> str:
    title = f"{result.benchmark}, {result.method}, seed {result.seed}"
    return title if result.status == "complete" else f"{title} ({result.status})"


def _legible(result: RunResult) -> RunResult:
    """The same run with names that can be drawn."""
    return replace(result, benchmark=_label(result.benchmark), class_names=tuple(map(_label, result.class_names)))


def _label(name: str) -> str:
    name = names.shown(name)
    return name if len(name) <= _NAME_UP_TO else f"{name[: _NAME_UP_TO - 16]}…{name[-15:]}"
