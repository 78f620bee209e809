"""The report of an experiment: tables, plots and what they mean, as Markdown and as one self-contained HTML page.

Everything is rendered from plain values, those of ``results.json``: so a report can be made again from that file alone,
without the runs. Its wording is in ``templates/report.md.jinja``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gradmix.training.reports import cells, document, findings, plots, significance
from gradmix.training.reports.arms import DIVERGED, KEYS, ArmRow, place_of, summarise, summary_of
from gradmix.training.reports.document import Picture, Svg, Table
from gradmix.training.reports.rows import Difference
from gradmix.training.runs import metrics
from gradmix.training.runs.experiments import label_of
from gradmix.training.runs.metrics import Interval
from gradmix.training.runs.results import METRIC_LABELS, R_MEANING, to_json
from gradmix.training.runs.running import RUNS_AT_A_TIME
from gradmix.training.runs.whole_files import make_folder, write_text

SHOWN = ("average_accuracy", "final_accuracy", "forgetting", "learning_accuracy")
"""The metrics of the report's tables. The last one says what less forgetting was paid for with."""
# Plots stay legible up to these numbers of rows and lines.
_DOTS_UP_TO, _LINES_UP_TO = 80, 8
_MIB = 2**20
_RESULT = "{mean:.3f} ± {std:.3f} [{low:.3f}, {high:.3f}]"


def to_markdown(values: Mapping[str, Any]) -> str:
    """Render the report as GitHub-flavoured Markdown, with links to the plots that :func:`write` puts beside it."""
    return _render(values, *summarise(values))[0]


def to_html(values: Mapping[str, Any]) -> str:
    """Render the report as one HTML page that needs nothing else, light or dark as the reader has it."""
    return document.to_html(*_render(values, *summarise(values)))


def write(values: Mapping[str, Any], folder: str | Path) -> Path:
    """Write ``report.md``, ``report.html``, ``results.json`` and the plots as SVG; each replaces the one before whole.

    The results come first, so that they are there whatever becomes of the rest. A plot that cannot be drawn costs
    nothing but itself: a note stands in its place, and a warning says so.

    Args:
        values: Those of :func:`~gradmix.training.reports.arms.collect` or
            :func:`~gradmix.training.reports.arms.from_results`.
        folder: Where to; made if it is not there, and returned.

    Raises:
        OSError: A file could not be written; the error names it.
    """
    folder = Path(folder)
    make_folder(folder)
    rows, differences = summarise(values)
    results = to_json({key: values[key] for key in KEYS} | {"summary": summary_of(rows, differences)})
    write_text(folder / "results.json", results)
    text, svgs = _render(values, rows, differences)
    files = {"report.html": document.to_html(text, svgs), "report.md": text}
    files |= {f"{name}.svg": svg.plain for name, svg in svgs.items()}
    for left in folder.glob("*.svg"):
        # A plot of an earlier report that this one does not have.
        if left.stem in ("average_accuracy", "after_tasks", "varied", "differences") and left.name not in files:
            left.unlink()
    for name, content in files.items():
        write_text(folder / name, content)
    return folder


def _render(
    values: Mapping[str, Any], rows: Sequence[ArmRow], differences: Sequence[Difference]
) -> tuple[str, dict[str, Svg]]:
    """Return the Markdown, and the plots that could be drawn."""
    lines = _lines(values, rows)
    places, svgs = document.draw(pictures(values, rows, differences))
    text = document.render(
        "report.md.jinja",
        values=values,
        rows=rows,
        differences=differences,
        findings=findings,
        rule_of=significance.rule_of,
        planned=len(values["runs"]) + len(values["missing"]),
        missing=len(values["missing"]),
        diverged=sum(bool(run.get(DIVERGED)) for run in values["missing"]),
        diverged_arms=divergence_notes(values),
        pictures=places,
        starred=any(mark is not None for mark in _marks(values, rows)),
        lines=lines,
        bands_up_to=plots.BANDS_UP_TO,
        intervals=sum(not math.isnan(d.metrics[name].half_width) for d in differences for name in SHOWN),
        tests=sum(not math.isnan(d.p) for d in differences),
        significant=sum(d.significant for d in differences),
        at_a_time=", ".join(sorted({str(run["environment"].get(RUNS_AT_A_TIME, "unknown")) for run in values["runs"]})),
        untimed=sum(not (run["timing"].get("steady") or {}).get("steps") for run in values["runs"]),
        on_cpu=all(row.on_cpu for row in rows),
        environment=_environments([run["environment"] for run in values["runs"]]),
        formulas={METRIC_LABELS[name]: metrics.FORMULAS[name] for name in METRIC_LABELS if name in SHOWN},
        r_meaning=R_MEANING,
        run_label=lambda run: label_of(run["arm"], run["values"]),
        **_tables(values, rows, differences),
    )
    return text, svgs


