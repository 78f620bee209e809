"""Sums by class without norms: when a pass for each class is taken, and that it keeps what layer rules promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_networks import ARCHITECTURES, LAYERS, USES, Case, Net, Slope, randomise
from gradient_truth import assert_layers_equal, by_class, cross_entropy
from gradient_truth import sample_gradients as truth
from test_promises import photograph, same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradmix
from gradmix.gradients import BatchStatisticsError, ClassGradients, CoupledSamplesError, NoRuleError, engine

EXACT = 1e-9
RULES, PASSES, SINGLE = "layer rules", "pass per class", "per sample"


class Recurrent(nn.Module):
    """Tokens through an LSTM, which has no layer rule, between two layers that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 5, padding_idx=0), nn.LSTM(5, 4, batch_first=True)
        self.after = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.after(self.layer(self.embedding(tokens))[0].sum(1))


class Tied(nn.Module):
    """One matrix for tokens and logits, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.out = nn.Embedding(9, 5), nn.Linear(5, 5), nn.Linear(5, 9, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.inner(self.inner(self.embedding(tokens)).tanh()).mean(1))


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))


def _convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2, bias=False)]
    return nn.Sequential(*layers, nn.GroupNorm(2, 6), nn.GELU(), nn.Flatten(), nn.Linear(24, 4))


RULED: dict[str, Case] = {
    "perceptron": Case(_perceptron, (6,), rows=12),
    "convolutions": Case(_convolutions, (3, 6, 6), rows=12),
    "vit": ARCHITECTURES["vit"],
    "text classifier, padding": ARCHITECTURES["text classifier"],
    "tied": Case(Tied, (5,), tokens=9, rows=12, classes=9),
    "soft labels": Case(_perceptron, (6,), rows=12, soft=True),
}
RECURRENT = Case(Recurrent, (6,), tokens=9, rows=40)


def sums(model: nn.Module, batch: tuple[Any, Any], **given: Any) -> ClassGradients:
    return gradmix.class_gradients(model, batch, **({"sketch": "identity", "norms": False} | given))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many classes there are, and whether torch.func can run the model or not."""
    monkeypatch.setattr(engine, "MOST_CLASSES", 1000)
    monkeypatch.setattr(engine, "LEAST_SAMPLES", 0)
    monkeypatch.setattr(engine.Engine, "_is_vectorised", lambda *_: False)


@pytest.fixture
def calls() -> Callable[[nn.Module], list[int]]:
    def count(model: nn.Module) -> list[int]:
        seen: list[int] = []
        model.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
        return seen

    return count


