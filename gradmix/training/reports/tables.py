"""Tables over runs: every method's mean over its seeds, and the paired differences between methods."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from gradmix.runtime.names import shown
from gradmix.training.reports import cells, findings
from gradmix.training.reports.advice import old_share
from gradmix.training.reports.document import Table, render
from gradmix.training.reports.rows import Difference, Row, compare, formulas, to_plain
from gradmix.training.reports.verdict import verdict
from gradmix.training.runs import metrics
from gradmix.training.runs.results import METRIC_LABELS, R_MEANING, RunResult, metric_values, tasks_reached
from gradmix.training.runs.same_data import OWN_DATA, same_data
from gradmix.training.runs.settings import settings_of

SHOWN = ("average_accuracy", "final_accuracy", "forgetting")
"""The metrics that have a column."""
_BETTER = {"average_accuracy": "↑", "final_accuracy": "↑", "forgetting": "↓"}

# All pairs of six rows are fifteen lines; beyond that only the differences to the first row are shown.
_ALL_PAIRS_UP_TO = 6


@dataclass(frozen=True)
class MethodRow(Row):
    """A method with one set of settings, ``arm`` being its name and the settings in which its compared runs differ.

    Attributes:
        method: The method's name alone.
        step_ms: Median milliseconds of a training step, selection included; of several runs the median, as of shares.
        selection_share: Share of the steps' time spent on selection, from 0 to 1.
        data_share: Share of it spent on drawing, reading and augmenting samples; NaN if it was not measured.
        originals: Whether the unmixed samples were trained on too.
        old_share: As :func:`~gradmix.training.reports.advice.old_share` estimates it.
    """

    method: str = ""
    step_ms: float = math.nan
    selection_share: float = math.nan
    data_share: float = math.nan
    originals: bool = False
    old_share: float = math.nan


@dataclass(frozen=True)
class Summary:
    """The figures of the table over several runs of one benchmark."""

    benchmark: str
    rows: tuple[MethodRow, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    """What the rows leave out, e.g. interrupted runs and such as have diverged."""


def group(results: Sequence[RunResult]) -> dict[str, tuple[RunResult, ...]]:
    """Group runs that differ by nothing but the seed, under a label each, in the order given.

    The label is the method's name; where runs of one method have different settings, these are added to it, so that
    no mean is taken over different settings.

    Raises:
        ValueError: There is no run; the runs are of different benchmarks or data, or are scored on different samples;
            or a seed appears twice in a group.
    """
    if not results:
        raise ValueError("results: got no run, expected at least one")
    scored: dict[str, list[Any]] = {
        "benchmarks": [r.benchmark for r in results],
        "data.validation": [r.config.data.validation for r in results],
    }
    for name, found in scored.items():
        if len(set(found)) > 1:
            raise ValueError(
                f"runs of different {name} cannot be compared: {_list_with_folders(found, results)}; expected runs of "
                "one of them"
            )
    data = [r.config.data.data_dir for r in results]
    if results[0].benchmark in OWN_DATA and not same_data(data):
        raise ValueError(
            f"runs of different data cannot be compared: {_list_with_folders(data, results)}; expected runs of one of "
            "them"
        )
    settings = [settings_of(r.config) for r in results]
    groups: dict[str, list[RunResult]] = {}
    for result, own in zip(results, settings, strict=True):
        others = [s for r, s in zip(results, settings, strict=True) if r.method == result.method]
        differing = [f"{key}={_short(v)}" for key, v in own.items() if any(s[key] != v for s in others)]
        members = groups.setdefault(" ".join([result.method, *differing]), [])
        if any(r.seed == result.seed for r in members):
            raise ValueError(f"{result.method} with seed {result.seed} is there twice with the same settings")
        members.append(result)
    return {label: tuple(sorted(members, key=lambda r: r.seed)) for label, members in groups.items()}


def _list_with_folders(values: Sequence[Any], results: Sequence[RunResult]) -> str:
    """The different values, each with the folder of the first run that has it, if that was read from one."""
    first: dict[Any, RunResult] = {}
    for value, result in zip(values, results, strict=True):
        first.setdefault(value, result)
    return ", ".join(f"{v}{'' if r.folder is None else f' (such as {r.folder})'}" for v, r in first.items())


def summarise(results: Sequence[RunResult]) -> Summary:
    """Compute the table over several runs; those that are not complete are named in the notes and enter no mean.

    Raises:
        ValueError: As :func:`group`.
    """
    groups = group(results)
    rows: list[MethodRow] = []
    notes: list[str] = []
    for label, members in groups.items():
        complete = [r for r in members if r.status == "complete"]
        notes += [_interruption_note(label, run) for run in members if run.status == "interrupted"]
        diverged = [r.seed for r in members if r.status == "diverged"]
        if diverged:
            notes.append(f"{label}: {findings.divergence_note(diverged, len(members))}.")
        if complete:
            row = MethodRow(
                label,
                {r.seed: metric_values(r) for r in complete},
                method=complete[0].method,
                step_ms=metrics.median_of_known(r.timing.step_ms for r in complete),
                selection_share=metrics.median_of_known(r.timing.selection_share for r in complete),
                data_share=metrics.median_of_known(r.timing.data_share for r in complete),
                originals=complete[0].config.mix.originals,
                old_share=old_share(complete[0]),
            )
            rows.append(row)
    pairs = [(row, first) for first, row in combinations(rows, 2)]
    if len(rows) > _ALL_PAIRS_UP_TO:
        pairs = [(row, rows[0]) for row in rows[1:]]
        notes.append(f"Of {len(rows)} rows, only the differences to the first are shown.")
    untimed = [r for r in results if r.status == "complete" and not r.timing.steady.steps]
    if untimed:
        notes.append(
            f"Single steps were not timed in {len(untimed)} of the runs: their times are means, with the warm-up."
        )
    return Summary(results[0].benchmark, tuple(rows), tuple(compare(pairs)), tuple(notes))


def to_text(summary: Summary, width: int = 80, *, bold: bool = False) -> str:
    """Render the tables as plain text, at most ``width`` columns wide where the labels allow it.

    Args:
        summary: The figures.
        width: Columns of the terminal.
        bold: Whether the best figure of each column is bold, by the escape sequences of terminals.
    """
    wrap = textwrap.TextWrapper(width=width, subsequent_indent="  ", break_on_hyphens=False)
    blocks, with_data = [], False
    if summary.rows:
        # The widest form that fits: with the share of reading data or without, intervals in the line or below it.
        forms = product((_IN_LINE, _STACKED), (True, False))
        tables = [(_results(summary, form, data, stacked=True), data) for form, data in forms]
        table, with_data = next((found for found in tables if _fits(found[0], width)), tables[-1])
        blocks.append(table.text(bold=bold))
        blocks += ["\n".join(wrap.fill(shown(line)) for line in verdict(summary.rows))]
    if summary.differences:
        table = _differences(summary, " - ", stacked=True)
        blocks.append((table if _fits(table, width) else _differences(summary, "\n- ", stacked=True)).text())
    legend = [*_legend(summary, with_data), *([_DIFFERENCE_LEGEND] if summary.differences else [])]
    blocks.append("\n".join(wrap.fill(shown(line)) for line in legend))
    return "\n\n".join(filter(None, blocks)) + "\n"


def to_markdown(summary: Summary) -> str:
    """Render the tables as GitHub-flavoured Markdown."""
    return render(
        "summary.md.jinja",
        summary=summary,
        results=_results(summary, _IN_LINE),
        verdict=verdict(summary.rows),
        legend=_legend(summary, with_data=True),
        differences=_differences(summary, " - "),
        difference_legend=_DIFFERENCE_LEGEND,
    )


def to_json_dict(summary: Summary) -> dict[str, Any]:
    """Return the whole summary as plain values, formulae included."""
    return {
        "benchmark": summary.benchmark,
        **formulas(),
        "rows": [
            to_plain(row)
            | {name: getattr(row, name) for name in ("method", "step_ms", "selection_share", "data_share")}
            for row in summary.rows
        ],
        "differences": [to_plain(d) | {"label": d.arm, "minus": d.minus} for d in summary.differences],
        "notes": list(summary.notes),
    }


_IN_LINE, _STACKED = (f"{{mean:.3f}} ± {{std:.3f}}{end}" for end in (" (95 %: ± {half:.3f})", "\n95 %: ± {half:.3f}"))
_DIFFERENCE_LEGEND = (
    "Paired differences: mean over the shared seeds ± half of the 95 % t-interval (Student); * if the interval leaves "
    "out 0, which is said of each difference by itself, however many there are."
)


def _fits(table: Table, width: int) -> bool:
    return max(map(len, table.text().splitlines())) <= width


def _results(summary: Summary, cell: str, with_data: bool = True, *, stacked: bool = False) -> Table:
    header = ["method", *_metric_headings(), "ms/step", "selection", "data", "seeds"]
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
    kept = [column for column, name in enumerate(header) if with_data or name != "data"]
    header, *body = [[row[column] for column in kept] for row in (header, *body)]
    return Table(_stack_words(header) if stacked else header, body, best=_best(summary))


def _metric_headings() -> list[str]:
    return [f"{METRIC_LABELS[name]} {_BETTER[name]}" for name in SHOWN]


def _best(summary: Summary) -> frozenset[tuple[int, int]]:
    """The row and column of each metric's best mean; of a single row there is none."""
    found = set()
    for column, name in enumerate(SHOWN, start=1):
        sign = 1 if _BETTER[name] == "↑" else -1
        means = {row: sign * r.metrics[name].mean for row, r in enumerate(summary.rows)}
        known = {row: mean for row, mean in means.items() if not math.isnan(mean)}
        if len(known) > 1:
            found.add((max(known, key=known.__getitem__), column))
    return frozenset(found)


