"""Labels: class indices (N,) int64, or label vectors (N, C) of a floating-point dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmix.ops.capsules import as_capsules, extension_for
from gradmix.runtime.deferred_checks import can_sync, check_samples, check_where

SUM_TOLERANCE = 1e-2
"""How far a label vector's sum may be from 1: the rounding of bfloat16 labels, not more."""


def dense_labels(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """(N, classes) label vectors: the labels themselves, or their one-hot form."""
    if labels.is_floating_point():
        return labels.to(dtype)
    # torch's own one_hot looks at the labels, for which a GPU would have to be waited for.
    return torch.zeros(*labels.shape, classes, dtype=dtype, device=labels.device).scatter_(-1, labels[..., None], 1.0)


def class_of(labels: Tensor) -> Tensor:
    """(N,) class indices: the labels themselves, or the largest entry of each label vector."""
    return labels.argmax(1) if labels.is_floating_point() else labels


def as_class_indices(name: str, labels: Tensor) -> Tensor:
    """Integer labels as int64; others as they are.

    Raises:
        TypeError: neither integers nor of a floating-point dtype.
    """
    if labels.is_floating_point() or labels.dtype == torch.int64:
        return labels
    if labels.dtype == torch.bool or labels.is_complex():
        raise TypeError(
            f"{name}: got dtype {labels.dtype}, expected int64 class indices or floating-point label vectors; y.long() "
            "makes class indices of it"
        )
    return labels.to(torch.int64)


def check_labels(name: str, labels: Tensor, rows: int, classes: int | None) -> None:
    """Raise unless ``labels`` are ``rows`` int64 class indices in [0, classes), or (rows, classes) label vectors.

    Args:
        name: how the error names the argument.
        labels: the value given.
        rows: how many rows it must have.
        classes: number of classes; None: any.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: got {type(labels).__name__}, expected a tensor")
    if labels.is_floating_point():
        if labels.ndim != 2 or len(labels) != rows or (classes is not None and labels.shape[1] != classes):
            width = "C" if classes is None else classes
            hint = "; class indices are integers, as y.long()" if labels.ndim == 1 else ""
            raise ValueError(
                f"{name}: got soft labels of shape {tuple(labels.shape)}, expected ({rows}, {width}){hint}"
            )
        _check_sums(name, labels)
        return
    if labels.dtype != torch.int64:
        raise TypeError(
            f"{name}: got dtype {labels.dtype}, expected int64 class indices or floating-point label vectors"
        )
    if labels.shape != (rows,):
        hint = "; y.squeeze(1) has that shape" if labels.shape == (rows, 1) else ""
        raise ValueError(f"{name}: got shape {tuple(labels.shape)}, expected ({rows},) class indices{hint}")
    if torch.compiler.is_compiling():
        return  # values cannot be looked at without breaking the graph
    limit = "[0, number of classes)" if classes is None else f"[0, {classes})"

    def error(row: int) -> ValueError:
        hint = "; rows that no class is known of, y < 0, are to be left out" if int(labels[row]) < 0 else ""
        return ValueError(
            f"{name}: row {row} {_describe_label(labels[row], classes)}, expected a class index in {limit}{hint}"
        )

    check_where(_is_outside, (labels, classes), error)


def check_label_range(name: str, labels: Tensor, classes: int, first_row: int = 0) -> None:
    """Raise ValueError unless checked labels fit a model of ``classes`` classes.

    Args:
        name: what the rows are called; the error speaks of its labels.
        labels: as :func:`check_labels` lets them pass.
        classes: width of the model's logits.
        first_row: index of row 0 in the whole argument, of which these are a chunk.
    """
    if labels.is_floating_point():
        if labels.shape[1] != classes:
            raise ValueError(f"{name} labels: got {labels.shape[1]} classes, expected {classes} as the model's logits")
        return
    check_where(
        _is_beyond,
        (labels, classes),
        lambda row: ValueError(
            f"{name} labels: row {first_row + row} {_describe_label(labels[row], classes)}, expected a class index in "
            f"[0, {classes})"
        ),
    )


def _is_outside(labels: Tensor, classes: int | None) -> Tensor:
    return labels < 0 if classes is None else (labels < 0) | (labels >= classes)


def _describe_label(label: Tensor, classes: int | None) -> str:
    """Say what a label is that was out of range; its memory may have been written since the check."""
    value = int(label)
    return "was another number" if value >= 0 and (classes is None or value < classes) else f"is {value}"


def _is_beyond(labels: Tensor, classes: int) -> Tensor:
    return labels >= classes


def are_live(labels: Tensor, logits: Tensor, masked: float) -> bool:
    """Whether each sample's label is a class whose logit is above ``masked``; False also where this is not known.

    Args:
        labels: (N,) class indices, or (N, C) label vectors, of which nothing is known.
        logits: (N, C).
        masked: the logit of a masked class.
    """
    labels, logits = labels.detach(), logits.detach()
    extension = extension_for((torch.int64,), labels) and extension_for((torch.float32, torch.float64), logits)
    return extension is not None and bool(extension.live_labels(*as_capsules(labels, logits), masked))


def within_range(labels: Tensor, classes: int) -> Tensor:
    """The labels, held in [0, classes) where their check is still under way: an index out of range ends CUDA's context.

    What is made of such labels lasts for a step: the next call raises the error.
    """
    if labels.is_floating_point() or can_sync(labels.device):
        return labels
    return labels.clamp(0, classes - 1)


def _check_sums(name: str, labels: Tensor) -> None:
    """softmax(z) - y is the gradient of the cross-entropy only where y sums to 1."""
    if torch.compiler.is_compiling():
        return
    totals = labels.sum(1, dtype=torch.float32)
    check_samples(
        ~((totals - 1).abs() <= SUM_TOLERANCE),
        lambda row: ValueError(
            f"{name}: row {row} sums to {float(totals[row]):.4g}, expected label vectors that sum to 1"
        ),
    )
