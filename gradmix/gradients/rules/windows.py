"""The windows of a convolution's input: projected without unfolding them, or, for exact gradients, unfolded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmix.gradients.projection import Projection
from gradmix.ops.dtypes import work_dtype


@dataclass(frozen=True)
class Windows:
    """The windows of a convolution.

    Attributes:
        shape: shape of one filter, (C / groups, taps...).
        stride, padding, dilation, groups: arguments of the convolution.
    """

    shape: tuple[int, ...]
    stride: Any
    padding: Any
    dilation: Any
    groups: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any], shape: Sequence[int]) -> Windows:
        """Return the windows of a call with these arguments and a filter of this shape."""
        return cls(tuple(shape), *(arguments[name] for name in ("stride", "padding", "dilation", "groups")))

    def project(self, x: Tensor, projection: Projection, size: Sequence[int] = ()) -> Tensor:
        """Return M times the window at each position of x (B, C, ...): (B, groups T, projection's size).

        Args:
            x: input of the convolution.
            projection: M.
            size: number of positions along each axis, if fewer than there are.
        """
        half = x.dtype == torch.float16
        if projection.is_identity:
            return self.unfold(x, size)
        x = x.to(torch.bfloat16) if half else x  # sums over a window may exceed the range of float16
        filters, scale = projection.filters(x, self.shape)
        count, groups = len(filters), self.groups
        if groups > 1:
            filters = filters.repeat(groups, *[1] * len(self.shape))
        convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[x.ndim - 3]
        z = convolution(x, filters, None, self.stride, self.padding, self.dilation, groups)
        for i, length in enumerate(size):
            z = z.narrow(2 + i, 0, length)
        z = z.flatten(2)
        z = z.transpose(1, 2) if groups == 1 else z.unflatten(1, (groups, count)).transpose(2, 3).flatten(1, 2)
        z = z.to(work_dtype(z.dtype))
        return z if scale == 1.0 else z * scale

    def unfold(self, x: Tensor, size: Sequence[int] = (), *, ones: bool = False) -> Tensor:
        """Return the windows themselves, (B, groups T, C / groups * taps), with an entry of 1 after each if ``ones``.

        Other arguments as in :meth:`project`. In memory the positions lie side by side, as they do in x: to copy window
        by window takes several times as long.
        """
        spatial = x.ndim - 2
        strides, dilations = per_axis(self.stride, spatial), per_axis(self.dilation, spatial)
        x = F.pad(x.to(work_dtype(x.dtype)), zero_padding(self.padding, self.shape[1:], dilations))
        for i in range(spatial):
            x = x.unfold(2 + i, dilations[i] * (self.shape[1 + i] - 1) + 1, strides[i])
            x = x[..., :: dilations[i]]
        for i, length in enumerate(size):
            x = x.narrow(2 + i, 0, length)
        x = x.unflatten(1, (self.groups, -1))  # (B, groups, C / groups, positions..., taps...)
        x = x.permute([0, 1, 2, *range(3 + spatial, 3 + 2 * spatial), *range(3, 3 + spatial)])
        entries, positions = math.prod(x.shape[2 : 3 + spatial]), math.prod(x.shape[3 + spatial :])
        windows = x.new_empty(*x.shape[:2], entries + ones, positions)
        windows[:, :, :entries].view(x.shape).copy_(x)
        if ones:
            windows[:, :, entries] = 1
        return windows.transpose(2, 3).flatten(1, 2)


def per_axis(value: Any, count: int) -> list[int]:
    """Return an argument of a convolution as one integer for each of ``count`` axes."""
    return [value] * count if isinstance(value, int) else list(value) * (count // len(value))


def zero_padding(padding: Any, taps: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return the number of zeros before and after each axis, the last axis first, as ``F.pad`` takes them."""
    spatial = len(taps)
    if padding == "valid":
        padding = 0
    pads = []
    for i in reversed(range(spatial)):
        if padding == "same":
            total = dilation[i] * (taps[i] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [per_axis(padding, spatial)[i]] * 2
    return pads
