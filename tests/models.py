"""Small networks of the kinds users have, shared by the tests; each is called as ``model(x)``, x (N, 3, 8, 8)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLASSES = 5


class MLP(nn.Module):
    """A perceptron whose classifier is ``fc``."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU())
        self.fc = nn.Linear(12, CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


class ConvNet(nn.Module):
    """Convolutions with BatchNorm and dropout, a linear classifier ``fc``, as a ResNet ends."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


class FullyConvolutional(nn.Module):
    """A 1x1 convolution ``fc`` as classifier, as timm's and DenseNet-like heads with ``conv`` have it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x)).flatten(1)


class ViT(nn.Module):
    """Patches, a class token, two encoder layers, a linear classifier ``fc`` on the token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.encoder(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1))
        return self.fc(self.norm(tokens[:, 0]))


@dataclass
class Output:
    """What a Hugging Face model returns: logits among other things."""

    logits: Tensor
    hidden_states: tuple = ()


class HuggingFaceStyle(nn.Module):
    """Returns an object with ``.logits``; there is a linear layer after the classifier's in order of registration."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, CLASSES)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.Tanh())

    def forward(self, x: Tensor) -> Output:
        return Output(logits=self.fc(self.body(x)))


NETWORKS = {
    "mlp": MLP,
    "mlp without bias": lambda: MLP(bias=False),
    "convnet with batch norm": ConvNet,
    "1x1 convolution head": FullyConvolutional,
    "vit": ViT,
    "object with logits": HuggingFaceStyle,
}


def rows(n: int, seed: int = 0, dtype: torch.dtype = torch.float32, soft: bool = False) -> tuple[Tensor, Tensor]:
    """n random rows and labels; the same numbers, float32's, in float32 and float64. Soft labels are float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, generator=g).to(dtype)
    if soft:
        return x, torch.softmax(2 * torch.randn(n, CLASSES, generator=g, dtype=torch.float64), 1)
    return x, torch.randint(CLASSES, (n,), generator=g)
