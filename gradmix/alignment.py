"""From a model and rows to alignment: the reference gradient, the estimators and the criteria.

The reference gradient G is the mean last-layer gradient of the replay buffer, mean_n (softmax(z_n) - y_n) [h_n; 1]^T.
One SGD step on a mixed row with gradient g changes the buffer's loss by about -lr <g, G>, so a mixture is helpful if
<g, G> >= 0 and detrimental otherwise (GradMix, arXiv 2505.08528, which states this as an angle of at most 90 degrees).

Estimators of g, for the last layer's weight and bias:

- ``feature``: the rows' features, logits and labels are mixed (:mod:`gradmix.ops.mixed_alignment`); no forward pass but
  the rows' own.
- ``mixed``: the mixed inputs are forwarded; exact, one forward a pair.

and over all parameters, where the reference is the buffer's whole mean gradient (:mod:`gradmix.estimators`):

- ``jvp``: the mixed inputs are forwarded, and the derivative of their loss along the reference is taken; exact.
- ``sketch``: mixtures of the rows' sketched gradients; what is in doubt is checked again by ``jvp``.

Criteria: ``sample`` judges each pair by its own inner product, ``class`` each pair of classes by the mean over its
rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import islice
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gradmix.estimators import (
    Cells,
    JvpEstimator,
    RowSketches,
    Screening,
    SketchEstimator,
    WholeEstimator,
    WholeReference,
    extent_of,
    jvp_alignment,
    recheck,
    reference_norm,
    rows_of_classes,
    whole_reference,
)
from gradmix.head import CapturedOutput, HeadLike, forward_head
from gradmix.head_values import MASKED
from gradmix.inputs import InputTree, check_alike, first_tensor, floating_dtype, map_tensors, mix_samples, take
from gradmix.inputs import concatenate as concatenate_inputs
from gradmix.mixing import beta_quadrature
from gradmix.ops.class_pairs import class_members, class_pair_alignment, class_pair_sums
from gradmix.ops.dtypes import exact_dtype, work_dtype
from gradmix.ops.labels import check_label_range, class_of, dense_labels, within_range
from gradmix.ops.last_layer_gradient import last_layer_gradient
from gradmix.ops.mixed_alignment import (
    Weight,
    as_lams,
    check_lam,
    cosine,
    in_range,
    length,
    mixed_alignment_op,
    mixed_residual,
)
from gradmix.ops.waiting import look_is_free, require
from gradmix.probe import device_of, require_finite, require_finite_pairs, untouched, unwrap
from gradmix.processes import Group, as_the_first, check_group, gather_rows, sum_over
from gradmix.refusals import refusing_by_name
from gradmix.replay.sources import CHUNK, as_pair, chunks_of, numbered_chunks
from gradmix.replay.sources import SampleSource as RowSource

Estimator = Literal["feature", "mixed", "jvp", "sketch"]
Criterion = Literal["class", "sample"]

TABLE_LAMS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Mixing weights at which a class table is evaluated; between them it is interpolated.

Whether a pair of classes may be mixed depends on the weight: near 1 it is a question about the row's own class, near 0
about the partner's. One decision for all weights, their mean, is worse on MNIST (REPRODUCIBILITY.md)."""

AVERAGE_NODES = 8
"""Quadrature nodes of a class table's average over Beta(alpha, alpha), which is for people to look at."""

TABLE_ROWS = 2048
"""Rows behind a class table at the most; with many classes there are fewer of each."""


@dataclass(frozen=True)
class Alignment:
    """Alignment of mixtures with the reference gradient.

    Attributes:
        inner: (N, M) or, by class, (P, P): inner products with the reference; NaN where no pair was evaluated.
        cosine: same shape, in [-1, 1]. By class it is the mean of the pairs' cosines weighted by the norms of their
            gradients, which has the sign of ``inner``.
        classes: None, or (P,) int64 in ascending order: entry (a, b) is a mixture of a row of ``classes[a]`` with
            weight lam and a row of ``classes[b]`` with weight 1 - lam.
    """

    inner: Tensor
    cosine: Tensor
    classes: Tensor | None = None

    def compact(self) -> Alignment:
        """The same without the places of :func:`classes_of` that stand for no class; looks at the classes."""
        if self.classes is None or look_is_free(self.classes.device):
            return self
        at = (self.classes >= 0).nonzero()[:, 0]
        inner, angle = (v.index_select(0, at).index_select(1, at) for v in (self.inner, self.cosine))
        return Alignment(inner, angle, self.classes[at])

    def helpful(self, threshold: float = 0.0) -> Tensor:
        """bool, same shape: whether a mixture is helpful; False where none was evaluated.

        At threshold 0 the sign of ``inner`` decides, which has no rounding of norms in it.
        """
        return self.inner >= 0 if threshold == 0.0 else self.cosine >= threshold


