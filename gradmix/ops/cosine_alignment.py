"""Cosines between all pairs of two batches of vectors, and the alignment of their mixtures with a reference.

:func:`cosine_alignment` gives <x_p, y_q> / (|x_p| |y_q|) for every pair. :func:`mixed_gram_alignment` is for sketched
gradients, where a mixture's gradient is taken to be lam x_p + mu y_q, mu = 1 - lam. Its alignment with a reference g
follows from inner products, without a mixture being formed:

    inner[p, q] = lam <x_p, g> + mu <y_q, g>
    norm[p, q]^2 = lam^2 |x_p|^2 + 2 lam mu <x_p, y_q> + mu^2 |y_q|^2

The references say so directly: the first in float64, the second by forming the mixtures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmix.calibration.lookup import CalibratedWorth, Extent
from gradmix.ops import _triton
from gradmix.ops.backends import Backend, Operator
from gradmix.ops.dtypes import without_autocast, work_dtype
from gradmix.ops.mixed_alignment import (
    MixedAlignment,
    Precision,
    Weight,
    as_lams,
    check_precision,
    largest_of,
    unit_of,
)
from gradmix.ops.registration import register

# ----------------------------------------------------------------------------------------------------------- references


def cosine_alignment_reference(x: Tensor, y: Tensor, precision: str = "tf32x3") -> Tensor:
    """The formula, in float64. Arguments and result as :func:`cosine_alignment`."""
    dtype = work_dtype(x.dtype)
    x, y = x.double(), y.double()
    inner = torch.einsum("lpk,lqk->lpq", x, y)
    norms = x.norm(dim=2)[:, :, None] * y.norm(dim=2)[:, None]
    return torch.where(norms == 0, 0.0, inner / norms).clamp(-1, 1).to(dtype)


def mixed_gram_alignment_reference(
    x: Tensor, y: Tensor, reference: Tensor, lam: Tensor, precision: str = "tf32x3"
) -> MixedAlignment:
    """The mixtures formed, row by row, in float64. Arguments and result as :func:`mixed_gram_alignment`; lam: (1,)."""
    dtype = work_dtype(x.dtype)
    x, y, reference = x.double(), y.double(), reference.double()
    inner = x.new_empty(x.shape[0], x.shape[1], y.shape[1])
    norm = torch.empty_like(inner)
    for p in range(x.shape[1]):
        mixed = lam * x[:, p, None] + (1 - lam) * y
        inner[:, p] = (mixed * reference[:, None]).sum(2)
        norm[:, p] = mixed.norm(dim=2)
    return MixedAlignment(inner.to(dtype), norm.to(dtype))


# ---------------------------------------------------------------------------------------------------------------- torch


def cosine_alignment_torch(x: Tensor, y: Tensor, precision: str = "tf32x3") -> Tensor:
    """One batched product of unit vectors. Arguments and result as :func:`cosine_alignment`.

    The product is as precise as torch's own setting has it; ``precision`` is the Triton body's.
    """
    with without_autocast(x.device):
        left = _units(x)
        right = left if x is y else _units(y)
        return (left @ right.mT).clamp_(-1, 1)


def _units(vectors: Tensor) -> Tensor:
    vectors = vectors.to(work_dtype(vectors.dtype))
    if vectors.shape[-1] == 0:
        return vectors
    # In two steps, so that neither a tiny nor a huge vector's squares leave the range of float32.
    largest = vectors.abs().amax(-1, keepdim=True)
    scaled = vectors / torch.where(largest == 0, 1, largest)
    norm = scaled.norm(dim=-1, keepdim=True)
    return scaled.div_(torch.where(norm == 0, 1, norm))


def mixed_gram_alignment_torch(
    x: Tensor, y: Tensor, reference: Tensor, lam: Tensor, precision: str = "tf32x3"
) -> MixedAlignment:
    """From a batched product. Arguments and result as :func:`mixed_gram_alignment`; lam: (1,)."""
    dtype = work_dtype(x.dtype)
    with without_autocast(x.device):
        left, right, unit = _in_range(x.to(dtype), None if x is y else y.to(dtype))
        target = reference.to(dtype)[:, :, None]
        a = lam.to(dtype)
        b = (1 - lam).to(dtype)
        square_left = left.square().sum(2)
        square_right = square_left if x is y else right.square().sum(2)
        inner_left = (left @ target)[:, :, 0]
        inner_right = inner_left if x is y else (right @ target)[:, :, 0]
        square = (left @ right.mT).mul_(2 * a * b)
        square.add_((a * a * square_left)[:, :, None]).add_((b * b * square_right)[:, None])
        inner = (a * inner_left)[:, :, None] + (b * inner_right)[:, None]
        return MixedAlignment(inner.mul_(unit), square.clamp_(min=0).sqrt_().mul_(unit))


def _in_range(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Weight]:
    """x, and y or x again, divided by a power of two that keeps their squares within the dtype's range; and that."""
    unit = unit_of(largest_of(x) if y is None else torch.maximum(largest_of(x), largest_of(y)))
    if isinstance(unit, Tensor) or unit != 1.0:
        x, y = x * (1.0 / unit), None if y is None else y * (1.0 / unit)
    return x, x if y is None else y, unit


