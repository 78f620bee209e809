"""The report of an experiment: tables, plots and what they mean, as Markdown and as one self-contained HTML page.

Everything is rendered from plain values, those of ``results.json``: so a report can be made again from that file alone,
without the runs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gradmix.training.config import to_dict
from gradmix.training.method_names import current_name
from gradmix.training.reports import cells, document, findings, plots
from gradmix.training.reports.document import Block, Code, Heading, Items, Picture, Table, Text
from gradmix.training.reports.significance import holm, paired_p_value
from gradmix.training.runs import metrics
from gradmix.training.runs.experiments import Experiment, Run, label_of, points_of, protocol
from gradmix.training.runs.metrics import Interval, known_mean, mean_interval, paired_difference
from gradmix.training.runs.results import METRIC_LABELS, R_MEANING, RunResult, load_run, metric_values, number, to_json
from gradmix.training.runs.running import RUNS_AT_A_TIME, state_of
from gradmix.training.runs.settings import flatten
from gradmix.training.runs.whole_files import make_folder, write_text

FORMAT = 1
"""Version of what ``results.json`` holds."""

_KEYS = (
    "format", "name", "title", "about", "command", "seeds", "arms", "vary", "differences", "references", "protocol",
    "runs", "missing",
)  # fmt: skip
DIVERGED = "diverged"
"""Key of a missing run: whether it was made, and its loss became no finite number. Earlier files lack it."""
SHOWN = ("average_accuracy", "final_accuracy", "forgetting", "learning_accuracy")
"""The metrics of the report's tables. The last one says what less forgetting was paid for with."""
# Plots stay legible up to these numbers of rows and lines.
_DOTS_UP_TO, _LINES_UP_TO = 80, 8
_MIB = 2**20
_RESULT = "{mean:.3f} ± {std:.3f} [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class Row:
    """An arm at some varied values, over its complete runs.

    Attributes:
        arm: The arm's name.
        values: The varied values.
        runs: The runs, as they stand in ``results.json``.
        metrics: Mean, standard deviation and half of the 95 % t-interval of each metric.
        mixed: Mean share of rows mixed, from 0 to 1; NaN where nothing is selected.
        step_ms: Median over the runs of the milliseconds of a training step.
        step_range: The lowest and the highest of them.
        shares: Medians of the shares of that time, from 0 to 1: of selection, of forward and backward passes, of data.
        peak_memory: Peak memory in bytes, 0 if unknown. On a GPU the highest of the runs. On a CPU, where a process's
            peak includes what it did before the run, the lowest: the closest bound there is.
    """

    arm: str
    values: Mapping[str, Any]
    runs: tuple[Mapping[str, Any], ...]
    metrics: Mapping[str, Interval]
    mixed: float
    step_ms: float
    step_range: tuple[float, float]
    shares: Mapping[str, float]
    peak_memory: int

    @property
    def label(self) -> str:
        """The arm and the varied values."""
        return label_of(self.arm, self.values)


@dataclass(frozen=True)
class Difference:
    """One arm minus another at the same varied values, paired over the seeds that both have.

    Attributes:
        arm: The first.
        minus: The second.
        values: The varied values.
        seeds: The shared seeds.
        metrics: Mean, standard deviation and half of the 95 % t-interval of each metric's differences.
        p: Two-sided p-value of the paired t-test for average accuracy; NaN with fewer than two seeds.
        holm: The same, adjusted by Holm's method for all the differences of the report.
    """

    arm: str
    minus: str
    values: Mapping[str, Any]
    seeds: tuple[int, ...]
    metrics: Mapping[str, Interval]
    p: float
    holm: float

    @property
    def label(self) -> str:
        """Both arms and the varied values."""
        return label_of(f"{self.arm} − {self.minus}", self.values)


# ---------------------------------------------------------------------------------------------------------- the figures


