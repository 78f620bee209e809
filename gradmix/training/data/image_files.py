"""Images that stay files until they are wanted, decoded one by one.

Pillow, which decodes them, is imported when the first one is (extra ``images``).
"""

from __future__ import annotations

import io
import os
import warnings
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from gradmix.training.data.class_names import printable
from gradmix.training.data.image_arrays import DataError
from gradmix.training.data.pixels import eight_bits, pillow

_FORMATS = ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000", "AVIF")
# What is decoded, whatever a file's name ends in. Pillow knows more: EPS it has run as a program, by Ghostscript.

_DRAFT = 2
# A JPEG is decoded at 1/2, 1/4 or 1/8 as long as both sides keep this many times the pixels wanted: the rest of the
# reduction is antialiased, and the result differs from a full decoding's by less than one of 256 levels on average.


class DamagedImageError(DataError):
    """A file that should be an image cannot be decoded; the message names its path and the cause."""


class ImageFiles:
    """Images in files, decoded when they are asked for; a map-style data set that is cheap to copy and to pickle.

    Names of files lie in one array of bytes, not in Python's strings: for the 1.28 million training images of ImageNet
    that is 48 MiB in all, 10 of them labels, where strings alone would be 130 MiB. A forked worker process shares the
    array with its parent, since no reference counts are in it; one that is started otherwise gets a copy.

    An image becomes RGB of 8 bits (:func:`~gradmix.training.data.pixels.eight_bits`; transparency is dropped), its
    shorter side is resized to ``size`` by antialiased bilinear interpolation, and the square in the middle is cut out,
    to fractions of a pixel. The orientation that EXIF may tell is not applied, as torchvision's ImageFolder does not. A
    large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but not below twice the pixels wanted.

    >>> images = ImageFiles("/data", [("train/cat", ["1.jpg", "2.jpg"])], [0, 0], ("cat",), 64)
    >>> len(images), images.path(1)
    (2, '/data/train/cat/2.jpg')

    Args:
        root: Folder that all paths start from.
        folders: Folders below ``root``, each with the names of its images, in order.
        labels: Label of every image ``(N,)`` in that order, in ``[0, len(class_names))``.
        class_names: Name of every label; bytes in them that are no UTF-8 become escapes.
        size: Side S of the decoded images, in pixels, at least 1.

    Raises:
        ValueError: ``labels`` are not as many as the images or out of range, or ``size`` is less than 1.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        folders: Iterable[tuple[str, Sequence[str]]],
        labels: Tensor | Sequence[int],
        class_names: Sequence[str],
        size: int,
    ) -> None:
        if size < 1:
            raise ValueError(f"size: got {size}, expected at least 1")
        self.class_names = tuple(map(printable, class_names))
        self.size = size
        self._root = os.fspath(root)
        names, ends, folder_of, kept = bytearray(), array("q"), array("i"), []
        for number, (folder, files) in enumerate(folders):
            kept.append(folder)
            for file in files:
                names += os.fsencode(file)
                ends.append(len(names))
                folder_of.append(number)
        self._folders = tuple(kept)
        self._names = np.frombuffer(bytes(names), np.uint8)
        self._ends = np.array(ends, np.int64)
        self._folder_of = np.array(folder_of, np.int32)
        self.labels = torch.as_tensor(labels, dtype=torch.int64).clone()
        """Label of every image ``(N,)`` int64."""
        if self.labels.shape != (len(self),):
            raise ValueError(
                f"labels: got shape {tuple(self.labels.shape)}, expected ({len(self)},), one for each image"
            )
        if len(self) and (int(self.labels.min()) < 0 or int(self.labels.max()) >= len(self.class_names)):
            raise ValueError(
                f"labels: got {int(self.labels.min())} to {int(self.labels.max())}, expected 0 to "
                f"{len(self.class_names) - 1}, the labels of class_names"
            )

    def __len__(self) -> int:
        return len(self._ends)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._root!r}: {len(self)} images of {len(self.class_names)} classes)"

    def path(self, index: int) -> str:
        """Path of image ``index``, in ``[0, N)``."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected 0 to {len(self) - 1}")
        start = int(self._ends[index - 1]) if index else 0
        name = os.fsdecode(self._names[start : int(self._ends[index])].tobytes())
        return os.path.join(self._root, self._folders[self._folder_of[index]], name)

    def __getitem__(self, index: int) -> Tensor:
        """The image decoded, ``(3, S, S)`` uint8.

        Raises:
            DamagedImageError: The file is there but cannot be decoded.
            ModuleNotFoundError: Pillow is not installed.
            OSError: The file cannot be read, because it is gone, for instance.
        """
        return decode(self.path(index), self.size)


def decode(path: str | os.PathLike[str], size: int) -> Tensor:
    """Read one image as :class:`ImageFiles` describes it: JPEG, PNG, PPM, BMP, TIFF, WebP, GIF, JPEG 2000 or AVIF.

    Args:
        path: The file.
        size: Side S of the result, in pixels, at least 1.

    Returns:
        ``(3, S, S)`` uint8.

    Raises:
        DamagedImageError: The file is there but cannot be decoded: it is none of these, is cut short, has more pixels
            than Pillow deems harmless (``PIL.Image.MAX_IMAGE_PIXELS``), or values whose range
            :func:`~gradmix.training.data.pixels.eight_bits` does not know.
        ModuleNotFoundError: Pillow is not installed.
        OSError: The file cannot be read.
    """
    image_module = pillow()
    with open(path, "rb") as file:
        content = file.read()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # at metadata that are odd, whose images are well
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            image_module.init()
            formats = [name for name in _FORMATS if name in image_module.OPEN]
            with image_module.open(io.BytesIO(content), formats=formats) as image:
                image.draft(None, (_DRAFT * size, _DRAFT * size))
                image.load()
                whole = eight_bits(image).convert("RGB")
        width, height = whole.size
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        pixels = np.array(whole.resize((size, size), image_module.Resampling.BILINEAR, box=box))
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly everything
        raise DamagedImageError(f"{printable(os.fspath(path))}: {_cause(error, content)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _cause(error: Exception, content: bytes) -> str:
    if not content:
        return "the file is empty"
    if type(error).__name__ == "UnidentifiedImageError":  # whose own text names a buffer, not a file
        return f"is no image of a kind that is read (it begins with {content[:8]!r})"
    return f"cannot be decoded: {error or type(error).__name__}"
