"""Random crops and flips for a whole batch at once, on the device where it lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gradmix.runtime.transfer import to_device_async

Among = tuple[int, Tensor]
"""Of how many images some are, and the places ``(N,)`` int64 of these on the CPU: what is drawn is drawn for all."""


def random_crop_flip(
    x: Tensor, padding: int = 4, generator: torch.Generator | None = None, among: Among | None = None
) -> Tensor:
    """Pad every image with zeros, cut a random window of the old size, and mirror it left to right half the time.

    Offsets are uniform in ``0..2*padding`` in both directions, drawn for every image apart. On normalised images the
    zeros of the border are the mean colour.

    Args:
        x: Images ``(N, C, H, W)`` of any dtype and layout, on any device.
        padding: Pixels added on every side, at least 0.
        generator: Source of randomness, on any device; ``None``: torch's global one on the CPU.
        among: Where the images are some of a step's, shared out to several processes, which these are. ``None``: all.

    Returns:
        New images ``(N, C, H, W)``, contiguous, with the dtype and device of ``x``.

    Raises:
        ValueError: ``x`` does not have four dimensions, or ``padding`` is negative.
    """
    _check_images(x)
    if padding < 0:
        raise ValueError(f"padding: got {padding}, expected at least 0")
    n, channels, height, width = x.shape
    source = torch.device("cpu") if generator is None else generator.device
    span = 2 * padding + 1
    total = n if among is None else among[0]
    draws = torch.stack(
        [torch.randint(limit, (total,), generator=generator, device=source) for limit in (span, span, 2)]
    )
    draws = to_device_async(draws if among is None else draws[:, among[1]], x.device)
    top, left, mirrored = draws.unsqueeze(2)
    rows = top + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device)
    columns = left + torch.where(mirrored == 1, width - 1 - columns, columns)
    places = rows.unsqueeze(2) * (width + 2 * padding) + columns.unsqueeze(1)  # (N, H, W)
    padded = F.pad(x, (padding,) * 4).flatten(2)
    index = places.reshape(n, 1, height * width).expand(n, channels, height * width)
    return padded.gather(2, index).reshape(x.shape)


TRIES = 10
"""Boxes drawn for every image, of which the first that fits is taken."""
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Least and greatest share of an image's area that a box has, and its least and greatest width over height."""


