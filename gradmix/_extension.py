"""The compiled extension ``gradmix._C``: loaded when an operator first needs it; import of the package never fails.

If it cannot be used (not built, built for another Python, broken, of another version), the reason is a sentence, which
the operators' dispatch and ``gradmix doctor`` show.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from gradmix._version import __version__

_NAME = "_C"
_REPORT = "_build_report.json"


def load() -> ModuleType | None:
    """Return the extension module, loaded on the first call; None if it cannot be used."""
    return _load()[0]


def unavailable_reason() -> str | None:
    """Return the reason why the extension cannot be used, or None if it can."""
    return _load()[1]


def build_report() -> dict[str, Any] | None:
    """Return the report of the build: whether extension, OpenMP and CUDA were built, and why not; None if missing.

    There is no report if the package was never installed, as in a bare checkout.
    """
    for folder in folders():
        try:
            report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(report, dict):
            return report
    return None


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(f"gradmix.{_NAME}")
        version = module.build_info()["version"]
    except ModuleNotFoundError as error:
        if error.name == f"gradmix.{_NAME}":
            return None, _why_missing()
        return None, f"it does not load: {error}"
    except Exception as error:
        return None, f"it does not load: {type(error).__name__}: {error}"
    if version != __version__:
        return None, f"it was built for gradmix {version}, but this is gradmix {__version__}: install the package again"
    return module, None


def _why_missing() -> str:
    report = build_report()
    part = report.get("extension") if report else None
    if isinstance(part, dict) and not part.get("built") and part.get("reason"):
        return f"it was not built: {part['reason']}"
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    for folder in folders():
        for file in sorted(folder.glob(f"{_NAME}.*")):
            if file.suffix in (".so", ".pyd") and file.name.removeprefix(_NAME) not in suffixes:
                return f"it was built for another Python: {file.name} is there, this Python needs {_NAME}{suffixes[0]}"
    if report is None:
        return "it was not built: this gradmix was not installed (a bare checkout has no compiled part)"
    return f"{_NAME}{suffixes[0]} is missing from the installed package: install it again"


def folders() -> list[Path]:
    """Return the folders of the package; an editable install has two."""
    package = sys.modules.get("gradmix")
    paths = list(getattr(package, "__path__", [])) or [str(Path(__file__).parent)]
    return [Path(path) for path in paths]
