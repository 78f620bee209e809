"""Any labelled data set as a stream of tasks: what is understood, where every row arrives, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset

from gradmix.training.data.samples import Inputs, StoredSamples, TensorSamples, samples_of
from gradmix.training.streams import (
    TaskStream,
    blur_boundaries,
    class_groups,
    class_incremental,
    concatenate,
    first_tasks,
)
from gradmix.training.streams.protocols import Protocol

# Not consecutive, not in order, and of unequal numbers.
LABELS = torch.tensor([7, 3, 7, 20, 3, 11, 20, 20, 7, 3, 11, 3, 40, 40, 20])
ORIGINALS = [3, 7, 11, 20, 40]


def rows(labels: Tensor = LABELS, start: int = 0) -> tuple[Tensor, Tensor]:
    """Rows (N, 2) that hold their own number."""
    return torch.arange(start, start + len(labels)).float().unsqueeze(1).expand(-1, 2).clone(), labels


TRAIN, TEST = rows(), rows(LABELS.unique(), start=100)


class Items:
    """A data set as users write it; counts how often each item is read."""

    def __init__(self, x: Any, of: Any, **named: Any) -> None:
        self.x, self.y_of = x, of
        self.reads: list[int] = []
        vars(self).update(named)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.reads.append(index)
        return self.x[index], None if self.y_of is None else self.y_of[index]


class Alone(Items):
    """Items that are inputs alone."""

    def __getitem__(self, index: int) -> Any:
        return self.x[index]


class Readers(torch.utils.data.Dataset):
    """A ``Dataset`` of torch's, whose labels are numbers of Python's."""

    def __len__(self) -> int:
        return len(TRAIN[1])

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return TRAIN[0][index].numpy(), int(TRAIN[1][index])


class InARow(IterableDataset):
    """Items that cannot be asked for by their place."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def locked(x: Tensor) -> np.ndarray:
    array = x.numpy().copy()
    array.flags.writeable = False
    return array


def whole(stream: TaskStream, side: str = "train") -> tuple[list[int], list[int]]:
    """Numbers of all rows of a stream and the labels that they had in the data set."""
    numbers, labels = [], []
    for task in stream.tasks:
        part = getattr(task, side)
        numbers += part.read(torch.arange(len(part)))[:, 0].long().tolist()
        labels += [stream.class_order[label] for label in part.y.tolist()]
        assert part.y.dtype == torch.int64
    return numbers, labels


# ---------------------------------------------------------------------------------------------- what is a data set

FORMS = {
    "tensors": lambda: TRAIN,
    "a list of two": lambda: list(TRAIN),
    "arrays": lambda: (TRAIN[0].numpy(), TRAIN[1].numpy()),
    "arrays that are locked": lambda: (locked(TRAIN[0]), locked(TRAIN[1])),
    "labels of another width": lambda: (TRAIN[0].numpy(), TRAIN[1].numpy().astype(np.uint8)),
    "labels of 16 bits, big end first": lambda: (TRAIN[0], TRAIN[1].numpy().astype(">i2")),
    "TensorDataset": lambda: TensorDataset(*TRAIN),
    "Dataset without labels of its own": Readers,
    "items with 0-d labels": lambda: Items(*TRAIN),
    "items with reversed arrays": lambda: Items(TRAIN[0].numpy()[:, ::-1], TRAIN[1].tolist()),
    "items of the other byte order": lambda: Items(TRAIN[0].numpy().astype(">f4"), TRAIN[1].numpy()),
    "items with locked arrays": lambda: Items(locked(TRAIN[0]), locked(TRAIN[1])),
    "items with targets": lambda: Items(TRAIN[0], None, targets=TRAIN[1].tolist()),
    "items with labels": lambda: Items(TRAIN[0], None, labels=TRAIN[1]),
    "inputs alone": lambda: Alone(TRAIN[0], None, y=TRAIN[1].numpy()),
    "Subset": lambda: Subset(Items(*rows(LABELS.repeat(2))), range(len(LABELS))),
}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_data_set_makes_the_same_stream(form: str, in_memory: bool) -> None:
    data = FORMS[form]()
    stream = class_incremental(data, TEST, tasks=2, in_memory=in_memory)
    stored = not isinstance(data, (tuple, list, TensorDataset))
    assert stream.is_read is (stored and not in_memory)
    numbers, labels = whole(stream)
    assert sorted(numbers) == list(range(len(LABELS)))
    assert labels == [int(LABELS[number]) for number in numbers]
    assert [task.classes for task in stream.tasks] == [(0, 1, 2), (3, 4)]
    for task in stream.tasks:
        assert set(task.train.y.tolist()) == set(task.test.y.tolist()) == set(task.classes)
        read = task.train.read(torch.arange(len(task.train)))
        assert read.dtype == torch.float32 and read.shape == (len(task.train), 2)
        assert read[:, 0].tolist() == sorted(read[:, 0].tolist()), "in the order of the data set"
    assert (stream.class_order, stream.num_classes, stream.input_shape) == (tuple(ORIGINALS), 5, (2,))
    assert stream.class_names == ("3", "7", "11", "20", "40") and stream.name == "custom"


