"""Inner products and cosines of sketched gradients, and the check that these can be compared."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from gradmix.ops.cosine_alignment import cosine_alignment


class Aligned(NamedTuple):
    """Alignment with one reference gradient.

    Attributes:
        inner: (N,) inner products.
        cosine: (N,) in [-1, 1]; 0 where a gradient is 0.
    """

    inner: Tensor
    cosine: Tensor


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines (N, M) between the vectors of a (N, D) and of b (M, D); 0 where a vector is 0."""
    left = a[None]
    return cosine_alignment(left, left if a is b else b[None])[0]


def align(vectors: Tensor, reference: Tensor) -> Aligned:
    """Return inner products and cosines of vectors (N, D) with a reference (D,)."""
    return Aligned(vectors @ reference, cosines(vectors, reference[None])[:, 0])


def differences(a: Any, b: Any) -> str | None:
    """Return the reason why two sketched gradients cannot be compared, or None if they can."""
    if dict(a.sketch) != dict(b.sketch):
        return f"a sketch {_as_text(b.sketch)}, expected {_as_text(a.sketch)}"
    if a.layout != b.layout:
        odd = sorted({layer.name for layer in a.layout} ^ {layer.name for layer in b.layout})
        return f"other layers ({', '.join(odd[:5]) or 'of other shapes'}), expected the same"
    return None


def _as_text(sketch: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in sketch.items())


def reference_vector(own: Any, reference: object) -> Tensor:
    """Return the reference as a vector (D,).

    Args:
        own: the sketched gradients to compare with it.
        reference: sketched gradients, of which the mean over all samples is taken, or a vector (D,).

    Raises:
        TypeError: the reference is neither sketched gradients nor a tensor.
        ValueError: the reference has another sketch, other layers or another size.
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
    overall_mean = getattr(reference, "overall_mean", None)
    mean: Tensor = overall_mean() if overall_mean is not None else reference.mean()  # type: ignore[attr-defined]
    return mean.to(own.vectors)
