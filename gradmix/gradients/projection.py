"""The projection of one side of a layer: products of the sketch's matrix L or R with the factors of a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradmix.gradients.sketches import Sketch
from gradmix.ops.backends import get_backend
from gradmix.ops.dtypes import work_dtype
from gradmix.ops.sketch_project import OPERATOR, is_stored_quicker, project


class Projection:
    """The matrix M (size x dim) of one side of one layer, or the identity where size = dim.

    The matrix, of size * dim entries, is computed at its first use and kept. It is not computed if its entries are
    counter-based random numbers and a native implementation of ``sketch_project``, which draws them in each call, is
    faster.

    Args:
        sketch, layer, side, size, dim: as :meth:`Sketch.matrix`.
        backend: of the operator ``sketch_project``.
    """

    def __init__(self, sketch: Sketch, layer: str, side: str, size: int, dim: int, backend: str = "auto") -> None:
        self.size, self.dim = size, dim
        self._sketch, self._layer, self._side, self._backend = sketch, layer, side, backend
        self._random_entries = sketch.random_entries(layer, side)
        self._matrices: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @property
    def is_identity(self) -> bool:
        """Whether the projection changes nothing."""
        return self.size == self.dim

    def matrix(self, like: Tensor) -> Tensor:
        """Return M (size, dim), in the working dtype and on the device of ``like``."""
        key = work_dtype(like.dtype), like.device
        if key not in self._matrices:
            if self.is_identity:
                matrix = torch.eye(self.dim, dtype=key[0], device=key[1])
            else:
                matrix = self._sketch.matrix(self._layer, self._side, self.size, self.dim, dtype=key[0], device=key[1])
                if matrix.shape != (self.size, self.dim):
                    raise ValueError(
                        f"sketch: {type(self._sketch).__name__}.matrix gave shape {tuple(matrix.shape)} for the "
                        f"{self._side} side of layer {self._layer!r}, expected {(self.size, self.dim)}"
                    )
            self._matrices[key] = matrix
        return self._matrices[key]

    def apply(self, x: Tensor, start: int = 0, ones: bool = False) -> Tensor:
        """Return M x_t (N, T, size) for each position of x (N, T, D), the entries ``start`` to ``start + D`` of dim.

        With ``ones``, they are followed by an entry of 1.
        """
        length = x.shape[2] + ones
        if self.is_identity:
            x = x.to(work_dtype(x.dtype))
            if ones:
                x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
            return x if length == self.dim else torch.nn.functional.pad(x, (start, self.dim - start - length))
        if self._random_entries is not None and start == 0 and self._may_draw_entries(x):
            entries, key = self._random_entries
            arguments = (x, self.size, key, ones, entries)
            implementation = OPERATOR.choose(self._backend, *arguments)
            if implementation.name != "torch":  # torch would compute the matrix in every call
                projected: Tensor = implementation.run(*arguments)
                return projected
        return project(x, self.matrix(x)[:, start : start + length], ones=ones)

    def _may_draw_entries(self, x: Tensor) -> bool:
        """Whether to draw the entries in the call: the user chose a backend, or the stored matrix is not faster."""
        return self._backend != "auto" or get_backend() != "auto" or not is_stored_quicker(x, self.size)

    def one_hot(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return M e_i (N, T, size) for each index (N, T)."""
        if self.is_identity:
            return torch.nn.functional.one_hot(index, self.dim).to(dtype)
        return self._sketch.columns(self._layer, self._side, self.size, self.dim, index, dtype=dtype)

    def filters(self, x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, float]:
        """Return the first columns of M as filters (size, *shape) of x's dtype, and a factor for their outputs.

        The factor is 1, except for half precision, where filters of +-1 remain exact by it.
        """
        length = math.prod(shape)
        matrix = self.matrix(x)[:, :length].reshape(self.size, *shape)
        if matrix.dtype == x.dtype:
            return matrix, 1.0
        root = math.sqrt(self.size)
        return (matrix * root).to(x.dtype), 1 / root

    def column(self, like: Tensor, index: int) -> Tensor:
        """Return a column (size,) of M, in the working dtype and on the device of ``like``."""
        return self.matrix(like)[:, index]

    def reduce(self, gradient: Tensor, start: int, axis: int) -> Tensor:
        """Apply M along an axis, 1 or 2, of gradients (N, p, q), the entries from ``start`` on of dim."""
        length = gradient.shape[axis]
        if self.is_identity:
            if length == self.dim:
                return gradient
            behind = self.dim - start - length
            return torch.nn.functional.pad(gradient, (start, behind) if axis == 2 else (0, 0, start, behind))
        matrix = self.matrix(gradient)[:, start : start + length]
        if axis == 2:
            return gradient @ matrix.T
        # One product for all samples: they are many and small.
        n, p, q = gradient.shape
        return (matrix @ gradient.permute(1, 0, 2).reshape(p, n * q)).view(-1, n, q).transpose(0, 1)
