"""``GradMixPlugin`` in Avalanche's own loop: pairs and loss of every step are those of ``select_pairs``."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from frameworks import CLASSES, WIDTH, framework, generator, network, task
from torch import nn
from torch.utils.data import TensorDataset

import gradmix

framework("avalanche.training")

from avalanche.benchmarks import (  # noqa: E402
    benchmark_from_datasets,
    nc_benchmark,
    split_online_stream,
    with_classes_timeline,
)
from avalanche.benchmarks.utils import TransformGroups, as_classification_dataset  # noqa: E402
from avalanche.core import SupervisedPlugin  # noqa: E402
from avalanche.models import IncrementalClassifier, MTSimpleMLP, SimpleMLP  # noqa: E402
from avalanche.training import DER, Naive  # noqa: E402
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, LwFPlugin, ReplayPlugin  # noqa: E402
from avalanche.training.storage_policy import ClassBalancedBuffer, ReservoirSamplingBuffer  # noqa: E402

from gradmix.integrations.avalanche import GradMixPlugin  # noqa: E402

# Avalanche 0.6's own: a method of its storage policies that 0.7 will rename; and that nothing is logged.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Call to deprecated function update"),
    pytest.mark.filterwarnings("ignore:No loggers specified"),
]


def dataset(x, y, transforms=None):
    samples = TensorDataset(x, y)
    samples.targets = y.tolist()
    return as_classification_dataset(samples, transform_groups=transforms)


def benchmark(*tasks):
    """Any samples in each experience; they are (x, y)."""
    return with_classes_timeline(benchmark_from_datasets(train=[dataset(*samples) for samples in tasks]))


def experiences(count):
    """Four classes, as many in each experience; samples are (x, y, t) with the task label 0."""
    samples = TensorDataset(*(torch.cat(parts) for parts in zip(task(0), task(1), strict=True)))
    samples.targets = samples.tensors[1].tolist()
    return nc_benchmark(samples, samples, n_experiences=count, task_labels=False, fixed_class_order=[0, 1, 2, 3])


TWO_TASKS = experiences(2)


class Growing(nn.Module):
    """A network whose classifier begins with two units, grows, and masks those without samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh())
        self.classifier = IncrementalClassifier(16, 2)

    def forward(self, x):
        return self.classifier(self.body(x))


