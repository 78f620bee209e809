"""Which rows may be mixed with which: :func:`select_pairs` for one call, :class:`GradMix` for a training loop.

A mixture is allowed if its gradient does not point against the gradient of the replay buffer
(:mod:`gradmix.alignment`); each row is then given one allowed partner, or stays as it is.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from gradmix.alignment import (
    Alignment,
    ClassTable,
    Criterion,
    Estimator,
    Rows,
    agreed,
    as_estimator,
    bare_rows,
    buffer_rows,
    check_choice,
    check_mixable,
    check_one_mask,
    checked_rows,
    class_index,
    class_table,
    classes_of,
    concatenate,
    feature_alignment,
    forward_all,
    gathered,
    judge,
    marked_reference,
    mixed_input_alignment,
    pair_alignment,
    read_buffer,
    refuse_worker,
    sketched_cells,
    whole_alignment,
    whole_class_table,
)
from gradmix.checks import check_count
from gradmix.estimators import (
    Extent,
    Screening,
    SketchEstimator,
    WholeEstimator,
    WholeReference,
    check_whole_reference,
    extent_of,
    jvp_alignment,
    recheck,
    reference_norm,
    whole_reference,
)
from gradmix.graphs import Graphs, Inputs, call, sent
from gradmix.head import HeadOutput, given_outputs, resolve_head
from gradmix.inputs import (
    InputTree,
    check_alike,
    check_inputs,
    first_tensor,
    floating_dtype,
    map_tensors,
    mix_samples,
    take,
)
from gradmix.mixing import check_alpha, default_generator, draw_lam
from gradmix.ops.backends import check_backend
from gradmix.ops.draw_partners import DrawnPartners, draw_partners
from gradmix.ops.dtypes import exact_dtype, work_dtype
from gradmix.ops.labels import as_class_indices, check_label_range, class_of, dense_labels, within_range
from gradmix.ops.mixed_alignment import Weight, check_lam, check_reference
from gradmix.ops.waiting import later, look_is_free, require, settle
from gradmix.probe import require_finite, untouched, unwrap
from gradmix.processes import Group, any_over, as_the_first, check_group
from gradmix.refusals import refusing_by_name
from gradmix.replay.sources import CHUNK, as_pair
from gradmix.replay.sources import SampleSource as RowSource
from gradmix.replay.sources import has_samples as has_rows

Policy = Literal["uniform", "permute", "best"]

Shapes: TypeAlias = dict[str, list[int]]
"""Parameters' shapes by name."""

