"""Task streams: every row in its place, classes renumbered, and the protocols as published."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from gradmix.training.config import DataConfig, MixConfig, OptimConfig, ReplayConfig, TrainConfig, from_dict, to_dict
from gradmix.training.data.image_arrays import LabelledData
from gradmix.training.models import build_model
from gradmix.training.streams import TaskStream, benchmarks
from gradmix.training.streams.benchmarks import BENCHMARKS, Benchmark, make_stream, resolve


def labelled(rows_per_class: list[int], seed: int = 0) -> LabelledData:
    """A shuffled data set whose images hold their own number: 3 times as many training rows as test rows."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for factor in (3, 1):
        y = torch.repeat_interleave(torch.arange(len(rows_per_class)), factor * torch.tensor(rows_per_class))
        y = y[torch.randperm(len(y), generator=generator)]
        parts += [torch.arange(len(y), dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2), y]
    return LabelledData(*parts, class_names=tuple(f"c{k}" for k in range(len(rows_per_class))), maximum=1.0)


@pytest.fixture
def cut(monkeypatch):
    """Cuts a made-up data set as split-mnist would be cut."""

    def cut(data: LabelledData, **options) -> TaskStream:
        monkeypatch.setitem(benchmarks.DATASETS, "mnist", lambda _data_dir, test: data)
        return make_stream("split-mnist", "unused", **options)

    return cut


SKEWED = [4, 1, 7, 2, 5, 3, 6, 1, 2, 9]


@pytest.mark.parametrize("class_order_seed", [None, 0, 1, 12345])
def test_every_row_arrives_once_in_the_task_of_its_class(cut, class_order_seed):
    data = labelled(SKEWED)
    stream = cut(data, class_order_seed=class_order_seed)
    assert sorted(stream.class_order) == list(range(10))
    assert stream.class_names == tuple(f"c{k}" for k in stream.class_order)
    assert (stream.num_classes, stream.input_shape, stream.name) == (10, (1, 2, 2), "split-mnist")
    for part, labels in (("train", data.train_y), ("test", data.test_y)):
        arrived = []
        for index, task in enumerate(stream.tasks):
            assert (task.index, task.classes) == (index, (2 * index, 2 * index + 1))
            rows = getattr(task, part)
            x, y = rows.x, rows.y
            assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (len(y), 1, 2, 2)
            rows = x[:, 0, 0, 0].long().tolist()
            assert rows == sorted(rows), "samples stand in the order of the data set"
            for row, label in zip(rows, y.tolist(), strict=True):
                assert label in task.classes
                assert stream.class_order[label] == labels[row]
            arrived += rows
        assert sorted(arrived) == list(range(len(labels)))


def test_class_order(cut):
    data = labelled(SKEWED)
    assert cut(data).class_order == tuple(range(10))
    first, again, other = (cut(data, class_order_seed=seed).class_order for seed in (3, 3, 4))
    assert first == again != other
    assert first == tuple(np.random.default_rng(3).permutation(10).tolist())


def test_class_order_leaves_global_random_state_alone(cut):
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    cut(labelled(SKEWED), class_order_seed=3, validation=0.3)
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.5, 0.8])
def test_validation_holds_out_a_share_of_every_class(cut, share):
    data = labelled([n + 4 for n in SKEWED])
    stream = cut(data, validation=share, class_order_seed=1)
    total = torch.bincount(data.train_y)
    all_rows = []
    for task in stream.tasks:
        for label in task.classes:
            original = stream.class_order[label]
            held = task.test.x[task.test.y == label][:, 0, 0, 0].long().tolist()
            left = task.train.x[task.train.y == label][:, 0, 0, 0].long().tolist()
            assert len(held) == int(np.floor(int(total[original]) * share + 0.5))
            assert all(data.train_y[row] == original for row in held + left), "held-out samples are training samples"
            # Evenly spread: no stretch of the data set goes without.
            ranks = sorted(sorted(held + left).index(row) for row in held)
            gap = len(held + left) / len(held)
            assert all(abs(b - a - gap) < 1 for a, b in itertools.pairwise(ranks))
            all_rows += held + left
    assert sorted(all_rows) == list(range(len(data.train_y)))


