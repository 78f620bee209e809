"""The sum of a layer's gradients over the samples of each class, from inputs and output gradients already sketched.

Sample n has, at each position t of a layer, the (sketched) output gradient d_nt and the (sketched) input a_nt; its
gradient is sum_t d_nt a_nt^T. Class p's is the sum over its samples,

    out[p] = sum over n with labels[n] = p, and over t, of d_nt a_nt^T

:func:`class_sketch_reference` says exactly this. The other bodies never hold more than they must: the C++ one walks
the rows class by class with the output in registers, and no per-sample gradient exists in it at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.ops.backends import Backend, Operator

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def class_sketch_reference(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The formula, sample by sample and position by position. For arguments and result see :func:`class_sketch`."""
    out = _zeros(deltas, activations, num_classes)
    for n, label in enumerate(_checked(labels, num_classes).tolist()):
        for t in range(deltas.shape[1]):
            out[label] += torch.outer(deltas[n, t].to(out.dtype), activations[n, t].to(out.dtype))
    return out


def class_sketch_torch(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Batched torch calls on any device. For arguments and result see :func:`class_sketch`.

    Two ways, whichever moves less memory: one product per sample, added to its class; or, where a sample has few
    positions and the classes are well filled, the samples laid side by side by class and one product per class.
    """
    out = _zeros(deltas, activations, num_classes)
    labels = _checked(labels, num_classes)
    samples, positions, rows = deltas.shape
    columns = activations.shape[2]
    deltas, activations = deltas.to(out.dtype), activations.to(out.dtype)
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
                x.new_zeros(padded, *x.shape[1:]).index_copy_(0, slot, x[order]).view(len(present), -1, x.shape[2])
                for x in (deltas, activations)
            ]
            out[present] = torch.bmm(side_by_side[0].transpose(1, 2), side_by_side[1])
            return out
    # In slices, so that the per-sample products never take more memory than a few MiB or one sample's.
    step = max(1, _PRODUCTS // max(1, rows * columns))
    for start in range(0, samples, step):
        part = slice(start, start + step)
        products = torch.bmm(deltas[part].transpose(1, 2), activations[part])
        out.index_add_(0, labels[part], products)
    return out


_PRODUCTS = 1 << 22
"""Elements of the per-sample products held at a time (16 MiB of float32)."""


def class_sketch_cpp(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The extension's body, for the CPU. For arguments and result see :func:`class_sketch`.

    The result is the same, to the bit, for every number of threads.
    """
    extension: Any = _extension.load()
    if extension is None:
        raise RuntimeError(f"class_sketch: backend 'cpp' cannot run: {_extension.unavailable_reason()}")
    out = torch.empty(num_classes, deltas.shape[2], activations.shape[2], dtype=_result_dtype(deltas))
    extension.class_sketch(
        deltas.detach().contiguous(),
        activations.detach().contiguous(),
        labels.contiguous(),
        out,
        torch.get_num_threads(),
    )
    return out


def _cpp_can_run(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int) -> str | None:
    if deltas.device.type != "cpu":
        return f"it serves the CPU, and the tensors are on {deltas.device}"
    return None


_LEAST_WORK = 1 << 17
"""Multiply-adds below which torch's one product per sample is as quick as handing the tensors over.

From bench/class_sketch.py (bench/results/class_sketch_cpu.json, two threads, float32): the ratio torch / cpp is 1.01 to
1.07 from 2,000 to 50,000 multiply-adds, too little to be sure of, and 1.13 at 520,000; with a single row in the output
it is 0.97 even at 200,000. At all other sizes measured it is 1.13 to 6.2."""


def _cpp_worth(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int) -> str | None:
    samples, positions, rows = deltas.shape
    columns = activations.shape[2]
    if _by_sample(positions, rows, columns):
        if samples * positions * rows * columns < _LEAST_WORK:
            return "so little work is done as soon in torch"
        if rows < 4:
            return "an output of so few rows is done sooner in torch"
    return None


def _by_sample(positions: int, rows: int, columns: int) -> bool:
    """Whether a sample's product takes no more memory than its rows."""
    return rows * columns <= positions * (rows + columns)


def _zeros(deltas: Tensor, activations: Tensor, num_classes: int) -> Tensor:
    return deltas.new_zeros(num_classes, deltas.shape[2], activations.shape[2], dtype=_result_dtype(deltas))


def _result_dtype(deltas: Tensor) -> torch.dtype:
    return torch.float64 if deltas.dtype == torch.float64 else torch.float32


def _checked(labels: Tensor, num_classes: int) -> Tensor:
    """The labels, all of them in [0, num_classes)."""
    bad = (labels < 0) | (labels >= num_classes)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"labels: got {int(labels[row])} in row {row}, expected labels in [0, {num_classes})")
    return labels


# --------------------------------------------------------------------------------------- dispatch and registration

OPERATOR = Operator(
    "class_sketch",
    (
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


@torch.library.custom_op("gradmix::class_sketch", mutates_args=())
def _class_sketch_op(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int, backend: str) -> Tensor:
    arguments = (deltas, activations, labels, num_classes)
    result: Tensor = OPERATOR.choose(backend, *arguments).run(*arguments)
    return result


@_class_sketch_op.register_fake
def _(deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int, backend: str) -> Tensor:
    return deltas.new_empty(num_classes, deltas.shape[2], activations.shape[2], dtype=_result_dtype(deltas))


def class_sketch(
    deltas: Tensor, activations: Tensor, labels: Tensor, num_classes: int, *, backend: str = "auto"
) -> Tensor:
    """The sum of d a^T over the samples of each class and their positions.

    out[p] = sum over n with labels[n] = p, and over t, of deltas[n, t] activations[n, t]^T: the gradient of a linear
    layer (or, over positions, of a convolution) summed by class, or its sketch if both sides were projected before.

    Args:
        deltas: (N, T, K) float32, float64, bfloat16 or float16: output gradients. N and T may be 0.
        activations: (N, T, J), of the same dtype and device: inputs.
        labels: (N,) int64 in [0, num_classes), in any order.
        num_classes: P.
        backend: ``"auto"``, ``"cpp"``, ``"torch"`` or ``"reference"``.

    Returns:
        (P, K, J), float64 for float64 and float32 otherwise, in which it is also accumulated; zero for a class without
        samples. It carries no gradient.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, a label out of range, or an unknown backend.
        RuntimeError: the backend named cannot run these tensors or is not available.

    >>> import torch
    >>> from gradmix.ops.class_sketch import class_sketch
    >>> deltas = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    >>> activations = torch.tensor([[[1.0]], [[10.0]]])
    >>> class_sketch(deltas, activations, torch.tensor([1, 1]), num_classes=2).squeeze(-1)
    tensor([[ 0.,  0.],
            [31., 42.]])
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
    result: Tensor = _class_sketch_op(deltas, activations, labels, num_classes, backend)
    return result