Batch: TypeAlias = tuple[Any, Tensor]
"""Checked rows: x, a tree of tensors (N, ...), and y, (N,) int64 or (N, C) label vectors."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """The partner chosen for each of N rows among M candidates.

    Attributes:
        partner: (N,) int64, index of the candidate; the row's own index, or 0 among foreign candidates, where it has
            none.
        lam: (N,) weight of the row itself; 1 where it has no partner.
        helpful: (N,) bool, whether the row has a partner.
        alignment: cosines of the mixtures' gradients with the reference gradient: (N, M), or (P, P) by class; NaN where
            a mixture was not evaluated, 0 throughout while the buffer is empty.
        classes: None, or (P,) int64 class labels of ``alignment``.
        num_classes: width of the mixed labels.
        screening: None, or for the estimator ``sketch`` how many pairs were judged by sketches, how many of them again
            by mixed inputs, and how many are in doubt (:class:`gradmix.estimators.Screening`).
    """

    partner: Tensor
    lam: Tensor
    helpful: Tensor
    num_classes: int
    _judged: Alignment = field(repr=False)
    _batch: Batch = field(repr=False)
    _candidates: Batch | None = field(repr=False)
    screening: Screening | None = None

    @cached_property
    def _seen(self) -> Alignment:
        # How many classes there are is not known before somebody asks, as a GPU would have to be waited for.
        return self._judged.compact()

    @property
    def alignment(self) -> Tensor:
        """(N, M), or (P, P) by class."""
        return self._seen.cosine

    @property
    def classes(self) -> Tensor | None:
        """None, or (P,) int64 in ascending order."""
        return self._seen.classes

    def __len__(self) -> int:
        return len(self.partner)

    def by_row(self, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
        """What was judged, row by row, also where it was judged by class.

        Args:
            threshold: smallest cosine of a helpful mixture.

        Returns:
            (N, M) bool, whether the mixture of row i and candidate j is helpful; and (N, M), its cosine or that of its
            classes, NaN where none was evaluated.
        """
        other_y = (self._batch if self._candidates is None else self._candidates)[1]
        return _decisions(self._judged, self._batch[1], other_y, threshold)

    def mix(self, x: InputTree | None = None, y: Tensor | None = None) -> tuple[Any, Tensor]:
        """The mixed rows: lam x_i + (1 - lam) x_partner, and their labels likewise.

        Of a mapping, tuple or list of tensors those of a floating-point dtype are mixed; the others have to be the same
        for a row and its partner, and stay.

        Args:
            x: (N, ...) to mix in place of the inputs that were selected on, for instance normalised ones or embeddings;
                where partners came from other candidates, those keep theirs, so the shapes must agree.
            y: (N,) or (N, C) in place of their labels.

        Returns:
            x (N, ...) of the input's dtype, a mapping as a dict; y (N, num_classes) label vectors, float64 for float64
            inputs, else float32.

        Raises:
            TypeError: inputs that cannot be mixed, such as token ids; see :func:`gradmix.mixed_forward`.
            ValueError: a wrong number of rows, or shapes that do not fit.
        """
        own_x, own_y = self._inputs(x, y)
        other_x, other_y = (own_x, own_y) if self._candidates is None else self._candidates
        if self._candidates is not None and floating_dtype(own_x) is not None:
            check_alike("x", own_x, other_x, "the candidates")
        mixed = mix_samples(own_x, take(other_x, self.partner), self.lam)
        return mixed, self._mixed_labels(own_y, other_y, _labels_dtype(own_x))

    def mix_labels(self, y: Tensor | None = None) -> Tensor:
        """The labels of the mixed rows, for inputs that are mixed elsewhere (:func:`gradmix.mixed_forward`).

        Args:
            y: (N,) or (N, C) in place of the labels that were selected on, as in :meth:`mix`.

        Returns:
            (N, num_classes) label vectors, float64 for float64 inputs, else float32.

        Raises:
            ValueError: a wrong number of rows.
        """
        own_x, own_y = self._inputs(None, y)
        other_y = own_y if self._candidates is None else self._candidates[1]
        return self._mixed_labels(own_y, other_y, _labels_dtype(own_x))

    def other_x(self, x: InputTree | None = None) -> Any:
        """Every row's partner, (N, ...), unmixed; a row without one has itself, or among candidates the first of them.

        Args:
            x: (N, ...) in place of the inputs that were selected on, where partners are of the batch's own rows.

        Raises:
            ValueError: a wrong number of rows, or rows given though partners came from other candidates.
        """
        if self._candidates is None:
            return take(self._inputs(x, None)[0], self.partner)
        if x is not None:
            count = check_inputs("x", x)
            raise ValueError(f"x: got {count} rows, expected None, as partners are among the candidates")
        return take(self._candidates[0], self.partner)

    def _mixed_labels(self, own_y: Tensor, other_y: Tensor, dtype: torch.dtype) -> Tensor:
        weight = self.lam.to(dtype)[:, None]
        labels = weight * dense_labels(own_y, self.num_classes, dtype)
        return labels + (1 - weight) * dense_labels(other_y, self.num_classes, dtype)[self.partner]

    def as_tuple(self) -> tuple[Any, Tensor, Tensor, Tensor]:
        """``(x, y_a, y_b, lam)``: mixed inputs, both labels and lam (N,): loss = lam CE(y_a) + (1 - lam) CE(y_b)."""
        _, y = self._batch
        other_y = y if self._candidates is None else self._candidates[1]
        return self.mix()[0], y, other_y[self.partner], self.lam

    def summary(self) -> dict[str, float]:
        """Plain figures: ``rows``, ``mixed`` rows, their ``mixed_share``, the mixed rows' ``lam``, and of the evaluated
        mixtures (or class pairs) the ``positive_share`` with a non-negative cosine and the ``mean_cosine``; for the
        estimator ``sketch`` the numbers ``screened``, ``rechecked`` and ``uncertain``.
        """
        mixed = int(self.helpful.sum())
        known = self.alignment[~torch.isnan(self.alignment)]
        return {
            **({} if self.screening is None else asdict(self.screening)),
            "rows": len(self),
            "mixed": mixed,
            "mixed_share": mixed / len(self),
            "lam": float(self.lam[self.helpful][0]) if mixed else 1.0,
            "positive_share": float((known >= 0).double().mean()),
            "mean_cosine": float(known.double().mean()),
        }

    def _inputs(self, x: InputTree | None, y: Tensor | None) -> Batch:
        x = self._batch[0] if x is None else x
        y = self._batch[1] if y is None else as_class_indices("y", y)
        for name, count in (("x", check_inputs("x", x)), ("y", check_inputs("y", y))):
            if count != len(self):
                raise ValueError(f"{name}: got {count} rows, expected the {len(self)} that pairs were selected for")
        return x, y


def _labels_dtype(x: InputTree) -> torch.dtype:
    """Of mixed labels and weights: float64 for float64 inputs, else float32."""
    return work_dtype(floating_dtype(x) or torch.float32)


@dataclass(frozen=True)
class _Settings:
    """The checked keyword arguments that :func:`select_pairs` and :class:`GradMix` share."""

    criterion: Criterion
    estimator: Estimator | WholeEstimator
    alpha: float
    threshold: float
    policy: Policy
    head: nn.Module | str | None
    num_classes: int | None
    backend: str
    chunk_size: int
    group: Group = None
    shared_batch: bool = False

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, get_args(Criterion))
        as_estimator(self.estimator)
        check_choice("policy", self.policy, get_args(Policy))
        check_alpha(self.alpha)
        check_backend(self.backend)
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise TypeError(f"threshold: got {type(self.threshold).__name__}, expected a cosine in [-1, 1]")
        if not -1.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold: got {self.threshold}, expected a cosine in [-1, 1]")
        check_count("chunk_size", self.chunk_size)
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes)
        check_group(self.group)

    @property
    def batch_group(self) -> Group:
        """The processes that hold the batch's other rows."""
        return None if self.shared_batch else self.group

    @property
    def whole(self) -> WholeEstimator | None:
        """The estimator over all parameters, if it is one."""
        kind = as_estimator(self.estimator)
        return None if isinstance(kind, str) else kind

    @property
    def last_layer(self) -> str:
        """The name of the estimator over the last layer."""
        kind = as_estimator(self.estimator)
        assert isinstance(kind, str)
        return kind