def divergence_notes(values: Mapping[str, Any]) -> list[str]:
    """For each arm at some varied values of which runs have diverged, a line that says so."""
    arms: dict[str, list[int]] = {}
    for run in values["missing"]:
        if run.get(DIVERGED):
            arms.setdefault(label_of(run["arm"], run["values"]), []).append(run["seed"])
    return [f"{arm}: {findings.divergence_note(seeds, len(values['seeds']))}" for arm, seeds in arms.items()]


def _environments(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    texts = {}
    for key in dict.fromkeys(key for environment in found for key in environment):
        seen = list(dict.fromkeys(str(e[key]) for e in found if key in e))
        texts[key] = f"{min(seen)} to {max(seen)}" if key == "date" and len(seen) > 1 else ", ".join(seen)
        lacking = sum(key not in e for e in found)
        if lacking:
            texts[key] += f" (of {lacking} of {len(found)} runs it is unknown)"
    return texts


# --------------------------------------------------------------------------------------------------------------- tables


def _tables(
    values: Mapping[str, Any], rows: Sequence[ArmRow], differences: Sequence[Difference]
) -> dict[str, Table | None]:
    vary = list(values["vary"])
    shown = [METRIC_LABELS[name] for name in SHOWN]
    results = [
        [
            row.arm,
            *(cells.setting(row.values[key]) for key in vary),
            *(cells.interval(row.metrics[name], _RESULT, minus="−") for name in SHOWN),
            cells.percent(row.mixed_share),
            str(len(row.runs)),
        ]
        for row in rows
    ]
    comparison = [
        [
            f"{d.arm} − {d.minus}",
            *(cells.setting(d.values[key]) for key in vary),
            *(cells.difference(d.metrics[name]) for name in SHOWN),
            cells.probability(d.p),
            cells.probability(d.holm),
            str(len(d.seeds)),
        ]
        for d in differences
    ]
    arms = [
        [arm["name"], arm["method"], ", ".join(f"{k} {cells.setting(v)}" for k, v in arm["settings"].items()) or "-"]
        for arm in values["arms"]
    ]
    return {
        "results": Table(["arm", *vary, *shown, "samples mixed", "seeds"], results, 1 + len(vary)),
        "references": _references(values, rows),
        "comparison": Table(["difference", *vary, *shown, "p", "p, Holm", "seeds"], comparison, 1 + len(vary)),
        "costs": _costs(rows),
        "arms": Table(["arm", "method", "settings"], arms, 3),
        "shared": Table(["of", "settings", "unset"], _common_settings(values["protocol"]), 3),
    }


def _references(values: Mapping[str, Any], rows: Sequence[ArmRow]) -> Table | None:
    by_arm = {} if values["vary"] else {row.arm: row for row in rows}
    body = []
    for item in values["references"]:
        row = by_arm.get(item["arm"])
        here = "-" if row is None else f"{row.metrics[item['metric']].mean:.3f} ({row.arm})"
        words = (item["label"], item["source"], item["differs"] or "-", METRIC_LABELS[item["metric"]])
        body.append([*words, f"{item['value']:.3f}", here])
    return Table(["what", "source", "differs", "metric", "published", "here"], body, 4) if body else None


def _costs(rows: Sequence[ArmRow]) -> Table:
    base: dict[str, ArmRow] = {}
    for row in rows:
        # Plain replay is what the others are measured by; without it, the first arm.
        key = json.dumps(row.values, sort_keys=True)
        if key not in base or (row.runs[0]["method"] == "er" and base[key].runs[0]["method"] != "er"):
            base[key] = row
    body = []
    for row in rows:
        unit = base[json.dumps(row.values, sort_keys=True)].mean_step_ms
        body.append(
            [
                row.label,
                cells.decimal(row.step_ms),
                " to ".join(map(cells.decimal, row.step_range)) if len(row.runs) > 1 else "-",
                cells.decimal(row.mean_step_ms),
                f"{row.mean_step_ms / unit:.2f}" if row.mean_step_ms > 0 and unit > 0 else "-",
                *map(cells.percent, row.shares.values()),
                f"{'≤ ' if row.on_cpu else ''}{row.peak_memory / _MIB:.0f}" if row.peak_memory else "-",
            ]
        )
    against = f"× {' or '.join(dict.fromkeys(row.arm for row in base.values()))}"
    parts = ["selection", "forward + backward", "data"]
    return Table(["arm", "ms/step", "lowest to highest", "mean", against, *parts, "peak MiB"], body)


def _common_settings(common: Mapping[str, Any]) -> list[list[str]]:
    """A line for each section: what is set in it, and what is not."""
    sections: dict[str, tuple[list[str], list[str]]] = {}
    for key, value in common.items():
        section, _, name = key.rpartition(".")
        put, unset = sections.setdefault(section, ([], []))
        if value is None:
            unset.append(name)
        else:
            put.append(f"{name} {cells.setting(value)}")
    return [[name or "the run", *(", ".join(part) or "-" for part in parts)] for name, parts in sections.items()]


# ------------------------------------------------------------------------------------------------------------- pictures


def pictures(values: Mapping[str, Any], rows: Sequence[ArmRow], differences: Sequence[Difference]) -> Iterator[Picture]:
    """Yield the plots that the figures give rise to."""
    label = METRIC_LABELS["average_accuracy"]
    if rows and len(rows) <= _DOTS_UP_TO:
        by_row = [metrics.without_nan(run["average_accuracy"] for run in row.by_seed.values()) for row in rows]
        figure = partial(plots.dots, [row.label for row in rows], by_row, label, _marks(values, rows))
        means = "; ".join(f"{row.label}: {row.metrics['average_accuracy'].mean:.3f}" for row in rows)
        yield Picture("average_accuracy", f"{label.capitalize()} by arm. {means}.", figure)
    lines = _lines(values, rows)
    if lines:
        ends = "; ".join(f"{name} {float(line[:, -1].mean()):.3f}" for name, line in lines.items())
        alt = f"Mean accuracy on the tasks seen, over tasks learnt, of {', '.join(lines)}. At the end: {ends}."
        yield Picture("after_tasks", alt, partial(plots.after_tasks, lines))
    if rows and values["vary"]:
        key, panels = next(iter(values["vary"])), _panels(values, rows)
        alt = f"Lines over {key} for {', '.join(next(iter(panels.values())))}; the figures are in the table above."
        yield Picture("varied", alt, partial(plots.sweep, key, values["vary"][key], panels))
    if differences and len(differences) <= _DOTS_UP_TO:
        figure = partial(
            plots.forest,
            [d.label for d in differences],
            [d.metrics["average_accuracy"] for d in differences],
            "difference of average accuracy (above 0: the first is better)",
            [d.significant for d in differences],
        )
        means = "; ".join(f"{d.label}: {cells.difference(d.metrics['average_accuracy'])}" for d in differences)
        yield Picture("differences", f"Differences of average accuracy. {means}.", figure)


def _marks(values: Mapping[str, Any], rows: Sequence[ArmRow]) -> list[float | None]:
    """The published average accuracy beside each row; None where there is none."""
    published = [] if values["vary"] else [r for r in values["references"] if r["metric"] == "average_accuracy"]
    by_arm = {r["arm"]: r["value"] for r in published}
    return [by_arm.get(row.arm) for row in rows]


def _lines(values: Mapping[str, Any], rows: Sequence[ArmRow]) -> dict[str, Any]:
    chosen = rows
    if len(chosen) > _LINES_UP_TO:
        if values["vary"]:
            return {}
        there, wanted = {row.arm for row in rows}, set[str]()
        for pair in values["differences"]:
            more = wanted | (there & set(pair))
            wanted = more if len(more) <= _LINES_UP_TO else wanted
        chosen = [row for row in rows if row.arm in wanted]
    lines = {row.label: np.array([run["seen_accuracy"] for run in row.runs], dtype=np.float64) for row in chosen}
    return lines if len({line.shape[1] for line in lines.values()}) == 1 else {}


def _panels(values: Mapping[str, Any], rows: Sequence[ArmRow]) -> dict[str, dict[str, list[Interval]]]:
    """A panel for each metric; with two varied settings, one for each value of the second."""
    first, *second = values["vary"]
    nothing = Interval(math.nan, math.nan, math.nan)
    at = {place_of(row.arm, row.values): row for row in rows}
    arms = dict.fromkeys(row.arm for row in rows)

    def line(arm: str, metric: str, rest: Mapping[str, Any]) -> list[Interval]:
        found = (at.get(place_of(arm, {first: value, **rest})) for value in values["vary"][first])
        return [nothing if row is None else row.metrics[metric] for row in found]

    if not second:
        return {METRIC_LABELS[name]: {arm: line(arm, name, {}) for arm in arms} for name in SHOWN}
    return {
        f"average accuracy, {second[0]} {cells.setting(value)}": {
            arm: line(arm, "average_accuracy", {second[0]: value}) for arm in arms
        }
        for value in values["vary"][second[0]]
    }
