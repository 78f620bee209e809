"""Labelled images from the files in which their data sets are published, checked while they are read.

Files are looked for in the layout torchvision uses, below one data directory. A file that is missing raises
:class:`FileNotFoundError` with the path expected and how to obtain it; a damaged one raises :class:`DataError`.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradmix.training.data import pickled_arrays
from gradmix.training.extras import import_extra

# Per-channel mean and standard deviation of the training images, values in [0, 1].
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY_IMAGENET_MEAN, TINY_IMAGENET_STD = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

_DIGIT_NAMES = tuple(str(digit) for digit in range(10))
_FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_IDX_SETS = {
    "MNIST": (_DIGIT_NAMES, MNIST_MEAN, MNIST_STD),
    "FashionMNIST": (_FASHION_NAMES, FASHION_MEAN, FASHION_STD),
}


class DataError(ValueError):
    """A data file is there but does not hold what its format promises; the message names the path and the fault."""


@dataclass(frozen=True)
class LabelledData:
    """A data set as read: raw values, and what turns them into a model's input.

    Args:
        train_x: Training samples ``(N, ...)``, images ``(N, C, H, W)`` among them, uint8 or float32; or N texts.
        train_y: Their labels ``(N,)`` int64 in ``[0, len(class_names))``.
        test_x: Test samples ``(M, ...)``, as ``train_x``; none, of the same shape, where they were not asked for.
        test_y: Their labels ``(M,)``.
        class_names: Name of every label; ``None``: the file has no names.
        maximum: The value of full intensity of pixels, which becomes 1; ``None``: values are used as they are.
        mean: Per-channel mean to subtract after scaling, or ``None``.
        std: Per-channel standard deviation to divide by after that, or ``None``.
    """

    train_x: Any
    train_y: Tensor
    test_x: Any
    test_y: Tensor
    class_names: tuple[str, ...] | None
    maximum: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def to_float(
    x: Tensor, maximum: float = 255.0, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
) -> Tensor:
    """Scale raw values to [0, 1] and, where constants are given, normalise: ``(x / maximum - mean) / std``.

    Args:
        x: Raw values ``(..., C, H, W)`` of any dtype.
        maximum: The raw value that becomes 1, above 0.
        mean: Per-channel mean ``(C,)`` of the scaled values, or ``None`` for 0.
        std: Per-channel standard deviation ``(C,)`` of the scaled values, or ``None`` for 1.

    Returns:
        A new float32 tensor of the same shape and device.

    Raises:
        ValueError: ``maximum`` is not above 0, or ``mean`` or ``std`` does not have one value per channel.
    """
    if not maximum > 0:
        raise ValueError(f"maximum: got {maximum}, expected a value above 0")
    scaled = x.to(torch.float32, copy=True).div_(maximum)
    for name, constants in (("mean", mean), ("std", std)):
        if constants is None:
            continue
        if x.dim() < 3 or x.shape[-3] != len(constants):
            raise ValueError(
                f"{name}: got {len(constants)} values for x of shape {tuple(x.shape)}, expected one for each channel"
            )
        values = torch.tensor(constants, dtype=torch.float32, device=x.device).reshape(-1, 1, 1)
        scaled = scaled.sub_(values) if name == "mean" else scaled.div_(values)
    return scaled


# ---------------------------------------------------------------------------------------------------------- data sets


def load_digits() -> LabelledData:
    """Read the 1,797 handwritten digits of 8x8 pixels that come with scikit-learn; values 0 to 16.

    They come without a test set. Of every class, in the order of the data set, each fifth (the 5th, 10th, ...) is a
    test sample: 1,442 training and 355 test samples. Samples of one writer stand together, so writers occur in both.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    table = _digits_table()
    x = torch.from_numpy(table[:, :-1].astype(np.float32)).view(-1, 1, 8, 8)
    y = torch.from_numpy(table[:, -1].astype(np.int64))
    test = rank_in_class(y) % 5 == 4
    return LabelledData(x[~test], y[~test], x[test], y[test], _DIGIT_NAMES, maximum=16.0)


