"""Folders of classes: names that look alike, names that are no UTF-8, sorted validation images, no test folder."""

from __future__ import annotations

import doctest
import io
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradmix.training import config
from gradmix.training.data import class_names
from gradmix.training.data import image_arrays as datasets
from gradmix.training.data.class_names import look_alikes, printable, same_names
from gradmix.training.data.image_arrays import DataError
from gradmix.training.data.image_files import DamagedImageError, ImageFiles
from gradmix.training.data.image_layouts import image_folder, imagenet, tiny_imagenet
from gradmix.training.data.texts import NEWSGROUPS, newsgroups20, text_folder
from gradmix.training.streams.benchmarks import BENCHMARKS, make_stream

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def png(value: int = 0) -> bytes:
    target = io.BytesIO()
    Image.new("L", (4, 4), value).save(target, "PNG")
    return target.getvalue()


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


NFC, NFD = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))

# ---------------------------------------------------------------------------------------------------------- names


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(class_names).failed == 0


def test_names_are_the_same_in_normal_form_where_that_is_certain() -> None:
    assert same_names(["a", NFC], [NFD, "a"]) == {NFD: NFC, "a": "a"}
    assert same_names([NFC, NFD], [NFD, NFC]) == {NFC: NFC, NFD: NFD}
    assert same_names([NFC, NFD], [NFD]) == {NFD: NFD}
    third = "\u212b"  # Angstrom: another code for the letter A with a ring
    ring, apart = unicodedata.normalize("NFC", third), unicodedata.normalize("NFD", third)
    assert same_names([ring], [third, apart]) == {}, "which of the two is not known"


DIFFERENCES = {
    "case": ("cat", "Cat", "'Cat' for 'cat', which differs in case"),
    "a blank after it": ("cat", "cat ", "'cat ' for 'cat', which differs in blanks"),
    "a blank within": ("tabby cat", "tabby\xa0 cat", r"'tabby\xa0 cat' for 'tabby cat', which differs in blanks"),
    "a tab": ("cat", "\tcat", r"'\tcat' for 'cat', which differs in blanks"),
    "a byte order mark": ("cat", "\ufeffcat", r"'\ufeffcat' for 'cat', which differs in invisible characters"),
    "a joiner": ("cat", "c\u200dat", r"'c\u200dat' for 'cat', which differs in invisible characters"),
    "normal form": (NFC, NFD, r"'Mu\u0308ller' for 'M\xfcller', which differs in normal form (NFC, NFD)"),
    "several": (NFC, " MU\u0308LLER", "which differs in normal form (NFC, NFD), case, blanks and invisible characters"),
}


@pytest.mark.parametrize("kind", ["images", "texts"])
@pytest.mark.parametrize("case", [case for case in DIFFERENCES if case != "normal form"])
def test_an_error_says_how_names_that_look_alike_differ(case: str, kind: str, tmp_path: Path) -> None:
    one, other, message = DIFFERENCES[case]
    read: Callable[[Path], Any] = (lambda root: image_folder(root, 4)) if kind == "images" else text_folder
    file, content, part = ("1.png", png(), "val") if kind == "images" else ("1.txt", b"word", "test")
    put(tmp_path, {f"train/{one}/{file}": content, f"train/dog/{file}": content})
    put(tmp_path, {f"{part}/{other}/{file}": content, f"{part}/dog/{file}": content})
    if kind == "texts":  # which names what the test part has
        message = message if case == "several" else f"which differs in {message.split(' differs in ')[1]}"
    with pytest.raises(DataError, match=re.escape(message)):
        read(tmp_path)
    # What the message advises.
    (tmp_path / part / other).rename(tmp_path / part / one)
    read(tmp_path)


def test_look_alikes_are_named_once_and_others_are_not() -> None:
    assert look_alikes(["cat", "dog"], ["bird"], "val") == ""
    for one, other, message in DIFFERENCES.values():
        assert message in look_alikes([one], [other], "val")
    assert len(look_alikes([str(k) + "a" for k in range(9)], [str(k) + "A" for k in range(9)], "val").split(";")) == 4


@pytest.mark.parametrize("forms", [(NFC, NFD), (NFD, NFC)])
def test_composed_and_decomposed_letters_are_one_name(forms: tuple[str, str], tmp_path: Path) -> None:
    train, val = forms
    # The name beside it comes before the one form and after the other.
    files = {f"train/{train}/1.png": png(10), "train/Mv/1.png": png(20), "train/z/1.png": png(30)}
    files |= {f"val/{val}/1.png": png(110), "val/Mv/1.png": png(120), "val/z/1.png": png(130)}
    found, held_out = image_folder(put(tmp_path, files), 4)
    assert found.class_names == held_out.class_names == (*sorted(["Mv", train]), "z")
    values = {found.class_names[int(label)]: int(held_out[k][0, 0, 0]) for k, label in enumerate(held_out.labels)}
    assert values == {train: 110, "Mv": 120, "z": 130}
    assert [int(found[k][0, 0, 0]) + 100 for k in range(3)] == [int(held_out[k][0, 0, 0]) for k in range(3)]
    texts = {f"train/{train}/1.txt": "eins", "train/Mv/1.txt": "zwei"}
    texts |= {f"test/{val}/1.txt": "drei", "test/Mv/1.txt": "vier"}
    read = text_folder(put(tmp_path / "texts", texts))
    labelled = dict(zip(read.test_x, (read.class_names[label] for label in read.test_y), strict=True))
    assert labelled == {"drei": train, "vier": "Mv"}


