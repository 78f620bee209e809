"""A batch goes one straight way through ``select_pairs`` (call_path.py prints it)."""

from __future__ import annotations

from collections import Counter

import pytest
from call_path import Entry, path


@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("estimator", ["feature", "mixed", "jvp", "sketch"])
def test_a_batch_goes_one_straight_way(estimator: str, criterion: str) -> None:
    found = path(estimator, criterion)
    assert found[0] == Entry("", "gradmix.selection", "select_pairs")
    visits = Counter(entry.module for entry in found)
    assert max(visits.values()) <= 2, visits
    functions = [entry.function for entry in found]
    scored = min(functions.index(name) for name in ("score", "class_scores", "__call__") if name in functions)
    assert all(entry.module != "gradmix.selection" for entry in found[scored:])
    assert 6 <= len(found) <= 14
