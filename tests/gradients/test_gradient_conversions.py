"""A parameter converted, copied or cut before it is used has its exact gradient or is refused: never left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_networks import Net
from gradient_truth import assert_layers_equal
from gradient_truth import sample_gradients as truth
from torch import Tensor, nn

import gradmix
from gradmix.gradients import NoRuleError
from gradmix.gradients.directions import directional_derivatives

# The parameters are float64, what they meet is float32: each conversion is one, and rounds to 2^-24.
CLOSE = 1e-5
ROWS = 5
Use = Callable[[Any, Tensor], Tensor]


def model_of(use: Use) -> nn.Module:
    g = torch.Generator().manual_seed(0)

    def wide(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64))

    parameters = {"w": wide(7, 6), "s": wide(6), "p": wide(1, 9, 6), "q": wide(4, 4), "k": wide(5, 4, 2), "u": wide(6)}
    torch.manual_seed(0)
    model = Net(lambda m, x: m.out(use(m, x).float().flatten(1).sin()), **parameters, out=nn.LazyLinear(3))
    model.register_buffer("kept", torch.zeros(6))
    return model


def batch_of(use: Use) -> tuple[nn.Module, Tensor, Tensor]:
    """A model in which only the parameters that are used are trained, and its rows."""
    model, spare = model_of(use), model_of(use)
    x = torch.randn(ROWS, 4, 6, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(spare(x).sum(), list(spare.parameters()), allow_unused=True)
    with torch.no_grad():
        model(x)  # makes the last layer's parameters
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        parameter.requires_grad_(gradient is not None)
    return model, x, torch.arange(ROWS) % 3


def changed(w: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    change(w)
    return w


def stored(m: Any) -> Tensor:
    return m.kept.zero_().copy_(m.s)


def called(weight: Callable[[Any], Tensor]) -> Use:
    """By a functional call of a layer with a weight of ours."""
    layer = nn.Linear(6, 7, bias=False).requires_grad_(False)
    return lambda m, x: torch.func.functional_call(layer, {"weight": weight(m)}, (x,))


RULED: dict[str, Use] = {
    "linear, float": lambda m, x: F.linear(x, m.w.float()),
    "linear, to": lambda m, x: F.linear(x, m.w.to(x.dtype)),
    "linear, to a device and dtype": lambda m, x: F.linear(x, m.w.to("cpu", torch.float32)),
    "linear, to another tensor's": lambda m, x: F.linear(x, m.w.to(x)),
    "linear, type_as": lambda m, x: F.linear(x, m.w.type_as(x)),
    "linear, type": lambda m, x: F.linear(x, m.w.type(torch.float32)),
    "linear, double": lambda m, x: F.linear(x.double(), m.w.double()),
    "linear, clone": lambda m, x: F.linear(x.double(), m.w.clone()),
    "linear, torch.clone": lambda m, x: F.linear(x.double(), torch.clone(m.w)),
    "linear, cpu": lambda m, x: F.linear(x.double(), m.w.cpu()),
    "linear, contiguous": lambda m, x: x.double() @ m.w.t().contiguous(),
    "linear, twice": lambda m, x: F.linear(x, m.w.to(torch.float32).double().float()),
    "transposed, then converted": lambda m, x: x @ m.w.t().float(),
    "converted, then transposed": lambda m, x: x @ m.w.float().t(),
    "converted, transposed, copied": lambda m, x: x @ m.w.float().t().contiguous(),
    "rows, then converted": lambda m, x: F.linear(x, m.w[2:5].float()),
    "converted, then rows": lambda m, x: F.linear(x, m.w.float()[2:5]),
    "converted once, used twice": lambda m, x: (lambda w: F.linear(x, w) * F.linear(x.sin(), w))(m.w.float()),
    "einsum, type_as": lambda m, x: torch.einsum("ntd,cd->ntc", x, m.w.type_as(x)),
    "converted each time": lambda m, x: F.linear(x, m.w.float()) * F.linear(x.sin(), m.w.type_as(x)),
    "in a functional call": called(lambda m: m.w.float()),
    "embedding": lambda m, x: F.embedding(x[..., 0].abs().long() % 7, m.w.float()),
    "layer norm": lambda m, x: F.layer_norm(x, (6,), m.s.float(), m.u.float()),
    "convolution": lambda m, x: F.conv1d(x, m.k.float()),
    "scale": lambda m, x: x * m.s.float(),
    "positions": lambda m, x: x + m.p.float()[:, :4],
    "positions, cut before": lambda m, x: x + m.p[:, :4].to(x.dtype),
    "positions, cut before, every second": lambda m, x: x + m.p[:, 1:8:2].to(x.dtype),
    "a column": lambda m, x: x * m.w[:6, 2].float(),
    "square, transposed and copied": lambda m, x: x[..., :4] * m.q.t().contiguous().float(),
    "square, transposed and converted": lambda m, x: x[..., :4] * m.q.t().float(),
    "square, converted and transposed": lambda m, x: x[..., :4] * m.q.float().t(),
    "class token": lambda m, x: torch.cat([m.s.float().expand(len(x), 1, 6), x], 1),
}
"""Uses that have a rule behind the conversion."""

WITHOUT_RULE: dict[str, Use] = {
    "1 + w.float()": lambda m, x: x * (1 + m.s.float()),
    "exp(w.to())": lambda m, x: x * torch.exp(m.s.to(x.dtype)),
    "negated": lambda m, x: x * -m.s.float(),
    "doubled": lambda m, x: x * (m.s.float() * 2),
    "clone, doubled": lambda m, x: x * (m.s.clone() * 2),
    "of a type by name": lambda m, x: x * m.s.type("torch.FloatTensor").exp(),
    "plus 0": lambda m, x: F.linear(x.double(), m.w + 0),
    "cat": lambda m, x: x * torch.cat([m.s[:3], m.u[3:]]).float(),
    "stack": lambda m, x: x * torch.stack([m.s, m.u]).float().sum(0),
    "in place into a new tensor": lambda m, x: x * torch.zeros(6).copy_(m.s),
    "in place into a buffer": lambda m, x: x * stored(m),
    "changed in place": lambda m, x: F.linear(x, changed(m.w.float(), lambda w: w.mul_(2))),
    "a view changed in place": lambda m, x: F.linear(x, changed(m.w.float(), lambda w: w.t().mul_(2))),
    "a part changed in place": lambda m, x: F.linear(x, changed(m.w.clone().float(), lambda w: w[2:4].zero_())),
    "added to in place": lambda m, x: x * changed(m.s.float(), lambda s: s.add_(m.u.float().tanh())),
    "in a functional call, scaled": called(lambda m: m.w.float() * 0.5),
    "once by a rule and once without": lambda m, x: x * m.s.float() * m.s.float().cos(),
    "once by a rule and once converted without": lambda m, x: (x.double() * m.s).float() * m.s.float().exp(),
    "filters cut": lambda m, x: F.conv1d(x, m.k[1:4].float()),
    "padded": lambda m, x: F.linear(x, F.pad(m.w[:, :5].float(), (0, 1))),
    "flipped": lambda m, x: F.linear(x, m.w.float().flip(0)),
    "indexed": lambda m, x: F.linear(x, m.w.float()[[3, 1, 1]]),
    "normalised": lambda m, x: F.linear(x, F.normalize(m.w.float())),
    "layer norm of weights": lambda m, x: F.linear(x, F.layer_norm(m.w.float(), (6,))),
    "instance norm of weights": lambda m, x: F.linear(x, F.instance_norm(m.w.float()[None])[0]),
    "group norm of weights": lambda m, x: F.linear(x, F.group_norm(m.w.float(), 2)),
    "batch norm of weights": lambda m, x: F.linear(x, F.batch_norm(m.w.float().t(), None, None, training=True).t()),
    "batch norm of weights, with a gain": lambda m, x: F.linear(
        x, F.batch_norm(m.w.float(), None, None, m.s.float(), None, training=True)
    ),
    "inside vmap": lambda m, x: torch.func.vmap(lambda row: F.linear(row, m.w.float()))(x),
    "normalised by other weights": lambda m, x: F.linear(x, m.w.float() / (1 + m.s.float().norm())),
}
"""Uses that have none."""


def check(model: nn.Module, x: Tensor, y: Tensor, **given: Any) -> None:
    expected = truth(copy.deepcopy(model), x, y, keep_dtype=True)
    result = gradmix.sample_gradients(model, (x, y), sketch="identity", **given)
    assert_layers_equal(result, expected, CLOSE)


@pytest.mark.parametrize("name", RULED, ids=str)
def test_a_rule_behind_a_conversion_is_exact(name: str) -> None:
    model, x, y = batch_of(RULED[name])
    check(model, x, y)
    expected = truth(copy.deepcopy(model), x, y, keep_dtype=True)
    directions = {k: torch.randn(v.shape[1:], dtype=torch.float64) for k, v in expected.items()}
    inner = sum((expected[k].double().flatten(1) @ directions[k].flatten() for k in expected), torch.zeros(ROWS))
    found = directional_derivatives(
        model, (x, y), {k: v.to(dict(model.named_parameters())[k].dtype) for k, v in directions.items()}
    )
    assert (found.inner - inner).abs().max() <= CLOSE * inner.abs().max()


@pytest.mark.parametrize("name", WITHOUT_RULE, ids=str)
def test_without_a_rule_it_is_refused_by_name_or_exact(name: str) -> None:
    model, x, y = batch_of(WITHOUT_RULE[name])
    with pytest.raises(NoRuleError, match=r"got no rule for the per-sample gradient of '[wsuk]'.*, which is used by"):
        check(model, x, y)
    try:
        check(model, x, y, without_rule="exact")
    except NoRuleError as error:
        assert name == "in place into a buffer" and "torch.func cannot" in str(error)


@pytest.mark.parametrize("name", WITHOUT_RULE, ids=str)
def test_chosen_alone_it_is_not_called_unused(name: str) -> None:
    model, x, y = batch_of(WITHOUT_RULE[name])
    for used in [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("out")]:
        try:
            result = gradmix.sample_gradients(model, (x, y), sketch="identity", layers=[used])
        except NoRuleError:
            continue
        expected = truth(copy.deepcopy(model), x, y, keep_dtype=True)
        assert_layers_equal(result, {used: expected[used]}, CLOSE)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: F.linear(x.double(), m.w.detach()),
        lambda m, x: F.linear(x, m.w.data.float()),
        lambda m, x: x.double() @ torch.no_grad()(m.w.t)(),
        lambda m, x: F.linear(x.double(), torch.no_grad()(m.w.view)(7, 6)),
        lambda m, x: F.linear(x, torch.no_grad()(m.w.float)()),
    ],
    ids=["detached", "data", "a transpose made without autograd", "a view made so", "a conversion made so"],
)
def test_what_autograd_does_not_see_has_no_gradient(use: Use) -> None:
    model, x, y = batch_of(use)
    model.w.requires_grad_(True)
    check(model, x, y)


def test_a_tensor_of_the_models_own_that_requires_grad_takes_nothing_away() -> None:
    """It is no parameter; autograd's graph begins at it all the same."""
    torch.manual_seed(0)
    model = Net(lambda m, x: m.last(m.first(x * m.own[0]).tanh()), first=nn.Linear(6, 5), last=nn.Linear(5, 3)).double()
    model.own = [torch.rand(6, dtype=torch.float64, requires_grad=True)]
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.arange(4) % 3
    check(model, x, y)
    check(model, x, y, layers=["last", "first"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_of_autocast(dtype: torch.dtype) -> None:
    """A product under autocast converts its weight itself; the same weight is used in another way besides."""

    def use(m: Any, x: Tensor) -> Tensor:
        return m.fc(x) * (1 + m.fc.bias.float())

    torch.manual_seed(0)
    model = Net(use, fc=nn.Linear(6, 5))
    batch = torch.randn(4, 6), torch.arange(4)
    with torch.autocast("cpu", dtype=dtype):
        with pytest.raises(NoRuleError, match=r"'fc\.bias'"):
            gradmix.sample_gradients(model, batch)
        found = gradmix.sample_gradients(model, batch, sketch="identity", without_rule="exact")
    assert {name for layer in found.layout for name in layer.parameters} == {"fc.weight", "fc.bias"}
    assert_layers_equal(found, truth(model, *batch), 16 * torch.finfo(dtype).eps)


class Gated(nn.Module):
    """Uses ``extra`` for some batches only: in a way without a rule, or with one."""

    def __init__(self, ruled: bool) -> None:
        super().__init__()
        self.fc, self.extra, self.ruled = nn.Linear(6, 5), nn.Parameter(torch.rand(6)), ruled

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 0:
            x = x * self.extra if self.ruled else x * self.extra.exp()
        return self.fc(x)


@pytest.mark.parametrize("ruled", [True, False])
def test_a_use_that_only_later_batches_make_is_not_missed(ruled: bool) -> None:
    torch.manual_seed(0)
    model = Gated(ruled).double()
    x, y = torch.rand(4, 6, dtype=torch.float64), torch.arange(4)
    first = gradmix.sample_gradients(model, (-x, y), sketch="identity")
    assert_layers_equal(first, truth(model, -x, y), 1e-9)
    if not ruled:
        with pytest.raises(NoRuleError, match="'extra'"):
            gradmix.sample_gradients(model, (x, y), sketch="identity")
        return
    assert_layers_equal(gradmix.sample_gradients(model, (x, y), sketch="identity"), truth(model, x, y), 1e-9)


def test_a_use_that_only_some_rows_make_is_not_missed() -> None:
    """The rows that the plan is made from do not show it."""

    class Late(Gated):
        def forward(self, x: Tensor) -> Tensor:
            x = x * self.extra.exp() if bool((x[:, 0] > 0).any()) else x
            return self.fc(x)

    model = Late(ruled=False).double()
    x = -torch.rand(6, 6, dtype=torch.float64)
    x[5] *= -1
    with pytest.raises(ValueError, match="model: does not make the same calls"):
        gradmix.sample_gradients(model, (x, torch.arange(6) % 5))


def _added_by_torch(dtype: torch.dtype) -> float:
    """The eps that torch adds by default: x / sqrt(x^2 + eps) of a small x is x / sqrt(eps)."""
    small = torch.full((1,), 2.0**-12, dtype=dtype)
    return float((small.double() / F.rms_norm(small, (1,)).double()) ** 2 - small.double() ** 2)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rms_norm_adds_what_torch_adds(dtype: torch.dtype, scale: float, eps: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(32, eps=eps), nn.Linear(32, 5)).to(dtype)
    x, y = (torch.randn(6, 32) * scale).to(dtype), torch.arange(6) % 5
    double = copy.deepcopy(model).double()
    double[0].eps = _added_by_torch(dtype) if eps is None else eps
    result = gradmix.sample_gradients(model, (x, y), sketch="identity")
    assert_layers_equal(result, truth(double, x.double(), y, keep_dtype=True), 4 * max(torch.finfo(dtype).eps, 1e-6))
