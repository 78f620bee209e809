"""Training by two processes: what one process makes of the same steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import start_processes
from thinning import part
from two_processes_training import CASES, OPTION_CASES, READ_CASES, outcome, process, read, resident

from gradmix.training.loop.sharding import Share

CHOSEN, CHOSEN_TO_READ = part(CASES, 3), part(READ_CASES, 3)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes came to, case by case."""
    folder = tmp_path_factory.mktemp("together")
    start_processes(process, (str(folder), CHOSEN, CHOSEN_TO_READ), 2)
    told = [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]
    for outcomes in told:
        assert "failure" not in outcomes, outcomes.get("failure")
    return told


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:sample .* is left out")
@pytest.mark.parametrize("name", [*CHOSEN, *(f"read: {name}" for name in CHOSEN_TO_READ)])
def test_two_processes_make_the_steps_of_one(told: list[dict[str, Any]], name: str) -> None:
    first, second = (outcomes[name] for outcomes in told)
    case, stream = (
        (READ_CASES[name.removeprefix("read: ")], read(name))
        if name.startswith("read: ")
        else (CASES[name], resident())
    )
    alone = outcome(case, stream)
    assert first["status"] == "complete"
    for one, other in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(one, other), "both processes have the same model"
    for one, expected in zip(first["parameters"], alone["parameters"], strict=True):
        # Sums are taken in another order; after all these steps that is all there is between them.
        torch.testing.assert_close(one, expected, rtol=0, atol=2e-6)
    assert torch.equal(first["accuracy"], alone["accuracy"]) and torch.equal(second["accuracy"], alone["accuracy"])
    assert torch.equal(first["held"], alone["held"])
    torch.testing.assert_close(torch.tensor(first["mixed"]), torch.tensor(alone["mixed"]), equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTION_CASES)
def test_two_processes_agree_and_go_on_to_the_bit(told: list[dict[str, Any]], name: str) -> None:
    first, second = (outcomes[f"option: {name}"] for outcomes in told)
    assert first["status"] == second["status"] == "complete"
    if name in ("bf16", "fp16", "fp16, in parts, originals", "compiled"):
        method, config = OPTION_CASES[name]
        alone = outcome((method, replace(config, optim=replace(config.optim, compile=False))), resident())
        for one, expected in zip(first["parameters"], alone["parameters"], strict=True):
            # Sums over a share's rows are rounded where one process rounds those over all.
            torch.testing.assert_close(one, expected, rtol=0, atol=3e-3)
    others = [second, *(outcomes[f"resumed: {name}"] for outcomes in told)]
    for other in others:
        for kind in ("parameters", "buffers"):
            for one, same in zip(first[kind], other[kind], strict=True):
                assert torch.equal(one, same)
        assert torch.equal(first["accuracy"], other["accuracy"]) and torch.equal(first["held"], other["held"])


@pytest.mark.parametrize("sizes", [[5, 4], [1, 0], [7], [0, 0], [3, 3, 2, 5]])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_even_and_whole(monkeypatch: pytest.MonkeyPatch, sizes: list[int], count: int) -> None:
    shares = []
    for rank in range(count):
        monkeypatch.setattr("gradmix.training.loop.sharding.size_of", lambda _group: count)
        monkeypatch.setattr("gradmix.training.loop.sharding.rank_of", lambda _group, rank=rank: rank)
        shares.append(Share.of(sizes, None, torch.device("cpu")))
    everyone = torch.cat([share.mine for share in shares])
    assert all(torch.equal(share.everyone, everyone) for share in shares)
    assert sorted(everyone.tolist()) == list(range(sum(sizes)))
    edges = torch.tensor([0, *sizes]).cumsum(0)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        counts = [int(((share.mine >= low) & (share.mine < high)).sum()) for share in shares]
        assert max(counts) - min(counts) <= 1
