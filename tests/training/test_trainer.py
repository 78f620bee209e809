"""Training end to end on real digits, and the parts of the trainer one by one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fresh import run_python
from thinning import part
from torch import nn

from gradmix.replay.buffer import ReplayBuffer
from gradmix.training.config import DataConfig, MixConfig, OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.data.samples import TensorSamples
from gradmix.training.loop import run
from gradmix.training.loop.clock import Clock
from gradmix.training.loop.environment import pick_device, pick_threads
from gradmix.training.loop.evaluation import evaluate
from gradmix.training.loop.optimiser import make_optimiser, make_schedule
from gradmix.training.loop.trainer import Progress, train_one
from gradmix.training.methods import METHODS, Context, Method, Needs, StepSamples, weighted_cross_entropy
from gradmix.training.models import build_model
from gradmix.training.runs.metrics import average_accuracy
from gradmix.training.runs.results import RunResult
from gradmix.training.streams.benchmarks import make_stream, resolve

SHORT = TrainConfig(optim=OptimConfig(epochs=2, lr=0.05), replay=ReplayConfig(size=8, stream="dual"), threads=1)


@pytest.fixture(scope="module")
def stream():
    return make_stream("split-digits")


@pytest.fixture(scope="module")
def results(stream):
    """A short run of a method, made when a test first asks for it."""
    return cache(lambda method: train_one(SHORT, method, 0, stream=stream))


@pytest.mark.parametrize("method", part(METHODS, 3))  # all of them learn in test_methods, and go on in test_resume
def test_a_run_is_complete(results, method: str) -> None:
    result = results(method)
    assert result.status == "complete"
    assert result.accuracy.shape == (5, 5) and np.isfinite(result.accuracy).all()
    assert ((result.accuracy >= 0) & (result.accuracy <= 1)).all()
    assert result.accuracy[0, 0] > 0.9  # two classes, nothing to forget yet
    assert (result.accuracy[0, 1:] == 0).all()  # classes never seen are never predicted right
    timing = result.timing
    assert timing.steps == sum(2 * -(-len(task.train.y) // 16) for task in make_stream("split-digits").tasks)
    assert 0 < timing.seconds_step < timing.seconds_total
    # The first step is left out, and the first one that selects.
    assert timing.steady.steps == timing.steps - (1 + (result.timing.seconds_selection > 0))
    assert 0 < timing.step_ms < timing.seconds_step * 1000
    assert result.config.methods == (method,) and result.config.seeds == (0,)
    assert result.environment["torch"] == torch.__version__


@pytest.mark.parametrize("method", ["gradmix-class", "gradmix-sample"])
def test_selection_is_recorded(results, method: str) -> None:
    result = results(method)
    assert 0 < result.timing.selection_share < 1
    assert result.mixed_share[0] > 0.99  # task 1 is plain Mixup
    assert all(0 < share <= 1 for share in result.mixed_share)
    assert min(result.mixed_share) < 0.99
    assert [record.task for record in result.alignments] == [1, 2, 3, 4]
    assert result.alignments[-1].classes.tolist() == list(range(10))
    assert result.config.mix.estimator is not None and result.config.mix.refresh is not None


@pytest.mark.parametrize("method", ["finetune", "er", "mixup"])
def test_nothing_is_recorded_where_nothing_is_selected(results, method: str) -> None:
    result = results(method)
    assert result.timing.seconds_selection == 0 and result.alignments == ()
    assert all(np.isnan(share) for share in result.mixed_share)


def test_replay_keeps_what_finetuning_forgets(results) -> None:
    assert average_accuracy(results("er").accuracy) > average_accuracy(results("finetune").accuracy) + 0.2
    assert results("finetune").accuracy[-1, 0] < 0.1


@pytest.mark.parametrize("method", part(METHODS, 3))
def test_the_same_seed_gives_the_same_run_whatever_the_global_state(results, stream, method: str) -> None:
    # Two tasks tell: in the second the buffer is drawn from.
    torch.manual_seed(99)
    again = train_one(SHORT, method, 0, stream=replace(stream, tasks=stream.tasks[:2]))
    assert np.array_equal(again.accuracy, results(method).accuracy[:2, :2])


def test_another_seed_gives_another_run(results, stream) -> None:
    assert not np.array_equal(train_one(SHORT, "er", 1, stream=stream).accuracy, results("er").accuracy)


def test_a_run_leaves_random_state_and_threads_alone(stream) -> None:
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train_one(replace(SHORT, optim=OptimConfig(epochs=1)), "gradmix-class", 0, stream=stream)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_a_perceptron_takes_one_thread_unless_told_otherwise(stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        short = replace(SHORT, optim=OptimConfig(epochs=1), threads=None)
        stream = replace(stream, tasks=stream.tasks[:1])
        assert train_one(short, "er", 0, stream=stream).environment["threads"] == 1
        assert train_one(replace(short, threads=2), "er", 0, stream=stream).environment["threads"] == 2
        assert torch.get_num_threads() == 2
        large = replace(short, optim=OptimConfig(model="resnet8"))
        assert pick_threads(large, torch.device("cpu")) is None
        small = replace(short, optim=OptimConfig(model="mlp"))
        assert [pick_threads(small, torch.device(name)) for name in ("cpu", "cuda")] == [1, None]
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert pick_threads(small, torch.device("cpu")) is None
    finally:
        torch.set_num_threads(before)


class Spy(Method):
    """Notes the rows of every step and learns nothing."""

    seen: list[StepSamples]

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.parameter = next(context.model.parameters())

    def losses(self, rows: StepSamples) -> Iterator[torch.Tensor]:
        type(self).seen.append(rows)
        yield 0 * self.parameter.sum()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch):
    Spy.seen = []
    monkeypatch.setitem(METHODS, "er", Spy)
    return Spy


def test_a_step_holds_current_rows_then_replayed_ones(spy, stream) -> None:
    config = replace(SHORT, optim=OptimConfig(epochs=1), replay=replace(SHORT.replay, batch=7, size=4, tau=3.0))
    train_one(config, "er", 0, stream=stream)
    steps = [-(-len(task.train.y) // 16) for task in stream.tasks]
    first, second = spy.seen[: steps[0]], spy.seen[steps[0] : steps[0] + steps[1]]
    assert all(len(rows.y) <= 16 and set(rows.y.tolist()) <= {0, 1} for rows in first)
    assert torch.cat([rows.y for rows in first]).bincount().tolist() == stream.tasks[0].train.y.bincount().tolist()
    for rows in second:
        current = len(rows.y) - 7
        assert set(rows.y[:current].tolist()) <= {2, 3} and set(rows.y[current:].tolist()) <= {0, 1}
        torch.testing.assert_close(rows.weight[:current], torch.full((current,), 1 / current))
        torch.testing.assert_close(rows.weight[current:], torch.full((7,), 3 / 7))


def test_methods_of_one_seed_see_the_same_rows(spy, stream, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SHORT, optim=OptimConfig(epochs=1))
    train_one(config, "er", 3, stream=stream)
    first, spy.seen = spy.seen, []
    monkeypatch.setitem(METHODS, "mixup", Spy)
    train_one(config, "mixup", 3, stream=stream)
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(first, spy.seen, strict=True))


def test_balanced_candidates_are_drawn_from_all_classes_seen(spy, stream) -> None:
    config = replace(SHORT, optim=OptimConfig(epochs=1), mix=MixConfig(candidates="balanced"))
    train_one(config, "er", 0, stream=stream)
    assert all(rows.candidates is not None and len(rows.candidates[1]) == len(rows.y) for rows in spy.seen)
    last = torch.cat([rows.candidates[1] for rows in spy.seen[-18:]])
    counts = last.bincount(minlength=10).float()
    expected = len(last) / 10
    assert ((counts - expected).abs() < 5 * expected**0.5).all()
    x, y = spy.seen[-1].candidates
    known = torch.cat([task.train.x for task in stream.tasks]), torch.cat([task.train.y for task in stream.tasks])
    for row, label in zip(x, y, strict=True):  # each candidate is a real row of its class
        assert (known[0][known[1] == label] == row).flatten(1).all(1).any()


@pytest.mark.parametrize("stream_kind", ["dual", "shuffled"])
def test_candidates_leave_the_step_as_it_was(spy, stream, stream_kind: str) -> None:
    """They are drawn and augmented apart, so that methods with and without them learn from the same rows."""
    optim, replay = OptimConfig(epochs=1, augment="crop-flip"), ReplayConfig(size=8, stream=stream_kind)
    config = replace(SHORT, optim=optim, replay=replay)
    train_one(config, "er", 3, stream=stream)
    without, spy.seen = spy.seen, []
    train_one(replace(config, mix=MixConfig(candidates="balanced")), "er", 3, stream=stream)
    assert without[0].candidates is None and spy.seen[0].candidates is not None
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(without, spy.seen, strict=True))


@pytest.mark.parametrize("method", ["mixup", "gradmix-class", "gradmix-sample"])
def test_balanced_candidates_train(stream, method: str) -> None:
    config = replace(SHORT, optim=OptimConfig(epochs=1), mix=MixConfig(candidates="balanced"))
    assert train_one(config, method, 0, stream=stream).status == "complete"


@pytest.mark.parametrize("reference", ["auto", "buffer"])
@pytest.mark.parametrize("method", ["mixup", "gradmix-class", "gradmix-sample"])
@pytest.mark.parametrize("originals", [False, True])
def test_forward_passes_of_a_step(
    monkeypatch: pytest.MonkeyPatch, stream, method: str, originals: bool, reference: Literal["auto", "buffer"]
) -> None:
    calls: list[int] = []

    def build(*args: object, **kwargs: object) -> nn.Module:
        model = build_model(*args, **kwargs)
        model.register_forward_hook(lambda _m, inputs, _o: calls.append(len(inputs[0])))
        return model

    monkeypatch.setattr("gradmix.training.loop.run.build_model", build)
    per_step: list[list[int]] = []

    def on_step(_: Progress) -> None:
        per_step.append(list(calls))
        calls.clear()

    config = replace(SHORT, optim=OptimConfig(epochs=1), mix=MixConfig(originals=originals, reference=reference))
    train_one(config, method, 0, stream=stream, on_step=on_step)
    second_task = per_step[len(stream.tasks[0].train.y) // 16 + 2 :][:10]
    held = [2 * 8] if reference == "buffer" else []
    expected = {
        ("mixup", False): [32],
        ("mixup", True): [32, 32],
        ("gradmix-class", False): [32],
        ("gradmix-class", True): [32, 32],
        ("gradmix-sample", False): [*held, 32, 32],  # the buffer if asked for, the rows, the mixed rows
        ("gradmix-sample", True): [32, *held, 32],  # no forward pass of the rows but the one trained on
    }[method, originals]
    assert second_task == [expected] * 10


@pytest.mark.parametrize("when", [1, 25, 60])
def test_an_interrupted_run_keeps_what_it_reached(stream, when: int) -> None:
    def on_step(progress: Progress) -> None:
        if progress.step == when:
            raise KeyboardInterrupt

    result = train_one(replace(SHORT, optim=OptimConfig(epochs=1)), "gradmix-class", 0, stream=stream, on_step=on_step)
    assert result.status == "interrupted" and result.timing.steps == when
    reached = np.isfinite(result.accuracy).all(1).tolist()
    steps = np.cumsum([-(-len(task.train.y) // 16) for task in stream.tasks])
    assert reached == [bool(when > end) for end in steps]
    assert np.isnan(result.accuracy[~np.array(reached)]).all()


def test_progress_counts_to_the_end(stream) -> None:
    seen: list[Progress] = []
    result = train_one(replace(SHORT, optim=OptimConfig(epochs=1)), "er", 4, stream=stream, on_step=seen.append)
    assert [p.step for p in seen] == list(range(1, result.timing.steps + 1))
    last = seen[-1]
    assert last.step == last.steps_total and (last.task, last.tasks, last.epoch, last.epochs) == (5, 5, 1, 1)
    assert (last.method, last.seed) == ("er", 4)
    assert any(p.loss is not None and p.loss > 0 for p in seen)


def test_the_result_config_runs_the_same_again(results, stream) -> None:
    first = results("gradmix-sample")
    again = train_one(first.config, first.config.methods[0], first.config.seeds[0])
    assert np.array_equal(again.accuracy, first.accuracy)


def test_weighted_cross_entropy_is_current_plus_tau_replayed() -> None:
    logits, y = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    weight = torch.cat([torch.full((3,), 1 / 3), torch.full((4,), 2.0 / 4)])
    expected = F.cross_entropy(logits[:3], y[:3]) + 2.0 * F.cross_entropy(logits[3:], y[3:])
    torch.testing.assert_close(weighted_cross_entropy(logits, y, weight), expected)
    torch.testing.assert_close(weighted_cross_entropy(logits, F.one_hot(y, 5).float(), weight), expected)


def method_context(mix: MixConfig, model: nn.Module, classes: int = 4) -> Context:
    clock = Clock(torch.device("cpu"))
    return Context(model, ReplayBuffer(3), classes, mix, torch.Generator().manual_seed(0), clock)


@pytest.mark.parametrize("method", ["mixup", "gradmix-class", "gradmix-sample"])
def test_originals_and_mixed_samples_have_half_the_weight_each(method: str) -> None:
    model, x, y = nn.Linear(3, 4), torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    rows = StepSamples(x, y, torch.full((6,), 1 / 6))
    both = METHODS[method](method_context(MixConfig(originals=True), model)).loss(rows)
    mixed = METHODS[method](method_context(MixConfig(), model)).loss(rows)
    torch.testing.assert_close(both, 0.5 * mixed + 0.5 * F.cross_entropy(model(x), y))


@pytest.mark.parametrize("method", ["mixup", "cutmix", "manifold-mixup", "gradmix-class", "gradmix-sample"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # what torch.compile itself imports
def test_originals_train_through_a_compiled_model(method: str) -> None:
    """Compiled code passes by hooks that are set after its first call: the second step is the one that matters."""
    model = build_model("mlp", (1, 8, 8), 4)
    compiled = torch.compile(model, backend="eager")
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    rows = StepSamples(x, y, torch.full((6,), 1 / 6))
    losses = []
    for network in (model, compiled):
        context = method_context(MixConfig(originals=True), network)
        context.buffer.add(x.flip(0), y)
        steps = METHODS[method](context)
        losses.append(torch.stack([steps.loss(rows).detach() for _ in range(3)]))
    torch.testing.assert_close(losses[0], losses[1])


def test_mixup_mixes_every_row_with_a_permutation_by_one_weight() -> None:
    x, y = torch.eye(5), torch.arange(5) % 4
    method = METHODS["mixup"](method_context(MixConfig(), nn.Linear(5, 4)))
    mixed, labels = method.mix(StepSamples(x, y, torch.ones(5)), None)
    lam = mixed.diagonal().min()
    partner = (mixed - lam * x).argmax(1)
    assert sorted(partner.tolist()) == list(range(5))
    torch.testing.assert_close(mixed, lam * x + (1 - lam) * x[partner])
    one_hot = F.one_hot(y, 4).float()
    torch.testing.assert_close(labels, lam * one_hot + (1 - lam) * one_hot[partner])


def test_a_setting_left_to_the_method_is_settled_by_it() -> None:
    left_open, given = TrainConfig(), TrainConfig(mix=MixConfig(estimator="feature", refresh=5, reference="buffer"))
    assert METHODS["gradmix-class"].resolve_config(left_open).mix == MixConfig(
        estimator="feature", refresh=0, reference=None
    )
    assert METHODS["gradmix-sample"].resolve_config(left_open).mix == MixConfig(
        estimator="feature", refresh=1, reference="replayed"
    )
    assert METHODS["gradmix-class"].resolve_config(given) == given
    assert METHODS["er"].resolve_config(left_open) == left_open


def test_the_learning_rate_falls_at_its_milestones() -> None:
    optim = resolve(TrainConfig(optim=OptimConfig(lr=1.0, lr_milestones=(0.5, 0.75)))).optim
    optimiser = make_optimiser(nn.Linear(1, 1), optim)
    schedule = make_schedule(optimiser, optim, length=8)
    rates = []
    for _ in range(8):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_evaluation_scores_every_task_and_leaves_the_model_training(stream) -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return F.one_hot(torch.full((len(x),), 3), 10).float()

    model = Constant().train()
    accuracies = evaluate(model, stream, torch.device("cpu"))
    threes = int((stream.tasks[1].test.y == 3).sum())
    assert accuracies == [0, threes / len(stream.tasks[1].test.y), 0, 0, 0]
    assert model.training


def test_augmentation_is_applied_to_rows_and_candidates(spy, stream) -> None:
    config = replace(SHORT, optim=OptimConfig(epochs=1, augment="crop-flip"), mix=MixConfig(candidates="balanced"))
    train_one(config, "er", 0, stream=stream)
    known = torch.cat([task.train.x for task in stream.tasks]).flatten(1)
    for x in (spy.seen[-1].x, spy.seen[-1].candidates[0]):
        found = (x.flatten(1)[:, None] == known).all(2).any(1).float().mean()
        assert found < 0.5


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"device: got '{name}', expected auto, cpu or a device torch can use here"):
        pick_device(name)


def test_an_unknown_method_is_named(stream) -> None:
    with pytest.raises(ValueError, match="method: got 'gem', expected one of finetune, er"):
        train_one(SHORT, "gem", 0, stream=stream)


@pytest.mark.slow
def test_resnet_with_augmentation_trains_on_the_path_of_cifar(stream) -> None:
    """The convolutional path: BatchNorm, crops and flips, a total buffer, originals, real mixed inputs."""
    few = tuple(
        replace(
            task,
            train=TensorSamples(F.pad(task.train.x[:24].expand(-1, 3, -1, -1), (4, 4, 4, 4)), task.train.y[:24]),
            test=TensorSamples(F.pad(task.test.x[:8].expand(-1, 3, -1, -1), (4, 4, 4, 4)), task.test.y[:8]),
        )
        for task in stream.tasks[:2]
    )
    small = replace(stream, tasks=few, input_shape=(3, 16, 16))
    config = replace(
        SHORT,
        data=DataConfig(),
        optim=OptimConfig(model="resnet18", epochs=1, batch=12, augment="crop-flip", lr=0.01),
        replay=ReplayConfig(policy="balanced", size=10, batch=8),
        mix=MixConfig(originals=True, class_samples=2),
    )
    for method in ("gradmix-class", "gradmix-sample"):
        result = train_one(config, method, 0, stream=small)
        assert result.status == "complete" and len(result.alignments) == 1


# --------------------------------------------------------------------------------------------------- streams and counts


def test_a_shuffled_stream_holds_every_row_once_an_epoch(spy, stream) -> None:
    config = replace(
        SHORT, optim=OptimConfig(epochs=1, batch=20), replay=ReplayConfig(size=5, stream="shuffled", tau=7.0)
    )
    seen: list[Progress] = []
    result = train_one(config, "er", 0, stream=stream, on_step=seen.append)
    held = [0, 10, 20, 30, 40]
    steps = [-(-(len(task.train.y) + kept) // 20) for task, kept in zip(stream.tasks, held, strict=True)]
    assert result.timing.steps == sum(steps) == seen[-1].steps_total
    third = spy.seen[sum(steps[:2]) : sum(steps[:3])]
    labels = torch.cat([rows.y for rows in third]).bincount(minlength=10)
    assert labels.tolist() == [5, 5, 5, 5, *stream.tasks[2].train.y.bincount()[4:].tolist(), 0, 0, 0, 0]
    for rows in third:  # one stream, one weight: tau has no part in it
        torch.testing.assert_close(rows.weight, torch.full((len(rows.y),), 1 / len(rows.y)))
    assert any((rows.y[:-3] < 4).any() and (rows.y[3:] >= 4).any() for rows in third)  # shuffled


@pytest.mark.parametrize(
    "replay", [ReplayConfig(policy="balanced", size=23), ReplayConfig(policy="reservoir", size=23)]
)
def test_steps_of_a_shuffled_stream_are_counted_ahead(spy, stream, replay: ReplayConfig) -> None:
    seen: list[Progress] = []
    config = replace(SHORT, optim=OptimConfig(epochs=2), replay=replace(replay, stream="shuffled"))
    result = train_one(config, "er", 0, stream=stream, on_step=seen.append)
    assert {progress.steps_total for progress in seen} == {result.timing.steps}


def test_a_method_without_replay_has_no_shuffled_stream_either(monkeypatch: pytest.MonkeyPatch, spy, stream) -> None:
    monkeypatch.setattr(spy, "needs", Needs(replayed=False))
    config = replace(SHORT, optim=OptimConfig(epochs=1), replay=ReplayConfig(stream="shuffled"))
    train_one(config, "er", 0, stream=stream)
    assert len(spy.seen) == sum(-(-len(task.train.y) // 16) for task in stream.tasks)


@pytest.mark.parametrize("method", ["er", "mixup", "gradmix-class", "gradmix-sample"])
@pytest.mark.parametrize("candidates", ["batch", "balanced"])
def test_methods_train_on_a_shuffled_stream(stream, method: str, candidates: str) -> None:
    config = replace(
        SHORT, optim=OptimConfig(epochs=1), replay=ReplayConfig(stream="shuffled"), mix=MixConfig(candidates=candidates)
    )
    assert train_one(config, method, 0, stream=stream).status == "complete"


def test_replayed_candidates_are_the_steps_replayed_rows(spy, stream) -> None:
    config = replace(
        SHORT,
        optim=OptimConfig(epochs=1, augment="crop-flip"),
        replay=ReplayConfig(batch=7, size=4),
        mix=MixConfig(candidates="replayed"),
    )
    train_one(config, "er", 0, stream=stream)
    first = -(-len(stream.tasks[0].train.y) // 16)
    assert all(rows.candidates is None for rows in spy.seen[:first])
    for rows in spy.seen[first:]:
        assert rows.candidates is not None
        x, y = rows.candidates
        assert torch.equal(x, rows.x[-7:]) and torch.equal(y, rows.y[-7:])


@pytest.mark.parametrize("method", ["mixup", "manifold-mixup", "cutmix", "remix", "gradmix-class", "gradmix-sample"])
def test_methods_mix_with_fewer_candidates_than_rows(stream, method: str) -> None:
    config = replace(
        SHORT, optim=OptimConfig(epochs=1), replay=ReplayConfig(batch=3), mix=MixConfig(candidates="replayed")
    )
    assert train_one(config, method, 0, stream=stream).status == "complete"


def test_partners_from_fewer_candidates_are_drawn_one_by_one() -> None:
    method = METHODS["mixup"](method_context(MixConfig(), nn.Linear(5, 4)))
    candidates = 10 + torch.arange(3.0)[:, None].expand(3, 5), torch.tensor([3, 1, 2])
    rows = StepSamples(torch.zeros(300, 5), torch.zeros(300, dtype=torch.int64), torch.ones(300), candidates)
    x, y = method.draw_partners(rows)
    assert torch.equal(y, candidates[1][(x[:, 0] - 10).long()])
    counts = torch.bincount((x[:, 0] - 10).long(), minlength=3)
    assert ((counts - 100).abs() < 5 * (300 * 2 / 9) ** 0.5).all()


class Counting(Spy):
    """Notes the class counts and extra replayed rows that a method is given, and keeps something with the rows."""

    def losses(self, rows: StepSamples) -> Iterator[torch.Tensor]:
        replayed = self.context.draw_replayed()
        type(self).seen.append((self.context.counts.clone(), replayed, rows))
        yield 0 * self.parameter.sum()

    needs = Needs(extras=True)

    def extras(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"label_again": y.clone(), "brightness": x.flatten(1).sum(1)}


def test_a_method_is_told_counts_and_given_more_rows_with_what_it_kept(monkeypatch: pytest.MonkeyPatch, stream) -> None:
    Counting.seen = []
    monkeypatch.setitem(METHODS, "mixup", Counting)
    train_one(replace(SHORT, optim=OptimConfig(epochs=1)), "mixup", 0, stream=stream)
    own = [task.train.y.bincount(minlength=10) for task in stream.tasks]
    steps = np.cumsum([0] + [-(-len(task.train.y) // 16) for task in stream.tasks])
    for task in range(5):
        counts, replayed, rows = Counting.seen[steps[task]]
        expected = own[task].clone()
        expected[: 2 * task] = 8
        assert torch.equal(counts, expected)
        if task == 0:
            assert replayed is None
            continue
        assert replayed is not None and len(replayed.y) == len(rows.y) - len(stream.tasks[task].train.y[:16])
        assert torch.equal(replayed.extras["label_again"], replayed.y)
        torch.testing.assert_close(replayed.extras["brightness"], replayed.x.flatten(1).sum(1))


def test_more_replayed_rows_leave_the_step_as_it_was(spy, stream, monkeypatch: pytest.MonkeyPatch) -> None:
    Counting.seen = []
    config = replace(SHORT, optim=OptimConfig(epochs=1, augment="crop-flip"))
    train_one(config, "er", 3, stream=stream)
    monkeypatch.setitem(METHODS, "mixup", Counting)
    train_one(config, "mixup", 3, stream=stream)
    assert all(torch.equal(a.x, b.x) for a, (_, _, b) in zip(spy.seen, Counting.seen, strict=True))


def test_a_method_that_wants_balanced_candidates_gets_them(spy, stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spy, "needs", Needs(balanced=True))
    train_one(replace(SHORT, optim=OptimConfig(epochs=1)), "er", 0, stream=stream)
    assert all(rows.candidates is not None for rows in spy.seen)


# ----------------------------------------------------------------------------------------------- precision and layout


@pytest.fixture(scope="module")
def with_originals(stream) -> Callable[[str], RunResult]:
    """A method's run in float32 that keeps unmixed rows, made once."""
    config = replace(SHORT, mix=MixConfig(originals=True))
    return cache(lambda method: train_one(config, method, 0, stream=stream))


