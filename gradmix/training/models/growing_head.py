"""A classifier that grows with the classes: the old rows as they were, and the optimiser's state with them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradmix.model.head import resolve_head
from gradmix.model.unchanged import unwrap
from gradmix.training.seeds import generator_for


def grow_head(
    model: nn.Module,
    num_classes: int,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
    head: nn.Module | str | None = None,
    example: Tensor | None = None,
) -> nn.Linear | nn.Conv2d:
    """Replace a model's classifier by one of more classes that gives the old classes the same logits.

    The old classes' weights and biases, and dtype, device, layout, ``requires_grad`` and training flag stay. The new
    classes' are uniform in ±1 / sqrt(in_features), as torch initialises a linear layer. Gradients (``.grad``) are not
    kept. The parameters are new ones: hand them to the optimiser, by :func:`extend_state` with its state, and wrap the
    model anew where it was wrapped for several processes.

    Args:
        model: The model, which is changed; of a wrapped one, the module inside.
        num_classes: Classes from now on, at least as many as before; if as many, nothing changes.
        seed: Seeds the new weights, together with the number of old classes, so that one seed serves a whole stream.
        generator: Draws the new weights in place of ``seed``. The global generators are never used.
        head: The classifier, an ``nn.Linear`` or 1x1 ``nn.Conv2d`` of the model, or its name. ``None``: it is found,
            as by :func:`gradmix.select_pairs`; a model that was never looked into before needs ``example``, but one of
            :mod:`gradmix.training.models`, whose classifier is called ``head``, does not.
        example: One or more input samples, to find the classifier with.

    Returns:
        The new classifier, in the old one's place, or the old one if it has as many classes.

    Raises:
        ValueError: Fewer classes than before; or the classifier is of a class of its own, shared, tied, parametrised
            or hooked, none of which a new one could take over; or it is the model itself, or was not found
            (:class:`gradmix.model.head.HeadNotFoundError`).
        TypeError: ``num_classes`` is no int, or ``head`` neither a module nor a name.
    """
    if not isinstance(num_classes, int) or isinstance(num_classes, bool):
        raise TypeError(f"num_classes: got {type(num_classes).__name__}, expected an int")
    inner = unwrap(model)
    if head is None and example is None and type(inner).__module__.startswith("gradmix.training.models."):
        head = getattr(inner, "head", None)
    found = resolve_head(inner, head, example)
    old, before = found.module, found.num_classes
    if num_classes < before:
        raise ValueError(f"num_classes: got {num_classes}, expected at least the {before} that the head has")
    if num_classes == before:
        return old  # type: ignore[return-value]
    _require_plain(inner, old)
    assert isinstance(old, (nn.Linear, nn.Conv2d))
    if generator is None:
        generator = generator_for(seed, f"head/{before}")
    bound = 1 / math.sqrt(old.weight[0].numel())
    new = _without_parameters(old, num_classes)
    for name, parameter in old.named_parameters():
        grown = _extend_rows(parameter.detach(), num_classes)
        drawn = torch.empty(num_classes - before, *parameter.shape[1:], device=generator.device)
        grown[before:] = drawn.uniform_(-bound, bound, generator=generator)
        new.register_parameter(name, nn.Parameter(grown, requires_grad=parameter.requires_grad))
    new.train(old.training)
    for parent, name in _places(inner, old):
        setattr(parent, name, new)
    return new


def extend_state(optimiser: torch.optim.Optimizer, old: nn.Module, new: nn.Module) -> None:
    """Put a grown classifier's parameters into an optimiser in the old ones' place, with their state.

    State of a parameter's shape, such as momentum or Adam's moments, keeps its rows, and the new classes' start at 0;
    single numbers, such as a count of steps, stay. Groups, order and settings do as well. Parameters that the optimiser
    did not have are left out still.

    Args:
        optimiser: The optimiser, which is changed.
        old: The classifier before :func:`grow_head`.
        new: The one that it returned.

    Raises:
        ValueError: The optimiser has none of the old one's parameters; ``new`` is no wider ``old``; or state is of
            another form, which rows cannot be added to (factored moments). Nothing is changed then.
    """
    if old is new:
        return
    grown = dict(new.named_parameters())
    # In the optimiser the parameters themselves are meant, not their values.
    known = {id(p) for group in optimiser.param_groups for p in group["params"]}
    pairs: dict[int, tuple[str, Tensor, Tensor]] = {}
    for name, parameter in old.named_parameters():
        other = grown.get(name)
        if other is None or other.shape[1:] != parameter.shape[1:] or len(other) < len(parameter):
            got = "nothing" if other is None else str(tuple(other.shape))
            raise ValueError(f"new: its {name} is {got}, expected {tuple(parameter.shape)} with more rows")
        if id(parameter) in known:
            pairs[id(parameter)] = (name, parameter, other)
    if not pairs:
        raise ValueError("old: the optimiser has none of its parameters, expected the head that it was given")
    states = {key: _extend_values(optimiser, *pair) for key, pair in pairs.items()}
    for group in optimiser.param_groups:
        group["params"] = [pairs[id(p)][2] if id(p) in pairs else p for p in group["params"]]
    for key, (_, before, after) in pairs.items():
        state = states[key]
        optimiser.state.pop(before, None)
        if state is not None:
            optimiser.state[after] = state


def _extend_values(optimiser: torch.optim.Optimizer, name: str, old: Tensor, new: Tensor) -> dict[str, object] | None:
    """The state of ``new``, or ``None`` where ``old`` has none."""
    if old not in optimiser.state:
        return None
    values: dict[str, object] = {}
    for key, value in optimiser.state[old].items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            wide = torch.zeros_like(new, dtype=value.dtype, device=value.device)
            wide[: len(old)] = value
            values[key] = wide
        elif (isinstance(value, Tensor) and value.ndim == 0) or value is None or isinstance(value, (bool, int, float)):
            values[key] = value
        else:
            got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"optimiser: {type(optimiser).__name__}'s {key} of the head's {name} is {got}, expected single numbers "
                f"and tensors {tuple(old.shape)}"
            )
    return values


def _require_plain(model: nn.Module, head: nn.Module) -> None:
    """Refuse a head that a new module of its kind would not be the same as."""
    label = next((name for name, module in model.named_modules() if module is head), "")
    if head is model:
        raise ValueError(f"model: got the {type(head).__name__} itself, expected a model with the head inside")
    if parametrize.is_parametrized(head) or {"weight", "bias"} - head._parameters.keys():
        raise ValueError(f"head: {label} has a parametrised weight or bias, expected plain parameters")
    plain = nn.Linear if isinstance(head, nn.Linear) else nn.Conv2d
    if type(head).forward is not plain.forward or "forward" in vars(head):
        raise ValueError(
            f"head: {label} is a {type(head).__name__} with a forward of its own, expected {plain.__name__}"
        )
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        raise ValueError(f"head: {label} has hooks, expected none: they would be lost with it")
    own = {id(parameter): name for name, parameter in head.named_parameters()}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if module is not head and id(parameter) in own:
                raise ValueError(
                    f"head: its {own[id(parameter)]} is tied to {f'{path}.{name}'.lstrip('.')}, expected one of its own"
                )


def _without_parameters(old: nn.Linear | nn.Conv2d, num_classes: int) -> nn.Linear | nn.Conv2d:
    """A layer as the old one but for its width, its parameters yet to come; drawn from no generator."""
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, num_classes, bias, device="meta")
    return nn.Conv2d(
        old.in_channels,
        num_classes,
        1,
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=bias,
        padding_mode=old.padding_mode,
        device="meta",
    )


def _extend_rows(value: Tensor, rows: int) -> Tensor:
    """A tensor of ``rows`` rows whose first ones are ``value``'s, its dimensions lying in memory in the same order."""
    order = sorted(range(value.ndim), key=value.stride, reverse=True)
    shape = (rows, *value.shape[1:])
    wide = value.new_empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(value.ndim)])
    wide[: len(value)] = value
    return wide


def _places(model: nn.Module, head: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is head:
                yield parent, name
