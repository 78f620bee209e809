"""Runs of the same settings, method and seed that were made more than once: each counts once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gradmix.training.runs.results import RunResult, tasks_reached
from gradmix.training.runs.settings import settings_of


def drop_repeats(results: Sequence[RunResult]) -> tuple[list[RunResult], list[str]]:
    """Keep one of several runs of the same settings, method and seed.

    The first is kept if the others have the same result, to the bit. An interrupted run gives way to one that has
    ended, or got further: it is in no mean.

    Args:
        results: Runs as :func:`~gradmix.training.runs.results.load_runs` reads them, in any order.

    Returns:
        The runs to compare, in the order given, and a note for each pair of folders of which runs were left out.

    Raises:
        ValueError: Two runs have ended with different results; the message names their folders.
    """
    kept: dict[str, RunResult] = {}
    notes: Counter[str] = Counter()
    for result in results:
        key = json.dumps([result.benchmark, result.method, result.seed, settings_of(result.config)], sort_keys=True)
        other = kept.setdefault(key, result)
        if other is result:
            continue
        better, worse = (result, other) if _rank(result) > _rank(other) else (other, result)
        kept[key] = better
        here, there = _roots(worse, better)
        if _is_same(worse, better):
            notes[f"in {here} with the same result, to the bit, as in {there}: counted once"] += 1
        elif worse.status == "interrupted":
            notes[f"in {here} interrupted, of which {there} has more: left out"] += 1
        else:
            raise ValueError(
                f"{result.method} with seed {result.seed} is there twice with the same settings and different results: "
                f"in {there} and in {here}{_data(worse, better)}; expected one of them: give the folders to compare "
                "without the other"
            )
    return list(kept.values()), [f"{count} run{'s' * (count > 1)} {note}" for note, count in notes.items()]


def _rank(result: RunResult) -> tuple[bool, int]:
    return result.status != "interrupted", tasks_reached(result)


def _is_same(a: RunResult, b: RunResult) -> bool:
    return (
        a.status == b.status
        and np.array_equal(a.accuracy, b.accuracy, equal_nan=True)
        and np.array_equal(a.mixed_share, b.mixed_share, equal_nan=True)
        and len(a.alignments) == len(b.alignments)
        and all(
            x.task == y.task
            and np.array_equal(x.classes, y.classes)
            and np.array_equal(x.cosine, y.cosine, equal_nan=True)
            for x, y in zip(a.alignments, b.alignments, strict=True)
        )
    )


def _roots(a: RunResult, b: RunResult) -> tuple[str, str]:
    """The folders of two runs without what their paths end in alike, as in ``a/er/seed-0`` and ``b/er/seed-0``."""
    if a.folder is None or b.folder is None:
        return str(a.folder or "memory"), str(b.folder or "memory")
    one, two = a.folder, b.folder
    while one.name == two.name and one.parent.name and two.parent.name:
        one, two = one.parent, two.parent
    return str(one), str(two)


def _data(a: RunResult, b: RunResult) -> str:
    here, there = a.config.data.data_dir, b.config.data.data_dir
    return "" if here == there else f", of the data {there} and {here}"
