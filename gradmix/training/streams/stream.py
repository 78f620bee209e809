"""Streams of tasks: any labelled data set, cut into tasks with new classes each, with sharp or blurred boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor

from gradmix._moved import alias_argument
from gradmix.training.data.class_names import printable
from gradmix.training.data.image_arrays import rank_in_class
from gradmix.training.data.samples import Samples, StoredSamples, TensorSamples, samples_of
from gradmix.training.seeds import generator_for
from gradmix.training.streams.protocols import Protocol


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Args:
        index: Place in the stream, from 0.
        classes: Its classes, by their new labels.
        train: Training samples, of its own classes unless boundaries are blurred.
        test: Test samples, of its own classes.
    """

    index: int
    classes: tuple[int, ...]
    train: Samples
    test: Samples


@dataclass(frozen=True)
class TaskStream:
    """A data set as a stream of tasks, its classes renumbered 0, 1, 2, ... in the order in which they arrive.

    Args:
        name: Its name in results.
        tasks: The tasks in order.
        class_names: Name of every class, by new label.
        class_order: Label of every class in the data set, by new label.
        input_shape: Shape of one sample as the model sees it: ``(C, H, W)``, ``(features,)``, ``(tokens,)``.
        protocol: The settings it is learnt with where the user sets none.
        mean: By channel, what is subtracted from pixels in [0, 1]; ``None``: nothing.
        std: By channel, what they are divided by after that; ``None``: nothing.
        vocabulary: Number of different tokens if samples are token ids ``(T,)`` int64, 0 being none; ``None``: they are
            no text.
    """

    name: str
    tasks: tuple[Task, ...]
    class_names: tuple[str, ...]
    class_order: tuple[int, ...]
    input_shape: tuple[int, ...]
    protocol: Protocol
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    vocabulary: int | None = None

    @property
    def num_classes(self) -> int:
        """Classes over all tasks."""
        return len(self.class_names)

    @property
    def is_read(self) -> bool:
        """Whether samples are read as they are wanted; otherwise they are tensors at hand."""
        return isinstance(self.tasks[0].train, StoredSamples)


