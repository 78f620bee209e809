"""Kinds of sketch: the matrices L and R that turn a layer's gradient G (p x q) into S = L G R^T.

A sketch keeps inner products in expectation, E <L G R^T, L H R^T> = <G, H>, if the matrices are drawn independently
with E[L^T L] = I and E[R^T R] = I (Johnson-Lindenstrauss on either side; the Kronecker form is that of TensorSketch and
LoGra). The error of the cosine of two sketches depends on what the gradients have in common. It is about 1/k if they
are unrelated on both sides, and about 1/sqrt(k) if they are similar on one side, as in single layers of real networks,
whose inputs after a ReLU share a direction. Over many layers these errors average out to about 1/k.
:func:`gradmix.gradients.standard_errors` estimates the error of given sketches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gradmix.ops.counter_random import random_columns, random_matrix, sketch_key
from gradmix.runtime.validation import did_you_mean


class Sketch(ABC):
    """A kind of sketch. A sketch of your own derives from it and implements :meth:`matrix`.

    Args:
        rank: k, the number of rows of either matrix, an integer >= 1; or a mapping from patterns of layer names (as in
            the shell: ``"layer1.*"``, ``"*"``) to ranks, of which the first match counts.
        seed: an integer; the matrices depend on it, the layer's name and the side alone.

    Raises:
        TypeError, ValueError: ``rank`` or ``seed`` is of another type or range.
    """

    name: ClassVar[str] = ""

    def __init__(self, rank: int | Mapping[str, int] = 32, seed: int = 0) -> None:
        ranks = rank if isinstance(rank, Mapping) else {"*": rank}
        for pattern, value in ranks.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"rank: got {value!r} for {pattern!r}, expected an integer >= 1")
            if value < 1:
                raise ValueError(f"rank: got {value} for {pattern!r}, expected an integer >= 1")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: got {type(seed).__name__}, expected an integer")
        self.rank, self.seed = rank, seed
        self._ranks = dict(ranks)

    def rank_of(self, layer: str) -> int:
        """Return the rank for a layer.

        Raises:
            ValueError: no pattern matches the name.
        """
        for pattern, rank in self._ranks.items():
            if fnmatchcase(layer, pattern):
                return rank
        raise ValueError(f"rank: got the patterns {list(self._ranks)}, none of which fits layer {layer!r}; add '*'")

    def sizes(self, layer: str, rows: int, columns: int) -> tuple[int, int]:
        """Return the numbers of rows of L and of R for a layer with a gradient (rows x columns).

        A side no larger than the rank k is not sketched, and the matrix of the other side has k^2 / side rows instead
        of k: in either case the sketch has about k^2 entries, and about the same error.
        """
        rank = self.rank_of(layer)
        if rows <= rank:
            return rows, min(columns, max(rank, rank * rank // rows))
        if columns <= rank:
            return min(rows, max(rank, rank * rank // columns)), columns
        return rank, rank

    @abstractmethod
    def matrix(
        self, layer: str, side: str, size: int, dim: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        """Return the matrix (size, dim) of one side of a layer, with E[M^T M] = I; the same in every call.

        Args:
            layer: name of the layer.
            side: ``"left"`` (L) or ``"right"`` (R), which must be independent of each other.
            size: number of rows, less than ``dim`` (for a side of size ``dim`` no matrix is needed).
            dim: number of columns.
            dtype: float32 or float64.
            device: device of the matrix.
        """

    def columns(self, layer: str, side: str, size: int, dim: int, index: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return the columns ``index`` (...) of :meth:`matrix`, (..., size); for embeddings, which need few of them."""
        return self.matrix(layer, side, size, dim, dtype=dtype, device=index.device).T[index]

    def random_entries(self, layer: str, side: str) -> tuple[str, int] | None:
        """Return ``(entries, key)`` if operators can draw :meth:`matrix` by counter-based numbers; else None."""
        return None

    def describe(self) -> dict[str, object]:
        """Return kind, seed and ranks as plain values; two sketches can be compared if these are equal."""
        return {"kind": self.name or type(self).__qualname__, "seed": self.seed, "rank": self.rank}


class _CounterSketch(Sketch):
    """L and R with independent entries from a counter-based generator (:mod:`gradmix.ops.counter_random`)."""

    def matrix(
        self, layer: str, side: str, size: int, dim: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        key = sketch_key(self.seed, layer, side)
        return random_matrix(size, dim, key, self.name, dtype=dtype, device=device)

    def columns(self, layer: str, side: str, size: int, dim: int, index: Tensor, *, dtype: torch.dtype) -> Tensor:
        return random_columns(index, size, sketch_key(self.seed, layer, side), self.name, dtype=dtype)

    def random_entries(self, layer: str, side: str) -> tuple[str, int] | None:
        return self.name, sketch_key(self.seed, layer, side)


class Rademacher(_CounterSketch):
    """Kronecker sketch, entries +-1/sqrt(k): the independent entries with the smallest variance."""

    name = "rademacher"


class Gaussian(_CounterSketch):
    """Kronecker sketch, normal entries of variance 1/k (in 65,536 quantiles, the same on every device)."""

    name = "gaussian"


class Identity(Sketch):
    """No sketch: the gradients themselves. Exact, and as large as the model for every class."""

    name = "identity"

    def __init__(self, rank: int | Mapping[str, int] = 1, seed: int = 0) -> None:
        super().__init__(1, 0)

    def sizes(self, layer: str, rows: int, columns: int) -> tuple[int, int]:
        """Return the sizes of the layer itself."""
        return rows, columns

    def matrix(
        self, layer: str, side: str, size: int, dim: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        """Return the identity; the engine does not call this."""
        return torch.eye(size, dim, dtype=dtype, device=device)


class RowSampling(Sketch):
    """L and R select ``size`` different rows and columns at random, scaled by sqrt(dim / size).

    Unbiased, and far less exact than random signs if few entries of a gradient are large.
    """

    name = "rows"

    def matrix(
        self, layer: str, side: str, size: int, dim: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        # 64 random bits for each row, in four numbers; the smallest are a uniform sample without replacement.
        draws = random_matrix(4, dim, sketch_key(self.seed, layer, side), "gaussian", dtype=torch.float64, device="cpu")
        chosen = torch.from_numpy(np.sort(np.lexsort(draws.numpy())[:size]))
        matrix = torch.zeros(size, dim, dtype=dtype, device="cpu")
        matrix[torch.arange(size, device="cpu"), chosen] = math.sqrt(dim / size)
        return matrix.to(device)


KINDS: dict[str, type[Sketch]] = {kind.name: kind for kind in (Rademacher, Gaussian, Identity, RowSampling)}


def as_sketch(sketch: str | Sketch, rank: int | Mapping[str, int], seed: int) -> Sketch:
    """Return the sketch of a name with rank and seed; a :class:`Sketch` is returned unchanged.

    Raises:
        TypeError, ValueError: ``sketch`` is neither a known name nor a :class:`Sketch`.
    """
    if isinstance(sketch, Sketch):
        return sketch
    if not isinstance(sketch, str):
        raise TypeError(f"sketch: got {type(sketch).__name__}, expected a gradmix.gradients.Sketch or its kind's name")
    if sketch not in KINDS:
        expected = f"expected one of {', '.join(map(repr, KINDS))} or a Sketch"
        raise ValueError(f"sketch: got {sketch!r}, {expected}{did_you_mean(sketch, KINDS)}")
    return KINDS[sketch](rank, seed)
