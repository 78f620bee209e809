"""The class table as a scorer: scores of classes are looked up, without a forward pass."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from gradmix.class_table import TableTensors, interpolate
from gradmix.criteria import PairScores, class_index
from gradmix.estimators.base import Estimator, PassSizes, Scorer
from gradmix.labelled_samples import LabelledSamples
from gradmix.mixtures import Mixtures, Request
from gradmix.model.inputs import InputTree
from gradmix.ops.labels import class_of
from gradmix.runtime.deferred_checks import can_sync


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
        """The scores of the table at the mixing weight.

        Of more classes than samples, they are of the samples' classes alone, if the host may look at these.
        """
        labels = [class_of(mixtures.batch.y)] + ([] if mixtures.own else [class_of(mixtures.partners.y)])
        if len(gradient.classes) > sum(map(len, labels)) and can_sync(labels[0].device):
            present = class_index(gradient.classes, torch.unique(torch.cat(labels)))
            gradient = gradient.take(present[present >= 0])
        return interpolate(self._lams, gradient, mixtures.lam)
