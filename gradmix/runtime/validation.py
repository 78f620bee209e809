"""Checks of arguments that several modules share."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def check_count(name: str, value: object, least: int = 1, other: str = "") -> None:
    """Raise unless ``value`` is an integer of at least ``least``; ``other`` ends the error, with what else is taken.

    Raises:
        TypeError: the value is no integer.
        ValueError: the value is less.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        given = repr(value) if isinstance(value, str) else type(value).__name__
        raise TypeError(f"{name}: got {given}, expected an integer >= {least}{other}")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected an integer >= {least}{other}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        expected = f"expected one of {', '.join(map(repr, allowed))}"
        raise ValueError(f"{name}: got {value!r}, {expected}{did_you_mean(value, allowed)}")


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the known one that is nearest, or nothing if none is near.

    Example:
        >>> did_you_mean("batchs", ["batch", "epochs"])
        "; did you mean 'batch'?"
        >>> did_you_mean("lr", ["batch", "epochs"])
        ''
    """
    found = get_close_matches(str(value), list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