def _differences(summary: Summary, minus: str, *, stacked: bool = False) -> Table:
    header = ["difference", *_metric_headings(), "seeds"]
    body = []
    for difference in summary.differences:
        # The figures stay under one another, with a star or without.
        intervals = [
            cells.interval(difference.metrics[name], "{mean:+.3f} ± {half:.3f}{star:2}", "{mean:+.3f}")
            for name in SHOWN
        ]
        label = f"{shown(difference.arm)}{minus}{shown(difference.minus)}"
        body.append([label, *intervals, str(len(difference.seeds))])
    return Table(_stack_words(header) if stacked else header, body)


def _stack_words(header: list[str]) -> list[str]:
    # Headings stand on two lines, so that columns stay as narrow as their figures and the table fits 80 columns.
    broken = {"ms/step": "ms/\nstep", "selection": "selec-\ntion"}
    return [broken.get(name, re.sub(" (?=[a-z])", "\n", name)) for name in header]


def _legend(summary: Summary, with_data: bool) -> list[str]:
    legend = [f"Benchmark {summary.benchmark}; {R_MEANING}."]
    if summary.rows:
        legend += [f"{METRIC_LABELS[name].capitalize()}: {metrics.FORMULAS[name]}." for name in SHOWN]
        legend.append("Mean ± standard deviation over seeds; 95 %: half of the mean's t-interval (Student).")
        legend.append(
            "ms/step: median time of a training step; selection: the share of the steps' time spent on selecting pairs"
            + ("; data: on drawing, reading and augmenting samples." if with_data else ".")
            + " First steps (warm-up) are left out."
        )
    else:
        legend.append("No run is complete, so there is no mean to show.")
    return [*legend, *summary.notes]


def _interruption_note(label: str, run: RunResult) -> str:
    reached = tasks_reached(run)
    note = f"{label}, seed {run.seed}: interrupted after {reached} of {run.tasks} tasks, in no mean"
    return f"{note} (average accuracy so far {metric_values(run)['average_accuracy']:.3f})." if reached else f"{note}."


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
