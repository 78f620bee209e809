"""The settings of the gradient engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from gradmix.gradients.layers import WithoutRule
from gradmix.gradients.losses import Loss, Scaler
from gradmix.gradients.sketches import Sketch
from gradmix.ops.backends import check_backend
from gradmix.runtime.validation import check_count

CHUNK = 256
"""Samples of one forward and backward pass by default."""


@dataclass(frozen=True)
class EngineSettings:
    """The settings of the gradient engine: the arguments of :func:`gradmix.class_gradients`.

    Attributes:
        layers: ``"all"``, or patterns of the names of modules or parameters.
        rank: rank of the sketch.
        seed: seed of the sketch.
        sketch: kind of the sketch, or a :class:`gradmix.gradients.Sketch`, which has its own rank and seed.
        loss: maps logits and targets to the losses of the samples; None: cross-entropy, which checks logits and labels.
        without_rule: treatment of parameters without a layer rule.
        scaler: a GradScaler or a factor of the loss.
        chunk_size: samples of one pass.
        backend: of the operators ``class_sketch`` and ``sketch_project``.
        norms: whether sums by class need the squared norms of the samples.
    """

    layers: str | Sequence[str] = "all"
    rank: int | Mapping[str, int] = 32
    seed: int = 0
    sketch: str | Sketch = "identity"
    loss: Loss | None = None
    without_rule: WithoutRule = "error"
    scaler: Scaler = None
    chunk_size: int = CHUNK
    backend: str = "auto"
    norms: bool = True

    def check(self) -> None:
        """Check the settings that do not depend on the model.

        Raises:
            TypeError, ValueError: a setting is of the wrong type or out of range.
        """
        if self.without_rule not in get_args(WithoutRule):
            allowed = " or ".join(map(repr, get_args(WithoutRule)))
            raise ValueError(f"without_rule: got {self.without_rule!r}, expected {allowed}")
        check_count("chunk_size", self.chunk_size)
        check_backend(self.backend)
        if not isinstance(self.norms, bool):
            raise TypeError(f"norms: got {type(self.norms).__name__}, expected True or False")
        if self.loss is not None and not callable(self.loss):
            raise TypeError(f"loss: got {type(self.loss).__name__}, expected a callable or None")
