"""The operator sketch_project and the product behind it: every body against the formula, however x lies in memory."""

from __future__ import annotations

import pytest
import torch
from fresh import run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmix import _extension
from gradmix.ops import sketch_project as module
from gradmix.ops.counter_random import random_matrix
from gradmix.ops.sketch_project import OPERATOR, is_stored_quicker, project, sketch_project

NEEDS_EXTENSION = pytest.mark.skipif(
    _extension.load() is None, reason=f"no compiled extension: {_extension.unavailable_reason()}"
)
BODIES = ["torch", pytest.param("cpp", marks=NEEDS_EXTENSION)]
ALL_BODIES = ["reference", *BODIES]
KEY = -8_070_450_532_247_928_832

# dtype: largest error allowed, relative to the largest entry of the truth. The half types are exact in float32.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}

CASES = {
    # name: (N, T, D, rank)
    "one entry": (1, 1, 1, 1),
    "linear": (40, 1, 48, 16),
    "image": (3, 64, 24, 16),
    "odd sizes": (3, 37, 21, 11),
    "positions just below a register": (5, 15, 9, 4),
    "positions just above a register": (5, 17, 9, 4),
    "few positions": (9, 4, 20, 8),
    "one column": (4, 18, 1, 6),
    "columns just above a table": (2, 20, 65, 5),
    "columns just below a table": (2, 20, 63, 5),
    "rank above a word": (2, 16, 12, 33),
    "rank above a block": (2, 33, 10, 131),
    "rank above the columns": (3, 20, 5, 40),
    "several pieces": (7, 150, 8, 12),
    "no samples": (0, 4, 3, 5),
    "no positions": (4, 0, 3, 5),
    "no columns": (4, 3, 0, 5),
}


def memory(values, layout):
    """The same (N, T, D) values, lying in memory in one of several ways."""
    _, t, d = values.shape
    if layout == "planes":
        return values.mT.contiguous().mT
    if layout == "part of planes":
        return torch.cat([values, values], 1).mT.contiguous().mT[:, t:]
    if layout == "part of rows":
        return torch.cat([values, values], 2)[:, :, d:]
    if layout == "without the first position":
        return torch.cat([values[:, :1], values], 1)[:, 1:]
    if layout == "every other column":
        return torch.stack([values, values + 1], 3).flatten(2)[:, :, ::2]
    if layout == "samples last":
        return values.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert layout == "rows"
    return values.contiguous()


LAYOUTS = [
    "rows",
    "planes",
    "part of rows",
    "part of planes",
    "without the first position",
    "every other column",
    "samples last",
]


def inputs(size, dtype=torch.float32, layout="rows", seed=0):
    n, t, d, rank = size
    generator = torch.Generator().manual_seed(seed)
    return memory(torch.randn(n, t, d, generator=generator, dtype=torch.float64).to(dtype), layout), rank


def truth(x, rank, ones, entries="rademacher"):
    """By an einsum in float64."""
    matrix = random_matrix(rank, x.shape[2] + ones, KEY, entries, dtype=torch.float64)
    out = torch.einsum("ij,ntj->nti", matrix[:, : x.shape[2]], x.double())
    return out + matrix[:, -1] if ones else out


