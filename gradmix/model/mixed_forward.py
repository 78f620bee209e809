"""Mixing inside a model, for inputs that cannot be mixed: token ids are mixed as embeddings or as features.

A stage of the model is run for both samples of a pair, its outputs are mixed, and the rest of the model receives only
the mixtures. This is how Mixup of texts is done, at the embeddings or at the classifier's input (Guo et al. 2019,
"Augmenting data with mixup for sentence classification").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradmix.model.head import logits_of, resolve_head
from gradmix.model.inputs import InputTree, arguments_of, call_model, check_inputs, num_samples
from gradmix.model.unchanged import unwrap, without_compilation
from gradmix.ops.mixed_alignment import check_lam


def mixed_forward(
    model: nn.Module,
    stage: nn.Module | str,
    x: InputTree,
    other_x: InputTree | None,
    lam: Tensor | float,
    *,
    partner: Tensor | None = None,
    head: nn.Module | str | None = None,
) -> Tensor:
    """Return the logits of samples mixed at a stage of the model: its output becomes lam o(x) + (1 - lam) o(other_x).

    After a selection::

        pairs = gradmix.select_pairs(model, buffer, (tokens, y))  # estimator "feature": mixes no inputs
        logits = gradmix.mixed_forward(model, "embedding", tokens, pairs.other_x(), pairs.lam)
        loss = F.cross_entropy(logits, pairs.mix_labels())

    ``other_x`` is forwarded first, up to the stage; then ``x`` is forwarded through the whole model. Gradients flow
    through both passes. Anything that the model computes beside the stage, such as a padding mask, is computed from
    ``x``. Batch normalisation before the stage sees both batches, one after the other. With ``other_x`` None there is
    one pass. A module compiled by ``torch.compile`` runs uncompiled, because compiled code may skip hooks; the whole
    pass goes through a data-parallel wrapper, which synchronises its gradients as usual.

    Args:
        model: the classifier; returns logits (N, C), or an object that holds them as ``.logits``.
        stage: a module of the model, or its name, called once in a forward pass and returning a tensor (N, ...); or
            ``"feature"``: the head's input.
        x: (N, ...) the model's input, a tensor, or a mapping, tuple or list of tensors, which is passed by keyword or
            position if the model's ``forward`` takes it so, else as one argument.
        other_x: (N, ...) the partners, or (M, ...) with ``partner``; None: ``x``, with ``partner``.
        lam: the weight of the sample itself, a number in [0, 1] or a tensor (N,); 1: the sample stays unmixed.
        partner: (N,) int64, the index of each sample's partner in ``other_x``; None: the sample's own index.
        head: the classifier layer or its name, for ``"feature"``; None: it is searched for.

    Returns:
        (N, C) logits, with a graph.

    Raises:
        ValueError: the stage is no module of the model, was not called exactly once, or its outputs for ``x`` and
            ``other_x`` differ in shape; or arguments differ in length.
        TypeError: an argument of the wrong type, or the stage's output is not a floating-point tensor.
    """
    count = check_inputs("x", x)
    _check_arguments(count, other_x, lam, partner)
    name, module = _resolve(model, stage, head, x)
    at_input = stage == "feature"
    # The outermost compiled wrapper is skipped; a data-parallel one stays for the pass that has the loss.
    inner = getattr(model, "_orig_mod", None)
    outer = inner if isinstance(inner, nn.Module) else model
    other = None if other_x is None else _output_at(unwrap(model), module, name, at_input, other_x)
    calls = 0

    def mix(value: object) -> Tensor:
        nonlocal calls
        calls += 1
        h = _check_output(value, name, count)
        partners = h if other is None else other
        if partners.shape[1:] != h.shape[1:]:
            raise ValueError(
                f"other_x: {name} makes samples of shape {tuple(partners.shape[1:])} of it, expected "
                f"{tuple(h.shape[1:])} as of x"
            )
        partners = partners if partner is None else partners[partner.to(h.device)]
        # In float32 at least: a weight rounded to bfloat16 is off by up to 0.2 %.
        dtype = torch.promote_types(h.dtype, torch.float32)
        weight = lam
        if isinstance(weight, Tensor):
            weight = weight.to(h.device, dtype)
            weight = weight.view(-1, *[1] * (h.ndim - 1)) if weight.ndim else weight
        return (weight * h.to(dtype) + (1 - weight) * partners.to(dtype)).to(h.dtype)

    handle = _hook(module, mix, at_input)
    try:
        with without_compilation():
            # The signature of the model itself decides: a data-parallel wrapper takes any arguments.
            positional, named = arguments_of(unwrap(model), x)
            logits = logits_of(outer(*positional, **named))
    finally:
        handle.remove()
    _require_one_call(calls, name)
    return logits


class _Reached(BaseException):
    """Ends a forward pass at the stage; not an Exception, which a model might catch."""


def _output_at(model: nn.Module, module: nn.Module, name: str, at_input: bool, x: InputTree) -> Tensor:
    """Return the stage's output (or input) for ``x``, without the rest of the pass."""
    found: list[Tensor] = []

    def stop(value: object) -> Tensor:
        found.append(_check_output(value, name, num_samples(x)))
        raise _Reached

    handle = _hook(module, stop, at_input)
    try:
        with without_compilation():
            call_model(model, x)
    except _Reached:
        pass
    finally:
        handle.remove()
    _require_one_call(len(found), name)
    return found[0]


