"""The operator class_sketch: every body against the formula, for the shapes, types and labels that may come."""

from __future__ import annotations

import pytest
import torch
from fresh import run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmix import _extension
from gradmix.ops import class_sketch as module
from gradmix.ops.class_sketch import OPERATOR, ClassSketch, class_sketch

NEEDS_EXTENSION = pytest.mark.skipif(
    _extension.load() is None, reason=f"no compiled extension: {_extension.unavailable_reason()}"
)
BODIES = ["torch", pytest.param("cpp", marks=NEEDS_EXTENSION)]
ALL_BODIES = ["reference", *BODIES]

# dtype: largest error allowed, relative to the largest entry of the truth. The half types are exact in float32.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}

CASES = {
    # name: (N, T, K, J, P)
    "one row": (1, 1, 1, 1, 1),
    "linear": (64, 1, 16, 16, 10),
    "more classes than rows": (5, 3, 8, 8, 40),
    "one class": (33, 2, 4, 20, 1),
    "odd sizes": (7, 5, 13, 19, 3),
    "columns below a vector": (9, 3, 6, 3, 2),
    "columns just above two vectors": (9, 3, 5, 33, 2),
    "single column": (9, 2, 5, 1, 2),
    "single row of the output": (9, 20, 1, 24, 2),
    "two positions": (40, 2, 16, 16, 4),
    "rows just above a strip": (6, 4, 65, 17, 2),
    "several blocks": (3, 700, 16, 24, 2),
    "several chunks of one class": (60, 30, 9, 31, 2),
    "several chunks and strips": (12, 200, 130, 5, 2),
    "several chunks of single positions": (1500, 1, 9, 31, 2),
    "a product in parts": (3, 5, 70, 300, 2),
    "a wide product in parts": (4, 3, 3, 5000, 2),
    "no samples": (0, 4, 3, 5, 6),
    "no positions": (4, 0, 3, 5, 6),
    "no rows": (4, 2, 0, 5, 6),
    "no columns": (4, 2, 3, 0, 6),
    "no classes": (0, 2, 3, 4, 0),
    "well filled classes": (512, 1, 12, 12, 4),
}


def inputs(size: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0):
    n, t, k, j, p = size
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(n, t, k, generator=generator, dtype=torch.float64).to(dtype)
    activations = torch.randn(n, t, j, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, max(p, 1), (n,), generator=generator)
    return deltas, activations, labels, p


def truth(deltas, activations, labels, classes):
    """By one-hot contractions in float64: a third way, none of the bodies'."""
    chosen = (labels[:, None] == torch.arange(classes)).double()
    gradients = torch.einsum("ntk,ntj->nkj", deltas.double(), activations.double())
    return ClassSketch(torch.einsum("np,nkj->pkj", chosen, gradients), chosen.T @ gradients.square().sum((1, 2)))


def assert_close(result, expected, dtype):
    assert isinstance(result, ClassSketch)
    for found, exact in zip(result, expected, strict=True):
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.shape == exact.shape
        scale = exact.abs().max().item() if exact.numel() else 1.0
        error = (found.double() - exact).abs().max().item() if exact.numel() else 0.0
        assert error <= TOLERANCE[dtype] * max(scale, 1e-30)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case, backend, dtype):
    arguments = inputs(CASES[case], dtype)
    assert_close(class_sketch(*arguments, backend=backend), truth(*arguments), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", [name for name, (n, t, *_) in CASES.items() if n * t <= 100])
def test_reference_equals_the_formula(case, dtype):
    arguments = inputs(CASES[case], dtype)
    assert_close(class_sketch(*arguments, backend="reference"), truth(*arguments), dtype)


@pytest.mark.parametrize("backend", BODIES)
@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(0, 30), st.integers(0, 9), st.integers(1, 70), st.integers(1, 70), st.integers(1, 12)),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1000),
)
def test_any_shape(backend, size, dtype, seed):
    arguments = inputs(size, dtype, seed)
    assert_close(class_sketch(*arguments, backend=backend), truth(*arguments), dtype)


