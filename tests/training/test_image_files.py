"""Layouts of image folders, with generated files in them, and decoding of what files hold, whole and damaged."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import run_python

from gradmix.training.data.image_arrays import DataError
from gradmix.training.data.image_files import DamagedImageError, ImageFiles, decode
from gradmix.training.data.image_layouts import EXTENSIONS, image_folder, imagenet, tiny_imagenet

Image = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow, which is not installed")


def smooth(width: int, height: int) -> np.ndarray:
    """A picture (height, width, 3) of slow waves, another in every channel."""
    down, across = np.mgrid[:height, :width]
    waves = [np.sin(down / (5 + 3 * c) + c) + np.cos(across / (7 + 2 * c)) for c in range(3)]
    return (np.stack(waves, 2) * 60 + 128).clip(0, 255).astype(np.uint8)


def encoded(image, kind: str, **options) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def jpeg(width: int = 12, height: int = 8, value: int | None = None) -> bytes:
    pixels = smooth(width, height) if value is None else np.full((height, width, 3), value, np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG", quality=95)


JPEG = jpeg()


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def below(images: ImageFiles, root: Path) -> list[tuple[str, int]]:
    return [
        (str(Path(images.path(k)).relative_to(root)), label)
        for k, label in zip(range(len(images)), images.labels.tolist(), strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------ decoding

RGB = smooth(60, 40)
COLOUR = Image.fromarray(RGB)
WHOLE = {
    "jpeg": (COLOUR, "JPEG", {"quality": 100, "subsampling": 0}),
    "progressive jpeg": (COLOUR, "JPEG", {"quality": 100, "subsampling": 0, "progressive": True}),
    "png": (COLOUR, "PNG", {}),
    "grey jpeg": (COLOUR.convert("L"), "JPEG", {"quality": 100}),
    "grey png with transparency": (COLOUR.convert("LA"), "PNG", {}),
    "palette": (COLOUR.convert("P"), "PNG", {}),
    "palette with transparent entries": (COLOUR.convert("P"), "PNG", {"transparency": bytes([0, 128, 255])}),
    "cmyk jpeg": (COLOUR.convert("CMYK"), "JPEG", {"quality": 100}),
    "rgba": (Image.fromarray(np.dstack([RGB, RGB[..., :1]])), "PNG", {}),
    "black and white": (COLOUR.convert("1"), "PNG", {}),
    "bmp": (COLOUR, "BMP", {}),
    "ppm": (COLOUR, "PPM", {}),
    "tiff": (COLOUR, "TIFF", {}),
    "webp": (COLOUR, "WEBP", {"lossless": True}),
}


@pytest.mark.parametrize("size", [4, 16, 40, 64])
@pytest.mark.parametrize("case", WHOLE)
def test_decoding_resizes_and_cuts_the_middle(case, size, tmp_path):
    image, kind, options = WHOLE[case]
    path = tmp_path / "image"
    path.write_bytes(encoded(image, kind, **options))
    result = decode(path, size)
    assert result.shape == (3, size, size) and result.dtype == torch.uint8 and result.is_contiguous()
    # 60 x 40 pixels, so that a quarter of the new side is to be cut off on either side.
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].double()
    scaled = torch.nn.functional.interpolate(pixels, (size, size * 3 // 2), mode="bilinear", antialias=True)[0]
    difference = (result - scaled[:, :, size // 4 : size // 4 + size]).abs()
    assert difference.mean() < 1.5 and difference.max() < (16 if case == "black and white" else 8)


def test_an_upright_image_is_cut_in_its_height(tmp_path):
    pixels = np.zeros((30, 10, 3), np.uint8)
    pixels[10:20] = 200
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    assert bool((decode(tmp_path / "a.png", 10) == 200).all())


@pytest.mark.parametrize(("width", "height"), [(1, 1000), (1000, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_narrow_images_cost_no_more_than_their_middle(width, height, kind, tmp_path):
    content = encoded(Image.fromarray(np.full((height, width, 3), 90, np.uint8)), kind)
    (tmp_path / "a").write_bytes(content)
    result = decode(tmp_path / "a", 32)
    assert result.shape == (3, 32, 32) and bool((result == 90).all())


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:10] = 255
    content = encoded(Image.fromarray(pixels), "JPEG", quality=95, exif=exif)
    assert Image.open(io.BytesIO(content)).getexif()[0x0112] == 6
    (tmp_path / "a.jpg").write_bytes(content)
    result = decode(tmp_path / "a.jpg", 20).float()
    assert result[:, :8].min() > 240 and result[:, 12:].max() < 15


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path):
    image = Image.fromarray(smooth(900, 600))
    (tmp_path / "a.jpg").write_bytes(encoded(image, "JPEG", quality=95))
    full = np.array(Image.open(tmp_path / "a.jpg").resize((64, 64), Image.Resampling.BILINEAR, box=(150, 0, 750, 600)))
    drawn = []
    original = Image.Image.resize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", lambda self, *a, **k: drawn.append(self.size) or original(self, *a, **k))
        result = decode(tmp_path / "a.jpg", 64)
    assert drawn == [(225, 150)]  # a quarter; an eighth would be less than twice 64
    difference = (result.permute(1, 2, 0).int() - torch.from_numpy(full).int()).abs().float()
    assert difference.mean() < 1 and difference.max() < 8


LARGE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
PNG = encoded(Image.fromarray(RGB), "PNG")
# Which Pillow would hand to Ghostscript to be run.
POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/etc/passwd) (r) file\nshowpage\n%%EOF"
)
DAMAGED = {
    "no bytes": (b"", "the file is empty"),
    "text": (b"<html>404 Not Found</html>", r"is no image of a kind that is read \(it begins with b'<html>40'\)"),
    "cut in the pixels": (LARGE[: len(LARGE) // 2], "cannot be decoded: .*truncated"),
    "cut in the header": (LARGE[:30], "is no image of a kind that is read|cannot be decoded"),
    "first bytes only": (LARGE[:3], "is no image of a kind that is read|cannot be decoded"),
    "png cut short": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "png with a bit flipped": (PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:], "cannot be decoded"),
    "zeros": (bytes(2000), r"is no image of a kind that is read \(it begins with b'\\x00"),
    "a program": (POSTSCRIPT, r"is no image of a kind that is read \(it begins with b'%!PS-Ado"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named_with_the_cause(case, tmp_path):
    content, message = DAMAGED[case]
    images = ImageFiles(put(tmp_path, {"folder/é 1.jpg": content}), [("folder", ["é 1.jpg"])], [0], ["a"], 16)
    with pytest.raises(DamagedImageError, match=f"^{re.escape(images.path(0))}: .*({message})") as caught:
        images[0]
    assert isinstance(caught.value, DataError) and pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_images_too_large_are_damaged(factor, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(60 * 40 / factor))
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(DamagedImageError, match=r"a.png: cannot be decoded: Image size \(2400 pixels\) exceeds limit"):
        decode(tmp_path / "a.png", 16)


def test_odd_metadata_are_no_warning(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0"
    content = encoded(COLOUR, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(content.replace(b"JFIF", b"JFIX"))
    assert decode(tmp_path / "a.jpg", 16).shape == (3, 16, 16)


def test_a_file_that_is_gone_is_not_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jpg"):
        decode(tmp_path / "gone.jpg", 16)


def test_out_of_memory_is_not_damage(tmp_path, monkeypatch):
    def exhausted(*_: object) -> None:
        raise MemoryError

    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setattr(Image.Image, "convert", exhausted)
    with pytest.raises(MemoryError):
        decode(tmp_path / "a.png", 16)


def test_pillow_is_missed_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gradmix\[images\]'"):
        decode(tmp_path / "a.png", 16)


def test_pillow_is_not_imported_with_the_module():
    assert run_python("import sys, gradmix.training.data.image_files; print('PIL' in sys.modules)") == ["False"]


# ---------------------------------------------------------------------------------------------------------- ImageFiles


def test_paths_and_labels():
    folders = [("train/a", ["1.jpg", "zwölf.png"]), ("train/b", []), ("train/c", [os.fsdecode(b"\xff.jpg"), "x"])]
    images = ImageFiles("/data", folders, [0, 0, 2, 2], ("a", "b", "c"), 8)
    expected = ["/data/train/a/1.jpg", "/data/train/a/zwölf.png", "/data/train/c/\udcff.jpg", "/data/train/c/x"]
    for each in (images, pickle.loads(pickle.dumps(images))):
        assert [each.path(k) for k in range(len(each))] == expected
        assert each.labels.tolist() == [0, 0, 2, 2] and each.labels.dtype == torch.int64
        assert each.class_names == ("a", "b", "c") and each.size == 8
    assert repr(images) == "ImageFiles('/data': 4 images of 3 classes)"
    assert images.path(torch.tensor(3)) == images.path(np.int64(3)) == expected[3]
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"index: got {index}, expected 0 to 3"):
            images.path(index)


def test_a_million_paths_are_some_bytes_each():
    folders = [(f"train/n{k:08d}", [f"n{k:08d}_{j}.JPEG" for j in range(100)]) for k in range(100)]
    images = ImageFiles("/data", folders, torch.arange(100).repeat_interleave(100), [str(k) for k in range(100)], 224)
    assert len(pickle.dumps(images)) / len(images) < 20 + 4 + 8 + 8  # name, folder, end, label


BAD_FILES = {
    "size": (lambda: ImageFiles("/", [], [], [], 0), "size: got 0, expected at least 1"),
    "labels too few": (
        lambda: ImageFiles("/", [("a", ["1", "2"])], [0], ["a"], 8),
        r"labels: got shape \(1,\), expected \(2,\), one for each image",
    ),
    "label too high": (
        lambda: ImageFiles("/", [("a", ["1", "2"])], [0, 1], ["a"], 8),
        "labels: got 0 to 1, expected 0 to 0, the labels of class_names",
    ),
    "label below zero": (
        lambda: ImageFiles("/", [("a", ["1"])], [-1], ["a"], 8),
        "labels: got -1 to -1, expected 0 to 0",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_arguments(case):
    call, message = BAD_FILES[case]
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------------- ImageFolder

FOLDER = {
    "train/cat/2.jpg": JPEG,
    "train/cat/10.JPG": JPEG,
    "train/cat/old/b.png": PNG,
    "train/cat/old/deep/a.webp": JPEG,
    "train/Dog/x.jpeg": JPEG,
    "val/cat/1.jpg": JPEG,
    "val/Dog/1.jpg": JPEG,
    "val/Dog/2.tiff": JPEG,
    "test/1.jpg": JPEG,
    "train/cat/._2.jpg": b"",
    "train/cat/.hidden/3.jpg": JPEG,
    "train/cat/notes.txt": "",
    "train/.cache/1.jpg": JPEG,
    "train/readme.jpg": JPEG,
}


def test_image_folder(tmp_path):
    put(tmp_path, FOLDER)
    train, test = image_folder(tmp_path, 8)
    assert train.class_names == test.class_names == ("Dog", "cat")
    assert below(train, tmp_path) == [
        ("train/Dog/x.jpeg", 0),
        ("train/cat/10.JPG", 1),
        ("train/cat/2.jpg", 1),
        ("train/cat/old/b.png", 1),
        ("train/cat/old/deep/a.webp", 1),
    ]
    assert below(test, tmp_path) == [("val/Dog/1.jpg", 0), ("val/Dog/2.tiff", 0), ("val/cat/1.jpg", 1)]
    assert train[0].shape == (3, 8, 8) and train.size == test.size == 8


def test_test_stands_in_for_val(tmp_path):
    put(tmp_path, {name.replace("val/", "test/"): FOLDER[name] for name in FOLDER if not name.startswith("test/")})
    _, test = image_folder(str(tmp_path), 8)
    assert below(test, tmp_path)[0] == ("test/Dog/1.jpg", 0)


def test_every_extension_is_read(tmp_path):
    files = {f"{part}/a/{k}{e}": JPEG for part in ("train", "val") for k, e in enumerate(EXTENSIONS)}
    train, _ = image_folder(put(tmp_path, files), 8)
    assert len(train) == len(EXTENSIONS) == 9


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path, {"train/a/1.jpg": JPEG, "val/a/1.jpg": JPEG, "elsewhere/2.jpg": JPEG})
    (tmp_path / "train/a/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "train/a")
    (tmp_path / "train/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/a/dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "val/b").symlink_to(tmp_path / "val/a")
    train, test = image_folder(tmp_path, 8)
    assert below(train, tmp_path) == [
        ("train/a/1.jpg", 0),
        ("train/a/more/2.jpg", 0),
        ("train/b/2.jpg", 1),
        ("train/b/back/1.jpg", 1),
    ]
    assert len(test) == 2


GOOD = {"train/a/1.jpg": JPEG, "train/b/1.jpg": JPEG, "val/a/1.jpg": JPEG, "val/b/1.jpg": JPEG}
BAD_FOLDERS = {
    "no train": ({"val/a/1.jpg": JPEG}, FileNotFoundError, "/train: missing; expected a folder with a folder for each"),
    "no val": ({"train/a/1.jpg": JPEG}, FileNotFoundError, "/val: missing, and .*/test too"),
    "no class": ({"train/1.jpg": JPEG, "val/a/1.jpg": JPEG}, DataError, "/train: no class; expected a folder for each"),
    "empty class": (GOOD | {"train/c/1.txt": b""}, DataError, r"/train: no image \(.jpg, .*\) of class 'c'$"),
    "empty class in val": (GOOD | {"val/c/.1.jpg": b""}, DataError, r"/val: no image \(.jpg, .*\) of class 'c'$"),
    "class without val": (GOOD | {"train/c/1.jpg": JPEG}, DataError, "no folder in val for class 'c'$"),
    "class without train": (GOOD | {"val/c/1.jpg": JPEG}, DataError, "no folder in train for class 'c'$"),
    "many classes without val": (
        GOOD | {f"train/{k}/1.jpg": JPEG for k in range(8)},
        DataError,
        "no folder in val for class '0', '1', '2', '3', '4' and 3 more",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_image_folders(case, tmp_path):
    files, error, message = BAD_FOLDERS[case]
    with pytest.raises(error, match=message):
        image_folder(put(tmp_path, files), 8)


# ------------------------------------------------------------------------------------------------------- Tiny ImageNet

TINY = {
    "wnids.txt": "n02\nn01\n",
    "words.txt": "n01\ttench, Tinca tinca\nn02\tgoldfish\nn03\tshark\n",
    "train/n01/images/n01_1.JPEG": JPEG,
    "train/n01/images/n01_0.JPEG": JPEG,
    "train/n01/n01_boxes.txt": "n01_0.JPEG\t0\t0\t1\t1\n",
    "train/n02/images/n02_0.JPEG": JPEG,
    "val/images/val_0.JPEG": JPEG,
    "val/images/val_1.JPEG": JPEG,
    "val/val_annotations.txt": "val_1.JPEG\tn01\t0\t32\t44\t62\nval_0.JPEG\tn02\t0\t0\t1\t1\n",
    "test/images/test_0.JPEG": JPEG,
}


@pytest.mark.parametrize("inside", [False, True])
def test_tiny_imagenet(inside, tmp_path):
    root = put(tmp_path / "tiny-imagenet-200", TINY)
    train, test = tiny_imagenet(root if inside else tmp_path)
    assert train.class_names == test.class_names == ("goldfish", "tench, Tinca tinca") and train.size == 64
    assert below(train, root) == [
        ("train/n02/images/n02_0.JPEG", 0),
        ("train/n01/images/n01_0.JPEG", 1),
        ("train/n01/images/n01_1.JPEG", 1),
    ]
    assert below(test, root) == [("val/images/val_0.JPEG", 0), ("val/images/val_1.JPEG", 1)]
    assert train[0].shape == (3, 64, 64)


def test_tiny_imagenet_without_words(tmp_path):
    put(tmp_path, {name: TINY[name] for name in TINY if name != "words.txt"})
    assert tiny_imagenet(tmp_path)[0].class_names == ("n02", "n01")


NOTES = "val/val_annotations.txt"
BAD_TINY = {
    "no list": (
        {"wnids.txt": None},
        FileNotFoundError,
        "/wnids.txt: missing; expected Tiny ImageNet's list of classes: the data directory is tiny-imagenet-200,",
    ),
    "empty list": ({"wnids.txt": "\n"}, DataError, "/wnids.txt: expected one class in each line, none twice"),
    "class twice": ({"wnids.txt": "n01\nn01\n"}, DataError, "/wnids.txt: expected one class in each line, none twice"),
    "no folder": ({"wnids.txt": "n01\nn02\nn03\n"}, FileNotFoundError, "/train/n03/images: missing; expected Tiny"),
    "no image": ({"train/n02/images/n02_0.JPEG": None}, DataError, "/train/n02/images: no image of class 'n02'"),
    "no annotations": ({NOTES: None}, FileNotFoundError, "/val_annotations.txt: missing; expected .*image_folder"),
    "annotation without a class": ({NOTES: "val_0.JPEG n01\n"}, DataError, "got 'val_0.JPEG n01', expected a file and"),
    "annotations not in UTF-8": ({NOTES: b"\xff\n"}, DataError, "/val_annotations.txt: expected text in UTF-8"),
    "annotation without a file": (
        {"val/images/val_1.JPEG": None},
        DataError,
        "val_annotations.txt: of files that are not in .*/val/images: 'val_1.JPEG'",
    ),
    "file without an annotation": (
        {"val/images/val_2.JPEG": JPEG},
        DataError,
        "val_annotations.txt: nothing said of files in .*/val/images: 'val_2.JPEG'",
    ),
    "class unknown": (
        {NOTES: "val_1.JPEG\tn03\nval_0.JPEG\tn02\n"},
        DataError,
        "val_annotations.txt: of classes without training images: 'n03'",
    ),
    "class without a validation image": (
        {NOTES: "val_1.JPEG\tn02\nval_0.JPEG\tn02\n"},
        DataError,
        "val_annotations.txt: no image of class: 'n01'",
    ),
}


@pytest.mark.parametrize("case", BAD_TINY)
def test_bad_tiny_imagenet(case, tmp_path):
    changes, error, message = BAD_TINY[case]
    put(tmp_path, TINY)
    for name, content in changes.items():
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            put(tmp_path, {name: content})
    with pytest.raises(error, match=message):
        tiny_imagenet(tmp_path)


# ------------------------------------------------------------------------------------------------------------ ImageNet

VAL = "ILSVRC2012_val_0000000"
TRAIN = {f"train/n0{k}/n0{k}_{j}.JPEG": JPEG for k in (1, 2, 3) for j in range(2)}
FLAT = {f"val/{VAL}{k}.JPEG": JPEG for k in (1, 2, 3, 4)}
CSV = (
    f"ImageId,PredictionString\n{VAL}3,n01 85 1 499 272 n01 1 2 3 4\n{VAL}1,n03 1 2 3 4\n"
    f"{VAL}2,n02 1 1 1 1\n{VAL}4,n02 \n"
)
EXPECTED = [(f"val/{VAL}{k}.JPEG", label) for k, label in ((1, 2), (2, 1), (3, 0), (4, 1))]


def devkit(root: Path, numbers: str = "5\n2\n9\n2\n") -> Path:
    """A development kit in which class n03 has number 5, n02 2 and n01 9, and a synset above them 1001."""
    savemat = pytest.importorskip("scipy.io", reason="the kit's table is written by SciPy").savemat
    (root / "data").mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(5, "n03", "shark", 0), (2, "n02", "goldfish", 0), (9, "n01", "tench", 0), (1001, "n00", "fish", 3)]
    savemat(root / "data" / "meta.mat", {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    (root / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(numbers)
    return root


def test_imagenet_with_folders(tmp_path):
    put(tmp_path, TRAIN | {f"val/n0{k}/{VAL}{k}.JPEG": JPEG for k in (3, 2, 1)})
    train, test = imagenet(tmp_path, 8)
    assert train.class_names == ("n01", "n02", "n03") and len(train) == 6
    assert below(test, tmp_path) == [(f"val/n0{k}/{VAL}{k}.JPEG", k - 1) for k in (1, 2, 3)]


def test_imagenet_with_a_table(tmp_path):
    train, test = imagenet(put(tmp_path, TRAIN | FLAT | {"LOC_val_solution.csv": CSV}), 8)
    assert below(test, tmp_path) == EXPECTED and test.class_names == train.class_names
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_imagenet_as_it_is_unpacked_with_its_table(tmp_path):
    base = put(tmp_path / "ILSVRC/Data/CLS-LOC", TRAIN | FLAT)
    _, test = imagenet(put(tmp_path, {"LOC_val_solution.csv": CSV}), 8)
    assert below(test, base) == EXPECTED


def test_imagenet_with_the_development_kit(tmp_path):
    put(tmp_path / "images", TRAIN | FLAT)
    _, test = imagenet(tmp_path / "images", 8, val_labels=devkit(tmp_path / "kit"))
    assert below(test, tmp_path / "images") == EXPECTED
    shutil.move(tmp_path / "kit", tmp_path / "images" / "ILSVRC2012_devkit_t12")
    assert below(imagenet(tmp_path / "images", 8)[1], tmp_path / "images") == EXPECTED


BAD_IMAGENET = {
    "no val": (TRAIN, FileNotFoundError, "/val: missing; expected ImageNet's validation images, beside train"),
    "no train": (FLAT | {"LOC_val_solution.csv": CSV}, FileNotFoundError, "/train: missing"),
    "no table": (
        TRAIN | FLAT,
        FileNotFoundError,
        "/LOC_val_solution.csv: missing. The validation images lie in one folder, so their classes are needed",
    ),
    "table of something else": (
        TRAIN | FLAT | {"LOC_val_solution.csv": "a,b\n1,2\n"},
        DataError,
        r"got columns \['a', 'b'\], expected ImageId and PredictionString",
    ),
    "empty table": (TRAIN | FLAT | {"LOC_val_solution.csv": ""}, DataError, "got columns None, expected ImageId"),
    "sample without a class": (
        TRAIN | FLAT | {"LOC_val_solution.csv": CSV + f"{VAL}5\n"},
        DataError,
        f"image '{VAL}5' has no class",
    ),
    "file without a row": (
        TRAIN | FLAT | {f"val/{VAL}5.JPEG": JPEG, "LOC_val_solution.csv": CSV},
        DataError,
        f"nothing said of files in .*/val: '{VAL}5.JPEG'",
    ),
    "sample without a file": (
        TRAIN | FLAT | {"LOC_val_solution.csv": CSV + f"{VAL}5,n01\n"},
        DataError,
        f"of files that are not in .*/val: '{VAL}5.JPEG'",
    ),
    "class that is not trained": (
        TRAIN | FLAT | {"LOC_val_solution.csv": CSV.replace("n03", "n09")},
        DataError,
        "of classes without training images: 'n09'",
    ),
}


@pytest.mark.parametrize("case", BAD_IMAGENET)
def test_bad_imagenet(case, tmp_path):
    files, error, message = BAD_IMAGENET[case]
    with pytest.raises(error, match=message):
        imagenet(put(tmp_path, files), 8)


BAD_KITS = {
    "too few numbers": ("5\n2\n9\n", None, DataError, "got 3 numbers for 4 validation images"),
    "unknown number": ("5\n2\n9\n7\n", None, DataError, "got '7', which meta.mat does not name"),
    "no table": ("5\n2\n9\n2\n", b"", FileNotFoundError, "/meta.mat: missing; expected what the numbers"),
    "table of something else": ("5\n2\n9\n2\n", b"not a table", DataError, "/meta.mat: expected synsets with"),
}


@pytest.mark.parametrize("case", BAD_KITS)
def test_bad_development_kits(case, tmp_path):
    numbers, table, error, message = BAD_KITS[case]
    put(tmp_path, TRAIN | FLAT)
    kit = devkit(tmp_path / "ILSVRC2012_devkit_t12", numbers)
    if table is not None:
        (kit / "data/meta.mat").unlink()
    if table:
        (kit / "data/meta.mat").write_bytes(table)
    with pytest.raises(error, match=message):
        imagenet(tmp_path, 8)


def test_labels_that_are_nowhere(tmp_path):
    put(tmp_path, TRAIN | FLAT | {"LOC_val_solution.csv": CSV})
    with pytest.raises(FileNotFoundError, match="/elsewhere.csv: missing"):
        imagenet(tmp_path, 8, val_labels=tmp_path / "elsewhere.csv")
