"""Products of activations and a parameter with any number of axes: ``einsum``, ``bmm``, ``matmul`` from the left."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.projection import Projection
from gradmix.gradients.rules.base import (
    Dense,
    FindParameter,
    FunctionCall,
    Outer,
    Part,
    Placement,
    Rule,
    register,
)
from gradmix.gradients.rules.parameter_view import ParameterView
from gradmix.ops.dtypes import work_dtype


@register(torch.einsum, torch.bmm, Tensor.bmm)
class Contraction(Rule):
    """y = x and W contracted as by einsum: W from the left, a matrix for each head or expert, weights of more axes.

    The gradient of sample n is x contracted with d over all axes but n's and those of W. It is a sum of outer products
    if the axes of W are first those of x and then those of y, or the other way round. Each axis has its letter.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.weight is not None
        self._x, self._w, self._y = self.arguments["letters"]
        self._shape = self.weight.value.shape
        if self.weight.transposed:
            self._w, self._shape = self._w[::-1], self.weight.full_shape

    @classmethod
    def match(cls, call: FunctionCall, find: FindParameter) -> Rule | None:
        operands = call.args[1:] if call.function is torch.einsum else call.args
        if len(operands) != 2 or call.named or not all(isinstance(operand, Tensor) for operand in operands):
            return None
        first, second = (find(operand) for operand in operands)
        weight = first or second
        if weight is None or (first and second):
            return None
        ndims = [operand.ndim for operand in operands]
        letters = _letters(call.args[0] if call.function is torch.einsum else _matmul_equation(*ndims), ndims)
        if letters is None:
            return None
        one, other, y = letters
        arguments = {"input": operands[first is not None], "args": call.args, "first": first is not None}
        return cls(call.function, arguments | {"letters": (other, one, y) if first else (one, other, y)}, weight, None)

    def refusal(self) -> str | None:
        assert self.weight is not None
        value, full_shape = self.weight.value, self.weight.full_shape
        if value.numel() != math.prod(full_shape) or (
            value.shape != full_shape and not self.weight.transposed and not value.is_contiguous()
        ):
            return "it is used otherwise than whole and in its own order"
        if any(len(set(letters)) < len(letters) for letters in (self._x, self._w, self._y)):
            return "an axis is named twice"
        sizes = dict(zip(self._x, self.x.shape, strict=True))
        if any(sizes.get(a, size) != size for a, size in zip(self._w, self._shape, strict=True)):
            return "an axis of length 1 is repeated"
        if set(self._w) - {*self._x, *self._y} or set(self._x) - {*self._w, *self._y}:
            return "an axis of one factor alone is summed"
        return None

    def run(self) -> Tensor:
        assert self.weight is not None
        return self._apply(self.x, self.weight.value)

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        assert self.weight is not None
        return self._apply(self.x.to(work_dtype(self.x.dtype)), self.weight.gather(directions[self.weight.name]))

    def _apply(self, x: Tensor, weight: Tensor) -> Tensor:
        operands = (weight, x) if self.arguments["first"] else (x, weight)
        result: Tensor = self.function(*self.arguments["args"][:-2], *operands)
        return result

    def batch_dims(self, output: Tensor) -> Sequence[int]:
        return [dim for dim, a in enumerate(self._y) if a in self._x and a not in self._w]

    def matrix_shape(self, view: ParameterView) -> tuple[int, int]:
        rows = math.prod(self._shape[: max(1, self._split)])
        return rows, math.prod(view.full_shape) // max(1, rows)

    @property
    def _split(self) -> int:
        """Number of leading axes of W that belong to one factor, if all others belong to the other; else 0."""
        owners = [(a in self._x, a in self._y) for a in self._w]
        first = next((i for i, owner in enumerate(owners) if owner != owners[0]), 0)
        return first if len(set(owners[first:])) == 1 and (True, True) not in owners else 0

    @property
    def has_factors(self) -> bool:  # type: ignore[override]
        """Whether the gradient is a sum of outer products."""
        return self._split > 0

    @property
    def keeps_input(self) -> bool:  # type: ignore[override]
        """A gradient that is no sum of outer products is formed from the input itself."""
        return self._split == 0

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        assert self.weight is not None
        name, shape, x = self.weight.name, self.matrix_shape(self.weight), self.x
        if self._split:
            yield Outer(
                placement.layer[name],
                "row" if self._w[0] in self._x else "column",
                lambda projection: self._factor(x, self._x, projection, axis, samples),
                lambda d, projection: self._factor(d, self._y, projection, axis, samples),
            )
            return

        def make(d: Tensor) -> Tensor:
            one, letters = self._samples_first(x, self._x, axis, samples)
            other, others = self._samples_first(d, self._y, axis, samples)
            dtype, sample = work_dtype(d.dtype), self._y[axis.dim]
            gradient = torch.einsum(f"{letters},{others}->{sample}{self._w}", one.to(dtype), other.to(dtype))
            return gradient.reshape(samples, *shape)

        yield Dense(placement.layer[name], 0, placement.column[name], make)

    def _samples_first(self, t: Tensor, letters: str, axis: BatchAxis, samples: int) -> tuple[Tensor, str]:
        """Move the samples to axis 0 and folded positions to an axis of their own; return the axes' letters too."""
        sample = self._y[axis.dim]
        position = next(a for a in string.ascii_letters if a not in self._x + self._w + self._y)
        dim = letters.index(sample)
        rest = letters.replace(sample, position if t.shape[dim] > samples else "")
        return replace(axis, dim=dim).split(t, samples), sample + rest

    def _factor(self, t: Tensor, letters: str, projection: Projection, axis: BatchAxis, samples: int) -> Tensor:
        """Project the axes shared with W, with all others as positions: (N, T, size)."""
        t, letters = self._samples_first(t, letters, axis, samples)
        sample = letters[0]
        own = [a for a in self._w if a in letters]
        others = sorted(set(letters) - {sample, *own})
        t = t.permute([letters.index(a) for a in (sample, *others, *own)])
        t = t.flatten(1 + len(others))
        return projection.apply(t.flatten(1, -2) if others else t.unsqueeze(1))


