"""Generated JPEGs in the layout of an image folder: smooth patterns that differ from class to class, with grain."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "val")

_CELLS = 6  # sides of the grids that patterns are made smooth from
_OWN = 0.45  # an image's own share of its pattern; the rest is its class's
_GRAIN = 24.0  # standard deviation of the noise in grey levels, which makes files as large as photographs'
_QUALITY = 88


@dataclass(frozen=True)
class Folder:
    """The files written: the same for equal values, whatever the number of processes, with one libjpeg.

    Attributes:
        classes: number of classes.
        train, val: images of each class.
        shortest, longest: sides in pixels, both drawn from this range.
        seed: of all patterns.
    """

    classes: int
    train: int
    val: int
    shortest: int = 300
    longest: int = 500
    seed: int = 0


def class_name(number: int) -> str:
    """A folder's name, in the form of ImageNet's."""
    return f"n{number:08d}"


def write_folder(root: Path, folder: Folder, processes: int = 1) -> int:
    """Write ``root``/train/<class>/*.JPEG and ``root``/val/<class>/*.JPEG; the bytes of all files.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
    """
    jobs = list(_jobs(root, folder))
    if processes == 1:
        return sum(map(_write, jobs))
    # A fork of a process with threads in it may hang.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(_write, jobs, chunksize=4))


def pattern(folder: Folder, split: str, number: int, index: int) -> npt.NDArray[np.uint8]:
    """Image ``index`` of class ``number``, (height, width, 3) uint8."""
    from PIL import Image

    by_class = np.random.default_rng([folder.seed, number]).uniform(0, 255, (_CELLS, _CELLS, 3))
    drawn = np.random.default_rng([folder.seed, number, SPLITS.index(split), index])
    own = drawn.uniform(0, 255, (_CELLS, _CELLS, 3))
    height, width = (int(side) for side in drawn.integers(folder.shortest, folder.longest + 1, 2))
    grid = ((1 - _OWN) * by_class + _OWN * own).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = _GRAIN * drawn.standard_normal((height, width, 1), dtype=np.float32)
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


def _jobs(root: Path, folder: Folder) -> Iterator[tuple[Path, Folder, str, int]]:
    for split in SPLITS:
        for number in range(folder.classes):
            yield root, folder, split, number


def _write(job: tuple[Path, Folder, str, int]) -> int:
    """Write the images of one class of one split."""
    from PIL import Image

    root, folder, split, number = job
    name = class_name(number)
    place = root / split / name
    place.mkdir(parents=True, exist_ok=True)
    size = 0
    for index in range(folder.train if split == "train" else folder.val):
        path = place / f"{name}_{index}.JPEG"
        temporary = path.with_name(path.name + ".part")
        try:
            Image.fromarray(pattern(folder, split, number, index)).save(temporary, "JPEG", quality=_QUALITY)
            size += temporary.stat().st_size
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return size
