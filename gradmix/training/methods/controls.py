"""Controls: the same number of pairs, but not chosen by alignment, to measure what alignment itself contributes.

Mixing fewer samples changes training whichever they are, so a gain over Mixup is not due to the criterion alone. Each
control starts from GradMix's choice in the same step and keeps its mixing weight. One, ``learnt``, adds a condition.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from gradmix.estimators.feature import feature_scores
from gradmix.mixing_weight import draw_lam
from gradmix.model.forward import forward_all
from gradmix.model.unchanged import leave_unchanged, unwrap
from gradmix.ops.draw_partners import draw_partners
from gradmix.ops.labels import class_of
from gradmix.pairs import Pairs
from gradmix.replay.sources import CHUNK
from gradmix.runtime.transfer import to_device_async
from gradmix.training.config import MixConfig


def apply_control(
    pairs: Pairs, model: nn.Module, mix: MixConfig, generator: torch.Generator, replayed: Tensor | None = None
) -> Pairs:
    """The pairs of the control ``mix.control`` in place of those GradMix chose.

    - ``random``: as many samples are mixed as GradMix would mix in this step of a model that the control has trained
      (a run of GradMix may have another rate), or a fixed share, ``mix.control_rate``: any samples, with any partners.
    - ``random-partner``: the same samples are mixed, with any partners.
    - ``partner-class``: the same samples are mixed, each with any sample of the class its partner had. What is left of
      the criterion is which classes meet.
    - ``replayed-partner``: the same samples are mixed, with any partners of the buffer's classes. What is left of the
      criterion is that it favours replayed samples.
    - ``learnt``: GradMix's own pairs, but a sample that the network does not get right yet stays as it is.
    - ``anti``: a sample is mixed with a detrimental partner, where it has one; the rate is its own.
    - ``small-gradient``, ``large-gradient``: as many pairs are allowed, those with the smallest or the largest norm of
      the mixture's last-layer gradient, mixed in feature space; how many samples that leaves a partner is their own.

    Partners are drawn uniformly from those a control allows, whatever ``mix.policy``.

    Args:
        pairs: GradMix's choice for the step.
        model: the network in training; left as it was.
        mix: the settings.
        generator: source of the draws.
        replayed: (K,) int64 labels of the buffer's samples, for ``replayed-partner``.

    Raises:
        ValueError: ``replayed`` is missing.
    """
    if mix.control == "learnt":
        return _only_learnt(pairs, model)
    device, count = pairs.partner.device, len(pairs)
    own, other = pairs.candidates is pairs.batch, pairs.candidates
    drawn = to_device_async(
        torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64), device
    )
    if mix.control in ("random", "random-partner"):
        partner, found = draw_partners(None, drawn, policy="uniform", score=None, own_rows=own, partners=len(other))
        kept = pairs.helpful
        if mix.control == "random":
            shuffled = to_device_async(torch.randperm(count, generator=generator, device=generator.device), device)
            kept = kept[shuffled] if mix.control_rate is None else shuffled < round(mix.control_rate * count)
        found = found & kept
    elif mix.control in ("partner-class", "replayed-partner"):
        other_class = class_of(other.y)
        if mix.control == "partner-class":
            fitting = other_class[pairs.partner].unsqueeze(1) == other_class
        elif replayed is None:
            raise ValueError("replayed: got None, expected the labels of the buffer's samples for replayed-partner")
        else:
            fitting = torch.isin(other_class, replayed.to(device)).expand(count, -1)
        allowed = fitting & pairs.helpful.unsqueeze(1)
        partner, found = draw_partners(allowed, drawn, policy="uniform", score=None, own_rows=own)
    else:
        helpful, cosine = pairs.by_pair(mix.threshold)
        if mix.control == "anti":
            allowed = ~helpful & ~cosine.isnan()
        else:
            allowed = _as_many_by_norm(pairs, model, helpful, largest=mix.control == "large-gradient")
        partner, found = draw_partners(allowed, drawn, policy="uniform", score=None, own_rows=own)
    # lam is 1 where a sample stays as it is; the step's own weight is that of any sample GradMix mixed.
    lam = pairs.lam.min() if bool(pairs.helpful.any()) else draw_lam(mix.alpha, generator)
    return replace(pairs, partner=partner, helpful=found, lam=torch.where(found, lam, torch.ones_like(pairs.lam)))


def _only_learnt(pairs: Pairs, model: nn.Module) -> Pairs:
    """The pairs of samples whose class has the largest logit; the others have no partner."""
    model = unwrap(model)
    with leave_unchanged(model):
        logits = forward_all(model, None, "batch", pairs.batch, CHUNK).logits
    kept = pairs.helpful & (logits.argmax(1) == class_of(pairs.batch.y))
    own = pairs.candidates is pairs.batch
    nobody = torch.arange(len(kept), device=kept.device) if own else torch.zeros_like(pairs.partner)
    lam = torch.where(kept, pairs.lam, torch.ones_like(pairs.lam))
    return replace(pairs, partner=torch.where(kept, pairs.partner, nobody), helpful=kept, lam=lam)


def _as_many_by_norm(pairs: Pairs, model: nn.Module, helpful: Tensor, *, largest: bool) -> Tensor:
    """(N, M) bool: as many pairs as are helpful, those with the smallest or largest gradient."""
    model = unwrap(model)
    with leave_unchanged(model):
        own, batch = pairs.candidates is pairs.batch, forward_all(model, None, "batch", pairs.batch, CHUNK)
        partners = batch if own else forward_all(model, None, "candidates", pairs.candidates, CHUNK)
        # The norm does not depend on the reference.
        nothing = batch.features.new_zeros(batch.logits.shape[1], batch.features.shape[1] + 1)
        lam = float(pairs.lam.min())
        norm = feature_scores(batch, partners, nothing, lam).norm
        assert norm is not None
    if own:
        # A sample is not its own partner: such pairs are neither counted nor taken.
        helpful = helpful.clone().fill_diagonal_(False)
        norm = norm.clone().fill_diagonal_(-torch.inf if largest else torch.inf)
    ranked = norm.flatten().argsort(descending=largest, stable=True)
    allowed = torch.zeros_like(helpful).flatten()
    allowed[ranked[: int(helpful.sum())]] = True
    return allowed.view_as(helpful)