# --------------------------------------------------------------------------------------------------------------- triton


def cosine_alignment_triton(x: Tensor, y: Tensor, precision: str = "tf32x3") -> Tensor:
    """Product and norms in one kernel, after one that scales rows. Arguments and result as :func:`cosine_alignment`."""
    from gradmix.kernels import cosine_alignment as kernel

    return kernel.cosine_alignment(x, y, precision)


def mixed_gram_alignment_triton(
    x: Tensor, y: Tensor, reference: Tensor, lam: Tensor, precision: str = "tf32x3"
) -> MixedAlignment:
    """All of it in one kernel. Arguments and result as :func:`mixed_gram_alignment`; lam: (1,) float64."""
    from gradmix.kernels import cosine_alignment as kernel

    unit: Weight = 1.0
    if x.dtype != torch.float16:  # whose squares float32 holds
        x, y, unit = _in_range(x, None if x is y else y)
    inner, norm = kernel.mixed_gram_alignment(x, y, reference, lam, precision)
    return MixedAlignment(inner.mul_(unit), norm.mul_(unit))


MOST_LAYERS = 65_535
"""Layers that a launch has room for: they are its third axis."""


def _cosine_can_run(x: Tensor, y: Tensor, *_rest: object) -> str | None:
    return _too_many_layers(x) or _triton.can_run(x, y)


def _mixed_can_run(x: Tensor, y: Tensor, reference: Tensor, *_rest: object) -> str | None:
    return _too_many_layers(x) or _triton.can_run(x, y, reference)


def _too_many_layers(x: Tensor) -> str | None:
    return None if len(x) <= MOST_LAYERS else f"it serves up to {MOST_LAYERS:,} layers, and got {len(x):,}"


TRITON_AXES = ("layers", "samples", "samples", "entries")


def _triton_extent(x: Tensor, y: Tensor, *rest: object) -> Extent:
    precision = rest[-1] if rest else "tf32x3"
    layers, rows, entries = x.shape
    return x.device, x.dtype, "" if precision == "tf32x3" else precision, layers, rows, y.shape[1], entries


# -------------------------------------------------------------------------------------------- dispatch and registration

OPERATOR = Operator(
    "cosine_alignment",
    (
        Backend(
            "triton",
            cosine_alignment_triton,
            can_run=_cosine_can_run,
            worth=CalibratedWorth("cosine_alignment", "triton", TRITON_AXES, _triton_extent),
            available=_triton.unavailable_reason,
        ),
        Backend("torch", cosine_alignment_torch),
        Backend("reference", cosine_alignment_reference),
    ),
)

MIXED_OPERATOR = Operator(
    "mixed_gram_alignment",
    (
        Backend(
            "triton",
            mixed_gram_alignment_triton,
            can_run=_mixed_can_run,
            worth=CalibratedWorth("mixed_gram_alignment", "triton", TRITON_AXES, _triton_extent),
            available=_triton.unavailable_reason,
        ),
        Backend("torch", mixed_gram_alignment_torch),
        Backend("reference", mixed_gram_alignment_reference),
    ),
)


def _fake(x: Tensor, y: Tensor, *_rest: str) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], y.shape[1]), dtype=work_dtype(x.dtype))


_cosine_alignment_op = register(OPERATOR, "(Tensor x, Tensor y, str precision, str backend) -> Tensor", _fake)

_mixed_gram_alignment_op = register(
    MIXED_OPERATOR,
    "(Tensor x, Tensor y, Tensor reference, Tensor lam, str precision, str backend) -> (Tensor, Tensor)",
    lambda x, y, *_rest: MixedAlignment(_fake(x, y), _fake(x, y)),
)


