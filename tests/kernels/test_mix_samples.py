"""The operators mix_samples and mix_labels: the same bits from every body, torch's own calls where autograd records."""

import math

import pytest
import torch

from gradmix import _extension
from gradmix.ops import mix_labels as labels
from gradmix.ops.capsules import as_capsules
from gradmix.ops.mix_samples import OPERATOR, mix_samples

BODIES, LABEL_BODIES = (
    [body.name for body in operator.backends if body.available() is None] for operator in (OPERATOR, labels.OPERATOR)
)


def make(n=5, m=None, shape=(3, 4), dtype=torch.float32, seed=0):
    """Samples, candidates (themselves without ``m``), partners and weights, of which some are 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    own = torch.randn(n, *shape, generator=g).to(dtype)
    other = own if m is None else torch.randn(m, *shape, generator=g).to(dtype)
    lam = torch.rand(n, generator=g, dtype=torch.float64)
    lam[::3], lam[1::3] = 1.0, lam[1::3].round()
    return own, other, torch.randint(len(other), (n,), generator=g), lam


def make_labels(classes=10, dtype=torch.float32, m=6, seed=0):
    """Class indices, partners and weights, of which some are 0 and 1, and the number of classes."""
    own, other, partner, lam = make(9, m, (), seed=seed)
    own, other = (values.mul(1e6).long() % classes for values in (own, other))
    other[partner[0]] = own[0]
    return own, other, partner, lam.to(dtype), classes


CASES = {
    "plain": {},
    "other candidates": {"m": 9},
    "one sample": {"n": 1},
    "numbers": {"shape": ()},
    "no values": {"shape": (0,)},
    "no samples": {"n": 0, "m": 2},
    "wide": {"n": 3, "shape": (40_001,)},
    "many": {"n": 70_001, "shape": (1,)},
    "images": {"n": 64, "shape": (3, 16, 16)},
}


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_body_gives_the_same_bits(case, dtype):
    arguments = make(**CASES[case], dtype=dtype)
    expected = mix_samples(*arguments, backend="torch")
    assert expected.shape == arguments[0].shape and expected.dtype == dtype
    bodies = [name for name in BODIES if name not in ("reference", "triton") or len(expected) < 100]
    for name in bodies:
        if name in ("cpp", "triton") and expected.numel() == 0:
            continue  # there is nothing to mix, and they say that they cannot run
        assert torch.equal(bits(mix_samples(*arguments, backend=name)), bits(expected)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 3, 1000])
@pytest.mark.parametrize("backend", LABEL_BODIES)
def test_mixed_labels_are_mixed_one_hot_vectors(backend, classes, dtype):
    own, other, partner, lam, _ = arguments = make_labels(classes, dtype)
    vectors = (torch.nn.functional.one_hot(y, classes).to(dtype) for y in (own, other))
    mixed = labels.mix_labels(*arguments, backend=backend)
    assert torch.equal(mixed, mix_samples(*vectors, partner, lam))
    assert mixed.dtype == dtype and mixed[0, own[0]] == lam[0] + (1 - lam[0])


@pytest.mark.parametrize("backend", LABEL_BODIES)
def test_labels_that_are_strided(backend):
    own, other, partner, lam, classes = make_labels()
    wide = torch.stack([own, own + 1], 1)[:, 0]
    expected = labels.mix_labels(own, other, partner, lam, classes, backend="torch")
    assert torch.equal(labels.mix_labels(wide, other, partner, lam, classes, backend=backend), expected)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
@pytest.mark.parametrize("backend", BODIES)
def test_values_beyond_the_usual(backend):
    own = torch.tensor([[1.0, math.inf, 1e38, 1e-45], [0.0, 1.0, -1e38, -0.0]])
    mixed = mix_samples(own, own, torch.tensor([1, 0]), torch.tensor([0.5, 1.0]), backend=backend)
    expected = [[0.5, math.inf, 0.0, 0.0], [0.0, math.nan, -1e38, 0.0]]  # 0 times infinity is no number
    torch.testing.assert_close(mixed, torch.tensor(expected), equal_nan=True, rtol=0, atol=1e-44)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_torch_s(dtype):
    own, other, partner, lam = make(m=6, dtype=dtype)
    weight = lam.to(dtype).view(-1, 1, 1)
    expected = weight * own + (1 - weight) * other[partner]
    assert torch.equal(mix_samples(own, other, partner, lam), expected)
    if "triton" in BODIES and dtype == torch.float16:  # the interpreter cuts off what bfloat16 cannot hold
        assert torch.equal(mix_samples(own, other, partner, lam, backend="triton"), expected)


@pytest.mark.parametrize("backend", ["auto", *BODIES])
@pytest.mark.parametrize("layout, shape", [(torch.channels_last, (3, 4, 5)), (torch.channels_last_3d, (2, 3, 4, 5))])
def test_samples_keep_their_layout(layout, shape, backend):
    own, other, partner, lam = make(m=6, shape=shape)
    expected = mix_samples(own, other, partner, lam, backend="torch")
    own, other = (values.to(memory_format=layout) for values in (own, other))
    mixed = mix_samples(own, other, partner, lam, backend=backend)
    assert torch.equal(mixed, expected) and mixed.is_contiguous(memory_format=layout)


def test_layouts_that_differ_and_samples_with_gaps():
    own, other, partner, lam = make(m=6, shape=(3, 4, 4))
    expected = mix_samples(own, other, partner, lam)
    for first, second in ((own.to(memory_format=torch.channels_last), other), (own.mT.contiguous().mT, other)):
        assert torch.equal(mix_samples(first, second, partner, lam), expected)
        assert torch.equal(
            mix_samples(second[partner], first, partner % len(own), lam),
            mix_samples(other[partner], own, partner % len(own), lam),
        )
    wide = torch.cat([own, own], 1)[:, :3]
    assert torch.equal(mix_samples(wide, other, partner, lam), expected)


@pytest.mark.parametrize("backend", ["auto", *(name for name in BODIES if name != "cpp")])
def test_candidates_of_another_dtype(backend):
    own, other, partner, lam = make(m=6, shape=(3, 4, 4))
    expected = mix_samples(own, other, partner, lam)
    assert torch.equal(mix_samples(own, other.double(), partner, lam, backend=backend), expected)


@pytest.mark.parametrize("backend", [name for name in BODIES if name in ("cpp", "triton")])
def test_what_does_not_fit_is_left_to_torch(backend):
    own, other, partner, lam = make(m=6, shape=(4,))
    for wrong in (
        (own, other[:, :3].clone(), partner, lam), (own, other[:, :1].clone(), partner, lam),
        (own, other, partner, lam[:1]), (own, other, partner[:3], lam),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run: it serves samples and candidates of"):
            mix_samples(*wrong, backend=backend)
    assert torch.equal(
        mix_samples(own, other[:, :1], partner, lam), mix_samples(own, other[:, :1].expand(6, 4), partner, lam)
    )


@pytest.mark.parametrize("backend", [name for name in BODIES if name in ("cpp", "triton")])
def test_a_preferred_backend_leaves_autograd_to_torch(backend, monkeypatch):
    monkeypatch.setenv("GRADMIX_BACKEND", backend)
    own, other, partner, lam = make(m=6)
    expected = mix_samples(own, other, partner, lam)
    mixed = mix_samples(own.clone().requires_grad_(), other, partner, lam)
    assert mixed.requires_grad and torch.equal(mixed, expected)


@pytest.mark.skipif("triton" not in BODIES, reason="triton: it is not available here")
def test_triton_serves_samples_with_gaps():
    own, other, partner, lam = make(m=6, shape=(4, 6))
    for first, second in ((own[:, :, ::2], other[:, :, ::2]), (own.mT, other.mT), (own[::2], other)):
        arguments = first, second, partner[: len(first)], lam[: len(first)]
        assert torch.equal(mix_samples(*arguments, backend="triton"), mix_samples(*arguments, backend="torch"))


@pytest.mark.skipif("triton" not in BODIES, reason="triton: it is not available here")
def test_candidates_are_rounded_as_torch_rounds_them():
    own, other = torch.ones(1, 1, dtype=torch.float16), torch.tensor([[1 + 2**-11 + 2**-30]], dtype=torch.float64)
    arguments = own, other, torch.tensor([0]), torch.tensor([0.0])
    assert torch.equal(mix_samples(*arguments, backend="triton"), mix_samples(*arguments, backend="torch"))


@pytest.mark.skipif("triton" not in LABEL_BODIES, reason="triton: it is not available here")
@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_label_out_of_range_is_nan_where_nothing_checks_it(wrong):
    own, other, partner, lam, classes = make_labels()
    own[3] = wrong
    vectors = labels.mix_labels(own, other, partner, lam, classes, backend="triton")
    assert vectors.isnan().all(1).nonzero().tolist() == [[3]]


def test_autograd_records_it():
    own, other, partner, lam = make(n=4, m=3, dtype=torch.float64)
    inputs = own.requires_grad_(), other.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mix_samples(a, b, partner, lam), inputs)
    with torch.no_grad():
        assert not mix_samples(*inputs, partner, lam).requires_grad


def test_a_compiled_function_is_not_broken_by_it():
    arguments = make()
    compiled = torch.compile(lambda *a: 2 * mix_samples(*a), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), 2 * mix_samples(*arguments))


@pytest.mark.skipif("cpp" not in BODIES, reason=f"no extension: {_extension.unavailable_reason()}")
@pytest.mark.parametrize("index", [-1, 5])
def test_the_extension_reads_no_partner_beyond_the_candidates(index):
    own, _, partner, lam = make(shape=(2,))
    partner[3] = index
    tensors = as_capsules(own, own, partner, lam.float(), torch.empty_like(own))
    with pytest.raises(ValueError, match=rf"partner: got {index} in row 3, expected an index in \[0, 5\)"):
        _extension.load().mix_samples(*tensors)
