"""Meeting the parameters of a model where they are used: in the calls of torch's functions, whatever module makes them.

A module's hook sees what goes into the module, which need not be what its weight is multiplied with
(``padding_mode``), may be passed by altogether (``nn.MultiheadAttention`` hands the weights of its submodules to a
function), and knows nothing of a weight that is used twice or by another module. So it is the functions that are
watched, by a ``TorchFunctionMode``. A call that has a rule is made with its parameters detached. Any other use leaves a
path to the parameter in autograd's graph, and by that path it is found out: no use escapes (:func:`unseen`).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from gradmix.gradients.rules import RULES, BatchNorm, Ref, Rule


class BatchStatisticsError(ValueError):
    """The model normalises by statistics of the batch, so that a row's gradient depends on the other rows."""


class Parameters:
    """The parameters whose calls are looked for, by name.

    Args:
        named: all that require gradients. A parameter with two names goes by the first.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self.named = dict(named)
        self._names = {id(parameter): name for name, parameter in self.named.items()}
        self._detached = {name: parameter.detach() for name, parameter in self.named.items()}
        self._casts: dict[int, tuple[Tensor, Ref]] = {}
        self.users: dict[str, str] = {}
        """By parameter name, who used it in a way that has no rule, in words."""

    def find(self, value: Any) -> Ref | None:
        """What ``value`` is of the parameters: one of them, rows of one, its transpose, or None."""
        if not isinstance(value, Tensor):
            return None
        name = self._names.get(id(value))
        if name is not None:
            return Ref(name, self._detached[name], 0, False, value.shape)
        cast = self._casts.get(id(value))
        if cast is not None:
            return cast[1]
        base = value._base
        if base is None:
            return None
        name = self._names.get(id(base))
        return None if name is None else self._view(name, base, value)

    def _view(self, name: str, base: Tensor, value: Tensor) -> Ref | None:
        offset = int(value.storage_offset() - base.storage_offset())
        geometry, own = (tuple(value.shape), value.stride()), (tuple(base.shape), base.stride())
        if value.ndim == 2 and offset == 0 and geometry == tuple(v[::-1] for v in own) and geometry != own:
            return Ref(name, value.detach(), 0, True, base.shape)
        if not base.is_contiguous():
            return None
        if value.ndim == base.ndim and value.shape[1:] == base.shape[1:] and value.stride() == base.stride():
            step = base.stride(0)
            # Rows of a matrix for the rules of layers; rows of a token, say, are like any other part of it.
            if (step and offset % step == 0 and base.ndim <= 2) or value.shape == base.shape:
                return Ref(name, value.detach(), offset // max(1, step), False, base.shape)
        return Ref(name, value.detach(), 0, False, base.shape, offset)

    def note_user(self, function: Callable[..., Any], values: Iterable[Any], why: str | None = None) -> None:
        """Remember that a call used these in a way that has no rule."""
        for value in values:
            if isinstance(value, (list, tuple)):
                self.note_user(function, value, why)
            elif isinstance(value, Tensor):
                base = value if value._base is None else value._base
                name = self._names.get(id(value)) or self._names.get(id(base))
                if name is not None:
                    text = f"by {_name(function)}" + (f": {why}" if why else "")
                    self.users.setdefault(name, text)

    def cast(self, result: Any, source: Ref) -> None:
        """Know the result of converting a parameter to another dtype as that parameter."""
        if isinstance(result, Tensor) and result.shape == source.value.shape:
            ref = Ref(source.name, result, source.start, source.transposed, source.whole)
            self._casts[id(result)] = (result, ref)

    def uses_any(self, values: Iterable[Any]) -> bool:
        """Whether a parameter is among these."""
        return any(self.find(value) is not None for value in values)


_CASTS = {Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type_as}
_SILENT = {"__get__", "size", "dim", "numel", "is_contiguous", "stride", "data_ptr", "__len__", "is_floating_point"}


class Watch(TorchFunctionMode):
    """Calls :meth:`seen` for every call that has a rule; derived classes say what is done then.

    Args:
        parameters: what to look for.
    """

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        self.parameters = parameters

    def seen(self, rule: Rule) -> Tensor:
        """A call that has a rule; returns what the model is to go on with."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Watch one call."""
        named = kwargs or {}
        kind = RULES.get(func)
        if not torch.is_grad_enabled():
            return func(*args, **named)  # a part that the model keeps out of its gradient
        if kind is not None:
            if kind is BatchNorm:
                _refuse_batch_statistics(args, named)
            rule = kind.match(func, args, named, self.parameters.find)
            if rule is not None:
                why = rule.refusal()
                if why is None:
                    return self.seen(rule)
                self.parameters.note_user(func, [*args, *named.values()], why)
                return func(*args, **named)
        if func in _CASTS and args:
            source = self.parameters.find(args[0])
            if source is not None:
                result = func(source.value, *args[1:], **named)
                self.parameters.cast(result, source)
                return result
        if func in _OPENED and self.parameters.uses_any([*args, *named.values()]):
            with self:
                return _OPENED[func](*args, **named)
        if getattr(func, "__name__", "") not in _SILENT:
            self.parameters.note_user(func, [*args, *named.values()])
        return func(*args, **named)