def _hook(module: nn.Module, change: Any, at_input: bool) -> torch.utils.hooks.RemovableHandle:
    """Register a hook by which ``change`` replaces the module's output, or its first input."""
    if not at_input:
        return module.register_forward_hook(lambda _module, _inputs, output: change(output))

    def before(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if inputs:
            return (change(inputs[0]), *inputs[1:]), named
        return inputs, {**named, "input": change(named["input"])}

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _check_output(value: object, name: str, count: int) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"a tensor of dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"stage: {name} gives {got}, expected a floating-point tensor, in which samples can be mixed")
    if value.shape[:1] != (count,):
        raise ValueError(f"stage: {name} gives a tensor {tuple(value.shape)}, expected {count} samples")
    return value


def _require_one_call(calls: int, name: str) -> None:
    if calls != 1:
        hint = " (code compiled inside a wrapper passes by hooks)" if calls == 0 else ""
        raise ValueError(f"stage: {name} was called {calls} times in a forward pass, expected once{hint}")


def _resolve(model: nn.Module, stage: nn.Module | str, head: nn.Module | str | None, x: Any) -> tuple[str, nn.Module]:
    inner = unwrap(model)
    if stage == "feature":
        return "the head", resolve_head(model, head, x).module
    if isinstance(stage, str):
        modules = dict(inner.named_modules())
        if stage not in modules or not stage:
            listed = ", ".join(repr(name) for name, _ in inner.named_children()) or "none"
            raise ValueError(
                f"stage: got {stage!r}, expected a module's name or 'feature'; the model's own children are {listed}"
            )
        return stage, modules[stage]
    if not isinstance(stage, nn.Module):
        raise TypeError(f"stage: got {type(stage).__name__}, expected a module of the model, its name, or 'feature'")
    for name, module in inner.named_modules():
        if module is stage:
            return name or type(stage).__name__, stage
    raise ValueError(f"stage: the {type(stage).__name__} given is not a module of the model")


def _check_arguments(count: int, other_x: InputTree | None, lam: Tensor | float, partner: Tensor | None) -> None:
    if isinstance(lam, Tensor):
        if not lam.is_floating_point():
            raise TypeError(f"lam: got dtype {lam.dtype}, expected a floating-point dtype")
        if lam.ndim > 1 or (lam.ndim == 1 and len(lam) != count):
            raise ValueError(f"lam: got shape {tuple(lam.shape)}, expected a number or ({count},)")
    else:
        check_lam(lam)
    if partner is None:
        if other_x is None:
            raise ValueError("other_x: got None, expected the partners, or partner= to tell where they are in x")
        others = check_inputs("other_x", other_x)
        if others != count:
            raise ValueError(f"other_x: got {others} samples, expected {count}, or partner= to tell which they are")
    elif partner.dtype != torch.int64 or partner.shape != (count,):
        raise ValueError(f"partner: got {partner.dtype} of shape {tuple(partner.shape)}, expected int64 ({count},)")
