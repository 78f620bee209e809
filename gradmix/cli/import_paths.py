"""Modules in the current folder, which the name of a benchmark, a model or an experiment may ask for."""

from __future__ import annotations

import os
import sys


def search_for(*names: str | None) -> None:
    """Make modules of the current folder importable if one of the names is an import path, ``package.module:name``."""
    if any(name is not None and ":" in name for name in names):
        search_here()


def search_here() -> None:
    """Make modules of the current folder importable from now on, after all others.

    A command that was installed does not look there by itself, as ``python -m`` does.
    """
    here = os.getcwd()
    if not {"", here} & set(sys.path):
        sys.path.append(here)
