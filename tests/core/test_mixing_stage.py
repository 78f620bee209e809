"""Mixing inside a model: against plain loops over rows, with what it refuses; selection and methods on token ids."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradmix
from gradmix import mixed_forward
from gradmix.model.head import resolve_head
from gradmix.replay.buffer import ReplayBuffer
from gradmix.training.config import MixConfig, TrainConfig
from gradmix.training.loop.clock import Clock
from gradmix.training.methods import METHODS, Context, StepSamples
from gradmix.training.methods import mixup as mixup_module
from gradmix.training.methods.mixing_space import stage_of

CLASSES, WORDS, LENGTH, WIDTH = 4, 30, 6, 8


class TokenModel(nn.Module):
    """Embedding, a mean over positions, two layers; says how often each part ran."""

    def __init__(self, seed: int = 0, named: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.words = nn.Embedding(WORDS, WIDTH)
            self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
            self.fc = nn.Linear(WIDTH, CLASSES)
        self._named = named
        self.ran: list[int] = []

    @property
    def mixing_stage(self) -> nn.Module:
        return self.words

    def rest(self, embedded: Tensor) -> Tensor:
        return self.fc(self.body(embedded.mean(1)))

    def features(self, tokens: Tensor) -> Tensor:
        return self.body(self.words(tokens).mean(1))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.body(self.words(tokens).mean(1))
        self.ran.append(len(h))
        return self.fc(input=h) if self._named else self.fc(h)


def tokens(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(WORDS, (n, LENGTH), generator=g), torch.randint(CLASSES, (n,), generator=g)


def by_loop(model: TokenModel, stage: str, x: Tensor, other: Tensor, lam: list[float]) -> Tensor:
    rows = []
    for i, weight in enumerate(lam):
        a, b = x[i : i + 1], other[i : i + 1]
        if stage == "feature":
            rows.append(model.fc(weight * model.features(a) + (1 - weight) * model.features(b)))
        else:
            rows.append(model.rest(weight * model.words(a) + (1 - weight) * model.words(b)))
    return torch.cat(rows)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("named", [False, True], ids=["", "head called by keyword"])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("lam", ["by row", "number", "scalar tensor", 0, 1])
@pytest.mark.parametrize("stage", ["words", "feature"])
def test_values_and_gradients_are_those_of_a_loop(stage: str, lam: object, n: int, named: bool) -> None:
    model = TokenModel(named=named)
    (x, _), (other, _) = tokens(n), tokens(n, 1)
    weights = torch.linspace(0, 1, n) if lam == "by row" else torch.full((n,), 0.3)
    given: Tensor | float = weights
    if lam == "number":
        given = 0.3
    elif lam == "scalar tensor":
        given = torch.tensor(0.3, dtype=torch.float64)
    elif isinstance(lam, int):
        given, weights = float(lam), torch.full((n,), float(lam))
    resolve_head(model, None, x)  # which takes a pass, once
    model.ran.clear()
    logits = mixed_forward(model, stage, x, other, given)
    assert model.ran == ([n] if stage == "words" else [n, n])  # the other rows' pass ends at the stage
    expected = by_loop(model, stage, x, other, weights.tolist())
    torch.testing.assert_close(logits, expected)
    params = list(model.parameters())
    for got, true in zip(
        torch.autograd.grad(logits.square().sum(), params),
        torch.autograd.grad(expected.square().sum(), params),
        strict=True,
    ):
        torch.testing.assert_close(got, true)
    assert hooks(model) == 0


@pytest.mark.parametrize("stage", ["words", "feature"])
def test_gradients_reach_the_embeddings_of_both_rows(stage: str) -> None:
    model = TokenModel()
    x, other = torch.full((1, LENGTH), 3), torch.full((1, LENGTH), 7)
    mixed_forward(model, stage, x, other, 0.4).square().sum().backward()
    moved = model.words.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert moved == [3, 7]


@pytest.mark.parametrize("stage", ["words", "feature"])
def test_partners_by_index(stage: str) -> None:
    model = TokenModel()
    (x, _), (pool, _) = tokens(5), tokens(3, 1)
    partner, lam = torch.tensor([4, 0, 0, 3, 1]), torch.rand(5, generator=torch.Generator().manual_seed(2))
    resolve_head(model, None, x)
    model.ran.clear()
    got = mixed_forward(model, stage, x, None, lam, partner=partner)
    assert len(model.ran) == 1  # one pass serves both
    torch.testing.assert_close(got, mixed_forward(model, stage, x, x[partner], lam))
    index = torch.tensor([2, 2, 0, 1, 0])
    got = mixed_forward(model, stage, x, pool, lam, partner=index)
    torch.testing.assert_close(got, mixed_forward(model, stage, x, pool[index], lam))


def test_a_stage_is_named_or_given_and_logits_may_be_in_an_object() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TokenModel()

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.inner(x))

    model = Wrapped()
    (x, _), (other, _) = tokens(3), tokens(3, 1)
    expected = by_loop(model.inner, "words", x, other, [0.3] * 3)
    for stage in ("inner.words", model.inner.words):
        torch.testing.assert_close(mixed_forward(model, stage, x, other, 0.3), expected)


def test_partners_of_another_length_meet_at_the_features() -> None:
    model = TokenModel()
    x, other = tokens(3)[0], tokens(3, 1)[0][:, :2]
    expected = by_loop(model, "feature", x, other, [0.3] * 3)
    torch.testing.assert_close(mixed_forward(model, "feature", x, other, 0.3), expected)
    with pytest.raises(ValueError, match=r"other_x: words makes samples of shape \(2, 8\) of it, expected \(6, 8\)"):
        mixed_forward(model, "words", x, other, 0.3)


@pytest.mark.parametrize("stage", ["words", "feature"])
def test_under_autocast_and_compiled(stage: str) -> None:
    model = TokenModel()
    (x, _), (other, _) = tokens(4), tokens(4, 1)
    expected = mixed_forward(model, stage, x, other, 0.3)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    for wrapped in (compiled, in_place):
        wrapped(x)  # compiled before there is a hook
        torch.testing.assert_close(mixed_forward(wrapped, stage, x, other, 0.3), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = mixed_forward(model, stage, x, other, 0.3)
        lam = torch.full((4,), 0.3, dtype=torch.float64)
        torch.testing.assert_close(mixed_forward(model, stage, x, other, lam), half, atol=1e-3, rtol=8e-3)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.02, rtol=0.02)


def pass_in_parallel(stage: str, compiled: bool, x: Tensor, other: Tensor) -> tuple[weakref.ref[nn.Module], nn.Module]:
    """Two steps of a data-parallel model in the present group; a reference to it, and the model with the gradients."""
    inner = TokenModel()
    parallel = DistributedDataParallel(torch.compile(inner, backend="eager") if compiled else inner)
    passed = []
    parallel.register_forward_hook(lambda *_: passed.append(1))
    for _ in range(2):  # the second pass finds the reducer as the first one left it
        parallel.zero_grad()
        mixed_forward(parallel, stage, x, other, 0.3).square().sum().backward()
    assert len(passed) == 2  # the pass with the loss goes through the wrapper, the other one does not
    return weakref.ref(parallel), inner


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled inside"])
@pytest.mark.parametrize("stage", ["words", "feature"])
def test_a_data_parallel_model_gets_the_same_gradients(stage: str, compiled: bool, tmp_path) -> None:
    (x, _), (other, _) = tokens(4), tokens(4, 1)
    plain = TokenModel()
    mixed_forward(plain, stage, x, other, 0.3).square().sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel, inner = pass_in_parallel(stage, compiled, x, other)
        # A reducer that outlives the group ends gloo's threads with Python's lock held, for which one of them may wait.
        gc.collect()
        assert parallel() is None
    finally:
        torch.distributed.destroy_process_group()
    for got, true in zip(inner.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, true.grad)


class Twice(TokenModel):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.rest(self.words(tokens) + self.words(tokens))


class Never(TokenModel):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.rest(F.embedding(tokens, self.words.weight))


class Raises(TokenModel):
    def rest(self, embedded: Tensor) -> Tensor:
        raise RuntimeError("broken")

    forward = Twice.forward


class Swallows(TokenModel):
    """Catches what its parts raise."""

    def forward(self, tokens: Tensor) -> Tensor:
        try:
            h = self.words(tokens)
        except Exception:
            h = torch.zeros(len(tokens), LENGTH, WIDTH)
        return self.rest(h)


class Pairwise(nn.Embedding):
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = super().forward(tokens)
        return h, h


class Flat(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).flatten(0, 1)


class Ids(nn.Identity):
    pass


class Layered(TokenModel):
    """The stage is another module than the embedding."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, tokens: Tensor) -> Tensor:
        self.stage(tokens)
        return super().forward(tokens)


