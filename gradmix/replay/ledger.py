"""The ledger of a replay buffer: it decides from random keys and quotas which samples are held.

Every sample seen gets an independent uniform key, and the samples with the smallest keys within a quota are held. The
k smallest of n independent keys sit at a uniformly random set of k samples. So the samples held are a uniformly
random subset of those seen, however they were split into calls. The policies differ in the quota only.

A ledger lies on the CPU and knows keys and labels only; decisions never wait for the data of samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BufferPolicy = Literal["class", "balanced", "reservoir"]


class Admission(NamedTuple):
    """A decision on new samples.

    Attributes:
        ledger: The ledger with the decision applied.
        kept: (R,) bool, which of the R samples held before stay.
        new: (k,) int64, ascending: which of the new samples are held from now on, after those kept.
    """

    ledger: Ledger
    kept: Tensor
    new: Tensor


@dataclass(frozen=True)
class Ledger:
    """Samples held, in order of arrival, and samples seen by class. A ledger is never changed: a new one replaces it.

    Attributes:
        policy: Policy that sets the quota.
        capacity: Samples per class for policy ``class``, samples in total otherwise.
        keys: (R,) float64, one for each sample held.
        labels: (R,) int64.
        classes: (P,) int64, ascending: the classes seen.
        seen: (P,) int64, samples seen of each class.
    """

    policy: BufferPolicy
    capacity: int
    keys: Tensor
    labels: Tensor
    classes: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, policy: BufferPolicy, capacity: int) -> Ledger:
        """Return the ledger before the first sample."""
        keys = torch.empty(0, dtype=torch.float64, device="cpu")
        labels, classes, seen = (torch.empty(0, dtype=torch.int64, device="cpu") for _ in range(3))
        return cls(policy, capacity, keys, labels, classes, seen)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def total_seen(self) -> int:
        """Samples seen, held or not."""
        return int(self.seen.sum())

    def count_seen(self) -> dict[int, int]:
        """Return the samples seen of every class, by label."""
        return dict(zip(self.classes.tolist(), self.seen.tolist(), strict=True))

    def class_counts(self) -> dict[int, int]:
        """Return the samples held of every class that has one, by label, in ascending order."""
        classes, counts = torch.unique(self.labels, return_counts=True)
        return dict(zip(classes.tolist(), counts.tolist(), strict=True))

    def admit(self, keys: Tensor, labels: Tensor) -> Admission:
        """Decide which samples are held once new ones have been seen.

        A quota never rises again once it is below the number of samples seen of its class. Samples rejected before
        therefore need not be considered again: the result is that of one decision on all samples seen.

        Args:
            keys: (N,) float64, uniform in [0, 1).
            labels: (N,) int64.
        """
        classes, seen = self._count(labels)
        all_keys, all_labels = torch.cat([self.keys, keys]), torch.cat([self.labels, labels])
        counted = replace(self, keys=all_keys, labels=all_labels, classes=classes, seen=seen)
        keep = counted._within_quota()
        held = len(self)
        ledger = replace(counted, keys=all_keys[keep], labels=all_labels[keep])
        return Admission(ledger, keep[:held], keep[held:].nonzero().squeeze(1))

    def _count(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return classes (P,), ascending, and samples seen of each (P,), with ``labels`` counted."""
        new_classes, new_counts = torch.unique(labels, return_counts=True)
        classes = torch.unique(torch.cat([self.classes, new_classes]))
        seen = torch.zeros_like(classes)
        seen[torch.searchsorted(classes, self.classes)] += self.seen
        seen[torch.searchsorted(classes, new_classes)] += new_counts
        return classes, seen

    def _within_quota(self) -> Tensor:
        """Return which samples have the smallest keys within the quota, (R,) bool."""
        keep = torch.zeros(len(self), dtype=torch.bool, device="cpu")
        # Stable: of equal keys the earlier sample wins, whatever the split into calls.
        order = torch.argsort(self.keys, stable=True)
        if self.policy == "reservoir":
            keep[order[: self.capacity]] = True
            return keep
        class_index = torch.searchsorted(self.classes, self.labels)
        order = order[torch.argsort(class_index[order], stable=True)]
        counts = torch.bincount(class_index, minlength=len(self.classes))
        starts = torch.cumsum(counts, 0) - counts
        class_of = class_index[order]
        rank = torch.arange(len(self), device="cpu") - starts[class_of]
        keep[order] = rank < quotas(self.policy, self.capacity, self.seen)[class_of]
        return keep


def quotas(policy: BufferPolicy, capacity: int, seen: Tensor) -> Tensor:
    """Return the samples that each class may hold.

    Args:
        policy: Policy of the buffer.
        capacity: Capacity of the buffer.
        seen: (P,) int64, samples seen of each class, classes in ascending order.

    Returns:
        (P,) int64.
    """
    if policy == "class":
        return seen.clamp(max=capacity)
    if policy == "reservoir" or int(seen.sum()) <= capacity:
        return seen.clone()
    # Water-filling: the highest level L with sum(min(seen, L)) <= capacity. With the k smallest classes below the
    # level, the others share what is left; the first k that is consistent with its own level is the answer.
    ascending = torch.sort(seen).values
    below = torch.cumsum(ascending, 0) - ascending
    sharing = torch.arange(len(seen), 0, -1, device="cpu")
    levels = torch.div(capacity - below, sharing, rounding_mode="floor")
    level = levels[int((levels < ascending).nonzero()[0])]
    quota = seen.clamp(max=int(level))
    more = seen > level
    return quota + (more & (torch.cumsum(more, 0) <= capacity - quota.sum()))
