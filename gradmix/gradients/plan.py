"""What a model's forward pass does with its parameters, found out once, on a few rows.

A forward pass over three rows, and a backward pass from each row's logits, tell: which calls use which parameters, and
whether any use escapes the rules; where in each call's output the samples lie, because a row's logits have a gradient
only there; and that rows do not influence each other. Nothing is concluded from names or from one shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gradmix.gradients.batch_axis import Place, possible_places
from gradmix.gradients.intercept import (
    BatchStatisticsError,
    Parameters,
    Passing,
    Watch,
    hook_gradient,
    refusing_checkpoints,
    uncovered_parameters,
)
from gradmix.gradients.rules.base import Placement, Rule, matrix_shape
from gradmix.head import logits_of
from gradmix.inputs import InputTree, call_model, first_tensor, leaves, map_tensors, num_samples, tensors_of
from gradmix.probe import require_finite, without_compilation

WithoutRule = Literal["error", "exact"]


class NoRuleError(ValueError):
    """A parameter is used in a way for which there is no layer rule."""


class CoupledRowsError(ValueError):
    """The output for a row depends on other rows of the batch, so that it has no gradient of its own."""


class MovedRowsError(CoupledRowsError):
    """Rows are not where the plan says; whether they influence each other is not known."""


class OutdatedPlanError(RuntimeError):
    """A forward pass did not do what the plan says."""


@dataclass(frozen=True)
class Layer:
    """Parameters whose gradients form one matrix.

    Attributes:
        name: the weight's name without ``.weight``, or the only parameter's.
        parameters: their names; the matrix is ``cat([p.reshape(rows, -1) for p in parameters], 1)``.
        shape: (rows, columns) of the matrix.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, int]


@dataclass(frozen=True)
class CallPlan:
    """A call that has a rule.

    Attributes:
        rule: which.
        parameters: those that it uses.
        place: where the samples are in its output, if anywhere.
        spread: whether its input is the same for all rows and is to stand there once a row.
    """

    rule: type[Rule]
    parameters: tuple[str, ...]
    place: Place | None
    spread: bool


@dataclass
class Plan:
    """A model's layers and the calls that use them.

    Attributes:
        layers: those with rules, in the order of their first call.
        exact: those without, each a single parameter; or all layers, of a model that has no plan for all its rows.
        calls: all calls that have a rule, of selected parameters or not, in their order.
        placement: where each parameter with a rule lies in its layer.
        row_bytes: bytes of the outputs of all calls for one row.
        classes: number of the model's logits.
        verified: whether a whole batch has been found to lie where the plan says.
        wanted: names of the parameters whose gradients the calls are to give; those that no call uses are unused.
        standardised: shapes of what ``batch_norm`` normalises by its own statistics: of weights, not of rows.
        noisy: whether the model was found to draw random numbers.
        passes: passes made by it.
        reads: hashes of what the model read of tensors' values in passes in which the rows were found at their places.
    """

    layers: tuple[Layer, ...]
    exact: tuple[Layer, ...]
    calls: tuple[CallPlan, ...]
    placement: Placement
    row_bytes: int
    classes: int
    verified: bool = False
    wanted: tuple[str, ...] = ()
    standardised: tuple[torch.Size, ...] = ()
    noisy: bool = False
    passes: int = 0
    reads: set[int] = field(default_factory=set)

    def selected(self) -> list[str]:
        """Names of all parameters with a rule whose gradients are wanted."""
        return [name for layer in self.layers for name in layer.parameters]


_plans: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan]] = weakref.WeakKeyDictionary()
_KEPT = 256
"""Plans of a model that are kept: for so many shapes of rows, above all."""


def plan_for(
    model: nn.Module, x: InputTree, layers: str | Sequence[str], without_rule: WithoutRule, *, anew: bool = False
) -> Plan:
    """The plan of a model for rows like those of ``x``, remembered from an earlier call unless ``anew``.

    Call it inside :func:`gradmix.probe.untouched`.

    Raises:
        NoRuleError: a parameter is used in a way without a rule, unless ``without_rule`` is ``"exact"``.
        CoupledRowsError: rows influence each other.
        ValueError: ``layers`` selects nothing.
    """
    trainable = trainable_parameters(model)
    chosen = select(trainable, layers)
    # Where the samples are may depend on the rows' shape; in a model that routes its tokens it does.
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
    known[key] = _make_plan(model, x, trainable, chosen, without_rule) if plan is None else plan  # the latest last
    while len(known) > _KEPT:
        del known[next(iter(known))]
    return known[key]


