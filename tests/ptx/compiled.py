"""A process in which Triton compiles: in one that runs tests without a GPU it interprets, and cannot do both."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def prepare(cache: Path) -> None:
    """Before anything that imports Triton. Compiled kernels are kept in ``cache``."""
    os.environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    # An instruction is a few closures, of which a kernel has ten thousand: collecting them takes longer than they do.
    gc.disable()
    import torch

    torch.set_num_threads(1)
    # Uninitialised memory is NaN, so that what no program writes is seen.
    torch.use_deterministic_algorithms(True)


@contextmanager
def process(cache: Path) -> Iterator[Callable[..., Any]]:
    """Calls functions of modules in that process: ``call(function, *arguments)``."""
    with ProcessPoolExecutor(1, get_context("spawn"), prepare, (cache,)) as executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result()
