"""What other engines get wrong, case by case: each test fails if the pitfall is put in.

A pitfall of values is a row of ``WRONG``: the right answer, and the answer with the pitfall in, which must differ.
Those that only a GPU has (streams, multiprocessors, sizes beyond 2^31) are in test_gpu_gradients.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gradient_networks import LAYERS, USES, Attend, Case, Net, around, logits, net
from gradient_truth import assert_layers_equal, by_class, cosines, cross_entropy, layer_matrix
from gradient_truth import sample_gradients as truth
from test_promises import photograph, same
from torch import Tensor, nn

import gradmix
from gradmix.gradients import NoRuleError

EXACT = 1e-9
Gradients = dict[str, Tensor]


def identity(model: nn.Module, batch: tuple[Tensor, Tensor], **given):
    return gradmix.sample_gradients(model, batch, sketch="identity", **given)


# ------------------------------------------------------------------------------------------------------------- values


def changed(**attributes: object) -> Callable[[nn.Module], nn.Module]:
    """The pitfall of a layer whose setting is not read."""

    def put_in(model: nn.Module) -> nn.Module:
        for name, value in attributes.items():
            setattr(model.module, name, value)
        return model

    return put_in


def zero_padding(model: nn.Module) -> nn.Module:
    model.module.padding_mode = "zeros"
    return model


def other_side(model: nn.Module) -> nn.Module:
    """Padding 'same' of an even kernel, its odd column on the left instead of on the right."""
    conv = model.module
    conv.padding = 0
    model.module = Net(lambda m, x: m.conv(F.pad(x, (1, 0, 1, 0))), conv=conv)
    return model


def first_use_missed(model: nn.Module) -> nn.Module:
    """Only the last use of a layer counts."""
    model.module.use = lambda m, x: m.fc(torch.relu(F.linear(x, m.fc.weight.detach(), m.fc.bias.detach())))
    return model


def fused_path(model: nn.Module) -> nn.Module:
    """The output projection is bypassed: its parameters get no gradient."""
    attention = model.module.attention
    attention.out_proj.weight.requires_grad_(False)
    attention.out_proj.bias.requires_grad_(False)
    return model


def bias_forgotten(model: nn.Module) -> nn.Module:
    model.module.bias.requires_grad_(False)
    return model


def same_model(model: nn.Module) -> nn.Module:
    return model


def mean_loss(z: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(z, y) / 4  # of a batch of four


def image(make: Callable[[], nn.Module], **more: object) -> Case:
    return around(make, 4, 6, 6, rows=4, **more)


TWICE = net(lambda: {"fc": nn.Linear(6, 6)}, lambda m, x: m.fc(torch.relu(m.fc(x))), 4, 6)

WRONG: dict[str, tuple[Case, Callable[[nn.Module], nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
    "padding mode circular": (
        image(lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular")),
        zero_padding,
        cross_entropy,
    ),
    "padding mode reflect": (
        image(lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect")),
        zero_padding,
        cross_entropy,
    ),
    "padding mode replicate": (
        image(lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="replicate")),
        zero_padding,
        cross_entropy,
    ),
    "string padding": (image(lambda: nn.Conv2d(4, 5, 2, padding="same", bias=False)), other_side, cross_entropy),
    "bias forgotten": (image(lambda: nn.Conv2d(4, 5, 3)), bias_forgotten, cross_entropy),
    "loss averaged": (image(lambda: nn.Conv2d(4, 5, 3)), same_model, mean_loss),
    "module used twice": (TWICE, first_use_missed, cross_entropy),
    "fused attention": (around(lambda: Attend(batch_first=True), 5, 6), fused_path, cross_entropy),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", WRONG, ids=str)
def test_values(name: str) -> None:
    case, pitfall, loss = WRONG[name]
    model, batch = case.model(), case.batch()
    right = truth(model, *batch)
    wrong = truth(pitfall(copy.deepcopy(model)), *batch, loss)
    wrong = dict(zip(right, wrong.values(), strict=True)) if len(right) == len(wrong) else wrong
    result = identity(model, batch)
    assert_layers_equal(result, right, EXACT)
    with pytest.raises((AssertionError, KeyError)):
        assert_layers_equal(result, wrong, EXACT)


@pytest.mark.parametrize(
    "name",
    ["conv2d, groups", "conv2d, depthwise, two a channel", "conv1d, dilation", "conv3d, padding same, dilation"],
)
def test_groups_and_dilation(name: str) -> None:
    """A rule that ignores either does not even fit in shape, or reads other windows."""
    case = LAYERS[name]
    model, batch = case.model(), case.batch()
    assert_layers_equal(identity(model, batch), truth(model, *batch), EXACT)


# --------------------------------------------------------------------------------------- a row's gradient is its own


@pytest.mark.parametrize("name", ["batch norm 2d", "conv2d, plain", "attention", "embedding", "residual"])
def test_a_row_does_not_depend_on_its_batch_mates(name: str) -> None:
    case = {**LAYERS, **USES}[name]
    model, (x, y) = case.model(), case.batch(7)
    whole = identity(model, (x, y)).vectors
    for rows in ([0], [6], [2, 5], [3, 1, 4, 0]):
        part = identity(model, (x[rows], y[rows])).vectors
        assert (part - whole[rows]).abs().max() <= 1e-12 * whole.abs().max()


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize(
    "name", ["conv2d, plain", "attention, sequence first", "embedding", "windows merged with rows"]
)
def test_the_chunk_size_does_not_matter(name: str, chunk_size: int) -> None:
    case = {**LAYERS, **USES}[name]
    model, batch = case.model(), case.batch(7)
    whole = gradmix.sample_gradients(model, batch, rank=3).vectors
    result = gradmix.sample_gradients(model, batch, rank=3, chunk_size=chunk_size).vectors
    assert (result - whole).abs().max() <= 1e-12 * whole.abs().max()


class Aside(nn.Module):
    """Calls a layer whose output it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.aside, self.head = nn.Conv2d(2, 3, 3, stride=2), nn.Conv2d(2, 4, 3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_a_layer_that_does_not_contribute_has_a_gradient_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = Aside().double(), (torch.randn(6, 2, 7, 7).double(), torch.tensor([3, 0, 3, 1, 1, 3]))
    expected = truth(model, *batch)
    empty = torch.empty

    def filled(*size: int, **more) -> Tensor:
        made = empty(*size, **more)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    # Memory that nobody wrote is often zero by chance.
    monkeypatch.setattr(torch, "empty", filled)
    samples, classes = identity(model, batch), gradmix.class_gradients(model, batch, sketch="identity")
    assert_layers_equal(samples, expected, 1e-12)
    assert_layers_equal(classes, by_class(expected, batch[1], classes.classes), 1e-12)
    (aside,) = (k for k, layer in enumerate(classes.layout) if layer.name.startswith("aside"))
    assert not samples.layer("aside").any() and not classes.layer("aside").any()
    assert not classes.square_norms[:, aside].any() and bool(classes.square_norms.isfinite().all())


def test_the_same_bits_from_run_to_run() -> None:
    case = LAYERS["encoder layer, norm first True, batch first True"]
    model, batch = case.model(torch.float32), case.batch(64, dtype=torch.float32)
    first, second = (gradmix.class_gradients(model, batch, rank=4) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors) and torch.equal(first.square_norms, second.square_norms)


# -------------------------------------------------------------------------------------------- modes of the network


def batch_norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4))


