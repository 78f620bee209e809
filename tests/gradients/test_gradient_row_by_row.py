"""``without_rule="exact"`` where torch.func cannot run the model: a loop over the rows, and what tells it is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_networks import Case, Net, Slope, randomise
from gradient_truth import assert_layers_equal, by_class, flat, layer_matrix
from gradient_truth import sample_gradients as truth
from torch import Tensor, nn

import gradmix
from gradmix.gradients import CoupledSamplesError, NoRuleError
from gradmix.gradients.directions import directional_derivatives, mean_gradient
from gradmix.model.inputs import call_model

EXACT = 1e-9


def exactly(model: nn.Module, batch: tuple[Any, Tensor], **given):
    return gradmix.sample_gradients(model, batch, sketch="identity", without_rule="exact", **given)


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.first = options.get("batch_first", False)
        self.before, self.layer = nn.Linear(6, 5), kind(5, 4, **options)
        width = (options.get("proj_size") or 4) * (1 + options.get("bidirectional", False))
        self.after = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        h = self.layer(h)[0] if self.first else self.layer(h.transpose(0, 1))[0].transpose(0, 1)
        return self.after(h.sum(1))


class Packed(nn.Module):
    """Tokens and lengths, packed, the state at each row's own end."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.layer = nn.GRU(5, 4, batch_first=True, bidirectional=True)
        self.after = nn.Linear(8, 4)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.after(torch.cat(list(self.layer(packed)[1]), 1))


class Experts(nn.Module):
    """Each token goes through the expert of its largest score; experts without tokens are not called.

    Args:
        capacity: tokens that an expert takes, the others going by; None: all.
        position: whether all tokens of a row share an expert.
    """

    def __init__(self, count: int = 4, capacity: int | None = None, by_row: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(6, count)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))
        self.after = nn.Linear(6, 4)
        self.capacity, self.by_row = capacity, by_row

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.sum(1) if self.by_row else x.reshape(-1, 6)
        weight, chosen = self.gate(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            mine = (chosen == index).nonzero().flatten()[: self.capacity]
            if len(mine):
                out[mine] = weight[mine, None] * expert(tokens[mine]).sin()
        return self.after(out.view(len(x), -1, 6).sum(1))


class Cube(torch.autograd.Function):
    """x^3 times a parameter, without a rule for vmap."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x**3 * scale

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return 3 * x**2 * scale * d, (d * x**3).sum(tuple(range(d.ndim - 1)))


class Aliased(nn.Module):
    """Uses its parameter by another reference, which a swap of parameters by name does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.kept: dict[str, Tensor] = {}
        self.after = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.kept.setdefault("scale", self.scale)
        return self.after((x * scale.exp()).sum(1))


def _each(m: Any, x: Tensor) -> Tensor:
    rows = [h.sum(0) * (1.0 if h.sum().item() > 0 else -2.0) for h in x * m.scale.sin()]
    return m.after(torch.stack(rows))


def _in_place(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros(len(x), 6, dtype=x.dtype)
    for t in range(x.shape[1]):
        state += x[:, t] * m.scale.exp()
        state[:, 0].mul_(0.5)
    return m.after(state)


def _parts(**more: Any) -> dict[str, Any]:
    return {"scale": torch.randn(6), "after": nn.Linear(6, 4), **more}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "bidirectional": {"bidirectional": True, "batch_first": True},
    "three layers with dropout": {"num_layers": 3, "dropout": 0.5, "batch_first": True},
    "without bias": {"bias": False},
    "all": {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "bias": False},
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"{kind.__name__}, {name}": lambda kind=kind, options=options: Recurrent(kind, **options)
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for name, options in OPTIONS.items()
    },
    "LSTM, projected": lambda: Recurrent(nn.LSTM, proj_size=2, bidirectional=True),
    "RNN, rectified": lambda: Recurrent(nn.RNN, nonlinearity="relu", batch_first=True),
    "tokens routed to experts": Experts,
    "rows routed to experts": lambda: Experts(by_row=True),
    "more experts than tokens": lambda: Experts(40),
    "one expert": lambda: Experts(1),
    "a function of the user's own": lambda: Net(lambda m, x: m.after(Cube.apply(x, m.scale).sum(1)), **_parts()),
    "a value looked at": lambda: Net(_each, **_parts()),
    "in place": lambda: Net(_in_place, **_parts()),
    "a parameter by another reference": Aliased,
}


