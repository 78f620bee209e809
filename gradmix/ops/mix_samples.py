"""Operator ``mix_samples``: each sample mixed with its partner, lam x_i + (1 - lam) x_partner.

Bodies: ``triton``, one launch; ``cpp`` for the CPU, in one pass over the memory; ``torch``, which autograd can record;
``reference``. All give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.calibration.lookup import CalibratedWorth, Extent
from gradmix.ops import _triton
from gradmix.ops.backends import Backend, Operator
from gradmix.ops.capsules import as_capsules
from gradmix.ops.registration import is_left_to_torch, refuse_observed


def mix_samples_reference(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """The formula, sample by sample. Arguments and result as :func:`mix_samples`."""
    mixed = torch.empty_like(own)
    for i, (j, weight) in enumerate(zip(partner.tolist(), lam.to(own.dtype), strict=True)):
        mixed[i] = weight * own[i] + (1 - weight) * other[j].to(own.dtype)
    return mixed


def mix_samples_torch(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """Batched torch calls. Arguments and result as :func:`mix_samples`."""
    weight = lam.to(own.dtype).view(-1, *[1] * (own.ndim - 1))
    return weight * own + (1 - weight) * other[partner].to(own.dtype)


def mix_samples_cpp(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """The extension's body. Arguments and result as :func:`mix_samples`."""
    extension: Any = _extension.load()
    mixed = torch.empty_like(own)
    matrices = (_as_matrix(value.detach()) for value in (own, other))
    weight = lam.detach().to(own.dtype).contiguous()
    tensors = as_capsules(*matrices, partner.contiguous(), weight, _as_matrix(mixed))
    extension.mix_samples(*tensors, torch.get_num_threads())
    return mixed


def _as_matrix(samples: Tensor) -> Tensor:
    """Return dense samples as rows of their memory, (N, values)."""
    width = samples[0].numel()
    return samples.as_strided((len(samples), width), (width, 1))


def _cpp_can_run(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor) -> str | None:
    if own.device.type != "cpu":
        return f"it serves the CPU, and the samples are on {own.device}"
    if own.dtype not in (torch.float32, torch.float64) or other.dtype != own.dtype:
        return f"it serves float32 and float64, and the samples are {own.dtype} and {other.dtype}"
    layout = _layout(own)
    if layout is None or not other.is_contiguous(memory_format=layout):
        return "it serves samples that lie one after the other in memory, of one layout"
    return _refuses(own, other, partner, lam)


def _refuses(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor) -> str | None:
    if own.numel() == 0 or own.shape[1:] != other.shape[1:] or not partner.shape == lam.shape == own.shape[:1]:
        return "it serves samples and candidates of one shape, with a partner and a weight each"
    return refuse_observed(own, other, partner, lam)


def _layout(samples: Tensor) -> torch.memory_format | None:
    """Return how the values of samples lie that have no gaps; None if they do not lie one after the other."""
    if samples.is_contiguous():
        return torch.contiguous_format
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(samples.ndim)
    return layout if layout is not None and samples.is_contiguous(memory_format=layout) else None


def mix_samples_triton(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """One launch. Arguments and result as :func:`mix_samples`."""
    from gradmix.kernels import mix_samples as kernel

    layout = _layout(own) or torch.contiguous_format
    own, other = (value.detach().contiguous(memory_format=layout) for value in (own, other))
    mixed = torch.empty_like(own)
    kernel.mix_samples(_as_matrix(own), _as_matrix(other), partner, lam.detach(), _as_matrix(mixed))
    return mixed


_MOST_VALUES = 1 << 26
"""Values of a sample; a grid can hold some more."""


def _triton_can_run(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor) -> str | None:
    if own.numel() > len(own) * _MOST_VALUES:
        return f"it serves up to {_MOST_VALUES:,} values a sample, and there are {own[0].numel():,}"
    return _triton.device_reason(own.device) or _refuses(own, other, partner, lam)


def _extent(own: Tensor, *_: Tensor) -> Extent:
    return own.device, own.dtype, "", len(own), own[0].numel() if len(own) else 0


OPERATOR = Operator(
    "mix_samples",
    (
        Backend(
            "triton",
            mix_samples_triton,
            can_run=_triton_can_run,
            available=_triton.unavailable_reason,
            worth=CalibratedWorth("mix_samples", "triton", ("samples", "values"), _extent),
        ),
        Backend("cpp", mix_samples_cpp, can_run=_cpp_can_run, available=_extension.unavailable_reason),
        Backend("torch", mix_samples_torch),
        Backend("reference", mix_samples_reference),
    ),
)


def mix_samples(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor, *, backend: str = "auto") -> Tensor:
    """Return lam own + (1 - lam) other[partner], each product rounded.

    Args:
        own: (N, ...) of a floating-point dtype.
        other: (M, ...) of any dtype.
        partner: (N,) int64, in [0, M).
        lam: (N,), the weight of ``own``.
        backend: ``"auto"``, ``"triton"``, ``"cpp"``, ``"torch"`` or ``"reference"``.

    Returns:
        (N, ...) of the dtype of ``own``, which autograd records as torch's own calls.

    >>> import torch
    >>> x = torch.tensor([[0.0], [4.0]])
    >>> mix_samples(x, x, torch.tensor([1, 1]), torch.tensor([0.25, 1.0]))
    tensor([[3.],
            [4.]])
    """
    if is_left_to_torch(backend, own, other, partner, lam):
        return mix_samples_torch(own, other, partner, lam)
    result: Tensor = OPERATOR.choose(backend, own, other, partner, lam).run(own, other, partner, lam)
    return result
