"""A trace of a model's forward pass: the calls that use parameters, and the places of the samples in their outputs.

A forward pass over three samples, and a backward pass from the logits of each, show which calls use which parameters,
and which uses have no rule; the places of the samples in the output of each call, because the logits of a sample have a
gradient only there; and whether samples influence each other. Names and single shapes are not used as evidence.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmix.gradients.batch_axis import BatchAxis, possible_batch_axes
from gradmix.gradients.exceptions import BatchStatisticsError, CoupledSamplesError
from gradmix.gradients.intercept import (
    Interceptor,
    Parameters,
    PlainCalls,
    hook_gradient,
    parameters_without_rule,
    refuse_checkpoints,
)
from gradmix.gradients.losses import check_output
from gradmix.gradients.rules import Rule
from gradmix.model.head import logits_of
from gradmix.model.inputs import InputTree, call_model, first_tensor, map_tensors, num_samples, tensors_of
from gradmix.model.unchanged import require_finite, without_compilation

SAMPLES = 3
"""Number of samples of the first trace."""


@dataclass
class TracedCall:
    """One call that has a rule, and the entries of its output that the logits of each sample depend on.

    Attributes:
        rule: class of the rule.
        function: name of the function.
        weight, bias: names of the parameters, or None.
        bias_is_column: whether the bias may be a column of the weight's matrix.
        matrix_shapes: rows and columns of each parameter's matrix, by name.
        shape: shape of the output.
        batch_dims: axes of the output that may hold the samples.
        nbytes: bytes of the output.
        half_precision: whether the output is of half precision.
        dependencies: for each sample, the entries of the output that its logits depend on; None: no entry.
    """

    rule: type[Rule]
    function: str
    weight: str | None
    bias: str | None
    bias_is_column: bool
    matrix_shapes: dict[str, tuple[int, int]]
    shape: tuple[int, ...]
    batch_dims: tuple[int, ...]
    nbytes: int
    half_precision: bool
    dependencies: list[Tensor | None]

    @classmethod
    def of(cls, rule: Rule, output: Tensor, samples: int) -> TracedCall:
        """Return the record of a call with this output, before any backward pass."""
        weight, bias = (None if view is None else view.name for view in (rule.weight, rule.bias))
        return cls(
            type(rule),
            getattr(rule.function, "__name__", "?"),
            weight,
            bias,
            rule.bias_is_column and not (rule.weight is not None and rule.weight.transposed),
            {view.name: rule.matrix_shape(view) for view in rule.views},
            tuple(output.shape),
            tuple(rule.batch_dims(output)),
            output.numel() * output.itemsize,
            output.itemsize < 4,
            [None] * samples,
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the call uses."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def batch_axes(self) -> set[BatchAxis]:
        """Return the axes of the output that may hold the samples."""
        return possible_batch_axes(self.dependencies, self.shape, self.batch_dims)


@dataclass
class Trace:
    """A trace of a forward pass.

    Attributes:
        calls: all calls that have a rule, in their order.
        uncovered: names of the parameters that are used in ways without a rule.
        logits: output of the model.
        expanded: indices of the calls whose input is expanded to a copy for each sample.
    """

    calls: list[TracedCall]
    uncovered: list[str]
    logits: Tensor
    expanded: set[int]

    @property
    def num_classes(self) -> int:
        """Number of logits of a sample."""
        return 1 if self.logits.ndim == 1 else self.logits.shape[1]


class _CannotExpandError(Exception):
    """The input of a call cannot be expanded to a copy for each sample."""


class _Tracer(Interceptor):
    """Records all calls that have a rule, and in the backward passes the dependencies of each sample's logits.

    Args:
        parameters: the parameters to look for.
        samples: batch size.
        device: the model's.
        expanded: indices of the calls whose input is to be expanded.

    Attributes:
        sample: the sample from whose logits the present backward pass starts.
    """

    def __init__(self, parameters: Parameters, samples: int, device: torch.device, expanded: Collection[int]) -> None:
        super().__init__(parameters)
        self.calls: list[TracedCall] = []
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.sample = 0
        self._samples, self._expanded = samples, expanded

    def intercept(self, rule: Rule) -> Tensor:
        """Make the call and watch the gradient of its output."""
        if len(self.calls) in self._expanded and not rule.expand_input(self._samples):
            raise _CannotExpandError
        output = rule.run()
        call = TracedCall.of(rule, output, self._samples)
        self.calls.append(call)

        def hook(gradient: Tensor) -> None:
            nonzero = gradient != 0
            call.dependencies[self.sample] = nonzero if bool(nonzero.any()) else None

        return hook_gradient(output, self.anchor, hook)


def trace(
    model: nn.Module, x: InputTree, parameters: Parameters, samples: int, expanded: Collection[int] = ()
) -> Trace:
    """Make a forward pass over ``samples`` samples of x, repeated if there are fewer, and a backward pass for each.

    Args:
        model: called with the samples.
        x: (N, ...) samples.
        parameters: the parameters to look for.
        samples: batch size.
        expanded: indices of the calls whose input is to be expanded.

    Raises:
        CoupledSamplesError: the logits of a sample have a gradient in the input of another.
        ValueError: logits of another batch size, a NaN, or checkpoints.
    """
    device, count = first_tensor(x).device, num_samples(x)
    repeated = map_tensors(lambda t: t[torch.arange(samples, device=device) % count].detach().clone(), x)
    entries = [leaf.requires_grad_() for leaf in tensors_of(repeated) if leaf.is_floating_point()]
    with torch.enable_grad(), without_compilation(), refuse_checkpoints():
        with _Tracer(parameters, samples, device, expanded) as tracer:
            logits = check_output(logits_of(call_model(model, map_tensors(Tensor.clone, repeated))), samples)
        require_finite(0, **{"the model's logits": logits.detach()})
        uncovered = parameters_without_rule(logits, parameters.named)
        # Unequal weights: the sum of probabilities, for example, has the gradient 0.
        weights = torch.linspace(1, 2, logits[0].numel(), device=logits.device, dtype=logits.dtype).cos()
        weights = weights.view(logits.shape[1:])
        for sample in range(samples):
            tracer.sample = sample
            if not logits.requires_grad:
                break
            inputs = [tracer.anchor, *entries]
            total = (logits[sample] * weights).sum()
            gradients = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
            for gradient in gradients[1:]:
                others = torch.arange(samples, device=device) != sample
                if gradient is not None and bool((gradient[others] != 0).any()):
                    raise CoupledSamplesError(
                        f"model: the output of sample {sample} of a batch of {samples} depends on other samples, "
                        "expected samples that do not influence each other, so that each has a gradient of its own"
                    )
    return Trace(tracer.calls, uncovered, logits.detach(), set(expanded))


def trace_with_expansion(model: nn.Module, x: InputTree, parameters: Parameters) -> Trace:
    """Make a :func:`trace` over 3 samples, with shared inputs expanded where the samples get an axis by that.

    A position embedding is looked up once and added to all samples: no axis of its output holds them. If it is looked
    up once for each sample, the model is the same. This is verified: the logits must be equal, and no call may lose the
    axis of the samples.
    """
    found = trace(model, x, parameters, SAMPLES)
    logits, tried = found.logits, set[int]()
    while True:
        placed = [bool(call.batch_axes()) for call in found.calls]
        lost = [
            i
            for i, has_place in enumerate(placed)
            if not has_place and i not in tried and found.calls[i].rule.can_expand_input
        ]
        if not lost:
            return found
        tried.add(lost[0])
        try:
            again = trace(model, x, Parameters(parameters.named), SAMPLES, found.expanded | {lost[0]})
        except Exception:  # any error of a model that does not accept the expanded input; it is refused later, by name
            continue
        now = [bool(call.batch_axes()) for call in again.calls]
        none_lost = len(now) == len(placed) and all(
            after or not before for before, after in zip(placed, now, strict=True)
        )
        tolerance = max(1e-3, 16 * torch.finfo(logits.dtype).eps) * float(logits.abs().amax())
        if none_lost and now[lost[0]] and torch.allclose(logits, again.logits, rtol=0, atol=tolerance):
            found = Trace(again.calls, found.uncovered, logits, again.expanded)


def forward(model: nn.Module, x: InputTree, samples: Tensor) -> Tensor:
    """Return the logits of samples of x, given by their indices modulo N, in this order."""
    device, count = first_tensor(x).device, num_samples(x)
    index = samples.to(device) % count
    logits = logits_of(call_model(model, map_tensors(lambda leaf: leaf[index].detach(), x)))
    return check_output(logits, len(samples))


def check_statistics(model: nn.Module, x: InputTree, parameters: Parameters) -> tuple[torch.Size, ...]:
    """Return the shapes of the inputs that ``batch_norm`` normalised by their own statistics in a trace.

    Args:
        model: the model of the trace.
        x: (N, ...) samples.
        parameters: those of the trace.

    Raises:
        BatchStatisticsError: such an input changes with the number of samples: it depends on them.
    """
    if parameters.standardised:
        other = Parameters(parameters.named, parameters.watched)
        # An error of the model itself is raised elsewhere.
        with suppress(Exception), torch.enable_grad(), without_compilation(), PlainCalls(other):
            forward(model, x, torch.arange(2, device="cpu"))
        first, second = parameters.standardised, other.standardised
        if len(first) != len(second) or not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            raise BatchStatisticsError(
                "model: a BatchNorm layer normalises by the statistics of the batch, expected running statistics: a "
                "sample's gradient would depend on the samples around it. In evaluation mode it uses running "
                "statistics if it was made with track_running_stats=True; GroupNorm or LayerNorm have no such trouble"
            )
    return tuple(value.shape for value in parameters.standardised)