@alias_argument("class_incremental", "rows_per_class", "samples_per_class")
def class_incremental(
    train: Any,
    test: Any = None,
    *,
    tasks: int | None = None,
    classes_per_task: int | Sequence[int] | None = None,
    class_order_seed: int | None = None,
    class_names: Sequence[str] | None = None,
    in_memory: bool = False,
    name: str = "custom",
    protocol: Protocol | None = None,
    labels: tuple[Any, Any] | None = None,
    validation: float = 0.0,
    samples_per_class: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    vocabulary: int | None = None,
) -> TaskStream:
    """Cut a data set into a class-incremental stream, for :func:`gradmix.training.loop.trainer.train_one`.

    Args:
        train: Training samples: an ``(x, y)`` pair of tensors or arrays, or any map-style data set of ``(input,
            label)`` with integer labels (:func:`gradmix.training.data.samples.samples_of` says what is understood).
        test: Test samples, likewise; not looked at if ``validation`` is above 0.
        tasks: Number of tasks; classes are shared out as evenly as possible, earlier tasks taking one more. ``None``:
            5, or fewer so that each has two classes.
        classes_per_task: In place of that, new classes in each task: a number (the last task may have fewer), or one
            for each task.
        class_order_seed: Shuffles the order in which classes arrive; ``None``: the order of their labels.
        class_names: Name of every label, by label from 0; ``None``: the data set's attribute ``class_names`` or
            ``classes``, else the labels. Names of labels that no sample has, in training and test alike, are left out.
            Bytes in names that are no UTF-8, as names of folders may have them, become escapes.
        in_memory: Read every item of a data set once, now, and keep it; whatever it draws at random is then settled for
            good. Otherwise items are read when they are wanted, by worker processes.
        name: The stream's name in results.
        protocol: Settings it is learnt with where the configuration leaves them open; ``None``: common ones.
        labels: Labels ``(N,)`` and ``(M,)`` of the two data sets, in place of those found in them.
        validation: If above 0, this share of every class's training samples is held out, evenly spread over the order
            of the data set (the same samples each time), and takes the place of the test samples, which are then not
            used.
        samples_per_class: Training samples kept of each class, the first ones after the held-out ones are gone;
            ``None``: all of them.
        input_shape: Shape of one sample as the model is to see it: images read larger are cropped. ``None``: as read.
        mean: By channel, subtracted from pixels in [0, 1] of images that are uint8; ``None``: nothing.
        std: By channel, what they are divided by after that; ``None``: nothing.
        vocabulary: Number of different tokens if samples are token ids ``(T,)``, 0 being none; ``None``: no text.

    Returns:
        The stream; samples within a task stand in the order of the data set. Labels need not be consecutive.

    Raises:
        ValueError: A number out of range, more tasks than classes, or a class without training or test samples.
        TypeError: ``train`` or ``test`` is no data set of the kind, or labels are no integers.
    """
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"validation: got {validation}, expected a share in [0, 1)")
    if samples_per_class is not None and samples_per_class < 1:
        raise ValueError(f"samples_per_class: got {samples_per_class}, expected at least 1")
    if validation == 0.0 and test is None:
        raise TypeError(
            "test: got None, expected test samples, or validation, the share of training samples in their place"
        )
    given = labels or (None, None)
    sides = {"train": samples_of("train", train, given[0], tokens=vocabulary is not None)}
    if validation == 0.0:
        sides["test"] = samples_of("test", test, given[1], tokens=vocabulary is not None)
    if class_names is None:
        class_names = _names_of(train)
        if "test" in sides:
            _check_same_names(class_names, _names_of(test), sides["test"].y)
    if in_memory:
        sides = {
            side: TensorSamples(samples.read(torch.arange(len(samples))), samples.y) for side, samples in sides.items()
        }
    known = torch.unique(sides["train"].y)
    if class_names is not None:
        if int(known[-1]) >= len(class_names):
            raise ValueError(
                f"class_names: got {len(class_names)} names, expected one for each label up to {int(known[-1])}, those "
                "without samples among them"
            )
        known = torch.unique(torch.cat([samples.y for samples in sides.values()]))
        known = known[known < len(class_names)]
    count, originals = len(known), known.tolist()
    names = [printable(str(label if class_names is None else class_names[label])) for label in originals]
    order = np.arange(count)
    if class_order_seed is not None:
        order = np.random.default_rng(class_order_seed).permutation(count)

    training = sides["train"]
    testing = sides.get("test", training)
    if validation > 0.0:
        held_out = _spread(training.y, validation)
        testing, training = (training.take(part.nonzero().squeeze(1)) for part in (held_out, ~held_out))
    if samples_per_class is not None:
        training = training.take((rank_in_class(training.y) < samples_per_class).nonzero().squeeze(1))
    new_label = torch.from_numpy(np.argsort(order))  # by place in `known`
    renumbered = {}
    for part, samples in (("training", training), ("test" if validation == 0.0 else "validation", testing)):
        places = torch.searchsorted(known, samples.y).clamp(max=count - 1)
        beyond = samples.y[known[places] != samples.y]
        if len(beyond):
            raise ValueError(
                f"{name}: {part} samples of label {int(beyond[0])}, of which there are no training samples"
            )
        y = new_label[places]
        absent = (torch.bincount(y, minlength=count) == 0).nonzero().squeeze(1).tolist()
        if absent:
            raise ValueError(f"{name}: no {part} samples of class {', '.join(names[order[label]] for label in absent)}")
        renumbered[part] = y
    train_y, test_y = renumbered.values()
    groups = class_groups(count, tasks, classes_per_task)
    cut = tuple(
        Task(index, classes, _of_classes(training, train_y, classes), _of_classes(testing, test_y, classes))
        for index, classes in enumerate(groups)
    )
    # Only now, and once: it may take reading a sample.
    shape = training.shape if input_shape is None else input_shape
    return TaskStream(
        name=name,
        tasks=cut,
        class_names=tuple(names[label] for label in order),
        class_order=tuple(originals[label] for label in order),
        input_shape=shape,
        protocol=protocol or Protocol.common(len(shape), vocabulary),
        mean=mean,
        std=std,
        vocabulary=vocabulary,
    )


