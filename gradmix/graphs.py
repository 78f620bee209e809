"""Calls captured in CUDA graphs: a function of tensors, launched as a whole.

A selection is a few dozen small kernels, whose launches take the host longer than the GPU takes for the work. Captured
once for each shape of its arguments, they are replayed by one launch. A graph reads its arguments from, and leaves its
results in, memory of its own: arguments are copied in (those that are the very tensors of the last call are not) and
results copied out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = "tuple[Tensor | float | None, ...]"
"""Arguments: tensors, which may change from call to call; numbers, which may too; None, which may not."""

WARM_UPS = 3
"""Calls before a capture, in which libraries allocate and kernels are compiled."""

GRAPHS = 8
"""Graphs kept at a time, each with its memory; the one that was not used for the longest is dropped first."""


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device`` of a tensor that was made for it, not waited for."""
    if device.type == "cuda" and host.device.type == "cpu":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def call(function: Callable[..., Any], inputs: Inputs) -> Any:
    """The call itself, of which :class:`Graphs` is the captured form."""
    return function(*inputs)


def capture(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """A function that replays ``function``, and the results that every replay overwrites."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile, such as a loader that pins memory, is none of the capture's business.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = function()
    return graph.replay, results


class Graphs:
    """Runs functions by captured graphs, one for each function and shapes, strides and dtypes of its arguments."""

    def __init__(self) -> None:
        self._kept: OrderedDict[object, _Graph] = OrderedDict()

    def serve(self, device: torch.device) -> bool:
        """Whether there are graphs on ``device``."""
        return device.type == "cuda"

    def __call__(self, function: Callable[..., Any], inputs: Inputs) -> Any:
        """What ``function(*inputs)`` returns, its tensors new ones.

        Args:
            function: hashable; it makes the host wait for nothing, what it returns depends on its arguments alone, and
                is a NamedTuple of tensors or None.
            inputs: tensors on one CUDA device, numbers, or None. The function gets numbers as scalar float64 tensors.
        """
        key = (function, *(_kind(value) for value in inputs))
        graph = self._kept.pop(key, None) or _Graph(function, inputs)
        self._kept[key] = graph
        if len(self._kept) > GRAPHS:
            self._kept.popitem(last=False)
        return graph(inputs)


def _kind(value: Tensor | float | None) -> object:
    if isinstance(value, Tensor):
        return value.device, value.dtype, value.shape, value.stride()
    return None if value is None else float


class _Graph:
    """One captured call."""

    def __init__(self, function: Callable[..., Any], inputs: Inputs) -> None:
        device = next(value.device for value in inputs if isinstance(value, Tensor))
        self._own = [
            value.clone()
            if isinstance(value, Tensor)
            else None
            if value is None
            else torch.full((), value, dtype=torch.float64, device=device)
            for value in inputs
        ]
        # What each was copied from, and in which state; the tensor is held, so that its place is not taken by another.
        self._source: list[tuple[Tensor, int] | None] = [None] * len(inputs)
        self._replay, self._results = capture(lambda: function(*self._own), device)

    def __call__(self, inputs: Inputs) -> Any:
        for k, (own, value) in enumerate(zip(self._own, inputs, strict=True)):
            if own is None:
                continue
            if not isinstance(value, Tensor):
                assert value is not None
                own.fill_(value)
                continue
            state = None if value.is_inference() else (value, value._version)
            known = self._source[k]
            if state is None or known is None or known[0] is not value or known[1] != state[1]:
                own.copy_(value)
                self._source[k] = state
        self._replay()
        return type(self._results)(*(value if value is None else value.clone() for value in self._results))