def test_a_name_in_both_forms_is_told_from_that_in_one(tmp_path: Path) -> None:
    put(tmp_path, {f"train/{NFC}/1.png": png(), f"val/{NFC}/1.png": png(), f"val/{NFD}/2.png": png()})
    with pytest.raises(
        DataError, match=re.escape(r"train has 'M\xfcller' for 'Mu\u0308ller', which differs in normal")
    ):
        image_folder(tmp_path, 4)
    (tmp_path / "val" / NFD / "2.png").rename(tmp_path / "val" / NFC / "2.png")
    (tmp_path / "val" / NFD).rmdir()
    assert len(image_folder(tmp_path, 4)[1]) == 2


def test_folders_of_another_case_are_named(tmp_path: Path) -> None:
    put(tmp_path, {"Train/a/1.png": png(), "VAL/a/1.png": png()})
    with pytest.raises(FileNotFoundError, match=r"/train: missing; .* has 'Train' for 'train', which differs in case"):
        image_folder(tmp_path, 4)
    (tmp_path / "Train").rename(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"/val: missing, .* has 'VAL' for 'val', which differs in case"):
        image_folder(tmp_path, 4)
    (tmp_path / "VAL").rename(tmp_path / "val")
    assert len(image_folder(tmp_path, 4)[1]) == 1
    put(tmp_path, {"texts/Train/a/1.txt": "x"})
    with pytest.raises(FileNotFoundError, match="has 'Train' for 'train', which differs in case"):
        text_folder(tmp_path / "texts")


# ---------------------------------------------------------------------------------------------- bytes that are no UTF-8


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes")
def test_a_class_folder_that_is_no_utf8_has_a_name_that_can_be_saved(tmp_path: Path) -> None:
    name = b"caf\xe9"
    for part in (b"train", b"val", b"test"):
        for kind in (b"images", b"texts"):
            folder = os.path.join(os.fsencode(tmp_path), kind, part, name)
            os.makedirs(folder)
            Path(os.fsdecode(folder), "1.png").write_bytes(png(7))
            Path(os.fsdecode(folder), "1.txt").write_text("word")
    for found in image_folder(tmp_path / "images", 4):
        assert found.class_names == (r"caf\xe9",) and int(found[0][0, 0, 0]) == 7
        assert "".join(found.class_names).encode()
    assert text_folder(tmp_path / "texts").class_names == (r"caf\xe9",)
    stream = make_stream("image-folder", tmp_path / "images", image_size=4)
    assert stream.class_names == (r"caf\xe9",)
    damaged = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"images", b"val", name, b"1.png")))
    damaged.write_bytes(b"no image")
    with pytest.raises(DamagedImageError) as caught:
        image_folder(tmp_path / "images", 4)[1][0]
    assert r"caf\xe9/1.png: is no image" in str(caught.value) and str(caught.value).encode()


def test_printable_names_stay_as_they_are() -> None:
    for name in ("cat", NFC, NFD, "猫", "a\\b", ""):
        assert printable(name) == name
    assert ImageFiles("/", [("a", ["1.png"])], [0], ["\udcff"], 4).class_names == (r"\xff",)


# ---------------------------------------------------------------------------------- Tiny ImageNet, sorted in many ways

WNIDS = ("n02", "n01")
TINY: dict[str, bytes | str] = {
    "wnids.txt": "\ufeffn02\r\nn01\r\n",  # as an editor of Windows saves it
    "words.txt": "n01\ttench\r\nn02\tgoldfish\r\n",
    **{f"train/{wnid}/images/{wnid}_{k}.JPEG": png(10 * k + j) for k in range(2) for j, wnid in enumerate(WNIDS)},
}
NOTES = {"val/val_annotations.txt": "val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n"}
SORTED: dict[str, dict[str, bytes | str]] = {
    "as published": {"val/images/val_0.JPEG": png(100), "val/images/val_1.JPEG": png(101), **NOTES},
    "val/CLASS": {"val/n02/val_0.JPEG": png(100), "val/n01/val_1.JPEG": png(101), **NOTES},
    "val/CLASS without annotations": {"val/n02/val_0.JPEG": png(100), "val/n01/val_1.JPEG": png(101)},
    "val/CLASS beside the old folder": {
        "val/n02/val_0.JPEG": png(100), "val/n01/val_1.JPEG": png(101), "val/images/.keep": b"", **NOTES,
    },
    "val/CLASS/images": {"val/n02/images/val_0.JPEG": png(100), "val/n01/images/val_1.JPEG": png(101), **NOTES},
    "val/images/CLASS": {"val/images/n02/val_0.JPEG": png(100), "val/images/n01/val_1.JPEG": png(101), **NOTES},
    "as published, folders made for sorting": {
        "val/images/val_0.JPEG": png(100), "val/images/val_1.JPEG": png(101), "val/n01/.keep": b"", **NOTES,
    },
}  # fmt: skip


