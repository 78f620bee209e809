"""Processes started by ``torchrun``: how they connect, which of them prints, and how they end.

``torchrun`` tells every process in the environment how many there are (``WORLD_SIZE``), its number among them
(``RANK``), and the same for those of its machine (``LOCAL_WORLD_SIZE``, ``LOCAL_RANK``). The first process, of rank 0,
alone prints and writes. A process that fails prints its error with its number and ends at once, without notice to the
others. They may be waiting for it in an exchange: they find its connection closed, or are ended by ``torchrun``.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from gradmix.cli.errors import ERROR, LostProcessError, StopNow, UsageError, report_error, status_of

if TYPE_CHECKING:
    from gradmix.runtime.collectives import Group

TIMEOUT = 1800.0
"""Seconds that a process waits for another; ``GRADMIX_TIMEOUT`` in the environment sets another number."""

_GRACE = 5.0
"""Seconds that a process waits for the first one to report an error: ``torchrun`` ends all when the first one ends."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """This process among all those of a command; alone, unless :func:`join_processes` finds others.

    Attributes:
        rank: Its number, from 0.
        size: The number of processes.
        local_rank: Its number among those of its machine.
        local_size: The number of processes on its machine.
        group: The group in which they communicate; None: there is one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Group = None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def by_the_first(self, make: Callable[[], _T]) -> _T:
        """Call ``make`` in the first process and return its result in all; if it fails, the others end silently."""
        if self.group is None:
            return make()
        from gradmix.runtime.collectives import broadcast_object

        made: _T | None = None
        failure: BaseException | None = None
        if self.first:
            try:
                made = make()
            except BaseException as error:
                failure = error
        made, status = broadcast_object((made, None if failure is None else status_of(failure)), self.group)
        if failure is not None:
            raise failure
        if status is not None:
            raise _SaidElsewhere(status)
        return cast(_T, made)

    def by_each(self, make: Callable[[], _T]) -> _T:
        """Call ``make`` in every process; if the first one fails, it alone reports the error."""
        made: list[_T] = []
        failure: Exception | None = None
        try:
            made.append(make())
        except Exception as error:
            failure = error

        def tell() -> None:
            if failure is not None:
                raise failure

        self.by_the_first(tell)
        tell()
        return made[0]

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is set in any of the processes."""
        if self.group is None:
            return flag
        import torch

        from gradmix.runtime.collectives import any_rank

        return bool(any_rank(torch.tensor(flag), self.group))

    def device(self, name: str) -> str:
        """Return this process's device; ``name`` is the one the user gave for all processes.

        Raises:
            ValueError: One GPU is named for all processes, or the machine has fewer than processes.
        """
        if self.group is None:
            return name
        import torch

        if name not in ("auto", "cuda"):
            if re.fullmatch(r"cuda:\d+", name):
                raise ValueError(
                    f"device: got {name!r} with {self.size} processes, expected auto, cuda or cpu: each takes the GPU "
                    "of its own number"
                )
            return name
        if name == "auto" and not torch.cuda.is_available():
            return "cpu"
        count = torch.cuda.device_count()
        if self.local_size > count:
            raise ValueError(
                f"device: got {name!r} with {self.local_size} processes on a machine where torch sees {count} GPUs, "
                "expected a GPU for each: start fewer processes, or train by --device cpu"
            )
        return f"cuda:{self.local_rank}"

    def command(self) -> str:
        """Return how ``gradmix`` was started, for a command that continues this one."""
        if self.group is None:
            return "gradmix"
        machines = self.size // max(1, self.local_size)
        several = "" if machines == 1 else f"--nnodes {machines} [as before] "
        return f"torchrun {several}--nproc-per-node {self.local_size} -m gradmix.cli"


class _SaidElsewhere(BaseException):
    """The first process has reported what ends this one."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Connect the processes that ``torchrun`` started, if it did, while the context is open.

    If there are several, a process in which the body fails ends here and at once: to disconnect properly it would have
    to wait for the others. One that succeeds ends by :func:`finish`.

    Raises:
        ValueError: ``GRADMIX_TIMEOUT`` is not a number of seconds, or a number in the environment is invalid.
    """
    alone = processes_from_environment()
    if alone is None:
        yield Processes()
        return
    try:
        yield _connect(alone)
    except _SaidElsewhere as elsewhere:
        if elsewhere.status:
            _wait()
        _end(elsewhere.status)
    except BaseException as error:
        _leave(error, alone)


def processes_from_environment() -> Processes | None:
    """Return this process among those started by ``torchrun``, not connected yet; None: there is only one."""
    # Cluster managers set WORLD_SIZE alone, for other purposes.
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        return None
    values = {}
    for name, default in (("WORLD_SIZE", None), ("RANK", None), ("LOCAL_WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name) or default or ""
        if not text.isdecimal():
            raise ValueError(f"{name}: got {text!r} in the environment, expected a number, as torchrun sets it")
        values[name] = int(text)
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise ValueError(f"RANK: got {values['RANK']} in the environment, expected less than {values['WORLD_SIZE']}")
    return Processes(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], values["LOCAL_WORLD_SIZE"])


def refuse_several(command: str, instead: str) -> None:
    """Refuse several processes: by a UsageError in the first, a SystemExit in the others, which wait for it."""
    processes = processes_from_environment()
    if processes is None:
        return
    if not processes.first:
        _wait()
        raise SystemExit(ERROR)
    raise UsageError(f"{command}: got {processes.size} processes, started by torchrun, expected one: {instead}")


@contextmanager
def explain_lost_process(go_on: Callable[[], str]) -> Iterator[None]:
    """Raise a LostProcessError, with the command that ``go_on`` makes, where an exchange shows a process gone."""
    try:
        yield
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise LostProcessError(
            f"another process has ended or cannot be reached ({_first_sentence(error)}); if it said why, its message "
            f"is above or in its own log; go on with: {go_on()}"
        ) from error


def _is_loss(error: RuntimeError) -> bool:
    # Those of gloo are plain RuntimeErrors, which name its source file.
    return isinstance(error, _torch_distributed().DistError) or "gloo" in str(error)


def _first_sentence(error: RuntimeError) -> str:
    # The path and line of the library's source that errors of gloo begin with say nothing to the user.
    reason = re.sub(r"\[[^\[\]]*\.(?:cc|cpp|h):\d+\]\s*", "", str(error).strip())
    return reason.partition("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__


def _connect(alone: Processes) -> Processes:
    text = os.environ.get("GRADMIX_TIMEOUT") or str(TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"GRADMIX_TIMEOUT: got {text!r} in the environment, expected a number of seconds above 0")
    import torch

    distributed = _torch_distributed()
    # What lies on a GPU goes by NCCL, and the rest by gloo.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=seconds))
    except RuntimeError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostProcessError(
            f"the {alone.size} processes have not met at {address} within {seconds:g} s ({_first_sentence(error)}); "
            "see that all were started, and reach that address; GRADMIX_TIMEOUT, in seconds, gives them more time"
        ) from error
    return Processes(alone.rank, alone.size, alone.local_rank, alone.local_size, distributed.group.WORLD)


def _torch_distributed() -> Any:
    import torch

    if not torch.distributed.is_available():
        raise UsageError("got several processes, started by torchrun, but this torch was built without them")
    return torch.distributed


def _wait() -> None:
    # If need be for all of it; torchrun ends this process as soon as it finds the first one ended.
    time.sleep(_GRACE)


def _leave(error: BaseException, here: Processes) -> None:
    if not here.first and isinstance(error, (KeyboardInterrupt, StopNow)):
        _end(status_of(error))
    # What the first process has to say is said for all, but for what it alone could see.
    who = "" if here.first and not isinstance(error, LostProcessError) else f"process {here.rank} of {here.size}"
    try:
        status = report_error(error, who)
    except BaseException:
        if who:
            print(f"gradmix: {who} failed:", file=sys.stderr)
        traceback.print_exception(error)
        status = 1
    _end(status)


def finish(processes: Processes, status: int) -> int:
    """The exit status of a process that is done; one of several waits for the others and ends here."""
    if processes.group is not None:
        # That another one left earlier, possibly with the store they met at, is no failure.
        with suppress(RuntimeError):
            _torch_distributed().barrier(processes.group)
        _end(status)
    return status


def _end(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Not sys.exit: at the interpreter's end the group waits for what this process and the others still exchange, and
    # threads of gloo that have not ended by then abort the process (seen once in some dozen runs).
    os._exit(status)