def rows(name: str, count: int = 7, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    case = Case(MODELS[name], (4, 6), rows=count)
    return case.model(), case.batch(seed=seed)


def same_loop(model: nn.Module, x: Any, y: Tensor) -> dict[str, Tensor]:
    """The truth without a copy of the model, in evaluation mode as the engine has it."""
    training = model.training
    model.eval()
    try:
        return truth(model, x, y, keep_dtype=True)
    finally:
        model.train(training)


@pytest.mark.parametrize("name", MODELS, ids=str)
def test_equals_the_loop_over_single_samples(name: str) -> None:
    model, (x, y) = rows(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = exactly(model, (x, y))
    expected = same_loop(model, x, y)
    assert_layers_equal(result, expected, EXACT)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and model.training


@pytest.mark.parametrize("name", ["GRU, bidirectional", "tokens routed to experts", "a value looked at"])
def test_sketches_classes_and_derivatives_agree_with_the_loop(name: str) -> None:
    model, (x, y) = rows(name, 9)
    expected = same_loop(model, x, y)
    given: dict[str, Any] = {"without_rule": "exact"}
    sketched = gradmix.sample_gradients(model, (x, y), rank=3, **given)
    whole = exactly(model, (x, y))
    sketch = gradmix.gradients.Rademacher(3, 0)
    for place in sketched.layout:
        g = layer_matrix(expected, place)
        left, right = (
            torch.eye(dim, dtype=torch.float64)
            if size == dim
            else sketch.matrix(place.name, side, size, dim, dtype=torch.float64, device="cpu")
            for side, size, dim in zip(("left", "right"), (place.rows, place.columns), place.shape, strict=True)
        )
        assert torch.allclose(sketched.layer(place.name), left @ g @ right.T, rtol=0, atol=EXACT * (1 + g.abs().max()))
    classes = gradmix.class_gradients(model, (x, y), sketch="identity", **given)
    sums = by_class(expected, y, classes.classes)
    for place in classes.layout:
        assert torch.allclose(classes.layer(place.name), layer_matrix(sums, place), rtol=0, atol=1e-12)
    assert {place.name for place in classes.layout} == {place.name for place in whole.layout}
    directions = mean_gradient(model, (x, y))
    assert all(torch.allclose(v, expected[k].mean(0), rtol=0, atol=1e-12) for k, v in directions.items())
    found = directional_derivatives(model, (x, y), directions, norms=True, **given)
    along = torch.cat([directions[k].flatten() for k in expected])
    assert torch.allclose(found.inner, flat(expected) @ along, rtol=1e-9)
    assert found.norm is not None and torch.allclose(found.norm, flat(expected).norm(dim=1), rtol=1e-9)


@pytest.mark.parametrize("chunk", [1, 2, 3, 256])
@pytest.mark.parametrize("name", ["tokens routed to experts", "rows routed to experts", "LSTM, plain", "one expert"])
def test_chunks_make_no_difference(name: str, chunk: int) -> None:
    """Whatever experts a chunk's rows go to, its gradients go to the same places, or an error says that they cannot."""
    model, (x, y) = rows(name, 8, seed=3)
    expected = same_loop(model, x, y)
    try:
        result = exactly(model, (x, y), chunk_size=chunk)
    except ValueError as error:
        assert "larger chunk_size= helps" in str(error) and "experts" in name
        result = exactly(model, (x, y), chunk_size=8)
    assert_layers_equal(result, expected, EXACT)


def test_an_expert_that_a_later_chunk_uses_first_is_named() -> None:
    model = Experts(2, by_row=True).double()
    with torch.no_grad():
        model.gate.weight.zero_()[0, 0], model.gate.weight[1, 0] = 1.0, -1.0
        model.gate.bias.zero_()
    x = torch.rand(6, 1, 6, dtype=torch.float64) + 0.5
    x[4:] *= -1
    batch = x, torch.arange(6) % 4
    for call in (gradmix.sample_gradients, gradmix.class_gradients):
        with pytest.raises(ValueError, match=r"'experts\.1\.weight' is used by sample 4 .*larger chunk_size"):
            call(model, batch, without_rule="exact", chunk_size=3)
    assert_layers_equal(exactly(model, batch, chunk_size=6), same_loop(model, *batch), EXACT)


def test_without_rules_rows_that_are_routed_are_refused_with_the_remedy() -> None:
    model, (x, y) = rows("rows routed to experts", 12)
    with pytest.raises(ValueError, match="without_rule='exact'"):
        gradmix.sample_gradients(model, (x, y))
    assert_layers_equal(exactly(model, (x, y)), same_loop(model, x, y), EXACT)


def test_rows_that_crowd_each_other_out_are_found_by_their_sum() -> None:
    """With a capacity, whether a row is served depends on the others; the few rows of the first look do not show it."""
    model, (x, y) = rows("rows routed to experts", 12)
    model.capacity = 3
    with torch.no_grad():
        model.gate.bias[0] += 50
    with pytest.raises(CoupledSamplesError, match="add up"):
        exactly(model, (x, y))
    model.capacity = 12
    assert_layers_equal(exactly(model, (x, y)), same_loop(model, x, y), EXACT)


def test_chance_in_evaluation_mode_is_found() -> None:
    model = Net(lambda m, x: m.after(F.dropout(x * m.scale.exp(), 0.5, training=True).sum(1)), **_parts()).double()
    with pytest.raises(CoupledSamplesError, match="without chance"):
        exactly(model, (torch.randn(5, 4, 6).double(), torch.arange(5) % 4))


def test_packed_sequences_of_two_inputs() -> None:
    model = Packed().double()
    randomise(model)
    tokens, lengths = torch.randint(9, (6, 5)), torch.tensor([3, 5, 1, 4, 5, 2])
    y = torch.arange(6) % 4
    result = exactly(model, ((tokens, lengths), y))
    singles = [
        torch.autograd.grad(
            F.cross_entropy(model(tokens[n : n + 1], lengths[n : n + 1]), y[n : n + 1]), list(model.parameters())
        )
        for n in range(6)
    ]
    names = [name for name, _ in model.named_parameters()]
    expected = {name: torch.stack(found) for name, found in zip(names, zip(*singles, strict=True), strict=True)}
    assert_layers_equal(result, expected, EXACT)


def test_a_table_with_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6, sparse=True), Experts(by_row=True)).double()
    tokens, y = torch.randint(9, (8, 4)), torch.arange(8) % 4
    expected = same_loop(model, tokens, y)
    expected["0.weight"] = torch.stack([g.to_dense() for g in expected["0.weight"].unbind()])
    assert_layers_equal(exactly(model, (tokens, y)), expected, EXACT)