@pytest.mark.parametrize("flat", [False, True], ids=["train/CLASS/images", "train/CLASS"])
@pytest.mark.parametrize("form", SORTED)
def test_tiny_imagenet_is_read_sorted_or_not(form: str, flat: bool, tmp_path: Path) -> None:
    files = {(name.replace("/images/", "/") if flat and "train" in name else name): TINY[name] for name in TINY}
    put(tmp_path, files | SORTED[form])
    train, held_out = tiny_imagenet(tmp_path, 4)
    assert train.class_names == held_out.class_names == ("goldfish", "tench")
    assert [(int(held_out[k][0, 0, 0]), int(held_out.labels[k])) for k in range(2)] == [(100, 0), (101, 1)]
    assert [(int(train[k][0, 0, 0]), int(train.labels[k])) for k in range(4)] == [(0, 0), (10, 0), (1, 1), (11, 1)]
    if (tmp_path / "val" / "images").is_dir():
        with pytest.raises((DataError, FileNotFoundError), match=r"This is Tiny ImageNet: tiny_imagenet .* reads it"):
            image_folder(tmp_path, 4)


SORTED_IN_PART = {
    "some in val/CLASS": {"val/n02/val_0.JPEG": png(), "val/images/val_1.JPEG": png(), **NOTES},
    "some in val/images/CLASS": {"val/images/n02/val_0.JPEG": png(), "val/images/val_1.JPEG": png(), **NOTES},
    "some in each": {"val/images/n02/val_0.JPEG": png(), "val/n01/val_1.JPEG": png(), **NOTES},
}


@pytest.mark.parametrize("form", SORTED_IN_PART)
def test_images_that_are_sorted_in_part_are_refused(form: str, tmp_path: Path) -> None:
    put(tmp_path, TINY | SORTED_IN_PART[form])
    with pytest.raises(DataError, match=r"/val: sorted in part: .*; expected all in one way"):
        tiny_imagenet(tmp_path, 4)
    shutil.rmtree(tmp_path / "val")
    put(tmp_path, SORTED["val/images/CLASS"])
    tiny_imagenet(tmp_path, 4)


def test_imagenet_that_is_sorted_in_part_is_refused(tmp_path: Path) -> None:
    put(tmp_path, {"train/n01/1.JPEG": png(), "val/n01/1.JPEG": png(), "val/2.JPEG": png()})
    put(tmp_path, {"LOC_val_solution.csv": "ImageId,PredictionString\n2,n01 1\n"})
    with pytest.raises(DataError, match=r"/val: sorted in part: 1 images lie in it, others in folders"):
        imagenet(tmp_path, 4)
    (tmp_path / "val" / "2.JPEG").rename(tmp_path / "val" / "n01" / "2.JPEG")
    assert len(imagenet(tmp_path, 4)[1]) == 2


def test_a_sorted_class_that_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    put(tmp_path, TINY | {"val/n02/val_0.JPEG": png()})
    with pytest.raises(DataError, match="no folder in val for class 'n01'"):
        tiny_imagenet(tmp_path, 4)
    put(tmp_path, {"val/n01/val_1.JPEG": png(), "val/n03/val_2.JPEG": png()})
    with pytest.raises(DataError, match="no folder in train for class 'n03'"):
        tiny_imagenet(tmp_path, 4)


def test_a_table_with_blanks_and_a_mark_is_read(tmp_path: Path) -> None:
    put(tmp_path, {"train/n01/1.JPEG": png(), "train/n02/1.JPEG": png(), "val/a.JPEG": png(), "val/b.JPEG": png()})
    put(tmp_path, {"LOC_val_solution.csv": "\ufeffImageId,PredictionString\r\na ,n02 1 2\r\nb,n01 1 2\r\n"})
    assert imagenet(tmp_path, 4)[1].labels.tolist() == [1, 0]


# ------------------------------------------------------------------------------------- validation without test files


