"""The controls that a selection is held against: what they keep of it, and what they replace."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import gradmix
from gradmix.estimators.feature import feature_scores
from gradmix.model.forward import forward_all
from gradmix.pairs import Pairs
from gradmix.training.config import DataConfig, MixConfig, OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.loop.trainer import train_one
from gradmix.training.methods import METHODS, Context, StepSamples, selective
from gradmix.training.methods.controls import apply_control
from gradmix.training.streams.benchmarks import make_stream, resolve

CONTROLS = (
    "random",
    "random-partner",
    "partner-class",
    "replayed-partner",
    "learnt",
    "anti",
    "small-gradient",
    "large-gradient",
)
BUFFER_CLASSES = torch.tensor([0, 2, 2])


def problem(rows: int = 23, candidates: int | None = None, **options: object) -> tuple[nn.Module, Pairs]:
    """A model, and pairs selected for it of which some are detrimental."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw(*parameter.shape))
    buffer = draw(12, 5), torch.arange(12) % 4
    batch = draw(rows, 5), torch.randint(4, (rows,), generator=generator)
    other = None if candidates is None else (draw(candidates, 5), torch.randint(4, (candidates,), generator=generator))
    pairs = gradmix.select_pairs(
        model, buffer, batch, candidates=other, lam=0.3, generator=torch.Generator().manual_seed(1), **options
    )
    return model, pairs


def control(name: str, model: nn.Module, pairs: Pairs, seed: int = 0, **mix: object) -> Pairs:
    return apply_control(
        pairs, model, MixConfig(control=name, **mix), torch.Generator().manual_seed(seed), BUFFER_CLASSES
    )


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("candidates", [None, 1, 40])
def test_rows_without_a_partner_stay_whole(name: str, criterion: str, candidates: int | None) -> None:
    model, pairs = problem(criterion=criterion, candidates=candidates)
    found = control(name, model, pairs)
    if pairs.helpful.any():  # otherwise there is no weight to keep
        assert torch.equal(found.lam[found.helpful], torch.full_like(found.lam[found.helpful], 0.3))
    assert (found.lam[~found.helpful] == 1).all()
    if candidates is None:
        assert (found.partner[found.helpful] != torch.arange(len(found))[found.helpful]).all()
    else:
        assert ((found.partner >= 0) & (found.partner < candidates)).all()
    x, y = found.mix()
    assert torch.equal(x[~found.helpful], pairs.batch.x[~found.helpful])
    torch.testing.assert_close(y.sum(1), torch.ones(len(pairs)))


@pytest.mark.parametrize("candidates", [None, 40])
def test_what_is_not_learnt_stays_as_it_is(candidates: int | None) -> None:
    model, pairs = problem(candidates=candidates)
    found = control("learnt", model, pairs)
    right = model(pairs.batch.x).argmax(1) == pairs.batch.y
    assert 0 < int((right & pairs.helpful).sum()) < int(pairs.helpful.sum())
    assert torch.equal(found.helpful, right & pairs.helpful)
    assert torch.equal(found.partner[found.helpful], pairs.partner[found.helpful])


def test_random_mixes_as_many_rows_but_others() -> None:
    model, pairs = problem(candidates=3, criterion="sample", threshold=0.6)
    count = int(pairs.helpful.sum())
    assert 0 < count < len(pairs)
    runs = [control("random", model, pairs, seed) for seed in range(200)]
    assert all(int(run.helpful.sum()) == count for run in runs)
    often = torch.stack([run.helpful for run in runs]).double().mean(0)
    # Every row as often as any other: five standard errors of a share around count / N.
    share = count / len(pairs)
    assert ((often - share).abs() < 5 * (share * (1 - share) / 200) ** 0.5).all()
    partners = torch.stack([run.partner[run.helpful] for run in runs]).flatten().bincount(minlength=3).double()
    drawn = partners.sum()
    # Any partner, detrimental ones among them.
    assert ((partners - drawn / 3).abs() < 5 * (drawn * 2 / 9) ** 0.5).all()


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.5, 12), (0.91, 21), (1.0, 23)])
def test_random_at_a_given_rate(rate: float, count: int) -> None:
    model, pairs = problem(criterion="sample")
    assert int(control("random", model, pairs, control_rate=rate).helpful.sum()) == count


@pytest.mark.parametrize("name", ["none", *CONTROLS[1:]])
def test_a_rate_without_a_control_that_heeds_it_is_refused(name: str) -> None:
    config = TrainConfig(mix=MixConfig(control=name, control_rate=0.9))
    with pytest.raises(ValueError, match=f"mix.control_rate: got 0.9 .* with mix.control '{name}', expected nothing"):
        resolve(config)
    resolve(replace(config, mix=MixConfig(control="random", control_rate=0.9)))


