"""The additions that training by several processes needs.

Every process draws the same random numbers, so all know what a step is made of. Each reads and forwards its share of
the current and of the replayed samples, and gradients are averaged by ``DistributedDataParallel``. Methods that mix
need all samples of a step: those read from files are gathered, as bytes. For selection every process forwards its
share, what the head saw and said is gathered, and all take the same decisions; a reference gradient over the buffer is
the sum of what each process found in its share. The buffer is the same everywhere, because it is shown the same labels.

Metrics are those of one process that makes the same steps, up to the order in which sums are taken, but for dropout,
which every process draws for its own samples, and for batch normalisation on the CPU, where every process normalises
its own samples: on GPUs its statistics are shared.

After every step the processes' states are the same but for torch's global generators, which are seeded anew in every
step. So the first one's state is all that a checkpoint needs to hold, and any number of processes can go on from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel

from gradmix.runtime.collectives import Group, all_reduce_sum, size_of

AGREE_EVERY = 8
"""Steps between two questions whether a process wants to stop."""


def with_shared_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch normalisation over the samples of all processes, where that exists: on GPUs."""
    if device.type == "cuda" and any(isinstance(module, _BatchNorm) for module in model.modules()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return]
    return model


def wrap(model: nn.Module, device: torch.device, group: Group) -> DistributedDataParallel:
    """The model with gradients averaged over the processes."""
    # Buffers are shared where they are made, if at all: changing them between two passes of a step would not do. Newer
    # versions of torch have another name for it.
    names = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, process_group=group, **options)


def local_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers that become others in every process: the statistics of batch normalisation that is not shared."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, (_BatchNorm, _InstanceNorm)) and not isinstance(module, nn.SyncBatchNorm)
        for buffer in module.buffers(recurse=False)
    ]


@torch.no_grad()
def share_buffers(buffers: Sequence[Tensor], group: Group) -> None:
    """Give every process the mean over all of them; of whole numbers, the mean rounded down."""
    for buffer, total in zip(buffers, all_reduce_sum(buffers, group), strict=True):
        mean = total / size_of(group) if total.is_floating_point() else total // size_of(group)
        buffer.copy_(mean)


def environment(batch: int | None, group: Group) -> dict[str, Any]:
    """Record the processes, if there are several: their number, and a step's samples for each."""
    if group is None:
        return {}
    return {"processes": size_of(group), "batch_per_process": (batch or 0) / size_of(group)}