def cifar(folder: Path, names: list[str], label_key: str, name_key: str, meta: str, classes: int) -> None:
    import pickle

    folder.mkdir(parents=True)
    y = [k % classes for k in range(2 * classes)]
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"data": np.zeros((2 * classes, 3072), np.uint8), label_key: y}))
    (folder / meta).write_bytes(pickle.dumps({name_key: [f"c{k}" for k in range(classes)]}))


def idx(folder: Path) -> None:
    import struct

    folder.mkdir(parents=True)
    y = bytes(range(10)) * 4
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">HBBIII", 0, 8, 3, 40, 28, 28) + bytes(40 * 784))
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 40) + y)


def pictures(root: Path, *middle: str) -> None:
    for k in range(4):
        put(root, {"/".join(("train", f"n0{k}", *middle, f"{j}.JPEG")): png() for j in range(4)})


TRAINING_FILES: dict[str, Callable[[Path], object]] = {
    "split-mnist": lambda root: idx(root / "MNIST" / "raw"),
    "split-fashion-mnist": lambda root: idx(root / "FashionMNIST" / "raw"),
    "split-cifar10": lambda root: cifar(
        root / "cifar-10-batches-py", [f"data_batch_{k}" for k in range(1, 6)], "labels", "label_names",
        "batches.meta", 10,
    ),
    "split-cifar100": lambda root: cifar(
        root / "cifar-100-python", ["train"], "fine_labels", "fine_label_names", "meta", 100
    ),
    "split-tiny-imagenet": lambda root: (
        pictures(root, "images"), put(root, {"wnids.txt": "n00\nn01\nn02\nn03\n"}),
    ),
    "split-imagenet": pictures,
    "image-folder": pictures,
    "text-folder": lambda root: put(root, {f"train/c{k}/{j}.txt": "word" for k in range(4) for j in range(4)}),
    "split-20newsgroups": lambda root: put(
        root, {f"20news-bydate-train/{group}/{j}": "From: a\n\nwords\n" for group in NEWSGROUPS for j in range(4)}
    ),
}  # fmt: skip
WITHOUT_TEST_FILES = {"split-digits", "split-descriptions", "split-covertype", "split-wine", "arrays"}


def test_every_benchmark_is_here_or_has_no_test_files() -> None:
    assert TRAINING_FILES.keys() | WITHOUT_TEST_FILES == BENCHMARKS.keys()


@pytest.mark.parametrize("name", TRAINING_FILES)
def test_a_validation_needs_no_test_files(name: str, tmp_path: Path) -> None:
    TRAINING_FILES[name](tmp_path)
    size = {"image_size": 8} if name in ("split-tiny-imagenet", "split-imagenet", "image-folder") else {}
    classes = {"classes_per_task": 2} if name in ("split-tiny-imagenet", "split-imagenet") else {}
    with pytest.raises(FileNotFoundError, match="missing"):
        make_stream(name, tmp_path, **size, **classes)
    stream = make_stream(name, tmp_path, validation=0.5, **size, **classes)
    for task in stream.tasks:
        assert len(task.train) == len(task.test) > 0
        assert set(task.test.y.tolist()) == set(task.classes) == set(task.train.y.tolist())
        assert task.test.read(torch.tensor([0])).shape[0] == 1


def test_the_advice_to_hold_out_training_images_works(tmp_path: Path) -> None:
    pictures(tmp_path)
    with pytest.raises(FileNotFoundError, match="or hold out training images .--validation"):
        image_folder(tmp_path, 8)
    section = config.DataConfig(benchmark="image-folder", data_dir=str(tmp_path), validation=0.25, image_size=8)
    from gradmix.training.streams.benchmarks import stream_of

    assert [len(task.test) for task in stream_of(section).tasks] == [2, 2]


def test_a_benchmark_that_lacks_a_class_is_refused(tmp_path: Path) -> None:
    idx(tmp_path / "MNIST" / "raw")
    labels = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes().replace(b"\x03", b"\x04"))
    with pytest.raises(ValueError, match="split-mnist: no samples of class 3$"):
        make_stream("split-mnist", tmp_path, validation=0.5)


def test_readers_without_test_files_have_none(tmp_path: Path) -> None:
    idx(tmp_path / "MNIST" / "raw")
    data = datasets.load_mnist(tmp_path, test=False)
    assert data.test_x.shape == (0, 1, 28, 28) and data.test_y.shape == (0,) and data.test_x.dtype == torch.uint8
    pictures(tmp_path / "images")
    held_out = image_folder(tmp_path / "images", 8, test=False)[1]
    assert len(held_out) == 0 and held_out.class_names == ("n00", "n01", "n02", "n03")
    TRAINING_FILES["split-20newsgroups"](tmp_path / "news")
    texts = newsgroups20(tmp_path / "news", test=False)
    assert texts.test_x == [] and texts.test_y.shape == (0,) and len(texts.train_x) == 80
