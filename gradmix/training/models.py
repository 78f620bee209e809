"""The protocol's models: a perceptron for small grey images, and the narrow and wide ResNets used on CIFAR."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODELS = ("mlp", "resnet8", "resnet20", "resnet32", "resnet18")


def build_model(name: str, input_shape: tuple[int, ...], num_classes: int, *, seed: int = 0) -> nn.Module:
    """Builds a model with initial weights settled by ``seed``; no global random state is read or changed.

    Args:
        name: One of ``MODELS``.
        input_shape: Shape of one row: anything for ``mlp``, ``(C, H, W)`` for the others.
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
    if name != "mlp" and len(input_shape) != 3:
        raise ValueError(f"input_shape: got {tuple(input_shape)}, expected (C, H, W) for {name}")
    # Layers draw their weights from the global CPU generator: lend it out, seeded, and put its state back. Seeding by
    # torch.manual_seed would reach the generators of other devices too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if name == "mlp":
            return MLP(math.prod(input_shape), num_classes)
        if name == "resnet18":
            return ResNet18(input_shape[0], num_classes)
        return NarrowResNet(input_shape[0], num_classes, depth=int(name.removeprefix("resnet")))


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

    @property
    def hidden_stages(self) -> tuple[nn.Module, nn.Module]:
        """The modules that take in the first and the second hidden layer, after ReLU."""
        return self.fc2, self.head

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
        _initialise(self)

    @property
    def hidden_stages(self) -> tuple[nn.Module, nn.Module]:
        """The modules that take in what comes out of the first and the second stage."""
        return self.blocks[2], self.blocks[4]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``x (N, in_channels, H, W)``."""
        h = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.head(h.mean(dim=(2, 3)))
        return logits


class NarrowResNet(nn.Module):
    """The ResNet that He et al. (2016) made for CIFAR: 6n + 2 layers in three stages of 16, 32 and 64 channels.

    A 3x3 stem of stride 1, n basic blocks a stage, the mean over all places, the classifier. Departing from the paper's
    CIFAR experiments, the two blocks that change the shape have a 1x1 convolution and batch normalisation as their
    shortcut (the paper's option B, which it has for ImageNet) instead of subsampling and zero padding. Initialised as
    :class:`ResNet18`. With three channels and 10 classes, depths 8, 20 and 32 make 78,042, 272,474 and 466,906
    parameters.

    Args:
        in_channels: Channels of the images.
        num_classes: Width of the output.
        depth: Layers with weights, shortcuts not counted: 6n + 2 with n of at least 1.

    Raises:
        ValueError: ``depth`` is not of that form.
    """

    def __init__(self, in_channels: int, num_classes: int, depth: int) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth: got {depth}, expected 6n + 2 with n of at least 1, such as 8, 20 or 32")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        before = 16
        for channels, stride in ((16, 1), (32, 2), (64, 2)):
            for block in range(depth // 6):
                blocks.append(BasicBlock(before, channels, stride if block == 0 else 1))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, num_classes)
        _initialise(self)

    @property
    def hidden_stages(self) -> tuple[nn.Module, nn.Module]:
        """The modules that take in what comes out of the first and the second stage."""
        per_stage = len(self.blocks) // 3
        return self.blocks[per_stage], self.blocks[2 * per_stage]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``x (N, in_channels, H, W)``."""
        h = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.head(h.mean(dim=(2, 3)))
        return logits


def _initialise(model: nn.Module) -> None:
    """Convolutions as in He et al. (2015), fan out; batch normalisation is the identity from the start."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
