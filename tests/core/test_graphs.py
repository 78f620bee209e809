"""GradMix(cuda_graph=True): on the CPU with a stand-in for CUDA's graphs, which replays by calling again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from graph_stand_in import Recorder, install_graphs
from models import CLASSES, MLP, rows
from torch import Tensor

from gradmix import GradMix, HeadCapture
from gradmix.runtime import cuda_graphs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Product(NamedTuple):
    value: Tensor
    other: Tensor | None


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Any:
    with install_graphs(monkeypatch) as recorder:
        yield recorder


@pytest.mark.parametrize("foreign", [False, True], ids=["own rows", "candidates"])
@pytest.mark.parametrize("policy", ["uniform", "permute", "best"])
@pytest.mark.parametrize("criterion", ["sample", "class"])
def test_replays_choose_what_calls_choose(criterion: str, policy: str, foreign: bool, recorder: Recorder) -> None:
    model = MLP()
    buffer = rows(30, 3)
    how = {"criterion": criterion, "policy": policy, "refresh": 4}
    plain = GradMix(model, buffer, generator=generator(), **how)
    replayed = GradMix(model, buffer, generator=generator(), cuda_graph=True, **how)
    kept = []
    for step in range(6):
        batch = rows(8, 10 + step)
        more = {"candidates": rows(5, 50 + step)} if foreign else {}
        if step == 3:  # what is kept changes without a refresh: also in place
            with torch.no_grad():
                for mixup in (plain, replayed):
                    mixup.reference.mul_(-1)
                    if mixup.table is not None:
                        mixup.table.inner.mul_(-1)
        expected, pairs = plain.select(*batch, **more), replayed.select(*batch, **more)
        kept.append((expected, pairs))
    for expected, pairs in kept:  # a later step leaves earlier results alone
        assert torch.equal(pairs.partner, expected.partner)
        assert torch.equal(pairs.helpful, expected.helpful)
        assert torch.equal(pairs.lam, expected.lam)
        torch.testing.assert_close(pairs.alignment, expected.alignment, equal_nan=True)
        for value, known in zip(pairs.mix(), expected.mix(), strict=True):
            assert torch.equal(value, known)
    # What comes once is called: the decision in step 0, the checks in step 0, which reads the buffer as step 4, and 1.
    assert recorder.captures == 3
    assert recorder.replays == 5 + 1 + 3
    assert len({float(pairs.lam.min()) for _, pairs in kept}) > 1


def test_every_shape_has_its_graph_and_the_oldest_goes(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "GRAPHS", 2)
    call, _ = seen_by(cuda_graphs.Graphs())
    captures = []
    for n in (8, 8, 8, 5, 8, 5, 3, 8, 3, 8, 5, 5):
        assert call(torch.ones(n)) == [0.5] * n
        captures.append(recorder.captures)
    assert captures == [0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    call(torch.ones(5, dtype=torch.float64))
    call(torch.ones(5, dtype=torch.float64))
    assert recorder.captures == 5


def test_other_labels_are_another_graph(recorder: Recorder) -> None:
    mixup = GradMix(MLP(), rows(12, 3), refresh="epoch", generator=generator(), cuda_graph=True)
    x, y = rows(5, 1)
    for labels in (y, torch.softmax(torch.randn(5, CLASSES), 1)):
        before = recorder.captures
        for _ in range(3):
            mixup(x, labels)
        assert recorder.captures == before + 2  # the decision and the checks


def test_a_buffer_that_grows_in_every_step_captures_no_checks(recorder: Recorder) -> None:
    """Each size comes once, and a capture takes as long as many steps."""
    mixup = GradMix(MLP(), lambda: rows(12 + step, 3), generator=generator(), cuda_graph=True)
    for step in range(5):
        mixup(*rows(8, step))
    assert recorder.captures == 1  # the decision


def test_shapes_that_came_once_are_forgotten(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "SHAPES", 2)
    call, _ = seen_by(cuda_graphs.Graphs())
    for n in (1, 2, 3, 1):
        call(torch.ones(n))
    assert recorder.captures == 0


def seen_by(run: cuda_graphs.Graphs) -> tuple[Callable[..., list[float]], list[Tensor]]:
    """Calls by a graph, x times lam; and what the graph holds of x."""
    seen = []

    def function(lam: Tensor, y: Tensor | None, x: Tensor) -> Product:
        seen.append(x)
        return Product(x * lam, y)

    def call(x: Tensor, lam: float = 0.5, kept: bool = False) -> list[float]:
        return run(function, (lam, None), (x,)).value.tolist() if kept else run(function, (lam, None, x)).value.tolist()

    return call, seen


def test_a_kept_tensor_that_did_not_change_is_not_copied(recorder: Recorder) -> None:
    call, seen = seen_by(cuda_graphs.Graphs())
    x = torch.ones(3)
    for _ in range(2):
        assert call(x, kept=True) == [0.5] * 3
    seen[-1].fill_(2)  # what the graph holds, behind its back
    assert call(x, kept=True) == [1.0] * 3
    x.add_(1)
    assert call(x, 0.25, kept=True) == [0.5] * 3
    assert call(torch.full((3,), 8.0), 0.25, kept=True) == [2.0] * 3
    assert recorder.captures == 1


def test_any_other_is_copied_in_every_call(recorder: Recorder) -> None:
    """A graph of the user's, or ``.data``, writes it without a new version."""
    call, _ = seen_by(cuda_graphs.Graphs())
    x = torch.ones(3)
    for _ in range(2):
        assert call(x) == [0.5] * 3
    version = x._version
    x.data.copy_(torch.full((3,), 4.0))
    assert x._version == version
    assert call(x) == [2.0] * 3
    assert recorder.captures == 1


