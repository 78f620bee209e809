"""Accumulators of the parts of the gradients: sketches per sample, sketches per class, inner products, norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.layout import LayerSketch, Projections
from gradmix.gradients.plan import Plan
from gradmix.gradients.projection import Projection
from gradmix.gradients.rules import Outer, Part, Rule
from gradmix.ops.class_sketch import OPERATOR as CLASS_SKETCH
from gradmix.ops.dtypes import work_dtype


class Accumulator(Protocol):
    """Receives the calls of a pass and the gradients of their outputs.

    Attributes:
        keeps_activations: whether it needs the activations in the backward pass.
    """

    keeps_activations: ClassVar[bool]

    def observe(self, rule: Rule, axis: BatchAxis, samples: int) -> Callable[[Tensor], None]:
        """Process a call in the forward pass; return a function to be called with its output's gradient.

        The gradient is that of the summed losses times the loss scale.
        """

    def finish(self) -> None:
        """End the backward pass."""


@dataclass
class _OpenLayer:
    """The parts of one layer in a pass: factors of outer products, formed blocks, and the number of parts to come."""

    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)
    expected: int = 0


class SketchAccumulator:
    """Collects the projected factors of each layer; subclasses use them in :meth:`take_layer`.

    A layer is finished with the last of its calls, so that its factors are not kept longer than necessary.

    Args:
        plan: the model's plan.
        projections: of the plan's layers.
        scale: factor of the loss.
    """

    keeps_activations: ClassVar[bool] = False
    """If set, the activations' factor is computed in the backward pass, as it is larger than the activations."""

    def __init__(self, plan: Plan, projections: Projections, scale: float) -> None:
        self._layout = {layer.name: (index, layer) for index, layer in enumerate(projections.layout)}
        self._placement, self._projections, self._scale = plan.placement, projections, scale
        self._layers: dict[str, _OpenLayer] = {}
        self._unused = set(self._layout)

    def observe(self, rule: Rule, axis: BatchAxis, samples: int) -> Callable[[Tensor], None]:
        """Project the activations; see :class:`Accumulator`."""
        kept: list[tuple[Part, Tensor | None]] = []
        for part in rule.parts(self._placement, axis, samples):
            factor = None
            if isinstance(part, Outer) and not self.keeps_activations:
                factor = self._activation_factor(part)
                part = Outer(part.layer, part.activation_side, _raise_dropped, part.delta)  # drops the activations
            self._layers.setdefault(part.layer, _OpenLayer()).expected += 1
            kept.append((part, factor))

        def backward(d: Tensor) -> None:
            while kept:
                part, factor = kept.pop()
                self._take(part, factor, d)

        return backward

    def _activation_factor(self, part: Outer) -> Tensor:
        left, right = self._projections.of(part.layer)
        return part.activation(left if part.activation_side == "row" else right)

    def _take(self, part: Part, factor: Tensor | None, d: Tensor) -> None:
        left, right = self._projections.of(part.layer)
        layer = self._layers[part.layer]
        if isinstance(part, Outer):
            if factor is None:
                factor = self._activation_factor(part)
            other = part.delta(d, right if part.activation_side == "row" else left)
            layer.factors.append((factor, other) if part.activation_side == "row" else (other, factor))
        else:
            block = left.reduce(part.make(d), part.start, 1)
            layer.blocks.append(right.reduce(block, part.column, 2))
        layer.expected -= 1
        if layer.expected == 0:
            self._close(part.layer)

    def _close(self, name: str) -> None:
        parts = self._layers.pop(name)
        if not parts.factors and not parts.blocks:
            return
        index, layer = self._layout[name]
        block = sum(parts.blocks[1:], parts.blocks[0]) if parts.blocks else None
        row = column = None
        if parts.factors:
            # A layer used more than once has one gradient: its calls are further positions.
            rows, columns = zip(*parts.factors, strict=True)
            row, column = (f[0] if len(f) == 1 else torch.cat(f, 1) for f in (rows, columns))
        self.take_layer(index, layer, row, column, block)
        self._unused.discard(name)

    def take_layer(
        self, index: int, layer: LayerSketch, row: Tensor | None, column: Tensor | None, block: Tensor | None
    ) -> None:
        """Process the sketches of a layer, sum_t row_t column_t^T + block.

        Args:
            index: of the layer in the layout.
            layer: its place in the layout.
            row, column: (N, T, rows) and (N, T, columns), or None for both.
            block: (N, rows, columns), or None.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Finish the layers of which a call does not contribute to the loss."""
        for name in list(self._layers):
            self._close(name)
        for name in self._unused:
            self.take_zero(*self._layout[name])

    def take_zero(self, index: int, layer: LayerSketch) -> None:
        """Process a layer of which no call contributes to the loss; arguments as in :meth:`take_layer`."""


def _raise_dropped(_projection: Projection) -> Tensor:
    raise AssertionError("the activations were dropped")


def _per_sample(row: Tensor | None, column: Tensor | None, block: Tensor | None) -> Tensor:
    """Return sum_t row_t column_t^T + block, (N, rows, columns)."""
    if row is None or column is None:
        assert block is not None
        return block
    product = torch.bmm(row.transpose(1, 2), column)
    return product if block is None else product + block


