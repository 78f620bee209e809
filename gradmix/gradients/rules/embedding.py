"""Embedding tables: ``F.embedding``, indexing of a parameter, and bags of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.projection import Projection
from gradmix.gradients.rules.base import FindParameter, FunctionCall, Outer, Part, Placement, Rule, register
from gradmix.ops.dtypes import work_dtype


@register(F.embedding)
class Embedding(Rule):
    """y_t = W[i_t]: the gradient is sum_t e_{i_t} d_t^T, without the positions that hold ``padding_idx``."""

    signature: ClassVar = {
        "input": ...,
        "weight": ...,
        "padding_idx": None,
        "max_norm": None,
        "norm_type": 2.0,
        "scale_grad_by_freq": False,
        "sparse": False,
    }
    can_expand_input = True

    def refusal(self) -> str | None:
        if self.weight is not None and self.weight.transposed:
            return "its columns are looked up"
        if self.arguments["max_norm"] is not None:
            return "max_norm changes it in the forward pass"
        if self.arguments["scale_grad_by_freq"]:
            return "scale_grad_by_freq makes a sample's gradient depend on the other samples"
        return super().refusal()

    def _call(self, arguments: dict[str, Any]) -> Tensor:
        # A sparse gradient would be that of the detached weight, which has none.
        return super()._call(arguments | {"sparse": False})

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        assert self.weight is not None
        result = F.embedding(self.x, self.weight.gather(directions[self.weight.name]))
        not_padding = self._not_padding()
        return result if not_padding is None else result * not_padding[..., None]

    def _not_padding(self) -> Tensor | None:
        """Return bool of the input's shape: the positions that do not hold ``padding_idx``; None: all."""
        padding = self.arguments["padding_idx"]
        if padding is None:
            return None
        assert self.weight is not None
        not_padding: Tensor = self.x != (padding if padding >= 0 else len(self.weight.value) + padding)
        return not_padding

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        assert self.weight is not None
        weight = self.weight
        index, not_padding = axis.split(self.x, samples).reshape(samples, -1).long(), self._not_padding()

        def one_hot(projection: Projection) -> Tensor:
            columns = projection.one_hot(index + weight.start, work_dtype(weight.value.dtype))
            if not_padding is None:
                return columns
            return columns * axis.split(not_padding, samples).reshape(samples, -1, 1)

        yield Outer(
            placement.layer[weight.name],
            "row",
            one_hot,
            lambda d, projection: projection.apply(axis.by_position(d, samples)),
        )


@register(Tensor.__getitem__, torch.index_select, Tensor.index_select)
class Lookup(Embedding):
    """y_t = W[i_t], W of any number of axes."""

    @classmethod
    def match(cls, call: FunctionCall, find: FindParameter) -> Rule | None:
        args, is_indexing = call.args, call.function is Tensor.__getitem__
        weight = find(args[0]) if args and not call.named else None
        if weight is None or (not is_indexing and args[1] not in (0, -weight.value.ndim)):
            return None
        index = args[-1][0] if isinstance(args[-1], tuple) and len(args[-1]) == 1 else args[-1]
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            return None
        if not is_indexing and index.ndim != 1:
            return None  # index_select with a scalar keeps the axis
        index = torch.where(index < 0, index + len(weight.value), index)
        return cls(call.function, cls.signature | {"input": index}, weight, None)

    def run(self) -> Tensor:
        assert self.weight is not None
        return self.weight.value[self.x]

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        assert self.weight is not None
        return self.weight.gather(directions[self.weight.name])[self.x]

    def batch_dims(self, output: Tensor) -> Sequence[int]:
        return range(self.x.ndim)

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        ndim = self.x.ndim
        for part in super().parts(placement, axis, samples):
            assert isinstance(part, Outer)
            yield replace(part, delta=self._flatten_features(part.delta, ndim))

    @staticmethod
    def _flatten_features(
        delta: Callable[[Tensor, Projection], Tensor], ndim: int
    ) -> Callable[[Tensor, Projection], Tensor]:
        return lambda d, projection: delta(d.reshape(*d.shape[:ndim], -1), projection)


@register(F.embedding_bag)
class EmbeddingBag(Embedding):
    """y_b = sum over t in bag b of a_t W[i_t], a sum or a mean: the gradient is sum_t a_t e_{i_t} d_b^T."""

    signature: ClassVar = {
        "input": ...,
        "weight": ...,
        "offsets": None,
        "max_norm": None,
        "norm_type": 2.0,
        "scale_grad_by_freq": False,
        "mode": "mean",
        "sparse": False,
        "per_sample_weights": None,
        "include_last_offset": False,
        "padding_idx": None,
    }
    can_expand_input = False

    def refusal(self) -> str | None:
        if self.arguments["mode"] == "max":
            return "the maximum of a bag is not linear in it"
        return super().refusal()

    def _call(self, arguments: dict[str, Any]) -> Tensor:
        scales, weight = arguments["per_sample_weights"], arguments["weight"]
        if scales is not None and scales.requires_grad and not _records_scales_alone():
            # No gradient of it is asked for in the backward pass.
            arguments = arguments | {"weight": weight.detach().requires_grad_()}
        return super()._call(arguments)

    def batch_dims(self, output: Tensor) -> Sequence[int]:
        return (0,)

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        assert self.weight is not None
        direction, scales = self.weight.gather(directions[self.weight.name]), self.arguments["per_sample_weights"]
        scales = None if scales is None else scales.to(direction.dtype)
        return self._call(self.arguments | {"weight": direction, "per_sample_weights": scales})

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        assert self.weight is not None
        weight, dtype = self.weight, work_dtype(self.weight.value.dtype)
        index, bag, count = self.x.flatten().long(), *self._bags()
        scales, not_padding = self.arguments["per_sample_weights"], self._not_padding()
        scale = torch.ones_like(index, dtype=dtype) if scales is None else scales.flatten().to(dtype)
        if not_padding is not None:
            scale = scale * not_padding.flatten()
        if self.arguments["mode"] == "mean":
            scale = scale / scale.new_zeros(count).index_add_(0, bag, scale).clamp(min=1)[bag]

        def sum_bags(projection: Projection) -> Tensor:
            columns = projection.one_hot(index[None] + weight.start, dtype)[0] * scale[:, None]
            sums = columns.new_zeros(count, projection.size).index_add_(0, bag, columns)
            return axis.by_position(sums, samples)

        yield Outer(
            placement.layer[weight.name],
            "row",
            sum_bags,
            lambda d, projection: projection.apply(axis.by_position(d, samples)),
        )

    def _bags(self) -> tuple[Tensor, int]:
        """Return the bag of each entry, and the number of bags."""
        x, offsets = self.x, self.arguments["offsets"]
        if x.ndim == 2:
            return torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1]), len(x)
        offsets = offsets[:-1] if self.arguments["include_last_offset"] else offsets
        entries = torch.arange(len(x), device=x.device, dtype=offsets.dtype)
        return torch.searchsorted(offsets, entries, right=True) - 1, len(offsets)


@cache
def _records_scales_alone() -> bool:
    """Whether autograd records a bag's ``per_sample_weights`` where its table has no gradient; torch 2.5 does not."""
    table, index = torch.ones(1, 1, device="cpu"), torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    with torch.enable_grad():
        try:
            F.embedding_bag(index, table, mode="sum", per_sample_weights=table.clone().requires_grad_())
        except RuntimeError:
            return False
    return True
