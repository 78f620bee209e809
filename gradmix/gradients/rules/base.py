"""Layer rules: what the per-sample gradient of a layer's parameters is made of, function by function.

A rule belongs to a function of torch that is linear in its parameters, up to a constant: ``F.linear``,
``torch.conv2d``. :mod:`gradmix.gradients.intercept` meets the calls in a model's forward pass, whatever module they are
made in. With activations a_t that go in and gradients d_t with respect to what comes out, at positions t, the gradient
of one sample with respect to the parameters, as a matrix, is either

- a sum of outer products, sum_t d_t a_t^T (:class:`Outer`): linear layers, convolutions (a_t being the window seen at
  t), embeddings (one factor is one-hot). It is never formed: both factors are sketched before they meet.
- small, and formed (:class:`Dense`): normalisation, depthwise convolutions, single biases, tokens, position embeddings.

A parameter's matrix is ``parameter.reshape(rows, -1)`` (:func:`matrix_shape`, :func:`token_shape`); a layer's bias is
one more column.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.projection import Side
from gradmix.ops.dtypes import work_dtype


@dataclass(frozen=True)
class Ref:
    """A parameter as one call uses it.

    Attributes:
        name: of the parameter.
        value: what the call was given, detached: the parameter, some of its rows, or its transpose, maybe converted.
        start: the first row of the parameter's matrix that is used.
        transposed: whether the call was given the transpose.
        whole: the parameter's own shape.
        offset: None; or, for a view other than its rows or its transpose, the position in the parameter's memory, which
            is contiguous, of the view's first entry.
        own_strides: of a converted view: its strides in the parameter's memory; None: those of ``value``.
    """

    name: str
    value: Tensor
    start: int
    transposed: bool
    whole: torch.Size
    offset: int | None = None
    own_strides: tuple[int, ...] | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Those of the view of the parameter."""
        return self.value.stride() if self.own_strides is None else self.own_strides

    @property
    def is_whole(self) -> bool:
        """Whether it is the parameter as it is, of its own shape."""
        return self.offset is None and not self.transposed and self.value.shape == self.whole

    def converted(self, result: Tensor) -> Ref:
        """The same view after a conversion of its entries, of the same shape."""
        return replace(self, value=result.detach(), own_strides=self.strides)

    def take(self, direction: Tensor) -> Tensor:
        """What of ``direction``, a tensor of the parameter's shape, corresponds to ``value``, of its working dtype."""
        direction = direction.to(work_dtype(self.value.dtype))
        if self.offset is not None:
            return direction.contiguous().as_strided(self.value.shape, self.strides, self.offset)
        if self.transposed:
            return direction.T
        return direction if self.value.shape == self.whole else direction[self.start : self.start + len(self.value)]

    def put(self, gradient: Tensor) -> Tensor:
        """The gradient (N, numel of the parameter) from that of ``value``, (N, *value.shape)."""
        if self.offset is None:
            return gradient.reshape(len(gradient), -1)
        numel = math.prod(self.whole)
        index = torch.arange(numel, device=gradient.device)
        index = index.as_strided(self.value.shape, self.strides, self.offset).flatten()
        return gradient.new_zeros(len(gradient), numel).index_add_(1, index, gradient.flatten(1))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight's matrix: its first axis against the others."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return shape[0], math.prod(shape[1:])


def token_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrix of a parameter used by itself: its last axis against the others.

    So that neither side of a position embedding (1, T, d) is as long as all of it.
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


@dataclass(frozen=True)
class Outer:
    """sum_t row_t column_t^T, in the rows from ``start`` on of the layer's matrix.

    Attributes:
        layer: its name.
        start: first row of the block.
        before: ``"row"`` or ``"column"``: the factor that is made of the activations, in the forward pass.
        activation: from that factor's side to the factor (N, T, size).
        delta: from the output's gradient and the other side to the other factor (N, T, size).
    """

    layer: str
    before: str
    activation: Callable[[Side], Tensor]
    delta: Callable[[Tensor, Side], Tensor]


@dataclass(frozen=True)
class Dense:
    """A gradient (N, p, q) that is formed from the output's, in a block of the layer's matrix.

    Attributes:
        layer: its name.
        start: first row of the block.
        column: first column of the block.
        make: from the output's gradient to the block, (N, p, q) of the working dtype.
    """

    layer: str
    start: int
    column: int
    make: Callable[[Tensor], Tensor]


Part: TypeAlias = "Outer | Dense"


@dataclass(frozen=True)
class Placement:
    """By parameter name: the layer it belongs to, and its first column in the layer's matrix."""

    layer: Mapping[str, str]
    column: Mapping[str, int]


