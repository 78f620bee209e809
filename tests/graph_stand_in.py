"""A stand-in for CUDA's graphs on the CPU: a replay repeats the calls of tensors that were recorded, without Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from no_looking import behind_the_host
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from gradmix.runtime import cuda_graphs, deferred_checks


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def _made(func: Any, args: Any, kwargs: Any, result: Any) -> list[Tensor]:
    """The tensors of a result that have memory of their own."""
    given = {value.untyped_storage().data_ptr() for value in _tensors((args, kwargs))}
    if func._schema.is_mutable:
        return []
    return [value for value in _tensors(result) if value.numel() and value.untyped_storage().data_ptr() not in given]


def _tensors(tree: Any) -> list[Tensor]:
    return [value for value in tree_leaves(tree) if isinstance(value, Tensor)]


class Recorder:
    """Captures; a replay computes anew from the same memory into the same memory, as a graph does.

    Attributes:
        captures, replays: their numbers.
        stale: whether replays are faulty and write nothing.
        error: what a capture raises, or None.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.stale = False
        self.error: Exception | None = None

    def __call__(self, function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        if self.error is not None:
            raise self.error
        self.captures += 1
        with _Calls() as recorded:
            results = function()
        for call in recorded.calls:  # a graph's memory holds nothing before it is replayed
            for value in _made(*call):
                value.fill_(1)

        def replay() -> None:
            self.replays += 1
            if self.stale:
                return
            with _disable_current_modes():  # what watches calls sees none
                for func, args, kwargs, result in recorded.calls:
                    own = _made(func, args, kwargs, result)
                    for value, new in zip(own, _made(func, args, kwargs, func(*args, **kwargs)), strict=True):
                        value.copy_(new)

        return replay, results


@contextmanager
def install_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Have the CPU pass for a device with graphs, whose values are not looked at."""
    behind_the_host(monkeypatch)
    recorder = Recorder()
    monkeypatch.setattr(cuda_graphs, "capture", recorder)
    monkeypatch.setattr(cuda_graphs, "supports", lambda device: True)
    yield recorder
    deferred_checks._unread.clear()
