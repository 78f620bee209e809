"""Random crops and flips, against a loop over single images."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from gradmix.training.data import augment
from gradmix.training.data.augment import (
    TRIES,
    as_floats,
    centre_crop,
    random_boxes,
    random_crop_flip,
    random_resized_crop_flip,
)
from gradmix.training.data.image_arrays import to_float

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device visible")],
    ),
]


def loop(x: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """One image after the other: padded, cut, mirrored."""
    n, channels, height, width = x.shape
    tops = torch.randint(2 * padding + 1, (n,), generator=generator, device=generator.device).tolist()
    lefts = torch.randint(2 * padding + 1, (n,), generator=generator, device=generator.device).tolist()
    flips = torch.randint(2, (n,), generator=generator, device=generator.device).tolist()
    out = []
    for image, top, left, flip in zip(x.cpu(), tops, lefts, flips, strict=True):
        padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=x.dtype)
        padded[:, padding : padding + height, padding : padding + width] = image
        window = padded[:, top : top + height, left : left + width]
        out.append(window.flip(2) if flip else window)
    return torch.stack(out) if out else torch.empty(x.shape, dtype=x.dtype)


CASES = {
    "uint8 batch": (torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8), 4),
    "float32 batch": (torch.randn(9, 3, 8, 8), 4),
    "bfloat16": (torch.randn(4, 1, 5, 5).bfloat16(), 2),
    "float64": (torch.randn(4, 1, 5, 5, dtype=torch.float64), 2),
    "one image": (torch.randn(1, 3, 6, 6), 4),
    "no image": (torch.empty(0, 3, 6, 6), 4),
    "oblong": (torch.randn(5, 2, 3, 11), 3),
    "one pixel": (torch.randn(7, 1, 1, 1), 1),
    "padding wider than the image": (torch.randn(7, 1, 2, 2), 5),
    "no padding": (torch.randn(8, 2, 4, 4), 0),
    "transposed": (torch.randn(5, 3, 4, 7).transpose(2, 3), 2),
    "channels last": (torch.randn(5, 3, 4, 4).to(memory_format=torch.channels_last), 2),
    "every second row": (torch.randn(10, 3, 4, 4)[::2], 2),
    "expanded": (torch.randn(1, 3, 4, 4).expand(6, 3, 4, 4), 2),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(case, device):
    x, padding = CASES[case]
    before = x.clone()
    result = random_crop_flip(x.to(device), padding, torch.Generator().manual_seed(1))
    expected = loop(x, padding, torch.Generator().manual_seed(1))
    assert result.device.type == device and result.dtype == x.dtype and result.is_contiguous()
    assert torch.equal(result.cpu(), expected)
    assert torch.equal(x, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device visible")
def test_generator_on_the_device():
    x = torch.randn(9, 3, 8, 8, device="cuda")
    result = random_crop_flip(x, 4, torch.Generator("cuda").manual_seed(1))
    assert torch.equal(result.cpu(), loop(x, 4, torch.Generator("cuda").manual_seed(1)))


def test_all_offsets_and_both_directions_come_up():
    image = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    results = random_crop_flip(image.expand(2000, 1, 3, 3), 1, torch.Generator().manual_seed(0))
    distinct, counts = torch.unique(results.reshape(2000, 9), dim=0, return_counts=True)
    assert len(distinct) == 3 * 3 * 2
    assert (counts / 2000 - 1 / 18).abs().max() < 5 * (1 / 18 * 17 / 18 / 2000) ** 0.5


def test_without_padding_an_image_is_itself_or_its_mirror_image():
    x = torch.randn(50, 2, 3, 4)
    result = random_crop_flip(x, 0, torch.Generator().manual_seed(0))
    same = (result == x).flatten(1).all(1)
    mirrored = (result == x.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all()) and same.any() and mirrored.any()


def test_own_generator_leaves_the_global_state_alone():
    before = torch.random.get_rng_state()
    random_crop_flip(torch.zeros(3, 1, 4, 4), 4, torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)


BAD = {
    "three dimensions": (torch.zeros(3, 4, 4), 4, r"x: got shape \(3, 4, 4\), expected images \(N, C, H, W\)"),
    "negative padding": (torch.zeros(1, 3, 4, 4), -1, "padding: got -1, expected at least 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    x, padding, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        random_crop_flip(x, padding, torch.Generator())


# ----------------------------------------------------------------------------------------------------- resized crops

LARGE = {
    "square": (6, 3, 32, 32),
    "oblong": (9, 2, 21, 40),
    "upright": (9, 1, 37, 16),
    "one sample of pixels": (5, 3, 1, 50),
    "one column of pixels": (5, 3, 50, 1),
    "one pixel": (4, 3, 1, 1),
    "one image": (1, 3, 9, 9),
    "no image": (0, 3, 9, 9),
    "no channel": (2, 0, 9, 9),
}


def box_loop(
    n: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> list[list[int]]:
    """Box after box, try after try, on the numbers that the batch is given."""
    draws = torch.rand(2 * TRIES + 3, n, generator=generator, dtype=torch.float64)
    boxes = []
    for row in draws.T.tolist():
        above, before, mirror = row[2 * TRIES :]
        for area_draw, ratio_draw in zip(row[:TRIES], row[TRIES : 2 * TRIES], strict=True):
            area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
            sides = math.exp(math.log(ratio[0]) + ratio_draw * (math.log(ratio[1]) - math.log(ratio[0])))
            w, h = round(math.sqrt(area * sides)), round(math.sqrt(area / sides))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(above * (height - h + 1)), int(before * (width - w + 1))
                break
        else:
            h, w = height, width
            if width / height < ratio[0]:
                h = max(1, min(height, round(width / ratio[0])))
            elif width / height > ratio[1]:
                w = max(1, min(width, round(height * ratio[1])))
            top, left = (height - h) // 2, (width - w) // 2
        boxes.append([top, left, h, w, int(mirror < 0.5)])
    return boxes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 8, 33])
@pytest.mark.parametrize("case", LARGE)
def test_resized_crops_equal_the_loop(case, size, device):
    x = torch.randn(LARGE[case], dtype=torch.float64)
    result = random_resized_crop_flip(x.to(device), size, generator=torch.Generator().manual_seed(1))
    boxes = box_loop(len(x), *x.shape[2:], (0.08, 1.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(1))
    expected = torch.empty(*x.shape[:2], size, size, dtype=torch.float64)
    for k, (top, left, h, w, mirrored) in enumerate(boxes):
        if x.shape[1]:
            cut = x[k : k + 1, :, top : top + h, left : left + w]
            scaled = F.interpolate(cut, (size, size), mode="bilinear", align_corners=False)[0]
            expected[k] = scaled.flip(2) if mirrored else scaled
    assert result.device.type == device and result.dtype == x.dtype
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", LARGE)
def test_boxes_equal_the_loop(case, monkeypatch):
    height, width = LARGE[case][2:]
    for scale, ratio in (((0.08, 1.0), (3 / 4, 4 / 3)), ((0.5, 0.5), (1.0, 1.0)), ((0.9, 1.0), (0.2, 0.4))):
        monkeypatch.setattr(augment, "SCALE", scale)
        monkeypatch.setattr(augment, "RATIO", ratio)
        boxes = random_boxes(200, height, width, torch.Generator().manual_seed(2)).T.tolist()
        assert boxes == box_loop(200, height, width, scale, ratio, torch.Generator().manual_seed(2))


def test_boxes_are_distributed_as_they_should(monkeypatch):
    n, side = 40_000, 4000
    monkeypatch.setattr(augment, "SCALE", (0.1, 0.4))
    top, left, height, width, mirrored = random_boxes(n, side, side, torch.Generator().manual_seed(0)).double()
    # At most 0.4 of a square with sides up to 4 : 3 fits always, so nothing is drawn twice.
    uniform = {
        "area": (height * width / side**2 - 0.1) / 0.3,
        "ratio": (torch.log(width / height) - math.log(3 / 4)) / math.log(16 / 9),
        "top": top / (side - height),
        "left": left / (side - width),
    }
    grid = torch.arange(1, n + 1) / n
    for name, values in uniform.items():  # Kolmogorov and Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand times
        assert (values.sort().values - grid).abs().max() < 1.95 / n**0.5 + 2e-3, name
    table = torch.corrcoef(torch.stack([*uniform.values(), mirrored])) - torch.eye(5)
    assert table.abs().max() < 5 / n**0.5
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / n**0.5


def test_boxes_that_do_not_fit_are_drawn_again():
    height, width = 100, 200
    top, left, h, w, _ = random_boxes(5000, height, width, generator=torch.Generator().manual_seed(0))
    assert bool((top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all())
    fallback = (h == 100) & (w == 133)
    # A box of at most 0.66 of this image fits whatever its ratio: hardly any of ten tries fail altogether.
    assert fallback.float().mean() < 0.01
    assert h.max() == height and h.min() < 45 and w.max() > 130


def test_half_precision_is_interpolated_in_single():
    x = torch.randn(5, 3, 20, 20).bfloat16()
    low = random_resized_crop_flip(x, 13, generator=torch.Generator().manual_seed(3))
    high = random_resized_crop_flip(x.float(), 13, generator=torch.Generator().manual_seed(3))
    assert low.dtype == torch.bfloat16 and torch.equal(low, high.bfloat16())


def test_single_precision_is_near_double():
    x = torch.rand(5, 3, 256, 300, dtype=torch.float64)
    low = random_resized_crop_flip(x.float(), 224, generator=torch.Generator().manual_seed(3))
    high = random_resized_crop_flip(x, 224, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(low.double(), high, rtol=0, atol=1e-4)


def test_resized_crops_leave_the_global_state_and_the_images_alone():
    x = torch.randn(3, 3, 8, 8)
    before, state = x.clone(), torch.random.get_rng_state()
    random_resized_crop_flip(x, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(x, before)


# --------------------------------------------------------------------------------------------- centre crops, floats


@pytest.mark.parametrize(("side", "size", "start"), [(8, 8, 0), (8, 4, 2), (9, 4, 2), (8, 3, 2), (5, 1, 2)])
def test_centre_crop(side, size, start):
    x = torch.arange(2 * side * (side + 2)).reshape(2, 1, side, side + 2)
    result = centre_crop(x, size)
    assert torch.equal(result, x[:, :, start : start + size, start + 1 : start + 1 + size])
    assert result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


NORMALISED = {
    "neither": (None, None),
    "mean": ((0.5, 0.4, 0.3), None),
    "std": (None, (0.5, 0.25, 0.125)),
    "both": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", NORMALISED)
def test_floats_of_bytes(case, device):
    mean, std = NORMALISED[case]
    x = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = x.to(device, memory_format=memory_format)
        result = as_floats(given, mean, std)
        assert result.dtype == torch.float32 and result.device.type == device
        assert result.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(result.cpu(), to_float(x, 255.0, mean, std), rtol=1e-6, atol=1e-6)
    assert torch.equal(given.cpu(), x)


def test_no_images_become_no_floats():
    assert as_floats(torch.empty(0, 3, 4, 5, dtype=torch.uint8)).shape == (0, 3, 4, 5)


BYTES, FLOATS = torch.zeros(2, 3, 4, 6, dtype=torch.uint8), torch.zeros(2, 3, 4, 6)
BAD_CALLS = {
    "crop of three dimensions": (
        lambda: random_resized_crop_flip(FLOATS[0], 2),
        ValueError,
        r"x: got shape \(3, 4, 6\)",
    ),
    "crop of bytes": (lambda: random_resized_crop_flip(BYTES, 2), TypeError, "x: got torch.uint8, expected a floating"),
    "crop to nothing": (lambda: random_resized_crop_flip(FLOATS, 0), ValueError, "size: got 0, expected at least 1"),
    "crop of no pixels": (
        lambda: random_resized_crop_flip(FLOATS[:, :, :0], 2),
        ValueError,
        "height: got 0, expected at least 1",
    ),
    "centre of three dimensions": (lambda: centre_crop(FLOATS[0], 2), ValueError, r"x: got shape \(3, 4, 6\)"),
    "centre too large": (
        lambda: centre_crop(FLOATS, 5),
        ValueError,
        "size: got 5 for images of 4 x 6, expected from 1 to 4",
    ),
    "centre of nothing": (
        lambda: centre_crop(FLOATS, 0),
        ValueError,
        "size: got 0 for images of 4 x 6, expected from 1 to 4",
    ),
    "floats of floats": (lambda: as_floats(FLOATS), TypeError, "x: got torch.float32, expected torch.uint8"),
    "floats of three dimensions": (lambda: as_floats(BYTES[0]), ValueError, r"x: got shape \(3, 4, 6\)"),
    "one mean for three channels": (
        lambda: as_floats(BYTES, (0.5,)),
        ValueError,
        "mean: got 1 values, expected one for each of 3 channels",
    ),
    "standard deviation of nothing": (
        lambda: as_floats(BYTES, None, (1.0, 0.0, 1.0)),
        ValueError,
        r"std: got \[1.0, 0.0, 1.0\], expected values above 0",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()
