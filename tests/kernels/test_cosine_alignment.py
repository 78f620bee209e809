"""The operators cosine_alignment and mixed_gram_alignment: every body against the formula in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradmix.ops.cosine_alignment import (
    MIXED_OPERATOR,
    MOST_LAYERS,
    OPERATOR,
    cosine_alignment,
    mixed_gram_alignment,
)

BODIES = [body.name for body in OPERATOR.backends if body.available() is None]
FAST = [name for name in BODIES if name != "reference"]
DOUBLE = [name for name in BODIES if name != "triton"]  # those that serve float64


def make(layers=2, p=5, q=4, k=7, scale=1.0, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and a reference, of which the first row of x is zero and two rows are alike."""
    g = torch.Generator().manual_seed(seed)
    x, y, reference = (
        (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)
        for shape in ((layers, p, k), (layers, q, k), (layers, k))
    )
    if p > 1:
        y[:, -1] = x[:, -1]
        x[:, 0] = 0
    return x, y, reference


CASES = {
    "plain": {},
    "one of each": {"layers": 1, "p": 1, "q": 1},
    "one entry": {"k": 1},
    "no entries": {"k": 0},
    "no rows": {"p": 0},
    "no layers": {"layers": 0},
    "odd sizes": {"layers": 1, "p": 33, "q": 65, "k": 19},
    "more entries than a block": {"layers": 1, "p": 3, "q": 2, "k": 1030},
}
SCALES = {"lengths near 1": 1.0, "huge": 1e20, "largest": 1e37, "tiny": 1e-25, "smallest": 1e-36}


