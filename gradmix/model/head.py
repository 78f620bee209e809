"""The classifier head of a model: what it is, and how it is found.

The last-layer gradient of a sample is (softmax(z) - y) [h; 1]^T, with h the head's input and z the model's logits. That
holds only if a linear layer computes the logits from h. Nothing about the head is assumed: the layers that end in the
logits are searched for (:mod:`gradmix.model.head_search`), and every pass checks on values that the model returned what
they computed, also where the caller names the head (:mod:`gradmix.model.head_capture`).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gradmix.model.head_layers import HeadNotFoundError, Layer, layers_of, logits_of, may_be_layer, standard_layer
from gradmix.model.head_search import find_layers
from gradmix.model.inputs import InputTree, map_tensors
from gradmix.model.unchanged import check_watched, leave_unchanged, unwrap

__all__ = ["Head", "HeadNotFoundError", "HeadOutput", "logits_of", "resolve_head"]


class HeadOutput(NamedTuple):
    """The head's input and output for a batch of samples.

    Attributes:
        features: (N, d), the head's input. For a head whose logits are scaled, or for several layers whose logits are
            summed: (N, sum_k (d_k + 1)), the layers' inputs with a 1 appended for each bias, times the factors of the
            sum.
        logits: (N, C), the model's logits; -1e30 for classes that the model masks.
    """

    features: Tensor
    logits: Tensor


class CapturedOutput(HeadOutput):
    """A :class:`HeadOutput` that was checked when it was captured.

    Attributes:
        appends_one: whether the features need a column of ones for the bias.
    """

    appends_one: bool

    def __new__(cls, features: Tensor, logits: Tensor, appends_one: bool = True) -> CapturedOutput:
        """Store the flag beside the pair."""
        output = super().__new__(cls, features, logits)
        output.appends_one = appends_one
        return output


@dataclass(frozen=True)
class Head:
    """The linear layers whose weighted sum is the model's logits; nearly always one, with the factor 1.

    Attributes:
        layers: K layers.
        weights: their factors, as they were when the head was found.
        direct: whether there is one layer and the model returned its output unchanged when the head was found.
        name: the caller's name for it; None: it was found.
    """

    layers: tuple[Layer, ...]
    weights: tuple[float, ...]
    direct: bool
    name: str | None

    @property
    def num_classes(self) -> int:
        """C, the number of logits."""
        return len(self.layers[0].matrix)

    @property
    def module(self) -> nn.Module:
        """The one layer's module.

        Raises:
            HeadNotFoundError: the logits are the sum of several.
        """
        if len(self.layers) > 1:
            raise HeadNotFoundError(f"head: the model's logits are the sum of {self.describe()}, expected one layer")
        return self.layers[0].module

    def appends_one(self, features: Tensor) -> bool:
        """Whether ``features`` (N, d) need a column of ones for the bias; those of a sum contain theirs."""
        layer = self.layers[0]
        return len(self.layers) == 1 and layer.bias is not None and features.shape[1] == layer.matrix.shape[1]

    def weight_and_bias(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """W (C, D) and b (C,) or None, by which ``features`` (N, D) of a :class:`HeadOutput` become logits."""
        first = self.layers[0]
        if len(self.layers) == 1 and features.shape[1] == first.matrix.shape[1]:
            return first.matrix, first.vector
        columns: list[Tensor] = []
        for layer in self.layers:
            columns.append(layer.matrix)
            if layer.vector is not None:
                columns.append(layer.vector[:, None])
        return torch.cat(columns, 1), None

    def describe(self) -> str:
        """Names, classes and sizes of the layers, for error messages."""
        return " and ".join(layer.describe() for layer in self.layers)


HeadLike: TypeAlias = nn.Module | str | Head | None

_Names = tuple[tuple[str, str, "str | None", bool, "str | int | None"], ...]


@dataclass(frozen=True)
class _Remembered:
    """A head by the names of its modules; it keeps no model alive."""

    layers: _Names
    weights: tuple[float, ...]
    direct: bool


_found: weakref.WeakKeyDictionary[nn.Module, dict[str | None, _Remembered]] = weakref.WeakKeyDictionary()

EXAMPLES = 8
"""Samples of the forward pass in which a head is searched for."""


def resolve_head(model: nn.Module, head: HeadLike = None, example: InputTree | None = None) -> Head:
    """Return the head: the one named, the one found before in this model, or the one found now.

    Args:
        model: the model, possibly wrapped.
        head: a module of the model or its name, a head resolved before, or None: it is searched for.
        example: one or more samples to search with; the first :data:`EXAMPLES` are used.

    Raises:
        HeadNotFoundError: the module named is not part of the model or contains no linear layer; or none was found.
        TypeError: ``head`` is neither a module nor a name, or it or the model is a TorchScript module.
    """
    if isinstance(head, Head):
        return head
    inner = unwrap(model)
    check_watched("model", inner)
    name = _name_of(inner, head)
    known = _recall(inner, name)
    if known is not None:
        return known
    only = None if name is None else inner.get_submodule(name)
    if only is not None:
        check_watched("head", only)
    # A module with the attributes of nn.Linear needs no pass here: every later pass checks what it computes.
    layer = None if only is None or name is None else standard_layer(only, name)
    if layer is not None:
        return Head((layer,), (1.0,), True, name)
    if only is not None and not layers_of(only, ""):
        raise HeadNotFoundError(
            f"head: got {type(only).__name__}, expected a linear layer: a module with a weight (C, d) that computes "
            f"W h + b, such as nn.Linear or a 1x1 convolution without groups; {_advice(inner)}"
        )
    if example is None:
        raise HeadNotFoundError(
            "head: not known yet for this model and no example samples to find it with; give them by example=, or name "
            f"the classifier layer by head=, as a module or by its name; {_advice(inner)}"
        )
    with leave_unchanged(inner):
        found = find_layers(inner, map_tensors(lambda v: v[:EXAMPLES], example), only)
    resolved = Head(found.layers, found.weights, found.direct, name)
    remember_head(inner, resolved)
    return resolved


def recall_head(model: nn.Module, head: HeadLike) -> Head | None:
    """Return the head that is named or was found before; None where a pass would be needed to find it."""
    if isinstance(head, Head):
        return head
    name = _name_of(model, head)
    known = _recall(model, name)
    if known is not None or name is None:
        return known
    layer = standard_layer(model.get_submodule(name), name)
    return None if layer is None else Head((layer,), (1.0,), True, name)


def remember_head(model: nn.Module, head: Head) -> None:
    """Record the head of this model under the name that the caller gave (None: it was found), for later calls."""
    names = tuple((v.path, v.weight, v.bias, v.transposed, v.part) for v in head.layers)
    _found.setdefault(model, {})[head.name] = _Remembered(names, head.weights, head.direct)


def forget_head(model: nn.Module, name: str | None) -> None:
    """Forget the head of this name, so that the next call searches for it."""
    _found.get(model, {}).pop(name, None)


def _name_of(model: nn.Module, head: nn.Module | str | None) -> str | None:
    """Return the path of a named head in the model."""
    if head is None:
        return None
    if isinstance(head, str):
        try:
            model.get_submodule(head)
        except AttributeError:
            raise HeadNotFoundError(f"head: the model has no module {head!r}; {_advice(model)}") from None
        return head
    if isinstance(head, nn.Module):
        for path, module in model.named_modules():
            if module is head:
                return str(path)
        raise HeadNotFoundError(f"head: the {type(head).__name__} given is not a module of the model; {_advice(model)}")
    raise TypeError(f"head: got {type(head).__name__}, expected a module of the model, its name, or None")


def _advice(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if standard_layer(module, name) is not None]
    if not names:
        return "the model has no linear layer"
    return f"the model's last linear layers are {', '.join(repr(name) for name in names[-5:])}"


def _recall(model: nn.Module, name: str | None) -> Head | None:
    known = _found.get(model, {}).get(name)
    if known is None:
        return None
    layers = []
    for path, weight, bias, transposed, part in known.layers:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return None
        # A head that was replaced by another module is searched for again.
        if not may_be_layer(module, weight, bias, transposed):
            return None
        layers.append(Layer(module, path, weight, bias, transposed, part))
    return Head(tuple(layers), known.weights, known.direct, name)
