import os
import sys
from pathlib import Path

# One of several processes (pytest -n) has one core to itself; OpenMP reads this when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# ``python -m pytest`` puts the working directory on the path, and a checkout's gradmix/, which has no compiled part,
# would be met instead of the installed package.
CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:] = [folder for folder in sys.path if Path(folder or os.curdir).resolve() != CHECKOUT]

# Without a GPU, Triton's kernels run in its interpreter. Triton looks when a kernel is defined, so before any import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run: a red test is a change's doing, not the day's.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=75)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("GRADMIX_HYPOTHESIS", "repeatable"))

pytest_plugins = ["bodies_run", "fast_set"]


MOST_PROCESSES = 8
"""Of ``pytest -n auto``: each collects all tests first, so that more of them save little."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist reads it
    # The cores that this process may use: in a container they are often fewer than the machine's.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device; torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
