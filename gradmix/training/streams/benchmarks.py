"""Benchmarks: a data set, cut into a stream of tasks with new classes each, and the protocol by which it is learnt."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import Tensor

from gradmix.runtime.validation import did_you_mean
from gradmix.training.config import DataConfig, TrainConfig, check
from gradmix.training.data.arrays import read_arrays
from gradmix.training.data.class_names import printable
from gradmix.training.data.image_arrays import (
    DATASETS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    TINY_IMAGENET_MEAN,
    TINY_IMAGENET_STD,
    LabelledData,
    to_float,
)
from gradmix.training.data.image_layouts import image_folder, imagenet, tiny_imagenet
from gradmix.training.data.samples import TensorSamples
from gradmix.training.data.tabular import covertype, wine
from gradmix.training.data.texts import HashedVocabulary, descriptions, newsgroups20, text_folder
from gradmix.training.streams import Task, TaskStream, class_incremental, first_tasks
from gradmix.training.streams.protocols import Protocol


@dataclass(frozen=True)
class Source:
    """A data set as a benchmark reads it.

    Args:
        train: Training samples, in any form that :func:`~gradmix.training.streams.class_incremental` takes.
        test: Test samples, likewise.
        class_names: Name of every label; ``None``: the training samples say.
        maximum, mean, std: As in :class:`~gradmix.training.data.image_arrays.LabelledData`.
        input_shape: Shape of one sample as the model sees it; ``None``: as it is read.
        vocabulary: Number of different tokens; ``None``: no text.
    """

    train: Any
    test: Any
    class_names: tuple[str, ...] | None = None
    maximum: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_shape: tuple[int, ...] | None = None
    vocabulary: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """A data set and its protocol.

    Args:
        read: Reads the data below a directory, images of files for a model that sees them at so many pixels a side
            (``None``: as the benchmark has it); test samples too, or the training samples alone.
        protocol: The settings.
    """

    read: Callable[[Path, int | None, bool], Source]
    protocol: Protocol


def _in_memory(read: Callable[..., LabelledData], data_dir: Path, _size: int | None, test: bool) -> Source:
    """Samples that are small enough to be kept in memory."""
    data = read(data_dir, test=test)
    train, test_samples = (data.train_x, data.train_y), (data.test_x, data.test_y)
    return Source(train, test_samples, data.class_names, data.maximum, data.mean, data.std)


def _images(dataset: str) -> Callable[[Path, int | None, bool], Source]:
    return partial(_in_memory, lambda data_dir, test: DATASETS[dataset](data_dir, test=test))


@dataclass(frozen=True)
class _Files:
    """Reads images from files when they are wanted.

    Args:
        layout: Finds the files below a folder.
        size: Side in pixels of what the model sees, unless the user sets it.
        mean: By channel, of pixels in [0, 1].
        std: By channel, likewise.
        spare: Whether they are read a little larger than the model sees them.
    """

    layout: Callable[..., tuple[Any, Any]]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    spare: bool = True

    def __call__(self, data_dir: Path, size: int | None, test: bool) -> Source:
        """Read the files of a folder."""
        size = size or self.size
        train, held_out = self.layout(data_dir, size + size // 7 if self.spare else size, test=test)
        return Source(train, held_out, train.class_names, mean=self.mean, std=self.std, input_shape=(3, size, size))


def _texts(read: Callable[..., LabelledData], length: int, data_dir: Path, _size: int | None, test: bool) -> Source:
    """Texts as numbers of words, padded to ``length``."""
    data, vocabulary = read(data_dir, test=test), HashedVocabulary()
    return Source(
        (vocabulary.encode(data.train_x, length), data.train_y),
        (vocabulary.encode(data.test_x, length), data.test_y),
        data.class_names,
        vocabulary=vocabulary.size,
    )


_FOLDER_PROTOCOL = Protocol(
    tasks=None, classes_per_task=None, model="resnet18-imagenet", lr=0.1, weight_decay=1e-4, lr_milestones=(0.5, 0.75),
    epochs=30, batch=64, replay_batch=64, buffer_size=20, augment="resized-crop-flip", normalise=True,
    reference="replayed",
)  # fmt: skip
_TEXT_PROTOCOL = Protocol(
    tasks=None, classes_per_task=None, model="text-transformer", lr=0.05, epochs=10, batch=64, replay_batch=64,
    buffer_size=20, space="embedding",
)  # fmt: skip
_CIFAR_PROTOCOL = Protocol(
    tasks=5, classes_per_task=2, model="resnet18", lr=0.1, epochs=50, batch=128, replay_batch=128, buffer_size=32,
    augment="crop-flip", normalise=True,
)  # fmt: skip
_CIFAR100_PROTOCOL = replace(
    _CIFAR_PROTOCOL, tasks=10, classes_per_task=10, weight_decay=2e-4, lr_milestones=(0.5, 0.75), epochs=200,
    buffer_policy="balanced", buffer_size=2000,
)  # fmt: skip
_TINY_IMAGENET_PROTOCOL = replace(
    _CIFAR_PROTOCOL, tasks=10, classes_per_task=20, weight_decay=2e-4, lr_milestones=(0.5, 0.75), buffer_size=20,
    reference="replayed",
)  # fmt: skip
_TABLE_PROTOCOL = Protocol(
    tasks=None, classes_per_task=None, model="mlp", lr=0.02, epochs=10, batch=16, replay_batch=16, buffer_size=4
)
# What is shown first is a stream in which replayed samples are few, as classes' samples mostly are: there selection has
# an effect that five seeds show.
_DIGITS_PROTOCOL = replace(_TABLE_PROTOCOL, tasks=5, classes_per_task=2, stream="shuffled")
_MNIST_PROTOCOL = Protocol(
    tasks=5, classes_per_task=2, model="mlp", lr=0.01, epochs=5, batch=64, replay_batch=64, buffer_size=32
)

BENCHMARKS: dict[str, Benchmark] = {
    "split-digits": Benchmark(_images("digits"), _DIGITS_PROTOCOL),
    "split-mnist": Benchmark(_images("mnist"), _MNIST_PROTOCOL),
    "split-fashion-mnist": Benchmark(_images("fashion-mnist"), _MNIST_PROTOCOL),
    "split-cifar10": Benchmark(_images("cifar10"), replace(_CIFAR_PROTOCOL, lr=0.01, batch=256, replay_batch=256)),
    "split-cifar100": Benchmark(_images("cifar100"), _CIFAR100_PROTOCOL),
    "split-tiny-imagenet": Benchmark(
        _Files(tiny_imagenet, 64, TINY_IMAGENET_MEAN, TINY_IMAGENET_STD, spare=False), _TINY_IMAGENET_PROTOCOL
    ),
    "split-imagenet": Benchmark(
        _Files(imagenet, 224, IMAGENET_MEAN, IMAGENET_STD),
        replace(_FOLDER_PROTOCOL, tasks=10, classes_per_task=100, model="resnet50", batch=256, replay_batch=256),
    ),
    "image-folder": Benchmark(_Files(image_folder, 224, IMAGENET_MEAN, IMAGENET_STD), _FOLDER_PROTOCOL),
    "split-20newsgroups": Benchmark(
        partial(_texts, newsgroups20, 256), replace(_TEXT_PROTOCOL, tasks=10, classes_per_task=2)
    ),
    "text-folder": Benchmark(partial(_texts, text_folder, 256), _TEXT_PROTOCOL),
    "split-descriptions": Benchmark(
        partial(_texts, lambda _data_dir, test: descriptions(), 16),
        replace(_TEXT_PROTOCOL, tasks=6, classes_per_task=2, epochs=20, batch=16, replay_batch=16, buffer_size=4),
    ),
    "arrays": Benchmark(partial(_in_memory, read_arrays), replace(_MNIST_PROTOCOL, tasks=None, classes_per_task=None)),
    "split-covertype": Benchmark(
        partial(_in_memory, lambda data_dir, test: covertype(data_dir)),
        replace(_MNIST_PROTOCOL, tasks=4, epochs=1, batch=256, replay_batch=256, buffer_size=256),
    ),
    "split-wine": Benchmark(
        partial(_in_memory, lambda _data_dir, test: wine()), replace(_TABLE_PROTOCOL, tasks=3, classes_per_task=1)
    ),
}
"""All benchmarks by name."""


GIVEN = "stream:"
"""What stands before the name of a stream, in place of a benchmark's, that was given by the caller."""


