"""What each of two processes does in the tests of selection over processes; both can import it from here."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked import start_processes
from models import MLP, rows
from patience import PATIENCE
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import gradmix
from gradmix.runtime.collectives import all_gather_samples, all_reduce_sum, any_rank, broadcast, local_share

SIZE = 2
"""Processes."""

BATCH = 10
"""Rows of the batch of all processes, of which each has its half."""

SOURCES: dict[str, Callable[[], Any]] = {
    "no rows": lambda: (torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64)),
    "one row": lambda: rows(1, 3),
    "two rows": lambda: rows(2, 3),
    "odd": lambda: rows(23, 3),
    "soft labels": lambda: rows(23, 3, soft=True),
    "buffer": lambda: filled(23),
    "empty buffer": lambda: gradmix.ReplayBuffer(3),
    "dataset": lambda: TensorDataset(*rows(23, 3)),
    "dataset of one": lambda: TensorDataset(*rows(1, 3)),
    "loader": lambda: DataLoader(TensorDataset(*rows(23, 3)), batch_size=5),
    "rows in a list": lambda: [(x, int(y)) for x, y in zip(*rows(23, 3), strict=True)],
    "function": lambda: lambda: rows(23, 3),
    "loader of one batch": lambda: DataLoader(TensorDataset(*rows(4, 3)), batch_size=5),
}

ESTIMATORS: dict[str, Any] = {
    "feature": "feature",
    "mixed": "mixed",
    "jvp": "jvp",
    "sketch": gradmix.SketchEstimator(rank=8),
}

WAYS = {
    f"{source}, {criterion}, {estimator}": (source, criterion, estimator)
    for source in ("no rows", "one row", "odd")
    for criterion in ("sample", "class")
    for estimator in ESTIMATORS
} | {f"{source}, class, feature": (source, "class", "feature") for source in ("soft labels", "buffer", "loader")}

MARKS = {"some": [1, 4, 8], "of one process": [6], "none": [], "all": list(range(BATCH))}

CHUNK = 4
"""Rows forwarded at a time, so that there are several chunks."""


def filled(n: int) -> gradmix.ReplayBuffer:
    buffer = gradmix.ReplayBuffer(100)
    buffer.add(*rows(n, 3))
    return buffer


class Scaled(MLP):
    """A network of images and a number for each."""

    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        return super().forward(image * scale.view(-1, 1, 1, 1))


def scaled(pair: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The rows as what :class:`Scaled` takes."""
    return {"image": pair[0], "scale": torch.ones(len(pair[1]))}, pair[1]


def model() -> MLP:
    torch.manual_seed(0)
    return MLP()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half(values: Tensor, rank: int) -> Tensor:
    return values.chunk(SIZE)[rank]


def marked(places: list[int]) -> Tensor:
    return torch.zeros(BATCH, dtype=torch.bool).index_fill_(0, torch.tensor(places, dtype=torch.int64), True)


def kept(mixup: gradmix.GradMix) -> dict[str, Any]:
    """What it keeps between steps."""
    state = mixup.state_dict()
    return {name: state[name] for name in ("reference", "table", "age", "refreshes")}


def own_rows(rank: int, dtype: torch.dtype) -> Tensor:
    """Rows of which the processes have different numbers."""
    return (torch.arange(12).reshape(4, 3) + 100 * rank)[: 4 * rank + (1 - rank)].to(dtype)


# ------------------------------------------------------------------------------------------------- what a process tells


def tell_exchanges(rank: int, group: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"shares": [[*local_share(n, group)] for n in range(6)]}
    given = [torch.full((2, 3), 1.0 + rank), torch.tensor(5 * rank), torch.ones(0), torch.tensor([0.5])]
    before = [v.clone() for v in given]
    told["sums"] = all_reduce_sum(given, group)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        told[f"rows of {dtype}"] = all_gather_samples(own_rows(rank, dtype), group)
    told["rows of no width"] = all_gather_samples(torch.empty(2 + rank, 0), group)
    told["no rows"] = all_gather_samples(torch.empty(0, 3), group)
    told["rows of one"] = all_gather_samples(torch.ones(3 * rank, 2), group)
    told["any"] = [any_rank(torch.tensor([False, rank == k]), group) for k in range(3)]
    told["the first's"] = broadcast([torch.tensor([rank, 7]), torch.tensor(float("nan") if rank else 2.0)], group)
    return told