def select_pairs(
    model: nn.Module,
    buffer: RowSource | Tensor,
    batch: tuple[InputTree, Tensor],
    *,
    candidates: tuple[InputTree, Tensor] | None = None,
    criterion: Criterion = "sample",
    estimator: Estimator | WholeEstimator = "feature",
    alpha: float = 1.0,
    lam: float | None = None,
    threshold: float = 0.0,
    policy: Policy = "uniform",
    head: nn.Module | str | None = None,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    reference: Tensor | WholeReference | None = None,
    outputs: HeadOutput | tuple[Tensor, Tensor] | None = None,
    chunk_size: int = CHUNK,
    group: Group = None,
) -> Pairs:
    """Choose for each row a partner with which it may be mixed without harm to the replay buffer.

    One mixing weight serves the call. A mixture is helpful if the cosine of its last-layer gradient with the reference
    gradient is at least ``threshold`` (see :mod:`gradmix.alignment`). A row without a helpful partner stays unmixed:
    its lam is 1. With an empty buffer every mixture counts as helpful, which is plain Mixup. The model, the tensors
    given, autograd's state and the global random generators are left as they were, also if the model raises.

    Args:
        model: the classifier in training; returns logits (N, C), or an object that holds them as ``.logits``.
        buffer: the replay buffer: a ReplayBuffer, an ``(x, y)`` pair of tensors or arrays, a Dataset, a DataLoader, any
            object of rows ``(x, y)`` with ``__len__`` and ``__getitem__`` (a list of rows), or a function that returns
            one of these, called at every read (:mod:`gradmix.rows`). Or (N,) bool, which of the batch's own rows are
            replayed ones: the reference gradient is then their mean, from the outputs at hand, and no buffer is
            forwarded. If no row is marked, that is an empty buffer.
        batch: the rows to mix, replayed rows among them: x (N, ...) and y, (N,) integer class indices or (N, C) label
            vectors. x is a tensor, or a mapping, tuple or list of tensors with one N, which the model is given by
            keyword or position if its ``forward`` takes them so, else as it is. Estimators that mix inputs mix those of
            a floating-point dtype; of the others, such as token ids, a row must have the same as its partner. The
            estimator ``feature`` takes any x that the model takes.
        candidates: where partners may come from, (x, y) of M rows; None: the batch's own rows, a row not being its own
            partner.
        criterion: ``"sample"``: every pair is judged by itself; ``"class"``, as in the paper: pairs of classes, by the
            mean over the rows at hand.
        estimator: for the last layer's gradient ``"feature"``: rows are mixed at the head's input; ``"mixed"``: mixed
            inputs are forwarded, all N x M of them, or with policy ``permute`` only the N drawn. For the gradient with
            respect to all parameters ``"jvp"``: likewise, exactly; ``"sketch"``: sketched gradients of the rows are
            mixed, and the decisions in doubt checked again by mixed inputs, up to a budget. Settings of these two are
            given as :class:`gradmix.JvpEstimator` or :class:`gradmix.SketchEstimator`.
        alpha: lam is drawn from Beta(alpha, alpha).
        lam: the weight of the row itself, in [0, 1], in place of a drawn one.
        threshold: smallest cosine of a helpful mixture; 0 is an angle of 90 degrees.
        policy: ``"uniform"``: a random one of the helpful partners; ``"permute"``: one random partner, as Mixup draws
            it, kept if helpful; ``"best"``: the largest cosine, ties broken at random, which forgets less and learns
            less, and is only for reference gradients of the very step (REPRODUCIBILITY.md).
        head: the classifier layer, or its name; None: found by itself (the linear layer whose output is the model's).
        num_classes: width of the mixed labels; None: the head's.
        generator: source of all randomness; same state, same result. None: a generator of the library's own, seeded by
            ``torch.initial_seed()``, which starts again with every call of ``torch.manual_seed``.
        backend: of the operator ``mixed_alignment``.
        reference: a reference gradient computed before (:func:`reference_gradient`; for ``jvp`` and ``sketch``
            :func:`gradmix.gradients.mean_gradient`), in place of a pass over the buffer.
        outputs: features (N, d) and logits (N, C) of the batch from a forward pass that was made anyway
            (:class:`gradmix.HeadCapture`), in place of one made here; of no use to ``jvp`` and ``sketch``.
        chunk_size: rows forwarded at a time.
        group: processes that share the reference gradient, each with a batch of its own, as
            :func:`gradmix.reference_gradient`; with marked rows it is the mean over the marked rows of all of them.

    Returns:
        :class:`Pairs`.

    Raises:
        ValueError: a value out of range, a NaN or infinity (its row is named), labels beyond the model's classes, an
            empty batch, or no certain head. What is wrong with values on a GPU is raised by the next call, as this one
            waits for nothing (:mod:`gradmix.ops.waiting`; estimators ``feature`` and ``mixed``).
        TypeError: an argument of the wrong type.
        BatchStatisticsError: the model normalises by statistics of the batch.
        RuntimeError: called in a worker process of a DataLoader.

    >>> import torch, gradmix
    >>> model, buffer = torch.nn.Linear(4, 3), (torch.randn(6, 4), torch.arange(6) % 3)
    >>> pairs = gradmix.select_pairs(model, buffer, (torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])))
    >>> x, y = pairs.mix()
    >>> x.shape, y.shape
    (torch.Size([5, 4]), torch.Size([5, 3]))
    """
    settings = _Settings(criterion, estimator, alpha, threshold, policy, head, num_classes, backend, chunk_size, group)
    if lam is not None:
        check_lam(lam)
    refuse_worker("select_pairs")
    generator = default_generator() if generator is None else generator
    model = unwrap(model)
    with _checks(settings, model), untouched(model):
        batch, candidates = _checked_rows_to_mix(batch, candidates, settings)
        marked = None
        if reference is None and isinstance(buffer, Tensor):
            marked = _checked_marks("buffer", buffer, batch)
        elif reference is None:
            reference = _reference(model, buffer, settings, batch[0])
        return _select(model, batch, candidates, settings, lam, generator, reference, None, outputs, marked=marked)


def _checks(settings: _Settings, model: nn.Module) -> AbstractContextManager[None]:
    """Checks without waiting for a GPU; over all parameters, where passes are long, at once."""
    return later(model) if settings.whole is None else nullcontext()


def _checked_rows_to_mix(
    batch: tuple[InputTree, Tensor], candidates: tuple[InputTree, Tensor] | None, settings: _Settings
) -> tuple[Batch, Batch | None]:
    """Both arguments as checked pairs on the batch's device."""
    x, y = as_pair("batch", batch)
    if len(y) == 0:
        raise ValueError("batch: got no rows, expected at least one")
    check_mixable("batch", x, settings.estimator)
    if candidates is None:
        return (x, y), None
    other_x, other_y = as_pair("candidates", candidates)
    if len(other_y) == 0:
        raise ValueError("candidates: got no rows, expected at least one")
    check_alike("candidates", other_x, x, "the batch")
    device = first_tensor(x).device
    return (x, y), (map_tensors(lambda leaf: leaf.to(device), other_x), other_y.to(device))


def _checked_marks(name: str, marked: object, batch: Batch) -> Tensor:
    """Which rows of the batch are replayed ones, (N,) bool on its device."""
    if not isinstance(marked, Tensor):
        raise TypeError(f"{name}: got {type(marked).__name__}, expected a bool tensor that marks rows of the batch")
    if marked.dtype != torch.bool:
        raise TypeError(f"{name}: got a tensor of dtype {marked.dtype}, expected bool, which marks rows of the batch")
    count = len(batch[1])
    if marked.shape != (count,):
        raise ValueError(f"{name}: got a mask of shape {tuple(marked.shape)}, expected ({count},) as the batch's rows")
    return sent(marked, first_tensor(batch[0]).device)