def class_groups(
    count: int, tasks: int | None = None, classes_per_task: int | Sequence[int] | None = None
) -> tuple[tuple[int, ...], ...]:
    """The classes 0, 1, 2, ... of each task.

    Args:
        count: Number of classes.
        tasks, classes_per_task: as :func:`class_incremental`.

    Raises:
        ValueError: Both are given, a number is out of range, or the numbers do not add up to ``count``.
    """
    if tasks is not None and classes_per_task is not None:
        raise ValueError(f"tasks: got {tasks} beside classes_per_task {classes_per_task}, expected one of the two")
    if classes_per_task is None:
        tasks = min(5, max(1, count // 2)) if tasks is None else tasks
        if not 1 <= tasks <= count:
            raise ValueError(f"tasks: got {tasks}, expected 1 to {count}, the number of classes")
        sizes = [count // tasks + (task < count % tasks) for task in range(tasks)]
    elif isinstance(classes_per_task, int):
        if not 1 <= classes_per_task <= count:
            raise ValueError(f"classes_per_task: got {classes_per_task}, expected 1 to {count}, the number of classes")
        sizes = [min(classes_per_task, count - start) for start in range(0, count, classes_per_task)]
    else:
        sizes = list(classes_per_task)
        if sum(sizes) != count or min(sizes, default=0) < 1:
            raise ValueError(f"classes_per_task: got {sizes}, expected positive numbers that add up to {count} classes")
    starts = np.cumsum([0, *sizes])
    return tuple(tuple(range(start, start + size)) for start, size in zip(starts.tolist(), sizes, strict=False))


def first_tasks(stream: TaskStream, tasks: int | None) -> TaskStream:
    """The stream's first tasks; classes of later ones are left out. ``None``: all of them.

    Raises:
        ValueError: It has fewer.
    """
    if tasks is None:
        return stream
    if not 1 <= tasks <= len(stream.tasks):
        raise ValueError(f"tasks: got {tasks}, expected 1 to {len(stream.tasks)}, the tasks of {stream.name}")
    kept = stream.tasks[:tasks]
    known = sum(len(task.classes) for task in kept)
    return replace(stream, tasks=kept, class_names=stream.class_names[:known], class_order=stream.class_order[:known])


def blur_boundaries(stream: TaskStream, blur: float, seed: int) -> TaskStream:
    """The stream with its training samples in an order in which tasks pass over into each other.

    A sample of task t stands at t + u + blur z in the order, u uniform in [0, 1) and z standard normal, each sample's
    own; the order is cut into as many parts as there were tasks, each of as many samples as the task had. Test samples
    stay.

    Args:
        stream: Any stream.
        blur: Standard deviation, in tasks, above 0. At 0.1 about a sixteenth of the samples of a task stand in
            another's part; from about the number of tasks on there is hardly an order of classes left.
        seed: Seeds the order.

    Returns:
        A stream with the same tasks, whose training samples may be of any classes and stand in the order of arrival.
    """
    if not blur > 0:
        raise ValueError(f"blur: got {blur}, expected a standard deviation above 0, in tasks")
    generator = generator_for(seed, "blur")
    sizes = [len(task.train) for task in stream.tasks]
    task_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    count = len(task_of)
    at = torch.rand(count, generator=generator, dtype=torch.float64)
    at += task_of + blur * torch.randn(count, generator=generator, dtype=torch.float64)
    everything = concatenate([task.train for task in stream.tasks])
    parts = torch.argsort(at, stable=True).split(sizes)
    tasks = tuple(replace(task, train=everything.take(part)) for task, part in zip(stream.tasks, parts, strict=True))
    return replace(stream, tasks=tasks)


def concatenate(parts: Sequence[Samples]) -> Samples:
    """Samples one after the other; stored ones are of one data set."""
    y = torch.cat([part.y for part in parts])
    if all(isinstance(part, TensorSamples) for part in parts):
        return TensorSamples(torch.cat([part.x for part in parts if isinstance(part, TensorSamples)]), y)
    stored = [part for part in parts if isinstance(part, StoredSamples)]
    assert len(stored) == len(parts) and all(part.items is stored[0].items for part in stored)
    return StoredSamples(stored[0].items, y, torch.cat([part.at for part in stored]))


def _names_of(data: Any) -> Sequence[str] | None:
    """Name of every label, where a data set has them."""
    for key in ("class_names", "classes"):
        found = getattr(data, key, None)
        if isinstance(found, (Sequence, np.ndarray)) and len(found):
            return list(found)
    return None


def _check_same_names(train: Sequence[str] | None, test: Sequence[str] | None, labels: Tensor) -> None:
    """Labels of two data sets mean the same classes: folders that were numbered each for itself may not."""
    for label in torch.unique(labels).tolist():
        if train is None or test is None or label >= min(len(train), len(test)):
            return
        if normalize("NFC", str(train[label])) != normalize("NFC", str(test[label])):
            raise ValueError(
                f"test: label {label} is class {str(test[label])!r} there and {str(train[label])!r} in train, expected "
                "one class; class_names tells what labels are if it is"
            )


def _of_classes(samples: Samples, y: Tensor, classes: tuple[int, ...]) -> Samples:
    places = torch.isin(y, torch.tensor(classes)).nonzero().squeeze(1)
    return samples.take(places, y[places])


def _spread(labels: Tensor, share: float) -> Tensor:
    """Mark a share of every class's samples, evenly spread and rounded to the nearest whole number; ``(N,)`` bool."""
    rank = rank_in_class(labels)
    _, where, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    counts = counts[where]
    marked = torch.floor(counts.double() * share + 0.5).to(torch.int64)
    # Sample r of n is marked where r * marked / n passes a whole number: exactly `marked` times, evenly.
    steps = torch.div((rank + 1) * marked, counts, rounding_mode="floor")
    return steps > torch.div(rank * marked, counts, rounding_mode="floor")