@pytest.mark.parametrize("backend", ALL_BODIES)
def test_a_class_without_samples_is_zero(backend):
    deltas, activations, _, _ = inputs((4, 2, 3, 5, 1))
    sums, squares = class_sketch(deltas, activations, torch.tensor([4, 1, 4, 1]), 6, backend=backend)
    assert (sums.flatten(1).abs().sum(1) > 0).tolist() == [False, True, False, False, True, False]
    assert (squares > 0).tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("backend", ALL_BODIES)
def test_samples_that_cancel_keep_their_squares(backend, positions):
    """The sum of two opposite gradients is zero, the squares are not: they are of the samples, not of the sum."""
    deltas, activations = (x.float() for x in inputs((1, positions, 3, 4, 1), torch.bfloat16)[:2])  # exact products
    both = torch.cat([deltas, -deltas]), torch.cat([activations, activations])
    sums, squares = class_sketch(*both, torch.tensor([1, 1]), 2, backend=backend)
    assert torch.equal(sums, torch.zeros(2, 3, 4))
    norm = torch.einsum("ntk,ntj->kj", deltas.double(), activations.double()).square().sum()
    torch.testing.assert_close(squares.double(), torch.tensor([0.0, 2 * norm]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ALL_BODIES)
def test_positions_that_cancel_have_no_square(backend):
    """A sample's own positions are summed before they are squared."""
    deltas, activations = (x.float() for x in inputs((1, 1, 3, 4, 1), torch.bfloat16)[:2])  # exact products
    twice = torch.cat([deltas, -deltas], 1), torch.cat([activations, activations], 1)
    _, squares = class_sketch(*twice, torch.tensor([0]), 1, backend=backend)
    assert squares.item() == 0.0


@pytest.mark.parametrize("backend", ALL_BODIES)
def test_autocast_changes_nothing(backend):
    for size in ((64, 1, 5, 6, 3), (6, 4, 5, 6, 3)):
        arguments = inputs(size)
        plain = class_sketch(*arguments, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(map(torch.equal, plain, class_sketch(*arguments, backend=backend)))


@pytest.mark.parametrize("backend", ALL_BODIES)
def test_non_contiguous_inputs(backend):
    deltas, activations, labels, p = inputs((12, 4, 10, 18, 3))
    deltas, activations = deltas.transpose(0, 1).contiguous().transpose(0, 1)[:, ::2], activations[:, ::2]
    labels = torch.stack([labels, labels], dim=1)[:, 0]
    assert not (deltas.is_contiguous() or activations.is_contiguous() or labels.is_contiguous())
    assert_close(
        class_sketch(deltas, activations, labels, p, backend=backend),
        truth(deltas, activations, labels, p),
        torch.float32,
    )


@pytest.mark.parametrize("backend", ALL_BODIES)
def test_inputs_are_left_alone_and_the_result_is_its_own(backend):
    deltas, activations, labels, p = inputs((6, 2, 4, 5, 3))
    before = [x.clone() for x in (deltas, activations, labels)]
    first = class_sketch(deltas, activations, labels, p, backend=backend)
    kept = [x.clone() for x in first]
    class_sketch(deltas * 2, activations, labels, p, backend=backend)
    assert all(map(torch.equal, first, kept))
    assert all(torch.equal(a, b) for a, b in zip(before, (deltas, activations, labels), strict=True))


@pytest.mark.parametrize("backend", ALL_BODIES)
def test_tracked_inputs_are_taken(backend):
    deltas, activations, labels, p = inputs((6, 2, 4, 5, 3))
    expected = truth(deltas, activations, labels, p)
    out = class_sketch(deltas.requires_grad_(), activations.requires_grad_(), labels, p, backend=backend)
    assert_close(ClassSketch(*(x.detach() for x in out)), expected, torch.float32)


@pytest.mark.parametrize("backend", BODIES)
def test_special_values_of_the_half_types(backend):
    """Subnormals, the largest numbers and both zeros are converted exactly; infinity and NaN come through."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        finite = values[values.isfinite()]
        one = torch.ones(1, 1, 1, dtype=dtype)
        out = class_sketch(one, finite.view(1, 1, -1), torch.tensor([0]), 1, backend=backend).sums.flatten()
        assert torch.equal(out, finite.float())
        odd = values[~values.isfinite()]
        out = class_sketch(one, odd.view(1, 1, -1), torch.tensor([0]), 1, backend=backend).sums.flatten()
        assert torch.equal(out.isnan(), odd.isnan()) and torch.equal(out[~odd.isnan()], odd.float()[~odd.isnan()])


@NEEDS_EXTENSION
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "case",
    [
        "several chunks of one class",
        "several chunks and strips",
        "several chunks of single positions",
        "a product in parts",
        "odd sizes",
        "linear",
    ],
)
def test_the_same_bits_for_every_number_of_threads(case, dtype):
    deltas, activations, labels, p = inputs(CASES[case], dtype)
    extension = _extension.load()
    results = []
    for threads in (1, 2, 3, 7):
        sums = torch.full((p, deltas.shape[2], activations.shape[2]), 7.0, dtype=truth_dtype(dtype))
        squares = torch.full((p,), 7.0, dtype=truth_dtype(dtype))
        extension.class_sketch(deltas, activations, labels, sums, squares, threads)
        results.append((sums, squares))
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


LEVELS = """
import torch
from gradmix import _extension
from gradmix.ops.class_sketch import class_sketch
for n, t, k, j, p in [(7, 5, 13, 19, 3), (3, 700, 16, 24, 2), (64, 1, 16, 16, 10), (6, 4, 65, 17, 2), (9, 2, 5, 1, 2)]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        d, a, y = torch.randn(n, t, k).to(dtype), torch.randn(n, t, j).to(dtype), torch.randint(0, p, (n,))
        exact = class_sketch(d.double(), a.double(), y, p, backend="torch")
        for found, truth in zip(class_sketch(d, a, y, p, backend="cpp"), exact):
            error = (found - truth).abs().max() / truth.abs().max()
            assert error <= (1e-13 if dtype == torch.float64 else 2e-6), (n, t, k, j, p, dtype, error)
print(_extension.load().build_info()["instruction_set"])
"""


@NEEDS_EXTENSION
@pytest.mark.parametrize("level", ["base", "avx2"])
def test_older_instruction_sets(level):
    """The kernels that older machines run, which the newest one would otherwise never meet."""
    newest = _extension.load().build_info()["instruction_set"]
    assert run_python(LEVELS, GRADMIX_CPU_LEVEL=level) == [level if newest != "base" else "base"]


def truth_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


BAD = {
    "deltas not a tensor": (dict(deltas=[[1.0]]), TypeError, "deltas: got list"),
    "deltas of two axes": (
        dict(deltas=torch.zeros(4, 3)),
        ValueError,
        r"deltas: got shape \(4, 3\), expected \(N, T, K\)",
    ),
    "integer deltas": (
        dict(deltas=torch.zeros(4, 2, 3, dtype=torch.int64)),
        TypeError,
        "deltas: got dtype torch.int64",
    ),
    "activations of other positions": (dict(activations=torch.zeros(4, 3, 5)), ValueError, "activations: got shape"),
    "activations of other dtype": (
        dict(activations=torch.zeros(4, 2, 5, dtype=torch.float64)),
        TypeError,
        "activations: got dtype torch.float64, expected torch.float32",
    ),
    "activations on another device": (
        dict(activations=torch.zeros(4, 2, 5, device="meta")),
        ValueError,
        "activations: got a tensor on meta, expected cpu",
    ),
    "float labels": (dict(labels=torch.zeros(4)), TypeError, "labels: got dtype torch.float32, expected int64"),
    "labels of another length": (
        dict(labels=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        r"labels: got shape \(3,\)",
    ),
    "no number of classes": (dict(num_classes=2.0), TypeError, "num_classes: got float"),
    "negative number of classes": (dict(num_classes=-1), ValueError, "num_classes: got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    change, error, message = BAD[case]
    arguments = dict(
        deltas=torch.zeros(4, 2, 3),
        activations=torch.zeros(4, 2, 5),
        labels=torch.zeros(4, dtype=torch.int64),
        num_classes=2,
    )
    with pytest.raises(error, match=message):
        class_sketch(**(arguments | change))


@pytest.mark.parametrize("backend", ALL_BODIES)
@pytest.mark.parametrize("label", [-1, 3, 1 << 40])
def test_a_label_out_of_range_is_named_with_its_row(backend, label):
    deltas, activations, labels, p = inputs((6, 2, 4, 5, 3))
    labels[4] = label
    with pytest.raises(ValueError, match=rf"labels: got {label} in row 4, expected labels in \[0, 3\)"):
        class_sketch(deltas, activations, labels, p, backend=backend)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        class_sketch(*inputs((6, 2, 4, 5, 3)), backend="fast")
    with pytest.raises(ValueError, match="class_sketch has no 'triton' body"):
        class_sketch(*inputs((6, 2, 4, 5, 3)), backend="triton")


def test_without_the_extension_torch_serves(monkeypatch):
    monkeypatch.setattr(_extension, "_load", lambda: (None, "it was taken away"))
    arguments = inputs((256, 1, 16, 16, 10))
    assert OPERATOR.choose("auto", *arguments).name == "torch"
    assert_close(class_sketch(*arguments), truth(*arguments), torch.float32)
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: it was taken away"):
        class_sketch(*arguments, backend="cpp")


@NEEDS_EXTENSION
def test_auto_takes_the_extension_wherever_it_can_run():
    for size in ((256, 1, 16, 16, 10), (128, 196, 64, 64, 10), (8, 4, 8, 8, 4), (64, 196, 1, 16, 10)):
        assert OPERATOR.choose("auto", *inputs(size)).name == "cpp"
    refusal = {b.name: b for b in OPERATOR.backends}["cpp"].can_run(torch.zeros(1, 1, 1, device="meta"), None, None, 1)
    assert refusal is not None and "meta" in refusal


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((8, 400, 16, 16, 4), "torch"),
        ((8, 9, 16, 16, 4), "cpp"),
        ((2, 32, 256, 2305, 2), "cpp"),
        ((8, 1, 256, 300, 4), "cpp"),
    ],
    ids=["many positions", "few positions", "large products", "one position"],
)
def test_positions_side_by_side_are_left_to_torch_where_a_copy_would_cost_more(size, name):
    deltas, activations, labels, classes = inputs(size)
    deltas, activations = (x.mT.contiguous().mT for x in (deltas, activations))
    body = OPERATOR.choose("auto", deltas, activations, labels, classes)
    assert body.name == name
    assert_close(body.run(deltas, activations, labels, classes), truth(*inputs(size)), torch.float32)


@pytest.mark.parametrize("backend", ["auto", *ALL_BODIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_registration(backend, dtype):
    arguments = inputs((64, 3, 8, 9, 4), dtype)
    torch.library.opcheck(module._class_sketch_op.registered, (*arguments, backend))


def test_shapes_are_known_without_running():
    with torch.device("meta"):
        arguments = torch.empty(4, 2, 3, dtype=torch.bfloat16), torch.empty(4, 2, 5, dtype=torch.bfloat16)
        sums, squares = class_sketch(*arguments, torch.empty(4, dtype=torch.int64), 6)
    assert sums.shape == (6, 3, 5) and squares.shape == (6,)
    assert sums.dtype == squares.dtype == torch.float32 and sums.device.type == squares.device.type == "meta"