def stream_of(data: DataConfig) -> TaskStream:
    """Read a benchmark's data and cut them into its tasks.

    Where ``benchmark`` is ``package.module:function``, the function is called with the section, and returns the stream.
    Held-out samples (``validation``) are spread evenly over the order of the data set, the same samples each time. They
    take the place of the test samples, which are then not read and need not be there.

    Args:
        data: The data section of a configuration; its fields say what they mean.

    Returns:
        The stream; samples within a task stand in the order of the data set.

    Raises:
        ValueError: The name is unknown, ``validation`` is outside [0, 1), a number is out of range, or a class is left
            without training or test samples.
        TypeError: The function does not return a stream.
        FileNotFoundError: A data file is missing.
        DataError: A data file is damaged.
    """
    name = data.benchmark
    if name.startswith(GIVEN):
        raise ValueError(
            f"data.benchmark: got {name!r}, which stands for a stream that was given to train_one, expected that "
            f"stream, or {_names(name)}"
        )
    if ":" in name:
        return _make_stream(_import_function(name), data)
    if name not in BENCHMARKS:
        raise ValueError(f"name: got {name!r}, expected {_names(name)}")
    if not 0.0 <= data.validation < 1.0:  # before anything is read
        raise ValueError(f"validation: got {data.validation}, expected a share in [0, 1)")
    benchmark = BENCHMARKS[name]
    protocol = benchmark.protocol
    filled = _fill(data, normalise=protocol.normalise, classes_per_task=protocol.classes_per_task)
    most = None if data.classes_per_task is not None else protocol.tasks
    if most is not None and data.tasks is not None and data.tasks > most:
        raise ValueError(f"tasks: got {data.tasks}, expected 1 to {most}, the tasks of {name}")
    source = benchmark.read(Path(data.data_dir), data.image_size, data.validation == 0.0)
    if filled.normalise and source.mean is None:
        raise ValueError(f"normalise: got True, but no mean and standard deviation are known of {name}")
    mean, std = (source.mean, source.std) if filled.normalise else (None, None)
    stream = class_incremental(
        source.train,
        source.test,
        classes_per_task=filled.classes_per_task,
        class_order_seed=data.class_order_seed,
        class_names=source.class_names,
        name=name,
        protocol=protocol,
        validation=data.validation,
        samples_per_class=data.samples_per_class,
        input_shape=source.input_shape,
        mean=mean,
        std=std,
        vocabulary=source.vocabulary,
    )
    if source.class_names is not None and stream.num_classes < len(source.class_names):
        absent = [printable(each) for label, each in enumerate(source.class_names) if label not in stream.class_order]
        raise ValueError(f"{name}: no samples of class {', '.join(absent)}")
    stream = first_tasks(stream, data.tasks)
    maximum = source.maximum
    return stream if maximum is None else _as_floats(stream, lambda x: to_float(x, maximum, mean, std))


