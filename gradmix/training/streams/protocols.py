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
        lr: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty of SGD.
        lr_milestones: Shares of a task's epochs after which the learning rate is divided by ten.
        epochs: Epochs per task.
        batch: Samples of the current task in a step.
        replay_batch: Replayed samples in a step.
        buffer_policy: Policy of the replay buffer.
        buffer_size: Samples per class for policy ``class``, in total otherwise.
        augment: ``none``; ``crop-flip``: a random crop after padding by an eighth of the width, and a random horizontal
            flip; ``resized-crop-flip``: a random part of the image, scaled to the model's size, and a flip.
        normalise: Whether pixels are normalised by the data set's mean and standard deviation, or stay in [0, 1].
        space: Where samples are mixed: ``None`` for the input, ``embedding`` or ``feature`` where inputs cannot be
            mixed.
        reference: What the reference gradient is taken over: ``None`` for the whole buffer, ``replayed`` for those of
            its samples that a step replays.
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
