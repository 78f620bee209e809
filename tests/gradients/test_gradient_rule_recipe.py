"""The recipe for a new layer rule (gradmix/gradients/rules/__init__.py), followed word by word."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from gradient_networks import deepened, net
from gradient_truth import assert_layers_equal
from gradient_truth import sample_gradients as truth

import gradmix
from gradmix.gradients import NoRuleError, directional_derivatives, rules
from gradmix.gradients.rules import RULES, Outer, Rule, register


def weight() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(6, 5)}


CASES = {
    "vectors": net(weight, lambda m, x: torch.tensordot(x, m.w, 1), 6),
    "positions": net(weight, lambda m, x: torch.tensordot(x, m.w, dims=1), 4, 6),
    "as many positions as samples": net(weight, lambda m, x: torch.tensordot(x, m.w, dims=1), 3, 6),
    "sequence first": net(weight, lambda m, x: torch.tensordot(x.transpose(0, 1), m.w, 1).transpose(0, 1), 4, 6),
    "above a layer": deepened(net(weight, lambda m, x: torch.tensordot(x, m.w, 1), 4, 6)),
}


def example() -> str:
    """The code at the end of the recipe."""
    assert rules.__doc__ is not None
    return textwrap.dedent(rules.__doc__.split("::\n")[-1])


@pytest.fixture
def registered() -> Iterator[type[Rule]]:
    before = dict(RULES)
    names = {"torch": torch, "register": register, "Rule": Rule, "Outer": Outer}
    exec(example(), names)
    yield names["TensorDot"]
    RULES.clear()
    RULES.update(before)


def test_the_example_has_about_twenty_lines() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= 22


@pytest.mark.parametrize("name", CASES, ids=str)
def test_the_registered_rule_equals_the_loop_over_single_samples(name: str, registered: type[Rule]) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    assert RULES[torch.tensordot] is registered
    assert_layers_equal(gradmix.sample_gradients(model, batch, sketch="identity"), truth(model, *batch), 1e-9)


def test_the_registered_rule_serves_directions_and_norms(registered: type[Rule]) -> None:
    model, batch = CASES["positions"].model(), CASES["positions"].batch()
    (gradients,) = truth(model, *batch).values()
    flat, direction = gradients.flatten(1), torch.arange(30.0, dtype=torch.float64).view(6, 5)
    name = next(name for name, _ in model.named_parameters())
    result = directional_derivatives(model, batch, {name: direction}, norms=True)
    assert torch.allclose(result.inner, flat @ direction.flatten(), rtol=1e-9)
    assert result.norm is not None and torch.allclose(result.norm, flat.norm(dim=1), rtol=1e-9)


def test_without_the_rule_the_function_is_refused_by_name() -> None:
    model, batch = CASES["positions"].model(), CASES["positions"].batch()
    with pytest.raises(NoRuleError, match=r"'module\.w', which is used by torch\.functional\.tensordot\."):
        gradmix.sample_gradients(model, batch)


def test_a_call_that_the_rule_refuses_is_refused_with_its_reason(registered: type[Rule]) -> None:
    case = net(lambda: {"w": torch.randn(4, 6, 5)}, lambda m, x: torch.tensordot(x, m.w, 2), 4, 6)
    with pytest.raises(NoRuleError, match=r"tensordot: it is contracted as other than a matrix over one axis"):
        gradmix.sample_gradients(case.model(), case.batch())


def test_a_function_has_one_rule() -> None:
    with pytest.raises(ValueError, match=r"functions: linear has the rule Linear already"):
        register(F.linear)(type("Other", (Rule,), {}))
    assert RULES[F.linear].__name__ == "Linear"
