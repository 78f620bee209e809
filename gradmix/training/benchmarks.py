"""Benchmarks: a data set, cut into a stream of tasks with new classes each, and the protocol by which it is learnt."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gradmix.training.config import DataConfig, TrainConfig, check
from gradmix.training.datasets import DATASETS, LabelledImages, rank_in_class


@dataclass(frozen=True)
class Protocol:
    """The settings a benchmark is learnt with unless the user says otherwise.

    Args:
        tasks: Number of tasks.
        classes_per_task: New classes in each.
        model: Name of the model.
        lr: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty of SGD.
        lr_milestones: Shares of a task's epochs after which the learning rate is divided by ten.
        epochs: Epochs per task.
        batch: Rows of the current task in a step.
        replay_batch: Replayed rows in a step.
        buffer_policy: Policy of the replay buffer.
        buffer_size: Rows per class for policy ``class``, in total otherwise.
        augment: ``none``, or ``crop-flip``: a random crop after padding by 4, and a random horizontal flip.
        normalise: Whether pixels are normalised by the data set's mean and standard deviation, or stay in [0, 1].
    """

    tasks: int
    classes_per_task: int
    model: Literal["mlp", "resnet8", "resnet20", "resnet32", "resnet18"]
    lr: float
    epochs: int
    batch: int
    replay_batch: int
    buffer_size: int
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_milestones: tuple[float, ...] = ()
    buffer_policy: Literal["class", "balanced", "reservoir"] = "class"
    augment: Literal["none", "crop-flip"] = "none"
    normalise: bool = False


@dataclass(frozen=True)
class Benchmark:
    """A data set and its protocol.

    Args:
        name: The name users give.
        title: What it is, in a few words.
        dataset: Key of :data:`gradmix.training.datasets.DATASETS`.
        protocol: The settings.
    """

    name: str
    title: str
    dataset: str
    protocol: Protocol


_MNIST_PROTOCOL = Protocol(
    tasks=5, classes_per_task=2, model="mlp", lr=0.01, epochs=5, batch=64, replay_batch=64, buffer_size=32
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "split-digits",
            "1,797 handwritten digits of 8x8 pixels (scikit-learn), 5 tasks of 2 classes",
            "digits",
            Protocol(
                tasks=5, classes_per_task=2, model="mlp", lr=0.02, epochs=10, batch=16, replay_batch=16, buffer_size=4
            ),
        ),
        Benchmark("split-mnist", "MNIST, 5 tasks of 2 classes", "mnist", _MNIST_PROTOCOL),
        Benchmark("split-fashion-mnist", "Fashion-MNIST, 5 tasks of 2 classes", "fashion-mnist", _MNIST_PROTOCOL),
        Benchmark(
            "split-cifar10",
            "CIFAR-10, 5 tasks of 2 classes",
            "cifar10",
            Protocol(
                tasks=5,
                classes_per_task=2,
                model="resnet18",
                lr=0.01,
                epochs=50,
                batch=256,
                replay_batch=256,
                buffer_size=32,
                augment="crop-flip",
                normalise=True,
            ),
        ),
        Benchmark(
            "split-cifar100",
            "CIFAR-100 (fine labels), 10 tasks of 10 classes",
            "cifar100",
            Protocol(
                tasks=10,
                classes_per_task=10,
                model="resnet18",
                lr=0.1,
                weight_decay=2e-4,
                lr_milestones=(0.5, 0.75),
                epochs=200,
                batch=128,
                replay_batch=128,
                buffer_policy="balanced",
                buffer_size=2000,
                augment="crop-flip",
                normalise=True,
            ),
        ),
    )
}
"""All benchmarks by name."""


@dataclass(frozen=True)
class Task:
    """One task of a stream: rows of its own classes only.

    Args:
        index: Place in the stream, from 0.
        classes: Its classes, by their new labels.
        train_x: Training inputs ``(N, C, H, W)`` float32.
        train_y: Their new labels ``(N,)`` int64.
        test_x: Test inputs ``(M, C, H, W)`` float32.
        test_y: Their new labels ``(M,)`` int64.
    """

    index: int
    classes: tuple[int, ...]
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class TaskStream:
    """A data set as a stream of tasks, its classes renumbered 0, 1, 2, ... in the order in which they arrive.

    Args:
        name: The benchmark's name.
        tasks: The tasks in order.
        class_names: Name of every class, by new label.
        class_order: Label of every class in the data set, by new label.
        input_shape: Shape of one input, ``(C, H, W)``.
        protocol: The benchmark's protocol.
        mean: By channel, what was subtracted from pixels in [0, 1]; ``None``: nothing.
        std: By channel, what they were divided by after that; ``None``: nothing.
    """

    name: str
    tasks: tuple[Task, ...]
    class_names: tuple[str, ...]
    class_order: tuple[int, ...]
    input_shape: tuple[int, ...]
    protocol: Protocol
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def num_classes(self) -> int:
        """Classes over all tasks."""
        return len(self.class_names)


def stream_of(data: DataConfig) -> TaskStream:
    """The stream that the data section of a configuration describes; :func:`make_stream` says more."""
    return make_stream(
        data.benchmark,
        data.data_dir,
        class_order_seed=data.class_order_seed,
        validation=data.validation,
        tasks=data.tasks,
        normalise=data.normalise,
        rows_per_class=data.rows_per_class,
    )


def make_stream(
    name: str,
    data_dir: str | Path = "data",
    *,
    class_order_seed: int | None = None,
    validation: float = 0.0,
    tasks: int | None = None,
    normalise: bool | None = None,
    rows_per_class: int | None = None,
) -> TaskStream:
    """Reads a benchmark's data and cuts them into its tasks.

    Args:
        name: Key of :data:`BENCHMARKS`.
        data_dir: Where the data sets lie, in the layout torchvision uses; ``split-digits`` needs none.
        class_order_seed: Shuffles the order in which classes arrive; ``None``: the order of their labels.
        validation: If above 0, this share of every class's training rows is held out, evenly spread over the order of
            the data set (the same rows each time), and takes the place of the test rows, which are then not used.
        tasks: Number of tasks, the first ones; classes of later ones are left out. ``None``: the protocol's.
        normalise: Whether pixels are normalised; ``None``: as the protocol has it.
        rows_per_class: Training rows kept of each class, the first ones after the held-out ones are gone; ``None``:
            all of them.

    Returns:
        The stream; rows within a task stand in the order of the data set.

    Raises:
        ValueError: The name is unknown, ``validation`` is outside [0, 1), ``tasks`` or ``rows_per_class`` is out of
            range, or a class is left without training or test rows.
        FileNotFoundError: A data file is missing.
        DataError: A data file is damaged.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(map(repr, BENCHMARKS))}")
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"validation: got {validation}, expected a share in [0, 1)")
    benchmark = BENCHMARKS[name]
    if tasks is not None and not 1 <= tasks <= benchmark.protocol.tasks:
        raise ValueError(f"tasks: got {tasks}, expected 1 to {benchmark.protocol.tasks}, the tasks of {name}")
    if rows_per_class is not None and rows_per_class < 1:
        raise ValueError(f"rows_per_class: got {rows_per_class}, expected at least 1")
    data = DATASETS[benchmark.dataset](data_dir)
    if not (benchmark.protocol.normalise if normalise is None else normalise):
        data = dataclasses.replace(data, mean=None, std=None)
    elif data.mean is None:
        raise ValueError(f"normalise: got True, but no mean and standard deviation are known of {name}")
    return _cut(benchmark, data, class_order_seed, validation, tasks, rows_per_class)


