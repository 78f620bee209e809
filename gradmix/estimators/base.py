"""Base classes: a scorer scores mixtures by a reference gradient; an estimator also computes that gradient.

An estimator is bound to a network. It does not depend on the criterion, its threshold, the policy or what is kept
between steps. :func:`gradmix.estimators.resolve` makes one from the user's argument.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, NamedTuple

import torch
from torch import Tensor, nn

from gradmix.calibration.agreement import agree
from gradmix.class_table import ClassTable
from gradmix.criteria import PairScores, mean_by_class
from gradmix.labelled_samples import AnySamples, LabelledSamples
from gradmix.mixtures import Mixtures, Request, labels_dtype
from gradmix.model.head import CapturedOutput, HeadLike
from gradmix.model.inputs import InputTree
from gradmix.model.unchanged import device_of, disable_autograd, leave_unchanged, require_finite
from gradmix.ops.backends import check_backend
from gradmix.ops.labels import check_label_range, within_range
from gradmix.references import Reference, dtype_of
from gradmix.runtime.collectives import Group, check_group
from gradmix.runtime.cuda_graphs import Graphs
from gradmix.runtime.deferred_checks import compute_checks, defer_checks
from gradmix.runtime.validation import check_count


@dataclass(frozen=True)
class Network:
    """The model in training, with the settings of its forward passes.

    Attributes:
        model: the unwrapped model.
        head: the classifier layer, its name, or None: it is searched for.
        num_classes: C as given by the user, or None.
        chunk_size: largest number of samples of one forward pass.
        backend: of the operators.
        group: the processes that train the model.
        shared_batch: whether all of them receive the same batch.
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
        """The processes that hold the other parts of the batch."""
        return None if self.shared_batch else self.group

    def check_num_classes(self, found: int) -> None:
        """Raise ValueError if the user gave another number of classes than the model's, ``found``."""
        if self.num_classes is not None and self.num_classes != found:
            raise ValueError(f"num_classes: got {self.num_classes}, expected {found} as the model's logits, or None")


class PassSizes(NamedTuple):
    """Sizes of forward passes.

    Attributes:
        chunk_size: samples of one pass.
        num_classes: C of the model.
    """

    chunk_size: int
    num_classes: int


@dataclass(frozen=True)
class Screening:
    """Numbers of decisions of the estimator ``sketch``.

    Attributes:
        screened: pairs of samples, or of classes, that were scored by sketches.
        rechecked: pairs in doubt that were then scored by forwarded mixtures.
        uncertain: pairs that remain in doubt, because the budget was spent.
    """

    screened: int
    rechecked: int
    uncertain: int


