"""The two sets of samples of which pairs are mixed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor

from gradmix._moved import REMOVED_IN

F = TypeVar("F", bound=Callable[..., Any])


class Side(NamedTuple):
    """Samples of one side of the pairs, with the outputs of the last layer.

    Attributes:
        features: (N, d) inputs of the last layer: float64, float32, float16 or bfloat16.
        logits: (N, C) its outputs, finite.
        labels: (N,) int64 class indices in [0, C), or (N, C) floating-point label vectors.
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
    def run(*arguments: Any, **keywords: Any) -> Any:
        return body(Side(*arguments[:3]), Side(*arguments[3:6]), *arguments[6:], **keywords)

    return run


def accept_tensors(*sides: str) -> Callable[[F], F]:
    """Return a decorator for a function that takes the tensors of its leading sides one by one too, as it once did.

    Args:
        sides: the suffix of each side's former keywords: ``""`` for ``features=``, ``"_a"`` for ``features_a=``.
    """
    former = [f"{field}{suffix}" for suffix in sides for field in Side._fields]

    def decorate(function: F) -> F:
        @wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            if not (args and isinstance(args[0], Tensor)) and not (keywords and former[0] in keywords):
                return function(*args, **keywords)
            name = function.__name__
            warnings.warn(
                f"{name}({', '.join(former)}, ...) is now {name}({', '.join(['Side(...)'] * len(sides))}, ...); the "
                f"former call is removed in version {REMOVED_IN}",
                DeprecationWarning,
                stacklevel=2,
            )
            tensors = [*args[: len(former)], *(keywords.pop(key) for key in former[len(args) :])]
            packed = [Side(*tensors[k : k + 3]) for k in range(0, len(former), 3)]
            return function(*packed, *args[len(former) :], **keywords)

        return cast(F, call)

    return decorate