def test_validation_is_the_same_each_time_and_whatever_the_class_order(cut):
    data = labelled([n + 4 for n in SKEWED])
    held = [
        sorted(row for task in stream.tasks for row in task.test.x[:, 0, 0, 0].tolist())
        for stream in (cut(data, validation=0.2), cut(data, validation=0.2, class_order_seed=9))
    ]
    assert held[0] == held[1]


def test_inputs_are_scaled_by_the_data_sets_constants(cut):
    data = dataclasses.replace(labelled(SKEWED), maximum=2.0, mean=(0.25,), std=(0.5,))
    for given, expected in {
        True: (data.train_x / 2 - 0.25) / 0.5,
        False: data.train_x / 2,
        None: data.train_x / 2,  # split-mnist's protocol keeps pixels in [0, 1]
    }.items():
        stream = cut(data, normalise=given)
        values = torch.cat([task.train.x for task in stream.tasks]).flatten().sort().values
        assert torch.equal(values, expected.flatten().sort().values)
        assert (stream.mean, stream.std) == (((0.25,), (0.5,)) if given else (None, None))


def test_normalisation_by_unknown_constants_is_refused():
    with pytest.raises(
        ValueError, match="normalise: got True, but no mean and standard deviation are known of split-digits"
    ):
        make_stream("split-digits", normalise=True)


@pytest.mark.parametrize("tasks", [1, 3, 5])
def test_the_first_tasks_alone(cut, tasks: int):
    data = labelled(SKEWED)
    whole, part = cut(data, class_order_seed=4), cut(data, class_order_seed=4, tasks=tasks)
    assert part.num_classes == 2 * tasks == len(part.class_names) and part.class_order == whole.class_order[: 2 * tasks]
    assert len(part.tasks) == tasks
    for a, b in zip(part.tasks, whole.tasks, strict=False):
        assert a.classes == b.classes and torch.equal(a.train.x, b.train.x) and torch.equal(a.test.y, b.test.y)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_first_rows_of_each_class_alone(cut, rows: int):
    data = labelled(SKEWED)
    stream = cut(data, samples_per_class=rows)
    for task in stream.tasks:
        for label in task.classes:
            mine = task.train.x[task.train.y == label][:, 0, 0, 0]
            all_of_it = data.train_x[data.train_y == label][:, 0, 0, 0].float() / data.maximum
            assert torch.equal(mine, all_of_it[:rows])
        assert len(task.test.y) == int(sum((data.test_y == label).sum() for label in task.classes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 0}, "tasks: got 0, expected 1 to 5, the tasks of split-mnist"),
        ({"tasks": 6}, "tasks: got 6, expected 1 to 5"),
        ({"samples_per_class": 0}, "samples_per_class: got 0, expected at least 1"),
    ],
)
def test_parts_that_are_not_there_are_refused(cut, options, message: str):
    with pytest.raises(ValueError, match=message):
        cut(labelled(SKEWED), **options)


ABSENT = {
    "no training samples": ({"train_y": 3}, {}, "no training samples of class c3"),
    "no test samples": ({"test_y": 0}, {}, "no test samples of class c0"),
    "no validation samples": ({}, {"validation": 0.01}, "no validation samples of class c0, c1"),
    "nothing left to train on": ({}, {"validation": 0.99}, "no training samples of class c0, c1"),
}


@pytest.mark.parametrize("case", ABSENT)
def test_a_class_without_rows_is_refused(cut, case):
    changes, options, message = ABSENT[case]
    data = labelled([2] * 10)
    for name, label in changes.items():
        y = getattr(data, name).clone()
        y[y == label] = label + 1
        data = dataclasses.replace(data, **{name: y})
    with pytest.raises(ValueError, match=message):
        cut(data, **options)


