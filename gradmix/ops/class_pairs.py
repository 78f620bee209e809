"""Alignment of mixed rows with a reference gradient, as means over the rows of every pair of classes.

Where the class table is wanted, the N x N pairs behind it are not: with r_a, r_b running over the rows of classes a and
b, no row with itself,

    inner[l, a, b] = mean of the inner product of the pair (r_a, r_b) mixed by lams[l]

and likewise for the norms (:mod:`gradmix.ops.mixed_alignment` says what these are). The Triton body sums within its
tiles and never writes the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.calibration.lookup import CalibratedWorth, Extent
from gradmix.ops import _triton
from gradmix.ops.backends import Backend, Operator
from gradmix.ops.dtypes import without_autocast, work_dtype
from gradmix.ops.labels import check_labels
from gradmix.ops.mixed_alignment import (
    MixedAlignment,
    Side,
    accept_tensors,
    as_lams,
    check_reference,
    cpp_can_run,
    has_bias,
    mixed_alignment_cpp,
    mixed_alignment_reference,
    mixed_alignment_torch,
    project,
)
from gradmix.ops.registration import register

PAIRS_AT_A_TIME = 1 << 24
"""Pairs held by the torch body, over several mixing weights where so many fit (64 MiB of float32)."""

LARGEST_GROUP = 16
"""Rows of one class that the Triton body sums within a tile; a class of more rows makes several groups."""


def class_pairs_reference(
    features: Tensor, logits: Tensor, labels: Tensor, index: Tensor, classes: int, reference: Tensor, lams: Tensor
) -> MixedAlignment:
    """The formula, class pair by class pair; slow. Arguments and result as :func:`class_pair_alignment`."""
    inner, norm = _empty(features, classes, lams)
    side = Side(features, logits, labels)
    for k, lam in enumerate(lams.tolist()):
        pairs = mixed_alignment_reference(side, side, reference, lam)
        for a in range(classes):
            for b in range(classes):
                at = [
                    (i, j)
                    for i in (index == a).nonzero()[:, 0].tolist()
                    for j in (index == b).nonzero()[:, 0].tolist()
                    if i != j
                ]
                for out, value in ((inner, pairs.inner), (norm, pairs.norm)):
                    out[k, a, b] = torch.stack([value[p] for p in at]).mean() if at else math.nan
    return MixedAlignment(inner, norm)


def class_pairs_torch(
    features: Tensor, logits: Tensor, labels: Tensor, index: Tensor, classes: int, reference: Tensor, lams: Tensor
) -> MixedAlignment:
    """All pairs in plain torch, then products with the rows' classes. As :func:`class_pair_alignment`."""
    return _of_all_pairs(mixed_alignment_torch, Side(features, logits, labels), index, classes, reference, lams)


def class_pairs_cpp(
    features: Tensor, logits: Tensor, labels: Tensor, index: Tensor, classes: int, reference: Tensor, lams: Tensor
) -> MixedAlignment:
    """The same, with the pairs from the extension, for the CPU. As :func:`class_pair_alignment`."""
    return _of_all_pairs(mixed_alignment_cpp, Side(features, logits, labels), index, classes, reference, lams)


