"""One forward and one backward pass that make no weight gradients, but hand out what these are made of.

The rows' losses are summed, so that each row's gradient is its own. The graph begins at the output of the first layer
that is wanted, and the backward pass makes the gradients of activations only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmix.gradients.axis import SampleAxis
from gradmix.gradients.capture import Parameters, Watch, refusing_checkpoints, tapped, without_compilation
from gradmix.gradients.plan import MovedRowsError, OutdatedPlanError, Plan, check_output, trainable_parameters
from gradmix.gradients.rules import Rule
from gradmix.head import logits_of
from gradmix.inputs import InputTree, call_model, first_tensor, map_tensors, num_samples
from gradmix.ops.dtypes import work_dtype
from gradmix.ops.labels import dense_labels
from gradmix.probe import require_finite

Loss: TypeAlias = Callable[[Tensor, Any], Tensor]
"""From logits (N, ...) and y (N, ...) to the rows' losses (N,)."""

HALF_SCALE = 1024.0
"""Factor of the loss under float16 unless a scaler gives another: about what a scaler settles at, per row."""


class Consumer(Protocol):
    """What is done with the parts of the gradients.

    Attributes:
        late: whether it looks at activations in the backward pass only.
    """

    late: ClassVar[bool]

    def observe(self, rule: Rule, axis: SampleAxis, samples: int) -> Callable[[Tensor], None]:
        """Take from a call in the forward pass what is needed; returns what to do with its output's gradient.

        The gradient is that of the summed losses times :attr:`scale`.
        """

    def finish(self) -> None:
        """The backward pass is over."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """(N,): the cross-entropy of each row; y (N,) class indices or (N, C) label vectors."""
    logits = logits.to(work_dtype(logits.dtype))
    if y.is_floating_point():
        y = dense_labels(y, logits.shape[1], logits.dtype)
    return F.cross_entropy(logits, y, reduction="none")


def check_losses(losses: object, rows: int) -> Tensor:
    """The losses, if there is one for each row.

    Raises:
        ValueError: they were reduced, or are no tensor.
    """
    if isinstance(losses, Tensor) and losses.shape == (rows,):
        return losses
    came = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
    raise ValueError(f"loss: returned {came}, expected the {rows} rows' losses, ({rows},), not reduced")


def loss_scale(scaler: float | torch.amp.GradScaler | None, device: torch.device) -> float:
    """The factor that the loss is multiplied by in the backward pass, and what comes of it divided by.

    Raises:
        TypeError, ValueError: ``scaler`` is neither a positive number nor a GradScaler.
    """
    if scaler is None:
        half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
        return HALF_SCALE if half else 1.0
    if isinstance(scaler, torch.amp.GradScaler):
        return float(scaler.get_scale())
    if isinstance(scaler, bool) or not isinstance(scaler, (int, float)):
        raise TypeError(f"scaler: got {type(scaler).__name__}, expected a positive number or a torch.amp.GradScaler")
    if not 0 < scaler < float("inf"):
        raise ValueError(f"scaler: got {scaler}, expected a positive number")
    return float(scaler)


class _Capture(Watch):
    """Lets the consumers observe every call that the plan wants."""

    def __init__(
        self, parameters: Parameters, plan: Plan, samples: int, consumers: Sequence[Consumer], device: torch.device
    ) -> None:
        super().__init__(parameters)
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._plan, self._samples, self._consumers = plan, samples, consumers
        self._wanted = set(plan.selected())
        self._next = 0
        self._verifying = not plan.verified and samples > 1
        self._norms: dict[int, Tensor] = {}
        self._weights: Tensor | None = None

    def seen(self, rule: Rule) -> Tensor:
        """Make the call; if it is of a layer that is wanted, show it to the consumers."""
        planned = self._plan.calls[self._next] if self._next < len(self._plan.calls) else None
        self._next += 1
        if planned is None or planned.rule is not type(rule) or planned.parameters != tuple(r.name for r in rule.refs):
            raise OutdatedPlanError("another call than planned")
        if planned.spread:
            rule.spread(self._samples)
        output = rule.run()
        if rule.weight is not None and rule.weight.name not in self._wanted:
            rule.weight = None
        if rule.bias is not None and rule.bias.name not in self._wanted:
            rule.bias = None
        if not rule.refs:
            return output
        if planned.place is None or output.shape[planned.place.axis.dim] != self._samples * planned.place.folded:
            raise OutdatedPlanError(f"an output of shape {tuple(output.shape)} for {self._samples} rows")
        with torch.no_grad(), _full_precision(output.device):
            callbacks = [consumer.observe(rule, planned.place.axis, self._samples) for consumer in self._consumers]
        late = rule.has_factors and any(consumer.late for consumer in self._consumers)
        held = rule.x if rule.keeps_input or late else None
        version = None if held is None else held._version
        rule.forget_input()
        output = tapped(output, self.anchor, anchored=output.requires_grad and not self._plan.has_other_graph)

        index, axis = self._next - 1, planned.place.axis

        def hook(gradient: Tensor) -> None:
            if held is not None and held._version != version:
                raise ValueError(
                    f"model: the input of {rule.refs[0].name!r} is changed in place after its layer has used it, "
                    "expected it to be left alone: the gradient needs it"
                )
            with torch.no_grad(), _full_precision(gradient.device):
                if self._weights is not None:
                    self._check_rows(rule, axis, gradient, self._norms[index])
                    return
                if self._verifying:
                    self._norms[index] = _row_norms(gradient, axis, self._samples)
                for callback in callbacks:
                    callback(gradient)

        output.register_hook(hook)
        return output

    def verify(self, weights: Tensor) -> None:
        """From now on see gradients of losses times powers of two (N,), and check that these are found again.

        Raises (in the backward pass):
            MovedRowsError: they are not found where the rows are said to be.
        """
        self._weights = weights

    def _check_rows(self, rule: Rule, axis: SampleAxis, gradient: Tensor, before: Tensor) -> None:
        assert self._weights is not None
        after = _row_norms(gradient, axis, self._samples)
        expected = before * self._weights[:, None]
        # By what is far from rounding, and far from a neighbouring power of two.
        wrong = (after - expected).abs() > 0.25 * expected + 1e-6 * before.amax()
        if bool(wrong.any()):
            raise MovedRowsError(
                f"model: where {rule.refs[0].name!r} is used, rows are not where they were in a smaller batch; they "
                "seem to be sorted or routed, expected an order of rows that does not depend on what is in them"
            )

    def check_complete(self) -> None:
        """Raise unless all calls of the plan were met."""
        if self._next != len(self._plan.calls):
            raise OutdatedPlanError(f"{self._next} calls instead of {len(self._plan.calls)}")


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, where it is on: entering a context that changes nothing costs more than looking."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _row_norms(gradient: Tensor, axis: SampleAxis, samples: int) -> Tensor:
    """(N, positions that are folded with the samples): norms of an output's gradient."""
    rows = axis.split(gradient, samples)
    rows = rows.movedim(1 + axis.dim, 1) if rows.ndim > gradient.ndim else rows.unsqueeze(1)
    rows = rows.flatten(2) if rows.ndim > 2 else rows[..., None]
    norms: Tensor = torch.linalg.vector_norm(rows, dim=2, dtype=work_dtype(rows.dtype))
    return norms


