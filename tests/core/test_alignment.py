"""Estimators, criteria and the reference gradient, against float64 loops of autograd over single mixed rows."""

import pytest
import torch
import truth
from models import CLASSES, MLP, NETWORKS, ConvNet, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradmix
from gradmix.alignment import alignment_matrix
from gradmix.class_table import TABLE_LAMS, ClassTable
from gradmix.criteria import Alignment, class_index
from gradmix.estimators import EstimatorName, Network, resolve
from gradmix.labelled_samples import LabelledSamples
from gradmix.mixtures import Mixtures
from gradmix.model.forward import forward_all
from gradmix.model.head import logits_of
from gradmix.model.unchanged import leave_unchanged
from gradmix.references import reference_gradient

BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}


class Logits(nn.Module):
    """A network that returns plain logits, for the truth."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x))


def trained_statistics(model: nn.Module) -> nn.Module:
    """BatchNorm statistics other than the initial ones."""
    model.train()
    for seed in range(3):
        model(rows(16, seed)[0] * 2 + 1)
    return model


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_reference_gradient(name: str, dtype: torch.dtype) -> None:
    model = trained_statistics(NETWORKS[name]())
    expected = truth.reference(Logits(model), "model.fc", *rows(7))
    result = reference_gradient(model.to(dtype), rows(7, dtype=dtype), chunk_size=3)
    assert result.dtype == dtype
    assert (result - expected).abs().max() <= BOUND[dtype] * expected.abs().max()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_estimator_mixed_is_exact_for_the_last_layer(name: str, dtype: torch.dtype, lam: float, soft: bool) -> None:
    model = trained_statistics(NETWORKS[name]())
    plain = Logits(model)
    batch, partners, buffer = rows(4, 1), rows(3, 2, soft=soft), rows(6, 3)
    grad_reference = truth.reference(plain, "model.fc", *buffer)
    inner, norm = truth.mixed_inputs(plain, "model.fc", batch, partners, lam, grad_reference)
    cast = [(x.to(dtype), y.to(dtype) if y.is_floating_point() else y) for x, y in (batch, partners, buffer)]
    result = alignment_matrix(
        model.to(dtype), cast[2], cast[0], lam=lam, candidates=cast[1], estimator="mixed", chunk_size=5
    )
    assert (result.inner - inner).abs().max() <= BOUND[dtype] * inner.abs().max()
    assert (result.cosine - inner / norm / grad_reference.norm()).abs().max() <= 10 * BOUND[dtype]
    truth.assert_decisions_agree(result.inner, inner)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_estimator_feature_is_exact_for_mixed_features(name: str, dtype: torch.dtype, lam: float, soft: bool) -> None:
    model = trained_statistics(NETWORKS[name]()).eval()
    batch, partners, buffer = rows(4, 1), rows(3, 2, soft=soft), rows(6, 3)
    exact = truth.double(model)
    grad_reference = truth.reference(Logits(model), "model.fc", *buffer)
    features = []
    for x, _ in (batch, partners):
        with gradmix.HeadCapture(exact, "fc") as capture, torch.no_grad():
            exact(x.double())
        features.append(capture.output.features)
    head = nn.Linear(features[0].shape[1], CLASSES, bias=exact.fc.bias is not None)
    head.weight.data = exact.fc.weight.data.flatten(1)
    if exact.fc.bias is not None:
        head.bias.data = exact.fc.bias.data
    inner, norm = truth.mixed_features(head, (features[0], batch[1]), (features[1], partners[1]), lam, grad_reference)
    cast = [(x.to(dtype), y.to(dtype) if y.is_floating_point() else y) for x, y in (batch, partners, buffer)]
    result = alignment_matrix(model.to(dtype), cast[2], cast[0], lam=lam, candidates=cast[1])
    assert (result.inner - inner).abs().max() <= BOUND[dtype] * inner.abs().max()
    assert (result.cosine - inner / norm / grad_reference.norm()).abs().max() <= 10 * BOUND[dtype]
    truth.assert_decisions_agree(result.inner, inner)


def test_mixing_nothing_makes_both_estimators_agree() -> None:
    model = MLP().double()
    given = (model, rows(6, 3, torch.float64), rows(5, 1, torch.float64))
    feature, mixed = (alignment_matrix(*given, lam=1.0, estimator=e) for e in ("feature", "mixed"))
    torch.testing.assert_close(feature.inner, mixed.inner)


SOURCES = {
    "pair": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dataset": TensorDataset,
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=4),
    "shuffled loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True),
    "integer labels one by one": lambda x, y: [(x[i], int(y[i])) for i in range(len(y))],
}


class ListDataset(torch.utils.data.Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple:
        return self.items[index]


@pytest.mark.parametrize("kind", SOURCES, ids=str)
def test_the_buffer_may_be_any_source_of_rows(kind: str) -> None:
    model, (x, y) = MLP().double(), rows(10, dtype=torch.float64)
    source = SOURCES[kind](x, y)
    if kind.startswith("integer"):
        source = ListDataset(source)
    torch.testing.assert_close(reference_gradient(model, source), reference_gradient(model, (x, y)))


def test_a_replay_buffer_is_read_as_it_is_now() -> None:
    model, (x, y) = MLP(), rows(10)
    buffer = gradmix.ReplayBuffer(100)
    buffer.add(x[:4], y[:4])
    first = reference_gradient(model, buffer)
    buffer.add(x[4:], y[4:])
    torch.testing.assert_close(first, reference_gradient(model, (x[:4], y[:4])))
    torch.testing.assert_close(reference_gradient(model, buffer), reference_gradient(model, (x, y)))


def test_by_class_it_is_the_mean_over_the_pairs_of_rows() -> None:
    model, (x, y), buffer = MLP().double(), rows(9, 1, torch.float64), rows(6, 3, torch.float64)
    y = torch.tensor([0, 0, 0, 2, 2, 2, 4, 4, 3])
    sample = alignment_matrix(model, buffer, (x, y), lam=0.3)
    by_class = alignment_matrix(model, buffer, (x, y), lam=0.3, criterion="class")
    assert by_class.classes.tolist() == [0, 2, 3, 4]
    not_itself = ~torch.eye(9, dtype=torch.bool)
    weights = sample.inner / sample.cosine
    for a, label in enumerate(by_class.classes):
        for b, other in enumerate(by_class.classes):
            cell = (y == label)[:, None] & (y == other) & not_itself
            if not cell.any():
                assert (label, other) == (3, 3)  # the only row of its class has no partner in it
                assert by_class.inner[a, b].isnan() and by_class.cosine[a, b].isnan()
                continue
            torch.testing.assert_close(by_class.inner[a, b], sample.inner[cell].mean())
            torch.testing.assert_close(
                by_class.cosine[a, b], (sample.cosine * weights)[cell].sum() / weights[cell].sum()
            )
    assert not by_class.helpful()[2, 2]


def test_by_class_with_foreign_candidates_counts_every_pair() -> None:
    model, buffer = MLP().double(), rows(6, 3, torch.float64)
    x, other = rows(2, 1, torch.float64)[0], rows(2, 2, torch.float64)[0]
    given = {"lam": 0.4, "candidates": (other, torch.tensor([4, 4]))}
    sample = alignment_matrix(model, buffer, (x, torch.tensor([1, 1])), **given)
    by_class = alignment_matrix(model, buffer, (x, torch.tensor([1, 1])), criterion="class", **given)
    torch.testing.assert_close(by_class.inner[0, 1], sample.inner.mean())
    assert by_class.inner[1, 0].isnan()


def table(
    model: nn.Module,
    pair: tuple,
    grad_reference: Tensor,
    estimator: EstimatorName = "feature",
    class_samples: int = 32,
) -> ClassTable:
    resolved = resolve(estimator, Network(model, model.fc, None, 512, "auto"))
    with leave_unchanged(model):
        got = forward_all(model, model.fc, "rows", LabelledSamples(*pair), 512)
        mixtures = Mixtures(got, None, 0.0, CLASSES, 512)
        return resolved.class_table(mixtures, grad_reference, class_samples, 0.0, torch.Generator().manual_seed(0))[0]


@pytest.mark.parametrize("lam", TABLE_LAMS)
def test_a_class_table_in_feature_space_is_the_class_mean_at_its_weights(lam: float) -> None:
    model, pair = MLP().double(), rows(12, 1, torch.float64)
    buffer = rows(6, 3, torch.float64)
    result = table(model, pair, reference_gradient(model, buffer)).at(lam)
    expected = alignment_matrix(model, buffer, pair, lam=lam, criterion="class")
    assert torch.equal(result.classes, expected.classes)
    for name in ("inner", "cosine"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), equal_nan=True)


@pytest.mark.parametrize("lam", [0.1, 0.4, 0.6, 0.97])
def test_a_class_table_is_interpolated_between_its_weights(lam: float) -> None:
    model, pair, buffer = MLP().double(), rows(12, 1, torch.float64), rows(6, 3, torch.float64)
    whole = table(model, pair, reference_gradient(model, buffer))
    result = whole.at(lam)
    k = int(lam * 4)
    share = lam * 4 - k
    torch.testing.assert_close(result.inner, (1 - share) * whole.inner[k] + share * whole.inner[k + 1], equal_nan=True)
    exact = alignment_matrix(model, buffer, pair, lam=lam, criterion="class")
    # Smooth in lam: five weights lose little.
    assert (result.inner - exact.inner).nan_to_num().abs().max() <= 0.05 * exact.inner.nan_to_num().abs().max()
    assert ((result.cosine >= 0) == (result.inner >= 0))[~result.inner.isnan()].all()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_average_of_a_class_table_is_over_beta(alpha: float) -> None:
    lams, classes = TABLE_LAMS, torch.tensor([3, 7])
    # Linear in lam, so that interpolation is exact: inner = 2 lam - 1 has mean 0, norm = 1 + lam has mean 1.5.
    inner = torch.tensor([2 * v - 1 for v in lams], dtype=torch.float64)[:, None, None].expand(-1, 2, 2)
    norm = torch.tensor([1 + v for v in lams], dtype=torch.float64)[:, None, None].expand(-1, 2, 2)
    whole = ClassTable(lams, inner + 0.75, norm, torch.tensor(2.0, dtype=torch.float64), classes)
    average = whole.average(alpha)
    torch.testing.assert_close(average.inner, torch.full((2, 2), 0.75, dtype=torch.float64))
    torch.testing.assert_close(average.cosine, torch.full((2, 2), 0.25, dtype=torch.float64))


def test_a_class_table_of_mixed_inputs_is_unbiased_over_its_random_pairs() -> None:
    model, pair = MLP(), rows(12, 1)
    grad_reference = reference_gradient(model, rows(6, 3))
    samples = 400
    whole = table(model, pair, grad_reference, estimator="mixed", class_samples=samples * len(TABLE_LAMS))
    y = pair[1]
    for lam in TABLE_LAMS:
        result = whole.at(lam)
        inner, norm = truth.mixed_inputs(model, "fc", pair, pair, lam, grad_reference)
        for a, label in enumerate(result.classes):
            for b, other in enumerate(result.classes):
                cell = (y == label)[:, None] & (y == other)
                error = inner[cell].std(correction=0) / samples**0.5
                assert (result.inner[a, b] - inner[cell].mean()).abs() <= 5 * error + 1e-5
                weighted = inner[cell].mean() / norm[cell].mean() / grad_reference.norm()
                assert (result.cosine[a, b] - weighted).abs() < 0.1


def test_many_classes_get_fewer_rows_each() -> None:
    model, (x, _) = MLP(), rows(30)
    y = torch.arange(30) % 3
    grad_reference = reference_gradient(model, rows(6, 3))
    few = table(model, (x, y), grad_reference, class_samples=2)
    first_two = torch.cat([(y == c).nonzero()[:2, 0] for c in range(3)])
    expected = table(model, (x[first_two], y[first_two]), grad_reference)
    torch.testing.assert_close(few.inner, expected.inner)


def test_class_index_finds_classes_and_marks_the_unknown() -> None:
    assert class_index(torch.tensor([1, 4]), torch.tensor([4, 1, 0, 2, 9])).tolist() == [1, 0, -1, -1, -1]


def test_threshold_zero_is_the_sign_and_others_compare_cosines() -> None:
    alignment = Alignment(
        torch.tensor([[-1e-30, 0.0, 5.0, float("nan")]]), torch.tensor([[0.0, 0.0, 0.4, float("nan")]])
    )
    assert alignment.helpful().tolist() == [[False, True, True, False]]
    assert alignment.helpful(0.3).tolist() == [[False, False, True, False]]
    assert alignment.helpful(-1.0).tolist() == [[True, True, True, False]]


def test_low_precision_models_are_served_in_float32() -> None:
    model = ConvNet().bfloat16().eval()
    result = alignment_matrix(model, rows(6, 3, torch.bfloat16), rows(4, 1, torch.bfloat16), lam=0.5)
    assert result.inner.dtype == torch.float32 and torch.isfinite(result.inner).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    {
        "empty buffer": (
            {"buffer": (torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64))},
            ValueError,
            "buffer: got no samples",
        ),
        "wrong source": ({"buffer": "rows"}, TypeError, "buffer: got str, expected a ReplayBuffer"),
        "three parts": ({"batch": (1, 2, 3)}, TypeError, "batch: got tuple of 3"),
        "labels in a list": ({"batch": (rows(2)[0], [0, 1])}, TypeError, "batch: got a pair of Tensor and list"),
        "lengths differ": (
            {"batch": (rows(2)[0], rows(3)[1])},
            ValueError,
            r"batch labels: got shape \(3,\), expected \(2,\)",
        ),
        "label beyond the model": (
            {"buffer": (rows(2)[0], torch.tensor([1, 5]))},
            ValueError,
            r"buffer labels: row 1 is 5, expected .* \[0, 5\)",
        ),
        "criterion": ({"criterion": "pair"}, ValueError, "criterion: got 'pair', expected one of 'class', 'sample'"),
        "estimator": ({"estimator": "exact"}, ValueError, "estimator: got 'exact'"),
        "lam": ({"lam": 2.0}, ValueError, "lam: got 2.0"),
    }.values(),
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    given = {"buffer": rows(4), "batch": rows(3), "lam": 0.5} | change
    with pytest.raises(error, match=message):
        alignment_matrix(MLP(), given.pop("buffer"), given.pop("batch"), **given)


def test_a_later_chunk_names_the_row_of_the_whole_buffer() -> None:
    x, y = rows(9)
    x[7, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="buffer: sample 7 holds NaN"):
        reference_gradient(MLP(), (x, y), chunk_size=4)
    with pytest.raises(ValueError, match=r"buffer labels: row 8 is 9, expected a class index in \[0, 5\)"):
        reference_gradient(MLP(), (rows(9)[0], torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 9])), chunk_size=4)
