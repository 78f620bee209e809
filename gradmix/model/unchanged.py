"""Forward passes that leave the model unchanged, and checks that values are finite.

Code inside :func:`leave_unchanged` runs the model in evaluation mode and without autograd. Afterwards, also after an
exception, training flags, buffers and the random number generators are as they were. In evaluation mode BatchNorm reads
its running statistics and does not update them, and dropout is off.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradmix.model.inputs import InputTree, leaves
from gradmix.ops.finite import all_finite
from gradmix.runtime.deferred_checks import can_sync, check_where


class ModelNotFiniteError(ValueError):
    """A model's output for finite inputs is not finite: usually its training has diverged."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside ``torch.compile`` and data-parallel wrappers.

    Forward passes for selection use it: compiled code may skip the hook that captures the head, and a data-parallel
    wrapper would synchronise with processes that make no such pass.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_compiled(model: nn.Module) -> bool:
    """Whether :func:`unwrap` finds a module compiled by ``torch.compile`` on its way in."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            return True
        if not isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            return False
        model = model.module


def without_compilation() -> AbstractContextManager[Any]:
    """Run modules compiled inside a model, or in place, uncompiled, where this version of torch can.

    Compiled code may skip hooks, and torch 2.5 may compile again for each call.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None else set_stance("force_eager")


def check_watched(what: str, module: nn.Module) -> None:
    """Refuse a module whose forward passes cannot be watched: TorchScript takes no hooks.

    Raises:
        TypeError: the module is a TorchScript module.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{what}: got a torch.jit.ScriptModule, which takes no hooks, expected the module that it was scripted or "
            "traced from; parts of a model before its classifier may be such"
        )


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return what ``model.modules()`` yields, in another order and a quarter of the time: every step walks them."""
    found: list[nn.Module] = []
    ahead = [model]
    seen = {model}
    while ahead:
        module = ahead.pop()
        found.append(module)
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                ahead.append(child)
    return found


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter, else of the first buffer, else the CPU."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def leave_unchanged(model: nn.Module) -> Iterator[None]:
    """Run the body with ``model`` in evaluation mode and without autograd, then restore everything.

    The flags are set on the modules themselves: ``train()`` and ``eval()`` are overridden by models that freeze or
    merge layers in them. Meanwhile autocast caches no half-precision copies of weights: made without autograd, they
    would also be used in the caller's next forward pass, which then had no gradient (seen with torch 2.5). Tensors made
    in the body are ordinary ones also if the caller is in inference mode: they may be kept and used outside it.

    Buffers that the model writes (counters, moving averages, caches) are restored, see :class:`_Buffers`. Anything else
    that it stores during a forward pass, such as lists or dictionaries of its own, is not.
    """
    modules = modules_of(model)
    training = [module for module in modules if module.training]
    device = device_of(model)
    cached = torch.is_autocast_cache_enabled()
    with torch.inference_mode(False):
        buffers = _Buffers(modules)
    with preserve_rng(device), disable_autograd():
        try:
            torch.set_autocast_cache_enabled(False)
            _set_training(training, False)
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            _set_training(training, True)
            buffers.restore()


def _set_training(modules: list[nn.Module], mode: bool) -> None:
    for module in modules:
        own = vars(module)
        if "training" in own:
            own["training"] = mode  # without the checks of ``__setattr__``, which take most of a walk's time
        else:
            module.training = mode


