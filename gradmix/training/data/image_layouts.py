"""The layouts in which sets of images lie on disk, in folders by class or with files that name the classes.

Reading a layout lists its folders and checks labels; no image is opened.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gradmix.training.data.class_names import look_alikes, same_names
from gradmix.training.data.image_arrays import DataError
from gradmix.training.data.image_files import ImageFiles
from gradmix.training.extras import import_extra

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Ends of the names of images, in capitals or not, the ones of torchvision's ImageFolder; others are passed over."""

TINY_IMAGENET = "tiny-imagenet-200"
"""The folder in which Tiny ImageNet is published."""


def image_folder(root: str | os.PathLike[str], size: int, *, test: bool = True) -> tuple[ImageFiles, ImageFiles]:
    """Read images sorted into folders by class: ``root/train/<class>/**`` and ``root/val/<class>/**``.

    Without ``val`` it is ``root/test``. Labels are numbers of the training folders in the order of their names; a
    folder of the other part is of the class whose name is the same, be its letters composed or not. Images may lie in
    folders within these, links are followed, and their order is that of the names. Files that do not end as images do
    (:data:`EXTENSIONS`) and hidden ones, whose names start with a dot, are passed over. Listing 100,000 files takes
    about half a second on a local disk's cached folders (network file systems take longer); nothing is kept for the
    next time.

    Args:
        root: Folder with ``train`` and ``val`` or ``test``.
        size: Side of the decoded images, in pixels.
        test: Whether ``val`` or ``test`` is read; otherwise neither need be there, and the second result is empty.

    Returns:
        Training images and validation (or test) images.

    Raises:
        FileNotFoundError: A folder is missing.
        DataError: There is no class, a class without an image, or the classes of the two folders differ.
    """
    base = Path(root)
    try:
        train = _by_class(base, "train")
        names = [found.name for found in train]
        if not test:
            return _image_files(base, train, names, size), _none(base, names, size)
        part = _test_folder(base)
        held_out = _in_order(base, names, _by_class(base, part), part)
    except (DataError, FileNotFoundError) as error:
        if (base / "wnids.txt").is_file():
            raise type(error)(
                f"{error}. This is Tiny ImageNet: tiny_imagenet (split-tiny-imagenet) reads it, its validation images "
                "in folders or not"
            ) from error
        raise
    return _image_files(base, train, names, size), _image_files(base, held_out, names, size)


def tiny_imagenet(root: str | os.PathLike[str], size: int = 64, *, test: bool = True) -> tuple[ImageFiles, ImageFiles]:
    """Read Tiny ImageNet as it is published: 200 classes, 64x64 pixels, the validation images as test images.

    Labels follow ``wnids.txt``; the training images of class ``w`` lie in ``train/w/images``, all validation images in
    ``val/images``, with their classes in ``val/val_annotations.txt``. Classes are named by ``words.txt`` or, without
    it, by their WordNet ids. Images that somebody sorted into ``val/w`` or ``val/images/w``, or training images that
    lie in ``train/w`` itself, are found there; then no annotations are needed.

    Args:
        root: The folder ``tiny-imagenet-200`` or the one that holds it.
        size: Side of the decoded images, in pixels.
        test: Whether the validation images are read; otherwise they need not be there, and the second result is empty.

    Returns:
        Training images and validation images.

    Raises:
        FileNotFoundError: A file or folder is missing.
        DataError: A class has no image, or an annotation names an unknown class or a file that is not there, or a
            validation image has no annotation.
    """
    base = Path(root)
    if (base / TINY_IMAGENET).is_dir():
        base = base / TINY_IMAGENET
    listed = _lines(
        base / "wnids.txt",
        f"Tiny ImageNet's list of classes: the data directory is {TINY_IMAGENET}, as its archive unpacks, or holds it",
    )
    wnids = [line.strip() for line in listed if line.strip()]
    if not wnids or len(set(wnids)) != len(wnids):
        raise DataError(f"{base / 'wnids.txt'}: expected one class in each line, none twice")
    train = []
    for wnid in wnids:
        own, folder = os.path.join("train", wnid), os.path.join("train", wnid, "images")
        if not (base / folder).is_dir() and (base / own).is_dir() and _images(base / own):
            folder = own
        _need_folder(base / folder, "Tiny ImageNet's training images of a class")
        files = _images(base / folder)
        if not files:
            raise DataError(f"{base / folder}: no image of class {wnid!r}")
        train.append(_Class(wnid, [(folder, files)]))
    names = wnids
    if (base / "words.txt").is_file():
        words = dict(line.rstrip("\n").split("\t", 1) for line in _lines(base / "words.txt", "") if "\t" in line)
        names = [words.get(wnid, wnid).strip() for wnid in wnids]
    held_out = _tiny_validation(base, wnids, names, size) if test else _none(base, names, size)
    return _image_files(base, train, names, size), held_out