def cosine_alignment(x: Tensor, y: Tensor, *, precision: Precision = "tf32x3", backend: str = "auto") -> Tensor:
    """Cosines between all pairs of rows of x and of y, for each of L layers.

    Rows are scaled by their largest entry, so that squares neither overflow nor underflow, however long or short a row.

    Args:
        x: (L, P, K) float64, float32, float16 or bfloat16.
        y: (L, Q, K), of the same dtype and device.
        precision: of the Triton body's product: ``"ieee"``, ``"tf32x3"`` (about as precise, on the matrix units) or
            ``"tf32"`` (ten bits). The torch body follows ``torch.backends.cuda.matmul``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        (L, P, Q) in [-1, 1], float64 for float64 and float32 otherwise; 0 where a row is zero, NaN where one holds a
        NaN or an infinity. It carries no gradient.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, or an unknown precision or backend.
        RuntimeError: the backend named cannot run these tensors or is not available.

    >>> import torch
    >>> from gradmix.ops.cosine_alignment import cosine_alignment
    >>> cosine_alignment(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]), torch.tensor([[[10.0, 0.0], [0.0, -1.0]]]))
    tensor([[[ 0.6000, -0.8000],
             [ 0.0000,  0.0000]]])
    """
    _check_batches(x, y, precision)
    cosines: Tensor = _cosine_alignment_op(x, y, precision, backend)
    return cosines


def mixed_gram_alignment(
    x: Tensor,
    y: Tensor,
    reference: Tensor,
    lam: float | Tensor,
    *,
    precision: Precision = "tf32x3",
    backend: str = "auto",
) -> MixedAlignment:
    """Alignment of lam x_p + (1 - lam) y_q with a reference, for all pairs of rows and each of L layers.

    Where lam x_p and (1 - lam) y_q all but cancel, the squared norm is a small difference of large terms: its error is
    about 1e-7 of (lam |x_p| + (1 - lam) |y_q|)^2 in float32, the norm's then up to 5e-4 of the terms' lengths; below
    zero it is taken as zero. Squared lengths may leave the dtype's range, except for rows 1e18 times shorter than the
    longest; inner products that do become infinite, or zero.

    Args:
        x: (L, P, K) float64, float32, float16 or bfloat16.
        y: (L, Q, K), of the same dtype and device.
        reference: (L, K), likewise.
        lam: the weight of x, in [0, 1]; or a tensor of it, () or (1,), which on a GPU is not looked at, so that a graph
            can be replayed with another one.
        precision: as :func:`cosine_alignment`; of the product <x_p, y_q>.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        :class:`gradmix.ops.mixed_alignment.MixedAlignment`: ``inner`` and ``norm``, (L, P, Q), float64 for float64 and
        float32 otherwise. They carry no gradient.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, ``lam`` out of range, or an unknown precision or backend.
        RuntimeError: the backend named cannot run these tensors or is not available.

    >>> import torch
    >>> from gradmix.ops.cosine_alignment import mixed_gram_alignment
    >>> x, y = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 2.0], [-2.0, 0.0]]])
    >>> mixed_gram_alignment(x, y, torch.tensor([[1.0, 3.0]]), lam=0.5)
    MixedAlignment(inner=tensor([[[4., 0.]]]), norm=tensor([[[1.4142, 0.0000]]]))
    """
    _check_batches(x, y, precision)
    if not isinstance(reference, Tensor):
        raise TypeError(f"reference: got {type(reference).__name__}, expected a tensor")
    layers, width = x.shape[0], x.shape[2]
    if reference.ndim != 2 or reference.shape[0] != layers or reference.shape[1] != width:
        raise ValueError(f"reference: got shape {tuple(reference.shape)}, expected ({layers}, {width}) as x")
    _check_like("reference", reference, x)
    lams = as_lams(lam, x.device)
    if lams.shape[0] != 1:
        raise ValueError(f"lam: got {lams.shape[0]} weights, expected one")
    return MixedAlignment(*_mixed_gram_alignment_op(x, y, reference, lams, precision, backend))


def _check_batches(x: Tensor, y: Tensor, precision: str) -> None:
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
        if value.ndim != 3:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected three dimensions")
        if not value.is_floating_point():
            raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating-point dtype")
    if y.shape[0] != x.shape[0] or y.shape[2] != x.shape[2]:
        raise ValueError(f"y: got shape {tuple(y.shape)}, expected ({x.shape[0]}, Q, {x.shape[2]}) as x")
    _check_like("y", y, x)
    check_precision(precision)


def _check_like(name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype != x.dtype:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {x.dtype} as x")
    if value.device != x.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, expected {x.device} as x")
