"""Names of methods, derived from their place on three axes: replay, augmentation, mixing.

A name joins what differs from plain experience replay: ``der++-trivialaugment-gradmix-class`` replays as DER++,
augments by TrivialAugment and mixes by GradMix with the criterion by class. This module needs no torch, so a
configuration is checked without it; :mod:`gradmix.training.methods.composition` has the classes.

``gradmix`` as the end of a name is the former name of ``gradmix-class``. It named another algorithm than
:class:`gradmix.GradMix` with its defaults, which is ``gradmix-sample``. The former name is still understood
(:func:`current_name`), and it stays in everything by which a saved run is found again (:func:`stable_name`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from gradmix.runtime.validation import did_you_mean

REPLAY = ("er", "finetune", "a-gem", "der++")
"""How samples are replayed: in every step; not at all; as a constraint on the gradient; with their former logits."""
AUGMENTATION = ("none", "autoaugment", "randaugment", "trivialaugment")
"""The policy by which samples are augmented, after the protocol's crops and flips."""
MIXING = (
    "none",
    "mixup",
    "manifold-mixup",
    "cutmix",
    "remix",
    "balanced-mixup",
    "gradmix-class",
    "gradmix-sample",
)
"""How samples are mixed."""

COMPOSABLE_REPLAY = ("er", "der++")
"""What can be combined with augmentation and mixing. A-GEM replaces the backward pass; finetuning replays nothing."""


class Axes(NamedTuple):
    """A method by its place on the three axes; the defaults are plain experience replay."""

    replay: str = "er"
    augmentation: str = "none"
    mixing: str = "none"

    @property
    def name(self) -> str:
        """The differences from plain experience replay, joined by hyphens; ``er`` if there are none."""
        parts = [part for part, plain in zip(self, Axes(), strict=True) if part != plain]
        return "-".join(parts) or "er"


def _presets() -> Iterator[Axes]:
    """The methods that are listed: each axis by itself, and what experiments have put on top of two of them."""
    for replay in ("finetune", "er", "a-gem", "der++"):
        yield Axes(replay=replay)
    for augmentation in AUGMENTATION[1:]:
        yield Axes(augmentation=augmentation)
    for mixing in MIXING[1:]:
        yield Axes(mixing=mixing)
    for base in (Axes(replay="der++"), Axes(augmentation="trivialaugment")):
        for mixing in ("mixup", "gradmix-class", "gradmix-sample"):
            yield base._replace(mixing=mixing)


PRESETS: dict[str, Axes] = {axes.name: axes for axes in _presets()}
"""The listed methods by name."""

COMPOSITIONS: dict[str, Axes] = PRESETS | {
    axes.name: axes for axes in map(Axes._make, product(COMPOSABLE_REPLAY, AUGMENTATION, MIXING))
}
"""All methods by name: the listed ones first, then every other combination."""


class FormerNameWarning(DeprecationWarning):
    """A method or a setting is called by its former name."""


def current_name(name: str, *, warn: bool = True, stacklevel: int = 2) -> str:
    """Return the name a method has now; a name that is not a former one is returned as it is.

    Args:
        name: a method's name.
        warn: whether a former name is worth a :class:`FormerNameWarning`; not when a saved run is read.
        stacklevel: as :func:`warnings.warn` has it, counted from the caller of this function's caller.

    Example:
        >>> current_name("der++-gradmix", warn=False)
        'der++-gradmix-class'
    """
    current = f"{name}-class"
    if name in COMPOSITIONS or not name.endswith("gradmix") or current not in COMPOSITIONS:
        return name
    if warn:
        other = f"{name}-sample"
        warnings.warn(
            f"method {name!r} is now called {current!r}: pairs are judged by class, as in the paper; by sample it is "
            f"{other!r}",
            FormerNameWarning,
            stacklevel=stacklevel + 1,
        )
    return current


def stable_name(name: str) -> str:
    """Return the name that stands for a method in settings hashes, in checkpoints and in folders of experiments' runs.

    It is the name that the method had when the first runs were saved, so that those are found again.

    Example:
        >>> stable_name("der++-gradmix-class")
        'der++-gradmix'
    """
    return name.removesuffix("-class") if name.endswith("gradmix-class") else name


def choices(name: object) -> str:
    """Return what a method may be called, in words, for an error about another ``name``."""
    replay, augmentation, mixing = COMPOSABLE_REPLAY[1], ", ".join(AUGMENTATION[1:]), ", ".join(MIXING[1:])
    return (
        f"expected one of {', '.join(PRESETS)}; or a composition such as der++-trivialaugment-mixup, of {replay}, one "
        f"of {augmentation}, and one of {mixing}{did_you_mean(name, COMPOSITIONS)}"
    )
