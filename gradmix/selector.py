"""From scores to partners: the criterion's alignment, the threshold's decisions, and the draw among what is helpful."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from gradmix.criteria import Alignment, Criterion, PairScores, no_alignment
from gradmix.draw import Policy, Proposal, choose, choose_any
from gradmix.estimators.base import Scorer, Screening
from gradmix.mixtures import Mixtures
from gradmix.ops.draw_partners import DrawnPartners
from gradmix.ops.dtypes import exact_dtype
from gradmix.ops.mixed_alignment import Weight
from gradmix.references import Reference
from gradmix.runtime.validation import check_choice


@dataclass(frozen=True)
class Rule:
    """The rule by which scores become partners: the arguments of these names of :func:`gradmix.select_pairs`.

    Raises:
        ValueError, TypeError: one of them is no such value.
    """

    criterion: Criterion
    threshold: float
    policy: Policy

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, get_args(Criterion))
        check_choice("policy", self.policy, get_args(Policy))
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise TypeError(f"threshold: got {type(self.threshold).__name__}, expected a cosine in [-1, 1]")
        if not -1.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold: got {self.threshold}, expected a cosine in [-1, 1]")


class Decision(NamedTuple):
    """Partners, and the alignment by which they were chosen.

    Attributes:
        partner: (N,) int64.
        helpful: (N,) bool, whether there is one.
        lam: (N,) float64 (float32 on devices without it), weight of the sample itself.
        inner, cosine, classes: as :class:`gradmix.Alignment`.
    """

    partner: Tensor
    helpful: Tensor
    lam: Tensor
    inner: Tensor
    cosine: Tensor
    classes: Tensor | None

    @property
    def alignment(self) -> Alignment:
        """The alignment."""
        return Alignment(self.inner, self.cosine, self.classes)


@dataclass(frozen=True)
class Selector:
    """Selects partners by one scorer and one rule; as a function of tensors where the scorer is pure."""

    scorer: Scorer[Any]
    rule: Rule

    def __call__(self, mixtures: Mixtures[Any], reference: Reference, numbers: Tensor) -> Decision:
        """Score all pairs and choose among them, without a wait; for pure scorers.

        Args:
            mixtures: of :meth:`gradmix.estimators.base.Scorer.see`.
            reference: the reference gradient.
            numbers: (N,) of :meth:`gradmix.draw.Proposal.numbers`.
        """
        return self.choose(self._scores(mixtures, reference, None), mixtures, reference, numbers)

    def align(self, mixtures: Mixtures[Any], reference: Reference) -> Alignment:
        """The alignment of all pairs, a sample with itself included; nothing is rechecked."""
        scores = self._scores(mixtures, reference, None)
        return scores.alignment(self.scorer.reference_norm(reference.gradient))

    def score(
        self, mixtures: Mixtures[Any], reference: Reference, proposal: Proposal
    ) -> tuple[PairScores, Screening | None]:
        """The scores of the pairs that are proposed, rechecked where they are in doubt; passes are made."""
        pairs = proposal.pairs(self.scorer.scores_itself)
        scores = self._scores(mixtures, reference, pairs)
        if scores.error is None:
            return scores, None
        return self.scorer.recheck(scores, mixtures, reference.gradient, pairs, self.rule.threshold, proposal.generator)

    def _scores(self, mixtures: Mixtures[Any], reference: Reference, pairs: Tensor | None) -> PairScores:
        by_class = self.rule.criterion == "class"
        score = self.scorer.class_scores if by_class else self.scorer.score
        return score(mixtures, reference.gradient, pairs)

    def choose(self, scores: PairScores, mixtures: Mixtures[Any], reference: Reference, numbers: Tensor) -> Decision:
        """Partners among the pairs whose alignment is helpful."""
        rule, empty = self.rule, reference.empty
        alignment = scores.alignment(self.scorer.reference_norm(reference.gradient))
        if empty is not None:
            inner, angle = (v.masked_fill(empty, 0) for v in (alignment.inner, alignment.cosine))
            alignment = Alignment(inner, angle, alignment.classes)
        allowed, score = alignment.by_pair(mixtures.batch.y, mixtures.partners.y, rule.threshold)
        if empty is not None:
            allowed = allowed | empty
        return _decision(alignment, choose(allowed, score, numbers, rule.policy, mixtures.own), mixtures.lam)

    def choose_any(self, mixtures: Mixtures[Any], numbers: Tensor) -> Decision:
        """Partners where no reference gradient is known: every mixture counts as helpful."""
        alignment = no_alignment(mixtures.batch.y, mixtures.partners.y, self.rule.criterion)
        drawn = choose_any(len(mixtures.partners), numbers, self.rule.policy, mixtures.own)
        return _decision(alignment, drawn, mixtures.lam)


def _decision(alignment: Alignment, drawn: DrawnPartners, lam: Weight) -> Decision:
    kept = torch.ones((), dtype=exact_dtype(drawn.found.device), device=drawn.found.device)
    weights = torch.where(drawn.found, lam, kept)
    return Decision(drawn.partner, drawn.found, weights, alignment.inner, alignment.cosine, alignment.classes)
