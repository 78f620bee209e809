"""class_sketch and sketch_project on a GPU: values against float64 on the CPU, and what only CUDA itself can get wrong.

The kernels' arithmetic and indices are tested without a GPU in tests/kernels/test_cuda_bodies.py; here are launches,
streams, devices, graphs, and tensors too large for 32-bit indices.
"""

from __future__ import annotations

import pytest
import torch
from gpu import captured, on_other_streams, poison_free_memory
from test_class_sketch import CASES, TOLERANCE
from test_class_sketch import truth as class_sketch_truth
from test_cuda_bodies import SKETCH_PROJECT, STRIDED, sketch_project_truth
from torch import Tensor

from gradmix.ops import _cuda
from gradmix.ops.class_sketch import class_sketch
from gradmix.ops.sketch_project import sketch_project

pytestmark = pytest.mark.gpu
BODIES = ["cuda", "torch"]
DTYPES = list(TOLERANCE)
ANOTHER_DEVICE = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two CUDA devices")


def test_the_cuda_bodies_are_there() -> None:
    """On a machine with a GPU, a build without them would let everything below fail for one reason: this one."""
    assert _cuda.unavailable_reason() is None


def make(
    size: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, int]:
    n, t, k, j, p = size
    deltas = torch.randn(n, t, k, dtype=torch.float64).to(dtype)
    activations = torch.randn(n, t, j, dtype=torch.float64).to(dtype)
    return deltas, activations, torch.randint(0, max(p, 1), (n,)), p


def on_gpu(arguments: tuple[Tensor, Tensor, Tensor, int], device: str = "cuda") -> tuple[Tensor, Tensor, Tensor, int]:
    deltas, activations, labels, classes = arguments
    return deltas.to(device), activations.to(device), labels.to(device), classes


def assert_close(result: Tensor, expected: Tensor, dtype: torch.dtype, unit: float | None = None) -> None:
    assert result.is_cuda and result.shape == expected.shape
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if expected.numel():
        scale = float(expected.abs().max().clamp_min(1e-30)) if unit is None else unit
        assert (result.cpu().double() - expected).abs().max() <= TOLERANCE[dtype] * scale


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("case", CASES)
def test_class_sketch_equals_the_formula(case: str, backend: str, dtype: torch.dtype) -> None:
    arguments = make(CASES[case], dtype)
    poison_free_memory()
    result = class_sketch(*on_gpu(arguments), backend=backend)
    for part, expected in zip(result, class_sketch_truth(*arguments), strict=True):
        assert_close(part, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("case", SKETCH_PROJECT)
def test_sketch_project_equals_the_formula(case: str, layout: str, backend: str, dtype: torch.dtype) -> None:
    n, t, d, rank = SKETCH_PROJECT[case]
    x = torch.randn(n, t, d, dtype=torch.float64).to(dtype)
    there = x.cuda() if layout == "rows" else x.mT.contiguous().cuda().mT
    for ones in (False, True):
        poison_free_memory()
        expected, unit = sketch_project_truth(x, rank, 11, ones)
        assert_close(sketch_project(there, rank, 11, ones=ones, backend=backend), expected, dtype, unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STRIDED)
def test_sketch_project_of_strided_memory(case: str, dtype: torch.dtype) -> None:
    x = STRIDED[case](dtype)
    room = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=dtype, device="cuda")
    there = room.as_strided(x.shape, x.stride(), x.storage_offset())
    room.copy_(x.as_strided((room.numel(),), (1,), 0))
    expected, unit = sketch_project_truth(x, 20, 5, True)
    assert_close(sketch_project(there, 20, 5, ones=True, backend="cuda"), expected, dtype, unit)


def test_sketch_project_copies_what_lies_neither_in_rows_nor_in_planes() -> None:
    x = torch.randn(2, 9, 12, 3)[..., 1]
    expected, unit = sketch_project_truth(x, 8, 5, False)
    there = torch.randn(2, 9, 12, 3, device="cuda")
    there[..., 1] = x.cuda()
    assert_close(sketch_project(there[..., 1], 8, 5, backend="cuda"), expected, torch.float32, unit)


def test_gaussian_entries_are_refused_by_name_and_served_by_torch() -> None:
    x = torch.randn(2, 3, 4, device="cuda")
    with pytest.raises(RuntimeError, match="'cuda' cannot run: it makes rademacher entries, not gaussian ones"):
        sketch_project(x, 4, 1, entries="gaussian", backend="cuda")
    expected = sketch_project(x.cpu(), 4, 1, entries="gaussian", backend="torch")
    torch.testing.assert_close(sketch_project(x, 4, 1, entries="gaussian").cpu(), expected)


def test_labels_out_of_range_are_refused() -> None:
    deltas, activations, labels, classes = on_gpu(make((4, 2, 3, 5, 3)))
    labels[2] = 3
    with pytest.raises(ValueError, match=r"labels: got 3 in row 2, expected labels in \[0, 3\)"):
        class_sketch(deltas, activations, labels, classes, backend="cuda")
    labels[2] = 1  # the same tensor again, now in range
    expected = class_sketch(deltas, activations, labels.clone(), classes, backend="torch")
    torch.testing.assert_close(class_sketch(deltas, activations, labels, classes, backend="cuda").sums, expected.sums)


