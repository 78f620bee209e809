"""The bodies of mixed_alignment in C++, for the CPU, and in Triton, for GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.calibration.lookup import Extent
from gradmix.ops import _triton
from gradmix.ops.capsules import as_capsules
from gradmix.ops.dtypes import without_autocast, work_dtype
from gradmix.ops.labels import dense_labels
from gradmix.ops.mixed_alignment.residuals import products_beside, split_labels
from gradmix.ops.mixed_alignment.scaling import in_range
from gradmix.ops.mixed_alignment.sides import Side
from gradmix.ops.mixed_alignment.values import MixedAlignment, Precision, has_bias, project


def mixed_alignment_cpp(
    a: Side, b: Side, reference: Tensor, lams: Tensor, norms: bool = True, precision: Precision = "tf32x3"
) -> MixedAlignment:
    """The extension's body, for the CPU. Arguments and result as the operator's.

    The products of whole matrices are torch's. The result is the same, to the bit, for every number of threads.
    """
    extension: Any = _extension.load()
    dtype = work_dtype(a.features.dtype)
    same = a.is_same(b)
    with without_autocast(a.features.device):
        h_a, z_a, grad_reference = (_plain(x, dtype) for x in (a.features, a.logits, reference))
        h_b, z_b = (h_a, z_a) if same else (_plain(x, dtype) for x in (b.features, b.logits))
        (y_a, _, t_a), (y_b, _, t_b) = split_labels(a.labels.detach(), b.labels.detach(), z_a.shape[1], dtype)
        y_a, y_b = y_a.contiguous(), y_b.contiguous()
        inner = h_a.new_empty(len(lams), len(h_a), len(h_b))
        # Of label vectors the norms show where the inner products have lost their digits.
        needs_norms, units = norms or t_a is not None, None
        norm = inner.new_empty(inner.shape if needs_norms else 0)
        while True:
            u_a = project(h_a, grad_reference)
            u_b = u_a if same else project(h_b, grad_reference)
            products: list[Tensor | None] = [h_a @ h_b.T if needs_norms else None, None, None]
            if t_a is not None and t_b is not None:
                products[1:] = products_beside(t_a, u_a, t_b, u_b)
            done = extension.mixed_alignment(
                as_capsules(h_a, z_a, y_a, u_a, t_a),
                as_capsules(h_b, z_b, y_b, u_b, t_b),
                *as_capsules(grad_reference, lams),
                as_capsules(*products),
                *as_capsules(inner, norm if needs_norms else None),
                units,
                torch.get_num_threads(),
            )
            if done:
                return MixedAlignment(inner, norm if norms else inner.new_empty(0))
            h_a, h_b, grad_reference, found = in_range(h_a, h_b, grad_reference, dtype)
            units = tuple(found)


def _plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).contiguous()


def cpp_can_run(features_a: Tensor, *_rest: object) -> str | None:
    """None, or why the extension's body cannot take these features."""
    if features_a.device.type != "cpu":
        return f"it serves the CPU, and the tensors are on {features_a.device}"
    return None


def mixed_alignment_triton(
    a: Side, b: Side, reference: Tensor, lams: Tensor, norms: bool = True, precision: Precision = "tf32x3"
) -> MixedAlignment:
    """The factorised form in one kernel, after U by torch. Arguments and result as the operator's."""
    from gradmix.kernels import mixed_alignment as kernel

    with without_autocast(a.features.device):
        grad_reference = reference.float()
        bias = has_bias(a.features, reference)
        u_a = project(a.features.float(), grad_reference)
        u_b = u_a if a.features is b.features else project(b.features.float(), grad_reference)
    if a.labels.is_floating_point() != b.labels.is_floating_point():
        a, b = (v._replace(labels=dense_labels(v.labels, a.logits.shape[1], torch.float32)) for v in (a, b))
    return MixedAlignment(*kernel.mixed_alignment(*a, u_a, *b, u_b, lams, bias=bias, precision=precision, norms=norms))


def triton_can_run(features_a: Tensor, logits_a: Tensor, *_rest: object) -> str | None:
    """None, or why the Triton body cannot take these features and logits."""
    return _triton.can_run(features_a, logits_a)


TRITON_AXES = ("samples", "samples", "classes", "features")


def triton_extent(features_a: Tensor, logits_a: Tensor, labels_a: Tensor, features_b: Tensor, *rest: Any) -> Extent:
    """Return the extent of a call, by which its measurement is found; arguments are the operator's.

    It is part of every call on a GPU, and reading an attribute of a tensor is most of its time: few are read.
    """
    labels_b, lams, norms = rest[1], rest[3], rest[4] if len(rest) > 4 else True
    if labels_a.ndim > 1 or (labels_b is not labels_a and labels_b.ndim > 1):
        kind = "label vectors"  # with or without norms: they show where inner products have lost their digits
    else:
        kind = "class indices, norms" if norms else "class indices"
    if lams.numel() > 1:
        kind += ", several weights"
    if len(rest) > 5 and rest[5] != "tf32x3":
        kind += f", {rest[5]}"
    rows, width = features_a.shape
    partners = rows if features_b is features_a else features_b.shape[0]
    dtype = features_a.dtype
    if logits_a.dtype is not dtype:
        kind += f", logits in {logits_a.dtype}"
    return features_a.device, dtype, kind, rows, partners, logits_a.shape[1], width
