"""Inputs of a model: a tensor, or a mapping, tuple or list of tensors, nested at will, that share their first axis.

``x`` of a batch is such a tree. Every tensor in it is a leaf; axis 0 of every leaf is that of the samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from gradmix.ops.mix_samples import mix_samples
from gradmix.runtime.deferred_checks import begin_pass

InputTree: TypeAlias = "Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]"
"""A tensor (N, ...), or a mapping, tuple or list of such trees with the same N."""

Tree = TypeVar("Tree")


def leaves(x: object, path: str = "x") -> Iterator[tuple[str, object]]:
    """Yield path and value of each leaf: anything that is neither a mapping, a tuple nor a list."""
    if isinstance(x, Mapping):
        for key, value in x.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(x, (tuple, list)):
        for index, value in enumerate(x):
            yield from leaves(value, f"{path}[{index}]")
    else:
        yield path, x


def tensors_of(x: InputTree) -> list[Tensor]:
    """Return the tensors of a checked tree, in order."""
    return [cast(Tensor, value) for _, value in leaves(x)]


def check_inputs(name: str, x: object) -> int:
    """Check that ``x`` is a tree of tensors with one number of samples.

    Args:
        name: how the error names the argument.
        x: the value given.

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
    """Return N of a checked tree."""
    return len(first_tensor(x))


def first_tensor(x: InputTree) -> Tensor:
    """Return the first leaf of a checked tree."""
    if isinstance(x, Tensor):
        return x
    return cast(Tensor, next(leaves(x))[1])


def map_tensors(function: Callable[[Any], Any], x: Tree) -> Tree:
    """Return the tree with ``function`` applied to every leaf; a mapping becomes a plain dict."""
    if isinstance(x, Tensor):
        return cast(Tree, function(x))
    if isinstance(x, Mapping):
        return cast(Tree, {key: map_tensors(function, value) for key, value in x.items()})
    if isinstance(x, tuple):
        parts = [map_tensors(function, value) for value in x]
        return cast(Tree, type(x)(*parts) if hasattr(x, "_fields") else tuple(parts))
    if isinstance(x, list):
        return cast(Tree, [map_tensors(function, value) for value in x])
    return cast(Tree, function(x))


def zip_tensors(function: Callable[..., Tensor], first: Tree, *others: Tree) -> Tree:
    """Return the tree of ``function(leaf, leaf, ...)`` over trees of one structure, such as chunks to be joined.

    Raises:
        ValueError: the trees differ in structure.
    """
    paths = [path for path, _ in leaves(first)]
    rest = [dict(leaves(other)) for other in others]
    for part in rest:
        if part.keys() != set(paths):
            raise ValueError(f"x: got the parts {', '.join(part)}, expected {', '.join(paths)}")
    following = iter(paths)

    def join(leaf: Tensor) -> Tensor:
        path = next(following)
        return function(leaf, *(part[path] for part in rest))

    return map_tensors(join, first)


def concatenate(trees: list[Tree]) -> Tree:
    """Concatenate trees of one structure along the samples."""
    return zip_tensors(lambda *parts: torch.cat(parts), trees[0], *trees[1:])


def take(x: Tree, index: Tensor | slice) -> Tree:
    """Return the samples at ``index``, (K,) int64, (N,) bool or a slice."""
    return map_tensors(lambda leaf: leaf[index], x)


def floating_dtype(x: InputTree) -> torch.dtype | None:
    """Return float64 if a leaf of a checked tree has it, else the dtype of the first floating-point leaf, or None."""
    found = [leaf.dtype for leaf in tensors_of(x) if leaf.is_floating_point()]
    return torch.float64 if torch.float64 in found else found[0] if found else None


def check_mixable(name: str, x: InputTree, estimator: str) -> None:
    """Refuse inputs that cannot be mixed, such as token ids.

    Args:
        name: name of the inputs in errors.
        x: the inputs.
        estimator: the name of the estimator that mixes them.

    Raises:
        TypeError: no leaf is of a floating-point dtype.
    """
    if floating_dtype(x) is None:
        raise TypeError(
            f"{name}: got x of dtype {first_tensor(x).dtype} with the estimator {estimator!r}, which mixes inputs, "
            "expected a floating-point dtype; token ids are served by the estimator 'feature'"
        )


