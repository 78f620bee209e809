"""Class tables of many classes: few pairs of samples for each pair of classes, and classes that come later."""

import io
from typing import Any

import pytest
import torch
from models import rows
from torch import Tensor, nn

from gradmix import GradMix
from gradmix.class_table import TABLE_LAMS, ClassTable
from gradmix.estimators import feature, last_layer, sampled_table
from gradmix.labelled_samples import HeadSamples
from gradmix.ops.mixed_alignment import Side, mixed_alignment
from gradmix.references import ClassQuota

CLASSES, WIDTH = 6, 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples_of(labels: list[int], seed: int = 0, soft: bool = False, bias: bool = True) -> HeadSamples:
    """Samples of these classes, in float64."""
    g = generator(seed)
    features = torch.randn(len(labels), WIDTH, generator=g, dtype=torch.float64)
    logits = 3 * torch.randn(len(labels), CLASSES, generator=g, dtype=torch.float64)
    y = torch.tensor(labels)
    return HeadSamples(None, nn.functional.one_hot(y, CLASSES).double() if soft else y, features, logits, bias)


def gradient_of(bias: bool = True) -> Tensor:
    return torch.randn(CLASSES, WIDTH + bias, generator=generator(9), dtype=torch.float64)


def table_of(samples: HeadSamples, gradient: Tensor, per_class: int = 32) -> ClassTable:
    return sampled_table.make_sampled_table(samples, gradient, gradient.norm(), per_class, "reference")


def score(samples: HeadSamples, i: int, j: int, lam: float, gradient: Tensor) -> tuple[float, float]:
    """Inner product and norm of one mixture."""
    one, other = ((s.features[k : k + 1], s.logits[k : k + 1], s.y[k : k + 1]) for s, k in ((samples, i), (samples, j)))
    found = mixed_alignment(Side(*one), Side(*other), gradient, lam, backend="reference")
    return float(found.inner), float(found.norm)


def expected(samples: HeadSamples, classes: list[int], gradient: Tensor) -> list[Tensor]:
    """The table as the module's docstring defines it, mixture by mixture: inner products and norms."""
    labels = samples.y.argmax(1) if samples.y.ndim == 2 else samples.y
    members = {c: (labels == c).nonzero()[:, 0].tolist() for c in classes}
    halves = {c: (found[::2], found[1::2] or found[::2]) for c, found in members.items()}
    tables = [torch.zeros(len(TABLE_LAMS), len(classes), len(classes), dtype=torch.float64) for _ in "ab"]
    for k, lam in enumerate(TABLE_LAMS):
        for a, first in enumerate(classes):
            for b, second in enumerate(classes):
                if lam in (0, 1):
                    pairs = [(i, i) for i in members[first if lam else second]]
                elif lam <= 0.5:
                    pairs = [(i, j) for i in halves[first][0] for j in halves[second][1]]
                else:
                    pairs = [(i, j) for i in halves[first][1] for j in halves[second][0]]
                values = torch.tensor([score(samples, i, j, lam, gradient) for i, j in pairs], dtype=torch.float64)
                for table, mean in zip(tables, values.mean(0), strict=True):
                    table[k, a, b] = mean
    return tables


LABELS = {
    "as many of each": [0, 1, 2, 3] * 4,
    "numbers that differ": [2, 0, 0, 5, 0, 2, 2, 2, 0, 5, 0],
    "single samples": [4, 1, 1, 3, 0],
    "one class": [3, 3, 3],
}


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "vectors"])
@pytest.mark.parametrize("case", LABELS)
def test_a_sampled_table_is_the_mean_over_pairs_of_the_halves(case: str, soft: bool) -> None:
    samples, gradient = samples_of(LABELS[case], soft=soft), gradient_of()
    table = table_of(samples, gradient)
    assert table.classes.tolist() == sorted(set(LABELS[case])) and table.lams == TABLE_LAMS
    inner, norm = expected(samples, table.classes.tolist(), gradient)
    torch.testing.assert_close(table.inner, inner)
    torch.testing.assert_close(table.norm, norm)


