"""The selected parameters, and the layers that they form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from gradmix.gradients.rules import matrix_shape

WithoutRule = Literal["error", "exact"]
"""The treatment of parameters without a layer rule: refuse them, or compute their gradients sample by sample."""


@dataclass(frozen=True)
class Layer:
    """Parameters whose gradients form one matrix.

    Attributes:
        name: the weight's name without ``.weight``, or that of the only parameter.
        parameters: their names; the matrix is ``cat([p.reshape(rows, -1) for p in parameters], 1)``.
        shape: (rows, columns) of the matrix.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, int]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def select_parameters(trainable: Mapping[str, nn.Parameter], layers: str | Sequence[str]) -> list[str]:
    """Return the parameters that ``layers`` selects: all, or those whose own or module's name matches a pattern.

    Raises:
        TypeError: ``layers`` is neither ``"all"`` nor a sequence of patterns.
        ValueError: there are no parameters to select, or a pattern matches none.
    """
    if not trainable:
        raise ValueError("model: has no parameter that requires gradients, expected at least one")
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers: got {layers!r}, expected 'all' or a sequence of names such as [{layers!r}]")
        return list(trainable)
    if not isinstance(layers, Sequence) or not all(isinstance(pattern, str) for pattern in layers):
        raise TypeError(f"layers: got {type(layers).__name__}, expected 'all' or a sequence of names")
    chosen: set[str] = set()
    for pattern in layers:
        fits = {name for name in trainable if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not fits:
            some = ", ".join(repr(name) for name in list(trainable)[:5])
            raise ValueError(f"layers: got {pattern!r}, which fits no trainable parameter; there are {some}, ...")
        chosen |= fits
    if not chosen:
        raise ValueError("layers: got no names, expected 'all' or at least one")
    return [name for name in trainable if name in chosen]


def single_layers(trainable: Mapping[str, nn.Parameter], names: Sequence[str]) -> tuple[Layer, ...]:
    """Return layers of one parameter each."""
    return tuple(Layer(name, (name,), matrix_shape(trainable[name].shape)) for name in names)
