"""Interception of the calls that use a model's parameters, in any module.

A module's hook receives the input of the module, which may differ from the factor of its weight (``padding_mode``).
A module may be bypassed (``nn.MultiheadAttention`` hands the weights of its submodules to a function), and its hook
does not show that a weight is used twice or by another module. Therefore functions are watched, by a
``TorchFunctionMode``. A call that has a rule is made with its parameters detached. Any other use leaves a path to the
parameter in autograd's graph, by which :func:`parameters_without_rule` and every later pass find it, so that no use is
missed. Only arguments of a call with a rule are detached; a converted parameter keeps its path until then.
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

from gradmix.gradients.exceptions import InnerBackwardError
from gradmix.gradients.rules import RULES, FunctionCall, ParameterView, Rule
from gradmix.gradients.rules.normalisation import BatchNorm


class Parameters:
    """The parameters whose calls are intercepted, by name.

    Args:
        named: all parameters that require gradients. A parameter with two names has the first.
        watched: whether calls with a rule are to be intercepted. Not in a model whose forward pass computes gradients:
            what it computes depends on the parameters in ways that autograd alone knows.

    Attributes:
        users: by parameter name, the call that used it in a way without a rule, in words.
        standardised: inputs that ``batch_norm`` normalised by their own statistics, in the order of the calls.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], watched: bool = True) -> None:
        self.named, self.watched = dict(named), watched
        self._names = {id(parameter): name for name, parameter in self.named.items()}
        self._detached = {name: parameter.detach() for name, parameter in self.named.items()}
        self._copies: dict[int, tuple[Tensor, int, ParameterView]] = {}
        why = "in a forward pass that computes gradients itself"
        self.users: dict[str, str] = {} if watched else dict.fromkeys(self.named, why)
        self.standardised: list[Tensor] = []

    def find(self, value: Any) -> ParameterView | None:
        """Return the parameter that ``value`` is: itself, its rows, its transpose, or a copy of these; else None.

        Only tensors that autograd connects with the parameter count: no detached tensor, no view made without autograd.
        """
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        name = self._names.get(id(value))
        if name is not None:
            return ParameterView(name, self._detached[name], 0, False, value.shape)
        copied = self._source_of_copy(value)
        if copied is not None:
            return copied
        base = value._base
        if base is None or value.grad_fn is None:
            return None
        name, copied = self._names.get(id(base)), self._source_of_copy(base)
        if copied is not None and copied.is_whole:
            name = copied.name
        return None if name is None else self._view(name, base, value)

    def _source_of_copy(self, value: Tensor) -> ParameterView | None:
        """Return the source of a copy, unless the copy has been changed in place since."""
        found = self._copies.get(id(value))
        return None if found is None or value._version != found[1] else found[2]

    def _view(self, name: str, base: Tensor, value: Tensor) -> ParameterView | None:
        if value.dtype != base.dtype or value.is_complex():
            return None
        offset = int(value.storage_offset() - base.storage_offset())
        geometry, own = (tuple(value.shape), value.stride()), (tuple(base.shape), base.stride())
        if value.ndim == 2 and offset == 0 and geometry == tuple(v[::-1] for v in own) and geometry != own:
            return ParameterView(name, value.detach(), 0, True, base.shape)
        if not base.is_contiguous():
            return None
        if value.ndim == base.ndim and value.shape[1:] == base.shape[1:] and value.stride() == base.stride():
            step = base.stride(0) if base.ndim else 0
            # Rows of a matrix, for the rules of layers; rows of a token are described like any other part of it.
            if (step and offset % step == 0 and base.ndim <= 2) or value.shape == base.shape:
                return ParameterView(name, value.detach(), offset // max(1, step), False, base.shape)
        return ParameterView(name, value.detach(), 0, False, base.shape, offset)

    def note_user(self, function: Callable[..., Any], values: Iterable[Any], why: str | None = None) -> None:
        """Record that a call used the parameters among ``values`` in a way without a rule."""
        for value in values:
            if isinstance(value, (list, tuple)):
                self.note_user(function, value, why)
            elif isinstance(value, Tensor):
                base = value if value._base is None else value._base
                name = self._name_of(value) or self._name_of(base)
                if name is not None:
                    text = f"by {_function_name(function)}" + (f": {why}" if why else "")
                    self.users.setdefault(name, text)

    def _name_of(self, value: Tensor) -> str | None:
        copied = self._copies.get(id(value))
        return self._names.get(id(value)) if copied is None else copied[2].name

    def add_copy(self, result: Any, source: ParameterView) -> None:
        """Record a tensor as a copy of a parameter or of a view of it."""
        if not isinstance(result, Tensor) or result.shape != source.value.shape or id(result) in self._names:
            return
        if result.requires_grad and result.is_floating_point():
            self._copies[id(result)] = (result, result._version, source.with_value(result))

    def uses_any(self, values: Iterable[Any]) -> bool:
        """Whether a parameter is among these values."""
        return any(self.find(value) is not None for value in values)


_COPYING = {
    *(Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
    *(Tensor.cpu, Tensor.cuda, Tensor.clone, torch.clone, Tensor.contiguous),
}
"""Functions whose result has the entries of their first argument."""

_BACKWARD = (torch.autograd.grad, Tensor.backward)
"""Functions that compute gradients."""

_SILENT = {"__get__", "size", "dim", "numel", "is_contiguous", "stride", "data_ptr", "__len__", "is_floating_point"}
"""Functions that read no entry of a tensor."""


class Interceptor(TorchFunctionMode):
    """Calls :meth:`intercept` for every call that has a rule.

    Args:
        parameters: the parameters to look for.
    """

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        self.parameters = parameters

    def intercept(self, rule: Rule) -> Tensor:
        """Make a call that has a rule and return its output, with which the model continues."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make one call, by :meth:`intercept` if it has a rule."""
        named = kwargs or {}
        if func in _BACKWARD and self.parameters.watched:
            raise InnerBackwardError("a gradient that is computed in the forward pass")
        kind = RULES.get(func)
        if kind is BatchNorm and _uses_batch_statistics(args, named):
            # No rule. Weights leave a path in the graph; activations are refused (gradmix.gradients.planner).
            self.parameters.standardised.append((named["input"] if "input" in named else args[0]).detach().clone())
            kind = None
        if not torch.is_grad_enabled():
            return func(*args, **named)  # a part that the model excludes from its gradient
        if torch._C._are_functorch_transforms_active() or not self.parameters.watched:
            kind = None  # inside vmap, for example, the arguments are not the parameters themselves
        if kind is not None:
            rule = kind.match(FunctionCall(func, args, named), self.parameters.find)
            if rule is not None:
                why = rule.refusal()
                if why is None:
                    return self.intercept(rule)
                self.parameters.note_user(func, [*args, *named.values()], why)
                return func(*args, **named)
        if func in _COPYING and args:
            source = self.parameters.find(args[0])
            if source is not None:
                result = func(*args, **named)
                self.parameters.add_copy(result, source)
                return result
        if func in _WATCHED_INSIDE and self.parameters.uses_any([*args, *named.values()]):
            with self:
                return _WATCHED_INSIDE[func](*args, **named)
        if getattr(func, "__name__", "") not in _SILENT:
            self.parameters.note_user(func, [*args, *named.values()])
        return func(*args, **named)


class PlainCalls(Interceptor):
    """Makes the calls and records nothing."""

    def intercept(self, rule: Rule) -> Tensor:
        """Make the call."""
        return rule.run()


def _uses_batch_statistics(args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a call of ``batch_norm`` normalises by the statistics of its input."""
    return bool(named.get("training", args[5] if len(args) > 5 else False))


def _copy_without_dispatch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a Python function of torch without its dispatch to modes, so that the calls in it are watched."""
    assert isinstance(function, types.FunctionType)
    own = dict(function.__globals__, has_torch_function=lambda *_: False)
    copy = types.FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_WATCHED_INSIDE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: _copy_without_dispatch(F.multi_head_attention_forward)
}
"""Functions that are watched inside, with the copies that allow it."""


def _function_name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", str(function))
    module = getattr(function, "__module__", None) or "torch.Tensor"
    return f"{module.removeprefix('torch._C._nn').removeprefix('torch._C.') or 'torch'}.{name}"


def parameters_without_rule(output: Tensor, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters that ``output`` still depends on: those used in a way without a rule."""
    if not output.requires_grad or not parameters:
        return []
    ones = torch.ones_like(output)
    gradients = torch.autograd.grad(output, list(parameters.values()), ones, allow_unused=True, retain_graph=True)
    return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


class _Anchored(torch.autograd.Function):
    """Connects a tensor with the anchor, without a copy, so that its gradient is computed, and calls a hook with it.

    A hook of the tensor itself would come before those that the model registers on it, which may change the gradient.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, _anchor: Tensor, hook: Callable[[Tensor], None]) -> Tensor:
        ctx.mark_dirty(output)
        ctx.hook = hook
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.hook(gradients[0])
        return gradients[0], None, None


def hook_gradient(output: Tensor, anchor: Tensor, hook: Callable[[Tensor], None]) -> Tensor:
    """Return the output of a call with a hook, which receives its gradient in a backward pass to ``anchor``.

    Args:
        output: a tensor that nothing else refers to yet.
        anchor: requires grad.
        hook: called with the gradient.
    """
    if output._is_view():
        # Linear layers return a view for inputs of more than two axes. A hook on a view is lost if the model continues
        # in place. No other tensor uses the memory of this view, so that it may become a tensor of its own.
        output = torch.ops.aten._unsafe_view(output, output.shape)
    result: Tensor = _Anchored.apply(output, anchor, hook)  # type: ignore[no-untyped-call]
    return result


@contextmanager
def refuse_checkpoints() -> Iterator[None]:
    """Refuse, around a backward pass, a model that computes parts of the forward pass again in it.

    Raises:
        ValueError: the model uses ``torch.utils.checkpoint``, whose second forward pass is not watched.
    """
    try:
        yield
    except RuntimeError as error:
        # With use_reentrant=True the error has no class of its own.
        if not isinstance(error, CheckpointError) and "torch.utils.checkpoint" not in str(error):
            raise
        raise ValueError(
            "model: computes parts again in the backward pass (torch.utils.checkpoint), expected a forward pass "
            "without; in evaluation mode there is no need for it"
        ) from error
