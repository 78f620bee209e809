"""Convolutions and transposed convolutions in 1 to 3 dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.projection import Projection
from gradmix.gradients.rules.base import ChannelsFirst, Dense, Outer, Part, Placement, register
from gradmix.gradients.rules.windows import Windows, per_axis, zero_padding
from gradmix.ops.dtypes import work_dtype


@register(torch.conv1d, torch.conv2d, torch.conv3d)
class Convolution(ChannelsFirst):
    """y[n, o, t] = sum over c, s of W[o, c, s] x[n, c, stride t + dilation s - padding] + b[o].

    The gradient is sum_t d_t a_t^T, with a_t the window seen at t. R a_t is a convolution of x with the rows of R as
    filters: nothing is unfolded.
    """

    signature: ClassVar = {
        "input": ...,
        "weight": ...,
        "bias": None,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
    }

    def refusal(self) -> str | None:
        spatial = self.function.__name__[4]
        return super().refusal() if self.x.ndim == int(spatial) + 2 else "its input has no axis of samples"

    @property
    def keeps_input(self) -> bool:  # type: ignore[override]
        """Only small gradients are formed from the input itself."""
        return self.weight is not None and self.arguments["groups"] > 1 and self._is_small()

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        if self.weight is not None:
            weight = self.weight
            layer, groups = placement.layer[weight.name], self.arguments["groups"]
            if groups > 1 and self._is_small():
                yield Dense(layer, weight.start, placement.column[weight.name], lambda d: self._dense(d, axis, samples))
                yield from self._bias(placement, axis, samples)
                return
            ones, x = self.has_bias_column(placement), self.x
            yield Outer(
                layer,
                "column",
                lambda projection: fold_positions(self._project_windows(x, projection, ones), axis, samples),
                lambda d, projection: fold_positions(
                    project_channels(d, projection, groups, weight.start), axis, samples
                ),
            )
        yield from self.bias_parts(placement, axis, samples)

    def _project_windows(self, x: Tensor, projection: Projection, ones: bool) -> Tensor:
        """Project the windows of x, with an entry of 1 after each window if ``ones``: (B, groups T, size)."""
        assert self.weight is not None
        shape = self.weight.value.shape[1:]
        windows = Windows.of(self.arguments, shape)
        if projection.is_identity:
            return windows.unfold(x, ones=ones)
        z = windows.project(x, projection)
        return z + projection.column(z, math.prod(shape)) if ones else z

    def _is_small(self) -> bool:
        """Whether a sample's gradient takes no more memory than its activations."""
        assert self.weight is not None
        weight = self.weight.value
        return weight.numel() * len(self.x) <= self.x.numel() * (1 + len(weight) / self.x.shape[1])

    def _dense(self, d: Tensor, axis: BatchAxis, samples: int) -> Tensor:
        """Form the gradient, one tap of the filter after the other: (N, out, in / groups * taps)."""
        assert self.weight is not None
        a, weight, dtype = self.arguments, self.weight.value, work_dtype(d.dtype)
        spatial = d.ndim - 2
        stride, dilation = (per_axis(a[name], spatial) for name in ("stride", "dilation"))
        x = F.pad(self.x, zero_padding(a["padding"], weight.shape[2:], dilation))
        d = d.to(dtype).unflatten(1, (a["groups"], -1)).flatten(3)
        lengths = self._output_lengths(x, stride, dilation)
        taps = []
        for tap in product(*map(range, weight.shape[2:])):
            seen = x
            for i, offset in enumerate(tap):
                seen = seen.narrow(2 + i, offset * dilation[i], (lengths[i] - 1) * stride[i] + 1)
                seen = seen[(slice(None),) * (2 + i) + (slice(None, None, stride[i]),)]
            seen = seen.to(dtype).unflatten(1, (a["groups"], -1)).flatten(3)
            taps.append(torch.einsum("ngot,ngct->ngoc", d, seen))
        gradient = torch.stack(taps, -1).flatten(3).flatten(1, 2)
        return axis.split(gradient, samples).flatten(1, -3).sum(1) if samples != len(gradient) else gradient

    def _output_lengths(self, padded: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
        """Positions of the output along each axis."""
        assert self.weight is not None
        taps = self.weight.value.shape[2:]
        return [(size - dilation[i] * (taps[i] - 1) - 1) // stride[i] + 1 for i, size in enumerate(padded.shape[2:])]


@register(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
class TransposedConvolution(ChannelsFirst):
    """y = the adjoint of a convolution with W (in, out / groups, ...), plus b.

    The gradient of W is sum_t x_t w_t^T, with w_t the window of the output's gradient that the convolution sees.
    """

    signature: ClassVar = {
        "input": ...,
        "weight": ...,
        "bias": None,
        "stride": 1,
        "padding": 0,
        "output_padding": 0,
        "groups": 1,
        "dilation": 1,
    }
    bias_is_column = False

    def refusal(self) -> str | None:
        spatial = self.function.__name__[14]
        return super().refusal() if self.x.ndim == int(spatial) + 2 else "its input has no axis of samples"

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        if self.weight is not None:
            weight, x, size, groups = self.weight, self.x, self.x.shape[2:], self.arguments["groups"]
            windows = Windows.of(self.arguments, weight.value.shape[1:])
            yield Outer(
                placement.layer[weight.name],
                "row",
                lambda projection: fold_positions(project_channels(x, projection, groups, weight.start), axis, samples),
                lambda d, projection: fold_positions(windows.project(d, projection, size), axis, samples),
            )
        yield from self.bias_parts(placement, axis, samples)


def project_channels(d: Tensor, projection: Projection, groups: int, start: int) -> Tensor:
    """Project the channels at each position of d (B, C, ...), group by group: (B, groups T, size)."""
    d = d.flatten(2)
    if groups == 1:
        return projection.apply(d.transpose(1, 2), start=start)
    channels = d.shape[1] // groups
    parts = [
        projection.apply(part.transpose(1, 2), start=start + g * channels)
        for g, part in enumerate(d.split(channels, 1))
    ]
    return torch.cat(parts, 1)


def fold_positions(z: Tensor, axis: BatchAxis, samples: int) -> Tensor:
    """Reshape (B, T, size) to (N, T', size), where B holds the samples, possibly folded with positions."""
    return z if len(z) == samples else axis.split(z, samples).flatten(1, -2)
