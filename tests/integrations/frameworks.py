"""The import of a framework in a test file, or the reason why the file is skipped; and the task that all learn."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

INSTALL = "pip install -c constraints.txt -r tests/integrations/requirements.txt"


def framework(module: str) -> Any:
    """Return the module, imported; without it, skip the file that asks."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{module} is not installed: {INSTALL}", allow_module_level=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the framework imports
        return importlib.import_module(module)


CLASSES, WIDTH = 4, 6


def task(number: int, count: int = 40) -> tuple[Tensor, Tensor]:
    """Samples of two of four classes, (count, 6) and (count,): Gaussians around corners of a simplex."""
    generator = torch.Generator().manual_seed(number)
    y = 2 * number + torch.arange(count) % 2
    return 3 * torch.eye(CLASSES, WIDTH)[y] + torch.randn(count, WIDTH, generator=generator), y


def network() -> nn.Sequential:
    """A perceptron, the same in every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
