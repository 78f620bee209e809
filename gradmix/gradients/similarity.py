"""Inner products and cosines of sketched gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from gradmix.ops.cosine_alignment import cosine_alignment

if TYPE_CHECKING:
    from gradmix.gradients.accumulators import LayerSketch


class Aligned(NamedTuple):
    """Alignment with one reference gradient.

    Attributes:
        inner: (N,) inner products.
        cosine: (N,) in [-1, 1]; 0 where a gradient is 0.
    """

    inner: Tensor
    cosine: Tensor


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) cosines between the rows of a (N, D) and of b (M, D); 0 where one of them is 0."""
    left = a[None]
    return cosine_alignment(left, left if a is b else b[None])[0]


def align(vectors: Tensor, reference: Tensor) -> Aligned:
    """Inner products and cosines of vectors (N, D) with a reference (D,)."""
    return Aligned(vectors @ reference, cosines(vectors, reference[None])[:, 0])


def layer_of(vectors: Tensor, layout: Sequence[LayerSketch], name: str) -> Tensor:
    """(N, rows, columns): what of the vectors (N, D) belongs to the layer of that name.

    Raises:
        KeyError: there is none.
    """
    for place in layout:
        if place.name == name:
            return vectors[:, place.start : place.stop].reshape(-1, place.rows, place.columns)
    raise KeyError(f"layer: got {name!r}, expected one of {', '.join(repr(place.name) for place in layout)}")


def differences(a: Any, b: Any) -> str | None:
    """Why two sketched gradients cannot be compared, or None if they can."""
    if dict(a.sketch) != dict(b.sketch):
        return f"a sketch {_plain(b.sketch)}, expected {_plain(a.sketch)}"
    if a.layout != b.layout:
        ours, theirs = {place.name for place in a.layout}, {place.name for place in b.layout}
        odd = sorted(ours ^ theirs)
        return f"other layers ({', '.join(odd[:5]) or 'of other shapes'}), expected the same"
    return None


def _plain(sketch: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in sketch.items())


def check_comparable(own: Any, reference: object) -> Tensor:
    """The reference as a vector (D,).

    Raises:
        TypeError: it is neither sketched gradients nor a tensor.
        ValueError: it is of another sketch, other layers or another size.
    """
    if isinstance(reference, Tensor):
        if reference.shape != own.vectors.shape[1:]:
            came, expected = tuple(reference.shape), tuple(own.vectors.shape[1:])
            raise ValueError(f"reference: got shape {came}, expected {expected}")
        return reference.to(own.vectors)
    if not hasattr(reference, "layout") or not hasattr(reference, "sketch"):
        raise TypeError(
            f"reference: got {type(reference).__name__}, expected SampleGradients, ClassGradients or a tensor"
        )
    why = differences(own, reference)
    if why:
        raise ValueError(f"reference: got {why}")
    whole = getattr(reference, "overall_mean", None)
    mean: Tensor = whole() if whole is not None else reference.mean()  # type: ignore[attr-defined]
    return mean.to(own.vectors)
