"""Parameters in two roles, with hooks on their gradients, without axes, and gradients that are nothing but rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_networks import Net, net
from gradient_truth import assert_layers_equal
from gradient_truth import sample_gradients as truth
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradmix
from gradmix.gradients import CoupledSamplesError, NoRuleError
from gradmix.gradients.directions import directional_derivatives

EXACT = 1e-9


def identity(model: nn.Module, batch: tuple[Any, Tensor], **given: Any) -> Any:
    return gradmix.sample_gradients(model, batch, sketch="identity", **given)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 6, dtype=x.dtype), torch.linspace(0.5, 2, 6, dtype=x.dtype)


def _parts() -> dict[str, Any]:
    return {"w": torch.randn(6, 6), "v": torch.randn(6, 6, 6), "b": torch.randn(6)}


ROLES = {
    "weight and bias of a layer norm": lambda m, x: F.layer_norm(x, (6,), m.b, m.b),
    "weight and bias of a batch norm": lambda m, x: F.batch_norm(x.transpose(1, 2), *_statistics(x), m.b, m.b),
    "weight and bias of a group norm": lambda m, x: F.group_norm(x.transpose(1, 2), 2, m.b, m.b),
    "weight and bias of an instance norm": lambda m, x: F.instance_norm(x.transpose(1, 2), None, None, m.b, m.b),
    "a scale, then a bias": lambda m, x: F.linear(x * m.b, m.w, m.b),
    "a bias, then a scale": lambda m, x: F.linear(x, m.w, m.b) * m.b,
    "a scale, then the bias of a bilinear layer": lambda m, x: F.bilinear(x * m.b, x, m.v, m.b),
    "a scale, then the bias of a convolution": lambda m, x: F.conv1d((x * m.b).transpose(1, 2), m.v, m.b, padding=3),
    "a norm's weight, then a bias": lambda m, x: F.linear(F.layer_norm(x, (6,), m.b), m.w, m.b),
    "a bias, then a norm's weight": lambda m, x: F.rms_norm(F.linear(x, m.w, m.b), (6,), m.b),
    "a norm's bias, then a layer's": lambda m, x: F.linear(F.layer_norm(x, (6,), None, m.b), m.w, m.b),
    "a factor of a product, then a bias": lambda m, x: F.linear((x @ m.b)[..., None] * x, m.w, m.b),
    "two layers' bias and a scale": lambda m, x: F.linear(F.linear(x, m.w, m.b).sin(), m.w, m.b) * m.b,
}


@pytest.mark.parametrize("name", ROLES, ids=str)
def test_a_parameter_in_two_roles_has_the_gradient_of_both(name: str) -> None:
    case = net(_parts, ROLES[name], 4, 6)
    model, batch = case.model(), case.batch()
    expected = truth(model, *batch)
    result = identity(model, batch)
    assert_layers_equal(result, expected, EXACT)
    used = {
        k: torch.randn_like(v[0]) for k, v in expected.items() if k in {n for p in result.layout for n in p.parameters}
    }
    found = directional_derivatives(model, batch, used, norms=True)
    assert torch.allclose(found.inner, sum((expected[k] * v).flatten(1).sum(1) for k, v in used.items()), rtol=EXACT)
    assert torch.allclose(found.norm, sum(expected[k].square().flatten(1).sum(1) for k in used).sqrt(), rtol=EXACT)


@pytest.mark.parametrize("view", [lambda p: p.view(()), lambda p: p.expand(()), lambda p: p.view(1)])
def test_a_view_of_a_parameter_without_axes(view: Any) -> None:
    case = net(lambda: {"shift": torch.tensor(0.5)}, lambda m, x: x.sin() + view(m.shift), 4, 6)
    model, batch = case.model(), case.batch()
    assert_layers_equal(identity(model, batch, without_rule="exact"), truth(model, *batch), EXACT)


# ------------------------------------------------------------------------------------------- hooks on the gradient


class Exponential(nn.Module):
    """Has a parameter without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.exp()


