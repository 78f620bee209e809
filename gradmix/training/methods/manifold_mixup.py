"""Manifold Mixup: Mixup at a layer drawn at random, the input or a hidden one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradmix.mixing_weight import draw_lam
from gradmix.runtime.transfer import to_device_async
from gradmix.training.methods.base import Context, Needs, StepSamples, weighted_cross_entropy
from gradmix.training.methods.mixing_space import require_mixable
from gradmix.training.methods.mixup import Mixup


class ManifoldMixup(Mixup):
    """Manifold Mixup (Verma et al. 2019): one layer, one lam ~ Beta(alpha, alpha) and one permutation a step.

    The layer is the input or the input of one of :func:`hidden_stages`, all equally likely. There the samples' states
    are mixed, lam h_n + (1 - lam) h_m, and the rest of the network sees the mixtures alone; labels are mixed likewise.

    Where samples are not mixed at the input (``mix.space``), the place they are mixed at takes the input's part.

    Departing from the paper, partners may come from a step's ``candidates``. Those drawn go through the stages below
    the layer together with the samples, so batch normalisation sees both there. A pass that mixes at a hidden layer
    runs the module inside ``torch.compile``, uncompiled: compiled code may skip the hook.

    Raises:
        ValueError: the model has no hidden stages.
    """

    needs = Needs(whole_step=True, one_process=True)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        if context.passes.group is not None:
            raise ValueError(
                "methods: got manifold-mixup with several processes, expected one: its layers mix whole steps"
            )
        # A data-parallel wrapper stays: a pass around it would leave its gradients unshared.
        inner = getattr(context.model, "_orig_mod", None)
        self._model = inner if isinstance(inner, nn.Module) else context.model
        self._stages = hidden_stages(self._model)

    def losses(self, samples: StepSamples) -> Iterator[Tensor]:
        context = self.context
        generator = context.generator
        if self._space == "input":
            require_mixable(samples.x)
        layer = int(torch.randint(1 + len(self._stages), (1,), generator=generator, device=generator.device))
        if layer == 0:
            yield from super().losses(samples)
            return
        lam = draw_lam(context.mix.alpha, generator)
        if samples.candidates is None:
            x = samples.x
            partner = to_device_async(torch.randperm(len(x), generator=generator, device=generator.device), x.device)
            other_y = samples.y[partner]
        else:
            other_x, other_y = self.draw_partners(samples)
            x = torch.cat([samples.x, other_x])
            partner = torch.arange(len(samples.x), len(x), device=x.device)
        logits = mixed_forward(self._model, self._stages[layer - 1], x, partner, lam)
        y = lam * self.one_hot(samples.y) + (1 - lam) * self.one_hot(other_y)
        loss = weighted_cross_entropy(logits, y, samples.weight)
        if not context.mix.originals:
            yield loss
            return
        yield 0.5 * loss
        for loss in self.cross_entropies(samples):
            yield 0.5 * loss


def hidden_stages(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules at whose input hidden states are mixed.

    A model of :mod:`gradmix.training.models` names its own: what comes out of its first two hidden layers or residual
    stages, with the input the paper's choice {0, 1, 2}. For any other model it is every direct child but the first, so
    the output of every child but the head, provided the model calls its children in the order of their registration.

    Raises:
        ValueError: there is none.
    """
    own = getattr(model, "hidden_stages", None)
    stages = tuple(model.children())[1:] if own is None else tuple(own)
    if not stages:
        raise ValueError(f"model: {type(model).__name__} has no hidden stages, expected at least two child modules")
    return stages


def mixed_forward(model: nn.Module, stage: nn.Module, x: Tensor, partner: Tensor, lam: float) -> Tensor:
    """Logits of samples mixed at the input of ``stage``.

    Args:
        model: the network.
        stage: one of its modules, called once in a forward pass, with a tensor (N + M, ...) first.
        x: (N + M, ...) the samples, then samples that are partners only; M may be 0.
        partner: (N,) where each sample's partner is in ``x``.
        lam: the weight of the sample itself.

    Returns:
        (N, C) logits.

    Raises:
        ValueError: the stage was not called once, or what it was called with is not a tensor of N + M samples.
    """
    calls = 0

    def mix(_stage: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        h = inputs[0] if inputs else None
        if not isinstance(h, Tensor) or h.shape[:1] != x.shape[:1]:
            got = f"a tensor {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(f"model: {name} was called with {got}, expected a tensor of {len(x)} samples")
        return (lam * h[: len(partner)] + (1 - lam) * h[partner], *inputs[1:])

    name = next(name for name, module in model.named_modules() if module is stage)
    handle = stage.register_forward_pre_hook(mix)
    try:
        logits: Tensor = model(x)
    finally:
        handle.remove()
    if calls != 1:
        raise ValueError(f"model: {name} was called {calls} times in a forward pass, expected once")
    return logits
