"""Normalisation layers: layer, RMS, group, batch and instance normalisation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.rules.base import ChannelsFirst, Dense, Part, Placement, Rule, register
from gradmix.gradients.rules.parameter_view import matrix_shape
from gradmix.ops.dtypes import work_dtype

_CACHED = 1 << 17
"""Elements multiplied at a time on a CPU, few enough to stay in its cache."""


class Normalisation(Rule):
    """y = w x^ + b with x^ the normalised input: the gradients are sum_t d_t x^_t and sum_t d_t."""

    keeps_input = True
    has_factors = False

    def normalise_input(self) -> Tensor:
        """Return x^, of the input's shape and the working dtype."""
        raise NotImplementedError

    def refusal(self) -> str | None:
        if not all(view.is_whole for view in self.views):
            return "it is used otherwise than whole and in its own order"
        return None

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        result: Tensor | float = 0.0
        if self.weight is not None:
            result = self.normalise_input() * self.along_features(self.weight.gather(directions[self.weight.name]))
        if self.bias is not None:
            result = result + self.along_features(self.bias.gather(directions[self.bias.name]))
        assert isinstance(result, Tensor)
        return result

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        def both(d: Tensor) -> Tensor:
            total = self.sum_features(d, axis, samples)
            return torch.stack([self._weight_gradient(d, total, axis, samples), total], 2)

        def only_weight(d: Tensor) -> Tensor:
            assert self.weight is not None
            gradient = self._weight_gradient(d, None, axis, samples)
            return gradient.view(samples, *matrix_shape(self.weight.full_shape))

        if self.weight is not None and self.weight.value.ndim == 1 and self.has_bias_column(placement):
            yield Dense(placement.layer[self.weight.name], 0, 0, both)
            return
        if self.weight is not None:
            yield Dense(placement.layer[self.weight.name], 0, placement.column[self.weight.name], only_weight)
        if self.bias is not None:
            shape = matrix_shape(self.bias.full_shape)
            if self.has_bias_column(placement):
                assert self.weight is not None
                shape = matrix_shape(self.weight.full_shape)
            yield Dense(
                placement.layer[self.bias.name],
                0,
                placement.column[self.bias.name],
                lambda d: self.sum_features(d, axis, samples).view(samples, *shape),
            )

    def _weight_gradient(self, d: Tensor, total: Tensor | None, axis: BatchAxis, samples: int) -> Tensor:
        """Return the gradient of w, (N, features).

        Args:
            d: gradient of the output.
            total: sum of d over the positions, if it is known.
            axis, samples: as :meth:`Rule.parts`.
        """
        return self.sum_features(d * self.normalise_input(), axis, samples)


@register(F.layer_norm, torch.layer_norm)
class LayerNorm(Normalisation):
    """Normalisation over the last axes of each position."""

    signature: ClassVar = {"input": ..., "normalized_shape": ..., "weight": None, "bias": None, "eps": 1e-5}
    can_expand_input = True

    def _call(self, arguments: dict[str, Any]) -> Tensor:
        return F.layer_norm(*(arguments[name] for name in self.signature))

    def batch_dims(self, output: Tensor) -> Sequence[int]:
        return range(output.ndim - len(self.arguments["normalized_shape"]))

    def sum_features(self, d: Tensor, axis: BatchAxis, samples: int) -> Tensor:
        return super().sum_features(d.flatten(-len(self.arguments["normalized_shape"])), axis, samples)

    def normalise_input(self) -> Tensor:
        a = self.arguments
        return F.layer_norm(self.x.to(work_dtype(self.x.dtype)), a["normalized_shape"], None, None, a["eps"])