@contextmanager
def disable_autograd() -> Iterator[None]:
    """Run the body without autograd; what is made in it are ordinary tensors, also in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def without_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """Leave hooks on the parameters' gradients (``Tensor.register_hook``) out of the body's backward passes.

    Such hooks change or log the gradient of a whole batch for an optimiser. They must neither change the gradient of
    the loss nor receive gradients of single samples.
    """
    hooks = [(parameter, parameter._backward_hooks) for parameter in model.parameters() if parameter._backward_hooks]
    try:
        for parameter, _ in hooks:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, own in hooks:
            parameter._backward_hooks = own


class _Buffers:
    """A copy of a model's buffers, from which they are restored.

    All buffers are copied, since it is not known in advance which of them a forward pass writes. Only those that were
    written are restored. Autograd's version counters do not show that, as a write through ``.data`` does not count;
    therefore values are compared. Where that would make the host wait for a GPU, all are restored, without a change of
    the counters. Buffers that were assigned, registered or deleted are replaced by the former ones. With a module's
    buffers its plain attributes (numbers, texts, None) are restored, as they may say how far a cache is filled. A
    buffer that was written keeps its higher version.
    """

    @torch.no_grad()
    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = [
            (m, dict(m._buffers.items()), set(m._non_persistent_buffers_set), dict(vars(m))) for m in modules
        ]
        found = {id(b): b for _, own, _, _ in self._modules for b in own.values() if b is not None and _is_plain(b)}
        # Each with its memory and its version.
        self._states = [
            (b, b.detach(), None if b.is_inference() else b._version, b.requires_grad) for b in found.values()
        ]
        # Those of a kind are copied together: on a GPU it is the number of calls that takes time.
        kinds: dict[object, list[Tensor]] = {}
        for buffer in found.values():
            kinds.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        self._copies = [(buffers, _join(buffers)) for buffers in kinds.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers."""
        written: set[int] = set()
        for buffer, memory, version, required_grad in self._states:
            if buffer.data_ptr() != memory.data_ptr() or buffer.shape != memory.shape:
                buffer.data = memory
                written.add(id(buffer))
            if buffer.requires_grad and not required_grad:
                buffer.detach_()
            if version is not None and buffer._version != version:
                written.add(id(buffer))
        for alike, joined in self._copies:
            if not can_sync(joined.device):
                own, copies = zip(*_parts(alike, joined), strict=True)
                with torch.inference_mode(any(buffer.is_inference() for buffer in alike)):
                    torch._foreach_copy_(own, copies)
            elif not torch.equal(_join(alike), joined):
                for buffer, (memory, copy) in zip(alike, _parts(alike, joined), strict=True):
                    if not torch.equal(memory, copy):
                        written.add(id(buffer))
                        with torch.inference_mode(buffer.is_inference()):
                            memory.copy_(copy)
        for module, buffers, transient, attributes in self._modules:
            if isinstance(module, torch.jit.ScriptModule):
                continue  # its attributes are not those of a Python object
            now = module._buffers
            if not now and not buffers:
                continue
            rebound = now.keys() != buffers.keys() or any(now[name] is not b for name, b in buffers.items())
            if rebound:
                now.clear()
                now.update(buffers)
                module._non_persistent_buffers_set = transient
            if rebound or any(id(b) in written for b in buffers.values()):
                _restore_plain_attributes(module, attributes)


def _join(buffers: list[Tensor]) -> Tensor:
    """Return the entries of all buffers of one kind, (K,)."""
    return torch.cat([buffer.detach().reshape(-1) for buffer in buffers])