class Masked(Growing):
    """The same with eight units from the start, of which those without samples are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = IncrementalClassifier(16, 8)


def strategy(model, plugins, epochs=2, kind=Naive, criterion=None):
    return kind(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.2),
        criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
        train_mb_size=8,
        train_epochs=epochs,
        eval_mb_size=64,
        plugins=plugins,
        evaluator=EvaluationPlugin(),
    )


class Witness(SupervisedPlugin):
    """Repeats every selection by ``select_pairs`` and compares; it is put before the plugin, and after it."""

    def __init__(self, plugin, buffer=None, **settings) -> None:
        super().__init__()
        self.plugin, self.buffer, self.settings = plugin, buffer, settings
        self.expected = self.own_loss = None
        self.steps = self.rejections = self.masks = 0

    def select(self, strategy, x, y):
        own = generator()
        if self.steps:
            own.set_state(self.state)
        reference = self.buffer
        if reference is None:
            reference = ~torch.isin(y, torch.tensor(sorted(strategy.experience.classes_in_this_experience)))
            self.masks += int(reference.any())
        else:
            policy = self.buffer.buffer
            reference = [tuple(policy[i][:2]) for i in range(len(policy))]
        self.expected = gradmix.select_pairs(strategy.model, reference, (x, y), generator=own, **self.settings)
        self.state = own.get_state()
        self.steps += 1
        self.rejections += int((~self.expected.helpful).sum())

    def compare(self):
        found = self.plugin.mixup.pairs
        assert torch.equal(found.partner, self.expected.partner)
        assert torch.equal(found.helpful, self.expected.helpful)
        assert torch.equal(found.lam, self.expected.lam)


class OriginalsWitness(Witness):
    def before_backward(self, strategy, **kwargs):
        if self.own_loss is None:
            self.select(strategy, strategy.mb_x, strategy.mb_y)
            self.own_loss = float(strategy.loss.detach())

    def after_backward(self, strategy, **kwargs):
        self.compare()
        x, y = self.expected.mix()
        mixed = F.cross_entropy(strategy.model(x), y)
        torch.testing.assert_close(strategy.loss.detach().squeeze(), ((self.own_loss + mixed) / 2).detach())
        self.own_loss = None


class MixedWitness(Witness):
    def before_forward(self, strategy, **kwargs):
        self.select(strategy, strategy.mb_x, strategy.mb_y)

    def after_forward(self, strategy, **kwargs):
        self.compare()
        x, y = self.expected.mix()
        assert torch.equal(strategy.mb_x, x) and torch.equal(strategy.mb_y, y)


MODELS = {"a fixed head": network, "SimpleMLP": lambda: simple_mlp(), "a growing head": Growing, "masked units": Masked}


def simple_mlp():
    torch.manual_seed(0)
    return SimpleMLP(num_classes=CLASSES, input_size=WIDTH, hidden_size=16, drop_rate=0)


@pytest.mark.parametrize("originals", [True, False])
@pytest.mark.parametrize("by_buffer", [False, True], ids=["by class", "by buffer"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_step_selects_what_select_pairs_does(model, by_buffer: bool, originals: bool) -> None:
    replay = ReplayPlugin(mem_size=10)
    policy = replay.storage_policy if by_buffer else None
    refresh = {"refresh": 1} if by_buffer else {}
    plugin = GradMixPlugin(policy, originals=originals, generator=generator(), **refresh)
    witness = (OriginalsWitness if originals else MixedWitness)(plugin, policy)
    trained = strategy(model(), [replay, witness, plugin])
    for experience in TWO_TASKS.train_stream:
        trained.train(experience)
    assert witness.steps == 20 and witness.rejections > 0
    assert by_buffer or witness.masks > 0


def test_the_buffer_of_now_is_read_when_an_experience_begins() -> None:
    """Between two refreshes the reference stays; the buffer that a policy has filled meanwhile is the next one's."""
    replay = ReplayPlugin(mem_size=10, storage_policy=ClassBalancedBuffer(10))
    plugin = GradMixPlugin(replay.storage_policy)
    trained = strategy(network(), [replay, plugin])
    for number, experience in enumerate(experiences(4).train_stream):
        before = plugin.mixup.refreshes if plugin.mixup else 0
        trained.train(experience)
        # Six steps each, so that one refresh is due, at the first of them.
        assert plugin.mixup.refreshes - before == 1, number
        assert (plugin.mixup.reference is None) == (number == 0)


def test_the_buffer_is_read_with_the_transformations_of_evaluation() -> None:
    doubled = TransformGroups({"train": (lambda x: 0 * x, None), "eval": (lambda x: 2 * x, None)})
    policy = ReservoirSamplingBuffer(6)
    x, y = task(0, 6)
    policy.update_from_dataset(dataset(x, y, doubled))
    plugin = GradMixPlugin(policy)
    samples = plugin._samples()
    found = torch.stack([samples[i][0] for i in range(len(samples))])
    assert sorted(found.tolist()) == sorted((2 * x).tolist())
    model = network()
    plugin._of(model).select(*task(1, 8))
    torch.testing.assert_close(plugin.mixup.reference, gradmix.reference_gradient(model, (2 * x, y)))


