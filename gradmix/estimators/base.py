"""Base classes: scorers score mixtures by a reference gradient; estimators make that gradient, too.

An estimator is bound to a network and knows nothing of criteria's thresholds, of policies, or of what is kept between
steps. :func:`gradmix.estimators.resolve` makes one from what the user gave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, NamedTuple

import torch
from torch import Tensor, nn

from gradmix.class_table import ClassTable
from gradmix.criteria import PairScores, mean_by_class
from gradmix.labelled_samples import AnySamples, LabelledSamples
from gradmix.mixtures import Mixtures, Request
from gradmix.model.head import HeadLike
from gradmix.model.inputs import InputTree
from gradmix.model.unchanged import leave_unchanged, require_finite
from gradmix.ops.backends import check_backend
from gradmix.ops.labels import check_label_range, within_range
from gradmix.references import Reference, dtype_of
from gradmix.runtime.collectives import Group, check_group
from gradmix.runtime.deferred_checks import defer_checks
from gradmix.runtime.validation import check_count


@dataclass(frozen=True)
class Network:
    """The model in training, and how it is run.

    Attributes:
        model: the unwrapped model.
        head: the classifier layer, its name, or None: it is found.
        num_classes: C as the user gave it, or None.
        chunk_size: samples of one forward pass, at the most.
        backend: of the operators.
        group: processes that train it.
        shared_batch: whether all of them are given the same batch.
    """

    model: nn.Module
    head: HeadLike
    num_classes: int | None
    chunk_size: int
    backend: str
    group: Group = None
    shared_batch: bool = False

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_count("chunk_size", self.chunk_size)
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes)
        check_group(self.group)

    @property
    def batch_group(self) -> Group:
        """The processes that hold other parts of the batch."""
        return None if self.shared_batch else self.group

    def check_num_classes(self, found: int) -> None:
        """Raise ValueError unless the model's number of classes is the one given."""
        if self.num_classes is not None and self.num_classes != found:
            raise ValueError(f"num_classes: got {self.num_classes}, expected {found} as the model's logits, or None")


class PassSizes(NamedTuple):
    """Sizes of passes to come.

    Attributes:
        chunk_size: samples to take at a time.
        num_classes: C of the model.
    """

    chunk_size: int
    num_classes: int


@dataclass(frozen=True)
class Screening:
    """Counts of the decisions of the estimator ``sketch``.

    Attributes:
        screened: pairs of samples, or of classes, that were scored by sketches.
        rechecked: those in doubt that were then scored by forwarded mixtures.
        uncertain: those left in doubt, because the budget was spent.
    """

    screened: int
    rechecked: int
    uncertain: int


