"""The methods compared, each a small class with the interface of :class:`~gradmix.training.methods.base.Method`."""

from gradmix.training.methods.a_gem import AGEM
from gradmix.training.methods.balanced_mixup import BalancedMixup
from gradmix.training.methods.base import (
    ER,
    Context,
    Finetune,
    Method,
    Pixels,
    StepRows,
    Wrapping,
    weighted_cross_entropy,
)
from gradmix.training.methods.cutmix import CutMix
from gradmix.training.methods.dark_replay import DarkER, DarkGradMixClass, DarkGradMixSample, DarkMixup, DarkReplay
from gradmix.training.methods.manifold_mixup import ManifoldMixup
from gradmix.training.methods.mixup import Mixing, Mixup
from gradmix.training.methods.policies import (
    AutoAugment,
    RandAugment,
    TrivialAugment,
    TrivialAugmentGradMixClass,
    TrivialAugmentGradMixSample,
    TrivialAugmentMixup,
)
from gradmix.training.methods.remix import Remix
from gradmix.training.methods.selective import GradMixClass, GradMixSample, SelectiveMixup

METHODS: dict[str, type[Method]] = {
    "finetune": Finetune,
    "er": ER,
    "a-gem": AGEM,
    "der++": DarkER,
    "autoaugment": AutoAugment,
    "randaugment": RandAugment,
    "trivialaugment": TrivialAugment,
    "mixup": Mixup,
    "manifold-mixup": ManifoldMixup,
    "cutmix": CutMix,
    "remix": Remix,
    "balanced-mixup": BalancedMixup,
    "gradmix": GradMixClass,
    "gradmix-sample": GradMixSample,
    "der++-mixup": DarkMixup,
    "der++-gradmix": DarkGradMixClass,
    "der++-gradmix-sample": DarkGradMixSample,
    "trivialaugment-mixup": TrivialAugmentMixup,
    "trivialaugment-gradmix": TrivialAugmentGradMixClass,
    "trivialaugment-gradmix-sample": TrivialAugmentGradMixSample,
}
"""All methods by name."""

__all__ = [
    "AGEM",
    "ER",
    "METHODS",
    "AutoAugment",
    "BalancedMixup",
    "Context",
    "CutMix",
    "DarkER",
    "DarkGradMixClass",
    "DarkGradMixSample",
    "DarkMixup",
    "DarkReplay",
    "Finetune",
    "GradMixClass",
    "GradMixSample",
    "ManifoldMixup",
    "Method",
    "Mixing",
    "Mixup",
    "Pixels",
    "RandAugment",
    "Remix",
    "SelectiveMixup",
    "StepRows",
    "TrivialAugment",
    "TrivialAugmentGradMixClass",
    "TrivialAugmentGradMixSample",
    "TrivialAugmentMixup",
    "Wrapping",
    "weighted_cross_entropy",
]