def _reference(model: nn.Module, buffer: object, settings: _Settings, x: InputTree) -> Tensor | WholeReference | None:
    """The buffer's gradient that the estimator wants; None for an empty buffer."""
    if settings.whole is not None:
        chunk = extent_of(model, settings.whole, x, settings.chunk_size).chunk
        return whole_reference(model, settings.whole, buffer, chunk, settings.group)
    device = first_tensor(x).device
    return read_buffer(model, buffer, settings.head, settings.chunk_size, device, group=settings.group)[0]


def _whole_marked_reference(
    model: nn.Module, batch: Batch, marked: Tensor, settings: _Settings, chunk: int
) -> WholeReference | None:
    """The marked rows' gradient with respect to all parameters; None if no row is marked."""
    estimator, own = settings.whole, (take(batch[0], marked), batch[1][marked])
    assert estimator is not None
    return whole_reference(model, estimator, own, chunk, settings.batch_group, name="replayed rows", shared=False)


def _select(
    model: nn.Module,
    batch: Batch,
    candidates: Batch | None,
    settings: _Settings,
    lam: float | None,
    generator: torch.Generator,
    reference: Tensor | WholeReference | None,
    table: ClassTable | None,
    outputs: HeadOutput | tuple[Tensor, Tensor] | None,
    graphs: Graphs | None = None,
    marked: Tensor | None = None,
) -> Pairs:
    """Select with a reference gradient (None: the buffer is empty) and maybe a class table; inside ``untouched``.

    With rows ``marked``, the reference gradient is theirs.
    """
    device = first_tensor(batch[0]).device
    run = graphs if graphs is not None and graphs.serve(device) else call
    lam = draw_lam(settings.alpha, generator) if lam is None else float(lam)
    draw = _Draw(settings.policy, len(batch[1]), len((candidates or batch)[1]), candidates is None, generator, device)
    partner_pair = batch if candidates is None else candidates
    screening = None
    if (reference is None and marked is None) or table is not None or settings.whole is not None:
        extent = None
        if settings.whole is None:
            width = _width_of(model, settings, batch[0])
        else:
            extent = extent_of(model, settings.whole, batch[0], settings.chunk_size)
            width = extent.width
            _check_width(settings.num_classes, width)
        batch, candidates = _checked_labels(batch, candidates, width)
        partner_pair = batch if candidates is None else candidates
        if marked is not None:
            assert extent is not None
            reference = _whole_marked_reference(model, batch, marked, settings, extent.chunk)
        if reference is None:
            alignment = _empty_buffer_alignment(batch, partner_pair, settings.criterion)
            decision = _decided(alignment, draw.partners(None, None), lam)
        elif table is not None:
            by_table = _ByTable(settings.threshold, settings.policy, draw.own_rows, table.lams)
            decision = run(by_table, by_table.inputs(table, batch[1], partner_pair[1], lam, draw.numbers()))
        else:
            assert extent is not None
            whole = check_whole_reference(reference)
            alignment, allowed, score, screening = _score_whole(
                model, batch, candidates, settings, lam, whole, draw, extent, generator
            )
            decision = _decided(alignment, draw.partners(allowed, score), lam)
    else:
        if marked is None and not isinstance(reference, Tensor):
            raise TypeError(
                f"reference: got {type(reference).__name__}, expected a tensor as gradmix.reference_gradient gives it"
            )
        rows = _forwarded_or_given(model, batch, outputs, settings)
        partners = (
            rows
            if candidates is None
            else forward_all(model, settings.head, "candidates", candidates, settings.chunk_size)
        )
        if candidates is not None:
            check_one_mask(rows, partners)
        _check_width(settings.num_classes, rows.logits.shape[1])
        width = rows.logits.shape[1]
        nothing = None
        if marked is not None:
            reference, nothing = marked_reference(rows, marked, settings.batch_group)
        assert isinstance(reference, Tensor)
        check_reference(reference, width, rows.features.shape[1])
        batch = batch[0], rows.y
        candidates = None if candidates is None else (candidates[0], partners.y)
        if settings.last_layer == "feature":
            by_features = _ByFeatures(
                settings.criterion, settings.threshold, settings.policy, draw.own_rows, settings.backend
            )
            decision = run(by_features, by_features.inputs(rows, partners, reference, nothing, lam, draw.numbers()))
        else:
            alignment, allowed, score = _score_mixed(model, rows, partners, settings, lam, reference, nothing, draw)
            decision = _decided(alignment, draw.partners(allowed, score), lam)
    return Pairs(
        decision.partner,
        decision.lam.to(_labels_dtype(batch[0])),
        decision.helpful,
        width,
        Alignment(decision.inner, decision.cosine, decision.classes),
        batch,
        candidates,
        screening,
    )


def _forwarded_or_given(
    model: nn.Module,
    batch: Batch,
    outputs: HeadOutput | tuple[Tensor, Tensor] | None,
    settings: _Settings,
) -> Rows:
    """The batch with its head outputs: those given, or those of a pass."""
    if outputs is None:
        return forward_all(model, settings.head, "batch", batch, settings.chunk_size)
    return checked_rows("batch", *batch, given_outputs(model, settings.head, outputs, len(batch[1])))


def _width_of(model: nn.Module, settings: _Settings, x: InputTree) -> int:
    """How many classes there are, for rows like these; inside ``untouched``."""
    if settings.whole is not None:
        return extent_of(model, settings.whole, x, settings.chunk_size).width
    if settings.num_classes is not None:
        return settings.num_classes
    with refusing_by_name("batch", model, x):
        return resolve_head(model, settings.head, x).num_classes


def _checked_labels(batch: Batch, candidates: Batch | None, width: int) -> tuple[Batch, Batch | None]:
    """Both, after a look for NaN and labels beyond ``width`` classes."""
    given = {"batch": batch} if candidates is None else {"batch": batch, "candidates": candidates}
    require_finite(0, **{name: x for name, (x, _) in given.items()})
    for name, (_, y) in given.items():
        check_label_range(name, y, width)
    x, y = batch
    held = None if candidates is None else (candidates[0], within_range(candidates[1], width))
    return (x, within_range(y, width)), held


class Decision(NamedTuple):
    """Partners, and what they were chosen by.

    Attributes:
        partner: (N,) int64.
        helpful: (N,) bool, whether there is one.
        lam: (N,) float64 (float32 on devices without it), weight of the row itself.
        inner, cosine, classes: the alignment of all pairs, or of their classes.
    """

    partner: Tensor
    helpful: Tensor
    lam: Tensor
    inner: Tensor
    cosine: Tensor
    classes: Tensor | None


