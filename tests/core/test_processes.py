"""Selection over two processes: the same in both to the bit, and what one process has of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import rows
from torch import Tensor
from two_processes_selection import (
    BATCH,
    CHUNK,
    ESTIMATORS,
    MARKS,
    SIZE,
    SOURCES,
    WAYS,
    generator,
    half,
    kept,
    marked,
    model,
    own_rows,
    told_by_both,
)

import gradmix
from gradmix.replay.sources import chunks_with_numbers
from gradmix.runtime.collectives import all_gather_samples, all_reduce_sum, any_rank, broadcast, local_share


def assert_close(value: Any, expected: Any, tolerance: float | None) -> None:
    """Nested dicts, lists and tensors; to the bit at tolerance 0, by torch's own measure at None."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for name, part in expected.items():
            assert_close(value[name], part, tolerance)
    elif isinstance(expected, (list, tuple)):
        for part, known in zip(value, expected, strict=True):
            assert_close(part, known, tolerance)
    elif isinstance(expected, Tensor):
        bound = {} if tolerance is None else {"atol": tolerance, "rtol": tolerance}
        torch.testing.assert_close(value, expected, equal_nan=True, **bound)
    else:
        assert value == expected


# --------------------------------------------------------------------------------------------------------- one process


def test_without_a_group_nothing_is_exchanged() -> None:
    values = [torch.rand(2, 3), torch.tensor(4)]
    for result in (all_reduce_sum(values, None), broadcast(values, None)):
        assert all(a is b for a, b in zip(result, values, strict=True))
    assert all_gather_samples(values[0], None) is values[0]
    assert any_rank(torch.tensor([False, True]), None).tolist() == [True]
    assert any_rank(torch.zeros(0, dtype=torch.bool), None).tolist() == [False]
    assert [*local_share(5, None)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("group", ["world", 3, torch.nn.Linear(1, 1)], ids=["text", "number", "module"])
def test_what_is_no_group_is_refused(group: Any) -> None:
    for call in (
        lambda: gradmix.reference_gradient(model(), rows(3), group=group),
        lambda: gradmix.select_pairs(model(), rows(3), rows(3), group=group),
        lambda: gradmix.GradMix(model(), rows(3), group=group),
    ):
        with pytest.raises(TypeError, match=rf"group: got {type(group).__name__}, expected None or a process group"):
            call()


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("source", SOURCES)
def test_the_shares_are_the_rows(source: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts() -> list[tuple[int, Tensor, Tensor]]:
        found = []
        for rank in range(size):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda _group, rank=rank: rank)
            found += chunks_with_numbers("buffer", SOURCES[source](), CHUNK, torch.device("cpu"), group)
        return sorted(found, key=lambda part: part[0])

    group: Any = object()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _group: size)
    whole = list(chunks_with_numbers("buffer", SOURCES[source](), CHUNK, torch.device("cpu")))
    pieces = parts()
    counts = torch.tensor([0, *(len(y) for _, _, y in pieces)])
    assert [start for start, _, _ in pieces] == counts.cumsum(0)[:-1].tolist()
    for k in (1, 2):
        assert torch.equal(
            torch.cat([torch.empty(0), *(part[k].flatten().float() for part in pieces)]),
            torch.cat([torch.empty(0), *(part[k].flatten().float() for part in whole)]),
        )


# ------------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def told_by_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return told_by_both(tmp_path_factory.mktemp("processes"))


def test_exchanges(told_by_processes: list[dict[str, Any]]) -> None:
    both = [told["exchanges"] for told in told_by_processes]
    shares = [[one["shares"][n] for one in both] for n in range(6)]
    assert [first + second for first, second in shares] == [list(range(n)) for n in range(6)]
    told, other = ({name: value for name, value in one.items() if name != "shares"} for one in both)
    assert_close(other, told, 0)
    expected = [torch.full((2, 3), 3.0), torch.tensor(5), torch.ones(0), torch.tensor([1.0])]
    assert all(torch.equal(a, b) for a, b in zip(told["sums"], expected, strict=True))
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        assert torch.equal(told[f"rows of {dtype}"], torch.cat([own_rows(rank, dtype) for rank in range(SIZE)]))
    assert told["rows of no width"].shape == (5, 0) and told["no rows"].shape == (0, 3)
    assert torch.equal(told["rows of one"], torch.ones(3, 2))
    assert [flag.tolist() for flag in told["any"]] == [[True], [True], [False]]
    assert [v.tolist() for v in told["the first's"]] == [[0, 7], 2.0]