def _parts(buffers: list[Tensor], joined: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the memory of each buffer and its part of what :func:`_join` returned, of the same shape."""
    for buffer, part in zip(buffers, joined.split([buffer.numel() for buffer in buffers]), strict=True):
        # Repeated entries of an expanded buffer are one in memory.
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in buffer.stride())
        yield buffer.data[once], part.view(buffer.shape)[once]


def _is_plain(buffer: Tensor) -> bool:
    """Whether a buffer has entries that can be copied and compared."""
    lazy = isinstance(buffer, nn.parameter.UninitializedBuffer)
    return not lazy and buffer.layout == torch.strided and not buffer.is_quantized and not buffer.is_meta


def _restore_plain_attributes(module: nn.Module, before: dict[str, object]) -> None:
    plain = (bool, int, float, complex, str, tuple, type(None))
    now = vars(module)
    for name in [name for name, value in now.items() if name not in before and isinstance(value, plain)]:
        del now[name]
    now.update({name: value for name, value in before.items() if isinstance(value, plain)})


class RandomState:
    """The present state of the global generators of torch (CPU and ``device``), numpy and Python."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._torch, self._python, self._numpy = self._tensors(), random.getstate(), np.random.get_state()

    def _tensors(self) -> list[Tensor]:
        accelerator = [] if self._device is None else [torch.cuda.get_rng_state(self._device)]
        return [torch.get_rng_state(), *accelerator]

    def has_advanced(self) -> bool:
        """Whether a number has been drawn from any of them since."""
        same = all(map(torch.equal, self._tensors(), self._torch)) and random.getstate() == self._python
        now, before = (_numpy_words(state) for state in (np.random.get_state(), self._numpy))
        return not same or now != before

    def restore(self) -> None:
        """Restore the generators."""
        torch.set_rng_state(self._torch[0])
        if self._device is not None:
            torch.cuda.set_rng_state(self._torch[1], self._device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def _numpy_words(state: Any) -> tuple[bytes, object]:
    """Return the words of numpy's generator and its position in them."""
    return np.asarray(state[1]).tobytes(), state[2]


@contextmanager
def preserve_rng(device: torch.device | None = None) -> Iterator[None]:
    """Restore the global generators of torch (CPU and ``device``), numpy and Python afterwards.

    Data sets may draw from any of them in ``__getitem__``.
    """
    state = RandomState(device)
    try:
        yield
    finally:
        state.restore()


def require_finite(first: int = 0, **named: InputTree) -> None:
    """Raise ValueError naming the argument and the first sample of it that holds a NaN or an infinity.

    Where the host may read values, the usual case costs one pass over each tensor. Elsewhere the largest entry of each
    sample is computed in any case (:mod:`gradmix.runtime.deferred_checks`).

    Args:
        first: index of sample 0 in the whole argument, of which the tensors are a chunk.
        named: trees of tensors (N, ...) by name; in the error, underscores become spaces.
    """
    floats = {
        path: value
        for name, tree in named.items()
        for path, value in leaves(tree, name.replace("_", " "))
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    }
    if not floats or _is_finite_now(*floats.values()):
        return
    for name, value in floats.items():
        _require_finite_samples(value, partial(_sample_error, name, first))


def require_finite_pairs(logits: Tensor, i: Tensor, j: Tensor) -> None:
    """Raise ValueError if the logits (K, C) of the mixtures of samples ``i`` and ``j``, both (K,), are not finite."""
    if not _is_finite_now(logits):
        _require_finite_samples(logits, partial(_pair_error, i, j))


def _is_finite_now(*values: Tensor) -> bool:
    """Whether the host may read values and all are known to be finite; one synchronisation."""
    return all(can_sync(value.device) for value in values) and all_finite(*values)


def _require_finite_samples(value: Tensor, error: Callable[[int, str], ValueError]) -> None:
    """Require the samples of ``value`` to be finite; ``error`` makes the error from the first that is not, and why."""
    what = [partial(_error_of_content, error, content) for content in ("NaN", "an infinity")]
    check_where(_not_finite, (value.detach(),), *what)


def _error_of_content(error: Callable[[int, str], ValueError], content: str, sample: int) -> ValueError:
    return error(sample, content)


def _not_finite(value: Tensor) -> Tensor:
    """Return (N,) uint8: 1 for a sample of ``value`` (N, ...) that holds a NaN, 2 for one with an infinity, else 0."""
    largest = torch.linalg.vector_norm(value.reshape(len(value), -1), torch.inf, dim=1)
    is_nan, is_infinite = (found.view(torch.uint8) for found in (largest.isnan(), largest == torch.inf))
    return torch.add(is_nan, is_infinite, alpha=2)


def _sample_error(name: str, first: int, sample: int, content: str) -> ValueError:
    kind = ModelNotFiniteError if name.startswith("the model") else ValueError
    return kind(f"{name}: sample {first + sample} holds {content}, expected finite values")


def _pair_error(i: Tensor, j: Tensor, k: int, content: str) -> ValueError:
    return ModelNotFiniteError(
        f"the model's logits of mixed samples {int(i[k])} and {int(j[k])}: {content}, expected finite values"
    )
