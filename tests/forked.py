"""Programs in forked processes: of their own, as scripts are, but torch is imported already.

An import of torch, and of what training imports besides, takes a process four seconds. What needs a fresh interpreter,
because it looks at ``sys.modules`` or at what is read when a module is imported, takes :mod:`fresh`.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple, NoReturn

import torch
import torch.multiprocessing
from fresh import run_python
from patience import PATIENCE

CAN_FORK = sys.platform == "linux" and not torch.backends.cuda.is_built()
"""Otherwise fresh processes are started: CUDA, libraries of other systems, and autograd's threads, which a torch built
for CUDA starts in some backward passes, do not bear a fork."""


def start_processes(function: Callable[..., None], arguments: tuple[Any, ...], number: int, join: bool = True) -> Any:
    """``torch.multiprocessing.spawn``, but the processes are forked."""
    with prepared():
        return torch.multiprocessing.start_processes(
            function, arguments, number, join, start_method="fork" if CAN_FORK else "spawn"
        )


@contextmanager
def prepared() -> Iterator[None]:
    """Around a fork."""
    importlib.import_module("torch._dynamo")  # as an optimiser's first step does

    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with warnings.catch_warnings():
        # Python warns of other threads: those of pytest-xdist, of which the process makes no use.
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class Ended(NamedTuple):
    """As of ``subprocess.run``; the status is negative where a signal ended the process."""

    returncode: int
    stdout: str
    stderr: str


class Forked:
    """A process that makes a call, in a folder and an environment of its own; its outputs go to files.

    The status is what the call returns or exits with, None counting as 0, and 1 after an error.
    """

    def __init__(self, call: Callable[[], int | None], cwd: Path, environment: Mapping[str, str] | None = None) -> None:
        self.outputs = [TemporaryFile("w+", encoding="utf-8") for _ in range(2)]  # noqa: SIM115 - wait closes them
        self.ended: int | None = None
        with prepared():
            self.pid = os.fork()
        if self.pid == 0:
            self._run(call, cwd, environment)

    def _run(self, call: Callable[[], int | None], cwd: Path, environment: Mapping[str, str] | None) -> NoReturn:
        status: object = 1
        try:
            for number, file in enumerate(self.outputs, 1):
                os.dup2(file.fileno(), number)
            streams = [open(n, "w", buffering=1, encoding="utf-8", closefd=False) for n in (1, 2)]  # noqa: SIM115
            sys.stdout, sys.stderr = streams
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if environment is not None:
                os.environ.clear()
                os.environ.update(environment)
            os.chdir(cwd)
            torch.set_num_threads(1)  # the threads of the parent are not there
            warnings.resetwarnings()
            status = call()
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(0 if status is None else status if isinstance(status, int) else 1)

    def poll(self) -> int | None:
        """The status, None while the process runs."""
        if self.ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.ended = os.waitstatus_to_exitcode(status) if pid else None
        return self.ended

    def printed(self) -> str:
        """What it has printed so far."""
        return os.pread(self.outputs[0].fileno(), 1 << 20, 0).decode()

    def wait(self) -> Ended:
        """Waits for the end."""
        if self.ended is None:
            self.ended = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Ended(self.ended, *map(_content, self.outputs))

    def kill(self) -> Ended:
        """Ends the process, if it runs, and waits for it."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()


class Started:
    """The same of a fresh process."""

    def __init__(self, words: tuple[str, ...], cwd: Path, environment: Mapping[str, str] | None = None) -> None:
        import gradmix

        path = {"PYTHONPATH": str(Path(gradmix.__file__).parents[1]), "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen(
            words, cwd=cwd, env={**(os.environ if environment is None else environment), **path},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        )  # fmt: skip

    def wait(self) -> Ended:
        """Waits for the end."""
        try:
            out, err = self.process.communicate(timeout=PATIENCE)
        finally:
            self.process.kill()
        return Ended(self.process.returncode, out, err)


def _content(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


def start_script(
    script: Path, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None
) -> Forked | Started:
    """Starts a script, which meets the same gradmix as the tests do."""

    def call() -> None:
        sys.argv = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")

    if CAN_FORK:
        return Forked(call, cwd, environment)
    return Started((sys.executable, str(script), *arguments), cwd, environment)


def run_script(script: Path, *arguments: str, cwd: Path) -> Ended:
    """Runs a script to its end."""
    return start_script(script, *arguments, cwd=cwd).wait()


def run_code(code: str, cwd: Path) -> list[str]:
    """The lines that ``code`` prints; an AssertionError with its stderr if it fails."""
    if not CAN_FORK:
        return run_python(code, OMP_NUM_THREADS="1")
    done = Forked(lambda: exec(code, {"__name__": "__main__"}), cwd).wait()
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