def test_batch_norm_in_training_mode_reads_and_keeps_its_running_statistics() -> None:
    case = Case(batch_norm_net, (6,), rows=5)
    model, batch = case.model(), case.batch()
    before = photograph(model, batch)
    assert model[1].training
    assert_layers_equal(identity(model, batch), truth(model, *batch), EXACT)
    assert same(photograph(model, batch), before)


def statistics_of_the_batch(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


BATCH_STATISTICS = {
    "without running statistics": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False)),
    "set to training in its forward": lambda: Net(
        lambda m, x: F.batch_norm(m.fc(x), m.mean, m.var, m.w, training=True),
        fc=nn.Linear(6, 5),
        mean=nn.Buffer(torch.zeros(5)),
        var=nn.Buffer(torch.ones(5)),
        w=torch.randn(5),
    ),
    "without parameters": lambda: Net(lambda m, x: statistics_of_the_batch(m.fc(x)), fc=nn.Linear(6, 5)),
}


@pytest.mark.parametrize("name", BATCH_STATISTICS, ids=str)
@pytest.mark.parametrize("without_rule", ["error", "exact"])
def test_statistics_of_the_batch_are_refused_with_the_remedy(name: str, without_rule: str) -> None:
    case = Case(BATCH_STATISTICS[name], (6,), rows=5)
    model, batch = case.model(), case.batch()
    before = photograph(model, batch)
    with pytest.raises(ValueError, match=r"(?i)statistics of the batch.*(running statistics|GroupNorm)"):
        identity(model, batch, without_rule=without_rule)
    assert same(photograph(model, batch), before)


