"""The linear layers that may be a head: what a layer is, whatever its class, and the values of its calls.

A layer is any module with a weight (C, d), or (d, C) as in GPT-2's projections, whose output is W h + b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils import parametrize


class HeadNotFoundError(ValueError):
    """The classifier head was not found for certain, or the module named cannot serve as one."""


@dataclass(frozen=True)
class Layer:
    """A module that computes W h + b, and the names of its attributes W and b.

    Attributes:
        module: the module.
        path: its name in the model.
        weight: attribute of the weight: (C, d), followed by axes of length 1 for a convolution.
        bias: attribute of the bias (C,), or None.
        transposed: whether the weight is (d, C).
        part: key or index of the logits in the module's output; None: the output is the logits.
    """

    module: nn.Module
    path: str
    weight: str = "weight"
    bias: str | None = None
    transposed: bool = False
    part: str | int | None = None

    @property
    def matrix(self) -> Tensor:
        """W (C, d)."""
        weight: Tensor = getattr(self.module, self.weight)
        return weight.T if self.transposed else weight.flatten(1)

    @property
    def vector(self) -> Tensor | None:
        """The bias b (C,), or None."""
        bias: Tensor | None = None if self.bias is None else getattr(self.module, self.bias)
        return bias

    @property
    def is_convolution(self) -> bool:
        """Whether axis 1 of input and output holds the channels."""
        return bool(getattr(self.module, self.weight).ndim > 2)

    def describe(self) -> str:
        """Name, class and sizes, for error messages."""
        shape = "x".join(map(str, self.matrix.shape))
        return f"{self.path or 'the model itself'!r} ({type(self.module).__name__}, weight {shape})"


@dataclass(frozen=True)
class Call:
    """One call of a layer's module.

    Attributes:
        features: the input.
        logits: a copy of the output, which the model may change in place afterwards.
        node: autograd's node of the output, or None.
        output: the output itself.
    """

    features: Tensor
    logits: Tensor
    node: Node | None
    output: Tensor


def parts_of(output: object) -> Iterator[tuple[str | int | None, Tensor]]:
    """Yield the floating-point tensors in a module's output, each with its key or index; None for a bare tensor."""
    pairs: Iterator[tuple[str | int | None, object]]
    if isinstance(output, Mapping):
        pairs = iter(output.items())
    elif isinstance(output, (tuple, list)):
        pairs = iter(enumerate(output))
    else:
        pairs = iter([(None, output)])
    for key, value in pairs:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            yield key, value


