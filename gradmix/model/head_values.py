"""The check on values that a model's logits are those of its head, made in every pass.

The last-layer gradient is (softmax(z) - y) [h; 1]^T only if the model's logits z are W h + b. After the layer the
following is allowed, which keeps the formula true:

- a shift that is the same for all classes of a sample, as in ``log_softmax``: the softmax does not depend on it;
- classes that are masked in all samples, by minus infinity or a large negative constant: their probability is 0;
- a common factor, such as a temperature: z = w (W h + b) is the layer applied to [w h; w];
- a weighted sum of several layers, z = sum_k w_k (W_k h_k + b_k): one layer [W_1 b_1 W_2 b_2 ...] applied to
  [w_1 h_1; w_1; w_2 h_2; w_2; ...].

Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from gradmix.ops.capsules import as_capsules, extension_for
from gradmix.ops.dtypes import exact_dtype, without_autocast, work_dtype
from gradmix.runtime.deferred_checks import can_sync

MASK_GAP = 100.0
"""Least distance of a masked logit below the sample's largest one: exp(-100) is below the normal float32 numbers."""

MASKED = -1e30
"""The logit of a masked class, in place of the constant that the model writes there."""

CHECKED_SAMPLES = 4
"""Samples of a pass for which W h + b is computed again."""

_SPARE_EQUATIONS = 4
"""Least number of equations beyond those that determine a factor, which then verify it."""


class Comparison(NamedTuple):
    """The model's logits, compared with those of the layers.

    Attributes:
        logits: (N, C), float32 or float64: the returned logits, :data:`MASKED` in masked classes.
        bad: (N,) bool: whether the sample's logits are not those of the layers.
    """

    logits: Tensor
    bad: Tensor


