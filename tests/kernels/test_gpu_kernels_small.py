"""The small kernels on a GPU: values against float64 on the CPU, or the bits of torch, and launches.

The tables of cases are those of the tests without a GPU; here are the kernels as compiled, every precision of the
products, streams, graphs, and that nothing makes the host wait.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_cosine_alignment as cosines
import test_draw_partners as draws
import test_last_layer_gradient as gradients
import test_mix_samples as mixtures
import torch
from gpu import captured, no_waiting, on_other_streams, poison_free_memory
from torch import Tensor

from gradmix import kernels
from gradmix.ops.cosine_alignment import cosine_alignment, mixed_gram_alignment
from gradmix.ops.draw_partners import draw_partners
from gradmix.ops.last_layer_gradient import last_layer_gradient
from gradmix.ops.mix_labels import mix_labels
from gradmix.ops.mix_samples import mix_samples

pytestmark = pytest.mark.gpu
BODIES = ["triton", "torch"]
PRECISION = {"ieee": 1.0, "tf32x3": 1.0, "tf32": 5e3}
"""By how much the bound of float32 is widened: of a product in TF32 it is 5e-3 relative to the largest."""


def test_the_kernels_are_there() -> None:
    """On a machine with a GPU, a missing Triton would let everything below fail for one reason: this one."""
    assert kernels.unavailable_reason() is None


def on_gpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.cuda() for t in tensors)


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("case", gradients.CASES)
def test_last_layer_gradient(case: str, backend: str, precision: str, seed: int) -> None:
    arguments = gradients.make(**gradients.CASES[case], seed=seed)
    poison_free_memory()
    for bias in (True, False):
        result = last_layer_gradient(*on_gpu(*arguments), bias=bias, precision=precision, backend=backend)
        assert result.is_cuda
        unit = 5e-7 * (PRECISION[precision] if backend == "triton" else 1)
        gradients.assert_close(result.cpu(), gradients.truth(arguments, bias), arguments, unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BODIES)
def test_last_layer_gradient_of_a_large_head(backend: str, dtype: torch.dtype) -> None:
    h, z, y = gradients.make(n=1500, classes=1000, d=1030, scale=3.0, dtype=dtype)
    residual = torch.softmax(z.double(), 1) - torch.nn.functional.one_hot(y, 1000)
    expected = torch.cat([residual.T @ h.double(), residual.sum(0)[:, None]], 1)
    result = last_layer_gradient(*on_gpu(h, z, y), backend=backend).cpu()
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("scale", cosines.SCALES)
@pytest.mark.parametrize("case", cosines.CASES)
def test_cosine_alignment(case: str, scale: str, backend: str, precision: str) -> None:
    x, y, _ = cosines.make_case(case, scale=cosines.SCALES[scale])
    poison_free_memory()
    result = cosine_alignment(*on_gpu(x, y), precision=precision, backend=backend)
    expected = cosine_alignment(x.double(), y.double(), backend="reference")
    assert result.is_cuda and result.shape == expected.shape
    if expected.numel():
        unit = 1e-6 * (PRECISION[precision] if backend == "triton" else 1)
        assert (result.cpu() - expected).abs().max() <= unit
        wide = expected.abs() > unit
        assert torch.equal((result.cpu() >= 0)[wide], (expected >= 0)[wide])


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("case", cosines.CASES)
def test_mixed_gram_alignment(case: str, backend: str, precision: str) -> None:
    arguments = cosines.make_case(case)
    poison_free_memory()
    result = mixed_gram_alignment(*on_gpu(*arguments), 0.3, precision=precision, backend=backend)
    expected = mixed_gram_alignment(*[t.double() for t in arguments], 0.3, backend="reference")
    if expected.norm.numel():
        length = float(torch.cat(arguments[:2], 1).norm(dim=2).max())
        unit = 1e-6 * (PRECISION[precision] if backend == "triton" else 1)
        error = (result.inner.cpu() - expected.inner).abs().max()
        assert error <= 1e-6 * length * float(arguments[2].norm(dim=1).max())
        assert (result.norm.cpu().double().square() - expected.norm.square()).abs().max() <= unit * length**2


@pytest.mark.parametrize("backend", BODIES)
def test_large_tiles_of_cosines(backend: str) -> None:
    x, y, _ = cosines.make(3, 700, 650, 515)
    expected = cosine_alignment(x.double(), y.double(), backend="reference")
    assert (cosine_alignment(*on_gpu(x, y), backend=backend).cpu() - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("policy", draws.POLICIES)
@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("case", [*draws.CASES, "large"])
def test_draw_partners_gives_the_integers_of_the_cpu(case: str, backend: str, policy: str, seed: int) -> None:
    size = {"n": 40, "m": 100_003, "nan": 0.1} if case == "large" else draws.CASES[case]
    arguments = draws.make(**size, policy=policy, seed=seed)
    there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    poison_free_memory()
    result = draw_partners(**there, backend=backend)
    expected = draw_partners(**arguments, backend="torch")
    assert result.partner.is_cuda
    assert torch.equal(result.partner.cpu(), expected.partner) and torch.equal(result.found.cpu(), expected.found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in mixtures.CASES if not case.startswith("no ")])
def test_mix_samples_gives_the_bits_of_torch(case: str, dtype: torch.dtype) -> None:
    arguments = on_gpu(*mixtures.make(**mixtures.CASES[case], dtype=dtype))
    poison_free_memory()
    mixed = mix_samples(*arguments, backend="triton")
    assert torch.equal(mixtures.bits(mixed), mixtures.bits(mix_samples(*arguments, backend="torch")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [1, 3, 1000, 21_841])
def test_mix_labels_gives_the_bits_of_torch(classes: int, dtype: torch.dtype) -> None:
    *tensors, _ = mixtures.make_labels(classes, dtype)
    poison_free_memory()
    vectors = mix_labels(*on_gpu(*tensors), classes, backend="triton")
    assert torch.equal(vectors.cpu(), mix_labels(*tensors, classes, backend="torch"))


# ------------------------------------------------------------------------------------------------------ streams, graphs


def calls(backend: str) -> dict[str, tuple[list[Tensor], Callable[[], tuple[Tensor, ...]]]]:
    """By name: what may change between two calls, and the call."""
    h, z, y = on_gpu(*gradients.make(n=300, classes=70, d=130))
    soft = on_gpu(*gradients.make(n=300, classes=70, d=130, soft=True))[2]
    a, b, g = on_gpu(*cosines.make(2, 70, 90, 100))
    lam = torch.tensor(0.3, dtype=torch.float64, device="cuda")
    v = {k: t.cuda() if isinstance(t, Tensor) else t for k, t in draws.make(100, 1500, "best").items()}
    own, other, partner, weight = on_gpu(*mixtures.make(m=9))
    start = torch.ones(70, 131, device="cuda")

    def added() -> tuple[Tensor, ...]:
        out = start.clone()
        # The operator itself: labels on a GPU are checked by the caller, who knows when a look at them is due.
        torch.ops.gradmix.last_layer_gradient(out, h, z, y, "tf32x3", backend)
        torch.ops.gradmix.last_layer_gradient(out, h, z, soft, "tf32x3", backend)
        return (out,)

    return {
        "last_layer_gradient": ([h, z], added),
        "cosine_alignment": ([a, b], lambda: (cosine_alignment(a, b, backend=backend),)),
        "mixed_gram_alignment": ([a, lam], lambda: tuple(mixed_gram_alignment(a, b, g, lam, backend=backend))),
        "mix_samples": ([own, weight], lambda: (mix_samples(own, other, partner, weight, backend=backend),)),
        "draw_partners": ([v["drawn"], v["score"]], lambda: tuple(draw_partners(**v, backend=backend))),
    }


def equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", BODIES)
def test_nothing_makes_the_host_wait(backend: str) -> None:
    prepared = calls(backend)
    for _, call in prepared.values():
        call()
    with no_waiting():
        for _, call in prepared.values():
            call()


def test_the_same_bits_in_every_run_back_to_back_and_on_other_streams() -> None:
    for name, (_, call) in calls("triton").items():
        expected = call()
        poison_free_memory()
        assert all(equal(call(), expected) for _ in range(10)), name
        assert all(equal(result, expected) for result in on_other_streams(call)), name


def test_work_is_queued_behind_what_its_stream_has_to_do_first() -> None:
    for name, (changing, call) in calls("triton").items():
        before = [t.clone() for t in changing]
        for t in changing:
            t.mul_(0.5)
        expected = call()
        for t, value in zip(changing, before, strict=True):
            t.copy_(value)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # tens of milliseconds
            for t in changing:
                t.mul_(0.5)
            result = call()
        stream.synchronize()
        assert equal(result, expected), name


@pytest.mark.parametrize("backend", BODIES)
def test_a_graph_follows_its_inputs(backend: str) -> None:
    for name, (changing, call) in calls(backend).items():
        graph, result = captured(call)
        for t in changing:
            t.mul_(0.7)  # the mixing weight too
        graph.replay()
        torch.cuda.synchronize()
        expected = call()
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(one, other, msg=name)


def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 logits, and labels whose rows lie at both ends of them."""
    rows, classes = 70_000, 40_000
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("it takes 8 GiB of GPU memory")
    z = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    z[-1, -1] = 20.0
    h = torch.zeros(rows, 1, device="cuda")
    h[0], h[-1] = 1.0, 2.0
    y = torch.zeros(rows, dtype=torch.int64, device="cuda")
    result = last_layer_gradient(h, z, y, backend="triton").cpu().double()
    assert abs(result[0, 0] + (1 - 1 / classes) + 2) <= 1e-3 and abs(result[-1, 0] - 2) <= 1e-3
    allowed = torch.zeros(rows, classes, dtype=torch.bool, device="cuda")
    allowed[-1, -1] = True
    drawn = draw_partners(allowed, torch.zeros(rows, dtype=torch.float64, device="cuda"), backend="triton")
    assert drawn.partner[-1] == classes - 1 and drawn.found.sum() == 1