class SampleSketches(SketchAccumulator):
    """Writes the sketches of all samples into ``out`` (N, D), whose former entries do not count."""

    def __init__(self, plan: Plan, projections: Projections, out: Tensor, scale: float) -> None:
        super().__init__(plan, projections, scale)
        self._out = out

    def take_layer(
        self, index: int, layer: LayerSketch, row: Tensor | None, column: Tensor | None, block: Tensor | None
    ) -> None:
        """See :meth:`SketchAccumulator.take_layer`."""
        place = self._out[:, layer.start : layer.stop].unflatten(1, (layer.rows, layer.columns))
        if row is None or column is None or block is not None or row.dtype != place.dtype:
            place.copy_(_per_sample(row, column, block))
        else:
            # At once into their place: together they may be as large as all the samples' gradients.
            torch.bmm(row.transpose(1, 2), column, out=place)
        if self._scale != 1.0:
            place /= self._scale

    def take_zero(self, index: int, layer: LayerSketch) -> None:
        """See :meth:`SketchAccumulator.take_zero`."""
        self._out[:, layer.start : layer.stop] = 0


class ClassSketches(SketchAccumulator):
    """Writes the sums of each class's sketches to ``sums`` (P, D), and of their squared norms to ``squares`` (P, L).

    Args:
        plan, projections, scale: as :class:`SketchAccumulator`.
        labels: (N,) int64 in [0, P).
        sums, squares: the tensors that are written to; their former entries do not count.
    """

    def __init__(
        self, plan: Plan, projections: Projections, labels: Tensor, sums: Tensor, squares: Tensor, scale: float
    ) -> None:
        super().__init__(plan, projections, scale)
        self._labels, self._sums, self._squares = labels, sums, squares

    def take_layer(
        self, index: int, layer: LayerSketch, row: Tensor | None, column: Tensor | None, block: Tensor | None
    ) -> None:
        """See :meth:`SketchAccumulator.take_layer`."""
        classes = len(self._sums)
        place, squares_of_layer = self._sums[:, layer.start : layer.stop], self._squares[:, index]
        if block is None:
            assert row is not None and column is not None
            arguments = (row, column, self._labels, classes)
            sums, squares = CLASS_SKETCH.choose(self._projections.backend, *arguments).run(*arguments)
            torch.div(sums.flatten(1), self._scale, out=place)
            torch.div(squares, self._scale**2, out=squares_of_layer)
            return
        sketches = _per_sample(row, column, block).flatten(1) / self._scale
        place.zero_().index_add_(0, self._labels, sketches)
        squares_of_layer.zero_().index_add_(0, self._labels, sketches.square().sum(1))

    def take_zero(self, index: int, layer: LayerSketch) -> None:
        """See :meth:`SketchAccumulator.take_zero`."""
        self._sums[:, layer.start : layer.stop] = 0
        self._squares[:, index] = 0


_SLICE = 1 << 24
"""Entries of per-sample gradients that are formed at a time for their norms (64 MiB of float32)."""


class SquaredNorms(SketchAccumulator):
    """Adds each sample's squared gradient norm to ``out`` (N,), exactly; its projections are identities."""

    keeps_activations: ClassVar[bool] = True

    def __init__(self, plan: Plan, projections: Projections, out: Tensor, scale: float) -> None:
        super().__init__(plan, projections, scale)
        self._out = out

    def take_layer(
        self, index: int, layer: LayerSketch, row: Tensor | None, column: Tensor | None, block: Tensor | None
    ) -> None:
        """See :meth:`SketchAccumulator.take_layer`."""
        self._out += self._squares(layer, row, column, block) / self._scale**2

    def _squares(self, layer: LayerSketch, row: Tensor | None, column: Tensor | None, block: Tensor | None) -> Tensor:
        if row is None or column is None:
            assert block is not None
            return block.square().sum((1, 2))
        size, positions = layer.rows * layer.columns, row.shape[1]
        if block is None and positions * (layer.rows + layer.columns) < size:
            # ||sum_t d_t a_t^T||^2 = sum_{s, t} <d_s, d_t> <a_s, a_t>: cheaper with few positions.
            pairs = torch.bmm(row, row.transpose(1, 2)) * torch.bmm(column, column.transpose(1, 2))
            return pairs.sum((1, 2))
        step = max(1, _SLICE // size)
        squares = []
        for start in range(0, len(row), step):
            part = slice(start, start + step)
            gradients = _per_sample(row[part], column[part], None if block is None else block[part])
            squares.append(gradients.square().sum((1, 2)))
        return torch.cat(squares)


class InnerProducts:
    """Adds the inner product of each sample's gradient with a direction to ``out`` (N,), exactly.

    <g, V> for g = sum_t d_t a_t^T is sum_t <d_t, V a_t>, and V a_t is the layer itself with V as its parameters: one
    more forward call of each layer. ``torch.func.jvp`` along V gives the same number at about the same cost, but not in
    one pass with norms or sketches.

    Args:
        directions: V by parameter name, of the parameters' shapes.
        out: (N,), added to.
        scale: factor of the loss.
    """

    keeps_activations: ClassVar[bool] = False

    def __init__(self, directions: Mapping[str, Tensor], out: Tensor, scale: float) -> None:
        self._directions, self._out, self._scale = directions, out, scale

    def observe(self, rule: Rule, axis: BatchAxis, samples: int) -> Callable[[Tensor], None]:
        """Compute the tangent of the call; see :class:`Accumulator`."""
        kept = [rule.tangent(self._directions)]

        def backward(d: Tensor) -> None:
            dtype = work_dtype(d.dtype)
            product = d.to(dtype) * kept.pop().to(dtype)
            self._out += axis.split(product, samples).reshape(samples, -1).sum(1).to(self._out.dtype) / self._scale

        return backward

    def finish(self) -> None:
        """Do nothing: every call is finished with its gradient."""
