"""Parts that adapters share: imports that may fail, early errors in settings, outputs of the framework's own pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

from torch import nn

from gradmix.mixer import GradMix
from gradmix.model.head_capture import HeadCapture
from gradmix.model.inputs import InputTree, map_tensors
from gradmix.model.unchanged import is_compiled, unwrap


def not_installed(adapter: str, command: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error of an adapter whose framework cannot be imported.

    Args:
        adapter: the adapter's module.
        command: what installs the framework.
        error: the error of the import.
    """
    return ModuleNotFoundError(f"{adapter}: found no module {error.name!r}; {command}", name=error.name)


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse wrong keyword arguments of :class:`gradmix.GradMix` before there is a model.

    Raises:
        ValueError, TypeError: as :class:`gradmix.GradMix`.
    """
    GradMix(nn.Identity(), None, **settings)


def selects_for(mixup: GradMix | None, model: nn.Module) -> TypeGuard[GradMix]:
    """Return whether there is a selection, and it is of this model, possibly wrapped."""
    return mixup is not None and mixup._model is unwrap(model)


def capture_outputs(mixup: GradMix, model: nn.Module, x: InputTree) -> AbstractContextManager[HeadCapture | None]:
    """Return a context that records what a selection needs of the framework's own forward pass of the originals.

    Its value is None where the selection makes a pass of its own: estimators of all parameters do not use outputs, and
    compiled code may skip the hook that records them.

    Args:
        mixup: the selection.
        model: the model that is about to be called, possibly wrapped.
        x: (N, ...) its input, of which one sample is used to find the head.
    """
    estimator = mixup._estimator
    if estimator.full_network or is_compiled(model):
        return nullcontext()
    return HeadCapture(model, estimator.network.head, map_tensors(lambda leaf: leaf[:1], x))