def make_case(case: str, **kwargs: object) -> tuple[Tensor, Tensor, Tensor]:
    return make(**CASES[case], **kwargs)


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BODIES)
def test_cosines_of_vectors_of_any_length(backend: str, case: str, scale: str) -> None:
    x, y, _ = make_case(case, scale=SCALES[scale])
    a, b = x.double(), y.double()
    expected = F.normalize(a, dim=2, eps=1e-300) @ F.normalize(b, dim=2, eps=1e-300).mT
    result = cosine_alignment(x, y, backend=backend)
    assert result.dtype == torch.float32 and result.shape == expected.shape
    if expected.numel():
        assert (result - expected).abs().max() <= 1e-6
        assert result.abs().max() <= 1
        wide = expected.abs() > 1e-6
        assert torch.equal((result >= 0)[wide], (expected >= 0)[wide])
    if x.shape[1] > 1:
        assert (result[:, 0] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", DOUBLE)
def test_cosines_in_float64(backend: str, case: str) -> None:
    x, y, _ = make_case(case, dtype=torch.float64)
    result = cosine_alignment(x, y, backend=backend)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, F.cosine_similarity(x[:, :, None], y[:, None], dim=3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", FAST)
def test_low_precision_is_summed_in_float32(backend: str, dtype: torch.dtype) -> None:
    x, y, reference = make(p=17, q=9, k=50, dtype=dtype)
    doubled = [t.double() for t in (x, y, reference)]
    result = cosine_alignment(x, y, backend=backend)
    assert result.dtype == torch.float32
    assert (result - cosine_alignment(*doubled[:2], backend="reference")).abs().max() <= 1e-6
    mixed = mixed_gram_alignment(x, y, reference, 0.3, backend=backend)
    expected = mixed_gram_alignment(*doubled, 0.3, backend="reference")
    assert mixed.inner.dtype == mixed.norm.dtype == torch.float32
    assert (mixed.inner - expected.inner).abs().max() <= 1e-5 * expected.inner.abs().max()
    assert (mixed.norm - expected.norm).abs().max() <= 1e-5 * expected.norm.max()


@pytest.mark.parametrize("backend", BODIES)
def test_rows_that_point_the_same_way_have_a_cosine_of_one_and_not_more(backend: str) -> None:
    x = torch.randn(1, 20, 33)
    result = cosine_alignment(x, torch.cat([3 * x, -x], 1), backend=backend)[0]
    assert (result[:, :20].diagonal() - 1).abs().max() <= 3e-7 and (result[:, 20:].diagonal() + 1).abs().max() <= 3e-7
    assert result.abs().max() <= 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("backend", BODIES)
def test_a_nan_or_an_infinity_is_not_hidden(backend: str) -> None:
    x, y, reference = make()
    x[1, 2, 3], y[0, 1, 0] = math.nan, math.inf
    result = cosine_alignment(x, y, backend=backend)
    norm = mixed_gram_alignment(x, y, reference, 0.5, backend=backend).norm
    bad = torch.zeros_like(result, dtype=torch.bool)
    bad[1, 2], bad[0, :, 1] = True, True
    # A zero row has the cosine 0 with whatever is finite; of a product with an infinity nothing is asked.
    bad[0, 0, 1] = result[0, 0, 1].isnan()
    assert torch.equal(result.isnan(), bad)
    assert norm[1, 2].isnan().all() and not norm[0, :, 1].isfinite().any()


# ------------------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("lam", [0.0, 1e-3, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_mixtures(backend: str, case: str, lam: float) -> None:
    x, y, reference = make_case(case)
    a, b, g = x.double(), y.double(), reference.double()
    mixed = lam * a[:, :, None] + (1 - lam) * b[:, None]
    inner, norm = (mixed * g[:, None, None]).sum(3), mixed.norm(dim=3)
    result = mixed_gram_alignment(x, y, reference, lam, backend=backend)
    assert result.inner.shape == result.norm.shape == norm.shape
    if norm.numel():
        length = float(torch.cat([a, b], 1).norm(dim=2).max())
        assert (result.inner - inner).abs().max() <= 1e-6 * length * float(g.norm(dim=1).max())
        assert (result.norm.double().square() - norm.square()).abs().max() <= 1e-6 * length**2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mixtures_in_float64(case: str) -> None:
    arguments = make_case(case, dtype=torch.float64)
    result, expected = (mixed_gram_alignment(*arguments, 0.3, backend=name) for name in ("torch", "reference"))
    assert result.norm.dtype == torch.float64
    torch.testing.assert_close(result.inner, expected.inner, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.norm, expected.norm, rtol=0, atol=1e-12)


@given(
    layers=st.integers(1, 2),
    p=st.integers(1, 6),
    q=st.integers(1, 6),
    k=st.integers(1, 40),
    lam=st.floats(0, 1),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=40)
def test_any_rows(layers, p, q, k, lam, seed) -> None:
    x, y, reference = make(layers, p, q, k, seed=seed)
    doubled = [t.double() for t in (x, y, reference)]
    cosines, mixed = cosine_alignment(*doubled[:2], backend="reference"), mixed_gram_alignment(*doubled, lam)
    scale = float(torch.cat([x, y], 1).norm(dim=2).max())
    for backend in FAST:
        assert (cosine_alignment(x, y, backend=backend) - cosines).abs().max() <= 1e-6
        result = mixed_gram_alignment(x, y, reference, lam, backend=backend)
        assert (result.inner - mixed.inner).abs().max() <= 1e-6 * scale * float(reference.norm(dim=1).max())
        assert (result.norm.double().square() - mixed.norm.square()).abs().max() <= 1e-6 * scale**2


@pytest.mark.parametrize("backend", FAST)
def test_what_cancels_is_small_and_no_nan(backend: str) -> None:
    x = torch.randn(1, 40, 50)
    reference = torch.randn(1, 50)
    result = mixed_gram_alignment(x, -x, reference, 0.5, backend=backend)
    # The error stated: 5e-4 of the terms' lengths.
    assert (result.norm[0].diagonal() <= 5e-4 * x[0].norm(dim=1)).all()
    assert (result.inner[0].diagonal().abs() <= 1e-6 * x[0].norm(dim=1) * reference.norm()).all()


@pytest.mark.parametrize("backend", BODIES)
def test_the_weight_may_be_a_tensor(backend: str) -> None:
    arguments = make()
    expected = mixed_gram_alignment(*arguments, 0.3, backend=backend)
    for lam in (torch.tensor(0.3, dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)):
        result = mixed_gram_alignment(*arguments, lam, backend=backend)
        assert torch.equal(result.inner, expected.inner) and torch.equal(result.norm, expected.norm)


# ----------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("backend", BODIES)
def test_strided_inputs_and_the_same_tensor_twice_give_the_same(backend: str) -> None:
    x, y, reference = make()
    turned = [
        (lambda t: t.mT.contiguous().mT),
        (lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]]),
        (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
    ]
    expected = cosine_alignment(x, y, backend=backend), *mixed_gram_alignment(x, y, reference, 0.3, backend=backend)
    for turn in turned:
        a, b = turn(x), turn(y)
        assert not a.is_contiguous()
        results = cosine_alignment(a, b, backend=backend), *mixed_gram_alignment(a, b, reference, 0.3, backend=backend)
        for result, other in zip(results, expected, strict=True):
            torch.testing.assert_close(result, other)
    twice = cosine_alignment(x, x, backend=backend), *mixed_gram_alignment(x, x, reference, 0.3, backend=backend)
    copies = [
        cosine_alignment(x, x.clone(), backend=backend),
        *mixed_gram_alignment(x, x.clone(), reference, 0.3, backend=backend),
    ]
    for result, other in zip(twice, copies, strict=True):
        torch.testing.assert_close(result, other)


def test_every_configuration_of_the_kernel_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("gradmix.kernels.cosine_alignment", reason="triton is not installed")
    if "triton" not in BODIES:
        pytest.skip("no Triton kernel can run here")
    x, y, reference = make(1, 70, 35, 50)
    doubled = x.double(), y.double(), reference.double()
    for chosen in kernel.CONFIGURATIONS:
        monkeypatch.setattr(kernel, "configuration", lambda *_, chosen=chosen: chosen)
        result = cosine_alignment(x, y, backend="triton")
        assert (result - cosine_alignment(*doubled[:2])).abs().max() <= 1e-6
        mixed, expected = (
            mixed_gram_alignment(x, y, reference, 0.3, backend="triton"),
            mixed_gram_alignment(*doubled, 0.3),
        )
        torch.testing.assert_close(mixed.inner.double(), expected.inner, rtol=0, atol=1e-4)
        torch.testing.assert_close(mixed.norm.double(), expected.norm, rtol=1e-5, atol=0)


def test_autocast_does_not_lower_the_precision() -> None:
    x, y, reference = make()
    expected = cosine_alignment(x, y), *mixed_gram_alignment(x, y, reference, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = cosine_alignment(x, y), *mixed_gram_alignment(x, y, reference, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


X, Y, G = make()
BAD = {
    "x a list": (([[[1.0]]], Y), {}, TypeError, "x: got list"),
    "x of two dimensions": ((X[0], Y), {}, ValueError, r"x: got shape \(5, 7\), expected three dimensions"),
    "x of integers": ((X.long(), Y), {}, TypeError, "x: got dtype torch.int64"),
    "y of other layers": ((X, Y[:1]), {}, ValueError, r"y: got shape \(1, 4, 7\), expected \(2, Q, 7\) as x"),
    "y of other entries": ((X, Y[..., :3]), {}, ValueError, r"y: got shape \(2, 4, 3\)"),
    "y of another dtype": ((X, Y.double()), {}, TypeError, "y: got dtype torch.float64, expected torch.float32 as x"),
    "precision": ((X, Y), {"precision": "fp8"}, ValueError, "precision: got 'fp8'"),
    "reference a list": ((X, Y, [1.0], 0.5), {}, TypeError, "reference: got list"),
    "reference of a layer": ((X, Y, G[0], 0.5), {}, ValueError, r"reference: got shape \(7,\), expected \(2, 7\) as x"),
    "reference in float64": ((X, Y, G.double(), 0.5), {}, TypeError, "reference: got dtype torch.float64"),
    "lam above 1": ((X, Y, G, 1.5), {}, ValueError, "lam: got 1.5"),
    "two weights": ((X, Y, G, torch.tensor([0.5, 0.5])), {}, ValueError, "lam: got 2 weights, expected one"),
    "lam a string": ((X, Y, G, "0.5"), {}, TypeError, "lam: got str"),
    "backend": ((X, Y), {"backend": "cpp"}, ValueError, "cosine_alignment has no 'cpp' body"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_is_named(case: str) -> None:
    arguments, named, error, message = BAD[case]
    with pytest.raises(error, match=message):
        (cosine_alignment if len(arguments) == 2 else mixed_gram_alignment)(*arguments, **named)


@pytest.mark.skipif("triton" not in BODIES, reason="no Triton kernel can run here")
def test_float64_is_refused_by_the_kernels_with_its_reason() -> None:
    x, y, reference = make(dtype=torch.float64)
    for call in (
        lambda: cosine_alignment(x, y, backend="triton"),
        lambda: mixed_gram_alignment(x, y, reference, 0.5, backend="triton"),
    ):
        with pytest.raises(RuntimeError, match="'triton' cannot run: it serves float32, bfloat16 and float16"):
            call()


def test_more_layers_than_a_launch_has_room_for_are_refused_by_the_kernels() -> None:
    x, y, reference = make(layers=MOST_LAYERS + 1, p=1, q=1, k=2)
    for operator, arguments in ((OPERATOR, (x, y)), (MIXED_OPERATOR, (x, y, reference))):
        kernel = next(body for body in operator.backends if body.name == "triton")
        assert kernel.can_run(*arguments) == "it serves up to 65,535 layers, and got 65,536"
    assert cosine_alignment(x, y).shape == (MOST_LAYERS + 1, 1, 1)


def test_registration() -> None:
    x, y, reference = make()
    torch.library.opcheck(torch.ops.gradmix.cosine_alignment.default, (x, y, "tf32x3", "torch"))
    lam = torch.tensor([0.3], dtype=torch.float64)
    torch.library.opcheck(torch.ops.gradmix.mixed_gram_alignment.default, (x, y, reference, lam, "tf32x3", "torch"))


def test_torch_compile_passes_through_without_a_graph_break() -> None:
    def both(x: Tensor, y: Tensor, reference: Tensor) -> Tensor:
        return cosine_alignment(x, y) + mixed_gram_alignment(x, y, reference, 0.3).norm

    arguments = make()
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), both(*arguments))


def test_auto_takes_torch_until_the_kernels_are_measured() -> None:
    x, y, reference = make()
    assert OPERATOR.choose("auto", x, y, "tf32x3").name == "torch"
    assert MIXED_OPERATOR.choose("auto", x, y, reference, torch.ones(1), "tf32x3").name == "torch"