X, OTHER = tokens(3)[0], tokens(3, 1)[0]
REFUSED = {
    "used twice": (Twice(), {}, ValueError, "stage: words was called 2 times in a forward pass, expected once"),
    "never used": (Never(), {}, ValueError, "stage: words was called 0 times in a forward pass"),
    "a model that raises": (Raises(), {}, RuntimeError, "broken"),
    "a tuple": (Layered(Pairwise(WORDS, 2)), {"stage": "stage"}, TypeError, "stage: stage gives tuple, expected a fl"),
    "integers": (Layered(Ids()), {"stage": "stage"}, TypeError, "stage: stage gives a tensor of dtype torch.int64"),
    "other samples": (
        Layered(Flat(WORDS, 2)),
        {"stage": "stage"},
        ValueError,
        r"gives a tensor \(18, 2\), expected 3 samples",
    ),
    "no such name": (
        TokenModel(),
        {"stage": "wrods"},
        ValueError,
        "stage: got 'wrods', .* children are 'words', 'body'",
    ),
    "the model's own name": (TokenModel(), {"stage": ""}, ValueError, "stage: got '', expected a module's name"),
    "a foreign module": (TokenModel(), {"stage": nn.Linear(1, 1)}, ValueError, "stage: the Linear given is not a mod"),
    "no stage": (TokenModel(), {"stage": 3}, TypeError, "stage: got int, expected a module of the model"),
    "lam too large": (TokenModel(), {"lam": 1.5}, ValueError, "lam: got 1.5"),
    "lam for other samples": (
        TokenModel(),
        {"lam": torch.ones(2)},
        ValueError,
        r"lam: got shape \(2,\), expected .*\(3,\)",
    ),
    "integer lam": (TokenModel(), {"lam": torch.ones(3).long()}, TypeError, "lam: got dtype torch.int64"),
    "no partners": (TokenModel(), {"other_x": None}, ValueError, "other_x: got None, expected the partners"),
    "fewer partners": (TokenModel(), {"other_x": OTHER[:2]}, ValueError, "other_x: got 2 samples, expected 3"),
    "partner of a wrong dtype": (
        TokenModel(),
        {"partner": torch.zeros(3)},
        ValueError,
        r"partner: got torch.float32 of shape \(3,\), expected int64 \(3,\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_no_hook_left(case: str) -> None:
    model, given, error, message = REFUSED[case]
    arguments = {"stage": "words", "x": X, "other_x": OTHER, "lam": 0.3} | given
    with pytest.raises(error, match=message):
        mixed_forward(model, **arguments)
    assert hooks(model) == 0


def test_a_model_that_catches_exceptions_does_not_catch_the_early_end() -> None:
    model = Swallows()
    expected = by_loop(model, "words", X, OTHER, [0.3] * 3)
    torch.testing.assert_close(mixed_forward(model, "words", X, OTHER, 0.3), expected)


# ----------------------------------------------------------------------------------------------- selecting on token ids


@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("candidates", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_pairs_of_token_ids_are_those_of_their_embeddings(criterion: str, candidates: bool, dtype: torch.dtype) -> None:
    model = TokenModel()
    rest = nn.Module()
    rest.body, rest.fc = model.body, model.fc
    rest.forward = model.rest  # type: ignore[method-assign]
    x, y = tokens(7)
    pool = tokens(5, 1) if candidates else None
    held = tokens(6, 2)

    def select(net: nn.Module, read) -> gradmix.Pairs:
        return gradmix.select_pairs(
            net,
            (read(held[0]), held[1]),
            (read(x), y),
            candidates=None if pool is None else (read(pool[0]), pool[1]),
            criterion=criterion,
            lam=0.3,
            generator=torch.Generator().manual_seed(5),
        )

    got, expected = select(model, lambda t: t.to(dtype)), select(rest, lambda t: model.words(t).detach())
    assert torch.equal(got.partner, expected.partner) and torch.equal(got.lam, expected.lam)
    torch.testing.assert_close(got.alignment, expected.alignment, equal_nan=True)
    own, labels = expected.mix()
    assert torch.equal(got.mix_labels(), labels) and torch.equal(expected.mix_labels(), labels)
    other = (x if pool is None else pool[0])[got.partner]
    assert torch.equal(got.other_x(), other.to(dtype))
    torch.testing.assert_close(mixed_forward(model, "words", x, got.other_x(), got.lam), rest.forward(own))
    with pytest.raises(TypeError, match=f"x: got dtype {dtype}, .* gradmix.mixed_forward.*pairs.mix_labels"):
        got.mix()


def test_other_labels_and_rows_in_place_of_those_selected_on() -> None:
    model, (x, y), (pool, pool_y) = TokenModel(), tokens(4), tokens(3, 1)
    pairs = gradmix.select_pairs(model, tokens(6, 2), (x, y), lam=0.3)
    soft = torch.full((4, CLASSES), 0.25)
    assert torch.equal(pairs.mix_labels(soft), soft)
    assert torch.equal(pairs.other_x(x + 1), x[pairs.partner] + 1)
    for call in (lambda: pairs.mix_labels(y[:3]), lambda: pairs.other_x(x[:3])):
        with pytest.raises(ValueError, match="got 3 samples, expected the 4"):
            call()
    foreign = gradmix.select_pairs(model, tokens(6, 2), (x, y), candidates=(pool, pool_y), lam=0.3)
    with pytest.raises(ValueError, match="x: got 4 samples, expected None, as partners are among the candidates"):
        foreign.other_x(x)


@pytest.mark.parametrize("stored", [False, True], ids=["empty buffer", "buffer of token ids"])
def test_gradmix_on_token_ids(stored: bool) -> None:
    buffer = ReplayBuffer(4)
    if stored:
        buffer.add(*tokens(12, 3))
    model = TokenModel()
    mixup = gradmix.GradMix(model, buffer, generator=torch.Generator().manual_seed(0))
    x, y = tokens(6)
    pairs = mixup.select(x, y)
    assert (mixup.reference is not None) == stored and bool(pairs.helpful.any())
    loss = F.cross_entropy(mixed_forward(model, "feature", x, pairs.other_x(), pairs.lam), pairs.mix_labels())
    loss.backward()
    assert model.words.weight.grad.abs().sum() > 0
    with pytest.raises(TypeError, match="x: got dtype torch.int64"):
        mixup(x, y)


INPUTS_ONLY = {
    "mixed": "estimator 'mixed'",
    "jvp": "estimator 'JvpEstimator'",
    "sketch": "estimator 'SketchEstimator'",
    gradmix.SketchEstimator(rank=4): "estimator 'SketchEstimator'",
}


@pytest.mark.parametrize("estimator", INPUTS_ONLY, ids=str)
@pytest.mark.parametrize("held", [0, 5], ids=["empty buffer", "buffer"])
def test_estimators_that_mix_inputs_refuse_token_ids(estimator, held: int) -> None:
    message = f"batch: got x of dtype torch.int64 with the {INPUTS_ONLY[estimator]}, which mixes inputs"
    model, buffer = TokenModel(), tokens(held, 2)
    with pytest.raises(TypeError, match=message):
        gradmix.select_pairs(model, buffer, tokens(3), estimator=estimator)
    with pytest.raises(TypeError, match=message):
        gradmix.GradMix(model, buffer, estimator=estimator).select(*tokens(3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int16, torch.complex64])
def test_other_dtypes_are_neither_inputs_nor_token_ids(dtype: torch.dtype) -> None:
    x, y = tokens(3)
    with pytest.raises(TypeError, match=f"batch: got x of dtype {dtype}, .* or token ids of dtype int64 or int32"):
        gradmix.select_pairs(TokenModel(), tokens(4), (x.to(dtype), y))


def test_candidates_are_of_the_batchs_kind() -> None:
    x, y = tokens(3)
    with pytest.raises(TypeError, match="candidates: got x of dtype torch.float32, expected torch.int64 as the batch"):
        gradmix.select_pairs(TokenModel(), tokens(4), (x, y), candidates=(x.float(), y))


# ----------------------------------------------------------------------------------------------------- training methods


@dataclass(frozen=True)
class SpacedMix(MixConfig):
    """Settings that name the place, whether or not the configuration itself does."""

    space: str | None = None  # type: ignore[assignment]


def make_context(space: str | None, model: nn.Module | None = None, held: int = 12, **mix) -> Context:
    buffer = ReplayBuffer(8)
    if held:
        buffer.add(*tokens(held, 3))
    return Context(
        model=TokenModel() if model is None else model,
        buffer=buffer,
        num_classes=CLASSES,
        mix=SpacedMix(space=space, **mix),
        generator=torch.Generator().manual_seed(3),
        clock=Clock(torch.device("cpu")),
        counts=torch.tensor([90, 30, 10, 29]),
    )


def make_rows(n: int, candidates: int = 0) -> StepSamples:
    x, y = tokens(n)
    weight = torch.rand(n, generator=torch.Generator().manual_seed(1))
    return StepSamples(x, y, weight, tokens(candidates, 4) if candidates else None)


LINEAR = ["mixup", "remix", "balanced-mixup", "gradmix-class", "gradmix-sample"]


@pytest.mark.parametrize("originals", [False, True])
@pytest.mark.parametrize("candidates", [0, 9])
@pytest.mark.parametrize("space", ["embedding", "feature"])
@pytest.mark.parametrize("name", LINEAR)
def test_methods_mix_at_the_place_named(monkeypatch, name: str, space: str, candidates: int, originals: bool) -> None:
    if name == "balanced-mixup" and not candidates:
        candidates = 6
    context, rows = make_context(space, originals=originals), make_rows(6, candidates)
    method = METHODS[name](context)
    made = []
    mixture = method.mixture
    monkeypatch.setattr(method, "mixture", lambda *a: made.append(mixture(*a)) or made[-1])
    loss = method.loss(rows)
    (used,) = made
    pool = rows.x if used.other_x is None else used.other_x
    lam = used.lam.tolist() if isinstance(used.lam, Tensor) else [used.lam] * 6
    logits = by_loop(context.model, "words" if space == "embedding" else space, rows.x, pool[used.partner], lam)
    expected = (rows.weight * F.cross_entropy(logits, used.y, reduction="none")).sum()
    if originals:
        own = F.cross_entropy(context.model(rows.x), rows.y, reduction="none")
        expected = 0.5 * (expected + (rows.weight * own).sum())
    torch.testing.assert_close(loss, expected)
    assert hooks(context.model) == 0
    assert used.partner.tolist() != list(range(6)) and min(lam) < 1


@pytest.mark.parametrize("lam", [0.25, 1.0])
def test_the_same_rows_meet_whatever_the_place(monkeypatch, lam: float) -> None:
    monkeypatch.setattr(mixup_module, "draw_lam", lambda alpha, generator: lam)
    rows = make_rows(6)
    kinds = [METHODS["mixup"](make_context(space)).mixture(rows, None) for space in (None, "embedding", "feature")]
    assert all(torch.equal(kinds[0].partner, kind.partner) and torch.equal(kinds[0].y, kind.y) for kind in kinds)


@pytest.mark.parametrize("name", ["mixup", "remix", "balanced-mixup", "gradmix-sample", "manifold-mixup"])
@pytest.mark.parametrize("space", [None, "input"])
def test_token_ids_are_not_mixed_as_inputs(name: str, space: str | None) -> None:
    method = METHODS[name](make_context(space))
    for _ in range(4):  # whichever layer is drawn
        with pytest.raises(TypeError, match="x: got samples of dtype torch.int64, .* mix.space: embedding or feature"):
            method.loss(make_rows(4, 4))


@pytest.mark.parametrize("space", ["embedding", "feature"])
def test_manifold_mixup_has_the_place_for_an_input(monkeypatch, space: str) -> None:
    context, rows = make_context(space), make_rows(5)
    method = METHODS["manifold-mixup"](context)
    places: list[object] = []
    monkeypatch.setattr(
        "gradmix.training.methods.mixing_space.mixed_forward",
        lambda model, stage, *a, **k: places.append(stage) or mixed_forward(model, stage, *a, **k),
    )
    losses = [float(method.loss(rows).detach()) for _ in range(30)]
    assert 1 <= len(places) < 30  # the others were mixed at a hidden layer
    assert set(places) == {context.model.words if space == "embedding" else "feature"}
    assert len(set(losses)) > 20


@pytest.mark.parametrize(
    "name", ["gradmix-class", "gradmix-sample", "der++-gradmix-class", "trivialaugment-gradmix-class"]
)
@pytest.mark.parametrize("space", ["embedding", "feature"])
def test_selection_is_by_features_where_inputs_are_not_mixed(name: str, space: str) -> None:
    for given in (None, "feature"):
        config = TrainConfig(mix=SpacedMix(space=space, estimator=given))
        assert METHODS[name].resolve_config(config).mix.estimator == "feature"
    for other in ("mixed", "jvp", "sketch"):
        with pytest.raises(
            ValueError, match=f"mix.estimator: got '{other}', .* expected 'feature' with mix.space: {space}"
        ):
            METHODS[name].resolve_config(TrainConfig(mix=SpacedMix(space=space, estimator=other)))
    plain = METHODS[name].resolve_config(TrainConfig(mix=SpacedMix())).mix.estimator
    assert plain == "feature"


REFUSED_PLACES = {
    "cutmix": ("cutmix", "embedding", TokenModel(), "mix.space: got 'embedding' for CutMix, expected 'input'"),
    "no such place": ("mixup", "logits", TokenModel(), "mix.space: got 'logits', expected one of 'input', 'embedding'"),
    "no stage": ("mixup", "embedding", nn.Linear(3, 4), "got 'embedding' for Linear with no module as mixing_stage"),
}


@pytest.mark.parametrize("case", REFUSED_PLACES)
def test_places_that_are_refused(case: str) -> None:
    name, space, model, message = REFUSED_PLACES[case]
    with pytest.raises(ValueError, match=message):
        METHODS[name](make_context(space, model))


def test_the_stage_is_found_inside_wrappers() -> None:
    model = TokenModel()
    assert stage_of(torch.compile(model, backend="eager"), "embedding") is model.words
    model.__class__ = type("Odd", (TokenModel,), {"mixing_stage": "words"})
    with pytest.raises(ValueError, match="with str as mixing_stage"):
        stage_of(model, "embedding")


@pytest.mark.parametrize("name", ["mixup", "gradmix-sample", "gradmix-class"])
@pytest.mark.parametrize("space", ["embedding", "feature"])
def test_steps_on_token_ids_learn(name: str, space: str) -> None:
    context = make_context(space, held=40)
    method = METHODS[name](context)
    optimiser = torch.optim.SGD(context.model.parameters(), lr=0.5)
    x, y = tokens(32)
    x[:, 0] = y  # one word tells the class
    rows = StepSamples(x, y, torch.full((32,), 1 / 32))
    before = F.cross_entropy(context.model(x), y).item()
    for _ in range(40):
        optimiser.zero_grad()
        method.backward(rows)
        optimiser.step()
    assert F.cross_entropy(context.model(x), y).item() < 0.8 * before
    assert method.mixed_samples() is None or int(method.mixed_samples()) > 0


def test_controls_on_token_ids() -> None:
    rows = make_rows(6)
    for control in ("random", "anti", "small-gradient", "partner-class"):
        context = make_context("embedding")
        method = METHODS["gradmix-sample"](replace(context, mix=replace(context.mix, control=control)))
        assert torch.isfinite(method.loss(rows))
