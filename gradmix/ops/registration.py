"""Registration of operators with torch, in one way for all of them.

A registered operator is one call for ``torch.compile``, for tracers and other modes, for fake tensors and for autograd.
torch's dispatcher takes some 50 microseconds of the host for it, as long as the operator itself on a small batch. Where
none of these is at work, the implementation is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gradmix.ops.backends import Operator

_PLAIN = (Tensor, nn.Parameter)


def register(
    operator: Operator, schema: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """The operator ``gradmix::<name>``, whose last argument is the backend; it checks nothing.

    Args:
        operator: its implementations; they return a tensor, a named tuple of tensors, or None.
        schema: arguments and results, as torch writes them.
        fake: makes empty results of the same shapes from the same arguments.
        mutates: names of the arguments that are written.

    Returns:
        The function that calls it. Its attribute ``registered`` is the operator as torch knows it.
    """

    def run(*arguments: Any) -> Any:
        *rest, backend = arguments
        result = operator.choose(backend, *rest).run(*rest)
        return tuple(result) if isinstance(result, tuple) else result

    registered: Any = torch.library.custom_op(f"gradmix::{operator.name}", run, mutates_args=mutates, schema=schema)
    registered.register_fake(fake)

    def call(*arguments: Any) -> Any:
        return run(*arguments) if is_plain(*arguments) else registered(*arguments)

    call.registered = registered  # type: ignore[attr-defined]
    return call


def is_plain(*arguments: object) -> bool:
    """Whether no compiler, tracer, mode or autograd sees a call with these arguments."""
    if torch.compiler.is_compiling() or _is_observed():
        return False
    recorded = torch.is_grad_enabled()
    for argument in arguments:
        # A tensor of another class, without values, or recorded by autograd.
        if isinstance(argument, Tensor) and (
            type(argument) not in _PLAIN or argument.is_meta or (recorded and argument.requires_grad)
        ):
            return False
    return True


def is_left_to_torch(backend: str, *arguments: object) -> bool:
    """Whether torch's own calls are made of an operator that autograd can record, whatever backend is preferred.

    The compiler makes one loop of them. Autograd, tracers and modes see them if the call names no backend.
    """
    return torch.compiler.is_compiling() or (backend == "auto" and not is_plain(*arguments))


def refuse_observed(*arguments: object) -> str | None:
    """Return why an implementation that nothing can record does not serve these arguments, or None."""
    return None if is_plain(*arguments) else "autograd, a tracer or a class of its own is to see torch's calls"


def _is_observed() -> bool:
    """Whether something records the operators that are called, such as a tracer: it must see this one as one call."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return tracing or is_in_torch_dispatch_mode()
