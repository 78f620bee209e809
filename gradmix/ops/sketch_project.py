"""Activations times a random matrix that is never stored: one side of a layer's sketch.

Row t of sample n of x, with a 1 behind it if the layer has a bias, is multiplied by the (rank x D) matrix M of a key,

    out[n, t, i] = sum over j of M[i, j] x[n, t, j]   (+ M[i, D])

whose entries `counter_random` defines. :func:`sketch_project_reference` says exactly this; the torch body makes M and
calls :func:`project`, which serves any matrix; the native ones make the entries where they need them.

Two ways that x may lie in memory are served without a copy: "rows", where the D entries of a position are next to each
other (linear layers, channels-last images), and "planes", where the T positions of an entry are (images: ``x`` is then
``image.flatten(2).transpose(1, 2)``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.calibration.lookup import CalibratedWorth, Extent
from gradmix.ops import _cuda
from gradmix.ops.backends import Backend, Operator
from gradmix.ops.capsules import as_capsules
from gradmix.ops.counter_random import check_matrix, random_matrix
from gradmix.ops.dtypes import without_autocast, work_dtype
from gradmix.ops.registration import register

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sketch_project_reference(x: Tensor, rank: int, key: int, ones: bool, entries: str) -> Tensor:
    """The formula, position by position. For arguments and result see :func:`sketch_project`."""
    samples, positions, dim = x.shape
    out = x.new_zeros(samples, positions, rank, dtype=work_dtype(x.dtype))
    matrix = random_matrix(rank, dim + ones, key, entries, dtype=out.dtype, device=x.device)
    for n in range(samples):
        for t in range(positions):
            row = x[n, t].to(out.dtype)
            if ones:
                row = torch.cat((row, row.new_ones(1)))
            out[n, t] = (matrix * row).sum(1)
    return out


def sketch_project_torch(x: Tensor, rank: int, key: int, ones: bool, entries: str) -> Tensor:
    """The matrix and one product, on any device. For arguments and result see :func:`sketch_project`."""
    dim = x.shape[2] + ones
    if _multiplies_halves(x) and entries == "rademacher":
        # Signs are exact in a half type, their common factor is not.
        signs = random_matrix(rank, dim, key, entries, dtype=x.dtype, device=x.device).sign_()
        return project(x, signs, ones=ones).contiguous().mul_(1.0 / math.sqrt(rank))
    matrix = random_matrix(rank, dim, key, entries, dtype=work_dtype(x.dtype), device=x.device)
    return project(x, matrix, ones=ones).contiguous()


def sketch_project_cpp(x: Tensor, rank: int, key: int, ones: bool, entries: str) -> Tensor:
    """The extension's body, for the CPU and Rademacher entries. For arguments and result see :func:`sketch_project`.

    The result is the same, to the bit, for every number of threads and every split of the samples.
    """
    extension: Any = _extension.load()
    if extension is None:
        raise RuntimeError(f"sketch_project: backend 'cpp' cannot run: {_extension.unavailable_reason()}")
    x = x.detach()
    if layout(x) is None or (layout(x) == "planes" and x.shape[1] < _REGISTER):
        x = x.contiguous()  # planes of so few positions would leave the registers half empty
    out = torch.empty(*x.shape[:2], rank, dtype=work_dtype(x.dtype), device="cpu")
    source, target = as_capsules(x, out)
    extension.sketch_project(source, key, ones, target, torch.get_num_threads())
    return out


_REGISTER = 16
"""Positions that a register may hold."""


def _cpp_can_run(x: Tensor, rank: int, key: int, ones: bool, entries: str) -> str | None:
    if x.device.type != "cpu":
        return f"it serves the CPU, and the tensor is on {x.device}"
    if entries != "rademacher":
        return f"it makes Rademacher entries, and {entries} ones were asked for"
    return None


_STORED_ELEMENTS, _STORED_RANK = 800_000, 32
"""Rows of float32 with more elements, and a matrix of no more rows, are multiplied by a stored matrix sooner."""


def is_stored_quicker(x: Tensor, rank: int) -> bool:
    """Whether :func:`project` with a matrix that was made before is quicker than the native body, which draws it anew.

    From bench/sketch_project.py (bench/results/sketch_project_*_cpu.json; two threads, AVX-512), stored / native: large
    rows of float32 with ranks up to 32 take 0.7 to 1.03 times as long, and for these the answer is yes. Smaller ones
    take 0.9 to 1.7 times, planes of float32 1.3 to 2.1, other dtypes 1.4 to 5. Where all is done in 20 us the stored
    matrix would save 2 to 8 of them. On other devices nothing has been measured, and the stored matrix serves.

    Args:
        x: (N, T, D).
        rank: of the matrix.
    """
    if x.device.type != "cpu":
        return True
    in_planes = layout(x) == "planes" and x.shape[1] >= _REGISTER
    return x.dtype == torch.float32 and not in_planes and x.numel() > _STORED_ELEMENTS and rank <= _STORED_RANK


# ----------------------------------------------------------------------------------------------- with any given matrix


def project(x: Tensor, matrix: Tensor, *, ones: bool = False) -> Tensor:
    """The product of every position's vector with a given matrix: :func:`sketch_project` without the random entries.

    x is not copied if it lies in rows or planes, or only slice by slice where a half type has to be converted.

    Args:
        x: (N, T, D) float32, float64, bfloat16 or float16, of any strides.
        matrix: (rank, D), or (rank, D + 1) with ``ones``, floating point, on the same device. It is converted to the
            dtype computed in, except that on a GPU a matrix of the same half type as ``x`` is multiplied as it is.
        ones: whether a 1 is assumed behind each position's vector.

    Returns:
        (N, T, rank), float64 for float64 and float32 otherwise, in which it is also accumulated. Where x lies in planes
        it is the transposed view of a contiguous (N, rank, T).

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices that do not fit.

    >>> import torch
    >>> from gradmix.ops.sketch_project import project
    >>> project(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[1.0, 0.0, 5.0], [1.0, 1.0, 0.0]]), ones=True)
    tensor([[[6., 3.]]])
    """
    _check_x(x)
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix: got {type(matrix).__name__}, expected a tensor")
    if not matrix.dtype.is_floating_point:
        raise TypeError(f"matrix: got dtype {matrix.dtype}, expected a floating-point dtype")
    samples, positions, dim = x.shape
    if matrix.ndim != 2 or matrix.shape[1] != dim + ones:
        raise ValueError(f"matrix: got shape {tuple(matrix.shape)}, expected (rank, {dim + ones})")
    if matrix.device != x.device:
        raise ValueError(f"matrix: got a tensor on {matrix.device}, expected {x.device} as x")
    dtype = work_dtype(x.dtype)
    with without_autocast(x.device):
        if _multiplies_halves(x) and matrix.dtype == x.dtype:
            return _product(x, matrix, ones, dtype)
        matrix = matrix.to(dtype)
        if x.dtype == dtype:
            return _product(x, matrix, ones, dtype)
        step = max(1, _CONVERTED[x.device.type == "cuda"] // max(1, positions * dim))
        if step >= samples:
            return _product(x.to(dtype), matrix, ones, dtype)
        parts = [_product(part.to(dtype), matrix, ones, dtype) for part in x.split(step)]
        # Of planes' results the memory is joined, not the view.
        return torch.cat([part.mT for part in parts]).mT if layout(x) == "planes" else torch.cat(parts)


_CONVERTED = (1 << 18, 1 << 26)
"""Elements converted to float32 at a time: on a CPU they stay in its cache, on a GPU they keep it busy."""


def layout(x: Tensor) -> str | None:
    """Layout of (N, T, D) in memory: ``"rows"`` (D contiguous), ``"planes"`` (T contiguous), or None for neither."""
    if x.stride(2) == 1 or x.shape[2] <= 1:
        return "rows"
    return "planes" if x.stride(1) == 1 or x.shape[1] <= 1 else None


def _multiplies_halves(x: Tensor) -> bool:
    """Whether torch multiplies x's half type here and returns the sums as float32, not rounded."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and hasattr(torch.ops.aten.bmm, "dtype")