def tell_references(rank: int, group: Any) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, source in SOURCES.items():
        sizes: list[int] = []
        network = model()
        network.register_forward_hook(partial(lambda sizes, _m, inputs, _o: sizes.append(len(inputs[0])), sizes))
        try:
            told[name] = gradmix.reference_gradient(network, source(), head="fc", chunk_size=CHUNK, group=group)
        except ValueError as error:
            told[name] = str(error)
        told[f"{name}: forwarded"] = sum(sizes)
    return told


def tell_selections(rank: int, group: Any) -> dict[str, Any]:
    x, y = (half(v, rank) for v in rows(BATCH, 1))
    told: dict[str, Any] = {}
    for name, (source, criterion, estimator) in WAYS.items():
        mixup = gradmix.GradMix(
            model(),
            SOURCES[source](),
            criterion=criterion,
            estimator=ESTIMATORS[estimator],
            generator=generator(10 * rank),
            chunk_size=CHUNK,
            class_samples=6,
            group=group,
        )
        told[name] = [mixup.select(x, y, lam=0.3).alignment, kept(mixup)]
    for estimator in ("feature", "mixed"):
        torch.manual_seed(0)
        mixup = gradmix.GradMix(
            Scaled(),
            scaled(rows(23, 3)),
            criterion="class",
            estimator=estimator,
            generator=generator(10 * rank),
            chunk_size=CHUNK,
            class_samples=6,
            group=group,
        )
        told[f"of two inputs, {estimator}"] = [mixup.select(*scaled((x, y)), lam=0.3).alignment, kept(mixup)]
    for name, places in MARKS.items():
        mine = half(marked(places), rank)
        for estimator in ("feature", "jvp"):
            pairs = gradmix.select_pairs(model(), mine, (x, y), lam=0.3, estimator=estimator, group=group)
            told[f"marked {name}, {estimator}"] = pairs.alignment
        mixup = gradmix.GradMix(model(), None, criterion="class", generator=generator(10 * rank), group=group)
        mixup.select(x, y, lam=0.3, replayed=mine)
        told[f"marked {name}, class"] = kept(mixup)
    # Only one process meets a class that the table does not know.
    mixup = gradmix.GradMix(model(), rows(6, 3), criterion="class", refresh="epoch", group=group)
    mixup.select(x, y.clamp(max=3))
    mixup.select(x, y.clamp(max=3))
    told["refreshes before"] = mixup.refreshes
    mixup.select(x, torch.full_like(y, 4) if rank else y.clamp(max=3))
    told["refreshes after"] = mixup.refreshes
    wrapped = torch.nn.parallel.DistributedDataParallel(model())
    told["wrapped"] = gradmix.reference_gradient(wrapped, rows(23, 3), chunk_size=CHUNK, group=group)
    return told


TELL = {"exchanges": tell_exchanges, "references": tell_references, "selections": tell_selections}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE)
    told = {what: tell(rank, torch.distributed.group.WORLD) for what, tell in TELL.items()}
    torch.save(told, Path(folder) / f"rank{rank}.pt")
    gc.collect()  # no reducer must outlive the group: it would end gloo's threads with Python's lock held
    torch.distributed.destroy_process_group()


def told_by_both(folder: Path, seconds: float = PATIENCE) -> list[dict[str, Any]]:
    """What the processes told; they are ended if that takes longer than so many seconds."""
    context = start_processes(process, (str(folder),), SIZE, join=False)
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() >= end:
                raise TimeoutError(f"the processes were not done after {seconds} s")
    finally:
        for started in context.processes:
            if started.is_alive():
                started.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(SIZE)]
