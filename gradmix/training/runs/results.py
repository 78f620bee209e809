"""The result of a run: in memory, and in the folder it is kept in."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from gradmix.runtime import names
from gradmix.runtime.validation import check_choice
from gradmix.training.config import TrainConfig, load_config, to_yaml
from gradmix.training.method_names import COMPOSITIONS, current_name
from gradmix.training.runs import metrics
from gradmix.training.runs.whole_files import replace_folder, write_text

Status = Literal["complete", "interrupted", "diverged"]


@dataclass(frozen=True)
class SteadySteps:
    """The training steps without those of the warm-up: the first one of a process, and the first one that selects."""

    steps: int = 0
    """How many they are; 0 also where single steps were not timed, as up to version 0.2."""
    median: float = math.nan
    """Median of their times in seconds, right to 0.6 %."""
    seconds_step: float = 0.0
    """All of them together."""
    seconds_selection: float = 0.0
    """The part spent on choosing pairs."""
    seconds_data: float = 0.0
    """The part spent on drawing and augmenting their samples."""


@dataclass(frozen=True)
class Timing:
    """The time of a run by its parts, in seconds of wall clock."""

    steps: int
    """Optimiser steps taken."""
    seconds_total: float
    """The whole run, evaluation included."""
    seconds_step: float
    """All training steps together, selection included."""
    seconds_selection: float
    """The part of the steps spent on choosing pairs, refreshes of the reference gradient included."""
    seconds_evaluation: float
    """Scoring the test samples after each task."""
    seconds_data: float = math.nan
    """The part of the steps spent on drawing and augmenting their samples; NaN if it was not measured."""
    peak_memory_bytes: int = 0
    """On a GPU the most that tensors took up, elsewhere the process's peak resident size; 0 where unknown."""
    steady: SteadySteps = SteadySteps()
    """The steps after the warm-up, of which the figures below are where there are any; of all steps otherwise."""

    @property
    def step_ms(self) -> float:
        """Median milliseconds of a training step; the mean where single steps were not timed; NaN without a step."""
        return 1000.0 * self.steady.median if self.steady.steps else self.mean_step_ms

    @property
    def mean_step_ms(self) -> float:
        """Mean milliseconds of a training step, which counts what is done in some steps only; NaN without a step."""
        basis = self._basis
        return 1000.0 * basis.seconds_step / basis.steps if basis.steps else math.nan

    @property
    def seconds_forward_backward(self) -> float:
        """The rest of the steps: forward and backward passes of the loss, and the optimiser."""
        return self.seconds_step - self.seconds_selection - self.seconds_data

    @property
    def selection_share(self) -> float:
        """Share of the training steps' time spent on selection, from 0 to 1; NaN if no step was taken."""
        return self._share(self._basis.seconds_selection)

    @property
    def data_share(self) -> float:
        """Share of the training steps' time spent on their samples, waiting for them included, from 0 to 1.

        On a GPU it is the device's time: samples that are read while it computes take none of it.
        """
        return self._share(self._basis.seconds_data)

    @property
    def forward_backward_share(self) -> float:
        """Share of the training steps' time spent on the rest: forward and backward passes, and the optimiser."""
        return 1.0 - self.selection_share - self.data_share

    @property
    def _basis(self) -> SteadySteps | Timing:
        """The steps that figures are of: those after the warm-up, unless it was all that there was of selection."""
        steady = self.steady
        return self if not steady.steps or steady.seconds_selection == 0 < self.seconds_selection else steady

    def _share(self, part: float) -> float:
        whole = self._basis.seconds_step
        return part / whole if whole > 0 else math.nan


