"""GradMix(cuda_graph=True): on the CPU with a stand-in for CUDA's graphs (:mod:`graph_stand_in`)."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from graph_stand_in import Recorder, install_graphs
from models import CLASSES, MLP, rows
from torch import Tensor, nn

from gradmix import GradMix, HeadCapture
from gradmix.captured_selection import MeasuredGraphs
from gradmix.model.head_layers import HeadNotFoundError
from gradmix.ops.backends import get_backend
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
    # The decision and the checks of a batch are one graph; those of passes before, as of a buffer, are others.
    assert 3 <= recorder.captures <= 4 and recorder.replays >= 5
    assert len({float(pairs.lam.min()) for _, pairs in kept}) > 1


def test_every_shape_has_its_graph(recorder: Recorder) -> None:
    call, _ = seen_by(cuda_graphs.Graphs())
    captures = []
    for n in (8, 8, 8, 5, 8, 5, 5):
        assert call(torch.ones(n)) == [0.5] * n
        captures.append(recorder.captures)
    assert captures == [0, 1, 1, 1, 1, 2, 2]
    for _ in range(2):
        call(torch.ones(5, dtype=torch.float64))
    assert recorder.captures == 3


def test_more_shapes_than_places_are_not_captured_in_turn(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture takes as long as many steps; a place becomes free where a graph has been idle for long."""
    monkeypatch.setattr(cuda_graphs, "GRAPHS", 2)
    monkeypatch.setattr(cuda_graphs, "IDLE", 20)
    call, _ = seen_by(cuda_graphs.Graphs())
    for n in (1, 2, 3) * 30:
        assert call(torch.ones(n)) == [0.5] * n
    assert recorder.captures == 2
    for n in (2, 3) * 12:
        assert call(torch.ones(n)) == [0.5] * n
    assert recorder.captures == 3


def test_other_labels_are_another_graph(recorder: Recorder) -> None:
    mixup = GradMix(MLP(), rows(12, 3), refresh="epoch", generator=generator(), cuda_graph=True)
    x, y = rows(5, 1)
    for labels in (y, torch.softmax(torch.randn(5, CLASSES), 1)):
        before = recorder.captures
        for _ in range(3):
            mixup(x, labels)
        assert recorder.captures == before + 1


def test_passes_of_a_buffer_that_grows_in_every_step_are_not_captured(recorder: Recorder) -> None:
    """Each size comes once, and a capture takes as long as many steps."""
    mixup = GradMix(MLP(), lambda: rows(12 + step, 3), generator=generator(), cuda_graph=True)
    for step in range(5):
        mixup(*rows(8, step))
    assert recorder.captures == 1  # the decision, with the checks of the batch's pass


def test_shapes_that_came_once_are_forgotten(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "SHAPES", 2)
    call, _ = seen_by(cuda_graphs.Graphs())
    for n in (1, 2, 3, 1):
        call(torch.ones(n))
    assert recorder.captures == 0


def seen_by(run: cuda_graphs.Graphs) -> tuple[Callable[..., list[float]], list[Tensor]]:
    """Calls by a graph, x times lam; and what the captured function was given for x."""
    seen = []

    def function(lam: Tensor, y: Tensor | None, x: Tensor) -> Product:
        seen.append(x)
        return Product(x * lam, y)

    return lambda x, lam=0.5: run(function, (lam, None, x)).value.tolist(), seen


def test_arguments_are_copied_in_every_call(recorder: Recorder) -> None:
    """A graph of the user's, a collective or ``.data`` writes them without a new version."""
    call, _ = seen_by(cuda_graphs.Graphs())
    x = torch.ones(3)
    for _ in range(2):
        assert call(x) == [0.5] * 3
    version = x._version
    x.data.copy_(torch.full((3,), 4.0))
    assert x._version == version
    assert call(x) == [2.0] * 3
    assert call(x, 0.25) == [1.0] * 3
    assert recorder.captures == 1


def test_a_parameter_is_read_where_it_is(recorder: Recorder) -> None:
    call, seen = seen_by(cuda_graphs.Graphs())
    weight = torch.nn.Parameter(torch.ones(3))
    for _ in range(2):
        assert call(weight) == [0.5] * 3
    assert seen[-1].data_ptr() == weight.data_ptr()
    with torch.no_grad():
        weight.add_(1)
        assert call(weight) == [1.0] * 3
        assert recorder.captures == 1
        weight.data = torch.full((3,), 8.0)  # elsewhere
        for _ in range(2):
            assert call(weight) == [4.0] * 3
        assert recorder.captures == 2
        weight.add_(1)
        assert call(weight) == [4.5] * 3


