"""Random crops and flips, against a loop over single images."""

from __future__ import annotations

import pytest
import torch

from gradmix.training.augment import random_crop_flip

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
