"""Pixels of 8 bits a channel, whatever an image has of its own; Pillow is imported when the first one is decoded."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradmix.training.extras import import_extra


def pillow() -> Any:
    """Pillow's module of images, or a ModuleNotFoundError that names the extra."""
    return import_extra("PIL.Image", "images in files are decoded by Pillow", "images")


_UNCERTAIN = "of which nothing tells what is black and what is white; save it with 8 or 16 unsigned bits a channel"

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF


def eight_bits(image: Any) -> Any:
    """A Pillow image as one of the same picture with 8 bits a channel: in mode L, LA, RGB or RGBA.

    Pillow's own conversion to 8 bits clips at 255 what has more. Here 16 bits are scaled, v to v * 255 / 65535, rounded
    (also where a TIFF tells of fewer bits, or that 0 is white), and floats that lie in [0, 1] from 0 to 255. One bit
    becomes 0 and 255. Colours of a palette are looked up, without their transparency; CMYK, YCbCr and HSV become RGB
    as Pillow converts them.

    Args:
        image: Any Pillow image.

    Raises:
        ValueError: It holds integers of 32 bits, signed ones, or floats beyond [0, 1], of which nothing tells what is
            black and what is white; or it is of a mode unknown here.
    """
    mode, tags = image.mode, getattr(image, "tag_v2", {})
    sixteen = mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM"))  # I of these has no more
    if 2 in tags.get(_SAMPLE_FORMAT, ()) or (mode == "I" and not sixteen):
        raise ValueError(f"holds integers that are signed or of 32 bits, {_UNCERTAIN}")
    if mode in ("L", "LA", "RGB", "RGBA"):
        return image
    if mode == "1":
        return image.convert("L")
    if mode in ("La", "RGBa"):
        return image.convert(mode.upper())
    if mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB")
    if mode in ("CMYK", "YCbCr", "HSV", "RGBX"):
        return image.convert("RGB")
    if sixteen:
        white = (1 << tags.get(_BITS, (16,))[0]) - 1
        values = np.asarray(image).astype(np.int64)
        if tags.get(_PHOTOMETRIC) == 0:
            values = white - values
        if int(values.min(initial=0)) >= 0 and int(values.max(initial=0)) <= white:
            return pillow().fromarray(((values * 510 + white) // (2 * white)).astype(np.uint8))
    if mode == "F":
        values = np.asarray(image)
        if bool(((values >= 0) & (values <= 1)).all()):  # no NaN either
            values = 1 - values if tags.get(_PHOTOMETRIC) == 0 else values
            return pillow().fromarray(np.rint(values * np.float32(255)).astype(np.uint8))
        raise ValueError(f"holds floats from {np.min(values):g} to {np.max(values):g}, beyond [0, 1], {_UNCERTAIN}")
    raise ValueError(f"is of mode {mode}, expected grey, a palette or RGB; save it in one of these")
