"""Old names of the public interface, which are served with a DeprecationWarning until version :data:`REMOVED_IN`.

A module that has moved stays as a stub of two lines::

    from gradmix._moved import moved

    __getattr__ = moved(__name__, "gradmix.replay.buffer", {"ReplayBuffer": "ReplayBuffer"})

:func:`alias_attribute` serves the old name of a method or attribute, :func:`alias_argument` that of a keyword.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

REMOVED_IN = "0.4"
"""The version that has no old names any more."""

P = ParamSpec("P")
T = TypeVar("T")


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


def alias_attribute(owner: str, old: str, new: str) -> Any:
    """Return a property that serves the method or attribute ``new`` under its former name.

    Args:
        owner: name of the class, for the warning.
        old: the former name.
        new: the present name.
    """

    def find(self: Any) -> Any:
        _warn_renamed(f"{owner}.{old}", f"{owner}.{new}")
        return getattr(self, new)

    return property(find, doc=f"Former name of :attr:`{new}`.")


def alias_argument(owner: str, old: str, new: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator for a function that takes the keyword ``new`` under its former name too.

    Args:
        owner: name of the function or class, for the warning.
        old: the former name.
        new: the present name.

    Raises:
        TypeError: a call gives both names.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{owner}: got {old} and {new}, expected {new} alone")
                _warn_renamed(f"{owner}({old}=)", f"{owner}({new}=)")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def _warn_renamed(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is now {new}; the old name is removed in version {REMOVED_IN}", DeprecationWarning, stacklevel=3
    )
