"""The public interface: names, their signatures and defaults, as recorded in public_api.json.

``python tests/project/public_api.py`` writes the record anew, after a change that is meant and is in the changelog.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import gradmix
import gradmix.gradients

RECORD = Path(__file__).with_suffix(".json")

MODULES = (gradmix, gradmix.gradients)


def signature(function: Any) -> str | None:
    """Parameters, their kinds and defaults; None for what has no signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    shown = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    return str(shown)


def described(value: Any) -> Any:
    """A function's signature; a class's, with those of its public methods and the names of its properties."""
    if not inspect.isclass(value):
        return signature(value) if callable(value) else type(value).__name__
    members = {
        name: signature(member) if callable(member) else "attribute"
        for name, member in inspect.getmembers(value)
        if not name.startswith("_") and not hasattr(Exception, name) and not hasattr(tuple, name)
    }
    return {"": signature(value), **members}


def interface() -> dict[str, Any]:
    """All public names, by module."""
    return {m.__name__: {name: described(getattr(m, name)) for name in sorted(m.__all__)} for m in MODULES}


if __name__ == "__main__":
    RECORD.write_text(json.dumps(interface(), indent=1) + "\n")
