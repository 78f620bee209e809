"""From scores to partners: the alignment by the criterion, the threshold, and the draw among helpful candidates."""

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
from gradmix.references import Reference
from gradmix.runtime.validation import check_choice


@dataclass(frozen=True)
class Rule:
    """The rule by which scores become partners: arguments of :func:`gradmix.select_pairs` with the same names.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.
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

    @property
    def needs_norms(self) -> bool:
        """Whether decisions need cosines; else the sign of the inner products decides, and cosines can wait."""
        return self.threshold != 0.0 or self.policy == "best" or self.criterion == "class"


class Decision(NamedTuple):
    """Partners, and the alignment by which they were chosen.

    Attributes:
        partner: (N,) int64.
        helpful: (N,) bool, whether the sample has a partner.
        lam: (N,) float64 (float32 on devices without it), weight of the sample itself.
        inner, cosine, classes: as :class:`gradmix.Alignment`; None where no decision needed cosines.
        gradient, empty: of :class:`gradmix.references.Reference`, where it was computed from marked samples on the way
            and cosines may still be asked for.
    """

    partner: Tensor
    helpful: Tensor
    lam: Tensor
    inner: Tensor | None
    cosine: Tensor | None
    classes: Tensor | None
    gradient: Tensor | None = None
    empty: Tensor | None = None

    @property
    def alignment(self) -> Alignment | None:
        """The alignment; None where no decision needed cosines."""
        if self.inner is None or self.cosine is None:
            return None
        return Alignment(self.inner, self.cosine, self.classes)


@dataclass(frozen=True)
class Selector:
    """Selects partners by one scorer and one rule; a function of tensors if the scorer is pure."""

    scorer: Scorer[Any]
    rule: Rule

    def __call__(self, mixtures: Mixtures[Any], numbers: Tensor, reference: Reference) -> Decision:
        """Score all pairs and choose among them, without a wait; for pure scorers.

        Args:
            mixtures: as :meth:`gradmix.estimators.base.Scorer.prepare` returns them.
            numbers: (N,), from :meth:`gradmix.draw.Proposal.numbers`.
            reference: the reference gradient.
        """
        scores = self._scores(mixtures, reference, None, self.rule.needs_norms)
        return self.choose(scores, mixtures, reference, numbers)

    def align(self, mixtures: Mixtures[Any], reference: Reference) -> Alignment:
        """Return the alignment of all pairs, including a sample with itself; without a recheck."""
        return self._alignment(self._scores(mixtures, reference, None), reference)

    def _alignment(self, scores: PairScores, reference: Reference) -> Alignment:
        alignment = scores.alignment(self.scorer.reference_norm(reference.gradient))
        if reference.empty is None:
            return alignment
        inner, angle = (v.masked_fill(reference.empty, 0) for v in (alignment.inner, alignment.cosine))
        return Alignment(inner, angle, alignment.classes)

    def score(
        self, mixtures: Mixtures[Any], reference: Reference, proposal: Proposal
    ) -> tuple[PairScores, Screening | None]:
        """Return the scores of the proposed pairs, rechecked where in doubt; forward passes may be made."""
        pairs = proposal.pairs(self.scorer.scores_itself)
        scores = self._scores(mixtures, reference, pairs)
        if scores.error is None:
            return scores, None
        return self.scorer.recheck(scores, mixtures, reference.gradient, pairs, self.rule.threshold, proposal.generator)

    def _scores(
        self, mixtures: Mixtures[Any], reference: Reference, pairs: Tensor | None, norms: bool = True
    ) -> PairScores:
        if self.rule.criterion == "class":
            return self.scorer.class_scores(mixtures, reference.gradient, pairs)
        return self.scorer.score(mixtures, reference.gradient, pairs, norms)

    def choose(self, scores: PairScores, mixtures: Mixtures[Any], reference: Reference, numbers: Tensor) -> Decision:
        """Choose partners among the helpful pairs."""
        rule, empty = self.rule, reference.empty
        alignment, score = None, None
        if scores.norm is None:
            allowed = scores.inner >= 0
        else:
            alignment = self._alignment(scores, reference)
            allowed, score = alignment.by_pair(mixtures.batch.y, mixtures.partners.y, rule.threshold)
        if empty is not None:
            allowed = allowed | empty
        return _decision(alignment, choose(allowed, score, numbers, rule.policy, mixtures.own), mixtures)

    def choose_any(self, mixtures: Mixtures[Any], numbers: Tensor) -> Decision:
        """Choose partners without a reference gradient: every mixture counts as helpful."""
        alignment = no_alignment(mixtures.batch.y, mixtures.partners.y, self.rule.criterion)
        drawn = choose_any(len(mixtures.partners), numbers, self.rule.policy, mixtures.own)
        return _decision(alignment, drawn, mixtures)


@dataclass(frozen=True)
class MarkedSelector:
    """Selects by the mean gradient of marked samples; equal ones are one captured graph."""

    selector: Selector

    def __call__(self, mixtures: Mixtures[Any], numbers: Tensor, marked: Tensor) -> Decision:
        """Do as :meth:`Selector.__call__` with the reference of the samples that ``marked``, (N,) bool, says."""
        reference = self.selector.scorer.reference_of_marked(mixtures, marked)
        assert reference is not None
        decision = self.selector(mixtures, numbers, reference)
        if decision.alignment is not None:
            return decision
        return decision._replace(gradient=reference.gradient, empty=reference.empty)


def _decision(alignment: Alignment | None, drawn: DrawnPartners, mixtures: Mixtures[Any]) -> Decision:
    kept = torch.ones((), dtype=exact_dtype(drawn.found.device), device=drawn.found.device)
    weights = torch.where(drawn.found, mixtures.lam, kept).to(mixtures.weights)
    known = (None, None, None) if alignment is None else (alignment.inner, alignment.cosine, alignment.classes)
    return Decision(drawn.partner, drawn.found, weights, *known)
