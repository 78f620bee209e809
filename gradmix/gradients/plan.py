"""The plan of a model's passes: its layers, the calls that use them, and the batch axis of each call's output."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.layers import Layer
from gradmix.gradients.rules import Placement, Rule


@dataclass(frozen=True)
class PlannedCall:
    """A call that has a rule.

    Attributes:
        rule: class of the rule.
        parameters: names of the parameters that the call uses.
        batch_axis: the axis of its output that holds the samples, if there is one.
        expands_input: whether the input is shared by all samples and must be expanded to a copy for each.
    """

    rule: type[Rule]
    parameters: tuple[str, ...]
    batch_axis: BatchAxis | None
    expands_input: bool


@dataclass
class Plan:
    """A model's layers and the calls that use them.

    Attributes:
        layers: layers with rules, in the order of their first call.
        exact: layers without rules, of a single parameter each; or all layers of a model whose samples follow no plan.
        calls: all calls that have a rule, in order, of selected parameters and others.
        placement: the place of each parameter with a rule in its layer.
        sample_bytes: bytes of the outputs of all calls for one sample.
        num_classes: number of the model's logits.
        verified: whether the samples of a whole batch have been found where the plan expects them.
        vectorised: whether ``torch.func`` computes all samples of the model at once; None: not known.
        half_precision: whether a call's output is of half precision, as under an autocast inside the model.
        verified_by_class: whether all samples of a batch have been checked in passes for each class.
        wanted: names of the selected parameters whose gradients the calls give; those without a call are unused.
        standardised: shapes of the inputs that ``batch_norm`` normalises by their own statistics: weights.
        draws_random_numbers: whether the model draws random numbers, as far as is known.
        passes: number of passes made by this plan.
        reads: hashes of the tensor values that the model read in passes in which the samples were at their places.
    """

    layers: tuple[Layer, ...]
    exact: tuple[Layer, ...]
    calls: tuple[PlannedCall, ...]
    placement: Placement
    sample_bytes: int
    num_classes: int
    verified: bool = False
    verified_by_class: bool = False
    half_precision: bool = False
    vectorised: bool | None = None
    wanted: tuple[str, ...] = ()
    standardised: tuple[torch.Size, ...] = ()
    draws_random_numbers: bool = False
    passes: int = 0
    reads: set[int] = field(default_factory=set)

    def parameters(self) -> list[str]:
        """Return the names of all selected parameters with a rule."""
        return [name for layer in self.layers for name in layer.parameters]


def plan_without_rules(layers: tuple[Layer, ...], num_classes: int) -> Plan:
    """Return a plan that watches no call: the gradients of all layers are computed sample by sample."""
    placement = Placement({}, {})
    return Plan((), layers, (), placement, sample_bytes=0, num_classes=num_classes)
