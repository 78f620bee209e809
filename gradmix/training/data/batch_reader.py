"""Batches read by worker processes, in the order planned: samples are decoded while the device computes."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gradmix.training.data.image_files import DamagedImageError


class Items(Protocol):
    """A map-style data set of tensors that have one shape and dtype."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor:
        """The sample, ``(...)``; :class:`~gradmix.training.data.image_files.DamagedImageError` if it cannot be had."""
        ...


class ReadBatch(NamedTuple):
    """The samples of one plan.

    Args:
        samples: ``(m, ...)``, in the plan's order; ``m`` is the plan's length ``n`` unless damaged samples were left
            out.
        kept: ``(n,)`` bool, which places of the plan came; None: all.
    """

    samples: Tensor
    kept: Tensor | None


class BatchReader:
    """Reads the samples of one plan after the other, ahead of their use, in worker processes.

    Batches come strictly in the order of the plans and are the same whatever ``workers`` is. Plans are pulled from
    their iterator in this process, when a worker is about to need them: up to ``workers * prefetch`` lie ahead of the
    batch that was yielded last. An iteration that ends early (by ``break``, an exception, Ctrl-C, or :meth:`close`)
    stops its workers; the next one goes on with the first batch that was not yielded, and no plan is lost.

    Workers do nothing but read ``items``. They draw no random numbers, and none are taken from torch's global
    generators here. They are started as :mod:`multiprocessing` starts processes by default, by a fork on Linux up to
    Python 3.13. A process that has used a GPU may fork them, as long as ``items`` do not touch it: decoding does not.
    They end with this process, within seconds also if that is killed.

    >>> reader = BatchReader(torch.arange(6.0), [torch.tensor([5, 0]), torch.tensor([2])])
    >>> [batch.samples.tolist() for batch in reader]
    [[5.0, 0.0], [2.0]]

    Args:
        items: A map-style data set whose samples are tensors; picklable if processes are not forked.
        plans: The samples of each batch, 1-D int64 tensors of indices into ``items``, finite or not.
        workers: Worker processes; 0: samples are read in this process, when they are asked for.
        pin_memory: Whether samples lie in page-locked memory, from which copies to a GPU need not be waited for.
            Without CUDA they never do.
        on_damage: What a :class:`~gradmix.training.data.image_files.DamagedImageError` does: ``stop`` the reading, or
            ``skip`` the sample, which is then named in a warning when it first occurs, and in :attr:`damaged`.
        prefetch: Batches in the making for each worker, at least 1.

    Raises:
        TypeError: ``items`` has no length.
        ValueError: ``workers``, ``prefetch`` or ``on_damage`` is none of the values above.
    """

    def __init__(
        self,
        items: Items,
        plans: Iterable[Tensor],
        *,
        workers: int = 0,
        pin_memory: bool = False,
        on_damage: Literal["stop", "skip"] = "stop",
        prefetch: int = 2,
    ) -> None:
        for name, value, least in (("workers", workers, 0), ("prefetch", prefetch, 1)):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")
        if on_damage not in ("stop", "skip"):
            raise ValueError(f"on_damage: got {on_damage!r}, expected 'stop' or 'skip'")
        if not hasattr(items, "__len__"):
            raise TypeError(f"items: got {type(items).__name__}, expected a map-style data set, with a length")
        self.damaged: dict[int, str] = {}
        """Index and fault of every sample left out so far."""
        self.seconds_waiting = 0.0
        """Seconds for which a batch was waited for, summed over all batches, the start of the workers included."""
        self._samples = _Samples(items, skip=on_damage == "skip")
        self._plans = iter(plans)
        self._ahead: deque[list[int]] = deque()  # plans pulled whose batches have not been yielded
        self._failure: Exception | None = None  # of the plans, to be raised in its turn
        self._workers, self._prefetch = workers, prefetch
        self._pin = pin_memory and torch.cuda.is_available()
        self._like: Tensor | None = None  # no samples, of the shape and dtype of those that came last
        # Weak, so that a loop's end, however it comes about, drops the one reference and so stops the workers.
        self._reading: weakref.ref[Generator[ReadBatch, None, None]] | None = None

    def __iter__(self) -> Iterator[ReadBatch]:
        """The batches from the first that was not yielded; an earlier iteration is closed.

        Raises:
            DamagedImageError: A sample is damaged, and ``on_damage`` is ``stop``; or all samples of the very first
                batch are.
            RuntimeError: A worker process died.
            TypeError: A plan is no int64 tensor, or a sample is no tensor.
            ValueError: A plan is not 1-D or has an index out of range, or samples differ in shape.
        """
        self.close()
        reading = self._read()
        self._reading = weakref.ref(reading)
        return reading

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, if there are any, and wait until they have ended."""
        reading = None if self._reading is None else self._reading()
        self._reading = None
        if reading is not None:
            reading.close()

    def _read(self) -> Generator[ReadBatch, None, None]:
        started = time.perf_counter()
        loader: Any = iter(
            DataLoader(
                cast(Any, self._samples),  # a Dataset in all but name
                batch_sampler=cast(Any, self._index_batches()),  # without a length, which is not asked for
                num_workers=self._workers,
                prefetch_factor=self._prefetch if self._workers else None,
                collate_fn=cast(Any, _as_it_is),
                pin_memory=self._pin,
                worker_init_fn=partial(_apart, os.getpid()) if self._workers else None,
                generator=torch.Generator(),  # not torch's global one, from which workers' seeds would be drawn
            )
        )
        for worker in getattr(loader, "_workers", ()):
            # From here too, as a signal may come before a worker has begun; one that has, or has ended, is left alone.
            with suppress(AttributeError, OSError):
                os.setpgid(worker.pid, worker.pid)
        try:
            while True:
                try:
                    part = next(loader)
                except StopIteration:
                    if self._failure is None:
                        return
                    failure, self._failure = self._failure, None
                    raise failure from None
                except RuntimeError as error:
                    if str(error).startswith("DataLoader worker (pid"):
                        raise RuntimeError(
                            f"a worker process that reads samples died ({str(error).strip().rstrip('.')}). If it was "
                            f"killed, the system may have run out of memory: try fewer workers (now {self._workers}) "
                            f"or a smaller prefetch (now {self._prefetch})"
                        ) from error
                    raise
                finally:
                    self.seconds_waiting += time.perf_counter() - started
                batch = self._batch(part, self._ahead[0])
                del part
                self._ahead.popleft()
                yield batch
                started = time.perf_counter()
        finally:
            # Not left to the loader's end of life, which tracebacks put off. Without workers there is nothing to stop.
            getattr(loader, "_shutdown_workers", lambda: None)()

    def _index_batches(self) -> Iterator[list[int]]:
        yield from tuple(self._ahead)
        while True:
            try:
                indices = self._indices(next(self._plans))
            except StopIteration:
                return
            except Exception as error:  # whose turn comes after the batches before it
                self._failure = error
                return
            self._ahead.append(indices)
            yield indices

    def _indices(self, plan: Tensor) -> list[int]:
        if not isinstance(plan, Tensor) or plan.dtype != torch.int64:
            what = plan.dtype if isinstance(plan, Tensor) else type(plan).__name__
            raise TypeError(f"plans: got {what}, expected tensors of torch.int64")
        if plan.dim() != 1:
            raise ValueError(f"plans: got a tensor of shape {tuple(plan.shape)}, expected one dimension")
        indices: list[int] = plan.tolist()  # a tensor would be sent by way of shared memory
        wrong = [index for index in indices if not 0 <= index < len(self._samples)]
        if wrong:
            raise ValueError(f"plans: got index {wrong[0]}, expected 0 to {len(self._samples) - 1}")
        return indices

    def _batch(self, part: _Part, plan: list[int]) -> ReadBatch:
        for index, fault in part.faults:
            if not self._samples.skip:
                raise DamagedImageError(fault)
            if index not in self.damaged:
                self.damaged[index] = fault
                warnings.warn(f"sample {index} is left out: {fault}", stacklevel=3)
        samples = part.samples
        if samples is None:
            if self._like is None and not plan:
                # Nothing was asked for: the first sample that can be read shows their shape and dtype.
                parts = (self._samples.__getitems__([index]) for index in range(len(self._samples)))
                self._like = next((part.samples[:0] for part in parts if part.samples is not None), None)
            if self._like is None:
                why = f"; the last one: {part.faults[-1][1]}" if part.faults else ""
                raise DamagedImageError(f"the first batch has {len(plan)} samples, and none that can be read{why}")
            samples = self._like.clone()
        elif self._like is None:
            self._like = samples.new_empty((0, *samples.shape[1:]))
        return ReadBatch(samples, part.kept)


class _Part(NamedTuple):
    """A worker's answer: the samples that could be read, if any, and the faults of the others."""

    samples: Tensor | None
    kept: Tensor | None
    faults: tuple[tuple[int, str], ...]


