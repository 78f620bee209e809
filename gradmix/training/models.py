"""The protocol's models: a perceptron for small grey images and the ResNet-18 used on CIFAR."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODELS = ("mlp", "resnet18")


def build_model(name: str, input_shape: tuple[int, ...], num_classes: int, *, seed: int = 0) -> nn.Module:
    """Builds a model with initial weights settled by ``seed``; no global random state is read or changed.

    Args:
        name: ``mlp`` or ``resnet18``.
        input_shape: Shape of one row: anything for ``mlp``, ``(C, H, W)`` for ``resnet18``.
        num_classes: Classes over the whole stream, the width of the output.
        seed: Seeds the initial weights.

    Returns:
        The model, float32 on the CPU, in training mode. Its classifier is the ``nn.Linear`` called ``head``.

    Raises:
        ValueError: The name is unknown, or a size is not positive, or the shape does not suit the model.
    """
    if name not in MODELS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(map(repr, MODELS))}")
    if len(input_shape) == 0 or any(size < 1 for size in input_shape):
        raise ValueError(f"input_shape: got {tuple(input_shape)}, expected positive sizes of one row")
    if num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes}, expected at least 1")
    if name == "resnet18" and len(input_shape) != 3:
        raise ValueError(f"input_shape: got {tuple(input_shape)}, expected (C, H, W) for resnet18")
    # Layers draw their weights from the global CPU generator: lend it out, seeded, and put its state back. Seeding by
    # torch.manual_seed would reach the generators of other devices too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if name == "mlp":
            return MLP(math.prod(input_shape), num_classes)
        return ResNet18(input_shape[0], num_classes)


class MLP(nn.Module):
    """A perceptron with two hidden layers of 256 and ReLU; it flattens its input.

    Weights are torch's own initialisation of ``nn.Linear``. 784 inputs and 10 classes make 269,322 parameters.

    Args:
        in_features: Values of one row.
        num_classes: Width of the output.
        hidden: Width of the hidden layers.
    """

    def __init__(self, in_features: int, num_classes: int, hidden: int = 256) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of rows ``x (N, ...)``."""
        h: Tensor = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.head(F.relu(self.fc2(h)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to their input (He et al. 2016, 'basic' block).

    Where the shape changes, the input passes a 1x1 convolution of the same stride and batch normalisation.

    Args:
        in_channels: Channels that come in.
        channels: Channels that go out.
        stride: Stride of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, channels, H / stride, W / stride)``."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for small images: a 3x3 stem of stride 1 and no max-pooling, stages of 64, 128, 256, 512 channels.

    Convolutions are initialised as in He et al. (2015), fan out; batch normalisation starts as the identity. Three
    channels and 10 classes make 11,173,962 parameters.

    Args:
        in_channels: Channels of the images.
        num_classes: Width of the output.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        blocks: list[nn.Module] = []
        before = 64
        for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [BasicBlock(before, channels, stride), BasicBlock(channels, channels, 1)]
            before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``x (N, in_channels, H, W)``."""
        h = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.head(h.mean(dim=(2, 3)))
        return logits