MIXED_PRECISION = [
    (*run, amp)
    for run in [("er", False), ("mixup", False), ("mixup", True), ("gradmix-class", True), ("gradmix-sample", False)]
    for amp in ("bf16", "fp16")
]


@pytest.mark.parametrize(("method", "originals", "amp"), part(MIXED_PRECISION, 3))
def test_mixed_precision_learns_as_float32_does(
    stream, results, with_originals, method: str, originals: bool, amp: str
) -> None:
    dtypes = set()
    linear = F.linear

    def watching(*args: torch.Tensor) -> torch.Tensor:
        out = linear(*args)
        dtypes.add(out.dtype)
        return out

    config = replace(SHORT, optim=replace(SHORT.optim, amp=amp), mix=MixConfig(originals=originals))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", watching)
        result = train_one(config, method, 0, stream=stream)
    assert dtypes == {torch.bfloat16 if amp == "bf16" else torch.float16}
    plain = results(method) if not originals else with_originals(method)
    assert abs(average_accuracy(result.accuracy) - average_accuracy(plain.accuracy)) < 0.08


def test_channels_last_reaches_the_model(stream, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = []

    def build(*args: object, **kwargs: object) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
        model[0].register_forward_hook(
            lambda m, inputs, _o: formats.append(
                all(t.is_contiguous(memory_format=torch.channels_last) for t in (m.weight, inputs[0]))
            )
        )
        return model

    monkeypatch.setattr("gradmix.training.loop.run.build_model", build)
    optim = OptimConfig(epochs=1, channels_last=True, augment="crop-flip")
    result = train_one(replace(SHORT, optim=optim), "gradmix-sample", 0, stream=stream)
    assert result.status == "complete" and formats and all(formats)


def test_processes_agree_about_kernels_before_these_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(run, "agree", lambda group, device: order.append((group, device)))
    monkeypatch.setattr(run, "describe_environment", lambda device: order.append("record") or {"kernels": "none"})
    data = DataConfig(tasks=1, samples_per_class=4)
    config = replace(SHORT, data=data, optim=OptimConfig(epochs=1))
    result = train_one(config, "finetune", 0, stream=make_stream("split-digits", tasks=1, samples_per_class=4))
    assert order == [(None, torch.device("cpu")), "record"] and result.environment["kernels"] == "none"


def test_time_and_memory_are_accounted_for(results) -> None:
    for method in ("finetune", "er", "gradmix-class"):
        timing = results(method).timing
        assert 0 < timing.seconds_data < timing.seconds_step
        assert timing.seconds_selection >= 0 and timing.seconds_forward_backward > 0
        parts = timing.seconds_data + timing.seconds_selection + timing.seconds_forward_backward
        assert parts == pytest.approx(timing.seconds_step)
        assert timing.peak_memory_bytes > 10 * 2**20


def test_the_peak_is_the_runs_own() -> None:
    """Memory that was given back before the run does not count in it, where the system can tell."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak can be begun anew on Linux only")
    # In a process of its own: one that has run other tests may serve such a tensor from memory it never gave back.
    code = """
import torch
from gradmix.training.loop.memory import peak_memory, start_peak_memory
device = torch.device("cpu")
hog = torch.ones(100 * 2**20)  # 400 MiB
print(peak_memory(device))
del hog
start_peak_memory(device)
print(peak_memory(device))
"""
    high, low = map(int, run_python(code))
    assert high > 400 * 2**20 and low < high - 300 * 2**20
