"""The classifier head: finding it in a model, and capturing what goes in and comes out.

The last-layer gradient of a sample is (softmax(z) - y) [h; 1]^T, with h the head's input and z its output. That holds
only if the head's output *is* the model's output, so the head is the ``nn.Linear`` or 1x1 convolution whose output was
found equal to what the model returned; a guess by name or position is not made.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradmix.probe import untouched, unwrap


class HeadOutput(NamedTuple):
    """What the head saw and said for a batch of rows.

    Attributes:
        features: (N, d), its input.
        logits: (N, C), its output.
    """

    features: Tensor
    logits: Tensor


class HeadNotFoundError(ValueError):
    """The classifier head could not be found for certain, or the module named cannot serve as one."""


HOW_TO_NAME = "name it by head=, as a module (head=model.fc) or by its name (head='fc')"

_found: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


class HeadCapture:
    """Context manager that records the head's input and output of a forward pass.

    In a training step it makes selection free of a forward pass of its own::

        with HeadCapture(model) as capture:
            logits = model(x)
        pairs = gradmix.select_pairs(model, buffer, (x, y), outputs=capture.output)

    Args:
        model: the model about to be called, maybe wrapped by ``torch.compile`` or a data-parallel class.
        head: the head, its name, or None: the one found by :func:`find_head` (then ``example`` must be given unless
            this model's head was found before).
        example: one or more input rows, used only to find the head.

    Raises:
        HeadNotFoundError: on entry, no certain head; on reading ``output``, the head did not run exactly once.
    """

    def __init__(self, model: nn.Module, head: nn.Module | str | None = None, example: Tensor | None = None) -> None:
        self.head = resolve_head(model, head, example)
        self._calls: list[HeadOutput] = []
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def __enter__(self) -> HeadCapture:
        self._calls.clear()
        self._handle = self.head.register_forward_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _record(self, _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        features = inputs[0] if inputs else named["input"]
        # Cloned, because logits are often masked or scaled in place afterwards.
        self._calls.append(HeadOutput(features.detach(), output.detach().clone()))

    @property
    def output(self) -> HeadOutput:
        """Detached features (N, d) and logits (N, C) of the forward pass inside the context."""
        if len(self._calls) != 1:
            raise HeadNotFoundError(
                f"head: {_describe(self.head)} was seen to run {len(self._calls)} times in one forward pass, expected "
                f"once (code compiled before may pass by the hook); {HOW_TO_NAME}"
            )
        features, logits = self._calls[0]
        return HeadOutput(_as_rows(features, "input", self.head), _as_rows(logits, "output", self.head))


def head_classes(head: nn.Module) -> int:
    """Number of classes of a head: its output features or channels."""
    return int(head.out_features if isinstance(head, nn.Linear) else head.out_channels)  # type: ignore[arg-type]


def has_bias(head: nn.Module) -> bool:
    """Whether the head's gradient has a bias column."""
    return getattr(head, "bias", None) is not None


def logits_of(output: Any) -> Tensor:
    """The logits in a model's return value: the tensor itself, or the ``logits`` of an object or mapping.

    Raises:
        TypeError: neither.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(f"model: returned {type(output).__name__}, expected a tensor or an object with a tensor .logits")


def resolve_head(model: nn.Module, head: nn.Module | str | None = None, example: Tensor | None = None) -> nn.Module:
    """The head module: the one named, the one found before in this very model, or the one found now on ``example``.

    Raises:
        HeadNotFoundError: the module named is not part of the model or no linear head; or none could be found.
        TypeError: ``head`` is neither a module nor a name.
    """
    inner = unwrap(model)
    if isinstance(head, str):
        try:
            module = inner.get_submodule(head)
        except AttributeError:
            raise HeadNotFoundError(f"head: the model has no module {head!r}; {_candidates(inner)}") from None
        return _check_kind(module)
    if isinstance(head, nn.Module):
        if not any(module is head for module in inner.modules()):
            raise HeadNotFoundError(
                f"head: the {type(head).__name__} given is not a module of the model; {_candidates(inner)}"
            )
        return _check_kind(head)
    if head is not None:
        raise TypeError(f"head: got {type(head).__name__}, expected a module of the model, its name, or None")
    known = _found.get(inner)
    module_ = known() if known is not None else None
    # A head that was replaced (a growing classifier) is no longer among the modules and is searched for again.
    if module_ is not None and any(module is module_ for module in inner.modules()):
        return module_
    if example is None:
        raise HeadNotFoundError(f"head: not known yet for this model and no example row to find it with; {HOW_TO_NAME}")
    with untouched(inner):
        found = find_head(inner, example)
    _found[inner] = weakref.ref(found)
    return found


def find_head(model: nn.Module, example: Tensor) -> nn.Module:
    """The ``nn.Linear`` or 1x1 convolution whose output is the model's output, found by one forward pass.

    The pass runs in the mode the model is in, on ``example`` (N, ...), N >= 1.

    Raises:
        HeadNotFoundError: no such layer: something follows the classifier (softmax, scaling, a mask), it is no module,
            or it classifies several positions of a row.
    """
    model = unwrap(model)
    outputs: list[tuple[nn.Module, Tensor, int]] = []

    def record(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, output, output._version))

    handles = [module.register_forward_hook(record) for module in model.modules() if _is_linear(module)]
    try:
        result = logits_of(model(example))
    finally:
        for handle in handles:
            handle.remove()
    matches = [module for module, output, version in outputs if output._version == version and _is_same(output, result)]
    if not matches:
        raise HeadNotFoundError(
            "head: no nn.Linear or 1x1 convolution whose output is the model's output was found (the output has shape "
            f"{tuple(result.shape)}); {_candidates(model)}"
        )
    return matches[-1]


def _is_same(output: Tensor, result: Tensor) -> bool:
    """Whether the model returned this layer's output: the same memory, or a copy in another dtype.

    Equal values in other memory are not enough: an adapter that still adds zero to the layer's output would pass.
    """
    if output.ndim < 2 or result.ndim != 2 or output.numel() != result.numel() or output.shape[:2] != result.shape:
        return False
    if output.dtype == result.dtype:
        return output.data_ptr() == result.data_ptr()
    return bool(torch.equal(output.reshape(result.shape).to(result.dtype), result))


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1} and module.groups == 1


def _check_kind(module: nn.Module) -> nn.Module:
    if _is_linear(module):
        return module
    raise HeadNotFoundError(f"head: got {_describe(module)}, expected an nn.Linear or a 1x1 nn.Conv2d without groups")


def _as_rows(value: Tensor, side: str, head: nn.Module) -> Tensor:
    rows = value.flatten(1) if value.ndim == 4 and value.shape[2:] == (1, 1) else value
    if rows.ndim != 2:
        raise HeadNotFoundError(
            f"head: the {side} of {_describe(head)} has shape {tuple(value.shape)}, expected one position a row: "
            f"(N, features); {HOW_TO_NAME}"
        )
    return rows


def _describe(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})" if _is_linear(module) else type(module).__name__


def _candidates(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if _is_linear(module)]
    if not names:
        return "the model has no nn.Linear and no 1x1 nn.Conv2d"
    listed = ", ".join(repr(name) for name in names[-5:])
    return f"{HOW_TO_NAME}; the model's last linear layers are {listed}"