class Scorer(ABC, Generic[AnySamples]):
    """Scores mixtures by a reference gradient.

    Attributes:
        network: the model and the settings of its passes.
        name: its name in errors.
        scores_itself: whether a sample mixed with itself is scored too, if the candidates are the batch itself.
        is_pure: whether scores are a function of tensors, without a forward pass or a wait of the host, so that a CUDA
            graph can capture them.
    """

    scores_itself: ClassVar[bool] = True
    is_pure: ClassVar[bool] = False

    network: Network
    name: str

    @abstractmethod
    def sizes(self, x: InputTree) -> PassSizes:
        """Return the sizes of passes over samples like ``x``."""

    def prepare_labels(self, request: Request, lam: float) -> Mixtures[Any]:
        """Return the mixtures of a request, with checked labels; no pass is made.

        Raises:
            ValueError: a NaN or an infinity among the inputs, or a label beyond the model's classes.
        """
        chunk_size, num_classes = self.sizes(request.batch.x)
        given = {"batch": request.batch} | ({} if request.candidates is None else {"candidates": request.candidates})
        require_finite(0, **{name: samples.x for name, samples in given.items()})
        for name, samples in given.items():
            check_label_range(name, samples.y, num_classes)

        def clamp_labels(samples: LabelledSamples) -> LabelledSamples:
            return replace(samples, y=within_range(samples.y, num_classes))

        candidates = None if request.candidates is None else clamp_labels(request.candidates)
        weights = labels_dtype(request.batch.x)
        return Mixtures(clamp_labels(request.batch), candidates, lam, num_classes, chunk_size, weights)

    @abstractmethod
    def prepare(self, request: Request, lam: float) -> Mixtures[AnySamples]:
        """Return the mixtures of a request, with checked labels and all that scores need; passes may be made."""

    def reference_of_marked(self, mixtures: Mixtures[AnySamples], marked: Tensor) -> Reference | None:
        """Return the mean gradient of the marked samples of all processes; None if it is known that there are none."""
        raise NotImplementedError(f"{type(self).__name__} makes no reference gradient")

    @abstractmethod
    def reference_norm(self, gradient: Any) -> Tensor:
        """Return the norm () of a reference gradient."""

    def score(
        self, mixtures: Mixtures[AnySamples], gradient: Any, pairs: Tensor | None, norms: bool = True
    ) -> PairScores:
        """Return the scores (N, M) of pairs of samples.

        Args:
            mixtures: as :meth:`prepare` returns them.
            gradient: the reference.
            pairs: (K, 2) int64, the pairs that are needed; others may be left NaN. None: all.
            norms: whether norms are needed; without, an estimator may leave them out.
        """
        raise NotImplementedError(f"{type(self).__name__} scores pairs of classes alone")

    def class_scores(self, mixtures: Mixtures[AnySamples], gradient: Any, pairs: Tensor | None) -> PairScores:
        """Return the scores (P, P) of pairs of classes: the means over the pairs of samples."""
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
        """Recompute scores with standard errors where a decision is in doubt, and count these decisions.

        Args:
            scores: as :meth:`score` or :meth:`class_scores` returns them.
            mixtures, gradient, pairs: the arguments of that call.
            threshold: the cosine that decides.
            generator: draws samples of classes.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no standard errors")


class Estimator(Scorer[AnySamples]):
    """A scorer that also computes reference gradients and class tables.

    Attributes:
        full_network: whether gradients are those of all parameters; checks then read values at once, as passes take
            long. Else gradients are the last layer's, and on a GPU the host waits for nothing.
        mixes_inputs: whether mixtures of inputs are forwarded, so that inputs must have a floating-point dtype.
    """

    full_network: ClassVar[bool]
    mixes_inputs: ClassVar[bool] = True

    @contextmanager
    def guard(self, passes: bool = True, graphs: Graphs | None = None) -> Iterator[None]:
        """Leave the model unchanged during one call, and raise what the checks of earlier calls on a GPU found.

        Args:
            passes: whether the model may be called; if not, nothing of it has to be restored.
            graphs: captures the checks; None: they are calls.
        """
        model, group = self.network.model, self.network.group
        if group is not None:
            agree(group, device_of(model))
        checks = nullcontext() if self.full_network else defer_checks(model, graphs)
        with checks, leave_unchanged(model) if passes else disable_autograd():
            yield
            compute_checks()  # before what they are of is restored

    def needs_passes(self, candidates: object, outputs: object, reads_buffer: bool) -> bool:
        """Whether a selection may call the model.

        Args:
            candidates: other samples than the batch, or None.
            outputs: of a pass of the batch made before, or None.
            reads_buffer: whether the reference gradient is that of a buffer.
        """
        captured = isinstance(outputs, CapturedOutput) and candidates is None
        return self.mixes_inputs or reads_buffer or not captured

    @abstractmethod
    def reference(self, buffer: object, x: InputTree, keep: int = 0) -> tuple[Reference | None, list[AnySamples]]:
        """Return the mean gradient of the buffer, None if it is empty; and the first ``keep`` samples of each class.

        Args:
            buffer: the source of samples.
            x: samples like those of the buffer, which determine the device and the sizes.
            keep: number of samples of each class; 0: none.
        """

    @abstractmethod
    def as_reference(self, gradient: object) -> Reference:
        """Return a gradient that the user gives as a reference.

        Raises:
            TypeError: it is no gradient of this estimator.
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
        """Return the alignment of all pairs of the samples' classes as a function of lam.

        Args:
            mixtures: of samples of the buffer and of the batch with each other; their lam is not used.
            gradient: the reference.
            per_class: samples of each class, or mixtures for each pair of classes.
            threshold: the cosine that decides.
            generator: draws the mixtures.
        """

    def extend_table(self, table: ClassTable, samples: AnySamples, gradient: Any) -> ClassTable:
        """Return a table that has its ``samples`` with those classes of other samples that it does not contain.

        Args:
            table: of :meth:`class_table`.
            samples: some of unknown classes.
            gradient: the table's reference.
        """
        raise NotImplementedError(f"{type(self).__name__} makes tables anew")
