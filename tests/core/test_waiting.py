"""Selection on a device that runs behind the host: nothing is waited for, and what is chosen is the same."""

import gc
import queue
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from graph_stand_in import install_graphs
from models import CLASSES, MLP, rows
from no_looking import Looked, behind_the_host, watched
from torch import Tensor, nn
from truth import one_hot

import gradmix
from gradmix import GradMix, select_pairs
from gradmix.model.head_capture import HeadCapture
from gradmix.ops.mixed_alignment import MixedAlignment, Side, factorised, mixed_alignment
from gradmix.runtime import deferred_checks

BUFFER = rows(12, 3)

STEPS = {
    f"{criterion}, {policy}, {kind}": {"criterion": criterion, "policy": policy, "kind": kind}
    for criterion in ("sample", "class")
    for policy in ("uniform", "permute", "best")
    for kind in ("own rows", "candidates", "soft labels", "outputs")
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(kind: str, model: Any) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    x, y = rows(11, 1)
    if kind == "candidates":
        return (x, y), {"candidates": rows(7, 2)}
    if kind == "soft labels":
        return (x, one_hot(y, CLASSES).float() * 0.9 + 0.1 / CLASSES), {}
    if kind == "outputs":
        with HeadCapture(model, example=x[:1]) as capture, torch.no_grad():
            model(x)
        return (x, y), {"outputs": capture.output}
    return (x, y), {}


@pytest.fixture(autouse=True)
def _nothing_left() -> Any:
    deferred_checks._unread.clear()
    yield
    deferred_checks._unread.clear()


def assert_same(pairs: gradmix.Pairs, expected: gradmix.Pairs) -> None:
    assert torch.equal(pairs.partner, expected.partner)
    assert torch.equal(pairs.helpful, expected.helpful)
    assert torch.equal(pairs.lam, expected.lam)
    if expected.classes is None:
        assert pairs.classes is None
    else:
        assert torch.equal(pairs.classes, expected.classes)
    torch.testing.assert_close(pairs.alignment, expected.alignment, equal_nan=True)
    for value, known in zip(pairs.mix(), expected.mix(), strict=True):
        torch.testing.assert_close(value, known)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_call_looks_at_nothing_and_chooses_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how = dict(STEPS[case])
    model = MLP()
    batch, more = made(how.pop("kind"), model)
    more = {**how, **more, "lam": 0.3}
    expected = select_pairs(model, BUFFER, batch, generator=generator(), **more)
    behind_the_host(monkeypatch)
    with watched():
        pairs = select_pairs(model, BUFFER, batch, generator=generator(), **more)
        mixed = pairs.mix()
    assert all(torch.isfinite(v).all() for v in mixed)
    deferred_checks.raise_deferred()
    assert_same(pairs, expected)


@pytest.mark.parametrize("marks", [[2, 5, 9], [4], [], list(range(11))], ids=["some", "one", "none", "all"])
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_marked_rows_are_not_looked_at(case: str, marks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    how = dict(STEPS[case])
    model = MLP()
    batch, more = made(how.pop("kind"), model)
    more = {**how, **more, "lam": 0.3, "threshold": 0.2}
    buffer = tuple(v[marks] for v in batch)
    expected = select_pairs(model, buffer, batch, generator=generator(), **more)
    marked = torch.zeros(11, dtype=torch.bool).index_fill_(0, torch.tensor(marks, dtype=torch.int64), True)
    behind_the_host(monkeypatch)
    with watched():
        pairs = select_pairs(model, marked, batch, generator=generator(), **more)
    deferred_checks.raise_deferred()
    assert_same(pairs, expected)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_step_between_refreshes_looks_at_nothing_and_chooses_the_same(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = dict(STEPS[case])
    model = MLP()
    (x, y), more = made(how.pop("kind"), model)
    known, unseen = (GradMix(model, BUFFER, refresh="epoch", generator=generator(), **how) for _ in "ab")
    expected = [known.select(x, y, lam=lam, **more) for lam in (0.3, 0.8)]
    behind_the_host(monkeypatch)
    pairs = [unseen.select(x, y, lam=0.3, **more)]  # makes the table
    deferred_checks.raise_deferred()
    with watched():
        pairs.append(unseen.select(x, y, lam=0.8, **more))
    for one, other in zip(pairs, expected, strict=True):
        assert_same(one, other)
    assert unseen.refreshes == known.refreshes == 1


def test_mixed_inputs_of_drawn_pairs_look_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = MLP(), rows(11, 1)
    how = {"criterion": "sample", "estimator": "mixed", "policy": "permute", "lam": 0.3}
    expected = select_pairs(model, BUFFER, batch, generator=generator(), **how)
    behind_the_host(monkeypatch)
    with watched():
        pairs = select_pairs(model, BUFFER, batch, generator=generator(), **how)
    assert_same(pairs, expected)


@pytest.mark.parametrize(
    "look",
    [
        lambda v: bool(v.any()),
        lambda v: v.sum().item(),
        lambda v: v.tolist(),
        lambda v: v.nonzero(),
        lambda v: torch.unique(v),
        lambda v: v[v > 0],
        lambda v: torch.equal(v, v),
        lambda v: torch.nn.functional.one_hot(v, 5),
    ],
)
def test_the_watch_sees_a_look(look: Any) -> None:
    values = torch.tensor([1, 2])
    with watched(), pytest.raises(Looked):
        look(values)


def nan_in(x: Tensor, row: int) -> Tensor:
    x = x.clone()
    x[row, 0, 0, 0] = torch.nan
    return x


def label_of(y: Tensor, row: int, label: int) -> Tensor:
    y = y.clone()
    y[row] = label
    return y


X, Y = rows(6, 1)
BAD = {
    "NaN": ((nan_in(X, 4), Y), "batch: sample 4 holds NaN"),
    "label too large": ((X, label_of(Y, 2, CLASSES)), f"batch labels: row 2 is {CLASSES}, expected a class index in"),
    "negative label": ((X, label_of(Y, 5, -3)), "batch labels: row 5 is -3, expected a class index in"),
    "soft labels": ((X, torch.full((6, CLASSES), 0.9)), "batch labels: row 0 sums to"),
}


@pytest.mark.parametrize("kept", [False, True], ids=["select_pairs", "GradMix"])
@pytest.mark.parametrize("criterion", ["class", "sample"])
@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_is_named_by_the_next_call(
    case: str, criterion: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, message = BAD[case]
    model = MLP()
    behind_the_host(monkeypatch)
    mixup = GradMix(model, BUFFER, criterion=criterion, refresh="epoch", generator=generator())
    mixup(X, Y)
    deferred_checks.raise_deferred()

    def call(x: Tensor, y: Tensor) -> gradmix.Pairs:
        return mixup.select(x, y) if kept else select_pairs(model, BUFFER, (x, y), criterion=criterion)

    pairs = call(*batch)
    if case == "NaN" and criterion == "sample":  # it is mixed with nothing, and nothing with it
        assert not pairs.helpful[4] and not (pairs.partner[pairs.helpful] == 4).any()
    assert pairs.mix()[1].shape == (6, CLASSES)
    with pytest.raises(ValueError, match=rf"{message}.*\(found on the GPU in an earlier call"):
        call(X, Y)
    call(X, Y)
    deferred_checks.raise_deferred()


def test_a_call_that_raises_leaves_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    behind_the_host(monkeypatch)
    with pytest.raises(ValueError, match="num_classes"):
        select_pairs(MLP(), BUFFER, (nan_in(X, 0), Y), num_classes=99)
    select_pairs(MLP(), BUFFER, (X, Y))
    deferred_checks.raise_deferred()


def test_checks_now_raises_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    behind_the_host(monkeypatch)
    monkeypatch.setenv("GRADMIX_CHECKS", "now")
    with pytest.raises(ValueError, match="batch: sample 4 holds NaN"):
        select_pairs(MLP(), BUFFER, BAD["NaN"][0])
    monkeypatch.setenv("GRADMIX_CHECKS", "soon")
    with pytest.raises(ValueError, match="environment variable GRADMIX_CHECKS: got 'soon', expected 'now' or 'later'"):
        select_pairs(MLP(), BUFFER, (X, Y))


def test_a_new_class_is_left_alone_for_a_step_and_known_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    behind_the_host(monkeypatch)
    mixup = GradMix(MLP(), BUFFER, refresh="epoch", generator=generator(), criterion="class")
    old = X, torch.tensor([0, 1, 0, 1, 0, 1])
    buffer = BUFFER[0], BUFFER[1].clamp(max=1)
    mixup._buffer = buffer
    mixup.select(*old)
    new = X, torch.tensor([0, 1, 4, 1, 0, 1])
    pairs = mixup.select(*new, lam=0.5)
    assert not pairs.helpful[2] and not (pairs.partner[pairs.helpful] == 2).any()
    assert mixup.refreshes == 1 and 4 not in mixup.table.classes
    mixup.select(*new, lam=0.5)
    assert mixup.refreshes == 2 and 4 in mixup.table.classes


# ---------------------------------------------------------------------------------------------------- the operator


def far_apart(soft: bool) -> list[Tensor]:
    """Rows of which every second favours another class by far: many pairs underflow."""
    torch.manual_seed(1)
    z = torch.randn(9, 6)
    z[::2, 0] += 300
    z[1::2, 1] += 300
    y = torch.tensor([2, 3, 4, 5, 2, 3, 4, 5, 2])
    labels = one_hot(y, 6).float() if soft else y
    return [torch.randn(9, 3), z, labels, torch.randn(9, 3), z.flip(0), labels.flip(0), torch.randn(6, 4)]


def by_torch(arguments: list[Tensor], lams: Tensor) -> MixedAlignment:
    return factorised.mixed_alignment_torch(Side(*arguments[:3]), Side(*arguments[3:6]), arguments[6], lams)


@pytest.mark.parametrize("soft", [False, True])
def test_lost_pairs_are_recomputed_without_knowing_how_many(soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = far_apart(soft)
    lams = torch.tensor([0.0, 0.4, 0.5, 1.0], dtype=torch.float64)
    expected = mixed_alignment(Side(*arguments[:3]), Side(*arguments[3:6]), arguments[6], lams, backend="torch")
    behind_the_host(monkeypatch)
    with deferred_checks.defer_checks(MLP()), watched():
        result = by_torch(arguments, lams)
    torch.testing.assert_close(result.inner, expected.inner)
    torch.testing.assert_close(result.norm, expected.norm)


def test_what_there_is_no_room_for_is_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = far_apart(soft=False)
    lams = torch.tensor([0.5], dtype=torch.float64)
    expected = mixed_alignment(Side(*arguments[:3]), Side(*arguments[3:6]), arguments[6], lams).inner
    behind_the_host(monkeypatch)
    monkeypatch.setattr(factorised, "LOST_ELEMENTS", 3 * 6)
    result = by_torch(arguments, lams)
    lost = result.inner.isnan()
    assert torch.equal(lost, result.norm.isnan())
    torch.testing.assert_close(result.inner[~lost], expected[~lost])
    monkeypatch.setattr(factorised, "LOST_ELEMENTS", 2 * 6)
    assert by_torch(arguments, lams).inner.isnan().sum() == lost.sum() + 1
    # They go unmixed: nothing that was not evaluated is helpful.
    assert not (result.inner >= 0)[lost].any()


# --------------------------------------------------------------------------------------------------- threads and models


def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call gives in a thread that has ended then: its result, or the error."""
    found: list[Any] = []

    def body() -> None:
        try:
            found.append(call())
        except ValueError as error:
            found.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return found[0]


class Elsewhere:
    """A thread that makes one call after the other."""

    def __init__(self) -> None:
        self._calls: queue.Queue[Any] = queue.Queue()
        self._results: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._results.put(call())
            except ValueError as error:
                self._results.put(error)

    def __call__(self, call: Callable[[], Any]) -> Any:
        self._calls.put(call)
        return self._results.get()

    def close(self) -> None:
        self._calls.put(None)
        self._thread.join()


def given_pairs(model: Any) -> Callable[[Tensor], Any]:
    return lambda x: select_pairs(model, BUFFER, (x, Y))


def given_mixup(model: Any, **how: Any) -> Callable[[Tensor], Any]:
    mixup = GradMix(model, BUFFER, **how)
    return lambda x: mixup.select(x, Y)


GIVEN: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "select_pairs": given_pairs,
    "GradMix": given_mixup,
    "GradMix by class": partial(given_mixup, criterion="class"),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_a_finding_stops_nobody_else(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    behind_the_host(monkeypatch)
    model, other = MLP(), MLP()
    mine, others, theirs = GIVEN[kind](model), GIVEN[kind](other), GIVEN[kind](model)
    thread = Elsewhere()
    mine(nan_in(X, 4))
    others(X)  # another model
    assert not isinstance(thread(lambda: theirs(X)), Exception)  # another thread
    assert not isinstance(thread(lambda: others(X)), Exception)
    with pytest.raises(ValueError, match=r"batch: sample 4 holds NaN.*\(found on the GPU in an earlier call"):
        mine(X)
    mine(X)
    thread(lambda: theirs(nan_in(X, 1)))
    mine(X)
    assert "batch: sample 1 holds NaN" in str(thread(lambda: theirs(X)))
    thread.close()
    deferred_checks.raise_deferred()
    assert not deferred_checks._unread


def test_what_a_thread_found_that_has_ended_is_told_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    behind_the_host(monkeypatch)
    model, other = MLP(), MLP()
    assert not isinstance(elsewhere(lambda: select_pairs(model, BUFFER, (nan_in(X, 4), Y))), Exception)
    select_pairs(other, BUFFER, (X, Y))
    with pytest.raises(ValueError, match="batch: sample 4 holds NaN"):
        select_pairs(model, BUFFER, (X, Y))
    select_pairs(model, BUFFER, (X, Y))
    deferred_checks.raise_deferred(model)
    deferred_checks.raise_deferred(other)
    assert not deferred_checks._unread


@pytest.mark.parametrize("kind", GIVEN)
def test_findings_keep_no_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    behind_the_host(monkeypatch)
    model = MLP()
    call = GIVEN[kind](model)
    for _ in range(3):
        call(X)
    call(nan_in(X, 4))
    assert len(deferred_checks._unread) == 1
    gone = weakref.ref(model)
    del model, call
    gc.collect()
    assert gone() is None and not deferred_checks._unread


def test_questions_are_of_the_thread_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    behind_the_host(monkeypatch)
    model = MLP()
    with deferred_checks.defer_checks(model):
        # Outside of a call of its own a thread is told at once.
        error = elsewhere(
            lambda: deferred_checks.check_samples(torch.tensor([False, True]), lambda row: ValueError(f"row {row}"))
        )
        deferred_checks.check_samples(torch.tensor([True]), lambda row: ValueError("later"))
    assert str(error) == "row 1"
    with pytest.raises(ValueError, match="later"):
        deferred_checks.raise_deferred()


# ------------------------------------------------------------------------------------------ memory that is used again


class SameMemory(nn.Module):
    """Writes its features to the same memory in every pass, as a backbone in a CUDA graph of the user's does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.features = torch.empty(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        own = self.features[: len(x)]
        with torch.no_grad():
            own.copy_(self.body(x.flatten(1)[:, :6]).relu())
        return self.fc(own)


class InABuffer(SameMemory):
    """That memory is a buffer, which is restored after the passes."""

    def __init__(self) -> None:
        super().__init__()
        features = self.features
        del self.features
        self.register_buffer("features", features.zero_())


class WrittenWeight(SameMemory):
    """The head's weight is written for each pass."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc.weight.copy_(float(x.sum()) * torch.arange(1.0, CLASSES + 1)[:, None].expand(-1, 8))
        return self.fc(self.body(x.flatten(1)[:, :6]).relu())


@pytest.mark.parametrize("graphs", [False, True], ids=["calls", "graphs"])
@pytest.mark.parametrize("kind", [SameMemory, InABuffer, WrittenWeight])
def test_checks_are_of_the_values_of_their_pass(
    kind: Callable[[], nn.Module], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = kind()
    mixup = GradMix(model, rows(20, 3), head="fc", chunk_size=8, generator=generator(), cuda_graph=graphs)
    with install_graphs(monkeypatch) as recorder:
        for step in range(6):
            mixup.select(*rows(8, step))
        deferred_checks.raise_deferred()
    assert (recorder.replays > 0) == graphs


@pytest.mark.parametrize("graphs", [False, True], ids=["calls", "graphs"])
def test_a_label_in_memory_that_is_used_again_is_refused(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a loader on the device."""
    x, y = (value.clone() for value in rows(4, 0))

    class Loader(torch.utils.data.DataLoader):
        def __iter__(self) -> Any:
            for k in range(3):
                for own, new in zip((x, y), rows(4, k), strict=True):
                    own.copy_(new)
                if k == 1:
                    y[1] = CLASSES + 12
                yield x, y

    mixup = GradMix(MLP(), Loader([0]), generator=generator(), cuda_graph=graphs)
    with install_graphs(monkeypatch):
        for _ in range(3):
            with pytest.raises(ValueError, match="buffer labels: row 5 was another number, expected a class index"):
                mixup.select(*rows(8, 0))
                deferred_checks.raise_deferred()


@pytest.mark.parametrize("graphs", [False, True], ids=["calls", "graphs"])
def test_no_samples_have_no_findings(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP()
    with install_graphs(monkeypatch), torch.no_grad(), HeadCapture(model, head="fc") as capture:
        model(X[:0])
        assert len(capture.output.features) == 0


def test_buffers_made_in_inference_mode_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    behind_the_host(monkeypatch)
    with torch.inference_mode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES))
    select_pairs(model, BUFFER, (X, Y))
    deferred_checks.raise_deferred()
