"""The command line: ``gradmix train``, ``experiment``, ``compare``, ``calibrate`` and ``doctor``.

Every command has a module of its own, imported when it is called. Only torch and numpy are needed for ``calibrate``,
``doctor`` and ``--version``; the rest is imported when a command needs it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from gradmix._version import __version__
from gradmix.cli.errors import ERROR, UsageError, report_error, require, warnings_in_one_line
from gradmix.runtime.validation import did_you_mean

_USAGE = """\
usage: gradmix [-h] [--version] COMMAND ...

Gradient-based selective Mixup for class-incremental learning.

commands:
  train       train methods on a benchmark, and compare them over seeds
  experiment  run a table of methods, settings and seeds, and write its report
  compare     tabulate and plot runs that were saved before
  calibrate   check and time the GPU kernels here; auto then uses what is faster
  doctor      show versions, devices and backends, and why something is missing

options:
  -h, --help  show this help message and exit
  --version   show the version and exit

'gradmix COMMAND --help' shows what a command takes. With GRADMIX_DEBUG=1 in the
environment, errors come with their traceback.
"""

_TABLES = ("tyro", "yaml", "matplotlib", "scipy", "jinja2", "markdown_it")
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("rich", *_TABLES),
    "experiment": ("rich", *_TABLES),
    "compare": _TABLES,
    "calibrate": (),
    "doctor": (),
}
"""The modules that each command needs. It is a module of this package, with a function ``main(args) -> status``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; None: those of the process.

    Returns:
        Exit status: 0; 1 if runs have diverged, some of an experiment are missing, or a kernel is faulty; 2 after an
        error that the user can mend; 130 after Ctrl-C, 143 after SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a sign gets a question mark in its place, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with warnings_in_one_line():
            return _dispatch(args)
    except BaseException as error:
        return report_error(error)


def _dispatch(args: list[str]) -> int:
    if not args:
        print(_USAGE, end="", file=sys.stderr)
        return ERROR
    command, rest = args[0], args[1:]
    if command in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if command == "--version":
        print(f"gradmix {__version__}")
        return 0
    if command not in COMMANDS:
        known = f"expected one of {', '.join(COMMANDS)} (see gradmix --help)"
        raise UsageError(f"got command {command!r}, {known}{did_you_mean(command, COMMANDS)}")
    require(command, *COMMANDS[command])
    return int(importlib.import_module(f"gradmix.cli.{command}").main(rest))
