"""The optimiser of a task and the course of its learning rate."""

from __future__ import annotations

import torch
from torch import nn

from gradmix.training.config import OptimConfig


def make_optimiser(model: nn.Module, optim: OptimConfig) -> torch.optim.SGD:
    """SGD as configured, with no momentum left over from the task before."""
    assert optim.lr is not None and optim.momentum is not None and optim.weight_decay is not None
    return torch.optim.SGD(model.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)


def make_schedule(
    optimiser: torch.optim.Optimizer, optim: OptimConfig, length: int
) -> torch.optim.lr_scheduler.MultiStepLR:
    """The learning rate divided by ten after each milestone, a share of ``length``: a task's epochs, or all steps."""
    milestones = sorted({max(1, round(share * length)) for share in optim.lr_milestones or ()})
    return torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.1)
