"""Old import paths: a module that has moved stays as a stub, which imports from the new place and warns.

A stub is two lines::

    from gradmix._moved import moved

    __getattr__ = moved(__name__, "gradmix.replay.buffer", {"ReplayBuffer": "ReplayBuffer"})
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

REMOVED_IN = "0.4"
"""The version that has no stubs any more."""


def moved(old: str, new: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that serves its former names.

    Args:
        old: the stub's name.
        new: the module that holds the objects now.
        names: the new name of each former one; ``"module:name"`` names an object of another module than ``new``.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        module, _, attribute = names[name].rpartition(":")
        module = module or new
        warnings.warn(
            f"{old}.{name} has moved to {module}.{attribute}; the old path is removed in version {REMOVED_IN}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(module), attribute)

    return find
