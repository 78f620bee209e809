"""``gradmix train``: methods over seeds into a run folder, from the start or resumed."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmix.cli.columns import text_width
from gradmix.cli.errors import LostProcessError, UsageError
from gradmix.cli.flags import parse_train
from gradmix.cli.former_names import print_former_names
from gradmix.cli.import_paths import find_named
from gradmix.cli.launch import Processes, explain_lost_process, finish, join_processes
from gradmix.cli.progress import Interruption, Reporter
from gradmix.runtime.allocator import keep_freed_memory
from gradmix.runtime.names import shell, shown
from gradmix.training.method_names import stable_name

if TYPE_CHECKING:
    from gradmix.training.config import TrainConfig
    from gradmix.training.runs.results import RunResult

_CHECKPOINTS = ".checkpoints"
_CONFIG, _METRICS = "config.yaml", "metrics.json"
_DIVERGED = 1


def main(args: list[str]) -> int:
    """Train, and save every run and the table over all; with several processes, together with the others."""
    keep_freed_memory()
    with (
        join_processes() as processes,
        explain_lost_process(lambda: f"{processes.command()} train {' '.join(map(shell, args))}"),
    ):
        # The folder's lock is released before the processes end together.
        with ExitStack() as held:
            status = _train(args, processes, held)
        return finish(processes, status)


def _train(args: list[str], processes: Processes, held: ExitStack) -> int:
    results: dict[tuple[str, int], RunResult] = {}
    config, todo, resumed = processes.by_the_first(lambda: _plan(args, processes, results, held))
    assert config.output is not None
    output = config.output
    stream = processes.by_each(lambda: _stream(config, processes)) if todo else None
    made = None if resumed else processes.by_the_first(lambda: _begin(config, held))
    interrupted = False
    with (
        nullcontext() if made is None or not processes.first else _remove_if_nothing_is_saved(output, made),
        Interruption(silent=not processes.first) as interruption,
        explain_lost_process(lambda: _resume(output, processes)),
    ):
        try:
            # Several processes all stop at the same step.
            with nullcontext() if processes.group is None else interruption.defer():
                _run_all(config, todo, stream, results, interruption, processes)
        except KeyboardInterrupt:
            interrupted = True
        except Exception:
            # The runs so far are summarised; the failure is what is reported.
            with suppress(KeyboardInterrupt), interruption.defer():
                _report(config, results)
            raise
        try:
            with interruption.defer():
                processes.by_the_first(lambda: _report(config, results))
        except KeyboardInterrupt:
            interrupted = True
    if not processes.first:
        return interruption.status if interrupted else 0
    if not interrupted:
        _tidy(output)
        return _say_diverged(results)
    kept = f"the results so far are in {shown(str(output))}" if results else "no run was saved"
    print(f"gradmix: interrupted; {kept}; go on with: {_resume(output, processes)}", file=sys.stderr)
    return interruption.status


def _say_diverged(results: dict[tuple[str, int], RunResult]) -> int:
    """Return the exit status of training that was not interrupted: 1, with a line on stderr, if a run has diverged."""
    diverged = [f"{method}, seed {seed}" for (method, seed), result in results.items() if result.status == "diverged"]
    if not diverged:
        return 0
    print(
        f"gradmix: {len(diverged)} of {len(results)} runs diverged ({'; '.join(diverged)}): their loss was not finite, "
        "they are in no mean; train anew with a lower --lr",
        file=sys.stderr,
    )
    return _DIVERGED


def _plan(
    args: list[str], processes: Processes, results: dict[tuple[str, int], RunResult], held: ExitStack | None = None
) -> tuple[TrainConfig, list[tuple[str, int]], bool]:
    """Return the configuration, the runs to make, and whether a folder is resumed; its results go to ``results``."""
    resumed = _config_to_resume(args)
    with print_former_names():
        config = parse_train(args) if resumed is None else resumed
    find_named("train --benchmark", config.data.benchmark, config.optim.model)

    from gradmix.training.config import check
    from gradmix.training.loop.environment import pick_device
    from gradmix.training.methods import find_method
    from gradmix.training.streams.benchmarks import resolve

    check(config)
    config = resolve(config)
    for method in config.methods:
        found = find_method(method)
        found.check_installed()
        if processes.group is not None and found.needs.one_process:
            raise ValueError(
                f"methods: got {method} with {processes.size} processes, expected one process: it mixes whole steps"
            )
    if resumed is None:
        config = replace(config, output=_new_output(config, processes))
    else:
        assert config.output is not None
        if held is not None:
            _occupy(config.output, held)
        results.update(_load_ended(config))
    todo = [run for run in _runs(config) if run not in results]
    if todo or processes.group is not None:
        pick_device(processes.device(config.device))
    if not todo:
        ended = "have ended" if any(r.status != "complete" for r in results.values()) else "are complete"
        print(f"Nothing is left to do: all {len(results)} runs of {shown(str(config.output))} {ended}.")
    return config, todo, resumed is not None


def _stream(config: TrainConfig, processes: Processes) -> Any:
    from gradmix.training.streams.benchmarks import stream_of

    device = processes.device(config.device)
    if device.startswith("cuda:"):
        import torch

        torch.cuda.set_device(device)
    return stream_of(config.data)


def _begin(config: TrainConfig, held: ExitStack) -> list[Path]:
    """Write the configuration into the run folder; return the folders that were made for it."""
    from gradmix.training.runs.results import refuse_occupied, save_config
    from gradmix.training.runs.whole_files import make_folder

    assert config.output is not None
    made = make_folder(config.output)
    _occupy(config.output, held)
    # Another command may have used the folder since it was checked.
    refuse_occupied(config.output)
    save_config(config, config.output)
    return made


@contextmanager
def _remove_if_nothing_is_saved(output: Path, made: list[Path]) -> Iterator[None]:
    """Remove a new run folder, and the others of ``made``, if training fails before anything but its settings is saved.

    A lost process is no such failure: its error names the folder as the one to go on with.
    """
    from gradmix.training.runs.results import LOCK

    try:
        yield
    except LostProcessError:
        raise
    except Exception:
        _tidy(output)
        own = [output / name for name in (_CONFIG, LOCK)]
        if set(output.iterdir()) <= set(own):
            for file in own:
                file.unlink(missing_ok=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
        raise


def _occupy(output: Path, held: ExitStack) -> None:
    """Lock a folder for this command while ``held`` is open, or refuse one that another command uses."""
    from gradmix.runtime.locks import try_lock
    from gradmix.training.runs.results import LOCK

    while not held.enter_context(try_lock(output / LOCK)):
        # If none holds it now, it has just ended.
        refuse_in_use(output)


def refuse_in_use(output: Path, *, shared: bool = False) -> None:
    """Refuse a folder that another command has locked; with ``shared`` only one that it has locked for itself."""
    from gradmix.runtime.locks import holder
    from gradmix.training.runs.results import LOCK

    who = holder(output / LOCK, shared=shared)
    if who is not None:
        raise ValueError(
            f"output: {output} is in use: {who} is at work in it; wait until that has ended, or give another folder"
        )


def _runs(config: TrainConfig) -> list[tuple[str, int]]:
    return [(method, seed) for method in config.methods for seed in config.seeds]


def _run_folder(output: Path, method: str, seed: int) -> Path:
    """The folder of one run: by the method's name, or by its former name in a folder that has it."""
    former = output / stable_name(method)
    return (former if former.is_dir() else output / method) / f"seed-{seed}"


