"""``GradMixup`` beside timm's and torchvision's own Mixup: the same calls, the same labels, timm's own models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from frameworks import framework

import gradmix
from gradmix.integrations.timm import GradMixup

framework("timm")
framework("torchvision")

import timm  # noqa: E402
from timm.data import Mixup  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from torchvision import tv_tensors  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

CLASSES = 4


def images(number, count=16):
    """Pictures of two of four classes, which differ in the brightness of a row."""
    generator = torch.Generator().manual_seed(number)
    y = 2 * number + torch.arange(count) % 2
    return torch.randn(count, 3, 32, 32, generator=generator) + 6 * F.one_hot(y, 32).float()[:, None, :, None], y


def model(name="test_vit"):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, img_size=32)


X, Y = images(1, 8)


def test_labels_are_timms() -> None:
    own = GradMixup(model(), images(0, 6), label_smoothing=0.1)
    theirs = Mixup(label_smoothing=0.1, num_classes=CLASSES)
    own.mixup_enabled = theirs.mixup_enabled = False
    for found, expected in zip(own(X, Y), theirs(X.clone(), Y), strict=True):
        torch.testing.assert_close(found, expected)
    own.mixup_enabled = theirs.mixup_enabled = True
    for found, expected in zip(own(X, Y), theirs(X.clone(), Y), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


SAMPLES = {
    "two arguments": (X, Y),
    "a tuple": ((X, Y),),
    "a dict": ({"image": X, "label": Y, "path": "a"},),
    "an Image": (tv_tensors.Image(X), Y),
    "a dict of an Image": ({"LABELS": Y, "image": tv_tensors.Image(X)},),
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_structures_are_torchvisions(sample) -> None:
    own, theirs = GradMixup(model(), images(0, 6))(*sample), v2.MixUp(num_classes=CLASSES)(*sample)
    assert type(own) is type(theirs)
    if isinstance(own, dict):
        assert list(own) == list(theirs)
        own, theirs = own.values(), theirs.values()
    for found, expected in zip(own, theirs, strict=True):
        assert type(found) is type(expected)
        if isinstance(found, torch.Tensor):
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_a_loop_of_two_tasks_in_timms_shape() -> None:
    """As timm's training script: Mixup in all but the last epochs, a loss of label vectors; the buffer changes."""
    network, buffer = model("test_vit"), gradmix.ReplayBuffer(capacity=4)
    mixup_fn = GradMixup(network, buffer, label_smoothing=0.1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for number in range(2):
        x, y = images(number)
        for epoch in range(50):
            mixup_fn.mixup_enabled = epoch < 45
            batch = (x, y) if not len(buffer) else (torch.cat([x, buffer.x]), torch.cat([y, buffer.y]))
            inputs, targets = mixup_fn(*batch)
            optimizer.zero_grad()
            SoftTargetCrossEntropy()(network.train()(inputs), targets).backward()
            optimizer.step()
        assert (mixup_fn.reference is None) == (number == 0)
        buffer.add(x, y)
    x, y = (torch.cat(parts) for parts in zip(images(0), images(1), strict=True))
    assert (network.eval()(x).argmax(1) == y).float().mean() > 0.8
