"""The truth of the gradient engine: a float64 loop over single samples with torch.autograd.grad, nothing shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from truth import double

Loss = Callable[[Tensor, Tensor], Tensor]


def logits_of(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """One cross-entropy a row, (N,), from class indices or label vectors."""
    return F.cross_entropy(logits, y.to(logits.dtype) if y.is_floating_point() else y, reduction="none")


def sample_gradients(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss = cross_entropy, keep_dtype: bool = False
) -> dict[str, Tensor]:
    """{parameter name: (N, *its shape)}: one forward and one backward a sample, in evaluation mode.

    The model is copied to float64, unless ``keep_dtype``: then it and the rows are taken as they are.
    """
    if not keep_dtype:
        model = double(model)
        x = x.double() if x.is_floating_point() else x
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients: dict[str, list[Tensor]] = {name: [] for name in named}
    for n in range(len(x)):
        value = loss(logits_of(model(x[n : n + 1])), y[n : n + 1])
        assert value.shape == (1,)
        found = torch.autograd.grad(value[0], list(named.values()), allow_unused=True)
        for (name, parameter), gradient in zip(named.items(), found, strict=True):
            gradients[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {
        name: torch.stack(found) if found else named[name].new_zeros(0, *named[name].shape)
        for name, found in gradients.items()
    }


def layer_matrix(gradients: Mapping[str, Tensor], layer) -> Tensor:
    """(N, p, q): the gradients of a layer's parameters side by side, each as p rows."""
    p, q = layer.shape
    parts = [gradients[name].reshape(len(gradients[name]), p, -1) for name in layer.parameters]
    matrix = torch.cat(parts, 2)
    assert matrix.shape[2] == q
    return matrix


def by_class(gradients: Mapping[str, Tensor], y: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """{parameter name: (P, *its shape)}: sums over the samples of each class."""
    return {name: torch.stack([g[y == c].sum(0) for c in classes]) for name, g in gradients.items()}


def flat(gradients: Mapping[str, Tensor]) -> Tensor:
    """(N, all parameters): a sample's whole gradient as one row."""
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) cosines of rows, 0 where a row is zero."""

    def unit(v: Tensor) -> Tensor:
        norm = v.norm(dim=1, keepdim=True)
        return v / torch.where(norm == 0, torch.ones_like(norm), norm)

    return unit(a) @ unit(b).T


def assert_layers_equal(result, gradients: Mapping[str, Tensor], tolerance: float) -> None:
    """Every layer of an unsketched result is the truth, and every parameter that has a gradient is in just one layer.

    ``tolerance`` is relative to the largest entry of the layer's own matrix.
    """
    covered = [name for layer in result.layout for name in layer.parameters]
    assert len(covered) == len(set(covered))
    missing = [name for name, g in gradients.items() if name not in covered and g.abs().sum() > 0]
    assert missing == []
    assert set(covered) <= set(gradients)
    for layer in result.layout:
        expected = layer_matrix(gradients, layer)
        found = result.layer(layer.name)
        assert (layer.rows, layer.columns) == tuple(layer.shape), "not the identity sketch"
        assert found.shape == expected.shape, layer.name
        if expected.numel():
            error = (found.double() - expected).abs().max()
            largest = expected.abs().max()
            assert error <= tolerance * largest, f"{layer.name}: error {error:.2e}, largest entry {largest:.2e}"


def assert_vectors_are_the_layers(result, rows: int) -> None:
    """``vectors`` is the layers one after the other, at the places the layout says."""
    parts: Sequence[Tensor] = [result.layer(layer.name).reshape(rows, -1) for layer in result.layout]
    start = 0
    for layer, part in zip(result.layout, parts, strict=True):
        assert layer.start == start
        assert part.shape[1] == layer.rows * layer.columns
        start += part.shape[1]
    assert torch.equal(result.vectors, torch.cat(list(parts), 1))
