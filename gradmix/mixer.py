"""Selective Mixup for a training loop: :class:`GradMix` keeps results of a selection between steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from gradmix.captured_selection import MeasuredGraphs
from gradmix.class_table import ClassTable
from gradmix.criteria import Criterion, class_index
from gradmix.draw import Policy
from gradmix.estimators import EstimatorLike, Network, Screening, TableLookup, resolve
from gradmix.estimators.full_network import FullGradient
from gradmix.labelled_samples import concatenate_samples
from gradmix.mixing_weight import draw_lam
from gradmix.mixtures import Mixtures, Request, labels_dtype
from gradmix.model.head import HeadOutput
from gradmix.model.inputs import InputTree
from gradmix.model.unchanged import unwrap
from gradmix.ops.backends import get_backend
from gradmix.ops.labels import class_of, dense_labels
from gradmix.ops.mixed_alignment import check_lam
from gradmix.pairs import Pairs
from gradmix.references import Reference, name_shapes_of_buffer, none_if_empty
from gradmix.replay.sources import CHUNK, SampleSource, has_samples
from gradmix.runtime.collectives import Group, any_rank, broadcast
from gradmix.runtime.cuda_graphs import Graphs
from gradmix.runtime.deferred_checks import can_sync, check_samples, raise_deferred
from gradmix.runtime.random import default_generator
from gradmix.runtime.validation import check_count
from gradmix.runtime.workers import refuse_worker
from gradmix.selection import check_request, check_weight, select
from gradmix.selector import Rule, Selector

Shapes: TypeAlias = dict[str, list[int]]
"""Parameters' shapes by name."""


