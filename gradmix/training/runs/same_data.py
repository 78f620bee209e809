"""Whether runs are of the same data, where a benchmark's name does not say: the data are the user's own."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable
from pathlib import Path

from gradmix.training.data.arrays import NAMES

OWN_DATA = ("arrays", "image-folder", "text-folder")
"""Benchmarks of which ``data.data_dir`` is the data set."""


def same_data(paths: Iterable[Path]) -> bool:
    """Judge whether files or folders of data are the same, as far as can be seen from here.

    Files that are there are compared by their contents. Otherwise the names decide: runs that were made on another
    machine have the same data at another place.
    """
    first, *others = (_file_of(path) for path in dict.fromkeys(paths))
    return all(_alike(first, other) for other in others)


def _file_of(path: Path) -> Path:
    """The file of arrays in a folder that has one; else the path itself."""
    return next((path / name for name in NAMES if (path / name).is_file()), path)


def _alike(one: Path, two: Path) -> bool:
    if one.is_file() and two.is_file():
        return filecmp.cmp(one, two, shallow=False)
    return one.absolute().name == two.absolute().name
