"""Labelled samples in one file of arrays: features, rows of a table, or small images."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradmix.training.data.image_arrays import DataError, LabelledData
from gradmix.training.data.samples import INTEGERS_OF_TEXT, NOT_FINITE, first_not_finite
from gradmix.training.extras import import_extra

NAMES = ("arrays.npz", "arrays.safetensors")
"""Files that are looked for in a folder."""

_CHANNELS = (1, 3, 4)

_FARTHEST = 20.0
"""Pixels of 8 bits less their mean reach farther from 0 than this, and standardised ones do not."""


def read_arrays(path: str | Path, *, test: bool = True) -> LabelledData:
    """Read ``x_train``, ``y_train``, ``x_test``, ``y_test`` and, where it is there, ``class_names``.

    Pixels of 8 bits are to be brought to [0, 1], other numbers are float32 and used as they are. A warning names the
    range of images that look like pixels beyond [0, 1], and a layout with the channels last.

    Args:
        path: An ``.npz`` file as ``numpy.savez`` writes it, a ``.safetensors`` file, or a folder with ``arrays.npz`` or
            ``arrays.safetensors``.
        test: Whether test samples are wanted.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: The file is damaged, lacks an array, or holds one of another kind or one with NaN.
        ModuleNotFoundError: It is a ``.safetensors`` file, and safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        found = [path / name for name in NAMES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"arrays: missing {path}, expected a file of x_train, y_train, x_test and y_test, as "
                "numpy.savez('data.npz', x_train=..., ...) writes it; give it as the data directory"
            )
        path = found[0]
    held = _safetensors(path) if path.suffix == ".safetensors" else _npz(path)
    wanted = ("x_train", "y_train", "x_test", "y_test") if test else ("x_train", "y_train")
    missing = [name for name in wanted if name not in held]
    if missing:
        advice = "" if missing[0] == "x_train" else "; --validation 0.2 takes test samples of the training samples"
        raise DataError(f"{path}: holds {', '.join(held) or 'nothing'}, expected {', '.join(missing)} too{advice}")
    train = _samples(path, held, "train")
    held_out = _samples(path, held, "test") if test else (train[0][:0], train[1][:0])
    if train[0].shape[1:] != held_out[0].shape[1:] or train[0].dtype != held_out[0].dtype:
        raise DataError(
            f"{path}: x_test has samples of shape {tuple(held_out[0].shape[1:])} and {held_out[0].dtype}, expected "
            f"{tuple(train[0].shape[1:])} and {train[0].dtype} as x_train"
        )
    _warn_of_pixels(path, train[0])
    maximum = 255.0 if train[0].dtype == torch.uint8 else None
    return LabelledData(*train, *held_out, _class_names(path, held, train[1]), maximum)


def _npz(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    try:
        with open(path, "rb") as file:
            held = np.load(file, allow_pickle=False)
            if not isinstance(held, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: holds one array, expected several by name, as numpy.savez writes them")
            return {name: _read(path, held, name) for name in held.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged, or no file of arrays: {error}") from error


def _read(path: Path, held: np.lib.npyio.NpzFile, name: str) -> npt.NDArray[np.generic]:
    try:
        array: npt.NDArray[np.generic] = held[name]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise DataError(
            f"{path}: {name} is an array of Python objects, expected numbers, or text in class_names; "
            f"{INTEGERS_OF_TEXT}"
        ) from error
    return array


def _safetensors(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    need = "a .safetensors file needs safetensors"
    module = import_extra("safetensors.numpy", need, "gradients")
    try:
        held: dict[str, npt.NDArray[np.generic]] = module.load_file(path)
    except (import_extra("safetensors", need, "gradients").SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged, or no file of tensors: {error}") from error
    return held


def _samples(path: Path, held: dict[str, npt.NDArray[np.generic]], part: str) -> tuple[Tensor, Tensor]:
    x, y = held[f"x_{part}"], held[f"y_{part}"]
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"{path}: x_{part} is of {x.dtype}, expected floating-point numbers, or uint8 for pixels")
    if x.ndim < 2:
        raise DataError(f"{path}: x_{part} has the shape {x.shape}, expected (N, ...), one row or more a sample")
    if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1]:
        both = f": {INTEGERS_OF_TEXT}, of y_train and y_test together; names is class_names"
        raise DataError(
            f"{path}: y_{part} is {y.dtype} {y.shape}, expected integers ({len(x)},) as x_{part} has samples"
            f"{both if y.dtype.kind in 'US' else ''}"
        )
    with np.errstate(over="ignore"):
        samples = torch.from_numpy(np.ascontiguousarray(x if x.dtype == np.uint8 else x.astype(np.float32)))
    at = first_not_finite(samples)
    if at is not None:
        raise DataError(f"{path}: x_{part}: sample {at} holds {NOT_FINITE}")
    return samples, torch.from_numpy(y.astype(np.int64))


def _warn_of_pixels(path: Path, x: Tensor) -> None:
    """Warn of floats that look like pixels as no network wants them; features and rows of tables are of any range."""
    if not _look_like_images(x.shape[1:]) or not x.is_floating_point() or len(x) == 0:
        return
    low, high = (float(end) for end in torch.aminmax(x))
    faults = []
    if (low >= 0 and high > 1) or max(-low, high) > _FARTHEST:
        faults.append(
            f"floats from {low:g} to {high:g}, expected [0, 1] or standardised ones: save pixels of 8 bits as uint8, "
            "or divide by the value of white"
        )
    if x.ndim == 4 and x.shape[-1] in _CHANNELS and x.shape[1] not in _CHANNELS:
        faults.append(
            f"shape {tuple(x.shape[1:])}, expected the channels first, (C, H, W), for a network of convolutions: move "
            "the last axis to the front"
        )
    if faults:
        warnings.warn(f"{path}: x_train holds images as they are used: {'; and '.join(faults)}", stacklevel=1)


def _look_like_images(shape: tuple[int, ...]) -> bool:
    if len(shape) == 2:
        return shape[0] == shape[1] > 1
    return len(shape) == 3 and (shape[0] in _CHANNELS or shape[-1] in _CHANNELS)


def _class_names(path: Path, held: dict[str, npt.NDArray[np.generic]], labels: Tensor) -> tuple[str, ...] | None:
    if "class_names" not in held:
        return None
    names = tuple(map(str, held["class_names"].tolist()))
    classes = int(labels.max()) + 1 if len(labels) else 0
    if len(names) != classes:
        raise DataError(f"{path}: class_names has {len(names)} entries, expected {classes}, one for each label")
    return names
