"""The estimators over all parameters, ``jvp`` and ``sketch``, against float64 loops of autograd over single rows."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, NETWORKS, rows
from torch import Tensor, nn
from truth import assert_decisions_agree, double, one_hot

import gradmix
from gradmix import class_table
from gradmix.class_table import TABLE_LAMS
from gradmix.criteria import PairScores
from gradmix.estimators import JvpEstimator, Network, SketchEstimator
from gradmix.estimators.sketch import Sketch
from gradmix.gradients import mean_gradient
from gradmix.labelled_samples import LabelledSamples
from gradmix.mixer import GradMix
from gradmix.mixtures import Mixtures
from gradmix.model.head import logits_of

BUFFER, BATCH, OTHERS = rows(11, 3), rows(6, 1), rows(4, 2)
LAM = 0.3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(name: str = "mlp") -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def flat_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The whole gradient of one row's cross-entropy, float64."""
    logits = logits_of(model(x[None].double()))
    loss = F.cross_entropy(logits, one_hot(y[None], logits.shape[1]))
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    pairs = zip(gradients, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def true_reference(model: nn.Module, buffer: tuple[Tensor, Tensor]) -> Tensor:
    model = double(model)
    return torch.stack([flat_gradient(model, x, y) for x, y in zip(*buffer, strict=True)]).mean(0)


def true_pairs(model: nn.Module, batch: tuple, partners: tuple, lam: float) -> Tensor:
    """(N, M, parameters): gradients at single mixed inputs."""
    model = double(model)

    def one(i: int, j: int) -> Tensor:
        y = lam * one_hot(batch[1][i : i + 1], CLASSES) + (1 - lam) * one_hot(partners[1][j : j + 1], CLASSES)
        return flat_gradient(model, lam * batch[0][i].double() + (1 - lam) * partners[0][j].double(), y[0])

    return torch.stack([torch.stack([one(i, j) for j in range(len(partners[1]))]) for i in range(len(batch[1]))])


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


# ------------------------------------------------------------------------------------------------------------------ jvp


@pytest.mark.parametrize("soft", [False, True], ids=["class indices", "label vectors"])
@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_jvp_is_exact(name: str, soft: bool) -> None:
    model = network(name)
    batch, others = (rows(n, s, soft=soft) for n, s in ((6, 1), (4, 2)))
    reference = true_reference(model, BUFFER)
    gradients = true_pairs(model, batch, others, LAM)
    inner, norm = gradients @ reference, gradients.norm(dim=2)
    found = gradmix.alignment_matrix(model, BUFFER, batch, candidates=others, lam=LAM, estimator="jvp", chunk_size=5)
    close(found.inner, inner, 2e-5)
    close(found.cosine, inner / (norm * reference.norm()), 2e-5)
    assert_decisions_agree(found.inner, inner, band=1e-4)


def test_jvp_in_float64() -> None:
    model = network("vit").double()
    batch, buffer = rows(5, 1, dtype=torch.float64), rows(7, 3, dtype=torch.float64)
    reference, gradients = true_reference(model, buffer), true_pairs(model, batch, batch, LAM)
    found = gradmix.alignment_matrix(model, buffer, batch, lam=LAM, estimator="jvp")
    close(found.inner, gradients @ reference, 1e-11)


def test_jvp_by_class_is_the_mean_over_the_pairs() -> None:
    model = network()
    reference, gradients = true_reference(model, BUFFER), true_pairs(model, BATCH, BATCH, LAM)
    inner = gradients @ reference
    inner.fill_diagonal_(float("nan"))
    found = gradmix.alignment_matrix(model, BUFFER, BATCH, lam=LAM, estimator="jvp", criterion="class")
    assert found.classes is not None
    for a, left in enumerate(found.classes):
        for b, right in enumerate(found.classes):
            cell = inner[BATCH[1] == left][:, BATCH[1] == right]
            expected = cell[~torch.isnan(cell)].mean()  # NaN where a class has but one row and is paired with itself
            torch.testing.assert_close(found.inner[a, b].double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_some_layers_only() -> None:
    model = network("convnet with batch norm")
    estimator = JvpEstimator(layers=["fc"])
    by_layer = gradmix.alignment_matrix(model, BUFFER, BATCH, lam=LAM, estimator=estimator)
    last = gradmix.alignment_matrix(model, BUFFER, BATCH, lam=LAM, estimator="mixed")
    torch.testing.assert_close(by_layer.inner, last.inner, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(by_layer.cosine, last.cosine, rtol=1e-4, atol=1e-5)


def test_permute_forwards_the_drawn_pairs_alone() -> None:
    model = network()
    pairs = gradmix.select_pairs(
        model, BUFFER, BATCH, estimator="jvp", criterion="sample", policy="permute", lam=LAM, generator=generator()
    )
    known = ~torch.isnan(pairs.alignment)
    assert (known.sum(1) <= 1).all() and not known.diagonal().any()
    everything = gradmix.alignment_matrix(model, BUFFER, BATCH, lam=LAM, estimator="jvp")
    torch.testing.assert_close(pairs.alignment[known], everything.cosine[known])


class Reader(nn.Module):
    """Reads an image line by line with a recurrent layer, which torch.func cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(BATCH[0][0, :, 0].numel(), 5, batch_first=True)
        self.fc = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(x.transpose(1, 2).flatten(2))[0].mean(1))


def test_a_network_without_rules_row_by_row() -> None:
    torch.manual_seed(0)
    model = Reader()
    reference = true_reference(model, BUFFER)
    gradients = true_pairs(model, BATCH, OTHERS, LAM)
    both = {"candidates": OTHERS, "lam": LAM, "chunk_size": 5}
    found = gradmix.alignment_matrix(model, BUFFER, BATCH, estimator=JvpEstimator(without_rule="exact"), **both)
    close(found.inner, gradients @ reference, 2e-5)
    close(found.cosine, (gradients @ reference) / (gradients.norm(dim=2) * reference.norm()), 2e-5)
    own, other = (
        torch.stack([flat_gradient(double(model), x, y) for x, y in zip(*part, strict=True)])
        for part in (BATCH, OTHERS)
    )
    sketch = SketchEstimator(sketch="identity", budget=0, without_rule="exact")
    found = gradmix.alignment_matrix(model, BUFFER, BATCH, estimator=sketch, **both)
    close(found.inner, (LAM * own[:, None] + (1 - LAM) * other) @ reference, 2e-5)
    with pytest.raises(ValueError, match="without_rule='exact'"):
        gradmix.alignment_matrix(model, BUFFER, BATCH, estimator="jvp", **both)


# --------------------------------------------------------------------------------------------------------------- sketch


def sketched(model: nn.Module, estimator: SketchEstimator, by_class: bool) -> PairScores:
    sketch = Sketch(Network(model, None, None, 64, "auto"), estimator)
    reference, _ = sketch.reference(BUFFER, BATCH[0])
    assert reference is not None
    mixtures = Mixtures(LabelledSamples(*BATCH), None, LAM, 5, 64)
    return (sketch.class_scores if by_class else sketch.score)(mixtures, reference.gradient, None)


@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_without_a_sketch_it_is_the_mixture_of_the_gradients(name: str) -> None:
    model = network(name)
    reference = true_reference(model, BUFFER)
    own = torch.stack([flat_gradient(double(model), x, y) for x, y in zip(*BATCH, strict=True)])
    mixed = LAM * own[:, None] + (1 - LAM) * own
    found = gradmix.alignment_matrix(
        model, BUFFER, BATCH, lam=LAM, estimator=SketchEstimator(sketch="identity", budget=0)
    )
    close(found.inner, mixed @ reference, 2e-5)
    close(found.cosine, mixed @ reference / (mixed.norm(dim=2) * reference.norm()), 2e-5)


def test_by_class_it_mixes_the_mean_gradients() -> None:
    model = network()
    reference = true_reference(model, BUFFER)
    own = torch.stack([flat_gradient(double(model), x, y) for x, y in zip(*BATCH, strict=True)])
    found = gradmix.alignment_matrix(
        model, BUFFER, BATCH, lam=LAM, criterion="class", estimator=SketchEstimator(sketch="identity", budget=0)
    )
    assert found.classes is not None
    means = torch.stack([own[BATCH[1] == c].mean(0) for c in found.classes])
    close(found.inner, (LAM * means[:, None] + (1 - LAM) * means) @ reference, 2e-5)


def test_sketched_inner_products_are_within_their_standard_errors() -> None:
    model = network("convnet with batch norm")
    exact = sketched(model, SketchEstimator(sketch="identity"), by_class=False)
    ratios = []
    for seed in range(40):
        cells = sketched(model, SketchEstimator(rank=4, seed=seed), by_class=False)
        ratios.append((cells.inner - exact.inner) / cells.error)
    ratio = torch.stack(ratios)
    # The stated error of a mixture is an upper bound (the two rows' errors may cancel): no more than 5 % lie outside.
    assert (ratio.abs() > 2).double().mean() <= 0.06
    assert ratio.square().mean().sqrt() >= 0.3  # and it is not a bound so wide that it means nothing


def doubtful_cells(model: nn.Module, estimator: SketchEstimator, criterion: str) -> tuple[Tensor, Tensor]:
    """Which pairs are within so many standard errors of 0, and how many of these errors they are away."""
    cells = sketched(model, estimator, by_class=criterion == "class")
    distance = cells.inner.abs() / cells.error
    return distance <= estimator.errors, distance


def test_decisions_in_doubt_are_checked_again_by_mixed_inputs() -> None:
    model, estimator = network(), SketchEstimator(rank=4, budget=1000)
    doubtful, _ = doubtful_cells(model, estimator, "sample")
    doubtful.fill_diagonal_(False)
    pairs = gradmix.select_pairs(
        model, BUFFER, BATCH, estimator=estimator, criterion="sample", lam=LAM, generator=generator()
    )
    screening = pairs.screening
    assert screening is not None
    assert (screening.screened, screening.rechecked, screening.uncertain) == (30, int(doubtful.sum()), 0)
    assert screening.rechecked > 0
    exact = gradmix.alignment_matrix(model, BUFFER, BATCH, lam=LAM, estimator="jvp")
    plain = gradmix.alignment_matrix(model, BUFFER, BATCH, lam=LAM, estimator=estimator)
    torch.testing.assert_close(pairs.alignment[doubtful], exact.cosine[doubtful])
    torch.testing.assert_close(pairs.alignment[~doubtful], plain.cosine[~doubtful])


def test_the_budget_goes_to_the_least_certain() -> None:
    model, estimator = network(), SketchEstimator(rank=4, budget=5)
    doubtful, distance = doubtful_cells(model, estimator, "sample")
    doubtful.fill_diagonal_(False)
    pairs = gradmix.select_pairs(
        model, BUFFER, BATCH, estimator=estimator, criterion="sample", lam=LAM, generator=generator()
    )
    plain = gradmix.alignment_matrix(model, BUFFER, BATCH, lam=LAM, estimator=estimator)
    changed = (pairs.alignment != plain.cosine).nonzero().tolist()
    order = distance.masked_fill(~doubtful, float("inf")).flatten().argsort()[:5]
    assert sorted(changed) == sorted([int(k) // 6, int(k) % 6] for k in order)
    assert pairs.screening is not None
    assert (pairs.screening.rechecked, pairs.screening.uncertain) == (5, int(doubtful.sum()) - 5)
    figures = pairs.summary()
    assert (figures["screened"], figures["rechecked"], figures["uncertain"]) == (30, 5, int(doubtful.sum()) - 5)


def test_pairs_of_classes_are_checked_by_rows_of_these_classes() -> None:
    model, estimator = network(), SketchEstimator(rank=4, errors=1e6, budget=10_000, mixtures_per_class_pair=400)
    pairs = gradmix.select_pairs(
        model, BUFFER, BATCH, criterion="class", estimator=estimator, lam=LAM, generator=generator()
    )
    assert pairs.screening is not None and pairs.classes is not None
    gradients = true_pairs(model, BATCH, BATCH, LAM) @ true_reference(model, BUFFER)
    norms = true_pairs(model, BATCH, BATCH, LAM).norm(dim=2) * true_reference(model, BUFFER).norm()
    for a, left in enumerate(pairs.classes):
        for b, right in enumerate(pairs.classes):
            own = BATCH[1] == left, BATCH[1] == right
            if left == right and own[0].sum() == 1:
                continue  # a row is not mixed with itself, so this pair of classes was not judged
            expected = gradients[own[0]][:, own[1]].mean() / norms[own[0]][:, own[1]].mean()
            assert abs(pairs.alignment[a, b] - expected) < 0.05  # a mean over 400 draws of few pairs


def test_only_pairs_that_may_be_drawn_are_judged() -> None:
    model = network()
    estimator = SketchEstimator(rank=4, errors=1e6, budget=1000)
    pairs = gradmix.select_pairs(
        model, BUFFER, BATCH, criterion="sample", policy="permute", estimator=estimator, generator=generator(1)
    )
    assert pairs.screening is not None
    assert pairs.screening.screened == pairs.screening.rechecked <= len(BATCH[1])


def test_a_threshold_other_than_zero_compares_cosines() -> None:
    model = network()
    exact = gradmix.alignment_matrix(model, BUFFER, BATCH, candidates=OTHERS, lam=LAM, estimator="jvp")
    threshold = float(exact.cosine.median())
    pairs = gradmix.select_pairs(
        model,
        BUFFER,
        BATCH,
        candidates=OTHERS,
        criterion="sample",
        lam=LAM,
        threshold=threshold,
        estimator=SketchEstimator(rank=4, errors=1e9, budget=1000),
        generator=generator(),
    )
    torch.testing.assert_close(pairs.alignment, exact.cosine)
    assert torch.equal(pairs.helpful, (exact.cosine >= threshold).any(1))


# -------------------------------------------------------------------------------------------------------------- GradMix


@pytest.mark.parametrize("criterion", ["class", "sample"])
@pytest.mark.parametrize("estimator", ["jvp", "sketch"])
def test_gradmix_keeps_reference_and_table(estimator: str, criterion: str) -> None:
    model = network()
    mixup = GradMix(model, BUFFER, estimator=estimator, criterion=criterion, refresh=3, generator=generator())
    for step in range(4):
        x, y = mixup(*rows(8, 10 + step))
        assert x.shape == (8, 3, 8, 8) and y.shape == (8, CLASSES)
    assert mixup.refreshes == 2
    expected = mean_gradient(model, BUFFER)
    assert isinstance(mixup.reference, dict)
    assert all(torch.equal(mixup.reference[name], g) for name, g in expected.items())
    assert (mixup.table is None) == (criterion == "sample")
    assert (mixup.screening is not None) == ((estimator, criterion) == ("sketch", "class"))


def test_the_class_table_of_sketches_is_linear_in_lam() -> None:
    model = network()
    mixup = GradMix(
        model,
        BUFFER,
        criterion="class",
        estimator=SketchEstimator(sketch="identity", budget=0),
        generator=generator(),
        class_samples=50,
    )
    mixup.select(*BATCH)
    assert mixup.table is not None
    everything = tuple(torch.cat(v) for v in zip(BUFFER, BATCH, strict=True))
    for index, lam in enumerate(TABLE_LAMS):
        found = gradmix.alignment_matrix(
            model, BUFFER, everything, lam=lam, criterion="class", estimator=SketchEstimator(sketch="identity")
        )
        close(mixup.table.inner[index], found.inner.double(), 1e-4)


@pytest.mark.parametrize("estimator", ["jvp", "sketch"])
def test_its_state_loads_with_weights_only(estimator: str, tmp_path: object) -> None:
    model = network()
    first = GradMix(model, BUFFER, estimator=estimator, refresh=9, generator=generator(), criterion="class")
    first.select(*BATCH)
    torch.save(first.state_dict(), f"{tmp_path}/state.pt")
    second = GradMix(model, BUFFER, estimator=estimator, refresh=9, generator=generator(5), criterion="class")
    second.load_state_dict(torch.load(f"{tmp_path}/state.pt", weights_only=True))
    a, b = first.select(*BATCH), second.select(*BATCH)
    assert torch.equal(a.partner, b.partner) and torch.equal(a.lam, b.lam)
    assert second.refreshes == 1


def test_an_empty_buffer_is_plain_mixup() -> None:
    pairs = gradmix.select_pairs(network(), gradmix.ReplayBuffer(capacity=2), BATCH, estimator="sketch")
    assert pairs.helpful.all() and pairs.screening is None


# -------------------------------------------------------------------------------------------------- promises and errors


@pytest.mark.parametrize("estimator", ["jvp", "sketch"])
def test_nothing_is_left_behind(estimator: str) -> None:
    model = network("convnet with batch norm").train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, state = copy.deepcopy(model), torch.get_rng_state()
    gradmix.select_pairs(model, BUFFER, BATCH, estimator=estimator, generator=generator())
    assert torch.equal(torch.get_rng_state(), state) and model.training
    for (name, a), (_, b) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad and torch.equal(a.grad, torch.ones_like(a)), name
    for (name, a), (_, b) in zip(model.named_buffers(), before.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("criterion", ["class", "sample"])
@pytest.mark.parametrize("estimator", ["jvp", "sketch"])
def test_same_generator_same_pairs(estimator: str, criterion: str) -> None:
    model = network()
    first, second = (
        gradmix.select_pairs(
            model, BUFFER, BATCH, candidates=OTHERS, estimator=estimator, criterion=criterion, generator=generator(4)
        )
        for _ in range(2)
    )
    assert torch.equal(first.partner, second.partner)
    torch.testing.assert_close(first.alignment, second.alignment, rtol=0, atol=0, equal_nan=True)


def test_a_pass_takes_as_many_rows_as_memory_allows() -> None:
    model, seen = network("convnet with batch norm"), []
    model.fc.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    results = [
        gradmix.alignment_matrix(model, BUFFER, BATCH, lam=LAM, estimator=JvpEstimator(memory=memory))
        for memory in (1, 100_000, None)
    ]
    torch.testing.assert_close(results[0].inner, results[2].inner)
    torch.testing.assert_close(results[1].inner, results[2].inner)
    assert max(seen) == 36  # all pairs at once where there is memory
    seen.clear()
    gradmix.alignment_matrix(model, BUFFER, BATCH, lam=LAM, estimator=JvpEstimator(memory=1))
    assert max(seen) == 1


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "an unknown name": (
        lambda: gradmix.select_pairs(network(), BUFFER, BATCH, estimator="exact"),
        ValueError,
        "estimator: got 'exact', expected one of 'feature', 'mixed', 'jvp', 'sketch'",
    ),
    "a last-layer reference": (
        lambda: gradmix.select_pairs(network(), BUFFER, BATCH, estimator="jvp", reference=torch.zeros(CLASSES, 13)),
        TypeError,
        "reference: got Tensor, expected the gradient with respect to all parameters by name",
    ),
    "a whole reference": (
        lambda: gradmix.select_pairs(network(), BUFFER, BATCH, reference=mean_gradient(network(), BUFFER)),
        TypeError,
        "reference: got dict, expected a tensor",
    ),
    "a negative budget": (lambda: SketchEstimator(budget=-1), ValueError, "budget: got -1, expected an integer >= 0"),
    "a budget that is no integer": (
        lambda: SketchEstimator(budget=1.5),
        TypeError,
        "budget: got float, expected an int",
    ),
    "no rows for a class": (
        lambda: SketchEstimator(mixtures_per_class_pair=0),
        ValueError,
        "mixtures_per_class_pair: got 0, expected",
    ),
    "negative errors": (lambda: SketchEstimator(errors=-1.0), ValueError, "errors: got -1.0, expected a number >= 0"),
    "errors that are no number": (lambda: SketchEstimator(errors="2"), TypeError, "errors: got str, expected a number"),
    "a rank of 0": (
        lambda: gradmix.select_pairs(network(), BUFFER, BATCH, estimator=SketchEstimator(rank=0)),
        ValueError,
        "rank: got 0",
    ),
    "an empty buffer for a matrix": (
        lambda: gradmix.alignment_matrix(network(), gradmix.ReplayBuffer(1), BATCH, lam=0.5, estimator="jvp"),
        ValueError,
        "buffer: got no samples, expected at least one",
    ),
    "a label beyond the classes": (
        lambda: gradmix.select_pairs(network(), BUFFER, (BATCH[0], BATCH[1] + CLASSES), estimator="sketch"),
        ValueError,
        "batch labels",
    ),
    "a NaN in the batch": (
        lambda: gradmix.select_pairs(network(), BUFFER, (BATCH[0] * float("nan"), BATCH[1]), estimator="jvp"),
        ValueError,
        "batch: sample 0 holds NaN",
    ),
    "no memory": (lambda: JvpEstimator(memory=0), ValueError, "memory: got 0, expected a number of bytes >= 1"),
    "memory that is no number": (lambda: SketchEstimator(memory="2G"), TypeError, "memory: got str, expected a number"),
    "another number of classes": (
        lambda: gradmix.select_pairs(network(), BUFFER, BATCH, estimator="jvp", num_classes=3),
        ValueError,
        "num_classes: got 3, expected 5",
    ),
}


@pytest.mark.parametrize("name", ERRORS, ids=str)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message.replace("(", r"\(").replace(")", r"\)")):
        call()


def test_a_class_table_of_very_many_mixtures_says_how_to_have_fewer() -> None:
    classes = 60
    batch = torch.randn(2 * classes, 3, generator=generator()), torch.arange(2 * classes) % classes
    model = nn.Linear(3, classes)

    def make_table(**settings: object) -> None:
        mixup = GradMix(model, batch, criterion="class", chunk_size=4096, generator=generator(), **settings)  # type: ignore[arg-type]
        mixup(*batch)

    with pytest.warns(UserWarning, match=r"60 classes forwards 108,000 mixtures .* 30 for each pair .*'feature'"):
        make_table(estimator="mixed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_table(estimator="mixed", class_samples=5)
        make_table(estimator="feature")


def test_a_class_table_of_the_fewest_mixtures_does_not_advise_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_table, "MANY_MIXTURES", 10)
    batch = torch.randn(6, 3, generator=generator()), torch.arange(6) % 3
    with pytest.warns(UserWarning, match=r"3 classes forwards 45 mixtures .* 5 for each pair .*forwards none$"):
        GradMix(nn.Linear(3, 3), batch, criterion="class", estimator="mixed", class_samples=1)(*batch)
