"""The place where a method mixes samples: the model's input, its embedding, or the classifier's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from gradmix.model.mixed_forward import mixed_forward
from gradmix.model.unchanged import unwrap
from gradmix.runtime.validation import check_choice
from gradmix.training.config import MixConfig

MixSpace = Literal["input", "embedding", "feature"]
"""The places: inputs; the output of the model's ``mixing_stage``; the classifier's input."""


def mix_space(mix: MixConfig) -> MixSpace:
    """Check and return the place that the settings name; where they leave it open, the input."""
    space: MixSpace = mix.space or "input"
    check_choice("mix.space", space, get_args(MixSpace))
    return space


def stage_of(model: nn.Module, space: MixSpace) -> nn.Module | Literal["feature"]:
    """The stage of the model at which samples are mixed, as :func:`gradmix.mixed_forward` takes it.

    Raises:
        ValueError: ``space`` is the input, or the model names no ``mixing_stage``.
    """
    if space == "feature":
        return "feature"
    stage = getattr(unwrap(model), "mixing_stage", None)
    if space != "embedding" or not isinstance(stage, nn.Module):
        got = "no module" if stage is None else type(stage).__name__
        name = type(unwrap(model)).__name__
        raise ValueError(
            f"mix.space: got {space!r} for {name} with {got} as mixing_stage, expected a module there whose output can "
            "be mixed, or mix.space: feature"
        )
    return stage


@dataclass(frozen=True)
class Mixture:
    """Which samples meet, with which weight, and what label that gives; the samples themselves are not mixed yet.

    Attributes:
        other_x: (M, ...) where the partners are; None: among the samples themselves.
        partner: (N,) int64, index of each sample's partner there.
        lam: the weight of the sample itself, a number or (N,).
        y: (N, C) label vectors of the mixtures.
    """

    other_x: Tensor | None
    partner: Tensor
    lam: Tensor | float
    y: Tensor

    def of_inputs(self, x: Tensor) -> Tensor:
        """The samples ``x`` (N, ...), no integers, mixed as they are: lam x_i + (1 - lam) x_partner."""
        require_mixable(x)
        other = (x if self.other_x is None else self.other_x)[self.partner]
        lam = self.lam
        if isinstance(lam, Tensor):
            lam = lam.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return lam * x + (1 - lam) * other

    def logits(self, model: nn.Module, space: MixSpace, x: Tensor, part: slice | Tensor = slice(None)) -> Tensor:
        """(n, C) logits of a part of the samples ``x`` mixed inside the model, by :func:`gradmix.mixed_forward`."""
        other_x, lam = self.other_x, self.lam
        partner: Tensor | None = self.partner[part]
        if isinstance(lam, Tensor):
            lam = lam[part]
        assert partner is not None
        if len(partner) < len(x):
            # Only the partners of this part make their pass.
            other_x, partner = (x if other_x is None else other_x)[partner], None
        return mixed_forward(model, stage_of(model, space), x[part], other_x, lam, partner=partner)


def require_mixable(x: Tensor) -> None:
    """Raise a TypeError for samples that cannot be mixed as they are."""
    if not x.is_floating_point():
        raise TypeError(
            f"x: got samples of dtype {x.dtype}, which cannot be mixed, expected a floating-point dtype, or mix.space: "
            "embedding or feature"
        )