def collect(
    experiment: Experiment,
    runs: Sequence[Run],
    root: str | Path,
    *,
    command: str = "",
    failed: Sequence[tuple[Run, str]] = (),
) -> dict[str, Any]:
    """Read the runs of an experiment that are there, as the plain values of ``results.json``.

    Args:
        experiment: The specification.
        runs: Its runs.
        root: Folder of all runs.
        command: What makes the report; empty: ``gradmix experiment`` with the experiment's name.
        failed: Runs that failed, and why.

    Raises:
        ValueError: A saved run is damaged.
    """
    root = Path(root)
    reasons = {run.folder: reason for run, reason in failed}
    words = {
        "unfinished": "begun, not finished",
        "absent": "not begun",
        "diverged": "diverged: the loss was not finite",
    }
    found, missing = [], []
    for run in runs:
        state = state_of(run, root)
        if state == "complete":
            found.append({"arm": run.arm, "values": dict(run.values)} | _run_values(run, load_run(root / run.folder)))
        else:
            why = f"failed: {reasons[run.folder]}" if run.folder in reasons else words[state]
            place = {"arm": run.arm, "values": dict(run.values), "seed": run.seed}
            missing.append(place | {"why": why, DIVERGED: state == "diverged"})
    return {
        "format": FORMAT,
        "name": experiment.name,
        "title": experiment.title,
        "about": experiment.about,
        "command": command or f"gradmix experiment {experiment.source or experiment.name}",
        "seeds": list(experiment.seeds),
        "arms": [
            {"name": arm.name, "method": arm.method, "settings": dict(flatten(arm.settings))} for arm in experiment.arms
        ],
        "vary": {key: list(values) for key, values in experiment.vary.items()},
        "differences": [list(pair) for pair in experiment.differences],
        "references": [asdict(reference) for reference in experiment.references],
        "protocol": protocol(runs),
        "runs": found,
        "missing": missing,
    }


def from_results(path: str | Path) -> dict[str, Any]:
    """Read a ``results.json``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or not written by gradmix, or by a later version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, or not written by gradmix: {error}") from error
    absent = [key for key in _KEYS if key not in values] if isinstance(values, dict) else list(_KEYS)
    if absent:
        raise ValueError(f"{path}: damaged, or not written by gradmix: {', '.join(absent)} missing")
    if values["format"] != FORMAT:
        raise ValueError(f"{path}: got format {values['format']}, expected {FORMAT}")
    # A run whose values were cut out would fail far from here.
    try:
        summarise(values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: damaged, or not written by gradmix: {reason}") from error
    _use_current_names(values)
    return dict(values)


def _use_current_names(values: Mapping[str, Any]) -> None:
    """Put the current names of methods in the place of former ones, in arms and runs."""
    for entry in (*values["arms"], *values["runs"]):
        entry["method"] = current_name(entry["method"], warn=False)
    for run in values["runs"]:
        config = run.get("config")
        if config and "methods" in config:
            config["methods"] = [current_name(name, warn=False) for name in config["methods"]]


def summarise(values: Mapping[str, Any]) -> tuple[list[Row], list[Difference]]:
    """Compute the rows and the paired differences over the complete runs of ``results.json``'s values."""
    rows: dict[tuple[str, str], Row] = {}
    for run in values["runs"]:
        key = _place(run["arm"], run["values"])
        if key not in rows:
            members = tuple(r for r in values["runs"] if _place(r["arm"], r["values"]) == key)
            rows[key] = _row(run["arm"], run["values"], members)
    order = [_place(arm["name"], point) for arm in values["arms"] for point in points_of(values["vary"])]
    ordered = [rows[key] for key in order if key in rows]
    found = []
    for first, second in values["differences"]:
        for point in points_of(values["vary"]):
            a, b = rows.get(_place(first, point)), rows.get(_place(second, point))
            if a is not None and b is not None:
                found += _difference(a, b)
    adjusted = holm([p for *_, p in found])
    differences = [
        Difference(a.arm, b.arm, a.values, seeds, intervals, p, q)
        for (a, b, seeds, intervals, p), q in zip(found, adjusted, strict=True)
    ]
    return ordered, differences


