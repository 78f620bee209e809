"""``GradMixup`` takes every call that timm's and torchvision's Mixup take, and mixes the pairs of ``select_pairs``."""

from __future__ import annotations

import collections
from operator import itemgetter

import pytest
import torch
import torch.nn.functional as F
from frameworks import CLASSES, generator, network, task
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradmix
from gradmix.integrations.timm import GradMixup

BUFFER = task(0, 10)
X, Y = (torch.cat(parts) for parts in zip(task(1, 9), task(0, 4), strict=True))
"""An odd number of samples, replayed ones among them."""


class Named(nn.Module):
    """A model of two inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, image, scale):
        return self.net(image * scale)


def mixup(**settings):
    return GradMixup(network(), BUFFER, **{"generator": generator(), **settings})


def reference_batch(mixup_fn, **settings):
    """The mixed batch of one selection with the same model, buffer and random numbers."""
    settings = {"generator": generator(), **settings}
    pairs = gradmix.select_pairs(mixup_fn._model, BUFFER, (X, Y), **settings)
    assert 0 < int(pairs.helpful.sum()) < len(Y), "the case must have both decisions"
    return pairs.mix()


Pair = collections.namedtuple("Pair", "image target")

SHAPES = {
    "two arguments": lambda f: f(X, Y),
    "a tuple": lambda f: f((X, Y)),
    "a list": lambda f: f([X, Y]),
    "a named tuple": lambda f: f(Pair(X, Y)),
    "a tuple with more": lambda f: f((X, Y, "path"))[:2],
    "three arguments": lambda f: f(X, Y, torch.arange(len(Y)))[:2],
    "a dict": lambda f: itemgetter("image", "label")(f({"image": X, "label": Y, "path": "a"})),
    "a dict, labels first": lambda f: itemgetter("x", "LABELS")(f({"LABELS": Y, "x": X})),
    "a dict with a target": lambda f: itemgetter("x", "target")(f({"x": X, "target": Y})),
}


@pytest.mark.parametrize("call", SHAPES.values(), ids=SHAPES)
def test_every_call_shape_gives_the_pairs_of_select_pairs(call) -> None:
    mixup_fn = mixup()
    x, y = call(mixup_fn)
    mixed_x, mixed_y = reference_batch(mixup_fn)
    assert torch.equal(x, mixed_x) and torch.equal(y, mixed_y)


def test_structures_and_other_entries_stay() -> None:
    mixup_fn, index = mixup(), torch.arange(len(Y))
    assert isinstance(mixup_fn(X, Y), tuple) and isinstance(mixup_fn([X, Y]), list)
    assert isinstance(mixup_fn(Pair(X, Y)), Pair)
    assert mixup_fn((X, Y, index))[2] is index
    found = mixup_fn({"path": "a", "x": X, "label": Y})
    assert list(found) == ["path", "x", "label"] and found["path"] == "a"
    before = X.clone()
    mixup_fn(X, Y)
    assert torch.equal(X, before), "inputs are not written in place"


def test_a_dict_of_several_tensors_is_the_models_input() -> None:
    torch.manual_seed(0)
    model, scale = Named(), torch.rand(len(Y), 1) + 0.5
    buffer = ({"image": BUFFER[0], "scale": torch.ones(10, 1)}, BUFFER[1])
    mixup_fn = GradMixup(model, buffer, generator=generator())
    found = mixup_fn({"image": X, "scale": scale, "label": Y, "name": "b"})
    x, y = gradmix.select_pairs(model, buffer, ({"image": X, "scale": scale}, Y), generator=generator()).mix()
    assert torch.equal(found["image"], x["image"]) and torch.equal(found["scale"], x["scale"])
    assert torch.equal(found["label"], y) and found["name"] == "b"


def test_labels_getter() -> None:
    weights = torch.rand(len(Y))
    x, w, y = mixup(labels_getter=lambda sample: sample[2])((X, weights, Y))
    assert w is weights and torch.equal(x, reference_batch(mixup())[0]) and y.shape == (len(Y), CLASSES)


@pytest.mark.parametrize("labels", [Y, F.one_hot(Y, CLASSES).float()], ids=["indices", "vectors"])
@pytest.mark.parametrize("enabled", [True, False])
def test_label_smoothing(labels: torch.Tensor, enabled: bool) -> None:
    plain, smooth = mixup(), mixup(label_smoothing=0.2)
    plain.mixup_enabled = smooth.mixup_enabled = enabled
    (x, y), (smooth_x, smooth_y) = plain(X, labels), smooth(X, labels)
    assert torch.equal(x, smooth_x)
    torch.testing.assert_close(smooth_y, y * 0.8 + 0.2 / CLASSES)
    torch.testing.assert_close(smooth_y.sum(1), torch.ones(len(Y)))
    assert torch.equal(x, X) != enabled


def test_marked_samples_are_the_reference() -> None:
    mark = torch.arange(len(Y)) >= 9
    mixup_fn = GradMixup(network(), None, generator=generator())
    x, y = mixup_fn((X, Y), replayed=mark)
    pairs = gradmix.select_pairs(mixup_fn._model, mark, (X, Y), generator=generator())
    assert torch.equal(x, pairs.mix()[0]) and torch.equal(y, pairs.mix()[1])


class Image(torch.Tensor):
    """A subclass of tensors, as torchvision's Image is."""