def make_stream(name: str, data_dir: str | Path = "data", **settings: Any) -> TaskStream:
    """Read a benchmark's data and cut them into its tasks: :func:`stream_of` of a data section made here.

    Args:
        name: Key of :data:`BENCHMARKS`.
        data_dir: Where the data lie; ``split-digits`` needs none.
        settings: Fields of :class:`~gradmix.training.config.DataConfig`, such as ``validation`` or ``tasks``.
    """
    return stream_of(DataConfig(name, Path(data_dir), **settings))


def _as_floats(stream: TaskStream, convert: Callable[[Tensor], Tensor]) -> TaskStream:
    """The stream with raw values made the model's input, task by task: a copy of all at once is not needed."""

    def convert_task(task: Task) -> Task:
        assert isinstance(task.train, TensorSamples) and isinstance(task.test, TensorSamples)
        train, test = (TensorSamples(convert(samples.x), samples.y) for samples in (task.train, task.test))
        return replace(task, train=train, test=test)

    return replace(stream, tasks=tuple(convert_task(task) for task in stream.tasks))


@lru_cache(maxsize=1)
def _make_stream(function: Callable[[DataConfig], Any], data: DataConfig) -> TaskStream:
    """Call the function once, for the protocol and for the samples: it may read much."""
    stream = function(data)
    if not isinstance(stream, TaskStream):
        raise TypeError(
            f"data.benchmark: {data.benchmark} returned {type(stream).__name__}, expected a TaskStream, such as "
            "gradmix.training.streams.class_incremental makes it"
        )
    return stream


