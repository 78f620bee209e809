"""What becomes of the parts of the gradients: sketches per sample, sketches per class, inner products, norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.plan import Layer, Plan
from gradmix.gradients.projection import Side
from gradmix.gradients.rules.base import Outer, Part, Rule
from gradmix.gradients.sketches import Sketch
from gradmix.ops.class_sketch import OPERATOR as CLASS_SKETCH
from gradmix.ops.dtypes import work_dtype


@dataclass(frozen=True)
class LayerSketch:
    """One layer's place in a sketched gradient.

    Attributes:
        name: of the layer.
        parameters: names of its parameters; its matrix is ``cat([p.reshape(shape[0], -1) for p in parameters], 1)``.
        shape: (p, q) of the matrix.
        rows, columns: of its sketch L G R^T.
        start: index of the sketch's first entry among all layers'.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, int]
    rows: int
    columns: int
    start: int

    @property
    def stop(self) -> int:
        """Index behind the sketch's last entry."""
        return self.start + self.rows * self.columns


def layout_of(layers: Sequence[Layer], sketch: Sketch) -> tuple[LayerSketch, ...]:
    """The places of all layers, one after the other."""
    places: list[LayerSketch] = []
    start = 0
    for layer in layers:
        rows, columns = sketch.sizes(layer.name, *layer.shape)
        places.append(LayerSketch(layer.name, layer.parameters, layer.shape, rows, columns, start))
        start = places[-1].stop
    return tuple(places)


class Sides:
    """The matrices of all layers, made when needed and kept."""

    def __init__(self, layout: Sequence[LayerSketch], sketch: Sketch, backend: str) -> None:
        self._sides = {
            place.name: (
                Side(sketch, place.name, "left", place.rows, place.shape[0], backend),
                Side(sketch, place.name, "right", place.columns, place.shape[1], backend),
            )
            for place in layout
        }

    def of(self, layer: str) -> tuple[Side, Side]:
        """The left and the right side of a layer."""
        return self._sides[layer]


@dataclass
class _Layer:
    """What has come of one layer in this pass: factors of outer products, formed blocks, and how much is to come."""

    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)
    expected: int = 0


class SketchConsumer:
    """Gathers each layer's sketched factors; derived classes say what is made of them once all are there.

    A layer is done as soon as the last of its calls is, so that its factors are not kept for longer than they must.

    Args:
        plan: of the model.
        layout: places of the plan's layers.
        sides: their matrices.
        scale: of the loss.
    """

    late: ClassVar[bool] = False
    """Whether activations are kept, and their factor made in the backward pass: where it is the larger of the two."""

    def __init__(self, plan: Plan, layout: Sequence[LayerSketch], sides: Sides, scale: float) -> None:
        self._places = {place.name: (index, place) for index, place in enumerate(layout)}
        self._placement, self._sides, self._scale = plan.placement, sides, scale
        self._layers: dict[str, _Layer] = {}

    def observe(self, rule: Rule, axis: BatchAxis, samples: int) -> Callable[[Tensor], None]:
        """Sketch the activations; see :class:`gradmix.gradients.backward.Consumer`."""
        kept: list[tuple[Part, Tensor | None]] = []
        for part in rule.parts(self._placement, axis, samples):
            factor = None
            if isinstance(part, Outer) and not self.late:
                left, right = self._sides.of(part.layer)
                factor = part.activation(left if part.before == "row" else right)
                part = Outer(part.layer, part.before, _done, part.delta)  # lets go of the activations
            self._layers.setdefault(part.layer, _Layer()).expected += 1
            kept.append((part, factor))

        def backward(d: Tensor) -> None:
            while kept:
                part, factor = kept.pop()
                self._take(part, factor, d)

        return backward

    def _take(self, part: Part, factor: Tensor | None, d: Tensor) -> None:
        left, right = self._sides.of(part.layer)
        layer = self._layers[part.layer]
        if isinstance(part, Outer):
            if factor is None:
                factor = part.activation(left if part.before == "row" else right)
            other = part.delta(d, right if part.before == "row" else left)
            layer.factors.append((factor, other) if part.before == "row" else (other, factor))
        else:
            block = left.reduce(part.make(d), part.start, 1)
            layer.blocks.append(right.reduce(block, part.column, 2))
        layer.expected -= 1
        if layer.expected == 0:
            self._close(part.layer)

    def _close(self, name: str) -> None:
        layer = self._layers.pop(name)
        if not layer.factors and not layer.blocks:
            return
        index, place = self._places[name]
        block = sum(layer.blocks[1:], layer.blocks[0]) if layer.blocks else None
        row = column = None
        if layer.factors:
            # A layer used more than once has one gradient: its calls are so many more positions.
            rows, columns = zip(*layer.factors, strict=True)
            row, column = (f[0] if len(f) == 1 else torch.cat(f, 1) for f in (rows, columns))
        self.take_layer(index, place, row, column, block)

    def take_layer(
        self, index: int, place: LayerSketch, row: Tensor | None, column: Tensor | None, block: Tensor | None
    ) -> None:
        """A layer's sketches are sum_t row_t column_t^T + block.

        Args:
            index: of the layer in the layout.
            place: the layer's.
            row, column: (N, T, rows) and (N, T, columns), or None for both.
            block: (N, rows, columns), or None.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Close layers of which a call had no part in the loss."""
        for name in list(self._layers):
            self._close(name)


def _done(_side: Side) -> Tensor:
    raise AssertionError("the activations were let go of")


