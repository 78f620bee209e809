"""Checks of values that do not make the host wait for a GPU.

To look at a value on a GPU the host must wait until everything queued before it is done, and the GPU is idle until it
gets new work: a check for NaN would cost more than the selection it guards. So where a look is not free, a check only
queues the question. What it found is read at the beginning of the next call, when the answer has long been there, and
an error is raised then, as CUDA's own errors are. In the step in between a NaN helps nobody, as its alignments are not
helpful, and labels are held in their range.

The next call is the next one for the same model by the same thread: nobody else is told of a finding. If that thread
has ended, the next call for the model by any other is told; what was found for a model that is gone is dropped with it.

On the CPU a check looks at once. ``GRADMIX_CHECKS=now`` makes it look at once everywhere, to find the line at fault.
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
"""Types of devices that run behind the host."""

Consequence = Callable[[int], "Exception | None"]
"""From the first row found bad: the error to raise, or None where the finding has been dealt with."""


def can_sync(device: torch.device) -> bool:
    """Whether the host may look at values on ``device`` at once: on the CPU, and everywhere by ``GRADMIX_CHECKS=now``.

    Raises:
        ValueError: the environment variable holds something else than ``now`` or ``later``.
    """
    setting = os.environ.get(ENVIRONMENT_VARIABLE, "later")
    if setting not in ("now", "later"):
        raise ValueError(f"environment variable {ENVIRONMENT_VARIABLE}: got {setting!r}, expected 'now' or 'later'")
    if device.type not in DEVICES:
        return True
    # While a graph is captured no setting makes it possible to look.
    return setting == "now" and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


@dataclass(frozen=True)
class _Answers:
    """Flags on their way to the host, and the thread whose call asked."""

    flags: Tensor
    event: torch.cuda.Event | None
    consequences: list[Consequence]
    thread: threading.Thread = field(default_factory=threading.current_thread)


class _Asking(threading.local):
    """The questions of the call that this thread is in; None: of no call."""

    questions: list[tuple[Tensor, Consequence]] | None = None


_asking = _Asking()
_underway: weakref.WeakKeyDictionary[nn.Module, list[_Answers]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def check_samples(bad: Tensor, consequence: Consequence) -> None:
    """Raise ``consequence(first bad row)`` if any row is bad: at once where a look is free, else with the next call.

    Args:
        bad: (N,) bool.
        consequence: called with the first row that is bad; it must not keep the model alive.
    """
    if bad.numel() == 0:
        return
    if can_sync(bad.device) or _asking.questions is None:
        if bad.any():
            error = consequence(int(bad.nonzero()[0]))
            if error is not None:
                raise error
        return
    _asking.questions.append((torch.where(bad.any(), bad.to(torch.uint8).argmax(), -1), consequence))


@contextmanager
def defer_checks(model: nn.Module) -> Iterator[None]:
    """Around one call: raise what earlier calls for this model found, and let the next one raise what this one finds.

    A body that raises leaves no question behind.
    """
    raise_deferred(model)
    before, _asking.questions = _asking.questions, []
    try:
        yield
        asked = _asking.questions
    finally:
        _asking.questions = before
    if asked:
        answers = _send(torch.stack([first for first, _ in asked]), [consequence for _, consequence in asked])
        with _lock:
            _underway.setdefault(model, []).append(answers)


def _send(flags: Tensor, consequences: list[Consequence]) -> _Answers:
    """``flags`` (K,), first bad rows or -1, being copied to the host without waiting."""
    if not flags.is_cuda:
        return _Answers(flags, None, consequences)
    host = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=True)
    host.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flags.device))
    return _Answers(host, event, consequences)


def raise_deferred(model: nn.Module | None = None) -> None:
    """Draw the consequences of what earlier calls of this thread, or of threads that have ended, found.

    It waits for the copy of the flags, which was queued before everything that came after that call.

    Args:
        model: whose; None: any.

    Raises:
        ValueError: an earlier call was given what it should not have been; the message names it.
    """
    mine = threading.current_thread()
    found: list[_Answers] = []
    with _lock:
        for asked in list(_underway) if model is None else [model]:
            answers = _underway.pop(asked, [])
            told = [answer.thread is mine or not answer.thread.is_alive() for answer in answers]
            found += [answer for answer, own in zip(answers, told, strict=True) if own]
            if not all(told):
                _underway[asked] = [answer for answer, own in zip(answers, told, strict=True) if not own]
    for answer in found:
        if answer.event is not None:
            answer.event.synchronize()
        for row, consequence in zip(answer.flags.tolist(), answer.consequences, strict=True):
            error = consequence(row) if row >= 0 else None
            if error is not None:
                raise type(error)(f"{error} (found on the GPU in an earlier call; GRADMIX_CHECKS=now raises at once)")
