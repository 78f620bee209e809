"""Images of every depth: the same picture has the same pixels, from files and as items, or it is refused by name."""

from __future__ import annotations

import struct
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradmix.training.data.image_files import DamagedImageError, decode
from gradmix.training.data.image_layouts import image_folder
from gradmix.training.data.pixels import eight_bits
from gradmix.training.data.samples import Inputs
from gradmix.training.loop.reading import Reading
from gradmix.training.streams import class_incremental

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

SIDE = 16
RAMP = np.linspace(0.0, 1.0, SIDE * SIDE).reshape(SIDE, SIDE)
GREY = np.rint(RAMP * 255)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)


def tiff16(values: np.ndarray, photometric: int, bits: int = 16) -> bytes:
    """A TIFF of one strip, little end first, as scanners write it."""
    data = values.astype("<u2").tobytes()
    if bits == 12:  # two values in three bytes
        pairs = values.astype(np.uint32).reshape(-1, 2)
        packed = (pairs[:, 0] << 12) | pairs[:, 1]
        data = b"".join(int(each).to_bytes(3, "big") for each in packed)
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def saved(path: Path, image: Any, **options: Any) -> Path:
    image.save(path, **options)
    try:
        with Image.open(path) as again:
            again.load()
    except OSError as error:
        pytest.skip(f"Pillow {version('pillow')} does not read what it has written: {error}")
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def grey(values: np.ndarray, dtype: Any) -> Any:
    return Image.fromarray(values.astype(dtype))


def sixteen() -> np.ndarray:
    return np.rint(RAMP * 65535)


def palette(transparency: Any = None) -> Any:
    image = grey(GREY, np.uint8).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def colours(mode: str) -> Any:
    return Image.fromarray(np.rint(COLOURS * 255).astype(np.uint8)).convert(mode)


def with_alpha(mode: str) -> Any:
    image = (grey(GREY, np.uint8) if mode == "LA" else colours("RGB")).convert(mode)
    image.putalpha(grey(255 - GREY, np.uint8))
    return image


BIG = sixteen().astype(">u2")
FILES = {
    "8 bits": (lambda p: saved(p / "1.png", grey(GREY, np.uint8)), GREY),
    "16 bits, PNG": (lambda p: saved(p / "1.png", grey(sixteen(), np.uint16)), GREY),
    "16 bits, TIFF": (lambda p: saved(p / "1.tif", grey(sixteen(), np.uint16)), GREY),
    "16 bits, TIFF, big end first": (
        lambda p: saved(p / "1.tif", Image.frombytes("I;16B", (SIDE, SIDE), BIG.tobytes())),
        GREY,
    ),
    "16 bits, TIFF, 0 is white": (lambda p: written(p / "1.tif", tiff16(65535 - sixteen(), 0)), GREY),
    "16 bits, TIFF, 0 is black": (lambda p: written(p / "1.tif", tiff16(sixteen(), 1)), GREY),
    "12 bits, TIFF": (
        lambda p: written(p / "1.tif", tiff16(np.rint(RAMP * 4095), 1, bits=12)),
        np.rint(np.rint(RAMP * 4095) / 4095 * 255),
    ),
    "16 bits, PGM": (lambda p: written(p / "1.pgm", b"P5 16 16 65535\n" + BIG.tobytes()), GREY),
    "10 bits, PGM": (
        lambda p: written(p / "1.pgm", b"P5 16 16 1023\n" + np.rint(RAMP * 1023).astype(">u2").tobytes()),
        np.rint(np.rint(RAMP * 1023) / 1023 * 255),
    ),
    "4 bits, PGM": (
        lambda p: written(p / "1.pgm", b"P5 16 16 15\n" + np.rint(RAMP * 15).astype(np.uint8).tobytes()),
        np.rint(RAMP * 15) * 17,
    ),
    "1 bit, PNG": (lambda p: saved(p / "1.png", grey(GREY, np.uint8).convert("1", dither=0)), (GREY > 127) * 255),
    "1 bit, TIFF": (lambda p: saved(p / "1.tif", grey(GREY, np.uint8).convert("1", dither=0)), (GREY > 127) * 255),
    "floats in [0, 1]": (lambda p: saved(p / "1.tif", grey(RAMP, np.float32)), GREY),
    "a palette": (lambda p: saved(p / "1.png", palette()), GREY),
    "a palette, one colour transparent": (lambda p: saved(p / "1.png", palette(3)), GREY),
    "a palette, transparent by degrees": (lambda p: saved(p / "1.png", palette(bytes(range(256)))), GREY),
    "grey with transparency": (lambda p: saved(p / "1.png", with_alpha("LA")), GREY),
    "RGB": (lambda p: saved(p / "1.png", colours("RGB")), np.rint(COLOURS * 255)),
    "RGB with transparency": (lambda p: saved(p / "1.png", with_alpha("RGBA")), np.rint(COLOURS * 255)),
    "RGB of 16 bits, PPM": (
        lambda p: written(p / "1.ppm", b"P6 16 16 65535\n" + np.rint(COLOURS * 65535).astype(">u2").tobytes()),
        np.rint(COLOURS * 255),
    ),
    "CMYK": (lambda p: saved(p / "1.tif", colours("CMYK")), np.rint(COLOURS * 255)),
    "YCbCr": (lambda p: saved(p / "1.tif", colours("YCbCr")), np.rint(COLOURS * 255)),
}