def test_dropout_is_off_and_every_pass_the_same() -> None:
    case = logits(
        lambda: {"fc": nn.Linear(6, 60), "drop": nn.Dropout(0.9), "out": nn.Linear(60, 4)},
        lambda m, x: m.out(m.drop(m.fc(x))),
        6,
    )
    model, batch = case.model(), case.batch()
    first = identity(model, batch)
    assert_layers_equal(first, truth(model, *batch), EXACT)
    assert torch.equal(first.vectors, identity(model, batch).vectors)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda c: c.__name__)
def test_never_zeros_for_want_of_autograd(context: Callable) -> None:
    case = LAYERS["linear over positions"]
    model, batch = case.model(), case.batch()
    expected = truth(model, *batch)
    with context():
        result = identity(model, batch)
    assert_layers_equal(result, expected, EXACT)


def test_tensors_made_in_inference_mode_are_taken() -> None:
    case = LAYERS["linear over positions"]
    model = case.model()
    with torch.inference_mode():
        batch = case.batch()
    assert batch[0].is_inference()
    assert_layers_equal(identity(model, batch), truth(model, *case.batch()), EXACT)


def test_a_model_without_trained_parameters_is_refused() -> None:
    model = LAYERS["linear"].model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"model.*requires gradients"):
        identity(model, LAYERS["linear"].batch())


# --------------------------------------------------------------------------------------------- the caller's own things


class Bang(torch.autograd.Function):
    """Raises in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, d: Tensor) -> Tensor:
        raise RuntimeError("out of luck")


def _raise(*_: object) -> Tensor:
    raise RuntimeError("out of luck")


def busy(model: nn.Module, batch: tuple[Tensor, Tensor], backward_hooks: bool) -> nn.Module:
    """Gradients accumulated, hooks of the user's, one layer in evaluation mode, one parameter frozen."""
    cross_entropy(model(batch[0]), batch[1]).sum().backward()
    list(model.parameters())[-1].requires_grad_(False)
    model[0].eval()
    model[0].register_forward_hook(lambda *_: None)
    if backward_hooks:
        model[-1].register_full_backward_hook(lambda *_: None)
    next(model.parameters()).register_hook(lambda g: g)
    return model


