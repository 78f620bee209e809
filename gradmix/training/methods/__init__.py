"""The methods compared.

Each loss is a class with the interface of :class:`~gradmix.training.methods.base.Method`;
:mod:`~gradmix.training.methods.composition` makes the methods of them, by name.
"""

from typing import Any

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
    StepRows,
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

_FORMER_CLASSES = {
    "DarkER": "der++",
    "DarkMixup": "der++-mixup",
    "DarkGradMixClass": "der++-gradmix-class",
    "DarkGradMixSample": "der++-gradmix-sample",
    "TrivialAugmentMixup": "trivialaugment-mixup",
    "TrivialAugmentGradMixClass": "trivialaugment-gradmix-class",
    "TrivialAugmentGradMixSample": "trivialaugment-gradmix-sample",
}


def __getattr__(name: str) -> Any:
    if name not in _FORMER_CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import warnings

    method = _FORMER_CLASSES[name]
    warnings.warn(f"{__name__}.{name} is now METHODS[{method!r}]", DeprecationWarning, stacklevel=2)
    return METHODS[method]


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
    "StepRows",
    "TrivialAugment",
    "Wrapping",
    "find_method",
    "weighted_cross_entropy",
]
