"""Every kernel, as compiled for sm_80 and launched by its launcher, against float64, in several orders of its warps.

By default the cases that have every kernel and instruction; ``GRADMIX_ALL_VARIANTS=1`` runs every variant that a
launcher can choose, which takes some minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from thinning import ALL

from gradmix import kernels
from ptx import launches
from ptx.compiled import process

REASON = kernels.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None and "triton" in REASON, reason=str(REASON))

NAMES = [name for name in launches.CASES if ALL or launches.is_chosen(name)]
SEEDS = (1, 2, 3) if ALL else (1,)


@pytest.fixture(scope="module")
def call(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    kept = getattr(pytestconfig, "cache", None)
    folder = tmp_path_factory.mktemp("triton") if kept is None else kept.mkdir("triton_for_ptx")
    with process(folder) as calling:
        yield calling


@pytest.mark.parametrize("name", NAMES)
def test_a_launch_gives_float64_in_every_order_of_warps_and_only_with_barriers(
    name: str, call: Callable[..., Any]
) -> None:
    # Pairs of NaN are recomputed one by one, which takes long.
    ignore_barriers = ALL or not name.startswith("pairs")
    outcome = call(launches.run, name, SEEDS, ignore_barriers)
    print(f"\n{name}: {', '.join(outcome.launched)}, {outcome.blocks} blocks, error {outcome.error:.3f} of its bound,")
    print(f"  without barriers {outcome.without_barriers}, {outcome.seconds:.1f} s of the processor")
    assert outcome.error <= 1.0
    assert outcome.same
    if ignore_barriers and outcome.launched not in (["_keep"], ["_mix"]):  # whose warps share nothing
        whole_numbers = name.startswith("draw")
        assert outcome.without_barriers in ({"NaN", "refused", "other"} if whole_numbers else {"NaN", "refused"})
