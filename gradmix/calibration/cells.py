"""The calls that ``gradmix calibrate`` measures: the sizes that matter for selection and for sketches.

``mixed_alignment``, which decides the cost of a selection, has a grid of batch, classes and features, each kind of call
with a grid of its own; the other operators have the corners of theirs. Beside the grids, one call of odd sizes for each
kind and dtype is checked and not timed: no tile is full there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from gradmix.calibration.verdicts import Cell

_Sizes = dict[str, tuple[int, ...]]
_Grid = tuple[str, str, str, tuple[str, ...], _Sizes, bool]

_PAIRS: _Sizes = {"samples": (64, 256, 1024), "classes": (10, 100, 1000), "features": (256, 2048)}
_CORNERS: _Sizes = {"samples": (64, 1024), "classes": (10, 1000), "features": (256, 2048)}
_ODD: _Sizes = {"samples": (61,), "classes": (37,), "features": (75,)}
_ODD_PAIRS: _Sizes = _ODD | {"classes": (37, 301)}  # with sums that are whole, and in parts
_BOTH = ("float32", "bfloat16")
_TABLE: _Sizes = {"samples": (320,), "classes": (10, 100), "features": (256, 2048), "weights": (5,)}
_IMAGES: _Sizes = {"samples": (64, 256), "values": (784, 150528)}
_VECTORS: _Sizes = {"layers": (1,), "samples": (16, 256), "entries": (1024, 16384)}
_POSITIONS: _Sizes = {"samples": (32, 256), "positions": (1, 196)}
_PLANES: _Sizes = {"samples": (3,), "positions": (49,), "entries": (75,), "rank": (20,)}
_SMALL: _Sizes = {"samples": (64, 1024), "classes": (10,), "features": (256,)}

_GRIDS: list[_Grid] = [
    # operator, implementation, kind, dtypes, sizes, timed
    ("mixed_alignment", "triton", "class indices", ("float32",), _PAIRS, True),
    ("mixed_alignment", "triton", "class indices", ("bfloat16",), _CORNERS, True),
    ("mixed_alignment", "triton", "class indices, norms", _BOTH, _CORNERS, True),
    ("mixed_alignment", "triton", "label vectors", _BOTH, _CORNERS, True),
    ("mixed_alignment", "triton", "class indices, norms", _BOTH, _ODD_PAIRS, False),
    ("mixed_alignment", "triton", "label vectors", _BOTH, _ODD_PAIRS, False),
    ("class_pair_alignment", "triton", "class indices", ("float32",), _TABLE, True),
    ("class_pair_alignment", "triton", "class indices", ("float32",), _ODD | {"weights": (5,)}, False),
    ("last_layer_gradient", "triton", "class indices", ("float32",), _CORNERS, True),
    ("last_layer_gradient", "triton", "class indices", _BOTH, _ODD, False),
    ("last_layer_gradient", "triton", "label vectors", _BOTH, _ODD, False),
    ("draw_partners", "triton", "uniform", ("float32",), {"samples": (64, 1024)}, True),
    ("draw_partners", "triton", "best", ("float32",), {"samples": (64, 1024)}, True),
    ("draw_partners", "triton", "permute", ("float32",), {"samples": (64, 1024)}, True),
    ("draw_partners", "triton", "uniform", ("float32",), {"samples": (61,)}, False),
    ("draw_partners", "triton", "best", ("float32",), {"samples": (61,)}, False),
    ("draw_partners", "triton", "permute", ("float32",), {"samples": (61,)}, False),
    ("selection", "cuda_graph", "class indices", _BOTH, _CORNERS, True),
    ("selection", "cuda_graph", "label vectors", _BOTH, _CORNERS, True),
    ("selection", "cuda_graph", "class indices", _BOTH, _ODD, False),
    ("selection", "cuda_graph", "label vectors", _BOTH, _ODD, False),
    ("mix_samples", "triton", "", _BOTH, _IMAGES, True),
    ("mix_samples", "triton", "", _BOTH, {"samples": (61,), "values": (75,)}, False),
    ("mix_labels", "triton", "", ("float32",), {"samples": (64, 1024), "classes": (10, 1000)}, True),
    ("mix_labels", "triton", "", ("float32",), {"samples": (61,), "classes": (37,)}, False),
    ("cosine_alignment", "triton", "", ("float32",), _VECTORS, True),
    ("cosine_alignment", "triton", "", ("float32",), {"layers": (2,), "samples": (61,), "entries": (75,)}, False),
    ("mixed_gram_alignment", "triton", "", ("float32",), _VECTORS, True),
    ("mixed_gram_alignment", "triton", "", ("float32",), {"layers": (2,), "samples": (61,), "entries": (75,)}, False),
    ("class_sketch", "cuda", "", ("float32",), _POSITIONS | {"rank": (16,), "classes": (10, 100)}, True),
    ("class_sketch", "cuda", "", _BOTH, {"samples": (7,), "positions": (5,), "rank": (13,), "classes": (3,)}, False),
    ("sketch_project", "cuda", "rows", ("float32",), _POSITIONS | {"entries": (64, 2048), "rank": (16,)}, True),
    ("sketch_project", "cuda", "planes", _BOTH, _PLANES, False),
]

_QUICK: list[_Grid] = [
    ("mixed_alignment", "triton", "class indices", ("float32",), _CORNERS, True),
    ("last_layer_gradient", "triton", "class indices", ("float32",), _SMALL, True),
    ("draw_partners", "triton", "uniform", ("float32",), {"samples": (64, 1024)}, True),
    ("selection", "cuda_graph", "class indices", ("float32",), _SMALL, True),
]


def cells(*, quick: bool = False) -> list[Cell]:
    """Return what is measured, the cells of an operator in a row; with ``quick`` a dozen of them."""
    return list(_cells(_QUICK if quick else _GRIDS))


def _cells(grids: Iterable[_Grid]) -> Iterator[Cell]:
    for seed, (operator, backend, kind, dtypes, sizes, timed) in enumerate(grids):
        for dtype, point in itertools.product(dtypes, itertools.product(*sizes.values())):
            yield Cell(operator, backend, kind, dtype, dict(zip(sizes, point, strict=True)), seed, timed)
