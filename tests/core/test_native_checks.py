"""Checks of values that the extension makes in one pass: they must say the same as torch's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradmix import _extension
from gradmix.model.head_values import factor_dtype, off_linear
from gradmix.ops.finite import all_finite
from gradmix.ops.labels import are_live

pytestmark = pytest.mark.skipif(_extension.load() is None, reason=f"{_extension.unavailable_reason()}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 7, 16, 33, 70_000])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(count, dtype):
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, 0.0, -0.0], dtype=dtype)
    values = values.repeat(count // 6 + 1)[:count].clone()
    assert all_finite(values)
    for place in {0, count // 2, count - 1}:
        for bad in (math.nan, -math.nan, math.inf, -math.inf):
            wrong = values.clone()
            wrong[place] = bad
            assert not all_finite(wrong)
            assert not all_finite(values, wrong, values)


@pytest.mark.parametrize(
    "values",
    [torch.ones(4, 6)[:, ::2], torch.ones(3, 0), torch.ones(2, 3).to_sparse(), torch.nn.Parameter(torch.ones(3))],
    ids=["strided", "empty", "sparse", "parameter"],
)
def test_tensors_of_every_kind(values):
    assert all_finite(values, torch.ones(2))
    assert not all_finite(values, torch.tensor([math.nan]))


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_live_labels(samples, classes, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes + 1, (samples,), generator=g)
    logits = torch.randn(samples, classes, generator=g)
    logits = logits.masked_fill(torch.rand(samples, classes, generator=g) < 0.1, -1e30).to(dtype)
    within = bool(((labels >= 0) & (labels < classes)).all())
    expected = within and bool((logits.gather(1, labels[:, None]) > -1e30).all())
    known = are_live(labels, logits, -1e30)
    assert known == (expected and dtype in (torch.float32, torch.float64))


def test_of_a_logit_that_is_no_number_nothing_is_known():
    assert not are_live(torch.tensor([0]), torch.tensor([[math.nan, 1.0]]), -1e30)
    assert not are_live(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), -1e30)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("samples, width, classes", [(1, 1, 1), (3, 5, 2), (9, 64, 10), (130, 257, 33)])
def test_a_linear_layer_is_known_as_torch_knows_it(samples, width, classes, bias, monkeypatch):
    torch.manual_seed(samples)
    layer = torch.nn.Linear(width, classes, bias=bias)
    features = torch.randn(samples, width)
    logits = layer(features).detach()
    step = -(-samples // 4)
    looked_at = list(range(0, samples, step))
    results = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(_extension, "load", lambda: None)
        found = [off_linear(features, logits, layer.weight, layer.bias, factor_dtype(logits))]
        for sample in looked_at:
            for change in (1e-3, math.nan, math.inf):
                wrong = logits.clone()
                wrong[sample, classes // 2] += change
                found.append(off_linear(features, wrong, layer.weight, layer.bias, factor_dtype(wrong)))
        results.append(torch.stack(found))
    assert torch.equal(*results)
    # What is no number is left to the check for finite values.
    assert not results[0][0].any() and results[0][1::3].any(1).all()