@pytest.mark.parametrize(
    ("kind", "without_rule"), [(nn.Tanh, "error"), (Exponential, "exact")], ids=["with rules", "row by row"]
)
def test_hooks_on_parameters_gradients_are_not_called(kind: type[nn.Module], without_rule: str) -> None:
    """They change or log what an optimiser gets, and are in place again afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), kind(), nn.Linear(5, 4)).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 4
    expected = truth(model, x, y, keep_dtype=True)
    called: list[Tensor] = []
    handle = model[2].weight.register_hook(lambda g: called.append(g) or g * 0)
    assert_layers_equal(identity(model, (x, y), without_rule=without_rule), expected, EXACT)
    assert not called
    F.cross_entropy(model(x), y).backward()
    assert len(called) == 1 and not model[2].weight.grad.any()
    handle.remove()
    F.cross_entropy(model(x), y).backward()
    assert len(called) == 1 and model[2].weight.grad.any()


# -------------------------------------------------------------------------------------- gradients that are rounding


def _shifted(m: Any, x: Tensor) -> Tensor:
    """The norm takes away again what is added to all entries: the gradient of the shift is 0, and rounding in fact."""
    return m.out(F.layer_norm(m.fc(x) + m.shift.exp(), (6,)).tanh().mean(1))


def _keys(m: Any, x: Tensor) -> Tensor:
    """What is added to all keys alike changes no attention."""
    h = m.fc(x)
    return m.out(F.scaled_dot_product_attention(h, h + m.shift.exp(), h).mean(1))


@pytest.mark.parametrize("use", [_shifted, _keys])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_are_rounding_are_not_taken_for_coupled_rows(use: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    size = (1,) if use is _shifted else (1, 6)
    model = Net(use, fc=nn.Linear(6, 6), shift=torch.randn(size), out=nn.Linear(6, 4)).to(dtype)
    for seed in range(4):
        x = torch.randn(9, 5, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
        result = identity(model, (x, torch.arange(9) % 4), without_rule="exact", layers=["shift"])
        assert float(result.vectors.abs().max()) < 64 * torch.finfo(dtype).eps


def test_coupled_rows_are_found_by_small_gradients_still() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.out((m.fc(x) * m.shift.exp() * 1e-3).sum(1) * (1 + x.mean())),
        fc=nn.Linear(6, 6),
        shift=torch.randn(1),
        out=nn.Linear(6, 4),
    ).double()
    batch = torch.randn(9, 5, 6, dtype=torch.float64), torch.arange(9) % 4
    with pytest.raises(CoupledSamplesError):
        identity(model, batch, without_rule="exact", layers=["shift"])


# ------------------------------------------------------------------------------------------------- refused by name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("without_rule", ["error", "exact"])
@pytest.mark.parametrize("layers", ["all", ["first"], ["last"]])
def test_parts_computed_again_are_refused_in_words(reentrant: bool, without_rule: str, layers: Any) -> None:
    model = Net(
        lambda m, x: m.last(checkpoint(lambda h: m.fc(h).relu(), m.first(x), use_reentrant=reentrant)).sum(1),
        first=nn.Linear(6, 6),
        fc=nn.Linear(6, 6),
        last=nn.Linear(6, 4),
    )
    with pytest.raises(
        ValueError, match=r"model: computes parts again in the backward pass \(torch.utils.checkpoint\)"
    ):
        identity(model, (torch.randn(3, 4, 6), torch.arange(3)), without_rule=without_rule, layers=layers)


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = nn.Linear(6, 4)
        batch = torch.randn(3, 6), torch.arange(3)
        with pytest.raises(ValueError, match=r"model: was made in torch\.inference_mode"):
            identity(model, batch)


class OfThreeAxes(nn.Module):
    """A table that is looked up once for all rows, by a model that takes nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.randn(7, 4)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        mixing = self.table[torch.arange(4)]
        assert mixing.ndim == 2, "a matrix is expected"
        return self.out((mixing @ x).sum(1))


def test_a_model_that_refuses_a_table_for_every_row_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = OfThreeAxes().double()
    batch = torch.randn(3, 4, 6, dtype=torch.float64), torch.arange(3)
    with pytest.raises(NoRuleError, match="'table'"):
        identity(model, batch)
    assert_layers_equal(identity(model, batch, without_rule="exact"), truth(model, *batch), EXACT)