def _matmul_equation(one: int, other: int) -> str:
    """Return the einsum equation of a matrix product of tensors with these numbers of axes."""
    batch = string.ascii_letters[3 : 1 + max(one, other)]
    left, right = (batch[len(batch) - max(0, ndim - 2) :] for ndim in (one, other))
    rows, columns = "a" * (one > 1), "c" * (other > 1)
    return f"{left}{rows}b,{right}b{columns}->{batch}{rows}{columns}"


def _letters(equation: object, ndims: Sequence[int]) -> tuple[str, str, str] | None:
    """Return the letters of both operands and of the result, ellipses written out; None for an unsupported equation.

    Args:
        equation: of two operands.
        ndims: number of axes of each operand.
    """
    if not isinstance(equation, str):
        return None
    operands, arrow, result = equation.replace(" ", "").partition("->")
    parts = operands.split(",")
    if len(parts) != 2:
        return None
    if not arrow:
        letters = operands.replace(",", "").replace("...", "")
        result = "..." * ("..." in operands) + "".join(sorted(a for a in set(letters) if letters.count(a) == 1))
    extra = [ndim - len(part.replace("...", "")) for part, ndim in zip(parts, ndims, strict=True)]
    if any((n and "..." not in part) or n < 0 for part, n in zip(parts, extra, strict=True)):
        return None
    spare = "".join(a for a in string.ascii_letters if a not in equation)[: max(extra)]
    one, other = (part.replace("...", spare[len(spare) - n :]) for part, n in zip(parts, extra, strict=True))
    return one, other, result.replace("...", spare)