def as_estimator(estimator: object) -> str | WholeEstimator:
    """``"feature"``, ``"mixed"``, or the settings of an estimator over all parameters.

    Raises:
        ValueError: neither a name nor such settings.
    """
    if isinstance(estimator, (JvpEstimator, SketchEstimator)):
        return estimator
    check_choice("estimator", estimator, get_args(Estimator))
    named: dict[object, WholeEstimator] = {"jvp": JvpEstimator(), "sketch": SketchEstimator()}
    return named.get(estimator, str(estimator))


def check_mixable(name: str, x: InputTree, estimator: object) -> None:
    """Refuse inputs without mixtures to forward, such as token ids, where an estimator mixes inputs.

    Raises:
        TypeError: no leaf is of a floating-point dtype.
    """
    kind = as_estimator(estimator)
    if kind == "feature" or floating_dtype(x) is not None:
        return
    called = kind if isinstance(kind, str) else type(kind).__name__
    raise TypeError(
        f"{name}: got x of dtype {first_tensor(x).dtype} with the estimator {called!r}, which mixes inputs, expected a "
        "floating-point dtype; token ids are served by the estimator 'feature'"
    )


def refuse_worker(what: str) -> None:
    """Refuse to judge by a model in a worker process of a DataLoader, which has a copy from when it was started.

    Raises:
        RuntimeError: this is such a process.
    """
    if torch.utils.data.get_worker_info() is not None:
        raise RuntimeError(
            f"{what}: was called in a worker process of a DataLoader, whose copy of the model and of the buffer stays "
            "as it was when the worker was started, expected a call in the training loop, on the batch that the loader "
            "gives"
        )


def classes_of(labels: Tensor) -> Tensor:
    """(P,) int64, ascending: the classes among labels (N,).

    Where the host may not look how many there are, as many as labels: -1 takes the place of repetitions.
    """
    if look_is_free(labels.device):
        found: Tensor = torch.unique(labels)
        return found
    ordered = labels.sort().values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[1:] = ordered[1:] == ordered[:-1]
    return ordered.masked_fill(repeated, -1).sort().values


def class_index(classes: Tensor, labels: Tensor) -> Tensor:
    """(N,) positions of ``labels`` among the ascending ``classes`` (P,); -1 for a class that is not there."""
    position = torch.searchsorted(classes, labels.contiguous()).clamp_(max=len(classes) - 1)
    return torch.where(classes[position] == labels, position, -1)