# ---------------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("chunk_size", [5, 256])
@pytest.mark.parametrize(("most", "way"), [(1000, PASSES), (0, RULES)])
@pytest.mark.parametrize("name", RULED)
def test_either_way_gives_the_sums_of_a_loop_over_single_samples(
    name: str, most: int, way: str, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MOST_CLASSES", most)
    model, (x, y) = RULED[name].model(), RULED[name].batch(12)
    before = photograph(model, (x, y))
    for _ in range(2):  # the second time two samples are checked
        result = sums(model, (x, y), chunk_size=chunk_size)
        assert result.ways == {way} and result.square_norms is None
        labels = y.argmax(1) if y.is_floating_point() else y
        assert_layers_equal(result, by_class(truth(model, x, y), labels, result.classes), EXACT)
        assert torch.equal(result.counts, labels.unique(return_counts=True)[1])
    assert same(photograph(model, (x, y)), before)
    assert result.layout == gradmix.class_gradients(model, (x, y), sketch="identity").layout


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("cases", [LAYERS, USES], ids=["layers", "uses"])
def test_every_layer_and_use_of_a_parameter_has_the_place_that_its_rule_gives_it(
    cases: dict[str, Case], always: None
) -> None:
    for name, case in cases.items():
        model, (x, y) = case.model(), case.batch()
        result, expected = (sums(model, (x, y), norms=norms) for norms in (False, True))
        assert result.ways == {PASSES} and expected.ways == {RULES}, name
        assert result.layout == expected.layout, name
        assert (result.vectors - expected.vectors).abs().max() <= 1e-11 * expected.vectors.abs().max(), name


@pytest.mark.parametrize("chunk_size", [20, 256])
def test_a_layer_without_a_rule(chunk_size: int) -> None:
    model, (x, y) = RECURRENT.model(), RECURRENT.batch()
    result = sums(model, (x, y), without_rule="exact", chunk_size=chunk_size)
    assert result.ways == {PASSES}
    assert_layers_equal(result, by_class(truth(model, x, y), y, result.classes), EXACT)
    with pytest.raises(NoRuleError, match=r"layer\.weight_ih_l0"):
        sums(model, (x, y))


@pytest.mark.parametrize("sketch", ["rademacher", "rows"])
def test_sketches_are_those_with_norms(sketch: str) -> None:
    model, batch = RECURRENT.model(), RECURRENT.batch()
    given = {"sketch": sketch, "rank": 3, "seed": 5, "without_rule": "exact"}
    result, expected = (gradmix.class_gradients(model, batch, norms=norms, **given) for norms in (False, True))
    assert result.ways == {PASSES} and expected.ways == {RULES, SINGLE}
    assert result.layout == expected.layout and dict(result.sketch) == dict(expected.sketch)
    assert (result.vectors - expected.vectors).abs().max() <= 1e-12 * expected.vectors.abs().max()
    assert (result.align(expected).cosine > 0).any()


def test_a_pass_for_each_class_and_none_for_each_sample(calls: Callable[[nn.Module], list[int]]) -> None:
    """P = 4 passes and up to sqrt(40) for the check, besides the trace of the first call."""
    model, batch = RECURRENT.model(), RECURRENT.batch()
    seen = calls(model)
    sums(model, batch, without_rule="exact")
    seen.clear()
    sums(model, batch, without_rule="exact")
    assert seen[:4] == batch[1].bincount().tolist() and len(seen) <= 4 + 6 and sum(seen) == 2 * 40


def test_later_passes_check_two_samples(always: None, calls: Callable[[nn.Module], list[int]]) -> None:
    model, batch = RULED["perceptron"].model(), RULED["perceptron"].batch(30)
    seen = calls(model)
    sums(model, batch)
    seen.clear()
    sums(model, batch)
    assert seen[:-1] == batch[1].bincount().tolist() and seen[-1] in (1, 2)


# --------------------------------------------------------------------------------------------------------- which way


WAYS: dict[str, tuple[int, dict[str, Any], str]] = {
    "few classes": (4, {}, PASSES),
    "many classes": (5, {}, RULES),
    "few in each chunk": (5, {"chunk_size": 4}, PASSES),
    "a sketch": (4, {"sketch": "rademacher"}, RULES),
    "norms": (4, {"norms": True}, RULES),
}


@pytest.mark.parametrize("name", WAYS)
def test_the_way_that_is_taken(name: str) -> None:
    classes, given, way = WAYS[name]
    model, x = nn.Linear(6, 9).double(), torch.randn(15, 6, dtype=torch.float64)
    assert sums(model, (x, torch.arange(15) % classes), **given).ways == {way}


WITHOUT_RULE: dict[str, tuple[Callable[[], nn.Module], int, set[str]]] = {
    "a loop over the samples": (lambda: Net(_recurrent, **_recurrent_parts()), 16, {PASSES}),
    "a loop, few samples of a class": (lambda: Net(_recurrent, **_recurrent_parts()), 15, {RULES, SINGLE}),
    "torch.func": (lambda: nn.Sequential(nn.Linear(6, 5), Slope(), nn.Linear(5, 4)), 16, {RULES, SINGLE}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_the_way_without_a_rule(name: str, dtype: torch.dtype) -> None:
    """In float32 vmap runs an LSTM sample by sample, and in float64 not at all."""
    make, samples, ways = WITHOUT_RULE[name]
    model, x = make().to(dtype), torch.randn(samples, 6, dtype=dtype)
    for _ in range(2):
        result = sums(model, (x, torch.arange(samples) % 4), without_rule="exact")
        assert result.ways == ways


def test_in_half_precision_layer_rules_keep_what_a_sum_would_round() -> None:
    model, (x, _) = _perceptron(), RULED["perceptron"].batch(32, dtype=torch.float32)
    y = torch.arange(32) % 4
    assert sums(model, (x, y)).ways == {PASSES}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sums(model, (x, y)).ways == {RULES}
    assert sums(model.to(torch.bfloat16), (x.bfloat16(), y)).ways == {RULES}


def test_norms_are_true_or_false() -> None:
    for wrong in (None, 1, "no"):
        with pytest.raises(TypeError, match=r"norms: got \w+, expected True or False"):
            sums(_perceptron().double(), RULED["perceptron"].batch(), norms=wrong)


def test_both_ways_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = RULED["convolutions"].model(), RULED["convolutions"].batch(12)
    parts = []
    for most, part in ((1000, slice(0, 5)), (0, slice(5, 12))):
        monkeypatch.setattr(engine, "MOST_CLASSES", most)
        parts.append(sums(model, (x[part], y[part])))
    both = parts[0] + parts[1]
    assert both.ways == {RULES, PASSES} and both.square_norms is None
    assert_layers_equal(both, by_class(truth(model, x, y), y, both.classes), EXACT)
    assert parts[1].add_(parts[0]).ways == {RULES, PASSES}
    assert torch.allclose(parts[1].vectors, both.vectors, rtol=1e-12, atol=1e-15)


# -------------------------------------------------------------------------------------------------------- the promises


class Between(nn.Module):
    """A layer, something between, a layer."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.between = nn.Linear(6, 8), nn.Linear(8, 4), between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def test_samples_that_influence_each_other_in_a_later_batch(always: None) -> None:
    model = Between(lambda m, h: h - m.share * h.detach().mean(0))
    model.share = torch.zeros((), dtype=torch.float64)
    x, y = RULED["perceptron"].batch(12)
    for _ in range(2):
        assert sums(model, (x, y)).ways == {PASSES}
    model.share.fill_(0.1)
    for seed in range(4):
        with pytest.raises(CoupledSamplesError, match="output of sample"):
            sums(model, RULED["perceptron"].batch(12, seed))


def test_after_a_failed_check_layer_rules_compare_all_samples(always: None) -> None:
    """Two of twenty samples influence each other, which the check of two samples hardly ever sees."""
    model = Between(lambda m, h: h + m.share * m.marked * ((m.marked * h).sum(0) - h).detach())
    model.share, model.marked = torch.zeros((), dtype=torch.float64), torch.zeros(20, 1, dtype=torch.float64)
    model.register_forward_pre_hook(lambda m, inputs: setattr(m, "marked", (inputs[0][:, :1] > 9).double()))
    x, y = RULED["perceptron"].batch(20)
    y = torch.arange(20) % 3
    x[4, 0], x[13, 0] = 10.0, 11.0  # of one class
    assert sums(model, (x, y), norms=True).ways == {RULES}
    model.share.fill_(0.1)
    for _ in range(3):
        with pytest.raises(CoupledSamplesError, match="output of sample (4|13) depends"):
            sums(model, (x, y))


@pytest.mark.parametrize("labels", [[0, 0], [0, 1], [0, 0, 1], [0, 1, 2], [0] * 9, [0, 1] * 4], ids=str)
def test_samples_that_influence_each_other_only_by_gradients(labels: list[int], always: None) -> None:
    """The gradient of a token's vector is divided by how often the token occurs in the batch."""
    model = nn.Sequential(nn.Embedding(5, 6, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(12, 4)).double()
    batch = torch.ones(len(labels), 2, dtype=torch.int64), torch.tensor(labels)
    with pytest.raises(CoupledSamplesError, match="add up"):
        sums(model, batch, without_rule="exact")
    model[0].scale_grad_by_freq = False
    assert sums(model, batch, without_rule="exact").ways == {PASSES}


INFLUENCES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean": lambda m, h: h - h.detach().mean(0),
    "number of samples": lambda m, h: h / len(h),
    "the first": lambda m, h: h + h[:1].detach(),
    "the next": lambda m, h: h + h.detach().roll(1, 0),
}


@pytest.mark.parametrize(
    "labels", [[0, 0], [0, 1], [0, 0, 1], [0, 1, 2], [0] * 9, [0, 1] * 4, [0, 1, 2, 3] * 4], ids=str
)
@pytest.mark.parametrize("between", INFLUENCES)
def test_samples_of_any_classes_are_checked_among_others(between: str, labels: list[int], always: None) -> None:
    """Behind tokens the trace, by gradients of the input, does not see the influence: passes must find it."""
    model = nn.Sequential(nn.Embedding(30, 6), Between(INFLUENCES[between])).double()
    tokens = torch.arange(len(labels))
    for _ in range(3):
        with pytest.raises(CoupledSamplesError):
            sums(model, (tokens, torch.tensor(labels)))


def test_statistics_of_the_batch(always: None) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 4)).double()
    for without_rule in ("error", "exact"):
        with pytest.raises(BatchStatisticsError, match="statistics of the batch"):
            sums(model, RULED["perceptron"].batch(12), without_rule=without_rule)


def test_checkpoints_are_refused(always: None) -> None:
    model = Between(lambda m, h: checkpoint(m.inner, h, use_reentrant=False))
    model.inner = nn.Linear(8, 8).double()
    with pytest.raises(ValueError, match=r"torch\.utils\.checkpoint"):
        sums(model, RULED["perceptron"].batch(12))


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("chunk_size", [4, 256])
def test_errors_name_the_sample_in_the_data(recurrent: bool, chunk_size: int, always: None) -> None:
    if recurrent:
        model = Net(lambda m, x: m.last(m.layer(x[:, None])[0][:, 0] / x.sum(1)[:, None]), **_recurrent_parts())
    else:
        model = Between(lambda m, h: h.sqrt() / h.sqrt())
        model.first.weight.data.fill_(1.0)
        model.first.bias.data.zero_()
    model.double()
    given: dict[str, Any] = {"without_rule": "exact", "chunk_size": chunk_size}
    x = torch.rand(12, 6, dtype=torch.float64) + 0.5
    y = torch.arange(12) % 3
    assert sums(model, (x, y), **given).ways == {PASSES}
    for norms in (False, True):
        with pytest.raises(ValueError, match=r"logits of data: sample 10 holds NaN"):
            sums(model, (x.index_fill(0, torch.tensor([10]), 0.0), y), norms=norms, **given)
        with pytest.raises(ValueError, match="data labels: row 9 is 4"):
            sums(model, (x, y.index_fill(0, torch.tensor([9]), 4)), norms=norms, **given)


def _recurrent(m: Any, x: Tensor) -> Tensor:
    return m.last(m.layer(x[:, None])[0][:, 0])


def _recurrent_parts() -> dict[str, nn.Module]:
    return {"layer": nn.LSTM(6, 5, batch_first=True), "last": nn.Linear(5, 4)}


def test_a_loss_that_depends_on_the_samples_around_is_left_to_layer_rules(always: None) -> None:
    model, (x, y) = RULED["perceptron"].model(), RULED["perceptron"].batch(12)

    def averaged(z: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(z, t) / len(t)

    for _ in range(3):
        assert sums(model, (x, y), loss=cross_entropy).ways == {PASSES}
        result, expected = (sums(model, (x, y), loss=averaged, norms=norms) for norms in (False, True))
        assert result.ways == {RULES}
        assert torch.equal(result.vectors, expected.vectors)


def test_a_model_that_draws_random_numbers_is_left_to_layer_rules(always: None) -> None:
    model = Between(lambda m, h: F.dropout(h, 0.5, training=True))
    batch = RULED["perceptron"].batch(12)
    before = photograph(model, batch)
    for _ in range(3):
        result, expected = (sums(model, batch, norms=norms) for norms in (False, True))
        assert result.ways == {RULES} and result.vectors.isfinite().all() and expected.vectors.any()
    assert same(photograph(model, batch), before)
    with pytest.raises(CoupledSamplesError, match="without chance"):
        net = Net(
            lambda m, x: m.last(F.dropout(m.layer(x[:, None])[0][:, 0], 0.5, training=True)), **_recurrent_parts()
        )
        sums(net.double(), batch, without_rule="exact")


class Gate(nn.Module):
    """Uses a parameter in a way without a rule, and reads a value, as ``torch.func`` cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Parameter(torch.ones(6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert float(x.detach().abs().max()) >= 0
        return self.out(x * self.gate.exp())


def test_in_half_precision_the_loss_is_scaled(always: None) -> None:
    """Gradients below float16's smallest number survive, as they do with norms."""
    model = nn.Sequential(nn.Linear(6, 5), Slope(), nn.Linear(5, 4))
    x, y = torch.randn(6, 6), torch.arange(6) % 2

    def tiny(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t, reduction="none") * 2.0**-26

    with torch.autocast("cpu", dtype=torch.float16):
        result = sums(model, (x, y), without_rule="exact", loss=tiny, scaler=2.0**24)
    assert result.ways == {PASSES}
    assert_layers_equal(result, by_class(truth(model, x, y, tiny), y, result.classes), 0.05)


def test_sums_too_large_for_half_precision_are_what_they_are_with_norms(always: None) -> None:
    model, x, y = Gate(), torch.rand(256, 6) + 0.5, torch.arange(256) % 2
    with torch.autocast("cpu", dtype=torch.float16):
        assert sums(model, (x[:16], y[:16]), without_rule="exact").ways == {PASSES}
        expected, result = (sums(model, (x, y), without_rule="exact", norms=norms) for norms in (True, False))
    assert result.ways == expected.ways == {RULES, SINGLE}
    assert torch.equal(result.vectors, expected.vectors) and bool(result.vectors.isfinite().all())


def test_an_autocast_inside_the_model_keeps_the_layer_rules() -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, m.weight).float()

    model = Net(use, weight=torch.randn(4, 6)).float()
    assert sums(model, (torch.randn(32, 6), torch.arange(32) % 2)).ways == {RULES}


def test_labels_are_checked_before_torch_func_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an index on a GPU, a label that is no class would end the process's use of it."""
    met: list[int] = []

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        met.append(1)
        return F.cross_entropy(logits, labels, reduction="none")

    monkeypatch.setattr(engine, "cross_entropy", watched)
    batch = torch.randn(16, 6), torch.tensor([0, 7] * 8)
    for norms in (True, False):
        with pytest.raises(ValueError, match=r"labels: row 1 is 7, expected a class index in \[0, 4\)"):
            sums(Gate(), batch, without_rule="exact", norms=norms)
    assert not met


def test_padding_that_torch_skips_without_autograd_does_not_fail_the_check() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, 4)
            self.inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.inner(self.embedding(tokens), src_key_padding_mask=tokens == 0).mean(1))

    tokens = torch.randint(1, 9, (16, 6))
    tokens[1::2, 4:] = 0
    model, y = Padded(), torch.arange(16) % 2
    for _ in range(4):
        assert sums(model, (tokens, y)).ways == {PASSES}


