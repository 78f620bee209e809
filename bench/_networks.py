"""The networks that gradients are timed on, in plain torch: ResNets for small and large images, vision transformers.

Every layer is a module of its own, so that the libraries compared, which follow modules, all see the same layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("batch", "group")
"""Normalisations of a ResNet: BatchNorm, which is timed in evaluation mode, or GroupNorm."""


@dataclass(frozen=True)
class Network:
    """A network and the samples that it is given.

    Attributes:
        build: from (norm, classes) to the module.
        image: side of the square images, of 3 channels.
        classes: width of its output.
    """

    build: Callable[[str, int], nn.Module]
    image: int
    classes: int


def make_network(name: str, norm: str = "batch", *, seed: int = 0) -> nn.Module:
    """One of :data:`NETWORKS` on the CPU, in float32 and evaluation mode.

    Weights are drawn from ``seed``. BatchNorm's running statistics are those of a batch of noise: at their initial
    values the activations of a deep ResNet would grow from block to block, and its softmax would be saturated.
    """
    network = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = network.build(norm, network.classes)
        rows = torch.randn(8, 3, network.image, network.image)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        if norms:
            for module in norms:
                module.momentum = None  # a plain average
            with torch.no_grad():
                model.train()(rows)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------- ResNets


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(min(32, channels // 2), channels)


class Basic(nn.Module):
    """Two 3x3 convolutions (He et al. 2016)."""

    expansion = 1

    def __init__(self, before: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, channels)
        self.shortcut = _shortcut(before, channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, channels, H / stride, W / stride)."""
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions (He et al. 2016), the stride at the 3x3 one."""

    expansion = 4

    def __init__(self, before: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        after = self.expansion * channels
        self.conv1 = nn.Conv2d(before, channels, 1, bias=False)
        self.norm1 = _norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.norm2 = _norm(norm, channels)
        self.conv3 = nn.Conv2d(channels, after, 1, bias=False)
        self.norm3 = _norm(norm, after)
        self.shortcut = _shortcut(before, after, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, 4 channels, H / stride, W / stride)."""
        h = F.relu(self.norm1(self.conv1(x)))
        h = self.norm3(self.conv3(F.relu(self.norm2(self.conv2(h)))))
        return F.relu(h + self.shortcut(x))


def _shortcut(before: int, after: int, stride: int, norm: str) -> nn.Module:
    if stride == 1 and before == after:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), _norm(norm, after))


class ResNet(nn.Module):
    """A residual network (He et al. 2016).

    Args:
        block: its kind of block.
        depths: blocks in each of the four stages.
        width: channels of the first stage.
        large: whether the stem is the one for ImageNet (7x7 of stride 2, then max-pooling) or a single 3x3.
        norm: one of :data:`NORMS`.
        classes: width of the output.
    """

    def __init__(
        self,
        block: type[Basic] | type[Bottleneck],
        depths: tuple[int, ...],
        width: int,
        large: bool,
        norm: str,
        classes: int,
    ) -> None:
        super().__init__()
        size, stride, padding = (7, 2, 3) if large else (3, 1, 1)
        self.conv1 = nn.Conv2d(3, width, size, stride, padding, bias=False)
        self.norm1 = _norm(norm, width)
        self.large = large
        blocks: list[nn.Module] = []
        before = width
        for stage, depth in enumerate(depths):
            for number in range(depth):
                blocks.append(block(before, width << stage, 2 if stage and not number else 1, norm))
                before = (width << stage) * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, classes)."""
        h = F.relu(self.norm1(self.conv1(x)))
        if self.large:
            h = F.max_pool2d(h, 3, 2, 1)
        logits: Tensor = self.head(self.blocks(h).mean((2, 3)))
        return logits


# -------------------------------------------------------------------------------------------------------- transformers


class Tokens(nn.Module):
    """Puts the class token before the patches and adds the positions."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, patches + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) to (N, 1 + T, width)."""
        return torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) to the same."""
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        h: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width))
        return h


class Encoder(nn.Module):
    """Attention and a perceptron of four times the width, each on normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) to the same."""
        x = x + self.attention(self.norm1(x))
        h: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return h


class VisionTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021), classified by its class token.

    Args:
        image: side of the images.
        patch: side of the patches.
        width: of the tokens.
        depth: number of encoder layers.
        heads: of each attention.
        classes: width of the output.
    """

    def __init__(self, image: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.tokens = Tokens((image // patch) ** 2, width)
        self.encoder = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, image, image) to (N, classes)."""
        h = self.encoder(self.tokens(self.patches(x).flatten(2).transpose(1, 2)))
        logits: Tensor = self.head(self.norm(h)[:, 0])
        return logits


class Perceptron(nn.Module):
    """Two hidden layers on an image's 768 pixels: the network of the accuracy tables, but for its 784 inputs."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 16, 16) to (N, classes)."""
        logits: Tensor = self.head(self.body(x))
        return logits


NETWORKS = {
    "resnet18": Network(lambda norm, classes: ResNet(Basic, (2, 2, 2, 2), 64, False, norm, classes), 32, 10),
    "resnet50": Network(lambda norm, classes: ResNet(Bottleneck, (3, 4, 6, 3), 64, True, norm, classes), 224, 1000),
    "vit-b": Network(lambda norm, classes: VisionTransformer(224, 16, 768, 12, 12, classes), 224, 1000),
    "vit-small": Network(lambda norm, classes: VisionTransformer(32, 4, 192, 6, 3, classes), 32, 10),
    "resnet-tiny": Network(lambda norm, classes: ResNet(Basic, (1, 1, 1, 1), 8, False, norm, classes), 16, 10),
    "perceptron": Network(lambda _norm, classes: Perceptron(classes), 16, 10),
    "vit-tiny": Network(lambda norm, classes: VisionTransformer(16, 4, 32, 2, 2, classes), 16, 10),
}
"""By the names of the command line. The transformers normalise by LayerNorm whatever ``norm`` says."""
