"""The check of a whole run: what counts as one, and what ran in several processes, also in one that crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copy

import pytest

HERE = Path(__file__).parents[1]

RUNS_ONE = """
import torch
from gradmix.ops.cosine_alignment import cosine_alignment

def test_runs_one():
    x = torch.ones(1, 2, 3)
    cosine_alignment(x, x, backend="torch")
"""
CRASHES = """
import os, time

def test_crashes():
    time.sleep(1)
    os._exit(1)
"""
LEFT_OUT = "cosine_alignment, torch: it can run here"
"""What the summary says where no test has run it."""


def project(folder: Path, tests: dict[str, str]) -> Path:
    """A project of its own that has this one's plugins."""
    (folder / "tests" / "part").mkdir(parents=True)
    for name in ("conftest.py", "bodies_run.py", "fast_set.py", "quick_interpreter.py"):
        copy(HERE / name, folder / "tests")
    copy(HERE.parent / "pyproject.toml", folder)
    for name, code in tests.items():
        (folder / "tests" / f"test_{name}.py").write_text(code)
    (folder / "tests" / "part" / "test_part.py").write_text("def test_part(): ...")
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run([sys.executable, *words], cwd=folder, env=own, capture_output=True, text=True, check=False)


SESSIONS = """
import contextlib, io, json, os, sys
import pytest
for folder, options in json.loads(sys.argv[1]):
    os.chdir(folder)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = pytest.main(["-q", "-p", "no:cacheprovider", *options])
    print(json.dumps([int(status), text.getvalue()]))
"""


def sessions(folder: Path, *sessions: tuple[str, list[str]]) -> list[tuple[int, str]]:
    """Exit status and output of sessions in one process, each in a folder of the project and with options."""
    answer = run(folder, "-c", SESSIONS, json.dumps([(str(folder / start), options) for start, options in sessions]))
    assert answer.returncode == 0, answer.stderr
    return [tuple(json.loads(line)) for line in answer.stdout.splitlines()]


def test_a_whole_run_that_leaves_something_out_fails_and_a_part_is_no_whole_run(tmp_path: Path) -> None:
    folder = project(tmp_path, {"nothing": "def test_nothing(): ..."})
    parts = [(".", ["-k", "nothing"]), (".", ["tests"]), ("tests/part", [])]
    (status, text), *others = sessions(folder, (".", []), *parts)
    assert status == 1 and "2 passed" in text and LEFT_OUT in text
    for (status, text), part in zip(others, parts, strict=True):
        assert status == 0 and "passed" in text and "no test ran" not in text, (part, text)


def test_what_another_process_ran_before_it_crashed_counts(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    folder = project(tmp_path, {"a": RUNS_ONE, "b": CRASHES})
    # The process that crashed is not started again: what it ran is known by then, or not at all.
    answer = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "1", "--max-worker-restart", "0")
    text = answer.stdout + answer.stderr
    assert answer.returncode == 1 and "crashed while running" in text
    assert LEFT_OUT not in text and "ended before it was told to" in text, text
    assert "cosine_alignment, reference: it can run here" in text, text