def test_a_failure_after_the_passes_leaves_nothing_of_them(always: None) -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        if len(x) == 4:
            raise RuntimeError("the group of a check")
        return (x * m.scale.sin())[:, :4]

    model, (x, y) = Net(use, scale=torch.randn(6)).double(), RULED["perceptron"].batch(16)
    y = torch.arange(16) % 2
    result = sums(model, (x, y), without_rule="exact")
    assert result.ways == {SINGLE}
    assert_layers_equal(result, by_class(truth(model, x, y), y, result.classes), EXACT)


def test_sparse_gradients_and_parameters_that_are_not_used(always: None) -> None:
    model = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Flatten(), nn.Linear(12, 4))
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    model.double()
    x, y = torch.randint(9, (12, 2)), torch.arange(12) % 3
    result, expected = (sums(model, (x, y), norms=norms) for norms in (False, True))
    assert result.ways == {PASSES} and result.layout == expected.layout
    assert torch.allclose(result.vectors, expected.vectors, rtol=1e-12, atol=1e-15)


def test_chosen_layers_and_frozen_ones(always: None) -> None:
    model, (x, y) = RULED["perceptron"].model(), RULED["perceptron"].batch(12)
    model[0].bias.requires_grad_(False)
    for layers in ("all", ["4"], ["0", "2.weight"]):
        result, expected = (sums(model, (x, y), layers=layers, norms=norms) for norms in (False, True))
        assert result.ways == {PASSES} and result.layout == expected.layout
        assert torch.allclose(result.vectors, expected.vectors, rtol=1e-12, atol=1e-15)