def _checkpoint_file(output: Path, method: str, seed: int) -> Path:
    """The checkpoint of one run; as :func:`_run_folder` one under the former name is gone on with."""
    former = output / _CHECKPOINTS / f"{stable_name(method)}-seed-{seed}.pt"
    return former if former.is_file() else former.with_name(f"{method}-seed-{seed}.pt")


def _run_all(
    config: TrainConfig,
    todo: list[tuple[str, int]],
    stream: Any,
    results: dict[tuple[str, int], RunResult],
    interruption: Interruption,
    processes: Processes,
) -> None:
    """Train run by run; the first process saves the runs and adds them to ``results``.

    Raises:
        KeyboardInterrupt: Training was interrupted; the interrupted run is among the results if a task was reached.
    """
    from gradmix.training.loop import checkpoint, trainer

    def step(progress: trainer.Progress) -> None:
        if reporter is not None:
            reporter.step(progress)
        interruption.check()

    def keep(result: RunResult) -> None:
        # With a GPU for each process, the first one's device is not what the user asked for.
        result = replace(result, config=replace(result.config, device=config.device))
        _save(result, _run_folder(output, result.method, result.seed))
        results[result.method, result.seed] = result
        if reporter is not None:
            reporter.finish(result)
        if result.status != "interrupted":
            # Only after the run is saved: until then the checkpoint is all there is of it.
            checkpoint.remove(file)

    assert config.output is not None
    output, own = config.output, replace(config, device=processes.device(config.device))
    with Reporter(len(todo), max(map(len, config.methods))) if processes.first else nullcontext() as reporter:
        for method, seed in todo:
            if reporter is not None:
                reporter.start(method, seed)
            file = _checkpoint_file(output, method, seed)
            with interruption.defer():
                result = trainer.train_one(
                    own,
                    method,
                    seed,
                    stream=stream,
                    on_step=step,
                    checkpoint=file if config.checkpoint > 0 else None,
                    checkpoint_seconds=config.checkpoint,
                    group=processes.group,
                )
                processes.by_the_first(partial(keep, result))
            if processes.any(result.status == "interrupted" or interruption.signal is not None):
                raise KeyboardInterrupt