def _refuse_batch_statistics(args: tuple[Any, ...], named: dict[str, Any]) -> None:
    training = named.get("training", args[5] if len(args) > 5 else False)
    if training:
        raise BatchStatisticsError(
            "model: a BatchNorm layer normalises by the statistics of the batch, expected running statistics: a row's "
            "gradient would depend on the rows around it. In evaluation mode it uses running statistics if it was made "
            "with track_running_stats=True; GroupNorm or LayerNorm have no such trouble"
        )


def _opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function of torch that does not hand itself over to a mode, so that the calls inside it are watched."""
    assert isinstance(function, types.FunctionType)
    own = dict(function.__globals__, has_torch_function=lambda *_: False)
    copy = types.FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_OPENED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: _opened(F.multi_head_attention_forward)
}


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", str(function))
    module = getattr(function, "__module__", None) or "torch.Tensor"
    return f"{module.removeprefix('torch._C._nn').removeprefix('torch._C.') or 'torch'}.{name}"


def unseen(output: Tensor, parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that ``output`` still depends on: those used in a way that no rule has seen."""
    if not output.requires_grad or not parameters:
        return []
    ones = torch.ones_like(output)
    gradients = torch.autograd.grad(output, list(parameters.values()), ones, allow_unused=True, retain_graph=True)
    return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


class _Start(torch.autograd.Function):
    """Puts a tensor between the loss and the anchor, without a copy of it, so that its gradient is made."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, _anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def tapped(output: Tensor, anchor: Tensor, *, anchored: bool = False) -> Tensor:
    """What a call gave, so prepared that a hook on it meets its gradient in a backward pass to ``anchor``.

    Args:
        output: a tensor that nobody else has yet.
        anchor: requires grad.
        anchored: whether a path leads from the anchor to it already.
    """
    if output._is_view():
        # As linear layers return it for inputs of more than two axes. A hook on a view is lost if the model goes on in
        # place; nobody else has this view's memory, so it may pass for a tensor of its own.
        output = torch.ops.aten._unsafe_view(output, output.shape)
    if anchored:
        return output
    result: Tensor = _Start.apply(output, anchor)  # type: ignore[no-untyped-call]
    return result


@contextmanager
def without_compilation() -> Iterator[None]:
    """Run compiled parts of a model as they were written, where this torch can."""
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextmanager
def refusing_checkpoints() -> Iterator[None]:
    """Around a backward pass: say it plainly where a part of the model is computed again in it.

    Raises:
        ValueError: the model uses ``torch.utils.checkpoint``, whose second forward pass is not watched.
    """
    try:
        yield
    except CheckpointError as error:
        raise ValueError(
            "model: computes parts again in the backward pass (torch.utils.checkpoint), expected a forward pass "
            "without; in evaluation mode there is no need for it"
        ) from error