@register(F.rms_norm, torch.rms_norm)
class RMSNorm(LayerNorm):
    """Division by the root mean square over the last axes of each position."""

    signature: ClassVar = {"input": ..., "normalized_shape": ..., "weight": None, "eps": None}

    def _call(self, arguments: dict[str, Any]) -> Tensor:
        return F.rms_norm(*(arguments[name] for name in self.signature))

    def normalise_input(self) -> Tensor:
        a, dtype = self.arguments, work_dtype(self.x.dtype)
        eps = _default_eps(self.x.dtype) if a["eps"] is None else a["eps"]
        return F.rms_norm(self.x.to(dtype), a["normalized_shape"], None, eps)


@cache
def _default_eps(dtype: torch.dtype) -> float:
    """Return the eps that ``rms_norm`` adds by default: that of the dtype in which it computes.

    For half-precision inputs this is float32 or, in some versions of torch, the inputs' dtype; a call shows which.
    """
    own, of_sums = torch.finfo(dtype).eps, torch.finfo(work_dtype(dtype)).eps
    # With x^2 between the two, x / sqrt(x^2 + eps) is below a half for the larger eps and above for the smaller.
    x = torch.full((1,), math.sqrt(math.sqrt(own * of_sums)), dtype=dtype, device="cpu")
    return own if float(F.rms_norm(x, (1,))) < 0.5 else of_sums


@register(F.group_norm)
class GroupNorm(Normalisation, ChannelsFirst):
    """Normalisation over groups of channels of each sample."""

    signature: ClassVar = {"input": ..., "num_groups": ..., "weight": None, "bias": None, "eps": 1e-5}

    def normalise_input(self) -> Tensor:
        a = self.arguments
        return F.group_norm(self.x.to(work_dtype(self.x.dtype)), a["num_groups"], None, None, a["eps"])


@register(F.batch_norm)
class BatchNorm(Normalisation, ChannelsFirst):
    """Normalisation by running statistics."""

    signature: ClassVar = {
        "input": ...,
        "running_mean": ...,
        "running_var": ...,
        "weight": None,
        "bias": None,
        "training": False,
        "momentum": 0.1,
        "eps": 1e-5,
    }

    def normalise_input(self) -> Tensor:
        a, dtype = self.arguments, work_dtype(self.x.dtype)
        mean, variance = a["running_mean"].to(dtype), a["running_var"].to(dtype)
        return F.batch_norm(self.x.to(dtype), mean, variance, None, None, False, 0.0, a["eps"])

    def _weight_gradient(self, d: Tensor, total: Tensor | None, axis: BatchAxis, samples: int) -> Tensor:
        # x^ is affine in x, with coefficients that depend on the channel alone: the sums over positions come first.
        a, dtype = self.arguments, work_dtype(d.dtype)
        mean, variance = a["running_mean"].to(dtype), a["running_var"].to(dtype)
        step = len(d) if d.is_cuda else max(1, _CACHED // max(1, d[:1].numel()))
        pieces = zip(d.split(step), self.x.split(step), strict=True)
        products = [(a.to(dtype) * b).reshape(*a.shape[:2], -1).sum(2) for a, b in pieces]
        gradient: Tensor = axis.by_position(torch.cat(products), samples).sum(1)
        gradient = gradient - mean * (self.sum_features(d, axis, samples) if total is None else total)
        return gradient * torch.rsqrt(variance + a["eps"])


@register(F.instance_norm)
class InstanceNorm(Normalisation, ChannelsFirst):
    """Normalisation over the positions of each channel of each sample, or by running statistics."""

    signature: ClassVar = {
        "input": ...,
        "running_mean": None,
        "running_var": None,
        "weight": None,
        "bias": None,
        "use_input_stats": True,
        "momentum": 0.1,
        "eps": 1e-5,
    }

    def normalise_input(self) -> Tensor:
        a, dtype = self.arguments, work_dtype(self.x.dtype)
        mean, variance = (
            None if a["use_input_stats"] or a[name] is None else a[name].to(dtype)
            for name in ("running_mean", "running_var")
        )
        return F.instance_norm(self.x.to(dtype), mean, variance, None, None, a["use_input_stats"], 0.0, a["eps"])