def test_of_many_samples_each_class_gives_its_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_table, "HALF", 7)  # of three classes, two in a half
    samples, gradient = samples_of([0, 1, 2] * 5), gradient_of()
    table = table_of(samples, gradient)
    inner, _ = expected(samples.take(torch.arange(12)), [0, 1, 2], gradient)
    torch.testing.assert_close(table.inner, inner)
    fewer = table_of(samples, gradient, per_class=2)
    torch.testing.assert_close(fewer.inner, expected(samples.take(torch.arange(6)), [0, 1, 2], gradient)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_a_class_that_comes_later_adds_its_row_and_column(bias: bool) -> None:
    gradient = gradient_of(bias)
    before = table_of(samples_of([1, 4, 1, 4, 4, 1], bias=bias), gradient)
    late = samples_of([2, 4, 0, 2, 2, 1, 0], seed=1, bias=bias)
    table = sampled_table.add_classes(before, late, gradient, "reference")
    assert table.classes.tolist() == [0, 1, 2, 4] and table.samples is not None
    known = torch.tensor([1, 3])
    for name in ("inner", "norm"):
        assert torch.equal(getattr(table, name)[:, known[:, None], known], getattr(before, name)), (
            "nothing else changes"
        )
    for name, value in zip(("inner", "norm"), expected(table.samples, [0, 1, 2, 4], gradient), strict=True):
        torch.testing.assert_close(getattr(table, name), value)
    assert sorted(table.samples.y.tolist()) == [0, 0, 1, 1, 1, 2, 2, 2, 4, 4, 4], "known classes need no more samples"
    assert sampled_table.add_classes(table, late, gradient, "reference") is table


@pytest.mark.parametrize("classes", [20, 100, 600])
def test_the_pairs_scored_are_bounded(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    scored: list[int] = []

    def count(*arguments: Any) -> Any:
        scored.append(len(arguments[0]) * len(arguments[3]) * len(arguments[7]))
        return operator(*arguments)

    operator = sampled_table.mixed_alignment_op
    monkeypatch.setattr(sampled_table, "mixed_alignment_op", count)
    g, y = generator(), torch.arange(classes).repeat(32)
    samples = HeadSamples(None, y, torch.randn(len(y), 3, generator=g), torch.randn(len(y), classes, generator=g))
    gradient = torch.randn(classes, 4, generator=g)
    table = sampled_table.make_sampled_table(samples, gradient, gradient.norm(), 32, "auto")
    assert sum(scored) <= 2 * max(sampled_table.HALF, classes) ** 2 + 2 * max(sampled_table.HALF, classes)
    assert not table.inner.isnan().any()
    scored.clear()
    start = sampled_table.make_sampled_table(samples.take(y > 1), gradient, gradient.norm(), 32, "auto")
    scored.clear()
    sampled_table.add_classes(start, samples.take(y <= 1), gradient, "auto")
    assert sum(scored) <= 4 * 32 * max(sampled_table.HALF, classes) + 2 * max(sampled_table.HALF, classes)


# ------------------------------------------------------------------------------------------------------------- GradMix


class Net(nn.Module):
    """A perceptron of many classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU())
        self.fc = nn.Linear(8, 40)
        self.passes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append(len(x))
        return self.fc(self.body(x))


def batch(labels: list[int], seed: int) -> tuple[Tensor, Tensor]:
    return rows(len(labels), seed)[0], torch.tensor(labels)


def steps(model: Net, **how: Any) -> GradMix:
    """After a first step, with a table of 30 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model.fc.reset_parameters()
    buffer = batch([c for c in range(28) for _ in range(20)], 1)
    mixup = GradMix(model, buffer, criterion="class", refresh="epoch", generator=generator(3), **how)
    mixup(*batch([28, 29, 3, 4], 2))
    return mixup


def test_an_unknown_class_is_added_without_a_pass_over_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    mixup = steps(model)
    assert mixup.table is not None and mixup.table.classes.tolist() == list(range(30)) and mixup.refreshes == 1
    before, reference = mixup.table, mixup.reference
    model.passes.clear()
    monkeypatch.setattr(last_layer, "read_buffer", lambda *_a, **_k: pytest.fail("the buffer is read"))
    mixup(*batch([35, 2, 35, 31], 3))
    assert model.passes == [4] and mixup.refreshes == 1 and mixup.reference is reference
    assert mixup.table.classes.tolist() == [*range(30), 31, 35]
    assert torch.equal(mixup.table.inner[:, :30, :30], before.inner)
    model.passes.clear()
    mixup(*batch([35, 31, 35, 0], 4))
    assert model.passes == [], "what is known needs no pass"
    candidates = mixup.select(*batch([1, 2], 5), candidates=batch([39, 2], 6))
    assert mixup.table.classes.tolist()[-1] == 39 and candidates.classes.tolist()[-1] == 39
    monkeypatch.undo()
    mixup.start_epoch()
    mixup(*batch([1, 2], 7))
    assert mixup.table.classes.tolist() == list(range(28)) and mixup.refreshes == 2


def test_marked_samples_serve_a_table_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature, "TABLE_SAMPLES", 3)
    mixup = GradMix(Net(), None, criterion="class", refresh="epoch", generator=generator(3))
    for seed, labels in enumerate(([0, 1, 2, 3], [4, 1, 2, 9], [0, 0, 1, 2])):
        mixup(*batch(labels, seed), replayed=torch.tensor([True, False, True, False]))
    assert mixup.table is not None and mixup.table.classes.tolist() == [0, 1, 2, 3, 4, 9] and mixup.refreshes == 1


def test_a_table_that_grows_is_saved_and_goes_on_to_the_bit() -> None:
    first = steps(Net())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = steps(Net())
    second._model.load_state_dict(first._model.state_dict())
    second.start_epoch()
    second.load_state_dict(torch.load(file, weights_only=True))
    for seed, labels in enumerate(([33, 2, 33, 31], [39, 30, 1, 33])):
        one, two = first.select(*batch(labels, seed)), second.select(*batch(labels, seed))
        assert torch.equal(one.partner, two.partner) and torch.equal(one.lam, two.lam)
    assert first.table is not None and second.table is not None
    assert torch.equal(first.table.inner, second.table.inner)
    assert "samples" not in GradMix(Net(), None).state_dict()


def test_what_a_deferred_check_finds_is_kept_in_the_state() -> None:
    """On a GPU an unknown class is known after the call; a run that stops there adds it as the undisturbed one does."""
    mixup = steps(Net())
    mixup._require_classes()
    state = mixup.state_dict()
    other = steps(Net())
    other.load_state_dict(state)
    other(*batch([34, 1], 8))
    assert other.table is not None and other.table.classes.tolist()[-1] == 34 and other.refreshes == 1
    assert "incomplete" not in other.state_dict()


def test_small_tables_are_of_all_pairs_and_made_anew() -> None:
    x, y = rows(60, 1)
    mixup = GradMix(Net(), (x, y), criterion="class", refresh="epoch")
    mixup(x[:4], y[:4])
    assert mixup.table is not None and mixup.table.samples is None
    mixup(x[:4], torch.tensor([30, 1, 2, 3]))
    assert mixup.refreshes == 2 and 30 in mixup.table.classes


def test_other_estimators_refuse_to_extend_a_table() -> None:
    mixup = GradMix(Net(), None, criterion="class", estimator="mixed")
    with pytest.raises(NotImplementedError, match="Mixed makes tables anew"):
        mixup._estimator.extend_table(None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_quota_admits_the_first_of_each_class(limit: int) -> None:
    quota, counts = ClassQuota(limit), [0] * 4
    for size in (5, 0, 9, 7):
        labels = torch.randint(4, (size,), generator=generator(size))
        admitted = []
        for index, label in enumerate(labels.tolist()):
            counts[label] += 1
            if counts[label] <= limit:
                admitted.append(index)
        found = quota.admit(labels)
        assert found.dtype == torch.int64 and found.tolist() == admitted
