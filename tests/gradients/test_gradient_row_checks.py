"""Rows that influence each other or change places are refused, in the first batch and in every later one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_truth import assert_layers_equal, cross_entropy
from gradient_truth import sample_gradients as truth
from test_promises import photograph, same
from torch import Tensor, nn

import gradmix
from gradmix.gradients import BatchStatisticsError, CoupledSamplesError, NoRuleError, engine

EXACT = 1e-9
Between = Callable[[Any, Tensor], Tensor]


class Body(nn.Module):
    """A layer, something between, a layer."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc, self.between = nn.Linear(6, 8), nn.Linear(8, 5), between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self, self.body(x)))


class Words(Body):
    """The same behind tokens, through which no gradient shows what a row depends on."""

    def __init__(self, between: Between) -> None:
        super().__init__(between)
        self.body = nn.Embedding(20, 8).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self, self.body(x).mean(1)))


def numbers(rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=g, dtype=torch.float64), torch.randint(0, 5, (rows,), generator=g)


def tokens(rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 20, (rows, 7), generator=g), torch.randint(0, 5, (rows,), generator=g)


@torch.no_grad()
def quietly(function: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    return function(h)


def quantised(h: Tensor) -> Tensor:
    """To eight bits, by one scale for the whole tensor, with the gradient of the identity."""
    scale = h.detach().abs().max() / 127
    return h + ((h / scale).round() * scale - h).detach()


def standardised(h: Tensor) -> Tensor:
    return F.batch_norm(h, None, None, training=True)


COUPLING: dict[str, Between] = {
    "mean": lambda m, h: h - h.mean(0),
    "mean, detached": lambda m, h: h - h.detach().mean(0),
    "mean of data": lambda m, h: h - h.data.mean(0),
    "mean without autograd": lambda m, h: h - quietly(lambda t: t.mean(0), h),
    "largest entry, by item": lambda m, h: h / h.abs().max().item(),
    "largest entry of all, by float": lambda m, h: h * float(h.detach().sum().sin()),
    "quantised by one scale": lambda m, h: quantised(h),
    "softmax over the rows, detached": lambda m, h: h * h.detach().softmax(0),
    "the first row": lambda m, h: h + h[:1].detach(),
    "the next row": lambda m, h: h + h.roll(1, 0).detach(),
    "the next row of data": lambda m, h: h + h.data.roll(1, 0) * 0.1,
    "products of rows": lambda m, h: h + 0.1 * (h @ h.T).detach() @ h.detach(),
    "statistics of the batch, detached": lambda m, h: h + standardised(h.detach()),
    "statistics of the batch without autograd": lambda m, h: h + quietly(standardised, h),
    "number of rows": lambda m, h: h / len(h),
    "place among the rows": lambda m, h: h + torch.arange(len(h), dtype=h.dtype)[:, None],
    "pairs of neighbours": lambda m, h: h + h.detach().view(-1, 1, 8).expand(-1, 2, 8).reshape(-1, 8)[: len(h)].flip(0),
}


@pytest.mark.parametrize("rows", [2, 3, 8])
@pytest.mark.parametrize("name", COUPLING, ids=str)
def test_rows_that_influence_each_other_are_refused(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MOST_CLASSES", 1000)
    frozen = Words(COUPLING[name])
    frozen.body.requires_grad_(False)
    for model, batch, layers in (
        (Body(COUPLING[name]), numbers(rows), "all"),
        (Body(COUPLING[name]), numbers(rows), ["fc"]),
        (Words(COUPLING[name]), tokens(rows), ["fc"]),
        (frozen, tokens(rows), "all"),
    ):
        for without_rule in ("error", "exact"):
            with pytest.raises((CoupledSamplesError, BatchStatisticsError), match="^model: "):
                gradmix.sample_gradients(model, batch, rank=2, layers=layers, without_rule=without_rule)
        for given in ({"rank": 2}, {"sketch": "identity", "norms": False}):
            with pytest.raises((CoupledSamplesError, BatchStatisticsError), match="^model: "):
                gradmix.class_gradients(model, batch, layers=layers, **given)


@pytest.mark.parametrize("model", [Body, Words])
def test_rows_that_influence_each_other_in_a_later_batch_are_refused(model: type[Body]) -> None:
    """The same calls, the same values read: only numbers differ."""

    def between(m: Any, h: Tensor) -> Tensor:
        return h - m.share * h.detach().mean(0)

    network, batch = model(between), (tokens if model is Words else numbers)
    network.share = torch.zeros((), dtype=torch.float64)
    x, y = batch(8)
    assert_layers_equal(gradmix.sample_gradients(network, (x, y), sketch="identity"), truth(network, x, y), EXACT)
    network.share.fill_(0.1)
    for seed in range(2, 6):
        with pytest.raises(CoupledSamplesError, match="depends on the samples around it"):
            gradmix.sample_gradients(network, batch(8, seed), rank=2)


def test_a_batch_that_was_refused_is_refused_again() -> None:
    """Also if only two of its rows influence each other, which only the comparison of all rows is sure to see."""

    def between(m: Any, h: Tensor) -> Tensor:
        other = torch.zeros_like(h)
        if len(h) > 17:
            other[4], other[17] = h[17], h[4]
        return h + other.detach()

    model, batch = Body(between), numbers(20)
    for _ in range(3):
        with pytest.raises(CoupledSamplesError, match="output of sample (4|17) depends"):
            gradmix.sample_gradients(model, batch, rank=2)


# ----------------------------------------------------------------------------------------------------- changing places


def by_index(key: Tensor, h: Tensor, layer: nn.Module) -> Tensor:
    order = key.argsort(stable=True)
    return layer(h[order])[order.argsort()]


def by_gather(key: Tensor, h: Tensor, layer: nn.Module) -> Tensor:
    order = key.argsort(stable=True)
    inverse = order.argsort()[:, None].expand(-1, 8)
    return layer(h.gather(0, order[:, None].expand(-1, 8))).gather(0, inverse)


def by_list(key: Tensor, h: Tensor, layer: nn.Module) -> Tensor:
    order = sorted(range(len(key)), key=key.tolist().__getitem__)
    out = layer(torch.stack([h[n] for n in order]))
    return torch.stack([out[order.index(n)] for n in range(len(key))])


def by_matrix(key: Tensor, h: Tensor, layer: nn.Module) -> Tensor:
    matrix = F.one_hot(key.argsort(stable=True)).to(h.dtype)
    return matrix.T @ layer(matrix @ h)


def by_scatter(key: Tensor, h: Tensor, layer: nn.Module) -> Tensor:
    order = key.argsort(stable=True)
    return torch.zeros_like(h).index_copy(0, order, layer(h.index_select(0, order)))


def by_turning(key: Tensor, h: Tensor, layer: nn.Module) -> Tensor:
    turned = bool(key[0] > key[-1])
    out = layer(h.flip(0) if turned else h)
    return out.flip(0) if turned else out


SORTING = {"index": by_index, "gather": by_gather, "list": by_list, "scatter": by_scatter, "turning": by_turning}
KEYS = {"numbers": lambda x: x[:, 0], "few values": lambda x: (x[:, 0] > 0.8).to(x.dtype), "one of them": lambda x: (
    torch.arange(len(x)) == x[:, 0].argmax()).to(x.dtype)}  # fmt: skip


class Sorting(nn.Module):
    """Puts the rows into an order by a key, and back behind a layer."""

    def __init__(self, sort: Callable, key: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.sort, self.key = sort, key
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).sin()
        return self.last(self.sort(self.key(x), h, self.inner).tanh())


def in_order(x: Tensor, key: Callable) -> Tensor:
    return x[key(x).argsort(stable=True)]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("sort", SORTING)
def test_rows_that_change_places_are_exact_or_refused_in_every_batch(sort: str, key: str) -> None:
    model = Sorting(SORTING[sort], KEYS[key])
    x, _ = numbers(9)
    refused = 0
    for batch in [in_order(x, KEYS[key]), x, *(numbers(n, seed)[0] for seed in range(2, 6) for n in (9, 12))]:
        labels = torch.arange(len(batch)) % 5
        try:
            result = gradmix.sample_gradients(model, (batch, labels), sketch="identity")
        except (CoupledSamplesError, NoRuleError):
            refused += 1
        else:
            assert_layers_equal(result, truth(model, batch, labels), EXACT)
    assert refused > 0


def test_rows_moved_by_a_matrix_are_refused() -> None:
    """No index and no value read tells of it; two rows in the opposite order are not both in order."""
    model = Sorting(by_matrix, KEYS["numbers"])
    for seed in range(8):
        x, y = numbers(9, seed)
        for batch in (in_order(x, KEYS["numbers"]), x):
            with pytest.raises(CoupledSamplesError):
                gradmix.sample_gradients(model, (batch, y), rank=2)


# ------------------------------------------------------------------------------------------------- what is not refused


def noise(m: Any, h: Tensor) -> Tensor:
    return h + 0.1 * torch.randn_like(h)


def quantised_by_row(m: Any, h: Tensor) -> Tensor:
    scale = h.detach().abs().amax(1, keepdim=True) / 7
    return h + ((h / scale).round() * scale - h).detach()


def codes(m: Any, h: Tensor) -> Tensor:
    """The nearest of a few vectors, with the gradient of the identity."""
    book = torch.linspace(-1, 1, 32, dtype=h.dtype).view(4, 8).sin()
    return h + (book[torch.cdist(h.detach(), book).argmin(1)] - h).detach()


INDEPENDENT: dict[str, Between] = {
    "nothing": lambda m, h: h,
    "quantised by row": quantised_by_row,
    "nearest codes": codes,
    "its largest entries": lambda m, h: h * (h >= h.topk(3, 1).values[:, -1:]),
    "its own softmax": lambda m, h: h.softmax(1),
    "an entry of its own": lambda m, h: h * h[torch.arange(len(h)), h.argmax(1)][:, None],
    "sorted by itself": lambda m, h: h.sort(1).values,
    "far apart": lambda m, h: h * 10.0 ** torch.arange(-20, 20, 5, dtype=h.dtype),
    "with infinities": lambda m, h: h.masked_fill(h < 0, -torch.inf).exp(),
}


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("name", INDEPENDENT, ids=str)
def test_rows_of_their_own_are_served(name: str, rows: int) -> None:
    model = Body(INDEPENDENT[name])
    for seed in range(4):
        x, y = numbers(rows, seed)
        assert_layers_equal(gradmix.sample_gradients(model, (x, y), sketch="identity"), truth(model, x, y), EXACT)


@pytest.mark.parametrize("between", [noise, lambda m, h: F.dropout(h, 0.5, training=True)], ids=["noise", "dropout"])
def test_a_model_that_draws_random_numbers_is_served_and_the_generators_left_alone(between: Between) -> None:
    model, batch = Body(between), numbers(8)
    before = photograph(model, batch)
    for _ in range(3):
        gradmix.sample_gradients(model, batch, rank=2)
    assert same(photograph(model, batch), before)


def test_random_numbers_do_not_hide_an_influence() -> None:
    model = Body(lambda m, h: noise(m, h) - h.detach().mean(0))
    for seed in range(3):
        with pytest.raises(CoupledSamplesError, match="samples around it"):
            gradmix.sample_gradients(model, numbers(8, seed), rank=2)


def test_a_batch_cut_to_its_longest_row_is_served() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.inner, self.fc = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 5)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, : int((x > 0).sum(1).max())]
            h = self.inner(self.embed(x)).tanh() * (x > 0)[..., None]
            return self.fc(h.sum(1))

    model = Cut()
    for seed in range(4):
        x, y = tokens(8, seed)
        length = torch.randint(2, 7, (8,), generator=torch.Generator().manual_seed(seed))
        x = (x + 1).clamp(max=19) * (torch.arange(7) < length[:, None])
        assert_layers_equal(gradmix.sample_gradients(model, (x, y), sketch="identity"), truth(model, x, y), EXACT)


