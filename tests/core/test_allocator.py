"""Memory that the C library keeps: blocks no longer come from the system one by one."""

import ctypes
import sys
from pathlib import Path

import pytest
from fresh import run_python

from gradmix.cli import experiment, main, train
from gradmix.runtime import allocator

PROGRAM = """
import ctypes, torch
from gradmix.runtime.allocator import keep_freed_memory

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", *"abcdef")]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Info

def mapped():
    # Blocks of 64 MiB that are taken from the system for a tensor alone.
    before = library.mallinfo2().hblks
    block = torch.empty(1 << 24)
    return library.mallinfo2().hblks - before

print(mapped(), keep_freed_memory(), mapped())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="the C library is no glibc since 2.33",
)
def test_large_blocks_are_kept() -> None:
    assert run_python(PROGRAM) == ["1 True 0"]


def test_where_it_cannot_be_asked_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert allocator.keep_freed_memory() is False


@pytest.mark.parametrize("command", ["train", "experiment"])
def test_training_on_the_command_line_asks_for_it(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    for module in (train, experiment):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: asked.append(command))
    few = ["--epochs", "1"] if command == "train" else []
    arguments = {
        "train": ["train", "--methods", "er", "--seeds", "0", *few, "--output", str(tmp_path / "run")],
        "experiment": ["experiment", "digits", "--seeds", "0", "--arms", "er", "--output", str(tmp_path)],
    }[command]
    assert main(arguments) == 0, capsys.readouterr().err
    assert asked == [command]
