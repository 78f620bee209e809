"""Operators in CUDA: memory from torch, the work queued on torch's current stream, nothing waited for.

`csrc/class_sketch_cuda.cu` and `csrc/sketch_project_cuda.cu` are the kernels. Each has the operator's arguments here,
and beside it the sentence that says which arguments it cannot take.

One thing makes the host wait: labels are looked at before they are used, once for a tensor of labels, however many
layers come with it. A stream that is being captured into a graph cannot wait, and there they are not looked at; rows
with a label out of range then count for no class.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.ops.dtypes import work_dtype


def unavailable_reason() -> str | None:
    """Why no CUDA body can run on this machine, or None where one could."""
    return _native_reason() or (None if _torch_sees_a_device() else "torch sees no CUDA device")


@lru_cache(maxsize=1)
def _torch_sees_a_device() -> bool:
    """Asked once: every call of an operator, on the CPU too, wants to know."""
    return torch.cuda.is_available()


@lru_cache(maxsize=1)
def _native_reason() -> str | None:
    extension = _extension.load()
    if extension is None:
        return _extension.unavailable_reason()
    if not hasattr(extension, "class_sketch_cuda"):
        part = (_extension.build_report() or {}).get("cuda")
        why = part.get("reason") if isinstance(part, dict) else None
        return f"the extension was built without CUDA: {why}" if why else "the extension was built without CUDA"
    return "this torch was built for other GPUs than CUDA's" if torch.version.hip else None


def class_sketch_can_run(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int) -> str | None:
    """None, or why :func:`class_sketch_cuda` cannot take these arguments."""
    return _device_reason(deltas.device)


def sketch_project_can_run(x: Tensor, rank: int, key: int, ones: bool, entries: str) -> str | None:
    """None, or why :func:`sketch_project_cuda` cannot take these arguments."""
    if entries != "rademacher":
        return f"it makes rademacher entries, not {entries} ones"
    return _device_reason(x.device)


@lru_cache(maxsize=64)
def _device_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it serves CUDA devices, and the tensors are on {device}"
    extension: Any = _extension.load()
    numbers = [name.split("-")[0].rstrip("af") for name in extension.build_info()["cuda_architectures"]]
    if not all(number.isdigit() for number in numbers):
        return None  # "native" and the like: whoever built it knew the device
    least = min(map(int, numbers))
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < least:
        return (
            f"it was compiled for compute capability {least // 10}.{least % 10} and later, {device} has {major}.{minor}"
        )
    return None


# -------------------------------------------------------------------------------------------------------- class_sketch


class SortedLabels(NamedTuple):
    """The rows of a batch in the order of their classes.

    Attributes:
        order: (N,) int64, the rows, those of a class in their own order.
        labels: (N,) int64, their labels, in that order.
        starts: (P + 1,) int64, where each class begins in that order, and where the last one ends.
    """

    order: Tensor
    labels: Tensor
    starts: Tensor


def sort_by_class(labels: Tensor, num_classes: int) -> SortedLabels:
    """Sort (N,) int64 labels on their device, without waiting for it. Labels may lie outside [0, num_classes)."""
    ordered = labels.detach().sort(stable=True)
    classes = torch.arange(num_classes + 1, device=labels.device)
    return SortedLabels(ordered.indices, ordered.values, torch.searchsorted(ordered.values, classes))


class _Known(NamedTuple):
    """Labels that were looked at and sorted; good for the same tensor, unchanged, on the same stream."""

    labels: weakref.ref[Tensor]
    version: int
    num_classes: int
    stream: int
    result: SortedLabels


_known: _Known | None = None


def _sort_once(labels: Tensor, num_classes: int, stream: int) -> SortedLabels:
    """:func:`sort_by_class` of labels in range; what was last sorted is kept, as the layers of a model share it."""
    global _known
    if torch.cuda.is_current_stream_capturing():
        return sort_by_class(labels, num_classes)
    known = _known
    version = -1 if labels.is_inference() else labels._version
    if (
        known is not None
        and known.labels() is labels
        and version >= 0
        and (known.version, known.num_classes, known.stream) == (version, num_classes, stream)
    ):
        return known.result
    bad = (labels < 0) | (labels >= num_classes)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"labels: got {int(labels[row])} in row {row}, expected labels in [0, {num_classes})")
    result = sort_by_class(labels, num_classes)
    _known = _Known(weakref.ref(labels, _forget), version, num_classes, stream, result)
    return result


def _forget(reference: weakref.ref[Tensor]) -> None:
    """Give the memory back with the labels it belongs to."""
    global _known
    if _known is not None and _known.labels is reference:
        _known = None


def class_sketch_cuda(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The sums and squares of `gradmix.ops.class_sketch.class_sketch`, by the extension's CUDA kernels.

    Beyond the results it takes up to 40 MiB and two arrays of K x J, for the sums of groups of samples, and less than
    the arguments take, for their squares. It never holds every sample's gradient where that would be more.

    Args:
        deltas: (N, T, K) on a CUDA device.
        activations: (N, T, J), likewise.
        labels: (N,) int64, likewise.
        num_classes: P.

    Returns:
        (P, K, J) and (P,), the same bits in every run and on every device.

    Raises:
        ValueError: a label outside [0, P).
        RuntimeError: a launch failed.
    """
    extension: Any = _extension.load()
    deltas, activations = deltas.detach().contiguous(), activations.detach().contiguous()
    dtype = work_dtype(deltas.dtype)
    samples, positions, rows = deltas.shape
    columns = activations.shape[2]
    elements = extension.class_sketch_cuda_workspace(_name(deltas), samples, positions, rows, columns)
    with torch.cuda.device(deltas.device):
        stream = torch.cuda.current_stream().cuda_stream
        ordered = _sort_once(labels, num_classes, stream)
        sums = deltas.new_empty(num_classes, rows, columns, dtype=dtype)
        squares = deltas.new_empty(num_classes, dtype=dtype)
        workspace = deltas.new_empty(elements, dtype=dtype)
        extension.class_sketch_cuda(deltas, activations, *ordered, sums, squares, workspace, stream)
    return sums, squares


# ------------------------------------------------------------------------------------------------------ sketch_project


def sketch_project_cuda(x: Tensor, rank: int, key: int, ones: bool, entries: str = "rademacher") -> Tensor:
    """`gradmix.ops.sketch_project.sketch_project` with Rademacher entries, by the extension's CUDA kernels.

    x is read where it lies if D or T is contiguous, and copied otherwise.

    Args:
        x: (N, T, D) on a CUDA device.
        rank: of the sketch.
        key: of the matrix.
        ones: whether a 1 is assumed behind each position's vector.
        entries: ``"rademacher"``.

    Returns:
        (N, T, rank), the same bits in every run, on every device and for both layouts.

    Raises:
        ValueError: other entries.
        RuntimeError: a launch failed.
    """
    if entries != "rademacher":
        raise ValueError(f"entries: got {entries!r}, expected 'rademacher'")
    extension: Any = _extension.load()
    samples, positions, dim = x.shape
    x = x.detach()
    if dim > 1 and x.stride(2) != 1 and positions > 1 and x.stride(1) != 1:
        x = x.contiguous()
    dtype = work_dtype(x.dtype)
    elements = extension.sketch_project_cuda_workspace(_name(x), samples, positions, dim, rank)
    with torch.cuda.device(x.device):
        out = x.new_empty(samples, positions, rank, dtype=dtype)
        workspace = x.new_empty(elements, dtype=dtype)
        extension.sketch_project_cuda(x, key, ones, out, workspace, torch.cuda.current_stream().cuda_stream)
    return out


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
