"""Parameters that meet the activations element by element: position embeddings, scales, PReLU, class tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.rules.base import Dense, FindParameter, FunctionCall, Part, Placement, Rule, register
from gradmix.gradients.rules.parameter_view import ParameterView, token_shape
from gradmix.ops.dtypes import work_dtype

_IN_PLACE = {Tensor.add_, Tensor.__iadd__, Tensor.sub_, Tensor.__isub__}


class Broadcast(Rule):
    """A parameter that meets activations element by element, broadcast over samples and positions."""

    has_factors = False

    @classmethod
    def match(cls, call: FunctionCall, find: FindParameter) -> Rule | None:
        if len(call.args) != 2 or call.named:
            return None
        first, second = find(call.args[0]), find(call.args[1])
        if (first is None) == (second is None):
            return None
        first, second = (None if view is None else view.as_entries() for view in (first, second))
        x = call.args[1] if second is None else call.args[0]
        if not isinstance(x, Tensor):
            return None
        return cls(call.function, {"input": x, "weight": None, "first": first is not None}, first or second, None)

    def refusal(self) -> str | None:
        assert self.weight is not None
        if self.weight.offset is None and not self.weight.is_whole:
            return "a part of it, converted, meets the activations element by element"
        if self.arguments["first"] and self.function in _IN_PLACE:
            return "it is changed in place"
        if self.x._is_view() and self.function in _IN_PLACE:
            return "it changes a view in place"
        return None

    def run(self) -> Tensor:
        assert self.weight is not None
        operands = (self.x, self.weight.value)
        result: Tensor = self.function(*(reversed(operands) if self.arguments["first"] else operands))
        return result

    def matrix_shape(self, view: ParameterView) -> tuple[int, int]:
        return token_shape(view.full_shape)

    def batch_dims(self, output: Tensor) -> Sequence[int]:
        shape = self._broadcast_shape(output.ndim)
        return [dim for dim in range(output.ndim) if shape[dim] == 1]

    def _broadcast_shape(self, ndim: int) -> list[int]:
        """Return the parameter's shape, with as many axes as the output."""
        assert self.weight is not None
        shape = list(self.weight.value.shape)
        return [1] * (ndim - len(shape)) + shape

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        assert self.weight is not None
        weight, matrix = self.weight, self.matrix_shape(self.weight)

        def make(d: Tensor) -> Tensor:
            d = self.times_derivative(d.to(work_dtype(d.dtype)))
            shape = self._broadcast_shape(d.ndim)
            # Sum over every axis that the parameter was broadcast over, except that of the samples.
            summed = [dim for dim in range(d.ndim) if shape[dim] == 1 and dim != axis.dim]
            d = axis.split(d.sum(summed, keepdim=True) if summed else d, samples)
            if d.ndim > len(shape):  # positions that were folded with the samples
                d = d.sum(1 + axis.dim)
            return weight.scatter(d).view(samples, *matrix)

        yield Dense(placement.layer[weight.name], 0, placement.column[weight.name], make)

    def times_derivative(self, d: Tensor) -> Tensor:
        """Return the output's gradient times the derivative of the output by the broadcast parameter."""
        return d

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        assert self.weight is not None
        return self.weight.gather(directions[self.weight.name])


@register(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
class Addition(Broadcast):
    """y = x + p: position embeddings."""

    signature: ClassVar = {"input": ..., "weight": ...}


@register(torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__)
class Subtraction(Addition):
    """y = x - p, or p - x."""

    @property
    def _sign(self) -> int:
        return 1 if self.arguments["first"] else -1

    def times_derivative(self, d: Tensor) -> Tensor:
        return d * self._sign

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        return super().tangent(directions) * self._sign


@register(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
class Multiplication(Broadcast):
    """y = x p: scales, as in LayerScale."""

    signature: ClassVar = {"input": ..., "weight": ...}
    keeps_input = True

    def times_derivative(self, d: Tensor) -> Tensor:
        return d * self.x

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        return self.x.to(work_dtype(self.x.dtype)) * super().tangent(directions)


@register(torch.prelu, Tensor.prelu)
class PReLU(Broadcast):
    """y = max(x, 0) + p min(x, 0), with one p, or one for each channel in axis 1."""

    keeps_input = True

    def refusal(self) -> str | None:
        return "it is what goes in" if self.arguments["first"] else super().refusal()

    def _broadcast_shape(self, ndim: int) -> list[int]:
        assert self.weight is not None
        count = self.weight.value.numel()
        return [count if dim == 1 else 1 for dim in range(ndim)]

    def times_derivative(self, d: Tensor) -> Tensor:
        return d * self.x.clamp(max=0)

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        slope = super().tangent(directions).view(self._broadcast_shape(self.x.ndim))
        return self.x.to(work_dtype(self.x.dtype)).clamp(max=0) * slope


@register(Tensor.expand, Tensor.repeat)
class Expansion(Broadcast):
    """y = p.expand(N, ...) or p.repeat(N, ...): a class token, one copy for each sample."""

    @classmethod
    def match(cls, call: FunctionCall, find: FindParameter) -> Rule | None:
        weight = find(call.args[0]) if len(call.args) > 1 else None
        if weight is None:
            return None
        weight = weight.as_entries()
        arguments = {"input": weight.value, "first": True, "sizes": call.args[1:], "named": call.named}
        return cls(call.function, arguments, weight, None)

    def refusal(self) -> str | None:
        if self.function is Tensor.repeat:
            sizes = self.arguments["sizes"]
            times = list(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
            shape = self._broadcast_shape(len(times))
            if any(t != 1 and size != 1 for t, size in zip(times, shape, strict=True)):
                return "it is repeated along an axis longer than 1"
        return super().refusal()

    def run(self) -> Tensor:
        assert self.weight is not None
        result: Tensor = self.function(self.weight.value, *self.arguments["sizes"], **self.arguments["named"])
        # Each copy is the activation of one sample from here on, and needs its own memory.
        return result.clone(memory_format=torch.contiguous_format)

    def batch_dims(self, output: Tensor) -> Sequence[int]:
        return [dim for dim in super().batch_dims(output) if output.shape[dim] > 1]