def test_the_mini_batch_of_the_originals_stays_for_other_plugins() -> None:
    class Seen(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            assert strategy.mb_y.dtype == torch.int64 and len(strategy.mb_output) == len(strategy.mb_y)
            torch.testing.assert_close(strategy.criterion(), F.cross_entropy(strategy.mb_output, strategy.mb_y))

    trained = strategy(network(), [ReplayPlugin(mem_size=10), GradMixPlugin(), Seen()])
    for experience in TWO_TASKS.train_stream:
        trained.train(experience)


@pytest.mark.parametrize("penalty", [lambda: LwFPlugin(), lambda: EWCPlugin(0.5)], ids=["LwF", "EWC"])
def test_penalties_of_other_plugins_are_kept_in_any_order(penalty) -> None:
    """The same weights whether a plugin adds to the loss before this one or after it."""
    weights = []
    for first in (True, False):
        torch.manual_seed(0)
        own = [GradMixPlugin(generator=generator()), penalty()]
        trained = strategy(network(), [ReplayPlugin(mem_size=10), *(own if first else reversed(own))])
        for experience in TWO_TASKS.train_stream:
            trained.train(experience)
        weights.append(nn.utils.parameters_to_vector(trained.model.parameters()).detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_online_streams() -> None:
    tasks = benchmark(task(0), task(1)).train_stream
    stream = split_online_stream(tasks, 4, access_task_boundaries=True)
    plugin = GradMixPlugin()
    trained = strategy(Growing(), [ReplayPlugin(mem_size=10), plugin], epochs=1)
    marked = 0
    for experience in stream:
        trained.train(experience)
        marked += int(torch.isin(plugin.mixup.pairs.batch.y, torch.tensor([0, 1])).any())
    assert marked > 10 and trained.model.classifier.classifier.out_features == CLASSES
    hidden = split_online_stream(tasks, 4)
    with pytest.raises(ValueError, match=r"without classes_in_this_experience.*storage_policy="):
        strategy(network(), [GradMixPlugin()], epochs=1).train(hidden)
    policy = ReservoirSamplingBuffer(10)
    plugin = GradMixPlugin(policy, refresh=3)
    strategy(network(), [ReplayPlugin(10, storage_policy=policy), plugin], epochs=1).train(hidden)
    assert plugin.mixup.reference is not None and plugin.mixup.refreshes <= 8


def test_classes_that_come_back_need_the_storage_policy() -> None:
    stream = benchmark(task(0), task(0)).train_stream
    replay = ReplayPlugin(mem_size=10)
    trained = strategy(network(), [replay, GradMixPlugin()])
    trained.train(stream[0])
    trained.train(stream[0])  # the same experience again is no other one
    with pytest.raises(ValueError, match=r"storage_policy: got None.*come back \(\[0, 1\]\)"):
        trained.train(stream[1])
    plugin = GradMixPlugin(replay.storage_policy)
    strategy(network(), [replay, plugin]).train(stream)
    assert plugin.mixup.reference is not None


def test_no_classes() -> None:
    plain = benchmark_from_datasets(train=[dataset(*task(0))])
    with pytest.raises(ValueError, match="with_classes_timeline"):
        strategy(network(), [GradMixPlugin()]).train(plain.train_stream)


WRONG = {
    "a data set": (lambda: GradMixPlugin(task(0)), "storage_policy: got tuple, expected an ExemplarsBuffer"),
    "an unknown setting": (lambda: GradMixPlugin(alpa=1.0), "alpa"),
    "a strategy with a loss of its own": (
        lambda: strategy(network(), [GradMixPlugin()], kind=DER).train(TWO_TASKS.train_stream),
        "strategy: got DER",
    ),
    "a classifier for each task": (
        lambda: strategy(MTSimpleMLP(WIDTH), [GradMixPlugin()]).train(TWO_TASKS.train_stream),
        "strategy.model: got MTSimpleMLP",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_wrong_set_ups_are_refused(call, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
    with pytest.raises(ValueError, match="alpha: got -1"):
        GradMixPlugin(alpha=-1.0)


def test_a_loop_of_two_tasks_learns_also_if_it_was_saved_in_between() -> None:
    torch.manual_seed(0)
    model, replay, plugin = simple_mlp(), ReplayPlugin(mem_size=10), GradMixPlugin()
    strategy(model, [replay, plugin], epochs=20).train(TWO_TASKS.train_stream[0])
    x, y = (torch.cat(parts) for parts in zip(task(0), task(1), strict=True))
    for own_model, own_plugin in (pickle.loads(pickle.dumps((model, plugin))), (model, plugin)):
        assert own_plugin.mixup._model is own_model
        own = ReplayPlugin(mem_size=10, storage_policy=copy.deepcopy(replay.storage_policy))
        strategy(own_model, [own, own_plugin], epochs=20).train(TWO_TASKS.train_stream[1])
        assert (own_model.eval()(x).argmax(1) == y).float().mean() > 0.8
        assert own_plugin.mixup.pairs.helpful.any()


def test_by_all_parameters_no_head_is_needed() -> None:
    plugin = GradMixPlugin(estimator="jvp", policy="permute")
    trained = strategy(network(), [ReplayPlugin(mem_size=10), plugin], epochs=1)
    for experience in TWO_TASKS.train_stream:
        trained.train(experience)
    assert plugin.mixup.pairs.helpful.any()
