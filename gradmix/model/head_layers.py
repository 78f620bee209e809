"""The linear layers that make a model's logits: what a layer is, whatever its class, and how they are found.

A layer is any module with a weight (C, d), or (d, C) as GPT-2's projections have it, whose output is W h + b. Which
layers end in the logits is read off autograd's graph of one forward pass over a few samples; that their sum is what the
model returns is checked on values (:mod:`gradmix.model.head_values`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils import parametrize

from gradmix.model.head_values import estimated_factor, off_linear, related
from gradmix.model.inputs import InputTree, call_model, own_copy
from gradmix.model.unchanged import without_compilation


class HeadNotFoundError(ValueError):
    """The classifier head could not be found for certain, or what is named cannot serve as one."""


@dataclass(frozen=True)
class Layer:
    """A module that computes W h + b, and under which names it holds W and b.

    Attributes:
        module: the module.
        path: its name in the model.
        weight: attribute of the weight: (C, d), with axes of length 1 behind for a convolution.
        bias: attribute of the bias (C,), or None.
        transposed: whether the weight is (d, C).
        part: key or index of the logits in what the module returns; None: it returns the logits themselves.
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
        """Whether channels are axis 1 of what goes in and comes out."""
        return bool(getattr(self.module, self.weight).ndim > 2)

    def describe(self) -> str:
        """For errors: its name, class and sizes."""
        shape = "x".join(map(str, self.matrix.shape))
        return f"{self.path or 'the model itself'!r} ({type(self.module).__name__}, weight {shape})"


@dataclass(frozen=True)
class Call:
    """One call of a layer's module.

    Attributes:
        features: what went in.
        logits: what came out, as it was then: the model may change it in place.
        node: autograd's node of what came out, or None.
        output: what came out, itself.
    """

    features: Tensor
    logits: Tensor
    node: Node | None
    output: Tensor


