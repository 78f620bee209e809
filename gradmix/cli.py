"""The command line: ``gradmix train``, ``gradmix compare`` and ``gradmix doctor``.

The flags of ``train`` are made from the fields of :class:`~gradmix.training.config.TrainConfig`. Only torch and numpy
are needed for ``doctor`` and ``--version``; the rest is imported when a command needs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from gradmix._version import __version__

if TYPE_CHECKING:
    from gradmix.training.config import TrainConfig
    from gradmix.training.results import RunResult
    from gradmix.training.trainer import Progress

_USAGE = """\
usage: gradmix [-h] [--version] COMMAND ...

Gradient-based selective Mixup for class-incremental learning.

commands:
  train    train methods on a benchmark, and compare them over seeds
  compare  tabulate and plot runs that were saved before
  doctor   show versions, devices and backends, and why something is missing

options:
  -h, --help  show this help message and exit
  --version   show the version and exit

'gradmix COMMAND --help' shows what a command takes. With GRADMIX_DEBUG=1 in the
environment, errors come with their traceback.
"""

# The parser wraps no paragraph, so each is short enough by itself.
_TRAIN_DESCRIPTION = """\
Train methods class-incrementally, over several seeds, and compare them.

With nothing given, er, mixup and gradmix learn scikit-learn's digits."""

# Module, and the name of its distribution.
_TRAIN_NEEDS = {"tyro": "tyro", "rich": "rich", "yaml": "pyyaml", "matplotlib": "matplotlib", "scipy": "scipy"}
_COMPARE_NEEDS = {name: _TRAIN_NEEDS[name] for name in ("tyro", "yaml", "matplotlib", "scipy")}

_ERROR, _INTERRUPTED = 2, 130