def _decided(alignment: Alignment, drawn: DrawnPartners, lam: Weight) -> Decision:
    kept = torch.ones((), dtype=exact_dtype(drawn.found.device), device=drawn.found.device)
    weights = torch.where(drawn.found, lam, kept)
    return Decision(drawn.partner, drawn.found, weights, alignment.inner, alignment.cosine, alignment.classes)


@dataclass(frozen=True)
class _ByTable:
    """The decision for rows of known classes: a look into the class table. It waits for nothing."""

    threshold: float
    policy: Policy
    own_rows: bool
    lams: tuple[float, ...]

    def inputs(self, table: ClassTable, y: Tensor, other_y: Tensor, lam: Weight, drawn: Tensor) -> Inputs:
        """The arguments of a call, all tensors but maybe lam."""
        kept = (table.inner, table.norm, table.reference_norm, table.classes)
        return (class_of(y), None if self.own_rows else class_of(other_y), lam, drawn, *kept)

    def __call__(
        self,
        y: Tensor,
        other_y: Tensor | None,
        lam: Weight,
        drawn: Tensor,
        inner: Tensor,
        norm: Tensor,
        reference_norm: Tensor,
        classes: Tensor,
    ) -> Decision:
        alignment = ClassTable(self.lams, inner, norm, reference_norm, classes).at(lam)
        other_y = y if other_y is None else other_y
        allowed, score = _class_decisions(alignment, y, other_y, self.threshold)
        return _decided(alignment, _partners(allowed, score, drawn, self.policy, self.own_rows), lam)


@dataclass(frozen=True)
class _ByFeatures:
    """The decision from what the head saw and said, by the estimator ``feature``. It waits for nothing."""

    criterion: Criterion
    threshold: float
    policy: Policy
    own_rows: bool
    backend: str

    def inputs(
        self, rows: Rows, partners: Rows, reference: Tensor, nothing: Tensor | None, lam: Weight, drawn: Tensor
    ) -> Inputs:
        """The arguments of a call, all tensors but maybe lam."""
        other = (None,) * 3 if self.own_rows else (partners.features, partners.logits, partners.y)
        return (rows.features, rows.logits, rows.y, lam, drawn, reference, nothing, *other)

    def __call__(
        self,
        features: Tensor,
        logits: Tensor,
        y: Tensor,
        lam: Weight,
        drawn: Tensor,
        reference: Tensor,
        nothing: Tensor | None,
        other_features: Tensor | None,
        other_logits: Tensor | None,
        other_y: Tensor | None,
    ) -> Decision:
        rows = partners = Rows(y, y, features, logits)
        if other_features is not None and other_logits is not None and other_y is not None:
            partners = Rows(other_y, other_y, other_features, other_logits)
        inner, norm = feature_alignment(rows, partners, reference, lam, self.backend)
        alignment = judge(inner, norm, rows, partners, reference, self.criterion, self.own_rows)
        alignment, allowed, score = _decisions_unless(nothing, alignment, rows.y, partners.y, self.threshold)
        return _decided(alignment, _partners(allowed, score, drawn, self.policy, self.own_rows), lam)


def _score_mixed(
    model: nn.Module,
    rows: Rows,
    partners: Rows,
    settings: _Settings,
    lam: float,
    reference: Tensor,
    nothing: Tensor | None,
    draw: _Draw,
) -> tuple[Alignment, Tensor, Tensor]:
    """The alignment by the estimator ``mixed``, and by pair (N, M): whether it is allowed, and its score."""
    if draw.permuted is not None:
        # Only the drawn pairs are forwarded; the others stay unknown.
        index = torch.stack([torch.arange(len(rows), device=rows.y.device), draw.permuted], 1)
        inner, norm = (
            torch.full((len(rows), len(partners)), float("nan"), dtype=reference.dtype, device=rows.y.device)
            for _ in "ab"
        )
        inner[index[:, 0], index[:, 1]], norm[index[:, 0], index[:, 1]] = mixed_input_alignment(
            model, settings.head, (rows.x, rows.y), (partners.x, partners.y), index, reference, lam, settings.chunk_size
        )
    else:
        inner, norm = pair_alignment(
            model,
            settings.head,
            rows,
            partners,
            reference,
            lam,
            estimator=settings.last_layer,
            chunk=settings.chunk_size,
            backend=settings.backend,
        )
    alignment = judge(inner, norm, rows, partners, reference, settings.criterion, draw.own_rows)
    return _decisions_unless(nothing, alignment, rows.y, partners.y, settings.threshold)


def _decisions_unless(
    nothing: Tensor | None, alignment: Alignment, y: Tensor, other_y: Tensor, threshold: float
) -> tuple[Alignment, Tensor, Tensor]:
    """The alignment, and by pair (N, M) whether it is allowed, and its score; unless there is no reference gradient.

    Args:
        nothing: () bool, whether no row is behind the reference, decided on the device: then everything is allowed, and
            all zeros, as with an empty buffer. None: there are such rows.
    """
    if nothing is not None:
        inner, angle = (v.masked_fill(nothing, 0) for v in (alignment.inner, alignment.cosine))
        alignment = Alignment(inner, angle, alignment.classes)
    allowed, score = _decisions(alignment, y, other_y, threshold)
    return alignment, allowed if nothing is None else allowed | nothing, score


