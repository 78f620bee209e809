"""The parts of a replay buffer: ledger, draws, layout, the two stores, and a draw made ahead."""

from __future__ import annotations

import hashlib
import importlib
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmix import ReplayBuffer
from gradmix.replay import draws
from gradmix.replay.file_store import FileStore
from gradmix.replay.layout import LABELS, Column, Layout, check_samples
from gradmix.replay.ledger import Ledger
from gradmix.replay.memory_store import MemoryStore
from gradmix.replay.prefetch import Prefetch
from gradmix.replay.store import Columns, Store

POLICIES = ("class", "balanced", "reservoir")
STORES = ("memory", "files")
CPU = torch.device("cpu")


def own_generator(seed: int, purpose: str) -> torch.Generator:
    """The generator of a buffer, as every version so far has seeded it: what a seed holds and draws must not change."""
    digest = hashlib.sha256(f"gradmix.ReplayBuffer {purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def labels_of(count: int, seed: int = 0) -> Tensor:
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** 2 * 5).long()


# -------------------------------------------------------------------------------------------------- keys and draws


@pytest.mark.parametrize("in_folder", [False, True], ids=STORES)
@pytest.mark.parametrize("seed", [0, 3, -1, 2**70])
def test_a_seed_stands_for_these_keys_and_draws(seed: int, in_folder: bool, tmp_path: Path) -> None:
    buffer = ReplayBuffer(30, policy="reservoir", seed=seed, folder=tmp_path if in_folder else None)
    numbers, y = torch.arange(20), labels_of(20)
    buffer.add(numbers[:7], y[:7])
    buffer.add(numbers[7:], y[7:])
    assert torch.equal(
        buffer.state_dict()["keys"], torch.rand(20, dtype=torch.float64, generator=own_generator(seed, "keys"))
    )
    own = own_generator(seed, "draws")
    assert torch.equal(buffer.sample(6)[0], torch.randperm(20, generator=own)[:6])
    buffer.prefetch(4)
    assert torch.equal(buffer.sample(4)[0], torch.randperm(20, generator=own)[:4])
    assert torch.equal(buffer.sample(50)[0], torch.randint(20, (50,), generator=own))
    assert torch.equal(buffer.draw_balanced(9)[0], draws.draw_balanced(y, 9, own))


