"""Tables over runs: every method's mean over its seeds, and the paired differences between methods."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from gradmix.names import markdown, markdown_cell, shown
from gradmix.training.reports import cells, findings
from gradmix.training.runs import metrics
from gradmix.training.runs.metrics import Interval
from gradmix.training.runs.results import METRIC_LABELS, R_MEANING, RunResult, metric_values, tasks_reached
from gradmix.training.runs.settings import distinguishing

SHOWN = ("average_accuracy", "final_accuracy", "forgetting")
"""The metrics that have a column."""

# All pairs of six rows are fifteen lines; beyond that only the differences to the first row are shown.
_ALL_PAIRS_UP_TO = 6


@dataclass(frozen=True)
class Row:
    """One method, with one set of settings, over its complete runs.

    Attributes:
        label: The method's name, followed by the settings in which the compared runs of this method differ.
        method: The method's name alone.
        seeds: Training seeds, ascending.
        metrics: Mean, sample standard deviation and half of the 95 % t-interval of each metric, accuracies in [0, 1].
        step_ms: Mean time of a training step in milliseconds, selection included.
        selection_share: Share of that time spent on selection, from 0 to 1.
        data_share: Share of it spent on drawing, reading and augmenting rows; NaN if it was not measured.
    """

    label: str
    method: str
    seeds: tuple[int, ...]
    metrics: dict[str, Interval]
    step_ms: float
    selection_share: float
    data_share: float = math.nan


@dataclass(frozen=True)
class Difference:
    """Mean over the shared seeds of one row's value minus another's, with half of its 95 % t-interval."""

    label: str
    minus: str
    seeds: tuple[int, ...]
    metrics: dict[str, Interval]


@dataclass(frozen=True)
class Summary:
    """The figures of the table over several runs of one benchmark."""

    benchmark: str
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    """What the rows leave out, e.g. interrupted runs and such as have diverged."""


def group(results: Sequence[RunResult]) -> dict[str, tuple[RunResult, ...]]:
    """Group runs that differ by nothing but the seed, under a label each, in the order given.

    The label is the method's name; where runs of one method have different settings, these are added to it, so that
    no mean is taken over different settings.

    Raises:
        ValueError: There is no run; the runs are of different benchmarks, or are scored on different rows; or a seed
            appears twice in a group.
    """
    if not results:
        raise ValueError("results: got no run, expected at least one")
    scored: dict[str, list[Any]] = {
        "benchmarks": [r.benchmark for r in results],
        "data.validation": [r.config.data.validation for r in results],
    }
    for name, found in scored.items():
        if len(set(found)) > 1:
            listed = ", ".join(map(str, dict.fromkeys(found)))
            raise ValueError(f"runs of different {name} cannot be compared: {listed}")
    settings = [distinguishing(r.config) for r in results]
    groups: dict[str, list[RunResult]] = {}
    for result, own in zip(results, settings, strict=True):
        others = [s for r, s in zip(results, settings, strict=True) if r.method == result.method]
        differing = [f"{key}={_short(v)}" for key, v in own.items() if any(s[key] != v for s in others)]
        members = groups.setdefault(" ".join([result.method, *differing]), [])
        if any(r.seed == result.seed for r in members):
            raise ValueError(f"{result.method} with seed {result.seed} is there twice with the same settings")
        members.append(result)
    return {label: tuple(sorted(members, key=lambda r: r.seed)) for label, members in groups.items()}


def summarise(results: Sequence[RunResult]) -> Summary:
    """Compute the table over several runs; those that are not complete are named in the notes and enter no mean.

    Raises:
        ValueError: As :func:`group`.
    """
    groups = group(results)
    rows, notes = [], []
    values: dict[str, dict[int, dict[str, float]]] = {}
    for label, members in groups.items():
        complete = [r for r in members if r.status == "complete"]
        notes += [_interrupted(label, run) for run in members if run.status == "interrupted"]
        diverged = [r.seed for r in members if r.status == "diverged"]
        if diverged:
            notes.append(f"{label}: {findings.diverged(diverged, len(members))}.")
        if not complete:
            continue
        values[label] = {r.seed: metric_values(r) for r in complete}
        rows.append(
            Row(
                label=label,
                method=complete[0].method,
                seeds=tuple(values[label]),
                metrics={
                    name: metrics.mean_interval([v[name] for v in values[label].values()]) for name in METRIC_LABELS
                },
                step_ms=metrics.known_mean([r.timing.step_ms for r in complete]),
                selection_share=metrics.known_mean([r.timing.selection_share for r in complete]),
                data_share=metrics.known_mean([r.timing.data_share for r in complete]),
            )
        )
    labels = list(values)
    pairs = list(combinations(labels, 2))
    if len(labels) > _ALL_PAIRS_UP_TO:
        pairs = [(labels[0], label) for label in labels[1:]]
        notes.append(f"Of {len(labels)} rows, only the differences to the first are shown.")
    differences = []
    for minus, label in pairs:
        shared = tuple(seed for seed in values[label] if seed in values[minus])
        if shared:
            by_metric = {
                name: metrics.paired_difference(
                    [values[label][s][name] for s in shared], [values[minus][s][name] for s in shared]
                )
                for name in METRIC_LABELS
            }
            differences.append(Difference(label, minus, shared, by_metric))
    return Summary(results[0].benchmark, tuple(rows), tuple(differences), tuple(notes))


def to_text(summary: Summary, width: int = 80) -> str:
    """Render the tables as plain text, at most ``width`` columns wide where the labels allow it."""
    wrap = textwrap.TextWrapper(width=width, subsequent_indent="  ", break_on_hyphens=False)
    blocks, with_data = [], False
    if summary.rows:
        form = "{mean:.3f} ± {std:.3f}\n95 %: ± {half:.3f}"
        table = _text_table(*_result_cells(summary, form))
        with_data = max(map(len, table.splitlines())) <= width
        if not with_data:
            table = _text_table(*_without(_result_cells(summary, form), "data"))
        blocks.append(table)
    blocks.append("\n".join(wrap.fill(shown(line)) for line in _legend(summary, with_data)))
    if summary.differences:
        table = _text_table(*_difference_cells(summary, " - "))
        if max(map(len, table.splitlines())) > width:
            table = _text_table(*_difference_cells(summary, "\n- "))
        blocks.append(table)
        blocks.append(wrap.fill(_DIFFERENCE_LEGEND))
    return "\n\n".join(blocks) + "\n"


def to_markdown(summary: Summary) -> str:
    """Render the tables as GitHub-flavoured Markdown."""
    blocks = [f"# {markdown(summary.benchmark)}"]
    if summary.rows:
        blocks.append(_markdown_table(*_result_cells(summary, "{mean:.3f} ± {std:.3f} (95 %: ± {half:.3f})")))
    blocks.append("\n".join(f"- {markdown(line)}" for line in _legend(summary, with_data=True)))
    if summary.differences:
        blocks.append(_markdown_table(*_difference_cells(summary, " - ")))
        blocks.append(_DIFFERENCE_LEGEND)
    return "\n\n".join(blocks) + "\n"


def to_dict_rows(summary: Summary) -> list[dict[str, Any]]:
    """Return the rows as plain dictionaries."""
    return [
        {
            "label": row.label,
            "method": row.method,
            "seeds": list(row.seeds),
            "metrics": {name: interval._asdict() for name, interval in row.metrics.items()},
            "step_ms": row.step_ms,
            "selection_share": row.selection_share,
            "data_share": row.data_share,
        }
        for row in summary.rows
    ]


def to_json_dict(summary: Summary) -> dict[str, Any]:
    """Return the whole summary as plain values, formulae included; ``half_width`` is half of the 95 % t-interval."""
    return {
        "benchmark": summary.benchmark,
        "formulas": {name: metrics.FORMULAS[name] for name in METRIC_LABELS},
        "formula_terms": R_MEANING,
        "confidence": 0.95,
        "rows": to_dict_rows(summary),
        "differences": [
            {
                "label": d.label,
                "minus": d.minus,
                "seeds": list(d.seeds),
                "metrics": {name: interval._asdict() for name, interval in d.metrics.items()},
            }
            for d in summary.differences
        ],
        "notes": list(summary.notes),
    }


_DIFFERENCE_LEGEND = (
    "Paired differences: mean over the shared seeds ± half of the 95 % t-interval (Student); * if the interval leaves "
    "out 0."
)

_Table = tuple[list[str], list[list[str]]]


def _result_cells(summary: Summary, cell: str) -> _Table:
    header = ["method", *(METRIC_LABELS[name] for name in SHOWN), "ms/step", "selection", "data", "seeds"]
    body = [
        [
            shown(row.label),
            *(cells.interval(row.metrics[name], cell) for name in SHOWN),
            cells.decimal(row.step_ms),
            cells.percent(row.selection_share or math.nan),
            cells.percent(row.data_share),
            str(len(row.seeds)),
        ]
        for row in summary.rows
    ]
    return header, body


def _difference_cells(summary: Summary, minus: str) -> _Table:
    header = ["difference", *(METRIC_LABELS[name] for name in SHOWN), "seeds"]
    body = []
    for difference in summary.differences:
        # The figures stay under one another, with a star or without.
        intervals = [
            cells.interval(difference.metrics[name], "{mean:+.3f} ± {half:.3f}{star:2}", "{mean:+.3f}")
            for name in SHOWN
        ]
        label = f"{shown(difference.label)}{minus}{shown(difference.minus)}"
        body.append([label, *intervals, str(len(difference.seeds))])
    return header, body


def _legend(summary: Summary, with_data: bool) -> list[str]:
    legend = [f"Benchmark {summary.benchmark}; {R_MEANING}."]
    if summary.rows:
        legend += [f"{METRIC_LABELS[name].capitalize()}: {metrics.FORMULAS[name]}." for name in SHOWN]
        legend.append("Mean ± standard deviation over seeds; 95 %: half of the mean's t-interval (Student).")
        legend.append("ms/step: time of a training step; selection: the share of it spent on selecting pairs.")
        if with_data:
            legend.append("data: the share of it spent on drawing, reading and augmenting rows.")
    else:
        legend.append("No run is complete, so there is no mean to show.")
    return [*legend, *summary.notes]


def _interrupted(label: str, run: RunResult) -> str:
    reached = tasks_reached(run)
    note = f"{label}, seed {run.seed}: interrupted after {reached} of {run.tasks} tasks, in no mean"
    return f"{note} (average accuracy so far {metric_values(run)['average_accuracy']:.3f})." if reached else f"{note}."


def _without(table: _Table, column: str) -> _Table:
    header, body = table
    place = header.index(column)
    return [*header[:place], *header[place + 1 :]], [[*row[:place], *row[place + 1 :]] for row in body]


def _text_table(header: list[str], body: list[list[str]]) -> str:
    rows = [[cell.split("\n") for cell in row] for row in [_stacked(header), *body]]
    widths = [max(len(line) for row in rows for line in row[column]) for column in range(len(header))]
    rule = "  ".join("-" * w for w in widths)
    blocks = []
    for row in rows:
        height = max(map(len, row))
        lines = []
        for i in range(height):
            parts = [cell[i] if i < len(cell) else "" for cell in row]
            first, *others = (
                text.ljust(w) if column == 0 else text.rjust(w)
                for column, (text, w) in enumerate(zip(parts, widths, strict=True))
            )
            lines.append("  ".join([first, *others]).rstrip())
        blocks.append("\n".join(lines))
    return "\n".join([rule, blocks[0], rule, *blocks[1:], rule])


def _stacked(header: list[str]) -> list[str]:
    # Headings stand on two lines, so that columns stay as narrow as their figures and the table fits 80 columns.
    broken = {"ms/step": "ms/\nstep", "selection": "selec-\ntion"}
    return [broken.get(name, name.replace(" ", "\n")) for name in header]


def _markdown_table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *([markdown_cell(row[0]), *row[1:]] for row in body)]
    return "\n".join("| " + " | ".join(map(str.strip, line)) + " |" for line in lines)


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
