"""A parameter as one call uses it: whole, some of its rows, its transpose, another view, or a converted copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradmix.ops.dtypes import work_dtype


@dataclass(frozen=True)
class ParameterView:
    """A parameter as one call uses it.

    Attributes:
        name: name of the parameter.
        value: argument of the call, detached: the parameter, some of its rows or its transpose, possibly converted.
        start: first row of the parameter's matrix in the view.
        transposed: whether the view is the transpose.
        full_shape: shape of the parameter itself.
        offset: position of the view's first entry in the parameter's memory, which is contiguous, for a view other
            than rows or transpose; else None.
        own_strides: strides of a converted view in the parameter's memory; None: those of ``value``.
    """

    name: str
    value: Tensor
    start: int
    transposed: bool
    full_shape: torch.Size
    offset: int | None = None
    own_strides: tuple[int, ...] | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the view in the parameter's memory."""
        return self.value.stride() if self.own_strides is None else self.own_strides

    @property
    def is_whole(self) -> bool:
        """Whether the view is the parameter itself, in its own shape."""
        return self.offset is None and not self.transposed and self.value.shape == self.full_shape

    def with_value(self, value: Tensor) -> ParameterView:
        """Return the view with converted entries, of the same shape."""
        return replace(self, value=value.detach(), own_strides=self.strides)

    def as_entries(self) -> ParameterView:
        """Return the view described by offset and strides, also if it is rows or the transpose."""
        if self.offset is not None or self.is_whole:
            return self
        strides = contiguous_strides(self.full_shape)
        if self.strides != (strides[::-1] if self.transposed else strides):
            return self
        return replace(self, start=0, transposed=False, offset=self.start * math.prod(self.full_shape[1:]))

    def gather(self, direction: Tensor) -> Tensor:
        """Return the view's entries of ``direction``, a tensor of the parameter's shape, in the working dtype."""
        direction = direction.to(work_dtype(self.value.dtype))
        if self.offset is not None:
            return direction.contiguous().as_strided(self.value.shape, self.strides, self.offset)
        if self.transposed:
            return direction.T
        if self.value.shape == self.full_shape:
            return direction
        return direction[self.start : self.start + len(self.value)]

    def scatter(self, gradient: Tensor) -> Tensor:
        """Return the parameter's gradients, (N, numel of the parameter), from those of the view, (N, *value.shape)."""
        if self.offset is None:
            return gradient.reshape(len(gradient), -1)
        numel = math.prod(self.full_shape)
        index = torch.arange(numel, device=gradient.device)
        index = index.as_strided(self.value.shape, self.strides, self.offset).flatten()
        return gradient.new_zeros(len(gradient), numel).index_add_(1, index, gradient.flatten(1))


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of a weight's matrix: its first axis against the others."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return shape[0], math.prod(shape[1:])


def token_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of the matrix of a parameter used element by element: its last axis against the others.

    Then neither side of the matrix of a position embedding (1, T, d) has all of its entries.
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]