def assert_close(result, expected, dtype):
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.shape == expected.shape
    if expected.numel():
        error = (result.double() - expected).abs().max().item()
        assert error <= TOLERANCE[dtype] * max(expected.abs().max().item(), 1e-30)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case, backend, dtype):
    for layout in LAYOUTS:
        for ones in (False, True):
            x, rank = inputs(CASES[case], dtype, layout)
            result = sketch_project(x, rank, KEY, ones=ones, backend=backend)
            assert result.is_contiguous()
            assert_close(result, truth(x, rank, ones), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("entries", ["rademacher", "gaussian"])
@pytest.mark.parametrize("case", [name for name, (n, t, *_) in CASES.items() if n * t <= 50])
def test_reference_equals_the_formula(case, entries, dtype):
    for ones in (False, True):
        x, rank = inputs(CASES[case], dtype, "planes")
        result = sketch_project(x, rank, KEY, ones=ones, entries=entries, backend="reference")
        assert_close(result, truth(x, rank, ones, entries), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_gaussian_entries(layout, dtype):
    x, rank = inputs((3, 37, 21, 11), dtype, layout)
    assert_close(sketch_project(x, rank, KEY, ones=True, entries="gaussian"), truth(x, rank, True, "gaussian"), dtype)


@pytest.mark.parametrize("backend", BODIES)
@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(0, 6), st.integers(0, 50), st.integers(0, 140), st.integers(1, 70)),
    dtype=st.sampled_from(list(TOLERANCE)),
    layout=st.sampled_from(LAYOUTS),
    ones=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(backend, size, dtype, layout, ones, seed):
    x, rank = inputs(size, dtype, layout, seed)
    assert_close(sketch_project(x, rank, KEY, ones=ones, backend=backend), truth(x, rank, ones), dtype)


@pytest.mark.parametrize("layout", ["rows", "planes", "without the first position"])
@pytest.mark.parametrize("backend", BODIES)
def test_large_enough_for_the_convolution(backend, layout):
    """Sizes at which torch's product goes another way."""
    for size in ((16, 600, 30, 16), (20, 90, 100, 33)):
        x, rank = inputs(size, layout=layout)
        for ones in (False, True):
            assert_close(sketch_project(x, rank, KEY, ones=ones, backend=backend), truth(x, rank, ones), x.dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_project_takes_any_matrix(layout, dtype):
    generator = torch.Generator().manual_seed(1)
    for size in ((5, 40, 21, 11), (9, 300, 200, 17)):  # the larger is converted in slices
        x, rank = inputs(size, dtype, layout)
        for ones in (False, True):
            matrix = torch.randn(rank, x.shape[2] + ones, generator=generator, dtype=torch.float64)
            for given_as in (matrix, matrix.T.contiguous().T, matrix.float(), matrix.to(dtype)):
                result = project(x, given_as, ones=ones)
                rounded = given_as.to(result.dtype).double()
                expected = x.double() @ rounded[:, : x.shape[2]].T
                assert_close(result, expected + rounded[:, -1] if ones else expected, dtype)


def test_project_copies_no_planes_and_no_rows():
    """The result of planes is the view of planes, and what torch allocates is little more than the result."""
    from torch.profiler import ProfilerActivity, profile

    for layout in ("planes", "rows", "part of planes", "without the first position"):
        for size in ((8, 300, 64, 2), (64, 128, 64, 16)):
            x, rank = inputs(size, layout=layout)
            matrix = random_matrix(rank, size[2], KEY)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                result = project(x, matrix)
            assert (result.mT if "planes" in layout else result).is_contiguous()
            allocated = sum(max(0, e.self_cpu_memory_usage) for e in profiler.key_averages())
            assert allocated < 4 * x.numel() / 2, (layout, size)


def test_project_carries_gradients():
    x, rank = inputs((3, 4, 5, 2), torch.float64)
    matrix = random_matrix(rank, 6, KEY, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: project(v, matrix, ones=True), x.requires_grad_())


def test_layouts():
    found = {name: module.layout(inputs((3, 20, 8, 1), layout=name)[0]) for name in LAYOUTS}
    assert found == {
        "rows": "rows",
        "planes": "planes",
        "part of rows": "rows",
        "part of planes": "planes",
        "without the first position": "rows",
        "every other column": None,
        "samples last": None,
    }


@pytest.mark.parametrize("backend", ALL_BODIES)
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_splits_of_the_batch_change_nothing(layout, backend):
    """Each sample's sketch is its own; the C++ body gives the same bits whatever is beside it."""
    x, rank = inputs((7, 35, 70, 20), layout=layout)
    whole = sketch_project(x, rank, KEY, ones=True, backend=backend)
    for step in (1, 2, 5):
        parts = torch.cat([sketch_project(part, rank, KEY, ones=True, backend=backend) for part in x.split(step)])
        if backend == "torch":
            torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(parts, whole)


@NEEDS_EXTENSION
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("case", ["several pieces", "odd sizes", "rank above a block"])
def test_the_same_bits_for_every_number_of_threads(case, layout, dtype):
    x, rank = inputs(CASES[case], dtype, layout)
    results = []
    for threads in (1, 2, 3, 7):
        out = torch.full((*x.shape[:2], rank), 7.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        _extension.load().sketch_project(x, KEY, True, out, threads)
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])


@NEEDS_EXTENSION
def test_nothing_is_written_beyond_the_result_or_read_beyond_x():
    """Where registers reach over the end of a sample or of the rank, neighbours are left alone and not looked at."""
    for n, t, d, rank in ((3, 21, 19, 5), (2, 5, 7, 3), (1, 1, 1, 1), (4, 16, 16, 16)):
        for layout in ("rows", "planes"):
            space = torch.full((n * t * d + 128,), torch.nan)
            inside = space[64 : 64 + n * t * d]
            x = inside.view(n, t, d) if layout == "rows" else inside.view(n, d, t).mT
            x.copy_(inputs((n, t, d, rank))[0])
            around = torch.full((n * t * rank + 128,), 7.0)
            out = around[64 : 64 + n * t * rank].view(n, t, rank)
            _extension.load().sketch_project(x, KEY, False, out, 1)
            assert_close(out, truth(x, rank, False), torch.float32)
            assert torch.equal(around[:64], torch.full((64,), 7.0)) and torch.equal(around[-64:], around[:64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BODIES)
def test_special_values_of_the_half_types(backend, dtype):
    """Subnormals, the largest numbers and both zeros are converted exactly; infinity and NaN come through."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    sign = random_matrix(1, 1, KEY).item()
    for x in (values.view(16, -1, 1), values.view(16, 1, -1).mT):
        out = sketch_project(x, 1, KEY, backend=backend).flatten()
        exact = values.float() * sign
        assert torch.equal(out.isnan(), exact.isnan())
        assert torch.equal(out[~out.isnan()], exact[~exact.isnan()])


@pytest.mark.parametrize("backend", ALL_BODIES)
def test_infinite_and_missing_values_stay_where_they_are(backend):
    """One bad position spoils its own sketch and no other."""
    for layout in ("rows", "planes"):
        x, rank = inputs((2, 40, 9, 8), layout=layout)
        clean = sketch_project(x, rank, KEY, backend=backend)
        x[1, 17, 4] = torch.inf
        x[0, 33, 2] = torch.nan
        out = sketch_project(x, rank, KEY, backend=backend)
        assert out[1, 17].isinf().all() and out[0, 33].isnan().all()
        fine = torch.ones(2, 40, dtype=torch.bool)
        fine[1, 17] = fine[0, 33] = False
        assert torch.equal(out[fine], clean[fine])


@pytest.mark.parametrize("backend", ALL_BODIES)
def test_inputs_are_left_alone_and_tracked_ones_are_taken(backend):
    x, rank = inputs((3, 20, 6, 4), layout="planes")
    before, expected = x.clone(), truth(x, rank, True)
    first = sketch_project(x, rank, KEY, ones=True, backend=backend)
    kept = first.clone()
    sketch_project(x * 2, rank, KEY, ones=True, backend=backend)
    assert torch.equal(x, before) and torch.equal(first, kept)
    tracked = sketch_project(x.requires_grad_(), rank, KEY, ones=True, backend=backend)
    assert_close(tracked.detach(), expected, torch.float32)


@pytest.mark.parametrize("backend", ALL_BODIES)
def test_autocast_changes_nothing(backend):
    for layout in ("rows", "planes"):
        x, rank = inputs((3, 20, 6, 4), layout=layout)
        plain = sketch_project(x, rank, KEY, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sketch_project(x, rank, KEY, backend=backend), plain)


LEVELS = """
import torch
from gradmix import _extension
from gradmix.ops.sketch_project import sketch_project
for n, t, d, rank in [(1, 1, 1, 1), (3, 37, 21, 11), (2, 20, 65, 33), (2, 5, 9, 70), (40, 1, 48, 16), (5, 6, 70, 8)]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        rows = torch.randn(n, t, d).to(dtype)
        for x in (rows, rows.mT.contiguous().mT):
            exact = sketch_project(rows.double(), rank, 7, ones=True, backend="torch")
            error = (sketch_project(x, rank, 7, ones=True, backend="cpp") - exact).abs().max() / exact.abs().max()
            assert error <= (1e-14 if dtype == torch.float64 else 2e-6), (n, t, d, rank, dtype, error)
print(_extension.load().build_info()["instruction_set"])
"""


@NEEDS_EXTENSION
@pytest.mark.parametrize("level", ["base", "avx2"])
def test_older_instruction_sets(level):
    """The kernels that older machines run, which the newest one would otherwise never meet."""
    newest = _extension.load().build_info()["instruction_set"]
    assert run_python(LEVELS, GRADMIX_CPU_LEVEL=level) == [level if newest != "base" else "base"]


BAD = {
    "x not a tensor": (dict(x=[[1.0]]), TypeError, "x: got list, expected a tensor"),
    "x of two axes": (dict(x=torch.zeros(4, 3)), ValueError, r"x: got shape \(4, 3\), expected \(N, T, D\)"),
    "integer x": (dict(x=torch.zeros(4, 2, 3, dtype=torch.int64)), TypeError, "x: got dtype torch.int64, expected"),
    "no rank": (dict(rank=0), ValueError, "rank: got 0, expected at least 1"),
    "half a rank": (dict(rank=0.5), TypeError, "rank: got float, expected int"),
    "key too small": (dict(key=-(1 << 63) - 1), ValueError, "key: got -9223372036854775809, expected a signed 64-bit"),
    "no key": (dict(key=None), TypeError, "key: got NoneType, expected int"),
    "number for ones": (dict(ones=1), TypeError, "ones: got int, expected bool"),
    "unknown entries": (dict(entries="uniform"), ValueError, "entries: got 'uniform', expected"),
    "unknown backend": (dict(backend="fast"), ValueError, "backend: got 'fast'"),
    "backend of other operators": (dict(backend="triton"), ValueError, "sketch_project has no 'triton' body"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        sketch_project(**(dict(x=torch.zeros(4, 2, 3), rank=2, key=1) | change))


BAD_MATRIX = {
    "not a tensor": ([[1.0]], TypeError, "matrix: got list, expected a tensor"),
    "integers": (torch.ones(2, 4, dtype=torch.int64), TypeError, "matrix: got dtype torch.int64"),
    "one axis": (torch.ones(4), ValueError, r"matrix: got shape \(4,\), expected \(rank, 4\)"),
    "no column for the ones": (torch.ones(2, 3), ValueError, r"matrix: got shape \(2, 3\), expected \(rank, 4\)"),
    "another device": (torch.ones(2, 4, device="meta"), ValueError, "matrix: got a tensor on meta, expected cpu as x"),
}


@pytest.mark.parametrize("case", BAD_MATRIX)
def test_bad_matrices_are_named(case):
    matrix, error, message = BAD_MATRIX[case]
    with pytest.raises(error, match=message):
        project(torch.zeros(4, 2, 3), matrix, ones=True)


@NEEDS_EXTENSION
def test_refusals_of_the_extension():
    x, rank = inputs((2, 3, 4, 5))
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: it makes Rademacher entries, and gaussian ones"):
        sketch_project(x, rank, KEY, entries="gaussian", backend="cpp")
    refusal = {b.name: b for b in OPERATOR.backends}["cpp"].can_run(
        torch.zeros(1, 1, 1, device="meta"), 1, 1, False, "rademacher"
    )
    assert refusal is not None and "meta" in refusal


@NEEDS_EXTENSION
def test_auto_takes_the_native_body_where_it_can_run():
    for size, dtype, layout in (
        ((32, 256, 128, 16), torch.float32, "planes"),
        ((64, 200, 128, 16), torch.float32, "rows"),
        ((4, 1, 3, 1), torch.bfloat16, "samples last"),
    ):
        x, rank = inputs(size, dtype, layout)
        assert OPERATOR.choose("auto", x, rank, KEY, False, "rademacher").name == "cpp"
        assert OPERATOR.choose("auto", x, rank, KEY, False, "gaussian").name == "torch"


def test_where_a_stored_matrix_is_quicker():
    cases = {
        # (N, T, D, rank), dtype, layout
        ((32, 256, 128, 16), torch.float32, "planes"): False,
        ((32, 256, 128, 16), torch.float32, "rows"): True,
        ((32, 256, 128, 64), torch.float32, "rows"): False,
        ((32, 256, 128, 16), torch.float32, "samples last"): True,
        ((32, 256, 128, 16), torch.bfloat16, "rows"): False,
        ((32, 256, 128, 16), torch.float64, "rows"): False,
        ((256, 9, 512, 16), torch.float32, "planes"): True,  # copied to rows
        ((16, 65, 192, 16), torch.float32, "rows"): False,
        ((4, 49, 16, 16), torch.float32, "planes"): False,
    }
    found = {}
    for size, dtype, layout in cases:
        x, rank = inputs(size, dtype, layout)
        found[size, dtype, layout] = is_stored_quicker(x, rank)
    assert found == cases
    assert is_stored_quicker(torch.empty(2, 3, 4, device="meta"), 2)


def test_without_the_extension_torch_serves(monkeypatch):
    monkeypatch.setattr(_extension, "_load", lambda: (None, "it was taken away"))
    x, rank = inputs((16, 600, 30, 16), layout="planes")
    assert OPERATOR.choose("auto", x, rank, KEY, False, "rademacher").name == "torch"
    assert_close(sketch_project(x, rank, KEY), truth(x, rank, False), torch.float32)
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: it was taken away"):
        sketch_project(x, rank, KEY, backend="cpp")


@pytest.mark.parametrize("backend", ["auto", *ALL_BODIES])
@pytest.mark.parametrize("layout", ["rows", "planes", "every other column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_registration(dtype, layout, backend):
    x, rank = inputs((6, 20, 9, 4), dtype, layout)
    torch.library.opcheck(module._sketch_project_op.registered, (x, rank, KEY, True, "rademacher", backend))


def test_shapes_are_known_without_running():
    x = torch.empty(4, 2, 3, dtype=torch.bfloat16, device="meta")
    out = sketch_project(x, 6, KEY, ones=True)
    assert out.shape == (4, 2, 6) and out.dtype == torch.float32 and out.device.type == "meta"