def parts_of(output: object) -> Iterator[tuple[str | int | None, Tensor]]:
    """The floating-point tensors in what a module returned, each with its key or index; None for the tensor itself."""
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
    """The first floating-point tensor that a module was given."""
    for value in (*inputs, *named.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            return value
    return None


def call_of(inputs: Sequence[Any], named: Mapping[str, Any], output: Tensor) -> Call | None:
    """Return the call that a hook saw; None if no tensor went in."""
    features = input_of(inputs, named)
    if features is None:
        return None
    # Cloned, because logits are often masked or scaled in place afterwards.
    return Call(features, output.detach().clone(), output.grad_fn, output)


def named_layer(module: nn.Module, path: str) -> Layer | None:
    """The layer that a module's attributes ``weight`` and ``bias`` say it is; None if it has no such weight."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not _is_matrix(weight):
        return None
    if isinstance(module, nn.modules.conv._ConvNd) and (getattr(module, "groups", 1) != 1 or module.transposed):
        return None
    return Layer(module, path, "weight", "bias" if isinstance(bias, Tensor) else None)


def layers_of(module: nn.Module, path: str, classes: int | None = None) -> list[Layer]:
    """All layers that a module may be by the shapes of its own tensors, the likeliest first.

    Args:
        module: the module.
        path: its name.
        classes: C, if it is known.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return []  # what it is given cannot be seen
    names = list(module._parameters)
    if parametrize.is_parametrized(module) or "weight" in vars(module):
        names.insert(0, "weight")  # an attribute made of other parameters
    found: list[Layer] = []
    for name in names:
        value = getattr(module, name)
        if not _is_matrix(value):
            continue
        for transposed in (False, True):
            if transposed and value.ndim > 2:
                continue
            outputs = value.shape[-1] if transposed else len(value)
            if classes is not None and outputs != classes:
                continue
            biases = [n for n in ("bias", *module._parameters) if n != name and _is_vector(module, n, outputs)]
            found += [Layer(module, path, name, b, transposed) for b in (*dict.fromkeys(biases), None)]
    return found


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


def rows_of(layer: Layer, call: Call, returned: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """A call's input and output as one row for each sample.

    A classifier that runs on all tokens of a text, of which the model returns one, is reduced to that token: the one
    whose logits are the returned ones, to the bit.

    Args:
        layer: the layer.
        call: its call.
        returned: (N, C), the model's logits.

    Returns:
        features (N, d), logits (N, C), and (N,) bool: the samples without one certain position. None: there are no
        such rows.
    """
    count, classes = returned.shape
    features, logits = call.features.detach(), call.logits
    if layer.is_convolution:
        if logits.ndim < 2 or any(size != 1 for size in logits.shape[2:]):
            return None
        features, logits = features.flatten(1), logits.flatten(1)
    if logits.ndim == 2 and logits.shape == returned.shape and features.ndim == 2:
        return features, logits, torch.zeros(count, dtype=torch.bool, device=logits.device)
    width = features.shape[-1]
    if layer.is_convolution or logits.shape[-1] != classes or count == 0 or logits.numel() % (count * classes):
        return None
    if logits.shape[0] % count or features.numel() != logits.numel() // classes * width:
        return None
    logits, features = logits.reshape(count, -1, classes), features.reshape(count, -1, width)
    if logits.shape[1] == 1:
        return features[:, 0], logits[:, 0], torch.zeros(count, dtype=torch.bool, device=logits.device)
    same = (logits.to(returned.dtype) == returned[:, None]).all(2)
    at = same.to(torch.uint8).argmax(1)[:, None, None]
    chosen = features.gather(1, at.expand(-1, 1, width))
    twice = (same & (features != chosen).any(2)).any(1)
    return chosen[:, 0], logits.gather(1, at.expand(-1, 1, classes))[:, 0], ~same.any(1) | twice


@dataclass(frozen=True)
class Found:
    """The layers whose weighted sum is the model's logits.

    Attributes:
        layers: K layers.
        weights: their factors.
        direct: whether the model returns the one layer's output as it is.
    """

    layers: tuple[Layer, ...]
    weights: tuple[float, ...]
    direct: bool


@dataclass(frozen=True)
class _Candidate:
    layer: Layer
    call: Call
    features: Tensor
    logits: Tensor


def find_layers(model: nn.Module, example: InputTree, only: nn.Module | None = None) -> Found:
    """The layers whose weighted sum is what the model returns, by two forward passes over ``example``.

    Call it inside :func:`gradmix.model.unchanged.unchanged`: the passes run in the mode the model is in.

    Args:
        model: the model.
        example: a few samples, at least one.
        only: the one module to look at.

    Raises:
        HeadNotFoundError: there are none.
    """
    with torch.inference_mode(False), torch.no_grad(), without_compilation():
        classes = logits_of(call_model(model, own_copy(example))).shape[-1]
    watched = {
        name: layers
        for name, module in model.named_modules()
        if (only is None or module is only) and (layers := layers_of(module, name, classes))
    }
    calls: dict[str, list[tuple[str | int | None, Call]]] = {}
    handles = [
        layers[0].module.register_forward_hook(_recorder(calls.setdefault(name, []), classes), with_kwargs=True)
        for name, layers in watched.items()
    ]
    # Tensors of inference mode cannot take part in a graph.
    graph = not any(v.is_inference() for v in (*model.parameters(), *model.buffers()))
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(graph), without_compilation():
            output = logits_of(call_model(model, own_copy(example)))
    finally:
        for handle in handles:
            handle.remove()
    returned = output.detach()
    if returned.ndim != 2:
        raise HeadNotFoundError(f"head: the model returns logits of shape {tuple(returned.shape)}, expected (N, C)")
    candidates = [
        candidate
        for name, layers in watched.items()
        for part, call in calls[name]
        if (candidate := _candidate(layers, part, call, returned)) is not None
    ]
    ending, others = _ends(output, candidates) if only is None else (candidates, [])
    # Without a graph, as of a model that is frozen as a whole, more may have run than end in the logits.
    groups = [ending] if output.grad_fn is not None else [[candidate] for candidate in reversed(ending)]
    for group in groups:
        found = None if others or not group else _sum_of(group, output)
        if found is not None:
            return found
    raise HeadNotFoundError(_why_not(model, returned, candidates, ending, others))


def _recorder(calls: list[tuple[str | int | None, Call]], classes: int) -> Any:
    def record(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        for part, value in parts_of(output):
            if classes in (value.shape[1], value.shape[-1]):
                call = call_of(inputs, named, value)
                if call is not None:
                    calls.append((part, call))

    return record


def _candidate(layers: list[Layer], part: str | int | None, call: Call, returned: Tensor) -> _Candidate | None:
    """The first of the layers that a module may be which explains the call."""
    for layer in layers:
        if call.features.shape[1 if layer.is_convolution else -1] != layer.matrix.shape[1]:
            continue
        rows = rows_of(layer, call, returned)
        if rows is None or bool(rows[2].any()):
            continue
        if not bool(off_linear(rows[0], rows[1], layer.matrix, layer.vector).any()):
            named = Layer(layer.module, layer.path, layer.weight, layer.bias, layer.transposed, part)
            return _Candidate(named, call, rows[0], rows[1])
    return None


def _ends(output: Tensor, candidates: list[_Candidate]) -> tuple[list[_Candidate], list[str]]:
    """The candidates that the logits are made of, and the shapes of other parameters that take part behind them.

    A learnt number, such as a temperature, may take part: what it does is checked on values.
    """
    if output.grad_fn is None:
        return candidates, []
    stops = {candidate.call.node: candidate for candidate in candidates if candidate.call.node is not None}
    reached: list[_Candidate] = []
    others: list[str] = []
    seen: set[Node] = set()
    waiting: list[Node | None] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in stops:
            reached.append(stops[node])
            continue
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and variable.numel() > 1:
            others.append("x".join(map(str, variable.shape)))
        waiting += [following for following, _ in node.next_functions]
    order = {id(candidate): index for index, candidate in enumerate(candidates)}
    return sorted(reached, key=lambda candidate: order[id(candidate)]), others


def _sum_of(group: Sequence[_Candidate], output: Tensor) -> Found | None:
    """The group as what the logits are the weighted sum of; None if they are not."""
    returned, logits = output.detach(), [candidate.logits for candidate in group]
    layers = tuple(candidate.layer for candidate in group)
    if len({layer.path for layer in layers}) < len(layers):
        return None  # a layer that runs twice has two gradients
    if len(group) == 1 and torch.equal(returned, logits[0]):
        return Found(layers, (1.0,), True)
    tried = [_weights_by_graph(group, output)]
    if len(group) == 1:
        tried.insert(0, (1.0,))
        factor = estimated_factor(returned, logits[0])
        tried.append(None if factor is None else (float(factor),))
    for weights in tried:
        if weights is not None and not bool(related(returned, logits, weights).bad.any()):
            return Found(layers, weights, False)
    return None


def _weights_by_graph(group: Sequence[_Candidate], output: Tensor) -> tuple[float, ...] | None:
    """d(z_a - z_b) / d z_k,a of one sample: the factor of layer k, whatever shift follows."""
    if output.grad_fn is None or output.shape[1] < 2:
        return None
    largest = output.detach().topk(2, dim=1)
    # The sample whose two largest logits are closest: neither is a masked class then, if it can be helped.
    row = int((largest.values[:, 0] - largest.values[:, 1]).argmin())
    first, second = largest.indices[row].tolist()
    outputs = [candidate.call.output for candidate in group]
    with torch.enable_grad():
        margin = output[row, first] - output[row, second]
    gradients = torch.autograd.grad(margin, outputs, retain_graph=True, allow_unused=True)
    classes = output.shape[1]
    weights: list[float] = []
    for gradient in gradients:
        reached: Tensor | None = gradient  # None for what has no path to the logits
        if reached is None:
            return None
        # One position of one sample is reached, whichever axes there are besides.
        entries = reached if reached.shape[-1] == classes else reached.movedim(1, -1)
        weights.append(float(entries.reshape(-1, classes).sum(0)[first]))
    return tuple(weights) if all(weights) else None


def _why_not(
    model: nn.Module,
    returned: Tensor,
    candidates: list[_Candidate],
    ending: list[_Candidate],
    others: list[str],
) -> str:
    shape = tuple(returned.shape)
    expected = (
        "expected logits W h + b of a linear layer that is a module (or a weighted sum of such), up to a shift or a "
        "factor of all classes and up to masked classes"
    )
    if not candidates:
        what = f"no linear layer of the model gives {shape[1]} logits for each sample"
    elif others:
        what = f"parameters of shape {', '.join(sorted(set(others))[:3])} take part beside {_listed(ending)}"
    elif not ending:
        what = f"what the model returns is not made from {_listed(candidates)}"
    elif len(ending) > 1:
        what = f"{len(ending)} linear layers end in the model's output, {_listed(ending)}, and it is not their sum"
    else:
        what = f"something follows {_listed(ending)} that changes its logits otherwise"
    return (
        f"head: the model's output {shape} is not that of its last linear layer: {what}; {expected}. "
        "estimator=gradmix.JvpEstimator(without_rule='exact') needs no head"
    )


def _listed(candidates: list[_Candidate]) -> str:
    return ", ".join(candidate.layer.describe() for candidate in candidates[-3:]) or "any linear layer"


def logits_of(output: Any) -> Tensor:
    """The logits in a model's return value: the tensor itself, or the ``logits`` of an object or mapping.

    Raises:
        TypeError: neither.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(f"model: returned {type(output).__name__}, expected a tensor or an object with a tensor .logits")
