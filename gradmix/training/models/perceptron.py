"""A perceptron for small grey images and for samples of plain numbers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """A perceptron with two hidden layers of 256 and ReLU; it flattens its input.

    Weights are torch's own initialisation of ``nn.Linear``. 784 inputs and 10 classes make 269,322 parameters.

    Args:
        in_features: Values of one sample.
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
        """Logits ``(N, num_classes)`` of samples ``x (N, ...)``."""
        h: Tensor = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.head(F.relu(self.fc2(h)))
        return logits
