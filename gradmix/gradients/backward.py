"""One forward and one backward pass that make no weight gradients, but hand out what these are made of.

The rows' losses are summed, so that each row's gradient is its own. The graph begins at the output of the first layer
that is wanted, and the backward pass makes the gradients of activations only.

Nothing is taken for granted that may be otherwise in another batch. In every pass autograd says whether a wanted
parameter has a gradient of its own, beside what the rules make: then the plan is wrong. Two rows are forwarded by
themselves (:mod:`gradmix.gradients.sample_check`). And where the model looks at values, or moves entries by an index, a
second backward pass, from losses times weights, tells whether the rows are where the plan says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.intercept import Parameters, hook_gradient, refusing_checkpoints
from gradmix.gradients.plan import MovedRowsError, OutdatedPlanError, Plan, check_output, trainable_parameters
from gradmix.gradients.rules.base import Rule
from gradmix.gradients.sample_check import Follow, check_rows, rows_to_check
from gradmix.head import logits_of
from gradmix.inputs import InputTree, call_model, first_tensor, num_samples, own_copy
from gradmix.ops.dtypes import work_dtype
from gradmix.ops.labels import dense_labels
from gradmix.probe import RandomState, require_finite, without_compilation

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

    def observe(self, rule: Rule, axis: BatchAxis, samples: int) -> Callable[[Tensor], None]:
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


_READING = {
    *("item", "tolist", "numpy", "__array__", "equal", "allclose", "is_nonzero"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__"),
}
"""Functions that give a tensor's values to Python, by which a model may go on in another way."""

_MOVING = {
    *("__getitem__", "__setitem__", "index_select", "gather", "take", "take_along_dim", "embedding"),
    *("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"),
    *("index_add", "index_add_", "index_copy", "index_copy_", "index_put", "index_put_"),
    *("masked_select", "masked_scatter", "masked_scatter_", "sort", "msort", "topk"),
}
"""Functions that move entries to places that depend on values."""