def test_an_item_is_read_for_its_label_only_where_nothing_tells_it() -> None:
    with_targets, without = Items(TRAIN[0], None, targets=TRAIN[1]), Items(*TRAIN)
    class_incremental(with_targets, TEST)
    class_incremental(without, TEST)
    assert len(with_targets.reads) <= 1, "for the shape"
    assert without.reads[:15] == list(range(15)) and len(without.reads) <= 16
    given = Items(TRAIN[0], None)
    stream = class_incremental(given, TEST, labels=(TRAIN[1], None))
    assert len(given.reads) <= 1
    assert whole(stream)[1] == [int(LABELS[number]) for number in whole(stream)[0]]


def test_given_labels_take_the_place_of_those_found() -> None:
    other = (LABELS == 3).long()
    stream = class_incremental((TRAIN[0], LABELS), (TRAIN[0], LABELS), labels=(other, other), tasks=2)
    assert stream.class_order == (0, 1)
    numbers, labels = whole(stream)
    assert labels == [int(other[number]) for number in numbers]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_pillow_images_become_bytes_by_channel(mode: str) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
    image = image_module.fromarray(pixels).convert(mode)
    read = Inputs([(image, 0)])[0]
    expected = np.array(image, dtype=np.uint8)
    expected = expected[None] if expected.ndim == 2 else expected.transpose(2, 0, 1)
    assert read.dtype == torch.uint8 and read.is_contiguous() and np.array_equal(read.numpy(), expected)
    read += 1
    assert np.array_equal(np.array(image, dtype=np.uint8).reshape(-1), np.moveaxis(expected, 0, -1).reshape(-1))


REFUSED_ROWS = {
    "a dictionary": ({"x": 1}, None, TypeError, "data: got dict, expected an (x, y) pair"),
    "text": ("rows", None, TypeError, "data: got str, expected an (x, y) pair"),
    "one tensor": (torch.zeros(3, 2), torch.zeros(3).long(), TypeError, "data: got Tensor, expected an (x, y) pair"),
    "lists": (([1.0], [1]), None, TypeError, "data: got tuple, expected an (x, y) pair of tensors"),
    "labels as text": ((torch.zeros(2, 1), np.array(["a", "b"])), None, TypeError, "dtype <U1, expected integers"),
    "three tensors": ((torch.zeros(1),) * 3, None, TypeError, "data: got tuple"),
    "items in a row": (InARow(), None, TypeError, "data: got InARow, expected an (x, y) pair"),
    "labels that are shares": ((torch.zeros(2, 1), torch.zeros(2)), None, TypeError, "dtype torch.float32, expected i"),
    "labels that are flags": ((torch.zeros(2, 1), torch.ones(2).bool()), None, TypeError, "dtype torch.bool, expected"),
    "label vectors": ((torch.zeros(2, 1), torch.zeros(2, 3).long()), None, ValueError, "shape (2, 3), expected (2,)"),
    "too few labels": ((torch.zeros(2, 1), torch.zeros(1).long()), None, ValueError, "shape (1,), expected (2,)"),
    "a negative label": ((torch.zeros(2, 1), torch.tensor([0, -1])), None, ValueError, "got the label -1, expected"),
    "no samples": ((torch.zeros(0, 1), torch.zeros(0).long()), None, ValueError, "data: got no samples"),
    "no items": (Items([], []), None, ValueError, "data: got no samples"),
    "names for labels": (Items([1.0, 2.0], ["cat", "dog"]), None, TypeError, "data: got labels of dtype"),
    "given labels too few": (Items([1.0, 2.0], None), [1], ValueError, "shape (1,), expected (2,)"),
}


