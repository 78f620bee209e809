"""One forward and one backward pass without weight gradients, whose parts go to accumulators.

The losses of the samples are summed, so that each sample has its own gradient. The graph begins at the output of the
first selected layer, and the backward pass computes gradients of activations only.

Every pass is verified, since the model may treat another batch differently. Autograd shows whether a selected parameter
has a gradient besides that of the rules: then the plan is wrong. Two samples are forwarded alone
(:mod:`gradmix.gradients.sample_check`). If the model reads values, or moves entries by an index, a second backward
pass, from losses times weights, shows whether the samples are where the plan expects them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradmix.gradients.accumulators import Accumulator
from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.chunk import Chunk
from gradmix.gradients.exceptions import MovedSamplesError, OutdatedPlanError
from gradmix.gradients.intercept import Parameters, hook_gradient, refuse_checkpoints
from gradmix.gradients.layers import trainable_parameters
from gradmix.gradients.losses import Loss, check_losses, check_output, loss_scale
from gradmix.gradients.plan import Plan
from gradmix.gradients.rules import Rule
from gradmix.gradients.sample_check import PlannedCalls, SampleCheck, samples_to_check
from gradmix.model.head import logits_of
from gradmix.model.inputs import call_model, first_tensor, own_copy
from gradmix.model.unchanged import RandomState, require_finite, without_compilation
from gradmix.ops.dtypes import work_dtype

_READING = {
    *("item", "tolist", "numpy", "__array__", "equal", "allclose", "is_nonzero"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__"),
}
"""Functions that pass a tensor's values to Python, on which the model's further calls may depend."""

_MOVING = {
    *("__getitem__", "__setitem__", "index_select", "gather", "take", "take_along_dim", "embedding"),
    *("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"),
    *("index_add", "index_add_", "index_copy", "index_copy_", "index_put", "index_put_"),
    *("masked_select", "masked_scatter", "masked_scatter_", "sort", "msort", "topk"),
}
"""Functions that move entries to places that depend on values."""

_KEPT_READS = 1024
"""Number of passes with different reads whose reads are kept."""


def run_pass(
    model: nn.Module, plan: Plan, chunk: Chunk, accumulators: Sequence[Accumulator], *, loss: Loss, scale: float
) -> None:
    """Make a forward and a backward pass over a chunk; call it inside ``Engine.evaluation_mode``.

    Args:
        model: the unwrapped model.
        plan: the model's plan.
        chunk: the samples; the model receives a copy of x, which it may change.
        accumulators: receive each layer's activations and output gradients.
        loss: losses of the samples, (N,).
        scale: factor of the losses in the backward pass.

    Raises:
        OutdatedPlanError: the pass differs from the plan; no accumulator was finished.
        CoupledSamplesError: samples influence each other or are not where the plan expects them.
        ValueError: a NaN, a loss of another shape, a label out of range.
    """
    parameters, device = Parameters(trainable_parameters(model)), first_tensor(chunk.x).device
    random_state = RandomState(device)
    samples = samples_to_check(plan, len(chunk), device)
    with torch.enable_grad(), without_compilation():
        calls = _ObservedCalls(parameters, plan, len(chunk), torch.tensor(samples, device=device), accumulators)
        with calls:
            logits = check_output(logits_of(call_model(model, own_copy(chunk.x))), len(chunk))
        calls.check_complete()
        losses = check_losses(loss(logits, chunk.y), len(chunk))
        verified, moved = calls.backward(losses, scale)
    # After the backward pass has been queued, since this synchronises with a GPU.
    finite = {f"the model's logits of {chunk.name}": logits.detach(), f"the loss of {chunk.name}": losses.detach()}
    require_finite(chunk.start, **finite)
    del losses, finite
    if samples:
        with torch.enable_grad(), without_compilation():
            check = SampleCheck(model, parameters.named, plan, chunk.x, random_state)
            check.check(samples, logits, calls.outputs, all_samples=not plan.verified)
    if moved is not None:
        raise moved  # if samples influence each other, the check above has raised that instead
    plan.verified |= verified
    for accumulator in accumulators:
        accumulator.finish()


class _ObservedCalls(PlannedCalls):
    """Makes the calls of a plan, and passes those of selected parameters to the accumulators.

    Args:
        parameters, plan, samples, kept: as :class:`PlannedCalls`.
        accumulators: receive these calls.
    """

    def __init__(
        self, parameters: Parameters, plan: Plan, samples: int, kept: Tensor, accumulators: Sequence[Accumulator]
    ) -> None:
        super().__init__(parameters, plan, samples, kept)
        self._anchor = torch.zeros((), device=kept.device, requires_grad=True)
        self._accumulators = accumulators
        self._reads = 0
        self._moved = False
        self._norms: dict[int, Tensor] = {}
        self._weights: Tensor | None = None

    # ------------------------------------------------------------------------------------------------- forward pass

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make a call, and record whether it may order the samples by their values."""
        result = super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in _READING:
            value = result.tobytes() if isinstance(result, np.ndarray) else repr(result)
            self._reads = hash((self._reads, value))
        elif name in _MOVING and not self._moved:
            self._moved = self._moves_samples(name, [*args, *(kwargs or {}).values()])
        return result

    def _moves_samples(self, name: str, values: Sequence[Any]) -> bool:
        """Whether a call of a function in ``_MOVING`` may move activations from sample to sample."""
        found = [v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))]
        tensors = [v for v in found if isinstance(v, Tensor)]
        activations = [t for t in tensors if t.requires_grad and self.parameters.find(t) is None]
        if not activations or name in ("sort", "msort", "topk"):
            return bool(activations)
        index = [t for t in tensors if t.ndim and not t.is_floating_point()]
        if name == "__getitem__" and any(t.shape == (self._samples,) and _counts_up(t) for t in index):
            return False  # sample n to sample n, possibly from other positions
        dim = next((v for v in values[1:2] if isinstance(v, int)), None)
        if name in ("gather", "index_select", "take_along_dim") and dim is not None:
            return activations[0].shape[dim] % self._samples == 0  # else this axis holds no samples
        return bool(index) or any(isinstance(v, list) for v in values)

    def intercept(self, rule: Rule) -> Tensor:
        """Make the call; if its layer is selected, pass it to the accumulators."""
        output, axis = self.run_planned(rule)
        if axis is None:
            return output
        if rule.weight is not None and rule.weight.name not in self._wanted:
            rule.weight = None
        if rule.bias is not None and rule.bias.name not in self._wanted:
            rule.bias = None
        with torch.no_grad(), _full_precision(output.device):
            callbacks = [accumulator.observe(rule, axis, self._samples) for accumulator in self._accumulators]
        late = rule.has_factors and any(accumulator.keeps_activations for accumulator in self._accumulators)
        held = rule.x if rule.keeps_input or late else None
        version = None if held is None else held._version
        rule.forget_input()
        index = self._next - 1

        def hook(gradient: Tensor) -> None:
            if held is not None and held._version != version:
                raise ValueError(
                    f"model: the input of {rule.views[0].name!r} is changed in place after its layer has used it, "
                    "expected it to be left alone: the gradient needs it"
                )
            with torch.no_grad(), _full_precision(gradient.device):
                if self._weights is not None:
                    self._check_places(rule, axis, gradient, self._norms[index])
                    return
                if self._verifies_places:
                    self._norms[index] = _sample_norms(gradient, axis, self._samples)
                for callback in callbacks:
                    callback(gradient)

        return hook_gradient(output, self._anchor, hook)

    # ------------------------------------------------------------------------------------------------ backward pass

    def backward(self, losses: Tensor, scale: float) -> tuple[bool, MovedSamplesError | None]:
        """Make the backward pass from the losses (N,), in which the accumulators receive the gradients.

        Returns:
            Whether the places of the samples were verified, and the error if they differ from the plan.

        Raises:
            OutdatedPlanError: a selected parameter has a gradient of its own, besides that of the rules.
        """
        total = losses.sum() * scale
        if not total.requires_grad:
            return False, None
        # A gradient reaches a selected parameter only if it is used in another way than planned. So every pass proves
        # that no use is left out.
        leaves = [self._anchor, *(self.parameters.named[name] for name in self._plan.wanted)]
        verifies = self._verifies_places
        with refuse_checkpoints():
            found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=verifies)
            if any(gradient is not None for gradient in found[1:]):
                raise OutdatedPlanError("a parameter used in another way than planned")
            if verifies:
                try:
                    self._verify_places(losses, scale)
                except MovedSamplesError as error:
                    return True, error
        return verifies, None

    @property
    def _verifies_places(self) -> bool:
        """Whether to verify the places of the samples by gradients: in the first batch, and if they may have moved.

        The tensor values that a model reads may decide where samples go; the same reads need no further check.
        """
        return self._samples > 1 and (not self._plan.verified or self._moved or self._reads not in self._plan.reads)

    def _verify_places(self, losses: Tensor, scale: float) -> None:
        """Verify the places of the samples by a backward pass from the losses (N,) times a weight for each sample.

        Raises:
            MovedSamplesError: the gradients at a sample's place do not have the sample's weight.
        """
        # Powers of two scale floating-point numbers exactly, unless these become too small.
        half = torch.float16 in self.dtypes or loss_scale(None, losses.device) != 1.0
        levels = 5 if half else 8 if losses.is_cuda else 16
        exponents = [n % levels for n in range(self._samples)]
        random.Random(self._plan.passes).shuffle(exponents)
        self._weights = torch.tensor([0.5**e for e in exponents], dtype=torch.float64, device="cpu").to(losses)
        torch.autograd.grad((losses * self._weights).sum() * scale, self._anchor, allow_unused=True)
        if len(self._plan.reads) < _KEPT_READS:
            self._plan.reads.add(self._reads)

    def _check_places(self, rule: Rule, axis: BatchAxis, gradient: Tensor, before: Tensor) -> None:
        assert self._weights is not None
        after = _sample_norms(gradient, axis, self._samples)
        expected = before * self._weights[:, None].to(before.dtype)
        # The tolerance is far from rounding, and far from the neighbouring powers of two.
        wrong = (after - expected).abs() > 0.25 * expected + 1e-6 * before.amax()
        if bool(wrong.any()):
            raise MovedSamplesError(
                f"model: where {rule.views[0].name!r} is used, samples are not where they were in a smaller batch; "
                "they seem to be sorted or routed, expected an order of samples that does not depend on what is in "
                "them"
            )


def _counts_up(index: Tensor) -> bool:
    return index.dtype == torch.int64 and torch.equal(index, torch.arange(len(index), device=index.device))


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast if it is on; entering a context without effect would cost more than this test."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _sample_norms(gradient: Tensor, axis: BatchAxis, samples: int) -> Tensor:
    """Return the norms of an output's gradient, (N, positions folded with the samples)."""
    parts = axis.split(gradient, samples)
    parts = parts.movedim(1 + axis.dim, 1) if parts.ndim > gradient.ndim else parts.unsqueeze(1)
    parts = parts.flatten(2) if parts.ndim > 2 else parts[..., None]
    norms: Tensor = torch.linalg.vector_norm(parts, dim=2, dtype=work_dtype(parts.dtype))
    return norms
