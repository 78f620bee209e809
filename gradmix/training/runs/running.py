"""Running the runs of experiments: one after the other or in several processes, each once, going on where it stopped.

All runs lie under one folder, each at its :attr:`~gradmix.training.runs.experiments.Run.folder`. A run's folder appears
when it is complete or has diverged; until then there is its checkpoint. A lock keeps two processes, of one command or
of several, from training the same run: the system releases it when its process ends, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

from gradmix.runtime.allocator import keep_freed_memory
from gradmix.runtime.locks import try_lock
from gradmix.training.config import DataConfig
from gradmix.training.loop import checkpoint, trainer
from gradmix.training.runs import results
from gradmix.training.runs.experiments import Run
from gradmix.training.runs.results import RunResult
from gradmix.training.runs.whole_files import make_folder
from gradmix.training.streams import TaskStream
from gradmix.training.streams.benchmarks import stream_of

State = Literal["complete", "diverged", "unfinished", "absent"]
ENDED: tuple[State, ...] = ("complete", "diverged")
"""The states in which a run is saved, and made no more: the same settings would diverge again."""

RUNS_AT_A_TIME = "runs at a time"
"""Key of a run's environment: how many runs its command made at a time, as its times depend on that."""

_CHECKPOINTS, _LOCKS = ".checkpoints", ".locks"
# Seconds until a run that another process is at is looked at again, and between two looks for a signal.
_AGAIN, _LOOK = 1.0, 0.1


class Watcher:
    """The events of runs as they go on; this class ignores them."""

    def start(self, run: Run) -> None:
        """A run takes its first step, or the first one after its checkpoint, in this process."""

    def step(self, progress: trainer.Progress) -> None:
        """A training step was taken, in this process."""

    def finish(self, run: Run, result: RunResult) -> None:
        """A run is complete, or has diverged, and is saved."""

    def fail(self, run: Run, reason: str) -> None:
        """A run failed; the others go on."""

    def wait(self, runs: int) -> None:
        """Nothing is left but runs that another command is at."""


@dataclass
class Outcome:
    """The outcome of the runs.

    Attributes:
        failed: Runs that failed, and why.
        interrupted: Whether runs were left out because a stop was asked for.
    """

    failed: list[tuple[Run, str]] = field(default_factory=list)
    interrupted: bool = False


def state_of(run: Run, root: str | Path) -> State:
    """The state of a run under ``root``."""
    root = Path(root)
    if (root / run.folder / "metrics.json").is_file():
        return "diverged" if results.status_of(root / run.folder) == "diverged" else "complete"
    return "unfinished" if checkpoint_of(run, root).is_file() else "absent"


def checkpoint_of(run: Run, root: str | Path) -> Path:
    """The file that holds the run's checkpoint until the run is complete."""
    return Path(root) / _CHECKPOINTS / f"{_flat(run)}.pt"


def attempt(
    run: Run, root: str | Path, on_step: Callable[[trainer.Progress], None] | None = None, *, jobs: int = 1
) -> RunResult | None:
    """Train and save a run, unless it is there already, or another process is at it.

    Args:
        run: The run.
        root: Folder of all runs.
        on_step: Called after every step; a KeyboardInterrupt that it raises ends the run, with a checkpoint.
        jobs: Number of runs that the caller makes at a time; noted with the run.

    Returns:
        The result; None if another process is at it. One of status ``interrupted`` is not saved, one that has
        ``diverged`` is.

    Raises:
        ValueError, OSError, RuntimeError: As training and saving raise them; a damaged checkpoint among them.
    """
    root = Path(root)
    folder, file = root / run.folder, checkpoint_of(run, root)
    make_folder(root / _LOCKS)
    with try_lock(root / _LOCKS / f"{_flat(run)}.lock") as mine:
        if not mine:
            return None
        if state_of(run, root) in ENDED:
            return results.load_run(folder)
        keep = run.config.checkpoint > 0
        result = trainer.train_one(
            run.config,
            run.method,
            run.seed,
            stream=_stream(run.config.data),
            on_step=on_step,
            checkpoint=file if keep else None,
            checkpoint_seconds=run.config.checkpoint,
        )
        result = replace(result, environment={**result.environment, RUNS_AT_A_TIME: jobs})
        if result.status in ENDED:
            results.write_run(result, folder)
            checkpoint.remove(file)
        return result