def input_of(inputs: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
    """Return the first floating-point tensor among a module's arguments."""
    for value in (*inputs, *named.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            return value
    return None


def call_of(inputs: Sequence[Any], named: Mapping[str, Any], output: Tensor) -> Call | None:
    """Return the record of a call from the arguments of a hook; None if no tensor is among the inputs."""
    features = input_of(inputs, named)
    if features is None:
        return None
    # Cloned, because logits are often masked or scaled in place afterwards.
    return Call(features, output.detach().clone(), output.grad_fn, output)


def standard_layer(module: nn.Module, path: str) -> Layer | None:
    """Return the layer of a module with the attributes ``weight`` and ``bias`` of ``nn.Linear``; None for any other."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not _is_matrix(weight):
        return None
    if isinstance(module, nn.modules.conv._ConvNd) and (getattr(module, "groups", 1) != 1 or module.transposed):
        return None
    if isinstance(weight, Tensor) and isinstance(bias, Tensor) and bias.shape != weight.shape[:1]:
        return None  # as of GPT-2's projections, whose weight is (d, C)
    return Layer(module, path, "weight", "bias" if isinstance(bias, Tensor) else None)


def layers_of(module: nn.Module, path: str, num_classes: int | None = None) -> list[Layer]:
    """Return all layers that a module may be by the shapes of its own tensors, the likeliest first.

    Args:
        module: the module.
        path: its name.
        num_classes: C, if it is known.
    """
    found: list[Layer] = []
    for name in _weight_names(module):
        value = getattr(module, name)
        for transposed in (False, True):
            outputs = _num_outputs(value, transposed)
            if outputs is None or (num_classes is not None and outputs != num_classes):
                continue
            biases = [n for n in ("bias", *module._parameters) if n != name and _is_vector(module, n, outputs)]
            found += [Layer(module, path, name, b, transposed) for b in (*dict.fromkeys(biases), None)]
    return found


def may_be_layer(module: nn.Module, weight: str, bias: str | None, transposed: bool) -> bool:
    """Whether :func:`layers_of` has a layer of a module with these attributes."""
    if weight not in _weight_names(module):
        return False
    outputs = _num_outputs(getattr(module, weight), transposed)
    if outputs is None or bias is None:
        return outputs is not None
    return bias != weight and bias in ("bias", *module._parameters) and _is_vector(module, bias, outputs)


def _weight_names(module: nn.Module) -> list[str]:
    """Return the names of the attributes that may be a weight."""
    if isinstance(module, torch.jit.ScriptModule):
        return []  # its inputs cannot be watched
    names = list(module._parameters)
    if parametrize.is_parametrized(module) or "weight" in vars(module):
        names.insert(0, "weight")  # an attribute computed from other parameters
    return names


def _num_outputs(value: object, transposed: bool) -> int | None:
    """Return C of a weight (C, d), or (d, C) where ``transposed``; None for what is no weight."""
    if not isinstance(value, Tensor) or not _is_matrix(value) or (transposed and value.ndim > 2):
        return None
    return value.shape[-1] if transposed else len(value)


def _is_matrix(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim >= 2
        and all(size == 1 for size in value.shape[2:])
    )


def _is_vector(module: nn.Module, name: str, length: int) -> bool:
    value = getattr(module, name, None)
    return isinstance(value, Tensor) and value.shape == (length,)


def values_per_sample(layer: Layer, call: Call, returned: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return a call's input and output with one vector for each sample.

    Of a classifier that runs on all tokens of a text, of which the model returns one, that token is taken: the one
    whose logits equal the returned ones to the bit.

    Args:
        layer: the layer.
        call: its call.
        returned: (N, C), the model's logits.

    Returns:
        features (N, d), logits (N, C), and (N,) bool: the samples without one certain position, or None: each has one.
        None: the shapes do not fit.
    """
    count, num_classes = returned.shape
    features, logits = call.features.detach(), call.logits
    if layer.is_convolution:
        if logits.ndim < 2 or any(size != 1 for size in logits.shape[2:]):
            return None
        features, logits = features.flatten(1), logits.flatten(1)
    if logits.ndim == 2 and logits.shape == returned.shape and features.ndim == 2:
        return features, logits, None
    size = features.shape[-1]
    if layer.is_convolution or logits.shape[-1] != num_classes or count == 0 or logits.numel() % (count * num_classes):
        return None
    if logits.shape[0] % count or features.numel() != logits.numel() // num_classes * size:
        return None
    logits, features = logits.reshape(count, -1, num_classes), features.reshape(count, -1, size)
    if logits.shape[1] == 1:
        return features[:, 0], logits[:, 0], None
    same = (logits.to(returned.dtype) == returned[:, None]).all(2)
    at = same.to(torch.uint8).argmax(1)[:, None, None]
    chosen = features.gather(1, at.expand(-1, 1, size))
    twice = (same & (features != chosen).any(2)).any(1)
    return chosen[:, 0], logits.gather(1, at.expand(-1, 1, num_classes))[:, 0], ~same.any(1) | twice


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output: the tensor itself, or the ``logits`` of an object or mapping.

    Raises:
        TypeError: there are none.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(f"model: returned {type(output).__name__}, expected a tensor or an object with a tensor .logits")