def random_resized_crop_flip(
    x: Tensor, size: int, *, generator: torch.Generator | None = None, among: Among | None = None
) -> Tensor:
    """Cut a random box out of every image, scale it to a square, and mirror it left to right half the time.

    The augmentation with which networks are trained on ImageNet (Szegedy et al., "Going deeper with convolutions",
    2015, section 6), on boxes of :func:`random_boxes`. Scaling is bilinear within the box, without antialiasing: images
    must come at about the final size, as :class:`~gradmix.training.data.image_files.ImageFiles` decodes them, so that
    a box is hardly ever scaled down by much.

    Args:
        x: Images ``(N, C, H, W)`` of a floating dtype, on any device.
        size: Side of the result, in pixels, at least 1.
        generator: Source of randomness, on any device; ``None``: torch's global one on the CPU.
        among: As :func:`random_crop_flip`.

    Returns:
        New images ``(N, C, size, size)`` with the dtype and device of ``x``. Interpolated in float32, or in float64
        where ``x`` is.

    Raises:
        TypeError: ``x`` is not of a floating dtype.
        ValueError: ``x`` does not have four dimensions or has images without pixels, or ``size`` is less than 1.
    """
    _check_images(x)
    if not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype}, expected a floating dtype; as_floats makes one of uint8")
    if size < 1:
        raise ValueError(f"size: got {size}, expected at least 1")
    n, channels, height, width = x.shape
    total = n if among is None else among[0]
    boxes = random_boxes(total, height, width, generator)
    boxes = to_device_async(boxes if among is None else boxes[:, among[1]], x.device)
    if n == 0 or channels == 0:  # which grid_sample refuses
        return x.new_empty((n, channels, size, size))
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = (torch.arange(size, dtype=precise, device=x.device) + 0.5) / size  # centres of the result's pixels
    top, left, rows, columns, mirrored = boxes.unsqueeze(2)
    # Pixels, counted from the centre of the first. Held within the box, whose neighbours are not to shine in.
    down = (top + steps * rows - 0.5).maximum(top).minimum(top + rows - 1)
    across = torch.where(mirrored == 1, 1 - steps, steps)
    across = (left + across * columns - 0.5).maximum(left).minimum(left + columns - 1)
    down, across = (2 * down + 1) / height - 1, (2 * across + 1) / width - 1  # as grid_sample counts
    grid = torch.stack(torch.broadcast_tensors(across.unsqueeze(1), down.unsqueeze(2)), dim=3)  # (N, size, size, 2)
    result = F.grid_sample(x.to(precise), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return result.to(x.dtype)


def random_boxes(n: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Boxes within an image, by a share of its area and a ratio of sides.

    Area uniform in :data:`SCALE`, the logarithm of the :data:`RATIO` uniform, sides rounded to whole pixels, and then a
    uniform place. A box whose sides do not fit into the image is drawn again, up to ten times in all (:data:`TRIES`;
    all are drawn at once for all samples, and the first that fits is taken). For a sample without any, which occurs in
    oblong images, it is the largest box in the middle whose ratio is within bounds. So does torchvision; the stream of
    random numbers is another. On a generator of one kind of device the boxes are the same wherever the images lie.

    Args:
        n: Number of boxes.
        height: Height of the image, in pixels, at least 1.
        width: Its width.
        generator: Source of randomness, on any device; ``None``: torch's global one on the CPU.

    Returns:
        ``(5, n)`` int64 on the generator's device: top, left, height, width, and whether to mirror (0 or 1).

    Raises:
        ValueError: ``height`` or ``width`` is less than 1.
    """
    for name, pixels in (("height", height), ("width", width)):
        if pixels < 1:
            raise ValueError(f"{name}: got {pixels}, expected at least 1")
    source = torch.device("cpu") if generator is None else generator.device
    draws = torch.rand(2 * TRIES + 3, n, generator=generator, device=source, dtype=torch.float64)
    area = (SCALE[0] + draws[:TRIES] * (SCALE[1] - SCALE[0])) * (height * width)
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    root = torch.exp((low + draws[TRIES : 2 * TRIES] * (high - low)) / 2)  # of the ratio
    rows, columns = (area.sqrt() / root).round().long(), (area.sqrt() * root).round().long()
    fits = (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)
    first = fits.int().argmax(0, keepdim=True)
    rows, columns, fits = (table.gather(0, first).squeeze(0) for table in (rows, columns, fits))
    whole = min(max(width / height, RATIO[0]), RATIO[1])
    largest = (min(height, max(1, round(width / whole))), min(width, max(1, round(height * whole))))
    rows, columns = torch.where(fits, rows, largest[0]), torch.where(fits, columns, largest[1])
    above, before, mirrored = draws[2 * TRIES :]
    top = torch.where(fits, (above * (height - rows + 1)).long(), (height - rows) // 2)
    left = torch.where(fits, (before * (width - columns + 1)).long(), (width - columns) // 2)
    return torch.stack([top, left, rows, columns, (mirrored < 0.5).long()])


def centre_crop(x: Tensor, size: int) -> Tensor:
    """The square in the middle of every image; of an odd number of spare rows or columns, the smaller half goes first.

    Args:
        x: Images ``(N, C, H, W)`` of any dtype and layout, on any device.
        size: Side of the square, in pixels, from 1 to the lesser of ``H`` and ``W``.

    Returns:
        A view ``(N, C, size, size)`` of ``x``.

    Raises:
        ValueError: ``x`` does not have four dimensions, or the images are smaller than ``size``.
    """
    _check_images(x)
    height, width = x.shape[2:]
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size: got {size} for images of {height} x {width}, expected from 1 to {min(height, width)}")
    top, left = (height - size) // 2, (width - size) // 2
    return x[:, :, top : top + size, left : left + size]


def as_floats(x: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """Floats in [0, 1] of bytes, normalised by channel, ``(x / 255 - mean) / std``, in one pass over the images.

    Args:
        x: Images ``(N, C, H, W)`` uint8, on any device.
        mean: Mean ``(C,)`` of every channel, of values in [0, 1]; ``None``: 0.
        std: Standard deviation ``(C,)`` of every channel, above 0; ``None``: 1.

    Returns:
        New images, float32, with the shape, device and memory format of ``x``.

    Raises:
        TypeError: ``x`` is not uint8.
        ValueError: ``x`` does not have four dimensions, or ``mean`` or ``std`` not one value for each channel, or a
            standard deviation is not above 0.
    """
    _check_images(x)
    if x.dtype != torch.uint8:
        raise TypeError(f"x: got {x.dtype}, expected torch.uint8")
    channels = x.shape[1]
    for name, constants in (("mean", mean), ("std", std)):
        if constants is not None and len(constants) != channels:
            raise ValueError(f"{name}: got {len(constants)} values, expected one for each of {channels} channels")
    means = torch.tensor(mean or [0.0] * channels, dtype=torch.float64)
    stds = torch.tensor(std or [1.0] * channels, dtype=torch.float64)
    if not bool((stds > 0).all()):
        raise ValueError(f"std: got {stds.tolist()}, expected values above 0")
    shift, factor = to_device_async(torch.stack([-means / stds, 1 / (255 * stds)]).float(), x.device).reshape(
        2, channels, 1, 1
    )
    return torch.addcmul(shift, x, factor)


def _check_images(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected images (N, C, H, W)")
