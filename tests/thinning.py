"""Part of a long list of cases: what the tests of every day run of it. ``GRADMIX_ALL_VARIANTS=1`` runs all of it.

The forge does so each week, and whoever changes what a list is about should. A list is thinned only where its cases are
products of settings, each of which stays in some case, or where another test runs all of them in another way.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

ALL = "GRADMIX_ALL_VARIANTS" in os.environ


def part(cases: Iterable[T], every: int) -> list[T]:
    """Every ``every``-th case, or all.

    Args:
        cases: A product of settings, the last of which changes fastest. A step that has no factor in common with the
            numbers of values keeps each pair of settings about equally often.
        every: The step.
    """
    return list(cases)[:: 1 if ALL else every]