def test_subclasses_of_tensors_stay() -> None:
    x, y = mixup()(X.as_subclass(Image), Y)
    assert type(x) is Image and type(y) is torch.Tensor
    assert torch.equal(x.as_subclass(torch.Tensor), reference_batch(mixup())[0])


class Collate:
    def __init__(self) -> None:
        self.mixup_fn = mixup()

    def __call__(self, samples):
        return self.mixup_fn(torch.utils.data.default_collate(samples))


@pytest.mark.parametrize("enabled", [True, False])
def test_worker_processes_are_refused(enabled: bool) -> None:
    collate = Collate()
    collate.mixup_fn.mixup_enabled = enabled
    loader = DataLoader(TensorDataset(X, Y), 4, num_workers=1, collate_fn=collate)
    with pytest.raises(RuntimeError, match="worker process of a DataLoader"):
        next(iter(loader))


WRONG = {
    "one tensor": (lambda: mixup()(X), TypeError, "sample: got Tensor, expected x and y"),
    "one entry": (lambda: mixup()((X,)), TypeError, "sample: got tuple of 1"),
    "no labels": (lambda: mixup()({"x": X, "id": Y}), ValueError, "'x', 'id', expected one whose name contains"),
    "no input": (lambda: mixup()({"label": Y}), ValueError, "expected labels among them and a tensor beside"),
    "labels of another kind": (lambda: mixup()(X, Y.tolist()), TypeError, "labels: got list"),
    "a getter of something else": (
        lambda: mixup(labels_getter=lambda sample: sample[1] + 0)(X, Y),
        ValueError,
        "labels_getter: returned no entry",
    ),
    "smoothing of one": (lambda: mixup(label_smoothing=1.0), ValueError, "label_smoothing: got 1.0"),
    "smoothing of no number": (lambda: mixup(label_smoothing="0.1"), TypeError, "label_smoothing: got str"),
    "a getter by name": (lambda: mixup(labels_getter="label"), ValueError, "labels_getter: got 'label'"),
    "an unknown setting": (lambda: mixup(cutmix_alpha=1.0), TypeError, "cutmix_alpha"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls_are_refused(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_loop_of_two_tasks() -> None:
    """timm's loop: mixing in all epochs but the last one; the buffer changes in between."""
    torch.manual_seed(0)
    model, buffer = network(), gradmix.ReplayBuffer(capacity=5)
    mixup_fn = GradMixup(model, buffer, label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for number in range(2):
        x, y = task(number)
        for epoch in range(30):
            mixup_fn.mixup_enabled = epoch < 29
            batch = (x, y) if not len(buffer) else (torch.cat([x, buffer.x]), torch.cat([y, buffer.y]))
            inputs, targets = mixup_fn(*batch)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        buffer.add(x, y)
    x, y = (torch.cat(parts) for parts in zip(task(0), task(1), strict=True))
    assert (model(x).argmax(1) == y).float().mean() > 0.8
