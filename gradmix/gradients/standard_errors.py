"""Standard errors of inner products of sketched gradients, estimated from the sketches themselves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradmix.gradients.layout import LayerSketch

_ENTRIES = 1 << 23
"""Entries of products of sketches formed at a time (32 MiB of float32)."""


def standard_errors(vectors: Tensor, reference: Tensor, layout: Sequence[LayerSketch]) -> Tensor:
    """Return the standard errors of the inner products of sketched gradients with a reference.

    For a layer with gradients A and B, and L and R of independent normal entries of variance 1/l and 1/r, the variance
    of <L A R^T, L B R^T> is ::

        (|A B^T|^2 + tr((A B^T)^2)) / l + (|A^T B|^2 + tr((A^T B)^2)) / r
        + (|A|^2 |B|^2 + <A, B>^2 + |A B^T|^2 + |A^T B|^2) / (l r)

    where 1/l or 1/r is 0 for a side without a sketch (Isserlis' theorem, for both sides in turn). Random signs have a
    smaller variance. A and B are not known; the formula is evaluated for their sketches, which tends to increase it.
    Layers are independent. The sign of an inner product within two standard errors of 0 is uncertain.

    Args:
        vectors: (N, D) sketched gradients.
        reference: (D,).
        layout: the layers' places among the D entries.

    Returns:
        (N,), of the dtype of ``vectors``.
    """
    variance = vectors.new_zeros(len(vectors))
    for layer in layout:
        left = 0.0 if layer.rows == layer.shape[0] else 1 / layer.rows
        right = 0.0 if layer.columns == layer.shape[1] else 1 / layer.columns
        if left == 0.0 and right == 0.0:
            continue
        size = (layer.rows, layer.columns)
        b = reference[layer.start : layer.stop].view(size)
        step = max(1, _ENTRIES // max(layer.rows, layer.columns) ** 2)
        for start in range(0, len(vectors), step):
            part = slice(start, start + step)
            a = vectors[part, layer.start : layer.stop].unflatten(1, size)
            rows, columns = a @ b.T, a.transpose(1, 2) @ b  # A B^T, A^T B
            squares = [m.square().sum((1, 2)) for m in (rows, columns)]
            traces = [(m * m.transpose(1, 2)).sum((1, 2)) for m in (rows, columns)]
            cross = a.square().sum((1, 2)) * b.square().sum() + (a * b).sum((1, 2)).square() + squares[0] + squares[1]
            variance[part] += left * (squares[0] + traces[0]) + right * (squares[1] + traces[1]) + left * right * cross
    return variance.clamp_(min=0).sqrt()
