"""Augmentation policies: AutoAugment, RandAugment and TrivialAugment, every image by itself.

The papers' policies are drawn here, sample by sample, from the method's generator; what they do to pixels is kornia's.
Its own policy classes are not used: they draw one policy a batch, and from torch's global generator. Samples that share
an operation go through it together, each with its own strength, and all geometric operations through one warp.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmix.runtime.transfer import to_device_async
from gradmix.training.extras import import_extra
from gradmix.training.methods.base import Context, Method, Needs, Pixels, StepSamples, Wrapping


class Strength(NamedTuple):
    """The argument of an operation at strength 0 and at 1, linear between. ``signed``: with either sign, at random."""

    none: float
    full: float
    signed: bool = False


NO_STRENGTH = Strength(0.0, 0.0)

GEOMETRIC = ("shear-x", "shear-y", "translate-x", "translate-y", "rotate")
"""Operations that move pixels: shear factors, shares of the image's width or height, degrees."""

STANDARD: dict[str, Strength] = {
    "identity": NO_STRENGTH,
    "auto-contrast": NO_STRENGTH,
    "equalize": NO_STRENGTH,
    "rotate": Strength(0.0, 30.0, signed=True),
    "solarize": Strength(1.0, 0.0),  # the pixel value from which on values are inverted
    "color": Strength(0.1, 1.9),  # the factor of blending with the grey image; 1 leaves the image as it is
    "posterize": Strength(8.0, 4.0),  # the bits kept
    "contrast": Strength(0.1, 1.9),
    "brightness": Strength(0.1, 1.9),
    "sharpness": Strength(0.1, 1.9),
    "shear-x": Strength(0.0, 0.3, signed=True),
    "shear-y": Strength(0.0, 0.3, signed=True),
    "translate-x": Strength(0.0, 150 / 331, signed=True),
    "translate-y": Strength(0.0, 150 / 331, signed=True),
    "invert": NO_STRENGTH,
}
"""AutoAugment's operations and ranges: RandAugment has all but the last. Translations were searched at 331 pixels."""

WIDE: dict[str, Strength] = {
    **{name: strength for name, strength in STANDARD.items() if name != "invert"},
    "rotate": Strength(0.0, 135.0, signed=True),
    "color": Strength(0.01, 2.0),
    "posterize": Strength(8.0, 2.0),
    "contrast": Strength(0.01, 2.0),
    "brightness": Strength(0.01, 2.0),
    "sharpness": Strength(0.01, 2.0),
    "shear-x": Strength(0.0, 0.99, signed=True),
    "shear-y": Strength(0.0, 0.99, signed=True),
    "translate-x": Strength(0.0, 1.0, signed=True),
    "translate-y": Strength(0.0, 1.0, signed=True),
}
"""TrivialAugment's wide ranges. Its 32 pixels of translation are the whole of a CIFAR image."""


class Drawn(NamedTuple):
    """Operations drawn for N samples, in K rounds.

    Attributes:
        operation: (N, K) int64, indices of a table's operations.
        strength: (N, K) float64 in [0, 1].
        sign: (N, K) float64, 1 or -1.
        applied: (N, K) bool; where not, the sample stays as it is.
    """

    operation: Tensor
    strength: Tensor
    sign: Tensor
    applied: Tensor


class PolicyAugmented(Wrapping):
    """Any method, experience replay if nothing is said, on samples augmented by a policy.

    Crops and flips of the protocol come before it, mixing after it; candidates from elsewhere are augmented too.

    Grey images stay so: what three equal channels would become, their one channel becomes. Places that a geometric
    operation leaves empty are black, and pixels move to the nearest place, as in the papers. Labels stay as they are.

    Raises:
        ModuleNotFoundError: kornia is not installed; the extra ``policies`` brings it.
        ValueError: the samples are no images of one or three channels, or not in the range that the context tells.
    """

    table = STANDARD
    needs = Needs(whole_step=True)

    def __init__(self, context: Context, inner: Method | None = None) -> None:
        super().__init__(context, inner)
        self.check_installed()
        self._range_checked = False

    @classmethod
    def check_installed(cls) -> None:
        require_kornia()

    def losses(self, samples: StepSamples) -> Iterator[Tensor]:
        with self.context.clock("data"):
            samples = replace(samples, x=self.augment(samples.x))
            if samples.candidates is not None:
                samples = replace(samples, candidates=(self.augment(samples.candidates[0]), samples.candidates[1]))
        return super().losses(samples)

    @abstractmethod
    def draw(self, count: int, channels: int) -> Drawn:
        """A policy for each of ``count`` samples, drawn from the context's generator, on its device."""

    @torch.no_grad()
    def augment(self, x: Tensor) -> Tensor:
        """New samples (N, C, H, W) of the dtype and on the device of ``x (N, C, H, W)``, normalised as they are."""
        if x.dim() != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"x: got samples of shape {tuple(x.shape)}, expected images (N, 1, H, W) or (N, 3, H, W)")
        drawn = self.draw(len(x), x.shape[1])
        mean, std = _by_channel(self.context.pixels, x)
        with torch.autocast(x.device.type, enabled=False):
            image = x.float() * std + mean
            if not self._range_checked:
                _check_range(image)
                self._range_checked = True
            image = image.clamp(0.0, 1.0)
            for k in range(drawn.operation.shape[1]):
                image = apply_round(image, self.table, Drawn(*(part[:, k : k + 1] for part in drawn)))
            # Copied, so that the layout in memory is that of x.
            return torch.empty_like(x).copy_((image - mean) / std)