def _of_all_pairs(
    align: Callable[..., MixedAlignment], side: Side, index: Tensor, classes: int, reference: Tensor, lams: Tensor
) -> MixedAlignment:
    inner, norm = _empty(side.features, classes, lams)
    member = class_members(index, torch.arange(classes, device=index.device), inner.dtype)
    at_once = max(1, PAIRS_AT_A_TIME // max(1, len(index)) ** 2)
    done = 0
    for part in lams.split(at_once):
        pairs = align(side, side, reference, part)
        *sums, count = class_pair_sums(pairs, member, member, own_rows=True)
        for out, value in zip((inner, norm), sums, strict=True):
            out[done : done + len(part)] = value / count
        done += len(part)
    return MixedAlignment(inner, norm)


def class_pairs_triton(
    features: Tensor, logits: Tensor, labels: Tensor, index: Tensor, classes: int, reference: Tensor, lams: Tensor
) -> MixedAlignment:
    """One kernel that sums within its tiles. As :func:`class_pair_alignment`; the host waits for the classes' sizes."""
    from gradmix.kernels import mixed_alignment as kernel

    counts = torch.bincount(index, minlength=classes)
    rows, group, groups = layout(index, counts)
    with without_autocast(features.device):
        u = project(features.float(), reference.float())
        sums = kernel.class_pair_sums(
            features, logits, labels, u, lams, rows, group, bias=has_bias(features, reference), precision="tf32x3"
        )
        member = class_members(groups, torch.arange(classes, device=index.device), torch.float32)
        pairs = counts[:, None] * counts - torch.diag(counts)
        # 0 / 0 is the NaN of a pair of classes without a pair of rows.
        inner, norm = ((member.T @ value @ member) / pairs for value in sums)
    return MixedAlignment(inner, norm)


def layout(index: Tensor, counts: Tensor) -> tuple[Tensor, int, Tensor]:
    """Rows sorted into groups of one class each; the host waits for the sizes of the classes.

    Args:
        index: (N,) int64, each row's class.
        counts: (P,) int64, rows of each class.

    Returns:
        (G * group,) int64, the row in each slot or -1; group, a power of two; (G,) int64, each group's class.
    """
    largest = int(counts.max()) if len(counts) else 0
    group = min(LARGEST_GROUP, 1 << max(0, largest - 1).bit_length())
    number = (counts + group - 1) // group
    groups = torch.repeat_interleave(torch.arange(len(counts), device=index.device), number)
    order = index.argsort(stable=True)
    ordered = index[order]
    within = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[ordered]
    first = number.cumsum(0) - number
    slot = first[ordered] * group + within
    rows = torch.full((len(groups) * group,), -1, dtype=torch.int64, device=index.device)
    return rows.scatter_(0, slot, order), group, groups


def class_members(labels: Tensor, classes: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, P), 1 where a row of ``labels`` (N,) is of one of the ``classes`` (P,), else 0."""
    return (labels[:, None] == classes).to(dtype)


def class_pair_sums(
    values: tuple[Tensor, Tensor], left: Tensor, right: Tensor, own_rows: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Two matrices of pairs summed by class pair, and the number of pairs summed; those that are NaN are left out.

    Args:
        values: (..., N, M) both, inner products and norms, NaN in the same places.
        left: (N, P), :func:`class_members` of the rows.
        right: (M, P), of the partners.
        own_rows: the partners are the rows themselves, and no row counts with itself.

    Returns:
        (..., P, P) sums of the first, of the second, and the count.
    """
    valid = ~torch.isnan(values[0])
    if own_rows:
        valid.diagonal(dim1=-2, dim2=-1).fill_(False)
    first, second = (left.T @ value.masked_fill(~valid, 0) @ right for value in values)
    return first, second, left.T @ valid.to(left.dtype) @ right


def _empty(features: Tensor, classes: int, lams: Tensor) -> MixedAlignment:
    shape = (len(lams), classes, classes)
    return MixedAlignment(*(features.new_empty(shape, dtype=work_dtype(features.dtype)) for _ in "ab"))


def _triton_can_run(features: Tensor, logits: Tensor, *_rest: object) -> str | None:
    return _triton.can_run(features, logits)


TRITON_AXES = ("samples", "classes", "features", "weights")


def _triton_extent(features: Tensor, logits: Tensor, labels: Tensor, *rest: Any) -> Extent:
    kind = "label vectors" if labels.is_floating_point() else "class indices"
    if logits.dtype is not features.dtype:
        kind += f", logits in {logits.dtype}"
    rows, width = features.shape
    return features.device, features.dtype, kind, rows, logits.shape[1], width, rest[3].numel()


OPERATOR = Operator(
    "class_pair_alignment",
    (
        Backend(
            "triton",
            class_pairs_triton,
            can_run=_triton_can_run,
            worth=CalibratedWorth("class_pair_alignment", "triton", TRITON_AXES, _triton_extent),
            available=_triton.unavailable_reason,
        ),
        Backend("cpp", class_pairs_cpp, can_run=cpp_can_run, available=_extension.unavailable_reason),
        Backend("torch", class_pairs_torch),
        Backend("reference", class_pairs_reference),
    ),
)


def _fake(features: Tensor, logits: Tensor, labels: Tensor, index: Tensor, classes: int, *rest: Any) -> MixedAlignment:
    return _empty(features, classes, rest[1])


_class_pair_alignment_op = register(
    OPERATOR,
    "(Tensor features, Tensor logits, Tensor labels, Tensor index, SymInt classes, Tensor reference, Tensor lams, "
    "str backend) -> (Tensor, Tensor)",
    _fake,
)


@accept_tensors("")
def class_pair_alignment(
    side: Side,
    index: Tensor,
    num_classes: int,
    reference: Tensor,
    lams: Tensor,
    *,
    backend: str = "auto",
) -> MixedAlignment:
    """Mean inner products and norms of mixed last-layer gradients for all pairs of classes, at several weights.

    Args:
        side: N samples: their features, logits and labels.
        index: (N,) int64 in [0, num_classes): the class that each row counts for.
        num_classes: P.
        reference: (C, d + 1), or (C, d) for a last layer without bias.
        lams: (L,) floating point, weights of the row of the first class, in [0, 1].
        backend: ``"auto"``, ``"triton"``, ``"cpp"``, ``"torch"`` or ``"reference"``.

    Returns:
        :class:`gradmix.ops.mixed_alignment.MixedAlignment` of two (L, P, P) tensors, float64 for float64 features and
        float32 otherwise; NaN for classes without a pair of rows.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes that do not fit, or values out of range.
        RuntimeError: the backend named cannot run these tensors or is not available.

    >>> import torch
    >>> from gradmix.ops.class_pairs import class_pair_alignment
    >>> from gradmix.ops.mixed_alignment import Side
    >>> y = torch.tensor([0, 1])
    >>> batch = Side(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]]), y)
    >>> G = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> class_pair_alignment(batch, y, 2, G, torch.tensor([0.5, 1.0])).inner
    tensor([[[    nan,  0.0000],
             [ 0.0000,     nan]],
    <BLANKLINE>
            [[    nan, -0.5000],
             [ 1.0000,     nan]]])
    """
    if not isinstance(side, Side):
        raise TypeError(f"side: got {type(side).__name__}, expected a Side of features, logits and labels")
    features, logits, labels = side
    for name, value in (("features", features), ("logits", logits)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
        if value.ndim != 2 or len(value) != len(features):
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected one row for each of features")
    check_labels("labels", labels, len(features), logits.shape[1])
    check_labels("index", index, len(features), num_classes)
    if index.is_floating_point():
        raise TypeError(f"index: got dtype {index.dtype}, expected int64")
    check_reference(reference, logits.shape[1], features.shape[1])
    weights = as_lams(lams, features.device)
    return MixedAlignment(*_class_pair_alignment_op(*side, index, num_classes, reference, weights, backend))
