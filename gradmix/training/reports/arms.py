"""The figures of an experiment: its runs as the plain values of ``results.json``, and the rows over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradmix.training.config import to_dict
from gradmix.training.former_keys import current_keys
from gradmix.training.method_names import current_name
from gradmix.training.reports.rows import Difference, Row, compare, formulas, to_plain
from gradmix.training.runs.experiments import Experiment, Run, points_of, protocol
from gradmix.training.runs.metrics import accuracy_on_seen, mean_of_known, median_of_known
from gradmix.training.runs.results import (
    METRIC_LABELS,
    RunResult,
    Timing,
    load_run,
    metric_values,
    name_damage,
    number,
    read_timing,
)
from gradmix.training.runs.running import state_of
from gradmix.training.runs.settings import flatten

FORMAT = 1
"""Version of what ``results.json`` holds."""

KEYS = (
    "format", "name", "title", "about", "command", "seeds", "arms", "vary", "differences", "references", "protocol",
    "runs", "missing",
)  # fmt: skip
DIVERGED = "diverged"
"""Key of a missing run: whether it was made, and its loss became no finite number. Earlier files lack it."""


@dataclass(frozen=True)
class ArmRow(Row):
    """An arm at some varied values, with what its runs cost.

    Attributes:
        runs: The runs, as they stand in ``results.json``.
    """

    runs: tuple[Mapping[str, Any], ...] = ()

    @property
    def mixed_share(self) -> float:
        """Mean share of samples mixed, from 0 to 1; NaN where nothing is selected."""
        # In the first task there is nothing to select by, and every sample is mixed.
        shares = (run["mixed_share"] for run in self.runs)
        return mean_of_known([mean_of_known([number(v) for v in (share[1:] or share)]) for share in shares])

    @property
    def step_ms(self) -> float:
        """Median over the runs of the median milliseconds of a training step."""
        return median_of_known(self._steps())

    @property
    def step_range(self) -> tuple[float, float]:
        """The lowest and the highest of them."""
        steps = self._steps()
        return min(steps), max(steps)

    def _steps(self) -> list[float]:
        return [timing.step_ms for timing in self._timings()]

    def _timings(self) -> list[Timing]:
        return [read_timing(run["timing"]) for run in self.runs]

    @property
    def mean_step_ms(self) -> float:
        """Median over the runs of the mean milliseconds of a training step, what is done in some steps included."""
        return median_of_known(timing.mean_step_ms for timing in self._timings())

    @property
    def shares(self) -> dict[str, float]:
        """Medians of the shares of that time, from 0 to 1: of selection, of forward and backward passes, of data."""
        return {
            name: median_of_known(getattr(timing, f"{name}_share") for timing in self._timings())
            for name in ("selection", "forward_backward", "data")
        }

    @property
    def on_cpu(self) -> bool:
        """Whether all runs were made on a CPU."""
        return all(run["environment"].get("device", "cpu") == "cpu" for run in self.runs)

    @property
    def peak_memory(self) -> int:
        """Peak memory in bytes, 0 if unknown.

        On a GPU the highest of the runs. On a CPU, where a process's peak includes what it did before the run, the
        lowest: the closest bound there is.
        """
        found = [int(run["timing"]["peak_memory_bytes"] or 0) for run in self.runs]
        closest: Callable[[list[int]], int] = min if self.on_cpu else max
        return closest([size for size in found if size] or [0])


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
        place = {"arm": run.arm, "values": dict(run.values)}
        if state == "complete":
            found.append(place | _run_values(run, load_run(root / run.folder)))
        else:
            why = f"failed: {reasons[run.folder]}" if run.folder in reasons else words[state]
            missing.append(place | {"seed": run.seed, "why": why, DIVERGED: state == "diverged"})
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


def _run_values(run: Run, result: RunResult) -> dict[str, Any]:
    names = ("total", "step", "selection", "forward_backward", "data", "evaluation")
    timing = result.timing
    return {
        "method": result.method,
        "seed": result.seed,
        "metrics": metric_values(result),
        "seen_accuracy": accuracy_on_seen(result.accuracy).tolist(),
        "mixed_share": list(result.mixed_share),
        "timing": {
            "steps": timing.steps,
            **{f"seconds_{name}": getattr(timing, f"seconds_{name}") for name in names},
            "peak_memory_bytes": timing.peak_memory_bytes,
            "steady": asdict(timing.steady),
        },
        "environment": dict(result.environment),
        "folder": run.folder.as_posix(),
        "config": {key: value for key, value in flatten(to_dict(result.config)) if key != "data.data_dir"},
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
    with name_damage(path):
        values: Any = current_keys(json.loads(path.read_text(encoding="utf-8")), warn=False)
        absent = [key for key in KEYS if key not in values] if isinstance(values, dict) else list(KEYS)
        if absent:
            raise ValueError(f"{', '.join(absent)} missing")
    if values["format"] != FORMAT:
        raise ValueError(f"{path}: got format {values['format']}, expected {FORMAT}")
    # A run whose values were cut out would fail far from here.
    with name_damage(path):
        summary_of(*summarise(values))
    _use_current_names(values)
    return dict(values)


def summary_of(rows: Sequence[ArmRow], differences: Sequence[Difference]) -> dict[str, Any]:
    """Return the plain values of rows and differences, for who reads ``results.json`` without gradmix."""
    costs = [
        {
            "mixed": row.mixed_share,
            "step_ms": row.step_ms,
            "step_ms_range": list(row.step_range),
            "mean_step_ms": row.mean_step_ms,
            "shares": row.shares,
            "peak_memory_bytes": row.peak_memory,
        }
        for row in rows
    ]
    return {
        **formulas(),
        "rows": [to_plain(row) | cost for row, cost in zip(rows, costs, strict=True)],
        "differences": [to_plain(d) | {"p": d.p, "p_holm": d.holm} for d in differences],
    }


def _use_current_names(values: Mapping[str, Any]) -> None:
    """Put the current names of methods in the place of former ones, in arms and runs."""
    for entry in (*values["arms"], *values["runs"]):
        entry["method"] = current_name(entry["method"], warn=False)
    for run in values["runs"]:
        config = run.get("config")
        if config and "methods" in config:
            config["methods"] = [current_name(name, warn=False) for name in config["methods"]]


def summarise(values: Mapping[str, Any]) -> tuple[list[ArmRow], list[Difference]]:
    """Compute the rows and the paired differences over the complete runs of ``results.json``'s values."""
    members: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in values["runs"]:
        members.setdefault(place_of(run["arm"], run["values"]), []).append(run)
    rows = {}
    points = points_of(values["vary"])
    for arm, point in ((arm["name"], point) for arm in values["arms"] for point in points):
        runs = members.get(place_of(arm, point))
        if runs:
            by_seed = {run["seed"]: {name: _metric(run["metrics"], name) for name in METRIC_LABELS} for run in runs}
            rows[place_of(arm, point)] = ArmRow(arm, by_seed, point, tuple(runs))
    pairs = (
        (rows.get(place_of(first, point)), rows.get(place_of(second, point)))
        for first, second in values["differences"]
        for point in points
    )
    return [*rows.values()], compare((a, b) for a, b in pairs if a is not None and b is not None)


def _metric(values: Mapping[str, Any], name: str) -> float:
    """A run's metric; NaN in a file that is older than the metric. The first one every whole file has."""
    return number(values[name] if name == "average_accuracy" else values.get(name))


def place_of(arm: str, point: Mapping[str, Any]) -> tuple[str, str]:
    """Return a key for an arm at some varied values."""
    return arm, json.dumps(point, sort_keys=True)