class AutoAugment(PolicyAugmented):
    """AutoAugment (Cubuk et al. 2019): each sample by one of 25 sub-policies of two operations with probabilities.

    Colour images have the policy found on CIFAR-10, grey ones that found on SVHN, which knows no colours. Levels 0 to 9
    are tenths of full strength. Departing from the paper there is no Cutout after it.
    """

    def draw(self, count: int, channels: int) -> Drawn:
        policy = sub_policies(channels)
        names = list(self.table)
        operation = torch.tensor([[names.index(name) for name, _, _ in pair] for pair in policy])
        numbers = torch.tensor([[(p, level) for _, p, level in pair] for pair in policy], dtype=torch.float64)
        generator = self.context.generator
        which = torch.randint(len(policy), (count,), generator=generator, device=generator.device).cpu()
        chance = _uniform((count, 2), generator)
        return Drawn(
            operation=operation[which],
            strength=numbers[which, :, 1] / 10,
            sign=_signs((count, 2), generator),
            applied=chance < numbers[which, :, 0],
        )


class RandAugment(PolicyAugmented):
    """RandAugment (Cubuk et al. 2020): N operations in a row out of 14, all of magnitude M on a scale of 0 to 10.

    N = 2 and M = 4, mild as its paper advises for small networks; both are our choice.
    """

    rounds = 2
    magnitude = 4
    table = {name: strength for name, strength in STANDARD.items() if name != "invert"}  # noqa: RUF012

    def draw(self, count: int, channels: int) -> Drawn:
        generator, shape = self.context.generator, (count, self.rounds)
        return Drawn(
            operation=torch.randint(len(self.table), shape, generator=generator, device=generator.device).cpu(),
            strength=torch.full(shape, self.magnitude / 10, dtype=torch.float64),
            sign=_signs(shape, generator),
            applied=torch.ones(shape, dtype=torch.bool),
        )


class TrivialAugment(PolicyAugmented):
    """TrivialAugment, Wide (Müller and Hutter 2021): one operation of 14, its strength uniform over 31 steps."""

    table = WIDE

    def draw(self, count: int, channels: int) -> Drawn:
        generator, shape = self.context.generator, (count, 1)
        operation = torch.randint(len(self.table), shape, generator=generator, device=generator.device).cpu()
        level = torch.randint(31, shape, generator=generator, device=generator.device).cpu()
        return Drawn(operation, level.double() / 30, _signs(shape, generator), torch.ones(shape, dtype=torch.bool))


def apply_round(image: Tensor, table: dict[str, Strength], drawn: Drawn) -> Tensor:
    """One round of operations.

    Args:
        image: (N, C, H, W) float32 in [0, 1], C being 1 or 3.
        table: the operations that ``drawn`` has indices of, and their ranges.
        drawn: one round, on the CPU, so that which samples share an operation is known without waiting for a GPU.

    Returns:
        A new tensor like ``image``.
    """
    result = image.clone()
    operation, applied = drawn.operation[:, 0], drawn.applied[:, 0]
    values, moved, matrices = torch.zeros(len(image), dtype=torch.float64), [], []
    for index, (name, strength) in enumerate(table.items()):
        samples = (applied & (operation == index)).nonzero().squeeze(1)
        if len(samples) == 0 or name == "identity":
            continue
        values[samples] = strength.none + (strength.full - strength.none) * drawn.strength[samples, 0]
        if strength.signed:
            values[samples] *= drawn.sign[samples, 0]
        if name in GEOMETRIC:
            moved.append(samples)
            matrices.append(_matrices(name, values[samples], image.shape[2], image.shape[3]))
            continue
        on_device = to_device_async(samples, image.device)
        result[on_device] = _PIXELWISE[name](
            image[on_device], to_device_async(values[samples].to(image.dtype), image.device)
        )
    if moved:
        on_device = to_device_async(torch.cat(moved), image.device)
        matrix = to_device_async(torch.cat(matrices).to(image.dtype), image.device)
        transform = require_kornia().geometry.transform
        size = (image.shape[2], image.shape[3])
        result[on_device] = transform.warp_affine(image[on_device], matrix, size, mode="nearest")
    return result