@pytest.mark.parametrize("case", REFUSED_ROWS)
def test_what_is_no_data_set_is_refused(case: str) -> None:
    data, labels, kind, message = REFUSED_ROWS[case]
    with pytest.raises(kind, match=re.escape(message)):
        samples_of("data", data, labels)


def test_an_input_of_another_kind_is_refused_when_it_is_read() -> None:
    with pytest.raises(TypeError, match="sample 1: got an input of type str, expected a tensor, an array or a Pillow"):
        Inputs([(torch.zeros(1), 0), ("text", 1)])[1]


@pytest.mark.parametrize("kind", [TensorSamples, StoredSamples])
def test_rows_without_their_labels_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="got 3 .*, expected 2 as there are labels"):
        kind(torch.zeros(3, 1), torch.zeros(2).long(), *([torch.arange(3)] if kind is StoredSamples else []))


def test_taken_rows_keep_or_change_their_labels() -> None:
    for source in (TensorSamples(*TRAIN), StoredSamples(Inputs(TRAIN[0]), TRAIN[1])):
        taken = source.take(torch.tensor([4, 0, 4]))
        assert taken.y.tolist() == [3, 7, 3] and taken.read(torch.tensor([2, 1]))[:, 0].tolist() == [4, 0]
        again = taken.take(torch.tensor([1]), torch.tensor([5]))
        assert again.y.tolist() == [5] and again.read(torch.tensor([0]))[0, 0] == 0 and again.shape == (2,)


# ------------------------------------------------------------------------------------------------ classes and tasks

GROUPS = {
    "nothing said, few classes": (5, {}, [3, 2]),
    "nothing said, one class": (1, {}, [1]),
    "nothing said, many": (23, {}, [5, 5, 5, 4, 4]),
    "one task": (4, {"tasks": 1}, [4]),
    "a task each": (4, {"tasks": 4}, [1, 1, 1, 1]),
    "uneven": (7, {"tasks": 3}, [3, 2, 2]),
    "a number": (7, {"classes_per_task": 3}, [3, 3, 1]),
    "a number that fits": (6, {"classes_per_task": 3}, [3, 3]),
    "all at once": (6, {"classes_per_task": 6}, [6]),
    "one for each": (7, {"classes_per_task": [1, 4, 2]}, [1, 4, 2]),
}


@pytest.mark.parametrize("case", GROUPS)
def test_classes_are_shared_out(case: str) -> None:
    count, options, sizes = GROUPS[case]
    groups = class_groups(count, **options)
    assert [len(group) for group in groups] == sizes
    assert [label for group in groups for label in group] == list(range(count))


REFUSED_GROUPS = {
    "both": ({"tasks": 2, "classes_per_task": 2}, "tasks: got 2 beside classes_per_task 2, expected one of the two"),
    "no task": ({"tasks": 0}, "tasks: got 0, expected 1 to 5, the number of classes"),
    "too many tasks": ({"tasks": 6}, "tasks: got 6, expected 1 to 5"),
    "no class": ({"classes_per_task": 0}, "classes_per_task: got 0, expected 1 to 5"),
    "too many classes": ({"classes_per_task": 6}, "classes_per_task: got 6, expected 1 to 5"),
    "do not add up": ({"classes_per_task": [2, 2]}, "classes_per_task: got [2, 2], expected positive numbers that add"),
    "an empty task": ({"classes_per_task": [5, 0]}, "classes_per_task: got [5, 0], expected positive numbers"),
    "no numbers": ({"classes_per_task": []}, "classes_per_task: got [], expected positive numbers"),
    "validation": ({"validation": 1.0}, "validation: got 1.0, expected a share in [0, 1)"),
    "rows": ({"samples_per_class": 0}, "samples_per_class: got 0, expected at least 1"),
    "names": ({"class_names": ["a"] * 40}, "class_names: got 40 names, expected one for each label up to 40"),
}


@pytest.mark.parametrize("case", REFUSED_GROUPS)
def test_settings_out_of_range_are_refused(case: str) -> None:
    options, message = REFUSED_GROUPS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        class_incremental(TRAIN, TEST, **options)