def _cut(
    benchmark: Benchmark,
    data: LabelledImages,
    class_order_seed: int | None = None,
    validation: float = 0.0,
    tasks: int | None = None,
    rows_per_class: int | None = None,
) -> TaskStream:
    protocol, count = benchmark.protocol, len(data.class_names)
    order = np.arange(count)
    if class_order_seed is not None:
        order = np.random.default_rng(class_order_seed).permutation(count)
    new_label = torch.empty(count, dtype=torch.int64)
    new_label[torch.from_numpy(order)] = torch.arange(count)

    train_x, train_y = data.train_x, data.train_y
    test_x, test_y = data.test_x, data.test_y
    if validation > 0.0:
        held_out = _spread(train_y, validation)
        test_x, test_y = train_x[held_out], train_y[held_out]
        train_x, train_y = train_x[~held_out], train_y[~held_out]
    if rows_per_class is not None:
        first = rank_in_class(train_y) < rows_per_class
        train_x, train_y = train_x[first], train_y[first]
    for part, labels in (("training", train_y), ("test" if validation == 0.0 else "validation", test_y)):
        absent = (torch.bincount(labels, minlength=count) == 0).nonzero().squeeze(1).tolist()
        if absent:
            names = ", ".join(data.class_names[label] for label in absent)
            raise ValueError(f"{benchmark.name}: no {part} rows of class {names}")

    train_y, test_y = new_label[train_y], new_label[test_y]
    cut = []
    for index in range(protocol.tasks if tasks is None else tasks):
        start = index * protocol.classes_per_task
        classes = tuple(range(start, start + protocol.classes_per_task))
        train, test = (torch.isin(labels, torch.tensor(classes)) for labels in (train_y, test_y))
        cut.append(
            Task(
                index,
                classes,
                data.to_float(train_x[train]),
                train_y[train],
                data.to_float(test_x[test]),
                test_y[test],
            )
        )
    known = order if tasks is None else order[: tasks * protocol.classes_per_task]
    return TaskStream(
        name=benchmark.name,
        tasks=tuple(cut),
        class_names=tuple(data.class_names[label] for label in known),
        class_order=tuple(int(label) for label in known),
        input_shape=tuple(data.train_x.shape[1:]),
        protocol=protocol,
        mean=data.mean,
        std=data.std,
    )


