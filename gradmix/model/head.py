"""The classifier head: finding it in a model, and capturing what goes in and comes out.

The last-layer gradient of a sample is (softmax(z) - y) [h; 1]^T, with h the head's input and z the model's logits. That
holds only if a linear layer makes the logits from h. So nothing about the head is assumed. The layers that end in the
logits are found (:mod:`gradmix.model.head_layers`). Every pass checks on values that the model returned what they
computed (:mod:`gradmix.model.head_values`), also where the caller names the head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gradmix.model.head_layers import (
    Call,
    HeadNotFoundError,
    Layer,
    call_of,
    find_layers,
    layers_of,
    logits_of,
    named_layer,
    parts_of,
    rows_of,
)
from gradmix.model.head_values import MASKED, estimated_factor, off_linear, related, stacked
from gradmix.model.inputs import InputTree, call_model, map_tensors, own_copy
from gradmix.model.unchanged import check_watched, unchanged, unwrap
from gradmix.runtime.deferred_checks import can_sync, check_samples, deferred_checks

__all__ = ["Head", "HeadCapture", "HeadNotFoundError", "HeadOutput", "logits_of", "resolve_head"]


class HeadOutput(NamedTuple):
    """The head's input and output for a batch of samples.

    Attributes:
        features: (N, d), its input; of a head whose logits are scaled, or of several layers whose logits are summed,
            (N, sum_k (d_k + 1)): their inputs with a 1 appended for each bias, times the factors of the sum.
        logits: (N, C), the model's; -1e30 for classes that the model masks.
    """

    features: Tensor
    logits: Tensor


class CapturedOutput(HeadOutput):
    """A :class:`HeadOutput` that was checked when it was captured.

    Attributes:
        appends_one: whether a column of ones for the bias goes with the features.
    """

    appends_one: bool

    def __new__(cls, features: Tensor, logits: Tensor, appends_one: bool = True) -> CapturedOutput:
        """Keep the flag beside the pair."""
        output = super().__new__(cls, features, logits)
        output.appends_one = appends_one
        return output


@dataclass(frozen=True)
class Head:
    """The linear layers whose weighted sum is the model's logits; nearly always one, with the factor 1.

    Attributes:
        layers: K layers.
        weights: their factors, as they were when the head was found.
        direct: whether the model returned the one layer's output as it is, then.
        name: how the caller names it; None: it was found.
    """

    layers: tuple[Layer, ...]
    weights: tuple[float, ...]
    direct: bool
    name: str | None

    @property
    def num_classes(self) -> int:
        """C."""
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
        """Whether a column of ones for the bias goes with ``features`` (N, d); those of a sum hold theirs."""
        layer = self.layers[0]
        return len(self.layers) == 1 and layer.bias is not None and features.shape[1] == layer.matrix.shape[1]

    def describe(self) -> str:
        """For errors: names, classes and sizes of the layers."""
        return " and ".join(layer.describe() for layer in self.layers)


HeadLike: TypeAlias = nn.Module | str | Head | None

_Names = tuple[tuple[str, str, "str | None", bool, "str | int | None"], ...]


@dataclass(frozen=True)
class _Remembered:
    """A head by the names of its modules, which keeps no model alive."""

    layers: _Names
    weights: tuple[float, ...]
    direct: bool


_found: weakref.WeakKeyDictionary[nn.Module, dict[str | None, _Remembered]] = weakref.WeakKeyDictionary()

EXAMPLES = 8
"""Samples that a head is looked for with."""


def resolve_head(model: nn.Module, head: HeadLike = None, example: InputTree | None = None) -> Head:
    """The head: the one named, the one found before in this very model, or the one found now.

    Args:
        model: the model, maybe wrapped.
        head: a module of the model or its name, a head resolved before, or None: it is found.
        example: one or more samples to find it with; the first few are used.

    Raises:
        HeadNotFoundError: the module named is not part of the model or holds no linear layer; or none could be found.
        TypeError: ``head`` is neither a module nor a name, or it or the model is of TorchScript.
    """
    if isinstance(head, Head):
        return head
    inner = unwrap(model)
    check_watched("model", inner)
    name = _name_of(inner, head)
    known = _remembered(inner, name)
    if known is not None:
        return known
    only = None if name is None else inner.get_submodule(name)
    if only is not None:
        check_watched("head", only)
    # A module whose attributes are those of nn.Linear needs no pass; every pass checks what it computes.
    layer = None if only is None or name is None else named_layer(only, name)
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
    with unchanged(inner):
        found = find_layers(inner, map_tensors(lambda v: v[:EXAMPLES], example), only)
    resolved = Head(found.layers, found.weights, found.direct, name)
    _remember(inner, resolved)
    return resolved


def forward_head(model: nn.Module, head: HeadLike, x: InputTree) -> CapturedOutput:
    """Return the head's input and output for ``x``; call it inside :func:`gradmix.model.unchanged.unchanged`.

    Raises:
        HeadNotFoundError: as :class:`HeadCapture`.
    """
    with HeadCapture(model, head, x) as capture:
        call_model(model, own_copy(x))
    return capture.checked()


class HeadCapture:
    """Context manager that records the head's input and the logits of a forward pass.

    In a training step it makes selection free of a forward pass of its own::

        with HeadCapture(model) as capture:
            logits = model(x)
        pairs = gradmix.select_pairs(model, buffer, (x, y), outputs=capture.output)

    Args:
        model: the model about to be called, maybe wrapped by ``torch.compile`` or a data-parallel class.
        head: the head, its name, or None: it is found by itself (then ``example`` must be given unless this model's
            head was found before).
        example: one or more input samples, used only to find the head.

    Raises:
        HeadNotFoundError: on entry, no certain head; on reading ``output``, the model or the head did not run exactly
            once, or the model's logits are not the head's.
    """

    def __init__(self, model: nn.Module, head: HeadLike = None, example: InputTree | None = None) -> None:
        self.head = resolve_head(model, head, example)
        self._model = unwrap(model)
        self._calls: list[list[Call]] = []
        self._passes: list[_Pass] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> HeadCapture:
        self._calls, self._passes = [[] for _ in self.head.layers], []
        for layer, calls in zip(self.head.layers, self._calls, strict=True):
            self._handles.append(layer.module.register_forward_hook(_recorder(layer, calls), with_kwargs=True))
        # Behind the layers' hooks, as the model may be the layer itself.
        self._handles.append(self._model.register_forward_hook(self._end))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _end(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        # At once, as an optimiser may change the weights before the output is read; cloned, because a loss may mask
        # logits in place.
        calls = [calls[0] for calls in self._calls if len(calls) == 1]
        returned = logits_of(output).detach().clone()
        self._passes.append(_Pass(returned, _rows_and_checks(self.head, calls, returned)))

    @property
    def output(self) -> CapturedOutput:
        """Detached features and logits of the forward pass inside the context (:class:`HeadOutput`).

        On a GPU nothing is waited for: logits that are not the head's are found by the next call of the library.
        """
        with deferred_checks(self._model):
            return self.checked()

    def checked(self) -> CapturedOutput:
        """:attr:`output`, for callers inside :func:`gradmix.runtime.deferred_checks.deferred_checks`."""
        for what, counts in ((self.head.describe(), map(len, self._calls)), ("the model", [len(self._passes)])):
            wrong = next((count for count in counts if count != 1), None)
            if wrong is not None:
                # Another one may end in the logits by now, such as that of another task.
                _forget(self._model, self.head.name)
                raise HeadNotFoundError(
                    f"head: {what} was seen to run {wrong} times in one forward pass of the model, expected once (code "
                    f"compiled before may pass by the hook); {_otherwise(self.head)}"
                )
        features, logits = _output_of(self._model, self.head, self._passes[0])
        return CapturedOutput(features, logits, self.head.appends_one(features))


def given_outputs(
    model: nn.Module, head: HeadLike, outputs: HeadOutput | tuple[Tensor, Tensor], count: int
) -> CapturedOutput:
    """Features and logits that a caller gives, checked against the head's weights on a few samples unless captured.

    No pass is made: a head that is not known yet is recognised by its values; one that cannot be is taken to have a
    bias.

    Raises:
        ValueError: their numbers are not ``count``.
        HeadNotFoundError: the logits are not those that the head makes of the features with its present weights.
    """
    if isinstance(outputs, CapturedOutput):
        return outputs
    features, logits = outputs
    if not len(features) == len(logits) == count:
        raise ValueError(
            f"outputs: got features of {len(features)} and logits of {len(logits)} samples, expected {count} as the "
            "batch has"
        )
    known = _known_head(unwrap(model), head)
    if known is None:
        return CapturedOutput(features, logits, _has_bias_by_values(unwrap(model), features, logits))
    weight, bias = _matrix_of(known, features)
    if features.ndim == 2 and logits.ndim == 2 and weight.shape == (logits.shape[1], features.shape[1]):
        text = (
            f"outputs: got logits that are not those of {known.describe()} for the features given, expected features "
            "and logits of one forward pass of this model with its present weights, as gradmix.HeadCapture records them"
        )
        check_samples(
            off_linear(features, logits, weight, bias, up_to_shift=True), lambda _row: HeadNotFoundError(text)
        )
    return CapturedOutput(features, logits, known.appends_one(features))


def _has_bias_by_values(model: nn.Module, features: Tensor, logits: Tensor) -> bool:
    """Whether the layer that made the logits has a bias; True where none is found, or where nothing is looked at."""
    if features.ndim != 2 or logits.ndim != 2 or not can_sync(features.device):
        return True
    live = (logits > MASKED).all(0)
    for name, module in reversed(list(model.named_modules())):
        for layer in layers_of(module, name, logits.shape[1]):
            head = Head((layer,), (1.0,), True, None)
            weight, bias = _matrix_of(head, features)
            if weight.shape[1] == features.shape[1]:
                bias = None if bias is None else bias[live]
                if not bool(off_linear(features, logits[:, live], weight[live], bias, up_to_shift=True).any()):
                    return head.appends_one(features)
    return True


def _name_of(model: nn.Module, head: nn.Module | str | None) -> str | None:
    """The path of a named head in the model."""
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
    names = [name for name, module in model.named_modules() if named_layer(module, name) is not None]
    if not names:
        return "the model has no linear layer"
    return f"the model's last linear layers are {', '.join(repr(name) for name in names[-5:])}"


def _remembered(model: nn.Module, name: str | None) -> Head | None:
    known = _found.get(model, {}).get(name)
    if known is None:
        return None
    layers = []
    for path, weight, bias, transposed, part in known.layers:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return None
        # A head that was replaced by something else is looked for again.
        layer = Layer(module, path, weight, bias, transposed, part)
        fits = any(
            (other.weight, other.bias, other.transposed) == (weight, bias, transposed)
            for other in layers_of(module, path)
        )
        if not fits:
            return None
        layers.append(layer)
    return Head(tuple(layers), known.weights, known.direct, name)


def _known_head(model: nn.Module, head: HeadLike) -> Head | None:
    """The head that is named or was found before; None where a pass would be needed to find it."""
    if isinstance(head, Head):
        return head
    name = _name_of(model, head)
    known = _remembered(model, name)
    if known is not None or name is None:
        return known
    layer = named_layer(model.get_submodule(name), name)
    return None if layer is None else Head((layer,), (1.0,), True, name)


def _remember(model: nn.Module, head: Head) -> None:
    names = tuple((v.path, v.weight, v.bias, v.transposed, v.part) for v in head.layers)
    _found.setdefault(model, {})[head.name] = _Remembered(names, head.weights, head.direct)


def _forget(model: nn.Module, name: str | None) -> None:
    _found.get(model, {}).pop(name, None)


def _recorder(layer: Layer, calls: list[Call]) -> Callable[..., None]:
    def record(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        for part, value in parts_of(output):
            if part == layer.part or (layer.part is None and part == "logits"):
                call = call_of(inputs, named, value)
                if call is not None:
                    calls.append(replace(call, node=None, output=call.logits))

    return record


def _matrix_of(head: Head, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """W and b by which ``features`` of a :class:`HeadOutput` become logits."""
    layer = head.layers[0]
    if len(head.layers) == 1 and features.shape[1] == layer.matrix.shape[1]:
        return layer.matrix, layer.vector
    columns: list[Tensor] = []
    for layer in head.layers:
        columns.append(layer.matrix)
        if layer.vector is not None:
            columns.append(layer.vector[:, None])
    return torch.cat(columns, 1), None


class _Rows(NamedTuple):
    """One layer's part of a pass.

    Attributes:
        features, logits: (N, d) and (N, C).
        nonlinear: (n,) bool, of a few samples: whether the logits are not W h + b.
        misplaced: (N,) bool: whether there is no one position that the model returned.
    """

    features: Tensor
    logits: Tensor
    nonlinear: Tensor
    misplaced: Tensor


class _Pass(NamedTuple):
    """The logits (N, C) that the model returned, and of each layer its part, or why there is none."""

    returned: Tensor
    rows: list[_Rows | str]


def _rows_and_checks(head: Head, calls: list[Call], returned: Tensor) -> list[_Rows | str]:
    if returned.ndim != 2:
        return [f"the model returns logits of shape {tuple(returned.shape)}, expected (N, C)"]
    parts: list[_Rows | str] = []
    for layer, call in zip(head.layers, calls, strict=False):
        rows = rows_of(layer, call, returned)
        if rows is None:
            parts.append(
                f"{layer.describe()} was given {tuple(call.features.shape)} and gave {tuple(call.logits.shape)}, "
                f"expected one position a sample as the logits {tuple(returned.shape)} have"
            )
            continue
        features, logits, misplaced = rows
        parts.append(_Rows(features, logits, off_linear(features, logits, layer.matrix, layer.vector), misplaced))
    return parts


def _output_of(model: nn.Module, head: Head, captured: _Pass) -> HeadOutput:
    """Features and logits of a pass, after the check that they belong together."""
    parts: list[_Rows] = []
    for part in captured.rows:
        if isinstance(part, str):
            raise HeadNotFoundError(f"head: {part}; {_otherwise(head)}")
        parts.append(part)
    for layer, part in zip(head.layers, parts, strict=True):
        _require(model, head, part.nonlinear, partial(_not_linear, layer.describe()))
        _require(model, head, part.misplaced, partial(_misplaced, layer.describe()))
    features, logits = [part.features for part in parts], [part.logits for part in parts]
    if can_sync(captured.returned.device):
        return _looked_at(model, head, features, logits, captured.returned)
    return _unseen(model, head, features, logits, captured.returned)


def _looked_at(
    model: nn.Module, head: Head, features: list[Tensor], logits: list[Tensor], returned: Tensor
) -> HeadOutput:
    biases = [layer.bias is not None for layer in head.layers]
    if len(logits) == 1 and torch.equal(returned, logits[0].to(returned.dtype)):
        return HeadOutput(features[0], logits[0])
    known = related(returned, logits, head.weights)
    if not bool(known.bad.any()):
        single = head.weights == (1.0,)
        return HeadOutput(features[0] if single else stacked(features, biases, head.weights), known.logits)
    if len(logits) == 1:
        for factor in (1.0, estimated_factor(returned, logits[0])):
            if factor is None:
                continue
            now = related(returned, logits, [factor])
            if not bool(now.bad.any()):
                return HeadOutput(
                    features[0] if isinstance(factor, float) else stacked(features, biases, [factor]), now.logits
                )
    _require(model, head, known.bad, partial(_not_the_heads, head.describe()))
    raise AssertionError("unreachable: a sample is bad")


def _unseen(model: nn.Module, head: Head, features: list[Tensor], logits: list[Tensor], returned: Tensor) -> HeadOutput:
    """The same on a device that is not waited for: what is not as it was is found out by the next call."""
    biases = [layer.bias is not None for layer in head.layers]
    if head.direct:
        same = returned == logits[0].to(returned.dtype)
        told, own = returned.clone(), logits[0]
        kept, name, described, otherwise = weakref.ref(model), head.name, head.describe(), _otherwise(head)

        def consequence(row: int) -> HeadNotFoundError | None:
            model = kept()  # the question must not keep it
            # Classes that are masked since, or a shift or factor of all: the logits given were the returned ones.
            factor = estimated_factor(told, own)
            for weight in (1.0, factor):
                if weight is not None and not bool(related(told, [own], [weight]).bad.any()):
                    known = None if model is None else _known_head(model, name)
                    if model is not None and known is not None:
                        _remember(model, replace(known, direct=False))
                    return None
            if model is not None:
                _forget(model, name)
            return HeadNotFoundError(f"head: {_not_the_heads(described, row)}; {otherwise}")

        check_samples(~(same | logits[0].isnan()).all(1), consequence)
        dtype = torch.promote_types(returned.dtype, torch.float32)
        return HeadOutput(features[0], torch.where(same, logits[0].to(dtype), returned.to(dtype).clamp(min=MASKED)))
    weights: list[float | Tensor] = list(head.weights)
    if len(logits) == 1:
        factor = estimated_factor(returned, logits[0])
        weights = weights if factor is None else [factor]
    now = related(returned, logits, weights)
    _require(model, head, now.bad, partial(_not_the_heads, head.describe()))
    return HeadOutput(stacked(features, biases, weights), now.logits)


def _require(model: nn.Module, head: Head, bad: Tensor, why: Callable[[int], str]) -> None:
    kept, name, otherwise = weakref.ref(model), head.name, _otherwise(head)

    def consequence(row: int) -> HeadNotFoundError:
        model = kept()  # the question must not keep it
        if model is not None:
            _forget(model, name)
        return HeadNotFoundError(f"head: {why(row)}; {otherwise}")

    check_samples(bad, consequence)


def _not_linear(layer: str, _row: int) -> str:
    return f"{layer} does not compute W h + b"


def _misplaced(layer: str, row: int) -> str:
    return f"the model's logits of sample {row} are those of no one position of the input of {layer}"


def _not_the_heads(head: str, row: int) -> str:
    return (
        f"the model's logits of sample {row} are not those of {head}, nor those after a shift or a factor "
        "of all classes or a mask of classes"
    )


def _otherwise(head: Head) -> str:
    none_needed = "use estimator=gradmix.JvpEstimator(without_rule='exact'), which needs no head"
    if head.name is None:
        return f"if the model has changed, the next call looks for its head anew; else {none_needed}"
    return f"leave head= out to have the layers looked for that end in the model's output, or {none_needed}"