class Scorer(ABC, Generic[AnySamples]):
    """Scores mixtures by a reference gradient.

    Attributes:
        network: the model and how it is run.
        name: what errors call it.
        scores_itself: whether a sample mixed with itself is scored too, where the batch's samples are the candidates.
        is_pure: whether scores are a function of tensors, without a pass and without a wait, so that a CUDA graph can
            capture them.
    """

    scores_itself: ClassVar[bool] = True
    is_pure: ClassVar[bool] = False

    network: Network
    name: str

    @abstractmethod
    def sizes(self, x: InputTree) -> PassSizes:
        """Sizes of the passes of samples like ``x``."""

    def label(self, request: Request, lam: float) -> Mixtures[Any]:
        """The mixtures that are asked for, with checked labels; no pass is made.

        Raises:
            ValueError: a NaN or an infinity among the inputs, or a label beyond the model's classes.
        """
        chunk_size, num_classes = self.sizes(request.batch.x)
        given = {"batch": request.batch} | ({} if request.candidates is None else {"candidates": request.candidates})
        require_finite(0, **{name: samples.x for name, samples in given.items()})
        for name, samples in given.items():
            check_label_range(name, samples.y, num_classes)

        def held(samples: LabelledSamples) -> LabelledSamples:
            return replace(samples, y=within_range(samples.y, num_classes))

        candidates = None if request.candidates is None else held(request.candidates)
        return Mixtures(held(request.batch), candidates, lam, num_classes, chunk_size)

    @abstractmethod
    def see(self, request: Request, lam: float) -> Mixtures[AnySamples]:
        """As :meth:`label`, with what scores need of every sample."""

    def reference_of_marked(self, mixtures: Mixtures[AnySamples], marked: Tensor) -> Reference | None:
        """The gradient of the marked samples of the batch, over all processes; None where there is known to be none."""
        raise NotImplementedError(f"{type(self).__name__} makes no reference gradient")

    @abstractmethod
    def reference_norm(self, gradient: Any) -> Tensor:
        """() the norm of a reference gradient."""

    def score(self, mixtures: Mixtures[AnySamples], gradient: Any, pairs: Tensor | None) -> PairScores:
        """The scores (N, M) of pairs of samples.

        Args:
            mixtures: of :meth:`see`.
            gradient: the reference.
            pairs: (K, 2) int64, the pairs that matter; others may be left NaN. None: all.
        """
        raise NotImplementedError(f"{type(self).__name__} scores pairs of classes alone")

    def class_scores(self, mixtures: Mixtures[AnySamples], gradient: Any, pairs: Tensor | None) -> PairScores:
        """The scores (P, P) of pairs of classes: the means over the pairs of samples."""
        scores = self.score(mixtures, gradient, pairs)
        return mean_by_class(scores, mixtures.batch.y, mixtures.partners.y, mixtures.own, dtype_of(gradient))

    def recheck(
        self,
        scores: PairScores,
        mixtures: Mixtures[AnySamples],
        gradient: Any,
        pairs: Tensor | None,
        threshold: float,
        generator: torch.Generator,
    ) -> tuple[PairScores, Screening]:
        """Scores with standard errors again, better where a decision is in doubt, and how many decisions that were.

        Args:
            scores, mixtures, gradient, pairs: of :meth:`score` or :meth:`class_scores`.
            threshold: the cosine that decides.
            generator: draws samples of classes.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no standard errors")


class Estimator(Scorer[AnySamples]):
    """A scorer that makes its reference gradients and class tables, too.

    Attributes:
        full_network: whether gradients are those of all parameters; then checks read values at once, as passes are
            long. Else they are the last layer's, and on a GPU nothing waits.
        mixes_inputs: whether mixtures of inputs are forwarded, so that inputs must be of a floating-point dtype.
    """

    full_network: ClassVar[bool]
    mixes_inputs: ClassVar[bool] = True

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around one call: leave the model as it is, and raise what earlier calls on a GPU found."""
        model = self.network.model
        with nullcontext() if self.full_network else defer_checks(model), leave_unchanged(model):
            yield

    @abstractmethod
    def reference(self, buffer: object, x: InputTree, keep: int = 0) -> tuple[Reference | None, list[AnySamples]]:
        """The gradient of the buffer, None where it is empty; and the first ``keep`` samples of each class.

        Args:
            buffer: the source of samples.
            x: samples like those of the buffer: they tell the device and the sizes.
            keep: 0: none is kept.
        """

    @abstractmethod
    def as_reference(self, gradient: object) -> Reference:
        """A gradient that the user gives.

        Raises:
            TypeError: it is of another kind.
        """

    @abstractmethod
    def class_table(
        self,
        mixtures: Mixtures[AnySamples],
        gradient: Any,
        per_class: int,
        threshold: float,
        generator: torch.Generator,
    ) -> tuple[ClassTable, Screening | None]:
        """The alignment of all pairs of the samples' classes as a function of lam.

        Args:
            mixtures: of samples of the buffer and of the batch with each other, at any lam.
            gradient: the reference.
            per_class: samples of each class, or mixtures for each pair of classes.
            threshold: the cosine that decides.
            generator: draws the mixtures.
        """
