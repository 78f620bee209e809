"""Gradient-based selective Mixup for class-incremental learning (GradMix, arXiv 2505.08528).

>>> import torch, gradmix
>>> model = torch.nn.Linear(4, 3)
>>> buffer = gradmix.ReplayBuffer(capacity=2)
>>> buffer.add(torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1]))
>>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 2, 2])
>>> x, y = gradmix.select_pairs(model, buffer, (x, y)).mix()
>>> loss = torch.nn.functional.cross_entropy(model(x), y)
"""

from gradmix._version import __version__
from gradmix.alignment import Alignment, ClassTable, alignment_matrix, reference_gradient
from gradmix.buffers import ReplayBuffer
from gradmix.head import HeadCapture, HeadNotFoundError, HeadOutput
from gradmix.ops.backends import get_backend, set_backend
from gradmix.selection import GradMix, Pairs, select_pairs

__all__ = [
    "Alignment",
    "ClassTable",
    "GradMix",
    "HeadCapture",
    "HeadNotFoundError",
    "HeadOutput",
    "Pairs",
    "ReplayBuffer",
    "__version__",
    "alignment_matrix",
    "get_backend",
    "reference_gradient",
    "select_pairs",
    "set_backend",
]