def _per_sample(row: Tensor | None, column: Tensor | None, block: Tensor | None) -> Tensor:
    """(N, rows, columns)."""
    if row is None or column is None:
        assert block is not None
        return block
    product = torch.bmm(row.transpose(1, 2), column)
    return product if block is None else product + block


class SampleSketches(SketchConsumer):
    """Writes the sketches of all samples into ``out`` (N, D)."""

    def __init__(self, plan: Plan, layout: Sequence[LayerSketch], sides: Sides, out: Tensor, scale: float) -> None:
        super().__init__(plan, layout, sides, scale)
        self._out = out

    def take_layer(
        self, index: int, place: LayerSketch, row: Tensor | None, column: Tensor | None, block: Tensor | None
    ) -> None:
        """See :meth:`SketchConsumer.take_layer`."""
        sketches = _per_sample(row, column, block).flatten(1)
        self._out[:, place.start : place.stop] = sketches if self._scale == 1.0 else sketches / self._scale


class ClassSketches(SketchConsumer):
    """Adds the sketches of each class's samples into ``sums`` (P, D), and their squared norms into ``squares`` (P, L).

    Args:
        labels: (N,) int64 in [0, P).
        sums, squares: added to.
        backend: of the operator ``class_sketch``.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Sequence[LayerSketch],
        sides: Sides,
        labels: Tensor,
        sums: Tensor,
        squares: Tensor,
        scale: float,
        backend: str,
    ) -> None:
        super().__init__(plan, layout, sides, scale)
        self._labels, self._sums, self._squares, self._backend = labels, sums, squares, backend

    def take_layer(
        self, index: int, place: LayerSketch, row: Tensor | None, column: Tensor | None, block: Tensor | None
    ) -> None:
        """See :meth:`SketchConsumer.take_layer`."""
        classes = len(self._sums)
        if block is None:
            assert row is not None and column is not None
            arguments = (row, column, self._labels, classes)
            sums, squares = CLASS_SKETCH.choose(self._backend, *arguments).run(*arguments)
            self._sums[:, place.start : place.stop] += sums.flatten(1) / self._scale
            self._squares[:, index] += squares / self._scale**2
            return
        sketches = _per_sample(row, column, block).flatten(1) / self._scale
        self._sums[:, place.start : place.stop].index_add_(0, self._labels, sketches)
        self._squares[:, index].index_add_(0, self._labels, sketches.square().sum(1))


_SLICE = 1 << 24
"""Entries of whole per-sample gradients that are formed at a time for their norms (64 MiB of float32)."""


class SquaredNorms(SketchConsumer):
    """Adds each sample's squared gradient norm into ``out`` (N,), exactly; its sides are identities."""

    late: ClassVar[bool] = True

    def __init__(self, plan: Plan, layout: Sequence[LayerSketch], sides: Sides, out: Tensor, scale: float) -> None:
        super().__init__(plan, layout, sides, scale)
        self._out = out

    def take_layer(
        self, index: int, place: LayerSketch, row: Tensor | None, column: Tensor | None, block: Tensor | None
    ) -> None:
        """See :meth:`SketchConsumer.take_layer`."""
        self._out += self._squares(place, row, column, block) / self._scale**2

    def _squares(self, place: LayerSketch, row: Tensor | None, column: Tensor | None, block: Tensor | None) -> Tensor:
        if row is None or column is None:
            assert block is not None
            return block.square().sum((1, 2))
        size, positions = place.rows * place.columns, row.shape[1]
        if block is None and positions * (place.rows + place.columns) < size:
            # ||sum_t d_t a_t^T||^2 = sum_{s, t} <d_s, d_t> <a_s, a_t>: cheaper with few positions.
            pairs = torch.bmm(row, row.transpose(1, 2)) * torch.bmm(column, column.transpose(1, 2))
            return pairs.sum((1, 2))
        step = max(1, _SLICE // size)
        parts = []
        for start in range(0, len(row), step):
            part = slice(start, start + step)
            whole = _per_sample(row[part], column[part], None if block is None else block[part])
            parts.append(whole.square().sum((1, 2)))
        return torch.cat(parts)


class InnerProducts:
    """Adds the inner product of each sample's gradient with a direction into ``out`` (N,), exactly.

    <g, V> for g = sum_t d_t a_t^T is sum_t <d_t, V a_t>, and V a_t is the layer itself with V for its parameters: one
    more forward call of each layer. It is the number that ``torch.func.jvp`` gives along V, at about the same cost, and
    can be had in one pass with norms or sketches.

    Args:
        directions: V by parameter name, of the parameters' shapes.
        out: (N,), added to.
        scale: of the loss.
    """

    late: ClassVar[bool] = False

    def __init__(self, directions: Mapping[str, Tensor], out: Tensor, scale: float) -> None:
        self._directions, self._out, self._scale = directions, out, scale

    def observe(self, rule: Rule, axis: BatchAxis, samples: int) -> Callable[[Tensor], None]:
        """See :class:`gradmix.gradients.backward.Consumer`."""
        kept = [rule.tangent(self._directions)]

        def backward(d: Tensor) -> None:
            dtype = work_dtype(d.dtype)
            product = d.to(dtype) * kept.pop().to(dtype)
            self._out += axis.split(product, samples).reshape(samples, -1).sum(1).to(self._out.dtype) / self._scale

        return backward

    def finish(self) -> None:
        """Nothing is left to do."""