@pytest.mark.parametrize("rows", [2, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_not_taken_for_an_influence(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    blocks = [m for _ in range(12) for m in (nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU())]
    model = nn.Sequential(nn.Linear(6, 64), *blocks, nn.Linear(64, 5)).to(dtype)
    for seed in range(3):
        x, y = numbers(rows, seed)
        x = x.to(dtype)
        result = gradmix.sample_gradients(model, (x, y), rank=2)
        alone = torch.cat(
            [gradmix.sample_gradients(model, (x[n : n + 1], y[n : n + 1]), rank=2).vectors for n in (0, 1)]
        )
        assert (result.vectors[:2] - alone).norm() <= 40 * torch.finfo(dtype).eps * alone.norm()


def test_two_rows_more_are_forwarded_in_a_pass() -> None:
    """The first batch of a shape is compared whole; the check of later ones does not grow with the batch."""
    model, seen = Body(lambda m, h: h.relu()), []
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    for rows in (32, 32, 64):
        seen.clear()
        gradmix.sample_gradients(model, numbers(rows, rows), rank=2)
        found = list(seen)
    assert found == [64, 2]


# ------------------------------------------------------------------------------------------------ statistics of weights


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_batch_norm_of_weights_is_no_statistic_of_the_batch(rows: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardised(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).double()
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows, 3, 8, 8, generator=g, dtype=torch.float64), torch.arange(rows) % 5
    with pytest.raises(NoRuleError, match=r"'0\.weight'"):
        gradmix.sample_gradients(model, (x, y))
    for n in (rows, max(1, rows - 1)):
        result = gradmix.sample_gradients(model, (x[:n], y[:n]), sketch="identity", without_rule="exact")
        assert_layers_equal(result, truth(model, x[:n], y[:n]), EXACT)
    model.append(nn.BatchNorm1d(5, track_running_stats=False).double())
    with pytest.raises(BatchStatisticsError, match="statistics of the batch"):
        gradmix.sample_gradients(model, (x, y), without_rule="exact")


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_of_the_batch_behind_tokens(rows: int, frozen: bool) -> None:
    model = Words(lambda m, h: standardised(h))
    model.body.requires_grad_(not frozen)
    for layers in ("all", ["fc"]):
        with pytest.raises(BatchStatisticsError, match="statistics of the batch"):
            gradmix.sample_gradients(model, tokens(rows), rank=2, layers=layers)


# -------------------------------------------------------------------------------------- where the samples are, at any T


class Folded(nn.Module):
    """Positions folded with rows, of which one position reaches the logits; in either order."""

    def __init__(self, position: Callable[[int], int], first: bool, heads: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.score = nn.Embedding(30, 4), nn.Linear(4 // heads, 4), nn.Linear(4, 3)
        self.position, self.first, self.heads = position, first, heads
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        rows, length = x.shape
        h = self.embed(x).cumsum(1) / torch.arange(1, length + 1, dtype=torch.float64)[:, None]
        if self.first:
            h = h.transpose(0, 1)
        h = self.inner(h.reshape(rows * length * self.heads, -1)).tanh()
        h = h.view(*((length, rows) if self.first else (rows, length)), self.heads, 4)
        h = h[:, :, 0]
        return self.score((h.transpose(0, 1) if self.first else h)[:, self.position(length)])


POSITIONS = {
    "last": lambda t: t - 1,
    "first": lambda t: 0,
    "middle": lambda t: t // 2,
    "second": lambda t: min(1, t - 1),
}


@pytest.mark.parametrize("first", [False, True], ids=["rows first", "positions first"])
@pytest.mark.parametrize("position", POSITIONS)
def test_one_position_of_any_number(position: str, first: bool) -> None:
    model = Folded(POSITIONS[position], first)
    for length in (1, 2, 3, 4, 5, 6, 7, 15, 16, 21, 31, 61, 106, 421):
        x, y = torch.randint(0, 30, (7, length)), torch.arange(7) % 3
        result = gradmix.sample_gradients(model, (x, y), sketch="identity")
        assert_layers_equal(result, truth(model, x, y), EXACT)


@pytest.mark.parametrize("first", [False, True], ids=["rows first", "positions first"])
def test_one_of_several_heads_folded_with_rows(first: bool) -> None:
    model = Folded(POSITIONS["first"], first, heads=2)
    for length in (1, 4, 16, 31):
        x, y = torch.randint(0, 30, (7, length)), torch.arange(7) % 3
        try:
            result = gradmix.sample_gradients(model, (x, y), sketch="identity")
        except (NoRuleError, CoupledSamplesError):
            assert first and length > 1  # neither rows nor positions are outermost then
        else:
            assert_layers_equal(result, truth(model, x, y), EXACT)


def test_a_last_position_of_each_rows_own() -> None:
    """The last word that is no padding, in batches in which it fits either order by chance."""

    class Last(Folded):
        def forward(self, x: Tensor) -> Tensor:
            rows, length = x.shape
            h = self.inner(self.embed(x).reshape(rows * length, -1)).tanh().view(rows, length, -1)
            return self.score(h[torch.arange(rows), (x > 0).sum(1) - 1])

    model = Last(POSITIONS["last"], False)
    for length in (7, 16, 31):
        for last in (lambda n, t: t - 1, lambda n, t: (n * (t - 1)) % 3 and t - 2, lambda n, t: (5 * n) % t):
            lengths = torch.tensor([last(n, length) for n in range(8)])[:, None]
            x = torch.randint(1, 30, (8, length)) * (torch.arange(length) <= lengths)
            y = torch.arange(8) % 3
            result = gradmix.sample_gradients(copy.deepcopy(model), (x, y), sketch="identity")
            assert_layers_equal(result, truth(model, x, y), EXACT)


def test_a_loss_of_one_row_only_and_rows_without_gradient() -> None:
    """Rows whose loss is constant have zero gradients and are checked all the same."""
    model, (x, y) = Body(lambda m, h: h.relu()), numbers(6)

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(z, labels) * (labels == labels[0])

    result = gradmix.sample_gradients(model, (x, y), sketch="identity", loss=lambda z, t: loss(z, t))
    expected = truth(model, x, y, lambda z, t: cross_entropy(z, t) * (t == y[0]))
    assert_layers_equal(result, expected, EXACT)