class _Samples:
    """The items as a data loader takes them: many at a time, with faults as values.

    An exception raised in a worker would come with the worker's traceback as its message.
    """

    def __init__(self, items: Items, skip: bool) -> None:
        self.items, self.skip = items, skip

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: list[int]) -> _Part:
        samples: Tensor | None = None
        kept = torch.ones(len(indices), dtype=torch.bool)
        faults: list[tuple[int, str]] = []
        count = 0
        for place, index in enumerate(indices):
            try:
                sample = self.items[index]
            except DamagedImageError as error:
                faults.append((index, str(error)))
                if not self.skip:
                    break
                kept[place] = False
                continue
            if not isinstance(sample, Tensor):
                raise TypeError(f"items: got {type(sample).__name__} as sample {index}, expected a tensor")
            if samples is None:
                samples = sample.new_empty((len(indices), *sample.shape))
            elif sample.shape != samples.shape[1:] or sample.dtype != samples.dtype:
                raise ValueError(
                    f"items: got sample {index} of shape {tuple(sample.shape)} and {sample.dtype}, expected "
                    f"{tuple(samples.shape[1:])} and {samples.dtype} as the batch's first sample has"
                )
            samples[count] = sample
            count += 1
        return _Part(None if samples is None else samples[:count], kept if faults else None, tuple(faults))


def _as_it_is(part: _Part) -> _Part:
    return part


def _apart(parent: int, _worker: int) -> None:
    """Take a worker out of reach of signals to all processes of a command, as Ctrl-C and torchrun send them.

    What becomes of a run is its own process's to say, which may need a few more samples to come to a place to stop. If
    that has ended by now, so does the worker: torch's watchdog looks only from now on whether the parent changes.
    """
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != parent:
        os._exit(1)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
