"""Where rows come from: everything that replay code has serves as a buffer, and what is none is refused by name."""

import re
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from gradmix import GradMix, ReplayBuffer, alignment_matrix, class_gradients, reference_gradient, select_pairs

CLASSES, N = 4, 20
G = torch.Generator().manual_seed(0)
X, Y = torch.rand(N, 12, generator=G), torch.arange(N) % CLASSES
BATCH = torch.rand(8, 12, generator=G), torch.arange(8) % CLASSES


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


class Memory:
    """An object of rows, no Dataset."""

    def __init__(self, row: Callable[[int], Any]) -> None:
        self.row = row

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.row(index)


class Rows(Memory, Dataset):
    """A Dataset of such rows."""


class Stream(IterableDataset):
    """A Dataset without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(X[k], int(Y[k])) for k in range(N)])


class Fetching(Rows):
    """A Dataset that reads several rows at once."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [(X[k], Y[k]) for k in indices]


def read_only() -> tuple[Any, Any]:
    x, y = X.numpy().copy(), Y.numpy().copy()
    x.flags.writeable = y.flags.writeable = False
    return x, y


def in_buffer() -> ReplayBuffer:
    buffer = ReplayBuffer(N)
    buffer.add(X, Y)
    return buffer


SOURCES: dict[str, Any] = {
    "pair": (X, Y),
    "list of two": [X, Y],
    "arrays": (X.numpy(), Y.numpy()),
    "array and tensor": (X.numpy(), Y),
    "tensor and array": (X, Y.numpy()),
    "list of arrays": [X.numpy(), Y.numpy()],
    "arrays that cannot be written to": read_only(),
    "arrays from back to front": (X.numpy()[::-1], Y.numpy()[::-1]),
    "arrays of the other byte order": (X.numpy().astype(">f4"), Y.numpy().astype(">i8")),
    "labels of int32": (X, Y.int()),
    "labels of int16": (X, Y.short()),
    "labels of uint8": (X, Y.byte()),
    "labels of uint16 in an array": (X, Y.numpy().astype(np.uint16)),
    "__len__ and __getitem__": Memory(lambda k: (X[k], int(Y[k]))),
    "rows in a list": [(X[k], int(Y[k])) for k in range(N)],
    "rows as lists": [[X[k], Y[k]] for k in range(N)],
    "rows in a deque": deque((X[k], int(Y[k])) for k in range(N)),
    "rows of arrays": Memory(lambda k: (X[k].numpy(), Y.numpy()[k])),
    "Dataset": TensorDataset(X, Y),
    "Dataset of rows of arrays and numbers": Rows(lambda k: (X[k].numpy(), int(Y[k]))),
    "Dataset that reads several at once": Fetching(lambda k: pytest.fail("read one by one")),
    "Subset": Subset(TensorDataset(X, Y), range(N)),
    "IterableDataset": Stream(),
    "DataLoader": DataLoader(TensorDataset(X, Y), 6),
    "DataLoader of an object": DataLoader(Memory(lambda k: (X[k], int(Y[k]))), 6),
    "ReplayBuffer": in_buffer(),
    "function that returns a pair": lambda: (X, Y),
    "function that returns a buffer": in_buffer,
    "function that returns an object": lambda: Memory(lambda k: (X[k], int(Y[k]))),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_gradients(source: str) -> None:
    model, given = network(), SOURCES[source]
    expected = reference_gradient(model, (X, Y))
    for chunk in (3, 512):
        torch.testing.assert_close(reference_gradient(model, given, chunk_size=chunk), expected)
    mixup = GradMix(model, given, criterion="class")
    mixup(*BATCH)
    torch.testing.assert_close(mixup.reference, expected)
    for estimator in ("mixed", "jvp"):
        got, known = (
            select_pairs(model, kept, BATCH, lam=0.6, estimator=estimator).alignment for kept in (given, (X, Y))
        )
        torch.testing.assert_close(got, known, equal_nan=True)
    torch.testing.assert_close(
        class_gradients(model, given, rank=4).cosine(), class_gradients(model, (X, Y), rank=4).cosine()
    )


def test_two_rows_in_a_list_are_not_a_pair() -> None:
    model = network()
    for rows in ([(X[0], 0), (X[1], 1)], [[X[0], 0], [X[1], 1]], [(X[0], Y[0]), (X[1], Y[1])]):
        torch.testing.assert_close(reference_gradient(model, rows), reference_gradient(model, (X[:2], Y[:2])))
    torch.testing.assert_close(reference_gradient(model, [X[:2], Y[:2]]), reference_gradient(model, (X[:2], Y[:2])))


def test_a_function_is_called_at_every_read() -> None:
    model, held = network(), []
    mixup = GradMix(model, lambda: held)
    assert mixup.select(*BATCH).helpful.all() and mixup.reference is None
    for count in (3, 7):
        held[:] = [(X[k], int(Y[k])) for k in range(count)]
        mixup.select(*BATCH)
        torch.testing.assert_close(mixup.reference, reference_gradient(model, (X[:count], Y[:count])))


def test_a_buffer_that_was_empty_is_read_when_it_has_rows() -> None:
    model, rows = network(), []
    mixup = GradMix(model, rows, refresh="epoch")
    mixup(*BATCH)
    rows += [(X[k], int(Y[k])) for k in range(2)]
    mixup(*BATCH)
    torch.testing.assert_close(mixup.reference, reference_gradient(model, (X[:2], Y[:2])))


def test_batches_and_candidates_may_be_arrays() -> None:
    x, y = BATCH
    expected = select_pairs(network(), (X, Y), BATCH, candidates=(X, Y), lam=0.6).alignment
    got = select_pairs(
        network(), (X, Y), (x.numpy(), y.numpy().astype(np.int16)), candidates=(X.numpy(), Y.int()), lam=0.6
    )
    torch.testing.assert_close(got.alignment, expected)
    mixed, labels = got.mix(y=y.byte())
    assert mixed.shape == x.shape and labels.shape == (8, CLASSES)


# ------------------------------------------------------------------------------------------------------------ refusals

ROWS_OF_OTHERS: dict[str, tuple[Callable[[int], Any], str, str]] = {
    "(x, y, task)": (lambda k: (X[k], int(Y[k]), 0), "has 3 entries, expected two", "sample[:2]"),
    "(index, x, y)": (lambda k: (k, X[k], int(Y[k])), "has 3 entries, expected two", "sample[1:]"),
    "(x, y, task, logits)": (lambda k: (X[k], int(Y[k]), 0, X[k]), "has 4 entries, expected two", "sample[:2]"),
    "mapping": (
        lambda k: {"pixels": X[k], "label": int(Y[k])},
        "is a dict with the keys 'pixels', 'label', expected",
        "({key: sample[key] for key in keys}, sample[label])",
    ),
}


class OfPixels(nn.Sequential):
    """A network of a mapping."""

    def forward(self, x: Any) -> Tensor:
        return super().forward(x["pixels"] if isinstance(x, dict) else x)


@pytest.mark.parametrize("loaded", [False, True], ids=["rows", "batches"])
@pytest.mark.parametrize("case", ROWS_OF_OTHERS)
def test_which_entries_are_x_and_y_is_not_guessed(case: str, loaded: bool) -> None:
    row, message, pick = ROWS_OF_OTHERS[case]
    data = Rows(row)
    model = OfPixels(*network())
    source = DataLoader(data, 6) if loaded else data
    what = "batch" if loaded else "sample"
    for call in (
        lambda: reference_gradient(model, source),
        lambda: select_pairs(model, source, BATCH),
        lambda: GradMix(model, source)(*BATCH),
        lambda: alignment_matrix(model, source, BATCH, lam=0.5),
        lambda: class_gradients(model, source),
    ):
        with pytest.raises(TypeError, match=f"{what} 0 {message}") as refused:
            call()
    # What the error says to do:
    advice = re.search(r"DataLoader\(data, 256, collate_fn=.*?\]\)\)", str(refused.value))
    assert advice is not None and pick.split("[")[0] in advice.group()
    written = re.sub(r"\[sample\[:2\] for sample", f"[{pick} for sample", advice.group())
    names = {"data": data, "DataLoader": DataLoader, "default_collate": default_collate}
    loader = eval(written, names | {"keys": ["pixels"], "label": "label"})
    torch.testing.assert_close(reference_gradient(model, loader), reference_gradient(model, (X, Y)))


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "text": ("rows", TypeError, "buffer: got str, expected a ReplayBuffer"),
    "mapping": ({"x": X, "y": Y}, TypeError, "buffer: got dict, expected a ReplayBuffer"),
    "array": (X.numpy(), TypeError, "buffer: got ndarray, expected a ReplayBuffer"),
    "nothing": (None, TypeError, "buffer: got NoneType, expected a ReplayBuffer"),
    "function that returns nothing": (lambda: None, TypeError, "buffer: got NoneType, expected a ReplayBuffer"),
    "model": (nn.Linear(2, 2), TypeError, "buffer: got Linear, expected a ReplayBuffer"),
    "tensors in a list": ([X[0], X[1], X[2]], TypeError, r"buffer: sample 0 is of type Tensor, expected \(x, y\)"),
    "numbers": (list(range(3)), TypeError, r"buffer: sample 0 is of type int, expected \(x, y\)"),
    "images without a transform": (
        [(SimpleNamespace(mode="RGB"), 1)],
        TypeError,
        "buffer: samples 0 to 0 cannot be stacked .*SimpleNamespace",
    ),
    "rows of unequal shape": ([(X[0], 1), (X[1, :4], 2)], TypeError, "buffer: samples 0 to 1 cannot be stacked"),
    "array of objects": ((np.array([{}, {}]), Y[:2]), TypeError, "buffer x: got an array of dtype object"),
    "texts": ((["a", "b"], Y[:2]), TypeError, r"buffer x\[0\]: got str, expected a tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_source_is_named(case: str) -> None:
    source, error, message = BAD[case]
    for call in (
        lambda: reference_gradient(network(), source),
        lambda: select_pairs(network(), source, BATCH),
        lambda: class_gradients(network(), source),
    ):
        with pytest.raises(error, match=message.replace("buffer", "(buffer|data)")):
            call()


LABELS: dict[str, tuple[Any, type[Exception], str, Callable[[Any, Any], tuple[Any, Any]]]] = {
    "of shape (N, 1)": (
        Y[:8, None],
        ValueError,
        r"labels: got shape \(8, 1\), expected \(8,\) class indices; y.squeeze\(1\)",
        lambda x, y: (x, y.squeeze(1)),
    ),
    "without a class": (
        torch.where(Y[:8] == 0, -1, Y[:8]),
        ValueError,
        "labels: row 0 is -1, expected a class index.*rows that no class is known of, y < 0, are to be left out",
        lambda x, y: (x[y >= 0], y[y >= 0]),
    ),
    "to be ignored": (
        torch.where(Y[:8] == 1, -100, Y[:8]),
        ValueError,
        "labels: row 1 is -100, expected a class index.*y < 0, are to be left out",
        lambda x, y: (x[y >= 0], y[y >= 0]),
    ),
    "in a list": (
        Y[:8].tolist(),
        TypeError,
        r"got a pair of Tensor and list, expected an \(x, y\) pair of tensors; torch.tensor\(y\)",
        lambda x, y: (x, torch.tensor(y)),
    ),
    "floating-point numbers": (
        Y[:8].float(),
        ValueError,
        r"labels: got soft labels of shape \(8,\), expected \(8, C\).*y.long\(\)",
        lambda x, y: (x, y.long()),
    ),
    "truth values": (Y[:8] > 1, TypeError, r"labels: got dtype torch.bool.*y.long\(\)", lambda x, y: (x, y.long())),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_none_are_refused_alike_and_the_advice_works(case: str) -> None:
    y, error, message, advised = LABELS[case]
    model, x = network(), BATCH[0]
    for name, call in {
        "batch": lambda pair: select_pairs(model, (X, Y), pair),
        "buffer": lambda pair: select_pairs(model, pair, BATCH),
        "candidates": lambda pair: select_pairs(model, (X, Y), BATCH, candidates=pair),
        "batch ": lambda pair: GradMix(model, (X, Y))(*pair),
        "buffer ": lambda pair: reference_gradient(model, pair),
        "data": lambda pair: class_gradients(model, pair),
    }.items():
        with pytest.raises(error, match=f"{name.strip()}.*{message}"):
            call((x, y))
        call(advised(x, y))


def test_a_buffer_refuses_labels_by_name() -> None:
    buffer = ReplayBuffer(3)
    with pytest.raises(ValueError, match=r"y: got shape \(8, 1\), expected \(8,\).*; y.squeeze\(1\)"):
        buffer.add(BATCH[0], Y[:8, None])
    with pytest.raises(ValueError, match="y: got label -1, .* y < 0, are to be left out"):
        buffer.add(BATCH[0], Y[:8] - 1)
    assert buffer.seen == 0


# -------------------------------------------------------------------------------------------------------------- dtypes


class OfBytes(nn.Module):
    """A network that scales its images itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float() / 255)


BYTES = (X * 255).byte()


def bytes_in_buffer() -> ReplayBuffer:
    buffer = ReplayBuffer(N)
    buffer.add(BYTES, Y)
    return buffer


UNLIKE: dict[str, Any] = {
    "uint8": (BYTES, Y),
    "uint8 buffer": bytes_in_buffer(),
    "uint8 Dataset": TensorDataset(BYTES, Y),
    "uint8 DataLoader": DataLoader(TensorDataset(BYTES, Y), 7),
    "float64": (X.numpy().astype(np.float64), Y),
    "float16": (X.half(), Y),
}


@pytest.mark.parametrize("estimator", ["feature", "mixed", "jvp", "sketch"])
@pytest.mark.parametrize("case", UNLIKE)
def test_a_dtype_that_the_model_does_not_take_is_named_alike(case: str, estimator: str) -> None:
    source, dtype = UNLIKE[case], case.split()[0]
    message = f"got x of dtype torch.{dtype}, which the model does not take .*, expected torch.float32"
    model = network()
    for criterion in ("sample", "class"):
        with pytest.raises(TypeError, match=f"^buffer: {message}"):
            select_pairs(model, source, BATCH, estimator=estimator, criterion=criterion)
        with pytest.raises(TypeError, match=f"^buffer: {message}"):
            GradMix(model, source, estimator=estimator, criterion=criterion)(*BATCH)
    if estimator == "feature":
        with pytest.raises(TypeError, match=f"^buffer: {message}"):
            reference_gradient(model, source)
    if isinstance(source, tuple) and (estimator == "feature" or dtype != "uint8"):
        with pytest.raises(TypeError, match=f"^batch: {message}"):
            select_pairs(model, (X, Y), source, estimator=estimator)


def test_a_model_that_takes_bytes_is_served() -> None:
    model = OfBytes()
    plain = select_pairs(model.net, (BYTES / 255, Y), (BYTES[:8] / 255, Y[:8]), lam=0.6)
    for source in (value for name, value in UNLIKE.items() if name.startswith("uint8")):
        pairs = select_pairs(model, source, (BYTES[:8], Y[:8]), lam=0.6)
        torch.testing.assert_close(pairs.alignment, plain.alignment)
        with pytest.raises(TypeError, match="x: got dtype torch.uint8"):
            pairs.mix()
        mixed, _ = pairs.mix(BYTES[:8].float())
        assert mixed.is_floating_point()
        with pytest.raises(TypeError, match="batch: got x of dtype torch.uint8 with the estimator 'mixed'"):
            select_pairs(model, source, (BYTES[:8], Y[:8]), estimator="mixed")


@pytest.mark.parametrize("estimator", ["mixed", "jvp", "sketch"])
def test_bytes_of_a_buffer_are_not_mixed_with_numbers(estimator: str) -> None:
    batch = BYTES[:8].float(), Y[:8]
    with pytest.raises(TypeError, match="buffer: got x of dtype torch.uint8 with the estimator"):
        GradMix(OfBytes(), (BYTES, Y), estimator=estimator, criterion="class")(*batch)


def test_what_a_model_raises_is_passed_on() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="^broken$"):
        select_pairs(Broken(), (X, Y), BATCH, head="fc")
