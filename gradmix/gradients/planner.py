"""The making of plans from traces of a model, and the plans that are kept between calls."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.exceptions import InnerBackwardError, NoRuleError
from gradmix.gradients.intercept import Parameters
from gradmix.gradients.layers import Layer, WithoutRule, select_parameters, single_layers, trainable_parameters
from gradmix.gradients.plan import Plan, PlannedCall, plan_without_rules
from gradmix.gradients.rules import Placement
from gradmix.gradients.trace import SAMPLES, Trace, TracedCall, check_statistics, trace, trace_with_expansion
from gradmix.model.inputs import InputTree, first_tensor, leaves

_plans: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan]] = weakref.WeakKeyDictionary()
_KEPT = 256
"""Number of plans of a model that are kept, usually one for each shape of the samples."""

_MAX_TRACES = 4
"""Largest number of further traces with other batch sizes; one is enough unless the samples' dependencies differ."""


def plan_for(
    model: nn.Module, x: InputTree, layers: str | Sequence[str], without_rule: WithoutRule, *, anew: bool = False
) -> Plan:
    """Return the plan of a model for samples like those of x, that of an earlier call unless ``anew``.

    Call it inside :func:`gradmix.model.unchanged.leave_unchanged`.

    Raises:
        NoRuleError: a parameter is used in a way without a rule, unless ``without_rule`` is ``"exact"``.
        CoupledSamplesError: samples influence each other.
        ValueError: ``layers`` selects nothing.
    """
    trainable = trainable_parameters(model)
    chosen = select_parameters(trainable, layers)
    # The batch axes may depend on the samples' shape, as in a model that routes its tokens.
    key = (
        tuple((path, leaf.shape[1:], leaf.dtype) for path, leaf in cast(Any, leaves(x))),
        tuple(chosen),
        tuple((name, p.shape) for name, p in trainable.items()),
        without_rule,
        torch.is_autocast_enabled(first_tensor(x).device.type),
        _fingerprint(model),
    )
    known = _plans.setdefault(model, {})
    plan = None if anew else known.pop(key, None)
    # The latest is the last.
    known[key] = _make_plan(model, x, trainable, chosen, without_rule) if plan is None else plan
    while len(known) > _KEPT:
        del known[next(iter(known))]
    return known[key]


def _fingerprint(model: nn.Module) -> int:
    """Return a hash of the model's modules and their plain attributes, which usually determine a forward pass."""
    plain = (bool, int, float, str, tuple, type(None))
    parts: list[object] = []
    for name, module in model.named_modules():
        parts += [name, type(module)]
        for key, value in vars(module).items():
            if isinstance(value, plain):
                parts.append((key, repr(value)))
            elif callable(value) and not isinstance(value, nn.Module):
                parts.append((key, id(value)))
            elif key.endswith("_hooks") and value:
                parts.append((key, tuple(value)))
    return hash(tuple(parts))


def _make_plan(
    model: nn.Module,
    x: InputTree,
    trainable: Mapping[str, nn.Parameter],
    chosen: Sequence[str],
    without_rule: WithoutRule,
) -> Plan:
    parameters = Parameters(trainable)
    try:
        found, standardised = _trace(model, x, parameters)
    except InnerBackwardError:
        parameters = Parameters(trainable, watched=False)
        found, standardised = _trace(model, x, parameters)
    try:
        axes = _batch_axes(model, x, trainable, found)
    except NoRuleError:
        if without_rule == "exact":
            return plan_without_rules(single_layers(trainable, chosen), found.num_classes)
        raise
    matrices, reasons = _matrices_and_reasons(found, axes, parameters.users)
    unruled = set(chosen) & reasons.keys()
    if unruled and without_rule == "error":
        listed = "; ".join(f"{name!r}, which is used {reasons[name]}" for name in chosen if name in unruled)
        raise NoRuleError(
            f"model: got no rule for the per-sample gradient of {listed}. Leave it out by layers=, or have it computed "
            "sample by sample (slower) with without_rule='exact'"
        )
    calls = tuple(
        PlannedCall(call.rule, call.parameters, next(iter(a)) if len(a) == 1 else None, index in found.expanded)
        for index, (call, a) in enumerate(zip(found.calls, axes, strict=True))
    )
    layers, placement = _layers(found.calls, matrices, trainable, set(chosen) - unruled)
    exact = single_layers(trainable, [name for name in chosen if name in unruled])
    if not layers and not exact:
        raise ValueError("layers: got only parameters that the model's forward pass does not use, expected others")
    return Plan(
        layers,
        exact,
        calls,
        placement,
        sample_bytes=sum(call.nbytes for call in found.calls) // SAMPLES,
        num_classes=found.num_classes,
        half_precision=any(call.half_precision for call in found.calls),
        wanted=tuple(name for name in chosen if name not in unruled),
        standardised=standardised,
    )