def check_alike(name: str, x: InputTree, like: InputTree, whose: str) -> None:
    """Check that samples of ``x`` have the parts, the shapes and the kinds of numbers of another checked tree.

    Args:
        name: how the error names the argument.
        x: the tree given, checked.
        like: the tree that it is compared with.
        whose: owner of ``like``, for the end of the error: "expected ... as <whose>".

    Raises:
        ValueError: other parts, or another shape.
        TypeError: integers in place of floating-point numbers, or vice versa.
    """
    came, expected = (cast("dict[str, Tensor]", dict(leaves(tree, name))) for tree in (x, like))
    if came.keys() != expected.keys():
        raise ValueError(f"{name}: got the parts {', '.join(came)}, expected {', '.join(expected)} as {whose}")
    for path, own in came.items():
        other = expected[path]
        if own.shape[1:] != other.shape[1:]:
            shapes = f"got samples of shape {tuple(own.shape[1:])}, expected {tuple(other.shape[1:])}"
            raise ValueError(f"{path}: {shapes} as {whose}")
        if own.is_floating_point() != other.is_floating_point():
            raise TypeError(f"{path}: got x of dtype {own.dtype}, expected {other.dtype} as {whose}")


INSIDE = (
    "is mixed inside the model, by gradmix.mixed_forward(model, stage, x, pairs.other_x(), pairs.lam) with the labels "
    "of pairs.mix_labels()"
)


def mix_trees(x: Tree, other: Tree, partner: Tensor, lam: Tensor | float) -> Tree:
    """Mix the floating-point leaves as lam x + (1 - lam) other[partner]; leave other leaves as they are.

    Args:
        x, other: checked trees of N and of M samples, alike (:func:`check_alike`).
        partner: (N,) int64, in [0, M).
        lam: a number or (N,), the weight of ``x``; where it is 1 the sample stays as it is.

    Raises:
        TypeError: no leaf is of a floating-point dtype, or another leaf is not the same for a sample and its partner.
    """
    paths = iter([path for path, _ in leaves(x)])
    first = first_tensor(cast(InputTree, x))
    if floating_dtype(cast(InputTree, x)) is None:
        raise TypeError(
            f"x: got dtype {first.dtype}, expected a floating-point dtype, in which samples can be mixed; what is "
            f"none, such as token ids, {INSIDE}"
        )

    def mix(own: Tensor, candidates: Tensor) -> Tensor:
        path = next(paths)
        if own.is_floating_point():
            weight = lam if isinstance(lam, Tensor) else own.new_full((len(own),), lam)
            return mix_samples(own, candidates, partner, weight)
        differ = own != candidates[partner]
        differ = differ.flatten(1).any(1) if differ.ndim > 1 else differ
        if bool((differ & (lam != 1)).any()):
            raise TypeError(
                f"{path}: got dtype {own.dtype} and other values for a sample than for its partner, expected a "
                f"floating-point dtype, in which samples can be mixed, or the same values; what is neither {INSIDE}"
            )
        return own

    return zip_tensors(mix, x, other)


def own_copy(x: Tree) -> Tree:
    """Return a copy of the samples, for a model that may change its input in place."""
    return map_tensors(lambda leaf: leaf.detach().clone(), x)


def call_model(model: nn.Module, x: InputTree) -> Any:
    """Return the model's output for ``x``, passed as :func:`arguments_of` defines."""
    begin_pass()
    positional, named = arguments_of(model, x)
    return model(*positional, **named)


def arguments_of(model: nn.Module, x: InputTree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments by which the model receives ``x``.

    A mapping is passed by keyword, ``model(**x)``, to a model whose ``forward`` takes these keywords, and as one
    argument to any other. A tuple or list is passed by position, ``model(*x)``, to a model whose ``forward`` takes that
    many arguments, and as one argument to any other. A tensor is passed as one argument.
    """
    if isinstance(x, Tensor):
        return (x,), {}
    positional, named = ((), dict(x)) if isinstance(x, Mapping) else (tuple(x), {})
    try:
        inspect.signature(model.forward).bind(*positional, **named)
    except (TypeError, ValueError):  # other parameters, or no signature that can be read
        return (x,), {}
    return positional, named
