"""Operator ``mix_samples``: each sample mixed with its partner, lam x_i + (1 - lam) x_partner.

Bodies: ``cpp`` for the CPU, in one pass over the memory; ``torch``, which autograd can record; ``reference``. All give
the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.ops.backends import Backend, Operator
from gradmix.ops.capsules import as_capsules
from gradmix.ops.registration import is_plain


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
    width = own[0].numel()
    matrices = (value.detach().view(len(value), width) for value in (own, other))
    weight = lam.detach().to(own.dtype).contiguous()
    tensors = as_capsules(*matrices, partner.contiguous(), weight, mixed.view(len(own), width))
    extension.mix_samples(*tensors, torch.get_num_threads())
    return mixed


def _cpp_can_run(own: Tensor, other: Tensor, partner: Tensor, lam: Tensor) -> str | None:
    if own.device.type != "cpu":
        return f"it serves the CPU, and the samples are on {own.device}"
    if own.dtype not in (torch.float32, torch.float64) or other.dtype != own.dtype:
        return f"it serves float32 and float64, and the samples are {own.dtype} and {other.dtype}"
    if not (own.numel() and own.is_contiguous() and other.is_contiguous()):
        return "it serves contiguous samples"
    if not is_plain(own, other, partner, lam):
        return "autograd, a tracer or a class of its own is to see torch's calls"
    return None


OPERATOR = Operator(
    "mix_samples",
    (
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
        backend: ``"auto"``, ``"cpp"``, ``"torch"`` or ``"reference"``.

    Returns:
        (N, ...) of the dtype of ``own``, which autograd records as torch's own calls.

    >>> import torch
    >>> x = torch.tensor([[0.0], [4.0]])
    >>> mix_samples(x, x, torch.tensor([1, 1]), torch.tensor([0.25, 1.0]))
    tensor([[3.],
            [4.]])
    """
    if torch.compiler.is_compiling():
        return mix_samples_torch(own, other, partner, lam)  # the compiler makes one loop of it
    result: Tensor = OPERATOR.choose(backend, own, other, partner, lam).run(own, other, partner, lam)
    return result