class Slope(nn.Module):
    """Uses a parameter in a way without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.25, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.slope.exp())


FAILURES: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "nothing": (nn.Tanh, {}),
    "the forward pass": (lambda: Net(_raise), {}),
    "the backward pass": (lambda: Net(lambda m, x: Bang.apply(x)), {}),
    "the loss": (nn.Tanh, {"loss": _raise}),
    "nothing, by torch.func": (Slope, {"without_rule": "exact"}),
    "the loss, by torch.func": (Slope, {"without_rule": "exact", "loss": _raise}),
    "nothing, by layers": (nn.Tanh, {"layers": ["0", "1"]}),
    "the search for rules": (Slope, {"error": "got no rule"}),
    "the loss's backward pass": (nn.Tanh, {"loss": lambda z, y: Bang.apply(cross_entropy(z, y))}),
}


@pytest.mark.parametrize("call", [gradmix.sample_gradients, gradmix.class_gradients], ids=lambda f: f.__name__)
@pytest.mark.parametrize("where", FAILURES, ids=str)
def test_everything_is_restored_when_it_fails_in(where: str, call: Callable) -> None:
    layer, given = FAILURES[where]
    parts = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4)]
    case = Case(lambda: nn.Sequential(*parts), (6,), rows=5)
    batch = case.batch()
    # torch.func does not go through modules with backward hooks.
    model = busy(case.model(), batch, backward_hooks="torch.func" not in where)
    model[2] = layer()
    model[2].train()
    batch[0].requires_grad_()
    before = photograph(model, batch)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    forwards = {name: module.forward.__func__ for name, module in model.named_modules()}
    given = dict(given)
    message = given.pop("error", "out of luck")
    if where.startswith("nothing"):
        call(model, batch, rank=2, **given)
    else:
        with pytest.raises((RuntimeError, ValueError), match=message):
            call(model, batch, rank=2, **given)
    after = photograph(model, batch)
    assert [k for k in before if not same(before[k], after[k])] == []
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {name: module.forward.__func__ for name, module in model.named_modules()} == forwards
    assert batch[0].grad is None
    # Nothing of the engine's is left behind: torch's functions are its own again.
    assert torch.overrides._get_current_function_mode() is None


def test_gradient_accumulation_goes_on_as_if_nothing_had_happened() -> None:
    case = LAYERS["conv2d, plain"]
    (x, y), model = case.batch(6), case.model()
    alone = copy.deepcopy(model)
    for part, interrupted in ((slice(0, 3), True), (slice(3, 6), True)):
        for m in (model, alone):
            cross_entropy(m(x[part]), y[part]).sum().backward()
        if interrupted:
            gradmix.class_gradients(model, (x, y), rank=2)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters(), strict=True))


def test_a_graph_of_the_callers_survives_a_call_between_forward_and_backward() -> None:
    case = LAYERS["conv2d, plain"]
    (x, y), model = case.batch(), case.model()
    expected = torch.autograd.grad(cross_entropy(model(x), y).sum(), list(model.parameters()))
    value = cross_entropy(model(x), y).sum()
    gradmix.sample_gradients(model, (x, y), rank=2)
    found = torch.autograd.grad(value, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_results_carry_no_graph() -> None:
    case = LAYERS["conv2d, plain"]
    model, batch = case.model(), case.batch()
    samples, classes = gradmix.sample_gradients(model, batch, rank=2), gradmix.class_gradients(model, batch, rank=2)
    assert not samples.vectors.requires_grad and not classes.vectors.requires_grad


# ----------------------------------------------------------------------------------------------- automatic precision


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Flatten(), nn.Linear(96, 4))


SMALL = Case(small_net, (3, 6, 6), rows=5)
SLOPE = Case(lambda: nn.Sequential(nn.Linear(6, 5), Slope(), nn.Linear(5, 4)), (6,), rows=5)
# Unit roundoffs: bfloat16 2^-9, float16 2^-12; about thirty roundings one after the other.
ROUNDING = {torch.bfloat16: 30 * 2**-9, torch.float16: 30 * 2**-12}


@pytest.mark.parametrize("scale", [None, 1.0, 1024.0, "GradScaler"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_under_autocast_the_loss_scale_is_divided_out(dtype: torch.dtype, scale: object) -> None:
    model, (x, y) = SMALL.model(torch.float32), SMALL.batch(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0) if scale == "GradScaler" else scale
    state = scaler.state_dict() if scale == "GradScaler" else None
    with torch.autocast("cpu", dtype=dtype):
        result = identity(model, (x, y), scaler=scaler)
    assert result.vectors.dtype == torch.float32
    assert_layers_equal(result, truth(model, x, y), ROUNDING[dtype])
    if state is not None:
        assert scaler.state_dict() == state


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_sketches_under_autocast(dtype: torch.dtype) -> None:
    """In either half type the factors are those of bfloat16 at the worst, and sums are made in float32."""
    model, batch = SMALL.model(torch.float32), SMALL.batch(dtype=torch.float32)
    expected = gradmix.sample_gradients(model, batch, rank=3)
    with torch.autocast("cpu", dtype=dtype):
        result = gradmix.sample_gradients(model, batch, rank=3)
    assert result.vectors.dtype == torch.float32
    for layer in result.layout:
        a, b = result.layer(layer.name), expected.layer(layer.name)
        assert (a - b).norm() <= ROUNDING[torch.bfloat16] * b.norm()


def test_a_scale_without_autocast_is_divided_out_exactly() -> None:
    model, batch = SMALL.model(torch.float32), SMALL.batch(dtype=torch.float32)
    assert torch.equal(identity(model, batch, scaler=4096.0).vectors, identity(model, batch).vectors)
    scaled, plain = (gradmix.class_gradients(model, batch, rank=3, scaler=scaler) for scaler in (4096.0, None))
    assert torch.equal(scaled.vectors, plain.vectors)
    assert torch.equal(scaled.square_norms, plain.square_norms)
    exact, expected = (
        gradmix.class_gradients(SLOPE.model(), SLOPE.batch(), rank=2, scaler=scaler, without_rule="exact")
        for scaler in (4096.0, None)
    )
    assert torch.allclose(exact.vectors, expected.vectors, rtol=1e-12)
    assert torch.allclose(exact.square_norms, expected.square_norms, rtol=1e-12)


def test_a_half_model_is_accumulated_in_float32() -> None:
    model, (x, y) = SMALL.model(torch.bfloat16), SMALL.batch(dtype=torch.bfloat16)
    result = identity(model, (x, y))
    assert result.vectors.dtype == torch.float32
    assert_layers_equal(result, truth(model, x, y), 2 * ROUNDING[torch.bfloat16])


def test_an_overflow_in_float16_is_an_error_that_names_the_scale() -> None:
    model, batch = SMALL.model(torch.float32), SMALL.batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises((ValueError, RuntimeError), match="scaler"):
        identity(model, batch, scaler=2.0**30)


def test_gradients_too_small_for_float16_come_back_with_a_scale() -> None:
    """Without the scale they would be zeros, and no error."""
    case = Case(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), (6,), rows=5)
    model, (x, y) = case.model(torch.float32), case.batch(dtype=torch.float32)

    def tiny(z: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(z.float(), labels) * 1e-9

    with torch.autocast("cpu", dtype=torch.float16):
        result = identity(model, (x, y), loss=tiny, scaler=2.0**28)
    expected = truth(model, x, y, lambda z, labels: cross_entropy(z, labels) * 1e-9)
    assert_layers_equal(result, expected, ROUNDING[torch.float16])


# --------------------------------------------------------------------------------------------- zeros and odd sizes


def test_the_cosine_with_a_zero_gradient_is_zero() -> None:
    case = USES["soft labels"]
    model, (x, y) = case.model(), case.batch(4)
    model.eval()
    with torch.no_grad():
        y[1] = model(x[1:2]).softmax(1)[0]
    model.fc.bias.requires_grad_(False)
    x[2] = 0  # the weight's gradient is zero whatever the label
    cosine = identity(model, (x, y)).cosine()
    exact = torch.tensor([True, False, False, True])
    assert torch.isfinite(cosine).all()
    assert (cosine[2] == 0).all() and (cosine[:, 2] == 0).all()
    assert torch.allclose(cosine.diagonal()[exact], torch.ones(2, dtype=cosine.dtype))


def test_a_class_with_a_zero_gradient() -> None:
    case = USES["one class"]
    result = gradmix.class_gradients(case.model(), case.batch(), rank=2)
    assert torch.equal(result.vectors, torch.zeros_like(result.vectors))
    assert torch.equal(result.cosine(), torch.zeros(1, 1, dtype=result.vectors.dtype))


def test_classes_without_samples_are_not_there() -> None:
    case = LAYERS["linear"]
    model, (x, _) = case.model(), case.batch(5)
    y = torch.tensor([3, 0, 3, 3, 0])
    result = gradmix.class_gradients(model, (x, y), rank=2)
    assert result.classes.tolist() == [0, 3] and result.counts.tolist() == [2, 3]
    assert torch.isfinite(result.mean()).all()


@pytest.mark.parametrize("width", [1, 3, 15, 17, 33])
@pytest.mark.parametrize("rank", [1, 5, 16, 31])
def test_sizes_that_are_no_multiple_of_a_tile(rank: int, width: int) -> None:
    """Held against L G R' with the sketch's own matrices in float64."""
    case = Case(lambda: nn.Sequential(nn.Linear(7, width), nn.Tanh(), nn.Linear(width, 4)), (3, 7), rows=5)
    model, batch = case.model(), case.batch()
    flat = nn.Sequential(model, nn.Flatten(), nn.Unflatten(1, (3, 4)), Net(lambda m, x: x.sum(1)))
    gradients = truth(flat, *batch)
    result = gradmix.sample_gradients(flat, batch, rank=rank)
    sketch = gradmix.gradients.Rademacher(rank, 0)
    for layer in result.layout:
        g = layer_matrix(gradients, layer)
        left, right = (
            torch.eye(dim, dtype=torch.float64)
            if size == dim
            else sketch.matrix(layer.name, side, size, dim, dtype=torch.float64, device="cpu")
            for side, size, dim in (
                ("left", layer.rows, layer.shape[0]),
                ("right", layer.columns, layer.shape[1]),
            )
        )
        assert (result.layer(layer.name) - left @ g @ right.T).abs().max() <= EXACT * g.abs().max()


def test_cosines_of_rows_are_those_of_the_whole_gradients() -> None:
    case = SMALL
    model, batch = case.model(), case.batch()
    expected = truth(model, *batch)
    result = identity(model, batch)
    flat = torch.cat([layer_matrix(expected, layer).flatten(1) for layer in result.layout], 1)
    assert (result.cosine() - cosines(flat, flat)).abs().max() <= EXACT


def test_a_hook_of_the_model_on_a_layers_output_changes_its_gradient() -> None:
    """As gradients are scaled or reversed: the engine reads the gradient after such hooks, whatever was first."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if h.requires_grad:
                h.register_hook(lambda gradient: gradient * 2)
            return self.last(h.relu())

    model, x, y = Scaled().double(), torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 4
    assert_layers_equal(identity(model, (x, y)), truth(model, x, y), EXACT)