# A level for what is cut off rather than rounded by Pillow's own reading of 16 bits by channel, three for YCbCr.
TOLERANCE = {"RGB of 16 bits, PPM": 1, "YCbCr": 3}


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_every_depth_has_its_pixels(case: str, tmp_path: Path) -> None:
    write, expected = FILES[case]
    pixels = decode(write(tmp_path), SIDE)
    assert pixels.shape == (3, SIDE, SIDE) and pixels.dtype == torch.uint8
    truth = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(float) - truth).max() <= TOLERANCE.get(case, 0)


@pytest.mark.parametrize("case", FILES)
def test_an_opened_image_as_an_item_has_its_pixels(case: str, tmp_path: Path) -> None:
    write, expected = FILES[case]
    with Image.open(write(tmp_path)) as image:
        pixels = Inputs([(image, 0)])[0]
    alpha = image.mode in ("LA", "RGBA")
    truth = expected[..., None] if expected.ndim == 2 else expected
    if image.mode == "P":
        truth = np.repeat(truth, 3, axis=2)
    assert pixels.dtype == torch.uint8 and pixels.shape == (truth.shape[2] + alpha, SIDE, SIDE)
    found = pixels[: truth.shape[2]].permute(1, 2, 0).numpy().astype(float)
    assert np.abs(found - truth).max() <= TOLERANCE.get(case, 0)
    if alpha:
        assert np.array_equal(pixels[-1].numpy(), 255 - GREY)


ITEMS = {
    "a tensor of 16 bits": (torch.from_numpy(sixteen().astype(np.uint16))[None], GREY),
    "an array of 16 bits": (sixteen().astype(np.uint16)[None], GREY),
    "an array of 16 bits, big end first": (sixteen().astype(">u2")[None], GREY),
    "an array of 16 bits without channels": (sixteen().astype(np.uint16), GREY),
    "flags": ((RAMP > 0.5)[None], (RAMP > 0.5) * 255),
    "flags as a tensor": (torch.from_numpy(RAMP > 0.5)[None], (RAMP > 0.5) * 255),
    "bytes": (GREY.astype(np.uint8)[None], GREY),
    "floats": (RAMP.astype(np.float32)[None], RAMP.astype(np.float32)),
    "floats up to 255": (GREY.astype(np.float32)[None], GREY),
    "an image of 16 bits": (grey(sixteen(), np.uint16), GREY),
    "an image of 16 bits, cropped": (grey(np.pad(sixteen(), 2), np.uint16).crop((2, 2, 18, 18)), GREY),
    "an image of one bit": (grey(GREY, np.uint8).convert("1", dither=0), (GREY > 127) * 255),
    "an image of floats": (grey(RAMP, np.float32), GREY),
}


@pytest.mark.parametrize(
    ("case", "paired"),
    [(case, paired) for case in ITEMS for paired in (False, True) if not (paired and case.startswith("an image"))],
)
def test_items_of_other_dtypes_have_their_pixels(case: str, paired: bool) -> None:
    item, expected = ITEMS[case]
    if paired:
        x = torch.stack([item] * 4) if isinstance(item, torch.Tensor) else np.stack([item] * 4)
        y = torch.tensor([0, 1, 0, 1])
        stream = class_incremental((x, y), (x, y), tasks=1)
        found = stream.tasks[0].train.read(torch.tensor([1]))[0]
    else:
        found = Inputs([(item, 0)])[0]
    assert found.dtype == (torch.float32 if case.startswith("floats") else torch.uint8)
    assert np.array_equal(found.squeeze(0).numpy(), expected)


UNCERTAIN = {
    "floats beyond 1": (grey(GREY, np.float32), "floats from 0 to 255, beyond"),
    "floats below 0": (grey(RAMP * 2 - 1, np.float32), "floats from -1 to 1, beyond"),
    "no numbers": (grey(np.where(RAMP > 0.5, np.nan, RAMP), np.float32), "floats from nan to nan, beyond"),
    "32 bits": (grey(RAMP * 2**31 - 1, np.int32), "integers that are signed or of 32 bits"),
    "32 bits with small values": (grey(sixteen(), np.int32), "integers that are signed or of 32 bits"),
}


