"""The operator last_layer_gradient: its reference against autograd, its fast bodies against the reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradmix import _extension
from gradmix.ops import last_layer_gradient as module
from gradmix.ops.last_layer_gradient import OPERATOR, last_layer_gradient

BODIES = [body.name for body in OPERATOR.backends if body.available() is None]
FAST = [name for name in BODIES if name != "reference"]
TORCH_AND_UP = [name for name in FAST if name != "triton"]  # those that serve float64


def make(n=5, classes=6, d=3, scale=1.0, soft=False, dtype=torch.float32, seed=0, label=None) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    z = (torch.randn(n, classes, generator=g, dtype=torch.float64) * scale).to(dtype)
    if soft:
        return [h, z, torch.softmax(3 * torch.randn(n, classes, generator=g, dtype=torch.float64), 1).float()]
    return [h, z, torch.randint(classes, (n,), generator=g) if label is None else torch.full((n,), label)]


def truth(arguments: list[Tensor], bias: bool = True) -> Tensor:
    """The reference in float64, of the same numbers."""
    doubled = [t.double() if t.is_floating_point() else t for t in arguments]
    return last_layer_gradient(*doubled, bias=bias, backend="reference")


def assert_close(result: Tensor, expected: Tensor, arguments: list[Tensor], unit: float) -> None:
    """Rounding is relative to the sum of the lengths of the rows' gradients; a residual is no longer than sqrt 2."""
    assert result.shape == expected.shape
    if expected.numel():
        h = arguments[0].double()
        scale = 2 * (h.square().sum(1) + 1).sqrt().sum()
        assert (result - expected).abs().max() <= unit * scale


CASES = {
    "plain": {},
    "one row": {"n": 1},
    "no rows": {"n": 0},
    "one class": {"classes": 1},
    "two classes": {"classes": 2},
    "one feature": {"d": 1},
    "no features": {"d": 0},
    "odd sizes": {"n": 67, "classes": 37, "d": 131},
    "more classes than a block": {"n": 3, "classes": 1030, "d": 5},
    "all one label": {"n": 9, "label": 2},
    "rows shared out": {"n": 81, "classes": 3, "d": 5},
    "soft labels": {"n": 35, "soft": True},
    "confident": {"scale": 30.0},
    "huge logits": {"n": 33, "scale": 1e4},
    "soft labels, huge logits": {"scale": 1e4, "soft": True},
    "flat logits": {"scale": 0.0},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_float32_against_float64(backend: str, case: str, bias: bool) -> None:
    arguments = make(**CASES[case])
    result = last_layer_gradient(*arguments, bias=bias, backend=backend)
    assert result.dtype == torch.float32
    assert_close(result, truth(arguments, bias), arguments, 3e-7)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", TORCH_AND_UP)
def test_float64(backend: str, case: str) -> None:
    arguments = make(**CASES[case], dtype=torch.float64)
    result = last_layer_gradient(*arguments, backend=backend)
    assert result.dtype == torch.float64
    assert_close(result, truth(arguments), arguments, 1e-14)


@pytest.mark.parametrize("soft, dtype", [(False, torch.bfloat16), (True, torch.float16)])
@pytest.mark.parametrize("backend", FAST)
def test_low_precision_is_summed_in_float32(backend: str, soft: bool, dtype: torch.dtype) -> None:
    arguments = make(n=70, classes=11, d=19, scale=5.0, soft=soft, dtype=dtype)
    for mixed in (
        arguments,
        [arguments[0].float(), *arguments[1:]],
        [arguments[0], arguments[1].float(), arguments[2]],
    ):
        result = last_layer_gradient(*mixed, backend=backend)
        assert result.dtype == torch.float32
        assert_close(result, truth(mixed), mixed, 3e-7)


@given(
    n=st.integers(0, 20),
    classes=st.integers(1, 9),
    d=st.integers(0, 6),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 10.0, 100.0, 1e4]),
    soft=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=25)
