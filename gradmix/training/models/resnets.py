"""ResNets: the narrow and the wide one used on CIFAR, and those with the stem made for ImageNet."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to their input (He et al. 2016, 'basic' block).

    Where the shape changes, the input passes a 1x1 convolution of the same stride and batch normalisation.

    The stride is the first convolution's.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, channels, H / stride, W / stride)``."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class _SmallImageResNet(nn.Module):
    """A 3x3 stem of stride 1, stages of basic blocks, the mean over all places, the classifier.

    Convolutions are initialised as in He et al. (2015), fan out; batch normalisation starts as the identity.

    Args:
        in_channels: Channels of the images.
        num_classes: Width of the output.
        widths: Channels of each stage; all but the first begin with a stride of 2.
        per_stage: Blocks of each stage.
    """

    def __init__(self, in_channels: int, num_classes: int, widths: tuple[int, ...], per_stage: int) -> None:
        super().__init__()
        before = widths[0]
        self.conv1 = nn.Conv2d(in_channels, before, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        blocks: list[nn.Module] = []
        for stage, channels in enumerate(widths):
            for block in range(per_stage):
                blocks.append(BasicBlock(before, channels, 2 if stage > 0 and block == 0 else 1))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, num_classes)
        self._per_stage = per_stage
        _initialise(self)

    @property
    def hidden_stages(self) -> tuple[nn.Module, nn.Module]:
        """The modules that take in what comes out of the first and the second stage."""
        return self.blocks[self._per_stage], self.blocks[2 * self._per_stage]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``x (N, in_channels, H, W)``."""
        h = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.head(h.mean(dim=(2, 3)))
        return logits


class ResNet18(_SmallImageResNet):
    """ResNet-18 for small images: a 3x3 stem of stride 1 and no max-pooling, stages of 64, 128, 256, 512 channels.

    Three channels and 10 classes make 11,173,962 parameters.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, (64, 128, 256, 512), 2)


class NarrowResNet(_SmallImageResNet):
    """The ResNet that He et al. (2016) made for CIFAR: 6n + 2 layers in three stages of 16, 32 and 64 channels.

    Departing from the paper's CIFAR experiments, the two blocks that change the shape have a 1x1 convolution and batch
    normalisation as their shortcut (the paper's option B, which it has for ImageNet) instead of subsampling and zero
    padding. With three channels and 10 classes, depths 8, 20 and 32 make 78,042, 272,474 and 466,906 parameters.

    Args:
        in_channels: Channels of the images.
        num_classes: Width of the output.
        depth: Layers with weights, shortcuts not counted: 6n + 2 with n of at least 1.

    Raises:
        ValueError: ``depth`` is not of that form.
    """

    def __init__(self, in_channels: int, num_classes: int, depth: int) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth: got {depth}, expected 6n + 2 with n of at least 1, such as 8, 20 or 32")
        super().__init__(in_channels, num_classes, (16, 32, 64), depth // 6)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, added to their input (He et al. 2016, 'bottleneck' block).

    Each has batch normalisation. The stride is the 3x3 convolution's, as is usual since; the paper has it in the first.
    The shortcut is that of :class:`BasicBlock`.

    Args:
        in_channels: Channels that come in.
        channels: Channels of the 3x3 convolution; four times as many go out.
        stride: Stride of the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, 4 channels, H / stride, W / stride)``."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.shortcut(x))


class ImageNetResNet(nn.Module):
    """A ResNet as He et al. (2016) made it for ImageNet: a 7x7 stem of stride 2, 3x3 max-pooling of stride 2, 4 stages.

    The stages begin with 64, 128, 256 and 512 channels; depth 18 has two basic blocks in each, depth 50 has 3, 4, 6
    and 3 bottleneck blocks. Images of any size will do. Initialised as :class:`ResNet18`, and the last batch
    normalisation of a block scales by 0 at first, so that a block starts as its shortcut (Goyal et al. 2017). With
    three channels and 1000 classes, depths 18 and 50 make 11,689,512 and 25,557,032 parameters.

    Args:
        in_channels: Channels of the images.
        num_classes: Width of the output.
        depth: 18 or 50.

    Raises:
        ValueError: ``depth`` is neither.
    """

    def __init__(self, in_channels: int, num_classes: int, depth: int) -> None:
        super().__init__()
        if depth not in (18, 50):
            raise ValueError(f"depth: got {depth}, expected 18 or 50")
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock if depth == 18 else Bottleneck
        expansion = 1 if depth == 18 else Bottleneck.expansion
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.stages = nn.Sequential()
        before = 64
        for channels, stride, count in zip(
            (64, 128, 256, 512), (1, 2, 2, 2), (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3), strict=True
        ):
            blocks = []
            for place in range(count):
                blocks.append(block(before, channels, stride if place == 0 else 1))
                before = expansion * channels
            self.stages.append(nn.Sequential(*blocks))
        self.head = nn.Linear(before, num_classes)
        _initialise(self)
        for module in self.modules():
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    @property
    def hidden_stages(self) -> tuple[nn.Module, nn.Module]:
        """The modules that take in what comes out of the first and the second stage."""
        return self.stages[1], self.stages[2]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``x (N, in_channels, H, W)``."""
        h = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        logits: Tensor = self.head(self.stages(h).mean(dim=(2, 3)))
        return logits


def _initialise(model: nn.Module) -> None:
    """Convolutions as in He et al. (2015), fan out; batch normalisation is the identity from the start."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
