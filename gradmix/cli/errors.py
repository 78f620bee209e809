"""What can end a command early: errors of the command line, missing packages, interruption."""

from __future__ import annotations

import importlib.util

ERROR, INTERRUPTED = 2, 130
"""Exit statuses: after an error that the user can mend, and after Ctrl-C."""

# Module, and the name of its distribution.
_DISTRIBUTIONS = {"tyro": "tyro", "rich": "rich", "yaml": "pyyaml", "matplotlib": "matplotlib", "scipy": "scipy"}


class UsageError(Exception):
    """An error of the command line itself."""


class StopNow(BaseException):
    """A second signal to stop: nothing more is finished or saved. Not an error that anything should catch.

    Attributes:
        signal: Number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


def require(command: str, *modules: str, **others: str) -> None:
    """Refuses to go on without the packages that a command needs.

    Args:
        command: As the user gave it.
        modules: Names of modules.
        others: More modules, with their distributions' names where these differ.

    Raises:
        UsageError: Some are not installed; it names all of them, and the command that installs them.
    """
    wanted = {name: _DISTRIBUTIONS[name] for name in modules} | others
    missing = [name for module, name in wanted.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f'gradmix {command} needs {", ".join(missing)}: pip install "gradmix[train]"')


def message(error: BaseException) -> str:
    """Puts an error into words, without its number or class."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