def _run_values(run: Run, result: RunResult) -> dict[str, Any]:
    timing = result.timing
    return {
        "method": result.method,
        "seed": result.seed,
        "metrics": metric_values(result),
        "seen_accuracy": plots.seen_accuracy(result.accuracy).tolist(),
        "mixed_share": list(result.mixed_share),
        "timing": {
            "steps": timing.steps,
            "seconds_total": timing.seconds_total,
            "seconds_step": timing.seconds_step,
            "seconds_selection": timing.seconds_selection,
            "seconds_forward_backward": timing.seconds_forward_backward,
            "seconds_data": timing.seconds_data,
            "seconds_evaluation": timing.seconds_evaluation,
            "peak_memory_bytes": timing.peak_memory_bytes,
        },
        "environment": dict(result.environment),
        "folder": run.folder.as_posix(),
        "config": {key: value for key, value in flatten(to_dict(result.config)) if key != "data.data_dir"},
    }


def _row(arm: str, point: Mapping[str, Any], runs: tuple[Mapping[str, Any], ...]) -> Row:
    timings = [run["timing"] for run in runs]
    steps = [1000.0 * _share(t["seconds_step"], t["steps"]) for t in timings]
    return Row(
        arm=arm,
        values=dict(point),
        runs=runs,
        metrics={name: mean_interval([_metric(run["metrics"], name) for run in runs]) for name in METRIC_LABELS},
        mixed=known_mean([_mixed(run["mixed_share"]) for run in runs]),
        step_ms=_median(steps),
        step_range=(min(steps), max(steps)),
        shares={
            name: _median([_share(t[f"seconds_{name}"], t["seconds_step"]) for t in timings])
            for name in ("selection", "forward_backward", "data")
        },
        peak_memory=_peak(runs),
    )


def _metric(values: Mapping[str, Any], name: str) -> float:
    """A run's metric; NaN in a file that is older than the metric. The first one every whole file has."""
    return number(values[name] if name == "average_accuracy" else values.get(name))


def _difference(a: Row, b: Row) -> list[tuple[Row, Row, tuple[int, ...], dict[str, Interval], float]]:
    left, right = ({run["seed"]: run["metrics"] for run in row.runs} for row in (a, b))
    seeds = tuple(seed for seed in left if seed in right)
    if not seeds:
        return []
    intervals = {
        name: paired_difference([_metric(left[s], name) for s in seeds], [_metric(right[s], name) for s in seeds])
        for name in METRIC_LABELS
    }
    return [(a, b, seeds, intervals, paired_p_value(intervals["average_accuracy"], len(seeds)))]


def _peak(runs: Sequence[Mapping[str, Any]]) -> int:
    found = [int(run["timing"]["peak_memory_bytes"] or 0) for run in runs]
    closest: Callable[[list[int]], int] = min if _on_cpu(runs) else max
    return closest([size for size in found if size] or [0])


def _on_cpu(runs: Sequence[Mapping[str, Any]]) -> bool:
    return all(run["environment"].get("device", "cpu") == "cpu" for run in runs)


def _mixed(shares: Sequence[float | None]) -> float:
    # In the first task there is nothing to select by, and every row is mixed.
    later = [number(v) for v in (shares[1:] or shares)]
    return known_mean(later)


def _place(arm: str, point: Mapping[str, Any]) -> tuple[str, str]:
    return arm, json.dumps(point, sort_keys=True)


# --------------------------------------------------------------------------------------------------------- the document


