"""Labels are those that items give, whatever attributes a data set has; what is no item of two is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from gradmix.training.data.image_files import DamagedImageError
from gradmix.training.data.samples import Inputs, samples_of
from gradmix.training.streams import class_incremental

RAW = [0, 1, 2, 3, 2, 3, 0, 1]
HALVED = [label // 2 for label in RAW]


class Kept(Dataset[Any]):
    """Items (input, label) beside raw labels under some name, as data sets of libraries have them."""

    def __init__(self, items: Any, kept: Any = RAW, under: str = "targets", **named: Any) -> None:
        self.items, self.reads = items, 0
        vars(self).update({under: kept, **named})

    def __len__(self) -> int:
        return len(RAW)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        label = self.items(index) if callable(self.items) else self.items[index]
        return torch.full((3, 2, 2), float(index)), label


def halve(label: int) -> int:
    return label // 2


def late(index: int) -> int:
    """Another label for one row alone, which is the last of its raw label."""
    return 9 if index == 7 else RAW[index]


TRANSFORMED = {
    "targets": lambda: Kept(HALVED),
    "labels": lambda: Kept(HALVED, under="labels"),
    "y, as a tensor": lambda: Kept(HALVED, torch.tensor(RAW), "y"),
    "labels that no reader knows": lambda: Kept(HALVED, under="_labels"),
    "targets and a transform": lambda: Kept(HALVED, target_transform=halve),
    "a part of it": lambda: Subset(Kept(HALVED), range(8)),
    "a part of a part": lambda: Subset(Subset(Kept(HALVED), range(8)), range(8)),
    "two parts, one after the other": lambda: ConcatDataset([Subset(Kept(HALVED), r) for r in (range(3), range(3, 8))]),
    "targets that are texts": lambda: Kept(HALVED, list("abcdefgh")),
    "targets of the classes": lambda: Kept(HALVED, [0, 1]),
    "targets that are names": lambda: Kept(HALVED, ["low", "high"]),
    "labels as tensors": lambda: Kept([torch.tensor(label) for label in HALVED]),
    "labels as tensors of one": lambda: Kept([torch.tensor([label]) for label in HALVED]),
    "labels as arrays of one": lambda: Kept([np.array([label]) for label in HALVED]),
    "labels as numpy's integers": lambda: Kept([np.uint8(label) for label in HALVED]),
    "labels of several kinds": lambda: Kept([torch.tensor(0), np.int64(0), 1, [1][0], np.array([1]), 1, 0, 0]),
}


@pytest.mark.parametrize("case", TRANSFORMED)
def test_labels_are_those_that_items_give(case: str) -> None:
    data = TRANSFORMED[case]()
    rows = samples_of("data", data)
    assert rows.y.tolist() == HALVED and rows.y.dtype == torch.int64
    assert [int(rows.read(torch.tensor([place]))[0, 0, 0, 0]) for place in range(8)] == list(range(8))
    stream = class_incremental(data, data, tasks=2)
    assert stream.class_order == (0, 1)
    assert [sorted(int(x) for x in task.train.read(torch.arange(4))[:, 0, 0, 0]) for task in stream.tasks] == [
        [0, 1, 6, 7],
        [2, 3, 4, 5],
    ]


def test_a_class_derived_from_tensor_dataset_gives_its_own_items() -> None:
    class Halved(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + 1, int(y) // 2

    rows = samples_of("data", Halved(torch.arange(8.0)[:, None], torch.tensor(RAW)))
    assert rows.y.tolist() == HALVED and rows.read(torch.tensor([3])).item() == 4


CONTRADICTING = {
    "flags": (lambda: Kept([label > 1 for label in RAW]), "dtype bool"),
    "fractions": (lambda: Kept([label / 2 for label in RAW]), "dtype float64"),
    "shares of a transform": (lambda: Kept([torch.rand(4)] * 8, target_transform=halve), "."),
}


@pytest.mark.parametrize("case", CONTRADICTING)
def test_labels_that_contradict_the_attribute_and_are_none_are_refused(case: str) -> None:
    make, message = CONTRADICTING[case]
    with pytest.raises((TypeError, ValueError), match=f"data: got labels of .*{message}"):
        samples_of("data", make())


AGREEING = {
    "the same": lambda: Kept(RAW),
    "the same, with a place for a transform": lambda: Kept(RAW, target_transform=None),
    "a column": lambda: Kept([np.array([label]) for label in RAW], np.array(RAW)[:, None], "labels"),
    "the same as floats": lambda: Kept([float(label) for label in RAW]),
    "items that say nothing": lambda: Kept([None] * 8),
    "items that say something else": lambda: Kept([{"box": 1}] * 8),
    "items of shares": lambda: Kept([torch.rand(4)] * 8),
}


@pytest.mark.parametrize("case", AGREEING)
def test_labels_at_hand_spare_most_reading(case: str) -> None:
    data = AGREEING[case]()
    assert samples_of("data", data).y.tolist() == RAW
    assert data.reads <= 1 + len(set(RAW))


def test_a_transform_is_asked_for_every_label() -> None:
    assert samples_of("data", Kept(late, target_transform=late)).y.tolist() == [*RAW[:-1], 9]


def test_a_large_data_set_is_asked_a_few_times() -> None:
    class Large(Kept):
        def __len__(self) -> int:
            return 10_000

    large = Large(lambda index: index % 500, [index % 500 for index in range(10_000)])
    assert samples_of("data", large).y.tolist() == [index % 500 for index in range(10_000)]
    assert large.reads <= 20
    shifted = Large(lambda index: index % 500 // 2, [index % 500 for index in range(10_000)])
    assert samples_of("data", shifted).y.tolist() == [index % 500 // 2 for index in range(10_000)]


def test_a_damaged_item_leaves_what_the_attribute_says() -> None:
    class Damaged(Kept):
        def __getitem__(self, index: int) -> Any:
            if index in (0, 2):
                raise DamagedImageError(f"sample {index} is damaged")
            return super().__getitem__(index)

    assert samples_of("data", Damaged(RAW)).y.tolist() == RAW
    with pytest.raises(DamagedImageError, match="sample 0 is damaged"):
        samples_of("data", Damaged(HALVED, target_transform=halve))


class Samples(Dataset[Any]):
    def __init__(self, row: Any, **named: Any) -> None:
        self.row = row
        vars(self).update(named)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self.row(index)


def picture(index: int) -> Tensor:
    return torch.full((3, 2, 2), float(index))


REFUSED = {
    "dictionaries": (
        lambda: Samples(lambda i: {"pixel_values": picture(i), "label": i % 4}),
        "data: got an item of type dict with the keys 'pixel_values', 'label', expected (input, label)",
    ),
    "dictionaries, labels apart": (
        lambda: Samples(lambda i: {"image": picture(i)}, labels=RAW),
        "data: got an item of type dict with the keys 'image', expected (input, label)",
    ),
    "numbers first": (
        lambda: Samples(lambda i: (i, picture(i), i % 4)),
        "data: got an item of 3 entries, expected (input, label)",
    ),
    "numbers first as tensors, labels apart": (
        lambda: Samples(lambda i: (torch.tensor([float(i)]), picture(i), i % 4), targets=RAW),
        "data: got an item of 3 entries, expected (input, label)",
    ),
    "tasks last": (lambda: Samples(lambda i: [picture(i), i % 4, 0]), "data: got an item of 3 entries"),
    "three tensors": (
        lambda: TensorDataset(torch.arange(8), torch.zeros(8, 2), torch.arange(8)),
        "an item of 3 entries",
    ),
    "texts": (lambda: Samples(lambda i: "text"), "data: got an item of type str, expected (input, label)"),
    "nothing": (lambda: Samples(lambda i: None), "data: got an item of type NoneType, expected (input, label)"),
    "inputs without labels": (lambda: Samples(picture), "data: got items without a label, expected (input, label)"),
    "inputs alone in tuples": (lambda: TensorDataset(torch.zeros(8, 2)), "data: got items without a label"),
    "labels that are flags": (
        lambda: Samples(lambda i: (picture(i), i > 4)),
        "got labels of dtype bool, expected integers",
    ),
    "some labels that are flags": (
        lambda: Samples(lambda i: (picture(i), 2 if i else True)),
        "got labels of dtype bool, expected integers",
    ),
    "labels that are shares": (
        lambda: Samples(lambda i: (picture(i), i / 2)),
        "got labels of dtype float64, expected int",
    ),
    "labels that are no numbers": (
        lambda: Samples(lambda i: (picture(i), "cat")),
        "got labels of dtype <U3, expected int",
    ),
    "labels of several lengths": (lambda: Samples(lambda i: (picture(i), [0] * i)), "got labels that are not numbers"),
    "inputs that are dictionaries": (
        lambda: Samples(lambda i: ({"a": 1}, i)),
        "sample 0: got an input of type dict, expected",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_items_that_are_no_pairs_are_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(TypeError, match=re.escape(message)):
        samples_of("data", make())


def test_what_the_refusal_advises_works() -> None:
    class Pairs(Dataset[Any]):
        def __init__(self, data: Any, *entries: Any) -> None:
            self.data, self.entries = data, entries

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> Any:
            item = self.data[index]
            return tuple(item[entry] for entry in self.entries)

    for case, entries in (
        ("dictionaries", ("pixel_values", "label")),
        ("numbers first", (1, 2)),
        ("tasks last", (0, 1)),
    ):
        data = Pairs(REFUSED[case][0](), *entries)
        assert samples_of("data", data).y.tolist() == [0, 1, 2, 3] * 2
        assert torch.equal(Inputs(data)[5], picture(5))
    for case in ("inputs without labels", "inputs alone in tuples"):
        assert samples_of("data", REFUSED[case][0](), RAW).y.tolist() == RAW


# ------------------------------------------------------------------------------------------------------------- classes


class Letters(Kept):
    """Labels from 1, and a name for 0 that no row has; one for 5 neither."""

    classes = ("N/A", "a", "b", "c", "d", "e")

    def __init__(self, **named: Any) -> None:
        super().__init__([label + 1 for label in RAW], [label + 1 for label in RAW], **named)


@pytest.mark.parametrize("order", [None, 3])
def test_a_name_without_rows_is_no_class(order: int | None) -> None:
    for options in ({}, {"class_names": Letters.classes}, {"class_names": list("?abcd")}, {"validation": 0.5}):
        stream = class_incremental(Letters(), Letters(), tasks=2, class_order_seed=order, **options)
        assert stream.num_classes == 4 and sorted(stream.class_order) == [1, 2, 3, 4]
        assert stream.class_names == tuple("?abcd"[label] for label in stream.class_order)
        for task in stream.tasks:
            numbers = task.train.read(torch.arange(len(task.train)))[:, 0, 0, 0].long().tolist()
            assert [stream.class_order[label] for label in task.train.y.tolist()] == [RAW[k] + 1 for k in numbers]


def test_a_class_on_one_side_alone_is_still_refused() -> None:
    train, test = (torch.zeros(4, 1), torch.tensor([1, 1, 2, 2])), (torch.zeros(3, 1), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="no training samples of class d"):
        class_incremental(train, test, class_names="abcd")
    with pytest.raises(ValueError, match="no test samples of class d"):
        class_incremental(test, train, class_names="abcd")


def test_labels_may_be_as_large_as_they_please() -> None:
    y = torch.tensor([2**62, 5, 2**40, 5, 2**62, 2**40])
    stream = class_incremental((torch.arange(6.0)[:, None], y), None, validation=0.5, class_order_seed=1)
    assert sorted(stream.class_order) == [5, 2**40, 2**62]
    for side in ("train", "test"):
        for task in stream.tasks:
            part = getattr(task, side)
            assert [stream.class_order[k] for k in part.y] == [
                int(y[int(x)]) for x in part.read(torch.arange(len(part)))
            ]


def test_labels_that_mean_other_classes_in_the_test_rows_are_refused() -> None:
    train, test = Kept(RAW, classes=list("abcd")), Kept(RAW, classes=list("abdc"))
    with pytest.raises(ValueError, match="test: label 2 is class 'd' there and 'c' in train, expected one class"):
        class_incremental(train, test)
    assert class_incremental(train, test, class_names="wxyz").class_names == tuple("wxyz")
    assert class_incremental(train, Kept(RAW, classes=np.array(list("abcde")))).class_names == tuple("abcd")


def test_names_that_cannot_be_encoded_are_made_so() -> None:
    x, y = torch.zeros(4, 1), torch.tensor([0, 0, 1, 1])
    names = [b"caf\xe9".decode("utf-8", "surrogateescape"), "half \ud800"]
    stream = class_incremental((x, y), validation=0.5, class_names=names)
    assert stream.class_names == ("caf\\xe9", "half \\ud800")
    assert "".join(stream.class_names).encode() and "".join(stream.class_names).isprintable()


def test_validation_needs_no_test_rows() -> None:
    x, y = torch.arange(8.0)[:, None], torch.tensor(RAW)
    alone = class_incremental((x, y), validation=0.5)
    both = class_incremental((x, y), (x, y + 50), validation=0.5)
    for one, other in zip(alone.tasks, both.tasks, strict=True):
        assert torch.equal(one.train.read(torch.arange(2)), other.train.read(torch.arange(2)))
        assert torch.equal(one.test.y, other.test.y)
    with pytest.raises(TypeError, match="test: got None, expected test samples, or validation"):
        class_incremental((x, y))
