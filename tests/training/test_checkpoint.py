"""Checkpoints: what goes in comes out, nothing else goes in, and no failure costs the one written before."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter, OrderedDict, namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Forked, run_code
from patience import PATIENCE
from torch import nn

from gradmix.training.loop import checkpoint
from gradmix.training.loop.checkpoint import CheckpointError, load, remove, save
from gradmix.training.loop.random_state import restore_rng, rng_state

SETTINGS = {
    "method": "er",
    "optim": {"lr": 0.1, "batch": 16, "lr_milestones": [0.5]},
    "replay": {"size": 8, "batch": 16},
}
RUN = json.dumps(SETTINGS, indent=1)
RUN_YAML = "method: er\noptim:\n  lr: 0.1\n  batch: 16\nreplay:\n  size: 8\n  batch: 16\n"
CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".checkpoints" / "er-seed-0.pt"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


# --------------------------------------------------------------------------------------------------- there and back

STATES = {
    "empty": {},
    "plain": {"none": None, "yes": True, "int": -(2**100), "float": 0.1, "nan": float("nan"), "text": "α\n\0"},
    "nested": {"a": [1, (2.0, [None, {"b": ()}])], "state": {0: {"momentum_buffer": torch.ones(3)}, 1: {}}},
    "dtypes": {
        str(d): torch.ones(2, 3).to(d) for d in (torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64)
    },
    "awkward tensors": {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "view": torch.arange(12.0)[::3]},
    "generator": {"rng": torch.Generator().manual_seed(7).get_state()},
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_comes_back_as_it_was(case: str, path: Path) -> None:
    save(STATES[case], path, run=RUN)
    assert same(load(path, run=RUN), STATES[case]) and same(load(path), STATES[case])
    assert names(path.parent) == [path.name]
    save({"later": 1}, path)
    assert load(path) == {"later": 1}


def test_the_states_of_a_model_and_an_optimiser_come_back(path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(5, 3)).square().sum().backward()
    optimiser.step()
    assert isinstance(model.state_dict(), OrderedDict)
    save({"model": model.state_dict(), "optimiser": optimiser.state_dict()}, path)
    state = load(path)
    twin = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    twin.load_state_dict(state["model"])
    assert same(dict(twin.state_dict()), dict(model.state_dict()))
    assert type(state["model"]) is dict and same(state["optimiser"], optimiser.state_dict())


def test_a_part_of_a_storage_is_saved_without_the_rest(path: Path) -> None:
    save({"x": torch.zeros(1_000_000)[:2]}, path)
    assert path.stat().st_size < 10_000 and torch.equal(load(path)["x"], torch.zeros(2))


def test_the_file_is_one_of_torch(path: Path) -> None:
    save({"x": torch.ones(2)}, path, run=RUN)
    found = torch.load(path, weights_only=True)
    assert (found["format"], found["run"], list(found["state"])) == (checkpoint.FORMAT, RUN, ["x"])


def test_the_file_has_the_usual_permissions(path: Path) -> None:
    save({}, path)
    plain = path.parent / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


# ------------------------------------------------------------------------------------------------ what is refused

Pair = namedtuple("Pair", "a b")

REFUSED = {
    "array": ({"model": {"w": np.ones(2)}}, r"state\['model'\]\['w'\]: got numpy.ndarray, expected a tensor, str"),
    "numpy float": ({"a": [0.0, np.float64(1)]}, r"state\['a'\]\[1\]: got numpy.float64"),
    "version of torch": ({"a": {"torch": torch.__version__}}, r"state\['a'\]\['torch'\]: got torch.*TorchVersion"),
    "path": ({"a": (Path("x"),)}, r"state\['a'\]\[0\]: got pathlib"),
    "counter": ({"schedule": {"milestones": Counter([2])}}, r"state\['schedule'\]\['milestones'\]: got collections"),
    "named tuple": ({"a": Pair(1, 2)}, r"state\['a'\]: got .*Pair"),
    "set": ({"a": {1}}, r"state\['a'\]: got builtins.set"),
    "bytes": ({"a": b"x"}, r"state\['a'\]: got builtins.bytes"),
    "function": ({"a": print}, r"state\['a'\]: got builtins.builtin_function_or_method"),
    "dtype": ({"a": torch.float32}, r"state\['a'\]: got torch.dtype"),
    "device": ({"a": CPU}, r"state\['a'\]: got torch.device"),
    "tensor of no values": ({"a": torch.empty(2, device="meta")}, r"state\['a'\]: got a tensor of layout .* on meta"),
    "sparse tensor": ({"a": torch.eye(2).to_sparse()}, r"state\['a'\]: got a tensor of layout torch.sparse_coo"),
    "key": ({"a": {(1, 2): 0}}, r"state\['a'\]: got a key \(1, 2\) \(tuple\), expected str or int"),
    "bool key": ({True: 0}, r"state: got a key True \(bool\)"),
    "no dict": ([1], "state: got list, expected a dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_read_back_is_refused_by_its_keys(case: str, path: Path) -> None:
    state, message = REFUSED[case]
    save({"kept": 1}, path)
    with pytest.raises(TypeError, match=message):
        save(state, path)
    assert load(path) == {"kept": 1} and names(path.parent) == [path.name]


@pytest.mark.parametrize("run", [RUN, RUN_YAML], ids=["json", "yaml"])
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(path: Path, run: str) -> None:
    save({}, path, run=run)
    other = re.sub(r"(lr\W+)0.1", r"\g<1>0.05", re.sub(r"(size\W+)8", r"\g<1>16", run))
    with pytest.raises(CheckpointError) as refusal:
        load(path, run=other)
    message = str(refusal.value)
    assert message.startswith(f"{path}: belongs to another run: ")
    assert "the checkpoint has 'optim.lr: 0.1', 'replay.size: 8'" in message
    assert "this run has 'optim.lr: 0.05', 'replay.size: 16'" in message
    assert "batch" not in message, "lines that agree are not shown"


@pytest.mark.parametrize("lines", [7, 400])
def test_many_differing_lines_are_counted(lines: int, path: Path) -> None:
    save({}, path, run="".join(f"k{i}: 1\n" for i in range(lines)))
    with pytest.raises(CheckpointError, match=rf"'k5: 1' and {lines - 6} more; this run has 'k0: 2'"):
        load(path, run="".join(f"k{i}: 2\n" for i in range(lines)))


def test_a_checkpoint_that_names_no_run_belongs_to_none(path: Path) -> None:
    save({}, path)
    with pytest.raises(CheckpointError, match="belongs to another run: this run has 'a: 1'"):
        load(path, run="a: 1")


def test_a_later_format_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    monkeypatch.setattr(checkpoint, "__version__", "7.1")
    save({}, path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="written by gradmix 7.1 in format 99, expected at most 1"):
        load(path)


# ---------------------------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_is_seen(path: Path) -> None:
    save({"x": torch.arange(4.0), "text": "a"}, path, run=RUN)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged|not a checkpoint"):
            load(path)
    path.write_bytes(whole)
    assert load(path)["text"] == "a"


DAMAGE = {
    "empty": (lambda b: b"", "the checkpoint is empty"),
    "one byte short": (lambda b: b[:-1], "cut off, or not a checkpoint"),
    "half": (lambda b: b[: len(b) // 2], "cut off, or not a checkpoint"),
    "no seal": (lambda b: b[:-90], "cut off, or not a checkpoint"),
    "beginning lost": (lambda b: b[512:], "damaged, its bytes do not match"),
    "one byte more": (lambda b: b + b"\0", "not a checkpoint"),
    "zeros in the middle": (lambda b: b[:600] + bytes(64) + b[664:], "damaged, its bytes do not match"),
    "all zeros": (lambda b: bytes(len(b)), "not a checkpoint of gradmix, its closing digest is missing"),
    "two of them": (lambda b: b + b, "damaged, its bytes do not match"),
    "text": (lambda b: b"epoch,loss\n" * 50, "not a checkpoint of gradmix"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_refused_and_named(case: str, path: Path) -> None:
    spoil, message = DAMAGE[case]
    save({"x": torch.arange(400.0)}, path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as refusal:
        load(path)
    assert str(path) in str(refusal.value) and "to start the run again" in str(refusal.value)


def test_a_file_of_torch_alone_is_refused(path: Path) -> None:
    path.parent.mkdir()
    torch.save({"format": 1, "state": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of gradmix"):
        load(path)


def test_code_in_a_sealed_file_is_not_run(path: Path) -> None:
    archive = io.BytesIO()
    torch.save({"format": 1, "run": None, "state": {"a": Counter([1]), "b": print}}, archive)
    path.parent.mkdir()
    path.write_bytes(checkpoint._add_seal(archive.getvalue()))
    with pytest.raises(CheckpointError, match="whole, but torch .* cannot read it"):
        load(path)


def test_a_missing_file_and_a_folder_are_named(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"er-seed-0\.pt: no such checkpoint"):
        load(path)
    path.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="could not be written .*; there is no earlier checkpoint"):
        save({}, path)
    assert names(path.parent) == [path.name]


# --------------------------------------------------------------------------------------------- writing that goes wrong


def failing(error: BaseException, after: int):
    """A writer that lets ``after`` bytes through, then fails."""
    write = Path.write_bytes

    def limited(path: Path, data: bytes) -> int:
        write(path, data[:after])
        raise error

    return limited


FULL, BROKEN = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [0, 1, 2500])
@pytest.mark.parametrize("error", [FULL, BROKEN], ids=["full", "broken"])
def test_a_failed_write_leaves_the_previous_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, after: int, before: bool
) -> None:
    if before:
        save({"x": torch.ones(3)}, path)
    monkeypatch.setattr(Path, "write_bytes", failing(error, after))
    kept = "the previous checkpoint is intact" if before else "there is no earlier checkpoint"
    with pytest.raises(CheckpointError, match=rf"er-seed-0\.pt: .*could not be written \({error.strerror}\); {kept}"):
        save({"x": torch.zeros(5000)}, path)
    monkeypatch.undo()
    assert names(path.parent) == [path.name] * before
    if before:
        assert torch.equal(load(path)["x"], torch.ones(3))


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_last_moment_costs_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: object) -> None:
        raise BROKEN

    save({"a": 1}, path)
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save({"a": 2}, path)
    monkeypatch.undo()
    assert load(path) == {"a": 1} and names(path.parent) == [path.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["Ctrl-C", "no memory"])
def test_other_ends_pass_through_and_leave_the_previous_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    save({"a": 1}, path)
    monkeypatch.setattr(Path, "write_bytes", failing(error, 1000))
    with pytest.raises(type(error)):
        save({"x": torch.zeros(5000)}, path)
    monkeypatch.undo()
    assert load(path) == {"a": 1} and names(path.parent) == [path.name]


def test_a_file_system_that_cannot_sync_folders_will_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save({"a": 1}, path)
    assert load(path) == {"a": 1}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on the size of files are tried on Linux")
def test_the_systems_own_limit_leaves_the_previous_one(path: Path) -> None:
    lines = run_code(
        f"""
