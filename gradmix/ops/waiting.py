"""Checks of values that do not make the host wait for a GPU.

To look at a value on a GPU the host must wait until everything queued before it is done, and the GPU is idle until it
gets new work: a check for NaN would cost more than the selection it guards. So where a look is not free, a check only
queues the question. What it found is read at the beginning of the next call, when the answer has long been there, and
an error is raised then, as CUDA's own errors are. In the step in between a NaN helps nobody, as its alignments are not
helpful, and labels are held in their range.

On the CPU a check looks at once. ``GRADMIX_CHECKS=now`` makes it look at once everywhere, to find the line at fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "GRADMIX_CHECKS"

DEVICES = frozenset({"cuda"})
"""Types of devices that run behind the host."""

Consequence = Callable[[int], "Exception | None"]
"""From the first row found bad: the error to raise, or None where the finding has been dealt with."""


def look_is_free(device: torch.device) -> bool:
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
    """Flags on their way to the host."""

    flags: Tensor
    event: torch.cuda.Event | None
    consequences: list[Consequence]


_asking: list[tuple[Tensor, Consequence]] | None = None
_underway: list[_Answers] = []


def require(bad: Tensor, consequence: Consequence) -> None:
    """Raise ``consequence(first bad row)`` if any row is bad: at once where a look is free, else with the next call.

    Args:
        bad: (N,) bool.
        consequence: called with the first row that is bad.
    """
    if bad.numel() == 0:
        return
    if look_is_free(bad.device) or _asking is None:
        if bad.any():
            error = consequence(int(bad.nonzero()[0]))
            if error is not None:
                raise error
        return
    _asking.append((torch.where(bad.any(), bad.to(torch.uint8).argmax(), -1), consequence))


@contextmanager
def later() -> Iterator[None]:
    """Around one call: raise what earlier calls found, and let the next one raise what this one finds.

    A body that raises leaves no question behind.
    """
    global _asking
    settle()
    before, _asking = _asking, []
    try:
        yield
        asked = _asking
    finally:
        _asking = before
    if asked:
        _send(torch.stack([first for first, _ in asked]), [consequence for _, consequence in asked])


def _send(flags: Tensor, consequences: list[Consequence]) -> None:
    """Have ``flags`` (K,), first bad rows or -1, copied to the host without waiting."""
    if not flags.is_cuda:
        _underway.append(_Answers(flags, None, consequences))
        return
    host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    host.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flags.device))
    _underway.append(_Answers(host, event, consequences))


def settle() -> None:
    """Draw the consequences of what earlier calls found.

    It waits for the copy of the flags, which was queued before everything that came after that call.

    Raises:
        ValueError: an earlier call was given what it should not have been; the message names it.
    """
    answers = _underway[:]
    _underway.clear()
    for answer in answers:
        if answer.event is not None:
            answer.event.synchronize()
        for row, consequence in zip(answer.flags.tolist(), answer.consequences, strict=True):
            error = consequence(row) if row >= 0 else None
            if error is not None:
                raise type(error)(f"{error} (found on the GPU in an earlier call; GRADMIX_CHECKS=now raises at once)")
