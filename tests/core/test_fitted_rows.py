"""Rows that a model fits so well that softmax(z) - y all but vanishes, held against extended precision.

By a cosine's sign a pair is decided, however small the gradients, so that no part of a residual may be lost against 1.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from models import MLP, rows
from no_looking import behind_the_host, watched
from torch import Tensor, nn

from gradmix import alignment_matrix, select_pairs
from gradmix.ops.class_pairs import class_pair_alignment
from gradmix.ops.cosine_alignment import MIXED_OPERATOR, mixed_gram_alignment
from gradmix.ops.last_layer_gradient import last_layer_gradient
from gradmix.ops.mixed_alignment import OPERATOR, Side, cosine, length, mixed_alignment
from gradmix.ops.mixed_alignment import factorised as module

Long = np.longdouble
BODIES = [body.name for body in OPERATOR.backends if body.available() is None]
LAMS = [0.0, 1e-9, 0.3, 0.5, 0.999, 1 - 5e-8, 1.0]
N, C, D = 12, 6, 8
BAND = 1e-6


def residuals(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """softmax(z) - y of each row, its largest class from what the others lack to the labels' sum."""
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    r = p - y
    at = p.argmax(-1)[:, None]
    np.put_along_axis(r, at, 0, -1)
    np.put_along_axis(r, at, (1 - y.sum(-1) - r.sum(-1))[:, None], -1)
    return r


