"""The operator mixed_alignment: its reference against autograd, its fast bodies against the reference."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from truth import assert_decisions_agree, mixed_features

from gradmix import _extension
from gradmix.ops.backends import set_backend
from gradmix.ops.mixed_alignment import (
    OPERATOR,
    MixedAlignment,
    Side,
    cosine,
    mixed_alignment,
    mixed_alignment_reference,
)

FAST = [b.name for b in OPERATOR.backends if b.name not in ("reference", "triton") and b.available() is None]
"""Triton's kernels, which have no float64, are held to the same in test_kernels_mixed_alignment.py."""


def make(
    n=5, m=4, classes=6, d=3, scale=1.0, soft=(False, False), bias=True, dtype=torch.float64, seed=0, labels=None
) -> list[Tensor]:
    """Arguments of the registered operator up to the reference: random rows whose logits have the given scale."""
    g = torch.Generator().manual_seed(seed)

    def side(rows: int, soft_labels: bool) -> list[Tensor]:
        h = torch.randn(rows, d, generator=g, dtype=torch.float64)
        z = torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale
        y = torch.randint(classes, (rows,), generator=g) if labels is None else torch.full((rows,), labels)
        if soft_labels:
            y = torch.softmax(3 * torch.randn(rows, classes, generator=g, dtype=torch.float64), 1).to(dtype)
        return [h.to(dtype), z.to(dtype), y]

    a, b = side(n, soft[0]), side(m, soft[1])
    return [*a, *b, torch.randn(classes, d + bias, generator=g, dtype=torch.float64).to(dtype)]


def sides(arguments: Sequence[Any]) -> list[Any]:
    """The arguments of mixed_alignment, from those of the registered operator."""
    return [Side(*arguments[:3]), Side(*arguments[3:6]), *arguments[6:]]