class _UsageError(Exception):
    """An error of the command line itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments after the program's name; None: those of the process.

    Returns:
        Exit status: 0; 2 after an error that the user can mend; 130 after Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a sign gets a question mark in its place, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return _dispatch(args)
    except SystemExit as stop:
        # The parsers end so after --help (0) and after bad flags (2).
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else _ERROR
    except KeyboardInterrupt:
        print("gradmix: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe, such as head, has gone; nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (ValueError, OSError, ModuleNotFoundError, _UsageError) as error:
        if os.environ.get("GRADMIX_DEBUG", "0") not in ("", "0"):
            raise
        print(f"gradmix: error: {' '.join(_message(error).split())}", file=sys.stderr)
        return _ERROR


def _dispatch(args: list[str]) -> int:
    if not args:
        print(_USAGE, end="", file=sys.stderr)
        return _ERROR
    command, rest = args[0], args[1:]
    if command in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if command == "--version":
        print(f"gradmix {__version__}")
        return 0
    commands = {"train": _train, "compare": _compare, "doctor": _doctor}
    if command not in commands:
        raise _UsageError(f"got command {command!r}, expected one of {', '.join(commands)} (see gradmix --help)")
    return commands[command](rest)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _require(command: str, modules: dict[str, str]) -> None:
    missing = [name for module, name in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise _UsageError(f'gradmix {command} needs {", ".join(missing)}: pip install "gradmix[train]"')


# ------------------------------------------------------------------------------------------------------------- doctor


def _doctor(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gradmix doctor",
        description="Show versions, devices and backends, and why something is missing.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(args)
    from gradmix import doctor

    report = doctor.report()
    print(json.dumps(report, indent=2) if options.json else doctor.format_report(report).rstrip("\n"))
    return 0


# -------------------------------------------------------------------------------------------------------------- train


def _train(args: list[str]) -> int:
    _require("train", _TRAIN_NEEDS)
    config = _parse_train(args)
    if config.data.benchmark == "split-digits":
        _require("train --benchmark split-digits", {"sklearn": "scikit-learn"})

    from gradmix.training.benchmarks import make_stream, resolve
    from gradmix.training.config import check
    from gradmix.training.results import refuse_occupied, save_config

    check(config)
    config = resolve(config)
    output = refuse_occupied(config.output or _default_output(config.data.benchmark))
    data = config.data
    stream = make_stream(
        data.benchmark, data.data_dir, class_order_seed=data.class_order_seed, validation=data.validation
    )
    output.mkdir(parents=True, exist_ok=True)
    save_config(config, output)
    results: list[RunResult] = []
    interrupted = False
    try:
        try:
            interrupted = _run_all(config, stream, output, results)
        finally:
            # Also after a failure: what was reached is summarised.
            if results:
                with _undisturbed():
                    _report(results, output)
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        kept = f"the results so far are in {output}" if results else "no run was saved"
        print(f"gradmix: interrupted; {kept}", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _run_all(config: TrainConfig, stream: Any, output: Path, results: list[RunResult]) -> bool:
    """Trains, saves and appends to ``results`` run by run; returns whether it was interrupted."""
    from gradmix.training import trainer
    from gradmix.training.results import save_run

    width = max(map(len, config.methods))
    runs = [(method, seed) for method in config.methods for seed in config.seeds]
    with _Reporter(len(runs), width) as reporter:
        for method, seed in runs:
            reporter.start(method, seed)
            result = trainer.train_one(config, method, seed, stream=stream, on_step=reporter.step)
            with _undisturbed():
                save_run(result, output / method / f"seed-{seed}")
                results.append(result)
            reporter.finish(result)
            if result.status == "interrupted":
                return True
    return False


def _report(results: list[RunResult], output: Path) -> None:
    from gradmix.training import tables
    from gradmix.training.results import save_summary

    save_summary(results, output)
    print()
    print(tables.to_text(tables.summarise(results)))
    print(f"Run folder: {output}")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done, so that a result is not lost while it is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived:
        raise KeyboardInterrupt


def _default_output(benchmark: str) -> Path:
    stem = f"{benchmark}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = Path("runs") / stem, 2
    while path.exists():
        path, number = Path("runs") / f"{stem}-{number}", number + 1
    return path


class _Reporter:
    """Shows how far training is: a bar on a terminal, a line for each task elsewhere."""

    def __init__(self, runs: int, width: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.runs, self.width = runs, width
        self.run = 0
        self.name = ""
        self.task = 0
        self.shown = 0.0
        self.loss: float | None = None
        # Highlighting would colour the figures in lines that are the same elsewhere.
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
                # Drawing takes time from training, and is timed with it.
                refresh_per_second=4,
                expand=False,
            )
            self.row = self.bar.add_task("", total=None)

    def __enter__(self) -> _Reporter:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, method: str, seed: int) -> None:
        """Begins a run."""
        self.run += 1
        self.task, self.shown, self.loss = 0, 0.0, None
        self.name = f"{method:<{self.width}}  seed {seed}"
        if self.bar is not None:
            self.bar.reset(
                self.row, total=None, description=f"[{self.run}/{self.runs}] {self.name}".replace("[", r"\[")
            )

    def step(self, progress: Progress) -> None:
        """Takes note of a training step."""
        self.loss = self.loss if progress.loss is None else progress.loss
        if self.bar is None:
            if progress.task != self.task:
                self.task = progress.task
                print(f"{self.name}  task {progress.task} of {progress.tasks}", flush=True)
            return
        now = time.monotonic()
        if now - self.shown < 0.1 and progress.step < progress.steps_total:
            return
        self.shown = now
        text = f"[{self.run}/{self.runs}] {self.name}  task {progress.task}/{progress.tasks}"
        if self.loss is not None:
            text += f"  loss {self.loss:.3f}"
        self.bar.update(
            self.row, completed=progress.step, total=progress.steps_total, description=text.replace("[", r"\[")
        )

    def finish(self, result: RunResult) -> None:
        """Shows a finished run's figures in a line that stays."""
        from gradmix.training.results import metric_values, tasks_reached

        values = metric_values(result)
        if result.status == "interrupted":
            line = f"{self.name}  interrupted after {tasks_reached(result)} of {result.tasks} tasks"
        else:
            line = (
                f"{self.name}  average accuracy {values['average_accuracy']:.3f}"
                f"  final {values['final_accuracy']:.3f}  {result.timing.seconds_total:.1f} s"
            )
        if self.bar is None:
            print(line, flush=True)
        else:
            self.console.print(line, markup=False)


# ------------------------------------------------------------------------------------------------- flags of the config


def _parse_train(args: list[str]) -> TrainConfig:
    import tyro

    from gradmix.training.config import TrainConfig, load_config

    file = _config_file(args)
    base = TrainConfig() if file is None else load_config(file)
    parsed: Any = tyro.cli(
        _flags_of(base),
        prog="gradmix train",
        description=_TRAIN_DESCRIPTION,
        args=args,
        config=(tyro.conf.DisallowNone,),
    )
    return _from_flags(base, parsed)


