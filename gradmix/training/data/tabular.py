"""Labelled samples of numbers from the files in which their data sets are published, checked while they are read.

A file that is missing raises :class:`FileNotFoundError` with the path expected; a damaged one raises
:class:`gradmix.training.data.image_arrays.DataError`.
"""

from __future__ import annotations

import codecs
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradmix.training.data.image_arrays import DataError, LabelledData, open_packed, rank_in_class
from gradmix.training.extras import import_extra

COVERTYPES = (
    "Spruce/Fir",
    "Lodgepole Pine",
    "Ponderosa Pine",
    "Cottonwood/Willow",
    "Aspen",
    "Douglas-fir",
    "Krummholz",
)
"""The cover types of Covertype, in the order of their labels: 1 to 7 in the file, 0 to 6 here."""

_COLUMNS = 55  # of covtype.data, the label last
_LINES = 581_012
_LONGEST = 20  # characters of a column: an integer of 32 bits has 11
_NUMERIC = 10  # of its columns; the others say by 0 or 1 which area and soil it is


def covertype(root: str | Path) -> LabelledData:
    """Read Covertype (Blackard and Dean 1999): 581,012 patches of forest by 54 columns, 7 cover types.

    The file is ``covtype.data`` or ``covtype.data.gz``, in ``root`` or in ``root/covertype``. Ten columns are numbers,
    44 say by 0 or 1 in which wilderness area and on which type of soil a patch lies.

    The first 15,120 samples, which the data set's authors trained and validated on, hold as many of each type and leave
    test samples of very unequal numbers. For class-incremental learning, which is about unequal numbers, all samples
    are split alike: of every type, in the order of the file, each fifth is a test sample.

    Args:
        root: The data directory.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: The file is damaged.
    """
    root = Path(root)
    places = [folder / name for folder in (root, root / "covertype") for name in ("covtype.data", "covtype.data.gz")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"Covertype: missing {places[0]}[.gz]; the file is published at "
            f"https://archive.ics.uci.edu/dataset/31/covertype: put it there, packed or unpacked, and give {root} as "
            "the data directory"
        )
    values = read_integers(path, _COLUMNS, _LINES)
    y = torch.from_numpy(values[:, -1].astype(np.int64)) - 1
    wrong = ((y < 0) | (y >= len(COVERTYPES))).nonzero().flatten()
    if len(wrong):
        line = int(wrong[0])
        raise DataError(f"{path}: line {line + 1} has the label {int(y[line]) + 1}, expected 1 to {len(COVERTYPES)}")
    return _standardise(torch.from_numpy(values[:, :-1].astype(np.float32)), y, COVERTYPES, numeric=_NUMERIC)


def wine() -> LabelledData:
    """Read the 178 wines that come with scikit-learn: 13 measurements, 3 growers.

    They come without a test set: of every class, in the order of the data set, each fifth is a test sample: 144
    training and 34 test samples.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    bunch = import_extra("sklearn.datasets", "wine needs scikit-learn, with which its data come").load_wine()
    x = torch.from_numpy(np.asarray(bunch.data, dtype=np.float32))
    y = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))
    return _standardise(x, y, tuple(map(str, bunch.target_names)), numeric=x.shape[1])


def _standardise(x: Tensor, y: Tensor, names: tuple[str, ...], numeric: int) -> LabelledData:
    """Split by class, each fifth sample to the test samples, and standardise the leading columns: the training samples'
    mean is subtracted, and what is left divided by their standard deviation.
    """
    test = rank_in_class(y) % 5 == 4
    train_x, test_x = x[~test], x[test]
    for column in range(numeric):  # one at a time: float64 copies of all would be the most memory taken
        values = train_x[:, column].double()
        mean, std = values.mean().float(), values.std(unbiased=False).float()
        for part in (train_x, test_x):
            part[:, column].sub_(mean).div_(std if std > 0 else 1.0)
    return LabelledData(train_x, y[~test], test_x, y[test], names)


def read_integers(path: str | Path, columns: int, most_lines: int | None = None) -> npt.NDArray[np.int32]:
    """Read lines of integers set apart by commas, compressed with gzip if the name ends in ``.gz``.

    Parsed by :func:`numpy.loadtxt` as 32-bit integers, which takes it half the time of floating-point numbers: about a
    second for 581,012 lines of 55.

    Args:
        path: The file.
        columns: Integers in every line, of 20 characters at most with what is between them.
        most_lines: Lines at most; None: as many as there are.

    Returns:
        ``(N, columns)`` int32.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: The file is empty, damaged, or holds something else.
    """
    path = Path(path)
    with warnings.catch_warnings(), open_packed(path) as file:
        warnings.simplefilter("error")  # of an empty file, and of fractions that old releases cut off
        try:
            lines = _lines(file, _LONGEST * columns, most_lines)
            values = np.loadtxt(lines, dtype=np.int32, delimiter=",", comments=None, ndmin=2)
        except (ValueError, OverflowError, UserWarning, DeprecationWarning) as error:
            raise DataError(f"{path}: not lines of {columns} integers set apart by commas ({error})") from error
    if values.shape[1] != columns:
        raise DataError(f"{path}: lines of {values.shape[1]} integers, expected {columns}")
    return values


def _lines(file: IO[bytes], longest: int, most: int | None) -> Iterator[str]:
    """The lines of a file, which may be a small one that unpacks to a large one: of lines too long or many no more."""
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        if len(line) > longest:
            raise ValueError(f"line {number} has more than {longest} characters")
        if most is not None and number > most:
            raise ValueError(f"more than {most} lines")
        yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("latin-1")