BAD = {
    "name": (("cifar", "."), {}, "name: got 'cifar', expected one of 'split-digits'"),
    "validation 1": (("split-digits",), {"validation": 1.0}, r"validation: got 1.0, expected a share in \[0, 1\)"),
    "validation negative": (("split-digits",), {"validation": -0.1}, "validation: got -0.1"),
    "validation nan": (("split-digits",), {"validation": float("nan")}, "validation: got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make_stream(*arguments, **options)


def test_missing_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        make_stream("split-mnist", tmp_path)


def test_split_digits():
    pytest.importorskip("sklearn", reason="scikit-learn, with which the digits come")
    stream = make_stream("split-digits")
    assert [len(task.train.y) for task in stream.tasks] == [289, 289, 291, 289, 284]
    assert sum(len(task.test.y) for task in stream.tasks) == 355
    assert stream.input_shape == (1, 8, 8) and stream.class_names == tuple("0123456789")
    assert all(task.train.x.min() >= 0 and task.train.x.max() == 1 for task in stream.tasks)


# ---------------------------------------------------------------------------------------------------------- protocols


PUBLISHED = {
    "split-mnist": dict(
        tasks=5, classes_per_task=2, model="mlp", lr=0.01, momentum=0.9, weight_decay=0.0, lr_milestones=(), epochs=5,
        batch=64, replay_batch=64, buffer_policy="class", buffer_size=32, augment="none",
        normalise=False,
    ),
    "split-fashion-mnist": dict(
        tasks=5, classes_per_task=2, model="mlp", lr=0.01, momentum=0.9, weight_decay=0.0, lr_milestones=(), epochs=5,
        batch=64, replay_batch=64, buffer_policy="class", buffer_size=32, augment="none",
        normalise=False,
    ),
    "split-cifar10": dict(
        tasks=5, classes_per_task=2, model="resnet18", lr=0.01, momentum=0.9, weight_decay=0.0, lr_milestones=(),
        epochs=50, batch=256, replay_batch=256, buffer_policy="class", buffer_size=32, augment="crop-flip",
        normalise=True,
    ),
    "split-cifar100": dict(
        tasks=10, classes_per_task=10, model="resnet18", lr=0.1, momentum=0.9, weight_decay=2e-4,
        lr_milestones=(0.5, 0.75), epochs=200, batch=128, replay_batch=128, buffer_policy="balanced", buffer_size=2000,
        augment="crop-flip", normalise=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_protocols_as_published(name):
    assert dataclasses.asdict(BENCHMARKS[name].protocol) == PUBLISHED[name] | {
        "space": None,
        "reference": None,
        "stream": "dual",
    }


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_complete(name):
    benchmark = BENCHMARKS[name]
    assert isinstance(benchmark, Benchmark) and callable(benchmark.read)
    protocol = benchmark.protocol
    assert (protocol.tasks is None) is (protocol.classes_per_task is None), (
        "or classes are shared out as they are found"
    )
    classes = (protocol.tasks or 3) * (protocol.classes_per_task or 2)
    vocabulary = 9 if protocol.model == "text-transformer" else None
    x = torch.zeros(2, 1, 8, 8) if vocabulary is None else torch.ones(2, 8, dtype=torch.int64)
    model = build_model(protocol.model, tuple(x.shape[1:]), classes, vocabulary=vocabulary)
    assert model(x).shape == (2, classes)
    assert (protocol.space is None) is (vocabulary is None), "ids cannot be mixed"


# -------------------------------------------------------------------------------------------------------- resolution


@pytest.mark.parametrize("name", BENCHMARKS)
def test_resolve_fills_every_open_field(name):
    open_config = TrainConfig(data=DataConfig(benchmark=name))
    resolved, protocol = resolve(open_config), BENCHMARKS[name].protocol
    left_open = {
        key for section in (resolved.optim, resolved.replay) for key, value in vars(section).items() if value is None
    }
    # The method's own, one pass, and where rows lie.
    assert left_open == {"distillation", "accumulate", "storage"}
    assert resolved.optim == OptimConfig(
        model=protocol.model,
        lr=protocol.lr,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
        lr_milestones=protocol.lr_milestones,
        epochs=protocol.epochs,
        batch=protocol.batch,
        augment=protocol.augment,
    )
    assert resolved.replay == ReplayConfig(
        policy=protocol.buffer_policy, size=protocol.buffer_size, batch=protocol.replay_batch, stream=protocol.stream
    )
    assert resolved.data == dataclasses.replace(open_config.data, normalise=protocol.normalise)
    assert resolved.mix == dataclasses.replace(
        open_config.mix, space=protocol.space, reference=protocol.reference or "auto"
    )
    assert resolved.seeds == open_config.seeds
    assert resolve(resolved) == resolved
    assert open_config.optim.lr is None


def test_digits_are_one_shuffled_stream_where_a_step_may_be_any_mixture_of_samples():
    assert resolve(TrainConfig()).replay.stream == "shuffled"
    assert resolve(TrainConfig(replay=ReplayConfig(stream="dual"))).replay.stream == "dual"
    assert resolve(TrainConfig(data=DataConfig(online=True))).replay.stream == "dual"
    assert resolve(TrainConfig(mix=MixConfig(candidates="replayed"))).replay.stream == "dual"
    # Runs from before the setting was recorded had fixed numbers.
    plain = to_dict(TrainConfig())
    del plain["replay"]["stream"]
    assert resolve(from_dict(plain, saved=True)).replay.stream == "dual"
    assert resolve(from_dict(plain)).replay.stream == "shuffled"


def test_resolve_keeps_what_the_user_said():
    config = TrainConfig(
        data=DataConfig(benchmark="split-cifar100"),
        optim=OptimConfig(lr=0.3, weight_decay=0.0, lr_milestones=(), epochs=2),
        replay=ReplayConfig(size=50, tau=0.0),
    )
    resolved = resolve(config)
    assert (resolved.optim.lr, resolved.optim.weight_decay, resolved.optim.lr_milestones) == (0.3, 0.0, ())
    assert (resolved.optim.epochs, resolved.optim.batch) == (2, 128)
    assert (resolved.replay.size, resolved.replay.tau, resolved.replay.policy) == (50, 0.0, "balanced")


SIZES = {
    "MNIST, per class": ("split-mnist", "class", None, 32),
    "MNIST, total": ("split-mnist", "reservoir", None, 320),
    "MNIST, total of two tasks": ("split-mnist", "reservoir", 2, 128),
    "CIFAR-100, total": ("split-cifar100", "reservoir", None, 2000),
    "CIFAR-100, per class": ("split-cifar100", "class", None, 20),
    "CIFAR-100, per class of four tasks": ("split-cifar100", "class", 4, 50),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_size_follows_the_meaning_of_the_policy(case):
    name, policy, tasks, size = SIZES[case]
    config = TrainConfig(data=DataConfig(benchmark=name, tasks=tasks), replay=ReplayConfig(policy=policy))
    assert resolve(config).replay.size == size


OUT_OF_RANGE = {
    "data.benchmark": TrainConfig(data=DataConfig(benchmark="split-x")),  # type: ignore[arg-type]
    "data.validation": TrainConfig(data=DataConfig(validation=1.0)),
    "optim.lr": TrainConfig(optim=OptimConfig(lr=0.0)),
    "optim.momentum": TrainConfig(optim=OptimConfig(momentum=1.0)),
    "optim.weight_decay": TrainConfig(optim=OptimConfig(weight_decay=-1e-4)),
    "optim.lr_milestones": TrainConfig(optim=OptimConfig(lr_milestones=(0.5, 1.5))),
    "optim.epochs": TrainConfig(optim=OptimConfig(epochs=0)),
    "optim.batch": TrainConfig(optim=OptimConfig(batch=0)),
    "replay.size": TrainConfig(replay=ReplayConfig(size=0)),
    "replay.batch": TrainConfig(replay=ReplayConfig(batch=-1)),
    "replay.tau": TrainConfig(replay=ReplayConfig(tau=float("nan"))),
    "mix.alpha": TrainConfig(mix=MixConfig(alpha=0.0)),
    "mix.threshold": TrainConfig(mix=MixConfig(threshold=1.5)),
    "mix.refresh": TrainConfig(mix=MixConfig(refresh=-1)),
    "mix.class_samples": TrainConfig(mix=MixConfig(class_samples=0)),
    "methods": TrainConfig(methods=()),
    "seeds": TrainConfig(seeds=(1, 1)),
}


@pytest.mark.parametrize("field", OUT_OF_RANGE)
def test_values_out_of_range_are_named(field):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        resolve(OUT_OF_RANGE[field])
