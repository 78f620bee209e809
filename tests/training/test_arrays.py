"""The benchmark ``arrays``: samples from one file, and an error for every file that is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
    with pytest.raises(DataError, match="damaged, or no file of arrays: Object arrays cannot be loaded"):
        read_arrays(tmp_path)
