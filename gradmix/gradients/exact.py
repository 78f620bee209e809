"""Per-sample gradients of parameters without a layer rule: by ``torch.func``, or in a loop over the samples.

``vmap(grad(loss))`` processes many samples at a time. Where it cannot run the model (recurrent layers, packed
sequences, control flow that depends on values, functions without a rule for vmap), autograd computes one sample after
the other. In both cases the sum over the samples is compared with the gradient of the whole batch: the gradient of a
sample alone is its gradient only if it is the same among other samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradmix.gradients.chunk import Chunk
from gradmix.gradients.exceptions import CoupledSamplesError
from gradmix.gradients.intercept import refuse_checkpoints
from gradmix.gradients.losses import Loss, check_losses, check_output
from gradmix.model.head import logits_of
from gradmix.model.inputs import InputTree, arguments_of, call_model, map_tensors, num_samples, own_copy, take
from gradmix.model.unchanged import require_finite, without_compilation
from gradmix.ops.dtypes import work_dtype

_ENTRIES = 1 << 25
"""Entries of per-sample gradients held at a time (128 MiB of float32)."""

Gradients = Mapping[str, Tensor]
"""(n, *shape) by parameter name, for n samples."""


def exact_gradients(
    model: nn.Module, names: Sequence[str], chunk: Chunk, loss: Loss, *, checked_loss: Loss, scale: float
) -> Iterator[tuple[slice, Gradients]]:
    """Yield slices of the samples with the gradients of the parameters; call it inside ``Engine.evaluation_mode``.

    The batch is passed forward and backward once as a whole, and then sample by sample: two to three passes if
    ``torch.func`` can run the model, else as many passes as there are samples. The memory is that of a training step on
    the batch, plus 128 MiB of gradients, or those of one sample if they are larger.

    Args:
        model: the unwrapped model.
        names: names of the parameters.
        chunk: the samples.
        loss: the losses of the samples; must not read values.
        checked_loss: the same function with checks, which may read values.
        scale: factor of the losses in the backward pass, by which the gradients are divided.

    Raises:
        CoupledSamplesError: the gradients of the samples do not add up to that of the batch.
        ValueError: a NaN, logits or losses of another shape, or an error of ``checked_loss``.
    """
    parameters = dict(model.named_parameters())
    gradients_of = LossGradients(model, {n: parameters[n] for n in names}, loss, scale)
    logits, losses, (*batch, of_logits) = gradients_of.batch(chunk.x, chunk.y, checked_loss)
    finite = {f"the model's logits of {chunk.name}": logits, f"the loss of {chunk.name}": losses}
    require_finite(chunk.start, **finite)
    tolerance, rounding = tolerances(logits, of_logits)
    sums, size = [torch.zeros_like(g, dtype=work_dtype(g.dtype)) for g in batch], 0.0
    vectorised = True
    step = max(1, _ENTRIES // max(1, sum(parameters[n].numel() for n in names)))
    for start in range(0, len(chunk), step):
        part = slice(start, min(start + step, len(chunk)))
        x, y = take(chunk.x, part), take(chunk.y, part)
        found = gradients_of.samples_by_vmap(x, y) if vectorised else None
        if found is not None and start == 0:
            expected = batch if part.stop == len(chunk) else gradients_of.batch(x, y, loss)[2][:-1]
            error = tolerance * total_norm(found) + rounding
            found = found if agree([g.sum(0) for g in found], expected, error) else None
        if found is None:
            vectorised = False
            found = gradients_of.samples_by_loop(x, y)
        for total, gradient in zip(sums, found, strict=True):
            total += gradient.sum(0, dtype=total.dtype)
        size += total_norm(found)
        yield part, {n: gradient / scale for n, gradient in zip(names, found, strict=True)}
    if not agree(sums, batch, tolerance * size + rounding):
        raise CoupledSamplesError(
            f"model: the gradients of {len(chunk)} samples alone do not add up to the gradient of the samples "
            "together, expected a forward pass without chance, and samples that do not influence each other, so that "
            "each has a gradient of its own"
        )


@dataclass(frozen=True)
class LossGradients:
    """Gradients of a loss of samples.

    Attributes:
        model: the unwrapped model.
        wanted: the parameters by name.
        loss: losses of the samples.
        scale: factor of the losses.
    """

    model: nn.Module
    wanted: Mapping[str, Tensor]
    loss: Loss
    scale: float

    def batch(self, x: InputTree, y: Any, loss: Loss) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return logits, losses, and the gradients of the summed losses by the parameters and then by the logits."""
        with torch.enable_grad(), without_compilation():
            logits, losses = self.forward(x, y, loss)
            total = losses.sum() * self.scale
            leaves = [*self.wanted.values(), logits]
            used = leaves if logits.requires_grad and total.requires_grad else []
            with refuse_checkpoints():
                found = torch.autograd.grad(total, used, allow_unused=True) if used else [None] * len(leaves)
        # A layer that does not contribute to the loss has no gradient, and that of a table may be sparse.
        pairs = zip(leaves, found, strict=True)
        dense = [torch.zeros_like(p, requires_grad=False) if g is None else g.to_dense() for p, g in pairs]
        return logits.detach(), losses.detach(), dense

    def forward(self, x: InputTree, y: Any, loss: Loss) -> tuple[Tensor, Tensor]:
        """Return logits and losses; call it inside :func:`without_compilation`."""
        logits = check_output(logits_of(call_model(self.model, own_copy(x))), num_samples(x))
        return logits, check_losses(loss(logits, y), num_samples(x))

    def samples_by_loop(self, x: InputTree, y: Any) -> list[Tensor]:
        """Return the gradients (n, *shape) of each parameter, by one pass for each sample."""
        each = [slice(n, n + 1) for n in range(num_samples(x))]
        singles = [self.batch(take(x, one), take(y, one), self.loss)[2][:-1] for one in each]
        return [torch.stack(gradients) for gradients in zip(*singles, strict=True)]

    def samples_by_vmap(self, x: InputTree, y: Any, *, loops: bool = True) -> list[Tensor] | None:
        """Return the gradients (n, *shape) by ``vmap(grad(loss))``; None if ``torch.func`` cannot run the model.

        Args:
            x, y: the samples.
            loops: whether it may compute an operation sample by sample, as it does where it has no rule for it.
        """
        own = {name: p.detach() for name, p in self.wanted.items()}
        fixed = {name: p.detach() for name, p in self.model.named_parameters() if name not in own}
        fixed |= dict(self.model.named_buffers())

        def sample_loss(own: dict[str, Tensor], sample: InputTree, target: Any) -> Tensor:
            sample, target = (map_tensors(lambda leaf: leaf[None], tree) for tree in (sample, target))
            positional, named = arguments_of(self.model, sample)
            logits = logits_of(torch.func.functional_call(self.model, {**fixed, **own}, positional, named))
            return check_losses(self.loss(logits, target), 1).sum() * self.scale

        gradient = torch.func.vmap(torch.func.grad(sample_loss), in_dims=(None, 0, 0), randomness="error")
        try:
            with (
                torch.enable_grad(),
                sdpa_kernel(SDPBackend.MATH),
                without_compilation(),
                _performance_warnings("ignore" if loops else "error"),
                _same_attributes(self.model),
            ):
                found = gradient(own, own_copy(x), y)
        except Exception:  # torch.func cannot run the model; an error of the model itself occurs again in the loop
            return None
        return [found[name].detach() for name in own]


