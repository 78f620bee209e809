"""Selection on a GPU: the host waits for nothing, and a captured graph chooses what calls choose."""

from typing import Any

import pytest
import torch
from gpu import no_waiting
from models import CLASSES, MLP, rows
from torch import Tensor
from truth import one_hot

import gradmix
from gradmix import GradMix, select_pairs
from gradmix.runtime import deferred_checks

pytestmark = pytest.mark.gpu
BACKENDS = ("torch", "triton")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_gpu(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].cuda(), pair[1].cuda()


def test_the_watch_sees_a_wait() -> None:
    value = torch.ones(3, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        value.sum().item()


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("foreign", [False, True], ids=["own rows", "candidates"])
@pytest.mark.parametrize("policy", ["uniform", "permute", "best"])
@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_select_pairs_waits_for_nothing(backend: str, criterion: str, policy: str, foreign: bool, soft: bool) -> None:
    model, x_y = MLP(), rows(11, 1)
    if soft:
        x_y = x_y[0], one_hot(x_y[1], CLASSES).float() * 0.9 + 0.1 / CLASSES
    buffer = rows(12, 3)
    more: dict[str, Any] = {"criterion": criterion, "policy": policy}
    candidates = rows(7, 2) if foreign else None
    expected = select_pairs(model, buffer, x_y, candidates=candidates, generator=generator(), **more)
    model.cuda()
    there, batch = on_gpu(buffer), on_gpu(x_y)
    partners = None if candidates is None else on_gpu(candidates)
    # The first call finds the head and compiles kernels.
    for watch in (False, True):
        with no_waiting() if watch else torch.no_grad():
            pairs = select_pairs(
                model, there, batch, candidates=partners, backend=backend, generator=generator(), **more
            )
            pairs.mix()
    assert torch.equal(pairs.helpful.cpu(), expected.helpful)
    assert torch.equal(pairs.partner.cpu(), expected.partner)
    torch.testing.assert_close(pairs.alignment.cpu(), expected.alignment, rtol=1e-3, atol=1e-4, equal_nan=True)
    if criterion == "class":
        assert torch.equal(pairs.classes.cpu(), expected.classes)


@pytest.mark.parametrize("policy", ["uniform", "permute", "best"])
@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("cuda_graph", [False, True], ids=["calls", "graph"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_between_refreshes_wait_for_nothing(backend: str, cuda_graph: bool, criterion: str, policy: str) -> None:
    model, buffer = MLP().cuda(), on_gpu(rows(30, 3))
    how: dict[str, Any] = {"criterion": criterion, "policy": policy, "refresh": "epoch", "backend": backend}
    plain = GradMix(model, buffer, generator=generator(), **how)
    watched = GradMix(model, buffer, generator=generator(), cuda_graph=cuda_graph, **how)
    batches = [on_gpu(rows(8, 10 + step)) for step in range(6)]
    expected = [plain.select(*batch) for batch in batches]
    # A graph is captured when a shape comes again, in the third call after that of the refresh.
    found = [watched.select(*batch) for batch in batches[:3]]
    for batch in batches[3:]:
        with no_waiting():
            found.append(watched.select(*batch))
            found[-1].mix()
    for pairs, known in zip(found, expected, strict=True):
        assert torch.equal(pairs.partner, known.partner) and torch.equal(pairs.helpful, known.helpful)
        assert torch.equal(pairs.lam, known.lam)
        assert torch.equal(pairs.alignment.nan_to_num(9), known.alignment.nan_to_num(9))
    assert len({float(pairs.lam.min()) for pairs in found}) > 1


def test_a_graph_follows_a_refreshed_reference() -> None:
    model, buffer = MLP().cuda(), on_gpu(rows(30, 3))
    plain, replayed = (
        GradMix(model, buffer, criterion="sample", refresh=2, generator=generator(), cuda_graph=flag)
        for flag in (False, True)
    )
    for step in range(6):
        with torch.no_grad():
            model.fc.weight.add_(0.1 * torch.randn_like(model.fc.weight))
        batch = on_gpu(rows(8, step))
        known, pairs = plain.select(*batch), replayed.select(*batch)
        assert torch.equal(pairs.partner, known.partner) and torch.equal(pairs.alignment, known.alignment)


def test_a_graph_that_two_streams_replay_in_turn() -> None:
    """Both write its memory; the second must wait for the first."""
    model, buffer = MLP().cuda(), on_gpu(rows(30, 3))
    plain, replayed = (
        GradMix(model, buffer, refresh="epoch", generator=generator(), cuda_graph=flag) for flag in (False, True)
    )
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    batches = [on_gpu(rows(256, step)) for step in range(8)]
    expected = [plain.select(*batch) for batch in batches]
    torch.cuda.synchronize()
    found = []
    for step, batch in enumerate(batches):
        with torch.cuda.stream(streams[step % 2]):
            found.append(replayed.select(*batch))
    torch.cuda.synchronize()
    for pairs, known in zip(found, expected, strict=True):
        assert torch.equal(pairs.partner, known.partner) and torch.equal(pairs.helpful, known.helpful)


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["calls", "graph"])
def test_bad_input_is_named_by_the_next_call(cuda_graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, buffer = MLP().cuda(), on_gpu(rows(30, 3))
    mixup = GradMix(model, buffer, criterion="sample", refresh="epoch", cuda_graph=cuda_graph)
    x, y = on_gpu(rows(6, 1))
    mixup(x, y)
    bad = y.clone()
    bad[2] = CLASSES
    mixup(x, bad)
    with pytest.raises(ValueError, match=f"batch labels: row 2 is {CLASSES}, expected .* in an earlier call"):
        mixup(x, y)
    broken = x.clone()
    broken[4] = torch.nan
    assert not mixup.select(broken, y).helpful[4]
    with pytest.raises(ValueError, match="batch: sample 4 holds NaN"):
        deferred_checks.raise_deferred()
    monkeypatch.setenv("GRADMIX_CHECKS", "now")
    with pytest.raises(ValueError, match="batch: sample 4 holds NaN"):
        mixup(broken, y)
    mixup(x, y)


def test_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model, buffer = MLP().cuda(), on_gpu(rows(30, 3))
    batch = on_gpu(rows(8, 1))
    expected = select_pairs(model, buffer, batch, generator=generator(), criterion="class")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        mixup = GradMix(model, buffer, generator=generator(), cuda_graph=True, criterion="sample")
        found = [
            (select_pairs(model, buffer, batch, generator=generator()), mixup.select(*batch, lam=0.3)) for _ in range(5)
        ]
    stream.synchronize()
    for pairs, _ in found:
        assert torch.equal(pairs.partner, expected.partner) and torch.equal(pairs.alignment, expected.alignment)
    assert all(torch.equal(v.alignment, found[0][1].alignment) for _, v in found)


def test_the_summary_waits_and_says_the_same() -> None:
    model, buffer, batch = MLP(), rows(12, 3), rows(9, 1)
    known = select_pairs(model, buffer, batch, generator=generator(), criterion="class").summary()
    found = select_pairs(
        model.cuda(), on_gpu(buffer), on_gpu(batch), generator=generator(), criterion="class"
    ).summary()
    assert found == {name: pytest.approx(value, abs=1e-4) for name, value in known.items()}
    assert isinstance(gradmix.alignment_matrix(model, on_gpu(buffer), on_gpu(batch), lam=0.3).inner, Tensor)
