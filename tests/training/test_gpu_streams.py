"""Streams of any data on a GPU: rows that are read, kept, texts, options; as on the CPU, and without waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import no_waiting
from patience import PATIENCE
from two_processes_training import BASE, CASES, READ_CASES, outcome, read, resident

from gradmix.training.config import DataConfig, MixConfig, OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.loop.run import Run
from gradmix.training.loop.trainer import train_one
from gradmix.training.streams import class_incremental
from gradmix.training.streams.benchmarks import make_stream

pytestmark = pytest.mark.gpu

ON = {"device": "cuda"}
# float32 sums are taken in another order: after some dozen steps this is what lies between the two.
CLOSE = {"rtol": 1e-3, "atol": 2e-4}


def both(case: tuple[str, TrainConfig], stream: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    method, config = case
    on_gpu = outcome((method, replace(config, **ON)), stream)
    return on_gpu, outcome((method, replace(config, device="cpu")), stream)


@pytest.mark.parametrize(
    "name", ["er", "der++", "mixup", "a-gem", "by sample, in three parts", "by sample, growing head"]
)
def test_resident_rows_train_as_on_the_cpu(name: str) -> None:
    on_gpu, expected = both(CASES[name], resident())
    for parameter, known in zip(on_gpu["parameters"], expected["parameters"], strict=True):
        torch.testing.assert_close(parameter.cpu(), known, **CLOSE)
    assert torch.equal(on_gpu["held"].cpu(), expected["held"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("storage", [None, "memory", "disk"])
@pytest.mark.parametrize("name", ["er", "er, crops"])
def test_rows_that_are_read_train_as_on_the_cpu(name: str, storage: Any, workers: int) -> None:
    method, config = READ_CASES[name]
    config = replace(config, replay=replace(config.replay, storage=storage), data=replace(config.data, workers=workers))
    on_gpu, expected = both((method, config), read(name))
    for parameter, known in zip(on_gpu["parameters"], expected["parameters"], strict=True):
        torch.testing.assert_close(parameter.cpu(), known, **CLOSE)


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": "bf16"},
        {"amp": "fp16", "accumulate": 2},
        {"amp": "bf16", "channels_last": True, "compile": True},
        {"accumulate": 3, "growing_head": True, "channels_last": True},
    ],
    ids=lambda changes: ", ".join(changes),
)
@pytest.mark.parametrize("method", ["mixup", "gradmix-sample", "der++-gradmix-sample"])
def test_options_of_large_runs(method: str, changes: dict[str, Any]) -> None:
    pictures = torch.rand(240, 3, 16, 16), torch.arange(240) % 6
    stream = class_incremental(pictures, pictures, tasks=3)
    config = TrainConfig(
        optim=OptimConfig(model="resnet8", epochs=1, batch=16, lr=0.02, augment="crop-flip", **changes),
        replay=ReplayConfig(size=4, batch=16),
        mix=MixConfig(originals=True),
        **ON,
    )
    result = train_one(config, method, 0, stream=stream)
    assert result.status == "complete" and 0 <= result.accuracy[-1].mean() <= 1
    assert result.timing.peak_memory_bytes > 0 and 0 < result.timing.data_share < 1


@pytest.mark.parametrize("space", ["embedding", "feature"])
def test_texts_are_mixed_inside_the_model(space: Any) -> None:
    config = TrainConfig(
        data=DataConfig("split-descriptions", tasks=2), optim=OptimConfig(epochs=2), mix=MixConfig(space=space), **ON
    )
    result = train_one(config, "gradmix-sample", 0, stream=make_stream("split-descriptions", tasks=2))
    assert result.status == "complete"


def test_the_reference_of_replayed_rows_makes_the_host_wait_for_nothing() -> None:
    """From the second task on a step is launched whole; scoring and the ends of tasks may wait."""
    stream = resident()
    config = replace(BASE, mix=MixConfig(reference="replayed"), **ON)
    stepped = Run.step
    watched = []

    def step(self: Any) -> Any:
        if self.task == 1 and 0 < self.batches_done < 3:
            watched.append(self.steps)
            with no_waiting():
                return stepped(self)
        return stepped(self)

    Run.step = step  # type: ignore[method-assign]
    try:
        train_one(config, "gradmix-sample", 0, stream=stream)
    finally:
        Run.step = stepped  # type: ignore[method-assign]
    assert watched


@pytest.mark.slow
@pytest.mark.skipif("WORLD_SIZE" in os.environ, reason="started by torchrun itself")
def test_one_process_of_torchrun_uses_its_gpu(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    flags = ["--methods", "gradmix-sample", "--seeds", "0", "--epochs", "1", "--output", str(tmp_path / "run")]
    command = [*launcher, "-m", "gradmix.cli", "train", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert "gradmix-sample" in done.stdout