def test_random_partner_keeps_the_rows_and_changes_the_partners() -> None:
    model, pairs = problem(candidates=3, criterion="sample", threshold=0.6)
    runs = [control("random-partner", model, pairs, seed) for seed in range(100)]
    assert 0 < pairs.helpful.sum() < len(pairs)
    assert all(torch.equal(run.helpful, pairs.helpful) for run in runs)
    helpful, _ = pairs.by_pair(0.6)
    row = torch.arange(len(pairs))
    kept = torch.stack([helpful[row, run.partner] for run in runs])[:, pairs.helpful].double().mean()
    expected = helpful[pairs.helpful].double().mean()
    assert abs(kept - expected) < 0.05 and kept < 0.95


@pytest.mark.parametrize("candidates", [None, 40])
def test_partners_of_the_same_classes_or_of_the_buffers(candidates: int | None) -> None:
    model, pairs = problem(criterion="sample", threshold=0.7, candidates=candidates)
    labels = pairs.candidates.y
    rows = pairs.helpful
    assert 0 < rows.sum() < len(pairs)
    wanted = {
        "partner-class": labels[pairs.partner].unsqueeze(1) == labels,
        "replayed-partner": ((labels == 0) | (labels == 2)).expand(len(pairs), -1),
    }
    for name, fitting in wanted.items():
        fitting = fitting.clone() if candidates else fitting.clone().fill_diagonal_(False)
        runs = [control(name, model, pairs, seed) for seed in range(150)]
        assert all(torch.equal(run.helpful, rows) for run in runs)
        assert all(torch.equal(run.lam, pairs.lam) for run in runs)
        often = torch.stack([torch.eye(len(labels))[run.partner] for run in runs]).mean(0)[rows]
        assert (often[~fitting[rows]] == 0).all()
        # Each as often as any other: five standard errors.
        share = 1 / fitting[rows].sum(1, keepdim=True).expand_as(often)[fitting[rows]].double()
        assert ((often[fitting[rows]] - share).abs() <= 5 * (share * (1 - share) / 150) ** 0.5).all()


def test_replayed_partners_need_the_buffers_labels() -> None:
    model, pairs = problem(criterion="sample")
    with pytest.raises(ValueError, match="replayed: got None, expected the labels"):
        apply_control(pairs, model, MixConfig(control="replayed-partner"), torch.Generator())


@pytest.mark.parametrize("criterion", ["sample", "class"])
def test_anti_takes_detrimental_partners_alone(criterion: str) -> None:
    model, pairs = problem(criterion=criterion)
    found = control("anti", model, pairs)
    helpful, cosine = pairs.by_pair()
    row = torch.arange(len(pairs))
    assert (cosine[row, found.partner][found.helpful] < 0).all() and found.helpful.any()
    off = ~torch.eye(len(pairs), dtype=torch.bool)
    assert torch.equal(found.helpful, (~helpful & off).any(1))


def test_a_class_that_was_not_judged_is_neither_helpful_nor_detrimental() -> None:
    """As where a table on a GPU meets a class that it does not know."""
    model, pairs = problem(criterion="class")
    table, y = pairs._alignment, pairs.batch.y
    known = replace(table, inner=table.inner[:3, :3], cosine=table.cosine[:3, :3], classes=table.classes[:3])
    helpful, cosine = replace(pairs, _alignment=known).by_pair()
    whole_helpful, whole_cosine = pairs.by_pair()
    judged = (y < 3)[:, None] & (y < 3)
    assert not judged.all()
    assert torch.equal(helpful, whole_helpful & judged)
    assert torch.equal(cosine[judged], whole_cosine[judged]) and cosine[~judged].isnan().all()
    found = control("anti", model, replace(pairs, _alignment=known))
    assert found.helpful.any() and (y[found.helpful] < 3).all() and (y[found.partner[found.helpful]] < 3).all()


def norms(model: nn.Module, pairs: Pairs) -> Tensor:
    """(N, N) norms of all mixtures' gradients, each from its own outer product."""
    x, y = pairs.batch.x, pairs.batch.y
    hidden = model[1](model[0](x)).detach().double()
    logits = model[2](hidden.float()).detach().double()
    one_hot = torch.eye(4, dtype=torch.float64)[y]
    found = torch.zeros(len(y), len(y), dtype=torch.float64)
    for i in range(len(y)):
        for j in range(len(y)):
            mixed = [0.3 * v[i] + 0.7 * v[j] for v in (hidden, logits, one_hot)]
            residual = mixed[1].softmax(0) - mixed[2]
            found[i, j] = torch.outer(residual, torch.cat([mixed[0], torch.ones(1, dtype=torch.float64)])).norm()
    return found