import resource, signal, torch
from pathlib import Path
from gradmix.training.loop.checkpoint import CheckpointError, load, save
path = Path({str(path)!r})
save({{"x": torch.ones(3)}}, path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    save({{"x": torch.zeros(100_000)}}, path)
except CheckpointError as error:
    print(error)
print(load(path)["x"].tolist(), [entry.name for entry in path.parent.iterdir()])
""",
        path.parent.parent,
    )
    assert lines == [
        f"{path}: the checkpoint could not be written (File too large); the previous checkpoint is intact",
        f"[1.0, 1.0, 1.0] ['{path.name}']",
    ]


# ---------------------------------------------------------------------------------------------------------- killing

DYING = """
import os, signal, sys
from pathlib import Path
from gradmix.training.loop import checkpoint
path = Path({path!r})
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write, replace = Path.write_bytes, os.replace
places = {{
    "first byte": (Path, "write_bytes", lambda path, _: die(path.touch())),
    "middle": (Path, "write_bytes", lambda path, data: die(write(path, data[:1000]))),
    "all written": (os, "fsync", die),
    "before the name": (os, "replace", die),
    "after the name": (os, "replace", lambda *a: die(replace(*a))),
}}
for place, (where, name, call) in places.items():
    checkpoint.save({{"a": "before"}}, path)
    if (child := os.fork()) == 0:
        setattr(where, name, call)
        checkpoint.save({{"a": "after"}}, path)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    files = [entry.name for entry in path.parent.iterdir()]
    print(place, killed, checkpoint.load(path)["a"], len(files), sep=", ")
checkpoint.save({{"a": "later"}}, path)
print(os.listdir(path.parent) == [path.name])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer is killed in a forked process")
def test_a_writer_killed_at_each_step_leaves_a_whole_checkpoint(path: Path) -> None:
    assert run_code(DYING.format(path=str(path)), path.parent.parent) == [
        "first byte, -9, before, 2",
        "middle, -9, before, 2",
        "all written, -9, before, 2",
        "before the name, -9, before, 2",
        "after the name, -9, after, 1",
        "True",
    ]


def write_checkpoints(path: Path) -> None:
    for number in itertools.count(1):
        save({"number": number, "x": torch.full((500_000,), float(number))}, path)
        print(number)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer is killed in a forked process")
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(path: Path) -> None:
    for pause in (0.0, 0.003, 0.011, 0.029):
        process = Forked(partial(write_checkpoints, path), path.parent.parent)
        until = time.monotonic() + PATIENCE
        while not process.printed() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(pause)
        ended = process.kill()
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        written = max(map(int, ended.stdout.split()))
        state = load(path)
        assert state["number"] in (written, written + 1)
        assert torch.equal(state["x"], torch.full((500_000,), float(state["number"])))
    save({"number": 0}, path)
    assert names(path.parent) == [path.name], "what the killed ones left is cleaned up"


def test_a_leftover_is_removed_and_those_of_other_checkpoints_are_not(path: Path) -> None:
    left, other = path.with_name(f".{path.name}"), path.with_name(".er-seed-01.pt")
    save({}, path)
    other.write_bytes(b"of another checkpoint")
    for clean in (lambda: save({"a": 1}, path), lambda: remove(path)):
        left.write_bytes(b"half")
        clean()
        assert not left.exists()
    assert names(path.parent) == [other.name]
    remove(path)
    remove(path.parent / "never" / "there.pt")


# ---------------------------------------------------------------------------------------------------- random numbers


def draws() -> list[object]:
    return [
        torch.randn(3).tolist(),
        torch.randint(1 << 40, (2,)).tolist(),
        np.random.normal(size=3).tolist(),
        np.random.randint(1 << 30),
        random.random(),
        random.gauss(0, 1),
    ]


@pytest.mark.parametrize("before", [0, 1, 7, 700])
def test_all_global_generators_go_on_where_they_were(path: Path, before: int) -> None:
    kept = rng_state(CPU)
    try:
        random.seed(1)
        np.random.seed(2)
        # Odd numbers of normal draws: each generator keeps the second of a pair for later.
        for _ in range(before):
            torch.randn(1), np.random.normal(), random.gauss(0, 1)
        save({"rng": rng_state(CPU)}, path)
        expected = draws()
        assert draws() != expected
        restore_rng(load(path)["rng"], CPU)
        assert draws() == expected
    finally:
        restore_rng(kept, CPU)


def test_a_state_from_a_gpu_is_not_restored_without_one() -> None:
    state = rng_state(CPU)
    with pytest.raises(ValueError, match="device: got cpu, but the state was taken with a GPU"):
        restore_rng({**state, "cuda": torch.zeros(16, dtype=torch.uint8)}, CPU)
    with pytest.raises(ValueError, match="device: got cuda:0, but the state was taken without a GPU"):
        restore_rng(state, torch.device("cuda:0"))


@pytest.mark.gpu
def test_the_generator_of_a_gpu_goes_on_where_it_was(path: Path) -> None:
    device = torch.device("cuda")
    torch.randn(5, device=device)
    save({"rng": rng_state(device)}, path)
    expected = torch.randn(9, device=device)
    restore_rng(load(path)["rng"], device)
    assert torch.equal(torch.randn(9, device=device), expected)
