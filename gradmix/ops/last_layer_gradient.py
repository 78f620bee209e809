"""The sum over rows of the cross-entropy gradient of the last layer, from the rows' features, logits and labels.

With features h_n, logits z_n and labels y_n it is

    sum_n r_n [h_n; 1]^T        r_n = softmax(z_n) - y_n

C x (d + 1). :func:`last_layer_gradient_reference` says exactly this. The other bodies never hold the residuals of all
rows: the C++ and torch bodies take rows in parts, and the Triton body forms residuals where the product needs them. For
a label that is a class index, p - 1 is taken as minus the sum of the other classes' probabilities, which has no
cancellation: the gradient of well-fitted rows keeps its relative accuracy in float32. Label vectors are taken as the
one-hot vector of their largest entry, and what they lack to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.calibration.lookup import CalibratedWorth, Extent
from gradmix.ops import _triton
from gradmix.ops.backends import Backend, Operator
from gradmix.ops.capsules import as_capsules
from gradmix.ops.dtypes import exact_dtype, without_autocast, work_dtype
from gradmix.ops.labels import check_labels, class_of
from gradmix.ops.mixed_alignment import (
    Precision,
    beside_one_hot,
    check_features_and_logits,
    check_precision,
    mixed_residual,
)
from gradmix.ops.registration import register

RESIDUALS = 1 << 23
"""Elements of the residuals, and of the rows' cast features, held at a time (64 MiB of float64)."""


# ------------------------------------------------------------------------------------------------------------ reference


def last_layer_gradient_reference(
    out: Tensor, features: Tensor, logits: Tensor, labels: Tensor, precision: str = "tf32x3"
) -> None:
    """The formula, row by row in float64, added to ``out`` (C, d + 1) or, without bias, (C, d)."""
    total = torch.zeros_like(out, dtype=torch.float64)
    for h, z, y in zip(features.double(), logits.double(), labels, strict=True):
        if out.shape[1] == len(h) + 1:
            h = torch.cat([h, h.new_ones(1)])
        total += torch.outer(mixed_residual(z[None], y[None], y[None], 1.0)[0], h)
    out += total


# ---------------------------------------------------------------------------------------------------------------- torch


def last_layer_gradient_torch(
    out: Tensor, features: Tensor, logits: Tensor, labels: Tensor, precision: str = "tf32x3"
) -> None:
    """Batched torch calls, rows in parts. Arguments as :func:`last_layer_gradient_reference`.

    The product is as precise as torch's own setting has it; ``precision`` is the Triton body's.
    """
    _add_products(out, features, logits, labels, _residual)


