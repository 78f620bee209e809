"""Arguments of the kernels of mixed_alignment, from those of the operator, and what they are held against."""

from __future__ import annotations

import torch
from test_mixed_alignment import in_double, sides
from torch import Tensor

from gradmix.ops.labels import dense_labels
from gradmix.ops.mixed_alignment import MixedAlignment, mixed_alignment_reference


def projected(features: Tensor, reference: Tensor) -> Tensor:
    """U = [h; 1] G^T in float32."""
    width = features.shape[1]
    u = features.double() @ reference[:, :width].double().T
    return (u + reference[:, width].double() if reference.shape[1] > width else u).float()


def prepared(arguments: list[Tensor], device: str = "cpu") -> tuple[list[Tensor], bool]:
    """The kernel's arguments, but for the mixing weights, from the operator's."""
    h_a, z_a, y_a, h_b, z_b, y_b, reference = arguments
    if y_a.is_floating_point() != y_b.is_floating_point():
        y_a, y_b = (dense_labels(y, z_a.shape[1], torch.float32) for y in (y_a, y_b))
    parts = [h_a, z_a, y_a, projected(h_a, reference), h_b, z_b, y_b, projected(h_b, reference)]
    return [part.to(device) for part in parts], reference.shape[1] > h_a.shape[1]


def truth(arguments: list[Tensor], *lams: float) -> MixedAlignment:
    results = [mixed_alignment_reference(*sides(in_double(arguments)), lam) for lam in lams]
    return MixedAlignment(*(torch.stack(parts) for parts in zip(*results, strict=True)))


def grouped_truth(arguments: list[Tensor], rows: Tensor, group: int, *lams: float) -> MixedAlignment:
    pairs = truth(arguments, *lams)
    filled = rows >= 0
    counted = filled[:, None] & filled & (rows[:, None] != rows)
    at = rows.clamp(min=0)
    groups = len(rows) // group
    return MixedAlignment(
        *(
            torch.where(counted, part[:, at][:, :, at], 0).view(len(lams), groups, group, groups, group).sum((2, 4))
            for part in pairs
        )
    )
