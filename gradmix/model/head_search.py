"""The search for the head: which linear layers end in a model's logits, and with which weights.

The layers that end in the logits are read off autograd's graph of one forward pass over a few samples. That the logits
are their weighted sum is checked on values (:mod:`gradmix.model.head_values`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from gradmix.model.head_layers import (
    Call,
    HeadNotFoundError,
    Layer,
    call_of,
    layers_of,
    logits_of,
    parts_of,
    values_per_sample,
)
from gradmix.model.head_values import compare_logits, estimate_factor, factor_dtype, off_linear
from gradmix.model.inputs import InputTree, call_model, own_copy
from gradmix.model.unchanged import without_compilation


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
    """Find the layers whose weighted sum is the model's output, by two forward passes over ``example``.

    Call it inside :func:`gradmix.model.unchanged.leave_unchanged`: the passes run in the model's present mode.

    Args:
        model: the model.
        example: a few samples, at least one.
        only: the one module to search in; None: all.

    Raises:
        HeadNotFoundError: there are no such layers.
    """
    with torch.inference_mode(False), torch.no_grad(), without_compilation():
        num_classes = logits_of(call_model(model, own_copy(example))).shape[-1]
    watched = {
        name: layers
        for name, module in model.named_modules()
        if (only is None or module is only) and (layers := layers_of(module, name, num_classes))
    }
    calls: dict[str, list[tuple[str | int | None, Call]]] = {}
    handles = [
        layers[0].module.register_forward_hook(_recorder(calls.setdefault(name, []), num_classes), with_kwargs=True)
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
    # Without a graph, as for a model that is frozen as a whole, layers that do not end in the logits are candidates
    # too.
    groups = [ending] if output.grad_fn is not None else [[candidate] for candidate in reversed(ending)]
    for group in groups:
        found = None if others or not group else _sum_of(group, output)
        if found is not None:
            return found
    raise HeadNotFoundError(_why_not(model, returned, candidates, ending, others))


def _recorder(calls: list[tuple[str | int | None, Call]], num_classes: int) -> Any:
    def record(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        for part, value in parts_of(output):
            if num_classes in (value.shape[1], value.shape[-1]):
                call = call_of(inputs, named, value)
                if call is not None:
                    calls.append((part, call))

    return record


def _candidate(layers: list[Layer], part: str | int | None, call: Call, returned: Tensor) -> _Candidate | None:
    """Return the first of the layers that a module may be by which the call can be explained."""
    for layer in layers:
        if call.features.shape[1 if layer.is_convolution else -1] != layer.matrix.shape[1]:
            continue
        values = values_per_sample(layer, call, returned)
        if values is None:
            continue
        features, logits, misplaced = values
        if misplaced is not None and bool(misplaced.any()):
            continue
        if not bool(off_linear(features, logits, layer.matrix, layer.vector, factor_dtype(logits)).any()):
            named = Layer(layer.module, layer.path, layer.weight, layer.bias, layer.transposed, part)
            return _Candidate(named, call, features, logits)
    return None


def _ends(output: Tensor, candidates: list[_Candidate]) -> tuple[list[_Candidate], list[str]]:
    """Return the candidates in which the logits end, and the shapes of other parameters used after them.

    A learnt scalar, such as a temperature, is allowed: its effect is checked on values.
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
    """Return the group with its weights if the logits are its weighted sum; else None."""
    returned, logits = output.detach(), [candidate.logits for candidate in group]
    layers = tuple(candidate.layer for candidate in group)
    if len({layer.path for layer in layers}) < len(layers):
        return None  # a layer that runs twice has two gradients
    if len(group) == 1 and torch.equal(returned, logits[0]):
        return Found(layers, (1.0,), True)
    tried = [_weights_by_graph(group, output)]
    if len(group) == 1:
        tried.insert(0, (1.0,))
        factor = estimate_factor(returned, logits[0])
        tried.append(None if factor is None else (float(factor),))
    for weights in tried:
        if weights is not None and not bool(compare_logits(returned, logits, weights).bad.any()):
            return Found(layers, weights, False)
    return None


def _weights_by_graph(group: Sequence[_Candidate], output: Tensor) -> tuple[float, ...] | None:
    """Return d(z_a - z_b) / d z_k,a of one sample: the factor of layer k, independent of a shift that follows."""
    if output.grad_fn is None or output.shape[1] < 2:
        return None
    largest = output.detach().topk(2, dim=1)
    # The sample whose two largest logits are closest: then, if possible, neither is a masked class.
    sample = int((largest.values[:, 0] - largest.values[:, 1]).argmin())
    first, second = largest.indices[sample].tolist()
    outputs = [candidate.call.output for candidate in group]
    with torch.enable_grad():
        margin = output[sample, first] - output[sample, second]
    gradients = torch.autograd.grad(margin, outputs, retain_graph=True, allow_unused=True)
    num_classes = output.shape[1]
    weights: list[float] = []
    for gradient in gradients:
        reached: Tensor | None = gradient  # None: no path to the logits
        if reached is None:
            return None
        # Only one position of one sample has a gradient, whichever other axes there are.
        entries = reached if reached.shape[-1] == num_classes else reached.movedim(1, -1)
        weights.append(float(entries.reshape(-1, num_classes).sum(0)[first]))
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
        what = f"parameters of shape {', '.join(sorted(set(others))[:3])} take part beside {_names(ending)}"
    elif not ending:
        what = f"what the model returns is not made from {_names(candidates)}"
    elif len(ending) > 1:
        what = f"{len(ending)} linear layers end in the model's output, {_names(ending)}, and it is not their sum"
    else:
        what = f"something follows {_names(ending)} that changes its logits otherwise"
    return (
        f"head: the model's output {shape} is not that of its last linear layer: {what}; {expected}. "
        "estimator=gradmix.JvpEstimator(without_rule='exact') needs no head"
    )


def _names(candidates: list[_Candidate]) -> str:
    return ", ".join(candidate.layer.describe() for candidate in candidates[-3:]) or "any linear layer"
