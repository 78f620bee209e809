"""Methods composed from replay, augmentation and mixing (:mod:`gradmix.training.method_names`)."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

from gradmix.training.config import TrainConfig
from gradmix.training.method_names import COMPOSITIONS, PRESETS, Axes, choices, current_name
from gradmix.training.methods.a_gem import AGEM
from gradmix.training.methods.balanced_mixup import BalancedMixup
from gradmix.training.methods.base import ER, Context, Finetune, Method, Needs, Wrapping
from gradmix.training.methods.cutmix import CutMix
from gradmix.training.methods.dark_replay import DarkReplay
from gradmix.training.methods.manifold_mixup import ManifoldMixup
from gradmix.training.methods.mixup import Mixup
from gradmix.training.methods.policies import AutoAugment, RandAugment, TrivialAugment
from gradmix.training.methods.remix import Remix
from gradmix.training.methods.selective import GradMixClass, GradMixSample

REPLAY: dict[str, type[Method]] = {"finetune": Finetune, "er": ER, "a-gem": AGEM}
"""The loss of samples that are not mixed."""
MIXING: dict[str, type[Method]] = {
    "mixup": Mixup,
    "manifold-mixup": ManifoldMixup,
    "cutmix": CutMix,
    "remix": Remix,
    "balanced-mixup": BalancedMixup,
    "gradmix-class": GradMixClass,
    "gradmix-sample": GradMixSample,
}
"""The loss of mixed samples."""
AUGMENTATION: dict[str, type[Wrapping]] = {
    "autoaugment": AutoAugment,
    "randaugment": RandAugment,
    "trivialaugment": TrivialAugment,
}
"""What is put around a loss, to augment its samples."""
DISTILLATION: dict[str, type[Wrapping]] = {"der++": DarkReplay}
"""What is put around all of this, to add a loss on the logits."""


@dataclass(frozen=True)
class Composition:
    """A method by its place on the axes, made when it is called with a context.

    Example:
        >>> Composition(Axes(replay="der++", mixing="gradmix-class")).core.__name__
        'GradMixClass'
    """

    axes: Axes

    @property
    def core(self) -> type[Method]:
        """The class of the innermost loss."""
        replay, _, mixing = self.axes
        return MIXING[mixing] if mixing != "none" else REPLAY.get(replay, ER)

    @property
    def wrappers(self) -> tuple[type[Wrapping], ...]:
        """The classes around it, from the inside out."""
        replay, augmentation, _ = self.axes
        found = AUGMENTATION.get(augmentation), DISTILLATION.get(replay)
        return tuple(wrapper for wrapper in found if wrapper is not None)

    @property
    def needs(self) -> Needs:
        """The needs of the method, which the training loop meets."""
        return reduce(operator.or_, (layer.needs for layer in self._layers()))

    def __call__(self, context: Context) -> Method:
        """Make the method for one run."""
        method = self.core(context)
        for wrapper in self.wrappers:
            method = wrapper(context, method)
        return method

    def resolve_config(self, config: TrainConfig) -> TrainConfig:
        """``config`` with the method's own values where it leaves them to the method."""
        for layer in self._layers():
            config = layer.resolve_config(config)
        return config

    def check_installed(self) -> None:
        """As :meth:`Method.check_installed`."""
        for layer in self._layers():
            layer.check_installed()

    def _layers(self) -> Iterator[type[Method]]:
        """All classes, from the outside in."""
        yield from reversed(self.wrappers)
        yield self.core


MethodFactory: TypeAlias = Composition | type[Method]
"""What makes a method from a context."""

METHODS: dict[str, MethodFactory] = {name: Composition(axes) for name, axes in PRESETS.items()}
"""The listed methods by name."""


def find_method(name: str) -> MethodFactory:
    """Return a method by name, a listed one or any other composition.

    Raises:
        ValueError: there is no such method; the message lists those there are.
    """
    name = current_name(name)
    if name in METHODS:
        return METHODS[name]
    if name not in COMPOSITIONS:
        raise ValueError(f"method: got {name!r}, {choices(name)}")
    return Composition(COMPOSITIONS[name])
