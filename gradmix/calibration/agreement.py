"""One table in all processes that train one model: the first process's serves all.

With ``group=`` all processes must take the same decisions, to the bit, and two implementations may differ in the last
digit. Therefore the first call with a group sends the first process's table to the others. It counts if the devices and
the installations of all processes are the same; if they are not, no kernel is used by any of them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from gradmix.calibration import lookup
from gradmix.calibration.key import difference, key_of, with_index
from gradmix.runtime.collectives import Group, any_rank, broadcast_object

_agreed: weakref.WeakSet[Any] = weakref.WeakSet()
"""Groups whose processes have the same table."""


def agree(group: Group, device: torch.device) -> None:
    """Have the first process's table count in all processes of a group; once for each group.

    Every process of the group must make the call. Without a group, or on the CPU, nothing is exchanged.

    Args:
        group: the processes, or None.
        device: of this process's tensors.
    """
    if group is None or not lookup.has_kernels(device) or group in _agreed:
        return
    device = with_index(device)
    key = key_of(device)
    first, table = broadcast_object((key, lookup.state_of(device).table), group)
    reason = difference(first, key)
    if bool(any_rank(torch.tensor([reason is not None], device=device), group)):
        table, reason = None, reason or "another process has another device or installation"
        reason = f"the processes of the group must agree: {reason}"
    lookup.use(device, table, reason if table is None else None)
    _agreed.add(group)