def _product(x: Tensor, matrix: Tensor, ones: bool, dtype: torch.dtype) -> Tensor:
    """The product of x and the matrix, both of one dtype, plus the matrix's last column if ``ones``; in ``dtype``."""
    samples, positions, dim = x.shape
    rank = len(matrix)
    bias = matrix[:, dim] if ones else None
    weight = matrix[:, :dim] if ones else matrix
    convolves = _convolves(x, rank)
    if layout(x) == "planes":
        planes = x.mT
        if convolves and (rank > 16 or positions >= 512):
            return _convolution(planes.unsqueeze(3), weight, bias).squeeze(3).mT
        left = weight.expand(samples, rank, dim)
        out = torch.bmm(left, planes) if x.dtype == dtype else torch.bmm(left, planes, out_dtype=dtype)
        return (out if bias is None else out.add_(bias[:, None])).mT
    if layout(x) == "rows" and samples > 1 and positions > 1 and x.stride(0) != positions * x.stride(1):
        # One matrix of all rows would be a copy of x.
        right = weight.t().expand(samples, dim, rank)
        out = torch.bmm(x, right) if x.dtype == dtype else torch.bmm(x, right, out_dtype=dtype)
        return out if bias is None else out.add_(bias)
    flat = x.reshape(samples * positions, dim)
    if x.dtype != dtype:
        out = torch.mm(flat, weight.t(), out_dtype=dtype)
        return (out if bias is None else out.add_(bias)).view(samples, positions, rank)
    if convolves and flat.stride(0) == dim:
        # The strides of a channels-last image of one line: only by them is it known to be one.
        size = len(flat) * dim
        out = _convolution(flat.as_strided((1, dim, 1, len(flat)), (size, 1, size, dim)), weight, bias)
        return out.permute(0, 2, 3, 1).reshape(samples, positions, rank)
    return torch.nn.functional.linear(flat, weight, bias).view(samples, positions, rank)


