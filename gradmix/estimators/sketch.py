"""Estimator ``sketch``: mixtures of the samples' sketched gradients over all parameters; scores in doubt are rechecked.

With the sketches S_a, S_b of two samples' gradients (or of two classes' mean gradients), the sketch of a mixture is
assumed to be lam S_a + (1 - lam) S_b. All pairs then follow from one inner product for each sample and a Gram matrix.
The inner products have standard errors. A pair whose inner product lies within a number of standard errors of the
threshold is in doubt: it is scored again by forwarded mixtures, up to a budget, the least certain first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from gradmix._moved import alias_argument, alias_attribute
from gradmix.class_table import TABLE_LAMS, ClassTable, draw_of_classes, table_of
from gradmix.criteria import PairScores, class_index
from gradmix.estimators.base import Network, Screening
from gradmix.estimators.forwarded_pairs import pairs_of
from gradmix.estimators.full_network import FullGradient, FullNetworkEstimator, check_memory
from gradmix.gradients.engine import Engine
from gradmix.gradients.layers import WithoutRule
from gradmix.gradients.losses import Scaler
from gradmix.gradients.sketches import Sketch as SketchKind
from gradmix.gradients.standard_errors import standard_errors
from gradmix.labelled_samples import LabelledSamples
from gradmix.mixtures import Mixtures
from gradmix.ops.labels import class_of
from gradmix.runtime.validation import check_count


@dataclass(frozen=True)
class SketchEstimator:
    """Settings of the estimator ``sketch``: alignment from sketched gradients, over all parameters; rechecked in doubt.

    Attributes:
        rank, seed, sketch, layers, without_rule, scaler: as :func:`gradmix.class_gradients`.
        errors: number of standard errors around the threshold within which a decision is in doubt.
        budget: mixtures that may be forwarded to recheck decisions; 0: none.
        mixtures_per_class_pair: number of mixtures whose mean rechecks the decision on a pair of classes.
        memory: as :class:`JvpEstimator`.

    Raises:
        TypeError, ValueError: ``errors``, ``budget`` or ``mixtures_per_class_pair`` is no such number.
    """

    rank: int | Mapping[str, int] = 32
    seed: int = 0
    sketch: str | SketchKind = "rademacher"
    layers: str | Sequence[str] = "all"
    without_rule: WithoutRule = "error"
    scaler: Scaler = None
    errors: float = 2.0
    budget: int = 64
    mixtures_per_class_pair: int = 8
    memory: int | None = None

    def __post_init__(self) -> None:
        check_memory(self.memory)
        if isinstance(self.errors, bool) or not isinstance(self.errors, (int, float)):
            raise TypeError(f"errors: got {type(self.errors).__name__}, expected a number >= 0")
        if not 0 <= self.errors < float("inf"):
            raise ValueError(f"errors: got {self.errors}, expected a number >= 0")
        check_count("budget", self.budget, least=0)
        check_count("mixtures_per_class_pair", self.mixtures_per_class_pair)

    rows_per_class = alias_attribute("SketchEstimator", "rows_per_class", "mixtures_per_class_pair")


_accept_former = alias_argument("SketchEstimator", "rows_per_class", "mixtures_per_class_pair")
SketchEstimator.__init__ = _accept_former(SketchEstimator.__init__)  # type: ignore[method-assign]


class Sketch(FullNetworkEstimator):
    """The estimator ``sketch`` of one network."""

    def __init__(self, network: Network, settings: SketchEstimator) -> None:
        super().__init__(network, settings)
        self._sketch = settings

    def score(
        self, mixtures: Mixtures[LabelledSamples], gradient: FullGradient, pairs: Tensor | None, norms: bool = True
    ) -> PairScores:
        """Score all pairs at once; ``pairs`` is ignored."""
        sketches = self.sketches(mixtures, gradient, by_class=False)
        if mixtures.own:
            return sketches.scores(float(mixtures.lam))
        count = len(mixtures.batch)
        return sketches.scores(float(mixtures.lam), slice(0, count), slice(count, None))

    def class_scores(
        self, mixtures: Mixtures[LabelledSamples], gradient: FullGradient, pairs: Tensor | None
    ) -> PairScores:
        """Score pairs of classes by their mean gradients."""
        return self.sketches(mixtures, gradient, by_class=True).scores(float(mixtures.lam))

    def sketches(
        self, mixtures: Mixtures[LabelledSamples], gradient: FullGradient, *, by_class: bool
    ) -> GradientSketches:
        """Return the sketched gradients of the samples, or the means of their classes."""
        sketch, network = self._sketch, self.network
        settings = replace(
            self.engine_settings(list(gradient), mixtures.chunk_size),
            rank=sketch.rank,
            seed=sketch.seed,
            sketch=sketch.sketch,
            backend=network.backend,
        )
        engine = Engine(network.model, settings)
        sources = {"batch": mixtures.batch}
        if mixtures.candidates is not None:
            sources["candidates"] = mixtures.candidates
        return GradientSketches(engine, sources, gradient, by_class=by_class)

    def recheck(
        self,
        scores: PairScores,
        mixtures: Mixtures[LabelledSamples],
        gradient: FullGradient,
        pairs: Tensor | None,
        threshold: float,
        generator: torch.Generator,
    ) -> tuple[PairScores, Screening]:
        """Score pairs in doubt again by forwarded mixtures, within the budget."""
        at = pairs_of(mixtures, pairs).unbind(1)
        if scores.classes is not None:
            sides = zip((mixtures.batch, mixtures.partners), at, strict=True)
            at = tuple(class_index(scores.classes, class_of(side.y))[k] for side, k in sides)
        judged = torch.zeros_like(scores.inner, dtype=torch.bool)
        judged[at] = True
        return self._recheck(scores, judged, mixtures, gradient, threshold, generator)

    def _recheck(
        self,
        scores: PairScores,
        judged: Tensor,
        mixtures: Mixtures[LabelledSamples],
        gradient: FullGradient,
        threshold: float,
        generator: torch.Generator,
        share: int = 1,
    ) -> tuple[PairScores, Screening]:
        """Do as :meth:`recheck`, for the entries ``judged`` (bool), with one of ``share`` equal parts of the budget."""
        assert scores.error is not None and scores.norm is not None
        settings = self._sketch
        norm = self.reference_norm(gradient).to(scores.inner)
        distance = (scores.inner - threshold * scores.norm * norm).abs()
        doubtful = judged & (distance <= settings.errors * scores.error) & (scores.error > 0)
        found = doubtful.nonzero()
        screened, doubts = int(judged.sum()), len(found)
        each = 1 if scores.classes is None else settings.mixtures_per_class_pair
        most = settings.budget // share // each
        if doubts == 0 or most == 0:
            return scores, Screening(screened, 0, doubts)
        if doubts > most:
            ratio = distance[doubtful] / scores.error[doubtful]
            found = found[ratio.argsort(stable=True)[:most]]
        pairs = found
        if scores.classes is not None:
            labels = (class_of(mixtures.batch.y), class_of(mixtures.partners.y))
            pairs = draw_of_classes(found, scores.classes, labels, each, generator)
        means = (v.view(-1, each).mean(1) for v in self.score_pairs(mixtures, gradient, pairs))
        inner, norms = (
            old.index_put(found.unbind(1), new.to(old))
            for old, new in zip((scores.inner, scores.norm), means, strict=True)
        )
        screening = Screening(screened, len(found), doubts - len(found))
        return replace(scores, inner=inner, norm=norms), screening

    def class_table(
        self,
        mixtures: Mixtures[LabelledSamples],
        gradient: FullGradient,
        per_class: int,
        threshold: float,
        generator: torch.Generator,
    ) -> tuple[ClassTable, Screening]:
        """The table of the sketches of the samples by class; the budget is divided among the mixing weights."""
        sketches = self.sketches(mixtures, gradient, by_class=True)
        table, counts = [], torch.zeros(3, dtype=torch.int64, device="cpu")
        for lam in TABLE_LAMS:
            scores = sketches.scores(lam)
            judged = torch.ones_like(scores.inner, dtype=torch.bool)
            scores, done = self._recheck(
                scores, judged, replace(mixtures, lam=lam), gradient, threshold, generator, share=len(TABLE_LAMS)
            )
            counts += torch.tensor(astuple(done), device="cpu")
            table.append(scores)
        norm = self.reference_norm(gradient).to(table[0].inner)
        return table_of(table, norm), Screening(*counts.tolist())


class GradientSketches:
    """Sketched gradients of samples, or of their classes, and their inner products with the reference.

    Args:
        engine: the gradient engine, with the sketch's settings.
        sources: the samples by their name in errors, in order.
        gradient: the reference.
        by_class: whether to average the samples by class.

    Attributes:
        classes: (P,), or None.
        vectors: (P, D) class means, or (N, D).
    """

    def __init__(
        self, engine: Engine, sources: Mapping[str, LabelledSamples], gradient: FullGradient, *, by_class: bool
    ) -> None:
        pairs = {name: (samples.x, samples.y) for name, samples in sources.items()}
        self.classes: Tensor | None = None
        with engine.evaluation_mode():
            if by_class:
                total = None
                for name, pair in pairs.items():
                    part = engine.classes(name, pair)
                    assert part is not None
                    total = part if total is None else total.add_(part)
                assert total is not None
                self.classes, self.vectors = total.classes, total.mean()
            else:
                self.vectors = torch.cat([v for name, pair in pairs.items() for *_, v in engine.samples(name, pair)])
            target = engine.sketch_of(gradient).to(self.vectors.dtype)
        self.inner = self.vectors @ target
        self.error = standard_errors(self.vectors, target, engine.layout)

    def scores(self, lam: float, batch: slice = slice(None), partners: slice = slice(None)) -> PairScores:
        """Return the scores of all pairs of ``batch`` and ``partners`` at one mixing weight.

        The gradient lam S_a + mu S_b has the inner product lam s_a + mu s_b, whose standard error is at most
        lam e_a + mu e_b, and the squared norm lam^2 |S_a|^2 + 2 lam mu <S_a, S_b> + mu^2 |S_b|^2.
        """
        mu = 1 - lam
        a, b = self.vectors[batch], self.vectors[partners]
        square = lam**2 * a.square().sum(1)[:, None] + 2 * lam * mu * (a @ b.T) + mu**2 * b.square().sum(1)
        return PairScores(
            lam * self.inner[batch][:, None] + mu * self.inner[partners],
            square.clamp_(min=0).sqrt(),
            lam * self.error[batch][:, None] + mu * self.error[partners],
            self.classes,
        )
