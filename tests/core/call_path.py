"""The way of a batch through one ``select_pairs``.

``PYTHONPATH=tests python tests/core/call_path.py [estimator] [criterion]`` prints it.

An entry is a call from one module of the package into another that is handed the batch, in any of the forms that it
takes on the way. What these objects do by themselves (:mod:`gradmix.labelled_samples`, :mod:`gradmix.mixtures`) is no
entry.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
from models import MLP, rows

import gradmix
from gradmix.criteria import PairScores
from gradmix.labelled_samples import LabelledSamples
from gradmix.mixtures import Mixtures, Request

CARRIERS = (LabelledSamples, Request, Mixtures, PairScores)
BY_THEMSELVES = (LabelledSamples.__module__, Mixtures.__module__)


class Entry(NamedTuple):
    """A call into another module: from where, into which, and which function."""

    caller: str
    module: str
    function: str


def module_of(frame: FrameType | None) -> str:
    """The module of the package that a frame runs in, or of the nearest one around it; "" outside."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("gradmix"):
            return name
        frame = frame.f_back
    return ""


def entries(call: Callable[[], Any], batch: object) -> list[Entry]:
    """The entries of one call, in order."""
    found: list[Entry] = []

    def note(frame: FrameType, event: str, _argument: object) -> None:
        name = frame.f_globals.get("__name__", "")
        if event != "call" or not name.startswith("gradmix") or name in BY_THEMSELVES:
            return
        caller, given = module_of(frame.f_back), list(frame.f_locals.values())
        if any(value is batch or isinstance(value, CARRIERS) for value in given) and caller != name:
            found.append(Entry(caller, name, frame.f_code.co_name))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [entry for entry in found if not entry.function.startswith("__") or entry.function == "__call__"]


def path(estimator: str = "feature", criterion: str = "sample") -> list[Entry]:
    """The entries of one ``select_pairs`` by these settings, with a buffer."""
    torch.manual_seed(0)
    model, buffer, batch = MLP(), rows(12, 2), rows(7, 1)

    def call() -> gradmix.Pairs:
        return gradmix.select_pairs(model, buffer, batch, estimator=estimator, criterion=criterion)  # type: ignore[arg-type]

    call()  # what is found out once about a model is not on the way
    return entries(call, batch)


if __name__ == "__main__":
    for number, entry in enumerate(path(*sys.argv[1:]), 1):
        print(f"{number:3} {entry.caller or 'user':32} -> {entry.module}.{entry.function}")