def _convolves(x: Tensor, rank: int) -> bool:
    """Whether the product is computed sooner as a 1x1 convolution.

    Torch has convolutions computed by another library than products, one that uses the widest registers of any
    processor. Measured with 1 and 2 threads on an AMD processor with AVX-512: 1.4 to 2.8 times as fast for rows, 1.1 to
    1.9 times for planes but for a small rank with few positions; slower below some 4 million multiply-adds.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and x.numel() < 1 << 31
        and x.numel() * rank >= 1 << 22
    )


def _convolution(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 1x1 convolution of an image with (rank, D)."""
    # The spacing between the taps of a kernel that has only one means nothing, but without it torch may run other code.
    return torch.nn.functional.conv2d(image, weight.reshape(*weight.shape, 1, 1), bias, dilation=2)


CUDA_AXES = ("samples", "positions", "entries", "rank")


def _cuda_extent(x: Tensor, rank: int, _key: int, _ones: bool, _entries: str = "rademacher") -> Extent:
    samples, positions, entries = x.shape
    return x.device, x.dtype, layout(x) or "strided", samples, positions, entries, rank


# --------------------------------------------------------------------------------------- dispatch and registration

OPERATOR = Operator(
    "sketch_project",
    (
        Backend(
            "cuda",
            _cuda.sketch_project_cuda,
            can_run=_cuda.sketch_project_can_run,
            worth=CalibratedWorth("sketch_project", "cuda", CUDA_AXES, _cuda_extent),
            available=_cuda.unavailable_reason,
        ),
        Backend(
            "cpp",
            sketch_project_cpp,
            can_run=_cpp_can_run,
            available=_extension.unavailable_reason,
        ),
        Backend("torch", sketch_project_torch),
        Backend("reference", sketch_project_reference),
    ),
)


def _fake(x: Tensor, rank: int, *_rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], rank, dtype=work_dtype(x.dtype))


_sketch_project_op = register(
    OPERATOR, "(Tensor x, SymInt rank, SymInt key, bool ones, str entries, str backend) -> Tensor", _fake
)


def sketch_project(
    x: Tensor, rank: int, key: int, *, ones: bool = False, entries: str = "rademacher", backend: str = "auto"
) -> Tensor:
    """Every position's vector times the random (rank x D) matrix of a key.

    out[n, t, i] = sum over j of M[i, j] x[n, t, j] (+ M[i, D] with ``ones``), where M is
    ``random_matrix(rank, D + ones, key, entries)`` of `gradmix.ops.counter_random`: the same on every device and for
    every split of x, with entries of variance 1 / rank, so that inner products are kept in the mean.

    Args:
        x: (N, T, D) float32, float64, bfloat16 or float16, of any strides: N samples of T positions. Any size may be 0.
        rank: of the sketch, at least 1.
        key: a signed 64-bit integer, such as `gradmix.ops.counter_random.sketch_key` gives.
        ones: whether a 1 is assumed behind each position's vector (for a layer's bias).
        entries: ``"rademacher"`` or ``"gaussian"``.
        backend: ``"auto"``, ``"cpp"``, ``"cuda"``, ``"torch"`` or ``"reference"``.

    Returns:
        (N, T, rank), contiguous, float64 for float64 and float32 otherwise, in which it is also accumulated. It carries
        no gradient.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of range, or the backend is unknown.
        RuntimeError: the backend named cannot run these arguments or is not available.

    >>> import torch
    >>> from gradmix.ops.counter_random import random_matrix
    >>> from gradmix.ops.sketch_project import sketch_project
    >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> torch.allclose(sketch_project(x, 4, key=7), x @ random_matrix(4, 3, key=7).T)
    True
    """
    _check_x(x)
    check_matrix(rank, key, entries, torch.float32)
    if not isinstance(ones, bool):
        raise TypeError(f"ones: got {type(ones).__name__}, expected bool")
    result: Tensor = _sketch_project_op(x, rank, key, ones, entries, backend)
    return result


def _check_x(x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a tensor")
    if x.ndim != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, T, D)")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: got dtype {x.dtype}, expected float32, float64, bfloat16 or float16")
