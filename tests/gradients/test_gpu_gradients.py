"""The gradient engine on a GPU: the values of float64 on the CPU, whatever the stream, the device or the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from gradient_networks import ARCHITECTURES, CONVOLUTION, LAYERS, NO_RULE, USES, Case
from gradient_truth import assert_layers_equal
from gradient_truth import sample_gradients as truth
from test_gradient_pitfalls import SMALL
from test_promises import photograph, same
from test_sketches import Signs
from torch import Tensor, nn

import gradmix
from gradmix.gradients.directions import directional_derivatives

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")]

EXACT = 1e-9
FLOAT32 = 100 * 2**-24
ROUNDING = {torch.bfloat16: 30 * 2**-9, torch.float16: 30 * 2**-12}
SERVED = {**LAYERS, **USES}


@pytest.fixture(autouse=True)
def _exact_arithmetic() -> Iterator[None]:
    """No TF32, whose ten bits would hide errors of the size looked for, and cuDNN without atomics."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def on_gpu(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].cuda(), batch[1].cuda()


class There:
    """A result whose tensors are brought to the CPU."""

    def __init__(self, result) -> None:
        assert result.vectors.is_cuda
        self.layout, self._result = result.layout, result

    def layer(self, name: str) -> Tensor:
        return self._result.layer(name).cpu()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, FLOAT32)], ids=str)
@pytest.mark.parametrize("name", SERVED, ids=str)
def test_equals_the_loop_over_single_samples(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = SERVED[name]
    model, batch = case.model(dtype), case.batch(dtype=dtype)
    result = gradmix.sample_gradients(copy.deepcopy(model).cuda(), on_gpu(batch), sketch="identity")
    assert_layers_equal(There(result), truth(model, *batch), tolerance)


@pytest.mark.parametrize("name", ["sine of a parameter", "cosine classifier", "standardised weights"])
def test_what_has_no_rule_is_served_exactly_on_request(name: str) -> None:
    case = NO_RULE[name]
    model, batch = case.model(), case.batch()
    result = gradmix.sample_gradients(
        copy.deepcopy(model).cuda(), on_gpu(batch), sketch="identity", without_rule="exact"
    )
    assert_layers_equal(There(result), truth(model, *batch), EXACT)


@pytest.mark.parametrize("sketch", ["rademacher", "gaussian", "rows", pytest.param(Signs(3), id="own")])
@pytest.mark.parametrize("name", ARCHITECTURES, ids=str)
def test_the_sketch_is_the_same_as_on_the_cpu(name: str, sketch: object) -> None:
    case = ARCHITECTURES[name]
    model, batch = case.model(), case.batch()
    expected = gradmix.sample_gradients(model, batch, rank=3, seed=7, sketch=sketch)
    result = gradmix.sample_gradients(copy.deepcopy(model).cuda(), on_gpu(batch), rank=3, seed=7, sketch=sketch)
    assert result.layout == expected.layout
    assert (result.vectors.cpu() - expected.vectors).abs().max() <= EXACT * expected.vectors.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES, ids=str)
def test_classes_of_rows_that_stay_on_the_cpu(name: str) -> None:
    """Rows are moved chunk by chunk; sums from either device merge."""
    case = ARCHITECTURES[name]
    model, batch = case.model(), case.batch(9)
    expected = gradmix.class_gradients(model, batch, rank=3)
    result = gradmix.class_gradients(copy.deepcopy(model).cuda(), batch, rank=3, chunk_size=4)
    assert result.vectors.is_cuda and torch.equal(result.classes.cpu(), expected.classes)
    here = result.to("cpu")
    for attribute in ("vectors", "square_norms"):
        a, b = getattr(here, attribute), getattr(expected, attribute)
        assert (a - b).abs().max() <= EXACT * b.abs().max()
    assert torch.allclose((result + expected).vectors.cpu(), (here + expected).vectors)
    assert torch.allclose((expected + result).vectors, (here + expected).vectors)
    assert (result.cosine().cpu() - expected.cosine()).abs().max() <= EXACT
    assert (result.align(expected).cosine.cpu() - expected.align(expected).cosine).abs().max() <= EXACT


@pytest.mark.parametrize("name", ["conv2d, everything", "attention", "embedding tied to the classifier"])
def test_derivatives_along_a_direction(name: str) -> None:
    case = SERVED[name]
    model, batch = case.model(), case.batch()
    directions = {k: torch.randn_like(p) for k, p in model.named_parameters()}
    expected = directional_derivatives(model, batch, directions, norms=True)
    there = {k: v.cuda() for k, v in directions.items()}
    result = directional_derivatives(copy.deepcopy(model).cuda(), on_gpu(batch), there, norms=True)
    assert torch.allclose(result.inner.cpu(), expected.inner, rtol=1e-9, atol=1e-12)
    assert torch.allclose(result.norm.cpu(), expected.norm, rtol=1e-9)


