"""The formats of a buffer's state.

All formats have the entries ``version``, ``capacity``, ``policy``, ``opened`` (whether there were samples), ``keys``,
``seen_classes``, ``seen_counts``, ``key_generator``, ``draw_generator`` and ``y``.

====== ================================================
format further entries
====== ================================================
1      ``x``
2      ``x``, ``extras``
3      ``files``: places of the samples in a folder
====== ================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmix.model.inputs import leaves, tensors_of
from gradmix.replay.ledger import Ledger, quotas

VERSION = 2
"""Format of a state that contains the samples."""

FOLDER_VERSION = 3
"""Format of a state whose samples lie in a folder."""

_READABLE = (1, VERSION)
_GENERATORS = ("key_generator", "draw_generator")
_TENSORS = ("y", "keys", "seen_classes", "seen_counts", *_GENERATORS)
_ENTRIES = frozenset({*_TENSORS, "x", "version", "capacity", "policy", "opened"})


class BufferState(NamedTuple):
    """A state that has been checked.

    Attributes:
        ledger: Which samples are held; tensors of its own.
        opened: Whether there were samples.
        x: The inputs (R, ...), a tree of tensors; None with a folder.
        y: The labels (R,), of any integer dtype.
        extras: The extras (R, ...) by name.
        files: Places of the samples in a folder, not checked yet; None: the samples are in the state.
        key_generator: State of the generator of keys.
        draw_generator: State of the generator of draws.
    """

    ledger: Ledger
    opened: bool
    x: Any
    y: Tensor
    extras: Mapping[str, Tensor]
    files: Any
    key_generator: Tensor
    draw_generator: Tensor


def write_state(ledger: Ledger, *, opened: bool, key_generator: Tensor, draw_generator: Tensor) -> dict[str, Any]:
    """Return the entries that all formats share, except ``y``; tensors are copies of the ledger's.

    ``version`` is that of the samples in the state. A store's entries are added to these.
    """
    return {
        "version": VERSION,
        "capacity": ledger.capacity,
        "policy": str(ledger.policy),
        "opened": int(opened),
        "keys": ledger.keys.clone(),
        "seen_classes": ledger.classes.clone(),
        "seen_counts": ledger.seen.clone(),
        "key_generator": key_generator,
        "draw_generator": draw_generator,
    }


def read_state(state: Mapping[str, Any], ledger: Ledger, *, in_folder: bool) -> BufferState:
    """Check a state of any format.

    Args:
        state: The state, which is not kept.
        ledger: The ledger of the buffer that is to load it.
        in_folder: Whether that buffer has a folder.

    Raises:
        ValueError: An entry is missing, or does not fit the buffer or the other entries.
    """
    _check_entries(state, ledger, in_folder)
    x: Any = None if in_folder else state["x"]
    for name, value in leaves(state["y"] if in_folder else x):
        if not isinstance(value, Tensor) or value.dim() < 1:
            raise ValueError(f"state: {name} is a {type(value).__name__}, expected a torch.Tensor (N, ...)")
    inputs = {} if in_folder else dict(zip((name for name, _ in leaves(x)), tensors_of(x), strict=True))
    loaded = _read_ledger(state, ledger, inputs)
    extras = _read_extras(state, len(loaded))
    key_generator, draw_generator = (_read_generator(state, name) for name in _GENERATORS)
    return BufferState(
        ledger=loaded,
        opened=bool(state["opened"]),
        x=x,
        y=state["y"],
        extras=extras,
        files=state["files"] if in_folder else None,
        key_generator=key_generator,
        draw_generator=draw_generator,
    )


def _check_entries(state: Mapping[str, Any], ledger: Ledger, in_folder: bool) -> None:
    """Check that the entries are there, of a known format, of this buffer's settings, and tensors where expected."""
    has_files = "files" in state
    missing = sorted((_ENTRIES - {"x"} if has_files else _ENTRIES) - set(state))
    if missing:
        raise ValueError(f"state: lacks {', '.join(missing)}; expected what ReplayBuffer.state_dict() returns")
    if has_files != in_folder:
        where, expected = ("in a folder", "folder= to name it") if has_files else ("in the state", "folder=None")
        raise ValueError(f"state: has its samples {where}, expected a buffer made with {expected}")
    if state["version"] not in ((FOLDER_VERSION,) if in_folder else _READABLE):
        raise ValueError(f"state: has version {state['version']!r}, expected at most {VERSION}")
    for name, own in (("capacity", ledger.capacity), ("policy", ledger.policy)):
        if state[name] != own:
            raise ValueError(f"state: has {name} {state[name]!r}, expected {own!r} as in this buffer")
    for name in _TENSORS:
        if not isinstance(state[name], Tensor):
            raise ValueError(f"state: {name} is a {type(state[name]).__name__}, expected a torch.Tensor")


def _read_ledger(state: Mapping[str, Any], ledger: Ledger, inputs: Mapping[str, Tensor]) -> Ledger:
    """Return the state's ledger, with tensors of its own, after a check against the quota and the inputs (R, ...)."""
    y = state["y"]
    keys, classes, seen = state["keys"].cpu(), state["seen_classes"].cpu(), state["seen_counts"].cpu()
    held = len(keys)
    lengths = {len(value) for value in inputs.values()} - {held}
    if lengths or y.shape != (held,) or keys.dim() != 1 or keys.dtype != torch.float64:
        shapes = ", ".join(f"{name} of shape {tuple(value.shape)}" for name, value in inputs.items())
        raise ValueError(
            f"state: {shapes or 'x in files'}, y of shape {tuple(y.shape)} and keys of shape {tuple(keys.shape)} "
            f"({keys.dtype}) do not belong together"
        )
    labels = y.to("cpu", torch.int64)
    ascending = bool((classes[1:] > classes[:-1]).all())
    if classes.shape != seen.shape or not ascending or not bool(torch.isin(labels, classes).all()):
        raise ValueError("state: seen_classes and seen_counts do not belong to the labels in y")
    # The seen counts determine how many samples are held: per class, or in total for the reservoir.
    if ledger.policy == "reservoir":
        fits = held == min(int(seen.sum()), ledger.capacity)
    else:
        counts = torch.bincount(torch.searchsorted(classes, labels), minlength=len(classes))
        fits = torch.equal(counts, quotas(ledger.policy, ledger.capacity, seen))
    if not fits:
        raise ValueError(f"state: the {held} samples held do not fit the seen counts and the capacity")
    with torch.inference_mode(False):
        return replace(ledger, keys=keys.clone(), labels=labels.clone(), classes=classes.clone(), seen=seen.clone())


def _read_extras(state: Mapping[str, Any], held: int) -> Mapping[str, Tensor]:
    """Return the extras (held, ...) by name, after a check; a state of format 1 or 3 has none."""
    extras = state.get("extras", {})
    if not isinstance(extras, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.shape[:1] == (held,)
        for name, value in extras.items()
    ):
        raise ValueError(f"state: extras is not a dict of tensors by name, each with the {held} samples held")
    if extras.keys() & {"x", "y"}:
        raise ValueError("state: extras holds x or y, expected other names")
    return extras


def _read_generator(state: Mapping[str, Any], name: str) -> Tensor:
    """Return the state of a generator, after a check that a generator takes it."""
    generator = torch.Generator("cpu")
    try:
        generator.set_state(state[name].cpu())
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"state: {name} is not the state of a torch.Generator on the CPU ({error})") from error
    return generator.get_state()