def _fingerprint(model: nn.Module) -> int:
    """Changes with a model's modules and their plain attributes: with whatever usually steers a forward pass."""
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


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def select(trainable: Mapping[str, nn.Parameter], layers: str | Sequence[str]) -> list[str]:
    """The parameters that ``layers`` selects: all, or those whose name, or a module's they are in, fits a pattern.

    Raises:
        TypeError: neither ``"all"`` nor a sequence of patterns.
        ValueError: there is nothing to select, or a pattern fits nothing.
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


# ---------------------------------------------------------------------------------------------------------- finding out


@dataclass
class _Record:
    """One call as the watcher saw it, and for each row which entries of the output its logits depend on."""

    rule: type[Rule]
    function: str
    weight: str | None
    bias: str | None
    pairs: bool
    matrices: dict[str, tuple[int, int]]
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    bytes: int
    reached: list[Tensor | None]

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def places(self) -> set[Place]:
        """Where the rows may be in the output."""
        return possible_places(self.reached, self.shape, self.dims)


class _Probe(Watch):
    """Records all calls that have a rule, and in the backward passes what each row's logits depend on.

    Args:
        parameters: what to look for.
        rows: batch size.
        device: the model's.
        spread: numbers of the calls whose input is to be spread.
    """

    def __init__(self, parameters: Parameters, rows: int, device: torch.device, spread: Collection[int]) -> None:
        super().__init__(parameters)
        self._spread = spread
        self.records: list[_Record] = []
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.row = 0
        self._rows = rows

    def seen(self, rule: Rule) -> Tensor:
        """Make the call and watch for the gradient of what came out."""
        if len(self.records) in self._spread and not rule.spread(self._rows):
            raise _CannotSpreadError
        output = hook_gradient(rule.run(), self.anchor)
        weight, bias = (None if ref is None else ref.name for ref in (rule.weight, rule.bias))
        pairs = rule.pairs and not (rule.weight is not None and rule.weight.transposed)
        record = _Record(
            type(rule),
            getattr(rule.function, "__name__", "?"),
            weight,
            bias,
            pairs,
            {ref.name: rule.matrix(ref) for ref in rule.refs},
            tuple(output.shape),
            tuple(rule.dims(output)),
            output.numel() * output.itemsize,
            [None] * self._rows,
        )
        self.records.append(record)

        def hook(gradient: Tensor) -> None:
            reached = gradient != 0
            record.reached[self.row] = reached if bool(reached.any()) else None

        output.register_hook(hook)
        return output


def _make_plan(
    model: nn.Module,
    x: InputTree,
    trainable: Mapping[str, nn.Parameter],
    chosen: Sequence[str],
    without_rule: WithoutRule,
) -> Plan:
    parameters = Parameters(trainable)
    try:
        records, missed, spread, classes = _spread_probe(model, x, parameters)
    finally:
        # Also where rows were found to be coupled: this may be by what.
        standardised = _check_statistics(model, x, parameters)
    places = [record.places() for record in records]
    rows, probes = 3, 0
    while probes < _PROBES and (
        any(len(possible) > 1 for possible in places)
        or (probes == 0 and any(all(r is None for r in record.reached) for record in records))
    ):
        # There may be as many positions as rows, say: with another number of rows the coincidence ends.
        rows, probes = _telling_rows(places, rows), probes + 1
        again, _, _ = _probe(model, x, Parameters(trainable), rows, spread)
        if [r.parameters for r in again] != [r.parameters for r in records]:
            if without_rule == "exact":
                return plan_without_rules(single_layers(trainable, chosen), classes)
            raise NoRuleError(
                f"model: passes over 3 and over {rows} rows made different calls, expected the same. Have the "
                "gradients computed row by row (slower) with without_rule='exact'"
            )
        places = [a & b.places() for a, b in zip(places, again, strict=True)]
    reasons = {name: parameters.users.get(name, "by a function that cannot be watched") for name in missed}
    matrices: dict[str, tuple[int, int]] = {}
    for record, possible in zip(records, places, strict=True):
        if len(possible) != 1:
            why = "no axis of what comes out holds the rows" if not possible else "the axis of the rows is ambiguous"
            reasons |= {name: f"by {record.function}: {why}" for name in record.parameters}
        for name, matrix in record.matrices.items():
            if matrices.setdefault(name, matrix) != matrix:
                reasons[name] = f"by {record.function} and in another way, as matrices of different shapes"
    wanted = set(chosen)
    unruled = wanted & reasons.keys()
    if unruled and without_rule == "error":
        listed = "; ".join(f"{name!r}, which is used {reasons[name]}" for name in chosen if name in unruled)
        raise NoRuleError(
            f"model: got no rule for the per-sample gradient of {listed}. Leave it out by layers=, or have it computed "
            "row by row (slower) with without_rule='exact'"
        )
    calls = tuple(
        CallPlan(r.rule, r.parameters, next(iter(p)) if len(p) == 1 else None, index in spread)
        for index, (r, p) in enumerate(zip(records, places, strict=True))
    )
    layers, placement = _layers(records, matrices, trainable, wanted - unruled)
    exact = single_layers(trainable, [name for name in chosen if name in unruled])
    if not layers and not exact:
        raise ValueError("layers: got only parameters that the model's forward pass does not use, expected others")
    row_bytes = sum(record.bytes for record in records) // 3
    return Plan(
        layers,
        exact,
        calls,
        placement,
        row_bytes,
        classes,
        wanted=tuple(name for name in chosen if name not in unruled),
        standardised=standardised,
    )


_PROBES = 4
"""Probes with further numbers of rows: one is enough, unless what a row's logits depend on is not the same for all."""


