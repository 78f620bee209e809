"""Made-up results of runs, for the tests of what is done with results."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradmix.training.config import DataConfig, MixConfig, OptimConfig, TrainConfig
from gradmix.training.method_names import stable_name
from gradmix.training.runs.results import AlignmentRecord, RunResult, SteadySteps, Timing


def make_timing(steps: int, *, selects: bool) -> Timing:
    """A first step of three seconds, then steps of 2.5 ms in the mean, 2 ms in the median, and 40 % selection."""
    if not steps:
        return Timing(0, 4.0, 0.0, 0.0, 0.5)
    warm = steps - 1
    steady = SteadySteps(warm, 0.002, 0.0025 * warm, 0.001 * warm if selects else 0.0, 0.0005 * warm)
    selection = 0.5 + steady.seconds_selection if selects else 0.0
    return Timing(steps, 4.0, 3.0 + steady.seconds_step, selection, 0.5, 1.0 + steady.seconds_data, steady=steady)


def make_result(
    method: Any = "gradmix-class",
    seed: int = 0,
    *,
    benchmark: Any = "split-digits",
    tasks: int = 3,
    per_task: int = 2,
    reached: int | None = None,
    level: float = 0.9,
    steps: int = 100,
    config: TrainConfig | None = None,
    class_names: tuple[str, ...] | None = None,
) -> RunResult:
    """A run whose old tasks lose accuracy from ``level``; ``reached`` below ``tasks`` makes it an interrupted one."""
    rng = np.random.default_rng(1000 * seed + len(stable_name(method)))
    done = tasks if reached is None else reached
    accuracy = np.full((tasks, tasks), np.nan)
    for i in range(done):
        for j in range(tasks):
            accuracy[i, j] = np.clip(level - 0.05 * (i - j) + rng.normal(0, 0.01), 0, 1) if j <= i else 0.0
    alignments = []
    if method == "gradmix-class":
        for task in range(1, done):
            classes = np.arange((task + 1) * per_task)
            cosine = rng.normal(0, 0.3, (classes.size, classes.size))
            cosine[0, -1] = np.nan
            alignments.append(AlignmentRecord(task, classes, cosine, np.nan_to_num(cosine) >= 0, 0.0))
    selects = method.startswith("gradmix")
    base = config or TrainConfig(data=DataConfig(benchmark), optim=OptimConfig(lr=0.05), mix=MixConfig())
    return RunResult(
        benchmark=benchmark,
        method=method,
        seed=seed,
        status="complete" if reached is None else "interrupted",
        class_names=class_names or tuple(f"digit {i}" for i in range(tasks * per_task)),
        task_classes=tuple(tuple(range(t * per_task, (t + 1) * per_task)) for t in range(tasks)),
        accuracy=accuracy,
        timing=make_timing(steps, selects=selects),
        config=TrainConfig(
            methods=(method,), seeds=(seed,), data=base.data, optim=base.optim, replay=base.replay, mix=base.mix
        ),
        mixed_share=tuple([0.75 if selects else float("nan")] * tasks),
        alignments=tuple(alignments),
        environment={"torch": "2.0", "device": "cpu", "threads": 2},
    )