def _document(values: Mapping[str, Any], rows: list[Row], differences: list[Difference]) -> list[Block]:
    planned = len(values["runs"]) + len(values["missing"])
    blocks: list[Block] = [Heading(values["title"], 1)]
    if values["about"]:
        blocks.append(Text(values["about"]))
    blocks += [Text("Made by, and made again by:"), Code(values["command"])]
    count, diverged = len(values["missing"]), sum(bool(run.get(DIVERGED)) for run in values["missing"])
    if count > diverged:
        blocks.append(
            Text(f"Not complete: {count - diverged} of {planned} runs are missing; they are named at the end.")
        )
    if diverged:
        blocks.append(Text(f"{diverged} of {planned} runs diverged: the loss was not finite. They are in no figure."))
    if not rows:
        blocks.append(Text("No run is complete, so there is no figure to show."))
    else:
        blocks += _findings(values, rows, differences)
        blocks += _results(values, rows)
        blocks += _comparisons(values, differences)
        blocks += _costs(rows)
    blocks += _meaning(values)
    return blocks


def _findings(values: Mapping[str, Any], rows: list[Row], differences: list[Difference]) -> list[Block]:
    blocks: list[Block] = [Heading("What the figures say")]
    if differences:
        blocks.append(Text("Differences of average accuracy, paired over seeds, ± half of their 95 % t-intervals."))
    for head, said in findings.comparisons(differences).items():
        blocks += [Text(head), Items([(sentence, "") for sentence in said])]
    kept = findings.controls(values, rows, differences)
    if kept:
        blocks += [Text("What controls keep of the gain:"), Items([(sentence, "") for sentence in kept])]
    return [*blocks, Text("To be kept in mind:"), Items([(line, "") for line in findings.caveats(values, rows)])]


def _results(values: Mapping[str, Any], rows: list[Row]) -> list[Block]:
    vary = list(values["vary"])
    header = ["arm", *vary, *(METRIC_LABELS[name] for name in SHOWN), "rows mixed", "seeds"]
    body = [
        [
            row.arm,
            *(cells.setting(row.values[key]) for key in vary),
            *(cells.interval(row.metrics[name], _RESULT, minus="−") for name in SHOWN),
            cells.percent(row.mixed),
            str(len(row.runs)),
        ]
        for row in rows
    ]
    caption = "Mean ± standard deviation over seeds [95 % t-interval of the mean]."
    blocks: list[Block] = [Heading("Results"), Table(caption, header, body, 1 + len(vary))]
    blocks += [Text(f"{line}.") for line in diverged_of(values)]
    if values["references"]:
        blocks.append(_references(values["references"], rows, bool(vary)))
    published = [] if vary else [r for r in values["references"] if r["metric"] == "average_accuracy"]
    marks = {r["arm"]: r["value"] for r in published}
    label = METRIC_LABELS["average_accuracy"]
    if len(rows) <= _DOTS_UP_TO:
        shown = [_values(row, "average_accuracy") for row in rows]
        figure = partial(plots.dots, [row.label for row in rows], shown, label, [marks.get(row.arm) for row in rows])
        alt = f"{label.capitalize()} by arm. " + "; ".join(
            f"{row.label}: {row.metrics['average_accuracy'].mean:.3f}" for row in rows
        )
        star = " Star: the published figure." if any(row.arm in marks for row in rows) else ""
        title = f"Average accuracy: a dot for each seed, their mean and its 95 % interval.{star}"
        blocks.append(Picture("average_accuracy", title, f"{alt}.", figure))
    lines = _lines(values, rows)
    if lines:
        band = "" if len(lines) > plots.BANDS_UP_TO else "; band: one standard deviation over seeds"
        some = "" if len(lines) == len(rows) else f" Shown are {len(lines)} of {len(rows)} arms, those compared first."
        title = f"Mean accuracy on the tasks seen after each task, and at the end{band}.{some}"
        alt = f"Mean accuracy on the tasks seen, over tasks learnt, of {', '.join(lines)}. At the end: " + "; ".join(
            f"{name} {float(line[:, -1].mean()):.3f}" for name, line in lines.items()
        )
        blocks.append(Picture("after_tasks", title, f"{alt}.", partial(plots.after_tasks, lines)))
    if vary:
        panels = _panels(values, rows)
        varied = partial(plots.varied, vary[0], values["vary"][vary[0]], panels)
        title = f"Over {vary[0]}: mean and 95 % interval."
        alt = f"Lines over {vary[0]} for {', '.join(next(iter(panels.values())))}; the figures are in the table above."
        blocks.append(Picture("varied", title, alt, varied))
    return blocks


