"""The extension's body of mixed_alignment: edges of its tiles, instruction sets, threads, and its binding's checks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fresh import run_python
from hypothesis import given
from hypothesis import strategies as st
from test_mixed_alignment import in_double, largest_inner, make, sides
from torch import Tensor

from gradmix import _extension
from gradmix.ops.mixed_alignment import Side, mixed_alignment, mixed_alignment_reference

EXTENSION: Any = _extension.load()
pytestmark = pytest.mark.skipif(EXTENSION is None, reason=f"no extension: {_extension.unavailable_reason()}")

EDGES = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 33)
"""Of tiles: three or eight samples by 2 to 16, according to the instruction set and the dtype."""


@given(
    n=st.sampled_from((*EDGES, 63, 64, 65, 97)),
    m=st.sampled_from(EDGES),
    classes=st.sampled_from((1, 2, 3, 10, 127, 128, 129, 257)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    soft=st.booleans(),
    lam=st.sampled_from((0.0, 1e-3, 0.37, 0.5, 1.0)),
    scale=st.sampled_from((0.0, 1.0, 30.0, 3000.0)),
    seed=st.integers(0, 1000),
)
def test_any_sizes_against_torch_in_float64(
    n: int, m: int, classes: int, dtype: torch.dtype, soft: bool, lam: float, scale: float, seed: int
) -> None:
    arguments = make(n, m, classes, 5, scale, (soft, soft), dtype=dtype, seed=seed)
    truth = mixed_alignment(*sides(in_double(arguments)), lam, backend="torch")
    result = mixed_alignment(*sides(arguments), lam, backend="cpp")
    assert result.inner.dtype == result.norm.dtype == dtype
    bound = (2e-6 if dtype == torch.float32 else 1e-12) * largest_inner(arguments)
    # Label vectors are rounded before they are taken apart.
    bound *= 8 if soft else 1
    assert (result.inner.double() - truth.inner).abs().max() <= bound
    assert (result.norm.double() - truth.norm).abs().max() <= bound


def test_the_exponential_keeps_its_digits() -> None:
    # Of two classes the inner product is a function of the logits' difference alone. The second side is a view of
    # the first, in the same memory.
    z = torch.linspace(-700, 700, 4001, dtype=torch.float64)
    logits = torch.stack([z, torch.zeros_like(z)], 1)
    h, y = torch.ones(len(z), 1, dtype=torch.float64), torch.zeros(len(z), dtype=torch.int64)
    reference = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    result = mixed_alignment(Side(h, logits, y), Side(h[:1], logits[:1], y[:1]), reference, 1.0, backend="cpp").inner[
        :, 0
    ]
    # Gradients are held at 1e-150.
    torch.testing.assert_close(result, torch.sigmoid(-z).clamp(min=1e-150), rtol=2e-13, atol=0.0)


@pytest.mark.parametrize("margin", [300.0, 709.0, 710.0, 1500.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_beyond_the_range_of_double_are_noticed(margin: float, dtype: torch.dtype) -> None:
    """One factor of a label's exponential is infinite and the other zero, but their product is moderate."""
    z_a = torch.tensor([[margin, 0.0, 1.0, 2.0], [0.0, -margin, 1.0, -1.0]], dtype=torch.float64)
    z_b = torch.tensor([[-margin, 0.5, 0.0, 1.0], [1.0, margin, 0.0, 3.0]], dtype=torch.float64)
    h = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    reference = torch.arange(12.0).view(4, 3) - 5
    for y in (torch.tensor([0, 1]), torch.tensor([0, 0])):
        arguments = [v.to(dtype) if v.is_floating_point() else v for v in (h, z_a, y, h, z_b, y, reference)]
        truth = mixed_alignment_reference(*sides(in_double(arguments)), 0.5)
        result = mixed_alignment(*sides(arguments), 0.5, backend="cpp")
        torch.testing.assert_close(result.inner.double(), truth.inner, rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(result.norm.double(), truth.norm, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_none(value: float) -> None:
    arguments = make(4, 4, dtype=torch.float32)
    arguments[1][2, 3] = value
    result = mixed_alignment(*sides(arguments), 0.4, backend="cpp")
    assert not result.inner[2].isfinite().any() and not result.norm[2].isfinite().any()
    assert result.inner[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [10, 300])
def test_the_same_bits_for_any_number_of_threads(classes: int, soft: bool) -> None:
    arguments = make(97, 61, classes, 9, dtype=torch.float32, soft=(soft, soft))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            # Torch's own products may round otherwise with other threads: one is enough to have them alike.
            results.append(mixed_alignment(*sides(arguments), torch.tensor([0.2, 0.9]), backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other.inner, results[0].inner, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
def test_without_norms_the_inner_products_are_the_same(backend: str, soft: bool) -> None:
    arguments = make(9, 5, 7, 4, dtype=torch.float32, soft=(soft, soft))
    lams = torch.tensor([0.3, 0.8], dtype=torch.float64)
    with torch.no_grad():
        whole = torch.ops.gradmix.mixed_alignment(*arguments, lams, True, "ieee", backend)
        inner, norm = torch.ops.gradmix.mixed_alignment(*arguments, lams, False, "ieee", backend)
    assert torch.equal(inner, whole[0]) and norm.shape == (0,) and whole[1].shape == inner.shape


LEVELS = """
import torch
from gradmix import _extension
from gradmix.ops.draw_partners import draw_partners
from gradmix.ops.mixed_alignment import Side, mixed_alignment
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64):
    for classes in (2, 10, 131):
        h, z, y = torch.randn(37, 6, dtype=dtype), 4 * torch.randn(37, classes, dtype=dtype), torch.arange(37) % classes
        for labels in (y, torch.nn.functional.one_hot(y, classes).to(dtype) * 0.9 + 0.1 / classes):
            side, reference = Side(h, z, labels), torch.randn(classes, 7, dtype=dtype)
            found = mixed_alignment(side, side, reference, 0.3, backend="cpp")
            truth = mixed_alignment(side, side, reference, 0.3, backend="torch")
            for one, two in zip(found, truth):
                torch.testing.assert_close(one, two, rtol=2e-5, atol=2e-5 * float(truth.norm.max()))
print(_extension.load().build_info()["instruction_set"])
"""


@pytest.mark.parametrize("level", ["base", "avx2", "avx512"])
def test_every_instruction_set(level: str) -> None:
    newest = EXTENSION.build_info()["instruction_set"]
    order = ["base", "avx2", "avx512"]
    if order.index(level) > order.index(newest):
        pytest.skip(f"this machine has {newest}")
    assert run_python(LEVELS, GRADMIX_CPU_LEVEL=level) == [level]


# ------------------------------------------------------------------------------------------------ the binding's checks


def call(**change: Any) -> Any:
    h, z, y, u = torch.ones(3, 2), torch.zeros(3, 4), torch.tensor([0, 1, 3]), torch.zeros(3, 4)
    usual: dict[str, Any] = {
        "a": (h, z, y, u, None),
        "b": (h, z, y, u, None),
        "reference": torch.ones(4, 3),
        "lams": torch.tensor([0.5], dtype=torch.float64),
        "products": (torch.ones(3, 3), None, None),
        "inner": torch.zeros(1, 3, 3),
        "norm": torch.zeros(1, 3, 3),
    }
    return EXTENSION.mixed_alignment(**(usual | change))


def side(**change: Tensor | None) -> tuple[Tensor | None, ...]:
    usual: dict[str, Tensor | None] = {
        "features": torch.ones(3, 2),
        "logits": torch.zeros(3, 4),
        "labels": torch.tensor([0, 1, 3]),
        "projected": torch.zeros(3, 4),
        "beside": None,
    }
    return tuple((usual | change).values())


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a label too large": (
        {"a": side(labels=torch.tensor([0, 4, 1]))},
        ValueError,
        "labels_a: got 4 in row 1",
    ),
    "a negative label": ({"b": side(labels=torch.tensor([0, 1, -1]))}, ValueError, "labels_b: got -1 in row 2"),
    "other classes": ({"b": side(logits=torch.zeros(3, 5), projected=torch.zeros(3, 5))}, ValueError, "logits_b: got"),
    "other features": ({"b": side(features=torch.ones(3, 5))}, ValueError, "features_b: got shape"),
    "another dtype": ({"b": side(features=torch.ones(3, 2).double())}, TypeError, "features_b: got dtype float64"),
    "half": (
        {"a": side(features=torch.ones(3, 2).half())},
        TypeError,
        "features_a: got dtype float16, expected",
    ),
    "no norms for vectors": (
        {"a": side(beside=torch.zeros(3, 4)), "b": side(beside=torch.zeros(3, 4))},
        ValueError,
        "products: expected gram where norms are wanted",
    ),
    "vectors on one side": ({"a": side(beside=torch.zeros(3, 4))}, ValueError, "products: expected gram"),
    "a reference too wide": ({"reference": torch.ones(4, 4)}, ValueError, "reference: got shape"),
    "a result too small": ({"inner": torch.zeros(1, 2, 3)}, ValueError, "inner: got shape"),
    "one result twice": (
        {"norm": None, "inner": torch.ones(1, 3, 3).expand(1, 3, 3), "lams": torch.ones(2).double()},
        ValueError,
        "inner: got shape",
    ),
    "a short side": ({"a": (torch.ones(3, 2),)}, ValueError, "expected tuples of 5, 5 and 3"),
    "no threads": ({"num_threads": 0}, ValueError, "num_threads: got 0"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_is_named(case: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(**change)


def test_sizes_that_are_not_moderate_are_refused_and_nothing_is_written() -> None:
    inner = torch.full((1, 3, 3), 7.0)
    assert call(a=side(features=torch.full((3, 2), 1e20)), inner=inner) is False
    assert (inner == 7.0).all()
    assert call(inner=inner) is True and not (inner == 7.0).any()
