"""The two sets of samples of which pairs are mixed."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor


class Side(NamedTuple):
    """Samples of one side of the pairs, with what the last layer made of them.

    Attributes:
        features: (N, d) inputs of the last layer.
        logits: (N, C) its outputs.
        labels: (N,) int64 class indices, or (N, C) label vectors.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor

    def is_same(self, other: Side) -> bool:
        """Whether both are the very same tensors."""
        return all(one is two for one, two in zip(self, other, strict=True))


def on_sides(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body for the operator's flat arguments, of which the first six are two sides."""

    @wraps(body)
    def run(*arguments: Any) -> Any:
        return body(Side(*arguments[:3]), Side(*arguments[3:6]), *arguments[6:])

    return run
