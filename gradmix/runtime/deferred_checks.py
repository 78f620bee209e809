"""Checks of values that do not make the host wait for a GPU.

To read a value on a GPU the host must wait until all work queued before is done, and the GPU is idle until it gets new
work: a check for NaN would cost more than the selection. Therefore a check on a GPU is only queued. The next call reads
its result, which is available by then, and raises the error, as CUDA does with its own errors. In the step in between,
mixtures with a NaN count as not helpful, and labels are clamped to their range.

The next call is the next one for the same model in the same thread; no other thread gets the error. If that thread has
ended, the next call for the model in any thread gets it. The results for a model that no longer exists are dropped.

If a call has graphs, a check that is given as a function of tensors is computed with others by one captured graph:
together with what the call computes next (``call_with_checks``), or before the next forward pass, which may write what
the checks are of (``begin_pass``).

On the CPU a check reads values at once. ``GRADMIX_CHECKS=now`` makes it do so everywhere, to find the line at fault.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from gradmix.runtime.cuda_graphs import Graphs

ENVIRONMENT_VARIABLE = "GRADMIX_CHECKS"

DEVICES = frozenset({"cuda"})
"""Types of devices that run asynchronously to the host."""

Consequence = Callable[[int], "Exception | None"]
"""Maps the index of the first bad sample to the error to raise, or to None if the result has been handled."""

Find = Callable[..., Tensor]
"""Maps tensors and constants to what is wrong with each sample, (N,): bool, or uint8 with 0 for a good sample. It is a
function of a module: no wait of the host, no other state."""

MOST_COPIED = 1 << 22
"""Elements of a check that a graph is given; one of more is computed at once, in launches of its own.

To copy as many into a graph's memory takes about 15 us on a GPU of 2 TB/s."""

_CODES = 256
"""Of a sample's uint8."""


class _Check(NamedTuple):
    """A check that is due: what computes the bad samples, of what, and what follows for each code from 1 on."""

    find: Find
    inputs: tuple[Any, ...]
    consequences: tuple[Consequence, ...]


def can_sync(device: torch.device) -> bool:
    """Whether the host may read values on ``device``: on the CPU, and everywhere with ``GRADMIX_CHECKS=now``.

    Raises:
        ValueError: the environment variable is neither ``now`` nor ``later``.
    """
    if device.type not in DEVICES:
        return True
    setting = os.environ.get(ENVIRONMENT_VARIABLE, "later")
    if setting not in ("now", "later"):
        raise ValueError(f"environment variable {ENVIRONMENT_VARIABLE}: got {setting!r}, expected 'now' or 'later'")
    # While a graph is captured, values cannot be read with any setting.
    return setting == "now" and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


@dataclass(frozen=True)
class _Results:
    """Flags that are being copied to the host, each with its check's consequences; the thread of the call."""

    flags: Tensor
    event: torch.cuda.Event | None
    consequences: list[tuple[Consequence, ...]]
    thread: threading.Thread = field(default_factory=threading.current_thread)