@pytest.mark.parametrize("scale", [None, 1024.0, "GradScaler"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_under_autocast_the_loss_scale_is_divided_out(dtype: torch.dtype, scale: object) -> None:
    model, batch = SMALL.model(torch.float32), SMALL.batch(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cuda", init_scale=512.0) if scale == "GradScaler" else scale
    with torch.autocast("cuda", dtype=dtype):
        result = gradmix.sample_gradients(copy.deepcopy(model).cuda(), on_gpu(batch), sketch="identity", scaler=scaler)
    assert result.vectors.dtype == torch.float32
    assert_layers_equal(There(result), truth(model, *batch), ROUNDING[dtype])


def test_an_overflow_in_float16_is_an_error_that_names_the_scale() -> None:
    model, batch = SMALL.model(torch.float32).cuda(), on_gpu(SMALL.batch(dtype=torch.float32))
    with torch.autocast("cuda", dtype=torch.float16), pytest.raises((ValueError, RuntimeError), match="scaler"):
        gradmix.sample_gradients(model, batch, scaler=2.0**30)


# --------------------------------------------------------------------------------------------- streams, runs, devices


def wide() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Enough work that a kernel on the wrong stream would be caught."""
    case = Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 256), nn.Tanh(), nn.Linear(256, 4),
        ),
        (3, 32, 32),
        rows=64,
    )  # fmt: skip
    return case.model(torch.float32).cuda(), on_gpu(case.batch(dtype=torch.float32))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_on_another_stream(backend: str) -> None:
    model, (x, y) = wide()
    expected = gradmix.class_gradients(model, (x, y), rank=16, backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.empty_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)  # there only once the sleep is over: whoever does not wait reads something else
        result = gradmix.class_gradients(model, (late, y), rank=16, backend=backend)
    stream.synchronize()
    assert torch.equal(result.vectors, expected.vectors)


def test_back_to_back_calls_do_not_disturb_each_other() -> None:
    model, (x, y) = wide()
    rows = [x * (k + 1) for k in range(6)]
    alone = []
    for part in rows:
        alone.append(gradmix.class_gradients(model, (part, y), rank=16))
        torch.cuda.synchronize()
    together = [gradmix.class_gradients(model, (part, y), rank=16) for part in rows]
    torch.cuda.synchronize()
    assert all(torch.equal(a.vectors, b.vectors) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_same_bits_from_run_to_run(backend: str) -> None:
    """Without float atomics of ours; index_add_ of torch is told to do without its own."""
    model, batch = wide()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        results = [gradmix.class_gradients(model, batch, rank=16, backend=backend) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(r.vectors, results[0].vectors) for r in results)
    assert all(torch.equal(r.square_norms, results[0].square_norms) for r in results)


def test_more_entries_than_32_bits_count() -> None:
    """B times the parameters of the layer is beyond 2^31, and so are its activations: 40,000 x 57,600."""
    rows, width = 40_000, 57_600
    needed = 6 * rows * width * 4
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free device memory")
    model = nn.Linear(width, 4).cuda()
    x = torch.zeros(rows, width, device="cuda")
    assert x.numel() > 2**31
    x[0], x[-1, -1], x[-2, 0] = 1.0, 3.0, 2.0
    y = torch.zeros(rows, dtype=torch.int64, device="cuda")
    y[-2:] = 1
    result = gradmix.class_gradients(model, (x, y), rank=16, chunk_size=rows)
    ends = [0, rows - 2, rows - 1]
    few = gradmix.sample_gradients(model, (x[ends], y[ends]), rank=16)
    assert result.counts.tolist() == [rows - 2, 2]
    expected = few.vectors[1:].sum(0)
    assert (result.vectors[1] - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_current_device_and_everything_else_is_left_alone() -> None:
    case = ARCHITECTURES["vit"]
    model, batch = case.model(torch.float32).cuda(), on_gpu(case.batch(dtype=torch.float32))
    before, state = photograph(model, batch), torch.cuda.get_rng_state()
    device, stream = torch.cuda.current_device(), torch.cuda.current_stream()
    gradmix.class_gradients(model, batch, rank=4)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.cuda.current_device() == device and torch.cuda.current_stream() == stream
    after = photograph(model, batch)
    assert [k for k in before if not same(before[k], after[k])] == []


def test_on_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two devices, torch sees {torch.cuda.device_count()}")
    case = ARCHITECTURES["vit"]
    model, (x, y) = case.model(), case.batch()
    expected = gradmix.class_gradients(model, (x, y), rank=3)
    with torch.cuda.device(0):
        result = gradmix.class_gradients(copy.deepcopy(model).to("cuda:1"), (x, y), rank=3)
        assert torch.cuda.current_device() == 0
    assert result.vectors.device == torch.device("cuda:1")
    assert (result.vectors.cpu() - expected.vectors).abs().max() <= EXACT * expected.vectors.abs().max()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", [n for n in CONVOLUTION if n.startswith("conv2d, ") and "channels-last" not in n])
def test_memory_formats_of_convolutions(name: str, memory_format: torch.memory_format) -> None:
    case = CONVOLUTION[name]
    model, (x, y) = case.model(), case.batch()
    there = copy.deepcopy(model).cuda().to(memory_format=memory_format)
    result = gradmix.sample_gradients(there, (x.cuda().to(memory_format=memory_format), y.cuda()), rank=2)
    expected = gradmix.sample_gradients(model, (x, y), rank=2)
    assert (result.vectors.cpu() - expected.vectors).abs().max() <= EXACT * expected.vectors.abs().max()


@pytest.mark.parametrize("call", [gradmix.sample_gradients, gradmix.class_gradients], ids=lambda f: f.__name__)
def test_bad_labels_are_named_on_the_gpu_too(call: Callable) -> None:
    case = LAYERS["linear"]
    x, _ = case.batch()
    with pytest.raises(ValueError, match="label"):
        call(case.model().cuda(), (x.cuda(), torch.tensor([0, 4, 1]).cuda()))


def test_peak_memory_does_not_grow_with_the_rows() -> None:
    model, (x, y) = wide()
    y[:4] = torch.arange(4)

    def peak(times: int) -> int:
        rows = (x.cpu().repeat(times, 1, 1, 1), y.cpu().repeat(times))
        gradmix.class_gradients(model, rows, rank=16, chunk_size=64)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradmix.class_gradients(model, rows, rank=16, chunk_size=64)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    assert peak(4) <= 1.1 * peak(1)