def test_the_order_of_classes_is_drawn_from_its_seed() -> None:
    orders = [class_incremental(TRAIN, TEST, class_order_seed=seed).class_order for seed in (None, 0, 0, 1, 2)]
    assert orders[0] == tuple(ORIGINALS) and orders[1] == orders[2]
    assert len(set(orders)) > 2 and all(sorted(order) == ORIGINALS for order in orders)
    names = [f"class {label}" for label in range(5)]
    compact = torch.searchsorted(torch.tensor(ORIGINALS), LABELS)
    stream = class_incremental((TRAIN[0], compact), (TEST[0], torch.arange(5)), class_names=names, class_order_seed=2)
    assert stream.class_names == tuple(names[label] for label in stream.class_order)
    for side, truth in (("train", compact), ("test", torch.arange(5))):
        numbers, labels = whole(stream, side)
        assert labels == [int(truth[number % 100]) for number in numbers]


@pytest.mark.parametrize("attribute", ["class_names", "classes"])
def test_names_are_found_in_the_data_set(attribute: str) -> None:
    compact = torch.searchsorted(torch.tensor(ORIGINALS), LABELS)
    data = Items(TRAIN[0], None, targets=compact, **{attribute: tuple("abcde")})
    assert class_incremental(data, (TEST[0], torch.arange(5))).class_names == tuple("abcde")
    assert class_incremental(data, (TEST[0], torch.arange(5)), class_names="vwxyz").class_names == tuple("vwxyz")


def test_classes_that_are_on_one_side_only_are_named() -> None:
    with pytest.raises(ValueError, match=re.escape("test samples of label 41, of which there are no training samples")):
        class_incremental(TRAIN, rows(torch.tensor([*ORIGINALS, 41])))
    with pytest.raises(ValueError, match=re.escape("test samples of label 8, of which there are no training samples")):
        class_incremental(TRAIN, rows(torch.tensor([*ORIGINALS, 8])))
    with pytest.raises(ValueError, match=re.escape("custom: no test samples of class 7, 40")):
        class_incremental(TRAIN, rows(torch.tensor([3, 11, 20])))


def test_validation_takes_the_place_of_the_test_rows() -> None:
    stream = class_incremental(TRAIN, rows(torch.tensor([99])), validation=0.5, samples_per_class=1)
    held, kept = whole(stream, "test"), whole(stream, "train")
    assert not set(held[0]) & set(kept[0]) and max(held[0]) < len(LABELS), "the test samples are not used"
    assert sorted(kept[1]) == ORIGINALS, "one sample of each class"
    total = torch.bincount(LABELS)
    assert torch.bincount(torch.tensor(held[1])).tolist() == torch.floor(total * 0.5 + 0.5).long().tolist()
    for number, label in zip(*kept, strict=True):
        left = [row for row in range(len(LABELS)) if LABELS[row] == label and row not in held[0]]
        assert number == left[0], "the first one that is left"
    with pytest.raises(ValueError, match="no validation samples of class 11, 40"):
        class_incremental(TRAIN, TEST, validation=0.2)


def test_in_memory_settles_what_is_drawn_at_random() -> None:
    class Noisy(Items):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(2), self.y_of[index]

    data = Noisy(*TRAIN, targets=TRAIN[1])
    kept = class_incremental(data, TEST, in_memory=True).tasks[0].train
    read = class_incremental(data, TEST).tasks[0].train
    place = torch.tensor([0, 1])
    assert torch.equal(kept.read(place), kept.read(place)) and not torch.equal(read.read(place), read.read(place))


def test_the_common_protocol_suits_the_rows() -> None:
    y = torch.arange(4).repeat(2)
    for x, options, model, space in (
        (torch.zeros(8, 3, 8, 8), {}, "resnet18", None),
        (torch.zeros(8, 6), {}, "mlp", None),
        (torch.zeros(8, 6).long(), {"vocabulary": 9}, "text-transformer", "embedding"),
    ):
        stream = class_incremental((x, y), (x, y), **options)
        assert (stream.protocol.model, stream.protocol.space) == (model, space)
        assert stream.input_shape == tuple(x.shape[1:]) and stream.vocabulary == options.get("vocabulary")
    own = Protocol(None, None, "mlp", 0.5, 1, 2, 3, 4)
    stream = class_incremental(
        (x, y), (x, y), protocol=own, name="own", input_shape=(3, 4, 4), mean=(0.1,) * 3, std=(2.0,) * 3
    )
    assert (stream.protocol, stream.name, stream.input_shape) == (own, "own", (3, 4, 4))
    assert (stream.mean, stream.std) == ((0.1,) * 3, (2.0,) * 3)


