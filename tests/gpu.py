"""What every test on a GPU may need: poisoned memory, other streams, a captured graph, a watch for waits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")


def poison_free_memory() -> None:
    """What torch hands out next, uninitialised, is NaN."""
    for elements in (1 << 8, 1 << 14, 1 << 18, 1 << 22):
        kept = [torch.full((elements,), torch.nan, device="cuda") for _ in range(8)]
        del kept


def on_other_streams(call: Callable[[], Result]) -> list[Result]:
    """The results of calls queued back to back on three streams, five on each."""
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(call())
    torch.cuda.synchronize()
    return results


def captured(call: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of ``call``, which was made once before, and the result that its replays overwrite."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any synchronisation with the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
