"""Linear layers and matrix products with a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.rules.base import FindParameter, FunctionCall, Outer, Part, Placement, Rule, register
from gradmix.gradients.rules.einsum import Contraction
from gradmix.ops.dtypes import work_dtype


@register(F.linear)
class Linear(Rule):
    """y = x W^T + b over any leading positions: the gradient is sum_t d_t x_t^T."""

    signature: ClassVar = {"input": ..., "weight": ..., "bias": None}
    can_expand_input = True

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        if self.weight is not None:
            ones, weight, x = self.has_bias_column(placement), self.weight, self.x
            if weight.transposed:  # the parameter's matrix is W^T, with the gradient sum_t x_t d_t^T
                yield Outer(
                    placement.layer[weight.name],
                    "row",
                    lambda projection: projection.apply(axis.by_position(x, samples)),
                    lambda d, projection: projection.apply(axis.by_position(d, samples)),
                )
            else:
                yield Outer(
                    placement.layer[weight.name],
                    "column",
                    lambda projection: projection.apply(axis.by_position(x, samples), ones=ones),
                    lambda d, projection: projection.apply(axis.by_position(d, samples), start=weight.start),
                )
        yield from self.bias_parts(placement, axis, samples)

    def has_bias_column(self, placement: Placement) -> bool:
        return self.weight is not None and not self.weight.transposed and super().has_bias_column(placement)


@register(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
class MatMul(Linear):
    """y = x W, with W (in, out) a parameter or the transpose of one."""

    signature: ClassVar = {"input": ..., "weight": ...}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._factor = self.weight
        if self.weight is not None:
            # For parts(): the weight of the linear layer is W^T.
            self.weight = replace(self.weight, transposed=not self.weight.transposed)

    @classmethod
    def match(cls, call: FunctionCall, find: FindParameter) -> Rule | None:
        rule = super().match(call, find)
        if cls is not MatMul:
            return rule
        if isinstance(rule, MatMul) and rule._factor is not None and rule._factor.value.ndim == 2:
            return rule
        return Contraction.match(call, find)

    def refusal(self) -> str | None:
        assert self._factor is not None
        if self._factor.value.ndim != 2 or self.x.ndim < 2:
            return "it is multiplied as other than a matrix from the right"
        if self._factor.offset is not None:
            return super().refusal()
        if not self._factor.transposed and self._factor.value.shape != self._factor.full_shape:
            return "only some of its rows are used"
        return None

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        assert self._factor is not None
        return self.x.to(work_dtype(self.x.dtype)) @ self._factor.gather(directions[self._factor.name])


@register(torch.addmm)
class AddMM(MatMul):
    """y = b + x W, with W (in, out): the linear layer of GPT-2."""

    signature: ClassVar = {"bias": ..., "input": ..., "weight": ...}

    def refusal(self) -> str | None:
        if self.bias is not None and self.bias.value.ndim != 1:
            return "it is added as other than a vector"
        return (None if self._factor is None else super().refusal()) or Rule.refusal(self)

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        bias = None if self.bias is None else self.bias.gather(directions[self.bias.name])
        if self._factor is None:
            assert bias is not None
            return bias
        result = super().tangent(directions)
        return result if bias is None else result + bias


@register(F.bilinear)
class Bilinear(Linear):
    """y_o = x1^T W_o x2 + b_o: a linear layer on the products of the entries of x1 and x2."""

    signature: ClassVar = {"input": ..., "input2": ..., "weight": ..., "bias": None}
    can_expand_input = False

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        one, other = (self.arguments[name].to(work_dtype(self.x.dtype)) for name in ("input", "input2"))
        self.x = (one[..., :, None] * other[..., None, :]).flatten(-2)
        yield from super().parts(placement, axis, samples)

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        self.arguments = self.arguments | {"input2": self.arguments["input2"].to(work_dtype(self.x.dtype))}
        return super().tangent(directions)

    def forget_input(self) -> None:
        super().forget_input()
        self.arguments = self.arguments | {"input2": self.x}
