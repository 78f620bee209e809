"""Selections are those on record: decisions exactly, real numbers but for the rounding of another machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import thinning
import torch
from golden_selections import RECORD, Case, cases, differences, digests, selections

EVERY = 5
"""No number of values of a setting has this factor, so that each pair of settings stays in some case."""


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Case]]:
    yield cases(1 if thinning.ALL else EVERY)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def record() -> dict[str, Case]:
    return json.loads(RECORD.read_text())


def real(value: Any) -> bool:
    """Whether this is the digest of real numbers."""
    return isinstance(value, list) and len(value) == 4 and isinstance(value[-1], float)


def test_selections_are_those_on_record(found: dict[str, Case], record: dict[str, Case]) -> None:
    assert found.keys() <= record.keys() and len(found) >= len(record) // (1 if thinning.ALL else EVERY + 1)
    for name, case in digests(found).items():
        expected = record[name]
        assert case.keys() == expected.keys(), name
        for key, value in case.items():
            if not real(value):
                assert value == expected[key], f"{name}: {key}"
                continue
            assert value[:2] == expected[key][:2], f"{name}: {key}"
            assert value[2:] == pytest.approx(expected[key][2:], rel=1e-5, abs=1e-4), f"{name}: {key}"


def test_the_record_tells_settings_apart(record: dict[str, Case]) -> None:
    """A record of nothing but refusals, or of nothing but agreement, would hold a rewrite to nothing."""
    shares = [sum(case["helpful"]) / len(case["helpful"]) for case in record.values() if "helpful" in case]
    assert min(shares) == 0 and max(shares) == 1 and 0.4 < sum(shares) / len(shares) < 0.95
    assert len({json.dumps(case["partner"]) for case in record.values() if "partner" in case}) > 400


def test_a_difference_of_one_bit_is_found() -> None:
    found = dict(islice(selections(), 3))
    name = next(iter(found))
    changed = found | {name: found[name] | {"lam": torch.nextafter(found[name]["lam"], torch.tensor(9.0))}}
    assert list(differences(changed, found)) == [f"{name}: lam"]
    assert list(differences(found, found)) == []
