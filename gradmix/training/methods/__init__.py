"""The methods compared.

Each loss is a class with the interface of :class:`~gradmix.training.methods.base.Method`;
:mod:`~gradmix.training.methods.composition` makes the methods of them, by name.
"""

from gradmix._moved import moved
from gradmix.training.methods.a_gem import AGEM
from gradmix.training.methods.balanced_mixup import BalancedMixup
from gradmix.training.methods.base import (
    ER,
    Context,
    Finetune,
    Method,
    Needs,
    Passes,
    Pixels,
    StepSamples,
    Wrapping,
    weighted_cross_entropy,
)
from gradmix.training.methods.composition import METHODS, Composition, MethodFactory, find_method
from gradmix.training.methods.cutmix import CutMix
from gradmix.training.methods.dark_replay import DarkReplay
from gradmix.training.methods.manifold_mixup import ManifoldMixup
from gradmix.training.methods.mixup import Mixing, Mixup
from gradmix.training.methods.policies import AutoAugment, RandAugment, TrivialAugment
from gradmix.training.methods.remix import Remix
from gradmix.training.methods.selective import GradMixClass, GradMixSample, SelectiveMixup

__getattr__ = moved(__name__, "gradmix.training.methods.base", {"StepRows": "StepSamples"})

__all__ = [
    "AGEM",
    "ER",
    "METHODS",
    "AutoAugment",
    "BalancedMixup",
    "Composition",
    "Context",
    "CutMix",
    "DarkReplay",
    "Finetune",
    "GradMixClass",
    "GradMixSample",
    "ManifoldMixup",
    "Method",
    "MethodFactory",
    "Mixing",
    "Mixup",
    "Needs",
    "Passes",
    "Pixels",
    "RandAugment",
    "Remix",
    "SelectiveMixup",
    "StepSamples",
    "TrivialAugment",
    "Wrapping",
    "find_method",
    "weighted_cross_entropy",
]
