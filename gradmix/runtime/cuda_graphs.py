"""Calls captured in CUDA graphs: a function of tensors that the host starts by one launch.

A selection consists of a few dozen small kernels, whose launches take longer than their work on the GPU. They are
captured when arguments have the same shapes for the second time, and replayed by one launch; what comes once, as the
last batch of an epoch or every size of a buffer that grows, is called. A graph reads its arguments from memory of its
own and writes its results there: arguments are copied in and results are copied out in every call, in one launch
each. No version shows whether an argument has changed: a graph of the user's, ``.data`` and collectives write it
without a new one. Parameters are not copied; a graph reads them where they are.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradmix.runtime.deferred_checks import can_sync

Inputs: TypeAlias = "tuple[Any, ...]"
"""Arguments: tensors and floats, which may change from call to call; tuples and dataclasses of arguments; any other
object is constant in the captured graph."""

WARM_UPS = 3
"""Calls before a capture, in which libraries allocate memory and kernels are compiled."""

GRAPHS = 16
"""Largest number of graphs kept, each with its memory."""

IDLE = 1000
"""Calls after which a graph that was not replayed gives its place to another shape; till then others are called. So
more shapes than places, taken in turn, do not have each other captured anew: that takes as long as many steps."""

SHAPES = 256
"""Number of shapes remembered that have come once, and of those that could not be captured."""


def call(function: Callable[..., Any], inputs: Inputs) -> Any:
    """Call the function; :class:`Graphs` is the captured form."""
    return function(*inputs)


def supports(device: torch.device) -> bool:
    """Whether calls on ``device`` can be captured now: not on a CPU, nor while values are read or a user captures."""
    return device.type == "cuda" and not can_sync(device) and not torch.cuda.is_current_stream_capturing()


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
    """Runs functions by captured graphs, one for each function and shapes, strides and dtypes of its arguments.

    A copy, also by pickle, has no graphs yet.

    Args:
        settings: returns what else the functions depend on; None: nothing. Torch's precision of products is known.
    """

    def __init__(self, settings: Callable[[], Hashable] | None = None) -> None:
        self._settings = settings
        self._kept: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._once: OrderedDict[Hashable, None] = OrderedDict()
        self._failed: OrderedDict[Hashable, None] = OrderedDict()
        self._calls = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._settings,)

    def __call__(self, function: Callable[..., Any], inputs: Inputs) -> Any:
        """Return what ``function(*inputs)`` returns, its tensors new ones, without a record of autograd.

        Args:
            function: hashable; the host never waits in it, and its result, a tuple of tensors, None and such tuples,
                depends on its arguments and the settings alone.
            inputs: arguments. If their tensors are not on one device that captures, the function is called. It receives
                floats as scalar float64 tensors while it is captured.
        """
        leaves: list[Tensor | float] = []
        shape = _shape_of(inputs, leaves, {})
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
        with torch.inference_mode(False), torch.no_grad():
            if len(devices) == 1 and supports(*devices):
                precision = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
                settings = precision if self._settings is None else (*precision, self._settings())
                key = (function, shape, settings, *(_kind(leaf) for leaf in leaves))
                with self._lock:
                    graph = self._graph(key, function, shape, leaves)
                    if graph is not None:
                        return graph(leaves)
            return function(*inputs)

    def _graph(
        self, key: Hashable, function: Callable[..., Any], shape: Any, leaves: list[Tensor | float]
    ) -> _Graph | None:
        """Return the graph of a shape, captured now if it comes again and there is room; None: it is to be called."""
        self._calls += 1
        graph = self._kept.get(key)
        if graph is None and key not in self._failed and not _remember(self._once, key) and self._has_room():
            try:
                graph = _Graph(function, shape, leaves)
            except Exception as error:  # of any library; the call that follows raises what is wrong with the function
                _remember(self._failed, key)
                line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                reason = f"a selection was not captured in a CUDA graph ({line}); its calls are made"
                warnings.warn(reason, RuntimeWarning, stacklevel=2)
        if graph is not None:
            self._kept[key] = graph
            self._kept.move_to_end(key)
            graph.used = self._calls
        return graph

    def _has_room(self) -> bool:
        """Whether there is a place for another graph, after those that are of no use any more are dropped."""
        for key in [key for key, graph in self._kept.items() if graph.is_stale()]:
            del self._kept[key]
        if len(self._kept) < GRAPHS:
            return True
        oldest = next(iter(self._kept))
        if self._calls - self._kept[oldest].used < IDLE:
            return False
        del self._kept[oldest]
        return True


def _remember(keys: OrderedDict[Hashable, None], key: Hashable) -> bool:
    """Whether a key is new; it is remembered."""
    new = key not in keys
    keys[key] = None
    keys.move_to_end(key)
    if len(keys) > SHAPES:
        keys.popitem(last=False)
    return new


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


def _kind(value: Tensor | float) -> tuple[Hashable, ...]:
    if not isinstance(value, Tensor):
        return (float,)
    kind = value.device, value.dtype, value.shape, value.stride()
    return (*kind, value.data_ptr()) if _is_read_in_place(value) else kind


def _is_read_in_place(value: Tensor) -> bool:
    """Whether a graph reads a tensor where it is: a parameter, which an optimiser writes in place."""
    return type(value) is nn.Parameter


class _Graph:
    """One captured call.

    Attributes:
        used: number of the call that replayed it last.
    """

    def __init__(self, function: Callable[..., Any], shape: Any, leaves: list[Tensor | float]) -> None:
        self.used = 0
        self._device = next(value.device for value in leaves if isinstance(value, Tensor))
        self._stream: torch.cuda.Stream | None = None
        self._own = [_own(value, self._device) for value in leaves]
        # Where the arguments that are copied go, and as what.
        self._copied = [
            (at, _as_words(own) if isinstance(value, Tensor) else None)
            for at, (own, value) in enumerate(zip(self._own, leaves, strict=True))
            if not (isinstance(value, Tensor) and _is_read_in_place(value))
        ]
        self._parameters = [
            weakref.ref(value) for value in leaves if isinstance(value, Tensor) and _is_read_in_place(value)
        ]

        def run() -> tuple[Any, list[_Result]]:
            found: list[Tensor | float] = []
            form = _shape_of(function(*_fill(shape, self._own)), found, {})
            return form, [_Result.of(value) for value in found if isinstance(value, Tensor)]

        self._replay, (self._form, self._results) = capture(run, self._device)

    def is_stale(self) -> bool:
        """Whether a parameter that it reads is gone, as of a head that was replaced."""
        return any(parameter() is None for parameter in self._parameters)

    def __call__(self, leaves: list[Tensor | float]) -> Any:
        self._stream = _follow(self._stream, self._device)
        own, given = [], []
        for at, words in self._copied:
            value = leaves[at]
            if not isinstance(value, Tensor):
                self._own[at].fill_(value)
            elif words is None or (others := _as_words(value)) is None:
                own.append(self._own[at])
                given.append(value)
            else:
                own.append(words)
                given.append(others)
        _copy(own, given)
        self._replay()
        new = [torch.empty_like(result.words) for result in self._results]
        _copy(new, [result.words for result in self._results])
        return _fill(self._form, [result.read(words) for result, words in zip(self._results, new, strict=True)])


_WORD = 4
"""Bytes of a word, as which tensors of any dtype are copied together."""


def _as_words(value: Tensor) -> Tensor | None:
    """Return the tensor's memory as int32 numbers, (K,); None if it has gaps, or does not consist of whole words."""
    size = value.element_size()
    if not value.is_contiguous() or value.is_conj() or value.is_neg():
        return None
    if value.numel() * size % _WORD or value.storage_offset() * size % _WORD or value.data_ptr() % _WORD:
        return None
    return value.detach().as_strided((value.numel(),), (1,)).view(torch.int32)


@dataclass(frozen=True)
class _Result:
    """A result in a graph's memory.

    Attributes:
        words: its memory, (K,) int32; the last number may be longer than the result.
        dtype, shape: of the result.
    """

    words: Tensor
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, value: Tensor) -> _Result:
        """Return the result that ``value`` is, copied where its memory is no whole number of words."""
        words = _as_words(value)
        if words is None:
            size = -(-value.numel() * value.element_size() // _WORD)
            words = torch.zeros(size, dtype=torch.int32, device=value.device)
            words.view(value.dtype)[: value.numel()].copy_(value.reshape(-1))
        return cls(words, value.dtype, value.shape)

    def read(self, words: Tensor) -> Tensor:
        """Return the result that a copy of the words holds: a tensor of its own, no view."""
        result = torch.empty(0, dtype=self.dtype, device=words.device)
        result.set_(words.untyped_storage(), 0, self.shape)  # type: ignore[call-overload]
        return result


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
