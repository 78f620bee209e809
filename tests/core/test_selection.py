"""select_pairs and Pairs: what is chosen, how it is mixed, and which input is refused."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
import truth
from hypothesis import given
from hypothesis import strategies as st
from models import CLASSES, MLP, NETWORKS, HuggingFaceStyle, rows
from torch import Tensor, nn

import gradmix
from gradmix import alignment_matrix, select_pairs

CRITERIA = ("class", "sample")
ESTIMATORS = ("feature", "mixed")
POLICIES = ("uniform", "permute", "best")
BUFFER = rows(12, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def helpful_by_pair(pairs: gradmix.Pairs, y: Tensor, other_y: Tensor, threshold: float = 0.0) -> Tensor:
    """(N, M) bool from the cosines that came back."""
    allowed = pairs.alignment >= threshold
    if pairs.classes is None:
        return allowed
    i, j = torch.searchsorted(pairs.classes, y), torch.searchsorted(pairs.classes, other_y)
    return allowed[i[:, None], j]


@pytest.mark.parametrize("foreign", [False, True], ids=["own rows", "candidates"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_only_helpful_partners_are_chosen(criterion: str, estimator: str, policy: str, foreign: bool) -> None:
    model, batch = MLP(), rows(11, 1)
    candidates = rows(7, 2) if foreign else None
    pairs = select_pairs(
        model,
        BUFFER,
        batch,
        candidates=candidates,
        criterion=criterion,
        estimator=estimator,
        policy=policy,
        generator=generator(),
    )
    other = batch if candidates is None else candidates
    allowed = helpful_by_pair(pairs, batch[1], other[1])
    row = torch.arange(11)
    assert allowed[row, pairs.partner][pairs.helpful].all()
    assert pairs.helpful.any()
    assert (pairs.lam[~pairs.helpful] == 1).all()
    assert len(torch.unique(pairs.lam[pairs.helpful])) == 1
    if not foreign:
        allowed.fill_diagonal_(False)
        assert (pairs.partner[~pairs.helpful] == row[~pairs.helpful]).all()
        assert (pairs.partner[pairs.helpful] != row[pairs.helpful]).all()
    if policy != "permute":
        assert torch.equal(pairs.helpful, allowed.any(1))
    shape = (len(pairs.classes),) * 2 if criterion == "class" else (11, len(other[1]))
    assert pairs.alignment.shape == shape
    if policy == "permute" and estimator == "mixed" and criterion == "sample":
        assert (~pairs.alignment.isnan()).sum(1).eq(1).all()  # only the drawn pairs were forwarded


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_it_decides_as_the_alignment_matrix_says(criterion: str, estimator: str) -> None:
    model, batch, candidates = MLP(), rows(9, 1), rows(6, 2)
    options = {"candidates": candidates, "criterion": criterion, "estimator": estimator}
    pairs = select_pairs(model, BUFFER, batch, lam=0.3, **options)
    expected = alignment_matrix(model, BUFFER, batch, lam=0.3, **options)
    assert torch.equal(pairs.alignment.nan_to_num(9), expected.cosine.nan_to_num(9))


def test_decisions_are_those_of_single_autograd_gradients() -> None:
    model, batch = MLP(), rows(12, 1)
    grad_reference = truth.reference(model, "fc", *BUFFER)
    inner, _ = truth.mixed_inputs(model, "fc", batch, batch, 0.4, grad_reference)
    pairs = select_pairs(model, BUFFER, batch, lam=0.4, criterion="sample", estimator="mixed")
    truth.assert_decisions_agree(pairs.alignment, inner)
    clear = inner.abs() > 1e-6 * inner.abs().max()
    chosen = (torch.arange(12), pairs.partner)
    assert (inner[chosen] >= 0)[pairs.helpful & clear[chosen]].all()


def test_uniform_draws_every_helpful_partner_equally_often() -> None:
    model, batch = MLP(), rows(8, 1)
    g, count, draws = generator(), torch.zeros(8, 8), 800
    for _ in range(draws):
        pairs = select_pairs(
            model, BUFFER, batch, lam=0.4, criterion="sample", generator=g, reference=torch.ones(CLASSES, 13)
        )
        count[torch.arange(8), pairs.partner] += 1
    allowed = pairs.alignment >= 0
    allowed.fill_diagonal_(False)
    assert allowed.any(1).sum() >= 4 and allowed.sum(1).max() >= 3
    for i in allowed.any(1).nonzero().squeeze(1):
        share = 1 / allowed[i].sum()
        spread = (draws * share * (1 - share)).sqrt()
        assert ((count[i, allowed[i]] - draws * share).abs() <= 5 * spread + 1e-6).all()
        assert count[i, ~allowed[i]].sum() == 0


def test_best_takes_the_largest_cosine_and_breaks_ties_at_random() -> None:
    model, batch = MLP(), rows(9, 1)
    pairs = select_pairs(model, BUFFER, batch, criterion="sample", policy="best", lam=0.5)
    ranked = pairs.alignment.clone().fill_diagonal_(-2)
    found = pairs.helpful
    assert torch.equal(pairs.partner[found], ranked.argmax(1)[found])
    # Copies of one candidate are equally good.
    x, y = rows(1, 5)
    tied = {
        int(p)
        for seed in range(20)
        for p in select_pairs(
            model,
            (x, y),
            (x, y),
            candidates=(x.expand(4, -1, -1, -1), y.expand(4)),
            policy="best",
            generator=generator(seed),
        ).partner
    }
    assert len(tied) > 1


def test_a_threshold_moves_the_decision() -> None:
    model, batch = MLP(), rows(12, 1)
    shares = [
        float(select_pairs(model, BUFFER, batch, criterion="sample", lam=0.5, threshold=t).helpful.float().mean())
        for t in (-1.0, 0.0, 0.5, 1.0)
    ]
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True) and shares[-1] == 0.0


@pytest.mark.parametrize(
    "empty",
    {
        "pair": (torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64)),
        "buffer": gradmix.ReplayBuffer(3),
        "dataset": torch.utils.data.TensorDataset(torch.empty(0, 3), torch.empty(0)),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_empty_buffer_is_plain_mixup(criterion: str, empty: tuple) -> None:
    model, batch = MLP(), rows(40, 1)
    pairs = select_pairs(
        model, empty[1], batch, criterion=criterion, policy="permute", threshold=0.9, generator=generator(4)
    )
    # What Mixup does with the same generator: the weight, then a permutation.
    g = generator(4)
    lam = gradmix.mixing_weight.draw_lam(1.0, g)
    permutation = torch.randperm(40, generator=g)
    x, y = pairs.mix()
    torch.testing.assert_close(x, lam * batch[0] + (1 - lam) * batch[0][permutation])
    one_hot = F.one_hot(batch[1], CLASSES)
    torch.testing.assert_close(y, lam * one_hot + (1 - lam) * one_hot[permutation])
    uniform = select_pairs(model, empty[1], batch, criterion=criterion)
    assert uniform.helpful.all() and (uniform.alignment == 0).all()


def test_an_empty_buffer_and_known_classes_need_no_forward_pass() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("called")

    _, y = select_pairs(Refuses(), gradmix.ReplayBuffer(1), rows(3), num_classes=CLASSES).mix()
    assert y.shape == (3, CLASSES)


@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_every_kind_of_network(name: str) -> None:
    model = NETWORKS[name]()
    x, y = select_pairs(model, BUFFER, rows(6, 1), generator=generator()).mix()
    assert x.shape == (6, 3, 8, 8) and y.shape == (6, CLASSES)
    torch.testing.assert_close(y.sum(1), torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft", [False, True])
def test_mix_gives_the_convex_combination(dtype: torch.dtype, soft: bool) -> None:
    model = MLP().to(dtype)
    x, y = rows(6, 1, dtype, soft)
    other_x, other_y = rows(5, 2, dtype)
    y = y.to(dtype) if soft and dtype != torch.bfloat16 else y
    buffer = (BUFFER[0].to(dtype), BUFFER[1])
    pairs = select_pairs(model, buffer, (x, y), candidates=(other_x, other_y), threshold=-1.0, criterion="sample")
    mixed_x, mixed_y = pairs.mix()
    assert mixed_x.dtype == dtype
    assert mixed_y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for i in range(6):
        lam, j = float(pairs.lam[i]), int(pairs.partner[i])
        torch.testing.assert_close(
            mixed_x[i].double(), lam * x[i].double() + (1 - lam) * other_x[j].double(), atol=tolerance, rtol=tolerance
        )
        label = truth.one_hot(y[i : i + 1], CLASSES)[0] * lam
        label[other_y[j]] += 1 - lam
        torch.testing.assert_close(mixed_y[i].double(), label, atol=1e-6, rtol=0)


def test_unmixed_samples_come_back_bit_for_bit() -> None:
    batch = rows(6, 1)
    pairs = select_pairs(MLP(), BUFFER, batch, criterion="sample", threshold=1.0)
    assert not pairs.helpful.any()
    x, y = pairs.mix()
    assert torch.equal(x, batch[0]) and torch.equal(y, F.one_hot(batch[1], CLASSES).float())


def test_mix_takes_other_forms_of_the_same_rows() -> None:
    batch = rows(6, 1)
    pairs = select_pairs(MLP(), BUFFER, batch, lam=0.25)
    embedded, smoothed = torch.randn(6, 10), torch.full((6, CLASSES), 1 / CLASSES)
    x, y = pairs.mix(embedded, smoothed)
    weight = pairs.lam[:, None]
    torch.testing.assert_close(x, weight * embedded + (1 - weight) * embedded[pairs.partner])
    torch.testing.assert_close(y, smoothed)
    with pytest.raises(ValueError, match="x: got 5 samples, expected the 6"):
        pairs.mix(embedded[:5])
    with pytest.raises(ValueError, match="y: got 7 samples, expected the 6"):
        pairs.mix(y=torch.zeros(7, dtype=torch.int64))
    with pytest.raises(TypeError, match="x: got dtype torch.int64"):
        pairs.mix(torch.ones(6, 2, dtype=torch.int64))
    foreign = select_pairs(MLP(), BUFFER, batch, candidates=rows(3, 2))
    with pytest.raises(ValueError, match=r"x: got samples of shape \(10,\), expected \(3, 8, 8\) as the candidates"):
        foreign.mix(embedded)


@pytest.mark.parametrize("foreign", [False, True], ids=["own samples", "candidates"])
def test_labels_given_to_the_mixing_are_of_the_models_classes(foreign: bool) -> None:
    model, (x, y) = MLP(), rows(6, 1)
    pairs = select_pairs(model, rows(9, 2), (x, y), candidates=rows(5, 3) if foreign else None, lam=0.5)
    wrong = y.clone()
    wrong[4] = CLASSES
    for mix in (lambda labels: pairs.mix(y=labels), pairs.mix_labels):
        with pytest.raises(
            ValueError, match=rf"y labels: row 4 is {CLASSES}, expected a class index in \[0, {CLASSES}\)"
        ):
            mix(wrong)
        with pytest.raises(ValueError, match=rf"y labels: got {CLASSES + 1} classes, expected {CLASSES}"):
            mix(torch.full((6, CLASSES + 1), 1 / (CLASSES + 1)))


@pytest.mark.parametrize("foreign", [False, True])
def test_as_tuple_is_the_mixup_criterion_idiom(foreign: bool) -> None:
    model, batch = MLP(), rows(6, 1)
    candidates = rows(9, 2) if foreign else None
    pairs = select_pairs(model, BUFFER, batch, candidates=candidates)
    x, y_a, y_b, lam = pairs.as_tuple()
    logits = model(x)
    idiom = lam * F.cross_entropy(logits, y_a, reduction="none") + (1 - lam) * F.cross_entropy(
        logits, y_b, reduction="none"
    )
    torch.testing.assert_close(idiom, F.cross_entropy(logits, pairs.mix()[1], reduction="none"))


def test_summary_counts() -> None:
    pairs = select_pairs(MLP(), BUFFER, rows(10, 1), criterion="sample", lam=0.25)
    summary = pairs.summary()
    assert summary["samples"] == summary["rows"] == len(pairs) == 10
    assert summary["mixed"] == int(pairs.helpful.sum()) == round(summary["mixed_share"] * 10)
    assert summary["lam"] == 0.25
    assert summary["positive_share"] == pytest.approx(float((pairs.alignment >= 0).float().mean()))
    assert summary["mean_cosine"] == pytest.approx(float(pairs.alignment.mean()), abs=1e-6)


def test_pairs_are_frozen() -> None:
    pairs = select_pairs(MLP(), BUFFER, rows(3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pairs.partner = pairs.lam


def test_outputs_of_a_forward_pass_made_anyway_save_one_and_change_nothing() -> None:
    model, batch = MLP().eval(), rows(8, 1)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with gradmix.HeadCapture(model, example=batch[0]) as capture:
        model(batch[0])
    given = {"criterion": "sample", "lam": 0.3, "reference": gradmix.reference_gradient(model, BUFFER)}
    calls.clear()
    expected = select_pairs(model, BUFFER, batch, **given)
    assert len(calls) == 1
    result = select_pairs(model, BUFFER, batch, outputs=capture.output, **given)
    assert len(calls) == 1
    assert torch.equal(result.alignment, expected.alignment)


def test_a_reference_given_stands_for_the_buffer() -> None:
    model, batch = MLP(), rows(8, 1)
    reference = gradmix.reference_gradient(model, BUFFER)
    expected = select_pairs(model, BUFFER, batch, criterion="sample", lam=0.3)
    result = select_pairs(model, gradmix.ReplayBuffer(1), batch, criterion="sample", lam=0.3, reference=reference)
    assert torch.equal(result.alignment, expected.alignment)


def test_a_zero_reference_gradient_forbids_nothing() -> None:
    pairs = select_pairs(MLP(), BUFFER, rows(5, 1), reference=torch.zeros(CLASSES, 13))
    assert pairs.helpful.all()


def test_one_row_alone_stays_unmixed() -> None:
    pairs = select_pairs(MLP(), BUFFER, rows(1, 1))
    assert not pairs.helpful.any() and pairs.partner.tolist() == [0] and pairs.lam.tolist() == [1.0]


def test_classes_appearing_later_and_a_grown_head() -> None:
    model = MLP()
    select_pairs(model, BUFFER, rows(4, 1))
    model.fc = nn.Linear(12, CLASSES + 2)
    x = rows(4, 1)[0]
    pairs = select_pairs(model, BUFFER, (x, torch.tensor([CLASSES + 1, 0, CLASSES, 1])))
    assert pairs.mix()[1].shape == (4, CLASSES + 2)


@given(
    n=st.integers(1, 6),
    m=st.one_of(st.none(), st.integers(1, 6)),
    k=st.integers(0, 5),
    criterion=st.sampled_from(CRITERIA),
    estimator=st.sampled_from(ESTIMATORS),
    policy=st.sampled_from(POLICIES),
    lam=st.one_of(st.none(), st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    threshold=st.sampled_from([0.0, -0.5, 0.5]),
    soft=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 1e4]),
    strided=st.booleans(),
    labels=st.integers(1, CLASSES),
    seed=st.integers(0, 1000),
)
def test_any_rows(
    n, m, k, criterion, estimator, policy, lam, threshold, soft, dtype, scale, strided, labels, seed
) -> None:
    torch.manual_seed(seed)
    model = MLP().to(dtype)
    model.fc.weight.data *= scale

    def some(count: int, offset: int, soft_labels: bool = False) -> tuple[Tensor, Tensor]:
        x, y = rows(count, seed + offset, dtype, soft_labels)
        if strided:
            x = torch.stack([x, x], -1)[..., 0]
        return x, y if soft_labels else y % labels

    batch, candidates = some(n, 1, soft), None if m is None else some(m, 2)
    pairs = select_pairs(
        model,
        some(k, 3),
        batch,
        candidates=candidates,
        criterion=criterion,
        estimator=estimator,
        policy=policy,
        lam=lam,
        threshold=threshold,
        generator=generator(seed),
    )
    x, y = pairs.mix()
    assert x.shape == batch[0].shape and torch.isfinite(x).all()
    torch.testing.assert_close(y.sum(1).double(), torch.ones(n).double(), atol=1e-2, rtol=0)
    assert (pairs.partner >= 0).all() and (pairs.partner < (n if m is None else m)).all()
    assert ((pairs.alignment.abs() <= 1) | pairs.alignment.isnan()).all()
    assert (pairs.lam[~pairs.helpful] == 1).all()
    if lam is not None:
        torch.testing.assert_close(pairs.lam[pairs.helpful].double(), torch.full((n,), lam).double()[pairs.helpful])
    if k == 0 and policy != "permute":
        assert pairs.helpful.all() or (m is None and n == 1)


def nan_at(row: int, n: int = 4) -> tuple[Tensor, Tensor]:
    x, y = rows(n, 1)
    x[row, 1, 2, 3] = float("nan")
    return x, y


def infinite_at(row: int) -> tuple[Tensor, Tensor]:
    x, y = rows(4, 1)
    x[row, 1, 2, 3] = float("inf")
    return x, y


class Diverged(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x) * torch.where(torch.arange(len(x)) == 2, torch.nan, 1.0)[:, None])


BAD = {
    "NaN in the batch": ({"batch": nan_at(2)}, ValueError, "^batch: sample 2 holds NaN, expected finite values"),
    "infinity in the batch": ({"batch": infinite_at(1)}, ValueError, "^batch: sample 1 holds an infinity"),
    "NaN in the candidates": ({"candidates": nan_at(3)}, ValueError, "^candidates: sample 3 holds NaN"),
    "NaN in the buffer": ({"buffer": nan_at(0)}, ValueError, "^buffer: sample 0 holds NaN"),
    "NaN with an empty buffer": (
        {"batch": nan_at(2), "buffer": gradmix.ReplayBuffer(1)},
        ValueError,
        "^batch: sample 2 holds NaN",
    ),
    "a model that has diverged": (
        {"model": Diverged(), "head": "fc"},
        ValueError,
        "^the model's features of buffer: sample 2 holds NaN",
    ),
    "no rows": ({"batch": rows(0)}, ValueError, "batch: got no samples"),
    "no candidates": ({"candidates": rows(0)}, ValueError, "candidates: got no samples"),
    "integer inputs": (
        {"batch": (torch.ones(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))},
        TypeError,
        "batch: got x of dtype torch.uint8",
    ),
    "candidates of another shape": (
        {"candidates": (torch.ones(2, 3), torch.tensor([0, 1]))},
        ValueError,
        r"candidates: got samples of shape \(3,\), expected \(3, 8, 8\)",
    ),
    "batch label too large": (
        {"batch": (rows(2)[0], torch.tensor([0, CLASSES]))},
        ValueError,
        r"batch labels: row 1 is 5, expected a class index in \[0, 5\)",
    ),
    "batch label too large, empty buffer": (
        {"batch": (rows(2)[0], torch.tensor([0, 9])), "buffer": gradmix.ReplayBuffer(1)},
        ValueError,
        "batch labels: row 1 is 9",
    ),
    "batch label negative": ({"batch": (rows(2)[0], torch.tensor([-1, 0]))}, ValueError, "batch labels: row 0 is -1"),
    "candidate label too large": (
        {"candidates": (rows(2)[0], torch.tensor([0, 7]))},
        ValueError,
        "candidates labels: row 1 is 7",
    ),
    "soft labels too wide": (
        {"batch": (rows(2)[0], torch.full((2, 10), 0.1))},
        ValueError,
        "batch labels: got 10 classes, expected 5",
    ),
    "soft labels that do not sum to 1": (
        {"batch": (rows(2)[0], torch.ones(2, 5))},
        ValueError,
        "batch labels: row 0 sums to 5",
    ),
    "criterion": ({"criterion": "both"}, ValueError, "criterion: got 'both'"),
    "estimator": ({"estimator": "all"}, ValueError, "estimator: got 'all'"),
    "policy": ({"policy": "random"}, ValueError, "policy: got 'random', expected one of 'uniform', 'permute', 'best'"),
    "alpha zero": ({"alpha": 0.0}, ValueError, "alpha: got 0.0, expected a number > 0"),
    "alpha text": ({"alpha": "1"}, TypeError, "alpha: got str"),
    "lam": ({"lam": -0.1}, ValueError, "lam: got -0.1"),
    "threshold": ({"threshold": 90}, ValueError, r"threshold: got 90, expected a cosine in \[-1, 1\]"),
    "threshold text": ({"threshold": "90"}, TypeError, "threshold: got str"),
    "num_classes": ({"num_classes": 7}, ValueError, "num_classes: got 7, expected 5 as the model's logits"),
    "num_classes float": ({"num_classes": 5.0}, TypeError, "num_classes: got float"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "chunk_size: got 0, expected an integer >= 1"),
    "backend": ({"backend": "cuda-fast"}, ValueError, "backend: got 'cuda-fast'"),
    "head": ({"head": "classifier"}, gradmix.HeadNotFoundError, "no module 'classifier'"),
    "model": ({"model": nn.Flatten()}, gradmix.HeadNotFoundError, "no linear layer of the model gives 192 logits"),
    "outputs of other rows": (
        {"outputs": (torch.zeros(3, 12), torch.zeros(3, CLASSES))},
        ValueError,
        "outputs: got features of 3 and logits of 3 samples, expected 4 as the batch",
    ),
    "reference": ({"reference": torch.zeros(CLASSES, 9)}, ValueError, r"reference: got shape \(5, 9\)"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_is_named(case: str) -> None:
    change, error, message = BAD[case]
    given = {"model": MLP(), "buffer": BUFFER, "batch": rows(4, 1)} | change
    with pytest.raises(error, match=message):
        select_pairs(given.pop("model"), given.pop("buffer"), given.pop("batch"), **given)


def test_a_nan_among_mixed_inputs_names_a_pair_of_rows() -> None:
    class Squares(HuggingFaceStyle):
        """Finite for the rows themselves, infinite for one of their mixtures."""

        def forward(self, x: Tensor):
            return super().forward(
                torch.where(x.flatten(1).mean(1).view(-1, 1, 1, 1).sub(0.5).abs() < 0.1, torch.nan, x)
            )

    x = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    with pytest.raises(ValueError, match="the model's logits of mixed samples 0 and 1: NaN"):
        select_pairs(Squares(), BUFFER, (x, torch.tensor([0, 1])), lam=0.5, estimator="mixed", head="fc")


@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_by_row_says_what_partners_were_drawn_from(criterion: str, threshold: float) -> None:
    """Foreign candidates, one of their classes unknown to the batch: the mask is what selection itself used."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Linear(6, 4)
    batch = torch.randn(9, 6, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    other = torch.randn(7, 6, generator=generator), torch.tensor([3, 0, 1, 2, 3, 0, 1])
    buffer = torch.randn(8, 6, generator=generator), torch.arange(8) % 4
    pairs = gradmix.select_pairs(
        model, buffer, batch, candidates=other, criterion=criterion, threshold=threshold, lam=0.4
    )
    helpful, cosine = pairs.by_pair(threshold)
    assert helpful.shape == cosine.shape == (9, 7)
    assert torch.equal(pairs.helpful, helpful.any(1))
    assert helpful[torch.arange(9), pairs.partner][pairs.helpful].all()
    for i in range(9):
        for j in range(7):
            if criterion == "sample":
                expected = pairs.alignment[i, j]
            else:
                a, b = ((pairs.classes == y).nonzero().item() for y in (batch[1][i], other[1][j]))
                expected = pairs.alignment[a, b]
            assert cosine[i, j] == expected and helpful[i, j] == (expected >= threshold)


@pytest.mark.parametrize("marked", ["some", "none"])
def test_the_alignment_is_computed_when_somebody_asks(marked: str) -> None:
    """At threshold 0 no decision needs a cosine; what is asked for later is what a decision would have used."""
    model, batch = MLP(), rows(9, 1)
    replayed = torch.arange(9) % 3 == 0 if marked == "some" else torch.zeros(9, dtype=torch.bool)
    how = {"lam": 0.4, "generator": torch.Generator().manual_seed(0)}
    pairs = gradmix.select_pairs(model, replayed, batch, **how)
    assert callable(pairs._alignment)
    eager = gradmix.select_pairs(model, replayed, batch, **(how | {"policy": "best"}))
    assert not callable(eager._alignment)
    copies = [pickle.loads(pickle.dumps(pairs)), copy.deepcopy(pairs)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # what was captured is what counts
    with torch.inference_mode():
        assert torch.equal(pairs.alignment, eager.alignment)
    assert not pairs.alignment.is_inference() and not pairs.alignment.requires_grad
    for other in copies:
        assert torch.equal(other.alignment, eager.alignment) and torch.equal(other.partner, pairs.partner)
    assert pairs.summary()["mean_cosine"] == eager.summary()["mean_cosine"]
    assert torch.equal(pairs.by_pair(0.2)[0], eager.by_pair(0.2)[0])


def test_samples_written_in_place_since_are_noticed() -> None:
    model, (x, y) = MLP(), rows(9, 1)
    with torch.no_grad(), gradmix.HeadCapture(model, example=x) as capture:
        model(x)
    outputs = capture.output
    pairs = gradmix.select_pairs(model, torch.arange(9) < 4, (x, y), outputs=outputs)
    outputs.features.mul_(2)
    with pytest.raises(RuntimeError, match="alignment: the labels, features or logits .* written in place since"):
        pairs.summary()
    assert pairs.partner.shape == pairs.lam.shape == (9,)  # what was decided stays
