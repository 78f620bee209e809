"""A stand-in for CUDA's graphs on the CPU, which replays by calling again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from no_looking import behind_the_host

from gradmix.runtime import cuda_graphs, deferred_checks


class Recorder:
    """Counts captures; a replay computes anew from the same memory into the same memory, as a graph does.

    Attributes:
        stale: whether replays are faulty and write nothing.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.stale = False

    def __call__(self, function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        first = function()
        results = type(first)(*(None if v is None else torch.full_like(v, 7) for v in first))

        def replay() -> None:
            self.replays += 1
            if self.stale:
                return
            for own, new in zip(results, function(), strict=True):
                if own is not None:
                    own.copy_(new)

        return replay, results


@contextmanager
def install_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Have the CPU pass for a device with graphs, whose values are not looked at."""
    behind_the_host(monkeypatch)
    recorder = Recorder()
    monkeypatch.setattr(cuda_graphs, "capture", recorder)
    monkeypatch.setattr(cuda_graphs.Graphs, "supports", lambda self, device: True)
    yield recorder
    deferred_checks._unread.clear()
