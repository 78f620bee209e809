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
from gradmix.alignment import alignment_matrix
from gradmix.class_table import ClassTable
from gradmix.criteria import Alignment
from gradmix.estimators import JvpEstimator, SketchEstimator
from gradmix.gradients import ClassGradients, SampleGradients, class_gradients, sample_gradients
from gradmix.mixer import GradMix
from gradmix.model.head import HeadNotFoundError, HeadOutput
from gradmix.model.head_capture import HeadCapture
from gradmix.model.mixed_forward import mixed_forward
from gradmix.ops.backends import get_backend, set_backend
from gradmix.pairs import Pairs
from gradmix.references import reference_gradient
from gradmix.replay.buffer import ReplayBuffer
from gradmix.selection import select_pairs

__all__ = [
    "Alignment",
    "ClassGradients",
    "ClassTable",
    "GradMix",
    "HeadCapture",
    "HeadNotFoundError",
    "HeadOutput",
    "JvpEstimator",
    "Pairs",
    "ReplayBuffer",
    "SampleGradients",
    "SketchEstimator",
    "__version__",
    "alignment_matrix",
    "class_gradients",
    "get_backend",
    "mixed_forward",
    "reference_gradient",
    "sample_gradients",
    "select_pairs",
    "set_backend",
]