def _tiny_validation(base: Path, wnids: Sequence[str], names: Sequence[str], size: int) -> ImageFiles:
    """Tiny ImageNet's validation images, in one folder with annotations or sorted into folders of their classes."""
    images = os.path.join("val", "images")
    flat = (base / images).is_dir() and bool(_images(base / images))
    places = [place for place in ("val", images) if _holds_classes(base, place, wnids)]
    if len(places) + flat > 1:
        raise DataError(
            f"{base / 'val'}: sorted in part: images lie in folders of their classes in {' and in '.join(places)}"
            f"{f', others in {images}' if flat else ''}; expected all in one way"
        )
    if places:
        found = [each for each in _by_class(base, places[0], beside=("images",)) if each.name != "images"]
        return _image_files(base, _in_order(base, wnids, found, places[0]), names, size)
    annotations = base / "val" / "val_annotations.txt"
    classes = {}
    for line in _lines(
        annotations, "classes of Tiny ImageNet's validation images, or these in folders val/CLASS, as for image_folder"
    ):
        if line.strip():
            file, *rest = line.rstrip("\n").split("\t")
            if not rest:
                raise DataError(
                    f"{annotations}: got {line.strip()!r}, expected a file and its class with a tab between"
                )
            classes[file] = rest[0].strip()
    return _flat(base, images, classes, annotations, wnids, names, size)


def _holds_classes(base: Path, place: str, wnids: Sequence[str]) -> bool:
    folders = (os.path.join(place, wnid) for wnid in wnids)
    return any(files for folder in folders if (base / folder).is_dir() for _, files in _walk(base, folder))


def imagenet(
    root: str | os.PathLike[str], size: int, *, val_labels: str | os.PathLike[str] | None = None, test: bool = True
) -> tuple[ImageFiles, ImageFiles]:
    """Read ImageNet-1K, or some of its classes: ``train/<wnid>/*.JPEG``, the validation images as test images.

    Labels are numbers of the WordNet ids in order, as everywhere; classes are named by these ids. The validation images
    lie in ``val/<wnid>`` or, as they are published, all in ``val`` itself. In that case their classes come from either

    - ``LOC_val_solution.csv`` (columns ``ImageId`` and ``PredictionString``, which begins with the WordNet id), or
    - the folder of the development kit, ``ILSVRC2012_devkit_t12``: its list of numbers
      ``data/ILSVRC2012_validation_ground_truth.txt``, whose meaning is in ``data/meta.mat``. That is read by SciPy.

    Args:
        root: Folder with ``train`` and ``val``; also one in which they lie in ``ILSVRC/Data/CLS-LOC``.
        size: Side of the decoded images, in pixels.
        val_labels: The csv file or the folder of the development kit; ``None``: looked for in ``root`` by these names.
        test: Whether the validation images are read; otherwise they need not be there, and the second result is empty.

    Returns:
        Training images and validation images.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ModuleNotFoundError: The development kit is to be read, and SciPy is not installed.
        DataError: As :func:`image_folder` and :func:`tiny_imagenet` raise it.
    """
    top = Path(root)
    base = top / "ILSVRC" / "Data" / "CLS-LOC"
    base = base if base.is_dir() else top
    if not test:
        return image_folder(base, size, test=False)
    _need_folder(
        base / "val",
        "ImageNet's validation images, beside train with a folder for each class: both lie in the data directory, or "
        "in ILSVRC/Data/CLS-LOC in it",
    )
    flat = _images(base / "val")
    if not flat:
        return image_folder(base, size)
    source = _val_labels(top, val_labels)
    train = _by_class(base, "train")
    wnids = [name for name, _ in train]
    if _holds_classes(base, "val", wnids):
        raise DataError(
            f"{base / 'val'}: sorted in part: {len(flat)} images lie in it, others in folders of their classes; "
            "expected all in one way"
        )
    classes = _devkit_classes(source, flat) if source.is_dir() else _csv_classes(source, flat)
    return _image_files(base, train, wnids, size), _flat(base, "val", classes, source, wnids, wnids, size)