def _add_products(
    out: Tensor, features: Tensor, logits: Tensor, labels: Tensor, residuals: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Add r^T [h; 1] to ``out``, r of so many samples at a time as memory allows."""
    rows, width = features.shape
    step = max(1, RESIDUALS // max(1, logits.shape[1], width))
    with without_autocast(features.device):
        for start in range(0, rows, step):
            part = slice(start, start + step)
            residual = residuals(logits[part], labels[part]).to(out.dtype)
            out[:, :width].addmm_(residual.T, features[part].to(out.dtype))
            if out.shape[1] > width:
                out[:, width] += residual.sum(0)


def _residual(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(z) - y, (N, C), in float64, whose exponents do not add their rounding to the powers."""
    r = torch.softmax(logits.to(exact_dtype(logits.device)), 1)
    label = class_of(labels)[:, None]
    r.scatter_(1, label, 0.0)
    r.scatter_(1, label, -r.sum(1, keepdim=True))
    return r.add_(beside_one_hot(labels.to(r.dtype))) if labels.is_floating_point() else r


# ------------------------------------------------------------------------------------------------------------------ cpp


def last_layer_gradient_cpp(
    out: Tensor, features: Tensor, logits: Tensor, labels: Tensor, precision: str = "tf32x3"
) -> None:
    """The extension's residuals and torch's product. Arguments as :func:`last_layer_gradient_reference`."""
    _add_products(out, features, logits, labels, _residual_cpp)


def _residual_cpp(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(z) - y, (N, C), in float32 or float64; in float64 inside."""
    extension: Any = _extension.load()
    z = logits.detach().to(work_dtype(logits.dtype)).contiguous()
    r = torch.empty_like(z)
    extension.residuals(*as_capsules(z, class_of(labels).contiguous(), r), torch.get_num_threads())
    return r.add_(beside_one_hot(labels.to(r.dtype))) if labels.is_floating_point() else r


def _cpp_can_run(out: Tensor, *_rest: object) -> str | None:
    if out.device.type != "cpu":
        return f"it serves the CPU, and the tensors are on {out.device}"
    return None


# --------------------------------------------------------------------------------------------------------------- triton


def last_layer_gradient_triton(
    out: Tensor, features: Tensor, logits: Tensor, labels: Tensor, precision: str = "tf32x3"
) -> None:
    """Residuals formed inside the product. Arguments as :func:`last_layer_gradient_reference`."""
    from gradmix.kernels import last_layer_gradient as kernel

    kernel.last_layer_gradient(out, features, logits, labels, precision)


def _triton_can_run(out: Tensor, features: Tensor, logits: Tensor, *_rest: object) -> str | None:
    return _triton.can_run(out, features, logits)


TRITON_AXES = ("samples", "classes", "features")


def _triton_extent(_out: Tensor, features: Tensor, logits: Tensor, labels: Tensor, precision: str = "tf32x3") -> Extent:
    kind = "label vectors" if labels.is_floating_point() else "class indices"
    if precision != "tf32x3":
        kind += f", {precision}"
    if logits.dtype is not features.dtype:
        kind += f", logits in {logits.dtype}"
    rows, width = features.shape
    return features.device, features.dtype, kind, rows, logits.shape[1], width


# -------------------------------------------------------------------------------------------- dispatch and registration

OPERATOR = Operator(
    "last_layer_gradient",
    (
        Backend(
            "triton",
            last_layer_gradient_triton,
            can_run=_triton_can_run,
            worth=CalibratedWorth("last_layer_gradient", "triton", TRITON_AXES, _triton_extent),
            available=_triton.unavailable_reason,
        ),
        Backend("cpp", last_layer_gradient_cpp, can_run=_cpp_can_run, available=_extension.unavailable_reason),
        Backend("torch", last_layer_gradient_torch),
        Backend("reference", last_layer_gradient_reference),
    ),
)


last_layer_gradient_op = register(
    OPERATOR,
    "(Tensor(a!) out, Tensor features, Tensor logits, Tensor labels, str precision, str backend) -> ()",
    lambda *_arguments: None,
    mutates=("out",),
)


def last_layer_gradient(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    bias: bool = True,
    out: Tensor | None = None,
    precision: Precision = "tf32x3",
    backend: str = "auto",
) -> Tensor:
    """The sum over rows of (softmax(z) - y) [h; 1]^T, the cross-entropy gradient of a last layer's weight and bias.

    Args:
        features: (N, d) float64, float32, float16 or bfloat16: the inputs of the last layer. N may be 0.
        logits: (N, C): its outputs.
        labels: (N,) int64 class indices in [0, C), or (N, C) floating-point label vectors.
        bias: whether the last layer has a bias, and the result a last column for it.
        out: None, or a tensor of the result's shape, dtype and device, to which the sum is added.
        precision: of the Triton body's product: ``"ieee"``, ``"tf32x3"`` (about as precise, on the matrix units) or
            ``"tf32"`` (ten bits). The torch body follows ``torch.backends.cuda.matmul``. The bias's column is a sum in
            float32 in any case.
        backend: ``"auto"``, ``"triton"``, ``"cpp"``, ``"torch"`` or ``"reference"``.

    Returns:
        (C, d + 1), or (C, d) without bias: ``out`` if it was given, else a new tensor, float64 for float64 features and
        float32 otherwise. It carries no gradient.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, labels out of range (under torch.compile values are not looked
            at), or an unknown precision or backend.
        RuntimeError: the backend named cannot run these tensors or is not available.

    >>> import torch
    >>> from gradmix.ops.last_layer_gradient import last_layer_gradient
    >>> last_layer_gradient(torch.tensor([[2.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([[ 1.0000,  0.5000],
            [-1.0000, -0.5000]])
    """
    check_features_and_logits(features, logits)
    (rows, width), classes = features.shape, logits.shape[1]
    check_labels("labels", labels, rows, classes)
    for name, value in (("logits", logits), ("labels", labels)):
        if value.device != features.device:
            raise ValueError(f"{name}: got a tensor on {value.device}, expected {features.device} as features")
    check_precision(precision)
    shape, dtype = (classes, width + bool(bias)), work_dtype(features.dtype)
    if out is None:
        out = torch.zeros(shape, dtype=dtype, device=features.device)
    elif not isinstance(out, Tensor):
        raise TypeError(f"out: got {type(out).__name__}, expected a tensor or None")
    elif out.shape != shape:
        raise ValueError(f"out: got shape {tuple(out.shape)}, expected {shape}")
    elif out.dtype != dtype:
        raise TypeError(f"out: got dtype {out.dtype}, expected {dtype}")
    elif out.device != features.device:
        raise ValueError(f"out: got a tensor on {out.device}, expected {features.device} as features")
    elif out.requires_grad:
        raise ValueError("out: got a tensor that requires grad, expected one that does not")
    last_layer_gradient_op(out, features.detach(), logits.detach(), labels.detach(), precision, backend)
    return out