def _trace(model: nn.Module, x: InputTree, parameters: Parameters) -> tuple[Trace, tuple[torch.Size, ...]]:
    """Return the trace and the shapes of the inputs that ``batch_norm`` normalised by their own statistics in it."""
    try:
        found = trace_with_expansion(model, x, parameters)
    finally:
        # Also if the trace has found that samples influence each other: batch statistics may be the cause.
        standardised = check_statistics(model, x, parameters)
    return found, standardised


def _batch_axes(
    model: nn.Module, x: InputTree, trainable: Mapping[str, nn.Parameter], found: Trace
) -> list[set[BatchAxis]]:
    """Return for each call the axes that may hold the samples, reduced by traces with other batch sizes.

    Raises:
        NoRuleError: a trace with another batch size has other calls.
    """
    axes = [call.batch_axes() for call in found.calls]
    samples, traces = SAMPLES, 0
    while traces < _MAX_TRACES and (
        any(len(possible) > 1 for possible in axes)
        or (traces == 0 and any(all(d is None for d in call.dependencies) for call in found.calls))
    ):
        # If there are as many positions as samples, another batch size tells the axes apart.
        samples, traces = _next_batch_size(axes, samples), traces + 1
        again = trace(model, x, Parameters(trainable), samples, found.expanded)
        if [call.parameters for call in again.calls] != [call.parameters for call in found.calls]:
            raise NoRuleError(
                f"model: passes over 3 and over {samples} samples made different calls, expected the same. Have the "
                "gradients computed sample by sample (slower) with without_rule='exact'"
            )
        axes = [a & call.batch_axes() for a, call in zip(axes, again.calls, strict=True)]
    return axes


def _next_batch_size(axes: Sequence[set[BatchAxis]], before: int) -> int:
    """Return a batch size above ``before`` by which the possible axes can be distinguished.

    For samples and positions folded into one axis, the order n T + t can be taken for t N + n with N samples only if
    n T + t = n modulo N for every sample n: for n = 0 and 1 with the same t, only if N divides T - 1.
    """
    folded = {a.positions for possible in axes if len(possible) > 1 for a in possible if a.positions > 1}
    samples = max(before + 1, 5)
    while any((positions - 1) % samples == 0 for positions in folded):
        samples += 1
    return samples


def _matrices_and_reasons(
    found: Trace, axes: Sequence[set[BatchAxis]], users: Mapping[str, str]
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Return rows and columns of each parameter's matrix, and the reasons why parameters have no rule.

    Args:
        found: trace of the model.
        axes: for each call, the axes that may hold the samples.
        users: by parameter name, the call that used it in a way without a rule.
    """
    reasons = {name: users.get(name, "by a function that cannot be watched") for name in found.uncovered}
    matrices: dict[str, tuple[int, int]] = {}
    for call, possible in zip(found.calls, axes, strict=True):
        if len(possible) != 1:
            why = (
                "no axis of what comes out holds the samples"
                if not possible
                else "the axis of the samples is ambiguous"
            )
            reasons |= {name: f"by {call.function}: {why}" for name in call.parameters}
        for name, shape in call.matrix_shapes.items():
            if matrices.setdefault(name, shape) != shape:
                reasons[name] = f"by {call.function} and in another way, as matrices of different shapes"
    return matrices, reasons


def _layers(
    calls: Sequence[TracedCall],
    matrices: Mapping[str, tuple[int, int]],
    trainable: Mapping[str, nn.Parameter],
    ruled: set[str],
) -> tuple[tuple[Layer, ...], Placement]:
    """Return the layers of the parameters in ``ruled``: weights, with a bias that is used with no other weight."""
    biases: dict[str, set[str]] = {}
    weights: dict[str, set[str]] = {}
    separate: set[str] = set()
    for call in calls:
        if call.weight in ruled and call.bias in ruled:
            biases.setdefault(call.weight, set()).add(call.bias)
            weights.setdefault(call.bias, set()).add(call.weight)
            if not call.bias_is_column:
                separate |= {call.weight}
        elif call.bias in ruled:
            weights.setdefault(call.bias, set()).add("")  # used without this weight
        if call.weight in ruled:
            weights.setdefault(call.weight, set()).add("")  # if it is a bias elsewhere, it is not of one weight alone
    layers: dict[str, Layer] = {}
    layer_of: dict[str, str] = {}
    column: dict[str, int] = {}

    def add(first: str, second: str | None) -> None:
        names = (first,) if second is None else (first, second)
        rows, columns = matrices[first]
        layer = Layer(first.removesuffix(".weight"), names, (rows, columns + len(names) - 1))
        layers[layer.name] = layer
        for position, name in enumerate(names):
            layer_of[name], column[name] = layer.name, position * columns

    for call in calls:
        for name in call.parameters:
            if name not in ruled or name in layer_of:
                continue
            partner = next(iter(biases.get(name, {None}))) if len(biases.get(name, ())) == 1 else None
            if partner is not None and (
                name in separate
                or partner in biases
                or weights[partner] != {name}
                or matrices[name][0] != trainable[partner].numel()
            ):
                partner = None
            add(name, partner)
    return tuple(layers.values()), Placement(layer_of, column)