def _val_labels(top: Path, given: str | os.PathLike[str] | None) -> Path:
    names = ("LOC_val_solution.csv", "ILSVRC2012_devkit_t12")
    places = [Path(given)] if given is not None else [top / name for name in names]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(
        f"{places[0]}: missing. The validation images lie in one folder, so their classes are needed: "
        f"{' or '.join(names)} in {top}, or val_labels"
    )


def _csv_classes(source: Path, files: Sequence[str]) -> dict[str, str]:
    """Class of every file, by the table of image and prediction."""
    suffix = {Path(file).stem: Path(file).suffix for file in files}
    classes = {}
    rows = csv.DictReader(_lines(source, "classes of ImageNet's validation images"))
    if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
        raise DataError(f"{source}: got columns {rows.fieldnames}, expected ImageId and PredictionString")
    for row in rows:
        stem, prediction = (row["ImageId"] or "").strip(), (row["PredictionString"] or "").split()
        if not prediction:
            raise DataError(f"{source}: image {stem!r} has no class")
        classes[stem + suffix.get(stem, ".JPEG")] = prediction[0]
    return classes


def _devkit_classes(source: Path, files: Sequence[str]) -> dict[str, str]:
    """Class of every file, by the n-th number of the ground truth and the names of these numbers."""
    loadmat = import_extra("scipy.io", "ImageNet's development kit is read by SciPy").loadmat
    truth, meta = source / "data" / "ILSVRC2012_validation_ground_truth.txt", source / "data" / "meta.mat"
    numbers = [line.strip() for line in _lines(truth, "classes of ImageNet's validation images") if line.strip()]
    if not meta.is_file():
        raise FileNotFoundError(f"{meta}: missing; expected what the numbers of the development kit mean")
    try:
        synsets = np.atleast_1d(loadmat(meta, squeeze_me=True)["synsets"])
        wnids = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
    except Exception as error:  # of SciPy's own kinds, too
        raise DataError(f"{meta}: expected synsets with ILSVRC2012_ID and WNID, {error}") from error
    if len(numbers) != len(files):
        raise DataError(f"{truth}: got {len(numbers)} numbers for {len(files)} validation images")
    unknown = sorted(set(numbers) - set(wnids))
    if unknown:
        raise DataError(f"{truth}: got {_some(unknown)}, which {meta.name} does not name")
    return {file: wnids[number] for file, number in zip(files, numbers, strict=True)}


# --------------------------------------------------------------------------------------------------- parts of a layout


class _Class(NamedTuple):
    name: str
    folders: list[tuple[str, list[str]]]  # below the root, with their images


