"""``gradmix experiment``: the missing runs of a specification, and the report on all."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, arg

from gradmix.cli.columns import label_width, wrap_label
from gradmix.cli.errors import UsageError
from gradmix.cli.flags import refuse_unknown_flags
from gradmix.cli.former_names import print_former_names
from gradmix.cli.import_paths import find_named, search_here
from gradmix.cli.launch import refuse_several
from gradmix.cli.progress import Interruption, Reporter, figures
from gradmix.runtime.allocator import keep_freed_memory
from gradmix.runtime.names import shell, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradmix.training.loop.run import Progress
    from gradmix.training.runs.experiments import Experiment, Run
    from gradmix.training.runs.results import RunResult

_MISSING = 1
_DEFAULT_OUTPUT = Path("runs") / "experiments"
_RUNS = "runs"
_OWN = "(default: the experiment's)"
_LOG_SECONDS = 600.0
"""Seconds between two lines in a log: a run of days shows early that it goes on, and fills no pages."""


@dataclass(frozen=True)
class _Flags:
    """Run what is missing of a table of methods and seeds; write its report."""

    experiment: Annotated[Positional[str | None], arg(metavar="NAME_OR_FILE", help_behavior_hint="")] = None
    """An experiment that comes with gradmix, a YAML file of one's own, or, with --report-only, a results.json."""
    output: Annotated[
        Path | None, arg(metavar="FOLDER", help_behavior_hint=f"(default: {_DEFAULT_OUTPUT.as_posix()})")
    ] = None
    """Folder for the report, in NAME/, and, in runs/, all runs; experiments that share it share their runs."""
    seeds: Annotated[tuple[int, ...], arg(metavar="INT [INT ...]", help_behavior_hint=_OWN)] = ()
    """Training seeds; the report on others than the experiment's lies in NAME/seeds-..."""
    arms: Annotated[tuple[str, ...], arg(metavar="ARM [ARM ...]", help_behavior_hint="(default: all)")] = ()
    """Names of the arms to be run; the report on some of them lies in NAME/arms-..."""
    jobs: int = 1
    """Runs at a time, each in a process of its own, of one thread unless the file has more."""
    data_dir: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint=_OWN)] = None
    """Where the data sets lie."""
    device: Annotated[str | None, arg(metavar="STR", help_behavior_hint=_OWN)] = None
    """auto, or a torch device."""
    report_only: bool = False
    """Run nothing; write the report on the runs that are there."""
    dry_run: bool = False
    """Run and write nothing; list the runs and what there is of them."""
    list: bool = False
    """List the experiments that come with gradmix."""


def main(args: list[str]) -> int:
    """Make the missing runs and write the report; some flags leave out one or both."""
    refuse_several("experiment", "--jobs runs several at a time")
    from gradmix.training.runs import experiments

    refuse_unknown_flags("experiment", args, [item.name.replace("_", "-") for item in fields(_Flags)[1:]])
    options = tyro.cli(_Flags, prog="gradmix experiment", args=args, config=(tyro.conf.DisallowNone,))
    if options.list:
        titles = experiments.builtin_titles()
        for name, title in titles.items():
            print(f"{name:<{max(map(len, titles))}}  {title}")
        return 0
    if options.experiment is None:
        raise UsageError("experiment: got no name, expected one of gradmix experiment --list, or a YAML file")
    if options.experiment.endswith(".json"):
        return _again(Path(options.experiment), options)
    # It may name modules in this folder, which are imported when it is read.
    search_here()
    with print_former_names():
        experiment = experiments.load(options.experiment).narrow(options.seeds or None, options.arms or None)
    if options.jobs < 1:
        raise UsageError(f"jobs: got {options.jobs}, expected at least 1")
    changes: dict[str, Any] = {}
    if options.data_dir is not None:
        changes["data_dir"] = options.data_dir
    if options.device is not None:
        changes["device"] = options.device
    if options.jobs > 1 and experiment.base.get("threads") is None:
        # One thread for each core in each of several processes would oversubscribe the machine.
        changes["threads"] = 1
    runs = experiment.runs(**changes)
    find_named("experiment on", runs[0].config.data.benchmark)
    output = _DEFAULT_OUTPUT if options.output is None else options.output
    if options.dry_run:
        return _plan(runs, output / _RUNS)
    command = _command(experiment, options)
    if options.report_only:
        return _report_only(experiment, runs, output, command)
    return _run(experiment, runs, output, command, _again_command(command, options), options.jobs)