class _Capture(Follow):
    """Lets the consumers observe every call that the plan wants."""

    def __init__(
        self, parameters: Parameters, plan: Plan, samples: int, kept: Tensor, consumers: Sequence[Consumer]
    ) -> None:
        super().__init__(parameters, plan, samples, kept)
        self.anchor = torch.zeros((), device=kept.device, requires_grad=True)
        self._consumers = consumers
        self._reads = 0
        self._moved = False
        self._norms: dict[int, Tensor] = {}
        self._weights: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Watch one call, and whether it may put the rows into an order that depends on what is in them."""
        result = super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in _READING:
            value = result.tobytes() if isinstance(result, np.ndarray) else repr(result)
            self._reads = hash((self._reads, value))
        elif name in _MOVING and not self._moved:
            self._moved = self._moves_rows(name, [*args, *(kwargs or {}).values()])
        return result

    def _moves_rows(self, name: str, values: Sequence[Any]) -> bool:
        """Whether a call of a function in ``_MOVING`` may move activations from row to row."""
        found = [v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))]
        tensors = [v for v in found if isinstance(v, Tensor)]
        moved = [t for t in tensors if t.requires_grad and self.parameters.find(t) is None]
        if not moved or name in ("sort", "msort", "topk"):
            return bool(moved)
        index = [t for t in tensors if t.ndim and not t.is_floating_point()]
        if name == "__getitem__" and any(t.shape == (self._samples,) and _counts_up(t) for t in index):
            return False  # row n to row n, from other positions maybe
        dim = next((v for v in values[1:2] if isinstance(v, int)), None)
        if name in ("gather", "index_select", "take_along_dim") and dim is not None:
            return moved[0].shape[dim] % self._samples == 0  # else there are no rows along this axis
        return bool(index) or any(isinstance(v, list) for v in values)

    def seen(self, rule: Rule) -> Tensor:
        """Make the call; if it is of a layer that is wanted, show it to the consumers."""
        output, axis = self.follow(rule)
        if axis is None:
            return output
        if rule.weight is not None and rule.weight.name not in self._wanted:
            rule.weight = None
        if rule.bias is not None and rule.bias.name not in self._wanted:
            rule.bias = None
        with torch.no_grad(), _full_precision(output.device):
            callbacks = [consumer.observe(rule, axis, self._samples) for consumer in self._consumers]
        late = rule.has_factors and any(consumer.late for consumer in self._consumers)
        held = rule.x if rule.keeps_input or late else None
        version = None if held is None else held._version
        rule.forget_input()
        output = hook_gradient(output, self.anchor)
        index = self._next - 1

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
                if self.verifying:
                    self._norms[index] = _row_norms(gradient, axis, self._samples)
                for callback in callbacks:
                    callback(gradient)

        output.register_hook(hook)
        return output

    @property
    def verifying(self) -> bool:
        """Whether to check where the rows are by gradients: in the first batch, and where they may have moved since.

        What a model reads of its tensors' values may steer where rows go; nothing is new if it reads the same.
        """
        return self._samples > 1 and (not self._plan.verified or self._moved or self._reads not in self._plan.reads)

    def verify(self, losses: Tensor, scale: float) -> None:
        """Check, in a backward pass from the rows' losses (N,) times weights, that these are found where the rows are.

        Raises:
            MovedRowsError: they are not.
        """
        # By powers of two numbers scale exactly, whatever they are rounded to, unless they become too small.
        half = torch.float16 in self.dtypes or loss_scale(None, losses.device) != 1.0
        levels = 5 if half else 8 if losses.is_cuda else 16
        exponents = [n % levels for n in range(self._samples)]
        random.Random(self._plan.passes).shuffle(exponents)
        self._weights = torch.tensor([0.5**e for e in exponents], dtype=torch.float64, device="cpu").to(losses)
        torch.autograd.grad((losses * self._weights).sum() * scale, self.anchor, allow_unused=True)
        if len(self._plan.reads) < _KEPT_READS:
            self._plan.reads.add(self._reads)

    def _check_rows(self, rule: Rule, axis: BatchAxis, gradient: Tensor, before: Tensor) -> None:
        assert self._weights is not None
        after = _row_norms(gradient, axis, self._samples)
        expected = before * self._weights[:, None].to(before.dtype)
        # By what is far from rounding, and far from a neighbouring power of two.
        wrong = (after - expected).abs() > 0.25 * expected + 1e-6 * before.amax()
        if bool(wrong.any()):
            raise MovedRowsError(
                f"model: where {rule.refs[0].name!r} is used, rows are not where they were in a smaller batch; they "
                "seem to be sorted or routed, expected an order of rows that does not depend on what is in them"
            )


_KEPT_READS = 1024
"""Passes whose reads are kept, of those that differ in them."""


def _counts_up(index: Tensor) -> bool:
    return index.dtype == torch.int64 and torch.equal(index, torch.arange(len(index), device=index.device))


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, where it is on: entering a context that changes nothing costs more than looking."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _row_norms(gradient: Tensor, axis: BatchAxis, samples: int) -> Tensor:
    """(N, positions that are folded with the samples): norms of an output's gradient."""
    rows = axis.split(gradient, samples)
    rows = rows.movedim(1 + axis.dim, 1) if rows.ndim > gradient.ndim else rows.unsqueeze(1)
    rows = rows.flatten(2) if rows.ndim > 2 else rows[..., None]
    norms: Tensor = torch.linalg.vector_norm(rows, dim=2, dtype=work_dtype(rows.dtype))
    return norms


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
        CoupledRowsError: rows influence each other or are not where the plan says.
        ValueError: a NaN, a loss of another shape, a label out of range.
    """
    parameters, count = Parameters(trainable_parameters(model)), num_samples(x)
    device = first_tensor(x).device
    before, verifying = RandomState(device), False
    moved: MovedRowsError | None = None
    rows = rows_to_check(plan, count, device)
    with torch.enable_grad(), without_compilation():
        capture = _Capture(parameters, plan, count, torch.tensor(rows, device=device), consumers)
        with capture:
            logits = check_output(logits_of(call_model(model, own_copy(x))), count)
        capture.check_complete()
        losses = check_losses(loss(logits, y), count)
        total = losses.sum() * scale
        if total.requires_grad:
            # No gradient can reach the parameters that are wanted, unless one is used in another way than planned: a
            # proof, in every pass, that nothing is left out.
            leaves = [capture.anchor, *(parameters.named[name] for name in plan.wanted)]
            verifying = capture.verifying
            with refusing_checkpoints():
                found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=verifying)
                if any(gradient is not None for gradient in found[1:]):
                    raise OutdatedPlanError("a parameter used in another way than planned")
                if verifying:
                    try:
                        capture.verify(losses, scale)
                    except MovedRowsError as error:
                        moved = error
    # After the backward pass has been queued: this is where a GPU is waited for.
    require_finite(
        first_row, **{f"the model's logits of {name}": logits.detach(), f"the loss of {name}": losses.detach()}
    )
    del losses, total
    if rows:
        with torch.enable_grad(), without_compilation():
            check_rows(
                model, parameters.named, plan, x, logits, capture.outputs, rows, before, all_rows=not plan.verified
            )
    if moved is not None:
        raise moved  # where rows influence each other, that has been said instead
    plan.verified |= verifying
    for consumer in consumers:
        consumer.finish()