def run_all(
    runs: Sequence[Run],
    root: str | Path,
    *,
    jobs: int = 1,
    watcher: Watcher | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Make all runs, in their order, as far as that goes.

    Args:
        runs: The runs; those that are complete already, or have diverged, are passed over.
        root: Folder of all runs.
        jobs: Number of runs at a time; more than one are made by spawned processes.
        watcher: Is called on every event.
        stopping: Whether to stop: every run then ends after the step it is in, with a checkpoint.

    Raises:
        ValueError: ``jobs`` is less than 1.
    """
    if jobs < 1:
        raise ValueError(f"jobs: got {jobs}, expected at least 1")
    todo = deque(run for run in runs if state_of(run, root) not in ENDED)
    watcher = watcher or Watcher()
    if not todo:
        return Outcome()
    if jobs == 1:
        return _in_turn(todo, Path(root), watcher, stopping)
    return _at_once(todo, Path(root), min(jobs, len(todo)), watcher, stopping)


def _in_turn(todo: deque[Run], root: Path, watcher: Watcher, stopping: Callable[[], bool]) -> Outcome:
    outcome, passed = Outcome(), 0
    begun = None

    def step(progress: trainer.Progress) -> None:
        nonlocal begun
        if begun is not run:
            begun = run
            watcher.start(run)
        watcher.step(progress)
        if stopping():
            raise KeyboardInterrupt

    while todo:
        if stopping():
            outcome.interrupted = True
            break
        run = todo.popleft()
        try:
            result = attempt(run, root, step)
        except Exception as error:
            outcome.failed.append((run, _reason(error)))
            watcher.fail(run, _reason(error))
            continue
        if result is None:
            todo.append(run)
            passed += 1
            if passed >= len(todo):
                if passed == len(todo):
                    watcher.wait(len(todo))
                _pause(stopping)
            continue
        passed = 0
        if result.status in ENDED:
            watcher.finish(run, result)
        else:
            outcome.interrupted = True
            break
    return outcome


# -------------------------------------------------------------------------------------------------- several processes


@dataclass
class _Worker:
    """A process that makes one run at a time, and the end of the pipe to it."""

    process: Any
    pipe: Any
    run: Run | None = None


def _at_once(todo: deque[Run], root: Path, jobs: int, watcher: Watcher, stopping: Callable[[], bool]) -> Outcome:
    # A forked process would share torch's threads, and CUDA not at all.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    outcome, workers = Outcome(), [_hire(context, stop) for _ in range(jobs)]
    later: list[Run] = []
    again = 0.0
    try:
        while todo or later or any(worker.run for worker in workers):
            if stopping() and not stop.is_set():
                stop.set()
                outcome.interrupted = True
            if stop.is_set():
                todo.clear()
                later.clear()
            if later and time.monotonic() >= again:
                todo.extend(later)
                later.clear()
            for worker in workers:
                if worker.run is None and todo:
                    worker.run = todo.popleft()
                    # If it is gone, the pipe's end says so below.
                    with suppress(BrokenPipeError):
                        worker.pipe.send((worker.run, root, jobs))
            busy = {worker.pipe: worker for worker in workers if worker.run is not None}
            if not busy:
                time.sleep(_LOOK)
            for pipe in connection.wait(list(busy), timeout=_LOOK) if busy else ():
                worker = busy[pipe]
                run, worker.run = worker.run, None
                assert run is not None
                try:
                    kind, content = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    kind, content = "failed", f"its process ended with status {worker.process.exitcode}"
                    workers[workers.index(worker)] = _hire(context, stop)
                if kind == "busy":
                    if not later and not todo:
                        watcher.wait(1)
                    later.append(run)
                    again = time.monotonic() + _AGAIN
                elif kind == "failed":
                    outcome.failed.append((run, content))
                    watcher.fail(run, content)
                elif content.status in ENDED:
                    watcher.finish(run, content)
                else:
                    outcome.interrupted = True
        for worker in workers:
            with suppress(BrokenPipeError):
                worker.pipe.send(None)
            worker.process.join()
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
    return outcome


def _hire(context: Any, stop: Any) -> _Worker:
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, stop, os.getpid()), daemon=True)
    process.start()
    # Otherwise the pipe would not end with the process.
    there.close()
    return _Worker(process, here)


def _work(pipe: Any, stop: Any, parent: int) -> None:
    """Make the runs that come through ``pipe`` until None comes, or the other end is gone."""
    # A signal to all of the group reaches the parent as well, which says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def step(_: trainer.Progress) -> None:
        if stop.is_set() or os.getppid() != parent:
            raise KeyboardInterrupt

    keep_freed_memory()
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        if order is None:
            return
        try:
            run, root, jobs = order
            result = attempt(run, root, step, jobs=jobs)
            answer: tuple[str, Any] = ("busy", None) if result is None else ("done", result)
        except Exception as error:
            answer = ("failed", _reason(error))
        try:
            pipe.send(answer)
        except OSError:
            return


# ------------------------------------------------------------------------------------------------------------- details


@lru_cache(maxsize=4)
def _stream(data: DataConfig) -> TaskStream:
    """A benchmark's samples, kept for the next run; a few, as class orders may vary."""
    return stream_of(data)


def check_data(runs: Sequence[Run]) -> None:
    """Read what the runs will read, so that missing or damaged data are found before anything is trained."""
    for data in dict.fromkeys(run.config.data for run in runs):
        _stream(data)


def _pause(stopping: Callable[[], bool]) -> None:
    until = time.monotonic() + _AGAIN
    while time.monotonic() < until and not stopping():
        time.sleep(_LOOK)


def _flat(run: Run) -> str:
    return "-".join(run.folder.parts)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"
