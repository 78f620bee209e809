"""Operator ``mix_labels``: class indices of each sample and its partner, mixed to a label vector.

Bodies: ``triton``, one launch; ``torch``; ``reference``. All give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gradmix.calibration.lookup import CalibratedWorth, Extent
from gradmix.ops import _triton
from gradmix.ops.backends import Backend, Operator
from gradmix.ops.mix_samples import mix_samples_reference
from gradmix.ops.registration import is_left_to_torch, refuse_observed


def mix_labels_reference(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor, classes: int) -> Tensor:
    """One-hot vectors, mixed as samples are. Arguments and result as :func:`mix_labels`."""
    vectors, candidates = (one_hot(labels, classes).to(lam.dtype) for labels in (own, other))
    return mix_samples_reference(vectors, candidates, partner, lam)


def mix_labels_torch(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor, classes: int) -> Tensor:
    """Batched torch calls. Arguments and result as :func:`mix_labels`."""
    weight = lam[:, None]
    vectors = weight.new_zeros(len(own), classes).scatter_(1, own[:, None], weight)
    return vectors.scatter_add_(1, other[partner][:, None], 1 - weight)


def mix_labels_triton(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor, classes: int) -> Tensor:
    """One launch. Arguments and result as :func:`mix_labels`."""
    from gradmix.kernels import mix_samples as kernel

    vectors = torch.empty(len(own), classes, dtype=lam.dtype, device=own.device)
    kernel.mix_samples(own.contiguous(), other.contiguous(), partner, lam.detach(), vectors)
    return vectors


def _triton_can_run(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor, _classes: int) -> str | None:
    if len(own) == 0 or not partner.shape == lam.shape == own.shape or other.ndim != 1:
        return "it serves one label, partner and weight a sample"
    return _triton.device_reason(own.device) or refuse_observed(own, other, partner, lam)


def _extent(own: Tensor, _other: Tensor, _partner: Tensor, lam: Tensor, classes: int) -> Extent:
    return own.device, lam.dtype, "", len(own), classes


OPERATOR = Operator(
    "mix_labels",
    (
        Backend(
            "triton",
            mix_labels_triton,
            can_run=_triton_can_run,
            available=_triton.unavailable_reason,
            worth=CalibratedWorth("mix_labels", "triton", ("samples", "classes"), _extent),
        ),
        Backend("torch", mix_labels_torch),
        Backend("reference", mix_labels_reference),
    ),
)


def mix_labels(
    own: Tensor, other: Tensor, partner: Tensor, lam: Tensor, classes: int, *, backend: str = "auto"
) -> Tensor:
    """Return lam e(own) + (1 - lam) e(other[partner]), e(c) being the one-hot vector of a class.

    Args:
        own: (N,) int64, class indices in [0, C).
        other: (M,) int64.
        partner: (N,) int64, in [0, M).
        lam: (N,), the weight of ``own``.
        classes: C.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        (N, C) of the dtype of ``lam``. Of a class index out of range torch raises an error, on a GPU CUDA does; the
        Triton kernel makes NaN of it.

    >>> import torch
    >>> y = torch.tensor([2, 0])
    >>> mix_labels(y, y, torch.tensor([1, 1]), torch.tensor([0.25, 1.0]), 3)
    tensor([[0.7500, 0.0000, 0.2500],
            [1.0000, 0.0000, 0.0000]])
    """
    if is_left_to_torch(backend, own, other, partner, lam):
        return mix_labels_torch(own, other, partner, lam, classes)
    result: Tensor = OPERATOR.choose(backend, own, other, partner, lam, classes).run(own, other, partner, lam, classes)
    return result
