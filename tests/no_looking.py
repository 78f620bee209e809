"""A stand-in for a GPU that must not be waited for: on the CPU, whatever would make the host wait raises."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradmix import draw, references
from gradmix.estimators import feature
from gradmix.ops import draw_partners, last_layer_gradient, mixed_alignment
from gradmix.runtime import deferred_checks

WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
}
"""Operators whose result's size or value the host must know."""

LOOKS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Looked(AssertionError):
    pass


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masks = name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or masks:
            raise Looked(name)
        return func(*args, **(kwargs or {}))


def behind_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the package take the CPU for a device whose values are not to be looked at."""
    monkeypatch.setattr(deferred_checks, "DEVICES", frozenset({"cuda", "cpu"}))


@contextmanager
def watched() -> Iterator[None]:
    """Raise :class:`Looked` where the body would wait; the package's operators are entered, not taken as one call."""
    with pytest.MonkeyPatch.context() as patch:
        # A dispatch mode does not see what a registered operator calls, nor what the extension does.
        for module, name, operator in (
            (feature, "mixed_alignment_op", mixed_alignment.OPERATOR),
            (draw, "draw_partners_op", draw_partners.OPERATOR),
            (references, "last_layer_gradient_op", last_layer_gradient.OPERATOR),
            (last_layer_gradient, "last_layer_gradient_op", last_layer_gradient.OPERATOR),
        ):
            assert callable(getattr(module, name))
            patch.setattr(module, name, _run(operator))
        for name in LOOKS:
            patch.setattr(Tensor, name, _refuse(name))
        with _Watch():
            yield


def _run(operator: Any) -> Any:
    def run(*args: Any) -> Any:
        *rest, backend = args
        return operator.choose("torch" if backend == "auto" else backend, *rest).run(*rest)

    return run


def _refuse(name: str) -> Any:
    def look(*_args: Any, **_kwargs: Any) -> Any:
        raise Looked(f"Tensor.{name}")

    return look
