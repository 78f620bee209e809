"""A-GEM: the gradient of the current samples, projected so that it does not oppose that of replayed ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmix.model.head import logits_of
from gradmix.model.unchanged import unwrap
from gradmix.runtime.collectives import all_reduce_sum
from gradmix.training.methods.base import Finetune, Needs, StepSamples, weighted_cross_entropy


class AGEM(Finetune):
    """A-GEM (Chaudhry et al. 2019): g <- g - (g.r / r.r) r where g.r < 0, all parameters taken as one vector.

    g is the gradient of the current samples' loss, r that of the mean cross-entropy of a batch of replayed samples,
    which are not used otherwise. As in the authors' code both passes run in training mode, the reference's first, and
    weight decay and momentum follow the projection. While the buffer is empty it is plain finetuning.
    """

    needs = Needs(replayed=False, second_batch=True)

    def backward(self, samples: StepSamples) -> Tensor:
        context = self.context
        replayed = context.draw_replayed()
        if replayed is None:
            return super().backward(samples)
        parameters = [p for p in context.model.parameters() if p.requires_grad]
        # Not through a data-parallel wrapper: the backward pass below does not go through it.
        model = context.model if context.passes.group is None else unwrap(context.model)
        with context.passes.autocast():
            logits = logits_of(model(replayed.x))
            weight = torch.full((len(replayed.y),), 1.0 / max(1, len(replayed.y)), device=logits.device)
            loss = weighted_cross_entropy(logits, replayed.y, weight)
        # Scaled as the step's own gradient is: the projection is the same, and neither underflows alone.
        reference = torch.autograd.grad(context.passes.scaler.scale(loss), parameters, allow_unused=True)
        if context.passes.group is not None:
            # Weighted by length, since the shares of the replayed samples may differ by one.
            known = [r for r in reference if r is not None]
            count = torch.tensor([float(len(replayed.y))], device=logits.device)
            *totals, counted = all_reduce_sum([*(r * count for r in known), count], context.passes.group)
            averaged = iter([total / counted for total in totals])
            reference = tuple(None if r is None else next(averaged) for r in reference)
        loss = super().backward(samples)
        project(parameters, reference)
        return loss


@torch.no_grad()
def project(parameters: Sequence[Tensor], reference: Sequence[Tensor | None]) -> None:
    """Remove the component along ``reference`` from the parameters' ``.grad``, in place, if it is negative.

    ``reference`` has a gradient of the shape of each parameter, or None. Nothing waits for the device. A missing
    gradient counts as zero. Where the inner product is not a number the gradient becomes so too, and a scaler skips the
    step.
    """
    used = [(p, r) for p, r in zip(parameters, reference, strict=True) if r is not None]
    if not used:
        return
    gradients = []
    for p, _ in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        gradients.append(p.grad)
    dot = torch.stack([(g.float() * r.float()).sum() for g, (_, r) in zip(gradients, used, strict=True)]).sum()
    square = torch.stack([r.float().square().sum() for _, r in used]).sum()
    # Not where(dot < 0): a NaN must come through.
    share = torch.where(dot >= 0, torch.zeros_like(dot), dot / square)
    for g, (_, r) in zip(gradients, used, strict=True):
        g.sub_(share * r)
