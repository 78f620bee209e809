"""A replay buffer whose rows lie in a folder, and draws made ahead: everything as in memory, also after a crash."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP
from thinning import part
from torch import Tensor

import gradmix
from gradmix import ReplayBuffer
from gradmix.estimators import Network, resolve
from gradmix.replay import sample_files
from gradmix.replay.buffer import BufferSamples
from gradmix.replay.layout import Column
from gradmix.replay.sample_files import SampleFiles
from gradmix.training.loop import checkpoint

POLICIES = ("class", "balanced", "reservoir")
EXTRAS = {"logits": (5,), "seen at": ()}


def stream(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    x = (torch.rand(rows, 3, 2, generator=g) * 200).to(dtype)
    y = (torch.rand(rows, generator=g) ** 2 * 4).long()
    return x, y, {"logits": torch.randn(rows, 5, generator=g), "seen at": torch.arange(rows)}


def add(buffer: ReplayBuffer, rows: tuple[Tensor, Tensor, dict[str, Tensor]], start: int, stop: int) -> None:
    x, y, extras = rows
    buffer.add(x[start:stop], y[start:stop], **{name: value[start:stop] for name, value in extras.items()})


def assert_same_rows(mine: BufferSamples, other: BufferSamples) -> None:
    assert torch.equal(mine.x, other.x) and mine.x.dtype == other.x.dtype
    assert torch.equal(mine.y, other.y)
    assert mine.extras.keys() == other.extras.keys()
    for name, value in other.extras.items():
        assert torch.equal(mine.extras[name], value)


def assert_same(mine: ReplayBuffer, other: ReplayBuffer) -> None:
    """Both hold the same and will draw the same; it draws from both."""
    assert len(mine) == len(other) and mine.seen_per_class == other.seen_per_class
    assert mine.class_counts() == other.class_counts()
    assert torch.equal(mine.x, other.x) and torch.equal(mine.y, other.y)
    assert mine.extras.keys() == other.extras.keys()
    for name, value in other.extras.items():
        assert torch.equal(mine.extras[name], value)
    for n in (0, 1, 5, 60):
        if len(other) or n == 0:
            assert_same_rows(mine.sample_with_extras(n), other.sample_with_extras(n))
            assert all(torch.equal(a, b) for a, b in zip(mine.draw_balanced(n), other.draw_balanced(n), strict=True))
    for start, stop in ((0, 3), (2, 50), (7, 7)):
        assert all(torch.equal(a, b) for a, b in zip(mine.part(start, stop), other.part(start, stop), strict=True))


def saved(state: dict[str, Any], path: Path) -> dict[str, Any]:
    checkpoint.save({"buffer": state}, path)
    return checkpoint.load(path)["buffer"]


# ------------------------------------------------------------------------------------------------------ as in memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16, torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("capacity", [1, 7, 100])
@pytest.mark.parametrize("policy", POLICIES)
def test_it_holds_and_draws_what_one_in_memory_does(
    policy: str, capacity: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    rows = stream(150, dtype=dtype)
    mine = ReplayBuffer(capacity, policy=policy, seed=3, folder=tmp_path / "rows")
    other = ReplayBuffer(capacity, policy=policy, seed=3)
    assert_same(mine, other)
    for start, stop in ((0, 1), (1, 40), (40, 40), (40, 150)):
        add(mine, rows, start, stop)
        add(other, rows, start, stop)
        assert_same(mine, other)


def test_x_is_mapped_from_the_file_and_cannot_spoil_it(tmp_path: Path) -> None:
    rows = stream(20)
    buffer = ReplayBuffer(50, policy="reservoir", folder=tmp_path)
    add(buffer, rows, 0, 20)
    before = buffer.x.clone()
    buffer.x.zero_()
    assert torch.equal(buffer.x, before) and torch.equal(before, rows[0])


def test_rows_of_no_width_and_single_numbers(tmp_path: Path) -> None:
    mine, other = ReplayBuffer(4, folder=tmp_path), ReplayBuffer(4)
    for buffer in (mine, other):
        buffer.add(torch.empty(6, 0), torch.zeros(6, dtype=torch.int64), number=torch.arange(6.0))
    assert_same(mine, other)


def test_a_reference_gradient_reads_it_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 3, 8, 8, generator=g), torch.randint(5, (40,), generator=g)
    mine, other = ReplayBuffer(5, folder=tmp_path), ReplayBuffer(5)
    for buffer in (mine, other):
        buffer.add(x, y)
        buffer.add(x.flip(0), y.flip(0))
    model = MLP()
    expected = gradmix.reference_gradient(model, other, chunk_size=8)
    monkeypatch.setattr(ReplayBuffer, "x", property(lambda self: pytest.fail("read as a whole")))
    assert torch.equal(gradmix.reference_gradient(model, mine, chunk_size=8), expected)
    jvp = resolve("jvp", Network(model, None, None, 8, "auto"))
    assert sum(len(part) for part in jvp.reference(mine, mine.part(0, 1)[0], keep=3)[1]) == 15


# --------------------------------------------------------------------------------------------------- drawing it ahead


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
@pytest.mark.parametrize("seed", range(6))
def test_drawing_ahead_changes_nothing(seed: int, in_folder: bool, tmp_path: Path) -> None:
    rows = stream(400)
    mine = ReplayBuffer(9, policy="balanced", folder=tmp_path / "a" if in_folder else None)
    other = ReplayBuffer(9, policy="balanced")
    chance = random.Random(seed)
    own, its = (torch.Generator().manual_seed(7) for _ in "ab")
    add(mine, rows, 0, 5)
    add(other, rows, 0, 5)
    done = 5
    for _ in range(120):
        what = chance.choice(["ahead", "ahead", "sample", "sample", "add", "balanced", "given", "state", "again"])
        n = chance.choice([3, 3, 3, 12])
        if what == "ahead":
            mine.prefetch(n)
        elif what == "sample":
            assert_same_rows(mine.sample_with_extras(n), other.sample_with_extras(n))
        elif what == "add":
            size = chance.choice([0, 1, 2])
            for buffer in (mine, other):
                add(buffer, rows, done, done + size)
            done += size
        elif what == "balanced":
            assert torch.equal(mine.draw_balanced(n)[0], other.draw_balanced(n)[0])
        elif what == "given":
            assert torch.equal(mine.sample(n, own)[0], other.sample(n, its)[0])
        elif what == "state":
            state, known = mine.state_dict(), other.state_dict()
            assert torch.equal(state["draw_generator"], known["draw_generator"])
            assert torch.equal(state["keys"], known["keys"])
        else:
            mine.load_state_dict(mine.state_dict())
    assert_same(mine, other)


def test_ahead_is_ahead_and_in_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    buffer = ReplayBuffer(50, folder=tmp_path)
    add(buffer, stream(40), 0, 40)
    readers: list[str] = []
    read = SampleFiles.read

    def noted(self: SampleFiles, *args: Any, **more: Any) -> Any:
        readers.append(threading.current_thread().name)
        return read(self, *args, **more)

    monkeypatch.setattr(SampleFiles, "read", noted)
    for _ in range(3):
        buffer.prefetch(6)
        buffer.sample(6)
    assert len(readers) == 3 and all(name.startswith("gradmix replay buffer") for name in readers)
    with pytest.raises(ValueError, match="n: got -1"):
        buffer.prefetch(-1)
    with pytest.raises(ValueError, match="the buffer is empty"):
        ReplayBuffer(3).prefetch(2)


def test_a_read_that_fails_ahead_is_raised_and_taken_back(tmp_path: Path) -> None:
    buffer, other = ReplayBuffer(50, folder=tmp_path), ReplayBuffer(50)
    for b in (buffer, other):
        add(b, stream(40), 0, 40)
    file = tmp_path / "column-0.bin"
    content = file.read_bytes()
    os.truncate(file, 10)
    buffer.prefetch(30)
    with pytest.raises(OSError, match="the file ends before sample") as caught:
        buffer.sample(30)
    assert caught.value.filename == str(file)
    file.write_bytes(content)
    assert_same_rows(buffer.sample_with_extras(30), other.sample_with_extras(30))


# ---------------------------------------------------------------------------------------------------- going on with it


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", part(range(2), 2))
def test_it_goes_on_identically_after_crashes(seed: int, policy: str, tmp_path: Path) -> None:
    """Crashes at any moment, also after a state was taken that was not saved any more."""
    rows, folder, chance = stream(600), tmp_path / "rows", random.Random(seed)

    def new(where: Path | None) -> ReplayBuffer:
        return ReplayBuffer(6, policy=policy, folder=where)

    mine: ReplayBuffer | None = new(folder)
    last, at = saved(mine.state_dict(), tmp_path / "state"), 0
    done = crashes = 0
    while done < 600:
        assert mine is not None
        what = chance.choice(["add"] * 4 + ["save", "crash", "crash after a state", "ahead", "draw"])
        if what == "add":
            size = chance.choice([0, 1, 7, 30])
            add(mine, rows, done, done + size)
            done = min(600, done + size)
        elif what == "save":
            last, at = saved(mine.state_dict(), tmp_path / "state"), done
        elif what == "ahead" and len(mine):
            mine.prefetch(4)
        elif what == "draw" and len(mine):
            mine.sample(4)
        elif what.startswith("crash"):
            if what == "crash after a state":
                mine.state_dict()
                add(mine, rows, done, done + 40)
            mine = None
            gc.collect()
            mine = new(folder)
            mine.load_state_dict(last)
            done, crashes = at, crashes + 1
            other = new(None)
            add(other, rows, 0, at)
            assert torch.equal(mine.y, other.y)
            if at:
                assert torch.equal(mine.x, other.x) and torch.equal(mine.extras["logits"], other.extras["logits"])
            if crashes == 5:
                break
    # What was drawn differs; what is held must not.
    other = new(None)
    add(other, rows, 0, done)
    assert torch.equal(mine.x, other.x) and torch.equal(mine.y, other.y)
    # Room for what two states may still need, not for everything that ever was.
    held = max(1, len(other))
    assert (folder / sample_files.STAMPS).stat().st_size / 8 <= 4 * (held + 40)


def test_draws_go_on_identically_from_a_state_with_a_draw_ahead(tmp_path: Path) -> None:
    first = ReplayBuffer(30, folder=tmp_path / "a")
    add(first, stream(40), 0, 40)
    first.sample(7)
    first.prefetch(7)
    state = saved(first.state_dict(), tmp_path / "state")
    expected = [first.sample_with_extras(n) for n in (7, 3, 7)]
    del first
    gc.collect()
    second = ReplayBuffer(30, folder=tmp_path / "a")
    second.load_state_dict(state)
    for rows in expected:
        assert_same_rows(second.sample_with_extras(len(rows.y)), rows)


KILLED = """
import sys, torch
from pathlib import Path
from gradmix import ReplayBuffer
from gradmix.training.loop import checkpoint
from test_storage import add, stream
folder = Path(sys.argv[1])
rows = stream(600)
buffer, step = ReplayBuffer(6, policy="balanced", folder=folder / "rows"), 0
if (folder / "state").exists():
    told = checkpoint.load(folder / "state")
    buffer.load_state_dict(told["buffer"])
    step = told["step"]