@pytest.mark.parametrize("norms", [True, False])
def test_logits_of_a_batch_that_is_cut_to_its_longest_text(norms: bool) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(9, 6), nn.Linear(6, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.embedding(tokens[:, : int((tokens > 0).sum(1).max())]))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, 0], labels, reduction="none")

    model, tokens, y = Cut().double(), torch.randint(1, 9, (18, 5)), torch.arange(18) % 3
    tokens[torch.arange(5) > torch.arange(18)[:, None] % 5] = 0
    result = gradmix.class_gradients(model, (tokens, y), loss=loss, sketch="identity", norms=norms)
    assert_layers_equal(result, by_class(truth(model, tokens, y, loss), y, result.classes), EXACT)


@pytest.mark.parametrize("by_method", [True, False])
def test_a_gradient_that_the_forward_pass_computes_is_not_missed(by_method: bool) -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                at = x.detach().requires_grad_()
                energy = self.first(at).tanh().sum()
                if by_method:
                    energy.backward(inputs=[at])
                    step = at.grad
                else:
                    (step,) = torch.autograd.grad(energy, at, create_graph=True)
            return self.last(self.first(x + step).relu())

    model, x, y = Energy().double(), torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 2
    why = "'first.weight', which is used in a forward pass that computes gradients itself"
    with pytest.raises(NoRuleError, match=why):
        identity(model, (x, y))
    expected = truth(model, x, y)
    assert_layers_equal(identity(model, (x, y), without_rule="exact"), expected, EXACT)
    result = gradmix.class_gradients(model, (x, y), sketch="identity", norms=False, without_rule="exact")
    assert_layers_equal(result, by_class(expected, y, result.classes), EXACT)
