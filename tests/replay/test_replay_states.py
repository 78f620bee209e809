"""States of replay buffers as earlier versions wrote them, spelt out: they load, and the formats stay what they are."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmix import ReplayBuffer

X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
IDS = torch.tensor([7, 8, 9])
LOGITS = torch.tensor([[0.5], [1.5], [2.5]])
Y = torch.tensor([4, 2, 4])
IDENTITY = "0123456789abcdef"
SLOTS, STAMPS = [3, 0, 1], [11, 12, 13]


def common() -> dict[str, Any]:
    """What all formats have: two of the five samples of class 4 and the one of class 2 are held."""
    return {
        "capacity": 2,
        "policy": "class",
        "opened": 1,
        "keys": torch.tensor([0.25, 0.9, 0.125], dtype=torch.float64),
        "seen_classes": torch.tensor([2, 4]),
        "seen_counts": torch.tensor([1, 5]),
        "key_generator": torch.Generator().manual_seed(1).get_state(),
        "draw_generator": torch.Generator().manual_seed(2).get_state(),
        "y": Y.clone(),
    }


def format_1() -> dict[str, Any]:
    return {**common(), "version": 1, "x": X.clone()}


def format_2() -> dict[str, Any]:
    return {**common(), "version": 2, "x": {"a": X.clone(), "b": [IDS.clone()]}, "extras": {"logits": LOGITS.clone()}}


def format_3(folder: Path, *, parts: bool = True) -> dict[str, Any]:
    """A state and its folder; the first of this format, of one tensor, did not say what the parts are."""
    columns = {
        "x": {"shape": [2], "dtype": "float32"},
        "logits": {"shape": [1], "dtype": "float32"},
    }
    folder.mkdir()
    described = {"format": 1, "identity": IDENTITY, "columns": [{"name": n, **c} for n, c in columns.items()]}
    (folder / "buffer.json").write_text(json.dumps(described, indent=1) + "\n")
    for file, values in {"column-0.bin": X, "column-1.bin": LOGITS}.items():
        width = values.shape[1]
        room = [0.0] * (4 * width)
        for slot, row in zip(SLOTS, values.tolist(), strict=True):
            room[slot * width : (slot + 1) * width] = row
        (folder / file).write_bytes(struct.pack(f"={len(room)}f", *room))
    stamps = [0] * 4
    for slot, stamp in zip(SLOTS, STAMPS, strict=True):
        stamps[slot] = stamp
    (folder / "stamps.bin").write_bytes(struct.pack("=4q", *stamps))
    files = {
        "identity": IDENTITY,
        "columns": columns,
        **({"parts": "x"} if parts else {}),
        "slots": torch.tensor(SLOTS),
        "stamps": torch.tensor(STAMPS),
    }
    return {**common(), "version": 3, "files": files}


def equal(mine: Any, other: Any) -> bool:
    if isinstance(other, Tensor):
        return isinstance(mine, Tensor) and mine.dtype == other.dtype and torch.equal(mine, other)
    if isinstance(other, dict):
        return mine.keys() == other.keys() and all(equal(mine[key], other[key]) for key in other)
    if isinstance(other, list):
        return len(mine) == len(other) and all(map(equal, mine, other))
    return type(mine) is type(other) and mine == other


def load(state: dict[str, Any], folder: Path | None) -> ReplayBuffer:
    buffer = ReplayBuffer(2, seed=9, folder=folder)
    buffer.load_state_dict(copy.deepcopy(state))
    return buffer


CASES = {
    "format 1": (format_1, False),
    "format 2": (format_2, False),
    "format 3": (format_3, True),
    "format 3 without parts": (lambda folder: format_3(folder, parts=False), True),
}


def written(case: str, tmp_path: Path) -> tuple[dict[str, Any], Path | None]:
    make, in_folder = CASES[case]
    folder = tmp_path / "rows" if in_folder else None
    return make(*([folder] if in_folder else [])), folder  # type: ignore[operator]


@pytest.mark.parametrize("case", CASES)
def test_a_state_of_an_earlier_version_loads(case: str, tmp_path: Path) -> None:
    buffer = load(*written(case, tmp_path))
    x = buffer.x["a"] if case == "format 2" else buffer.x
    assert torch.equal(x, X) and torch.equal(buffer.y, Y)
    if case == "format 2":
        assert torch.equal(buffer.x["b"][0], IDS)
    assert equal(buffer.extras, {} if case == "format 1" else {"logits": LOGITS})
    assert buffer.seen_per_class == {2: 1, 4: 5} and buffer.class_counts() == {2: 1, 4: 2}
    # Draws and decisions go on from the generators' states.
    places = torch.randperm(3, generator=torch.Generator().manual_seed(2))
    assert torch.equal(buffer.sample(3)[1], Y[places])
    more = X[:1].repeat(3, 1)
    extras = {name: values[:1].repeat(3, 1) for name, values in buffer.extras.items()}
    buffer.add({"a": more, "b": [IDS[:1].repeat(3)]} if case == "format 2" else more, torch.tensor([4, 4, 4]), **extras)
    keys = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of_class_4 = sorted([0.25, 0.125, *keys.tolist()])[:2]
    assert sorted(buffer.state_dict()["keys"].tolist()) == sorted([0.9, *of_class_4])


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_state_is_written_again_as_it_was(case: str, tmp_path: Path) -> None:
    state, folder = written(case, tmp_path)
    again = load(state, folder).state_dict()
    if case == "format 1":
        state |= {"version": 2, "extras": {}}
    if folder is not None:
        state["files"]["parts"] = "x"
    assert equal(again, state)


@pytest.mark.parametrize("case", CASES)
def test_a_state_can_be_loaded_by_weights_only(case: str, tmp_path: Path) -> None:
    state, folder = written(case, tmp_path)
    torch.save(load(state, folder).state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["version"] == (2 if folder is None else 3)


def wipe(state: Any) -> None:
    """Set every tensor of a state to zero."""
    if isinstance(state, Tensor):
        state.zero_()
    elif isinstance(state, (dict, list)):
        for value in state.values() if isinstance(state, dict) else state:
            wipe(value)


@pytest.mark.parametrize("case", CASES)
def test_a_state_shares_no_memory_with_the_buffer_either_way(case: str, tmp_path: Path) -> None:
    state, folder = written(case, tmp_path)
    buffer = ReplayBuffer(2, folder=folder)
    buffer.load_state_dict(state)
    expected = copy.deepcopy(buffer.state_dict())
    wipe(state)
    given = buffer.state_dict()
    assert equal(given, expected)
    wipe(given)
    assert equal(buffer.state_dict(), expected)


def test_a_state_that_was_loaded_can_be_loaded_again_after_more_samples(tmp_path: Path) -> None:
    """As after two crashes without a state in between: its samples have not been overwritten."""
    x = torch.arange(60.0)[:, None]
    first = ReplayBuffer(6, policy="balanced", folder=tmp_path)
    first.add(x[:20], torch.zeros(20, dtype=torch.int64))
    state, held = first.state_dict(), first.x.clone()
    first.close()
    for _ in range(2):
        buffer = ReplayBuffer(6, policy="balanced", folder=tmp_path)
        buffer.load_state_dict(copy.deepcopy(state))
        assert torch.equal(buffer.x, held)
        for label in range(1, 5):  # each class takes room from those before
            buffer.add(x[10 * label :][:10], torch.full((10,), label))
        buffer.close()


ORDER = [
    ({"policy": "balanced", "keys": None}, "lacks keys"),
    ({"version": 9, "capacity": 7}, "has version 9"),
    ({"capacity": 7, "y": [1]}, "has capacity 7"),
    ({"y": [1], "x": torch.tensor(1.0)}, "y is a list"),
    ({"x": torch.tensor(1.0), "key_generator": torch.zeros(1)}, "x is a Tensor"),
    ({"x": X[:2], "extras": 3}, "x of shape \\(2, 2\\), y of shape \\(3,\\)"),
    ({"seen_counts": torch.tensor([9, 9]), "extras": 3}, "do not fit the seen counts"),
    ({"extras": 3, "key_generator": torch.zeros(1)}, "extras is not a dict"),
]


@pytest.mark.parametrize("number", range(len(ORDER)))
def test_of_several_faults_the_first_of_this_order_is_named(number: int) -> None:
    faults, message = ORDER[number]
    state = format_2() | {"x": X}
    state |= faults
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=f"state: .*{message}"):
        ReplayBuffer(2).load_state_dict(state)