@pytest.mark.parametrize("case", UNCERTAIN)
def test_values_of_unknown_range_are_refused_by_name(case: str, tmp_path: Path) -> None:
    image, message = UNCERTAIN[case]
    path = saved(tmp_path / "1.tif", image)
    with pytest.raises(DamagedImageError, match=rf"1.tif: cannot be decoded: holds {message}.* 8 or 16 unsigned bits"):
        decode(path, SIDE)
    with pytest.raises(DamagedImageError, match=f"sample 1: the image holds {message}"):
        Inputs([(grey(GREY, np.uint8), 0), (image, 0)])[1]
    # What the message advises.
    values = np.asarray(image, np.float64)
    scaled = np.nan_to_num((values - np.nanmin(values)) / (np.nanmax(values) - np.nanmin(values)))
    saved(path, grey(scaled * 65535, np.uint16))
    assert decode(path, SIDE).float().mean() > 50


def test_signed_values_are_refused_by_name(tmp_path: Path) -> None:
    for bits, values in ((8, RAMP * 254 - 127), (16, RAMP * 65534 - 32767)):
        content = bytearray(tiff16(np.zeros((SIDE, SIDE)), 1))
        data = values.astype(f"<i{bits // 8}").tobytes()
        content[8 : 8 + len(data)] = data
        at = content.index(struct.pack("<HHII", 258, 4, 1, 16))
        content[at : at + 12] = struct.pack("<HHII", 258, 4, 1, bits)
        at = content.index(struct.pack("<HHII", 279, 4, 1, SIDE * SIDE * 2))
        content[at : at + 12] = struct.pack("<HHII", 339, 4, 1, 2)
        path = written(tmp_path / f"{bits}.tif", bytes(content))
        with pytest.raises(
            DamagedImageError, match=f"{bits}.tif: cannot be decoded: holds integers that are signed or"
        ):
            decode(path, SIDE)


def test_integer_images_of_unknown_range_are_refused_and_numbers_of_tokens_are_not() -> None:
    for dtype in (np.int8, np.int16, np.int32, np.int64, np.uint32):
        with pytest.raises(TypeError, match="sample 0: got an image of .*expected uint8, uint16, bool, or floats"):
            Inputs([(np.zeros((1, 4, 4), dtype), 0)])[0]
        with pytest.raises(TypeError, match="train: got an image of"):
            class_incremental((np.zeros((4, 1, 4, 4), dtype), torch.arange(4)), None, validation=0.5)
    y = torch.tensor([0, 0, 1, 1])
    for dtype in (np.uint8, np.uint16, np.int16, np.int32, np.int64):
        tokens = np.arange(8).reshape(4, 2).astype(dtype)
        for data in ((tokens, y), [(row, label) for row, label in zip(tokens, y, strict=True)]):
            data = data if isinstance(data, tuple) else torch.utils.data.ConcatDataset([data])
            stream = class_incremental(data, None, validation=0.5, vocabulary=9, tasks=1)
            found = stream.tasks[0].train.read(torch.tensor([0, 1]))
            assert found.dtype == torch.int64 and found.tolist() == [[0, 1], [4, 5]], dtype


def test_images_with_their_channels_last_are_refused() -> None:
    for channels in (1, 3, 4):
        x = np.random.default_rng(0).integers(0, 256, (4, 8, 6, channels), np.uint8)
        y = torch.tensor([0, 0, 1, 1])
        items = torch.utils.data.TensorDataset(torch.from_numpy(x), y)
        for data in ((x, y), (torch.from_numpy(x), y), items, torch.utils.data.Subset(items, range(4))):
            with pytest.raises(
                ValueError, match=rf"got an image of shape \(8, 6, {channels}\), expected its channels first"
            ):
                class_incremental(data, validation=0.5)
        # What the message advises.
        assert class_incremental((np.moveaxis(x, -1, 1), y), validation=0.5).input_shape == (channels, 8, 6)
        assert class_incremental((x.astype(np.float32), y), validation=0.5).input_shape == (8, 6, channels)


def test_a_reader_names_or_skips_what_is_refused(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            saved(tmp_path / part / name / "1.png", grey(sixteen(), np.uint16))
    saved(tmp_path / "train" / "a" / "2.tif", grey(GREY, np.float32))
    train, _ = image_folder(tmp_path, SIDE)
    plans = [torch.tensor([0, 1, 2])]
    with pytest.raises(DamagedImageError, match="2.tif"):
        list(Reading(0, skip_damaged=False, device=torch.device("cpu")).reader(train, plans))
    with pytest.warns(UserWarning, match="sample 1 is left out: .*2.tif"):
        (batch,) = Reading(0, skip_damaged=True, device=torch.device("cpu")).reader(train, plans)
    assert batch.kept is not None and batch.kept.tolist() == [True, False, True]
    assert torch.equal(batch.samples[0], batch.samples[1]) and np.array_equal(batch.samples[0, 0].numpy(), GREY)


def test_an_image_of_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="is of mode LAB, expected grey, a palette or RGB"):
        eight_bits(Image.new("LAB", (2, 2)))
