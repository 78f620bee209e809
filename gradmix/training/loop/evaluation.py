"""Scoring a model on the test samples of a stream's tasks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradmix.model.head import logits_of
from gradmix.model.unchanged import leave_unchanged
from gradmix.runtime.collectives import Group, all_reduce_sum, local_share
from gradmix.training.loop.divergence import DivergedError
from gradmix.training.loop.reading import Reading
from gradmix.training.streams import TaskStream

EVALUATION_SAMPLES = 1024
"""Samples forwarded at a time when scoring; a quarter of it where they are read from files: images may be large."""


def evaluate(
    model: nn.Module,
    stream: TaskStream,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    prepared: Callable[[Tensor], Tensor] = lambda x: x,
    reading: Reading | None = None,
    group: Group = None,
) -> list[float]:
    """Accuracy on the test samples of every task, future ones included, among all classes; each in [0, 1].

    Args:
        model: the classifier.
        stream: the stream.
        device: where the model is.
        autocast: makes the context of forward passes.
        prepared: makes samples as they are kept, on the device, into the model's input.
        reading: how samples are read from files; None: by this process. Damaged ones that are left out count as wrong.
        group: processes that forward a share of the samples each; all get the same accuracies.

    Raises:
        DivergedError: the largest output for a sample is a NaN or an infinity.
    """
    reading = reading or Reading(0, skip_damaged=False, device=device)
    samples = EVALUATION_SAMPLES // 4 if stream.is_read else EVALUATION_SAMPLES
    # The last entry counts the samples without a finite prediction. Classes that a model masks by -inf do not count.
    correct = torch.zeros(len(stream.tasks) + 1, dtype=torch.int64, device=device)
    tests = [task.test for task in stream.tasks]
    if group is not None:
        tests = [test.take(torch.tensor(local_share(len(test), group), dtype=torch.int64)) for test in tests]
    with leave_unchanged(model), autocast():
        for task, x, y in reading.batches_of(tests, samples):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            logits = logits_of(model(prepared(x)))
            predicted = logits.argmax(1, keepdim=True)
            correct[task] += (predicted.squeeze(1) == y).sum()
            correct[-1] += (~torch.isfinite(logits.gather(1, predicted))).sum()
    (total,) = all_reduce_sum([correct], group)
    *right, unclear = total.tolist()
    if unclear:
        raise DivergedError(f"the model's outputs for {unclear} test samples are not finite")
    return [count / len(task.test) for count, task in zip(right, stream.tasks, strict=True)]