def _by_class(base: Path, part: str, beside: Sequence[str] = ()) -> list[_Class]:
    """The classes in ``base/part``, in order of their names, with all images below each; those beside may be empty."""
    _need_folder(base / part, "a folder with a folder for each class")
    with os.scandir(base / part) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    if not names:
        raise DataError(f"{base / part}: no class; expected a folder for each")
    classes = [_Class(name, list(_walk(base, os.path.join(part, name)))) for name in names]
    filled = [found.name for found in classes if any(files for _, files in found.folders)]
    empty = [name for name in names if name not in {*filled, *beside}]
    if empty:
        raise DataError(f"{base / part}: no image ({', '.join(EXTENSIONS)}) of class {_some(empty)}")
    return classes


def _walk(base: Path, folder: str) -> Iterator[tuple[str, list[str]]]:
    """All folders from ``folder`` down, in order, with their images; one that links lead back to only once."""
    waiting, seen = [folder], set()
    while waiting:
        here = waiting.pop()
        state = os.stat(base / here)
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        files, folders = [], []
        with os.scandir(base / here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                    files.append(entry.name)
                elif entry.is_dir():
                    folders.append(os.path.join(here, entry.name))
        yield here, sorted(files)
        waiting += sorted(folders, reverse=True)


def _images(folder: Path) -> list[str]:
    """Names of the images that lie in ``folder`` itself, in order."""
    return next(_walk(folder, ""))[1]


def _image_files(base: Path, classes: Sequence[_Class], names: Sequence[str], size: int) -> ImageFiles:
    counts = [sum(len(files) for _, files in folders) for _, folders in classes]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return ImageFiles(base, (each for _, folders in classes for each in folders), labels, names, size)


def _none(base: Path, names: Sequence[str], size: int) -> ImageFiles:
    """No images, of these classes."""
    return ImageFiles(base, (), (), names, size)


def _flat(
    base: Path,
    folder: str,
    classes: Mapping[str, str],
    source: Path,
    wnids: Sequence[str],
    names: Sequence[str],
    size: int,
) -> ImageFiles:
    """The images of one folder, whose classes a file tells."""
    _need_folder(base / folder, "validation images")
    files = _images(base / folder)
    for what, wrong in (
        (f"{source}: of files that are not in {base / folder}", set(classes) - set(files)),
        (f"{source}: nothing said of files in {base / folder}", set(files) - set(classes)),
        (f"{source}: of classes without training images", set(classes.values()) - set(wnids)),
        (f"{source}: no image of class", set(wnids) - set(classes.values())),
    ):
        if wrong:
            raise DataError(f"{what}: {_some(sorted(wrong))}")
    label = {wnid: k for k, wnid in enumerate(wnids)}
    return ImageFiles(base, [(folder, files)], [label[classes[file]] for file in files], names, size)


def _test_folder(base: Path) -> str:
    for part in ("val", "test"):
        if (base / part).is_dir():
            return part
    alike = look_alikes(("val", "test"), sorted(os.listdir(base)), str(base))
    raise FileNotFoundError(
        f"{base / 'val'}: missing, and {base / 'test'} too; expected one, with a folder for each class{alike}; or hold "
        "out training images (--validation)"
    )


def _in_order(base: Path, names: Sequence[str], test: Sequence[_Class], part: str) -> list[_Class]:
    """The classes of ``part`` in the order of the training classes ``names``, of which each must be one."""
    there = [found.name for found in test]
    pairs = same_names(names, there)
    for only, without, others in (
        (set(names) - set(pairs.values()), part, there),
        (set(there) - set(pairs), "train", names),
    ):
        if only:
            alike = look_alikes(sorted(only), sorted(others), without)
            raise DataError(f"{base}: no folder in {without} for class {_some(sorted(only))}{alike}")
    found = {pairs[each.name]: each for each in test}
    return [found[name] for name in names]


def _need_folder(folder: Path, what: str) -> None:
    if not folder.is_dir():
        beside = sorted(os.listdir(folder.parent)) if folder.parent.is_dir() else []
        alike = look_alikes([folder.name], beside, str(folder.parent))
        raise FileNotFoundError(f"{folder}: missing; expected {what}{alike}")


def _lines(path: Path, what: str) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected {what}")
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8, {error}") from error


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(repr(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