def test_indices_beyond_32_bits() -> None:
    """x of more than 2^31 elements, and results at both ends of it."""
    samples, positions, dim = 2, 20_000, 60_000
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("it takes 8 GiB of GPU memory")
    x = torch.empty(samples, positions, dim, dtype=torch.bfloat16, device="cuda").normal_()
    for view in (x, x.view(samples, dim, positions).mT):
        out = sketch_project(view, 4, 3, backend="cuda")
        for n, t in ((0, 0), (1, positions - 1)):
            expected, unit = sketch_project_truth(view[n : n + 1, t : t + 1].cpu(), 4, 3, False)
            assert (out[n, t].cpu().double() - expected[0, 0]).abs().max() <= 1e-5 * unit


# ------------------------------------------------------------------------------------ streams, repeats, graphs, devices


def calls() -> dict[str, object]:
    sizes = {"linear": (300, 1, 16, 16, 10), "positions": (200, 49, 32, 20, 7), "positions cut": (3, 3000, 16, 16, 2)}
    prepared: dict[str, object] = {}
    for name, size in sizes.items():
        arguments = on_gpu(make(size))
        prepared[f"class_sketch {name}"] = lambda a=arguments: torch.cat(
            [part.flatten() for part in class_sketch(*a, backend="cuda")]
        )
    for name, x in {
        "rows": torch.randn(33, 50, 300, device="cuda"),
        "planes": torch.randn(33, 300, 49, device="cuda").mT,
        "columns cut": torch.randn(32, 1, 4608, device="cuda"),
    }.items():
        prepared[f"sketch_project {name}"] = lambda x=x: sketch_project(x, 32, 1, ones=True, backend="cuda").flatten()
    return prepared


def test_the_same_bits_in_every_run_back_to_back_and_on_other_streams() -> None:
    for name, call in calls().items():
        expected = call()
        poison_free_memory()
        assert all(torch.equal(call(), expected) for _ in range(10)), name
        assert all(torch.equal(result, expected) for result in on_other_streams(call)), name


def test_work_is_queued_behind_what_its_stream_has_to_do_first() -> None:
    deltas, activations, labels, classes = on_gpu(make((64, 20, 16, 16, 5)))
    x = torch.randn(64, 20, 100, device="cuda")
    expected = (
        *class_sketch(2 * deltas, activations, labels, classes, backend="cuda"),
        sketch_project(2 * x, 16, 1, backend="cuda"),
    )
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds
        deltas.mul_(2)
        x.mul_(2)
        results = (
            *class_sketch(deltas, activations, labels, classes, backend="cuda"),
            sketch_project(x, 16, 1, backend="cuda"),
        )
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_graph_of_both_follows_its_inputs() -> None:
    deltas, activations, labels, classes = on_gpu(make((64, 20, 16, 16, 5)))
    x = torch.randn(64, 20, 100, device="cuda")

    def both() -> tuple[Tensor, ...]:
        return (
            *class_sketch(deltas, activations, labels, classes, backend="cuda"),
            sketch_project(x, 16, 1, backend="cuda"),
        )

    graph, results = captured(both)
    deltas.normal_()
    x.normal_()
    labels.copy_(labels.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, both(), strict=True))


@ANOTHER_DEVICE
def test_the_current_device_stays_current_and_the_tensors_device_does_the_work() -> None:
    arguments = make((30, 5, 16, 16, 3))
    x = torch.randn(3, 20, 40)
    first = (
        *class_sketch(*on_gpu(arguments, "cuda:0"), backend="cuda"),
        sketch_project(x.to("cuda:0"), 8, 1, backend="cuda"),
    )
    for current in (0, 1):
        with torch.cuda.device(current):
            second = (
                *class_sketch(*on_gpu(arguments, "cuda:1"), backend="cuda"),
                sketch_project(x.to("cuda:1"), 8, 1, backend="cuda"),
            )
            assert torch.cuda.current_device() == current
        assert all(b.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


def test_the_current_device_is_the_same_afterwards_and_torch_goes_on() -> None:
    before = torch.cuda.current_device()
    for call in calls().values():
        call()
    assert torch.cuda.current_device() == before
    assert float(torch.ones(3, device="cuda").sum()) == 3.0


# --------------------------------------------------------------------------------------------- registration, dispatch


@pytest.mark.parametrize("backend", BODIES)
def test_opcheck(backend: str) -> None:
    torch.library.opcheck(torch.ops.gradmix.class_sketch.default, (*on_gpu(make((6, 2, 4, 5, 3))), backend))
    x = torch.randn(3, 8, 12, device="cuda")
    torch.library.opcheck(torch.ops.gradmix.sketch_project.default, (x, 4, 1, True, "rademacher", backend))


def test_auto_leaves_the_cuda_bodies_alone_and_says_why() -> None:
    from gradmix.ops import class_sketch as class_sketch_module
    from gradmix.ops import sketch_project as sketch_project_module

    arguments = on_gpu(make((6, 2, 4, 5, 3)))
    assert class_sketch_module.OPERATOR.choose("auto", *arguments).name == "torch"
    assert "measured" in class_sketch_module.OPERATOR.backends[0].worth(*arguments)
    x = torch.randn(3, 8, 12, device="cuda")
    assert sketch_project_module.OPERATOR.choose("auto", x, 4, 1, False, "rademacher").name == "torch"
