"""Sketches of gradients: which matrices, without bias, how exact, and the same however the rows are split."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable

import pytest
import torch
from gradient_networks import ARCHITECTURES, LAYERS, USES, Case
from gradient_truth import cosines, layer_matrix
from gradient_truth import sample_gradients as truth
from thinning import ALL
from torch import Tensor, nn

import gradmix
from gradmix.gradients import Gaussian, Identity, Rademacher, RowSampling, Sketch
from gradmix.gradients.standard_errors import standard_errors

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

EXACT = 1e-9
KINDS: dict[str, type[Sketch]] = {"rademacher": Rademacher, "gaussian": Gaussian, "rows": RowSampling}
SERVED = {**LAYERS, **USES}
SOME = [
    "linear over positions",
    "conv2d, everything",
    "conv2d, depthwise",
    "conv_transpose2d, everything",
    "embedding, tokens repeated",
    "layer norm over two dimensions",
    "attention, widths of their own",
    "embedding tied to the classifier",
    "class token, expanded",
]


def sides(sketch: Sketch, name: str, p: int, q: int) -> tuple[Tensor, Tensor]:
    """L and R of a layer, in float64; the identity where a side is kept."""
    sizes = sketch.sizes(name, p, q)
    left, right = (
        torch.eye(dim, dtype=torch.float64)
        if size == dim
        else sketch.matrix(name, side, size, dim, dtype=torch.float64, device="cpu")
        for side, size, dim in zip(("left", "right"), sizes, (p, q), strict=True)
    )
    return left, right


def assert_sketched(result, gradients: dict[str, Tensor], sketch: Sketch) -> None:
    for layer in result.layout:
        g = layer_matrix(gradients, layer)
        left, right = sides(sketch, layer.name, *layer.shape)
        assert (layer.rows, layer.columns) == (len(left), len(right))
        expected = left @ g @ right.T
        scale = (left.abs() @ g.abs() @ right.abs().T).amax() if g.numel() else 0.0
        found = result.layer(layer.name)
        assert found.shape == expected.shape
        if expected.numel():
            assert (found - expected).abs().max() <= EXACT * scale, layer.name


@pytest.mark.parametrize(
    "name, rank", [(name, rank) for at, name in enumerate(SERVED) for rank in (2, 3) if ALL or (at + rank) % 2], ids=str
)
def test_is_the_gradient_between_the_two_matrices(name: str, rank: int) -> None:
    case = SERVED[name]
    model, batch = case.model(), case.batch()
    result = gradmix.sample_gradients(model, batch, rank=rank, seed=5)
    assert_sketched(result, truth(model, *batch), Rademacher(rank, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOME)
def test_every_kind_is_the_gradient_between_its_matrices(name: str, kind: str) -> None:
    case = SERVED[name]
    model, batch = case.model(), case.batch()
    result = gradmix.sample_gradients(model, batch, rank=2, seed=1, sketch=kind)
    assert_sketched(result, truth(model, *batch), KINDS[kind](2, 1))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", SOME)
def test_every_backend_gives_the_same(name: str, backend: str) -> None:
    case = SERVED[name]
    model, batch = case.model(), case.batch()
    expected = gradmix.sample_gradients(model, batch, rank=2).vectors
    result = gradmix.sample_gradients(model, batch, rank=2, backend=backend).vectors
    assert (result - expected).abs().max() <= EXACT * expected.abs().max()


# ------------------------------------------------------------------------------------------------------- the matrices


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_layers_and_sides_have_matrices_of_their_own(kind: str) -> None:
    def matrix(seed: int, layer: str, side: str) -> Tensor:
        return KINDS[kind](8, seed).matrix(layer, side, 8, 40, dtype=torch.float64, device="cpu")

    first = matrix(0, "a", "left")
    assert torch.equal(first, matrix(0, "a", "left"))
    for other in (matrix(1, "a", "left"), matrix(0, "b", "left"), matrix(0, "a", "right"), matrix(-1, "a", "left")):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrices_keep_products_on_average(kind: str) -> None:
    """E M'M = I: the mean over seeds, entry by entry, within five standard errors."""
    seeds, size, dim = 400, 3, 12
    grams = []
    for seed in range(seeds):
        m = KINDS[kind](size, seed).matrix("layer", "left", size, dim, dtype=torch.float64, device="cpu")
        grams.append(m.T @ m)
    stacked = torch.stack(grams)
    error = (stacked.mean(0) - torch.eye(dim, dtype=torch.float64)).abs()
    assert (error <= 5 * stacked.std(0) / math.sqrt(seeds) + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_are_those_of_the_matrix(kind: str, dtype: torch.dtype) -> None:
    sketch = KINDS[kind](4, 3)
    index = torch.tensor([[0, 6, 6], [2, 1, 0]])
    matrix = sketch.matrix("words", "right", 4, 7, dtype=dtype, device="cpu")
    found = sketch.columns("words", "right", 4, 7, index, dtype=dtype)
    assert found.dtype == dtype and torch.equal(found, matrix.T[index])


def test_row_sampling_picks_rows() -> None:
    matrix = RowSampling(5, 2).matrix("layer", "left", 5, 20, dtype=torch.float64, device="cpu")
    assert ((matrix != 0).sum(1) == 1).all() and ((matrix != 0).sum(0) <= 1).all()
    assert torch.allclose(matrix[matrix != 0], torch.full((5,), math.sqrt(20 / 5), dtype=torch.float64))


SIZES = {
    # (rank, rows, columns): rows of L and R
    "both larger": ((4, 10, 20), (4, 4)),
    "both as large": ((4, 4, 4), (4, 4)),
    "both smaller": ((4, 3, 2), (3, 2)),
    "few rows": ((4, 2, 20), (2, 8)),
    "few columns": ((4, 20, 2), (8, 2)),
    "one row": ((4, 1, 100), (1, 16)),
    "one column": ((4, 100, 1), (16, 1)),
    "one column, not so many rows": ((4, 9, 1), (9, 1)),
    "a share that is no integer": ((4, 3, 100), (3, 5)),
    "rank one": ((1, 7, 7), (1, 1)),
}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_the_sides(kind: str, case: str) -> None:
    (rank, rows, columns), expected = SIZES[case]
    assert KINDS[kind](rank).sizes("layer", rows, columns) == expected
    assert Identity().sizes("layer", rows, columns) == (rows, columns)


def test_a_rank_for_each_layer() -> None:
    case = ARCHITECTURES["vit"]
    model, batch = case.model(), case.batch()
    ranks = {"blocks.0.*": 2, "patches": 5, "*": 3}
    result = gradmix.sample_gradients(model, batch, rank=ranks)
    for layer in result.layout:
        rank = next(value for pattern, value in ranks.items() if fnmatch.fnmatchcase(layer.name, pattern))
        assert (layer.rows, layer.columns) == Rademacher(rank).sizes(layer.name, *layer.shape)
    assert len({(layer.rows, layer.columns) for layer in result.layout}) > 3
    assert_sketched(result, truth(model, *batch), Rademacher(ranks))


# ------------------------------------------------------------------------------------------------- a kind of one's own


class Signs(Sketch):
    """Every column of the gradient goes to one place of the sketch with a sign (CountSketch)."""

    def matrix(
        self, layer: str, side: str, size: int, dim: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        g = torch.Generator().manual_seed(sum(map(ord, f"{self.seed} {layer} {side}")))
        place, sign = torch.randint(size, (dim,), generator=g), torch.randint(2, (dim,), generator=g) * 2 - 1
        return torch.zeros(size, dim, dtype=dtype).index_put_((place, torch.arange(dim)), sign.to(dtype)).to(device)


@pytest.mark.parametrize("name", SOME)
def test_a_sketch_of_the_users_own(name: str) -> None:
    case = SERVED[name]
    model, batch = case.model(), case.batch()
    result = gradmix.sample_gradients(model, batch, sketch=Signs(2, seed=4))
    assert_sketched(result, truth(model, *batch), Signs(2, seed=4))


# ------------------------------------------------------------------------------------------------------ how exact it is


def inner_products(v: Tensor) -> Tensor:
    """(pairs,) of the rows of v, each with every other and with itself."""
    i, j = torch.triu_indices(len(v), len(v))
    return (v[i] * v[j]).sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tabular mlp", "conv2d, plain"])
def test_inner_products_are_unbiased(name: str, kind: str) -> None:
    """Gradients of a network: the mean over seeds is the exact value, within four standard errors for every pair."""
    seeds = 120
    case = {**ARCHITECTURES, **LAYERS}[name]
    model, batch = case.model(), case.batch(5)
    exact = inner_products(gradmix.sample_gradients(model, batch, sketch="identity").vectors)
    found = torch.stack(
        [
            inner_products(gradmix.sample_gradients(model, batch, rank=4, sketch=kind, seed=seed).vectors)
            for seed in range(seeds)
        ]
    )
    z = (found.mean(0) - exact) / (found.std(0) / math.sqrt(seeds))
    assert z.abs().max() <= 4
    assert found.std(0).min() > 0


def variance(a: Tensor, b: Tensor, k: int) -> Tensor:
    """Of <L a R', L b R'> over independent normal entries of variance 1/k in L and R, both with k rows.

    From E[W C W] = C + (C' + tr(C) I) / k for W = R'R, used once for each side.
    """
    ab, ba = a @ b.T, a.T @ b
    outer = ab.square().sum() + (ab @ ab).trace() + ba.square().sum() + (ba @ ba).trace()
    rest = ab.square().sum() + ba.square().sum() + (a.square().sum() * b.square().sum()) + (a * b).sum().square()
    return outer / k + rest / k**2


@pytest.mark.parametrize("layer", ["0", "2", "6"])
def test_the_error_is_that_of_independent_entries(layer: str) -> None:
    """Gradients of a convolutional network: mean squared errors over seeds against the variance in closed form."""
    k, seeds = 8, 400
    model, (x, y) = conv_net(), conv_rows(4)
    result = gradmix.sample_gradients(model, (x, y), sketch="identity", layers=[layer])
    g = result.layer(layer)
    found = []
    for seed in range(seeds):
        left, right = sides(Gaussian(k, seed), layer, *g.shape[1:])
        assert len(left) == len(right) == k
        found.append(inner_products((left @ g @ right.T).flatten(1)))
    i, j = torch.triu_indices(4, 4)
    expected = torch.stack([variance(g[a], g[b], k) for a, b in zip(i.tolist(), j.tolist(), strict=True)])
    ratio = (torch.stack(found) - inner_products(g.flatten(1))).square().mean(0) / expected
    # The pairs share the draws, and fourth moments of products are large.
    assert ratio.min() > 0.6 and ratio.max() < 1.6
    assert 0.8 < ratio.mean() < 1.2


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    ).double()


def conv_rows(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(10, (n,), generator=g)


def _full(n: int, p: int, q: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, p, q, generator=g, dtype=torch.float64)


def _of_rank(r: int) -> Callable[[int, int, int, torch.Generator], Tensor]:
    return lambda n, p, q, g: _full(n, p, r, g) @ _full(n, r, q, g)


POPULATIONS: dict[str, Callable[[int, int, int, torch.Generator], Tensor]] = {
    "normal entries": _full,
    "one outer product each": _of_rank(1),
    "four outer products each": _of_rank(4),
    "normal entries, half in common": lambda n, p, q, g: _full(n, p, q, g) + _full(1, p, q, g),
}


@pytest.mark.parametrize("k", [8, 16, 32])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("population", POPULATIONS)
def test_cosines_are_off_by_about_one_over_the_rank(population: str, kind: str, k: int) -> None:
    """Pairs of random matrices (8k x 8k) of the population named: RMSE of the cosine at most 1.2/k, and unbiased.

    It holds where neither the output gradients nor the activations of two rows have much in common. Of networks see
    the next test.
    """
    g = torch.Generator().manual_seed(0)
    matrices = POPULATIONS[population](8, 8 * k, 8 * k, g)
    i, j = torch.triu_indices(8, 8, 1)
    exact = cosines(matrices.flatten(1), matrices.flatten(1))[i, j]
    errors = []
    for seed in range(24):
        left, right = sides(KINDS[kind](k, seed), "layer", 8 * k, 8 * k)
        sketched = (left @ matrices @ right.T).flatten(1)
        errors.append(cosines(sketched, sketched)[i, j] - exact)
    error = torch.stack(errors)
    assert error.square().mean().sqrt() <= 1.2 / k
    # Pairs of one seed are not independent of each other; means over pairs of different seeds are.
    by_seed = error.mean(1)
    assert by_seed.mean().abs() <= 4 * by_seed.std() / math.sqrt(len(by_seed)) + 1 / k**2


@pytest.mark.parametrize("k", [4, 8, 16])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_cosines_of_a_networks_gradients(kind: str, k: int) -> None:
    """All layers of a small network of convolutions and linear layers, pairs of random rows.

    Rows share a direction of their activations (all are positive after a ReLU), along which the input side of a sketch
    averages over nothing, so that a single layer's cosine is off by more than 1/k: about 1/sqrt(k) at the worst.
    """
    model, batch = conv_net(), conv_rows(8)
    exact = gradmix.sample_gradients(model, batch, sketch="identity")
    i, j = torch.triu_indices(8, 8, 1)
    whole, single = [], []
    for seed in range(12):
        result = gradmix.sample_gradients(model, batch, rank=k, sketch=kind, seed=seed)
        whole.append((result.cosine() - exact.cosine())[i, j])
        for layer in result.layout:
            a, b = (r.layer(layer.name).flatten(1) for r in (result, exact))
            single.append((cosines(a, a) - cosines(b, b))[i, j])
    assert torch.stack(single).square().mean().sqrt() <= 1 / math.sqrt(k)
    assert torch.stack(whole).square().mean().sqrt() <= 2 / k


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_standard_errors_tell_how_far_off_an_inner_product_is(kind: str) -> None:
    """Told by one sketch alone, of a whole network, against what happens over seeds."""
    seeds, k = 60, 8
    model, batch = conv_net(), conv_rows(6)
    exact = gradmix.sample_gradients(model, batch, sketch="identity")
    truth_inner = exact.vectors[:5] @ exact.vectors[5]
    errors, told = [], []
    for seed in range(seeds):
        result = gradmix.sample_gradients(model, batch, rank=k, sketch=kind, seed=seed)
        errors.append(result.vectors[:5] @ result.vectors[5] - truth_inner)
        told.append(standard_errors(result.vectors[:5], result.vectors[5], result.layout))
    error, standard = torch.stack(errors), torch.stack(told)
    assert (error.abs() <= 2 * standard).double().mean() >= 0.9
    # Not by being far too careful: it is of the size of what happens.
    ratio = standard.square().mean(0) / error.square().mean(0)
    assert ratio.min() >= 0.6 and ratio.max() <= 3


def test_standard_errors_of_what_is_not_sketched_are_zero() -> None:
    model, batch = conv_net(), conv_rows(4)
    result = gradmix.sample_gradients(model, batch, sketch="identity")
    assert (standard_errors(result.vectors, result.vectors[0], result.layout) == 0).all()


def test_standard_errors_are_the_formula() -> None:
    """One layer, both sides sketched, with the sketches in the place of the gradients."""
    model, batch = conv_net(), conv_rows(4)
    result = gradmix.sample_gradients(model, batch, rank=5, layers=["2"])
    a = result.layer("2")
    expected = torch.stack([variance(m, a[0], 5) for m in a]).sqrt()
    assert torch.allclose(standard_errors(result.vectors, result.vectors[0], result.layout), expected, rtol=1e-9)


# ------------------------------------------------------------------------------------------- the same however it is had


@pytest.mark.parametrize("name", ["vit", "text classifier", "tabular mlp"])
def test_the_same_for_every_split_of_the_rows(name: str) -> None:
    case = ARCHITECTURES[name]
    model, (x, y) = case.model(), case.batch(7)
    whole = gradmix.sample_gradients(model, (x, y), rank=3, seed=9).vectors
    for cuts in ([1, 6], [3, 4], [2, 2, 2, 1]):
        parts = [
            gradmix.sample_gradients(model, part, rank=3, seed=9).vectors
            for part in zip(x.split(cuts), y.split(cuts), strict=True)
        ]
        assert (torch.cat(parts) - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_the_same_for_a_layer_alone_and_among_others() -> None:
    case = ARCHITECTURES["vit"]
    model, batch = case.model(), case.batch()
    whole = gradmix.sample_gradients(model, batch, rank=3)
    for name in ("head", "patches", "blocks.1.attn.qkv", "cls_token"):
        alone = gradmix.sample_gradients(model, batch, rank=3, layers=[name])
        assert [layer.name for layer in alone.layout] == [name]
        found, expected = alone.layer(name), whole.layer(name)
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_the_same_in_float32_up_to_rounding() -> None:
    case = ARCHITECTURES["vit"]
    model, (x, y) = case.model(), case.batch()
    expected = gradmix.sample_gradients(model, (x, y), rank=3).vectors
    result = gradmix.sample_gradients(model.float(), (x.float(), y), rank=3).vectors
    assert result.dtype == torch.float32
    assert (result - expected).norm() <= 1e-4 * expected.norm()


def test_another_seed_gives_another_sketch() -> None:
    case = LAYERS["linear over positions"]
    model, batch = case.model(), case.batch()
    a, b = (gradmix.sample_gradients(model, batch, rank=2, seed=seed).vectors for seed in (0, 1))
    assert not torch.allclose(a, b)


def test_layers_alike_in_all_but_name_have_different_sketches() -> None:
    """Else their errors would add up instead of averaging out."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 9), nn.Linear(6, 9)
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    case = Case(Twins, (6,), classes=9)
    model, batch = case.model(), case.batch()
    model.b.load_state_dict(model.a.state_dict())
    result = gradmix.sample_gradients(model, batch, rank=3)
    assert not torch.allclose(result.layer("a"), result.layer("b"))


# ---------------------------------------------------------------------------------------------------------- bad input

LINEAR = LAYERS["linear"]
BAD: dict[str, tuple[dict, type[Exception], str]] = {
    "rank of zero": ({"rank": 0}, ValueError, r"rank: got 0.*>= 1"),
    "rank that is no integer": ({"rank": 2.5}, TypeError, r"rank: got 2\.5.*integer"),
    "rank that is a truth value": ({"rank": True}, TypeError, r"rank: got True"),
    "ranks that fit no layer": ({"rank": {"other": 3}}, ValueError, r"rank.*other.*module"),
    "seed that is no integer": ({"seed": 1.0}, TypeError, r"seed: got float"),
    "unknown sketch": ({"sketch": "sparse"}, ValueError, r"sketch: got 'sparse'.*rademacher"),
    "sketch that is none": ({"sketch": 3}, TypeError, r"sketch: got int"),
    "unknown layers": ({"layers": ["nothing"]}, ValueError, r"layers: got 'nothing'.*module\.weight"),
    "layers as one name": ({"layers": "module"}, ValueError, r"layers: got 'module'.*\['module'\]"),
    "no layers": ({"layers": []}, ValueError, r"layers"),
    "layers of another type": ({"layers": 3}, TypeError, r"layers: got int"),
    "chunk size of zero": ({"chunk_size": 0}, ValueError, r"chunk_size: got 0"),
    "chunk size that is no integer": ({"chunk_size": 1.5}, TypeError, r"chunk_size: got"),
    "unknown backend": ({"backend": "gpu"}, ValueError, r"backend.*gpu"),
    "unknown way without a rule": ({"without_rule": "guess"}, ValueError, r"without_rule: got 'guess'.*exact"),
    "loss that is none": ({"loss": "mse"}, TypeError, r"loss: got str"),
    "loss of the batch": ({"loss": lambda z, y: z.sum()}, ValueError, r"loss: returned shape \(\).*3 samples"),
    "loss that is no tensor": ({"loss": lambda z, y: 3.0}, ValueError, r"loss: returned float.*3 samples"),
    "scale of zero": ({"scaler": 0.0}, ValueError, r"scaler: got 0"),
    "scale of another type": ({"scaler": "big"}, TypeError, r"scaler: got str"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("call", [gradmix.sample_gradients, gradmix.class_gradients], ids=lambda f: f.__name__)
def test_bad_arguments(call: Callable, case: str) -> None:
    given, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(LINEAR.model(), LINEAR.batch(), **given)


def _batch(x: object = None, y: object = None) -> tuple:
    return (LINEAR.batch()[0] if x is None else x, LINEAR.batch()[1] if y is None else y)


BAD_ROWS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "not a pair": (lambda: LINEAR.batch()[0], TypeError, r"got Tensor"),
    "a triple": (lambda: (*LINEAR.batch(), 3), TypeError, r"got tuple of 3"),
    "a list of numbers": (lambda: _batch(y=[0, 1, 2]), TypeError, r"list"),
    "labels of another length": (lambda: _batch(y=torch.tensor([0, 1])), ValueError, r"labels"),
    "labels beyond the classes": (lambda: _batch(y=torch.tensor([0, 4, 1])), ValueError, r"label"),
    "negative labels": (lambda: _batch(y=torch.tensor([0, -1, 1])), ValueError, r"label"),
    "labels of truth values": (lambda: _batch(y=torch.tensor([True, False, True])), TypeError, r"label"),
    "soft labels of another width": (lambda: _batch(y=torch.rand(3, 5).double()), ValueError, r"label"),
    "a row with NaN": (
        lambda: _batch(x=torch.tensor([[0.0], [math.nan], [1.0]]).expand(3, 5).double()),
        ValueError,
        r"sample 1.*NaN",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case: str) -> None:
    make, error, message = BAD_ROWS[case]
    with pytest.raises(error, match=message):
        gradmix.sample_gradients(LINEAR.model(), make())


@pytest.mark.parametrize("call", [gradmix.sample_gradients, gradmix.class_gradients], ids=lambda f: f.__name__)
def test_no_rows(call: Callable) -> None:
    x, y = LINEAR.batch()
    with pytest.raises(ValueError, match=r"got no samples, expected at least one"):
        call(LINEAR.model(), (x[:0], y[:0]))


def test_the_old_path_of_standard_errors_warns() -> None:
    from gradmix.gradients import errors

    with pytest.warns(DeprecationWarning, match=r"has moved to gradmix\.gradients\.standard_errors\.standard_errors"):
        assert errors.standard_errors is standard_errors
