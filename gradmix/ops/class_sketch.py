"""The sum of a layer's gradients over the samples of each class, from inputs and output gradients already sketched.

Sample n has, at each position t of a layer, the (sketched) output gradient d_nt and the (sketched) input a_nt; its
gradient is G_n = sum_t d_nt a_nt^T. Class p's sum, and the sum of its samples' squared norms, are

    sums[p] = sum over n with labels[n] = p of G_n        squares[p] = sum over the same n of ||G_n||^2

:func:`class_sketch_reference` says exactly this. The other bodies never hold more than they must: with one position a
sample, where ||G_n|| = ||d_n|| ||a_n||, no per-sample gradient is formed at all, and otherwise the C++ body forms one
at a time, by parts that stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.calibration.lookup import CalibratedWorth, Extent
from gradmix.ops import _cuda
from gradmix.ops.backends import Backend, Operator
from gradmix.ops.capsules import as_capsules
from gradmix.ops.dtypes import without_autocast, work_dtype
from gradmix.ops.registration import register

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ClassSketch(NamedTuple):
    """Gradients summed by class, and how large they were one by one.

    Attributes:
        sums: (P, K, J), the sum of the gradients of each class's samples.
        squares: (P,), the sum of their squared Frobenius norms.
    """

    sums: Tensor
    squares: Tensor


def class_sketch_reference(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int) -> ClassSketch:
    """The formula, sample by sample and position by position. For arguments and result see :func:`class_sketch`."""
    sums, squares = _zeros(deltas, activations, num_classes)
    for n, label in enumerate(_check_labels(labels, num_classes).tolist()):
        gradient = torch.zeros_like(sums[label])
        for t in range(deltas.shape[1]):
            gradient += torch.outer(deltas[n, t].to(sums.dtype), activations[n, t].to(sums.dtype))
        sums[label] += gradient
        squares[label] += gradient.square().sum()
    return ClassSketch(sums, squares)


def class_sketch_torch(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int) -> ClassSketch:
    """Batched torch calls on any device. For arguments and result see :func:`class_sketch`.

    Two ways: one product per sample, added to its class; or, for one position a sample where the classes are well
    filled, the samples laid side by side by class and one product per class.
    """
    labels = _check_labels(labels, num_classes)
    with without_autocast(deltas.device):
        sums, squares = _zeros(deltas, activations, num_classes)
        samples, positions, rows = deltas.shape
        columns = activations.shape[2]
        deltas, activations = deltas.to(sums.dtype), activations.to(sums.dtype)
        if positions == 1:
            norms = [torch.linalg.vector_norm(x, dim=(1, 2)).square_() for x in (deltas, activations)]
            squares.index_add_(0, labels, norms[0].mul_(norms[1]))
            # Finding out how full the classes are would make a GPU wait.
            if samples > 0 and not deltas.is_cuda and not _by_sample(positions, rows, columns):
                present, index, counts = labels.unique(return_inverse=True, return_counts=True)
                longest = int(counts.max())
                padded = len(present) * longest
                if len(present) * 4 <= samples and padded <= 4 * samples:
                    order = index.argsort(stable=True)
                    first = counts.cumsum(0) - counts
                    place = torch.arange(samples, device=labels.device) - first[index[order]]
                    slot = index[order] * longest + place
                    side_by_side = [
                        x.new_zeros(padded, x.shape[2]).index_copy_(0, slot, x[order, 0]) for x in (deltas, activations)
                    ]
                    left, right = (x.view(len(present), longest, -1) for x in side_by_side)
                    sums[present] = torch.bmm(left.mT, right)
                    return ClassSketch(sums, squares)
        # In slices, so that the per-sample products never take more memory than a few MiB or one sample's.
        step = max(1, _PRODUCTS // max(1, rows * columns))
        for start in range(0, samples, step):
            part = slice(start, start + step)
            products = torch.bmm(deltas[part].mT, activations[part])
            sums.index_add_(0, labels[part], products)
            if positions > 1:
                squares.index_add_(0, labels[part], torch.linalg.vector_norm(products, dim=(1, 2)).square_())
    return ClassSketch(sums, squares)


_PRODUCTS = 1 << 22
"""Elements of the per-sample products held at a time (16 MiB of float32)."""


def class_sketch_cpp(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int) -> ClassSketch:
    """The extension's body, for the CPU. For arguments and result see :func:`class_sketch`.

    The result is the same, to the bit, for every number of threads.
    """
    extension: Any = _extension.load()
    if extension is None:
        raise RuntimeError(f"class_sketch: backend 'cpp' cannot run: {_extension.unavailable_reason()}")
    result = _empty(deltas, activations, num_classes)
    inputs = deltas.detach().contiguous(), activations.detach().contiguous(), labels.contiguous()
    extension.class_sketch(*as_capsules(*inputs, *result), torch.get_num_threads())
    return result


def _cpp_can_run(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int) -> str | None:
    if deltas.device.type != "cpu":
        return f"it serves the CPU, and the tensors are on {deltas.device}"
    return None


_SMALL = 1 << 12
"""Entries of a sample's larger factor up to which all of it takes less than torch's calls."""

_LARGE = 1 << 17
"""Entries of a sample's product above which torch's products, kept and then added, take longer than a copy."""


def _cpp_worth(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int) -> str | None:
    positions, rows, columns = deltas.shape[1], deltas.shape[2], activations.shape[2]
    side_by_side = positions > 1 and all(x.stride(1) == 1 and x.shape[2] > 1 for x in (deltas, activations))
    if side_by_side and positions * max(rows, columns) > _SMALL and rows * columns <= _LARGE:
        return "positions lie side by side in memory: it would copy them, and torch's products take them as they are"
    return None


def _by_sample(positions: int, rows: int, columns: int) -> bool:
    """Whether a sample's product takes no more memory than its rows."""
    return rows * columns <= positions * (rows + columns)


