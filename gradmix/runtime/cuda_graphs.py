"""Calls captured in CUDA graphs: a function of tensors that the host starts by one launch.

A selection consists of a few dozen small kernels, whose launches take longer than their work on the GPU. They are
captured when arguments have the same shapes for the second time, and replayed by one launch; what comes once, as the
last batch of an epoch or every size of a buffer that grows, is called. A graph reads its arguments from memory of
its own and writes its results there: arguments are copied in, and results are copied out, in one launch for each dtype.
Not copied are parameters, which a graph reads where they are, and kept tensors that have not changed since.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = "tuple[Any, ...]"
"""Arguments: tensors and floats, which may change from call to call; tuples and dataclasses of arguments; any other
object is constant in the captured graph."""

WARM_UPS = 3
"""Calls before a capture, in which libraries allocate memory and kernels are compiled."""

GRAPHS = 16
"""Largest number of graphs kept, each with its memory; the least recently used one is dropped first."""

SHAPES = 256
"""Number of shapes remembered that have come once."""


def call(function: Callable[..., Any], inputs: Inputs, kept: Inputs = ()) -> Any:
    """Call the function; :class:`Graphs` is the captured form."""
    return function(*inputs, *kept)


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
        self._once: OrderedDict[object, None] = OrderedDict()

    def supports(self, device: torch.device) -> bool:
        """Whether there are graphs on ``device``."""
        return device.type == "cuda"

    def __call__(self, function: Callable[..., Any], inputs: Inputs, kept: Inputs = ()) -> Any:
        """Return what ``function(*inputs, *kept)`` returns, its tensors new ones.

        Args:
            function: hashable; the host never waits in it, and its result, a NamedTuple of tensors or None, depends on
                its arguments alone.
            inputs: arguments whose tensors are on one CUDA device. The function receives floats as scalar float64
                tensors while it is captured.
            kept: further arguments, whose tensors are written by this library and PyTorch's own operators alone: what
                has the same version as in the last call is taken to be unchanged. Others are copied in every call, as
                writes by a graph of the user's or through ``.data`` raise no version.
        """
        leaves: list[Tensor | float] = []
        given = _shape_of(inputs, leaves, {})
        copied = len(leaves)
        shape = given, _shape_of(kept, leaves, {})
        key = (function, shape, *(_kind(leaf) for leaf in leaves))
        graph = self._kept.pop(key, None)
        if graph is None and not self._comes_again(key):
            return function(*inputs, *kept)
        graph = graph or _Graph(function, shape, leaves, copied)
        self._kept[key] = graph
        if len(self._kept) > GRAPHS:
            self._kept.popitem(last=False)
        return graph(leaves)

    def _comes_again(self, key: object) -> bool:
        """Whether a shape has come before; if not, it is remembered."""
        if key in self._once:
            del self._once[key]
            return True
        self._once[key] = None
        if len(self._once) > SHAPES:
            self._once.popitem(last=False)
        return False


@dataclass(frozen=True)
class _Leaf:
    """Stands for a tensor or a float in the shape of arguments: its number; the same memory given twice has one."""

    number: int


def _shape_of(value: Any, leaves: list[Tensor | float], known: dict[object, _Leaf]) -> Any:
    """Return the arguments with a placeholder for each tensor and float, which are appended to ``leaves``.

    Args:
        value: the arguments.
        leaves: those of other arguments.
        known: placeholders of tensors by their memory.
    """
    if isinstance(value, (Tensor, float)):
        memory = (value.data_ptr(), *_kind(value)) if isinstance(value, Tensor) else object()
        if memory not in known:
            known[memory] = _Leaf(len(leaves))
            leaves.append(value)
        return known[memory]
    if isinstance(value, tuple):
        return type(value), tuple(_shape_of(part, leaves, known) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(_shape_of(getattr(value, part.name), leaves, known) for part in fields(value))
    return value


def _fill(shape: Any, own: Sequence[Tensor]) -> Any:
    """Return the arguments of a shape with tensors in place of the placeholders."""
    if isinstance(shape, _Leaf):
        return own[shape.number]
    if not isinstance(shape, tuple):
        return shape
    kind, parts = shape
    values = [_fill(part, own) for part in parts]
    return tuple(values) if kind is tuple else kind(*values)


def _kind(value: Tensor | float) -> tuple[object, ...]:
    if not isinstance(value, Tensor):
        return (float,)
    kind = value.device, value.dtype, value.shape, value.stride()
    return (*kind, value.data_ptr()) if _is_read_in_place(value) else kind


def _is_read_in_place(value: Tensor) -> bool:
    """Whether a graph reads a tensor where it is: a parameter, which an optimiser writes in place."""
    return type(value) is nn.Parameter


class _Graph:
    """One captured call."""

    def __init__(self, function: Callable[..., Any], shape: Any, leaves: list[Tensor | float], copied: int) -> None:
        device = next(value.device for value in leaves if isinstance(value, Tensor))
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._own = [_own(value, device) for value in leaves]
        # The source of each copy that may be left out, with its version; it is kept, so that no other tensor gets its
        # memory.
        self._source: list[tuple[Tensor, int] | None] = [None] * len(leaves)
        self._copied = copied

        def run() -> Any:
            inputs, kept = (_fill(part, self._own) for part in shape)
            return function(*inputs, *kept)

        self._replay, self._results = capture(run, device)

    def __call__(self, leaves: list[Tensor | float]) -> Any:
        self._stream = _follow(self._stream, self._device)
        own, given = [], []
        for k, value in enumerate(leaves):
            if not isinstance(value, Tensor):
                self._own[k].fill_(value)
            elif not (_is_read_in_place(value) or self._is_known(k, value)):
                own.append(self._own[k])
                given.append(value)
        _copy(own, given)
        self._replay()
        found = [value for value in self._results if value is not None]
        new = [torch.empty_like(value) for value in found]
        _copy(new, found)
        copies = iter(new)
        return type(self._results)(*(None if value is None else next(copies) for value in self._results))

    def _is_known(self, k: int, value: Tensor) -> bool:
        """Whether argument ``k`` is kept and unchanged since the last call, which is noted for the next one."""
        if k < self._copied or value.is_inference():
            return False
        before, self._source[k] = self._source[k], (value, value._version)
        return before is not None and before[0] is value and before[1] == value._version


def _follow(before: torch.cuda.Stream | None, device: torch.device) -> torch.cuda.Stream | None:
    """Return the current stream, after having it wait for the one of the last call: both use the graph's memory."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.current_stream(device)
    if before is not None and before != stream:
        stream.wait_stream(before)
    return stream


def _own(value: Tensor | float, device: torch.device) -> Tensor:
    """Return the memory from which a graph reads an argument."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float64, device=device)
    return value.detach() if _is_read_in_place(value) else value.detach().clone()


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, in one launch for each dtype."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        own, given = by_dtype.setdefault(target.dtype, ([], []))
        own.append(target)
        given.append(source)
    for own, given in by_dtype.values():
        torch._foreach_copy_(own, given)