def test_graphs_of_a_head_that_is_gone_are_dropped(recorder: Recorder) -> None:
    model = MLP()
    mixup, batch = GradMix(model, rows(20, 3), refresh="epoch", generator=generator(), cuda_graph=True), rows(9, 1)
    heads = []
    for _ in range(6):
        model.fc = nn.Linear(model.fc.in_features, CLASSES)
        heads.append(weakref.ref(model.fc.weight))
        for _ in range(3):
            mixup.select(*batch)
    gc.collect()
    assert sum(head() is not None for head in heads) == 1
    assert len(mixup._graphs._kept) <= 3


def test_a_backend_or_a_precision_that_changes_is_another_graph(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixup, batch = GradMix(MLP(), rows(20, 3), refresh="epoch", generator=generator(), cuda_graph=True), rows(9, 1)
    before = 0
    for change in (lambda: None, lambda: monkeypatch.setenv("GRADMIX_BACKEND", "torch")):
        change()
        for _ in range(3):
            mixup.select(*batch)
        assert recorder.captures == before + 1
        before = recorder.captures


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_has_no_graphs(copied: Callable[[Any], Any], recorder: Recorder) -> None:
    for graphs in (cuda_graphs.Graphs(get_backend), MeasuredGraphs()):
        graphs._kept["a graph"] = threading.Lock()  # which cannot be copied
        other = copied(graphs)
        assert type(other) is type(graphs) and not other._kept and other._settings is graphs._settings


def test_what_cannot_be_captured_is_called_with_one_warning(recorder: Recorder) -> None:
    recorder.error = RuntimeError("CUDA out of memory\nmore")
    model, (x, y) = MLP(), rows(9, 1)
    mixup, plain = (
        GradMix(model, rows(20, 3), refresh="epoch", generator=generator(), cuda_graph=flag) for flag in (True, False)
    )
    with pytest.warns(RuntimeWarning, match=r"was not captured in a CUDA graph \(CUDA out of memory\)") as warned:
        for _ in range(6):
            assert torch.equal(mixup.select(x, y).partner, plain.select(x, y).partner)
    assert len(warned) == 1
    bad = x.clone()
    bad[3] = torch.nan
    mixup.select(bad, y)
    with pytest.raises(ValueError, match="batch: sample 3 holds NaN"):
        mixup.select(x, y)


def test_graphs_keep_no_record_of_autograd(recorder: Recorder) -> None:
    model = MLP()
    mixup = GradMix(model, rows(12, 3), refresh="epoch", generator=generator(), cuda_graph=True, head="fc")
    alive = []
    for step in range(12):
        x, y = rows(5, step)
        with HeadCapture(model, head="fc") as capture:
            z = model(x)
        features, saved = capture.output.features.clone().requires_grad_() * 1, torch.empty(1)
        features.register_hook(lambda grad, saved=saved: grad)
        alive.append(weakref.ref(saved))
        mixup.select(x, y, outputs=(features, z))
        del features, z, capture, saved
    gc.collect()
    assert sum(saved() is not None for saved in alive) <= 1


def test_calls_in_inference_mode_and_outside(recorder: Recorder) -> None:
    mixup, batch = GradMix(MLP(), rows(12, 3), refresh="epoch", generator=generator(), cuda_graph=True), rows(5, 1)
    for inference in (True, True, True, False, True, False):
        with torch.inference_mode(inference):
            assert not mixup.select(*batch).lam.is_inference()


def test_threads_take_turns(recorder: Recorder) -> None:
    run = cuda_graphs.Graphs()
    call, _ = seen_by(run)
    for _ in range(2):
        call(torch.ones(64))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: call(torch.full((64,), float(k))), range(200)))
    assert found == [[k / 2] * 64 for k in range(200)]


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
    assert recorder.captures == 1


