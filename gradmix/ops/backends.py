"""Implementations of an operator: which one runs, and the reason for every refusal.

An operator (`mixed_alignment`, `class_sketch`, ...) has several bodies: ``reference`` reads like the formula, ``torch``
is the same mathematics in batched torch calls, ``cpp``/``cuda``/``triton`` are native. A body is asked two questions
about the actual arguments: *can* it run them, and, under ``auto``, is it *worth* running there. Both answer ``None``
for yes and a sentence for no, so that a refusal always carries its reason (``gradmix doctor`` prints them).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradmix.runtime.validation import did_you_mean

BACKENDS = ("reference", "torch", "cpp", "cuda", "triton")
ENVIRONMENT_VARIABLE = "GRADMIX_BACKEND"

Verdict = Callable[..., "str | None"]


def _always(*_args: Any, **_kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Args:
        name: one of :data:`BACKENDS`.
        run: the body itself, called with the operator's arguments.
        can_run: called with the same arguments; None, or why this body cannot take them.
        worth: called with the same arguments under ``auto``; None, or why another body is the better choice there.
        available: called without arguments; None, or why this body cannot run on this machine at all.
    """

    name: str
    run: Callable[..., Any]
    can_run: Verdict = _always
    worth: Verdict = _always
    available: Verdict = _always


@dataclass(frozen=True)
class Operator:
    """An operator and its bodies, the preferred first; the last one must be able to run anything."""

    name: str
    backends: tuple[Backend, ...]

    def choose(self, backend: str, *args: Any, **kwargs: Any) -> Backend:
        """The body that will run ``args``.

        Args:
            backend: a name from :data:`BACKENDS`, which this operator must have and which must be able to run the
                arguments; or ``"auto"``, which honours :func:`set_backend` and ``GRADMIX_BACKEND`` where this operator
                has such a body, and otherwise takes the first body that can run the arguments and is worth it.

        Raises:
            ValueError: no such backend, or this operator has no such body.
            RuntimeError: the body was asked for by name but cannot run, with the reason.
        """
        check_backend(backend)
        if backend != "auto":
            return self._choose_named(backend, *args, **kwargs)
        preferred = get_backend()
        if preferred != "auto" and any(b.name == preferred for b in self.backends):
            return self._choose_named(preferred, *args, **kwargs)
        for body in self.backends:
            if body.available() or body.can_run(*args, **kwargs) or body.worth(*args, **kwargs):
                continue
            return body
        raise RuntimeError(f"{self.name}: no backend can run these arguments")  # pragma: no cover - the last one can

    def _choose_named(self, name: str, *args: Any, **kwargs: Any) -> Backend:
        for body in self.backends:
            if body.name == name:
                reason = body.available() or body.can_run(*args, **kwargs)
                if reason:
                    raise RuntimeError(f"{self.name}: backend {name!r} cannot run: {reason}")
                return body
        have = ", ".join(b.name for b in self.backends)
        raise ValueError(f"backend: {self.name} has no {name!r} body; it has {have}")

    def explain(self) -> list[tuple[str, str | None]]:
        """``(backend, None or why it is unavailable on this machine)`` for every body, preferred first."""
        return [(b.name, b.available()) for b in self.backends]


_preferred: str | None = None


def check_backend(name: str) -> None:
    """Raise ValueError unless ``name`` is ``"auto"`` or one of :data:`BACKENDS`."""
    if name != "auto" and name not in BACKENDS:
        expected = f"expected 'auto' or one of {', '.join(BACKENDS)}"
        raise ValueError(f"backend: got {name!r}, {expected}{did_you_mean(name, ('auto', *BACKENDS))}")


def set_backend(name: str) -> None:
    """Prefer one backend in this process for every operator that has it; ``"auto"`` takes the preference back.

    It overrides the environment variable ``GRADMIX_BACKEND``. An operator without such a body keeps choosing by itself;
    one that has it but cannot run it raises, with the reason.

    Args:
        name: ``"auto"``, ``"reference"``, ``"torch"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.

    Raises:
        ValueError: no such backend.

    >>> import gradmix
    >>> gradmix.set_backend("reference")
    >>> gradmix.get_backend()
    'reference'
    >>> gradmix.set_backend("auto")
    """
    global _preferred
    check_backend(name)
    _preferred = name


def get_backend() -> str:
    """The backend preferred in this process: by :func:`set_backend`, else ``GRADMIX_BACKEND``, else ``"auto"``."""
    if _preferred is not None:
        return _preferred
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    try:
        check_backend(name)
    except ValueError as error:
        raise ValueError(f"environment variable {ENVIRONMENT_VARIABLE}: {error}") from None
    return name