@pytest.mark.parametrize("name", ["small-gradient", "large-gradient"])
def test_gradients_are_chosen_by_norm_as_many_pairs_as_were_helpful(name: str) -> None:
    model, pairs = problem(criterion="sample", threshold=0.2)
    helpful, _ = pairs.by_pair(0.2)
    off = ~torch.eye(len(pairs), dtype=torch.bool)
    count = int((helpful & off).sum())
    ordered = norms(model, pairs)[off].sort(descending=name == "large-gradient").values
    bound = ordered[count - 1]
    row = torch.arange(len(pairs))
    seen = set()
    for seed in range(60):
        found = control(name, model, pairs, seed, threshold=0.2)
        chosen = norms(model, pairs)[row, found.partner][found.helpful]
        slack = 1e-5 * bound
        assert (chosen <= bound + slack).all() if name == "small-gradient" else (chosen >= bound - slack).all()
        seen |= {(i, int(j)) for i, j in zip(row[found.helpful].tolist(), found.partner[found.helpful], strict=True)}
    inside = (norms(model, pairs) <= bound) if name == "small-gradient" else (norms(model, pairs) >= bound)
    assert len(seen) > 0.6 * int((inside & off).sum())  # drawn from all of them, not the extreme ones alone


def test_the_norm_does_not_depend_on_the_reference() -> None:
    model, pairs = problem(criterion="sample")
    rows = forward_all(model, model[2], "batch", pairs.batch, 64)
    zero, other = (feature_scores(rows, rows, scale * torch.ones(4, 9), 0.3).norm for scale in (0.0, 5.0))
    assert torch.equal(zero, other)


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("method", ["gradmix-class", "gradmix-sample"])
def test_a_run_under_control(name: str, method: str) -> None:
    stream = make_stream("split-digits", tasks=2, samples_per_class=40)
    config = TrainConfig(
        optim=OptimConfig(epochs=1),
        replay=ReplayConfig(size=8, stream="dual"),
        mix=MixConfig(control=name),
        threads=1,
    )
    config = replace(config, data=replace(config.data, tasks=2, samples_per_class=40))
    first, second = (train_one(config, method, 0, stream=stream) for _ in range(2))
    assert first.status == "complete" and (first.accuracy == second.accuracy).all()
    plain = train_one(replace(config, mix=MixConfig()), method, 0, stream=stream)
    # Before there is a buffer nothing is selected, so a control has nothing to replace.
    assert first.accuracy[0, 0] == plain.accuracy[0, 0] and first.mixed_share[0] == plain.mixed_share[0]
    assert first.mixed_share[1] <= 1


@pytest.mark.parametrize("method", ["gradmix-class", "gradmix-sample"])
@pytest.mark.parametrize("reference", [None, "replayed"])
def test_a_control_takes_the_place_of_every_selection(
    reference: Literal["replayed"] | None, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def count(pairs: Pairs, *_args: object) -> Pairs:
        calls.append(len(pairs))
        return pairs

    monkeypatch.setattr(selective, "apply_control", count)
    config = TrainConfig(
        data=DataConfig(tasks=2, samples_per_class=40),
        optim=OptimConfig(epochs=1),
        replay=ReplayConfig(size=8, stream="dual"),
        mix=MixConfig(control="random", reference=reference),
        threads=1,
    )
    result = train_one(config, method, 0, stream=make_stream("split-digits", tasks=2, samples_per_class=40))
    # In the first task's steps there is nothing to select by.
    assert 0 < len(calls) == result.timing.steps // 2


def test_a_control_leaves_the_model_alone() -> None:
    model, pairs = problem(criterion="sample")
    before = [p.clone() for p in model.parameters()]
    control("small-gradient", model, pairs)
    assert model.training and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_an_unhelpful_step_still_has_a_weight_for_its_control() -> None:
    """Where GradMix mixes nothing at all, anti-selection still mixes, with a weight drawn anew."""
    model, pairs = problem(criterion="sample", threshold=1.0)
    assert not pairs.helpful.any()
    found = control("anti", model, pairs, threshold=1.0)
    assert found.helpful.all() and ((found.lam > 0) & (found.lam < 1)).all() and len(found.lam.unique()) == 1


def test_methods_know_their_mixed_samples() -> None:
    model, _ = problem()
    buffer = gradmix.ReplayBuffer(3)
    buffer.add(torch.randn(12, 5), torch.arange(12) % 4)
    from gradmix.training.loop.clock import Clock

    context = Context(
        model,
        buffer,
        4,
        MixConfig(control="random", control_rate=0.5),
        torch.Generator().manual_seed(0),
        Clock(torch.device("cpu")),
    )
    method = METHODS["gradmix-sample"](context)
    assert method.mixed_samples() is None
    method.loss(StepSamples(torch.randn(10, 5), torch.arange(10) % 4, torch.full((10,), 0.1))).backward()
    assert int(method.mixed_samples()) == 5