def require_kornia() -> Any:
    """The module kornia, or a ModuleNotFoundError that names the extra."""
    need = "kornia: not installed; the methods autoaugment, randaugment and trivialaugment need it"
    return import_extra("kornia", need, "policies")


def _auto_contrast(image: Tensor, _: Tensor) -> Tensor:
    stretched: Tensor = require_kornia().enhance.normalize_min_max(image)
    # A channel of one value has no contrast to stretch and stays; kornia would make it black.
    low, high = image.amin(dim=(2, 3), keepdim=True), image.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, stretched, image)


def _color(image: Tensor, value: Tensor) -> Tensor:
    if image.shape[1] == 1:
        return image
    blended: Tensor = require_kornia().enhance.adjust_saturation_with_gray_subtraction(image, value)
    return blended


def _contrast(image: Tensor, value: Tensor) -> Tensor:
    # As three channels: older versions of kornia take the mean of one-channel images over the whole batch.
    colour = image.expand(-1, 3, -1, -1)
    blended: Tensor = require_kornia().enhance.adjust_contrast_with_mean_subtraction(colour, value)
    return blended[:, : image.shape[1]]


_PIXELWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto-contrast": _auto_contrast,
    "equalize": lambda image, _: require_kornia().enhance.equalize(image),
    "invert": lambda image, _: 1 - image,
    "solarize": lambda image, value: require_kornia().enhance.solarize(image, value),
    "posterize": lambda image, value: require_kornia().enhance.posterize(image, value.round().int()),
    "color": _color,
    "contrast": _contrast,
    "brightness": lambda image, value: require_kornia().enhance.adjust_brightness_accumulative(image, value),
    "sharpness": lambda image, value: require_kornia().enhance.sharpness(image, value),
}
"""Operations on pixels where they are, of images (n, C, H, W) and values (n,): those that blend clamp to [0, 1]."""


def _matrices(name: str, values: Tensor, height: int, width: int) -> Tensor:
    """(n, 2, 3) float64 affine maps of pixel places (x, y) around the image's centre."""
    linear = torch.eye(2, dtype=torch.float64).repeat(len(values), 1, 1)
    shift = torch.zeros(len(values), 2, dtype=torch.float64)
    if name == "shear-x":
        linear[:, 0, 1] = values
    elif name == "shear-y":
        linear[:, 1, 0] = values
    elif name == "translate-x":
        shift[:, 0] = values * width
    elif name == "translate-y":
        shift[:, 1] = values * height
    else:
        angle = values * (math.pi / 180)
        linear[:, 0, 0] = linear[:, 1, 1] = angle.cos()
        linear[:, 0, 1], linear[:, 1, 0] = -angle.sin(), angle.sin()
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
    offset = centre - linear @ centre + shift
    return torch.cat([linear, offset.unsqueeze(2)], dim=2)


def _by_channel(pixels: Pixels | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (1, C, 1, 1) each."""
    channels = x.shape[1]
    mean, std = ((0.0,) * channels, (1.0,) * channels) if pixels is None else (pixels.mean, pixels.std)
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"pixels: got {len(mean)} means and {len(std)} deviations, expected {channels}, one a channel")
    shape = (1, channels, 1, 1)
    return (
        to_device_async(torch.tensor(mean, dtype=torch.float32), x.device).view(shape),
        to_device_async(torch.tensor(std, dtype=torch.float32), x.device).view(shape),
    )


def _check_range(image: Tensor) -> None:
    """Refuse pixels outside [0, 1]; what rounding may do is let through."""
    low, high = float(image.min()), float(image.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"x: got pixels from {low:.4g} to {high:.4g}, expected [0, 1] once pixels' mean is put back")


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).cpu()


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.where(_uniform(shape, generator) < 0.5, -1.0, 1.0).double()


SubPolicy = tuple[tuple[str, float, int], ...]


def sub_policies(channels: int) -> list[SubPolicy]:
    """AutoAugment's 25 sub-policies, as kornia has them: those for CIFAR-10, or for SVHN if there is one channel.

    Returns:
        For each its two operations, with probability and level; level 0 for operations without one.
    """
    require_kornia()
    from kornia.augmentation.auto.autoaugment import autoaugment as tables

    found = tables.cifar10_policy if channels == 3 else tables.svhn_policy
    return [tuple((name.replace("_", "-"), chance, int(level or 0)) for name, chance, level in pair) for pair in found]