class GradMix:
    """Selective Mixup for a training loop, called like torchvision's and timm's Mixup.

    ::

        mixup = gradmix.GradMix(model, buffer, alpha=1.0)
        for x, y in loader:  # replayed samples among them
            x, y = mixup(x, y)
            loss = F.cross_entropy(model(x), y)

    It keeps the reference gradient between steps and, with the criterion ``class``, the table of class pairs. Both are
    computed anew

    - when they are ``refresh`` calls old;
    - when the buffer has been filled for the first time;
    - when a parameter of the model is new, gone, or of another shape, as in a classifier that grows (for estimators
      over all parameters: also when one has been frozen or unfrozen);
    - with the criterion ``class``, when a batch holds a class that the table does not contain, and the table is of all
      pairs of its samples. One that takes some pairs of each pair of classes, as of many classes the estimator
      ``feature`` does, gets a row and a column for the class instead.

    The class table is computed from samples of the buffer and of the present batch. It holds the alignment as a
    function of lam, because it is used in steps with different lam.

    On a GPU no call waits for the device (estimators ``feature`` and ``mixed``, between refreshes). The next call
    raises the errors that a check finds (:mod:`gradmix.runtime.deferred_checks`). Samples of a class that the table
    does not contain stay unmixed in that step, and the next step completes the table. Reading a buffer on the host,
    and computing a class table, do wait.

    Call it in the training loop, not in a ``collate_fn`` or a data set that worker processes run: their copy of the
    model is not trained.

    Args:
        model, criterion, estimator, alpha, threshold, policy, head, num_classes, generator, backend, chunk_size: as
            :func:`select_pairs`.
        buffer: as :func:`select_pairs`; read at every refresh, so that it may change in between. None: there is no
            buffer, and every call marks the replayed samples of its batch.
        refresh: steps between two refreshes, an integer >= 1; or ``"epoch"``: after :meth:`start_epoch` only.
        class_samples: samples of each class for the class table (estimators ``mixed`` and ``jvp``: mixtures for each
            pair of classes).
        cuda_graph: on a GPU, capture the selection after the samples' forward pass, and its checks, in a CUDA graph
            when a shape of batch comes for the second time; the host then starts them by one launch. Elsewhere without
            effect. For the estimator ``feature``, and with the criterion ``class`` for all of them. Same
            results. ``"auto"``: where ``gradmix calibrate`` found on this device that this is faster, and the same.
        group: a process group of ``torch.distributed`` whose processes train one model: all hold the same buffer and
            make the same calls, each with a batch of its own. Each forwards its share of the buffer. All keep the same
            reference gradient, to the bit, and the same class table, computed from the samples of the buffer and of all
            processes' batches in the order of the ranks, as one process would compute it from the whole batch. With the
            criterion ``class`` every call asks all processes whether one of them has found an unknown class. If a
            process fails, the others wait (:mod:`gradmix.runtime.collectives`).
        shared_batch: whether every process of the group receives the same, whole batch, as when the outputs of its
            parts have been gathered before; the decisions are then the same if the generators have the same state.

    Attributes:
        mixup_enabled: whether a call mixes. If False, as training loops with timm's Mixup set it for the last epochs, a
            call returns its inputs unchanged, and label vectors; :meth:`select` does not read it.
        reference: the reference gradient, (C, d + 1) or by parameter name; None before the first call and while the
            buffer is empty.
        table: the class table (:class:`gradmix.ClassTable`), or None.
        pairs: the last :class:`gradmix.Pairs`, or None.
        screening: None, or for the estimator ``sketch`` with the criterion ``class`` the counts of the table's
            decisions.
        refreshes: number of times that the reference gradient was computed.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`select_pairs`.
    """

    def __init__(
        self,
        model: nn.Module,
        buffer: SampleSource | None,
        *,
        criterion: Criterion = "sample",
        estimator: EstimatorLike = "feature",
        alpha: float = 1.0,
        threshold: float = 0.0,
        policy: Policy = "uniform",
        refresh: int | Literal["epoch"] = 1,
        class_samples: int = 32,
        head: nn.Module | str | None = None,
        num_classes: int | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
        chunk_size: int = CHUNK,
        cuda_graph: bool | Literal["auto"] = "auto",
        group: Group = None,
        shared_batch: bool = False,
    ) -> None:
        network = Network(unwrap(model), head, num_classes, chunk_size, backend, group, shared_batch)
        self._estimator, self._rule = resolve(estimator, network), Rule(criterion, threshold, policy)
        check_weight(alpha, None)
        self._alpha = alpha
        if not isinstance(cuda_graph, bool) and cuda_graph != "auto":
            raise TypeError(f"cuda_graph: got {cuda_graph!r}, expected True, False or 'auto'")
        if cuda_graph is True and criterion == "sample" and estimator != "feature":
            raise ValueError(
                f"cuda_graph: got True with the estimator {estimator!r} by sample, expected 'feature', or by class "
                "any of them; passes of mixed inputs are not captured"
            )
        self._graphs: Graphs | None = None
        if cuda_graph is True:
            self._graphs = Graphs(get_backend)
        elif cuda_graph == "auto" and backend == "auto":
            self._graphs = MeasuredGraphs()
        if refresh != "epoch":
            check_count("refresh", refresh, other=" or 'epoch'")
        check_count("class_samples", class_samples)
        self._model, self._buffer = network.model, buffer
        self._refresh, self._class_samples = refresh, class_samples
        self._generator = generator
        self.mixup_enabled = True
        self.reference: Tensor | FullGradient | None = None
        self.table: ClassTable | None = None
        self.pairs: Pairs | None = None
        self.screening: Screening | None = None
        self.refreshes = 0
        self._age = 0
        self._stale = True
        self._incomplete = False
        self._shapes: Shapes | None = None

    @property
    def _source(self) -> torch.Generator:
        """The given generator, or the library's present one, which ``torch.manual_seed`` replaces."""
        return default_generator() if self._generator is None else self._generator

    def __call__(self, x: InputTree, y: Tensor, *, replayed: Tensor | None = None) -> tuple[Any, Tensor]:
        """Return mixed inputs (N, ...) and label vectors (N, C) for a batch x (N, ...), y (N,) or (N, C).

        With ``mixup_enabled`` False the inputs are returned unchanged, with their label vectors.
        """
        if self.mixup_enabled:
            return self.select(x, y, replayed=replayed).mix()
        refuse_worker("GradMix")
        with self._estimator.guard():
            request = check_request(self._estimator, (x, y), None, None, ("replayed", None))
            mixtures = self._estimator.prepare_labels(request, 1.0)
        return x, dense_labels(mixtures.batch.y, mixtures.num_classes, labels_dtype(request.batch.x))

    def select(
        self,
        x: InputTree,
        y: Tensor,
        *,
        candidates: tuple[InputTree, Tensor] | None = None,
        lam: float | None = None,
        outputs: HeadOutput | tuple[Tensor, Tensor] | None = None,
        replayed: Tensor | None = None,
    ) -> Pairs:
        """Select the pairs of a batch.

        Args:
            x, y: the batch.
            candidates, lam, outputs: as :func:`select_pairs`.
            replayed: (N,) bool, which marks the replayed samples of the batch. Their mean gradient is then the
                reference of this call in place of the buffer's, which is not read. With the criterion ``sample``,
                results kept between steps are neither used nor changed. With ``class``, the table is refreshed as
                usual; its reference is the marked samples' gradient, and it is computed from the given samples alone.

        Raises:
            ValueError, TypeError: as :func:`select_pairs`; or ``replayed`` is None and there is no buffer.
        """
        refuse_worker("GradMix")
        if lam is not None:
            check_lam(lam)
        if replayed is None and self._buffer is None:
            raise ValueError(
                "replayed: got None, expected (N,) bool, which marks replayed samples, as there is no buffer"
            )
        # With the criterion ``sample`` the gradient of marked samples is for this call alone.
        once = replayed is not None and self._rule.criterion == "sample"
        passes = self._estimator.needs_passes(candidates, outputs, reads_buffer=not once)
        with self._estimator.guard(passes, self._graphs):
            request = check_request(self._estimator, (x, y), candidates, outputs, ("replayed", replayed))
            buffer = self._buffer if request.marked is None else None
            with name_shapes_of_buffer(buffer, request.batch.x):
                if not once:
                    if self._is_due(request):
                        self._refresh_kept(request)
                    elif self._incomplete:
                        self._extend_table(request)
                    request = replace(request, marked=None)
                lam = draw_lam(self._alpha, self._source) if lam is None else float(lam)
                selector, known = (Selector(self._estimator, self._rule), None) if once else self._selector()
                self.pairs = select(selector, request, known, lam, self._source, self._graphs)
        self._age += 1
        return self.pairs

    def _selector(self) -> tuple[Selector, Reference | None]:
        """Return the selector between refreshes and its reference: the class table, else the estimator."""
        if self.table is not None:
            lookup = TableLookup(self._estimator, self.table.lams)
            return Selector(lookup, self._rule), Reference(self.table.tensors())
        known = None if self.reference is None else Reference(self.reference)
        return Selector(self._estimator, self._rule), known

    def start_epoch(self) -> None:
        """Make the next call compute everything anew."""
        self._stale = True

    def _is_due(self, request: Request) -> bool:
        """Whether the reference gradient and the class table must be computed anew."""
        if self._stale or (self._refresh != "epoch" and self._age >= self._refresh):
            return True
        if self._shapes != self._shapes_now():
            return True
        if self.reference is None:
            if request.marked is None:
                return has_samples(self._buffer)
            return self._any_set(request.marked, GradMix.start_epoch)
        if self.table is None:
            return False
        labels = [class_of(samples.y) for samples in (request.batch, request.candidates) if samples is not None]
        unknown = torch.cat([class_index(self.table.classes, label) < 0 for label in labels])
        if self.table.samples is None:
            return self._any_set(unknown, GradMix.start_epoch)
        if not self._incomplete and self._any_set(unknown, GradMix._require_classes):
            self._require_classes()
        return False

    def _require_classes(self) -> None:
        """Make this call, or the next, add the unknown classes of its samples to the class table."""
        self._incomplete = True

    def _any_set(self, flags: Tensor, then: Callable[[GradMix], None]) -> bool:
        """Whether any of ``flags`` (K,) is set in any process; where the host may not wait, False; ``then`` follows."""
        group = self._estimator.network.group
        if group is not None:
            flags = any_rank(flags, group)
        if can_sync(flags.device) or self._estimator.full_network:
            return bool(flags.any())
        # By a weak reference: a pending check must not keep this object alive.
        reference = weakref.ref(self)

        def act(_sample: int) -> None:
            mixup = reference()
            if mixup is not None:
                then(mixup)

        check_samples(flags, act)
        return False

    def _shapes_now(self) -> Shapes:
        """Return the shapes of the parameters with which the kept gradient must agree."""
        frozen_count = not self._estimator.full_network
        parameters = self._model.named_parameters()
        return {name: list(p.shape) for name, p in parameters if p.requires_grad or frozen_count}

    def _refresh_kept(self, request: Request) -> None:
        """Compute the kept results anew; if the model raises, the former ones stay."""
        estimator, by_class = self._estimator, self._rule.criterion == "class"
        reference: Reference | None = None
        samples: list[Any] = []
        table = screening = None
        if request.marked is None:
            keep = self._class_samples if by_class else 0
            reference, samples = estimator.reference(self._buffer, request.batch.x, keep)
        if by_class and (reference is not None or request.marked is not None):
            mixtures = estimator.prepare(request, 1.0)
            if request.marked is not None:
                reference = none_if_empty(estimator.reference_of_marked(mixtures, request.marked))
            if reference is not None:
                table, screening = self._class_table(mixtures, samples, reference)
        self.reference = None if reference is None else reference.gradient
        self.table, self.screening = table, screening
        self._age, self._stale, self._incomplete, self._shapes = 0, False, False, self._shapes_now()
        self.refreshes += 1

    def _extend_table(self, request: Request) -> None:
        """Add the unknown classes of the batch and the candidates to the class table."""
        mixtures = self._estimator.prepare(request, 1.0)
        assert self.table is not None and self.reference is not None
        everything = concatenate_samples(self._gather(mixtures), mixtures.num_classes)
        table = self._estimator.extend_table(self.table, everything, self.reference)
        self.table = table.of_first_process(self._estimator.network.group)
        self._incomplete = False

    def _gather(self, mixtures: Mixtures[Any]) -> list[Any]:
        """Return the samples of the batches, and of the candidates, of all processes."""
        given = [mixtures.batch] if mixtures.candidates is None else [mixtures.batch, mixtures.candidates]
        if not self._estimator.mixes_inputs:
            given = [part.without_inputs() for part in given]
        return [part.gather(self._estimator.network.batch_group) for part in given]

    def _class_table(
        self, mixtures: Mixtures[Any], samples: list[Any], reference: Reference
    ) -> tuple[ClassTable, Screening | None]:
        """Return the class table of the buffer's ``samples`` and of the mixtures', the same in all processes."""
        estimator, network = self._estimator, self._estimator.network
        everything = concatenate_samples([*samples, *self._gather(mixtures)], mixtures.num_classes)
        table, screening = estimator.class_table(
            replace(mixtures, batch=everything, candidates=None),
            reference.gradient,
            self._class_samples,
            self._rule.threshold,
            self._source,
        )
        if screening is not None:
            counts = torch.tensor(astuple(screening), device=table.inner.device)
            screening = Screening(*broadcast([counts], network.group)[0].tolist())
        return table.of_first_process(network.group), screening

    def state_dict(self) -> dict[str, Any]:
        """Return the results kept between steps, tensors and numbers; loads with ``torch.load(weights_only=True)``.

        Raises:
            ValueError: a check of an earlier call on a GPU has found a wrong value.
        """
        # Whether the table must be computed anew may still be pending on the GPU.
        raise_deferred(self._model)
        return {
            "reference": self.reference,
            "table": None if self.table is None else self.table.state_dict(),
            "age": self._age,
            "stale": self._stale,
            "shapes": self._shapes,
            "refreshes": self.refreshes,
            "generator": self._source.get_state(),
        } | ({"incomplete": True} if self._incomplete else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of :meth:`state_dict`.

        Raises:
            ValueError: a key is missing or unknown; the object is then unchanged.
        """
        expected = {"reference", "table", "age", "stale", "refreshes", "generator", "shapes"}
        if {"shapes", *state} - {"incomplete"} != expected:
            raise ValueError(f"state: got the keys {sorted(state)}, expected {sorted(expected)}")
        made = None if state["table"] is None else ClassTable.from_state(state["table"])
        self._source.set_state(state["generator"])
        self.reference, self.table = state["reference"], made
        self._age, self._stale, self.refreshes = state["age"], state["stale"], state["refreshes"]
        self._incomplete = state.get("incomplete", False)
        # A state of an earlier version has no shapes, and is assumed to be of a model with the present ones.
        self._shapes = state.get("shapes", self._shapes_now())
