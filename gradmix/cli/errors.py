"""Early ends of a command: errors of the command line, missing packages, interruption."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradmix.runtime.names import shown

ERROR, INTERRUPTED = 2, 130
"""Exit statuses: after an error that the user can mend, and after Ctrl-C."""

# Modules whose distribution has another name.
_DISTRIBUTIONS = {"yaml": "pyyaml", "markdown_it": "markdown-it-py", "sklearn": "scikit-learn"}


class UsageError(Exception):
    """An error of the command line itself."""


class StopNow(BaseException):
    """A second signal to stop: nothing more is finished or saved. Not to be caught like an error.

    Attributes:
        signal: Number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class LostProcessError(Exception):
    """One of several processes that train together has ended, or cannot be reached."""


def require(command: str, *modules: str) -> None:
    """Raise a UsageError, with the command that installs them, if packages of ``modules`` are not installed."""
    missing = [_DISTRIBUTIONS.get(name, name) for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'gradmix {command} needs {", ".join(missing)}: pip install "gradmix[train]"')


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print the package's own warnings as a line of the command, without file and source; others stay as they are."""
    package, before = str(Path(__file__).parents[1]), warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], filename: str, *others: Any, **named: Any) -> str:
        if not filename.startswith(package):
            return before(message, category, filename, *others, **named)
        return f"gradmix: warning: {shown(' '.join(str(message).split()))}\n"

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def message(error: BaseException) -> str:
    """Return an error's message, without its number or class."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def status_of(error: BaseException) -> int:
    """Return the exit status for an error."""
    if isinstance(error, SystemExit):
        # Parsers raise it after --help (0) and after bad flags (2).
        return error.code if isinstance(error.code, int) else 0 if error.code is None else ERROR
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, StopNow):
        return 128 + error.signal
    return ERROR if isinstance(error, _EXPECTED) and not isinstance(error, BrokenPipeError) else 1


def report_error(error: BaseException, who: str = "") -> int:
    """Print on stderr, in one line, what ended a command.

    Args:
        error: The error or the interruption.
        who: The process that reports it, if there are several.

    Returns:
        The exit status.

    Raises:
        BaseException: The error itself if its traceback is wanted: for an unexpected error, or any error with
            ``GRADMIX_DEBUG`` set.
    """
    who = f"{who}: " if who else ""
    if isinstance(error, KeyboardInterrupt):
        print(f"gradmix: {who}interrupted", file=sys.stderr)
    elif isinstance(error, StopNow):
        print(f"gradmix: {who}stopped at once", file=sys.stderr)
    elif isinstance(error, BrokenPipeError):
        # The reader of a pipe, such as head, has gone; nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    elif not isinstance(error, SystemExit):
        if not isinstance(error, _EXPECTED) or os.environ.get("GRADMIX_DEBUG", "0") not in ("", "0"):
            raise error
        print(f"gradmix: error: {who}{shown(' '.join(message(error).split()))}", file=sys.stderr)
    return status_of(error)


_EXPECTED = (ValueError, OSError, ModuleNotFoundError, UsageError, LostProcessError)