def truth(h: Tensor, z: Tensor, y: Tensor, reference: Tensor, lam: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(inner, norm, cosine) of all pairs of the rows, in extended precision."""
    y = y if y.is_floating_point() else torch.eye(z.shape[1])[y]
    h, z, y, g = (v.double().numpy().astype(Long) for v in (h, z, y, reference))
    if g.shape[1] > h.shape[1]:
        h = np.concatenate([h, np.ones((len(h), 1), Long)], 1)
    inner, norm = np.empty((2, len(h), len(h)), Long)
    mu = 1 - Long(lam)
    for i in range(len(h)):
        r, mixed = residuals(lam * z[i] + mu * z, lam * y[i] + mu * y), lam * h[i] + mu * h
        inner[i] = (r * (mixed @ g.T)).sum(1)
        norm[i] = np.sqrt((r**2).sum(1)) * np.sqrt((mixed**2).sum(1))
    return inner, norm, inner / norm / np.sqrt((g**2).sum())


LABELS = ("class indices", "one-hot vectors", "smoothed", "two classes")


def make(
    labels: str = "class indices",
    margin: float = 20.0,
    dtype: torch.dtype = torch.float32,
    classes: int = C,
    seed: int = 0,
) -> list[Tensor]:
    """Features, logits, labels and a reference; the logits lead by ``margin``, or fit label vectors to 1e-3."""
    g = torch.Generator().manual_seed(seed)
    h, noise = torch.rand(N, D, generator=g), torch.randn(N, classes, generator=g)
    y = torch.randint(classes, (N,), generator=g)
    vectors = torch.eye(classes)[y]
    z = 2 * noise + margin * vectors
    if labels in ("smoothed", "two classes"):
        other = torch.eye(classes)[(y + 1) % classes]
        vectors = (
            0.9 * vectors + 0.1 / classes if labels == "smoothed" else 0.7 * vectors + 0.28 * other + 0.02 / classes
        )
        z = vectors.log() + 1e-3 * noise
    reference = 0.1 * torch.randn(classes, D + 1, generator=g)
    return [h.to(dtype), z.to(dtype), y if labels == "class indices" else vectors, reference.to(dtype)]


def assert_right(arguments: list[Tensor], lam: float, backend: str, unit: float = BAND) -> None:
    h, z, y, reference = arguments
    inner, _, cosines = truth(*arguments, lam)
    result = mixed_alignment(Side(h, z, y), Side(h, z, y), reference, lam, precision="ieee", backend=backend)
    got = cosine(result.inner, result.norm, length(reference.to(result.inner.dtype))).numpy()
    assert np.abs(got - cosines).max() <= unit
    clear = np.abs(cosines) > BAND
    assert np.array_equal((result.inner.numpy() >= 0)[clear], (inner >= 0)[clear])


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("backend", BODIES)
def test_decisions_and_cosines(backend: str, lam: float, labels: str) -> None:
    assert_right(make(labels), lam, backend)


@pytest.mark.parametrize("margin", [40.0, 60.0, 100.0, 1e3, 4e3])
@pytest.mark.parametrize("backend", [b for b in BODIES if b != "triton"])
def test_gradients_beyond_what_float32_can_hold_keep_their_direction(backend: str, margin: float) -> None:
    for labels in LABELS[:2]:
        for lam in (0.0, 0.4, 1 - 5e-8):
            assert_right(make(labels, margin), lam, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BODIES)
def test_low_precision_logits(backend: str, dtype: torch.dtype) -> None:
    for lam in (0.5, 1 - 5e-8):
        assert_right(make(dtype=dtype), lam, backend)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_float64(backend: str, labels: str) -> None:
    for margin in (20.0, 60.0):
        for lam in LAMS:
            # Vectors fitted to 1e-3 leave residuals of 1e-4, of which 1e-16 is 1e-12.
            assert_right(make(labels, margin, torch.float64), lam, backend, unit=1e-11)


@pytest.mark.parametrize("backend", BODIES)
def test_values_keep_their_relative_accuracy(backend: str) -> None:
    for labels in LABELS:
        arguments = make(labels)
        for lam in (0.0, 0.3, 0.5, 1 - 5e-8):
            inner, norm, _ = truth(*arguments, lam)
            h, z, y, reference = arguments
            result = mixed_alignment(Side(h, z, y), Side(h, z, y), reference, lam, precision="ieee", backend=backend)
            scale = norm * float(reference.norm())
            assert (np.abs(result.norm.numpy() - norm) <= 1e-5 * norm).all()
            assert (np.abs(result.inner.numpy() - inner) <= 1e-5 * scale).all()


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("backend", BODIES)
def test_few_classes(backend: str, classes: int) -> None:
    arguments = make(classes=classes, margin=30.0)
    if classes > 1:
        assert_right(arguments, 0.3, backend)
        return
    h, z, y, reference = arguments
    result = mixed_alignment(Side(h, z, y), Side(h, z, y), reference, 0.3, backend=backend)
    assert not result.inner.any() and not result.norm.any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rows_that_are_sure_of_different_other_classes(backend: str) -> None:
    """Own logits lead by far, and the rest's products of exponentials underflow: what is left of r hangs on them."""
    h, z, y, reference = make(margin=0.0)
    z[::2, 4] += 200.0
    z[1::2, 5] += 200.0
    y = y % 4
    z[torch.arange(N), y] += 400.0
    for lam in (0.3, 0.5):
        assert_right([h, z, y, reference], lam, backend)


@pytest.mark.parametrize("shift", [0.0, -5e3])
@pytest.mark.parametrize("backend", BODIES)
def test_rows_of_two_classes_that_are_confidently_wrong(backend: str, shift: float) -> None:
    """No other class is left, and both labels' exponentials are below what any float can hold."""
    h, _, _, reference = make(classes=2)
    y = torch.arange(N) % 2
    for margin in (100.0, 4e3):
        z = shift - margin * torch.eye(2)[y] + torch.rand(N, 2, generator=torch.Generator().manual_seed(1))
        for lam in (0.0, 0.5, 0.501, 1.0):
            assert_right([h, z, y, reference], lam, backend)


@pytest.mark.parametrize("backend", BODIES)
def test_one_class_of_any_logits_has_no_gradient(backend: str) -> None:
    h, _, _, reference = make(classes=1)
    for logit in (-5e3, 0.0, 5e3):
        z, y = torch.full((N, 1), logit), torch.zeros(N, dtype=torch.long)
        for lam in (0.0, 0.5, 1.0):
            result = mixed_alignment(Side(h, z, y), Side(h, z, y), reference, lam, backend=backend)
            assert not result.inner.any() and not result.norm.any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_smoothed_labels_whose_mixture_is_even(backend: str) -> None:
    """What the two vectors lack to one-hot ones cancels too."""
    h, z, y, reference = make("smoothed", classes=2)
    for lam in (0.5, 0.500001):
        inner, norm, _ = truth(h, z, y, reference, lam)
        result = mixed_alignment(Side(h, z, y), Side(h, z, y), reference, lam, backend=backend)
        assert (np.abs(result.norm.numpy() - norm) <= 1e-5 * norm).all()
        assert (np.abs(result.inner.numpy() - inner) <= 1e-5 * norm * float(reference.norm())).all()


@pytest.mark.parametrize("labels", LABELS)
def test_exponentials_and_logarithms_give_the_same(labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host may look, moderate logits are spared the logarithms."""
    for margin in (0.0, 3.0, 12.0):
        h, z, y, reference = make(labels, margin)
        for lam in (0.0, 0.3, 0.5, 1 - 5e-8):
            found = mixed_alignment(Side(h, z, y), Side(h, z, y), reference, lam, backend="torch")
            with monkeypatch.context() as patch:
                patch.setattr(module, "MODERATE_LOGITS", -1.0)
                other = mixed_alignment(Side(h, z, y), Side(h, z, y), reference, lam, backend="torch")
            assert ((found.norm - other.norm).abs() <= 2e-6 * other.norm).all()
            assert ((found.inner - other.inner).abs() <= 2e-6 * other.norm * reference.norm()).all()
            assert_right([h, z, y, reference], lam, "torch")


@pytest.mark.parametrize("labels", LABELS)
def test_a_device_that_is_not_waited_for(labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    behind_the_host(monkeypatch)
    for margin in (3.0, 20.0):
        for lam in (0.3, 1 - 5e-8):
            h, z, y, reference = make(labels, margin)
            with watched():
                result = OPERATOR.choose("torch").run(
                    h, z, y, h, z, y, reference, torch.tensor([lam], dtype=torch.float64)
                )
            inner, norm, _ = truth(h, z, y, reference, lam)
            assert (np.abs(result.norm[0].numpy() - norm) <= 1e-5 * norm).all()
            assert (np.abs(result.inner[0].numpy() - inner) <= 1e-5 * norm * float(reference.norm())).all()


def test_one_hot_vectors_are_decided_as_class_indices() -> None:
    h, z, y, reference = make()
    vectors = torch.eye(C)[y]
    for other in (vectors, y):  # both sides, and one of them
        result = mixed_alignment(Side(h, z, vectors), Side(h, z, other), reference, 0.37)
        expected = mixed_alignment(Side(h, z, y), Side(h, z, y), reference, 0.37)
        assert torch.equal(result.inner, expected.inner) and torch.equal(result.norm, expected.norm)


# ------------------------------------------------------------------------------------------------ features of any size


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "features, reference", [(1e-25, 1.0), (1e-25, 1e-20), (1e20, 1e-10), (1e15, 1e15), (1.0, 1e25), (1.0, 1e-35)]
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_squares_and_products_beyond_float32(backend: str, features: float, reference: float, bias: bool) -> None:
    for labels in ("class indices", "smoothed"):
        h, z, y, g = make(labels)
        g = g if bias else g[:, :-1]
        for lam in (0.3, 1 - 5e-8):
            assert_right([features * h, z, y, reference * g], lam, backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_inner_products_beyond_float32_are_refused_and_the_advice_helps(backend: str) -> None:
    h, z, y, g = make(margin=2.0)
    huge = [1e25 * h, z, y, 1e25 * g]
    with pytest.raises(
        ValueError, match=r"features and reference: .*inner products up to .*: compute in float64, or scale"
    ):
        mixed_alignment(Side(*huge[:3]), Side(*huge[:3]), huge[3], 0.3, backend=backend)
    assert_right([v.double() if v.is_floating_point() else v for v in huge], 0.3, backend, unit=1e-12)
    assert_right([h, z, y, g], 0.3, backend)


def test_select_pairs_refuses_features_whose_products_leave_float32() -> None:
    model = nn.Linear(3, 4)
    x, y = 1e25 * torch.rand(8, 3), torch.arange(8) % 4
    with torch.no_grad():
        model.weight.mul_(1e-25)
    for criterion in ("sample", "class"):
        with pytest.raises(ValueError, match="features and reference: .*compute in float64"):
            select_pairs(model, (x, y), (x, y), criterion=criterion, lam=0.4)
        pairs = select_pairs(model.double(), (x.double(), y), (x.double(), y), criterion=criterion, lam=0.4)
        assert pairs.alignment.abs().nan_to_num().max() > 0.1
        model.float()


@pytest.mark.parametrize("scale", [1e-25, 1e20])
@pytest.mark.parametrize("backend", [b.name for b in MIXED_OPERATOR.backends if b.available() is None])
def test_mixed_gram_of_vectors_of_any_length(backend: str, scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    x, y, reference = (torch.randn(shape, generator=g) for shape in ((2, 5, 7), (2, 4, 7), (2, 7)))
    result = mixed_gram_alignment(scale * x, scale * y, reference, 0.3, backend=backend)
    mixed = 0.3 * (scale * x).double()[:, :, None] + 0.7 * (scale * y).double()[:, None]
    torch.testing.assert_close(result.norm.double(), mixed.norm(dim=3), rtol=1e-5, atol=0)
    inner = (mixed * reference.double()[:, None, None]).sum(3)
    assert (result.inner - inner).abs().max() <= 1e-5 * inner.abs().max()


def test_lengths_of_any_size() -> None:
    for scale in (1e-30, 1.0, 1e30):
        assert float(length(torch.full((4,), scale))) == pytest.approx(2 * scale)
    assert float(length(torch.zeros(3))) == 0 and math.isnan(float(length(torch.tensor([1.0, math.nan]))))
    one = torch.tensor([1e-25, -1e25])
    assert cosine(one, one.abs(), torch.tensor(1.0)).tolist() == [1.0, -1.0]


# ------------------------------------------------------------------------------------------------------------ siblings


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("backend", BODIES)
def test_means_over_class_pairs(backend: str, labels: str) -> None:
    h, z, y, reference = make(labels)
    index = torch.arange(N) % 3
    lams = torch.tensor([0.0, 0.5, 1 - 5e-8], dtype=torch.float64)
    result = class_pair_alignment(Side(h, z, y), index, 3, reference, lams, backend=backend)
    for k, lam in enumerate(lams.tolist()):
        inner, norm, _ = truth(h, z, y, reference, lam)
        for a in range(3):
            for b in range(3):
                at = [(i, j) for i in range(a, N, 3) for j in range(b, N, 3) if i != j]
                means = [np.mean([v[p] for p in at]) for v in (inner, norm)]
                assert abs(float(result.norm[k, a, b]) - means[1]) <= 1e-5 * means[1]
                assert abs(float(result.inner[k, a, b]) - means[0]) <= BAND * means[1] * float(reference.norm())


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_the_reference_gradient(backend: str, labels: str) -> None:
    if backend not in BODIES:
        pytest.skip(f"{backend} cannot run here")
    h, z, y, _ = make(labels)
    vectors = y if y.is_floating_point() else torch.eye(C)[y]
    r = residuals(z.double().numpy().astype(Long), vectors.double().numpy().astype(Long))
    exact = r.T @ np.concatenate([h.double().numpy(), np.ones((N, 1))], 1)
    result = last_layer_gradient(h, z, y, precision="ieee", backend=backend).numpy()
    # The Triton body forms p - y of other label vectors in float32: 6e-8 of the labels, which are 1e-3 from p.
    unit = 1e-4 if backend == "triton" and labels in ("smoothed", "two classes") else 2e-6
    assert np.abs(result - exact).max() <= unit * np.abs(exact).max()


@pytest.mark.parametrize("vectors", [False, True], ids=["class indices", "one-hot vectors"])
def test_mixed_inputs(vectors: bool) -> None:
    """The estimator that forwards mixtures, of a linear model: there it is the mixture of features."""
    h, _, _, _ = make()
    model = nn.Linear(D, C)
    with torch.no_grad():
        model.weight.mul_(60.0)
        y = model(h).argmax(1)
    labels = torch.eye(C)[y] if vectors else y
    buffer = torch.rand(20, D), torch.arange(20) % C
    doubled = copy.deepcopy(model).double()
    for lam in (0.5, 1 - 5e-8):
        found = alignment_matrix(model, buffer, (h, labels), lam=lam, estimator="mixed")
        exact = alignment_matrix(doubled, (buffer[0].double(), buffer[1]), (h.double(), labels), lam=lam)
        # The mixtures themselves are rounded to float32 here, which moves logits of 60 by 1e-5.
        assert (found.cosine - exact.cosine).abs().max() <= 2e-4


def test_selection_with_a_fitted_model_is_the_one_in_float64() -> None:
    model, (x, _) = MLP(), rows(12, 1)
    with torch.no_grad():
        model.fc.weight.mul_(200.0)
        labels = model(x).argmax(1)
    buffer = rows(12, 3)
    for lam in (0.5, 1 - 5e-8):
        found = alignment_matrix(model, buffer, (x, labels), lam=lam)
        model.double()
        exact = alignment_matrix(model, (buffer[0].double(), buffer[1]), (x.double(), labels), lam=lam)
        model.float()
        clear = exact.cosine.abs() > 1e-3  # the features and logits themselves are float32's
        assert torch.equal((found.inner >= 0)[clear], (exact.inner >= 0)[clear])
