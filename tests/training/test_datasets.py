"""Readers of the published files: tiny files in the true layouts, damaged ones, and the real ones where they lie."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from gradmix.training.data import image_arrays as datasets
from gradmix.training.data.image_arrays import DataError, LabelledData, rank_in_class, read_idx, read_pickle, to_float

DATA_DIR_VARIABLE = "GRADMIX_DATA_DIR"


def real_data(*parts: str) -> Path:
    """The data directory named by the environment, if it holds ``parts``; skips the test otherwise."""
    root = os.environ.get(DATA_DIR_VARIABLE)
    if not root or not Path(root, *parts).exists():
        pytest.skip(f"{DATA_DIR_VARIABLE} does not name a directory with {'/'.join(parts)}")
    return Path(root)


# --------------------------------------------------------------------------------------------------- writing the files


def idx_bytes(array: np.ndarray, code: int = 0x08, magic: bytes = b"\0\0") -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return magic + bytes([code, array.ndim]) + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


IDX_NAMES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip


def tiny_idx(folder: Path, compress: bool = True, train: int = 30, test: int = 20) -> list[np.ndarray]:
    """Writes four IDX files below ``folder/raw`` and returns their arrays."""
    generator = np.random.default_rng(0)
    arrays = []
    for rows in (train, test):
        arrays += [generator.integers(0, 256, (rows, 28, 28), np.uint8), np.arange(rows, dtype=np.uint8) % 10]
    (folder / "raw").mkdir(parents=True)
    for name, array in zip(IDX_NAMES, arrays, strict=True):
        path = folder / "raw" / (name + ".gz" * compress)
        path.write_bytes(gzip.compress(idx_bytes(array)) if compress else idx_bytes(array))
    return arrays


class Python2Pickler(pickle._Pickler):  # type: ignore[misc]
    """Writes what Python 2 wrote: byte strings for all text and data, numpy's functions under their old names."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    def save_flag(self, value: bool) -> None:
        self.write(b"K" + bytes([value]))  # the flags of a dtype were numbers

    dispatch[str] = save_string
    dispatch[bytes] = save_string
    dispatch[bool] = save_flag


def python2_dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def bytes_keys(value: dict[str, Any]) -> dict[bytes, Any]:
    def as_bytes(item: Any) -> Any:
        if isinstance(item, list):
            return [as_bytes(each) for each in item]
        return item.encode() if isinstance(item, str) else item

    return {key.encode(): as_bytes(item) for key, item in value.items()}


WRITERS = {
    "python 2": python2_dumps,
    "protocol 2": lambda value: pickle.dumps(value, 2),
    "protocol 4": lambda value: pickle.dumps(value, 4),
    "protocol 5": lambda value: pickle.dumps(value, 5),
    "bytes for keys": lambda value: pickle.dumps(bytes_keys(value)),
    "numpy 1 names": lambda value: pickle.dumps(value, 2).replace(b"cnumpy._core.", b"cnumpy.core."),
}


def cifar_batch(rows: int, classes: int, seed: int, key: str) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows, 3072), np.uint8)
    return {"batch_label": "a batch", "data": data, key: [int(v) for v in np.arange(rows) % classes]}


def tiny_cifar10(root: Path, dumps: Any = pickle.dumps, rows: int = 10) -> dict[str, dict[str, Any]]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    content = {name: cifar_batch(rows, 10, seed, "labels") for seed, name in enumerate(names)}
    content["batches.meta"] = {"label_names": [f"class {k}" for k in range(10)], "num_vis": 3072}
    for name, value in content.items():
        (folder / name).write_bytes(dumps(value))
    return content


def tiny_cifar100(root: Path, dumps: Any = pickle.dumps, rows: int = 100) -> dict[str, dict[str, Any]]:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    content: dict[str, dict[str, Any]] = {
        name: {**cifar_batch(rows, 100, seed, "fine_labels"), "coarse_labels": [0] * rows}
        for seed, name in enumerate(("train", "test"))
    }
    content["meta"] = {"fine_label_names": [f"fine {k}" for k in range(100)], "coarse_label_names": ["coarse"] * 20}
    for name, value in content.items():
        (folder / name).write_bytes(dumps(value))
    return content


# ----------------------------------------------------------------------------------------------------------- IDX files