def test_reference_gradients(told_by_processes: list[dict[str, Any]]) -> None:
    both = [told["references"] for told in told_by_processes]
    for name, source in SOURCES.items():
        if name in ("no rows", "empty buffer"):
            assert [told[name] for told in both] == ["buffer: got no samples, expected at least one"] * SIZE
            continue
        expected = gradmix.reference_gradient(model(), source(), chunk_size=CHUNK)
        assert torch.equal(both[0][name], both[1][name]), name
        torch.testing.assert_close(both[0][name], expected)
        # Every row is forwarded by one of them; one without any forwards a single row, to know the shapes.
        forwarded = [told[f"{name}: forwarded"] for told in both]
        alone = {"one row": [1, 1], "dataset of one": [1, 1], "loader of one batch": [4, 1]}
        total = {"two rows": 2}.get(name, 23)
        assert forwarded == alone[name] if name in alone else sum(forwarded) == total and min(forwarded) >= total // 3


def test_selections(told_by_processes: list[dict[str, Any]]) -> None:
    both = [told["selections"] for told in told_by_processes]
    x, y = rows(BATCH, 1)
    for name, (source, criterion, estimator) in WAYS.items():
        told = [one[name] for one in both]
        assert_close(told[1][1], told[0][1], 0)
        alone = gradmix.GradMix(
            model(),
            SOURCES[source](),
            criterion=criterion,
            estimator=ESTIMATORS[estimator],
            generator=generator(0),
            chunk_size=CHUNK,
            class_samples=6,
        )
        pairs = alone.select(x, y, lam=0.3)
        assert_close(told[0][1], kept(alone), None)
        for rank in range(SIZE):
            expected = pairs.alignment
            if criterion == "sample":
                expected = half(half(expected, rank).T, rank).T
            elif source == "no rows":
                expected = torch.zeros_like(told[rank][0])
            if estimator == "sketch" and criterion == "sample":
                # Which decisions are checked again depends on the rows at hand.
                assert told[rank][0].shape == expected.shape
                continue
            own = ~torch.eye(len(expected), dtype=torch.bool) if estimator == "jvp" else torch.ones(())
            difference = (told[rank][0] - expected) * own
            assert difference.nan_to_num().abs().max() < 1e-4, name
            assert torch.equal(told[rank][0].isnan(), expected.isnan())
    for name, places in MARKS.items():
        chosen = marked(places)
        buffer = (x[chosen], y[chosen])
        for estimator in ("feature", "jvp"):
            for rank in range(SIZE):
                mine = (half(x, rank), half(y, rank))
                expected = gradmix.select_pairs(model(), buffer, mine, lam=0.3, estimator=estimator).alignment
                assert_close(both[rank][f"marked {name}, {estimator}"], expected, None)
        alone = gradmix.GradMix(model(), None, criterion="class", generator=generator(0))
        alone.select(x, y, lam=0.3, replayed=chosen)
        assert_close(both[1][f"marked {name}, class"], both[0][f"marked {name}, class"], 0)
        assert_close(both[0][f"marked {name}, class"], kept(alone), None)
    for told in both:
        assert told["refreshes before"] == 1 and told["refreshes after"] == 2
        torch.testing.assert_close(told["wrapped"], gradmix.reference_gradient(model(), rows(23, 3)))


@pytest.mark.parametrize("estimator", ["feature", "mixed"])
def test_inputs_of_several_tensors_over_processes(told_by_processes: list[dict[str, Any]], estimator: str) -> None:
    for told in (one["selections"] for one in told_by_processes):
        alignment, state = told[f"of two inputs, {estimator}"]
        expected, known = told[f"odd, class, {estimator}"]
        assert_close(alignment, expected, None)
        assert_close(state["table"], known["table"], None)
        assert_close(state["reference"], known["reference"], None)