def test_weight_norm_by_a_hook_leaves_the_layer_usable() -> None:
    """The hook writes the weight into the module in every forward pass; a tensor of torch.func must not stay there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(5, 6).double(), torch.arange(5) % 4
    with pytest.raises(NoRuleError, match="weight_g.*without_rule='exact'"):
        gradmix.sample_gradients(model, (x, y))
    before = model[0].weight.detach().clone()
    result = exactly(model, (x, y))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(model[0].weight)
    assert torch.equal(model[0].weight, before)
    assert_layers_equal(result, same_loop(model, x, y), EXACT)


def test_a_model_that_changes_its_input_changes_a_copy() -> None:
    for use in (
        lambda m, x: m.after(x.sub_(1).mul_(2).sum(1)),
        lambda m, x: m.after((x.sub_(1) * m.scale.exp()).sum(1)),
    ):
        model = Net(use, **_parts()).double()
        x, y = torch.randn(5, 4, 6).double(), torch.arange(5) % 4
        before = x.clone()
        result = exactly(model, (x, y))
        mean = mean_gradient(model, (x, y))
        assert torch.equal(x, before)
        copied = [truth(model, before[n : n + 1].clone(), y[n : n + 1], keep_dtype=True) for n in range(5)]
        expected = {name: torch.cat([single[name] for single in copied]) for name in copied[0]}
        assert_layers_equal(result, expected, EXACT)
        assert all(torch.allclose(v, expected[k].mean(0), rtol=1e-9, atol=1e-14) for k, v in mean.items())


def test_in_half_precision_the_loss_is_scaled() -> None:
    """Gradients below float16's smallest number survive, as they do in layers with rules."""
    model = nn.Sequential(nn.Linear(6, 5), Slope(), nn.Linear(5, 4))
    x, y = torch.randn(6, 6), torch.arange(6) % 4

    def tiny(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t, reduction="none") * 2.0**-26

    with torch.autocast("cpu", dtype=torch.float16):
        result = gradmix.sample_gradients(
            model, (x, y), sketch="identity", without_rule="exact", loss=tiny, scaler=2.0**24
        )
    expected = truth(model, x, y, tiny)
    assert_layers_equal(result, expected, 0.05)


def test_recurrent_layers_do_without_cudnn_and_other_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's recurrent layers have no backward pass in evaluation mode."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", True)
    monkeypatch.setattr(cudnn, "enabled", True)
    for name, enabled in (("LSTM, plain", False), ("in place", True)):
        model, batch = rows(name)
        seen = set()
        model.register_forward_pre_hook(lambda *_, seen=seen: seen.add((cudnn.enabled, cudnn.deterministic)))
        exactly(model, batch)
        mean_gradient(model, batch)
        assert seen == {(enabled, True)} and cudnn.enabled and cudnn.deterministic


def test_a_model_is_called_as_its_forward_takes_rows() -> None:
    model = Net(lambda m, x: m.after((x["a"] * m.scale.exp()).sum(1)), **_parts()).double()
    x, y = {"a": torch.randn(5, 4, 6).double()}, torch.arange(5) % 4
    result = exactly(model, (x, y))
    rows_of = [
        torch.autograd.grad(
            F.cross_entropy(call_model(model, {"a": x["a"][n : n + 1]}), y[n : n + 1]), list(model.parameters())
        )
        for n in range(5)
    ]
    names = [name for name, _ in model.named_parameters()]
    expected = {name: torch.stack(found) for name, found in zip(names, zip(*rows_of, strict=True), strict=True)}
    assert_layers_equal(result, expected, EXACT)
