"""The state that a run keeps between steps: its position in the stream, and its records. Checkpoints hold both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradmix.training.loop.state_checks import require_like, require_number, require_tensor
from gradmix.training.runs.results import AlignmentRecord

_MOST = torch.iinfo(torch.int64).max


@dataclass
class Position:
    """The position of a run.

    Attributes:
        mixed: samples of the current task that found a helpful partner, a scalar on the run's device.
        task: index of the current task.
        epoch: index of the current epoch.
        batches_done: steps done of the current epoch.
        order: (n,) int64, the order of the current epoch's samples; None: the epoch has not begun.
        steps: steps done of the run.
        seen: samples of the current task whose partners were looked for.
    """

    mixed: Tensor
    task: int = 0
    epoch: int = 0
    batches_done: int = 0
    order: Tensor | None = None
    steps: int = 0
    seen: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values and tensors."""
        return {**vars(self), "mixed": int(self.mixed)}

    def check(self, state: Mapping[str, Any], *, tasks: int, epochs: int) -> None:
        """Refuse a state that is no position in a run of so many tasks and epochs; the order is checked elsewhere."""
        highest = {"task": tasks - 1, "epoch": epochs - 1}
        for name in ("task", "epoch", "batches_done", "steps", "mixed", "seen"):
            require_number(state[name], 0, highest.get(name, _MOST), name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state of :meth:`state_dict`."""
        for name in vars(self).keys() - {"mixed"}:
            setattr(self, name, state[name])
        self.mixed.fill_(state["mixed"])


@dataclass
class Records:
    """The measurements of a run.

    Attributes:
        tasks: number of tasks T.
        accuracy: (T, T), see :class:`~gradmix.training.runs.results.RunResult`; as are the others.
        mixed_share: one share for each task.
        alignments: one record for each task that had a class table.
    """

    tasks: int
    accuracy: npt.NDArray[np.float64] = field(init=False)
    mixed_share: list[float] = field(init=False)
    alignments: list[AlignmentRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accuracy = np.full((self.tasks, self.tasks), np.nan)
        self.mixed_share = [float("nan")] * self.tasks

    def state_dict(self) -> dict[str, Any]:
        """Return the records as plain values and tensors."""
        return {
            "accuracy": torch.from_numpy(self.accuracy),
            "mixed_share": self.mixed_share,
            "alignments": [
                {
                    name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                    for name, value in vars(record).items()
                }
                for record in self.alignments
            ],
        }

    def check(self, state: Mapping[str, Any], *, num_classes: int) -> None:
        """Refuse a state that holds no records of a run with so many classes."""
        require_tensor(state["accuracy"], torch.float64, (self.tasks, self.tasks), "accuracy")
        require_like(state["mixed_share"], [0.0] * self.tasks, "mixed_share")
        for record in state["alignments"]:
            require_number(record["task"], 0, self.tasks - 1, "alignments.task")
            classes = len(require_tensor(record["classes"], torch.int64, (None,), "alignments.classes"))
            require_tensor(record["cosine"], torch.float64, (classes, classes), "alignments.cosine")
            require_tensor(record["helpful"], torch.bool, (classes, classes), "alignments.helpful")
            require_like(record["threshold"], 0.0, "alignments.threshold")
            if not bool(((record["classes"] >= 0) & (record["classes"] < num_classes)).all()):
                raise ValueError("alignments.classes: got classes that the stream does not have")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state of :meth:`state_dict`."""
        self.accuracy = state["accuracy"].numpy()
        self.mixed_share = list(state["mixed_share"])
        self.alignments = [AlignmentRecord(**record) for record in state["alignments"]]
