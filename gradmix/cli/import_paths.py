"""Imports that a benchmark's or a model's name asks for: packages, and modules in the current folder."""

from __future__ import annotations

import os
import sys

from gradmix.cli.errors import require

_FROM_SCIKIT_LEARN = ("split-digits", "split-descriptions", "split-wine")


def find_named(command: str, benchmark: str, model: str | None = None) -> None:
    """Make the modules importable that a benchmark and a model are named by; ``model`` None: the benchmark's own.

    Raises:
        UsageError: The benchmark comes with a package that is not installed; ``command`` is named as one that needs it.
    """
    if benchmark in _FROM_SCIKIT_LEARN:
        require(f"{command} {benchmark}", "sklearn")
    if any(name is not None and ":" in name for name in (benchmark, model)):
        search_here()


def search_here() -> None:
    """Make modules of the current folder importable from now on, after all others.

    A command that was installed does not look there by itself, as ``python -m`` does.
    """
    here = os.getcwd()
    if not {"", here} & set(sys.path):
        sys.path.append(here)
