"""The Triton kernels of mixed_alignment on a GPU: float64 truth, streams, graphs, and no waiting for the host."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from gpu import captured, no_waiting, on_other_streams, poison_free_memory
from mixed_pairs import prepared
from test_mixed_alignment import CASES, in_double, make, sides
from torch import Tensor
from truth import assert_decisions_agree

from gradmix.ops.mixed_alignment import mixed_alignment_reference

pytestmark = pytest.mark.gpu

UNITS = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 5e-3}
# One mantissa of TF32 leaves nothing of logits whose differences are what counts, nor of a residual of all but zero.
MODERATE = [name for name, case in CASES.items() if case.get("scale", 1.0) <= 30.0]


@pytest.fixture
def kernel():
    from gradmix.kernels import mixed_alignment

    return mixed_alignment


def weights(*lams: float) -> Tensor:
    return torch.tensor(lams, dtype=torch.float64, device="cuda")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("case", MODERATE)
def test_equals_float64(case: str, precision: str, seed: int, kernel) -> None:
    arguments = make(**CASES[case], dtype=torch.float32, seed=seed)
    parts, bias = prepared(arguments, "cuda")
    poison_free_memory()
    result = kernel.mixed_alignment(*parts, weights(0.3), bias=bias, precision=precision)
    expected = mixed_alignment_reference(*sides(in_double(arguments)), 0.3)
    inner, norm = kernel.mixed_alignment(*parts, weights(0.3), bias=bias, precision=precision, norms=False)
    assert norm.numel() == 0
    for part, exact in zip((*result, inner), (*expected, expected.inner), strict=True):
        assert (part[0].cpu() - exact).abs().max() <= UNITS[precision] * exact.abs().max()
    for part in (result[0], inner):
        assert_decisions_agree(part[0].cpu(), expected.inner, band=1e-6 if precision != "tf32" else 2e-2)


@pytest.mark.parametrize("soft", [False, True])
def test_what_underflows_is_recomputed(soft: bool, kernel) -> None:
    arguments = make(n=70, m=40, classes=50, scale=300.0, soft=(soft, soft), dtype=torch.float32)
    parts, bias = prepared(arguments, "cuda")
    result = kernel.mixed_alignment(*parts, weights(0.5), bias=bias)
    expected = mixed_alignment_reference(*sides(in_double(arguments)), 0.5)
    for part, exact in zip(result, expected, strict=True):
        assert (part[0].cpu() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("soft", [False, True])
def test_split_sums_equal_float64_with_the_same_bits_in_every_run(soft: bool, precision: str, kernel) -> None:
    arguments = make(n=70, m=40, classes=701, d=603, soft=(soft, soft), dtype=torch.float32)
    parts, bias = prepared(arguments, "cuda")
    poison_free_memory()
    with mock.patch.object(kernel, "parts", wraps=kernel.parts) as chosen:
        result = kernel.mixed_alignment(*parts, weights(0.3), bias=bias, precision=precision)
    assert min(kernel.parts(*call.args) for call in chosen.mock_calls) > 1
    expected = mixed_alignment_reference(*sides(in_double(arguments)), 0.3)
    for part, exact in zip(result, expected, strict=True):
        assert (part[0].cpu() - exact).abs().max() <= UNITS[precision] * exact.abs().max()
    assert_decisions_agree(result[0][0].cpu(), expected.inner, band=1e-6 if precision != "tf32" else 2e-2)
    again = on_other_streams(lambda: kernel.mixed_alignment(*parts, weights(0.3), bias=bias, precision=precision))
    assert all(torch.equal(a, b) for results in again for a, b in zip(results, result, strict=True))


def test_a_large_problem_and_its_sums_over_groups(kernel) -> None:
    arguments = make(n=500, m=1, classes=1000, d=300, dtype=torch.float32)
    side, bias = prepared([*arguments[:3], *arguments[:3], arguments[6]], "cuda")
    inner, norm = kernel.mixed_alignment(*side[:4], *side[:4], weights(0.2, 0.5), bias=bias)
    rows = torch.arange(512, device="cuda").where(torch.arange(512, device="cuda") < 500, -1)
    sums = kernel.class_pair_sums(*side[:4], weights(0.2, 0.5), rows, 16, bias=bias)
    for total, pairs in zip(sums, (inner, norm), strict=True):
        full = torch.nn.functional.pad(pairs.double() * (1 - torch.eye(500, device="cuda")), (0, 12, 0, 12))
        exact = full.view(2, 32, 16, 32, 16).sum((2, 4))
        assert (total - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_the_same_bits_back_to_back_and_on_other_streams(kernel) -> None:
    parts, bias = prepared(make(n=300, m=200, classes=130, d=70, dtype=torch.float32), "cuda")
    lams = weights(0.3, 0.6)
    expected = kernel.mixed_alignment(*parts, lams, bias=bias)
    poison_free_memory()
    results = on_other_streams(lambda: kernel.mixed_alignment(*parts, lams, bias=bias))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))


def test_a_graph_replayed_with_another_weight_gives_what_a_call_gives(kernel) -> None:
    parts, bias = prepared(make(n=60, m=50, classes=40, d=30, dtype=torch.float32), "cuda")
    lams = weights(0.3)
    graph, kept = captured(lambda: kernel.mixed_alignment(*parts, lams, bias=bias))
    lams.fill_(0.7)
    graph.replay()
    torch.cuda.synchronize()
    called = kernel.mixed_alignment(*parts, weights(0.7), bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(kept, called, strict=True))


def test_the_host_does_not_wait(kernel) -> None:
    parts, bias = prepared(make(n=60, m=50, scale=300.0, dtype=torch.float32), "cuda")
    lams = weights(0.3)
    kernel.mixed_alignment(*parts, lams, bias=bias)
    with no_waiting():
        kernel.mixed_alignment(*parts, lams, bias=bias)
        with pytest.raises(RuntimeError, match="synchroniz"):
            lams.item()