def _import_function(path: str) -> Callable[[DataConfig], Any]:
    """The function named ``package.module:function``."""
    module, _, name = path.partition(":")
    try:
        found: Any = attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"data.benchmark: {path} was not found ({error}), expected package.module:function") from error
    if not callable(found):
        raise ValueError(f"data.benchmark: {path} is of type {type(found).__name__}, expected a function")
    return found  # type: ignore[no-any-return]


def _names(name: str) -> str:
    return f"one of {', '.join(map(repr, BENCHMARKS))}, or package.module:function{did_you_mean(name, BENCHMARKS)}"


# ------------------------------------------------------------------------------------------------------ configuration


def resolve(config: TrainConfig, stream: TaskStream | None = None) -> TrainConfig:
    """Fill every open field of ``optim`` and ``replay`` from the stream's protocol, and check all ranges.

    Args:
        config: The configuration as the user gave it; unchanged.
        stream: The stream that it is for. ``None``: the benchmark's; one that comes from a function is made for it.

    Returns:
        A configuration without ``None`` in ``optim`` and ``replay``, but where that has a meaning of its own. Resolving
        it again changes nothing.

    Raises:
        ValueError: The benchmark is unknown or a value is out of range; the message names the field.
    """
    name = config.data.benchmark
    if stream is None and ":" in name:
        stream = stream_of(config.data)
    elif stream is not None and ":" not in name and name != stream.name:
        config = replace(config, data=replace(config.data, benchmark=GIVEN + stream.name))
    if stream is None and name not in BENCHMARKS:
        raise ValueError(f"data.benchmark: got {name!r}, expected {_names(name)}")
    protocol = BENCHMARKS[name].protocol if stream is None else stream.protocol
    names = ("model", "lr", "momentum", "weight_decay", "lr_milestones", "epochs", "batch", "augment")
    defaults = {name: getattr(protocol, name) for name in names}
    if config.data.online:
        defaults["epochs"] = 1
    optim = _fill(config.optim, **defaults)
    # The protocol's size is meant for its own policy: a size per class says nothing about a total.
    size = protocol.buffer_size
    by_class = config.replay.policy == "class"
    other = config.replay.policy is not None and by_class != (protocol.buffer_policy == "class")
    if other and config.replay.size is None:
        classes = _number_of_classes(config.data, protocol, stream)
        size = max(1, size // classes) if by_class else size * classes
    # Which of a step's samples are replayed ones is known in fixed numbers only.
    fixed = config.data.online or config.mix.candidates == "replayed"
    replay = _fill(
        config.replay,
        policy=protocol.buffer_policy,
        size=size,
        batch=protocol.replay_batch,
        stream="dual" if fixed else protocol.stream,
    )
    data = _fill(config.data, normalise=protocol.normalise)
    mix = _fill(config.mix, space=protocol.space)
    if mix.reference in (None, "auto"):
        mix = replace(mix, reference=protocol.reference or mix.reference)
    most = None if stream is not None or data.classes_per_task is not None else protocol.tasks
    if most is not None and data.tasks is not None and data.tasks > most:
        raise ValueError(f"data.tasks: got {data.tasks}, expected at most {most}, the tasks of {name}")
    resolved = replace(config, optim=optim, replay=replay, data=data, mix=mix)
    check(resolved)
    return resolved


def _number_of_classes(data: DataConfig, protocol: Protocol, stream: TaskStream | None) -> int:
    if stream is not None:
        return stream.num_classes
    per_task = data.classes_per_task or protocol.classes_per_task
    tasks = data.tasks or protocol.tasks
    if per_task is None or tasks is None:
        raise ValueError(
            "replay.size: got nothing with another replay.policy than the benchmark's, expected a number of samples: "
            f"how many classes {data.benchmark} has is known only when it is read"
        )
    return tasks * per_task


def _fill(section: Any, **defaults: Any) -> Any:
    return replace(section, **{name: value for name, value in defaults.items() if getattr(section, name) is None})
