"""What each of two processes does in the test of class gradients over processes; both can import it from here."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from gradient_networks import ARCHITECTURES

import gradmix
from gradmix.gradients import ClassGradients

TABULAR = ARCHITECTURES["tabular mlp"]


def tabular(n: int = 9, rows: int = 0, classes: list[int] | None = None, **given) -> ClassGradients:
    """Class gradients of n rows, drawn by the number ``rows``, through one and the same network."""
    x, y = TABULAR.batch(n, rows)
    if classes is not None:
        y = torch.tensor(classes)
    return gradmix.class_gradients(TABULAR.model(), (x, y), **({"rank": 3} | given))


# What each of two processes has seen: rows of these classes, or nothing.
SPLITS: dict[str, tuple[list[int], list[int]]] = {
    "different classes": ([0, 0, 3], [1, 3, 2, 1]),
    "the same classes": ([0, 1, 1], [1, 0]),
    "one process without rows": ([2, 0, 2], []),
    "the other process without rows": ([], [1, 1]),
}


def part(classes: list[int], rows: int, **given) -> ClassGradients:
    return tabular(len(classes), rows, classes=classes, **given) if classes else ClassGradients.empty()


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    told: dict[str, object] = {}
    for name, classes in SPLITS.items():
        mine = part(classes[rank], rank)
        before = copy.deepcopy(mine)
        told[name] = mine.all_reduce().state_dict()
        for attribute in ("classes", "vectors", "counts", "square_norms"):
            assert torch.equal(getattr(mine, attribute), getattr(before, attribute)), attribute
    told["both empty"] = ClassGradients.empty().all_reduce().state_dict()
    try:
        tabular(3, rank=3 + rank).all_reduce()
    except ValueError as error:
        told["different ranks"] = str(error)
    try:
        part([0], rank, norms=rank == 0).all_reduce()
    except ValueError as error:
        told["norms in one"] = str(error)
    told["norms in none"] = part([[0], []][rank], rank, norms=False).all_reduce().state_dict()
    group = torch.distributed.new_group([0, 1])
    told["a group"] = part([rank, rank], rank).all_reduce(group).state_dict()
    torch.save(told, Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