def diverged_of(values: Mapping[str, Any]) -> list[str]:
    """For each arm at some varied values of which runs have diverged, a line that says so."""
    arms: dict[str, list[int]] = {}
    for run in values["missing"]:
        if run.get(DIVERGED):
            arms.setdefault(label_of(run["arm"], run["values"]), []).append(run["seed"])
    return [f"{arm}: {findings.diverged(seeds, len(values['seeds']))}" for arm, seeds in arms.items()]


def _comparisons(values: Mapping[str, Any], differences: list[Difference]) -> list[Block]:
    if not differences:
        return []
    vary = list(values["vary"])
    header = ["difference", *vary, *(METRIC_LABELS[name] for name in SHOWN), "p", "p, Holm", "seeds"]
    body = [
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
    shown = sum(not math.isnan(d.metrics[name].half_width) for d in differences for name in SHOWN)
    tests = sum(not math.isnan(d.p) for d in differences)
    told = sum(d.holm < 0.05 for d in differences)
    caption = (
        "Paired differences: mean over the shared seeds ± half of its 95 % t-interval; * where that leaves out 0. p: "
        "two-sided paired t-test of average accuracy."
    )
    many = (
        f"{shown} intervals are shown. Were there no difference anywhere, about {0.05 * shown:.1f} of them would still "
        f"leave out 0. Holm's p allows for that among the {tests} tests of average accuracy: {told} of them stay below "
        "0.05."
    )
    alt = "Differences of average accuracy. " + "; ".join(
        f"{d.label}: {cells.difference(d.metrics['average_accuracy'])}" for d in differences
    )
    picture = Picture(
        "differences",
        "Paired differences of average accuracy with 95 % intervals. Full: told apart from 0 as one of all of these "
        "comparisons (Holm); hollow: by itself only; grey: not.",
        f"{alt}.",
        partial(
            plots.forest,
            [d.label for d in differences],
            [d.metrics["average_accuracy"] for d in differences],
            "difference of average accuracy (above 0: the first is better)",
            [d.holm < 0.05 for d in differences],
        ),
    )
    blocks: list[Block] = [Heading("Differences"), Table(caption, header, body, 1 + len(vary)), Text(many)]
    return [*blocks, picture] if len(differences) <= _DOTS_UP_TO else blocks


def _costs(rows: list[Row]) -> list[Block]:
    base: dict[str, Row] = {}
    for row in rows:
        # Plain replay is what the others are measured by; without it, the first arm.
        key = json.dumps(row.values, sort_keys=True)
        if key not in base or (row.runs[0]["method"] == "er" and base[key].runs[0]["method"] != "er"):
            base[key] = row
    names = list(dict.fromkeys(row.arm for row in base.values()))
    body = []
    for row in rows:
        unit = base[json.dumps(row.values, sort_keys=True)].step_ms
        body.append(
            [
                row.label,
                cells.decimal(row.step_ms),
                " to ".join(map(cells.decimal, row.step_range)) if len(row.runs) > 1 else "-",
                f"{row.step_ms / unit:.2f}" if row.step_ms > 0 and unit > 0 else "-",
                *(cells.percent(row.shares[name]) for name in ("selection", "forward_backward", "data")),
                f"{'≤ ' if _on_cpu(row.runs) else ''}{row.peak_memory / _MIB:.0f}" if row.peak_memory else "-",
            ]
        )
    against = f"× {' or '.join(names)}"
    header = ["arm", "ms/step", "lowest to highest", against, "selection", "forward + backward", "data", "peak MiB"]
    at_once = sorted({str(run["environment"].get(RUNS_AT_A_TIME, "unknown")) for row in rows for run in row.runs})
    memory = (
        "the whole process's, with its libraries and data and the runs made before in it; the lowest over seeds is the "
        "closest bound"
        if all(_on_cpu(row.runs) for row in rows)
        else "on a GPU what tensors took up; elsewhere the whole process's, a bound from above"
    )
    caption = (
        "Cost of a training step, and the shares of its parts: medians over seeds. Times are comparable only between "
        "runs on the same machine with nothing else on it; where the lowest and the highest are far apart, something "
        f"else was. Runs at a time: {', '.join(at_once)}. Peak memory: {memory}."
    )
    return [Heading("Cost"), Table(caption, header, body)]


def _meaning(values: Mapping[str, Any]) -> list[Block]:
    vary = {key: " / ".join(map(cells.setting, listed)) for key, listed in values["vary"].items()}
    blocks: list[Block] = [
        Heading("Protocol"),
        Table("Arms: method, and what each sets.", ["arm", "method", "settings"], _arms(values), 3),
        Table("Settings that all runs share.", ["of", "settings", "unset"], _shared(values["protocol"]), 3),
    ]
    if vary:
        blocks.append(Items([(f"Varied: {key}: {listed}.", "") for key, listed in vary.items()]))
    blocks.append(Text(f"Seeds: {', '.join(map(str, values['seeds']))}."))
    environment = _environments([run["environment"] for run in values["runs"]])
    if environment:
        blocks += [Heading("Environment"), Items([(f"{key}: {value}", "") for key, value in environment.items()])]
    formulas = [
        (f"{METRIC_LABELS[name].capitalize()}: ", metrics.FORMULAS[name]) for name in METRIC_LABELS if name in SHOWN
    ]
    share = (
        "Rows mixed: mean over the tasks after the first of the share of rows that found a partner; - where all are "
        "mixed, or none."
    )
    blocks += [Heading("Formulae"), Text(f"{R_MEANING}."), Items([*formulas, (share, "")])]
    if values["missing"]:
        names = [
            (f"{label_of(run['arm'], run['values'])}, seed {run['seed']}: {run['why']}", "")
            for run in values["missing"]
        ]
        blocks += [Heading("Missing runs"), Items(names)]
    return blocks


def _references(references: Sequence[Mapping[str, Any]], rows: list[Row], varied: bool) -> Table:
    by_arm = {} if varied else {row.arm: row for row in rows}
    body = []
    for item in references:
        row = by_arm.get(item["arm"])
        here = "-" if row is None else f"{row.metrics[item['metric']].mean:.3f} ({row.arm})"
        body.append(
            [
                item["label"],
                item["source"],
                item["differs"] or "-",
                METRIC_LABELS[item["metric"]],
                f"{item['value']:.3f}",
                here,
            ]
        )
    return Table(
        "Published figures, with what differs.", ["what", "source", "differs", "metric", "published", "here"], body, 4
    )


def _lines(values: Mapping[str, Any], rows: list[Row]) -> dict[str, Any]:
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


def _panels(values: Mapping[str, Any], rows: list[Row]) -> dict[str, dict[str, list[Interval]]]:
    """A panel for each metric; with two varied settings, one for each value of the second."""
    first, *second = values["vary"]
    nothing = Interval(math.nan, math.nan, math.nan)
    at = {_place(row.arm, row.values): row for row in rows}
    arms = [arm["name"] for arm in values["arms"] if any(row.arm == arm["name"] for row in rows)]

    def line(arm: str, metric: str, rest: Mapping[str, Any]) -> list[Interval]:
        found = (at.get(_place(arm, {first: value, **rest})) for value in values["vary"][first])
        return [nothing if row is None else row.metrics[metric] for row in found]

    if not second:
        return {METRIC_LABELS[name]: {arm: line(arm, name, {}) for arm in arms} for name in SHOWN}
    return {
        f"average accuracy, {second[0]} {cells.setting(value)}": {
            arm: line(arm, "average_accuracy", {second[0]: value}) for arm in arms
        }
        for value in values["vary"][second[0]]
    }


def _shared(common: Mapping[str, Any]) -> list[list[str]]:
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


def _arms(values: Mapping[str, Any]) -> list[list[str]]:
    return [
        [arm["name"], arm["method"], ", ".join(f"{k} {cells.setting(v)}" for k, v in arm["settings"].items()) or "-"]
        for arm in values["arms"]
    ]


def _environments(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    keys = dict.fromkeys(key for environment in found for key in environment)
    told = {}
    for key in keys:
        seen = list(dict.fromkeys(str(e[key]) for e in found if key in e))
        told[key] = f"{min(seen)} to {max(seen)}" if key == "date" and len(seen) > 1 else ", ".join(seen)
        lacking = sum(key not in e for e in found)
        if lacking:
            told[key] += f" (of {lacking} of {len(found)} runs it is unknown)"
    return told


# ----------------------------------------------------------------------------------------------------------- renderings


def to_markdown(values: Mapping[str, Any]) -> str:
    """Render the report as GitHub-flavoured Markdown, with links to the plots that :func:`write` puts beside it."""
    return document.to_markdown(document.drawn(_document(values, *summarise(values))))


def to_html(values: Mapping[str, Any]) -> str:
    """Render the report as one HTML page that needs nothing else, light or dark as the reader has it."""
    return document.to_html(document.drawn(_document(values, *summarise(values))))


def write(values: Mapping[str, Any], folder: str | Path) -> Path:
    """Write ``report.md``, ``report.html``, ``results.json`` and the plots as SVG; each replaces the one before whole.

    The results come first, so that they are there whatever becomes of the rest. A plot that cannot be drawn costs
    nothing but itself: a note stands in its place, and a warning says so.

    Args:
        values: Those of :func:`collect` or :func:`from_results`.
        folder: Where to; made if it is not there.

    Returns:
        The folder.

    Raises:
        OSError: A file could not be written; the error names it.
    """
    folder = Path(folder)
    make_folder(folder)
    rows, differences = summarise(values)
    results = to_json({key: values[key] for key in _KEYS} | {"summary": _summary(rows, differences)})
    write_text(folder / "results.json", results)
    blocks = document.drawn(_document(values, rows, differences))
    files = {"report.html": document.to_html(blocks), "report.md": document.to_markdown(blocks)}
    files |= {f"{block.name}.svg": block.svg[0] for block in blocks if isinstance(block, Picture)}
    for left in folder.glob("*.svg"):
        # A plot of an earlier report that this one does not have.
        if left.stem in ("average_accuracy", "after_tasks", "varied", "differences") and left.name not in files:
            left.unlink()
    for name, text in files.items():
        write_text(folder / name, text)
    return folder


def _summary(rows: Sequence[Row], differences: Sequence[Difference]) -> dict[str, Any]:
    return {
        "confidence": 0.95,
        "formulas": {name: metrics.FORMULAS[name] for name in METRIC_LABELS},
        "formula_terms": R_MEANING,
        "rows": [
            {
                "label": row.label,
                "seeds": [run["seed"] for run in row.runs],
                "metrics": {name: interval._asdict() for name, interval in row.metrics.items()},
                "mixed": row.mixed,
                "step_ms": row.step_ms,
                "step_ms_range": list(row.step_range),
                "shares": dict(row.shares),
                "peak_memory_bytes": row.peak_memory,
            }
            for row in rows
        ],
        "differences": [
            {
                "label": d.label,
                "seeds": list(d.seeds),
                "metrics": {name: interval._asdict() for name, interval in d.metrics.items()},
                "p": d.p,
                "p_holm": d.holm,
            }
            for d in differences
        ],
    }


# ---------------------------------------------------------------------------------------------------- the runs' numbers


def _values(row: Row, metric: str) -> list[float]:
    found = [number(run["metrics"][metric]) for run in row.runs]
    return [value for value in found if not math.isnan(value)]


def _share(part: float | None, whole: float | None) -> float:
    return number(part) / whole if whole else math.nan


def _median(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return statistics.median(known) if known else math.nan