def test_in_inference_mode_and_with_two_inputs(always: None) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.last(self.first(a).tanh() * b)

    model = Two().double()
    randomise(model)
    x = {"a": torch.randn(12, 6).double(), "b": torch.randn(12, 5).double()}
    y = torch.arange(12) % 3
    expected = sums(model, (x, y), norms=True)
    with torch.inference_mode():
        result = sums(model, (x, y))
    assert result.ways == {PASSES} and not result.vectors.is_inference()
    assert torch.allclose(result.vectors, expected.vectors, rtol=1e-12, atol=1e-15)


def test_a_parameter_first_used_by_a_later_chunk_is_named(always: None) -> None:
    """Its gradient has no place in the layout of the chunks before."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            out = x.new_zeros(len(x), 4)
            for sign, expert in zip((1, -1), self.experts, strict=True):
                mine = (x[:, 0] * sign > 0).nonzero().flatten()
                if len(mine):
                    out[mine] = expert(x[mine])
            return out

    x = torch.rand(6, 6, dtype=torch.float64) + 0.5
    x[4:] *= -1
    batch = x, torch.arange(6) % 2
    for norms in (False, True):
        model = Experts().double()
        with pytest.raises(ValueError, match=r"'experts\.1\.weight' is used by sample 4 .*larger chunk_size"):
            sums(model, batch, without_rule="exact", chunk_size=3, norms=norms)
    result = sums(model, batch, without_rule="exact")
    assert_layers_equal(result, by_class(truth(model, *batch), batch[1], result.classes), EXACT)
