"""Settings to look at where selection gained nothing: those that the runs themselves give a reason for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradmix.training.reports import cells
from gradmix.training.reports.rows import Difference

if TYPE_CHECKING:
    from gradmix.training.reports.tables import MethodRow
    from gradmix.training.runs.results import RunResult

RARE = 0.1
"""Share of old samples in one shuffled stream up to which selection had an effect there: 2 % on MNIST, 10 % on digits
(docs/results/streams.md, docs/results/digits.md)."""

_BASELINES = ("er", "mixup")


def advice(rows: Sequence[MethodRow], differences: Sequence[Difference]) -> list[str]:
    """Name the settings to look at, in one sentence, if no method that selects is significantly above er or mixup.

    - ``--replay-stream shuffled`` if current and replayed samples come in fixed numbers, and old samples would be rare
      in one stream of both.
    - ``--mix-originals`` if learning accuracy is below er's, by an interval that leaves out 0.

    Args:
        rows: The methods.
        differences: Those of the methods that select to the others.

    Returns:
        The sentence; nothing if there was a gain, or none of the settings applies.
    """
    by_arm = {row.arm: row for row in rows}
    compared = [d for d in differences if by_arm[d.minus].method in _BASELINES]
    if not compared or any(d.significant and d.metrics["average_accuracy"].mean > 0 for d in compared):
        return []
    selecting = [by_arm[d.arm] for d in compared]
    found = []
    shares = [row.old_share for row in selecting]
    if all(share <= RARE for share in shares):
        found.append(
            "--replay-stream shuffled, the protocol of gradmix train with nothing given (old samples would be "
            f"{cells.percent(max(shares))} of the last task's samples: where they are rare selection gains most over "
            "the others, and all methods are less accurate)"
        )
    behind = [
        (d.metrics["learning_accuracy"], d.arm)
        for d in compared
        if by_arm[d.minus].method == "er"
        and not by_arm[d.arm].originals
        and d.metrics["learning_accuracy"].excludes_zero
        and d.metrics["learning_accuracy"].mean < 0
    ]
    if behind:
        (mean, _, half), arm = min(behind)
        found.append(f"--mix-originals (the learning accuracy of {arm} is {-mean:.3f} ± {half:.3f} below er's)")
    names = " or ".join(dict.fromkeys(by_arm[d.minus].method for d in compared))
    return [f"No significant gain over {names} was found. Settings to look at: {'; '.join(found)}."] if found else []


def old_share(run: RunResult) -> float:
    """Estimate the share of old samples in the last task's, were current and kept samples shuffled into one stream.

    It is ``kept / (kept + current)``, with ``current`` the samples of a task, from the number of steps.

    Returns:
        The share; NaN where current and kept samples are in one stream already, or cannot be.
    """
    config, epochs, batch = run.config, run.config.optim.epochs, run.config.optim.batch
    size = config.replay.size
    fixed = config.data.online or config.mix.candidates == "replayed"
    if config.replay.stream != "dual" or fixed or run.tasks < 2 or not (epochs and batch and size and run.timing.steps):
        return math.nan
    current = run.timing.steps * batch / (epochs * run.tasks)
    old_classes = sum(map(len, run.task_classes[:-1]))
    kept = min(size * old_classes if config.replay.policy == "class" else size, current * (run.tasks - 1))
    return kept / (kept + current)