def _spread(labels: Tensor, share: float) -> Tensor:
    """Marks a share of every class's rows, evenly spread and rounded to the nearest whole number; ``(N,)`` bool."""
    rank = rank_in_class(labels)
    counts = torch.bincount(labels)[labels]
    marked = torch.floor(counts.double() * share + 0.5).to(torch.int64)
    # Row r of n is marked where r * marked / n passes a whole number: exactly `marked` times, evenly.
    steps = torch.div((rank + 1) * marked, counts, rounding_mode="floor")
    return steps > torch.div(rank * marked, counts, rounding_mode="floor")


# ------------------------------------------------------------------------------------------------------ configuration


def resolve(config: TrainConfig) -> TrainConfig:
    """Fills every open field of ``optim`` and ``replay`` from the benchmark's protocol, and checks all ranges.

    Args:
        config: The configuration as the user gave it; unchanged.

    Returns:
        A configuration without ``None`` in ``optim`` and ``replay``. Resolving it again changes nothing.

    Raises:
        ValueError: The benchmark is unknown or a value is out of range; the message names the field.
    """
    name = config.data.benchmark
    if name not in BENCHMARKS:
        raise ValueError(f"data.benchmark: got {name!r}, expected one of {', '.join(map(repr, BENCHMARKS))}")
    protocol = BENCHMARKS[name].protocol
    optim = _filled(
        config.optim,
        model=protocol.model,
        lr=protocol.lr,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
        lr_milestones=protocol.lr_milestones,
        epochs=protocol.epochs,
        batch=protocol.batch,
        augment=protocol.augment,
    )
    # The protocol's size is meant for its own policy: a size per class says nothing about a total.
    size = protocol.buffer_size
    if config.replay.policy is not None and (config.replay.policy == "class") != (protocol.buffer_policy == "class"):
        classes = (config.data.tasks or protocol.tasks) * protocol.classes_per_task
        size = max(1, size // classes) if config.replay.policy == "class" else size * classes
    replay = _filled(config.replay, policy=protocol.buffer_policy, size=size, batch=protocol.replay_batch)
    data = _filled(config.data, normalise=protocol.normalise)
    if data.tasks is not None and data.tasks > protocol.tasks:
        raise ValueError(f"data.tasks: got {data.tasks}, expected at most {protocol.tasks}, the tasks of {name}")
    resolved = dataclasses.replace(config, optim=optim, replay=replay, data=data)
    check(resolved)
    return resolved


def _filled(section: Any, **defaults: Any) -> Any:
    return dataclasses.replace(
        section, **{name: value for name, value in defaults.items() if getattr(section, name) is None}
    )
