"""Exact inner products of per-sample gradients with a direction, exact norms, and the mean gradient.

<g_n, V> is the derivative of sample n's loss along V, which ``torch.func.jvp`` computes by a pass of dual numbers
through the whole network. For layers with rules it is computed from the activations and gradients of one pass: for each
layer <d_t, V a_t>, summed over the positions t, with d_t the gradient of the layer's output and V a_t the layer itself
with V as its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradmix.gradients.accumulators import Accumulator, InnerProducts, SquaredNorms
from gradmix.gradients.chunk import Chunk
from gradmix.gradients.engine import Engine
from gradmix.gradients.layers import WithoutRule, select_parameters, trainable_parameters
from gradmix.gradients.losses import Loss, Scaler, check_losses, check_output
from gradmix.gradients.plan import Plan
from gradmix.gradients.settings import CHUNK, EngineSettings
from gradmix.model.head import logits_of
from gradmix.model.inputs import InputTree, call_model, own_copy
from gradmix.model.unchanged import device_of, require_finite
from gradmix.ops.dtypes import work_dtype
from gradmix.replay.sources import SampleSource, as_pair
from gradmix.runtime.collectives import Group, all_reduce_sum


class Derivatives(NamedTuple):
    """The result of :func:`directional_derivatives`.

    Attributes:
        inner: (N,): <g_n, V>.
        norm: (N,): ||g_n||; None without ``norms``.
    """

    inner: Tensor
    norm: Tensor | None


def mean_gradient(
    model: nn.Module,
    data: SampleSource,
    *,
    layers: str | Sequence[str] = "all",
    loss: Loss | None = None,
    scaler: Scaler = None,
    chunk_size: int = CHUNK,
) -> dict[str, Tensor]:
    """Return the mean gradient of the loss over all samples, without a sketch, as one backward pass gives it.

    The model runs in evaluation mode and stays unchanged.

    Args:
        model, data, layers, loss, scaler, chunk_size: as :func:`gradmix.class_gradients`.

    Returns:
        Tensors of the parameters' shapes by parameter name, float32, or float64 for float64 parameters.

    Raises:
        ValueError, TypeError: no samples, or an argument as in :func:`gradmix.class_gradients`.
    """
    engine = Engine(model, EngineSettings(layers=layers, loss=loss, scaler=scaler, chunk_size=chunk_size))
    with engine.evaluation_mode():
        result = mean_gradient_of(engine, "data", data)
    if result is None:
        raise ValueError("data: got no samples, expected at least one")
    return result


def mean_gradient_of(
    engine: Engine, name: str, source: object, group: Group = None, *, shared: bool = True
) -> dict[str, Tensor] | None:
    """Return :func:`mean_gradient`; inside ``engine.evaluation_mode()``; None if there are no samples.

    Args:
        engine: computes the gradients.
        name: name of the samples in error messages.
        source: the samples.
        group: processes over which the mean is taken; all have the same result.
        shared: whether all processes hold the same samples, of which each takes its share; False: each has its own.
    """
    trainable = trainable_parameters(engine.model)
    wanted = {n: trainable[n] for n in select_parameters(trainable, engine.settings.layers)}
    total = {n: torch.zeros_like(p, dtype=work_dtype(p.dtype), requires_grad=False) for n, p in wanted.items()}
    count = 0
    for chunk in engine.chunks(name, source, group if shared else None):
        scale = engine.scale(chunk.x)
        with torch.enable_grad():
            logits = check_output(logits_of(call_model(engine.model, own_copy(chunk.x))), len(chunk))
            require_finite(chunk.start, **{f"the model's logits of {name}": logits.detach()})
            losses = check_losses(engine.losses(chunk)(logits, chunk.y), len(chunk))
            gradients = torch.autograd.grad(losses.sum() * scale, list(wanted.values()), allow_unused=True)
        for sum_, gradient in zip(total.values(), gradients, strict=True):
            if gradient is not None:
                sum_.add_(gradient.to(sum_.dtype), alpha=1 / scale)
        count += len(chunk)
    if group is not None:
        *sums, samples = all_reduce_sum([*total.values(), torch.tensor(count, device=device_of(engine.model))], group)
        total, count = dict(zip(total, sums, strict=True)), int(samples)
    if count == 0:
        return None
    for n, sum_ in total.items():
        sum_.div_(count)
        if not bool(torch.isfinite(sum_.sum())):
            raise ValueError(f"{name}: the gradient of {n!r} holds a NaN or an infinity, expected finite values")
    return total


def directional_derivatives(
    model: nn.Module,
    batch: tuple[InputTree, Any],
    directions: Mapping[str, Tensor],
    *,
    norms: bool = False,
    loss: Loss | None = None,
    without_rule: WithoutRule = "error",
    scaler: Scaler = None,
    chunk_size: int = CHUNK,
) -> Derivatives:
    """Return <g_n, V> for each sample's gradient g_n, exactly, and with ``norms`` ||g_n||.

    One forward pass, one more call of each layer, and a backward pass without weight gradients. Norms cost about as
    much again, and the memory of the layers' inputs.

    Args:
        model, loss, without_rule, scaler, chunk_size: as :func:`gradmix.class_gradients`.
        batch: x and y as in :func:`gradmix.sample_gradients`.
        directions: V by parameter name, such as :func:`mean_gradient` returns; other parameters are held fixed.
        norms: whether to compute the norms, over the named parameters, too.

    Returns:
        :class:`Derivatives`, float32, or float64 for a float64 model.

    Raises:
        ValueError, TypeError: a direction of no parameter or of another shape; or as :func:`gradmix.class_gradients`.
    """
    x, y = as_pair("batch", batch, any_targets=loss is not None)
    settings = EngineSettings(
        layers=list(directions), loss=loss, without_rule=without_rule, scaler=scaler, chunk_size=chunk_size
    )
    engine = Engine(model, settings)
    _check_directions(engine.model, directions)
    with engine.evaluation_mode():
        parts = list(derivatives_of(engine, "batch", (x, y), directions, norms))
    if not parts:
        raise ValueError("batch: got no samples, expected at least one")
    inner = torch.cat([part.inner for part in parts])
    return Derivatives(inner, torch.cat([part.norm for part in parts if part.norm is not None]) if norms else None)


def _check_directions(model: nn.Module, directions: Mapping[str, Tensor]) -> None:
    trainable = trainable_parameters(model)
    if not directions:
        raise ValueError("directions: got none, expected a tensor for at least one parameter")
    for name, direction in directions.items():
        if name not in trainable:
            raise ValueError(f"directions: got {name!r}, expected names of the model's trainable parameters")
        if not isinstance(direction, Tensor) or direction.shape != trainable[name].shape:
            came = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
            raise ValueError(f"directions: got {came} for {name!r}, expected shape {tuple(trainable[name].shape)}")


def derivatives_of(
    engine: Engine, name: str, source: object, directions: Mapping[str, Tensor], norms: bool
) -> Iterator[Derivatives]:
    """Yield :func:`directional_derivatives` by chunk; inside ``engine.evaluation_mode()``, with an Identity sketch."""

    def run(chunk: Chunk, plan: Plan) -> Derivatives:
        inner, squares, scale = engine.zeros(chunk.x), engine.zeros(chunk.x), engine.scale(chunk.x)
        accumulators: list[Accumulator] = [InnerProducts(directions, inner, scale)]
        if norms:
            accumulators.append(SquaredNorms(plan, engine.projections, squares, scale))
        engine.run(chunk, plan, accumulators)
        for part, gradients in engine.exact(chunk, plan):
            for n, gradient in gradients.items():
                flat = gradient.reshape(len(gradient), -1).to(inner.dtype)
                inner[part] += flat @ directions[n].flatten().to(inner.dtype)
                squares[part] += flat.square().sum(1)
        require_finite(chunk.start, **{f"the gradient of {name}": inner})
        return Derivatives(inner, squares.sqrt() if norms else None)

    for chunk in engine.chunks(name, source):
        yield engine.with_plan(run, chunk)