class WritesOneMemory(MLP):
    """Its output is always the same memory, as of a pass that is a graph; ``wrong`` is a pass whose output is not the
    head's."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.wrong, self.memory = 0, -1, torch.empty(100, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.memory[: len(x)]
        logits.copy_(super().forward(x))
        if self.passes == self.wrong:
            logits[2, 1] += 1
        self.passes += 1
        return logits


@pytest.mark.parametrize("first", [True, False], ids=["batch", "candidates"])
@pytest.mark.parametrize("flag", [False, True], ids=["calls", "graphs"])
def test_checks_are_of_their_own_pass(flag: bool, first: bool, recorder: Recorder) -> None:
    model = WritesOneMemory()
    mixup = GradMix(model, rows(12, 3), refresh="epoch", generator=generator(), cuda_graph=flag, head="fc")
    for step in range(4):
        mixup.select(*rows(8, step), candidates=rows(8, 20 + step))
    model.wrong = model.passes + (not first)
    mixup.select(*rows(8, 4), candidates=rows(8, 24))
    with pytest.raises(HeadNotFoundError, match="logits of sample 2 are not those of"):
        mixup.select(*rows(8, 5))


class Masks(nn.Module):
    """A layer whose last class is masked from the time that ``mask`` is set."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, dtype=dtype)
        self.mask: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(x)
        return logits if self.mask is None else logits.masked_fill(torch.arange(4) == 3, self.mask)


@pytest.mark.parametrize("flag", [False, True], ids=["calls", "graphs"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "a new mask"])
def test_minus_infinity_of_the_head_itself_is_no_mask(masked: bool, flag: bool, recorder: Recorder) -> None:
    torch.manual_seed(0)
    model = Masks()
    buffer = torch.rand(12, 4), torch.arange(12) % 3
    mixup = GradMix(model, lambda: buffer, chunk_size=5, generator=generator(), cuda_graph=flag)
    for _ in range(3):
        mixup.select(torch.rand(6, 4), torch.arange(6) % 3)
    with torch.no_grad():
        model.fc.weight[1] = torch.tensor([3e38, 0.0, 0.0, 0.0])
    buffer[0][:, 0] = 0.01
    buffer[0][8, 0] = -100.0
    model.mask = -torch.inf if masked else None
    mixup.select(torch.rand(6, 4).mul(0.01), torch.arange(6) % 3)
    with pytest.raises(ValueError, match="the model's logits of buffer: sample 8 holds an infinity"):
        mixup.select(torch.rand(6, 4).mul(0.01), torch.arange(6) % 3)


@pytest.mark.parametrize("flag", [False, True], ids=["calls", "graphs"])
@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_new_mask_may_hide_what_is_not_finite(
    dtype: torch.dtype, infinity: float, flag: bool, recorder: Recorder
) -> None:
    model = Masks(dtype)
    buffer = torch.randn(12, 4, dtype=dtype), torch.arange(12) % 3
    mixup = GradMix(model, buffer, generator=generator(), cuda_graph=flag)
    for step in range(6):
        if step == 3:
            model.mask = -60_000.0
            with torch.no_grad():
                model.fc.bias[3] = infinity
        mixup.select(torch.randn(6, 4, dtype=dtype), torch.arange(6) % 3)


@pytest.mark.parametrize("estimator", ["feature", "mixed", "jvp", "sketch"])
def test_selections_by_class_are_captured_with_every_estimator(estimator: str, recorder: Recorder) -> None:
    how = {"criterion": "class", "estimator": estimator, "refresh": "epoch", "class_samples": 2}
    mixup = GradMix(MLP(), rows(12, 3), generator=generator(), cuda_graph=True, **how)
    for step in range(5):
        mixup.select(*rows(8, step))
    assert recorder.captures >= 1 and recorder.replays >= 3


def test_memory_that_is_no_whole_words_is_copied_as_it_is() -> None:
    words = cuda_graphs._as_words
    assert words(torch.arange(6).view(3, 2)[1:2, 0]).tolist() == [2, 0]
    assert words(torch.ones(3, dtype=torch.bool)) is None
    assert words(torch.ones(4, 2).T) is None and words(torch.ones(3).expand(2, 3)) is None
    assert words(torch.ones(2, dtype=torch.complex64).conj()) is None
    assert words(torch.frombuffer(bytearray(64), dtype=torch.half, offset=2, count=8)) is None  # its address is odd
    assert words(torch.ones(9, dtype=torch.half)[1:]) is None
    assert len(words(torch.empty(0))) == 0 and len(words(torch.tensor(1.0))) == 1


def test_results_of_a_graph_are_no_views(recorder: Recorder) -> None:
    mixup, batch = GradMix(MLP(), rows(12, 3), refresh="epoch", generator=generator(), cuda_graph=True), rows(7, 1)
    for _ in range(4):
        pairs = mixup.select(*batch)
    assert recorder.replays > 0
    weight = torch.ones(7, requires_grad=True)
    pairs.lam.mul_(weight).sum().backward()
    assert weight.grad is not None and not pairs.partner._is_view() and not pairs.helpful._is_view()


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
