"""Progress of runs on the terminal, and how Ctrl-C or SIGTERM ends them."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from gradmix.cli.errors import INTERRUPTED, StopNow
from gradmix.runtime.names import shown

if TYPE_CHECKING:
    from gradmix.training.loop.run import Progress
    from gradmix.training.runs.results import RunResult


_BAR_AND_TIME = 24
"""Columns for a short bar, the share done and the time left."""
_BELOW = "    "
"""Before the rest of a line that is too long for the terminal."""


class Reporter:
    """Shows how far training is: a bar on a terminal, a line for each task elsewhere.

    Args:
        runs: Number of runs to come.
        width: Characters of the longest name of what is run.
    """

    def __init__(self, runs: int, width: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.runs, self.width = runs, width
        self.run = 0
        self.name = self.label = self.seed = ""
        self.task = 0
        self.shown = 0.0
        self.loss: float | None = None
        # Highlighting would colour the figures in lines that are the same elsewhere.
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
                # Drawing takes time from training, and is timed with it.
                refresh_per_second=4,
                expand=False,
            )
            self.bar_task = self.bar.add_task("", total=None)

    def __enter__(self) -> Reporter:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, name: str, seed: int) -> None:
        """Begin a run of what is called ``name``."""
        self.run += 1
        self.task, self.shown, self.loss = 0, 0.0, None
        self.label, self.seed = shown(name), f"seed {seed}"
        self.name = f"{self.label:<{self.width}}  {self.seed}"
        if self.bar is not None:
            self.bar.reset(self.bar_task, total=None, description=self._describe())

    def step(self, progress: Progress) -> None:
        """Take note of a training step."""
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
        position = f"  task {progress.task}/{progress.tasks}"
        if self.loss is not None:
            position += f"  loss {self.loss:.3f}"
        text = self._describe(position)
        self.bar.update(self.bar_task, completed=progress.step, total=progress.steps_total, description=text)

    def _describe(self, position: str = "") -> str:
        """Return the text before the bar; a long name is cut, so that the time left is not."""
        number = f"[{self.run}/{self.runs}] "
        room = self.console.width - len(number) - len(position) - _BAR_AND_TIME
        if len(self.name) <= room:
            return f"{number}{self.name}{position}"
        # Without the seed two runs look the same.
        label, room = self.label, max(room - len(self.seed) - 2, 1)
        return f"{number}{label if len(label) <= room else f'{label[: room - 1]}…'}  {self.seed}{position}"

    def finish(self, result: RunResult, note: str = "") -> None:
        """Show a run's figures in a line that stays."""
        self.say(self.name, f"{figures(result)}{note}")

    def count(self, done: int, running: int) -> None:
        """Show how many runs are over and how many are going on, where their steps are other processes'."""
        if self.bar is not None:
            self.bar.update(
                self.bar_task,
                completed=done,
                total=self.runs,
                description=f"{done} of {self.runs} runs, {running} at a time",
            )

    def say(self, line: str, more: str = "") -> None:
        """Show a line that stays; on a terminal that is too narrow for it, what is ``more`` stands below."""
        parts = [f"{line}  {more}".rstrip()]
        if self.bar is not None and len(parts[0]) > self.console.width:
            width = self.console.width
            parts = wrap(line, width) + [_BELOW + rest for rest in wrap(more, width - len(_BELOW))]
        for part in parts:
            self._say(shown(part))

    def _say(self, line: str) -> None:
        if self.bar is None:
            print(line, flush=True)
        else:
            self.console.print(line, markup=False, emoji=False)


def figures(result: RunResult) -> str:
    """A run's figures in a few words."""
    from gradmix.training.runs.results import metric_values, tasks_reached

    if result.status != "complete":
        return f"{result.status} after {tasks_reached(result)} of {result.tasks} tasks"
    values = metric_values(result)
    return (
        f"average accuracy {values['average_accuracy']:.3f}  final {values['final_accuracy']:.3f}"
        f"  {result.timing.seconds_total:.1f} s"
    )


class Interruption:
    """Ctrl-C and SIGTERM, heeded where a run can be left: the first waits for such a place, the second does not.

    While the context is open, the first signal raises a KeyboardInterrupt at once, or, within :meth:`defer`, at the
    next call of :meth:`check`. A second one raises a :class:`~gradmix.cli.errors.StopNow` wherever the program is.
    Outside the main thread nothing is caught, as Python allows it there alone.

    Args:
        silent: Nothing is said of a signal: of several processes, one does.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self.signal: int | None = None
        self._deferring = False
        self._before: dict[int, Any] = {}

    @property
    def status(self) -> int:
        """Exit status: 130 after Ctrl-C, 143 after SIGTERM."""
        return INTERRUPTED if self.signal is None else 128 + self.signal

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise the KeyboardInterrupt that a signal has left to be raised."""
        if self.signal is not None:
            raise KeyboardInterrupt

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Hold the first signal back within the block; :meth:`check` and the block's end raise it."""
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before
        if not before:
            self.check()

    def _on_signal(self, number: int, _: object) -> None:
        if self.signal is not None:
            raise StopNow(number)
        self.signal = number
        if not self._deferring:
            raise KeyboardInterrupt
        if self._silent:
            return
        print("gradmix: stopping after this step; once more stops at once", file=sys.stderr, flush=True)