def test_balanced_places_are_drawn_in_this_order() -> None:
    """A random order of samples, of classes, and of draws, in turn from one generator."""
    y, n = labels_of(40), 23
    own, again = (torch.Generator().manual_seed(5) for _ in range(2))
    places = draws.draw_balanced(y, n, own)
    shuffled = torch.randperm(40, generator=again).tolist()
    classes = sorted(set(y.tolist()))
    order = torch.randperm(len(classes), generator=again).tolist()
    drawn = []
    for number in range(n):
        members = [place for place in shuffled if y[place] == classes[order[number % len(classes)]]]
        drawn.append(members[number // len(classes) % len(members)])
    assert places.tolist() == [drawn[k] for k in torch.randperm(n, generator=again).tolist()]
    assert torch.equal(own.get_state(), again.get_state())


@pytest.mark.parametrize("n", [0, 1, 5, 12])
def test_uniform_places(n: int) -> None:
    places = draws.draw_uniform(5, n, torch.Generator().manual_seed(1))
    assert places.shape == (n,) and places.dtype == torch.int64
    assert len(places.unique()) == n if n <= 5 else set(places.tolist()) <= set(range(5))


# ---------------------------------------------------------------------------------------------------------- ledger


@pytest.mark.parametrize("capacity", [1, 4, 100])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_admission_changes_no_ledger_and_names_what_moves(policy: Any, capacity: int) -> None:
    chance = random.Random(capacity)
    generator = torch.Generator().manual_seed(0)
    keys, y = torch.rand(80, dtype=torch.float64, generator=generator), labels_of(80)
    ledger, held, start = Ledger.empty(policy, capacity), torch.empty(0, dtype=torch.int64), 0
    while start < 80:
        stop = start + chance.choice([1, 2, 9])
        before = [value.clone() for value in (ledger.keys, ledger.labels, ledger.classes, ledger.seen)]
        admission = ledger.admit(keys[start:stop], y[start:stop])
        for value, known in zip((ledger.keys, ledger.labels, ledger.classes, ledger.seen), before, strict=True):
            assert torch.equal(value, known)
        held = torch.cat([held[admission.kept], start + admission.new])
        ledger, start = admission.ledger, min(80, stop)
        assert torch.equal(ledger.keys, keys[held]) and torch.equal(ledger.labels, y[held])
        assert ledger.total_seen == start and ledger.count_seen() == {
            label: int((y[:start] == label).sum()) for label in sorted(set(y[:start].tolist()))
        }
        assert torch.equal(held, held.sort().values), "in order of arrival"
    whole = Ledger.empty(policy, capacity).admit(keys, y)
    assert torch.equal(whole.new, held) and torch.equal(whole.ledger.keys, ledger.keys)
    assert whole.ledger.class_counts() == ledger.class_counts()


# ---------------------------------------------------------------------------------------------------------- layout


def test_a_layout_names_and_reassembles_the_parts() -> None:
    x = {"ids": torch.ones(2, 3, dtype=torch.int64), "rest": (torch.zeros(2), [torch.ones(2, 1)])}
    labels, columns = check_samples(x, torch.tensor([1, 0], dtype=torch.uint8), {"logits": torch.ones(2, 4)}, None)
    layout = Layout.of(x, columns)
    assert labels.dtype == torch.int64
    assert layout.parts == {"ids": "x['ids']", "rest": ("x['rest'][0]", ["x['rest'][1][0]"])}
    assert layout.columns == {
        "x['ids']": Column((3,), torch.int64),
        "x['rest'][0]": Column((), torch.float32),
        "x['rest'][1][0]": Column((1,), torch.float32),
        "logits": Column((4,), torch.float32),
    }
    assert layout.extra_names == ["logits"] and layout.extras(columns)["logits"] is columns["logits"]
    assert layout.inputs(columns)["rest"][1][0] is x["rest"][1][0]  # type: ignore[index]
    assert all(Column.from_dict(column.to_dict()) == column for column in layout.columns.values())


# ---------------------------------------------------------------------------------------------------------- stores


def make_store(kind: str, folder: Path) -> Store:
    return MemoryStore(None, 12) if kind == "memory" else FileStore(folder, None)


def columns_of(numbers: Tensor) -> Columns:
    """Two columns that say which sample an entry belongs to."""
    return {"x": numbers[:, None].float().expand(-1, 3), "number": numbers}


def opened(store: Store) -> Store:
    columns = columns_of(torch.arange(1))
    store.open(Layout.of(columns["x"], columns), CPU)
    return store


def assert_holds(store: Store, held: Tensor, labels: Tensor) -> None:
    expected = {**columns_of(held), LABELS: labels}
    places = torch.tensor([k for k in (4, 0, 0, 2) if k < len(held)], dtype=torch.int64)
    copies = store.deliver(store.reader(places)())
    part = store.part(1, 6)
    for name, values in expected.items():
        assert torch.equal(copies[name], values[places]) and copies[name].dtype == values.dtype
        assert torch.equal(part[name], values[1:6])
    if len(held) % 2:  # reading a whole column may bring the samples into order: now and then only
        assert all(torch.equal(store.column(name), values) for name, values in expected.items())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", STORES)
def test_a_store_holds_what_it_is_told_in_order(kind: str, seed: int, tmp_path: Path) -> None:
    """Any samples dropped, any appended: as a list of numbers would have them."""
    store, chance = opened(make_store(kind, tmp_path)), random.Random(seed)
    held, labels, given = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 0
    for _ in range(60):
        kept = torch.tensor([chance.random() < 0.7 for _ in range(len(held))], dtype=torch.bool)
        count = chance.choice([1, 2, 6])
        new = torch.tensor(
            sorted(chance.sample(range(count), min(chance.randint(0, count), 12 - int(kept.sum())))), dtype=torch.int64
        )
        numbers = torch.arange(given, given + count)
        held, labels = torch.cat([held[kept], numbers[new]]), torch.cat([labels[kept], numbers[new] % 7])
        store.update(kept, new, columns_of(numbers), labels)
        given += count
        assert_holds(store, held, labels)
        if chance.random() < 0.2:
            store.to(CPU)
            store.state()
    store.close()


@pytest.mark.parametrize("kind", STORES)
def test_a_reader_copies_the_samples_of_its_moment(kind: str, tmp_path: Path) -> None:
    store = opened(make_store(kind, tmp_path))
    numbers = torch.arange(6)
    store.update(torch.empty(0, dtype=torch.bool), numbers, columns_of(numbers), numbers)
    store.update(numbers != 1, torch.tensor([0]), columns_of(torch.tensor([9])), torch.tensor([0, 2, 3, 4, 5, 9]))
    read = store.reader(torch.tensor([5, 1]))
    store.column("x")  # may bring the samples into order meanwhile
    assert read()["number"].tolist() == [9, 2]
    copies = read()
    copies["x"].zero_()
    assert store.column("x")[:, 0].tolist() == [0, 2, 3, 4, 5, 9]


def test_both_stores_have_the_protocols_members(tmp_path: Path) -> None:
    members = {name for name in vars(Store) if not name.startswith("_")} | {*Store.__annotations__}
    for kind in STORES:
        assert members <= {*dir(make_store(kind, tmp_path))}


# -------------------------------------------------------------------------------------------------------- prefetch


def counting(generator: torch.Generator, threads: list[str]) -> Callable[[], Callable[[], Columns]]:
    def draw() -> Callable[[], Columns]:
        numbers = torch.randint(1000, (3,), generator=generator)

        def copy() -> Columns:
            threads.append(threading.current_thread().name)
            return {"number": numbers}

        return copy

    return draw


@pytest.mark.parametrize("in_thread", [True, False])
def test_a_draw_made_ahead_is_taken_once_or_undone(in_thread: bool) -> None:
    generator, twin = (torch.Generator().manual_seed(2) for _ in range(2))
    threads: list[str] = []
    prefetch, draw = Prefetch(generator), counting(generator, threads)
    before = generator.get_state()
    prefetch.start(3, draw, in_thread=in_thread)
    assert prefetch.has(3) and not prefetch.has(4)
    assert torch.equal(prefetch.generator_state(), before) and not torch.equal(generator.get_state(), before)
    prefetch.undo()
    assert not prefetch.has(3) and torch.equal(generator.get_state(), before)
    prefetch.start(5, draw, in_thread=in_thread)
    prefetch.start(3, draw, in_thread=in_thread)  # in place of the earlier one
    assert torch.equal(prefetch.take()["number"], torch.randint(1000, (3,), generator=twin))
    assert not prefetch.has(3) and torch.equal(generator.get_state(), twin.get_state())
    main = threading.current_thread().name
    assert all(name.startswith("gradmix replay buffer") if in_thread else name == main for name in threads)
    prefetch.close()
    prefetch.close()
    assert not any(thread.name.startswith("gradmix replay buffer") for thread in threading.enumerate())
    prefetch.start(3, draw, in_thread=in_thread)
    assert torch.equal(prefetch.take()["number"], torch.randint(1000, (3,), generator=twin))
    prefetch.close()


def test_a_copy_that_fails_is_raised_and_the_draw_is_undone() -> None:
    generator = torch.Generator().manual_seed(2)
    prefetch, before = Prefetch(generator), generator.get_state()

    def draw() -> Callable[[], Columns]:
        torch.rand(4, generator=generator)

        def copy() -> Columns:
            raise OSError("gone")

        return copy

    prefetch.start(3, draw, in_thread=True)
    with pytest.raises(OSError, match="gone"):
        prefetch.take()
    assert not prefetch.has(3) and torch.equal(generator.get_state(), before)
    prefetch.close()


# ----------------------------------------------------------------------------------------------------- former paths


FORMER = {
    "gradmix.buffers.ReplayBuffer": "gradmix.replay.buffer.ReplayBuffer",
    "gradmix.buffers.BufferRows": "gradmix.replay.buffer.BufferSamples",
    "gradmix.buffers.BufferPolicy": "gradmix.replay.ledger.BufferPolicy",
    "gradmix.storage.Column": "gradmix.replay.layout.Column",
    "gradmix.storage.RowFiles": "gradmix.replay.sample_files.SampleFiles",
    "gradmix.storage.DESCRIPTION": "gradmix.replay.sample_files.DESCRIPTION",
    "gradmix.storage.STAMPS": "gradmix.replay.sample_files.STAMPS",
    "gradmix.rows.CHUNK": "gradmix.replay.sources.CHUNK",
    "gradmix.rows.RowSource": "gradmix.replay.sources.SampleSource",
    "gradmix.rows.as_pair": "gradmix.replay.sources.as_pair",
    "gradmix.rows.chunks_of": "gradmix.replay.sources.chunks_of",
    "gradmix.rows.has_rows": "gradmix.replay.sources.has_samples",
    "gradmix.rows.numbered_chunks": "gradmix.replay.sources.chunks_with_numbers",
}


@pytest.mark.parametrize("former", FORMER)
def test_former_paths_lead_to_the_same_objects(former: str) -> None:
    (old, name), (new, attribute) = (path.rsplit(".", 1) for path in (former, FORMER[former]))
    stub = importlib.import_module(old)
    with pytest.warns(DeprecationWarning, match=f"{former} has moved to {FORMER[former]}"):
        found = getattr(stub, name)
    assert found is getattr(importlib.import_module(new), attribute)
