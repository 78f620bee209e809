"""Calls captured in CUDA graphs: a function of tensors that the host starts by one launch.

A selection consists of a few dozen small kernels, whose launches take longer than their work on the GPU. They are
captured once for each shape of the arguments, and replayed by one launch. A graph reads its arguments from memory of
its own and writes its results there: arguments are copied in, unless they are the unchanged tensors of the last call,
and results are copied out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = "tuple[Any, ...]"
"""Arguments: tensors and floats, which may change from call to call; tuples and dataclasses of arguments; any other
object is constant in the captured graph."""

WARM_UPS = 3
"""Calls before a capture, in which libraries allocate memory and kernels are compiled."""

GRAPHS = 8
"""Largest number of graphs kept, each with its memory; the least recently used one is dropped first."""


def call(function: Callable[..., Any], inputs: Inputs) -> Any:
    """Call the function; :class:`Graphs` is the captured form."""
    return function(*inputs)


def capture(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Return a function that replays ``function``, and the results, which every replay overwrites."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Work of other threads, such as a loader that pins memory, is no part of the capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = function()
    return graph.replay, results


class Graphs:
    """Runs functions by captured graphs, one for each function and shapes, strides and dtypes of its arguments."""

    def __init__(self) -> None:
        self._kept: OrderedDict[object, _Graph] = OrderedDict()

    def supports(self, device: torch.device) -> bool:
        """Whether there are graphs on ``device``."""
        return device.type == "cuda"

    def __call__(self, function: Callable[..., Any], inputs: Inputs) -> Any:
        """Return what ``function(*inputs)`` returns, its tensors new ones.

        Args:
            function: hashable; the host never waits in it, and its result, a NamedTuple of tensors or None, depends on
                its arguments alone.
            inputs: arguments whose tensors are on one CUDA device. The function receives floats as scalar float64
                tensors.
        """
        leaves: list[Tensor | float] = []
        shape = _shape_of(inputs, leaves)
        key = (function, shape, *(_kind(leaf) for leaf in leaves))
        graph = self._kept.pop(key, None) or _Graph(function, shape, leaves)
        self._kept[key] = graph
        if len(self._kept) > GRAPHS:
            self._kept.popitem(last=False)
        return graph(leaves)


_LEAF = object()
"""Stands for a tensor or a float in the shape of arguments."""


def _shape_of(value: Any, leaves: list[Tensor | float]) -> Any:
    """Return the arguments with a placeholder for each tensor and float, which are appended to ``leaves``."""
    if isinstance(value, (Tensor, float)):
        leaves.append(value)
        return _LEAF
    if isinstance(value, tuple):
        return type(value), tuple(_shape_of(part, leaves) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(_shape_of(getattr(value, part.name), leaves) for part in fields(value))
    return value


def _fill(shape: Any, leaves: Iterator[Tensor]) -> Any:
    """Return the arguments of a shape with tensors in place of the placeholders."""
    if shape is _LEAF:
        return next(leaves)
    if not isinstance(shape, tuple):
        return shape
    kind, parts = shape
    values = [_fill(part, leaves) for part in parts]
    return tuple(values) if kind is tuple else kind(*values)


def _kind(value: Tensor | float) -> object:
    return (value.device, value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else float


class _Graph:
    """One captured call."""

    def __init__(self, function: Callable[..., Any], shape: Any, leaves: list[Tensor | float]) -> None:
        device = next(value.device for value in leaves if isinstance(value, Tensor))
        self._own = [
            value.clone() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)
            for value in leaves
        ]
        # The source of each copy with its version; the tensor is kept, so that no other one gets its memory.
        self._source: list[tuple[Tensor, int] | None] = [None] * len(leaves)
        self._replay, self._results = capture(lambda: function(*_fill(shape, iter(self._own))), device)

    def __call__(self, leaves: list[Tensor | float]) -> Any:
        for k, (own, value) in enumerate(zip(self._own, leaves, strict=True)):
            if not isinstance(value, Tensor):
                own.fill_(value)
                continue
            state = None if value.is_inference() else (value, value._version)
            known = self._source[k]
            if state is None or known is None or known[0] is not value or known[1] != state[1]:
                own.copy_(value)
                self._source[k] = state
        self._replay()
        return type(self._results)(*(value if value is None else value.clone() for value in self._results))
