"""Generated images in the layouts in which data sets are published: a class is a colour under noise."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np


def draw(classes: int, each: int, size: int, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images (classes * each, channels, size, size) uint8 and their labels, class after class in turn."""
    labels = np.arange(classes * each) % classes
    colours = np.random.default_rng(3).uniform(60, 200, (classes, channels, 1, 1))
    noise = np.random.default_rng(4).normal(0, 25, (len(labels), channels, size, size))
    return (colours[labels] + noise).clip(0, 255).astype(np.uint8), labels


def write_idx(root: Path, train: int, test: int, name: str = "FashionMNIST") -> None:
    """MNIST's layout, ten classes with ``train`` and ``test`` images each."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part, each in (("train", train), ("t10k", test)):
        x, y = draw(10, each, 28, 1)
        head = struct.pack(">HBBIII", 0, 8, 3, len(x), 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + x.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, len(y)) + bytes(y.tolist()))


def write_cifar10(root: Path, train: int, test: int) -> None:
    """CIFAR-10's layout; ``train`` images of each class, in five files."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    x, y = draw(10, train, 32)
    for k in range(5):
        part = slice(k * len(x) // 5, (k + 1) * len(x) // 5)
        _write_batch(folder / f"data_batch_{k + 1}", x[part], y[part], "labels")
    _write_batch(folder / "test_batch", *draw(10, test, 32), "labels")
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {k}" for k in range(10)]}))


def write_cifar100(root: Path, train: int, test: int) -> None:
    """CIFAR-100's layout."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    _write_batch(folder / "train", *draw(100, train, 32), "fine_labels")
    _write_batch(folder / "test", *draw(100, test, 32), "fine_labels")
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {k}" for k in range(100)]}))


def write_tiny_imagenet(root: Path, train: int, test: int, classes: int = 200) -> None:
    """Tiny ImageNet's layout: validation images in one folder, their classes in a file."""
    base = root / "tiny-imagenet-200"
    (base / "val" / "images").mkdir(parents=True)
    names = [f"n{k:08d}" for k in range(classes)]
    (base / "wnids.txt").write_text("".join(f"{name}\n" for name in names))
    for number, (image, label) in enumerate(zip(*draw(classes, train, 64), strict=True)):
        _save(image, base / "train" / names[label] / "images" / f"{names[label]}_{number}.JPEG")
    lines = []
    for number, (image, label) in enumerate(zip(*draw(classes, test, 64), strict=True)):
        _save(image, base / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{names[label]}\t0\t0\t62\t62\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))


def write_imagenet(root: Path, train: int, test: int, classes: int = 1000, size: int = 96) -> None:
    """ImageNet's layout, the validation images in folders of their classes."""
    for part, each in (("train", train), ("val", test)):
        for number, (image, label) in enumerate(zip(*draw(classes, each, size), strict=True)):
            _save(image, root / part / f"n{label:08d}" / f"{part}_{number}.JPEG")


WRITERS: dict[str, Callable[..., None]] = {
    "split-fashion-mnist": write_idx,
    "split-cifar10": write_cifar10,
    "split-cifar100": write_cifar100,
    "split-tiny-imagenet": write_tiny_imagenet,
    "split-imagenet": write_imagenet,
}
"""By benchmark: writes a data set below a folder, so many training and test images of each class."""


def _write_batch(path: Path, x: np.ndarray, y: np.ndarray, key: str) -> None:
    path.write_bytes(pickle.dumps({"data": x.reshape(len(x), -1), key: y.tolist()}))


def _save(image: np.ndarray, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.transpose(1, 2, 0)).save(path, "JPEG", quality=90)
