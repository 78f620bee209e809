"""Checks of values that do not make the host wait for a GPU.

To read a value on a GPU the host must wait until all work queued before is done, and the GPU is idle until it gets new
work: a check for NaN would cost more than the selection. Therefore a check on a GPU is only queued. The next call reads
its result, which is available by then, and raises the error, as CUDA does with its own errors. In the step in between,
mixtures with a NaN count as not helpful, and labels are clamped to their range.

The next call is the next one for the same model in the same thread; no other thread gets the error. If that thread has
ended, the next call for the model in any thread gets it. The results for a model that no longer exists are dropped.

On the CPU a check reads values at once. ``GRADMIX_CHECKS=now`` makes it do so everywhere, to find the line at fault.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

ENVIRONMENT_VARIABLE = "GRADMIX_CHECKS"

DEVICES = frozenset({"cuda"})
"""Types of devices that run asynchronously to the host."""

Consequence = Callable[[int], "Exception | None"]
"""Maps the index of the first bad sample to the error to raise, or to None if the result has been handled."""

_Check = tuple[Tensor, Consequence]
"""The bad samples, (N,) bool, and what follows."""


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
    """Flags that are being copied to the host, each with its check's place and consequence; the thread of the call."""

    flags: Tensor
    event: torch.cuda.Event | None
    consequences: list[tuple[int, Consequence]]
    thread: threading.Thread = field(default_factory=threading.current_thread)


class _Pending(threading.local):
    """The checks of the call that this thread is in; None: it is in no call."""

    checks: list[_Check] | None = None


_pending = _Pending()
_unread: weakref.WeakKeyDictionary[nn.Module, list[_Results]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def check_samples(bad: Tensor, consequence: Consequence) -> None:
    """Raise ``consequence(first bad sample)`` if any is bad: at once, or in the next call inside :func:`defer_checks`.

    Args:
        bad: (N,) bool.
        consequence: called with the first sample that is bad; it must not keep the model alive.
    """
    if bad.numel() == 0:
        return
    if can_sync(bad.device) or _pending.checks is None:
        if bad.any():
            error = consequence(int(bad.nonzero()[0]))
            if error is not None:
                raise error
        return
    _pending.checks.append((bad, consequence))


@contextmanager
def defer_checks(model: nn.Module) -> Iterator[None]:
    """Raise the errors of earlier calls for this model, and leave those of this call's checks to the next one.

    If the body raises, its checks are dropped.
    """
    raise_deferred(model)
    before, _pending.checks = _pending.checks, []
    try:
        yield
        checks = _pending.checks
    finally:
        _pending.checks = before
    if checks:
        results = _send(*_first_bad(checks))
        with _lock:
            _unread.setdefault(model, []).append(results)


def _first_bad(checks: list[_Check]) -> tuple[Tensor, list[tuple[int, Consequence]]]:
    """Return the first bad sample of each check or -1, (K,), and the place of each check with its consequence.

    Checks of as many samples are computed together: on a GPU it is the number of calls that takes time.
    """
    by_size: dict[int, list[int]] = {}
    for place, (bad, _) in enumerate(checks):
        by_size.setdefault(bad.numel(), []).append(place)
    flags = []
    for places in by_size.values():
        bad = torch.stack([checks[place][0].flatten() for place in places])
        flags.append(torch.where(bad.any(1), bad.to(torch.uint8).argmax(1), -1))
    order = [place for places in by_size.values() for place in places]
    return torch.cat(flags) if len(flags) > 1 else flags[0], [(place, checks[place][1]) for place in order]


def _send(flags: Tensor, consequences: list[tuple[int, Consequence]]) -> _Results:
    """Copy ``flags`` (K,), the first bad sample of each check or -1, to the host without a wait."""
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
        found_by_place = zip(result.consequences, result.flags.tolist(), strict=True)
        for (_, consequence), sample in sorted(found_by_place, key=lambda check: check[0][0]):
            error = consequence(sample) if sample >= 0 else None
            if error is not None:
                raise type(error)(f"{error} (found on the GPU in an earlier call; GRADMIX_CHECKS=now raises at once)")