def in_double(arguments: list[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in arguments]


def largest_inner(arguments: list[Tensor]) -> float:
    """The scale of an inner product whose residual has norm 1: what rounding is relative to."""
    h = torch.cat([arguments[0], arguments[3]]).double()
    return float((h.square().sum(1) + 1).sqrt().max() * arguments[6].double().norm())


CASES = {
    "plain": {},
    "one row each": {"n": 1, "m": 1},
    "one candidate": {"m": 1},
    "one class": {"classes": 1},
    "two classes": {"classes": 2},
    "odd sizes": {"n": 17, "m": 33, "classes": 129, "d": 65},
    "all one label": {"labels": 2},
    "no bias": {"bias": False},
    "one feature": {"d": 1},
    "soft labels": {"soft": (True, True)},
    "soft and hard": {"soft": (True, False)},
    "hard and soft": {"soft": (False, True)},
    "confident": {"scale": 30.0},
    "soft confident": {"scale": 30.0, "soft": (True, True)},
    "huge logits": {"scale": 1e4},
    "soft huge logits": {"scale": 1e4, "soft": (True, True)},
    "flat logits": {"scale": 0.0},
}


@pytest.mark.parametrize("lam", [0.0, 1e-3, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_equals_the_reference_in_float64(backend: str, case: str, lam: float) -> None:
    arguments = make(**CASES[case])
    truth = mixed_alignment_reference(*sides(arguments), lam)
    result = mixed_alignment(*sides(arguments), lam, backend=backend)
    scale = largest_inner(arguments)
    assert (result.inner - truth.inner).abs().max() <= 1e-12 * scale
    # The square of a residual that is all but zero keeps half the digits.
    assert (result.norm - truth.norm).abs().max() <= 1e-7 * truth.norm.max().clamp(min=1e-7)
    assert_decisions_agree(result.inner, truth.inner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [c for c in CASES if CASES[c].get("scale", 1.0) <= 30.0], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_low_precision_against_float64_of_the_same_numbers(backend: str, case: str, dtype: torch.dtype) -> None:
    arguments = make(**CASES[case], dtype=dtype)
    truth = mixed_alignment_reference(*sides(in_double(arguments)), 0.3)
    result = mixed_alignment(*sides(arguments), 0.3, backend=backend)
    assert result.inner.dtype == result.norm.dtype == torch.float32
    assert (result.inner - truth.inner).abs().max() <= 1e-5 * truth.inner.abs().max()
    assert (result.norm - truth.norm).abs().max() <= 1e-5 * truth.norm.max()
    assert_decisions_agree(result.inner, truth.inner)


@given(
    n=st.integers(1, 7),
    m=st.integers(1, 7),
    classes=st.integers(1, 9),
    d=st.integers(1, 6),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 10.0, 100.0, 1e4]),
    soft=st.tuples(st.booleans(), st.booleans()),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    lam=st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)),
    seed=st.integers(0, 1 << 16),
)
@pytest.mark.parametrize("backend", FAST)
def test_any_rows(backend, n, m, classes, d, scale, soft, bias, dtype, lam, seed) -> None:
    arguments = make(n, m, classes, d, scale, soft, bias, dtype, seed)
    if dtype == torch.bfloat16:  # label vectors rounded to 8 bits need not sum to 1
        arguments = [t.float() if t.is_floating_point() and t.shape[-1] == classes else t for t in arguments]
    truth = mixed_alignment_reference(*sides(in_double(arguments)), lam)
    result = mixed_alignment(*sides(arguments), lam, backend=backend)
    unit = 1e-12 if dtype == torch.float64 else 2e-6
    assert (result.inner.double() - truth.inner).abs().max() <= unit * largest_inner(arguments)
    wide = truth.inner.abs() > unit * largest_inner(arguments)
    assert torch.equal((result.inner >= 0)[wide], (truth.inner >= 0)[wide])
    assert torch.isfinite(result.norm).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_the_reference_is_the_gradient_of_the_cross_entropy(bias: bool, soft: bool, lam: float) -> None:
    head = nn.Linear(4, 5, bias=bias).double()
    h_a, h_b = torch.randn(3, 4).double(), torch.randn(2, 4).double()
    y_a, y_b = torch.tensor([0, 4, 2]), torch.tensor([4, 1])
    if soft:
        y_a = torch.softmax(torch.randn(3, 5).double(), 1)
    grad_reference = torch.randn(5, 4 + bias).double()
    with torch.no_grad():
        arguments = [h_a, head(h_a), y_a, h_b, head(h_b), y_b, grad_reference]
        result = mixed_alignment_reference(*sides(arguments), lam)
    inner, norm = mixed_features(head, (h_a, y_a), (h_b, y_b), lam, grad_reference)
    torch.testing.assert_close(result.inner, inner, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.norm, norm, rtol=0, atol=1e-12)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_rows_that_favour_different_classes_underflow_and_are_recomputed(backend: str, soft: bool) -> None:
    # No class has a product of exponentials above e^-200, so every Z of float32 is zero before the recheck.
    z_a = torch.tensor([[400.0, 0.0, -3.0, -5.0]])
    z_b = torch.tensor([[0.0, 400.0, -5.0, -4.0]])
    y = torch.tensor([2]) if not soft else torch.tensor([[0.0, 0.25, 0.5, 0.25]])
    arguments = [torch.randn(1, 3), z_a, y, torch.randn(1, 3), z_b, torch.tensor([3]), torch.randn(4, 4)]
    truth = mixed_alignment_reference(*sides(in_double(arguments)), 0.5)
    result = mixed_alignment(*sides(arguments), 0.5, backend=backend)
    torch.testing.assert_close(result.inner.double(), truth.inner, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.norm.double(), truth.norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", FAST)
def test_a_well_fitted_pair_keeps_its_relative_accuracy_in_float32(backend: str) -> None:
    # softmax(z) - y is 1e-10 here: formed by subtraction in float32 it would be zero or noise.
    z = torch.tensor([[25.0, 1.0, 0.0], [24.0, 0.0, 2.0]])
    arguments = [torch.randn(2, 3), z, torch.tensor([0, 0])] * 2 + [torch.randn(3, 4)]
    truth = mixed_alignment_reference(*sides(in_double(arguments)), 0.3)
    result = mixed_alignment(*sides(arguments), 0.3, backend=backend)
    assert (result.inner - truth.inner).abs().max() <= 1e-5 * truth.inner.abs().max() <= 1e-9
    torch.testing.assert_close(result.norm.double(), truth.norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs_give_the_same(backend: str) -> None:
    arguments = make(n=6, m=5)
    strided = [
        torch.stack([t, t], -1)[..., 0] if t.is_floating_point() else torch.stack([t, t], 1)[:, 1] for t in arguments
    ]
    assert not strided[0].is_contiguous() and not strided[2].is_contiguous()
    expected, result = (mixed_alignment(*sides(v), 0.4, backend=backend) for v in (arguments, strided))
    torch.testing.assert_close(result.inner, expected.inner)


def test_the_same_rows_on_both_sides_give_what_copies_give() -> None:
    a = make()[:3]
    grad_reference = make()[6]
    same = mixed_alignment(Side(*a), Side(*a), grad_reference, 0.3)
    copies = mixed_alignment(Side(*a), Side(*[t.clone() for t in a]), grad_reference, 0.3)
    torch.testing.assert_close(same.inner, copies.inner)


def test_arguments_are_left_as_they_were() -> None:
    arguments = make(scale=1e4)
    before = [t.clone() for t in arguments]
    mixed_alignment(*sides(arguments), 0.3)
    assert all(torch.equal(t, b) for t, b in zip(arguments, before, strict=True))


def test_autocast_does_not_lower_the_precision() -> None:
    arguments = make(dtype=torch.float32)
    expected = mixed_alignment(*sides(arguments), 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = mixed_alignment(*sides(arguments), 0.3)
    assert torch.equal(result.inner, expected.inner)


def test_no_rows_give_an_empty_result() -> None:
    arguments = make(n=0)
    assert mixed_alignment(*sides(arguments), 0.3).inner.shape == (0, 4)


def test_cosine_of_a_zero_gradient_is_zero_and_never_leaves_its_range() -> None:
    inner, norm = torch.tensor([0.0, 3.0000002, -1.0]), torch.tensor([0.0, 1.0, 2.0])
    assert cosine(inner, norm, torch.tensor(3.0)).tolist() == [0.0, 1.0, pytest.approx(-1 / 6)]
    assert cosine(inner, norm, torch.tensor(0.0)).tolist() == [0.0, 0.0, 0.0]


def replaced(index: int, value: object) -> list:
    arguments: list = [*make(), 0.3]
    arguments[index] = value
    return arguments


BAD = {
    "features not a tensor": (replaced(0, [[1.0]]), TypeError, "features_a: got list"),
    "features of one dimension": (replaced(0, torch.randn(5).double()), ValueError, r"features_a: got shape \(5,\)"),
    "integer features": (
        replaced(0, torch.ones(5, 3, dtype=torch.int64)),
        TypeError,
        "features_a: got dtype torch.int64",
    ),
    "logits of another length": (replaced(1, torch.randn(4, 6)), ValueError, "logits_a: got 4 rows, expected 5"),
    "no classes": (replaced(1, torch.randn(5, 0)), ValueError, "logits_a: got no classes"),
    "other classes": (replaced(4, torch.randn(4, 7)), ValueError, "logits_b: got 7 classes, expected 6"),
    "other features": (replaced(3, torch.randn(4, 2)), ValueError, "features_b: got 2 features a row, expected 3"),
    "int32 labels": (replaced(2, torch.zeros(5, dtype=torch.int32)), TypeError, "labels_a: got dtype torch.int32"),
    "labels of another length": (
        replaced(2, torch.zeros(4, dtype=torch.int64)),
        ValueError,
        r"labels_a: got shape \(4,\)",
    ),
    "label too large": (
        replaced(5, torch.tensor([0, 1, 6, 2])),
        ValueError,
        r"labels_b: row 2 is 6, expected .* \[0, 6\)",
    ),
    "negative label": (replaced(2, torch.tensor([0, -1, 2, 2, 1])), ValueError, "labels_a: row 1 is -1"),
    "soft labels too narrow": (
        replaced(2, torch.ones(5, 1)),
        ValueError,
        r"labels_a: got soft labels of shape \(5, 1\)",
    ),
    "soft labels that sum to 2": (replaced(2, torch.full((5, 6), 1 / 3)), ValueError, "labels_a: row 0 sums to 2"),
    "NaN label": (replaced(2, torch.full((5, 6), math.nan)), ValueError, "labels_a: row 0 sums to nan"),
    "reference of another width": (
        replaced(6, torch.randn(6, 5)),
        ValueError,
        r"reference: got shape \(6, 5\), expected \(6, 4\)",
    ),
    "reference of other classes": (replaced(6, torch.randn(5, 4)), ValueError, "reference: got shape"),
    "lam above 1": (replaced(7, 1.5), ValueError, "lam: got 1.5"),
    "lam NaN": (replaced(7, math.nan), ValueError, "lam: got nan"),
    "lam a string": (replaced(7, "0.5"), TypeError, "lam: got str"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_is_named(case: str) -> None:
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        mixed_alignment(*sides(arguments))


def test_a_side_that_is_none_is_named() -> None:
    a, b, grad_reference = sides(make())
    with pytest.raises(TypeError, match="a: got list, expected a Side of features, logits and labels"):
        mixed_alignment([*a], b, grad_reference, 0.3)
    with pytest.raises(TypeError, match="b: got tuple, expected a Side"):
        mixed_alignment(a, tuple(b), grad_reference, 0.3)


def test_the_tensors_of_the_sides_are_taken_one_by_one_with_a_warning() -> None:
    arguments = make()
    expected = mixed_alignment(*sides(arguments), 0.3).inner
    names = ("features_a", "logits_a", "labels_a", "features_b", "logits_b", "labels_b", "reference")
    with pytest.warns(DeprecationWarning, match=r"labels_b, \.\.\.\) is now mixed_alignment\(Side\(\.\.\.\), Side"):
        assert torch.equal(mixed_alignment(*arguments, 0.3).inner, expected)
    for count in (0, 2, 6):
        named = dict(zip(names[count:], arguments[count:], strict=True))
        with pytest.warns(DeprecationWarning, match="the former call is removed in version"):
            assert torch.equal(mixed_alignment(*arguments[:count], **named, lam=0.3).inner, expected)


@pytest.mark.parametrize("soft", [False, True])
def test_registration(soft: bool) -> None:
    arguments = make(soft=(soft, soft), dtype=torch.float32)
    lams = torch.tensor([0.3, 0.8], dtype=torch.float64)
    torch.library.opcheck(torch.ops.gradmix.mixed_alignment.default, (*arguments, lams, True, "ieee", "torch"))
    torch.library.opcheck(torch.ops.gradmix.mixed_alignment.default, (*arguments, lams, False, "ieee", "torch"))


def test_torch_compile_passes_through_without_a_graph_break() -> None:
    arguments = make(dtype=torch.float32)

    def doubled(*tensors: Tensor) -> Tensor:
        return mixed_alignment(*sides(tensors), 0.3).inner * 2

    compiled = torch.compile(doubled, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), 2 * mixed_alignment(*sides(arguments), 0.3).inner)


def test_the_backend_can_be_named_set_or_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make()
    best = "cpp" if _extension.load() is not None else "torch"
    assert OPERATOR.choose("auto", *arguments, 0.3).name == best
    assert OPERATOR.choose("reference", *arguments, 0.3).name == "reference"
    monkeypatch.setenv("GRADMIX_BACKEND", "reference")
    assert OPERATOR.choose("auto", *arguments, 0.3).name == "reference"
    monkeypatch.setattr("gradmix.ops.backends._preferred", None)
    set_backend("torch")
    assert OPERATOR.choose("auto", *arguments, 0.3).name == "torch"
    set_backend("cuda")  # this operator has no such body and keeps choosing by itself
    assert OPERATOR.choose("auto", *arguments, 0.3).name == best
    expected = "backend: mixed_alignment has no 'cuda' body; it has triton, cpp, torch, reference"
    with pytest.raises(ValueError, match=expected):
        mixed_alignment(*sides(arguments), 0.3, backend="cuda")
    with pytest.raises(ValueError, match="backend: got 'fast', expected 'auto' or one of"):
        mixed_alignment(*sides(arguments), 0.3, backend="fast")
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        set_backend("fast")
    monkeypatch.setattr("gradmix.ops.backends._preferred", None)
    monkeypatch.setenv("GRADMIX_BACKEND", "fast")
    with pytest.raises(ValueError, match="environment variable GRADMIX_BACKEND: backend: got 'fast'"):
        mixed_alignment(*sides(arguments), 0.3)


def test_the_result_is_a_named_pair() -> None:
    result = mixed_alignment(*sides(make()), 0.3)
    assert isinstance(result, MixedAlignment) and result._fields == ("inner", "norm")