def _digits_table() -> npt.NDArray[np.float64]:
    """(1797, 65): 64 pixel values and the label of each digit, from scikit-learn's file.

    scikit-learn itself is imported only if its file is not where it was: the import takes longer than a short run.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "split-digits needs scikit-learn, with which its data come: pip install 'gradmix[train]'", name="sklearn"
        )
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        return np.loadtxt(file, delimiter=",")
    bunch = import_extra("sklearn.datasets", "split-digits needs scikit-learn, with which its data come").load_digits()
    return np.column_stack([bunch.data, bunch.target])


def load_mnist(data_dir: str | Path, *, test: bool = True, name: str = "MNIST") -> LabelledData:
    """Read MNIST, 28x28 pixels, from ``<data_dir>/MNIST/raw``: four IDX files, plain or with ``.gz`` appended.

    Args:
        data_dir: The data directory.
        test: Whether the test files are read; otherwise they need not be there, and there are no test images.
        name: ``MNIST`` or ``FashionMNIST``, whose files lie in a folder of that name.

    Raises:
        FileNotFoundError: A file is missing.
        DataError: A file is damaged.
    """
    names, mean, std = _IDX_SETS[name]
    folder = Path(data_dir) / name / "raw"
    parts = ("train", "t10k") if test else ("train",)
    stems = [f"{part}-{kind}" for part in parts for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    paths = [next((p for p in (folder / s, folder / f"{s}.gz") if p.is_file()), folder / s) for s in stems]
    _require(paths, name, name, suffix="[.gz]")
    train = _idx_samples(paths[0], paths[1], len(names))
    held_out = _idx_samples(paths[2], paths[3], len(names)) if test else _none_of(train)
    return LabelledData(*train, *held_out, names, 255.0, mean, std)


load_fashion_mnist = partial(load_mnist, name="FashionMNIST")
"""Read Fashion-MNIST, as :func:`load_mnist` does."""


def load_cifar10(data_dir: str | Path, *, test: bool = True) -> LabelledData:
    """Read CIFAR-10, 3x32x32, from ``<data_dir>/cifar-10-batches-py``: five training batches, a test batch, names.

    Arguments and errors are those of :func:`load_mnist`.
    """
    folder = Path(data_dir) / "cifar-10-batches-py"
    train = [folder / f"data_batch_{number}" for number in range(1, 6)]
    meta = folder / "batches.meta"
    return _load_cifar(train, folder / "test_batch" if test else None, meta, "10", ("labels", "label_names"))


def load_cifar100(data_dir: str | Path, *, test: bool = True) -> LabelledData:
    """Read CIFAR-100, 3x32x32, with its 100 fine labels, from ``<data_dir>/cifar-100-python``.

    Arguments and errors are those of :func:`load_mnist`.
    """
    folder = Path(data_dir) / "cifar-100-python"
    keys = ("fine_labels", "fine_label_names")
    return _load_cifar([folder / "train"], folder / "test" if test else None, folder / "meta", "100", keys)


DATASETS: dict[str, Callable[..., LabelledData]] = {
    "digits": lambda _data_dir, *, test=True: load_digits(),
    "mnist": load_mnist,
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
}
"""Readers by name, each called with the data directory; with ``test=False`` test files need not be there."""


def rank_in_class(labels: Tensor) -> Tensor:
    """Place of every sample among those of its own class, counted from 0 in the order given.

    Args:
        labels: ``(N,)`` integers.

    Returns:
        ``(N,)`` int64.

    Example:
        >>> rank_in_class(torch.tensor([7, 3, 7, 7, 3])).tolist()
        [0, 0, 1, 2, 1]
    """
    _, where, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    order = torch.argsort(where, stable=True)
    starts = torch.cumsum(counts, 0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(labels), device=labels.device) - starts[where[order]]
    return rank


# ---------------------------------------------------------------------------------------------------------------- IDX

_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> npt.NDArray[Any]:
    """Read one array in the IDX format, compressed with gzip if the name ends in ``.gz``.

    The format: two zero bytes, a byte for the data type, a byte for the number of dimensions D, D sizes as big-endian
    32-bit integers, then the values, big-endian, last dimension fastest.

    Args:
        path: The file.

    Returns:
        The array, in the machine's own byte order, writeable.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: The file is not IDX, not gzip, or its length does not fit its header.
    """
    path = Path(path)
    with open_packed(path) as file:
        return _read_idx(path, file)


@contextmanager
def open_packed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, decompressed if its name ends in ``.gz``; where that is damaged, a DataError ends the block."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield cast(IO[bytes], file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error


def _read_idx(path: Path, file: IO[bytes]) -> npt.NDArray[Any]:
    start = up_to(file, 4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _IDX_DTYPES:
        raise DataError(f"{path}: not an IDX file, it begins with {start.hex(' ') or 'nothing'}")
    dtype, ndim = np.dtype(_IDX_DTYPES[start[2]]), start[3]
    header = 4 + 4 * ndim
    sizes = up_to(file, 4 * ndim)
    if len(sizes) < 4 * ndim:
        raise DataError(f"{path}: ends within its header, after {4 + len(sizes)} of {header} bytes")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    expected = math.prod(shape) * dtype.itemsize
    raw = up_to(file, expected + 1)  # one more, to see whether there is more, and the checksum at the end
    if len(raw) != expected:
        # Of what is compressed no more is read than was promised, so no more is known.
        least = "at least " if len(raw) > expected else ""
        raise DataError(
            f"{path}: {least}{header + len(raw)} bytes long, expected {header + expected} for an array of shape "
            f"{shape}; {'truncated' if len(raw) < expected else 'another file'}?"
        )
    try:
        values = np.frombuffer(raw, dtype).reshape(shape)
    except ValueError as error:  # more dimensions than numpy has
        raise DataError(f"{path}: an array of {ndim} dimensions, which numpy does not take ({error})") from error
    return values.astype(dtype.newbyteorder("="), copy=False)


def up_to(file: IO[bytes], count: int) -> bytearray:
    """The next ``count`` bytes of a file, or all that are left: memory is taken as bytes come, not as promised."""
    found = bytearray()
    while len(found) < count:
        part = file.read(min(count - len(found), 1 << 20))
        if not part:
            break
        found += part
    return found


def _idx_samples(x_path: Path, y_path: Path, classes: int) -> tuple[Tensor, Tensor]:
    x, y = read_idx(x_path), read_idx(y_path)
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[1:] != (28, 28) or len(x) == 0:
        raise DataError(f"{x_path}: holds {x.dtype} of shape {x.shape}, expected uint8 images (N, 28, 28)")
    if y.dtype != np.uint8 or y.shape != x.shape[:1]:
        raise DataError(f"{y_path}: holds {y.dtype} of shape {y.shape}, expected uint8 labels ({len(x)},)")
    return torch.from_numpy(x).unsqueeze(1), _label_tensor(y_path, y, classes)


# -------------------------------------------------------------------------------------------------------------- CIFAR


def read_pickle(path: str | Path) -> dict[str, Any]:
    """Read a pickled dictionary of numbers, strings and numpy arrays, and refuses to load anything else.

    A pickle may name any function to be called. :mod:`~gradmix.training.data.pickled_arrays` calls none and makes
    nothing but these, so a file from an unknown source can do no harm. Files of Python 2 and 3, and of either
    generation of numpy, are read; keys that are bytes come back as strings. Arrays are of numbers and read-only.

    Args:
        path: The file.

    Returns:
        The dictionary.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: The file is not a pickle, is cut short, or holds something else.
    """
    path = Path(path)
    raw = path.read_bytes()
    try:
        content = pickled_arrays.loads(raw)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: not a pickle of arrays, or damaged ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected a dictionary")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}


def _load_cifar(train: list[Path], test: Path | None, meta: Path, classes: str, keys: tuple[str, str]) -> LabelledData:
    _require([*train, *([] if test is None else [test]), meta], f"CIFAR-{classes}", f"CIFAR{classes}")
    label_key, name_key = keys
    names = _class_names(meta, name_key, int(classes))
    parts = [_cifar_samples(path, label_key, len(names)) for path in train]
    train_x, train_y = (torch.cat(columns) for columns in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
    held_out = _none_of(parts[0]) if test is None else _cifar_samples(test, label_key, len(names))
    mean, std = (CIFAR10_MEAN, CIFAR10_STD) if classes == "10" else (CIFAR100_MEAN, CIFAR100_STD)
    return LabelledData(train_x, train_y, *held_out, names, 255.0, mean, std)


def _cifar_samples(path: Path, label_key: str, classes: int) -> tuple[Tensor, Tensor]:
    content = read_pickle(path)
    for key in ("data", label_key):
        if key not in content:
            found = ", ".join(ascii(known[:40]) for known in list(content)[:10])
            raise DataError(f"{path}: has no entry {key!r}, only {found or 'none'}")
    x = content["data"]
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072 or len(x) == 0:
        found = f"{x.dtype} of shape {x.shape}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
        raise DataError(f"{path}: 'data' is {found}, expected uint8 rows (N, 3072)")
    y = content[label_key]
    if isinstance(y, (list, tuple)):
        # One by one: numpy would unfold a list that holds another many times, which is large though its file is small.
        other = next((type(label).__name__ for label in y if type(label) is not int), None)
        if other is not None:
            raise DataError(
                f"{path}: {label_key!r} is not a list of integers, it holds a {other}, expected {len(x)} integers"
            )
        y = np.array([min(max(label, -(1 << 62)), 1 << 62) for label in y], np.int64)
    if not isinstance(y, np.ndarray) or y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        found = f"{y.dtype} of shape {y.shape}" if isinstance(y, np.ndarray) else f"a {type(y).__name__}"
        raise DataError(f"{path}: {label_key!r} is {found}, expected {len(x)} integers")
    images = torch.from_numpy(np.array(x, order="C")).reshape(-1, 3, 32, 32)
    return images, _label_tensor(path, y, classes)


def _none_of(samples: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """No samples, of the shape and dtype of these."""
    x, y = samples
    return x[:0].clone(), y[:0].clone()


def _class_names(path: Path, key: str, count: int) -> tuple[str, ...]:
    names = read_pickle(path).get(key)
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, (str, bytes)) for name in names):
        raise DataError(f"{path}: {key!r} is not a list of {count} names")
    return tuple(name.decode("latin1") if isinstance(name, bytes) else name for name in names)


# ------------------------------------------------------------------------------------------------------------- checks


def _label_tensor(path: Path, y: npt.NDArray[Any], classes: int) -> Tensor:
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise DataError(f"{path}: label {wrong} out of range, expected 0 to {classes - 1}")
    return torch.from_numpy(y.astype(np.int64))


def _require(paths: list[Path], title: str, torchvision_name: str, suffix: str = "") -> None:
    missing = [path for path in paths if not path.is_file()]
    if not missing:
        return
    folder = missing[0].parent
    data_dir = folder.parent.parent if folder.name == "raw" else folder.parent
    names = ", ".join(path.name + suffix for path in missing)
    raise FileNotFoundError(
        f"{title}: missing {missing[0]}{suffix}; expected in {folder}: {names}. "
        f'To obtain them, wherever torchvision is installed: python -c "import torchvision; '
        f'torchvision.datasets.{torchvision_name}({str(data_dir)!r}, download=True)"; or copy the files there, under '
        f"these names, and give {data_dir} as the data directory"
    )
