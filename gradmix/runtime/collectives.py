"""Several processes that train one model: what of the rows is each one's, and what they tell each other.

A group of None stands for this process alone, and nothing is said to anybody. Otherwise every process of the group must
make the same calls in the same order, with tensors of the same dtypes: what is exchanged is decided on what all of them
know. A process that fails in between leaves the others waiting, until the group's timeout or until the launcher ends
them, as ``torchrun`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Group: TypeAlias = "torch.distributed.ProcessGroup | None"
"""Processes that work together; None: this process alone."""


def check_group(group: object) -> None:
    """Raise TypeError unless ``group`` is None or a process group that this process belongs to."""
    if group is None:
        return
    distributed = torch.distributed
    if distributed.is_available() and isinstance(group, distributed.ProcessGroup):
        return
    raise TypeError(
        f"group: got {type(group).__name__}, expected None or a process group of torch.distributed that this process "
        "belongs to, such as torch.distributed.group.WORLD after init_process_group"
    )


def size_of(group: Group) -> int:
    """Number of processes."""
    return 1 if group is None else torch.distributed.get_world_size(group)


def rank_of(group: Group) -> int:
    """This process's number among them, from 0."""
    return 0 if group is None else torch.distributed.get_rank(group)


def local_share(n: int, group: Group) -> range:
    """Which of ``n`` rows are this process's: n div size of them or one more, in the order of the ranks.

    The shares of all processes, one after the other, are the rows.
    """
    size, rank = size_of(group), rank_of(group)
    return range(n * rank // size, n * (rank + 1) // size)


def all_reduce_sum(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """The sums over all processes, the same in each to the last bit; new tensors, but for one process those given.

    Tensors of one dtype travel together, as one flat buffer.

    Args:
        tensors: of any shapes, the same in all processes, on the group's device.
        group: None: returned as they are.
    """
    if group is None:
        return list(tensors)
    sums: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [k for k, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[k].reshape(-1) for k in places])
        torch.distributed.all_reduce(flat, group=group)
        for k, part in zip(places, flat.split([tensors[k].numel() for k in places]), strict=True):
            sums[k] = part.view(tensors[k].shape)
    return sums


def any_rank(flags: Tensor, group: Group) -> Tensor:
    """(1,) bool: whether any of ``flags``, bool of any shape, is set in any process; it is not waited for."""
    flag = flags.any().view(1)
    if group is None:
        return flag
    found = flag.to(torch.int32)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX, group=group)
    return found > 0


def all_gather_samples(rows: Tensor, group: Group, counts: Sequence[int] | None = None) -> Tensor:
    """The rows of all processes, in the order of the ranks.

    Args:
        rows: (n, ...), of another number in each process, none included; the same dtype and row shape in all.
        group: None: returned as they are.
        counts: each process's n. None: the processes tell each other, which the host waits for.

    Returns:
        (sum of all n, ...).
    """
    if group is None:
        return rows
    distributed = torch.distributed
    if counts is None:
        mine = torch.tensor([len(rows)], device=rows.device)
        told = [torch.empty_like(mine) for _ in range(size_of(group))]
        distributed.all_gather(told, mine, group=group)
        counts = torch.cat(told).tolist()
    if rows.shape[1:].numel() * max(counts) == 0:
        return rows.new_empty(sum(counts), *rows.shape[1:])
    # As bytes, since not every backend knows every dtype; as many from each process, since not every one takes others.
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    sent = padded.reshape(-1).view(torch.uint8)
    received = [torch.empty_like(sent) for _ in counts]
    distributed.all_gather(received, sent, group=group)
    parts = [part.view(rows.dtype).view(padded.shape)[:n] for part, n in zip(received, counts, strict=True)]
    return torch.cat(parts)


def broadcast(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """The tensors of the group's first process, in every process; all have the same shapes and dtypes."""
    if group is None:
        return list(tensors)
    distributed: Any = torch.distributed
    told = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    for tensor in told:
        distributed.broadcast(tensor, src=distributed.get_global_rank(group, 0), group=group)
    return told


def broadcast_object(value: Any, group: Group) -> Any:
    """The group's first process's value, in every process: anything that can be pickled; the others' are not read."""
    if group is None:
        return value
    told, distributed = [value], torch.distributed
    first = distributed.get_global_rank(group, 0)
    distributed.broadcast_object_list(told, src=first, group=group)
    return told[0]
