"""Sketched gradients of single samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmix.gradients.layout import LayerSketch, layer_vectors
from gradmix.gradients.similarity import Aligned, align, cosines, reference_vector


@dataclass(frozen=True, eq=False)
class SampleGradients:
    """The sketched gradients of N samples.

    Attributes:
        vectors: (N, D) float32, or float64 for a float64 model: all layers' sketches, one after the other.
        layout: the place of each layer among the D entries, and its parameters.
        sketch: kind, seed and rank of the sketch, as plain values.
    """

    vectors: Tensor
    layout: tuple[LayerSketch, ...]
    sketch: Mapping[str, object]

    def __len__(self) -> int:
        return len(self.vectors)

    def layer(self, name: str) -> Tensor:
        """Return the sketches of one layer, by its name, (N, rows, columns).

        Raises:
            KeyError: there is no such layer.
        """
        return layer_vectors(self.vectors, self.layout, name)

    def mean(self) -> Tensor:
        """Return the mean over the samples, (D,)."""
        return self.vectors.mean(0)

    def cosine(self) -> Tensor:
        """Return the cosines between the samples' gradients, (N, N); 0 where a gradient is 0."""
        return cosines(self.vectors, self.vectors)

    def align(self, reference: object) -> Aligned:
        """Return inner products and cosines with a reference, both (N,).

        Args:
            reference: :class:`SampleGradients` or :class:`ClassGradients` of the same sketch, whose mean over all
                samples counts, or a vector (D,).

        Raises:
            TypeError, ValueError: the reference is of another sketch, model or type.
        """
        return align(self.vectors, reference_vector(self, reference))

    def __getitem__(self, index: slice | Tensor) -> SampleGradients:
        """The gradients of the samples at ``index``, a slice, (K,) int64 or (N,) bool."""
        if isinstance(index, Tensor) and index.dtype not in (torch.int64, torch.bool):
            raise TypeError(f"index: got dtype {index.dtype}, expected int64 or bool")
        return SampleGradients(self.vectors[index], self.layout, self.sketch)