def _run(experiment: Experiment, runs: Sequence[Run], output: Path, command: str, again: str, jobs: int) -> int:
    from gradmix.cli.train import refuse_in_use
    from gradmix.training.loop.environment import pick_device
    from gradmix.training.methods import find_method
    from gradmix.training.runs import running

    refuse_in_use(output, shared=True)
    keep_freed_memory()
    root = output / _RUNS
    todo = [run for run in runs if running.state_of(run, root) not in running.ENDED]
    print(f"{shown(experiment.title)}: {len(runs)} runs, {len(runs) - len(todo)} of them complete", flush=True)
    outcome = running.Outcome()
    with Interruption() as interruption:
        try:
            # What would fail every run is reported before the first one, without a report of failures.
            for device in dict.fromkeys(run.config.device for run in todo):
                pick_device(device)
            for method in dict.fromkeys(run.method for run in todo):
                find_method(method).check_installed()
            running.check_data(todo)
            with interruption.defer(), _lock_shared(output):
                with Reporter(len(todo), max(len(shown(run.label)) for run in runs)) as reporter:
                    outcome = running.run_all(
                        runs,
                        root,
                        jobs=jobs,
                        watcher=_watcher(reporter, todo, jobs),
                        stopping=lambda: interruption.signal is not None,
                    )
                _write(experiment, runs, output, command, outcome.failed)
        except KeyboardInterrupt:
            outcome.interrupted = True
    if outcome.interrupted:
        print(f"gradmix: interrupted; go on with: {again}", file=sys.stderr)
        return interruption.status
    status = 0
    if outcome.failed:
        status = _MISSING
        print(
            f"gradmix: {len(outcome.failed)} of {len(runs)} runs failed; try them again with: {again}", file=sys.stderr
        )
    diverged = [run for run in runs if running.state_of(run, root) == "diverged"]
    if diverged:
        status = _MISSING
        print(
            f"gradmix: {len(diverged)} of {len(runs)} runs diverged, their loss was not finite: lower optim.lr. They "
            f"are in no mean. To make one again as it is, remove its folder first, such as "
            f"{shell(str(root / diverged[0].folder))}",
            file=sys.stderr,
        )
    return status


@contextmanager
def _lock_shared(output: Path) -> Iterator[None]:
    """Lock a folder against ``gradmix train``, or refuse it; several experiments may share its runs."""
    from gradmix.cli.train import refuse_in_use
    from gradmix.runtime.locks import try_lock
    from gradmix.training.runs.results import LOCK
    from gradmix.training.runs.whole_files import make_folder

    make_folder(output)
    with try_lock(output / LOCK, shared=True) as mine:
        if not mine:
            refuse_in_use(output, shared=True)
        yield


def _watcher(reporter: Reporter, runs: Sequence[Run], jobs: int) -> Any:
    from gradmix.training.runs.running import Watcher

    todo = len(runs)

    class Shown(Watcher):
        """Shows each run's steps, or, of runs in other processes, their ends."""

        def __init__(self) -> None:
            self.done = 0
            self.left = Counter(run.label for run in runs)
            self.seconds: dict[str, list[float]] = defaultdict(list)
            self._count()

        def start(self, run: Run) -> None:
            reporter.start(run.label, run.seed)
            self.run, self.first_step = run, 0
            self.started = self.logged = time.monotonic()

        def step(self, progress: Progress) -> None:
            now = time.monotonic()
            self.first_step = self.first_step or progress.step
            if reporter.bar is not None:
                reporter.step(progress)
            elif now - self.logged >= _LOG_SECONDS:
                self.logged = now
                steps, left = progress.step - self.first_step, progress.steps_total - progress.step
                seconds = (now - self.started) / max(steps, 1) * left
                share = f"{100 * progress.step / progress.steps_total:.0f} %"
                position = f"task {progress.task} of {progress.tasks}, {share} done"
                reporter.say(self._name(self.run), f"{position}  ({_duration(seconds)} of this run to go)")

        def finish(self, run: Run, result: RunResult) -> None:
            self._end(run)
            self.seconds[run.label].append(result.timing.seconds_total)
            reporter.say(self._name(run), f"{figures(result)}{self._time_left()}")
            self._count()

        def fail(self, run: Run, reason: str) -> None:
            self._end(run)
            reporter.say(self._name(run), f"failed: {reason}")
            self._count()

        def wait(self, runs: int) -> None:
            reporter.say("waiting for runs that another command is at")

        def _end(self, run: Run) -> None:
            self.done += 1
            self.left[run.label] -= 1

        def _count(self) -> None:
            if jobs > 1:
                reporter.count(self.done, min(jobs, todo - self.done))

        def _name(self, run: Run) -> str:
            width = len(str(todo))
            return f"[{self.done:>{width}}/{todo}] {shown(run.label):<{reporter.width}}  seed {run.seed}"

        def _time_left(self) -> str:
            if self.done >= todo:
                return ""
            # An arm of which no run has ended takes as long as the mean of the others.
            means = {label: fmean(seconds) for label, seconds in self.seconds.items()}
            others = fmean(means.values())
            seconds = sum(count * means.get(label, others) for label, count in self.left.items())
            return f"  ({_duration(seconds / min(jobs, todo - self.done))} to go)"

    return Shown()


