"""The Triton kernels of mixed_alignment in the interpreter: values and decisions against float64, in every tile.

The interpreter computes every precision in float32; what TF32 does to the products is for test_gpu_kernels.py.
"""

from __future__ import annotations

import itertools
import math
import os
from functools import cache
from typing import Any

import pytest
import thinning
import torch
from mixed_pairs import grouped_truth, prepared, truth
from test_mixed_alignment import CASES, largest_inner, make
from torch import Tensor
from truth import assert_decisions_agree

from gradmix import kernels
from gradmix.ops.mixed_alignment import MixedAlignment

if kernels.unavailable_reason() is not None:
    pytest.skip(str(kernels.unavailable_reason()), allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is a GPU, so Triton's interpreter is off", allow_module_level=True)

from gradmix.kernels import mixed_alignment as kernel

CONFIGURATIONS = sorted({choice[:4] for choice in (*kernel.HARD, *kernel.SOFT)})


def weights(*lams: float) -> Tensor:
    return torch.tensor(lams, dtype=torch.float64)


def run(arguments: list[Tensor], *lams: float) -> MixedAlignment:
    """Both results of the kernel, after the check that without norms the inner products have the same bits."""
    parts, bias = prepared(arguments)
    result = MixedAlignment(*kernel.mixed_alignment(*parts, weights(*lams), bias=bias, precision="ieee"))
    inner, norm = kernel.mixed_alignment(*parts, weights(*lams), bias=bias, precision="ieee", norms=False)
    assert torch.equal(inner, result.inner) and norm.shape == (0,)
    return result


def assert_close(result: MixedAlignment, expected: MixedAlignment, unit: float = 1e-5) -> None:
    for part, exact in zip(result, expected, strict=True):
        assert part.shape == exact.shape and part.dtype == torch.float32
        assert (part - exact).abs().max() <= unit * exact.abs().max()
    assert_decisions_agree(result.inner, expected.inner)


def force(monkeypatch: pytest.MonkeyPatch, choice: kernel.Configuration) -> None:
    monkeypatch.setattr(kernel, "configuration", lambda n, m, soft: choice)


def split(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Have sums of whatever size in ``count`` parts; with more than there are blocks, some have no terms."""
    monkeypatch.setattr(kernel, "parts", lambda tiles, terms: count)


@pytest.fixture(params=[1, 3], ids=["whole", "split"])
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of the sums of one mixing weight, in the kernels of either way."""
    split(monkeypatch, request.param)
    return request.param


SIZES = {
    "tiles and one row": {"n": 65, "m": 33, "classes": 33, "d": 40},
    "one row and tiles": {"n": 1, "m": 65, "classes": 100, "d": 3},
    "many classes": {"n": 5, "m": 33, "classes": 257, "d": 1},
    "few classes": {"n": 33, "m": 5, "classes": 7, "d": 40},
    "two classes": {"n": 33, "m": 34, "classes": 2, "d": 3},
    "one class": {"n": 5, "m": 1, "classes": 1, "d": 3},
}


@pytest.mark.parametrize(("lam", "count"), [(0.0, 1), (0.3, 1), (1.0, 1), (0.3, 3)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: str, lam: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, count)
    arguments = make(**CASES[case], dtype=torch.float32)
    assert_close(run(arguments, lam), truth(arguments, lam))


# Every size with either kind of labels, and with a bias and without; which goes with which alternates.
AWKWARD = [(case, soft, soft == bool(at % 2)) for at, case in enumerate(SIZES) for soft in (False, True)]


@pytest.mark.parametrize(("case", "soft", "bias"), AWKWARD, ids=str)
def test_awkward_sizes(case: str, soft: bool, bias: bool, count: int) -> None:
    arguments = make(**SIZES[case], soft=(soft, soft), bias=bias, dtype=torch.float32)
    result, expected = run(arguments, 0.3), truth(arguments, 0.3)
    if not soft:
        assert_close(result, expected)
        return
    # ||p - y||^2 by its three terms: with few classes it may be all but zero, and its root then has half the digits.
    scale = largest_inner(arguments)
    assert (result.inner - expected.inner).abs().max() <= 1e-6 * scale
    largest = torch.cat([arguments[0], arguments[3]]).double().square().sum(1).max() + 1
    assert (result.norm.double().square() - expected.norm.square()).abs().max() <= 2e-6 * largest
    assert_decisions_agree(result.inner, expected.inner, band=1e-6 if SIZES[case]["classes"] > 1 else 1.0)


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_against_float64_of_the_same_numbers(
    features: torch.dtype, logits: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(monkeypatch, 3 if features != logits else 1)
    arguments = make(n=7, m=6, classes=35, d=40, dtype=torch.float32)
    for at, dtype in ((0, features), (3, features), (1, logits), (4, logits)):
        arguments[at] = arguments[at].to(dtype)
    assert_close(run(arguments, 0.3), truth(arguments, 0.3))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_several_weights_give_what_each_gives_alone(soft: bool) -> None:
    arguments = make(n=5, m=18, classes=20, soft=(soft, soft), dtype=torch.float32)
    lams = (0.0, 0.2, 0.5, 1.0)
    result = run(arguments, *lams)
    assert_close(result, truth(arguments, *lams))
    for k, lam in enumerate(lams):
        alone = run(arguments, lam)
        assert torch.equal(result.inner[k], alone.inner[0]) and torch.equal(result.norm[k], alone.norm[0])


@cache
def by_the_configuration_of_the_sizes(soft: bool, scale: float) -> tuple[list[Tensor], MixedAlignment, MixedAlignment]:
    """Arguments, their result, and the first five rows of the truth."""
    torch.manual_seed(0)
    n, m = (66, 35) if scale == 1.0 else (4, 19)  # what underflows is slow to interpret
    arguments = make(n=n, m=m, classes=20, d=20, scale=scale, soft=(soft, soft), dtype=torch.float32)
    part = truth([t[:5] if at < 3 else t for at, t in enumerate(arguments)], 0.3, 0.5)
    return arguments, run(arguments, 0.3, 0.5), part


@pytest.mark.parametrize(
    "choice, scale, soft", thinning.part(itertools.product(CONFIGURATIONS, (1.0, 300.0), (False, True)), 5), ids=str
)
def test_no_result_depends_on_the_configuration(
    choice: tuple[int, int, int, int], soft: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, expected, part = by_the_configuration_of_the_sizes(soft, scale)
    force(monkeypatch, kernel.Configuration(*choice))
    result = run(arguments, 0.3, 0.5)
    assert_close(result, MixedAlignment(*(part.double() for part in expected)), unit=1e-6)
    assert (result.inner[:, :5] - part.inner).abs().max() <= 1e-5 * part.inner.abs().max()


def test_the_same_rows_on_both_sides_give_what_copies_give() -> None:
    (h, z, y, u, *_), bias = prepared(make(n=35, dtype=torch.float32))
    same = kernel.mixed_alignment(h, z, y, u, h, z, y, u, weights(0.3), bias=bias)
    copies = kernel.mixed_alignment(h, z, y, u, *(t.clone() for t in (h, z, y, u)), weights(0.3), bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(same, copies, strict=True))
    other = (y + 1) % 6  # the same rows with other labels are other rows
    result = kernel.mixed_alignment(h, z, y, u, h, z, other, u, weights(0.3), bias=bias)
    copies = kernel.mixed_alignment(h, z, y, u, h.clone(), z.clone(), other, u.clone(), weights(0.3), bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(result, copies, strict=True))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_strided_inputs_give_the_same(soft: bool, count: int) -> None:
    parts, bias = prepared(make(n=6, m=5, soft=(soft, soft), dtype=torch.float32))
    expected = kernel.mixed_alignment(*parts, weights(0.4), bias=bias)
    columns = [torch.stack([t, t], -1)[..., 0] for t in parts]
    rows = [torch.cat([t, t + 1], -1)[..., : t.shape[-1]] if t.ndim == 2 else t for t in parts]
    for strided in (columns, rows):
        assert not strided[0].is_contiguous()
        result = kernel.mixed_alignment(*strided, weights(0.4), bias=bias)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_rows_that_favour_different_classes_underflow_and_are_recomputed(soft: bool, count: int) -> None:
    z_a = torch.tensor([[400.0, 0.0, -3.0, -5.0], [1.0, 0.0, 2.0, 1.0]])
    z_b = torch.tensor([[0.0, 400.0, -5.0, -4.0], [0.0, 1.0, 1.0, 3.0]])
    y = torch.tensor([2, 0]) if not soft else torch.tensor([[0.0, 0.25, 0.5, 0.25], [1.0, 0.0, 0.0, 0.0]])
    other = torch.tensor([3, 0]) if not soft else y.flip(0)
    arguments = [torch.randn(2, 3), z_a, y, torch.randn(2, 3), z_b, other, torch.randn(4, 4)]
    result, expected = run(arguments, 0.5, 0.2), truth(arguments, 0.5, 0.2)
    torch.testing.assert_close(result.inner.double(), expected.inner, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.norm.double(), expected.norm, rtol=1e-5, atol=0)


def test_confidently_wrong_rows_of_two_classes_leave_the_rest_empty_and_are_recomputed(count: int) -> None:
    z_a, z_b = torch.tensor([[0.0, 200.0]]), torch.tensor([[300.0, 0.0]])
    arguments = [
        torch.randn(1, 3),
        z_a,
        torch.tensor([0]),
        torch.randn(1, 3),
        z_b,
        torch.tensor([1]),
        torch.randn(2, 4),
    ]
    for lam in (0.5, 0.599, 0.6, 0.7):
        result, expected = run(arguments, lam), truth(arguments, lam)
        torch.testing.assert_close(result.norm.double(), expected.norm, rtol=2e-5, atol=0)


def test_a_well_fitted_pair_keeps_its_relative_accuracy(count: int) -> None:
    z = torch.tensor([[25.0, 1.0, 0.0], [24.0, 0.0, 2.0]])
    arguments = [torch.randn(2, 3), z, torch.tensor([0, 0])] * 2 + [torch.randn(3, 4)]
    result, expected = run(arguments, 0.3), truth(arguments, 0.3)
    assert (result.inner - expected.inner).abs().max() <= 1e-5 * expected.inner.abs().max() <= 1e-9
    torch.testing.assert_close(result.norm.double(), expected.norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("where", ["label", "other class", "feature", "u"])
def test_a_nan_makes_its_row_nan_and_no_other(where: str, count: int) -> None:
    parts, bias = prepared(make(n=4, m=5, dtype=torch.float32))
    clean = kernel.mixed_alignment(*parts, weights(0.3), bias=bias)
    label = int(parts[2][1])
    at = {"label": (1, label), "other class": (1, (label + 1) % 6), "feature": (0, 0), "u": (3, 2)}[where]
    parts[at[0]][1, at[1]] = math.nan
    inner, norm = kernel.mixed_alignment(*parts, weights(0.3), bias=bias)
    others = torch.tensor([0, 2, 3])
    assert torch.equal(inner[:, others], clean[0][:, others]) and torch.equal(norm[:, others], clean[1][:, others])
    if where == "feature":
        assert norm[:, 1].isnan().all()
    elif where == "u":
        assert inner[:, 1].isnan().all()
    else:
        assert inner[:, 1].isnan().all() and norm[:, 1].isnan().all()


# ---------------------------------------------------------------------------------------------------------- split sums


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(("scale", "n", "m"), [(1.0, 65, 17), (300.0, 3, 5)], ids=["tiles", "lost pairs"])
def test_parts_of_classes_and_features_give_the_reference(
    scale: float, n: int, m: int, soft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = make(n=n, m=3 if soft else m, classes=75, d=90, scale=scale, soft=(soft, soft), dtype=torch.float32)
    expected, results = truth(arguments, 0.3), []
    for class_parts, feature_parts in ((1, 1), (2, 1), (1, 3), (5, 16)):
        by_terms = {75: class_parts, 90: feature_parts}
        monkeypatch.setattr(kernel, "parts", lambda tiles, terms, by_terms=by_terms: by_terms[terms])
        results.append(run(arguments, 0.3))
        assert_close(results[-1], expected)
    if scale == 1.0:  # what is lost is recomputed, whatever the sums are
        whole, by_classes, by_features, _ = results
        assert torch.equal(by_features.inner, whole.inner) and not torch.equal(by_features.norm, whole.norm)
        assert not torch.equal(by_classes.inner, whole.inner)


def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Names and grids of the kernels of this module that are launched from now on."""
    found: list[tuple[str, tuple[int, ...]]] = []

    class Noting:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernel, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            found.append((self.name, grid))
            return self.kernel[grid]

    for name in ("_row_kernel", "_sum_kernel", "_pair_kernel"):
        monkeypatch.setattr(kernel, name, Noting(name))
    return found


@pytest.mark.parametrize(
    "classes, d, norms, count", [(255, 255, True, 1), (256, 8, True, 2), (8, 400, True, 3), (8, 400, False, 1)]
)
def test_a_call_is_two_launches_and_one_more_for_split_sums(
    classes: int, d: int, norms: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, bias = prepared(make(n=65, m=3, classes=classes, d=d, dtype=torch.float32))
    found = launched(monkeypatch)
    kernel.mixed_alignment(*parts, weights(0.3), bias=bias, norms=norms)
    sums = [("_sum_kernel", (2, count))] if count > 1 else []
    assert found == [("_row_kernel", (18,)), *sums, ("_pair_kernel", (2,))]


def test_of_several_weights_and_groups_no_sums_are_split(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, bias = prepared(make(n=5, m=4, dtype=torch.float32))
    found = launched(monkeypatch)
    kernel.mixed_alignment(*parts, weights(0.3, 0.4), bias=bias)
    kernel.class_pair_sums(*parts[:4], weights(0.3), torch.arange(4), 2, bias=bias)
    assert [name for name, _ in found] == ["_row_kernel", "_pair_kernel"] * 2


@pytest.mark.parametrize(
    "tiles, terms, count",
    [
        (64, 1000, 4),
        (64, 255, 1),
        (64, 256, 2),
        (4, 1000, 7),
        (1, 10**6, 16),
        (111, 1000, 2),
        (112, 1000, 1),
        (1, 0, 1),
    ],
)
def test_the_number_of_parts_is_a_function_of_the_sizes(tiles: int, terms: int, count: int) -> None:
    assert kernel.parts(tiles, terms) == count


def test_split_sums_take_no_more_than_the_memory_stated() -> None:
    for soft, rows in itertools.product((False, True), range(16, 20_000, 16)):
        choice = kernel.configuration(rows, 16, soft)
        tiles = math.ceil(rows / choice.rows_a)
        count = kernel.parts(tiles, 10**6)
        assert count == 1 or 4 * kernel.SUMS.value * count * tiles * choice.rows_a * choice.rows_b <= 8e6


# -------------------------------------------------------------------------------------------------------- grouped sums


@pytest.mark.parametrize(
    "group, case",
    # What is lost is slow to interpret, and knows of no groups.
    [(8, "lost pairs"), (8, "soft lost pairs"), (2, "no bias"), *itertools.product([1, 2, 8, 16], ["hard", "soft"])],
)
def test_sums_over_groups(group: int, case: str) -> None:
    soft, scale = "soft" in case, 300.0 if "lost" in case else 1.0
    side = make(n=9, m=1, classes=7, soft=(soft, soft), scale=scale, bias=case != "no bias", dtype=torch.float32)
    arguments = [*side[:3], *side[:3], side[6]]
    rows = torch.randint(-1, 9, (group * max(3, 16 // group),))
    rows[:group] = -1  # a group without rows
    parts, bias = prepared(arguments)
    lams = (0.3, 0.5)
    result = kernel.class_pair_sums(*parts[:4], weights(*lams), rows, group, bias=bias, precision="ieee")
    assert_close(MixedAlignment(*result), grouped_truth(arguments, rows, group, *lams))
    assert not result[0][:, 0].any() and not result[1][:, :, 0].any()


@cache
def sixteens() -> tuple[list[Tensor], Tensor, MixedAlignment]:
    """Arguments, rows in groups of 16, and the truth, whose loop over pairs takes as long as a kernel."""
    torch.manual_seed(0)
    side = make(n=90, m=1, classes=20, dtype=torch.float32)
    arguments = [*side[:3], *side[:3], side[6]]
    rows = (torch.randperm(96) - 6).clamp(min=-1)
    return arguments, rows, grouped_truth(arguments, rows, 16, 0.3)


@pytest.mark.parametrize("choice", kernel.HARD, ids=str)
def test_sums_over_groups_in_every_configuration(choice: kernel.Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, rows, expected = sixteens()
    parts, bias = prepared(arguments)
    force(monkeypatch, choice)
    result = kernel.class_pair_sums(*parts[:4], weights(0.3), rows, 16, bias=bias, precision="ieee")
    assert_close(MixedAlignment(*result), expected)


# ------------------------------------------------------------------------------------------------- arguments and sizes


def test_no_rows_and_no_weights_give_empty_results() -> None:
    parts, bias = prepared(make(n=0, dtype=torch.float32))
    assert kernel.mixed_alignment(*parts, weights(0.3), bias=bias)[0].shape == (1, 0, 4)
    parts, bias = prepared(make(dtype=torch.float32))
    assert kernel.mixed_alignment(*parts, weights(), bias=bias)[1].shape == (0, 5, 4)
    none = torch.full((8,), -1)
    empty = [t[:0] for t in parts[:4]]
    assert not kernel.class_pair_sums(*empty, weights(0.3), none, 4, bias=bias)[0].any()


def test_bad_arguments_are_named() -> None:
    parts, bias = prepared(make(dtype=torch.float32))
    with pytest.raises(ValueError, match="precision: got 'bf16', expected one of ieee, tf32x3, tf32"):
        kernel.mixed_alignment(*parts, weights(0.3), bias=bias, precision="bf16")
    rows = torch.arange(5)
    with pytest.raises(ValueError, match="group: got 3, expected a power of two up to 16"):
        kernel.class_pair_sums(*parts[:4], weights(0.3), rows, 3, bias=bias)
    with pytest.raises(ValueError, match="rows: got 5 slots, expected a multiple of the group of 2"):
        kernel.class_pair_sums(*parts[:4], weights(0.3), rows, 2, bias=bias)


@pytest.mark.parametrize(
    "n, m, soft, tile", [(256, 256, False, 64), (8192, 8192, False, 128), (1, 1, False, 64), (4096, 4096, True, 64)]
)
def test_the_configuration_is_a_function_of_the_sizes(n: int, m: int, soft: bool, tile: int) -> None:
    assert kernel.configuration(n, m, soft).rows_a == tile