def _telling_rows(places: Sequence[set[Place]], before: int) -> int:
    """More than ``before`` rows, so many that they tell the places apart.

    Of samples and positions folded into one axis, the order n T + t cannot pass for t N + n with N rows unless n T + t
    is n modulo N for every row n: for n = 0 and 1 with the same t, unless N divides T - 1.
    """
    folded = {place.folded for possible in places if len(possible) > 1 for place in possible if place.folded > 1}
    rows = max(before + 1, 5)
    while any((size - 1) % rows == 0 for size in folded):
        rows += 1
    return rows


def _check_statistics(model: nn.Module, x: InputTree, parameters: Parameters) -> tuple[torch.Size, ...]:
    """Shapes of what ``batch_norm`` normalised by its own statistics in a probe, if that does not depend on the rows.

    Raises:
        BatchStatisticsError: over two rows it is something else.
    """
    if parameters.standardised:
        other = Parameters(parameters.named)
        # An error of the model's own has been, or will be, raised elsewhere.
        with suppress(Exception), torch.enable_grad(), without_compilation(), Passing(other):
            forward(model, x, torch.arange(2, device="cpu"))
        first, second = parameters.standardised, other.standardised
        if len(first) != len(second) or not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            raise BatchStatisticsError(
                "model: a BatchNorm layer normalises by the statistics of the batch, expected running statistics: a "
                "row's gradient would depend on the rows around it. In evaluation mode it uses running statistics if "
                "it was made with track_running_stats=True; GroupNorm or LayerNorm have no such trouble"
            )
    return tuple(value.shape for value in parameters.standardised)


def forward(model: nn.Module, x: InputTree, rows: Tensor) -> Tensor:
    """The logits of some rows of x, by their indices modulo their number, in this order."""
    device, count = first_tensor(x).device, num_samples(x)
    index = rows.to(device) % count
    logits = logits_of(call_model(model, map_tensors(lambda leaf: leaf[index].detach(), x)))
    return check_output(logits, len(rows))


def single_layers(trainable: Mapping[str, nn.Parameter], names: Sequence[str]) -> tuple[Layer, ...]:
    """Layers of one parameter each."""
    return tuple(Layer(name, (name,), matrix_shape(trainable[name].shape)) for name in names)


def plan_without_rules(layers: tuple[Layer, ...], classes: int) -> Plan:
    """The plan by which no call is watched, and the gradients of all layers are computed row by row."""
    placement = Placement({}, {})
    return Plan((), layers, (), placement, row_bytes=0, classes=classes)


class _CannotSpreadError(Exception):
    """A call's input cannot be spread over the rows."""


def _spread_probe(
    model: nn.Module, x: InputTree, parameters: Parameters
) -> tuple[list[_Record], list[str], set[int], int]:
    """:func:`_probe` over 3 rows, with inputs spread that are the same for all rows, where that gives the rows a place.

    A position embedding is looked up once and added to all rows: no axis of what comes out holds them. Looked up once a
    row it is the same model. That is not assumed: the logits have to be the same, and no call may lose its place.

    Returns:
        The calls, the parameters that are used in ways without a rule, the numbers of the calls to be spread, and the
        number of classes.
    """
    records, missed, logits = _probe(model, x, parameters, 3, ())
    spread: set[int] = set()
    tried: set[int] = set()
    while True:
        placed = [_has_place(record) for record in records]
        lost = [i for i, found in enumerate(placed) if not found and i not in tried and records[i].rule.spreads]
        if not lost:
            return records, missed, spread, 1 if logits.ndim == 1 else logits.shape[1]
        tried.add(lost[0])
        try:
            again, _, other = _probe(model, x, Parameters(parameters.named), 3, spread | {lost[0]})
        except Exception:  # whatever a model raises that does not take it so; it is refused by name then
            continue
        now = [_has_place(record) for record in again]
        none_lost = len(now) == len(placed) and all(
            after or not before for before, after in zip(placed, now, strict=True)
        )
        tolerance = max(1e-3, 16 * torch.finfo(logits.dtype).eps) * float(logits.abs().amax())
        if none_lost and now[lost[0]] and torch.allclose(logits, other, rtol=0, atol=tolerance):
            records, spread = again, spread | {lost[0]}