def _write(
    experiment: Experiment, runs: Sequence[Run], output: Path, command: str, failed: Sequence[tuple[Run, str]]
) -> dict[str, Any]:
    from gradmix.training.reports import arms, report

    values = arms.collect(experiment, runs, output / _RUNS, command=command, failed=failed)
    folder = report.write(values, output / experiment.folder)
    _say(values, folder)
    return values


def _say(values: dict[str, Any], folder: Path) -> None:
    from gradmix.training.reports import arms, report
    from gradmix.training.reports.cells import difference, interval, probability
    from gradmix.training.reports.significance import rule_of
    from gradmix.training.reports.tables import SHOWN

    rows, differences = arms.summarise(values)
    print()
    if rows:
        header = f"{'average accuracy':<18}{'final accuracy':<16}{'forgetting':<15}seeds"
        width = label_width([row.label for row in rows], len(header))
        print(f"{'':<{width}}  {header}")
        for row in rows:
            cells = [interval(row.metrics[name], "{mean:.3f} ± {half:.3f}") for name in SHOWN]
            line = f"{cells[0]:<18}{cells[1]:<16}{cells[2]:<15}{len(row.runs)}"
            print(wrap_label(row.label, width, line))
        print("mean ± half of its 95 % t-interval")
    for line in report.divergence_notes(values):
        print(shown(line))
    if differences:
        header = f"{'difference':<18}{'p, Holm':<10}seeds"
        heading = "average accuracy, paired"
        width = max(label_width([d.label for d in differences], len(header)), len(heading))
        print(f"\n{heading:<{width}}  {header}")
        for d in differences:
            apart = difference(d.metrics["average_accuracy"])
            print(wrap_label(d.label, width, f"{apart:<18}{probability(d.holm):<10}{len(d.seeds)}"))
        tests = sum(not math.isnan(d.p) for d in differences)
        print("* where the 95 % t-interval leaves out 0")
        if tests:
            print(f"significant: {rule_of(tests)}")
    lacking = sum(not run.get(arms.DIVERGED) for run in values["missing"])
    if lacking:
        print(f"{lacking} of {len(values['missing']) + len(values['runs'])} runs are missing")
    print(f"Report: {shown(str(folder / 'report.html'))}")


def _report_only(experiment: Experiment, runs: Sequence[Run], output: Path, command: str) -> int:
    from gradmix.training.reports import arms, report
    from gradmix.training.runs import running

    saved = output / experiment.folder / "results.json"
    if saved.is_file() and all(running.state_of(run, output / _RUNS) == "absent" for run in runs):
        # The runs are gone, but their figures are in this file.
        values = arms.from_results(saved)
        _say(values, report.write(values, saved.parent))
    else:
        values = _write(experiment, runs, output, command, ())
    return _MISSING if values["missing"] else 0


def _again(file: Path, options: _Flags) -> int:
    """Write the report on a ``results.json``, beside it or in the folder given."""
    from gradmix.training.reports import arms, report

    if options.seeds or options.arms or options.dry_run:
        raise UsageError("got --seeds, --arms or --dry-run with a results.json, expected --report-only and --output")
    if not options.report_only:
        raise UsageError(f"got {file}, from which nothing can be run, expected --report-only with it")
    values = arms.from_results(file)
    _say(values, report.write(values, file.parent if options.output is None else options.output))
    return 0


def _plan(runs: Sequence[Run], root: Path) -> int:
    from gradmix.training.runs.running import state_of

    states = [state_of(run, root) for run in runs]
    width = max(len(shown(run.label)) for run in runs)
    for run, state in zip(runs, states, strict=True):
        print(f"{shown(run.label):<{width}}  seed {run.seed:<4}{state:<12}{run.folder.as_posix()}")
    counts = {state: states.count(state) for state in ("complete", "diverged", "unfinished", "absent")}
    told = [f"{count} {state}" for state, count in counts.items() if count or state != "diverged"]
    print(f"{len(runs)} runs: {', '.join(told)}")
    return 0


def _command(experiment: Experiment, options: _Flags) -> str:
    """Return the command that makes the same report, without data folder and device."""
    words = ["gradmix", "experiment", experiment.source]
    if options.seeds:
        words += ["--seeds", *map(str, options.seeds)]
    if options.arms:
        words += ["--arms", *options.arms]
    return " ".join(map(shell, words))


def _again_command(command: str, options: _Flags) -> str:
    """Return the command that continues the runs, with data folder, device and number of processes."""
    words = [command]
    for name in ("output", "data_dir", "device"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", shell(str(value))]
    return " ".join([*words, f"--jobs {options.jobs}"] if options.jobs > 1 else words)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
