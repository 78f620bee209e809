"""The benchmark ``arrays``: samples from one file, and an error for every file that is none."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from fresh import run_python

from gradmix.training.config import DataConfig, OptimConfig, TrainConfig
from gradmix.training.data.arrays import read_arrays
from gradmix.training.data.image_arrays import DataError
from gradmix.training.loop.trainer import train_one
from gradmix.training.streams.benchmarks import make_stream


def arrays(shape=(5,), dtype=np.float32, classes=4, label=np.int64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    held = {}
    for part, count in (("train", 40), ("test", 12)):
        x = rng.integers(0, 256, (count, *shape)) if dtype == np.uint8 else rng.normal(size=(count, *shape))
        held[f"x_{part}"], held[f"y_{part}"] = x.astype(dtype), (np.arange(count) % classes).astype(label)
    return held


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("folder", [True, False])
def test_a_file_is_read(tmp_path, suffix, folder):
    held, file = arrays(), tmp_path / f"arrays.{suffix}"
    if suffix == "npz":
        np.savez(file, **held)
    else:
        pytest.importorskip("safetensors.numpy", reason="safetensors is not installed").save_file(held, file)
    data = read_arrays(tmp_path if folder else file)
    for part, (x, y) in (("train", (data.train_x, data.train_y)), ("test", (data.test_x, data.test_y))):
        assert torch.equal(x, torch.from_numpy(held[f"x_{part}"])) and y.tolist() == held[f"y_{part}"].tolist()
    assert data.class_names is None


def test_features_are_learnt(tmp_path):
    held = arrays(dtype=np.float64, label=np.int32)
    for part in ("train", "test"):
        held[f"x_{part}"][:, :4] += 6 * np.eye(4)[held[f"y_{part}"]]
    np.savez(tmp_path / "mine.npz", **held, class_names=["a", "b", "c", "d"])
    config = TrainConfig(
        data=DataConfig("arrays", tmp_path / "mine.npz", classes_per_task=2),
        optim=OptimConfig(model="mlp", epochs=30, lr=0.05),
        threads=1,
    )
    result = train_one(config, "gradmix-sample", 0)
    assert result.status == "complete" and result.tasks == 2
    assert result.accuracy[-1].mean() > 0.6


def test_pixels_of_eight_bits_are_brought_to_one(tmp_path):
    held = arrays((1, 4, 4), np.uint8)
    held["x_train"][0] = 255
    np.savez(tmp_path / "arrays.npz", **held)
    stream = make_stream("arrays", tmp_path, classes_per_task=2)
    x = stream.tasks[0].train.read(torch.arange(3))
    assert x.dtype == torch.float32 and float(x.max()) == 1.0 and float(x.min()) >= 0.0
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3)]


def test_a_validation_needs_no_test_samples(tmp_path):
    held = {name: value for name, value in arrays().items() if "train" in name}
    np.savez(tmp_path / "arrays.npz", **held)
    stream = make_stream("arrays", tmp_path, validation=0.2, classes_per_task=2)
    assert [len(task.test) for task in stream.tasks] == [4, 4]
    with pytest.raises(DataError, match="holds x_train, y_train, expected x_test, y_test too; --validation 0.2"):
        make_stream("arrays", tmp_path)


def replaced(**values) -> dict[str, np.ndarray]:
    return {**arrays(), **values}


BAD = {
    "no samples": ({"y_train": arrays()["y_train"]}, "holds y_train, expected x_train, x_test, y_test too$"),
    "integers": (replaced(x_train=np.ones((40, 5), np.int32)), "x_train is of int32, expected floating-point numbers"),
    "no features": (replaced(x_test=np.ones(12, np.float32)), r"x_test has the shape \(12,\), expected \(N, ...\)"),
    "labels of text": (
        replaced(y_train=np.array(["cat"] * 40)),
        r"y_train is <U3 \(40,\), expected integers \(40,\) as x_train has samples: names, integers = "
        r"numpy\.unique\(labels, return_inverse=True\) makes integers of text, of y_train and y_test together",
    ),
    "labels that are objects": (
        replaced(y_test=np.array(["cat"] * 12, object)),
        r"y_test is an array of Python objects, expected numbers.*numpy\.unique\(labels, return_inverse=True\)",
    ),
    "NaN": (
        replaced(x_train=np.where(np.arange(40)[:, None] == 7, np.nan, np.ones((40, 5)))),
        r"arrays\.npz: x_train: sample 7 holds NaN, an infinity or a number beyond float32, expected finite",
    ),
    "beyond float32": (replaced(x_test=np.full((12, 5), 1e300)), "x_test: sample 0 holds NaN, an infinity or a"),
    "label vectors": (replaced(y_train=np.ones((40, 4))), r"y_train is float64 \(40, 4\), expected integers \(40,\)"),
    "fewer labels": (replaced(y_train=np.ones(39, int)), r"y_train is int64 \(39,\), expected integers \(40,\)"),
    "another width": (replaced(x_test=np.ones((12, 6), np.float32)), r"x_test has samples of shape \(6,\)"),
    "another dtype": (replaced(x_test=np.ones((12, 5), np.uint8)), "and torch.uint8, expected .* torch.float32"),
    "names": (replaced(class_names=np.array(["a"])), "class_names has 1 entries, expected 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_arrays_of_another_kind_are_named(tmp_path, case):
    held, message = BAD[case]
    np.savez(tmp_path / "arrays.npz", **held)
    with pytest.raises(DataError, match=message):
        read_arrays(tmp_path)


@pytest.mark.parametrize("name", ["arrays.npz", "arrays.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x93NUMPY", b"words"], ids=repr)
def test_a_damaged_file_is_named(tmp_path, name, content):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: damaged, or no file of"):
        read_arrays(tmp_path)


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"arrays: missing .*expected a file of x_train"):
        read_arrays(tmp_path)
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(DataError, match="holds one array, expected several by name"):
        read_arrays(tmp_path / "one.npy")
    np.savez(tmp_path / "arrays.npz", **{**arrays(), "x_train": np.array([object()])})
    with pytest.raises(DataError, match="x_train is an array of Python objects, expected numbers"):
        read_arrays(tmp_path)


def images(shape: tuple[int, ...], low: float, high: float, dtype=np.float32) -> dict[str, np.ndarray]:
    held = arrays(shape)
    rng = np.random.default_rng(1)
    for part in ("train", "test"):
        x = rng.uniform(low, high, held[f"x_{part}"].shape)
        x.flat[:2] = low, high
        held[f"x_{part}"] = x.astype(dtype)
    return held


RANGE = r"floats from {} to {}, expected \[0, 1\] or standardised ones: save pixels of 8 bits as uint8"
UNUSUAL = {
    "0 to 240, channels last": ((8, 8, 3), 0, 240, RANGE.format(0, 240) + ".*; and shape .8, 8, 3., expected the chan"),
    "0 to 255": ((3, 8, 8), 0, 255, RANGE.format(0, 255)),
    "0 to 16, without channels": ((8, 8), 0, 16, RANGE.format(0, 16)),
    "less their mean": ((1, 8, 8), -120, 135, RANGE.format(-120, 135)),
    "channels last": ((8, 8, 1), 0, 1, r"shape \(8, 8, 1\), expected the channels first, \(C, H, W\)"),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_floats_that_look_like_pixels_get_a_warning(tmp_path, case):
    shape, low, high, message = UNUSUAL[case]
    np.savez(tmp_path / "arrays.npz", **images(shape, low, high))
    with pytest.warns(UserWarning, match=rf"arrays\.npz: x_train holds images as they are used: {message}"):
        data = read_arrays(tmp_path)
    assert float(data.train_x.max()) == high, "they stay as they are"


@pytest.mark.parametrize(
    ("shape", "low", "high", "dtype"),
    [
        ((5,), 0, 240, np.float32),
        ((7, 5), 0, 240, np.float32),
        ((64, 8, 8), 0, 240, np.float32),
        ((3, 8, 8), 0, 1, np.float32),
        ((3, 8, 8), -2.1, 2.6, np.float32),
        ((3, 8, 8), 0, 255, np.uint8),
    ],
    ids=["a table", "sequences", "maps of features", "pixels", "standardised pixels", "bytes"],
)
def test_other_numbers_get_no_warning(tmp_path, shape, low, high, dtype):
    np.savez(tmp_path / "arrays.npz", **images(shape, low, high, dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_arrays(tmp_path)


def test_a_command_warns_in_one_line():
    assert run_python(
        """
import sys, warnings
from gradmix.cli.errors import warnings_in_one_line
from gradmix.training.data import arrays
sys.stderr = sys.stdout
with warnings_in_one_line():
    warnings.warn_explicit("a file\\nof two", UserWarning, arrays.__file__, 1)
    warnings.warn_explicit("theirs", UserWarning, "other.py", 7)
"""
    ) == ["gradmix: warning: a file of two", "other.py:7: UserWarning: theirs"]
