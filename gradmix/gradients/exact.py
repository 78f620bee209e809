"""Per-sample gradients by ``torch.func``, for parameters without a layer rule."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradmix.gradients.passes import Loss
from gradmix.gradients.plan import Layer, NoRuleError
from gradmix.head import logits_of

_ENTRIES = 1 << 25
"""Entries of per-sample gradients held at a time (128 MiB of float32)."""


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep to ourselves that vmap is slow for an operation: that these gradients are, is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        yield


def exact_gradients(
    model: nn.Module, layers: Sequence[Layer], x: Tensor, y: Tensor, loss: Loss
) -> Iterator[tuple[slice, Mapping[str, Tensor]]]:
    """Slices of the rows with the gradients (n, p, q) of the layers' parameters, by layer name.

    They are ``vmap(grad(loss))`` with the other parameters held fixed; call it inside ``Engine.probing``.

    Raises:
        NoRuleError: torch.func cannot run the model.
    """
    names = [layer.parameters[0] for layer in layers]
    parameters = dict(model.named_parameters())
    wanted = {name: parameters[name].detach() for name in names}
    fixed = {name: p.detach() for name, p in parameters.items() if name not in wanted}
    fixed |= dict(model.named_buffers())

    def row_loss(own: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        logits = logits_of(torch.func.functional_call(model, {**fixed, **own}, (row[None],)))
        return loss(logits, label[None]).sum()

    gradient = torch.func.vmap(torch.func.grad(row_loss), in_dims=(None, 0, 0), randomness="error")
    step = max(1, _ENTRIES // max(1, sum(p.numel() for p in wanted.values())))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        try:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _without_advice():
                found = gradient(wanted, x[part].detach(), y[part])
        except (RuntimeError, NotImplementedError, ValueError) as error:
            listed = ", ".join(map(repr, names))
            first_line = (str(error).splitlines() or [""])[0]
            raise NoRuleError(
                f"model: torch.func cannot compute the per-sample gradient of {listed} ({type(error).__name__}: "
                f"{first_line}), and there is no rule for it; leave it out by layers="
            ) from error
        yield part, {layer.name: found[layer.parameters[0]].detach().reshape(-1, *layer.shape) for layer in layers}
