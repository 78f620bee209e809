"""Protocols: the settings a stream is learnt with where the user sets none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Protocol:
    """The settings a stream is learnt with where the user sets none.

    Args:
        tasks: Number of tasks; ``None``: as :func:`~gradmix.training.streams.class_groups` cuts the classes found.
        classes_per_task: New classes in each; ``None``: likewise.
        model: Name of the model, as :func:`gradmix.training.models.build_model` takes it.
        lr, momentum, weight_decay, lr_milestones, epochs, batch, augment: As in
            :class:`~gradmix.training.config.OptimConfig`; ``crop-flip`` pads by an eighth of the width.
        replay_batch, buffer_policy, buffer_size: ``batch``, ``policy`` and ``size`` of
            :class:`~gradmix.training.config.ReplayConfig`.
        normalise: Whether pixels are normalised by the data set's mean and standard deviation, or stay in [0, 1].
        stream: As in :class:`~gradmix.training.config.ReplayConfig`.
        space, reference: As in :class:`~gradmix.training.config.MixConfig`.
    """

    tasks: int | None
    classes_per_task: int | None
    model: str
    lr: float
    epochs: int
    batch: int
    replay_batch: int
    buffer_size: int
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_milestones: tuple[float, ...] = ()
    buffer_policy: Literal["class", "balanced", "reservoir"] = "class"
    augment: Literal["none", "crop-flip", "resized-crop-flip"] = "none"
    normalise: bool = False
    space: Literal["embedding", "feature"] | None = None
    reference: Literal["replayed"] | None = None
    stream: Literal["dual", "shuffled"] = "dual"

    @staticmethod
    def common(dimensions: int, vocabulary: int | None = None) -> Protocol:
        """Settings to begin with for samples of that many dimensions: 3 for images, 1 for vectors or texts."""
        text = vocabulary is not None
        return Protocol(
            tasks=None,
            classes_per_task=None,
            model="text-transformer" if text else "resnet18" if dimensions == 3 else "mlp",
            lr=0.1 if text else 0.01,
            epochs=5,
            batch=64,
            replay_batch=64,
            buffer_size=20,
            space="embedding" if text else None,
        )
