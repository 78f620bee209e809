"""Several processes that train one model: each one's share of the samples, and collective communication.

A group of None stands for this process alone, without communication. Otherwise every process of the group must make the
same calls in the same order, with tensors of the same dtypes. If a process fails, the others wait until the group's
timeout, or until the launcher ends them, as ``torchrun`` does.
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
    """Return the number of processes."""
    return 1 if group is None else torch.distributed.get_world_size(group)


def rank_of(group: Group) -> int:
    """Return this process's rank, from 0."""
    return 0 if group is None else torch.distributed.get_rank(group)


def local_share(n: int, group: Group) -> range:
    """Return the indices of this process's share of ``n`` samples: n div size of them, or one more.

    The shares of all processes, in the order of the ranks, are all samples in order.
    """
    size, rank = size_of(group), rank_of(group)
    return range(n * rank // size, n * (rank + 1) // size)


def all_reduce_sum(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Return the sums over all processes, equal in all of them to the bit, as new tensors.

    Tensors of one dtype are sent together, as one flat buffer.

    Args:
        tensors: of any shapes, the same in all processes, on the group's device.
        group: the processes; None: the tensors are returned themselves.
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
    """Return (1,) bool: whether any of ``flags``, bool of any shape, is set in any process; the host does not wait."""
    flag = flags.any().view(1)
    if group is None:
        return flag
    found = flag.to(torch.int32)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX, group=group)
    return found > 0


def all_gather_samples(samples: Tensor, group: Group, counts: Sequence[int] | None = None) -> Tensor:
    """Return the samples of all processes, in the order of the ranks.

    Args:
        samples: (n, ...), with n >= 0 that may differ between processes; the same dtype and sample shape in all.
        group: the processes; None: the samples are returned themselves.
        counts: n of each process; None: the processes exchange it, and the host waits.

    Returns:
        (sum of all n, ...).
    """
    if group is None:
        return samples
    distributed = torch.distributed
    if counts is None:
        mine = torch.tensor([len(samples)], device=samples.device)
        gathered = [torch.empty_like(mine) for _ in range(size_of(group))]
        distributed.all_gather(gathered, mine, group=group)
        counts = torch.cat(gathered).tolist()
    if samples.shape[1:].numel() * max(counts) == 0:
        return samples.new_empty(sum(counts), *samples.shape[1:])
    # As bytes, since not every backend supports every dtype; padded, since not every one supports different lengths.
    padded = samples.new_zeros(max(counts), *samples.shape[1:])
    padded[: len(samples)] = samples
    sent = padded.reshape(-1).view(torch.uint8)
    received = [torch.empty_like(sent) for _ in counts]
    distributed.all_gather(received, sent, group=group)
    parts = [part.view(samples.dtype).view(padded.shape)[:n] for part, n in zip(received, counts, strict=True)]
    return torch.cat(parts)


def broadcast(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Return the tensors of the group's first process in every process; shapes and dtypes must be equal in all."""
    if group is None:
        return list(tensors)
    distributed: Any = torch.distributed
    copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    for tensor in copies:
        distributed.broadcast(tensor, src=distributed.get_global_rank(group, 0), group=group)
    return copies


def broadcast_object(value: Any, group: Group) -> Any:
    """Return the value of the group's first process in every process: any object that can be pickled."""
    if group is None:
        return value
    values, distributed = [value], torch.distributed
    first = distributed.get_global_rank(group, 0)
    distributed.broadcast_object_list(values, src=first, group=group)
    return values[0]