@dataclass
class _Call:
    """A call in progress.

    Attributes:
        graphs: captures its checks; None: they are calls.
        due: checks that are not computed yet.
        flags: of those that are, see :class:`_Flags`.
        consequences: of the same checks.
        passed: whether a forward pass was made since checks were computed.
    """

    graphs: Graphs | None
    due: list[_Check] = field(default_factory=list)
    flags: list[Tensor] = field(default_factory=list)
    consequences: list[tuple[Consequence, ...]] = field(default_factory=list)
    passed: bool = False

    def compute(self) -> None:
        """Compute the checks that are due."""
        if self.due:
            self.call(_no_result, ())

    def call(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        """Call a function, and compute the checks that are due."""
        if not self.due:
            return function(*inputs) if self.graphs is None else self.graphs(function, inputs)
        due, self.due, self.passed = self.due, [], False
        run = _WithChecks(function, _FirstBad(tuple(check.find for check in due)))
        arguments = inputs, tuple(check.inputs for check in due)
        result, found = run(*arguments) if self.graphs is None else self.graphs(run, arguments)
        self.flags.append(found.flags)
        self.consequences += [check.consequences for check in due]
        return result


class _Present(threading.local):
    """The call that this thread is in; None: it is in no call."""

    call: _Call | None = None


_present = _Present()
_unread: weakref.WeakKeyDictionary[nn.Module, list[_Results]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def check_samples(bad: Tensor, *consequences: Consequence) -> None:
    """Raise ``consequence(first bad sample)`` if any is bad: at once, or in the next call inside :func:`defer_checks`.

    Args:
        bad: (N,) bool; or uint8, with 0 for a good sample.
        consequences: one for each of the codes 1, 2, ... of bad samples, True being 1. It is called with the first
            sample that is bad, and must not keep the model alive.
    """
    check_where(_as_given, (bad,), *consequences)


def check_where(find: Find, inputs: tuple[Any, ...], *consequences: Consequence) -> None:
    """Do as :func:`check_samples` with the samples that a function finds, which a captured graph may compute.

    Args:
        find: the function.
        inputs: its arguments, of which the first is a tensor. They stay as they are until :func:`compute_checks` or
            :func:`call_with_checks`.
        consequences: as :func:`check_samples`, for the codes that the function returns.
    """
    call = _present.call
    if can_sync(inputs[0].device) or call is None:
        bad = find(*inputs)
        if bad.any():
            sample = int(bad.nonzero()[0])
            error = consequences[int(bad[sample]) - 1](sample)
            if error is not None:
                raise error
        return
    if call.graphs is None or _size(inputs) > MOST_COPIED:
        find, inputs = _as_given, (find(*inputs),)
    call.due.append(_Check(find, inputs, consequences))


def compute_checks() -> None:
    """Compute the checks so far, before what they are of is written by their source, or by what restores the model."""
    call = _present.call
    if call is not None and call.graphs is not None:
        call.compute()


def begin_pass() -> None:
    """Compute the checks of the pass before, before a forward pass writes what they are of."""
    call = _present.call
    if call is not None and call.graphs is not None:
        if call.passed:
            call.compute()
        call.passed = True


def call_with_checks(function: Callable[..., Any], inputs: tuple[Any, ...], graphs: Graphs | None) -> Any:
    """Return ``function(*inputs)``, captured in one graph with the checks so far.

    Args:
        function, inputs: as :meth:`gradmix.runtime.cuda_graphs.Graphs.__call__` defines.
        graphs: those of this call of the library; None: nothing is captured.
    """
    if graphs is None:
        return function(*inputs)
    call = _present.call  # None for estimators that wait for the device
    return graphs(function, inputs) if call is None else call.call(function, inputs)


def _no_result() -> tuple[()]:
    return ()


def _size(inputs: tuple[Any, ...]) -> int:
    """Return the number of elements that would be copied; a parameter is read where it is."""
    return sum(v.numel() for v in inputs if isinstance(v, Tensor) and not isinstance(v, nn.Parameter))


def _as_given(bad: Tensor) -> Tensor:
    return bad


@contextmanager
def defer_checks(model: nn.Module, graphs: Graphs | None = None) -> Iterator[None]:
    """Raise the errors of earlier calls for this model, and leave those of this call's checks to the next one.

    If the body raises, its checks are dropped.

    Args:
        model: the model.
        graphs: captures the computation of the checks where it can.
    """
    raise_deferred(model)
    before, call = _present.call, _Call(graphs)
    _present.call = call
    try:
        yield
    finally:
        _present.call = before
    call.compute()
    if call.flags:
        flags = call.flags[0] if len(call.flags) == 1 else torch.cat([f.to(call.flags[0].device) for f in call.flags])
        results = _send(flags, call.consequences)
        with _lock:
            _unread.setdefault(model, []).append(results)


class _Flags(NamedTuple):
    """The first bad sample of each check and its code: sample * :data:`_CODES` + code, code 0 without one; (K,)."""

    flags: Tensor


@dataclass(frozen=True)
class _FirstBad:
    """Computes checks; equal ones are one captured graph.

    Checks of as many samples are computed together: on a GPU it is the number of calls that takes time.
    """

    finds: tuple[Find, ...]

    def __call__(self, *inputs: tuple[Any, ...]) -> _Flags:
        codes = [find(*values) for find, values in zip(self.finds, inputs, strict=True)]
        device = codes[0].device
        by_size: dict[int, list[int]] = {}
        for place, found in enumerate(codes):
            by_size.setdefault(found.numel(), []).append(place)
        flags: dict[int, Tensor] = {}
        for size, places in by_size.items():
            if size == 0:
                none = torch.zeros(len(places), dtype=torch.int64, device=device)
                flags.update(zip(places, none.unbind(), strict=True))
                continue
            together = torch.stack([codes[place].flatten().view(torch.uint8).to(device) for place in places])
            first = (together != 0).view(torch.uint8).argmax(1, keepdim=True)
            packed = torch.add(together.gather(1, first), first, alpha=_CODES)[:, 0]
            flags.update(zip(places, packed.unbind(), strict=True))
        if list(by_size) == [codes[0].numel()] != [0]:
            return _Flags(packed)
        return _Flags(torch.stack([flags[place] for place in range(len(codes))]))


@dataclass(frozen=True)
class _WithChecks:
    """A function and checks, computed together; equal ones are one captured graph."""

    function: Callable[..., Any]
    checks: _FirstBad

    def __call__(self, inputs: tuple[Any, ...], checked: tuple[Any, ...]) -> tuple[Any, _Flags]:
        return self.function(*inputs), self.checks(*checked)


def _send(flags: Tensor, consequences: list[tuple[Consequence, ...]]) -> _Results:
    """Copy the flags of :class:`_Flags` to the host without a wait."""
    if not flags.is_cuda:
        return _Results(flags, None, consequences)
    host = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=True)
    host.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flags.device))
    return _Results(host, event, consequences)


def raise_deferred(model: nn.Module | None = None) -> None:
    """Raise the errors found by checks of earlier calls in this thread, or in threads that have ended.

    The host waits for the copy of the flags, which was queued at the end of those calls.

    Args:
        model: the model of the calls; None: any.

    Raises:
        ValueError: an earlier call was given a wrong value, which the message names.
    """
    own_thread = threading.current_thread()
    found: list[_Results] = []
    with _lock:
        for key in list(_unread) if model is None else [model]:
            results = _unread.pop(key, [])
            own = [result.thread is own_thread or not result.thread.is_alive() for result in results]
            found += [result for result, is_own in zip(results, own, strict=True) if is_own]
            if not all(own):
                _unread[key] = [result for result, is_own in zip(results, own, strict=True) if not is_own]
    for result in found:
        if result.event is not None:
            result.event.synchronize()
        for flag, consequences in zip(result.flags.tolist(), result.consequences, strict=True):
            sample, code = divmod(flag, _CODES)
            error = consequences[code - 1](sample) if code else None
            if error is not None:
                raise type(error)(f"{error} (found on the GPU in an earlier call; GRADMIX_CHECKS=now raises at once)")
