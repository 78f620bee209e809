"""The check of a whole run: what counts as one, and what ran in several processes, also in one that crashes."""

from __future__ import annotations

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


def run(folder: Path, tests: dict[str, str], *options: str, start: str = ".") -> tuple[int, str]:
    """Exit status and output of pytest in a project of its own that has this one's plugins."""
    (folder / "tests" / "part").mkdir(parents=True)
    for name in ("conftest.py", "bodies_run.py", "fast_set.py"):
        copy(HERE / name, folder / "tests")
    copy(HERE.parent / "pyproject.toml", folder)
    for name, code in tests.items():
        (folder / "tests" / f"test_{name}.py").write_text(code)
    (folder / "tests" / "part" / "test_part.py").write_text("def test_part(): ...")
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
        cwd=folder / start, env=own, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return answer.returncode, answer.stdout + answer.stderr


def test_a_whole_run_that_leaves_something_out_fails(tmp_path: Path) -> None:
    status, text = run(tmp_path, {"nothing": "def test_nothing(): ..."})
    assert status == 1 and "2 passed" in text and LEFT_OUT in text


@pytest.mark.parametrize("options, start", [(["-k", "nothing"], "."), (["tests"], "."), ([], "tests/part")], ids=str)
def test_a_part_of_the_tests_is_no_whole_run(tmp_path: Path, options: list[str], start: str) -> None:
    status, text = run(tmp_path, {"nothing": "def test_nothing(): ..."}, *options, start=start)
    assert status == 0 and "no test ran" not in text, text


def test_what_other_processes_ran_counts(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    status, text = run(tmp_path, {"one": RUNS_ONE}, "-n", "2")
    assert status == 1 and LEFT_OUT not in text and "cosine_alignment, reference: it can run here" in text, text


def test_what_a_process_ran_before_it_crashed_counts(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    status, text = run(tmp_path, {"a": RUNS_ONE, "b": CRASHES}, "-n", "1")
    assert status == 1 and "crashed while running" in text
    assert LEFT_OUT not in text and "ended before it was told to" in text, text