def _has_place(record: _Record) -> bool:
    return bool(record.places())


def _probe(
    model: nn.Module, x: InputTree, parameters: Parameters, rows: int, spread: Collection[int]
) -> tuple[list[_Record], list[str], Tensor]:
    """A forward pass over ``rows`` of the rows, some of them repeated if there are fewer, and a backward pass for each.

    Returns:
        The calls, the parameters that are used in ways without a rule, and the logits.
    """
    device, count = first_tensor(x).device, num_samples(x)
    repeated = map_tensors(lambda t: t[torch.arange(rows, device=device) % count].detach().clone(), x)
    entries = [leaf.requires_grad_() for leaf in tensors_of(repeated) if leaf.is_floating_point()]
    with torch.enable_grad(), without_compilation(), refusing_checkpoints():
        with _Probe(parameters, rows, device, spread) as probe:
            logits = check_output(logits_of(call_model(model, map_tensors(Tensor.clone, repeated))), rows)
        require_finite(0, **{"the model's logits": logits.detach()})
        missed = uncovered_parameters(logits, parameters.named)
        # Weights that differ: the sum of probabilities, say, depends on nothing.
        weights = torch.linspace(1, 2, logits[0].numel(), device=logits.device, dtype=logits.dtype).cos()
        weights = weights.view(logits.shape[1:])
        for row in range(rows):
            probe.row = row
            if not logits.requires_grad:
                break
            inputs = [probe.anchor, *entries]
            gradients = torch.autograd.grad((logits[row] * weights).sum(), inputs, retain_graph=True, allow_unused=True)
            for gradient in gradients[1:]:
                others = torch.arange(rows, device=device) != row
                if gradient is not None and bool((gradient[others] != 0).any()):
                    raise CoupledRowsError(
                        f"model: the output of row {row} of a batch of {rows} depends on other rows, expected rows "
                        "that do not influence each other, so that each has a gradient of its own"
                    )
    return probe.records, missed, logits.detach()


def check_output(logits: Tensor, rows: int) -> Tensor:
    """The logits, if they are of ``rows`` rows, (N, ...).

    Raises:
        ValueError: they are not.
    """
    if logits.ndim == 0 or len(logits) != rows:
        raise ValueError(f"model: returned logits of shape {tuple(logits.shape)} for {rows} rows, expected ({rows}, C)")
    return logits


def _layers(
    records: Sequence[_Record],
    matrices: Mapping[str, tuple[int, int]],
    trainable: Mapping[str, nn.Parameter],
    ruled: set[str],
) -> tuple[tuple[Layer, ...], Placement]:
    """The layers that the calls make of the parameters in ``ruled``: a weight with the bias that goes with it alone."""
    biases: dict[str, set[str]] = {}
    weights: dict[str, set[str]] = {}
    apart: set[str] = set()
    for record in records:
        if record.weight in ruled and record.bias in ruled:
            biases.setdefault(record.weight, set()).add(record.bias)
            weights.setdefault(record.bias, set()).add(record.weight)
            if not record.pairs:
                apart |= {record.weight}
        elif record.bias in ruled:
            weights.setdefault(record.bias, set()).add("")  # used without this weight
        if record.weight in ruled:
            weights.setdefault(record.weight, set()).add("")  # if it is a bias elsewhere, then not of one weight alone
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

    for record in records:
        for name in record.parameters:
            if name not in ruled or name in layer_of:
                continue
            partner = next(iter(biases.get(name, {None}))) if len(biases.get(name, ())) == 1 else None
            if partner is not None and (
                name in apart
                or partner in biases
                or weights[partner] != {name}
                or matrices[name][0] != trainable[partner].numel()
            ):
                partner = None
            add(name, partner)
    return tuple(layers.values()), Placement(layer_of, column)
