"""The base class of layer rules, the parts that a rule returns, and the registry of rules by torch function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

from torch import Tensor

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.projection import Projection
from gradmix.gradients.rules.parameter_view import ParameterView, matrix_shape
from gradmix.ops.dtypes import work_dtype

Function: TypeAlias = Callable[..., Any]
FindParameter: TypeAlias = Callable[[Any], ParameterView | None]
"""Maps an argument of a call to the parameter that it is, or None."""

# ------------------------------------------------------------------------------------------------ parts of a gradient


@dataclass(frozen=True)
class Outer:
    """sum_t row_t column_t^T, in the rows of the layer's matrix from the weight's ``start`` on.

    Attributes:
        layer: name of the layer.
        activation_side: ``"row"`` or ``"column"``: the factor that is computed from the activations, in the forward
            pass.
        activation: maps the projection of that side to the factor (N, T, size).
        delta: maps the output's gradient and the projection of the other side to the other factor (N, T, size).
    """

    layer: str
    activation_side: Literal["row", "column"]
    activation: Callable[[Projection], Tensor]
    delta: Callable[[Tensor, Projection], Tensor]


@dataclass(frozen=True)
class Dense:
    """A gradient (N, p, q) formed from the output's gradient: a block of the layer's matrix.

    Attributes:
        layer: name of the layer.
        start: first row of the block.
        column: first column of the block.
        make: maps the output's gradient to the block, (N, p, q) of the working dtype.
    """

    layer: str
    start: int
    column: int
    make: Callable[[Tensor], Tensor]


Part: TypeAlias = "Outer | Dense"


@dataclass(frozen=True)
class Placement:
    """The places of the parameters in the layers' matrices.

    Attributes:
        layer: by parameter name, the name of its layer.
        column: by parameter name, its first column in the layer's matrix.
    """

    layer: Mapping[str, str]
    column: Mapping[str, int]


# ----------------------------------------------------------------------------------------------------------- the rule


@dataclass(frozen=True)
class FunctionCall:
    """A call of a function of torch, as a ``TorchFunctionMode`` sees it.

    Attributes:
        function: the function that is called.
        args: its positional arguments.
        named: its keyword arguments.
    """

    function: Function
    args: tuple[Any, ...]
    named: dict[str, Any]


@dataclass(eq=False, repr=False)
class Rule:
    """One call of a function in a forward pass.

    A subclass defines in :attr:`signature` the arguments of the function, and in :meth:`parts` the parts of the
    gradients of its parameters. The other methods have defaults, for functions with the samples in any axis but the
    last, and the features in the last axis. Values derived from the arguments are set in ``__post_init__``.

    Attributes:
        function: the function that is called.
        arguments: all its arguments by name.
        weight: the parameter among them called ``weight``, if its gradient may be wanted.
        bias: the parameter among them called ``bias``, if its gradient may be wanted.
        x: the argument called ``input``, the activations.
    """

    function: Function
    arguments: dict[str, Any]
    weight: ParameterView | None
    bias: ParameterView | None
    x: Tensor = field(init=False)

    signature: ClassVar[dict[str, Any]] = {}
    """Names and defaults of the function's arguments, in order; ``...``: no default. The input is called ``input``."""
    bias_is_column: ClassVar[bool] = True
    """Whether the bias is one more column of the weight's matrix."""
    keeps_input: ClassVar[bool] = False
    """Whether the backward pass needs the activations themselves."""
    can_expand_input: ClassVar[bool] = False
    """Whether any leading axes may precede those of the input."""
    has_factors: ClassVar[bool] = True
    """Whether there may be an :class:`Outer` part, one factor of which is computed from the activations."""

    def __post_init__(self) -> None:
        self.x = self.arguments["input"]

    # ------------------------------------------------------------------------------------------------------- the call

    @classmethod
    def match(cls, call: FunctionCall, find: FindParameter) -> Rule | None:
        """Return the rule for a call; None if ``find`` finds no parameter in it, or it differs from the signature."""
        names = list(cls.signature)
        if len(call.args) > len(names) or not all(name in cls.signature for name in call.named):
            return None
        arguments = {**cls.signature, **dict(zip(names, call.args, strict=False)), **call.named}
        weight, bias = find(arguments.get("weight")), find(arguments.get("bias"))
        if (weight is None and bias is None) or not isinstance(arguments["input"], Tensor):
            return None
        return cls(call.function, arguments, weight, bias)

    def refusal(self) -> str | None:
        """Return the reason why the rule does not cover this call, or None."""
        return "a part of it other than rows" if any(view.offset is not None for view in self.views) else None

    @property
    def views(self) -> tuple[ParameterView, ...]:
        """The parameters that the call uses."""
        return tuple(view for view in (self.weight, self.bias) if view is not None)

    def expand_input(self, samples: int) -> bool:
        """Expand an input that all samples share, (1, ...) or (...), to a copy for each sample, (N, ...).

        Each sample then has its own gradient of a position embedding that is looked up once for all of them.

        Returns:
            Whether the rule has done so.
        """
        if not self.can_expand_input or self.x.ndim == 0:
            return False
        x = self.x if len(self.x) == 1 and self.x.ndim > 1 else self.x[None]
        self.x = x.expand(samples, *x.shape[1:])
        self.arguments = {**self.arguments, "input": self.x}
        return True

    def run(self) -> Tensor:
        """Make the call with detached parameters, so that autograd computes no gradient of them."""
        values = {k: v.value for k, v in (("weight", self.weight), ("bias", self.bias)) if v is not None}
        return self._call(self.arguments | values)

    def _call(self, arguments: dict[str, Any]) -> Tensor:
        result: Tensor = self.function(*(arguments[name] for name in self.signature))
        return result

    def forget_input(self) -> None:
        """Drop the activations, unless the backward pass needs them."""
        if not self.keeps_input:
            self.x = self.x.new_empty((0,) * self.x.ndim)
            self.arguments = {**self.arguments, "input": self.x}

    # ------------------------------------------------------------------------------------------------- its derivatives

    def parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        """Yield the parts of the gradient of this call's parameters.

        Args:
            placement: the places of the parameters in the layers' matrices.
            axis: the batch axis of input and output.
            samples: N.
        """
        raise NotImplementedError

    def tangent(self, directions: Mapping[str, Tensor]) -> Tensor:
        """Return the derivative of the output along ``directions`` of the parameters, broadcastable to the output."""
        dtype = work_dtype(self.x.dtype) if self.x.is_floating_point() else None
        weight, bias = (None if v is None else v.gather(directions[v.name]) for v in (self.weight, self.bias))
        if weight is None:
            assert bias is not None
            return self.along_features(bias)
        values: dict[str, Any] = {"weight": weight, "input": self.x if dtype is None else self.x.to(dtype)}
        if "bias" in self.signature:
            values["bias"] = bias
        return self._call(self.arguments | values)

    def matrix_shape(self, view: ParameterView) -> tuple[int, int]:
        """Return rows and columns of a parameter's matrix."""
        return matrix_shape(view.full_shape)

    def batch_dims(self, output: Tensor) -> Sequence[int]:
        """Return the axes of the output, and of the input, that may hold the samples."""
        return range(output.ndim - 1)

    def along_features(self, bias: Tensor) -> Tensor:
        """Return the bias in a shape that can be added to the output."""
        return bias

    def sum_features(self, d: Tensor, axis: BatchAxis, samples: int) -> Tensor:
        """Return the output's gradient, or a product with it, summed over each sample's positions, (N, features)."""
        return axis.by_position(d, samples).to(work_dtype(d.dtype)).sum(1)

    def has_bias_column(self, placement: Placement) -> bool:
        """Whether the bias is a column of the weight's layer."""
        if self.weight is None or self.bias is None or self.weight.name == self.bias.name:
            return False
        same_rows = (self.weight.start, len(self.weight.value)) == (self.bias.start, len(self.bias.value))
        return same_rows and placement.layer[self.weight.name] == placement.layer[self.bias.name]

    def bias_parts(self, placement: Placement, axis: BatchAxis, samples: int) -> Iterator[Part]:
        """Yield the bias's own part; none if the bias is a column of the weight's factor."""
        if not self.has_bias_column(placement):
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


