"""Per-sample gradients of parameters without a layer rule: row by row, by ``torch.func`` or in a loop.

``vmap(grad(loss))`` takes many rows at a time. What it cannot run (recurrent layers, packed sequences, control flow
that looks at values, functions without a rule for vmap) is run by autograd, one row after the other. Either way the
rows' sum is compared with the gradient of the whole batch: what a row has alone is its gradient only if it has the
same among others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradmix.gradients.backward import Loss, check_losses
from gradmix.gradients.intercept import refusing_checkpoints
from gradmix.gradients.plan import CoupledRowsError, check_output
from gradmix.head import logits_of
from gradmix.inputs import InputTree, arguments_of, call_model, map_tensors, num_samples, own_copy, take
from gradmix.ops.dtypes import work_dtype
from gradmix.probe import require_finite, without_compilation

_ENTRIES = 1 << 25
"""Entries of per-sample gradients held at a time (128 MiB of float32)."""

Gradients = Mapping[str, Tensor]
"""(n, *shape) by parameter name, for n rows."""


def exact_gradients(
    model: nn.Module,
    names: Sequence[str],
    x: InputTree,
    y: Any,
    loss: Loss,
    *,
    checked_loss: Loss,
    scale: float,
    name: str,
    first_row: int = 0,
) -> Iterator[tuple[slice, Gradients]]:
    """Slices of the rows with the gradients of the parameters; call it inside ``Engine.probing``.

    The batch is passed forward and backward once as a whole, and then row by row: at the cost of two to three passes if
    ``torch.func`` can run the model, of as many passes as there are rows if not. The memory is that of a training step
    on the batch, plus 128 MiB of gradients, or those of one row if they are larger.

    Args:
        model: the unwrapped model.
        names: of the parameters.
        x, y: the rows.
        loss, checked_loss: the rows' losses; the latter may look at values.
        scale: factor of the losses in the backward pass, divided out again.
        name, first_row: what the rows are called, and the index of row 0 there, for errors.

    Raises:
        CoupledRowsError: the rows' gradients do not add up to that of the batch.
        ValueError: a NaN, logits or losses of another shape, or what ``checked_loss`` raises.
    """
    count = num_samples(x)
    parameters = dict(model.named_parameters())
    wanted = {n: parameters[n] for n in names}

    def gradient_of(rows: InputTree, targets: Any, function: Loss) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits, losses and the gradients of the losses' sum, by autograd: of the parameters, then of the logits."""
        size = num_samples(rows)
        with torch.enable_grad(), without_compilation():
            logits = check_output(logits_of(call_model(model, own_copy(rows))), size)
            losses = check_losses(function(logits, targets), size)
            total = losses.sum() * scale
            leaves = [*wanted.values(), logits]
            used = leaves if logits.requires_grad and total.requires_grad else []
            with refusing_checkpoints():
                found = torch.autograd.grad(total, used, allow_unused=True) if used else [None] * len(leaves)
        # A layer that has no part has no gradient, and a table's may be sparse.
        zeros = (torch.zeros_like(p, requires_grad=False) for p in leaves)
        dense = [z if g is None else g.to_dense() for z, g in zip(zeros, found, strict=True)]
        return logits.detach(), losses.detach(), dense

    logits, losses, (*batch, of_logits) = gradient_of(x, y, checked_loss)
    require_finite(first_row, **{f"the model's logits of {name}": logits, f"the loss of {name}": losses})
    tolerance = _tolerance(logits)
    # Where the gradients are 0, as of what the next layer takes away again, there is nothing but rounding.
    rounding = (
        32 * torch.finfo(logits.dtype).eps * float(torch.linalg.vector_norm(of_logits.to(work_dtype(logits.dtype))))
    )
    sums, size = [torch.zeros_like(g, dtype=work_dtype(g.dtype)) for g in batch], 0.0
    together = True
    step = max(1, _ENTRIES // max(1, sum(p.numel() for p in wanted.values())))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        rows, targets = take(x, part), take(y, part)
        found = _by_func(model, wanted, rows, targets, loss, scale) if together else None
        if found is not None and start == 0:
            expected = batch if part.stop == count else gradient_of(rows, targets, loss)[2][:-1]
            error = tolerance * _size(found) + rounding
            found = found if _agree([g.sum(0) for g in found], expected, error) else None
        if found is None:
            together = False
            each = [slice(n, n + 1) for n in range(part.stop - part.start)]
            singles = [gradient_of(take(rows, one), take(targets, one), loss)[2][:-1] for one in each]
            found = [torch.stack(gradients) for gradients in zip(*singles, strict=True)]
        for total, gradient in zip(sums, found, strict=True):
            total += gradient.sum(0, dtype=total.dtype)
        size += _size(found)
        yield part, {n: gradient / scale for n, gradient in zip(wanted, found, strict=True)}
    if not _agree(sums, batch, tolerance * size + rounding):
        raise CoupledRowsError(
            f"model: the gradients of {count} rows alone do not add up to the gradient of the rows together, expected "
            "a forward pass without chance, and rows that do not influence each other, so that each has a gradient of "
            "its own"
        )


def _by_func(
    model: nn.Module, wanted: Mapping[str, Tensor], rows: InputTree, targets: Any, loss: Loss, scale: float
) -> list[Tensor] | None:
    """The rows' gradients by ``vmap(grad(loss))``, or None where ``torch.func`` cannot run the model."""
    own = {name: p.detach() for name, p in wanted.items()}
    fixed = {name: p.detach() for name, p in model.named_parameters() if name not in own} | dict(model.named_buffers())

    def row_loss(own: dict[str, Tensor], row: InputTree, target: Any) -> Tensor:
        row, target = (map_tensors(lambda leaf: leaf[None], tree) for tree in (row, target))
        positional, named = arguments_of(model, row)
        logits = logits_of(torch.func.functional_call(model, {**fixed, **own}, positional, named))
        return check_losses(loss(logits, target), 1).sum() * scale

    gradient = torch.func.vmap(torch.func.grad(row_loss), in_dims=(None, 0, 0), randomness="error")
    try:
        with (
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            without_compilation(),
            _without_advice(),
            _same_attributes(model),
        ):
            found = gradient(own, own_copy(rows), targets)
    except Exception:  # whatever it cannot do; an error of the model's own comes again without it
        return None
    return [found[name].detach() for name in own]


def _size(gradients: Sequence[Tensor]) -> float:
    """The sum of the norms of the rows' gradients, at most."""
    flat = (g.reshape(len(g), -1).to(work_dtype(g.dtype)) for g in gradients)
    return sum(float(torch.linalg.vector_norm(g, dim=1).sum()) for g in flat)


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor], error: float) -> bool:
    """Whether gradients are the same up to an error."""
    differences = ((a - b).to(work_dtype(b.dtype)) for a, b in zip(found, expected, strict=True))
    # What is not finite is no difference: it is found in the gradients themselves.
    return not sum(float(torch.linalg.vector_norm(d)) for d in differences) > error


def _tolerance(logits: Tensor) -> float:
    """What is far from rounding in a network's pass, and far from other rows' influence."""
    kind = logits.device.type
    if logits.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(kind):
        return 0.1
    if logits.dtype == torch.float64:
        return 1e-6
    return 1e-3 if kind == "cpu" else 1e-2  # elsewhere products may be rounded to TF32


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep to ourselves that vmap is slow for an operation: that these gradients are, is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        yield


@contextmanager
def _same_attributes(model: nn.Module) -> Iterator[None]:
    """Restore the modules' attributes: a tensor of ``torch.func`` kept in one could not be used outside of it."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, kept in before:
            attributes.clear()
            attributes.update(kept)
