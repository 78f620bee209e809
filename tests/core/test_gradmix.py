"""GradMix: what it keeps between steps, and when it computes it anew."""

import io
from typing import Any

import pytest
import torch
from models import CLASSES, MLP, ConvNet, rows
from torch import Tensor, nn

import gradmix
from gradmix import GradMix, ReplayBuffer
from gradmix.criteria import class_index
from gradmix.estimators import feature, mixed
from gradmix.gradients import mean_gradient
from gradmix.labelled_samples import HeadSamples
from gradmix.mixtures import Mixtures


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(n: int = 12, seed: int = 3) -> ReplayBuffer:
    buffer = ReplayBuffer(100)
    buffer.add(*rows(n, seed))
    return buffer


def test_the_call_shape_of_mixup() -> None:
    x, y = GradMix(MLP(), filled())(*rows(6, 1))
    assert x.shape == (6, 3, 8, 8) and y.shape == (6, CLASSES)
    torch.testing.assert_close(y.sum(1), torch.ones(6))


@pytest.mark.parametrize("refresh", [1, 3, "epoch"])
@pytest.mark.parametrize("criterion", ["class", "sample"])
def test_it_refreshes_when_it_says(criterion: str, refresh: object) -> None:
    mixup = GradMix(MLP(), filled(40), criterion=criterion, refresh=refresh)
    counts = []
    for step in range(7):
        mixup(*rows(6, step))
        counts.append(mixup.refreshes)
    assert counts == {1: [1, 2, 3, 4, 5, 6, 7], 3: [1, 1, 1, 2, 2, 2, 3], "epoch": [1] * 7}[refresh]
    mixup.start_epoch()
    assert mixup.refreshes == counts[-1]
    mixup(*rows(6))
    assert mixup.refreshes == counts[-1] + 1


def test_what_is_kept_is_the_reference_gradient() -> None:
    model, buffer = MLP(), filled()
    mixup = GradMix(model, buffer, refresh=2, criterion="class")
    mixup(*rows(6, 1))
    first = mixup.reference
    torch.testing.assert_close(first, gradmix.reference_gradient(model, buffer))
    with torch.no_grad():
        model.fc.weight += 1
    mixup(*rows(6, 1))
    assert mixup.reference is first
    mixup(*rows(6, 1))
    torch.testing.assert_close(mixup.reference, gradmix.reference_gradient(model, buffer))


def test_by_sample_it_selects_as_select_pairs_does() -> None:
    model, buffer, batch = MLP(), filled(), rows(9, 1)
    pairs = GradMix(model, buffer, criterion="sample", generator=generator(5)).select(*batch)
    expected = gradmix.select_pairs(model, buffer, batch, criterion="sample", generator=generator(5))
    assert torch.equal(pairs.partner, expected.partner) and torch.equal(pairs.alignment, expected.alignment)


@pytest.mark.parametrize("estimator", ["feature", "mixed"])
def test_between_refreshes_the_class_criterion_needs_no_forward_pass(estimator: str) -> None:
    model, calls = MLP(), []
    mixup = GradMix(model, filled(40), refresh="epoch", estimator=estimator, criterion="class")
    mixup(*rows(6, 1))
    model.register_forward_hook(lambda *_: calls.append(1))
    mixup(*rows(6, 2))
    assert calls == [] and mixup.refreshes == 1
    lam = mixup.pairs.lam[mixup.pairs.helpful].unique().item()
    torch.testing.assert_close(mixup.pairs.alignment, mixup.table.at(lam).cosine, equal_nan=True)