def _zeros(deltas: Tensor, activations: Tensor, num_classes: int) -> ClassSketch:
    sums, squares = _empty(deltas, activations, num_classes)
    return ClassSketch(sums.zero_(), squares.zero_())


def _empty(deltas: Tensor, activations: Tensor, num_classes: int) -> ClassSketch:
    dtype = work_dtype(deltas.dtype)
    sums = deltas.new_empty(num_classes, deltas.shape[2], activations.shape[2], dtype=dtype)
    return ClassSketch(sums, deltas.new_empty(num_classes, dtype=dtype))


def _check_labels(labels: Tensor, num_classes: int) -> Tensor:
    """The labels, all of them in [0, num_classes)."""
    bad = (labels < 0) | (labels >= num_classes)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"labels: got {int(labels[row])} in row {row}, expected labels in [0, {num_classes})")
    return labels


CUDA_AXES = ("samples", "positions", "rank", "rank", "classes")


def _cuda_extent(deltas: Tensor, activations: Tensor, _labels: Tensor, num_classes: int) -> Extent:
    samples, positions, rows = deltas.shape
    return deltas.device, deltas.dtype, "", samples, positions, rows, activations.shape[2], num_classes


# --------------------------------------------------------------------------------------- dispatch and registration

OPERATOR = Operator(
    "class_sketch",
    (
        Backend(
            "cuda",
            _cuda.class_sketch_cuda,
            can_run=_cuda.class_sketch_can_run,
            worth=CalibratedWorth("class_sketch", "cuda", CUDA_AXES, _cuda_extent),
            available=_cuda.unavailable_reason,
        ),
        Backend(
            "cpp",
            class_sketch_cpp,
            can_run=_cpp_can_run,
            worth=_cpp_worth,
            available=_extension.unavailable_reason,
        ),
        Backend("torch", class_sketch_torch),
        Backend("reference", class_sketch_reference),
    ),
)


def _fake(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int, backend: str) -> ClassSketch:
    return _empty(deltas, activations, num_classes)


_class_sketch_op = register(
    OPERATOR,
    "(Tensor deltas, Tensor activations, Tensor labels, SymInt num_classes, str backend) -> (Tensor, Tensor)",
    _fake,
)


def class_sketch(
    deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int, *, backend: str = "auto"
) -> ClassSketch:
    """The samples' gradients, sum_t d a^T, summed by class, and the sums of their squared norms.

    With G[n] = sum over t of deltas[n, t] activations[n, t]^T, the gradient of a linear layer (or, over positions, of a
    convolution) or its sketch if both sides were projected before: sums[p] = sum of G[n], and squares[p] = sum of
    ||G[n]||^2 in the Frobenius norm, both over the n with labels[n] = p.

    Args:
        deltas: (N, T, K) float32, float64, bfloat16 or float16: output gradients. N and T may be 0.
        activations: (N, T, J), of the same dtype and device: inputs.
        labels: (N,) int64 in [0, num_classes), in any order.
        num_classes: P.
        backend: ``"auto"``, ``"cpp"``, ``"cuda"``, ``"torch"`` or ``"reference"``.

    Returns:
        :class:`ClassSketch`: ``sums`` (P, K, J) and ``squares`` (P,), float64 for float64 and float32 otherwise, in
        which they are also accumulated; zero for a class without samples. They carry no gradient.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, a label out of range, or an unknown backend.
        RuntimeError: the backend named cannot run these tensors or is not available.

    >>> import torch
    >>> from gradmix.ops.class_sketch import class_sketch
    >>> deltas = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    >>> activations = torch.tensor([[[1.0]], [[10.0]]])
    >>> sums, squares = class_sketch(deltas, activations, torch.tensor([1, 1]), num_classes=2)
    >>> sums.squeeze(-1)
    tensor([[ 0.,  0.],
            [31., 42.]])
    >>> squares
    tensor([   0., 2505.])
    """
    for name, value in (("deltas", deltas), ("activations", activations), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if deltas.ndim != 3:
        raise ValueError(f"deltas: got shape {tuple(deltas.shape)}, expected (N, T, K)")
    if deltas.dtype not in _DTYPES:
        raise TypeError(f"deltas: got dtype {deltas.dtype}, expected float32, float64, bfloat16 or float16")
    samples, positions = deltas.shape[:2]
    if activations.ndim != 3 or activations.shape[:2] != deltas.shape[:2]:
        came = tuple(activations.shape)
        raise ValueError(f"activations: got shape {came}, expected ({samples}, {positions}, J) as deltas")
    if activations.dtype != deltas.dtype:
        raise TypeError(f"activations: got dtype {activations.dtype}, expected {deltas.dtype} as deltas")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got dtype {labels.dtype}, expected int64")
    if labels.shape != (samples,):
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({samples},), one label a row of deltas")
    for name, value in (("activations", activations), ("labels", labels)):
        if value.device != deltas.device:
            raise ValueError(f"{name}: got a tensor on {value.device}, expected {deltas.device} as deltas")
    if isinstance(num_classes, bool) or not isinstance(num_classes, (int, torch.SymInt)):
        raise TypeError(f"num_classes: got {type(num_classes).__name__}, expected an int")
    if num_classes < 0:
        raise ValueError(f"num_classes: got {num_classes}, expected at least 0")
    return ClassSketch(*_class_sketch_op(deltas, activations, labels, num_classes, backend))