def test_the_first_tasks_alone() -> None:
    stream = class_incremental(TRAIN, TEST, classes_per_task=[2, 1, 2], class_order_seed=3)
    assert first_tasks(stream, None) is stream
    two = first_tasks(stream, 2)
    assert two.tasks == stream.tasks[:2] and two.num_classes == 3
    assert two.class_order == stream.class_order[:3] and two.class_names == stream.class_names[:3]
    for tasks in (0, 4):
        with pytest.raises(ValueError, match=f"tasks: got {tasks}, expected 1 to 3, the tasks of custom"):
            first_tasks(stream, tasks)


# --------------------------------------------------------------------------------------------- blurred boundaries

PER_TASK = 3000


@pytest.fixture(scope="module")
def large() -> TaskStream:
    """Three tasks of as many rows each, and a smaller one."""
    y = torch.repeat_interleave(torch.arange(8), torch.tensor([PER_TASK // 2] * 6 + [200, 100]))
    return class_incremental(rows(y), rows(torch.arange(8)), tasks=4)


def strays(stream: TaskStream) -> list[float]:
    """Share of the rows of each task's part that are of another task's classes."""
    return [float((~torch.isin(task.train.y, torch.tensor(task.classes))).float().mean()) for task in stream.tasks]


@pytest.mark.parametrize("stored", [False, True])
def test_every_row_arrives_once_where_boundaries_are_blurred(stored: bool) -> None:
    data = Items(*TRAIN, targets=TRAIN[1]) if stored else TRAIN
    sharp = class_incremental(data, TEST, tasks=3, class_order_seed=1)
    stream = blur_boundaries(sharp, 0.7, 5)
    assert stream.is_read is stored
    numbers, labels = whole(stream)
    assert sorted(numbers) == list(range(len(LABELS))) and numbers != sorted(numbers)
    assert labels == [int(LABELS[number]) for number in numbers]
    for task, before in zip(stream.tasks, sharp.tasks, strict=True):
        assert len(task.train) == len(before.train) and task.test is before.test and task.classes == before.classes
    assert numbers == whole(blur_boundaries(sharp, 0.7, 5))[0] != whole(blur_boundaries(sharp, 0.7, 6))[0]
    assert numbers != whole(blur_boundaries(sharp, 0.1, 5))[0]
    other = blur_boundaries(class_incremental(TRAIN, TEST, tasks=3, class_order_seed=1), 0.7, 5)
    assert numbers == whole(other)[0], "samples that are read stand where samples in memory do"


def test_how_many_rows_stray(large: TaskStream) -> None:
    assert strays(large) == [0, 0, 0, 0]
    # A part in the middle has two boundaries, over each of which half of E|z| blur rows pass, either way: at 0.1 a
    # twelfth, by either's standard deviation of a few in a thousand.
    at_a_tenth = strays(blur_boundaries(large, 0.1, 0))[1]
    assert at_a_tenth == pytest.approx(2 * 0.1 * (2 / np.pi) ** 0.5 / 2, abs=0.015)
    tiny, small, wide, none_left = (strays(blur_boundaries(large, blur, 0))[1] for blur in (1e-9, 0.1, 0.5, 50.0))
    assert tiny == 0 < small < wide < none_left
    assert none_left == pytest.approx(1 - PER_TASK / (3 * PER_TASK + 300), abs=0.03), "hardly an order of classes"
    # Rows move within their task, too.
    assert whole(blur_boundaries(large, 1e-9, 0))[0] != whole(large)[0]


@pytest.mark.parametrize("blur", [0.0, -1.0, float("nan")])
def test_a_blur_that_is_none_is_refused(blur: float, large: TaskStream) -> None:
    with pytest.raises(ValueError, match="blur: got .*, expected a standard deviation above 0, in tasks"):
        blur_boundaries(large, blur, 0)


def test_rows_of_several_parts_one_after_the_other() -> None:
    stored = StoredSamples(Inputs(TRAIN[0]), TRAIN[1])
    for source in (TensorSamples(*TRAIN), stored):
        both = concatenate(
            [source.take(torch.tensor([3, 1])), source.take(torch.tensor([], dtype=torch.int64)), source]
        )
        assert len(both) == 2 + len(LABELS) and both.y[:3].tolist() == [20, 3, 7]
        assert both.read(torch.tensor([0, 2]))[:, 0].tolist() == [3, 0]