@dataclass(frozen=True)
class AlignmentRecord:
    """The class-pair alignment at the last refresh of one task.

    Attributes:
        task: The task being learnt, counted from 0.
        classes: ``(P,)`` int64, the classes of the rows and columns.
        cosine: ``(P, P)`` float64, cosine of a mixed pair's gradient with the reference gradient; NaN where a pair had
            no samples.
        helpful: ``(P, P)`` bool, whether the pair may be mixed.
        threshold: The cosine from which a pair is helpful.
    """

    task: int
    classes: npt.NDArray[np.int64]
    cosine: npt.NDArray[np.float64]
    helpful: npt.NDArray[np.bool_]
    threshold: float = 0.0

    def __post_init__(self) -> None:
        for name, dtype in (("classes", np.int64), ("cosine", np.float64), ("helpful", np.bool_)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        if self.classes.ndim != 1:
            raise ValueError(f"classes: expected shape (P,), got {self.classes.shape}")
        square = (self.classes.size, self.classes.size)
        for name, shape in (("cosine", self.cosine.shape), ("helpful", self.helpful.shape)):
            if shape != square:
                raise ValueError(f"{name}: expected shape {square} for {self.classes.size} classes, got {shape}")


@dataclass(frozen=True)
class RunResult:
    """One method trained with one seed.

    Attributes:
        benchmark: Name of the benchmark, e.g. ``split-digits``.
        method: Name of the method, e.g. ``gradmix-class``.
        seed: Training seed.
        status: ``complete``; ``interrupted`` if training was stopped before its end; ``diverged`` if it ended because
            the loss was not finite. Only complete runs are to be compared.
        class_names: Names of all classes, indexed by label.
        task_classes: The labels each task brings, in order of arrival; its length is T.
        accuracy: ``(T, T)`` float64, ``accuracy[i, j]`` is the share of task j's test samples classified correctly
            after training task i, in [0, 1]; NaN where training did not get there.
        timing: Where the time went.
        config: The configuration with nothing left to a default, narrowed to this method and seed.
        mixed_share: ``(T,)`` share of each task's samples that found a helpful partner; NaN where nothing is selected.
        alignments: The class-pair alignment at the last refresh of each task that had one.
        environment: Versions, device, threads and date, as plain values.
        folder: The folder from which it was read; None: it was not read from one.
    """

    benchmark: str
    method: str
    seed: int
    status: Status
    class_names: tuple[str, ...]
    task_classes: tuple[tuple[int, ...], ...]
    accuracy: npt.NDArray[np.float64]
    timing: Timing
    config: TrainConfig
    mixed_share: tuple[float, ...] = ()
    alignments: tuple[AlignmentRecord, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def __post_init__(self) -> None:
        check_choice("status", self.status, get_args(Status))
        accuracy = np.array(self.accuracy, dtype=np.float64)
        tasks = len(self.task_classes)
        if accuracy.shape != (tasks, tasks):
            raise ValueError(f"accuracy: expected shape {(tasks, tasks)} for {tasks} tasks, got {accuracy.shape}")
        if self.mixed_share and len(self.mixed_share) != tasks:
            raise ValueError(f"mixed_share: expected one value for each of {tasks} tasks, got {len(self.mixed_share)}")
        object.__setattr__(self, "accuracy", accuracy)

    @property
    def tasks(self) -> int:
        """Number of tasks T of the benchmark."""
        return len(self.task_classes)


METRIC_LABELS: dict[str, str] = {name: name.replace("_", " ") for name in metrics.FORMULAS}
"""Names of the metrics in tables and plots, in the order in which they are reported."""

R_MEANING = "R[i,j] = accuracy on task j after training task i, of tasks 1 to T"
"""What R means in :data:`gradmix.training.runs.metrics.FORMULAS`."""

LOCK = ".lock"
"""The file in a folder of runs that says that a command is at work in it (:mod:`gradmix.runtime.locks`)."""

_FILES = ("config.yaml", "metrics.json", "accuracy_matrix.csv")


def metric_values(result: RunResult) -> dict[str, float]:
    """Compute all of :data:`METRIC_LABELS`; of a run that is not complete, over the tasks reached."""
    chance = 1.0 / max(1, sum(len(classes) for classes in result.task_classes))
    return metrics.summary(result.accuracy, chance)


def task_names(result: RunResult) -> tuple[str, ...]:
    """Name the tasks by number and classes, e.g. ``task 1 (cat, dog)``; of many classes, only the first and last."""
    names = []
    for number, classes in enumerate(result.task_classes, start=1):
        members = [result.class_names[c] for c in classes]
        listed = ", ".join(members) if len(members) <= 4 else f"{members[0]} … {members[-1]}"
        names.append(f"task {number} ({listed})")
    return tuple(names)


def tasks_reached(result: RunResult) -> int:
    """Count the tasks after which the model was scored on all tasks seen."""
    reached = [bool(np.isfinite(result.accuracy[t, : t + 1]).all()) for t in range(result.tasks)]
    return reached.index(False) if False in reached else result.tasks


def refuse_occupied(folder: str | Path) -> Path:
    """Return ``folder`` as a path; raise a ValueError if it is a file, or a folder that is not empty."""
    folder = Path(folder)
    if folder.is_dir():
        # A process that was killed while it wrote the configuration leaves its draft and its lock, and nothing else.
        if any(path.name not in (".config.yaml", LOCK) for path in folder.iterdir()):
            raise ValueError(f"output: {folder} exists and is not empty, expected a new or an empty folder")
    elif folder.exists() or folder.is_symlink():
        raise ValueError(f"output: {folder} is not a folder, expected a new or an empty folder")
    return folder


def write_run(result: RunResult, folder: str | Path) -> Path:
    """Write the files of one run's folder, whole or not at all; when this returns they are on the disk.

    They are ``config.yaml`` (``gradmix train --config`` runs it again), ``metrics.json`` and ``accuracy_matrix.csv``.
    The folder, which is returned, is a new or an empty one; its parents are made.

    Raises:
        ValueError: The folder is taken.
        OSError: It could not be written; the error names it, and nothing is left of the attempt.
    """
    folder = refuse_occupied(folder)
    with replace_folder(folder) as staging:
        (staging / "config.yaml").write_text(_config_text(result.config), encoding="utf-8")
        (staging / "metrics.json").write_text(to_json(_to_dict(result)), encoding="utf-8")
        (staging / "accuracy_matrix.csv").write_text(_accuracy_csv(result), encoding="utf-8")
    return folder


def load_run(folder: str | Path) -> RunResult:
    """Read a folder that :func:`write_run` wrote.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A file is damaged; the message names it.
    """
    folder = Path(folder)
    for name in _FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no run folder: {name} is missing")
    config = load_config(folder / "config.yaml", saved=True)
    path = folder / "metrics.json"
    with name_damage(path):
        return replace(_from_dict(json.loads(path.read_text(encoding="utf-8")), config), folder=folder)


@contextmanager
def name_damage(path: Path) -> Iterator[None]:
    """Raise a ValueError that names the file where a block that reads its values finds them damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: damaged, or not written by gradmix: {reason}") from error


def status_of(folder: str | Path) -> str:
    """The status of a saved run, of which nothing else is read; errors name ``metrics.json``."""
    path = Path(folder) / "metrics.json"
    with name_damage(path):
        return _text(json.loads(path.read_text(encoding="utf-8")), "status")


class NoRunError(FileNotFoundError):
    """A folder is there, and no finished run in it."""


def load_runs(folder: str | Path) -> dict[Path, RunResult]:
    """Read a run folder, or all run folders below a folder, in the order in which they were run.

    Raises:
        NoRunError: There is no run in the folder, or it is a file.
        FileNotFoundError: There is no such folder.
        ValueError: A run is damaged.
    """
    folder = Path(folder)
    if folder.is_file():
        raise NoRunError(f"{folder}: is a file, expected a run folder")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    found = [folder] if (folder / "metrics.json").is_file() else [p.parent for p in folder.rglob("metrics.json")]
    # Folders that begin with a dot are runs being written.
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not found:
        begun = f"; to go on with its runs: gradmix train --resume {names.shell(str(folder))}"
        raise NoRunError(
            f"{folder}: no finished run in it, expected {', '.join(_FILES)} there or in folders below"
            f"{begun if (folder / 'config.yaml').is_file() else ''}"
        )
    runs = {p: load_run(p) for p in sorted(found)}
    methods = list(COMPOSITIONS)
    return dict(sorted(runs.items(), key=lambda item: (methods.index(item[1].method), item[1].seed)))


def save_config(config: TrainConfig, folder: str | Path) -> None:
    """Write the ``config.yaml`` of several runs into their common folder."""
    write_text(Path(folder) / "config.yaml", _config_text(config))


def to_json(value: Any) -> str:
    """Render plain values as strict JSON: numbers that are not finite become null, flat lists take one line."""
    return _json(value, "") + "\n"


def number(value: float | None) -> float:
    """A number as :func:`to_json` writes it: null, which is None here, stands for one that is not known."""
    return math.nan if value is None else float(value)


def _json(value: Any, indent: str) -> str:
    deeper = indent + "  "
    if isinstance(value, Mapping):
        if not value:
            return "{}"
        items = (f"{deeper}{_string(str(k))}: {_json(v, deeper)}" for k, v in value.items())
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        if any(isinstance(v, (list, tuple, Mapping, np.ndarray)) for v in value):
            return "[\n" + ",\n".join(deeper + _json(v, deeper) for v in value) + f"\n{indent}]"
        return "[" + ", ".join(_json(v, deeper) for v in value) + "]"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    return _string(value) if isinstance(value, str) else json.dumps(value, allow_nan=False)


def _string(text: str) -> str:
    # Lone surrogates, of names of files that are no UTF-8, have an escape in JSON and none in UTF-8.
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def _to_dict(result: RunResult) -> dict[str, Any]:
    values = metric_values(result)
    timing = result.timing
    derived = ("seconds_forward_backward", "step_ms", "mean_step_ms", "selection_share", "data_share")
    return {
        "benchmark": result.benchmark,
        "method": result.method,
        "seed": result.seed,
        "status": result.status,
        "tasks_reached": tasks_reached(result),
        "metrics": {
            name: {"name": label, "formula": metrics.FORMULAS[name], "value": values[name]}
            for name, label in METRIC_LABELS.items()
        },
        "formula_terms": R_MEANING,
        "timing": asdict(timing) | {name: getattr(timing, name) for name in derived},
        "mixed_share": list(result.mixed_share),
        "class_names": list(result.class_names),
        "task_classes": [list(classes) for classes in result.task_classes],
        "accuracy": result.accuracy,
        "alignments": [vars(record) for record in result.alignments],
        "environment": dict(result.environment),
    }


def _from_dict(values: Mapping[str, Any], config: TrainConfig) -> RunResult:
    return RunResult(
        benchmark=_text(values, "benchmark"),
        method=current_name(_text(values, "method"), warn=False),
        seed=int(values["seed"]),
        status=values["status"],
        class_names=tuple(str(n) for n in values["class_names"]),
        task_classes=tuple(tuple(int(c) for c in classes) for classes in values["task_classes"]),
        accuracy=values["accuracy"],
        timing=read_timing(values["timing"]),
        config=config,
        mixed_share=tuple(number(v) for v in values["mixed_share"]),
        alignments=tuple(AlignmentRecord(**record) for record in values["alignments"]),
        environment=dict(values["environment"]),
    )


def read_timing(values: Mapping[str, Any]) -> Timing:
    """The timing that ``metrics.json`` and ``results.json`` hold, of earlier versions too."""
    steady = dict(values.get("steady") or {})
    steps = int(steady.pop("steps", 0))
    names = ("seconds_total", "seconds_step", "seconds_selection", "seconds_evaluation")
    return Timing(
        steps=int(values["steps"]),
        **{name: number(values[name]) for name in names},
        seconds_data=number(values.get("seconds_data")),
        peak_memory_bytes=int(values.get("peak_memory_bytes") or 0),
        steady=SteadySteps(steps, **{name: number(value) for name, value in steady.items()}),
    )


def _text(values: Mapping[str, Any], key: str) -> str:
    if not isinstance(values[key], str):
        raise ValueError(f"{key}: got {values[key]!r}, expected a string")
    return str(values[key])


def _accuracy_csv(result: RunResult) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    # No cell begins with a name of others, which a spreadsheet might take for a formula.
    tasks = [names.shown(name) for name in task_names(result)]
    writer.writerow(["accuracy after", *(f"on {name}" for name in tasks)])
    for name, row in zip(tasks, result.accuracy.tolist(), strict=True):
        writer.writerow([name, *("" if math.isnan(v) else repr(v) for v in row)])
    return text.getvalue()


def _config_text(config: TrainConfig) -> str:
    # A second run must not aim at the folder of the first, and must find the data from any folder.
    data = config.data
    if data.data_dir.exists():
        data = replace(data, data_dir=data.data_dir.absolute())
    return "# Run again with: gradmix train --config FILE\n" + to_yaml(replace(config, data=data, output=None))