def total_norm(gradients: Sequence[Tensor]) -> float:
    """Return an upper bound of the sum of the norms of the samples' gradients."""
    flat = (g.reshape(len(g), -1).to(work_dtype(g.dtype)) for g in gradients)
    return sum(float(torch.linalg.vector_norm(g, dim=1).sum()) for g in flat)


def agree(found: Sequence[Tensor], expected: Sequence[Tensor], error: float) -> bool:
    """Whether gradients are equal up to an error."""
    differences = ((a - b).to(work_dtype(b.dtype)) for a, b in zip(found, expected, strict=True))
    # Values that are not finite do not count as a difference: they are found in the gradients themselves.
    return not sum(float(torch.linalg.vector_norm(d)) for d in differences) > error


def tolerances(logits: Tensor, of_logits: Tensor) -> tuple[float, float]:
    """Return a relative tolerance of gradients, and an absolute one.

    They are far above the rounding of a pass and far below the influence of other samples.

    Args:
        logits: (N, ...) of the pass.
        of_logits: the gradients of the logits, of the same shape.
    """
    kind = logits.device.type
    relative = 1e-3 if kind == "cpu" else 1e-2  # elsewhere products may be rounded to TF32
    if logits.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(kind):
        relative = 0.1
    elif logits.dtype == torch.float64:
        relative = 1e-6
    # Gradients that are 0, as before a layer that removes their effect, consist of rounding errors.
    size = float(torch.linalg.vector_norm(of_logits.to(work_dtype(logits.dtype))))
    return relative, 32 * torch.finfo(logits.dtype).eps * size


@contextmanager
def _performance_warnings(action: Literal["ignore", "error"]) -> Iterator[None]:
    """Suppress the warning that vmap is slow for an operation, or make it an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings(action, message="There is a performance drop", category=UserWarning)
        yield


@contextmanager
def _same_attributes(model: nn.Module) -> Iterator[None]:
    """Restore the modules' attributes afterwards: tensors of ``torch.func`` in them could not be used outside."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, kept in before:
            attributes.clear()
            attributes.update(kept)