@dataclass(frozen=True)
class ClassTable:
    """Alignment of class pairs as a function of the mixing weight.

    Attributes:
        lams: L mixing weights from 0 to 1, ascending.
        inner: (L, P, P), mean inner products with the reference; NaN where no pair of rows was evaluated.
        norm: (L, P, P), mean gradient norms.
        reference_norm: scalar tensor, the reference gradient's norm.
        classes: (P,) int64, ascending; entry (a, b) is a row of ``classes[a]`` with weight lam and a partner of
            ``classes[b]``.
    """

    lams: tuple[float, ...]
    inner: Tensor
    norm: Tensor
    reference_norm: Tensor
    classes: Tensor

    def at(self, lam: Weight) -> Alignment:
        """The alignment at one mixing weight, (P, P), interpolated linearly between the weights evaluated."""
        return self._alignment(*self._interpolated(lam))

    def average(self, alpha: float) -> Alignment:
        """The mean over Beta(alpha, alpha), (P, P): what can be shown of the table in one picture."""
        inner, norm = torch.zeros_like(self.inner[0]), torch.zeros_like(self.norm[0])
        for lam, weight in zip(*beta_quadrature(alpha, AVERAGE_NODES), strict=True):
            inner_at, norm_at = self._interpolated(lam)
            inner += weight * inner_at
            norm += weight * norm_at
        return self._alignment(inner, norm)

    def _interpolated(self, lam: Weight) -> tuple[Tensor, Tensor]:
        if isinstance(lam, Tensor):
            return self._interpolated_unseen(lam)
        upper = min(bisect_right(self.lams, lam), len(self.lams) - 1)
        low, high = self.lams[upper - 1], self.lams[upper]
        share = (lam - low) / (high - low)
        return (
            torch.lerp(self.inner[upper - 1], self.inner[upper], share),
            torch.lerp(self.norm[upper - 1], self.norm[upper], share),
        )

    def _interpolated_unseen(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """The same at a weight () that the host does not look at."""
        # Filled one by one: a copy from the host would be waited for.
        lams = torch.stack([torch.full_like(lam, value) for value in self.lams])
        upper = torch.searchsorted(lams, lam.reshape(1), right=True).clamp_(1, len(self.lams) - 1)
        low, high = lams[upper - 1], lams[upper]
        share = ((lam - low) / (high - low)).to(self.inner.dtype)
        first, second = (torch.lerp(v[upper - 1], v[upper], share[:, None, None])[0] for v in (self.inner, self.norm))
        return first, second

    def _alignment(self, inner: Tensor, norm: Tensor) -> Alignment:
        return Alignment(inner, cosine(inner, norm, self.reference_norm), self.classes)


@dataclass(frozen=True)
class Rows:
    """Rows with what the head saw and said for them: x a tree (N, ...), y labels, features (N, d), logits (N, C).

    ``appends_one``: whether a column of ones for the head's bias goes with the features.
    """

    x: InputTree
    y: Tensor
    features: Tensor
    logits: Tensor
    appends_one: bool = True

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> Rows:
        """The rows at ``index``."""
        return Rows(take(self.x, index), self.y[index], self.features[index], self.logits[index], self.appends_one)

    def without_inputs(self) -> Rows:
        """The same with x of width 0: what is kept in feature space must not keep images alive."""
        return replace(self, x=self.features.new_empty(len(self), 0))


# ------------------------------------------------------------------------------------------------------- forward passes


def forwarded(
    model: nn.Module, head: HeadLike, name: str, source: object, chunk: int, device: torch.device
) -> Iterator[Rows]:
    """Forward ``source`` in chunks, none of them empty; call it inside :func:`gradmix.probe.untouched`.

    Raises:
        ValueError: a row with a NaN or an infinity in it, or for which the model returns one, named; a label out of
            range.
    """
    for _, rows in _forwarded_share(model, head, name, source, chunk, device, None):
        yield rows


def _forwarded_share(
    model: nn.Module,
    head: HeadLike,
    name: str,
    source: object,
    chunk: int,
    device: torch.device,
    group: Group,
) -> Iterator[tuple[int, Rows]]:
    """This process's share of ``source``, forwarded, and the number of each chunk's first row.

    A process without a share of rows that there are gets one chunk of no rows, so that it knows their shapes.
    """
    empty = True
    for start, x, y in numbered_chunks(name, source, chunk, device, group):
        with refusing_by_name(name, model, x):
            output = forward_head(model, head, x)
        yield start, checked_rows(name, x, y, output, start)
        empty = False
    if empty and group is not None:
        for x, y in islice(chunks_of(name, source, 1, device), 1):
            with refusing_by_name(name, model, x):
                output = forward_head(model, head, x)
            yield 0, checked_rows(name, x, y, output).take(torch.arange(0, device=y.device))


def checked_rows(name: str, x: InputTree, y: Tensor, output: CapturedOutput, first_row: int = 0) -> Rows:
    """Rows with their head output, after a look for NaN and labels beyond the logits' classes."""
    features, logits = output
    if len(features) != len(y):
        raise ValueError(f"{name}: the head ran on {len(features)} rows, expected {len(y)} as there are labels")
    require_finite(
        first_row, **{name: x, f"the model's features of {name}": features, f"the model's logits of {name}": logits}
    )
    check_label_range(name, y, logits.shape[1], first_row)
    y = within_range(y, logits.shape[1])
    if y.is_floating_point():
        masked = ((logits <= MASKED) & (y > 0)).any(1)
    else:
        masked = logits.gather(1, y[:, None])[:, 0] <= MASKED
    require(
        masked,
        lambda row: ValueError(
            f"{name}: row {first_row + row} has a label among the classes that the model masks, expected labels of the "
            "others: the loss of a masked class has no gradient that could be compared"
        ),
    )
    return Rows(x, y, features, logits, output.appends_one)


# --------------------------------------------------------------------------------------------------- reference gradient


class ReferenceSum:
    """Running sum of last-layer gradients; its mean is the reference gradient."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.count = 0

    def add(self, rows: Rows) -> None:
        """Add sum_n r_n [h_n; 1]^T of these rows."""
        self._sum = last_layer_gradient(rows.features, rows.logits, rows.y, bias=rows.appends_one, out=self._sum)
        self.count += len(rows)

    def mean(self, group: Group = None) -> Tensor | None:
        """(C, d + 1), or (C, d) without bias, over the rows of all processes of a group; None if there were none.

        Every process must have added rows, be it none of them (:func:`_forwarded_share`), or none may have.
        """
        if self._sum is None or group is None:
            return None if self._sum is None else self._sum / self.count
        total, count = sum_over([self._sum, torch.full_like(self._sum[0, 0], self.count)], group)
        return total / count


def marked_reference(rows: Rows, marked: Tensor, group: Group = None) -> tuple[Tensor, Tensor]:
    """The mean last-layer gradient of those rows that are marked; nothing is waited for.

    Args:
        rows: N rows with their features and logits.
        marked: (N,) bool.
        group: processes, each with rows of its own, over all of which the mean is taken.

    Returns:
        (C, d + 1), or (C, d) without bias, and () bool, whether no row was marked: then it is zero.
    """
    h = rows.features.to(work_dtype(rows.features.dtype))
    if rows.appends_one:
        h = torch.cat([h, h.new_ones(len(h), 1)], 1)
    # The row [h; 1] of zeros adds nothing, and how many such rows there are need not be known.
    total = last_layer_gradient(h.masked_fill(~marked[:, None], 0), rows.logits, rows.y, bias=False)
    total, count = sum_over([total, marked.sum().to(total.dtype)], group)
    return total / count.clamp(min=1), count == 0


def reference_gradient(
    model: nn.Module,
    buffer: RowSource,
    *,
    head: nn.Module | str | None = None,
    chunk_size: int = CHUNK,
    group: Group = None,
) -> Tensor:
    """Mean last-layer gradient of the buffer's cross-entropy: G = mean_n (softmax(z_n) - y_n) [h_n; 1]^T.

    The model runs in evaluation mode and is left as it was.

    Args:
        model: returns logits (N, C), or an object that holds them as ``.logits``.
        buffer: a ReplayBuffer, an ``(x, y)`` pair of tensors or arrays, a Dataset, a DataLoader, any object of rows
            ``(x, y)`` with ``__len__`` and ``__getitem__``, or a function that returns one of these and is called at
            every read (:mod:`gradmix.rows`). x is a tensor, or a mapping, tuple or list of tensors, which the model is
            given by keyword or position if its ``forward`` takes them so (:mod:`gradmix.inputs`).
        head: the classifier, or its name; None: found by itself.
        chunk_size: rows forwarded at a time.
        group: a process group of ``torch.distributed`` whose processes hold the same model and the same buffer: each
            forwards its share of the rows, and all get the same result, to the bit. Every process must call this; one
            that fails leaves the others waiting (:mod:`gradmix.processes`). A DataLoader must give the same batches in
            all of them. None: this process forwards all rows.

    Returns:
        (C, d + 1) float32 (float64 for a float64 model), the last column the bias's; (C, d) for a head without bias.

    Raises:
        ValueError: an empty buffer, labels out of range, a NaN (its row is named), or no certain head.
        TypeError: a buffer of another type.

    >>> import torch, gradmix
    >>> model = torch.nn.Linear(2, 2)
    >>> G = gradmix.reference_gradient(model, (torch.eye(2), torch.tensor([0, 1])))
    >>> G.shape
    torch.Size([2, 3])
    """
    refuse_worker("reference_gradient")
    check_group(group)
    model = unwrap(model)
    device = device_of(model)
    with untouched(model):
        reference, _ = read_buffer(model, buffer, head, chunk_size, device, group=group)
    if reference is None:
        raise ValueError("buffer: got no rows, expected at least one")
    return reference


def read_buffer(
    model: nn.Module,
    buffer: object,
    head: HeadLike,
    chunk: int,
    device: torch.device,
    keep: int = 0,
    keep_inputs: bool = True,
    group: Group = None,
) -> tuple[Tensor | None, list[Rows]]:
    """The reference gradient, or None for an empty buffer, and the first ``keep`` rows of each class.

    Both are the same in all processes of a group, each of which forwards its share.
    """
    total: ReferenceSum | None = None
    kept: list[Rows] = []
    places: list[Tensor] = []
    quota = ClassQuota(keep)
    for start, rows in _forwarded_share(model, head, "buffer", buffer, chunk, device, group):
        total = total or ReferenceSum()
        total.add(rows)
        if keep:
            if keep_inputs:
                check_mixable("buffer", rows.x, "mixed")
            index = quota.admit(rows.y)
            kept.append((rows if keep_inputs else rows.without_inputs()).take(index))
            places.append(start + index)
    if kept and group is not None:
        # The first rows of all are among the first rows of each share.
        everyone = gathered(concatenate(kept), group)
        everyone = everyone.take(gather_rows(torch.cat(places), group).argsort())
        kept = [everyone.take(ClassQuota(keep).admit(everyone.y))]
    return (None if total is None else total.mean(group)), kept


class ClassQuota:
    """Admits the first ``limit`` rows of every class over several calls."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count: dict[int, int] = {}

    def admit(self, labels: Tensor) -> Tensor:
        """Indices of the rows of this call that are within the quota, in order."""
        admitted = []
        for index, label in enumerate(class_of(labels).tolist()):
            count = self._count.get(label, 0)
            if count < self._limit:
                self._count[label] = count + 1
                admitted.append(index)
        return torch.tensor(admitted, dtype=torch.int64, device=labels.device)


# ----------------------------------------------------------------------------------------------------------- estimators


def feature_alignment(
    rows: Rows, partners: Rows, reference: Tensor, lam: Weight, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Estimator ``feature``: (inner, norm), both (N, M), of all pairs mixed in feature space; checks nothing."""
    inner, norm = mixed_alignment_op(
        rows.features,
        rows.logits,
        rows.y,
        partners.features,
        partners.logits,
        partners.y,
        reference,
        as_lams(lam, rows.features.device),
        "tf32x3",
        backend,
    )
    return inner[0], norm[0]


def mixed_input_alignment(
    model: nn.Module,
    head: HeadLike,
    rows: tuple[InputTree, Tensor],
    partners: tuple[InputTree, Tensor],
    pairs: Tensor,
    reference: Tensor,
    lam: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Estimator ``mixed``: (inner, norm), both (K,), of the pairs (i, j) in ``pairs`` (K, 2), each forwarded.

    Call it inside :func:`gradmix.probe.untouched`.
    """
    (x, y), (other_x, other_y) = rows, partners
    inner, norm = [], []
    for start in range(0, len(pairs), chunk):
        i, j = pairs[start : start + chunk].unbind(1)
        features, logits = forward_head(model, head, mix_samples(take(x, i), take(other_x, j), lam))
        require_finite_pairs(logits, i, j)
        part = row_alignment(features, logits, y[i], other_y[j], lam, reference)
        inner.append(part[0])
        norm.append(part[1])
    empty = reference.new_empty(0)
    return torch.cat([empty, *inner]), torch.cat([empty, *norm])


def row_alignment(
    features: Tensor, logits: Tensor, y_a: Tensor, y_b: Tensor, lam: float, reference: Tensor
) -> tuple[Tensor, Tensor]:
    """<r [h; 1]^T, G> and ||r [h; 1]^T|| of each row, both (N,), for the labels lam y_a + (1 - lam) y_b."""
    dtype, exact = reference.dtype, exact_dtype(reference.device)
    with torch.autocast(features.device.type, enabled=False):
        least = in_range(features, features, reference, dtype)[-1].least
        h = features.to(exact)
        residual = mixed_residual(logits.to(exact), y_a, y_b, lam, least)
        toward = residual @ reference.to(exact)  # (N, d + 1): G^T r
        inner = (toward[:, : h.shape[1]] * h).sum(1)
        square = h.square().sum(1)
        if reference.shape[1] == h.shape[1] + 1:
            inner = inner + toward[:, -1]
            square = square + 1
        return inner.to(dtype), torch.linalg.vector_norm(residual, dim=1).mul(square.sqrt()).to(dtype)


# ------------------------------------------------------------------------------------------------------------- criteria


def by_sample(inner: Tensor, norm: Tensor, reference: Tensor) -> Alignment:
    """Criterion ``sample``: every pair for itself; ``reference`` is the reference gradient, or its norm."""
    return Alignment(inner, cosine(inner, norm, length(reference)))


class ClassMean:
    """Criterion ``class``: means over the rows of each class pair, gathered over several calls.

    Args:
        classes: (P,) int64, ascending: the classes told apart, as :func:`classes_of` gives them.
        reference: the reference gradient, or its norm.
    """

    def __init__(self, classes: Tensor, reference: Tensor) -> None:
        size = len(classes)
        self.classes, self._reference = classes, reference
        self._inner = torch.zeros(size * size, dtype=reference.dtype, device=reference.device)
        self._norm, self._count = torch.zeros_like(self._inner), torch.zeros_like(self._inner)

    def add_matrix(self, inner: Tensor, norm: Tensor, y_a: Tensor, y_b: Tensor, own_rows: bool) -> None:
        """Add all pairs of an (N, M) matrix but those that are NaN and, if ``own_rows``, a row with itself."""
        left, right = (class_members(y, self.classes, inner.dtype) for y in (y_a, y_b))
        sums = class_pair_sums((inner, norm), left, right, own_rows)
        for total, value in zip((self._inner, self._norm, self._count), sums, strict=True):
            total += value.flatten()

    def add_pairs(self, inner: Tensor, norm: Tensor, y_a: Tensor, y_b: Tensor) -> None:
        """Add single pairs: all arguments (K,), the labels among ``classes``."""
        left, right = (torch.searchsorted(self.classes, y.contiguous()) for y in (y_a, y_b))
        cell = left * len(self.classes) + right
        for total, value in ((self._inner, inner), (self._norm, norm), (self._count, torch.ones_like(inner))):
            total.index_add_(0, cell, value.to(total.dtype))

    def means(self) -> tuple[Tensor, Tensor]:
        """The (P, P) means of inner products and of norms; NaN where no pair was added."""
        shape = (len(self.classes),) * 2
        count = self._count.masked_fill(self._count == 0, float("nan"))
        return (self._inner / count).view(shape), (self._norm / count).view(shape)

    def alignment(self) -> Alignment:
        """The (P, P) alignment; NaN where no pair was added."""
        inner, norm = self.means()
        return Alignment(inner, cosine(inner, norm, length(self._reference)), self.classes)


def class_table(
    model: nn.Module,
    head: HeadLike,
    rows: Rows,
    reference: Tensor,
    *,
    estimator: str,
    class_samples: int,
    generator: torch.Generator,
    chunk: int,
    backend: str,
) -> ClassTable:
    """Alignment of all pairs of the classes of ``rows`` at :data:`TABLE_LAMS`; call it inside ``untouched``.

    ``feature``: all pairs of up to ``class_samples`` rows of each class. ``mixed``: ``class_samples`` random mixed
    inputs for each ordered pair of classes, shared out among the mixing weights.
    """
    labels = class_of(rows.y)
    classes = torch.unique(labels)
    if estimator == "feature":
        limit = max(1, min(class_samples, TABLE_ROWS // len(classes)))
        rows = rows.take(ClassQuota(limit).admit(rows.y))
        inner, norm = class_pair_alignment(
            rows.features,
            rows.logits,
            rows.y,
            class_index(classes, class_of(rows.y)),
            len(classes),
            reference,
            torch.tensor(TABLE_LAMS, dtype=torch.float64, device="cpu"),
            backend=backend,
        )
        return ClassTable(TABLE_LAMS, inner, norm, length(reference), classes)
    own = (rows.x, rows.y)
    means = []
    for lam in TABLE_LAMS:
        mean = ClassMean(classes, reference)
        pairs = _class_pairs(labels, classes, max(1, class_samples // len(TABLE_LAMS)), generator)
        inner, norm = mixed_input_alignment(model, head, own, own, pairs, reference, lam, chunk)
        mean.add_pairs(inner, norm, labels[pairs[:, 0]], labels[pairs[:, 1]])
        means.append(mean.means())
    inner, norm = (torch.stack(v) for v in zip(*means, strict=True))
    return ClassTable(TABLE_LAMS, inner, norm, length(reference), classes)


def whole_class_table(
    model: nn.Module,
    rows: tuple[InputTree, Tensor],
    reference: WholeReference,
    *,
    estimator: WholeEstimator,
    class_samples: int,
    threshold: float,
    width: int,
    generator: torch.Generator,
    chunk: int,
    backend: str,
) -> tuple[ClassTable, Screening | None]:
    """The same over all parameters, from rows (x, y); for ``sketch`` also how it came about.

    ``jvp``: ``class_samples`` random mixed inputs for each ordered pair of classes. ``sketch``: all rows' sketches by
    class, and its budget, both shared out among the mixing weights.
    """
    labels = class_of(rows[1])
    classes = torch.unique(labels)
    norm = reference_norm(reference)
    means, screening = [], None
    if isinstance(estimator, SketchEstimator):
        sketches = RowSketches(
            model, estimator, [("batch", rows)], reference, by_class=True, chunk=chunk, backend=backend
        )
        share = replace(estimator, budget=estimator.budget // len(TABLE_LAMS))
        counts = [0, 0, 0]
        for lam in TABLE_LAMS:
            cells = sketches.cells(lam)
            done = recheck(
                model, share, cells, torch.ones_like(cells.inner, dtype=torch.bool), threshold, rows, rows, reference,
                lam, width, chunk, generator,
            )  # fmt: skip
            counts = [a + b for a, b in zip(counts, astuple(done), strict=True)]
            means.append((cells.inner, cells.norm))
        screening = Screening(*counts)
    else:
        each = max(1, class_samples // len(TABLE_LAMS))
        for lam in TABLE_LAMS:
            mean = ClassMean(classes, norm)
            pairs = _class_pairs(labels, classes, each, generator)
            inner, norms = jvp_alignment(model, estimator, rows, rows, pairs, reference, lam, width, chunk)
            mean.add_pairs(inner, norms, labels[pairs[:, 0]], labels[pairs[:, 1]])
            means.append(mean.means())
    inner, norms = (torch.stack(v) for v in zip(*means, strict=True))
    return ClassTable(TABLE_LAMS, inner, norms, norm.to(inner), classes), screening


def _class_pairs(labels: Tensor, classes: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """(P * P * samples, 2) random row indices, ``samples`` for each ordered pair of classes, drawn with replacement."""
    position = torch.arange(len(classes), device=labels.device)
    cells = torch.cartesian_prod(position, position).view(-1, 2)
    return rows_of_classes(cells, classes, labels, labels, samples, generator)


def alignment_matrix(
    model: nn.Module,
    buffer: RowSource,
    batch: tuple[InputTree, Tensor],
    *,
    lam: float,
    candidates: tuple[InputTree, Tensor] | None = None,
    criterion: Criterion = "sample",
    estimator: Estimator | WholeEstimator = "feature",
    head: nn.Module | str | None = None,
    backend: str = "auto",
    chunk_size: int = CHUNK,
) -> Alignment:
    """Alignment of every mixture of a row of ``batch`` with a candidate, at one mixing weight.

    Args:
        model, buffer, head, chunk_size: as :func:`reference_gradient`; the buffer must not be empty.
        batch: x (N, ...), a tensor or a tree of tensors, and y, (N,) integers or (N, C) label vectors.
        lam: weight of the batch's row, in [0, 1].
        candidates: the partners' rows (M of them); None: the batch's own rows.
        criterion: ``"sample"``, (N, M); or ``"class"``, (P, P) over the classes of both.
        estimator: ``"feature"``, ``"mixed"`` or ``"jvp"`` (which forward all N x M mixtures), or ``"sketch"`` (here
            nothing is checked again); or a :class:`gradmix.JvpEstimator` or :class:`gradmix.SketchEstimator`.
        backend: of the operator ``mixed_alignment``.

    Returns:
        :class:`Alignment`.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type, named.
    """
    check_choice("criterion", criterion, get_args(Criterion))
    kind = as_estimator(estimator)
    check_lam(lam)
    model = unwrap(model)
    refuse_worker("alignment_matrix")
    x, y = as_pair("batch", batch)
    device = first_tensor(x).device
    check_mixable("batch", x, kind)
    partner_pair = (x, y)
    if candidates is not None:
        partner_pair = as_pair("candidates", candidates)
        check_alike("candidates", partner_pair[0], x, "the batch")
    if not isinstance(kind, str):
        chunk_size, width = extent_of(model, kind, x, chunk_size)
        whole = whole_reference(model, kind, buffer, chunk_size)
        if whole is None:
            raise ValueError("buffer: got no rows, expected at least one")
        rows, partners = (bare_rows(*pair) for pair in ((x, y), partner_pair))
        if isinstance(kind, SketchEstimator):
            return sketched_cells(
                model, kind, rows, None if candidates is None else partners, whole, lam, criterion, chunk_size, backend
            )[0]
        pairs = torch.cartesian_prod(*(torch.arange(len(r), device=device) for r in (rows, partners))).view(-1, 2)
        inner, norm = jvp_alignment(model, kind, (x, y), partner_pair, pairs, whole, lam, width, chunk_size)
        shape = (len(rows), len(partners))
        return judge(
            inner.view(shape), norm.view(shape), rows, partners, reference_norm(whole), criterion, candidates is None
        )
    with untouched(model):
        reference, _ = read_buffer(model, buffer, head, chunk_size, device)
        if reference is None:
            raise ValueError("buffer: got no rows, expected at least one")
        rows, partners = forward_pair(model, head, (x, y), partner_pair, chunk_size, candidates is None)
        inner, norm = pair_alignment(
            model, head, rows, partners, reference, lam, estimator=kind, chunk=chunk_size, backend=backend
        )
    return judge(inner, norm, rows, partners, reference, criterion, candidates is None).compact()


def forward_pair(
    model: nn.Module,
    head: HeadLike,
    batch: tuple[InputTree, Tensor],
    candidates: tuple[InputTree, Tensor],
    chunk: int,
    own_rows: bool,
) -> tuple[Rows, Rows]:
    """The batch and the candidates, forwarded once each; the same object twice if ``own_rows``."""
    rows = forward_all(model, head, "batch", batch, chunk)
    if own_rows:
        return rows, rows
    partners = forward_all(model, head, "candidates", candidates, chunk)
    check_one_mask(rows, partners)
    return rows, partners


def forward_all(model: nn.Module, head: HeadLike, name: str, pair: tuple[InputTree, Tensor], chunk: int) -> Rows:
    """All rows of ``pair`` with their head outputs; call it inside ``untouched``."""
    parts = list(forwarded(model, head, name, pair, chunk, first_tensor(pair[0]).device))
    return parts[0] if len(parts) == 1 else concatenate(parts)


def gathered(rows: Rows, group: Group) -> Rows:
    """The rows of all processes of a group, in the order of their ranks."""
    x = map_tensors(lambda leaf: gather_rows(leaf, group), rows.x)
    y, features, logits = (gather_rows(part, group) for part in (rows.y, rows.features, rows.logits))
    return Rows(x, y, features, logits, rows.appends_one)


def agreed(table: ClassTable, group: Group) -> ClassTable:
    """The table of a group's first process; those of the others differ from it by their draws and by rounding."""
    inner, norm = as_the_first([table.inner, table.norm], group)
    return replace(table, inner=inner, norm=norm)


def concatenate(parts: list[Rows], classes: int | None = None) -> Rows:
    """Several chunks as one; hard and soft labels meet as label vectors, as wide as ``classes`` or the logits."""
    if len({part.y.is_floating_point() for part in parts}) > 1:
        classes = parts[0].logits.shape[1] if classes is None else classes
        parts = [replace(part, y=dense_labels(part.y, classes, torch.float32)) for part in parts]
    for part in parts[1:]:
        check_one_mask(parts[0], part)
    x = concatenate_inputs([part.x for part in parts])
    y, features, logits = (torch.cat([getattr(part, name) for part in parts]) for name in ("y", "features", "logits"))
    return Rows(x, y, features, logits, parts[0].appends_one)


def check_one_mask(rows: Rows, others: Rows) -> None:
    """Refuse rows of two passes in which the model masks other classes: their mixtures are of no head.

    Raises:
        ValueError: there are such.
    """
    if len(rows) == 0 or rows.logits.shape[1] != others.logits.shape[1]:
        return
    masked = rows.logits[:1] <= MASKED
    require(
        ((others.logits <= MASKED) != masked).any(1),
        lambda row: ValueError(
            f"model: masks other classes for sample {row} of a pass than in a pass before, expected one mask for all "
            "samples that are mixed with each other (of the batch, the candidates, and by class the buffer)"
        ),
    )


def pair_alignment(
    model: nn.Module,
    head: HeadLike,
    rows: Rows,
    partners: Rows,
    reference: Tensor,
    lam: float,
    *,
    estimator: str,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(inner, norm), both (N, M), of all pairs by either last-layer estimator; call it inside ``untouched``."""
    if estimator == "feature":
        return feature_alignment(rows, partners, reference, lam, backend)
    count = (len(rows), len(partners))
    pairs = torch.cartesian_prod(*(torch.arange(n, device=rows.y.device) for n in count)).view(-1, 2)
    inner, norm = mixed_input_alignment(
        model, head, (rows.x, rows.y), (partners.x, partners.y), pairs, reference, lam, chunk
    )
    return inner.view(count), norm.view(count)


def judge(
    inner: Tensor, norm: Tensor, rows: Rows, partners: Rows, reference: Tensor, criterion: Criterion, own_rows: bool
) -> Alignment:
    """Apply a criterion to all pairs."""
    if criterion == "sample":
        return by_sample(inner, norm, reference)
    y_a, y_b = class_of(rows.y), class_of(partners.y)
    mean = ClassMean(classes_of(y_a if own_rows else torch.cat([y_a, y_b])), reference)
    mean.add_matrix(inner, norm, y_a, y_b, own_rows)
    return mean.alignment()


def bare_rows(x: InputTree, y: Tensor) -> Rows:
    """Rows of which neither features nor logits are wanted."""
    nothing = y.new_empty(len(y), 0, dtype=floating_dtype(x))
    return Rows(x, y, nothing, nothing)


def buffer_rows(source: object, keep: int, chunk: int, device: torch.device) -> list[Rows]:
    """Up to ``keep`` rows a class of the buffer, bare."""
    quota = ClassQuota(keep)
    kept = []
    for x, y in chunks_of("buffer", source, chunk, device):
        index = quota.admit(y)
        kept.append(bare_rows(take(x, index), y[index]))
    return kept


def sketched_cells(
    model: nn.Module,
    estimator: SketchEstimator,
    rows: Rows,
    partners: Rows | None,
    reference: WholeReference,
    lam: float,
    criterion: Criterion,
    chunk: int,
    backend: str,
) -> tuple[Alignment, Cells]:
    """Estimator ``sketch``: the alignment of all pairs of rows, or of their classes, and what it is made of.

    Args:
        partners: None: the rows' own.
    """
    sources = [("batch", (rows.x, rows.y))] + ([] if partners is None else [("candidates", (partners.x, partners.y))])
    by_class = criterion == "class"
    sketches = RowSketches(model, estimator, sources, reference, by_class=by_class, chunk=chunk, backend=backend)
    if by_class or partners is None:
        cells = sketches.cells(lam)
    else:
        cells = sketches.cells(lam, slice(0, len(rows)), slice(len(rows), None))
    return whole_alignment(cells, reference), cells


def whole_alignment(cells: Cells, reference: WholeReference) -> Alignment:
    """The alignment that cells stand for."""
    norm = reference_norm(reference).to(cells.inner)
    return Alignment(cells.inner, cosine(cells.inner, cells.norm, norm), cells.classes)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")
