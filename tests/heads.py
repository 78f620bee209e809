"""Networks by what lies between the last linear layer and the logits; each is called as ``model(x)``, x (N, 10)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, WIDTH, SEEN = 6, 7, 4


class Net(nn.Module):
    """A body, and a classifier ``fc`` that the derived classes use in their own ways."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, WIDTH), nn.Tanh())
        self.fc = nn.Linear(WIDTH, CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc(self.body(x)))

    def after(self, z: Tensor) -> Tensor:
        return z


def after(function: Callable[[Tensor], Tensor], bias: bool = True) -> Callable[[], nn.Module]:
    """A network whose logits are ``function`` of the classifier's."""

    class After(Net):
        def after(self, z: Tensor) -> Tensor:
            return function(z)

    return lambda: After(bias)


UNSEEN = torch.arange(CLASSES, device="cpu") >= SEEN


def _through_data(z: Tensor) -> Tensor:
    z[:, SEEN:].data.fill_(-1e11)
    return z


def _in_place(z: Tensor) -> Tensor:
    z[:, SEEN:] = -1e9
    return z


class LearntTemperature(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def after(self, z: Tensor) -> Tensor:
        return z * self.scale.exp()


class Averaged(nn.Module):
    """The mean of a class token's and a distillation token's classifier, as DeiT has it."""

    def __init__(self, weights: tuple[float, float] = (0.5, 0.5), zero: bool = False) -> None:
        super().__init__()
        self.body, self.other = nn.Linear(10, WIDTH), nn.Linear(10, WIDTH + 2)
        self.fc, self.fc_dist = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH + 2, CLASSES, bias=False)
        self.weights = weights
        if zero:
            nn.init.zeros_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)
            nn.init.zeros_(self.fc_dist.weight)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.weights
        return a * self.fc(self.body(x).tanh()) + b * self.fc_dist(self.other(x).tanh())


class OwnLinear(nn.Module):
    """A linear layer of a class of its own, which returns a dictionary, as networks of the field have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, WIDTH) / 4)
        self.bias = nn.Parameter(torch.randn(CLASSES) / 4)

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        return {"logits": F.linear(h, self.weight, self.bias)}


class ReturnsDict(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = OwnLinear()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {"features": h, **self.fc(h)}


class Transposed(nn.Module):
    """W is (d, C), as in GPT-2's projections, and has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(WIDTH, CLASSES) / 4)
        self.offset = nn.Parameter(torch.randn(CLASSES) / 4)

    def forward(self, h: Tensor) -> Tensor:
        return torch.addmm(self.offset, h, self.kernel)


class TransposedHead(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = Transposed()


class Conv1dHead(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv1d(WIDTH, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x)[:, :, None])[:, :, 0]


class LastToken(nn.Module):
    """A decoder's classifier, which runs on all positions, of which the model returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = nn.Linear(2, WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.view(len(x), 5, 2).cumsum(1)).tanh()
        at = (x[:, 0] > 0).long() + 3
        return self.score(h)[torch.arange(len(x)), at]


class Parametrised(Net):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.fc)


SERVED: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    "no bias": lambda: Net(bias=False),
    "copied": after(lambda z: z.clone()),
    "reshaped": after(lambda z: z.T.contiguous().T),
    "log-softmax": after(lambda z: z.log_softmax(1)),
    "shifted for each sample": after(lambda z: z - z.detach().amax(1, keepdim=True)),
    "masked by -1000": after(lambda z: z.masked_fill(UNSEEN, -1000)),
    "masked by -inf": after(lambda z: z.masked_fill(UNSEEN, -torch.inf)),
    "masked in place": after(_in_place),
    "masked through .data": after(_through_data),
    "masked by subtraction": after(lambda z: z - 1e6 * UNSEEN),
    "masked, then log-softmax": after(lambda z: z.masked_fill(UNSEEN, -torch.inf).log_softmax(1)),
    "temperature": after(lambda z: z / 0.05),
    "temperature in place": after(lambda z: z.mul_(2.0)),
    "temperature, no bias": after(lambda z: z / 0.3, bias=False),
    "temperature and mask": after(lambda z: (z / 0.3).masked_fill(UNSEEN, -1e4)),
    "temperature, then log-softmax": after(lambda z: (z / 3).log_softmax(1)),
    "learnt temperature": LearntTemperature,
    "average of two heads": Averaged,
    "weighted sum of two heads": lambda: Averaged((0.3, 1.5)),
    "average of two heads that begin at zero": lambda: Averaged(zero=True),
    "own class, dictionary": ReturnsDict,
    "transposed weight of another name": TransposedHead,
    "one-dimensional convolution": Conv1dHead,
    "one of many tokens": LastToken,
    "weight norm": Parametrised,
}
"""Exact without naming the head."""


class CosineLinear(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(h), F.normalize(self.weight))


class Cosine(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = CosineLinear(WIDTH, CLASSES, bias=False)


class ScaledInput(nn.Linear):
    """W h / |h| + b."""

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(F.normalize(h), self.weight, self.bias)


class NormalisedInput(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = ScaledInput(WIDTH, CLASSES)


class Largest(Averaged):
    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(self.fc(self.body(x).tanh()), self.fc_dist(self.other(x).tanh()))


class Gated(Averaged):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 0, self.fc(self.body(x).tanh()), self.fc_dist(self.other(x).tanh()))


class OwnMask(Net):
    """Every sample has its own masked class."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x)).scatter(1, (x[:, :1] > 0).long(), -6e4)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "cosine classifier": Cosine,
    "normalised input": NormalisedInput,
    "softmax": after(lambda z: z.softmax(1)),
    "soft cap": after(lambda z: 3 * (z / 3).tanh()),
    "factor of each class": after(lambda z: z * torch.linspace(1, 2, CLASSES)),
    "temperature of each sample": after(lambda z: z * (1 + z.detach()[:, :1].abs())),
    "sigmoid": after(torch.sigmoid),
    "larger of two heads": Largest,
    "one of two heads": Gated,
    "mask of each sample": OwnMask,
}
"""A clear error, also where the classifier is named."""