def test_a_parameter_is_read_where_it_is(recorder: Recorder) -> None:
    call, seen = seen_by(cuda_graphs.Graphs())
    weight = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        for _ in range(2):
            assert call(weight) == [0.5] * 3
        assert seen[-1].data_ptr() == weight.data_ptr()
        weight.add_(1)
        assert call(weight) == [1.0] * 3
        assert recorder.captures == 1
        weight.data = torch.full((3,), 8.0)  # elsewhere
        for _ in range(2):
            assert call(weight) == [4.0] * 3
        assert recorder.captures == 2
        weight.add_(1)
        assert call(weight) == [4.5] * 3


@pytest.mark.parametrize("marks", [False, True], ids=["buffer", "marked"])
def test_outputs_that_a_graph_of_the_users_writes(marks: bool, recorder: Recorder) -> None:
    """The same tensors in every step, written without a new version."""
    model = MLP()
    plain, replayed = (
        GradMix(model, rows(30, 3), refresh=10, generator=generator(), cuda_graph=flag) for flag in (False, True)
    )
    static: list[Tensor] = []
    for step in range(4):
        x, y = rows(8, 10 + step)
        with torch.no_grad(), HeadCapture(model, head="fc") as capture:
            model(x)
        new = [x, y, *capture.output[:2], torch.arange(8) % 3 == step % 3]
        static = static or [value.clone() for value in new]
        for value, latest in zip(static, new, strict=True):
            value.data.copy_(latest)
        *batch, features, logits, marked = static
        how = {"outputs": (features, logits), "replayed": marked if marks else None}
        expected, pairs = plain.select(*batch, **how), replayed.select(*batch, **how)
        assert torch.equal(pairs.partner, expected.partner)
        assert torch.equal(pairs.helpful, expected.helpful)
        torch.testing.assert_close(pairs.alignment, expected.alignment, equal_nan=True)
    assert recorder.captures == 2  # the decision and the checks


def test_without_a_gpu_it_makes_no_difference() -> None:
    with_graph, plain = (GradMix(MLP(), rows(12, 3), generator=generator(), cuda_graph=flag) for flag in (True, False))
    with_graph._model.load_state_dict(plain._model.state_dict())
    for value, known in zip(with_graph(*rows(6, 1)), plain(*rows(6, 1)), strict=True):
        assert torch.equal(value, known)


@pytest.mark.parametrize("estimator", ["mixed", "jvp", "sketch"])
def test_forward_passes_of_mixed_inputs_are_not_captured(estimator: str) -> None:
    with pytest.raises(ValueError, match=f"cuda_graph: got True with the estimator {estimator!r} by sample"):
        GradMix(MLP(), rows(12, 3), criterion="sample", estimator=estimator, cuda_graph=True)
    GradMix(MLP(), rows(12, 3), criterion="class", estimator=estimator, cuda_graph=True)
