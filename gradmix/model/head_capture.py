"""Capture of a head's input and output in a forward pass, and the check that the model's logits are the head's.

W h + b is computed again for a few samples of every pass, and the returned logits are compared with those of the layers
for all samples (:mod:`gradmix.model.head_values`). Where the host may not wait for the device, the next call raises
what the check finds (:mod:`gradmix.runtime.deferred_checks`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradmix._moved import alias_attribute
from gradmix.model.head import (
    CapturedOutput,
    Head,
    HeadLike,
    HeadOutput,
    forget_head,
    recall_head,
    remember_head,
    resolve_head,
)
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
from gradmix.model.head_values import MASKED, compare_logits, estimate_factor, factor_dtype, off_linear, stack_inputs
from gradmix.model.inputs import InputTree, call_model, own_copy
from gradmix.model.unchanged import unwrap
from gradmix.runtime.deferred_checks import Consequence, can_sync, check_samples, check_where, defer_checks

__all__ = ["HeadCapture", "check_outputs", "forward_head"]


class HeadCapture:
    """Context manager that records the head's input and the logits of a forward pass.

    In a training step it saves the selection a forward pass of its own::

        with HeadCapture(model) as capture:
            logits = model(x)
        pairs = gradmix.select_pairs(model, buffer, (x, y), outputs=capture.output)

    Args:
        model: the model about to be called, possibly wrapped by ``torch.compile`` or a data-parallel class.
        head: the head, its name, or None: it is searched for (``example`` must then be given unless this model's head
            was found before).
        example: one or more input samples, used only to find the head.

    Raises:
        HeadNotFoundError: on entry, there is no certain head; on reading ``output``, the model or the head did not run
            exactly once, or the model's logits are not the head's.
    """

    def __init__(self, model: nn.Module, head: HeadLike = None, example: InputTree | None = None) -> None:
        self.head = resolve_head(model, head, example)
        self._model = unwrap(model)
        self._calls: list[list[Call]] = []
        self._passes: list[_Pass] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # Whether :meth:`read_output` follows the pass at once, with the same weights.
        self._read_at_once = False

    def __enter__(self) -> HeadCapture:
        self._calls, self._passes = [[] for _ in self.head.layers], []
        for layer, calls in zip(self.head.layers, self._calls, strict=True):
            self._handles.append(layer.module.register_forward_hook(_recorder(layer, calls), with_kwargs=True))
        # Registered after the layers' hooks, as the model may be the layer itself.
        self._handles.append(self._model.register_forward_hook(self._end))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _end(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        # Checked here and not on reading, unless that is the same, as an optimiser may change the weights in between;
        # cloned, because a loss may mask logits in place.
        calls = [calls[0] for calls in self._calls if len(calls) == 1]
        returned = logits_of(output).detach()
        if not self._read_at_once:
            returned = returned.clone()
        self._passes.append(_Pass(returned, _check_layers(self.head, calls, returned, self._read_at_once)))

    @property
    def output(self) -> CapturedOutput:
        """Detached features and logits of the forward pass inside the context (:class:`HeadOutput`).

        On a GPU this does not wait: if the logits are not the head's, the next call of the library raises.
        """
        with defer_checks(self._model):
            return self.read_output()

    def read_output(self) -> CapturedOutput:
        """Return :attr:`output`; for callers inside :func:`gradmix.runtime.deferred_checks.defer_checks`."""
        counts = [*map(len, self._calls), len(self._passes)]
        wrong = next((place for place, count in enumerate(counts) if count != 1), None)
        if wrong is not None:
            what = "the model" if wrong == len(self._calls) else self.head.describe()
            # Another layer may end in the logits by now, such as the head of another task.
            forget_head(self._model, self.head.name)
            raise HeadNotFoundError(
                f"head: {what} was seen to run {counts[wrong]} times in one forward pass of the model, expected once "
                f"(code compiled before may pass by the hook); {_remedy(self.head)}"
            )
        features, logits = _output_of(self._model, self.head, self._passes[0])
        return CapturedOutput(features, logits, self.head.appends_one(features))

    checked = alias_attribute("HeadCapture", "checked", "read_output")


def forward_head(model: nn.Module, head: HeadLike, x: InputTree) -> CapturedOutput:
    """Return the head's input and output for ``x``; call it inside :func:`gradmix.model.unchanged.leave_unchanged`.

    Raises:
        HeadNotFoundError: as :class:`HeadCapture`.
    """
    capture = HeadCapture(model, head, x)
    capture._read_at_once = True
    with capture:
        call_model(model, own_copy(x))
    return capture.read_output()


def check_outputs(
    model: nn.Module, head: HeadLike, outputs: HeadOutput | tuple[Tensor, Tensor], count: int
) -> CapturedOutput:
    """Check features and logits that a caller gives; unless captured, against the head's weights on a few samples.

    No pass is made. A head that is not known yet is identified by its values; if that fails, it is taken to have a
    bias.

    Raises:
        ValueError: the number of features or logits is not ``count``.
        HeadNotFoundError: the logits are not those that the head computes from the features with its present weights.
    """
    if isinstance(outputs, CapturedOutput):
        return outputs
    features, logits = outputs
    if not len(features) == len(logits) == count:
        raise ValueError(
            f"outputs: got features of {len(features)} and logits of {len(logits)} samples, expected {count} as the "
            "batch has"
        )
    known = recall_head(unwrap(model), head)
    if known is None:
        return CapturedOutput(features, logits, _has_bias_by_values(unwrap(model), features, logits))
    weight, bias = known.weight_and_bias(features)
    if features.ndim == 2 and logits.ndim == 2 and weight.shape == (logits.shape[1], features.shape[1]):
        text = (
            f"outputs: got logits that are not those of {known.describe()} for the features given, expected features "
            "and logits of one forward pass of this model with its present weights, as gradmix.HeadCapture records them"
        )
        given = (features, logits, weight, bias, factor_dtype(logits), True)
        check_where(off_linear, given, lambda _sample: HeadNotFoundError(text))
    return CapturedOutput(features, logits, known.appends_one(features))


def _has_bias_by_values(model: nn.Module, features: Tensor, logits: Tensor) -> bool:
    """Whether the layer that computed the logits has a bias; True if none is found, or the host may not read values."""
    if features.ndim != 2 or logits.ndim != 2 or not can_sync(features.device):
        return True
    live = (logits > MASKED).all(0)
    for name, module in reversed(list(model.named_modules())):
        for layer in layers_of(module, name, logits.shape[1]):
            head = Head((layer,), (1.0,), True, None)
            weight, bias = head.weight_and_bias(features)
            if weight.shape[1] == features.shape[1]:
                bias = None if bias is None else bias[live]
                given = features, logits[:, live], weight[live], bias, factor_dtype(logits)
                if not bool(off_linear(*given, up_to_shift=True).any()):
                    return head.appends_one(features)
    return True


def _recorder(layer: Layer, calls: list[Call]) -> Callable[..., None]:
    def record(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        for part, value in parts_of(output):
            if part == layer.part or (layer.part is None and part == "logits"):
                call = call_of(inputs, named, value)
                if call is not None:
                    calls.append(replace(call, node=None, output=call.logits))

    return record


class _LayerValues(NamedTuple):
    """The input and output of one layer in a pass, and what was checked of them.

    Attributes:
        features: (N, d), the input.
        logits: (N, C), the output.
        nonlinear: whether the logits are not W h + b, (n,) bool for a few of the samples; or the arguments of
            :func:`gradmix.model.head_values.off_linear`, which says so.
        misplaced: (N,) bool, whether the model's logits are not those of exactly one position; None: they all are.
    """

    features: Tensor
    logits: Tensor
    nonlinear: Tensor | tuple[Any, ...]
    misplaced: Tensor | None


class _Pass(NamedTuple):
    """One forward pass.

    Attributes:
        returned: (N, C), the logits that the model returned.
        layers: the values of each layer, or the reason why there are none.
    """

    returned: Tensor
    layers: list[_LayerValues | str]


_MOST_CAPTURED = 1 << 23
"""Entries of a weight that is checked by a captured graph, which keeps three copies of it in float64."""


def _check_layers(head: Head, calls: list[Call], returned: Tensor, read_at_once: bool) -> list[_LayerValues | str]:
    if returned.ndim != 2:
        return [f"the model returns logits of shape {tuple(returned.shape)}, expected (N, C)"]
    parts: list[_LayerValues | str] = []
    for layer, call in zip(head.layers, calls, strict=False):
        values = values_per_sample(layer, call, returned)
        if values is None:
            parts.append(
                f"{layer.describe()} was given {tuple(call.features.shape)} and gave {tuple(call.logits.shape)}, "
                f"expected one position a sample as the logits {tuple(returned.shape)} have"
            )
            continue
        features, logits, misplaced = values
        if layer.matrix.shape != (logits.shape[1], features.shape[1]):
            parts.append(f"{layer.describe()} made {logits.shape[1]} logits of {features.shape[1]} features")
            continue
        given = features, logits, layer.matrix, layer.vector, factor_dtype(logits)
        later = read_at_once and given[2].numel() <= _MOST_CAPTURED
        parts.append(_LayerValues(features, logits, given if later else off_linear(*given), misplaced))
    return parts


def _output_of(model: nn.Module, head: Head, captured: _Pass) -> HeadOutput:
    """Return features and logits of a pass, after the check that they belong together."""
    parts: list[_LayerValues] = []
    for part in captured.layers:
        if isinstance(part, str):
            # Another layer may be the head by now.
            forget_head(model, head.name)
            raise HeadNotFoundError(f"head: {part}; {_remedy(head)}")
        parts.append(part)
    for layer, part in zip(head.layers, parts, strict=True):
        off_line = _refusal(model, head, partial(_linear_message, layer.describe()))
        if isinstance(part.nonlinear, Tensor):
            check_samples(part.nonlinear, off_line)
        else:
            check_where(off_linear, part.nonlinear, off_line)
        if part.misplaced is not None:
            check_samples(part.misplaced, _refusal(model, head, partial(_position_message, layer.describe())))
    features, logits = [part.features for part in parts], [part.logits for part in parts]
    if can_sync(captured.returned.device):
        return _check_now(model, head, features, logits, captured.returned)
    return _check_later(model, head, features, logits, captured.returned)


def _check_now(
    model: nn.Module, head: Head, features: list[Tensor], logits: list[Tensor], returned: Tensor
) -> HeadOutput:
    """Return features and logits of a pass, checked before this returns.

    Args:
        model: the unwrapped model.
        head: its head.
        features: K tensors (N, d_k), the layers' inputs.
        logits: K tensors (N, C), the layers' outputs.
        returned: (N, C), the model's logits.
    """
    biases = [layer.bias is not None for layer in head.layers]
    if len(logits) == 1 and torch.equal(returned, logits[0].to(returned.dtype)):
        return HeadOutput(features[0], logits[0])
    known = compare_logits(returned, logits, head.weights)
    if not bool(known.bad.any()):
        single = head.weights == (1.0,)
        return HeadOutput(features[0] if single else stack_inputs(features, biases, head.weights), known.logits)
    if len(logits) == 1:
        for factor in (1.0, estimate_factor(returned, logits[0])):
            if factor is None:
                continue
            now = compare_logits(returned, logits, [factor])
            if not bool(now.bad.any()):
                return HeadOutput(
                    features[0] if isinstance(factor, float) else stack_inputs(features, biases, [factor]), now.logits
                )
    check_samples(known.bad, _refusal(model, head, partial(_logits_message, head.describe())))
    raise AssertionError("unreachable: a sample is bad")


def _check_later(
    model: nn.Module, head: Head, features: list[Tensor], logits: list[Tensor], returned: Tensor
) -> HeadOutput:
    """Do as :func:`_check_now`, on a device that the host does not wait for: the next call raises the error."""
    biases = [layer.bias is not None for layer in head.layers]
    if head.direct:
        own = logits[0]
        dtype = torch.promote_types(returned.dtype, torch.float32)
        if returned.dtype == own.dtype == dtype:
            # The layer's logits where they are the same, also if infinite, and MASKED in place of the model's minus
            # infinity. New memory, as the next pass may write the model's output where this one is.
            lowest = torch.tensor(MASKED, dtype=dtype, device="cpu")  # a number of the host to a GPU's kernel
            result = returned = torch.maximum(returned, torch.fmin(own, lowest))
        else:
            returned = returned.clone()
            same = returned == own.to(returned.dtype)
            result = torch.where(same, own.to(dtype), returned.to(dtype).clamp(min=MASKED))
        reference, name, described, remedy = weakref.ref(model), head.name, head.describe(), _remedy(head)

        def consequence(sample: int) -> HeadNotFoundError | None:
            model = reference()  # a pending check must not keep the model alive
            # Classes masked since, or a shift or a factor of all classes: the logits given were the returned ones.
            given = returned.masked_fill(returned == MASKED, -torch.inf)
            factor = estimate_factor(given, own)
            for weight in (1.0, factor):
                if weight is not None and not bool(compare_logits(given, [own], [weight]).bad.any()):
                    known = None if model is None else recall_head(model, name)
                    if model is not None and known is not None:
                        remember_head(model, replace(known, direct=False))
                    return None
            if model is not None:
                forget_head(model, name)
            return HeadNotFoundError(f"head: {_logits_message(described, sample)}; {remedy}")

        check_where(_differs, (returned, own), consequence)
        return HeadOutput(features[0], result)
    weights: list[float | Tensor] = list(head.weights)
    if len(logits) == 1:
        factor = estimate_factor(returned, logits[0])
        weights = weights if factor is None else [factor]
    now = compare_logits(returned, logits, weights)
    check_samples(now.bad, _refusal(model, head, partial(_logits_message, head.describe())))
    return HeadOutput(stack_inputs(features, biases, weights), now.logits)


def _refusal(model: nn.Module, head: Head, why: Callable[[int], str]) -> Consequence:
    """Return what follows where samples are not the head's: it is forgotten; the error says ``why`` of the first."""
    reference, name, remedy = weakref.ref(model), head.name, _remedy(head)

    def consequence(sample: int) -> HeadNotFoundError:
        model = reference()  # a pending check must not keep the model alive
        if model is not None:
            forget_head(model, name)
        return HeadNotFoundError(f"head: {why(sample)}; {remedy}")

    return consequence


def _differs(returned: Tensor, own: Tensor) -> Tensor:
    """Return (N,) bool: whether a sample's logits are not its layer's; a NaN is refused elsewhere."""
    return ~((returned == own.to(returned.dtype)) | own.isnan()).all(1)


def _linear_message(layer: str, _sample: int) -> str:
    return f"{layer} does not compute W h + b"


def _position_message(layer: str, sample: int) -> str:
    return f"the model's logits of sample {sample} are those of no one position of the input of {layer}"


def _logits_message(head: str, sample: int) -> str:
    return (
        f"the model's logits of sample {sample} are not those of {head}, nor those after a shift or a factor "
        "of all classes or a mask of classes"
    )


def _remedy(head: Head) -> str:
    """Return the caller's options, for error messages."""
    none_needed = "use estimator=gradmix.JvpEstimator(without_rule='exact'), which needs no head"
    if head.name is None:
        return f"if the model has changed, the next call looks for its head anew; else {none_needed}"
    return f"leave head= out to have the layers looked for that end in the model's output, or {none_needed}"
