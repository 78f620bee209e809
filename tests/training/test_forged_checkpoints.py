"""Checkpoints that were sealed with a right digest and hold what no run has: refused by name, whatever it is."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gradmix.training.config import OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.loop import checkpoint
from gradmix.training.loop.checkpoint import CheckpointError
from gradmix.training.loop.trainer import Progress, train_one
from gradmix.training.streams import TaskStream, class_incremental

CONFIG = TrainConfig(optim=OptimConfig(model="mlp", epochs=1, batch=4), replay=ReplayConfig(size=4, batch=2), threads=1)
FORGED: list[Any] = [
    None, True, -1, 7, 10**30, 1.5, "x", [], {}, (1, 2), torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64),
    torch.zeros(1).expand(10**12), torch.zeros(0), torch.full((4,), 9, dtype=torch.int64), {"a": {"b": [[[[]]]]}},
]  # fmt: skip


def stream() -> TaskStream:
    y = torch.arange(16) % 4
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    return class_incremental((x, y), (x, y), tasks=2)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the entries of a nested state are; of a list, the first two."""
    if at:
        yield at
    inner = value if isinstance(value, dict) else range(min(2, len(value))) if isinstance(value, (list, tuple)) else ()
    for key in inner:
        yield from places(value[key], (*at, key))


def changed(value: Any, at: tuple[Any, ...], *new: Any) -> Any:
    """A copy with another entry at a place, or, with none given, without that entry."""
    key, *rest = at
    inside = [changed(value[key], tuple(rest), *new)] if rest else list(new)
    if isinstance(value, dict):
        others = {k: v for k, v in value.items() if k != key}
        return others | {key: inside[0]} if inside else others
    return type(value)([*value[:key], *inside, *value[key + 1 :]])


def left(method: str, path: Path, config: TrainConfig = CONFIG) -> tuple[dict[str, Any], str]:
    """The state, and what tells the run, of a run that is left in its second task."""

    def leave(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    train_one(config, method, 0, stream=stream(), checkpoint=path, on_step=leave)
    content = torch.load(path, weights_only=True)
    return content["state"], content["run"]


@pytest.mark.parametrize("method", ["der++", "gradmix-class"])
def test_a_forged_state_is_refused_or_of_use(method: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    state, run = left(method, path)
    draw = random.Random(0)
    before = torch.get_rng_state()
    # Every entry is left out once; what stands in its place otherwise is drawn. Large parts alike are passed over.
    forged = [changed(state, at) for at in places(state) if len(at) < 3]
    forged += [changed(state, at, draw.choice(FORGED)) for at in places(state) for _ in range(1 + (at[0] == "method"))]
    refused = 0
    for one in forged:
        checkpoint.save(one, path, run=run)
        try:
            train_one(CONFIG, method, 0, stream=stream(), checkpoint=path)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error) and "remove the file to start the run again" in str(error)
    assert refused > len(forged) / 2
    assert torch.equal(torch.get_rng_state(), before), "nothing of it is left in the global generators"
    # As the message says.
    path.unlink()
    assert train_one(CONFIG, method, 0, stream=stream(), checkpoint=path).status == "complete"


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (("task",), 2), (("task",), -1), (("epoch",), 1), (("batches_done",), 3), (("width",), 5), (("steps",), True),
        (("order",), torch.zeros(8, dtype=torch.int64)), (("order",), torch.arange(9)), (("order",), torch.arange(8.0)),
        (("accuracy",), torch.zeros(2, 3, dtype=torch.float64)), (("mixed_share",), [0.0]),
        (("buffer", "y"), torch.full((4,), 4)), (("buffer", "x"), torch.zeros(4, 6)), (("clock",), {"step": "x"}),
        (("optimiser", "param_groups", 0, "momentum"), 0.5), (("optimiser", "param_groups", 0, "lr"), "x"),
        (("optimiser", "state", 0, "momentum_buffer"), torch.zeros(2)), (("schedule", "gamma"), None),
        (("global_generators", "numpy", "pos"), 10**6), (("global_generators", "numpy", "key"), torch.zeros(3)),
        (("global_generators", "python"), (3, (1, 2), None)), (("generators", "batches"), torch.zeros(7)),
        (("method", "mixup", "reference"), torch.zeros(3, 3)), (("method", "mixup", "table", "lams"), [0.5]),
        (("method", "mixup", "table", "classes"), torch.tensor([0, 1, 2, 9])),
    ],
)  # fmt: skip
def test_what_would_end_the_run_later_is_refused_at_once(at: tuple[Any, ...], new: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    config = replace(CONFIG, optim=replace(CONFIG.optim, momentum=0.9))
    state, run = left("gradmix-class", path, config)
    checkpoint.save(changed(state, at, new), path, run=run)
    kept = path.read_bytes()
    with pytest.raises(CheckpointError, match="no state of this run"):
        train_one(config, "gradmix-class", 0, stream=stream(), checkpoint=path)
    assert path.read_bytes() == kept


@pytest.mark.parametrize(
    "content",
    [
        [], "text", {}, {"format": 1}, {"format": "1", "gradmix": "1", "run": None, "state": {}}, torch.zeros(2),
        {"format": 1, "gradmix": "1", "run": 3, "state": {}}, {"format": 1, "gradmix": "1", "run": None, "state": []},
    ],
    ids=repr,
)  # fmt: skip
def test_a_sealed_file_of_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    archive = io.BytesIO()
    torch.save(content, archive)
    path = tmp_path / "c.pt"
    path.write_bytes(checkpoint._add_seal(archive.getvalue()))
    with pytest.raises(CheckpointError, match="holds something else than a checkpoint; remove the file"):
        checkpoint.load(path)


def test_sealed_bytes_of_any_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save({"a": torch.arange(50), "b": [1, {"c": 2.0}]}, path)
    whole = bytearray(path.read_bytes())[: -checkpoint._SEAL_BYTES]
    draw = random.Random(0)
    for _ in range(300):
        body = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            body[draw.randrange(len(body) - 2)] = draw.randrange(256)
        path.write_bytes(bytes(body) + checkpoint._seal_of(bytes(body)))
        try:
            checkpoint.load(path)
        except CheckpointError as error:
            assert str(path) in str(error)