while True:
    step += 1
    start = step * 7 % 580
    add(buffer, rows, start, start + 20)
    buffer.prefetch(3)
    if step % 3 == 0:
        checkpoint.save({"buffer": buffer.state_dict(), "step": step}, folder / "state")
        print(step, flush=True)
"""


def test_a_process_that_is_killed_leaves_what_its_last_state_needs(tmp_path: Path) -> None:
    chance = random.Random(3)
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        here = Path(__file__).parent
        known = os.pathsep.join(map(str, (here, here.parent, Path(gradmix.__file__).parents[1])))
        environment = os.environ | {"PYTHONPATH": known, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=tmp_path, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            time.sleep(chance.random() / 2)
            process.send_signal(signal.SIGKILL)
        told = checkpoint.load(tmp_path / "state")
        mine, other = ReplayBuffer(6, policy="balanced", folder=tmp_path / "rows"), ReplayBuffer(6, policy="balanced")
        mine.load_state_dict(told["buffer"])
        rows = stream(600)
        for step in range(1, told["step"] + 1):
            add(other, rows, step * 7 % 580, step * 7 % 580 + 20)
        assert torch.equal(mine.x, other.x) and torch.equal(mine.y, other.y)
        assert mine.seen == other.seen
        del mine
        gc.collect()


def test_an_older_state_than_the_last_two_is_refused_once_overwritten(tmp_path: Path) -> None:
    x, _, _ = stream(50)
    buffer = ReplayBuffer(6, policy="balanced", folder=tmp_path)
    states, held = [], []
    for label in range(5):  # each class takes room from those before
        buffer.add(x[10 * label :][:10], torch.full((10,), label))
        states.append(buffer.state_dict())
        held.append(buffer.x.clone())
    for k in (4, 3):
        buffer.load_state_dict(states[k])
        assert torch.equal(buffer.x, held[k])
    with pytest.raises(ValueError, match=r"of the state's 6 samples in .* have been overwritten since"):
        buffer.load_state_dict(states[0])
    assert torch.equal(buffer.x, held[3])


# ------------------------------------------------------------------------------------------------------------- errors


def other_files(folder: Path) -> None:
    (folder / "photo.jpg").write_bytes(b"")


def another_buffer(folder: Path) -> None:
    add(ReplayBuffer(3, folder=folder), stream(9), 0, 9)
    gc.collect()


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    other_files(tmp_path)
    with pytest.raises(ValueError, match="is not empty and holds no replay buffer"):
        ReplayBuffer(3, folder=tmp_path)
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        ReplayBuffer(3, folder=tmp_path / "photo.jpg")
    with pytest.raises(TypeError, match="folder: got int"):
        ReplayBuffer(3, folder=3)  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_the_folder_of_another_buffer_is_left_alone(tmp_path: Path) -> None:
    another_buffer(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    buffer = ReplayBuffer(3, folder=tmp_path)
    with pytest.raises(ValueError, match="holds the samples of another buffer, expected a new or empty folder"):
        add(buffer, stream(9), 0, 9)
    stranger = ReplayBuffer(3, folder=tmp_path / "stranger")
    add(stranger, stream(9), 0, 9)
    with pytest.raises(ValueError, match="holds the samples of another buffer than the state's"):
        buffer.load_state_dict(stranger.state_dict())
    assert len(buffer) == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_one_buffer_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="the system has no advisory locks")
    first = ReplayBuffer(3, folder=tmp_path)
    add(first, stream(9), 0, 9)
    state, held = first.state_dict(), first.x.clone()
    second = ReplayBuffer(3, folder=tmp_path)
    with pytest.raises(ValueError, match="is in use by another buffer"):
        second.load_state_dict(state)
    del first
    gc.collect()
    second.load_state_dict(state)
    assert torch.equal(second.x, held)


def test_states_and_folders_go_together(tmp_path: Path) -> None:
    inside, outside = ReplayBuffer(3, folder=tmp_path / "a"), ReplayBuffer(3)
    for buffer in (inside, outside):
        add(buffer, stream(9), 0, 9)
    with pytest.raises(ValueError, match="has its samples in a folder, expected a buffer made with folder= to name it"):
        outside.load_state_dict(inside.state_dict())
    with pytest.raises(ValueError, match="has its samples in the state, expected a buffer made with folder=None"):
        inside.load_state_dict(outside.state_dict())
    with pytest.raises(ValueError, match="does not hold the samples that the state speaks of"):
        ReplayBuffer(3, folder=tmp_path / "b").load_state_dict(inside.state_dict())
    assert not (tmp_path / "b").exists()


BROKEN = {
    "no slots": lambda files: files.pop("slots"),
    "no columns": lambda files: files.pop("columns"),
    "a slot twice": lambda files: files["slots"].fill_(1),
    "a negative slot": lambda files: files["slots"].sub_(1),
    "a slot that there is no room for": lambda files: files["slots"].add_(1000),
    "too few": lambda files: files.update(slots=files["slots"][1:]),
    "other stamps": lambda files: files["stamps"].add_(1),
    "other columns": lambda files: files["columns"]["x"].update(shape=[7]),
    "an unknown dtype": lambda files: files["columns"]["x"].update(dtype="float3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_states_are_refused_and_change_nothing(case: str, tmp_path: Path) -> None:
    buffer, other = ReplayBuffer(3, folder=tmp_path), ReplayBuffer(3)
    for b in (buffer, other):
        add(b, stream(9), 0, 9)
    state = buffer.state_dict()
    BROKEN[case](state["files"])
    with pytest.raises(ValueError, match="state|folder"):
        buffer.load_state_dict(state)
    assert_same(buffer, other)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_an_error_that_leaves_the_buffer_as_it_was(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, call):
        pytest.skip(f"the system has no {call}")
    rows = stream(60)
    buffer, other = ReplayBuffer(9, folder=tmp_path), ReplayBuffer(9)
    for b in (buffer, other):
        add(b, rows, 0, 5)

    def full(*_args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match=r"No space left on device; \d+ bytes more were wanted") as caught:
            add(buffer, rows, 5, 60)
    assert caught.value.errno == errno.ENOSPC and Path(caught.value.filename).parent == tmp_path
    for b in (buffer, other):
        add(b, rows, 5, 60)
    assert_same(buffer, other)


def test_a_disk_that_fails_half_way_leaves_the_buffer_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = stream(200)
    buffer, other = (ReplayBuffer(9, policy="reservoir", folder=folder) for folder in (tmp_path, None))
    for b in (buffer, other):
        add(b, rows, 0, 20)
    real, left = os.pwrite, [2]

    def fails(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails)
        with pytest.raises(OSError, match="Input/output error"):
            add(buffer, rows, 20, 200)
    assert left[0] < 0
    assert_same(buffer, other)
    for b in (buffer, other):
        add(b, rows, 20, 200)
    assert_same(buffer, other)


def test_a_closed_buffer_leaves_its_folder_to_others(tmp_path: Path) -> None:
    rows, before = stream(40), set(threading.enumerate())
    buffer, other, expected = ReplayBuffer(9, folder=tmp_path), ReplayBuffer(9, folder=tmp_path), ReplayBuffer(9)
    for b in (buffer, expected):
        add(b, rows, 0, 20)
    state = buffer.state_dict()
    buffer.prefetch(3)
    buffer.close()
    buffer.close()
    assert set(threading.enumerate()) <= before
    for use in (lambda: buffer.sample(3), lambda: buffer.x, lambda: add(buffer, rows, 20, 40)):
        with pytest.raises(ValueError, match="has been closed"):
            use()
    other.load_state_dict(state)
    assert_same(other, expected)
    state = other.state_dict()
    other.close()
    other.load_state_dict(state)
    other.prefetch(2)
    for b in (other, expected):
        add(b, rows, 20, 40)
    assert_same(other, expected)


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = ReplayBuffer(9, folder=tmp_path / "rows")
    real = os.open

    def read_only(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(PermissionError, match="Permission denied"):
        add(buffer, stream(5), 0, 5)
    monkeypatch.undo()
    add(buffer, stream(5), 0, 5)
    assert len(buffer) == 5


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    another_buffer(tmp_path)
    path = tmp_path / sample_files.DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="is of format 99, expected at most 1"):
        add(ReplayBuffer(3, folder=tmp_path), stream(9), 0, 9)
    path.write_text("[]")
    with pytest.raises(ValueError, match="does not describe a replay buffer"):
        add(ReplayBuffer(3, folder=tmp_path), stream(9), 0, 9)


# --------------------------------------------------------------------------------------------------------- SampleFiles


@pytest.mark.parametrize("preadv", [True, False], ids=["preadv", "pread"])
def test_slots_in_any_order_and_more_than_once(preadv: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not preadv:
        monkeypatch.delattr(os, "preadv", raising=False)
    files = SampleFiles(tmp_path)
    files.create({"a": Column((2,), torch.int32)})
    files.reserve(20)
    values = torch.arange(40, dtype=torch.int32).view(20, 2)
    order = torch.randperm(20)
    stamps = files.write(order, {"a": values[order]})
    assert len(stamps.unique()) == 20
    for slots in ([], [3], [4, 5, 6], [6, 5, 4], [19, 0, 0, 7, 19, 8, 9]):
        assert torch.equal(files.read(torch.tensor(slots, dtype=torch.int64))["a"], values[slots])
    assert torch.equal(files.map_column("a", 20), values)
