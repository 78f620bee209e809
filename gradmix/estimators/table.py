"""The class table as a scorer: scores of classes are looked up, without a forward pass."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from gradmix.class_table import TableTensors, interpolate
from gradmix.criteria import PairScores
from gradmix.estimators.base import Estimator, PassSizes, Scorer
from gradmix.labelled_samples import LabelledSamples
from gradmix.mixtures import Mixtures, Request
from gradmix.model.inputs import InputTree


class TableLookup(Scorer[LabelledSamples]):
    """Looks scores up in a class table; in place of a reference gradient it takes the table's tensors.

    Args:
        made_by: the estimator that made the table.
        lams: the table's mixing weights.
    """

    is_pure: ClassVar[bool] = True

    def __init__(self, made_by: Estimator[Any], lams: tuple[float, ...]) -> None:
        self.network, self.name = made_by.network, made_by.name
        self._made_by, self._lams = made_by, lams

    def __eq__(self, other: object) -> bool:
        """Equal ones give the same scores, so that a captured graph of one serves the other."""
        return isinstance(other, TableLookup) and (self._made_by, self._lams) == (other._made_by, other._lams)

    def __hash__(self) -> int:
        return hash((self._made_by, self._lams))

    def sizes(self, x: InputTree) -> PassSizes:
        """The sizes of the estimator that made the table."""
        return self._made_by.sizes(x)

    def prepare(self, request: Request, lam: float) -> Mixtures[LabelledSamples]:
        """The mixtures with labels alone, which the table needs."""
        return self._made_by.prepare_labels(request, lam)

    def reference_norm(self, gradient: TableTensors) -> Tensor:
        """The reference norm () stored in the table."""
        return gradient.reference_norm

    def class_scores(
        self, mixtures: Mixtures[LabelledSamples], gradient: TableTensors, pairs: Tensor | None
    ) -> PairScores:
        """The scores of the table at the mixing weight."""
        return interpolate(self._lams, gradient, mixtures.lam)
