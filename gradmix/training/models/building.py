"""A model from its name, the shape of a sample and the number of classes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from gradmix.model.unchanged import preserve_rng
from gradmix.runtime.validation import did_you_mean
from gradmix.training.config import MODEL_NAMES
from gradmix.training.models.imported import check_model, find_builder, is_import_path
from gradmix.training.models.perceptron import MLP
from gradmix.training.models.resnets import ImageNetResNet, NarrowResNet, ResNet18
from gradmix.training.models.text_transformer import TextTransformer
from gradmix.training.models.vision_transformer import VisionTransformer

MODELS = MODEL_NAMES
"""Names of the models that come with gradmix."""


def build_model(
    name: str, input_shape: tuple[int, ...], num_classes: int, *, seed: int = 0, vocabulary: int | None = None
) -> nn.Module:
    """Build a model with initial weights settled by ``seed``; no global random state is read or changed.

    Args:
        name: One of ``MODELS``; or ``torchvision:NAME``, ``timm:NAME``, ``transformers:NAME`` or the import path of a
            callable, ``package.module:callable``, as :mod:`gradmix.training.models.imported` describes.
        input_shape: Shape of one sample: anything for ``mlp``, ``(T,)`` for ``text-transformer``, ``(C, H, W)`` for the
            others. ``vit-tiny`` takes patches of 16 if both sides are at least 128, else of 4.
        num_classes: Classes over the whole stream, the width of the output.
        seed: Seeds the initial weights.
        vocabulary: Number of token ids, 0 for padding among them, for ``text-transformer`` and imported models of
            texts; then the samples are int64. ``None`` for all others.

    Returns:
        The model, in training mode. One of ``MODELS`` is float32 on the CPU, and its classifier is the ``nn.Linear``
        called ``head``. One from elsewhere was seen to return logits ``(2, num_classes)`` for two samples on the CPU.

    Raises:
        ValueError: The name is unknown, or a size is not positive, or the shape does not suit the model; or a model
            from elsewhere failed, or is none, or returned something else than logits.
        ModuleNotFoundError: What a model from elsewhere comes from is not installed.
        ImportError: It is installed and cannot be imported.
    """
    if name not in MODELS and not is_import_path(name):
        raise ValueError(
            f"name: got {name!r}, expected one of {', '.join(map(repr, MODELS))}, or an import path such as "
            f"'package.module:callable', 'torchvision:resnet50' or 'timm:resnet10t'{did_you_mean(name, MODELS)}"
        )
    if len(input_shape) == 0 or any(size < 1 for size in input_shape):
        raise ValueError(f"input_shape: got {tuple(input_shape)}, expected positive sizes of one sample")
    if num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes}, expected at least 1")
    if vocabulary is not None and vocabulary < 2:
        raise ValueError(f"vocabulary: got {vocabulary}, expected at least 2: the padding and a token")
    input_shape = tuple(input_shape)
    if is_import_path(name):
        with preserve_rng():
            # Importing may draw random numbers, but only the first time: so before the seed.
            build = find_builder(name, input_shape, num_classes, vocabulary)
            with _lent_generators(seed):
                random.seed(seed)
                np.random.seed(seed % 2**32)
                return check_model(name, build(), input_shape, num_classes, vocabulary)
    if name == "text-transformer":
        if vocabulary is None:
            raise ValueError("vocabulary: got None, expected the number of token ids for text-transformer")
        if len(input_shape) != 1:
            raise ValueError(f"input_shape: got {input_shape}, expected (T,), the tokens of a text, for {name}")
    elif vocabulary is not None:
        raise ValueError(f"vocabulary: got {vocabulary}, expected None: {name} takes no token ids")
    elif name != "mlp" and len(input_shape) != 3:
        raise ValueError(f"input_shape: got {input_shape}, expected (C, H, W) for {name}")
    with _lent_generators(seed):
        return _build_own(name, input_shape, num_classes, vocabulary)


def _build_own(name: str, input_shape: tuple[int, ...], num_classes: int, vocabulary: int | None) -> nn.Module:
    if name == "mlp":
        return MLP(math.prod(input_shape), num_classes)
    if name == "text-transformer":
        assert vocabulary is not None
        return TextTransformer(vocabulary, input_shape[0], num_classes)
    channels, height, width = input_shape
    if name == "vit-tiny":
        patch = 16 if min(height, width) >= 128 else 4
        return VisionTransformer((channels, height, width), num_classes, patch=patch, width=192, depth=12, heads=3)
    if name == "vit-b16":
        return VisionTransformer((channels, height, width), num_classes, patch=16, width=768, depth=12, heads=12)
    if name == "resnet18":
        return ResNet18(channels, num_classes)
    if name in ("resnet50", "resnet18-imagenet"):
        return ImageNetResNet(channels, num_classes, depth=50 if name == "resnet50" else 18)
    return NarrowResNet(channels, num_classes, depth=int(name.removeprefix("resnet")))


@contextmanager
def _lent_generators(seed: int) -> Iterator[None]:
    """Torch's global generators, those of CUDA too where it is in use, seeded; their states are put back afterwards."""
    # Layers draw their weights from the global generators. Seeding by torch.manual_seed would reach the generators of
    # devices that are not forked.
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for device in cuda:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield
