"""Scoring a model on the test rows of a stream's tasks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from gradmix.head import logits_of
from gradmix.probe import untouched
from gradmix.training.benchmarks import TaskStream

EVALUATION_ROWS = 1024
"""Rows forwarded at a time when scoring."""


def evaluate(
    model: nn.Module,
    stream: TaskStream,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[float]:
    """Accuracy on the test rows of every task, future ones included, among all classes; each in [0, 1]."""
    accuracies = []
    with untouched(model), autocast():
        for task in stream.tasks:
            correct = 0
            for x, y in zip(task.test_x.split(EVALUATION_ROWS), task.test_y.split(EVALUATION_ROWS), strict=True):
                correct += int((logits_of(model(x.to(device))).argmax(1) == y.to(device)).sum())
            accuracies.append(correct / len(task.test_y))
    return accuracies