def test_any_rows(n, classes, d, scale, soft, bias, seed) -> None:
    arguments = make(n, classes, d, scale, soft, seed=seed)
    for backend in FAST:
        assert_close(
            last_layer_gradient(*arguments, bias=bias, backend=backend), truth(arguments, bias), arguments, 3e-7
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("soft", [False, True])
def test_the_reference_is_the_gradient_of_the_cross_entropy(soft: bool, bias: bool) -> None:
    head = nn.Linear(4, 5, bias=bias).double()
    h, y = torch.randn(7, 4).double(), torch.randint(5, (7,))
    if soft:
        y = torch.softmax(torch.randn(7, 5).double(), 1)
    z = head(h)
    F.cross_entropy(z, y, reduction="sum").backward()
    expected = head.weight.grad if not bias else torch.cat([head.weight.grad, head.bias.grad[:, None]], 1)
    result = last_layer_gradient(h, z, y, bias=bias, backend="reference")
    assert not result.requires_grad
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", FAST)
def test_well_fitted_rows_keep_their_relative_accuracy(backend: str) -> None:
    # softmax(z) - y is 1e-10 here: formed by subtraction in float32 the labels' own entries would be zero or noise.
    h = torch.randn(2, 3)
    arguments = [h, torch.tensor([[25.0, 1.0, 0.0], [0.0, 24.0, 2.0]]), torch.tensor([0, 1])]
    expected = truth(arguments)
    assert 0 < expected.abs().max() < 1e-8
    torch.testing.assert_close(last_layer_gradient(*arguments, backend=backend).double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", ["plain", "no rows", "rows shared out", "soft labels"], ids=str)
@pytest.mark.parametrize("backend", BODIES)
def test_the_sum_is_added_to_out(backend: str, case: str, bias: bool) -> None:
    arguments = make(**CASES[case])
    before = [t.clone() for t in arguments]
    shape = arguments[1].shape[1], arguments[0].shape[1] + bias
    start = torch.randn(shape)
    expected = start.double() + truth(arguments, bias)
    outs = {
        "plain": start.clone(),
        "transposed": start.T.contiguous().T,
        "a part": torch.cat([start, start], 1)[:, : shape[1]],
    }
    for name, out in outs.items():
        assert last_layer_gradient(*arguments, bias=bias, out=out, backend=backend) is out, name
        assert_close(out, expected, arguments, 1e-6)
    assert all(torch.equal(t, b) for t, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_what_lies_beside_a_part_is_left_alone(backend: str) -> None:
    arguments = make(n=70)
    whole = torch.full((8, 7), 3.0)
    last_layer_gradient(*arguments, out=whole[1:7, 2:6], backend=backend)
    inside = torch.zeros(8, 7, dtype=torch.bool)
    inside[1:7, 2:6] = True
    assert (whole[~inside] == 3).all() and (whole[inside] != 3).all()


def test_rows_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft in (False, True):
        arguments = make(n=50, soft=soft)
        monkeypatch.setattr(module, "RESIDUALS", 6 * 7)
        assert_close(last_layer_gradient(*arguments, backend="torch"), truth(arguments), arguments, 3e-7)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_residuals_never_exceed_their_room() -> None:
    """What the torch body allocates at a time stays below 64 MiB and a little, whatever the number of rows."""
    n, classes = 3000, 20_000
    h, z, y = torch.zeros(n, 2), torch.zeros(1, classes).expand(n, classes), torch.zeros(n, dtype=torch.int64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        last_layer_gradient(h, z, y, backend="torch")
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert (32 << 20) < largest <= (66 << 20)


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs_give_the_same(backend: str) -> None:
    for soft in (False, True):
        arguments = make(n=20, soft=soft)
        expected = last_layer_gradient(*arguments, backend=backend)
        turned = [t.T.contiguous().T if t.ndim == 2 else torch.stack([t, t], 1)[:, 1] for t in arguments]
        wide = [torch.cat([t, t], -1)[..., : t.shape[-1]] if t.ndim == 2 else t for t in arguments]
        for strided in (turned, wide):
            assert not strided[0].is_contiguous()
            torch.testing.assert_close(last_layer_gradient(*strided, backend=backend), expected)


@pytest.mark.parametrize("backend", FAST)
def test_a_nan_is_not_hidden(backend: str) -> None:
    h, z, y = make(n=40)
    z[3, 1] = math.nan
    assert last_layer_gradient(h, z, y, backend=backend).isnan().all()


def test_every_configuration_of_the_kernel_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("gradmix.kernels.last_layer_gradient", reason="triton is not installed")
    if "triton" not in BODIES:
        pytest.skip("no Triton kernel can run here")
    for soft, parts in ((False, 3), (True, 1)):
        arguments = make(n=37, classes=66, d=130, soft=soft)
        expected = truth(arguments)
        for configuration in kernel.CONFIGURATIONS:
            monkeypatch.setattr(kernel, "configuration", lambda *_, chosen=configuration: chosen)
            monkeypatch.setattr(kernel, "splits", lambda *_, chosen=parts: chosen)
            result = last_layer_gradient(*arguments, backend="triton")
            assert_close(result, expected, arguments, 3e-7)


def test_autocast_does_not_lower_the_precision() -> None:
    arguments = make()
    expected = last_layer_gradient(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(last_layer_gradient(*arguments), expected)


H, Z, Y = make()
BAD = {
    "features not a tensor": (([[1.0]], Z, Y), {}, TypeError, "features: got list"),
    "features of one dimension": ((H[0], Z, Y), {}, ValueError, r"features: got shape \(3,\)"),
    "integer logits": ((H, Z.long(), Y), {}, TypeError, "logits: got dtype torch.int64"),
    "logits of other rows": ((H, Z[:4], Y), {}, ValueError, "logits: got 4 rows, expected 5"),
    "no classes": ((H, Z[:, :0], Y), {}, ValueError, "logits: got no classes"),
    "labels of other rows": ((H, Z, Y[:4]), {}, ValueError, r"labels: got shape \(4,\)"),
    "a label too large": ((H, Z, Y + 6), {}, ValueError, r"labels: row 0 is .* \[0, 6\)"),
    "label vectors that sum to 2": ((H, Z, torch.full((5, 6), 1 / 3)), {}, ValueError, "labels: row 0 sums to 2"),
    "out a list": ((H, Z, Y), {"out": [0.0]}, TypeError, "out: got list"),
    "out of another shape": ((H, Z, Y), {"out": torch.zeros(6, 3)}, ValueError, r"out: got .*, expected \(6, 4\)"),
    "out in float64": ((H, Z, Y), {"out": torch.zeros(6, 4).double()}, TypeError, "out: got dtype torch.float64"),
    "out that is trained": ((H, Z, Y), {"out": torch.zeros(6, 4, requires_grad=True)}, ValueError, "requires grad"),
    "precision": ((H, Z, Y), {"precision": "fp8"}, ValueError, "precision: got 'fp8'"),
    "backend": ((H, Z, Y), {"backend": "cuda"}, ValueError, "last_layer_gradient has no 'cuda' body"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_is_named(case: str) -> None:
    arguments, named, error, message = BAD[case]
    with pytest.raises(error, match=message):
        last_layer_gradient(*arguments, **named)


@pytest.mark.skipif("triton" not in BODIES, reason="no Triton kernel can run here")
def test_float64_is_refused_by_the_kernel_with_its_reason() -> None:
    with pytest.raises(RuntimeError, match="'triton' cannot run: it serves float32, bfloat16 and float16"):
        last_layer_gradient(*make(dtype=torch.float64), backend="triton")


@pytest.mark.parametrize("soft", [False, True])
def test_registration(soft: bool) -> None:
    arguments = (torch.randn(6, 4), *make(soft=soft), "tf32x3", "torch")
    torch.library.opcheck(torch.ops.gradmix.last_layer_gradient.default, arguments)


def test_torch_compile_passes_through_without_a_graph_break() -> None:
    arguments = make()

    def doubled(*tensors: Tensor) -> Tensor:
        return 2 * last_layer_gradient(*tensors)

    compiled = torch.compile(doubled, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), doubled(*arguments))


def test_auto_takes_no_kernel_that_is_not_measured() -> None:
    best = "torch" if _extension.load() is None else "cpp"
    assert OPERATOR.choose("auto", torch.zeros(6, 4), *make(), "tf32x3").name == best
