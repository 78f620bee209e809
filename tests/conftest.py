import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# One of several processes (pytest -n) has one core to itself, and a forked process would wait for ever for the threads
# that its parent had. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from quick_interpreter import make_quick

# ``python -m pytest`` puts the working directory on the path, and a checkout's gradmix/, which has no compiled part,
# would be met instead of the installed package.
CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:] = [folder for folder in sys.path if Path(folder or os.curdir).resolve() != CHECKOUT]

# Without a GPU, Triton's kernels run in its interpreter. Triton looks when a kernel is defined, so before any import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    make_quick()

# What gradmix calibrate has measured on this machine must not change which implementation a test meets.
os.environ["GRADMIX_CACHE_DIR"] = os.devnull

# torch.manual_seed also seeds devices that are not there: it keeps the call for later, with a traceback, which takes a
# millisecond, and thousands of tests seed.
for device in (torch.cuda, torch.xpu):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None

# The same examples on every run: a red test is a change's doing, not the day's.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=75)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("GRADMIX_HYPOTHESIS", "repeatable"))

pytest_plugins = ["bodies_run", "fast_set"]


@pytest.fixture(autouse=True)
def _prefer_no_backend() -> Iterator[None]:
    """What a test, or an example in a docstring, has set by ``set_backend`` is no setting of the next test."""
    yield
    backends = sys.modules.get("gradmix.ops.backends")
    if backends is not None:
        backends._preferred = None


MOST_PROCESSES = 8
"""Of ``pytest -n auto``: each collects all tests first, so that more of them save little."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist reads it
    # The cores that this process may use: in a container they are often fewer than the machine's.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


NEEDS_GPU = "needs a CUDA or ROCm device; torch sees none"


def _skip() -> None:
    pytest.skip(NEEDS_GPU)


def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: object) -> pytest.Item | None:
    """Without a GPU, a test that needs one is skipped as a whole: by their parameters they are thousands."""
    if torch.cuda.is_available() or not isinstance(collector, pytest.Module) or not collector.istestfunction(obj, name):
        return None
    marks = [*collector.iter_markers("gpu"), *(mark for mark in getattr(obj, "pytestmark", ()) if mark.name == "gpu")]
    return pytest.Function.from_parent(collector, name=name, callobj=_skip) if marks else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the parameters that need a GPU, of tests that do not need one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NEEDS_GPU))


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: no search for garbage goes over them, nor copies their pages after a fork."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