class Rule:
    """One call of a function in a forward pass.

    Args:
        function: what was called.
        arguments: all its arguments by name.
        weight, bias: the parameters among them whose gradient may be wanted.
    """

    functions: ClassVar[tuple[Callable[..., Any], ...]] = ()
    signature: ClassVar[dict[str, Any]] = {}
    pairs: ClassVar[bool] = True
    """Whether the bias is a column of the weight's matrix."""
    keeps_input: ClassVar[bool] = False
    """Whether the backward pass needs the activations themselves."""
    spreads: ClassVar[bool] = False
    """Whether any leading axes may be put before those of the input."""
    has_factors: ClassVar[bool] = True
    """Whether there may be parts that are sums of outer products, one factor of which is made of the activations."""

    def __init__(
        self, function: Callable[..., Any], arguments: dict[str, Any], weight: Ref | None, bias: Ref | None
    ) -> None:
        self.function, self.arguments, self.weight, self.bias = function, arguments, weight, bias
        self.x: Tensor = arguments["input"]

    @classmethod
    def match(
        cls,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        named: dict[str, Any],
        find: Callable[[Any], Ref | None],
    ) -> Rule | None:
        """The rule for a call, or None if it uses no parameter that ``find`` knows, or is not called as expected."""
        names = list(cls.signature)
        if len(args) > len(names) or not all(name in cls.signature for name in named):
            return None
        arguments = {**cls.signature, **dict(zip(names, args, strict=False)), **named}
        weight, bias = find(arguments.get("weight")), find(arguments.get("bias"))
        if (weight is None and bias is None) or not isinstance(arguments["input"], Tensor):
            return None
        return cls(function, arguments, weight, bias)

    def spread(self, samples: int) -> bool:
        """Have an input that is the same for all rows, (1, ...) or (...), stand there once a row: (N, ...).

        Then each row has a gradient of its own to a position embedding that is looked up once for all of them.

        Returns:
            Whether this rule can do so.
        """
        if not self.spreads or self.x.ndim == 0:
            return False
        x = self.x if len(self.x) == 1 and self.x.ndim > 1 else self.x[None]
        self.x = x.expand(samples, *x.shape[1:])
        self.arguments = {**self.arguments, "input": self.x}
        return True

    def forget_input(self) -> None:
        """Let go of the activations, unless the backward pass needs them."""
        if not self.keeps_input:
            self.x = self.x.new_empty((0,) * self.x.ndim)
            self.arguments = {**self.arguments, "input": self.x}

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The parameters used."""
        return tuple(ref for ref in (self.weight, self.bias) if ref is not None)

    def refusal(self) -> str | None:
        """Why the rule cannot do this call, or None."""
        return "a part of it other than rows" if any(ref.offset is not None for ref in self.refs) else None

    def run(self) -> Tensor:
        """The call, with its parameters detached: autograd is to make no gradient of theirs."""
        given = {k: r.value for k, r in (("weight", self.weight), ("bias", self.bias)) if r is not None}
        return self._call(self.arguments | given)

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        """The derivative of the output along ``directions`` of the parameters, broadcastable to the output."""
        dtype = work_dtype(self.x.dtype) if self.x.is_floating_point() else None
        weight, bias = (None if r is None else r.take(directions[r.name]) for r in (self.weight, self.bias))
        if weight is None:
            assert bias is not None
            return self.along_features(bias)
        given: dict[str, Any] = {"weight": weight, "input": self.x if dtype is None else self.x.to(dtype)}
        if "bias" in self.signature:
            given["bias"] = bias
        return self._call(self.arguments | given)

    def _call(self, arguments: dict[str, Any]) -> Tensor:
        result: Tensor = self.function(*(arguments[name] for name in self.signature))
        return result

    def matrix(self, ref: Ref) -> tuple[int, int]:
        """Rows and columns of a parameter's matrix."""
        return matrix_shape(ref.whole)

    def dims(self, output: Tensor) -> Sequence[int]:
        """Axes of the output that may hold the samples; those of the input that may are the same."""
        return range(output.ndim - 1)

    def along_features(self, bias: Tensor) -> Tensor:
        """The bias, shaped to be added to the output."""
        return bias

    def sum_features(self, d: Tensor, axis: BatchAxis, samples: int) -> Tensor:
        """(N, features): the output's gradient (or a product with it) summed over the positions of each sample."""
        return positions(d, axis, samples).to(work_dtype(d.dtype)).sum(1)

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        """The parts of the gradient with respect to this call's parameters."""
        raise NotImplementedError

    def column_of_ones(self, placement: Placement) -> bool:
        """Whether the bias is a column in the weight's layer."""
        if self.weight is None or self.bias is None or self.weight.name == self.bias.name:
            return False
        same_rows = (self.weight.start, len(self.weight.value)) == (self.bias.start, len(self.bias.value))
        return same_rows and placement.layer[self.weight.name] == placement.layer[self.bias.name]

    def bias_alone(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        """The bias's own part, unless it is a column of the weight's factor."""
        if not self.column_of_ones(placement):
            yield from self._bias(placement, axis, samples)

    def _bias(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        if self.bias is not None:
            name = self.bias.name
            yield Dense(
                placement.layer[name],
                self.bias.start,
                placement.column[name],
                lambda d: self.sum_features(d, axis, samples)[:, :, None],
            )


def positions(t: Tensor, axis: BatchAxis, samples: int) -> Tensor:
    """(N, T, d) of activations (..., d) with the samples along ``axis``."""
    t = axis.split(t, samples)
    return t.unsqueeze(1) if t.ndim == 2 else t.flatten(1, -2)


class Linear(Rule):
    """y = x W^T + b over any leading positions."""

    spreads = True
    functions: ClassVar[tuple[Callable[..., Any], ...]] = (F.linear,)
    signature: ClassVar = {"input": ..., "weight": ..., "bias": None}

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        if self.weight is not None:
            ones, weight, x = self.column_of_ones(placement), self.weight, self.x
            if weight.transposed:  # its matrix is W^T, whose gradient is sum_t a_t d_t^T
                yield Outer(
                    placement.layer[weight.name],
                    "row",
                    lambda side: side.apply(positions(x, axis, samples)),
                    lambda d, side: side.apply(positions(d, axis, samples)),
                )
            else:
                yield Outer(
                    placement.layer[weight.name],
                    "column",
                    lambda side: side.apply(positions(x, axis, samples), ones=ones),
                    lambda d, side: side.apply(positions(d, axis, samples), start=weight.start),
                )
        yield from self.bias_alone(placement, axis, samples)

    def column_of_ones(self, placement: Placement) -> bool:
        return self.weight is not None and not self.weight.transposed and super().column_of_ones(placement)


class MatMul(Linear):
    """y = x W, with W (in, out) a parameter or the transpose of one."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (
        torch.matmul,
        torch.mm,
        Tensor.matmul,
        Tensor.mm,
        Tensor.__matmul__,
    )
    signature: ClassVar = {"input": ..., "weight": ...}

    def __init__(
        self, function: Callable[..., Any], arguments: dict[str, Any], weight: Ref | None, bias: Ref | None
    ) -> None:
        super().__init__(function, arguments, weight, bias)
        self._given = weight
        if weight is not None:
            # For parts() the weight is what a linear layer would be given: W^T.
            self.weight = replace(weight, transposed=not weight.transposed)

    @classmethod
    def match(
        cls,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        named: dict[str, Any],
        find: Callable[[Any], Ref | None],
    ) -> Rule | None:
        rule = super().match(function, args, named, find)
        if cls is not MatMul or (isinstance(rule, MatMul) and rule._given is not None and rule._given.value.ndim == 2):
            return rule
        return Contraction.match(function, args, named, find)

    def refusal(self) -> str | None:
        assert self._given is not None
        if self._given.value.ndim != 2 or self.x.ndim < 2:
            return "it is multiplied as other than a matrix from the right"
        if self._given.offset is not None:
            return super().refusal()
        if not self._given.transposed and self._given.value.shape != self._given.whole:
            return "only some of its rows are used"
        return None

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        assert self._given is not None
        return self.x.to(work_dtype(self.x.dtype)) @ self._given.take(directions[self._given.name])


class AddMM(MatMul):
    """y = b + x W, with W (in, out): the linear layer of GPT-2."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (torch.addmm,)
    signature: ClassVar = {"bias": ..., "input": ..., "weight": ...}

    def refusal(self) -> str | None:
        if self.bias is not None and self.bias.value.ndim != 1:
            return "it is added as other than a vector"
        return (None if self._given is None else super().refusal()) or Rule.refusal(self)

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        bias = None if self.bias is None else self.bias.take(directions[self.bias.name])
        if self._given is None:
            assert bias is not None
            return bias
        result = super().tangent(directions)
        return result if bias is None else result + bias


class Bilinear(Linear):
    """y_o = x1^T W_o x2 + b_o: a linear layer on the products of the entries of x1 and x2."""

    spreads = False
    functions: ClassVar[tuple[Callable[..., Any], ...]] = (F.bilinear,)
    signature: ClassVar = {"input": ..., "input2": ..., "weight": ..., "bias": None}

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        one, other = (self.arguments[name].to(work_dtype(self.x.dtype)) for name in ("input", "input2"))
        self.x = (one[..., :, None] * other[..., None, :]).flatten(-2)
        yield from super().parts(placement, axis, samples)

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        self.arguments = self.arguments | {"input2": self.arguments["input2"].to(work_dtype(self.x.dtype))}
        return super().tangent(directions)

    def forget_input(self) -> None:
        super().forget_input()
        self.arguments = self.arguments | {"input2": self.x}


class Contraction(Rule):
    """y = x and W contracted as einsum does: W from the left, a matrix for each head or expert, weights of more axes.

    The gradient of sample n is x contracted with d over all axes but n's and those of W. It is a sum of outer products
    if the axes of W are first those of x and then those of y, or the other way round. Each axis goes by its letter.
    """

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (torch.einsum, torch.bmm, Tensor.bmm)

    def __init__(
        self, function: Callable[..., Any], arguments: dict[str, Any], weight: Ref | None, bias: Ref | None
    ) -> None:
        super().__init__(function, arguments, weight, bias)
        assert weight is not None
        self._x, self._w, self._y = arguments["letters"]
        self._shape = weight.value.shape
        if weight.transposed:
            self._w, self._shape = self._w[::-1], weight.whole

    @classmethod
    def match(
        cls,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        named: dict[str, Any],
        find: Callable[[Any], Ref | None],
    ) -> Rule | None:
        operands = args[1:] if function is torch.einsum else args
        if len(operands) != 2 or named or not all(isinstance(operand, Tensor) for operand in operands):
            return None
        first, second = (find(operand) for operand in operands)
        weight = first or second
        if weight is None or (first and second):
            return None
        ndims = [operand.ndim for operand in operands]
        letters = _letters(args[0] if function is torch.einsum else _product(*ndims), ndims)
        if letters is None:
            return None
        one, other, y = letters
        arguments = {"input": operands[first is not None], "args": args, "first": first is not None}
        return cls(function, arguments | {"letters": (other, one, y) if first else (one, other, y)}, weight, None)

    def refusal(self) -> str | None:
        assert self.weight is not None
        value, whole = self.weight.value, self.weight.whole
        if value.numel() != math.prod(whole) or (
            value.shape != whole and not self.weight.transposed and not value.is_contiguous()
        ):
            return "it is used otherwise than whole and in its own order"
        if any(len(set(letters)) < len(letters) for letters in (self._x, self._w, self._y)):
            return "an axis is named twice"
        sizes = dict(zip(self._x, self.x.shape, strict=True))
        if any(sizes.get(a, size) != size for a, size in zip(self._w, self._shape, strict=True)):
            return "an axis of length 1 is repeated"
        if set(self._w) - {*self._x, *self._y} or set(self._x) - {*self._w, *self._y}:
            return "an axis of one factor alone is summed"
        return None

    def run(self) -> Tensor:
        assert self.weight is not None
        return self._apply(self.x, self.weight.value)

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        assert self.weight is not None
        return self._apply(self.x.to(work_dtype(self.x.dtype)), self.weight.take(directions[self.weight.name]))

    def _apply(self, x: Tensor, weight: Tensor) -> Tensor:
        operands = (weight, x) if self.arguments["first"] else (x, weight)
        result: Tensor = self.function(*self.arguments["args"][:-2], *operands)
        return result

    def dims(self, output: Tensor) -> Sequence[int]:
        return [dim for dim, a in enumerate(self._y) if a in self._x and a not in self._w]

    def matrix(self, ref: Ref) -> tuple[int, int]:
        rows = math.prod(self._shape[: max(1, self._split)])
        return rows, math.prod(ref.whole) // max(1, rows)

    @property
    def _split(self) -> int:
        """How many axes of W, from the first on, belong to one factor, where all others belong to the other; else 0."""
        owners = [(a in self._x, a in self._y) for a in self._w]
        first = next((i for i, owner in enumerate(owners) if owner != owners[0]), 0)
        return first if len(set(owners[first:])) == 1 and (True, True) not in owners else 0

    @property
    def has_factors(self) -> bool:  # type: ignore[override]
        """Whether the gradient is a sum of outer products."""
        return self._split > 0

    @property
    def keeps_input(self) -> bool:  # type: ignore[override]
        """Otherwise it is formed from the input itself."""
        return self._split == 0

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        assert self.weight is not None
        name, shape, x, split = self.weight.name, self.matrix(self.weight), self.x, self._split
        sample = self._y[axis.dim]
        position = next(a for a in string.ascii_letters if a not in self._x + self._w + self._y)

        def by_axes(t: Tensor, letters: str) -> tuple[Tensor, str]:
            """The samples first, positions that are folded with them on an axis of their own, and all axes' letters."""
            dim = letters.index(sample)
            rest = letters.replace(sample, position if t.shape[dim] > samples else "")
            return replace(axis, dim=dim).split(t, samples), sample + rest

        def factor(t: Tensor, letters: str, side: Side) -> Tensor:
            """(N, T, size)."""
            t, letters = by_axes(t, letters)
            own = [a for a in self._w if a in letters]
            others = sorted(set(letters) - {sample, *own})
            t = t.permute([letters.index(a) for a in (sample, *others, *own)])
            t = t.flatten(1 + len(others))
            return side.apply(t.flatten(1, -2) if others else t.unsqueeze(1))

        if split:
            yield Outer(
                placement.layer[name],
                "row" if self._w[0] in self._x else "column",
                lambda side: factor(x, self._x, side),
                lambda d, side: factor(d, self._y, side),
            )
            return

        def make(d: Tensor) -> Tensor:
            (one, letters), (other, others) = by_axes(x, self._x), by_axes(d, self._y)
            dtype = work_dtype(d.dtype)
            gradient = torch.einsum(f"{letters},{others}->{sample}{self._w}", one.to(dtype), other.to(dtype))
            return gradient.reshape(samples, *shape)

        yield Dense(placement.layer[name], 0, placement.column[name], make)


def _product(one: int, other: int) -> str:
    """The equation of a matrix product of tensors with so many axes."""
    batch = string.ascii_letters[3 : 1 + max(one, other)]
    left, right = (batch[len(batch) - max(0, ndim - 2) :] for ndim in (one, other))
    rows, columns = "a" * (one > 1), "c" * (other > 1)
    return f"{left}{rows}b,{right}b{columns}->{batch}{rows}{columns}"


def _letters(equation: object, ndims: Sequence[int]) -> tuple[str, str, str] | None:
    """The letters of two operands with so many axes, and of the result, ellipses written out; None: not so written."""
    if not isinstance(equation, str):
        return None
    operands, arrow, result = equation.replace(" ", "").partition("->")
    parts = operands.split(",")
    if len(parts) != 2:
        return None
    if not arrow:
        letters = operands.replace(",", "").replace("...", "")
        result = "..." * ("..." in operands) + "".join(sorted(a for a in set(letters) if letters.count(a) == 1))
    extra = [ndim - len(part.replace("...", "")) for part, ndim in zip(parts, ndims, strict=True)]
    if any((n and "..." not in part) or n < 0 for part, n in zip(parts, extra, strict=True)):
        return None
    spare = "".join(a for a in string.ascii_letters if a not in equation)[: max(extra)]
    one, other = (part.replace("...", spare[len(spare) - n :]) for part, n in zip(parts, extra, strict=True))
    return one, other, result.replace("...", spare)


class Channels(Rule):
    """What the functions with channels in axis 1, (B, C, ...), have in common."""

    def dims(self, output: Tensor) -> Sequence[int]:
        return (0,)

    def along_features(self, bias: Tensor) -> Tensor:
        return bias.view(-1, *[1] * (self.x.ndim - 2))

    def sum_features(self, d: Tensor, axis: BatchAxis, samples: int) -> Tensor:
        d = d.to(work_dtype(d.dtype))
        if d.ndim > 2:
            d = d.flatten(2).sum(2)
        return positions(d, axis, samples).sum(1)


class Convolution(Channels):
    """y[n, o, t] = sum over c, s of W[o, c, s] x[n, c, stride t + dilation s - padding] + b[o], in 1 to 3 dimensions.

    The window seen at t, times R, is a convolution of x with the rows of R as filters: nothing is unfolded.
    """

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (torch.conv1d, torch.conv2d, torch.conv3d)
    signature: ClassVar = {
        "input": ...,
        "weight": ...,
        "bias": None,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
    }

    def refusal(self) -> str | None:
        spatial = self.function.__name__[4]
        return super().refusal() if self.x.ndim == int(spatial) + 2 else "its input has no axis of samples"

    @property
    def keeps_input(self) -> bool:  # type: ignore[override]
        """Only small gradients are formed from the input itself."""
        return self.weight is not None and self.arguments["groups"] > 1 and self._is_small()

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        if self.weight is not None:
            weight = self.weight
            layer, groups = placement.layer[weight.name], self.arguments["groups"]
            if groups > 1 and self._is_small():
                yield Dense(layer, weight.start, placement.column[weight.name], lambda d: self._dense(d, axis, samples))
                yield from self._bias(placement, axis, samples)
                return
            ones, x = self.column_of_ones(placement), self.x
            yield Outer(
                layer,
                "column",
                lambda side: by_sample(self._windows(x, side, ones), axis, samples),
                lambda d, side: by_sample(channels(d, side, groups, weight.start), axis, samples),
            )
        yield from self.bias_alone(placement, axis, samples)

    def _windows(self, x: Tensor, side: Side, ones: bool) -> Tensor:
        """(B, groups T, size)."""
        assert self.weight is not None
        a = self.arguments
        z = windows(x, side, self.weight.value.shape[1:], a["stride"], a["padding"], a["dilation"], a["groups"])
        if not ones:
            return z
        if side.is_identity:
            return torch.cat([z, z.new_ones(*z.shape[:2], 1)], 2)
        return z + side.constant(z, math.prod(self.weight.value.shape[1:]))

    def _is_small(self) -> bool:
        """Whether a sample's gradient takes no more memory than its activations."""
        assert self.weight is not None
        return self.weight.value.numel() * len(self.x) <= self.x.numel() * (
            1 + len(self.weight.value) / self.x.shape[1]
        )

    def _dense(self, d: Tensor, axis: BatchAxis, samples: int) -> Tensor:
        """(N, out, in / groups * taps), one tap of the filter after the other."""
        assert self.weight is not None
        a, weight, dtype = self.arguments, self.weight.value, work_dtype(d.dtype)
        spatial = d.ndim - 2
        stride, dilation = (_each(a[name], spatial) for name in ("stride", "dilation"))
        x = F.pad(self.x, _padding(a["padding"], weight.shape[2:], dilation))
        d = d.to(dtype).unflatten(1, (a["groups"], -1)).flatten(3)
        taps = []
        for tap in product(*map(range, weight.shape[2:])):
            seen = x
            for i, offset in enumerate(tap):
                first, length = offset * dilation[i], self._positions(x, stride, dilation)[i]
                seen = seen.narrow(2 + i, first, (length - 1) * stride[i] + 1)
                seen = seen[(slice(None),) * (2 + i) + (slice(None, None, stride[i]),)]
            seen = seen.to(dtype).unflatten(1, (a["groups"], -1)).flatten(3)
            taps.append(torch.einsum("ngot,ngct->ngoc", d, seen))
        gradient = torch.stack(taps, -1).flatten(3).flatten(1, 2)
        return axis.split(gradient, samples).flatten(1, -3).sum(1) if samples != len(gradient) else gradient

    def _positions(self, padded: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
        assert self.weight is not None
        taps = self.weight.value.shape[2:]
        return [(size - dilation[i] * (taps[i] - 1) - 1) // stride[i] + 1 for i, size in enumerate(padded.shape[2:])]


class TransposedConvolution(Channels):
    """y = the adjoint of a convolution with W (in, out / groups, ...), plus b.

    Its weight's gradient is sum_t x_t w_t^T, w_t being the window of the output's gradient that the convolution sees.
    """

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
    )
    signature: ClassVar = {
        "input": ...,
        "weight": ...,
        "bias": None,
        "stride": 1,
        "padding": 0,
        "output_padding": 0,
        "groups": 1,
        "dilation": 1,
    }
    pairs = False

    def refusal(self) -> str | None:
        spatial = self.function.__name__[14]
        return super().refusal() if self.x.ndim == int(spatial) + 2 else "its input has no axis of samples"

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        if self.weight is not None:
            weight, x, size, groups = self.weight, self.x, self.x.shape[2:], self.arguments["groups"]
            stride, padding, dilation = (self.arguments[name] for name in ("stride", "padding", "dilation"))

            def seen(d: Tensor, side: Side) -> Tensor:
                z = windows(d, side, weight.value.shape[1:], stride, padding, dilation, groups, size)
                return by_sample(z, axis, samples)

            yield Outer(
                placement.layer[weight.name],
                "row",
                lambda side: by_sample(channels(x, side, groups, weight.start), axis, samples),
                seen,
            )
        yield from self.bias_alone(placement, axis, samples)


def windows(
    x: Tensor,
    side: Side,
    shape: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    size: Sequence[int] | None = None,
) -> Tensor:
    """(B, groups T, side's size): M times the window that a convolution sees at each position of x (B, C, ...).

    Args:
        shape: a filter's, (C / groups, ...).
        size: positions wanted along each axis, where there may be more; None: all.
    """
    half = x.dtype == torch.float16
    if side.is_identity:
        return unfolded(x, shape, stride, padding, dilation, groups, size)
    x = x.to(torch.bfloat16) if half else x  # sums over a window may exceed float16's range
    filters, scale = side.filters(x, tuple(shape))
    count = len(filters)
    if groups > 1:
        filters = filters.repeat(groups, *[1] * len(shape))
    convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[x.ndim - 3]
    z = convolution(x, filters, None, stride, padding, dilation, groups)
    for i, wanted in enumerate(size or ()):
        z = z.narrow(2 + i, 0, wanted)
    z = z.flatten(2)
    z = z.transpose(1, 2) if groups == 1 else z.unflatten(1, (groups, count)).transpose(2, 3).flatten(1, 2)
    z = z.to(work_dtype(z.dtype))
    return z if scale == 1.0 else z * scale


def unfolded(
    x: Tensor, shape: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int, size: Sequence[int] | None
) -> Tensor:
    """(B, groups T, C / groups * taps): the windows themselves; arguments as :func:`windows`."""
    spatial = x.ndim - 2
    strides, dilations = _each(stride, spatial), _each(dilation, spatial)
    x = F.pad(x.to(work_dtype(x.dtype)), _padding(padding, shape[1:], dilations))
    for i in range(spatial):
        x = x.unfold(2 + i, dilations[i] * (shape[1 + i] - 1) + 1, strides[i])
        x = x[..., :: dilations[i]]
    for i, wanted in enumerate(size or ()):
        x = x.narrow(2 + i, 0, wanted)
    x = x.unflatten(1, (groups, -1))  # (B, groups, C / groups, positions..., taps...)
    order = [0, 1, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial)]
    return x.permute(order).flatten(2 + spatial).flatten(1, -2)


def channels(d: Tensor, side: Side, groups: int, start: int) -> Tensor:
    """(B, groups T, side's size): M times the channels at each position of d (B, C, ...), group by group."""
    d = d.flatten(2)
    if groups == 1:
        return side.apply(d.transpose(1, 2), start=start)
    width = d.shape[1] // groups
    parts = [side.apply(part.transpose(1, 2), start=start + g * width) for g, part in enumerate(d.split(width, 1))]
    return torch.cat(parts, 1)


def by_sample(z: Tensor, axis: BatchAxis, samples: int) -> Tensor:
    """(N, T', size) from (B, T, size), where B holds the samples and maybe positions."""
    return z if len(z) == samples else axis.split(z, samples).flatten(1, -2)


def _each(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value) * (count // len(value))


def _padding(padding: Any, taps: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Zeros before and behind each axis as F.pad wants them, the last axis first."""
    spatial = len(taps)
    if padding == "valid":
        padding = 0
    pads = []
    for i in reversed(range(spatial)):
        if padding == "same":
            total = dilation[i] * (taps[i] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [_each(padding, spatial)[i]] * 2
    return pads


class Embedding(Rule):
    """y_t = W[i_t]: the gradient is sum_t e_{i_t} d_t^T, without the positions that hold ``padding_idx``."""

    spreads = True
    functions: ClassVar[tuple[Callable[..., Any], ...]] = (F.embedding,)
    signature: ClassVar = {
        "input": ...,
        "weight": ...,
        "padding_idx": None,
        "max_norm": None,
        "norm_type": 2.0,
        "scale_grad_by_freq": False,
        "sparse": False,
    }

    def refusal(self) -> str | None:
        if self.weight is not None and self.weight.transposed:
            return "its columns are looked up"
        if self.arguments["max_norm"] is not None:
            return "max_norm changes it in the forward pass"
        if self.arguments["scale_grad_by_freq"]:
            return "scale_grad_by_freq makes a row's gradient depend on the other rows"
        return super().refusal()

    def _call(self, arguments: dict[str, Any]) -> Tensor:
        # A sparse gradient would be of the detached weight, which gets none.
        return super()._call(arguments | {"sparse": False})

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        assert self.weight is not None
        result = F.embedding(self.x, self.weight.take(directions[self.weight.name]))
        kept = self._kept()
        return result if kept is None else result * kept[..., None]

    def _kept(self) -> Tensor | None:
        padding = self.arguments["padding_idx"]
        if padding is None:
            return None
        assert self.weight is not None
        kept: Tensor = self.x != (padding if padding >= 0 else len(self.weight.value) + padding)
        return kept

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        assert self.weight is not None
        weight = self.weight

        index, kept = axis.split(self.x, samples).reshape(samples, -1).long(), self._kept()

        def one_hot(side: Side) -> Tensor:
            rows = side.one_hot(index + weight.start, work_dtype(weight.value.dtype))
            if kept is None:
                return rows
            return rows * axis.split(kept, samples).reshape(samples, -1, 1)

        yield Outer(
            placement.layer[weight.name],
            "row",
            one_hot,
            lambda d, side: side.apply(positions(d, axis, samples)),
        )


class Lookup(Embedding):
    """y_t = W[i_t], W of any number of axes."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (Tensor.__getitem__, torch.index_select, Tensor.index_select)

    @classmethod
    def match(
        cls,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        named: dict[str, Any],
        find: Callable[[Any], Ref | None],
    ) -> Rule | None:
        weight = find(args[0]) if args and not named else None
        if weight is None or (function is not Tensor.__getitem__ and args[1] not in (0, -weight.value.ndim)):
            return None
        index = args[-1][0] if isinstance(args[-1], tuple) and len(args[-1]) == 1 else args[-1]
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            return None
        if function is not Tensor.__getitem__ and index.ndim != 1:
            return None  # a single row keeps its axis
        index = torch.where(index < 0, index + len(weight.value), index)
        return cls(function, cls.signature | {"input": index}, weight, None)

    def run(self) -> Tensor:
        assert self.weight is not None
        return self.weight.value[self.x]

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        assert self.weight is not None
        return self.weight.take(directions[self.weight.name])[self.x]

    def dims(self, output: Tensor) -> Sequence[int]:
        return range(self.x.ndim)

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        ndim = self.x.ndim
        for part in super().parts(placement, axis, samples):
            assert isinstance(part, Outer)
            yield replace(part, delta=self._flat(part.delta, ndim))

    @staticmethod
    def _flat(delta: Callable[[Tensor, Side], Tensor], ndim: int) -> Callable[[Tensor, Side], Tensor]:
        return lambda d, side: delta(d.reshape(*d.shape[:ndim], -1), side)


class EmbeddingBag(Embedding):
    """y_b = sum over t in bag b of a_t W[i_t], a sum or a mean: the gradient is sum_t a_t e_{i_t} d_b^T."""

    spreads = False
    functions: ClassVar[tuple[Callable[..., Any], ...]] = (F.embedding_bag,)
    signature: ClassVar = {
        "input": ...,
        "weight": ...,
        "offsets": None,
        "max_norm": None,
        "norm_type": 2.0,
        "scale_grad_by_freq": False,
        "mode": "mean",
        "sparse": False,
        "per_sample_weights": None,
        "include_last_offset": False,
        "padding_idx": None,
    }

    def refusal(self) -> str | None:
        if self.arguments["mode"] == "max":
            return "the maximum of a bag is not linear in it"
        return super().refusal()

    def dims(self, output: Tensor) -> Sequence[int]:
        return (0,)

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        assert self.weight is not None
        direction, scales = self.weight.take(directions[self.weight.name]), self.arguments["per_sample_weights"]
        scales = None if scales is None else scales.to(direction.dtype)
        return self._call(self.arguments | {"weight": direction, "per_sample_weights": scales})

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        assert self.weight is not None
        weight, dtype = self.weight, work_dtype(self.weight.value.dtype)
        index, bag, count = self.x.flatten().long(), *self._bags()
        scales, kept = self.arguments["per_sample_weights"], self._kept()
        scale = torch.ones_like(index, dtype=dtype) if scales is None else scales.flatten().to(dtype)
        if kept is not None:
            scale = scale * kept.flatten()
        if self.arguments["mode"] == "mean":
            scale = scale / scale.new_zeros(count).index_add_(0, bag, scale).clamp(min=1)[bag]

        def bags(side: Side) -> Tensor:
            rows = side.one_hot(index[None] + weight.start, dtype)[0] * scale[:, None]
            return positions(rows.new_zeros(count, side.size).index_add_(0, bag, rows), axis, samples)

        yield Outer(
            placement.layer[weight.name],
            "row",
            bags,
            lambda d, side: side.apply(positions(d, axis, samples)),
        )

    def _bags(self) -> tuple[Tensor, int]:
        """The bag of each entry, and how many bags there are."""
        x, offsets = self.x, self.arguments["offsets"]
        if x.ndim == 2:
            return torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1]), len(x)
        offsets = offsets[:-1] if self.arguments["include_last_offset"] else offsets
        at = torch.arange(len(x), device=x.device, dtype=offsets.dtype)
        return torch.searchsorted(offsets, at, right=True) - 1, len(offsets)


_CACHED = 1 << 17
"""Elements multiplied at a time on a CPU, few enough to stay in its cache."""


class _Normalisation(Rule):
    """y = w x^ + b with x^ the normalised input: the gradients are sum_t d_t x^_t and sum_t d_t."""

    keeps_input = True
    has_factors = False

    def normalised(self) -> Tensor:
        """x^, of the input's shape and the working dtype."""
        raise NotImplementedError

    def refusal(self) -> str | None:
        if any(ref.value.shape != ref.whole or ref.transposed or ref.offset is not None for ref in self.refs):
            return "it is used otherwise than whole and in its own order"
        return None

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        result: Tensor | float = 0.0
        if self.weight is not None:
            result = self.normalised() * self.along_features(self.weight.take(directions[self.weight.name]))
        if self.bias is not None:
            result = result + self.along_features(self.bias.take(directions[self.bias.name]))
        assert isinstance(result, Tensor)
        return result

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        def both(d: Tensor) -> Tensor:
            total = self.sum_features(d, axis, samples)
            return torch.stack([self._weight_gradient(d, total, axis, samples), total], 2)

        def only_weight(d: Tensor) -> Tensor:
            assert self.weight is not None
            gradient = self._weight_gradient(d, None, axis, samples)
            return gradient.view(samples, *matrix_shape(self.weight.whole))

        if self.weight is not None and self.weight.value.ndim == 1 and self.column_of_ones(placement):
            yield Dense(placement.layer[self.weight.name], 0, 0, both)
            return
        if self.weight is not None:
            yield Dense(placement.layer[self.weight.name], 0, placement.column[self.weight.name], only_weight)
        if self.bias is not None:
            rows_columns = matrix_shape(self.bias.whole)
            if self.column_of_ones(placement):
                assert self.weight is not None
                rows_columns = matrix_shape(self.weight.whole)
            yield Dense(
                placement.layer[self.bias.name],
                0,
                placement.column[self.bias.name],
                lambda d: self.sum_features(d, axis, samples).view(samples, *rows_columns),
            )

    def _weight_gradient(self, d: Tensor, total: Tensor | None, axis: BatchAxis, samples: int) -> Tensor:
        """(N, features), given the sum of d if it is there already."""
        return self.sum_features(d * self.normalised(), axis, samples)


class LayerNorm(_Normalisation):
    """Normalised over the last axes of each position."""

    spreads = True
    functions: ClassVar[tuple[Callable[..., Any], ...]] = (F.layer_norm, torch.layer_norm)
    signature: ClassVar = {"input": ..., "normalized_shape": ..., "weight": None, "bias": None, "eps": 1e-5}

    def _call(self, arguments: dict[str, Any]) -> Tensor:
        return F.layer_norm(*(arguments[name] for name in self.signature))

    def dims(self, output: Tensor) -> Sequence[int]:
        return range(output.ndim - len(self.arguments["normalized_shape"]))

    def sum_features(self, d: Tensor, axis: BatchAxis, samples: int) -> Tensor:
        return super().sum_features(d.flatten(-len(self.arguments["normalized_shape"])), axis, samples)

    def normalised(self) -> Tensor:
        a = self.arguments
        return F.layer_norm(self.x.to(work_dtype(self.x.dtype)), a["normalized_shape"], None, None, a["eps"])


class RMSNorm(LayerNorm):
    """Divided by the root mean square over the last axes of each position."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = tuple(
        f for f in (getattr(F, "rms_norm", None), getattr(torch, "rms_norm", None)) if f is not None
    )
    signature: ClassVar = {"input": ..., "normalized_shape": ..., "weight": None, "eps": None}

    def _call(self, arguments: dict[str, Any]) -> Tensor:
        return F.rms_norm(*(arguments[name] for name in self.signature))

    def normalised(self) -> Tensor:
        a, dtype = self.arguments, work_dtype(self.x.dtype)
        eps = _default_eps(self.x.dtype) if a["eps"] is None else a["eps"]
        return F.rms_norm(self.x.to(dtype), a["normalized_shape"], None, eps)


@cache
def _default_eps(dtype: torch.dtype) -> float:
    """What ``rms_norm`` adds without an eps of its own: the eps of the dtype that it computes in.

    For half-precision inputs that is float32, or, in some versions of torch, theirs. It is told by what comes out.
    """
    own, of_sums = torch.finfo(dtype).eps, torch.finfo(work_dtype(dtype)).eps
    # x / sqrt(x^2 + eps) with x^2 between the two is below a half or above.
    x = torch.full((1,), math.sqrt(math.sqrt(own * of_sums)), dtype=dtype, device="cpu")
    return own if float(F.rms_norm(x, (1,))) < 0.5 else of_sums


class GroupNorm(_Normalisation, Channels):
    """Normalised over groups of channels of each sample."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (F.group_norm,)
    signature: ClassVar = {"input": ..., "num_groups": ..., "weight": None, "bias": None, "eps": 1e-5}

    def normalised(self) -> Tensor:
        a = self.arguments
        return F.group_norm(self.x.to(work_dtype(self.x.dtype)), a["num_groups"], None, None, a["eps"])


class BatchNorm(_Normalisation, Channels):
    """Normalised by running statistics."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (F.batch_norm,)
    signature: ClassVar = {
        "input": ...,
        "running_mean": ...,
        "running_var": ...,
        "weight": None,
        "bias": None,
        "training": False,
        "momentum": 0.1,
        "eps": 1e-5,
    }

    def normalised(self) -> Tensor:
        a, dtype = self.arguments, work_dtype(self.x.dtype)
        mean, variance = a["running_mean"].to(dtype), a["running_var"].to(dtype)
        return F.batch_norm(self.x.to(dtype), mean, variance, None, None, False, 0.0, a["eps"])

    def _weight_gradient(self, d: Tensor, total: Tensor | None, axis: BatchAxis, samples: int) -> Tensor:
        # x^ is affine in x, with coefficients of the channel alone: sums over positions come first.
        a, dtype = self.arguments, work_dtype(d.dtype)
        mean, variance = a["running_mean"].to(dtype), a["running_var"].to(dtype)
        step = len(d) if d.is_cuda else max(1, _CACHED // max(1, d[:1].numel()))
        pieces = zip(d.split(step), self.x.split(step), strict=True)
        products = [(a.to(dtype) * b).reshape(*a.shape[:2], -1).sum(2) for a, b in pieces]
        gradient: Tensor = positions(torch.cat(products), axis, samples).sum(1)
        gradient = gradient - mean * (self.sum_features(d, axis, samples) if total is None else total)
        return gradient * torch.rsqrt(variance + a["eps"])


class InstanceNorm(_Normalisation, Channels):
    """Normalised over the positions of each channel of each sample, or by running statistics."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (F.instance_norm,)
    signature: ClassVar = {
        "input": ...,
        "running_mean": None,
        "running_var": None,
        "weight": None,
        "bias": None,
        "use_input_stats": True,
        "momentum": 0.1,
        "eps": 1e-5,
    }

    def normalised(self) -> Tensor:
        a, dtype = self.arguments, work_dtype(self.x.dtype)
        mean, variance = (
            None if a["use_input_stats"] or a[name] is None else a[name].to(dtype)
            for name in ("running_mean", "running_var")
        )
        return F.instance_norm(self.x.to(dtype), mean, variance, None, None, a["use_input_stats"], 0.0, a["eps"])


# ---------------------------------------------------------------------------------------- parameters used by themselves


def _as_part(ref: Ref) -> Ref:
    """The same parameter, rows or the transpose of which are described as any other part is."""
    if ref.offset is not None or ref.is_whole:
        return ref
    contiguous = math.prod(ref.whole[1:])
    strides = _strides(ref.whole)
    if ref.strides != (strides[::-1] if ref.transposed else strides):
        return ref
    return replace(ref, start=0, transposed=False, offset=ref.start * contiguous)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


_IN_PLACE = {Tensor.add_, Tensor.__iadd__, Tensor.sub_, Tensor.__isub__}


class _Broadcast(Rule):
    """A parameter that meets activations element by element, broadcast over samples and positions."""

    has_factors = False

    def matrix(self, ref: Ref) -> tuple[int, int]:
        return token_shape(ref.whole)

    def _own(self, ndim: int) -> list[int]:
        """The parameter's shape, with as many axes as the output."""
        assert self.weight is not None
        own = list(self.weight.value.shape)
        return [1] * (ndim - len(own)) + own

    def dims(self, output: Tensor) -> Sequence[int]:
        own = self._own(output.ndim)
        return [dim for dim in range(output.ndim) if own[dim] == 1]

    def refusal(self) -> str | None:
        assert self.weight is not None
        if self.weight.offset is None and (self.weight.value.shape != self.weight.whole or self.weight.transposed):
            return "a part of it, converted, meets the activations element by element"
        if self.arguments["first"] and self.function in _IN_PLACE:
            return "it is changed in place"
        if self.x._is_view() and self.function in _IN_PLACE:
            return "it changes a view in place"
        return None

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        assert self.weight is not None
        weight, rows_columns = self.weight, self.matrix(self.weight)

        def make(d: Tensor) -> Tensor:
            d = self.times(d.to(work_dtype(d.dtype)))
            own = self._own(d.ndim)
            # Every axis that the parameter was broadcast over is summed but that of the samples.
            summed = [dim for dim in range(d.ndim) if own[dim] == 1 and dim != axis.dim]
            d = axis.split(d.sum(summed, keepdim=True) if summed else d, samples)
            if d.ndim > len(own):  # positions that were folded with the samples
                d = d.sum(1 + axis.dim)
            return weight.put(d).view(samples, *rows_columns)

        yield Dense(placement.layer[weight.name], 0, placement.column[weight.name], make)

    def times(self, d: Tensor) -> Tensor:
        """The output's gradient times the derivative of the output with respect to the broadcast parameter."""
        return d

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        assert self.weight is not None
        return self.weight.take(directions[self.weight.name])

    @classmethod
    def match(
        cls,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        named: dict[str, Any],
        find: Callable[[Any], Ref | None],
    ) -> Rule | None:
        if len(args) != 2 or named:
            return None
        first, second = find(args[0]), find(args[1])
        if (first is None) == (second is None):
            return None
        first, second = (None if ref is None else _as_part(ref) for ref in (first, second))
        x = args[1] if second is None else args[0]
        if not isinstance(x, Tensor):
            return None
        return cls(function, {"input": x, "weight": None, "first": first is not None}, first or second, None)

    def run(self) -> Tensor:
        assert self.weight is not None
        operands = (self.x, self.weight.value)
        result: Tensor = self.function(*(reversed(operands) if self.arguments["first"] else operands))
        return result


class Addition(_Broadcast):
    """y = x + p: position embeddings."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (
        torch.add,
        Tensor.add,
        Tensor.add_,
        Tensor.__add__,
        Tensor.__radd__,
        Tensor.__iadd__,
    )
    signature: ClassVar = {"input": ..., "weight": ...}


class Subtraction(Addition):
    """y = x - p, or p - x."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (
        torch.sub,
        Tensor.sub,
        Tensor.sub_,
        Tensor.__sub__,
        Tensor.__isub__,
    )

    @property
    def _sign(self) -> int:
        return 1 if self.arguments["first"] else -1

    def times(self, d: Tensor) -> Tensor:
        return d * self._sign

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        return super().tangent(directions) * self._sign


class Multiplication(_Broadcast):
    """y = x p: the scales of LayerScale and its kin."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
    signature: ClassVar = {"input": ..., "weight": ...}
    keeps_input = True

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        return self.x.to(work_dtype(self.x.dtype)) * super().tangent(directions)

    def times(self, d: Tensor) -> Tensor:
        return d * self.x


class PReLU(_Broadcast):
    """y = max(x, 0) + p min(x, 0), with one p or one for each channel, which is axis 1."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (torch.prelu, Tensor.prelu)
    keeps_input = True

    def _own(self, ndim: int) -> list[int]:
        assert self.weight is not None
        count = self.weight.value.numel()
        return [count if dim == 1 else 1 for dim in range(ndim)]

    def refusal(self) -> str | None:
        return "it is what goes in" if self.arguments["first"] else super().refusal()

    def times(self, d: Tensor) -> Tensor:
        return d * self.x.clamp(max=0)

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        return self.x.to(work_dtype(self.x.dtype)).clamp(max=0) * super().tangent(directions).view(
            self._own(self.x.ndim)
        )


class Copies(_Broadcast):
    """y = p.expand(N, ...) or p.repeat(N, ...): a class token, one copy a sample."""

    functions: ClassVar[tuple[Callable[..., Any], ...]] = (Tensor.expand, Tensor.repeat)

    def run(self) -> Tensor:
        assert self.weight is not None
        result: Tensor = self.function(self.weight.value, *self.arguments["sizes"], **self.arguments["named"])
        # Memory of its own for each copy, which from here on is an activation of one sample.
        return result.clone(memory_format=torch.contiguous_format)

    def refusal(self) -> str | None:
        if self.function is Tensor.repeat:
            sizes = self.arguments["sizes"]
            times = list(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
            if any(t != 1 and own != 1 for t, own in zip(times, self._own(len(times)), strict=True)):
                return "it is repeated along an axis longer than 1"
        return super().refusal()

    def dims(self, output: Tensor) -> Sequence[int]:
        return [dim for dim in super().dims(output) if output.shape[dim] > 1]

    @classmethod
    def match(
        cls,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        named: dict[str, Any],
        find: Callable[[Any], Ref | None],
    ) -> Rule | None:
        weight = find(args[0]) if len(args) > 1 else None
        if weight is None:
            return None
        weight = _as_part(weight)
        arguments = {"input": weight.value, "first": True, "sizes": args[1:], "named": named}
        return cls(function, arguments, weight, None)


RULES: dict[Callable[..., Any], type[Rule]] = {
    function: rule
    for rule in (
        Linear,
        MatMul,
        AddMM,
        Bilinear,
        Contraction,
        Convolution,
        TransposedConvolution,
        Embedding,
        Lookup,
        EmbeddingBag,
        LayerNorm,
        RMSNorm,
        GroupNorm,
        BatchNorm,
        InstanceNorm,
        Addition,
        Subtraction,
        Multiplication,
        PReLU,
        Copies,
    )
    for function in rule.functions
}
"""The rule of each function that has one."""
