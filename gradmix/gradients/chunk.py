"""A chunk of the samples, for one forward and backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradmix.model.inputs import InputTree, num_samples


@dataclass(frozen=True)
class Chunk:
    """Samples of one pass.

    Attributes:
        name: name of the argument that the samples come from, for error messages.
        start: index of the first sample in it, for error messages.
        x: (n, ...) inputs.
        y: (n, ...) targets.
    """

    name: str
    start: int
    x: InputTree
    y: Any

    def __len__(self) -> int:
        return num_samples(self.x)