def _decisions(alignment: Alignment, y: Tensor, other_y: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """By pair (N, M): whether it is allowed, and its score."""
    if alignment.classes is None:
        return alignment.helpful(threshold), alignment.cosine
    return _class_decisions(alignment, y, other_y, threshold)


def _score_whole(
    model: nn.Module,
    batch: Batch,
    candidates: Batch | None,
    settings: _Settings,
    lam: float,
    reference: WholeReference,
    draw: _Draw,
    extent: Extent,
    generator: torch.Generator,
) -> tuple[Alignment, Tensor, Tensor, Screening | None]:
    """As :func:`_score_mixed` over all parameters, and for the estimator ``sketch`` how the decisions were made."""
    estimator, partner_pair = settings.whole, batch if candidates is None else candidates
    assert estimator is not None
    chunk, width = extent
    rows, partners = bare_rows(*batch), bare_rows(*partner_pair)
    count, device = (len(rows), len(partners)), rows.y.device
    drawn = torch.ones(count, dtype=torch.bool, device=device)
    if draw.permuted is not None:
        drawn = torch.zeros_like(drawn).index_put_((torch.arange(count[0], device=device), draw.permuted), drawn[0, 0])
    if draw.own_rows:
        drawn.fill_diagonal_(False)
    screening = None
    if isinstance(estimator, SketchEstimator):
        alignment, cells = sketched_cells(
            model,
            estimator,
            rows,
            None if candidates is None else partners,
            reference,
            lam,
            settings.criterion,
            chunk,
            settings.backend,
        )
        judged = drawn
        if cells.classes is not None:
            i, j = (class_index(cells.classes, class_of(y)) for y in (rows.y, partners.y))
            judged = torch.zeros_like(cells.inner, dtype=torch.bool)
            at = drawn.nonzero()
            judged[i[at[:, 0]], j[at[:, 1]]] = True
        screening = recheck(
            model, estimator, cells, judged, settings.threshold, batch, partner_pair, reference, lam, width,
            chunk, generator,
        )  # fmt: skip
        alignment = whole_alignment(cells, reference)
    else:
        pairs = drawn.nonzero()
        found = jvp_alignment(model, estimator, batch, partner_pair, pairs, reference, lam, width, chunk)
        inner, norm = (torch.full(count, float("nan"), dtype=v.dtype, device=device) for v in found)
        inner[pairs[:, 0], pairs[:, 1]], norm[pairs[:, 0], pairs[:, 1]] = found
        alignment = judge(inner, norm, rows, partners, reference_norm(reference), settings.criterion, draw.own_rows)
    return (alignment, *_decisions(alignment, rows.y, partners.y, settings.threshold), screening)


def _class_decisions(table: Alignment, y: Tensor, other_y: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """By pair (N, M): whether its classes may be mixed, and their cosine; of a class not in the table, no and NaN."""
    assert table.classes is not None
    i, j = (class_index(table.classes, class_of(labels)) for labels in (y, other_y))
    known = (i >= 0)[:, None] & (j >= 0)
    i, j = i.clamp(min=0), j.clamp(min=0)
    helpful, score = (v.index_select(0, i).index_select(1, j) for v in (table.helpful(threshold), table.cosine))
    return helpful & known, score.masked_fill(~known, torch.nan)


def _empty_buffer_alignment(batch: Batch, candidates: Batch, criterion: Criterion) -> Alignment:
    """Zeros: with no reference gradient nothing is known."""
    _, y = batch
    device = y.device
    if criterion == "sample":
        zeros = torch.zeros(len(y), len(candidates[1]), dtype=torch.float32, device=device)
        return Alignment(zeros, zeros)
    classes = classes_of(torch.cat([class_of(y), class_of(candidates[1])]))
    zeros = torch.zeros(len(classes), len(classes), dtype=torch.float32, device=device)
    return Alignment(zeros, zeros, classes)


def _partners(
    allowed: Tensor | None, score: Tensor | None, drawn: Tensor, policy: Policy, own_rows: bool, partners: int = 0
) -> DrawnPartners:
    best = score if policy == "best" else None
    return draw_partners(
        allowed, drawn, policy=policy, score=best, own_rows=own_rows, partners=partners if allowed is None else None
    )


class _Draw:
    """The draw of one partner a row; for ``permute`` the partner is drawn at once, before anything is evaluated.

    The numbers come from the caller's generator, usually on the host, and go to the device without being waited for.
    """

    def __init__(
        self, policy: Policy, rows: int, partners: int, own_rows: bool, generator: torch.Generator, device: torch.device
    ) -> None:
        self._policy, self._rows, self._partners = policy, rows, partners
        self.own_rows = own_rows
        self._generator, self._device = generator, device
        self.permuted = self._permutation() if policy == "permute" else None

    def _permutation(self) -> Tensor:
        if self._partners >= self._rows:
            drawn = torch.randperm(self._partners, generator=self._generator, device=self._generator.device)[
                : self._rows
            ]
        else:
            drawn = torch.randint(
                self._partners, (self._rows,), generator=self._generator, device=self._generator.device
            )
        return sent(drawn, self._device)

    def numbers(self) -> Tensor:
        """(N,): what the operator ``draw_partners`` draws by; call it once."""
        if self.permuted is not None:
            return self.permuted
        source = self._generator
        drawn = torch.rand(self._rows, generator=source, device=source.device, dtype=torch.float64)
        return sent(drawn, self._device)

    def partners(self, allowed: Tensor | None, score: Tensor | None) -> DrawnPartners:
        """The partners.

        Args:
            allowed: (N, M) bool; None: everything.
            score: (N, M) the larger the better, for policy ``best``; None: all equal.
        """
        return _partners(allowed, score, self.numbers(), self._policy, self.own_rows, self._partners)


def _check_width(num_classes: int | None, width: int) -> None:
    if num_classes is not None and num_classes != width:
        raise ValueError(f"num_classes: got {num_classes}, expected {width} as the model's logits, or None")


class GradMix:
    """Selective Mixup for a training loop: keeps the reference gradient (and table of class pairs) between steps.

    Called like torchvision's and timm's Mixup::

        mixup = gradmix.GradMix(model, buffer, alpha=1.0)
        for x, y in loader:                                   # replayed rows among them
            x, y = mixup(x, y)
            loss = F.cross_entropy(model(x), y)

    What is kept is computed again when it is ``refresh`` calls old; when the buffer has been filled for the first time;
    when a parameter of the model has appeared, gone, or changed its shape, as in a classifier that grows (over all
    parameters: also when one has been frozen or freed); and, by class, when a batch holds a class the table does not
    know. The class table is made of the buffer's rows and
    the rows at hand, and holds the alignment as a function of lam, because it serves steps with different lam.

    Args:
        model, criterion, estimator, alpha, threshold, policy, head, num_classes, generator, backend, chunk_size: as
            :func:`select_pairs`.
        buffer: as :func:`select_pairs`; read again at every refresh, so it may change in between. None: there is none,
            and every call marks the replayed rows of its batch.
        refresh: steps between two refreshes, an integer >= 1; or ``"epoch"``: after :meth:`start_epoch` only.
        class_samples: rows of each class behind its entries of the class table (estimator ``mixed``: mixed inputs for
            each pair of classes).
        cuda_graph: on a GPU, capture what follows the rows' own forward pass in a CUDA graph, one for each shape of
            batch, and replay it, so that a selection costs the host one launch; elsewhere it makes no difference. For
            the estimator ``feature``, and by class for all of them. Same results.
        group: a process group of ``torch.distributed`` whose processes train one model: all hold the same buffer and
            make the same calls, each with a batch of its own. Each forwards its share of the buffer, and all keep the
            same reference gradient, to the bit; and the same class table, made of the buffer's rows and the batches of
            all of them, in the order of the ranks, as one process would of the whole batch. By class every call asks
            all processes whether one of them has met an unknown class. A process that fails leaves the others waiting
            (:mod:`gradmix.processes`).
        shared_batch: whether every process of the group is given the same batch, the whole one, as where the outputs of
            its parts have been gathered already; they then make the same decisions if their generators are alike.

    On a GPU no call waits for the device (estimators ``feature`` and ``mixed``, between refreshes): what a check finds
    is raised by the next call (:mod:`gradmix.ops.waiting`), and a class that the table does not know has its rows stay
    unmixed in that step and the table computed anew in the next one. Reading a buffer kept on the host, and making a
    class table, do wait.

    Call it in the training loop, not in a ``collate_fn`` or a data set that worker processes run: they have a copy of
    the model, which does not learn.

    Attributes:
        mixup_enabled: whether a call mixes. Set to False, as training loops with timm's Mixup do for the last epochs, a
            call returns its inputs as they are, and label vectors; :meth:`select` does not look at it.
        reference: the reference gradient, (C, d + 1) or by parameter name; None before the first call and while the
            buffer is empty.
        table: the class table (:class:`gradmix.alignment.ClassTable`), or None.
        pairs: the last :class:`Pairs`, or None.
        screening: None, or for the estimator ``sketch`` by class how the table came about.
        refreshes: how often the reference gradient was computed.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`select_pairs`.
    """

    def __init__(
        self,
        model: nn.Module,
        buffer: RowSource | None,
        *,
        criterion: Criterion = "sample",
        estimator: Estimator | WholeEstimator = "feature",
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
        cuda_graph: bool = False,
        group: Group = None,
        shared_batch: bool = False,
    ) -> None:
        self._settings = _Settings(
            criterion,
            estimator,
            alpha,
            threshold,
            policy,
            head,
            num_classes,
            backend,
            chunk_size,
            group,
            shared_batch,
        )
        if not isinstance(cuda_graph, bool):
            raise TypeError(f"cuda_graph: got {type(cuda_graph).__name__}, expected a bool")
        if cuda_graph and criterion == "sample" and estimator != "feature":
            raise ValueError(
                f"cuda_graph: got True with the estimator {estimator!r} by sample, expected 'feature', or by class "
                "any of them; passes of mixed inputs are not captured"
            )
        self._graphs = Graphs() if cuda_graph else None
        if refresh != "epoch":
            check_count("refresh", refresh)
        check_count("class_samples", class_samples)
        self._model, self._buffer = unwrap(model), buffer
        self._refresh, self._class_samples = refresh, class_samples
        self._generator = generator
        self.mixup_enabled = True
        self.reference: Tensor | WholeReference | None = None
        self.table: ClassTable | None = None
        self.pairs: Pairs | None = None
        self.screening: Screening | None = None
        self.refreshes = 0
        self._age = 0
        self._stale = True
        self._shapes: Shapes | None = None

    @property
    def _source(self) -> torch.Generator:
        """The generator given, or the library's own as of now: another one after ``torch.manual_seed``."""
        return default_generator() if self._generator is None else self._generator

    def __call__(self, x: InputTree, y: Tensor, *, replayed: Tensor | None = None) -> tuple[Any, Tensor]:
        """Mixed inputs (N, ...) and label vectors (N, C) for a batch x (N, ...), y (N,) or (N, C).

        With ``mixup_enabled`` False the inputs are given back as they are, with their label vectors.
        """
        if self.mixup_enabled:
            return self.select(x, y, replayed=replayed).mix()
        refuse_worker("GradMix")
        batch, _ = _checked_rows_to_mix((x, y), None, self._settings)
        with untouched(self._model):
            width = _width_of(self._model, self._settings, batch[0])
            _, labels = _checked_labels(batch, None, width)[0]
        return x, dense_labels(labels, width, _labels_dtype(batch[0]))

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
        """The pairs for a batch.

        Args:
            x, y: the batch.
            candidates, lam, outputs: as :func:`select_pairs`.
            replayed: (N,) bool, which rows of the batch are replayed ones. Their mean gradient is then the reference of
                this call in place of the buffer's, which is not read. By sample what is kept between steps is neither
                used nor changed. By class the table is refreshed as ever, its reference the marked rows' gradient, and
                made of the rows at hand alone; as long as there is none, whether a row is marked is found out as
                whether a class is unknown.

        Raises:
            ValueError, TypeError: as :func:`select_pairs`; no ``replayed`` where there is no buffer.
        """
        refuse_worker("GradMix")
        if lam is not None:
            check_lam(lam)
        if replayed is None and self._buffer is None:
            raise ValueError("replayed: got None, expected (N,) bool, which marks replayed rows, as there is no buffer")
        with _checks(self._settings, self._model), untouched(self._model):
            batch, candidates = _checked_rows_to_mix((x, y), candidates, self._settings)
            marked = None if replayed is None else _checked_marks("replayed", replayed, batch)
            once = marked is not None and self._settings.criterion == "sample"
            if not once and self._is_due(batch, candidates, marked):
                self._update(batch, candidates, outputs, marked)
            self.pairs = _select(
                self._model,
                batch,
                candidates,
                self._settings,
                lam,
                self._source,
                None if once else self.reference,
                self.table,
                outputs,
                self._graphs,
                marked if once else None,
            )
        self._age += 1
        return self.pairs

    def start_epoch(self) -> None:
        """Have the next call compute everything anew."""
        self._stale = True

    def _is_due(self, batch: Batch, candidates: Batch | None, marked: Tensor | None) -> bool:
        if self._stale or (self._refresh != "epoch" and self._age >= self._refresh):
            return True
        if self._shapes != self._shapes_now():
            return True
        if self.reference is None:
            return has_rows(self._buffer) if marked is None else self._is_met(marked)
        if self.table is None:
            return False
        labels = [class_of(pair[1]) for pair in (batch, candidates) if pair is not None]
        return self._is_met(torch.cat([class_index(self.table.classes, label) < 0 for label in labels]))

    def _is_met(self, flags: Tensor) -> bool:
        """Whether any of ``flags`` (K,) is set, in any process; where the host may not look, the next call knows."""
        if self._settings.group is not None:
            flags = any_over(flags, self._settings.group)
        if look_is_free(flags.device) or self._settings.whole is not None:
            return bool(flags.any())
        # By a weak reference: the question is kept for the model, and must not keep it.
        kept = weakref.ref(self)

        def grow_stale(_row: int) -> None:
            mixup = kept()
            if mixup is not None:
                mixup.start_epoch()

        require(flags, grow_stale)
        return False

    def _shapes_now(self) -> Shapes:
        """What the kept gradient depends on of the model, but for values."""
        whole = self._settings.whole is not None
        return {name: list(p.shape) for name, p in self._model.named_parameters() if p.requires_grad or not whole}

    def _update(
        self,
        batch: Batch,
        candidates: Batch | None,
        outputs: HeadOutput | tuple[Tensor, Tensor] | None,
        marked: Tensor | None,
    ) -> None:
        settings, by_class = self._settings, self._settings.criterion == "class"
        if settings.whole is not None:
            self._update_whole(settings.whole, batch, candidates, marked)
            return
        reference: Tensor | None = None
        kept: list[Rows] = []
        if marked is None:
            reference, kept = read_buffer(
                self._model,
                self._buffer,
                settings.head,
                settings.chunk_size,
                first_tensor(batch[0]).device,
                keep=self._class_samples if by_class else 0,
                keep_inputs=settings.last_layer == "mixed",
                group=settings.group,
            )
        table = None
        if by_class and (reference is not None or marked is not None):
            at_hand = [_forwarded_or_given(self._model, batch, outputs, settings)]
            if candidates is not None:
                at_hand.append(forward_all(self._model, settings.head, "candidates", candidates, settings.chunk_size))
            if marked is not None:
                reference, nothing = marked_reference(at_hand[0], marked, settings.batch_group)
                reference = None if bool(nothing) else reference
            if settings.last_layer == "feature":
                at_hand = [rows.without_inputs() for rows in at_hand]
        if by_class and reference is not None:
            at_hand = [gathered(rows, settings.batch_group) for rows in at_hand]
            table = class_table(
                self._model,
                settings.head,
                concatenate([*kept, *at_hand]),
                reference,
                estimator=settings.last_layer,
                class_samples=self._class_samples,
                generator=self._source,
                chunk=settings.chunk_size,
                backend=settings.backend,
            )
            table = agreed(table, settings.group)
        # All or nothing: a model that raises above leaves what was kept before.
        self.reference, self.table = reference, table
        self._age, self._stale, self._shapes = 0, False, self._shapes_now()
        self.refreshes += 1

    def _update_whole(
        self,
        estimator: WholeEstimator,
        batch: Batch,
        candidates: Batch | None,
        marked: Tensor | None,
    ) -> None:
        """:meth:`_update` for an estimator over all parameters."""
        settings = self._settings
        chunk, width = extent_of(self._model, estimator, batch[0], settings.chunk_size)
        device = first_tensor(batch[0]).device
        kept: list[Rows] = []
        reference: WholeReference | None
        if marked is None:
            reference = whole_reference(self._model, estimator, self._buffer, chunk, settings.group)
        else:
            reference = _whole_marked_reference(self._model, batch, marked, settings, chunk)
        table = screening = None
        if reference is not None and settings.criterion == "class":
            if marked is None:
                kept = buffer_rows(self._buffer, self._class_samples, settings.chunk_size, device)
                for part in kept:
                    check_mixable("buffer", part.x, estimator)
            at_hand = [batch] if candidates is None else [batch, candidates]
            rows = [*kept, *(gathered(bare_rows(*pair), settings.batch_group) for pair in at_hand)]
            for part in rows:
                check_label_range("batch", part.y, width)
            everything = concatenate(rows, width)
            table, screening = whole_class_table(
                self._model,
                (everything.x, everything.y),
                reference,
                estimator=estimator,
                class_samples=self._class_samples,
                threshold=settings.threshold,
                width=width,
                generator=self._source,
                chunk=chunk,
                backend=settings.backend,
            )
            table = agreed(table, settings.group)
            if screening is not None:
                told = torch.tensor(astuple(screening), device=device)
                screening = Screening(*as_the_first([told], settings.group)[0].tolist())
        self.reference, self.table, self.screening = reference, table, screening
        self._age, self._stale, self._shapes = 0, False, self._shapes_now()
        self.refreshes += 1

    def state_dict(self) -> dict[str, Any]:
        """What is kept between steps, of tensors and plain numbers; loads with ``torch.load(weights_only=True)``.

        Raises:
            ValueError: the call before was given what it should not have been, found on a GPU.
        """
        # Whether the table is to be made anew may still be on its way from the GPU.
        settle(self._model)
        table = self.table
        return {
            "reference": self.reference,
            "table": None if table is None else vars(table) | {"lams": list(table.lams)},
            "age": self._age,
            "stale": self._stale,
            "shapes": self._shapes,
            "refreshes": self.refreshes,
            "generator": self._source.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of :meth:`state_dict`.

        Raises:
            ValueError: a key is missing or unknown; nothing is changed then.
        """
        expected = {"reference", "table", "age", "stale", "refreshes", "generator", "shapes"}
        if {"shapes", *state} != expected:
            raise ValueError(f"state: got the keys {sorted(state)}, expected {sorted(expected)}")
        table = state["table"]
        made = None if table is None else ClassTable(**(table | {"lams": tuple(table["lams"])}))
        self._source.set_state(state["generator"])
        self.reference, self.table = state["reference"], made
        self._age, self._stale, self.refreshes = state["age"], state["stale"], state["refreshes"]
        # A state from before these were kept is taken to be of a model like this one.
        self._shapes = state.get("shapes", self._shapes_now())