def _save(result: RunResult, folder: Path) -> None:
    """Save a run; an interrupted one in the same folder stays until the new one is complete."""
    from gradmix.training.reports import saving
    from gradmix.training.runs.whole_files import name_in_errors, sync

    if not folder.exists():
        saving.save_run(result, folder)
        return
    new, old = (folder.with_name(f".{folder.name}-{which}") for which in ("new", "old"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    with name_in_errors(folder):
        saving.save_run(result, new, pictures=False)
        os.replace(folder, old)
        os.replace(new, folder)
        sync(folder.parent)
    shutil.rmtree(old)
    saving.draw_run(result, folder)


def _report(config: TrainConfig, results: dict[tuple[str, int], RunResult]) -> None:
    if not results:
        return
    from gradmix.training.reports import tables
    from gradmix.training.reports.saving import save_summary

    assert config.output is not None
    ordered = [results[run] for run in _runs(config) if run in results]
    save_summary(ordered, config.output)
    print()
    print(tables.to_text(tables.summarise(ordered), text_width(), bold=sys.stdout.isatty()))
    print(f"Run folder: {shown(str(config.output))}")
    pictures = (_run_folder(config.output, *run) / "alignment.png" for run in reversed(_runs(config)))
    if picture := next((file for file in pictures if file.is_file()), None):
        print(f"Which classes' mixtures were kept: {shown(str(picture))}")


def _tidy(output: Path) -> None:
    folder = output / _CHECKPOINTS
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


# ----------------------------------------------------------------------------------------------------------- resuming


def _config_to_resume(args: list[str]) -> TrainConfig | None:
    """Return the configuration of the folder given by ``--resume``, or refuse other flags; None without the flag."""
    if not any(arg == "--resume" or arg.startswith("--resume=") for arg in args) or {"-h", "--help"} & set(args):
        return None
    from gradmix.training.config import check, load_config

    parser = argparse.ArgumentParser(prog="gradmix train", add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    given, others = parser.parse_known_args(args)
    if others:
        raise UsageError(
            f"got {others[0].split('=')[0]} with --resume, expected none but --data-dir, --device and --threads: a run "
            "goes on with its own settings"
        )
    folder: Path = given.resume
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    refuse_in_use(folder)
    if (folder / _METRICS).is_file():
        raise ValueError(f"{folder} is the folder of one run, expected the one in which its training was started")
    config = load_config(folder / _CONFIG, saved=True)
    own = {"data-dir": config.data.data_dir, "device": config.device, "threads": config.threads}
    now = {name: getattr(given, name.replace("-", "_")) for name in own}
    now = {name: own[name] if value is None else value for name, value in now.items()}
    data = replace(config.data, data_dir=now["data-dir"])
    changed = replace(config, output=folder, data=data, device=now["device"], threads=now["threads"])
    check(changed)
    unset = "torch's own"
    differing = [f"{k} {own[k] or unset} -> {now[k] or unset}" for k in own if own[k] != now[k]]
    if differing:
        print(f"gradmix: changed: {shown(', '.join(differing))}; the same bits are no longer promised", file=sys.stderr)
    return changed


def _load_ended(config: TrainConfig) -> dict[tuple[str, int], RunResult]:
    """Return the runs of a folder that are complete or have diverged, by method and seed."""
    from gradmix.training.runs.results import load_run

    assert config.output is not None
    found = {}
    for method, seed in _runs(config):
        folder = _run_folder(config.output, method, seed)
        old = folder.with_name(f".{folder.name}-old")
        if not folder.exists() and old.is_dir():
            # The process ended between the two renames.
            os.replace(old, folder)
        if (folder / _METRICS).is_file():
            result = load_run(folder)
            if result.status != "interrupted":
                found[method, seed] = result
    return found


def _resume(output: Path, processes: Processes) -> str:
    """Return the command that resumes the runs of a folder."""
    return f"{processes.command()} train --resume {shell(str(output))}"


def _new_output(config: TrainConfig, processes: Processes) -> Path:
    """Return the run folder, new or empty; if training was interrupted there, the error says how to resume it."""
    from gradmix.training.config import load_config
    from gradmix.training.runs.results import refuse_occupied

    output = config.output or _default_output(config.data.benchmark)
    refuse_in_use(output)
    try:
        return refuse_occupied(output)
    except ValueError as error:
        file = output / _CONFIG
        if not file.is_file() or (output / _METRICS).is_file():
            raise
        try:
            there = replace(load_config(file, saved=True), output=output)
            unfinished = len(_runs(there)) - len(_load_ended(there))
        except (ValueError, OSError):
            raise error from None
        if not unfinished:
            raise
        raise ValueError(
            f"output: {output} has {unfinished} unfinished runs; go on with them by: {_resume(output, processes)}"
        ) from None


def _default_output(benchmark: str) -> Path:
    # Not every file system has colons, which import paths have.
    stem = f"{benchmark.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = Path("runs") / stem, 2
    while path.exists():
        path, number = Path("runs") / f"{stem}-{number}", number + 1
    return path
