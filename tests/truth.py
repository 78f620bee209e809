"""The truth that everything is held against: float64 loops of torch.autograd.grad over single mixed rows."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def double(model: nn.Module) -> nn.Module:
    """A float64 copy in evaluation mode."""
    return copy.deepcopy(model).double().eval()


def one_hot(y: Tensor, classes: int) -> Tensor:
    return y.double() if y.is_floating_point() else F.one_hot(y, classes).double()


def head_gradient(loss: Tensor, head: nn.Module) -> Tensor:
    """Gradient of a scalar loss with respect to the head's weight, and bias as the last column, (C, d + 1)."""
    parameters = [head.weight] if head.bias is None else [head.weight, head.bias]
    gradients = torch.autograd.grad(loss, parameters)
    return torch.cat([g.reshape(len(g), -1) for g in gradients], 1)


def reference(model: nn.Module, head: str, x: Tensor, y: Tensor, logits: Callable = lambda out: out) -> Tensor:
    """Mean over single rows of the head's cross-entropy gradient."""
    model = double(model)
    total = 0
    for i in range(len(x)):
        z = logits(model(x[i : i + 1].double()))
        total = total + head_gradient(F.cross_entropy(z, one_hot(y[i : i + 1], z.shape[1])), model.get_submodule(head))
    return total / len(x)


def mixed_inputs(
    model: nn.Module, head: str, batch: tuple, partners: tuple, lam: float, grad_reference: Tensor
) -> tuple[Tensor, Tensor]:
    """(inner, norm), (N, M): gradients at single mixed inputs."""
    model = double(model)
    module = model.get_submodule(head)

    def gradient(i: int, j: int) -> Tensor:
        x = lam * batch[0][i : i + 1].double() + (1 - lam) * partners[0][j : j + 1].double()
        z = model(x)
        classes = z.shape[1]
        y = lam * one_hot(batch[1][i : i + 1], classes) + (1 - lam) * one_hot(partners[1][j : j + 1], classes)
        return head_gradient(F.cross_entropy(z, y), module)

    return _all_pairs(gradient, len(batch[1]), len(partners[1]), grad_reference)


def mixed_features(
    head: nn.Module, batch: tuple, partners: tuple, lam: float, grad_reference: Tensor
) -> tuple[Tensor, Tensor]:
    """(inner, norm), (N, M): gradients at single mixed features; ``batch`` and ``partners`` are (features, labels)."""
    head = double(head)

    def gradient(i: int, j: int) -> Tensor:
        z = head(lam * batch[0][i : i + 1].double() + (1 - lam) * partners[0][j : j + 1].double())
        classes = z.shape[1]
        y = lam * one_hot(batch[1][i : i + 1], classes) + (1 - lam) * one_hot(partners[1][j : j + 1], classes)
        return head_gradient(F.cross_entropy(z, y), head)

    return _all_pairs(gradient, len(batch[1]), len(partners[1]), grad_reference)


def _all_pairs(gradient: Callable[[int, int], Tensor], n: int, m: int, grad_reference: Tensor) -> tuple[Tensor, Tensor]:
    inner, norm = torch.empty(n, m, dtype=torch.float64), torch.empty(n, m, dtype=torch.float64)
    for i in range(n):
        for j in range(m):
            g = gradient(i, j)
            inner[i, j], norm[i, j] = (g * grad_reference.double()).sum(), g.norm()
    return inner, norm


def assert_decisions_agree(inner: Tensor, truth: Tensor, band: float = 1e-6) -> None:
    """Helpful or not must be the same wherever the truth is farther from 0 than ``band`` times its largest entry."""
    clear = truth.abs() > band * truth.abs().max()
    assert torch.equal((inner >= 0)[clear], (truth >= 0)[clear])
