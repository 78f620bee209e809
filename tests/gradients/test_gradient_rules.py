"""Every layer rule, unsketched, against the loop over single samples; and what rules do not serve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gradient_networks import ARCHITECTURES, LAYERS, NO_RULE, TRAPS, USES, Case, Columns, Net, deepened
from gradient_truth import assert_layers_equal, assert_vectors_are_the_layers, cross_entropy
from gradient_truth import sample_gradients as truth
from thinning import part
from torch import Tensor, nn

import gradmix
from gradmix.gradients import NoRuleError
from gradmix.gradients.directions import directional_derivatives, mean_gradient

# torch's own remark on 'same' with even kernels, which the model's author gets from any forward pass.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

EXACT = 1e-9
SERVED = {**LAYERS, **USES}
# Convolutions in one and in three dimensions are the same rule as in two: float64 covers them.
ONCE = [name for name in SERVED if not name.startswith(("conv1d", "conv3d", "conv_transpose1d", "conv_transpose3d"))]


def identity(model: nn.Module, batch: tuple[Tensor, Tensor], **given):
    return gradmix.sample_gradients(model, batch, sketch="identity", **given)


@pytest.mark.parametrize("name", SERVED, ids=str)
def test_equals_the_loop_over_single_samples(name: str) -> None:
    case = SERVED[name]
    model, batch = case.model(), case.batch()
    result = identity(model, batch)
    assert result.vectors.dtype == torch.float64
    assert_layers_equal(result, truth(model, *batch), EXACT)
    assert_vectors_are_the_layers(result, len(batch[1]))


@pytest.mark.parametrize("name", [name for name, case in SERVED.items() if not case.tokens], ids=str)
def test_equals_the_loop_with_a_layer_below(name: str) -> None:
    case = deepened(SERVED[name])
    model, batch = case.model(seed=1), case.batch(seed=1)
    assert_layers_equal(identity(model, batch), truth(model, *batch), EXACT)


@pytest.mark.parametrize("name", part(ONCE, 3), ids=str)
def test_derivatives_along_a_direction_and_norms(name: str) -> None:
    case = SERVED[name]
    model, batch = case.model(seed=2), case.batch(seed=2)
    gradients = truth(model, *batch)
    g = torch.Generator().manual_seed(0)
    directions = {k: torch.randn(v.shape[1:], generator=g, dtype=torch.float64) for k, v in gradients.items()}
    used = {k: v for k, v in directions.items() if (gradients[k] != 0).any()} or directions
    result = directional_derivatives(model, batch, used, norms=True)
    single = torch.cat([gradients[k].reshape(len(batch[1]), -1) for k in used], 1)
    along = torch.cat([v.flatten() for v in used.values()])
    assert result.norm is not None and result.inner.shape == result.norm.shape == (len(batch[1]),)
    assert ((result.inner - single @ along).abs() <= EXACT * (single.abs() @ along.abs())).all()
    assert ((result.norm - single.norm(dim=1)).abs() <= EXACT * single.norm(dim=1)).all()


@pytest.mark.parametrize("name", ARCHITECTURES, ids=str)
def test_the_mean_gradient_is_the_mean_of_the_rows(name: str) -> None:
    case = ARCHITECTURES[name]
    model, batch = case.model(), case.batch()
    expected = {k: v.mean(0) for k, v in truth(model, *batch).items()}
    result = mean_gradient(model, batch, chunk_size=3)
    assert result.keys() == expected.keys()
    for k, v in expected.items():
        assert result[k].shape == v.shape and (result[k] - v).abs().max() <= EXACT * v.abs().max()


# The unit roundoff of float32, 2^-24, times the roundings along the longest chain here, forward and back.
FLOAT32 = 100 * 2**-24


@pytest.mark.parametrize("name", part(ONCE, 3), ids=str)
def test_in_float32(name: str) -> None:
    case = SERVED[name]
    model, (x, y) = case.model(torch.float32), case.batch(dtype=torch.float32)
    result = identity(model, (x, y))
    assert result.vectors.dtype == torch.float32
    assert_layers_equal(result, truth(model, x, y), FLOAT32)


# The loop runs under autocast too: what bfloat16 does to the network's own values is in both. But the loop rounds a
# weight's gradient to bfloat16 (unit roundoff 2^-9), and a batch may be added up in another order than single rows,
# which rounds differently at each of the eight products of an attention layer, forward and back.
BFLOAT16 = 16 * 2**-9


@pytest.mark.parametrize("name", part(ONCE, 3), ids=str)
def test_under_autocast_to_bfloat16(name: str) -> None:
    case = SERVED[name]
    model, (x, y) = case.model(torch.float32).eval(), case.batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = identity(model, (x, y))
        expected = truth(model, x, y, keep_dtype=True)
    assert result.vectors.dtype == torch.float32
    assert_layers_equal(result, expected, BFLOAT16)


# ------------------------------------------------------------------------------------------- what rules do not serve

SERVED_TOO = [
    "two views along the batch",
    "two views along the batch, without positions",
    "sequence first, merged",
    "sequence first, merged, as many positions as rows",
    "a token for every row, fed by no row",
    "a layer fed by the mean of the positions",
    "positions embedded for every row",
    "some rows of a weight",
    "some rows of a table",
    "some entries of a bias",
    "some entries of a scale",
    "rows of a weight used twice, overlapping",
    "one weight cut in three",
    "gradient turned round",
    "a hook that changes the output",
    "complex numbers inside",
]


@pytest.mark.parametrize("without_rule", ["error", "exact"])
@pytest.mark.parametrize("name", TRAPS, ids=str)
def test_exact_or_refused(name: str, without_rule: str) -> None:
    case = TRAPS[name]
    model, batch = case.model(), case.batch()
    try:
        result = identity(model, batch, without_rule=without_rule)
    except ValueError as error:
        assert name not in SERVED_TOO and str(error).startswith("model: ")
    else:
        assert_layers_equal(result, truth(model, *batch), EXACT)


@pytest.mark.parametrize("name", NO_RULE, ids=str)
def test_refused_by_name(name: str) -> None:
    case = NO_RULE[name]
    with pytest.raises(NoRuleError, match=r"module\.odd.*without_rule='exact'"):
        identity(case.model(), case.batch())


@pytest.mark.parametrize("name", NO_RULE, ids=str)
def test_served_exactly_on_request(name: str) -> None:
    case = deepened(NO_RULE[name]) if not NO_RULE[name].tokens else NO_RULE[name]
    model, batch = case.model(), case.batch()
    assert_layers_equal(identity(model, batch, without_rule="exact"), truth(model, *batch), EXACT)


@pytest.mark.parametrize("name", ["lstm", "weight norm", "sine of a parameter"])
def test_what_has_no_rule_can_be_left_out(name: str) -> None:
    case = deepened(NO_RULE[name])
    model, batch = case.model(), case.batch()
    result = identity(model, batch, layers=["before"])
    expected = {k: v for k, v in truth(model, *batch).items() if k.startswith("before")}
    assert_layers_equal(result, expected, EXACT)


# -------------------------------------------------------------------------------------------- layers and their matrices

MATRICES = {
    # case: (layer, its parameters, rows and columns of its matrix)
    "linear": ("module", ("module.weight", "module.bias"), (7, 6)),
    "linear without bias": ("module", ("module.weight",), (7, 5)),
    "linear, only its bias trained": ("module.bias", ("module.bias",), (7, 1)),
    "conv2d, plain": ("module", ("module.weight", "module.bias"), (6, 37)),
    "conv2d, groups": ("module", ("module.weight", "module.bias"), (6, 19)),
    "conv3d, depthwise": ("module", ("module.weight", "module.bias"), (4, 28)),
    "conv_transpose2d, no bias": ("module", ("module.weight",), (4, 54)),
    "embedding": ("module", ("module.weight",), (9, 4)),
    "layer norm": ("module", ("module.weight", "module.bias"), (6, 2)),
    "batch norm 2d": ("module", ("module.weight", "module.bias"), (6, 2)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_layers_matrix(name: str) -> None:
    case = LAYERS[name]
    layers = identity(case.model(), case.batch()).layout
    assert [(layer.name, layer.parameters, tuple(layer.shape)) for layer in layers] == [MATRICES[name]]


def test_layers_are_chosen_by_patterns() -> None:
    case = ARCHITECTURES["vit"]
    model, batch = case.model(), case.batch(3)
    whole = identity(model, batch)
    names = [layer.name for layer in whole.layout]
    chosen = {
        ("head",): ["head"],
        ("blocks.0.mlp",): ["blocks.0.mlp.0", "blocks.0.mlp.3"],
        ("blocks.*.norm1", "cls_token"): ["cls_token", "blocks.0.norm1", "blocks.1.norm1"],
        ("*.bias",): None,
        ("*",): names,
    }
    for patterns, expected in chosen.items():
        result = identity(model, batch, layers=list(patterns))
        if expected is not None:
            assert [layer.name for layer in result.layout] == expected
        for layer in result.layout:
            if layer.name in names:
                a, b = result.layer(layer.name), whole.layer(layer.name)
                assert (a - b).abs().max() <= 1e-12 * b.abs().max()
            else:  # a bias alone is the last column of its layer
                weight = whole.layer(layer.name.removesuffix(".bias"))
                assert torch.allclose(result.layer(layer.name)[..., 0], weight[..., -1])


def test_without_rule_exact_changes_nothing_where_rules_serve() -> None:
    for name in ("conv2d, everything", "attention", "embedding tied to the classifier", "class token, expanded"):
        case = SERVED[name]
        model, batch = case.model(), case.batch()
        assert torch.equal(identity(model, batch, without_rule="exact").vectors, identity(model, batch).vectors)


def test_an_unknown_layer_is_named() -> None:
    case = LAYERS["linear"]
    with pytest.raises(KeyError, match="'nothing'.*'module'"):
        identity(case.model(), case.batch()).layer("nothing")


# ------------------------------------------------------------------------------------------------------------ the loss


def squared(z: Tensor, y: Tensor) -> Tensor:
    return (z - F.one_hot(y, z.shape[1])).square().sum(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared error": squared,
    "label smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2, reduction="none"),
    "weighted classes": lambda z, y: F.cross_entropy(z, y, weight=torch.arange(1, 5, dtype=z.dtype), reduction="none"),
    "focal": lambda z, y: (lambda ce: (1 - (-ce).exp()) ** 2 * ce)(cross_entropy(z, y)),
    "entropy, without labels": lambda z, y: -(z.softmax(1) * z.log_softmax(1)).sum(1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_the_users_own(name: str) -> None:
    case = USES["residual"]
    model, batch = case.model(), case.batch(5)
    result = identity(model, batch, loss=LOSSES[name])
    assert_layers_equal(result, truth(model, *batch, LOSSES[name]), EXACT)


def test_a_loss_that_is_not_differentiable_in_part() -> None:
    """Rows on which the loss does not depend have zero gradients."""

    def ignoring(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, ignore_index=0, reduction="none")

    case = LAYERS["linear over positions"]
    model, (x, _) = case.model(), case.batch(4)
    y = torch.tensor([1, 0, 2, 0])
    result = identity(model, (x, y), loss=ignoring)
    assert_layers_equal(result, truth(model, x, y, ignoring), EXACT)
    assert (result.vectors[[1, 3]] == 0).all() and (result.vectors[[0, 2]].norm(dim=1) > 0).all()


# ------------------------------------------------------------------------------------------ calls one after the other


def test_lengths_may_vary_between_calls() -> None:
    case = USES["scaled dot products"]
    model = case.model()
    model.after = Net(lambda m, h: torch.tanh(h.sum(1)) @ m.matrix, matrix=torch.randn(6, 4).double())
    model.after.requires_grad_(False)
    for length, rows in ((5, 3), (3, 3), (4, 7), (3, 5), (1, 2), (15, 3)):
        x, y = torch.randn(rows, length, 6).double(), torch.randint(4, (rows,))
        assert_layers_equal(identity(model, (x, y)), truth(model, x, y), EXACT)


def test_a_model_that_was_changed_is_looked_at_again() -> None:
    """Frozen layers, replaced layers, another layout: nothing kept from an earlier call may be used."""
    case = Case(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)), (6,))
    model, batch = case.model(), case.batch()

    def check() -> None:
        assert_layers_equal(identity(model, batch), truth(model, *batch), EXACT)

    check()
    model[2].requires_grad_(False)
    check()
    model[2].requires_grad_(True)
    model[2].bias.requires_grad_(False)
    check()
    model[0] = nn.Linear(6, 6, bias=False).double()
    check()
    model[2] = Net(lambda m, h: F.bilinear(h, h, m.w), w=torch.randn(6, 6, 6)).double()
    check()
    model[2].use = lambda m, h: F.bilinear(h, h, m.w.sin())
    with pytest.raises(NoRuleError, match="sin"):
        identity(model, batch)
    model[2] = nn.LayerNorm(6).double()
    check()
    model[4] = nn.Linear(6, 8).double()  # a classifier that grew
    check()
    model[0], model[2] = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
    check()
    model[0].weight = model[2].weight
    check()


@pytest.mark.parametrize("rows", [3, 4, 5, 7])
def test_a_layout_that_changed_is_looked_at_again(rows: int) -> None:
    case = USES["sequence first, contiguous"]
    model, batch = case.model(), case.batch(rows)
    assert_layers_equal(identity(model, batch), truth(model, *batch), EXACT)
    model.module.use = lambda m, x: m.fc(x)
    assert_layers_equal(identity(model, batch), truth(model, *batch), EXACT)
    model.module.use = lambda m, x: m.fc(x.transpose(0, 1)).transpose(0, 1)
    assert_layers_equal(identity(model, batch), truth(model, *batch), EXACT)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_no_row_is_made_up_that_the_model_might_not_take(rows: int, dtype: torch.dtype) -> None:
    """Columns of categories with vocabularies of their own: only rows as they are given are safe to show."""
    model = Case(Columns, (3,)).model()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    x = torch.tensor([[1, 3, 8], [0, 2, 7], [1, 0, 5], [0, 3, 8], [1, 1, 6]])[:rows].to(dtype)
    y = torch.arange(rows) % 4
    result = identity(model, (x, y))
    given = set(map(tuple, x.tolist()))
    assert set(map(tuple, torch.cat(seen).tolist())) <= given
    model._forward_pre_hooks.clear()
    assert_layers_equal(result, truth(model, x, y), EXACT)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 4])
def test_rows_of_other_dtypes(rows: int, dtype: torch.dtype) -> None:
    """Images of bytes, which the model itself turns into numbers."""
    case = Case(lambda: Net(lambda m, x: m.fc(m.conv(x.to(m.fc.weight.dtype) / 8).flatten(1)),
                            conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(36, 4)), (3, 5, 5))  # fmt: skip
    g = torch.Generator().manual_seed(0)
    x = torch.randint(2 if dtype == torch.bool else 256, (rows, 3, 5, 5), generator=g).to(dtype)
    y = torch.arange(rows) % 4
    model = case.model()
    assert_layers_equal(identity(model, (x, y)), truth(model, x, y), EXACT)