def compare_logits(returned: Tensor, layer_logits: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Comparison:
    """Compare logits with a weighted sum of layers' logits, up to a shift of each sample and masked classes.

    Args:
        returned: (N, C), the logits that the model returned.
        layer_logits: K tensors (N, C), W_k h_k + b_k.
        weights: K factors w_k.

    Two numbers count as equal if rounding explains the difference: one rounding of each term to the coarser dtype, and
    a few of the sum over classes in a log-softmax.
    """
    coarse = _coarsest([returned, *layer_logits])
    dtype = torch.promote_types(returned.dtype, work_dtype(coarse.dtype))
    result = returned.to(dtype)
    total = torch.zeros_like(result)
    size = torch.zeros_like(result)
    for logits, weight in zip(layer_logits, weights, strict=True):
        total = total + weight * logits.to(dtype)
        size = size + (weight * logits.to(dtype)).abs()
    largest = result.max(1, keepdim=True)
    shift = largest.values - total.gather(1, largest.indices)
    error = (result - total - shift).abs()
    size = size + result.abs() + shift.abs()
    live_size = size.masked_fill(result.isinf(), 0).amax(1, keepdim=True)
    # The shift has the rounding error of the logit that it was computed from.
    tolerance = coarse.eps * (size + size.gather(1, largest.indices)) + 4 * torch.finfo(dtype).eps * live_size
    other = (error > tolerance) | (result.isinf() & (result != total))
    dead = result < largest.values - MASK_GAP
    masked = (other & dead).any(0)
    bad = ((other | masked) & ~dead).any(1)
    return Comparison(result.masked_fill(masked, MASKED), bad)


def estimate_factor(returned: Tensor, layer_logits: Tensor) -> Tensor | None:
    """Return the factor w () of returned = w layer_logits + shift, by least squares; None for too few logits."""
    count, classes = returned.shape
    if count * (classes - 1) < 1 + _SPARE_EQUATIONS:
        return None
    dtype = exact_dtype(returned.device)
    result, logits = returned.to(dtype), layer_logits.to(dtype)
    dead = (result < result.amax(1, keepdim=True) - MASK_GAP).all(0)
    live = classes - dead.sum()
    result, logits = (v.masked_fill(dead, 0) for v in (result, logits))
    result, logits = ((v - v.sum(1, keepdim=True) / live).masked_fill(dead, 0) for v in (result, logits))
    factor = (result * logits).sum() / logits.square().sum()
    # Logits that are all equal do not determine the factor.
    return torch.where(factor.isfinite() & (factor != 0), factor, torch.ones_like(factor))


def off_linear(
    features: Tensor,
    logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: torch.dtype,
    up_to_shift: bool = False,
) -> Tensor:
    """Return (n,) bool, for a few of the samples: whether the logits are not W h + b.

    Args:
        features: (N, d), the layer's input.
        logits: (N, C), its output.
        weight: (C, d).
        bias: (C,) or None.
        factors: the dtype of :func:`factor_dtype`.
        up_to_shift: whether to ignore a factor of all logits, a shift of each sample's logits, and masked classes.

    The tolerance allows for the precision in which the layer is computed: under autocast its input and weight are
    rounded to the dtype of its output, and float32 products may be computed in TF32 or bfloat16. All that the result
    depends on is an argument, so that a captured graph may hold it.
    """
    # Samples at equal distances, so that in small batches no sample is always left out.
    step = max(1, -(-len(features) // CHECKED_SAMPLES))
    # Of the sum, in the usual case the whole difference.
    accumulated = torch.finfo(work_dtype(logits.dtype)).eps * (features.shape[1] ** 0.5 + 8)
    if _is_linear_natively(features, logits, weight, bias, step, accumulated):
        return torch.zeros(-(-len(features) // step), dtype=torch.bool, device=features.device)
    dtype = exact_dtype(features.device)
    # Autocast leaves float64 alone.
    with nullcontext() if dtype == torch.float64 else without_autocast(features.device):
        h, w, b = (
            None if v is None else v.detach().to(logits.dtype).to(dtype) for v in (features[::step], weight, bias)
        )
        assert h is not None and w is not None
        z = logits[::step].to(dtype)
        product, terms = h @ w.T, h.abs() @ w.abs().T
        size = z.abs()
        if b is not None:
            magnitude = b.abs()
            product, terms, size = product + b, terms + magnitude, size + magnitude
        tolerance = accumulated * terms
        # The usual case: the rounding of the sum explains the difference, and that of the factors is not needed.
        if can_sync(features.device):
            wrong: Tensor = ((product - z).abs() > tolerance).any(1)
            if not wrong.any():
                return wrong
        size = size + product.abs() + (h.square() @ w.square().T).sqrt()
        tolerance = torch.add(tolerance, size, alpha=4 * torch.finfo(factors).eps)
        if not up_to_shift:
            wrong = ((product - z).abs() > tolerance).any(1)
            return wrong
        factor = estimate_factor(z, product)
        if factor is not None:
            product, tolerance = product * factor, tolerance * factor.abs().clamp(min=1)
        largest = z.max(1, keepdim=True)
        error = product - z
        error = error - error.gather(1, largest.indices)
        tolerance = tolerance + tolerance.gather(1, largest.indices)
        wrong = ((error.abs() > tolerance) & (z >= largest.values - MASK_GAP)).any(1)
        return wrong


def _is_linear_natively(
    features: Tensor, logits: Tensor, weight: Tensor, bias: Tensor | None, step: int, tolerance: float
) -> bool:
    """Whether the extension finds every ``step``-th sample's logits to be W h + b; False also where it cannot tell.

    Args:
        features, logits, weight, bias: as :func:`off_linear`.
        step: distance of the samples.
        tolerance: of a logit, relative to the sum of its terms' magnitudes.
    """
    tensors = [None if v is None else v.detach() for v in (features, logits, weight, bias)]
    extension = extension_for((torch.float32,), *(v for v in tensors if v is not None))
    if extension is None or len(features) == 0:
        return False
    return not extension.off_linear(*as_capsules(*tensors), step, tolerance)


def stack_inputs(features: Sequence[Tensor], biases: Sequence[bool], weights: Sequence[float | Tensor]) -> Tensor:
    """Return [w_1 h_1, w_1, w_2 h_2, w_2, ...] (N, D): the input of all layers as one layer without a bias.

    Args:
        features: K tensors (N, d_k).
        biases: for each layer, whether it has a bias, for which a column is appended.
        weights: K factors w_k.
    """
    parts: list[Tensor] = []
    for h, bias, weight in zip(features, biases, weights, strict=True):
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        parts.append(h * weight)
        if bias:
            parts.append(h.new_ones(len(h), 1) * weight)
    return torch.cat([part.to(parts[0].dtype) for part in parts], 1)


class _Coarse(NamedTuple):
    dtype: torch.dtype
    eps: float


def _coarsest(values: Sequence[Tensor]) -> _Coarse:
    dtype = max((v.dtype for v in values), key=lambda d: torch.finfo(d).eps)
    return _Coarse(dtype, torch.finfo(dtype).eps)


def factor_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype to which the factors of the matrix product that gave ``logits`` are rounded by today's settings.

    float16 stands for TF32, which has as many digits.
    """
    if logits.dtype == torch.float32:
        precision = torch.get_float32_matmul_precision()
        if precision == "medium":
            return torch.bfloat16
        if precision == "high" or (logits.is_cuda and torch.backends.cuda.matmul.allow_tf32):
            return torch.float16
    return logits.dtype
