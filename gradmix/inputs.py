"""Inputs of a model: a tensor, or a mapping, tuple or list of tensors, nested at will, that share their first axis.

``x`` of a batch is such a tree. Every tensor in it is a leaf, and axis 0 of every leaf counts the same samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

InputTree: TypeAlias = "Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]"
"""A tensor (N, ...), or a mapping, tuple or list of such trees with the same N."""

Tree = TypeVar("Tree")


def leaves(x: object, path: str = "x") -> Iterator[tuple[str, object]]:
    """Path and value of each leaf: whatever is neither a mapping, a tuple nor a list."""
    if isinstance(x, Mapping):
        for key, value in x.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(x, (tuple, list)):
        for index, value in enumerate(x):
            yield from leaves(value, f"{path}[{index}]")
    else:
        yield path, x


def tensors_of(x: InputTree) -> list[Tensor]:
    """The tensors of a checked tree, in order."""
    return [cast(Tensor, value) for _, value in leaves(x)]


def check_inputs(name: str, x: object) -> int:
    """Check that ``x`` is a tree of tensors with one number of samples.

    Args:
        name: how the error names the argument.
        x: what came.

    Returns:
        N, the number of samples.

    Raises:
        TypeError: a leaf is not a tensor.
        ValueError: there is no leaf, a leaf has no axis, or leaves differ in length.
    """
    count: int | None = None
    first = name
    for path, value in leaves(x, name):
        if not isinstance(value, Tensor):
            raise TypeError(f"{path}: got {type(value).__name__}, expected a tensor whose axis 0 counts the samples")
        if value.ndim == 0:
            raise ValueError(f"{path}: got a tensor without dimensions, expected (N, ...)")
        if count is None:
            count, first = len(value), path
        elif len(value) != count:
            raise ValueError(f"{path}: got {len(value)} samples, expected {count} as in {first}")
    if count is None:
        raise ValueError(f"{name}: got {type(x).__name__} without tensors, expected at least one")
    return count


def num_samples(x: InputTree) -> int:
    """N of a checked tree."""
    return len(first_tensor(x))


def first_tensor(x: InputTree) -> Tensor:
    """The first leaf of a checked tree."""
    return cast(Tensor, next(leaves(x))[1])


def map_tensors(function: Callable[[Tensor], Tensor], x: Tree) -> Tree:
    """The same tree with ``function`` applied to every leaf; a mapping becomes a plain dict."""
    if isinstance(x, Mapping):
        return cast(Tree, {key: map_tensors(function, value) for key, value in x.items()})
    if isinstance(x, tuple):
        parts = [map_tensors(function, value) for value in x]
        return cast(Tree, type(x)(*parts) if hasattr(x, "_fields") else tuple(parts))
    if isinstance(x, list):
        return cast(Tree, [map_tensors(function, value) for value in x])
    return cast(Tree, function(cast(Tensor, x)))


def zip_tensors(function: Callable[..., Tensor], first: Tree, *others: Tree) -> Tree:
    """The tree of ``function(leaf, leaf, ...)`` over trees of one structure, such as chunks to be joined.

    Raises:
        ValueError: the trees differ in structure.
    """
    paths = [path for path, _ in leaves(first)]
    for other in others:
        found = [path for path, _ in leaves(other)]
        if found != paths:
            raise ValueError(f"x: got the parts {', '.join(found)}, expected {', '.join(paths)}")
    rest = [iter(tensors_of(cast(InputTree, other))) for other in others]
    return map_tensors(lambda leaf: function(leaf, *(next(part) for part in rest)), first)


def concatenate(trees: list[Tree]) -> Tree:
    """Several trees of one structure as one, along the samples."""
    return zip_tensors(lambda *parts: torch.cat(parts), trees[0], *trees[1:])


def take(x: Tree, index: Tensor | slice) -> Tree:
    """The samples at ``index``."""
    return map_tensors(lambda leaf: leaf[index], x)


def call_model(model: nn.Module, x: InputTree) -> Any:
    """What the model returns for ``x``, given as :func:`arguments_of` says."""
    positional, named = arguments_of(model, x)
    return model(*positional, **named)


def arguments_of(model: nn.Module, x: InputTree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments by which the model is given ``x``.

    A mapping is given by keyword to a model whose ``forward`` takes these keywords, ``model(**x)``, and as it is to any
    other. A tuple or list is given by position to a model whose ``forward`` takes that many arguments, ``model(*x)``,
    and as it is to any other. A tensor is given as it is.
    """
    if isinstance(x, Tensor):
        return (x,), {}
    positional, named = ((), dict(x)) if isinstance(x, Mapping) else (tuple(x), {})
    try:
        inspect.signature(model.forward).bind(*positional, **named)
    except (TypeError, ValueError):  # other parameters, or no signature that can be read
        return (x,), {}
    return positional, named
