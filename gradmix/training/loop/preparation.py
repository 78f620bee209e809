"""The preparation of stored samples for the model: conversion to floats, augmentation or crop, memory format."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmix.training.data.augment import Among, as_floats, centre_crop, random_crop_flip, random_resized_crop_flip
from gradmix.training.data.image_arrays import to_float
from gradmix.training.data.samples import Samples, TensorSamples
from gradmix.training.streams import TaskStream


class Preparation:
    """Makes samples as they are kept into samples as the model is to see them.

    Args:
        stream: The stream; images of it that are uint8 become floats in [0, 1], normalised by its mean and standard
            deviation.
        augment: As the configuration has it.
        channels_last: Whether images are to have that layout.
        dtype: Of the model; floats become it.
    """

    def __init__(
        self, stream: TaskStream, augment: str | None, *, channels_last: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        self._dtype = dtype
        self._mean, self._std, self._shape = stream.mean, stream.std, stream.input_shape
        self._augment, self._channels_last = augment or "none", channels_last
        if self._augment != "none" and len(stream.input_shape) != 3:
            raise ValueError(
                f"optim.augment: got {augment!r} for samples of shape {stream.input_shape}, which are no images; "
                "expected none"
            )

    def for_training(self, x: Tensor, generator: torch.Generator, among: Among | None = None) -> Tensor:
        """Samples ``(N, ...)`` augmented, each by itself; ``among`` says which of a step's they are, if not all."""
        x = self._floats(x)
        if self._augment == "resized-crop-flip":
            x = random_resized_crop_flip(x, self._shape[-1], generator=generator, among=among)
        else:
            x = self._crop(x)
            if self._augment == "crop-flip":
                x = random_crop_flip(x, padding=max(1, self._shape[-1] // 8), generator=generator, among=among)
        return self._with_layout(x)

    def changes(self, samples: Samples) -> bool:
        """Whether :meth:`for_testing` gives ``samples``, which lie in memory, other values than they have."""
        if not isinstance(samples, TensorSamples):
            return False
        other = samples.x.is_floating_point() and samples.x.dtype != self._dtype
        return other or samples.x.dtype == torch.uint8 or samples.shape != self._shape

    def for_testing(self, x: Tensor) -> Tensor:
        """Samples ``(N, ...)`` as they are, images cropped in the middle to the model's size."""
        return self._with_layout(self._crop(self._floats(x)))

    def _floats(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            # Images in one pass, and without the host waiting for their constants to be on the device.
            x = as_floats(x, self._mean, self._std) if x.ndim == 4 else to_float(x, 255.0, self._mean, self._std)
        return x.to(self._dtype) if x.is_floating_point() else x

    def _crop(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and x.shape[-2:] != self._shape[-2:]:
            return centre_crop(x, self._shape[-1])
        return x

    def _with_layout(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x