def _config_file(args: list[str]) -> str | None:
    """Finds ``--config`` before the other flags are read, since it changes their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="gradmix train")
    parser.add_argument("--config", metavar="FILE")
    found = parser.parse_known_args(args)[0].config
    return None if found is None else str(found)


def _flags_of(base: TrainConfig) -> type:
    """Makes the dataclass from which tyro makes the flags, with the values of ``base`` as defaults.

    Names get a prefix where a bare one would say too little: ``replay.batch`` is ``--replay-batch``.
    """
    import tyro

    config_type = Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FILE",
            help="Configuration to start from, such as the config.yaml of a run folder; flags given too override it.",
            help_behavior_hint="(default: none)",
        ),
    ]
    members: list[Any] = [("config", config_type, field(default=None))]
    prefixes = {"data": "", "optim": "", "replay": "replay-", "mix": "mix-"}
    for item in fields(base):
        section = getattr(base, item.name)
        if is_dataclass(section):
            cls = _section(type(section), section, prefixes[item.name])
            members.append((item.name, cls, field(default_factory=cls)))
    top = _section(type(base), base, "", nested=False)
    members[1:1] = [(f.name, get_type_hints(top, include_extras=True)[f.name], f) for f in fields(top)]
    return make_dataclass("Train", [(name, kind, _fresh(default)) for name, kind, default in members], frozen=True)


def _section(cls: type, values: Any, prefix: str, nested: bool = True) -> type:
    """Makes a dataclass with the fields of a section of the configuration, each with its flag and its help."""
    import tyro

    from gradmix.training.config import field_docs

    docs, hints = field_docs(cls), get_type_hints(cls)
    members: list[Any] = []
    for item in fields(cls):
        value = getattr(values, item.name)
        if is_dataclass(value):
            continue
        text, unset = _split_help(docs.get(item.name, ""))
        hint = f"(default: {unset or 'the benchmark' + chr(39) + 's'})" if value is None else None
        metavar = {Path: "FOLDER"}.get(_bare(hints[item.name]))
        flag = tyro.conf.arg(
            name=(prefix + item.name).replace("_", "-"),
            prefix_name=False,
            help=text,
            help_behavior_hint=hint,
            metavar=metavar,
        )
        members.append((item.name, Annotated[hints[item.name], flag], field(default=value)))
    made = make_dataclass(cls.__name__.removesuffix("Config"), members, frozen=True)
    made.__doc__ = cls.__doc__ if nested else ""
    return made


def _from_flags(base: TrainConfig, parsed: Any) -> TrainConfig:
    changes: dict[str, Any] = {}
    for item in fields(base):
        section, given = getattr(base, item.name), getattr(parsed, item.name)
        if is_dataclass(section) and not isinstance(section, type):
            given = replace(section, **{f.name: getattr(given, f.name) for f in fields(section)})
        changes[item.name] = given
    return replace(base, **changes)


def _split_help(doc: str) -> tuple[str, str | None]:
    """Takes ``None: what it means`` out of a field's docstring: the help shows it as the default."""
    found = re.search(r"[;.] None: ([^.]+)\.?", doc)
    if found is None:
        return doc, None
    rest = doc[found.end() :].strip()
    return f"{doc[: found.start()]}. {rest}".strip(), found[1]


def _bare(hint: Any) -> Any:
    return next((a for a in getattr(hint, "__args__", ()) if a is Path), hint)


def _fresh(default: Any) -> Any:
    # A field belongs to one class only.
    if default.default_factory is not MISSING:
        return field(default_factory=default.default_factory)
    return field(default=default.default)


# ------------------------------------------------------------------------------------------------------------ compare


def _compare(args: list[str]) -> int:
    _require("compare", _COMPARE_NEEDS)
    import tyro

    from gradmix.training import tables
    from gradmix.training.results import load_runs, refuse_occupied, save_summary, to_json

    flags = make_dataclass(
        "Compare",
        [
            (
                "runs",
                Annotated[
                    tuple[Path, ...],
                    tyro.conf.Positional,
                    tyro.conf.arg(
                        metavar="RUN [RUN ...]",
                        help="Run folders, or folders with run folders in them.",
                        help_behavior_hint="",
                    ),
                ],
            ),
            (
                "output",
                Annotated[
                    Path | None,
                    tyro.conf.arg(
                        metavar="FOLDER",
                        help="New folder for summary.json, summary.md and compare.png.",
                        help_behavior_hint="(default: none is written)",
                    ),
                ],
                field(default=None),
            ),
            (
                "format",
                Annotated[Literal["text", "markdown", "json"], tyro.conf.arg(help="How the tables are printed.")],
                field(default="text"),
            ),
        ],
        frozen=True,
    )
    flags.__doc__ = "Tabulate and plot runs that were saved before."
    options: Any = tyro.cli(flags, prog="gradmix compare", args=args, config=(tyro.conf.DisallowNone,))
    if not options.runs:
        raise _UsageError("compare: got no run folder, expected at least one")
    if options.output is not None:
        refuse_occupied(options.output)
    found: dict[Path, RunResult] = {}
    for folder in options.runs:
        # A run named twice, or named besides its parent, counts once.
        found.update({path.resolve(): result for path, result in load_runs(folder).items()})
    results = list(found.values())
    summary = tables.summarise(results)
    if options.output is not None:
        save_summary(results, options.output)
    renderings = {
        "text": lambda: tables.to_text(summary),
        "markdown": lambda: tables.to_markdown(summary),
        "json": lambda: to_json(tables.to_json_dict(summary)),
    }
    print(renderings[options.format](), end="")
    if options.output is not None:
        print(f"\nSaved in {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