@pytest.mark.parametrize("kind", [feature.Feature, mixed.Mixed], ids=["feature", "mixed"])
def test_only_mixed_inputs_keep_inputs_alive(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    kept: list[bool] = []

    def spy(self: object, mixtures: Mixtures[HeadSamples], *args: object) -> object:
        kept.append(mixtures.batch.x is not None)
        return class_table(self, mixtures, *args)

    class_table = kind.class_table
    monkeypatch.setattr(kind, "class_table", spy)
    mixup = GradMix(MLP(), filled(40), estimator=kind.name, criterion="class")
    mixup(*rows(6, 1))
    mixup.select(*rows(6, 1), candidates=rows(5, 2))
    assert kept == [kind is mixed.Mixed] * 2


def test_choices_follow_the_kept_table() -> None:
    mixup = GradMix(MLP(), filled(40), criterion="class")
    x, y = rows(30, 1)
    refused = 0
    for lam in (0.1, 0.5, 0.9):
        pairs = mixup.select(x, y, lam=lam)
        table = mixup.table.at(lam)
        i, j = class_index(table.classes, y), class_index(table.classes, y[pairs.partner])
        assert (table.inner[i, j] >= 0)[pairs.helpful].all()
        refused += int((~table.helpful()).sum())
    assert refused


def test_one_table_serves_every_weight() -> None:
    mixup = GradMix(MLP(), filled(40), refresh="epoch", criterion="class")
    x, y = rows(30, 1)
    low, high = (mixup.select(x, y, lam=lam).alignment for lam in (0.05, 0.95))
    assert mixup.refreshes == 1 and not torch.equal(low, high)
    # Weight lam on a and 1 - lam on b is weight 1 - lam on b and lam on a.
    torch.testing.assert_close(low, high.T, equal_nan=True, atol=0.02, rtol=0)


def test_a_class_the_table_does_not_know_has_it_made_anew() -> None:
    x, y = rows(40, 3)
    buffer = ReplayBuffer(100)
    buffer.add(x[y < 2], y[y < 2])
    mixup = GradMix(MLP(), buffer, refresh="epoch", criterion="class")
    mixup(x[:6], y[:6] % 2)
    assert mixup.table.classes.tolist() == [0, 1]
    mixup(x[:6], torch.tensor([0, 1, 4, 4, 0, 1]))
    assert mixup.table.classes.tolist() == [0, 1, 4] and mixup.refreshes == 2
    mixup(x[:6], torch.tensor([0, 4, 4, 4, 0, 1]))
    assert mixup.refreshes == 2


def test_a_buffer_filled_later_is_noticed() -> None:
    buffer = ReplayBuffer(5)
    mixup = GradMix(MLP(), buffer, refresh="epoch", criterion="class")
    mixup(*rows(6, 1))
    assert mixup.reference is None and mixup.table is None
    assert mixup.pairs.helpful.all()
    buffer.add(*rows(20, 2))
    mixup(*rows(6, 1))
    assert mixup.reference is not None and mixup.table is not None


def test_foreign_candidates_join_the_table() -> None:
    mixup = GradMix(MLP(), filled(), criterion="class")
    x, y = rows(6, 1)
    pairs = mixup.select(x, torch.zeros_like(y), candidates=(rows(4, 2)[0], torch.full((4,), 3)))
    assert {0, 3} <= set(mixup.table.classes.tolist())
    assert len(pairs.mix()[0]) == 6


def test_outputs_given_save_the_forward_pass_of_the_batch() -> None:
    model, batch = MLP().eval(), rows(6, 1)
    with gradmix.HeadCapture(model, example=batch[0]) as capture:
        model(batch[0])
    sizes: list[int] = []
    model.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    for criterion in ("class", "sample"):
        sizes.clear()
        mixup = GradMix(model, filled(12), criterion=criterion)
        mixup.select(*batch, outputs=capture.output)
        assert sizes == [12]  # the buffer's, nothing else


@pytest.mark.parametrize("criterion", ["class", "sample"])
def test_state_survives_saving_and_goes_on_identically(criterion: str) -> None:
    model, buffer = ConvNet(), filled(30)

    def make() -> GradMix:
        return GradMix(model, buffer, criterion=criterion, refresh=4, generator=generator(3))

    def outcome(mixup: GradMix, seed: int) -> list[Tensor]:
        return list(mixup(*rows(8, seed)))

    first = make()
    for seed in range(2):
        outcome(first, seed)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make()
    second.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(2, 8):
        expected, result = outcome(first, seed), outcome(second, seed)
        assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
    assert first.refreshes == second.refreshes


def test_a_fresh_state_can_be_saved_too() -> None:
    mixup = GradMix(MLP(), filled(), criterion="class")
    other = GradMix(MLP(), filled(), criterion="class")
    other.load_state_dict(mixup.state_dict())
    assert other.reference is None and other.table is None


def test_a_wrong_state_changes_nothing() -> None:
    mixup = GradMix(MLP(), filled(), criterion="class")
    mixup(*rows(6, 1))
    reference = mixup.reference
    with pytest.raises(ValueError, match=r"state: got the keys \['age'\], expected \['age', 'generator'"):
        mixup.load_state_dict({"age": 1})
    assert mixup.reference is reference


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"refresh": 0}, ValueError, "refresh: got 0, expected an integer >= 1 or 'epoch'$"),
        ({"refresh": "task"}, TypeError, "refresh: got 'task', expected an integer >= 1 or 'epoch'$"),
        ({"class_samples": 0}, ValueError, "class_samples: got 0"),
        ({"criterion": "pair"}, ValueError, "criterion: got 'pair'"),
        ({"alpha": -1.0}, ValueError, r"alpha: got -1\.0"),
    ],
)
def test_bad_settings_are_named_at_once(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradMix(MLP(), filled(), **change)


def test_bad_rows_are_named_at_the_call() -> None:
    mixup = GradMix(MLP(), filled(40), refresh="epoch", criterion="class")
    mixup(*rows(6, 1))
    x, y = rows(4, 2)
    x[1] = float("nan")
    with pytest.raises(ValueError, match="batch: sample 1 holds NaN"):
        mixup(x, y)
    with pytest.raises(ValueError, match="batch labels: row 0 is 9"):
        mixup(rows(2)[0], torch.tensor([9, 0]))
    with pytest.raises(ValueError, match=r"lam: got 3\.0"):
        mixup.select(*rows(2), lam=3.0)


# --------------------------------------------------------------------------------------------------- models that change


class Growing(nn.Module):
    """A classifier of two classes at first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Linear(12, 16), nn.ReLU()), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


def head_replaced(model: Growing) -> None:
    model.fc = nn.Linear(16, 4)


def head_enlarged(model: Growing) -> None:
    head, new = model.fc, nn.Linear(16, 4)
    head.weight, head.bias, head.out_features = new.weight, new.bias, 4


def features_enlarged(model: Growing) -> None:
    model.body, model.fc = nn.Sequential(nn.Linear(12, 20), nn.ReLU()), nn.Linear(20, 4)


def bias_dropped(model: Growing) -> None:
    model.fc = nn.Linear(16, 4, bias=False)


CHANGES = [head_replaced, head_enlarged, features_enlarged, bias_dropped]
ESTIMATORS = ["feature", "mixed", "jvp", "sketch"]


def vectors(n: int, seed: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 12, generator=generator(seed)), torch.arange(n) % classes


def assert_made_anew(mixup: GradMix, model: nn.Module, buffer: tuple[Tensor, Tensor], refreshes: int) -> None:
    assert mixup.refreshes == refreshes
    if isinstance(mixup.reference, Tensor):
        torch.testing.assert_close(mixup.reference, gradmix.reference_gradient(model, buffer))
    else:
        expected = mean_gradient(model, buffer)
        assert mixup.reference is not None and mixup.reference.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(mixup.reference[name], gradient)


@pytest.mark.parametrize(("loaded", "refresh"), [(False, 5), (False, "epoch"), (True, "epoch")])
@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_of_another_model_is_made_anew(
    change: Any, estimator: str, criterion: str, refresh: Any, loaded: bool
) -> None:
    model, buffer = Growing(), vectors(8, 1, 2)
    how: dict[str, Any] = {"estimator": estimator, "criterion": criterion, "refresh": refresh}
    mixup = GradMix(model, lambda: buffer, generator=generator(), **how)
    for seed in range(2):
        mixup(*vectors(6, seed, 2))
    assert mixup.refreshes == 1
    change(model)
    if loaded:
        state = mixup.state_dict()
        mixup = GradMix(model, lambda: buffer, generator=generator(), **how)
        mixup.load_state_dict(state)
    for seed in range(2):
        _, labels = mixup(*vectors(6, seed, 2))  # of the old classes
    assert labels.shape == (6, 4)
    assert_made_anew(mixup, model, buffer, 2)
    buffer = vectors(8, 1, 4)
    mixup(*vectors(6, 3, 4))


@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("estimator", ["jvp", "sketch"])
def test_over_all_parameters_those_that_are_frozen_count(estimator: str, criterion: str) -> None:
    model, buffer = Growing(), vectors(8, 1, 2)
    mixup = GradMix(model, buffer, estimator=estimator, criterion=criterion, refresh="epoch", generator=generator())
    mixup(*vectors(6, 1, 2))
    for refreshes, learns in ((2, False), (3, True)):
        model.body.requires_grad_(learns)
        for seed in range(2):
            mixup(*vectors(6, seed, 2))
        assert_made_anew(mixup, model, buffer, refreshes)
    model.scale = nn.Parameter(torch.ones(()))
    mixup(*vectors(6, 1, 2))
    assert mixup.refreshes == 4


@pytest.mark.parametrize("criterion", ["sample", "class"])
def test_a_state_from_before_shapes_were_kept_is_read(criterion: str) -> None:
    model, buffer = Growing(), vectors(8, 1, 2)
    mixup, other = (GradMix(model, buffer, criterion=criterion, refresh="epoch", generator=generator()) for _ in "ab")
    mixup(*vectors(6, 1, 2))
    state = mixup.state_dict()
    del state["shapes"]
    other.load_state_dict(state)
    for expected, value in zip(mixup(*vectors(6, 2, 2)), other(*vectors(6, 2, 2)), strict=True):
        assert torch.equal(expected, value)
    assert other.refreshes == 1


# -------------------------------------------------------------------------------------------------------- mixing or not


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("soft", [False, True])
def test_a_training_loop_switches_mixing_off(estimator: str, soft: bool) -> None:
    model, (x, y) = MLP(), rows(6, 1)
    hot = torch.nn.functional.one_hot(y, CLASSES).float()
    mixup = GradMix(model, filled(), estimator=estimator, generator=generator())
    state = generator().get_state()
    mixup.mixup_enabled = False
    own, labels = mixup(x, hot * 0.9 + 0.1 / CLASSES if soft else y)
    assert own is x
    torch.testing.assert_close(labels, hot * 0.9 + 0.1 / CLASSES if soft else hot)
    assert torch.equal(mixup.state_dict()["generator"], state) and mixup.pairs is None
    with pytest.raises(ValueError, match="batch labels: row 0 is 9"):
        mixup(x, torch.tensor([9, 0, 0, 0, 0, 0]))
    mixup.mixup_enabled = True
    assert not torch.equal(mixup(x, y)[1], hot)
    assert mixup.pairs is not None


def test_token_ids_pass_where_nothing_is_mixed() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, CLASSES))
    x, y = torch.arange(12).view(4, 3) % 9, torch.arange(4)
    mixup = GradMix(model, (x, y))
    mixup.mixup_enabled = False
    own, labels = mixup(x, y)
    assert own is x and labels.shape == (4, CLASSES)