class ChannelsFirst(Rule):
    """A function with the samples in axis 0 and the channels in axis 1: (B, C, ...)."""

    def batch_dims(self, output: Tensor) -> Sequence[int]:
        return (0,)

    def along_features(self, bias: Tensor) -> Tensor:
        return bias.view(-1, *[1] * (self.x.ndim - 2))

    def sum_features(self, d: Tensor, axis: BatchAxis, samples: int) -> Tensor:
        d = d.to(work_dtype(d.dtype))
        if d.ndim > 2:
            d = d.flatten(2).sum(2)
        return axis.by_position(d, samples).sum(1)


# -------------------------------------------------------------------------------------------------------- the registry

RULES: dict[Function, type[Rule]] = {}
"""The rule of each function that has one."""

R = TypeVar("R", bound=type[Rule])


def register(*functions: Function) -> Callable[[R], R]:
    """Return a class decorator that registers a rule for these functions.

    Args:
        functions: functions of torch, as a ``TorchFunctionMode`` sees them: ``F.linear``, ``Tensor.__matmul__``.

    Raises:
        ValueError: a function has a rule already.
    """

    def add(rule: R) -> R:
        for function in functions:
            if RULES.setdefault(function, rule) is not rule:
                name = getattr(function, "__name__", function)
                raise ValueError(f"functions: {name} has the rule {RULES[function].__name__} already")
        return rule

    return add
