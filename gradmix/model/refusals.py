"""Refusals around forward passes: models that use statistics of the batch, and inputs of a wrong dtype."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from gradmix.gradients.exceptions import BatchStatisticsError
from gradmix.model.head import logits_of
from gradmix.model.inputs import InputTree, call_model, leaves, num_samples, own_copy, take
from gradmix.model.unchanged import check_watched, modules_of, without_compilation

_SAMPLES = 2
"""Samples of the two passes that show whether a model uses statistics of the batch."""

_TOLERANCE = 1e-3
"""Largest difference of a sample's logits alone and in a batch, relative to the largest logit: rounding of sums."""

_met: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models whose calls of ``batch_norm`` have been watched through a whole pass."""


@contextmanager
def refuse_by_name(name: str, model: nn.Module, x: InputTree) -> Iterator[None]:
    """Refuse, around forward passes of samples ``x`` in evaluation mode, what would give wrong or unclear results.

    Raises:
        BatchStatisticsError: the model normalises by statistics of the batch, so that its output for a sample depends
            on the other samples of the pass.
        TypeError: the model fails, and there is an input of a dtype that may be the cause.
    """
    with name_dtypes(name, model, lambda: x), refuse_batch_statistics(model, x):
        yield


@contextmanager
def name_dtypes(name: str, model: nn.Module, x: Callable[[], InputTree]) -> Iterator[None]:
    """Refuse inputs of a dtype with which the model fails; ``x()`` returns samples like those of the body."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        usual = {own, torch.int64, torch.int32}
        for path, leaf in leaves(x(), name):
            if isinstance(leaf, Tensor) and leaf.dtype not in usual:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise TypeError(
                    f"{path}: got x of dtype {leaf.dtype}, which the model does not take ({reason}), expected {own} as "
                    "the model's parameters, or token ids of dtype int64 or int32"
                ) from error
        raise


@contextmanager
def refuse_batch_statistics(model: nn.Module, x: InputTree) -> Iterator[None]:
    """Refuse a model that normalises by statistics of the batch.

    Modules of torch that would use such statistics get a hook that raises. Other calls of ``batch_norm`` are watched in
    the first pass of a model; since a call may standardise weights, the model's values decide.
    """
    check_watched("model", model)
    watch = _Watch()
    with ExitStack() as stack:
        for module in modules_of(model):
            if isinstance(module, _BatchNorm) and module.running_mean is None and module.running_var is None:
                stack.callback(module.register_forward_pre_hook(_refuse).remove)
        if model in _met:
            yield
            return
        passes: list[None] = []
        stack.callback(model.register_forward_hook(lambda *_: passes.append(None)).remove)
        with without_compilation(), watch:  # compiled code may skip hooks and the watch
            yield
    # Calls in TorchScript are not seen.
    unseen = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    if (watch.called or unseen) and _is_coupled(model, x):
        _refuse()
    if passes and num_samples(x) >= _SAMPLES:
        _met.add(model)


def _refuse(*_: object) -> None:
    raise BatchStatisticsError(
        "model: normalises by the statistics of the batch, expected running statistics: what the model makes of a "
        "sample would depend on the samples around it. In evaluation mode BatchNorm uses running statistics if it was "
        "made with track_running_stats=True; GroupNorm or LayerNorm have no such trouble"
    )


class _Watch(TorchFunctionMode):
    """Records whether ``batch_norm`` was called with the statistics of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.called = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the call and record it."""
        named = kwargs or {}
        if func not in (F.batch_norm, torch.batch_norm) or not named.get("training", args[5] if len(args) > 5 else 0):
            return func(*args, **named)
        self.called = True
        try:
            return func(*args, **named)
        except ValueError as error:
            _refuse_single(error)
            raise


def _refuse_single(error: Exception) -> None:
    """Refuse the model if the error is torch's for the statistics of a single sample."""
    if "more than 1 value per channel" in str(error):
        _refuse()


def _is_coupled(model: nn.Module, x: InputTree) -> bool:
    """Whether the logits of the first sample change in a batch with the second one."""
    try:
        alone, together = (logits_of(call_model(model, own_copy(take(x, slice(n)))))[0].float() for n in (1, _SAMPLES))
    except (ValueError, torch.jit.Error) as error:
        _refuse_single(error)
        raise
    return bool((alone - together).abs().amax() > _TOLERANCE * together.abs().amax())
