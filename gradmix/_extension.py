"""The compiled extension ``gradmix._C``: loaded when an operator first needs it, and never a reason for import to fail.

Whatever is wrong with it (not built, built for another Python, broken, of another version) becomes a sentence, which
the operators' dispatch and ``gradmix doctor`` pass on.
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
    """The extension module, loaded on the first call; None if it cannot be used (see :func:`unavailable_reason`)."""
    return _load()[0]


def unavailable_reason() -> str | None:
    """Why the extension cannot be used, or None if it can."""
    return _load()[1]


def build_report() -> dict[str, Any] | None:
    """What the build left behind about itself: extension, OpenMP and CUDA, each built or not and why; None if nothing.

    There is no report where the package was never installed, as in a bare checkout.
    """
    for folder in _folders():
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
    for folder in _folders():
        for file in sorted(folder.glob(f"{_NAME}.*")):
            if file.suffix in (".so", ".pyd") and file.name.removeprefix(_NAME) not in suffixes:
                return f"it was built for another Python: {file.name} is there, this Python needs {_NAME}{suffixes[0]}"
    if report is None:
        return "it was not built: this gradmix was not installed (a bare checkout has no compiled part)"
    return f"{_NAME}{suffixes[0]} is missing from the installed package: install it again"


def _folders() -> list[Path]:
    """Where the package's files lie; an editable install has them in two places."""
    package = sys.modules.get("gradmix")
    paths = list(getattr(package, "__path__", [])) or [str(Path(__file__).parent)]
    return [Path(path) for path in paths]