IDX_ARRAYS = {
    "uint8 images": (np.arange(24, dtype=np.uint8).reshape(2, 3, 4), 0x08),
    "int8": (np.array([-3, 7], dtype=np.int8), 0x09),
    "int16": (np.array([[-300, 700]], dtype=np.int16), 0x0B),
    "int32": (np.array([2**30, -5], dtype=np.int32), 0x0C),
    "float32": (np.array([1.5, -2.25], dtype=np.float32), 0x0D),
    "float64": (np.array([[1e300], [-0.0]]), 0x0E),
    "no samples": (np.zeros((0, 5), dtype=np.uint8), 0x08),
    "a single number": (np.array(9, dtype=np.uint8), 0x08),
}


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("case", IDX_ARRAYS)
def test_idx_arrays_of_every_type(tmp_path, case, compress):
    array, code = IDX_ARRAYS[case]
    raw = idx_bytes(array, code)
    path = tmp_path / ("array.gz" if compress else "array")
    path.write_bytes(gzip.compress(raw) if compress else raw)
    result = read_idx(path)
    assert result.dtype == array.dtype and result.dtype.isnative and result.flags.writeable
    assert result.shape == array.shape and np.array_equal(result, array)


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
DAMAGED_IDX = {
    "empty": ("a", b"", "not an IDX file, it begins with nothing"),
    "text": ("a", b"<html>not found</html>", "not an IDX file, it begins with 3c 68 74 6d"),
    "wrong magic": ("a", b"\1" + GOOD[1:], "not an IDX file"),
    "unknown data type": ("a", GOOD[:2] + b"\x0a" + GOOD[3:], "not an IDX file"),
    "ends within its header": ("a", GOOD[:10], "ends within its header, after 10 of 16 bytes"),
    "cut short": ("a", GOOD[:-1], r"39 bytes long, expected 40 for an array of shape \(2, 3, 4\)"),
    "too long": ("a", GOOD + b"\0", "41 bytes long, expected 40"),
    "sizes beyond all memory": ("a", GOOD[:4] + b"\xff" * 12 + GOOD[16:], "expected 79228162458924105385300197391"),
    "plain file named gz": ("a.gz", GOOD, "damaged gzip file"),
    "gzip cut short": ("a.gz", gzip.compress(GOOD)[:-9], "damaged gzip file"),
    "gzip with a flipped byte": (
        "a.gz", gzip.compress(GOOD)[:-8] + b"\0\0\0\0" + gzip.compress(GOOD)[-4:], "damaged gzip file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED_IDX)
def test_damaged_idx_names_the_path_and_the_fault(tmp_path, case):
    name, raw, message = DAMAGED_IDX[case]
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("folder", "load"), [("MNIST", datasets.load_mnist), ("FashionMNIST", datasets.load_fashion_mnist)]
)
def test_mnist_layout(tmp_path, folder, load, compress):
    train_x, train_y, test_x, test_y = tiny_idx(tmp_path / folder, compress)
    data = load(str(tmp_path))
    for tensor, array in ((data.train_x, train_x[:, None]), (data.test_x, test_x[:, None])):
        assert tensor.dtype == torch.uint8 and np.array_equal(tensor.numpy(), array)
    for tensor, array in ((data.train_y, train_y), (data.test_y, test_y)):
        assert tensor.dtype == torch.int64 and np.array_equal(tensor.numpy(), array)
    assert len(data.class_names) == 10 and len(set(data.class_names)) == 10
    constants = {"MNIST": ((0.1307,), (0.3081,)), "FashionMNIST": ((0.2860,), (0.3530,))}
    assert (data.maximum, (data.mean, data.std)) == (255.0, constants[folder])
    assert data.class_names[3] == {"MNIST": "3", "FashionMNIST": "Dress"}[folder]


def test_plain_file_goes_before_the_compressed_one(tmp_path):
    tiny_idx(tmp_path / "MNIST", compress=False)
    (tmp_path / "MNIST" / "raw" / (IDX_NAMES[0] + ".gz")).write_bytes(b"rubbish")
    assert len(datasets.load_mnist(tmp_path).train_x) == 30


WRONG_MNIST = {
    "label out of range": (1, np.full(30, 10, np.uint8), "label 10 out of range, expected 0 to 9"),
    "too few labels": (1, np.zeros(29, np.uint8), r"holds uint8 of shape \(29,\), expected uint8 labels \(30,\)"),
    "labels swapped for images": (0, np.zeros(30, np.uint8), r"holds uint8 of shape \(30,\), expected uint8 images"),
    "images of another size": (2, np.zeros((20, 32, 32), np.uint8), r"shape \(20, 32, 32\), expected uint8 images"),
    "no images": (2, np.zeros((0, 28, 28), np.uint8), r"shape \(0, 28, 28\)"),
}


@pytest.mark.parametrize("case", WRONG_MNIST)
def test_mnist_files_that_do_not_belong_together(tmp_path, case):
    which, array, message = WRONG_MNIST[case]
    tiny_idx(tmp_path / "MNIST")
    path = tmp_path / "MNIST" / "raw" / (IDX_NAMES[which] + ".gz")
    path.write_bytes(gzip.compress(idx_bytes(array)))
    with pytest.raises(DataError, match=message) as caught:
        datasets.load_mnist(tmp_path)
    assert str(path) in str(caught.value)


def test_idx_images_of_another_type(tmp_path):
    tiny_idx(tmp_path / "MNIST")
    path = tmp_path / "MNIST" / "raw" / (IDX_NAMES[0] + ".gz")
    path.write_bytes(gzip.compress(idx_bytes(np.zeros((30, 28, 28), np.float32), 0x0D)))
    with pytest.raises(DataError, match="holds float32 of shape"):
        datasets.load_mnist(tmp_path)


# --------------------------------------------------------------------------------------------------------- CIFAR files


@pytest.mark.parametrize("writer", WRITERS)
def test_cifar10_layout(tmp_path, writer):
    content = tiny_cifar10(tmp_path, WRITERS[writer])
    data = datasets.load_cifar10(tmp_path)
    train = np.concatenate([content[f"data_batch_{k}"]["data"] for k in range(1, 6)])
    assert data.train_x.dtype == torch.uint8 and np.array_equal(data.train_x.numpy(), train.reshape(-1, 3, 32, 32))
    assert np.array_equal(data.test_x.numpy(), content["test_batch"]["data"].reshape(-1, 3, 32, 32))
    assert data.train_y.tolist() == list(range(10)) * 5 and data.test_y.tolist() == list(range(10))
    assert data.train_y.dtype == torch.int64
    assert data.class_names == tuple(f"class {k}" for k in range(10))
    assert data.mean == datasets.CIFAR10_MEAN and data.std == datasets.CIFAR10_STD


@pytest.mark.parametrize("writer", WRITERS)
def test_cifar100_layout(tmp_path, writer):
    content = tiny_cifar100(tmp_path, WRITERS[writer])
    data = datasets.load_cifar100(tmp_path)
    assert np.array_equal(data.train_x.numpy().reshape(-1, 3072), content["train"]["data"])
    assert data.test_y.tolist() == list(range(100))
    assert data.class_names[99] == "fine 99" and data.mean == datasets.CIFAR100_MEAN


def test_cifar_pixels_stand_where_the_format_says(tmp_path):
    # A row is 1,024 red values, then green, then blue; each row by row.
    content = tiny_cifar10(tmp_path)
    row = content["test_batch"]["data"][3]
    image = datasets.load_cifar10(tmp_path).test_x[3]
    for channel, line, column in ((0, 0, 0), (1, 5, 7), (2, 31, 30)):
        assert image[channel, line, column] == row[channel * 1024 + line * 32 + column]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickled_numpy_labels_are_read(tmp_path, protocol):
    tiny_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    batch = cifar_batch(4, 10, 0, "labels")
    for labels in (np.arange(4), [np.int64(k) for k in range(4)]):
        path.write_bytes(pickle.dumps({**batch, "labels": labels}, protocol))
        assert datasets.load_cifar10(tmp_path).test_y.tolist() == [0, 1, 2, 3]


class Attack:
    """Unpickles by calling a function of the attacker's choice."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_calls_functions_is_refused_uncalled(tmp_path, protocol):
    path, marker = tmp_path / "batch", tmp_path / "marker"
    attacks = {
        "touch": Attack(os.mkdir, str(marker)),
        "eval": Attack(eval, f"__import__('os').mkdir({str(marker)!r})"),
        "by numpy": Attack(np.load, str(marker)),
        "by attribute": Attack(getattr, np, "load"),
    }
    for name, attack in attacks.items():
        try:
            path.write_bytes(pickle.dumps({"data": attack}, protocol))
        except TypeError:  # a module cannot be pickled: this attack is none
            continue
        with pytest.raises(DataError, match=r"not a pickle of arrays, or damaged.*not admitted"):
            read_pickle(path)
        assert not marker.exists(), name


def test_bytes_in_an_odd_encoding_are_refused(tmp_path):
    path = tmp_path / "batch"
    path.write_bytes(b"\x80\x02}U\x01aU\x01b" + b"s" + b"c_codecs\nencode\nU\x01aU\x03hex\x86R.")
    with pytest.raises(DataError, match="bytes in the encoding 'hex'"):
        read_pickle(path)


WHOLE = pickle.dumps(cifar_batch(3, 10, 0, "labels"))
DAMAGED_PICKLES = {
    "empty": (b"", "damaged"),
    "text": (b"<html>not found</html>", "damaged"),
    "cut short": (WHOLE[: len(WHOLE) // 2], "damaged"),
    "its last byte missing": (WHOLE[:-1], "damaged"),
    "a list": (pickle.dumps([1, 2]), "holds a list, expected a dictionary"),
    "no data": (pickle.dumps({"labels": [1]}), "has no entry 'data', only 'labels'"),
    "no labels": (pickle.dumps({"data": np.zeros((1, 3072), np.uint8)}), "has no entry 'labels'"),
    "nothing": (pickle.dumps({}), "has no entry 'data', only none"),
    "data as a list": (pickle.dumps({"data": [1], "labels": [1]}), "'data' is a list"),
    "data of another size": (
        pickle.dumps({"data": np.zeros((1, 784), np.uint8), "labels": [1]}), r"'data' is uint8 of shape \(1, 784\)",
    ),
    "data of another type": (pickle.dumps({"data": np.zeros((1, 3072)), "labels": [1]}), "'data' is float64"),
    "no samples": (pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}), r"shape \(0, 3072\)"),
    "too few labels": (
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}), r"shape \(1,\), expected 2 integers",
    ),
    "labels that are no numbers": (
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}), "expected 1 integers",
    ),
    "labels that are no list": (
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [[1], [1, 2]]}), "not a list of integers",
    ),
    "label too large": (
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}), "label 10 out of range",
    ),
    "label negative": (
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [-1, 10]}), "label -1 out of range",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED_PICKLES)
def test_damaged_cifar_names_the_path_and_the_fault(tmp_path, case):
    raw, message = DAMAGED_PICKLES[case]
    tiny_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        datasets.load_cifar10(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("names", [None, ["a"], [1] * 10, "abcdefghij"], ids=["none", "too few", "numbers", "text"])
def test_class_names_that_are_none(tmp_path, names):
    tiny_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "batches.meta"
    path.write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(DataError, match="'label_names' is not a list of 10 names"):
        datasets.load_cifar10(tmp_path)


# ------------------------------------------------------------------------------------------------------- missing files


MISSING = {
    "MNIST": (datasets.load_mnist, "MNIST/raw/train-images-idx3-ubyte[.gz]", "MNIST", "t10k-labels-idx1-ubyte[.gz]"),
    "Fashion-MNIST": (
        datasets.load_fashion_mnist, "FashionMNIST/raw/train-images-idx3-ubyte[.gz]", "FashionMNIST", "t10k-labels",
    ),
    "CIFAR-10": (datasets.load_cifar10, "cifar-10-batches-py/data_batch_1", "CIFAR10", "batches.meta"),
    "CIFAR-100": (datasets.load_cifar100, "cifar-100-python/train", "CIFAR100", "meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_missing_files_say_where_they_belong_and_how_to_get_them(tmp_path, case):
    load, path, torchvision_name, last = MISSING[case]
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path / "no such folder")
    message = str(caught.value)
    assert f"missing {tmp_path / 'no such folder'}/{path}" in message and last in message
    assert f"torchvision.datasets.{torchvision_name}('{tmp_path / 'no such folder'}', download=True)" in message


def test_only_the_missing_file_is_named(tmp_path):
    tiny_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4") as caught:
        datasets.load_cifar10(tmp_path)
    assert "data_batch_3" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- values


def test_to_float_is_its_formula():
    x = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    before = x.clone()
    result = to_float(x, 255.0, mean, std)
    assert result.dtype == torch.float32 and torch.equal(x, before)
    for channel in range(3):
        expected = (x[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(result[:, channel].double(), expected, rtol=1e-5, atol=1e-6)
    assert to_float(x).min() >= 0 and to_float(torch.tensor([[[0, 255]]])).tolist() == [[[0.0, 1.0]]]


def test_to_float_copies_and_takes_single_images():
    x = torch.rand(3, 4, 4)
    kept = x.clone()
    to_float(x, 1.0).zero_()
    assert torch.equal(x, kept)
    assert to_float(x[:0], 1.0).shape == (0, 4, 4)
    assert to_float(torch.empty(0, 3, 4, 4), 1.0, (0.0,) * 3, (1.0,) * 3).shape == (0, 3, 4, 4)


BAD_CONSTANTS = {
    "maximum 0": ((torch.ones(1, 1, 1), 0.0), "maximum: got 0.0"),
    "two means, three channels": ((torch.ones(1, 3, 2, 2), 1.0, (0.0, 0.0)), "mean: got 2 values for x of shape"),
    "std for flat samples": ((torch.ones(4, 3), 1.0, None, (1.0,)), "std: got 1 values"),
}


@pytest.mark.parametrize("case", BAD_CONSTANTS)
def test_bad_constants(case):
    arguments, message = BAD_CONSTANTS[case]
    with pytest.raises(ValueError, match=message):
        to_float(*arguments)


@pytest.mark.parametrize("labels", [[], [4], [7, 3, 7, 7, 3], [0] * 5, [2, 1, 0]], ids=str)
def test_rank_in_class(labels):
    expected = [labels[:place].count(label) for place, label in enumerate(labels)]
    assert rank_in_class(torch.tensor(labels, dtype=torch.int64)).tolist() == expected


# -------------------------------------------------------------------------------------------------------- real data


def test_digits():
    sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn, with which the digits come")
    data = datasets.load_digits()
    assert data.train_x.shape == (1442, 1, 8, 8) and data.test_x.shape == (355, 1, 8, 8)
    both = to_float(torch.cat([data.train_x, data.test_x]), data.maximum, data.mean, data.std)
    assert both.min() == 0 and both.max() == 1
    shares = torch.bincount(data.test_y) / torch.bincount(torch.cat([data.train_y, data.test_y]))
    assert (shares - 0.2).abs().max() < 0.01
    # Every row of the source is in one of the two, with its own label.
    source = sklearn_datasets.load_digits()

    def rows(x: Any, y: Any) -> list[tuple[Any, ...]]:
        return sorted((int(label), *image.reshape(-1).tolist()) for image, label in zip(x, y, strict=True))

    ours = rows(torch.cat([data.train_x, data.test_x]), torch.cat([data.train_y, data.test_y]))
    assert ours == rows(source.images, source.target)
    assert torch.equal(datasets.load_digits().train_x, data.train_x)


def test_digits_without_the_file_and_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn.datasets", reason="scikit-learn, with which the digits come")
    expected = datasets.load_digits()
    # The package is asked where its file is not.
    monkeypatch.setattr("importlib.util.find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    found = datasets.load_digits()
    assert torch.equal(found.train_x, expected.train_x) and torch.equal(found.test_y, expected.test_y)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"split-digits needs scikit-learn.*pip install 'gradmix\[train\]'"):
        datasets.load_digits()


def test_real_mnist():
    data = datasets.load_mnist(real_data("MNIST", "raw"))
    assert data.train_x.shape == (60_000, 1, 28, 28) and data.test_x.shape == (10_000, 1, 28, 28)
    # Counts of the digits as published with the data.
    assert torch.bincount(data.train_y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(data.test_y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.train_y[:5].tolist() == [5, 0, 4, 1, 9]
    normalised = to_float(data.train_x, data.maximum, data.mean, data.std)
    assert normalised.mean().item() == pytest.approx(0, abs=1e-3) and normalised.std().item() == pytest.approx(
        1, abs=1e-3
    )


def test_real_cifar10():
    data = datasets.load_cifar10(real_data("cifar-10-batches-py"))
    assert data.train_x.shape == (50_000, 3, 32, 32) and data.test_x.shape == (10_000, 3, 32, 32)
    assert torch.bincount(data.train_y).tolist() == [5000] * 10 and torch.bincount(data.test_y).tolist() == [1000] * 10
    assert data.class_names[0] == "airplane" and data.class_names[9] == "truck"
    normalised = to_float(data.train_x[::5], data.maximum, data.mean, data.std)
    assert normalised.mean((0, 2, 3)).abs().max() < 0.02 and (normalised.std((0, 2, 3)) - 1).abs().max() < 0.02


def test_registry_names_every_reader(tmp_path):
    tiny_idx(tmp_path / "MNIST")
    tiny_idx(tmp_path / "FashionMNIST")
    tiny_cifar10(tmp_path)
    tiny_cifar100(tmp_path)
    for name, load in datasets.DATASETS.items():
        data = load(tmp_path)
        assert isinstance(data, LabelledData), name
        assert data.train_x.dim() == 4 and len(data.train_x) == len(data.train_y), name
        assert int(data.train_y.max()) == len(data.class_names) - 1, name
