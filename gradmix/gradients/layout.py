"""The layout of a sketched gradient: the place of each layer among its entries, and the projections of the layers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gradmix.gradients.layers import Layer
from gradmix.gradients.projection import Projection
from gradmix.gradients.sketches import KINDS, Identity, Sketch
from gradmix.runtime.validation import did_you_mean


@dataclass(frozen=True)
class LayerSketch:
    """The place of one layer in a sketched gradient.

    Attributes:
        name: name of the layer.
        parameters: names of its parameters; its matrix is ``cat([p.reshape(shape[0], -1) for p in parameters], 1)``.
        shape: (p, q) of the matrix.
        rows, columns: numbers of rows and columns of its sketch L G R^T.
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
        """Index after the sketch's last entry."""
        return self.start + self.rows * self.columns


Layout = tuple[LayerSketch, ...]


def layout_of(layers: Sequence[Layer], sketch: Sketch) -> Layout:
    """Return the places of all layers, one after the other."""
    layout: list[LayerSketch] = []
    start = 0
    for layer in layers:
        rows, columns = sketch.sizes(layer.name, *layer.shape)
        layout.append(LayerSketch(layer.name, layer.parameters, layer.shape, rows, columns, start))
        start = layout[-1].stop
    return tuple(layout)


def layer_vectors(vectors: Tensor, layout: Sequence[LayerSketch], name: str) -> Tensor:
    """Return the entries of vectors (N, D) that belong to a layer, (N, rows, columns).

    Raises:
        KeyError: there is no layer of this name.
    """
    for layer in layout:
        if layer.name == name:
            return vectors[:, layer.start : layer.stop].reshape(-1, layer.rows, layer.columns)
    names = [layer.name for layer in layout]
    raise KeyError(f"layer: got {name!r}, expected one of {', '.join(map(repr, names))}{did_you_mean(name, names)}")


class Projections:
    """The projections of all layers of a layout.

    Args:
        layout: the layers.
        sketch: source of the matrices.
        backend: of the operators ``sketch_project`` and ``class_sketch``.
    """

    def __init__(self, layout: Layout, sketch: Sketch, backend: str) -> None:
        self.layout, self.backend = layout, backend
        self._by_layer = {
            layer.name: (
                Projection(sketch, layer.name, "left", layer.rows, layer.shape[0], backend),
                Projection(sketch, layer.name, "right", layer.columns, layer.shape[1], backend),
            )
            for layer in layout
        }

    def of(self, layer: str) -> tuple[Projection, Projection]:
        """Return the left and the right projection of a layer."""
        return self._by_layer[layer]


_projections: weakref.WeakKeyDictionary[nn.Module, dict[object, Projections]] = weakref.WeakKeyDictionary()
_KEPT = 8
"""Number of sketches of a model whose matrices are kept between calls."""


def projections_for(model: nn.Module, layout: Layout, sketch: Sketch, backend: str) -> Projections:
    """Return the projections of a sketch, those of an earlier call for this model if the matrices are the same."""
    # The matrices of a user's own sketch are identified only by the object itself.
    identity = repr(sketch.describe()) if type(sketch) in KINDS.values() else sketch
    key = (layout, identity, backend)
    known = _projections.setdefault(model, {})
    projections = known.pop(key, None) or Projections(layout, sketch, backend)
    if not isinstance(sketch, Identity):
        known[key] = projections  # the latest is the last
        while len(known) > _KEPT:
            del known[next(iter(known))]
    return projections
