"""The modules in ``bench/``, as Python finds them when one is run as a script."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """Import ``bench/NAME.py``; its folder is on the path while the test runs."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module(name)