def _spread(count: int, device: torch.device) -> Tensor:
    """(count,) small integers, different for neighbours and in no short period."""
    n = torch.arange(count, device=device)
    return (n * 7 + n // 5 + n // 25 * 2) % 5


def own_copy(x: InputTree) -> InputTree:
    """The rows, for a model that may change them in place."""
    return map_tensors(lambda leaf: leaf.detach().clone(), x)


def run_pass(
    model: nn.Module,
    plan: Plan,
    x: InputTree,
    y: Any,
    consumers: Sequence[Consumer],
    *,
    loss: Loss,
    scale: float,
    name: str,
    first_row: int = 0,
) -> None:
    """A forward and a backward pass over x and y, both (N, ...); call it inside ``Engine.probing``.

    Args:
        model: the unwrapped model.
        plan: the model's.
        x, y: the rows; the model is given a copy of x, which it may change.
        consumers: shown each layer's activations and output gradients.
        loss: the rows' losses (N,).
        scale: factor of the losses in the backward pass.
        name: of the argument that the rows come from, for errors.
        first_row: index of row 0 in it.

    Raises:
        OutdatedPlanError: the model did not do what the plan says; nothing was handed to ``finish`` then.
        ValueError: a NaN, a loss of another shape, a label out of range.
    """
    parameters, count = Parameters(trainable_parameters(model)), num_samples(x)
    device = first_tensor(x).device
    with torch.enable_grad(), without_compilation():
        capture = _Capture(parameters, plan, count, consumers, device)
        with capture:
            logits = check_output(logits_of(call_model(model, own_copy(x))), count)
        capture.check_complete()
        losses = check_losses(loss(logits, y), count)
        total = losses.sum() * scale
        if total.requires_grad:
            # No gradient can reach the parameters, unless one is used in another way than planned.
            leaves = [capture.anchor, *(parameters.named[name] for name in plan.selected())]
            verifying = not plan.verified and count > 1
            with refusing_checkpoints():
                found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=verifying)
                if any(gradient is not None for gradient in found[1:]):
                    raise OutdatedPlanError("a parameter used in another way than planned")
                if verifying:
                    weights = 0.5 ** _spread(count, device).to(losses.dtype)
                    capture.verify(weights)
                    torch.autograd.grad((losses * weights).sum() * scale, capture.anchor, allow_unused=True)
                    plan.verified = True
    # After the backward pass has been queued: this is where a GPU is waited for.
    require_finite(
        first_row, **{f"the model's logits of {name}": logits.detach(), f"the loss of {name}": losses.detach()}
    )
    for consumer in consumers:
        consumer.finish()
