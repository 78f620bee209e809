"""Rows that are not a tensor and a class: targets that only the loss knows, and inputs of several tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from gradient_networks import Net
from gradient_truth import assert_layers_equal
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import gradmix
from gradmix.gradients import NoRuleError
from gradmix.gradients.directions import directional_derivatives, mean_gradient
from gradmix.model.inputs import call_model, num_samples, take

EXACT = 1e-9
Loss = Callable[[Tensor, Any], Tensor]


def single(model: nn.Module, x: Any, y: Any, loss: Loss) -> dict[str, Tensor]:
    """The truth: each row by itself, forward and backward."""
    named = dict(model.named_parameters())
    found = []
    for n in range(num_samples(x)):
        one = slice(n, n + 1)
        output = call_model(model, take(x, one))
        value = loss(getattr(output, "logits", output), take(y, one))
        found.append(torch.autograd.grad(value.sum(), list(named.values())))
    return {name: torch.stack(rows) for name, rows in zip(named, zip(*found, strict=True), strict=True)}


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


N = 6
G = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G, dtype=torch.float64)


def whole(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(high, shape, generator=G).to(dtype)


def mlp(outputs: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, outputs)).double()


def tagger(flat: bool = False, norm: bool = False) -> nn.Module:
    torch.manual_seed(2)
    end = [nn.Flatten()] if flat else []
    middle = [nn.LayerNorm(5)] if norm else []
    return nn.Sequential(nn.Embedding(20, 5), nn.Tanh(), *middle, nn.Linear(5, 4), *end).double()


def by_position(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(len(y), -1, 4).transpose(1, 2), y, ignore_index=-100, reduction="none").sum(1)


def ignored(y: Tensor) -> Tensor:
    y = y.clone()
    y[0] = -100
    y[2, 1:] = -100
    return y


class Pair(NamedTuple):
    """Two targets by name."""

    first: Tensor
    second: Tensor


X, TOKENS = normal(N, 8), whole(20, N, 3)
TARGETS: dict[str, tuple[nn.Module, Tensor, Any, Loss]] = {
    "regression, y (N, 1)": (mlp(1), X, normal(N, 1), lambda z, y: (z - y).square().sum(1)),
    "regression, y (N,)": (mlp(1), X, normal(N), lambda z, y: (z[:, 0] - y).square()),
    "regression of three, y (N, 3)": (
        mlp(3),
        X,
        normal(N, 3) * 100,
        lambda z, y: F.huber_loss(z, y, reduction="none").sum(1),
    ),
    "logits (N,)": (nn.Sequential(mlp(1), nn.Flatten(0)), X, normal(N), lambda z, y: (z - y).square()),
    "regression in float32, y of integers": (
        mlp(1),
        X,
        whole(50, N, dtype=torch.int32) - 25,
        lambda z, y: (z[:, 0] - y).square(),
    ),
    "multi-hot, y (N, C)": (
        mlp(5),
        X,
        whole(2, N, 5).double(),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1),
    ),
    "multi-hot, y bool": (
        mlp(5),
        X,
        whole(2, N, 5).bool(),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y.double(), reduction="none").sum(1),
    ),
    "a label a position": (tagger(True), TOKENS, whole(4, N, 3), by_position),
    "a label a position, logits (N, T, V)": (tagger(), TOKENS, whole(4, N, 3), by_position),
    "a label a position, as many positions as rows": (tagger(norm=True), whole(20, N, N), whole(4, N, N), by_position),
    "a label a position, some ignored": (tagger(), TOKENS, ignored(whole(4, N, 3)), by_position),
    "a class beyond the logits": (mlp(3), X, whole(9, N), lambda z, y: (z[:, 0] - y).square()),
    "a class to ignore": (
        mlp(3),
        X,
        torch.tensor([0, -100, 2, 1, -100, 0]),
        lambda z, y: F.cross_entropy(z, y, ignore_index=-100, reduction="none"),
    ),
    "label vectors that do not sum to 1": (mlp(3), X, normal(N, 3).exp(), lambda z, y: -(z.log_softmax(1) * y).sum(1)),
    "uint8 classes": (mlp(3), X, whole(3, N, dtype=torch.uint8), lambda z, y: cross_entropy(z, y.long())),
    "a dictionary of two targets": (
        mlp(5),
        X,
        {"class": whole(4, N), "value": normal(N)},
        lambda z, y: cross_entropy(z[:, :4], y["class"]) + (z[:, 4] - y["value"]).square(),
    ),
    "a named tuple of two targets": (
        mlp(5),
        X,
        Pair(whole(4, N), normal(N, 1)),
        lambda z, y: cross_entropy(z[:, :4], y.first) + (z[:, 4:] - y.second).abs().sum(1),
    ),
    "images, logits (N, C, H, W)": (
        nn.Conv2d(2, 3, 3, padding=1).double(),
        normal(N, 2, 4, 4),
        whole(3, N, 4, 4),
        lambda z, y: cross_entropy(z, y).sum((1, 2)),
    ),
}


@pytest.mark.parametrize("chunk", [2, 256])
@pytest.mark.parametrize("name", TARGETS, ids=str)
def test_targets_are_whatever_the_loss_takes(name: str, chunk: int) -> None:
    model, x, y, loss = TARGETS[name]
    expected = single(model, x, y, loss)
    given: dict[str, Any] = {"loss": loss, "chunk_size": chunk}
    assert_layers_equal(gradmix.sample_gradients(model, (x, y), sketch="identity", **given), expected, EXACT)
    mean = mean_gradient(model, (x, y), **given)
    assert all(torch.allclose(v, expected[k].mean(0), rtol=1e-9, atol=1e-12) for k, v in mean.items())
    found = directional_derivatives(model, (x, y), mean, norms=True, **given)
    rows = torch.cat([v.flatten(1) for v in expected.values()], 1)
    assert torch.allclose(found.inner, rows @ torch.cat([v.flatten() for v in mean.values()]), rtol=1e-9, atol=1e-12)
    assert found.norm is not None and torch.allclose(found.norm, rows.norm(dim=1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["regression, y (N,)", "a dictionary of two targets", "a label a position, some ignored"]
)
def test_targets_by_torch_func_and_row_by_row(name: str) -> None:
    model, x, y, loss = TARGETS[name]
    odd = Net(lambda m, h: m.model(h) * m.odd.exp(), model=model, odd=torch.zeros(1).double())
    looked = Net(lambda m, h: m.model(h) * (m.odd.exp() if m.odd.item() == 0 else 1), model=model, odd=odd.odd.data)
    for each in (odd, looked):
        result = gradmix.sample_gradients(each, (x, y), sketch="identity", loss=loss, without_rule="exact")
        assert_layers_equal(result, single(each, x, y, loss), EXACT)


CLASSLESS = [
    "regression, y (N, 1)",
    "regression, y (N,)",
    "multi-hot, y (N, C)",
    "a label a position",
    "a class to ignore",
    "a dictionary of two targets",
]


@pytest.mark.parametrize("name", CLASSLESS, ids=str)
def test_targets_that_are_no_classes_are_refused_with_what_helps(name: str) -> None:
    model, x, y, loss = TARGETS[name]
    with pytest.raises((ValueError, TypeError), match=r"^data labels: .*sample_gradients takes any y") as error:
        gradmix.class_gradients(model, (x, y), loss=loss)
    assert "sum its vectors by classes of your own" in str(error.value)
    samples = gradmix.sample_gradients(model, (x, y), loss=loss, sketch="identity")
    groups = torch.arange(N) % 2
    sums = torch.zeros(2, samples.vectors.shape[1], dtype=torch.float64).index_add_(0, groups, samples.vectors)
    assert torch.allclose(sums.sum(0), samples.vectors.sum(0))


@pytest.mark.parametrize("name", ["a class beyond the logits", "uint8 classes"])
def test_a_loss_with_classes_still_sums_by_them(name: str) -> None:
    model, x, y, loss = TARGETS[name]
    result = gradmix.class_gradients(model, (x, y), loss=loss, sketch="identity")
    samples = gradmix.sample_gradients(model, (x, y), loss=loss, sketch="identity")
    assert result.classes.dtype == torch.int64 and torch.equal(result.classes, y.long().unique())
    for c, vector in zip(result.classes, result.vectors, strict=True):
        assert torch.allclose(vector, samples.vectors[y == c].sum(0), rtol=1e-12)


REFUSED = {
    "float classes": (normal(N), "soft labels of shape"),
    "a class beyond the logits": (torch.tensor([0, 1, 2, 3, 4, 1]), r"row 3 is 3, expected a class index in \[0, 3\)"),
    "a negative class": (torch.tensor([0, 1, -1, 2, 0, 1]), "row 2 is -1"),
    "label vectors that do not sum to 1": (torch.rand(N, 3) + 1, "sums to"),
    "labels of every position": (whole(3, N, 2), "expected .6,. class indices"),
    "too few": (whole(3, N - 1), "class indices|samples"),
    "a dictionary": ({"y": whole(3, N)}, "expected an .x, y. pair of tensors"),
}


@pytest.mark.parametrize("call", [gradmix.sample_gradients, gradmix.class_gradients], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", REFUSED, ids=str)
def test_without_a_loss_labels_are_checked(name: str, call: Callable) -> None:
    y, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call(mlp(3), (X, y))


def test_logits_of_positions_want_a_loss() -> None:
    model, x, y, loss = TARGETS["a label a position, logits (N, T, V)"]
    for call in (gradmix.sample_gradients, gradmix.class_gradients, mean_gradient):
        with pytest.raises(ValueError, match=r"logits of shape \(6, 3, 4\) .*a loss= that takes them"):
            call(model, (x, y[:, 0]))
    for without_rule in ("error", "exact"):
        result = gradmix.sample_gradients(model, (x, y), loss=loss, sketch="identity", without_rule=without_rule)
        assert_layers_equal(result, single(model, x, y, loss), EXACT)


def test_targets_of_another_length_are_named() -> None:
    model, x, y, loss = TARGETS["regression, y (N,)"]
    with pytest.raises(ValueError, match=r"batch labels: got 5 samples, expected 6"):
        gradmix.sample_gradients(model, (x, y[:5]), loss=loss)
    with pytest.raises(ValueError, match=r"batch labels\['b'\]: got 5 samples, expected 6"):
        gradmix.sample_gradients(model, (x, {"a": y, "b": y[:5]}), loss=loss)


# ------------------------------------------------------------------------------------------------- inputs of several


class ByKeyword(nn.Module):
    """Ids and an attention mask, as tokenizers give them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.fc, self.scale = nn.Embedding(20, 6), nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, extra: Tensor | None = None) -> Tensor:
        h = (self.embedding(input_ids) * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return self.fc(h.tanh() if extra is None else (h * self.scale(extra)).tanh())


class ByMapping(ByKeyword):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(**batch)


class ByPosition(ByKeyword):
    def forward(self, ids: Tensor, mask: Tensor, extra: Tensor) -> Tensor:
        return super().forward(ids, mask, extra)


class BySequence(ByKeyword):
    def forward(self, parts: Any) -> Tensor:
        ids, (mask, extra) = parts
        return super().forward(ids, mask, extra)


IDS, MASK, EXTRA = whole(20, N, 5), (torch.arange(5) < torch.tensor([5, 2, 1, 4, 3, 5])[:, None]).long(), normal(N, 2)
INPUTS: dict[str, tuple[type[nn.Module], Any]] = {
    "by keyword": (ByKeyword, {"input_ids": IDS, "attention_mask": MASK, "extra": EXTRA}),
    "by keyword, one left out": (ByKeyword, {"input_ids": IDS, "attention_mask": MASK}),
    "a mapping as it is": (ByMapping, {"input_ids": IDS, "attention_mask": MASK, "extra": EXTRA}),
    "by position": (ByPosition, (IDS, MASK, EXTRA)),
    "a list by position": (ByPosition, [IDS, MASK, EXTRA]),
    "nested, as it is": (BySequence, (IDS, (MASK, EXTRA))),
}
Y = torch.tensor([0, 2, 1, 2, 3, 0])


@pytest.mark.parametrize("without_rule", ["error", "exact"])
@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize("name", INPUTS, ids=str)
def test_inputs_of_several_tensors(name: str, chunk: int, without_rule: str) -> None:
    kind, x = INPUTS[name]
    model = kind().double()
    if name.endswith("left out"):
        model.scale.requires_grad_(False)
    if without_rule == "exact":
        inner = model.fc
        model.fc = Net(lambda m, h: m.fc(h) * m.odd.exp(), fc=inner, odd=torch.zeros(1).double())
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.requires_grad_(True)
    expected = {k: v for k, v in _grads(model, x).items() if k in trained}
    for k, p in model.named_parameters():
        p.requires_grad_(k in trained)
    given: dict[str, Any] = {"chunk_size": chunk, "without_rule": without_rule, "sketch": "identity"}
    result = gradmix.sample_gradients(model, (x, Y), **given)
    assert_layers_equal(result, expected, EXACT)
    classes = gradmix.class_gradients(model, (x, Y), **given)
    for c, vector in zip(classes.classes, classes.vectors, strict=True):
        assert torch.allclose(vector, result.vectors[c == Y].sum(0), rtol=1e-9, atol=1e-12)
    mean = mean_gradient(model, (x, Y), chunk_size=chunk)
    assert all(torch.allclose(v, expected[k].mean(0), rtol=1e-9, atol=1e-12) for k, v in mean.items())
    inner_products = directional_derivatives(model, (x, Y), mean, chunk_size=chunk, without_rule=without_rule).inner
    rows = torch.cat([expected[k].flatten(1) for k in mean], 1)
    along = torch.cat([v.flatten() for v in mean.values()])
    assert torch.allclose(inner_products, rows @ along, rtol=1e-9, atol=1e-12)


def _grads(model: nn.Module, x: Any) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = []
    for n in range(N):
        one = slice(n, n + 1)
        value = cross_entropy(call_model(model, take(x, one)), Y[one]).sum()
        gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        found.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), gradients, strict=True)])
    return {name: torch.stack(rows) for name, rows in zip(named, zip(*found, strict=True), strict=True)}


class Rows(Dataset[Any]):
    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return num_samples(self.x)

    def __getitem__(self, n: int) -> Any:
        return take(self.x, n), take(self.y, n)


class Stream(IterableDataset[Any]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return (self.rows[n] for n in range(len(self.rows)))


def test_sources_of_dictionaries_and_of_other_targets() -> None:
    x = {"input_ids": IDS, "attention_mask": MASK, "extra": EXTRA}
    model = ByKeyword().double()
    expected = gradmix.class_gradients(model, (x, Y), sketch="identity")
    rows = Rows(x, Y)
    for source in (rows, Stream(rows), DataLoader(rows, batch_size=4), [x, Y]):
        result = gradmix.class_gradients(model, source, sketch="identity", chunk_size=2)
        assert torch.equal(result.classes, expected.classes)
        assert torch.allclose(result.vectors, expected.vectors, rtol=1e-12, atol=1e-14)
    model, x, y, loss = TARGETS["regression, y (N,)"]
    expected = mean_gradient(model, (x, y), loss=loss)
    for source in (TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=4), Stream(Rows(x, y))):
        result = mean_gradient(model, source, loss=loss, chunk_size=3)
        assert all(torch.allclose(v, result[k], rtol=1e-12, atol=1e-14) for k, v in expected.items())


BAD_INPUTS = {
    "a leaf that is no tensor": (
        {"input_ids": IDS, "attention_mask": "all"},
        TypeError,
        r"x\['attention_mask'\]: got str",
    ),
    "other lengths": ((IDS, MASK[:3], EXTRA), ValueError, r"x\[1\]: got 3 samples, expected 6"),
    "none": ({}, ValueError, "without tensors"),
    "a number": ((IDS, torch.tensor(1)), ValueError, r"x\[1\]: got a tensor without dimensions"),
}


@pytest.mark.parametrize("name", BAD_INPUTS, ids=str)
def test_bad_inputs_are_named(name: str) -> None:
    x, kind, message = BAD_INPUTS[name]
    for call, argument in ((gradmix.sample_gradients, "batch"), (gradmix.class_gradients, "data")):
        with pytest.raises(kind, match=rf"^{argument} {message}|{argument}.*{message}"):
            call(ByKeyword().double(), (x, Y))


def test_a_value_that_is_not_finite_is_found_in_any_part() -> None:
    extra = EXTRA.clone()
    extra[3, 1] = float("nan")
    with pytest.raises(ValueError, match="sample 3 holds NaN"):
        gradmix.sample_gradients(ByKeyword().double(), ({"input_ids": IDS, "attention_mask": MASK, "extra": extra}, Y))


def test_coupled_rows_are_found_in_any_part() -> None:
    class Coupled(ByKeyword):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, extra: Tensor) -> Tensor:
            return super().forward(input_ids, attention_mask, extra - extra.mean(0))

    with pytest.raises(gradmix.gradients.CoupledSamplesError):
        gradmix.sample_gradients(Coupled().double(), ({"input_ids": IDS, "attention_mask": MASK, "extra": EXTRA}, Y))


def test_plans_of_dictionaries_are_of_all_their_parts() -> None:
    """The same ids with and without the optional part are two kinds of rows."""
    model = ByKeyword().double()
    x = {"input_ids": IDS, "attention_mask": MASK, "extra": EXTRA}
    assert_layers_equal(gradmix.sample_gradients(model, (x, Y), sketch="identity"), _grads(model, x), EXACT)
    x.pop("extra")
    assert_layers_equal(gradmix.sample_gradients(model, (x, Y), sketch="identity"), _grads(model, x), EXACT)
    with pytest.raises(NoRuleError):
        gradmix.sample_gradients(
            Net(lambda m, x: x["a"] * m.w.exp(), w=torch.ones(4)), ({"a": torch.rand(3, 4)}, Y[:3])
        )


# ------------------------------------------------------------------------------------------------ modes and defaults


@pytest.mark.parametrize("without_rule", ["error", "exact"])
def test_nothing_depends_on_the_default_device(without_rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.PReLU(4), nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 4)
    ).double()
    batch = normal(N, 2, 4, 4), Y
    calls = {
        kind: lambda kind=kind: (
            gradmix.class_gradients(model, batch, rank=3, sketch=kind, without_rule=without_rule, chunk_size=4).vectors
        )
        for kind in ("identity", "rademacher", "gaussian", "rows")
    }
    expected = {kind: call() for kind, call in calls.items()}
    torch.set_default_device("meta")
    try:
        found = {kind: call() for kind, call in calls.items()}
        fresh = gradmix.sample_gradients(nn.Linear(8, 4, device="cpu", dtype=torch.float64), (X, Y), rank=2, seed=7)
    finally:
        torch.set_default_device(None)
    assert fresh.vectors.device.type == "cpu"
    assert all(torch.equal(found[kind], expected[kind]) for kind in expected)


def test_targets_and_parts_of_inference_mode() -> None:
    x = {"input_ids": IDS, "attention_mask": MASK, "extra": EXTRA}
    model = ByKeyword().double()
    expected = gradmix.sample_gradients(model, (x, Y), sketch="identity").vectors
    with torch.inference_mode():
        made = take({k: v.clone() for k, v in x.items()}, slice(None)), Y.clone()
        inside = gradmix.sample_gradients(model, made, sketch="identity").vectors
    assert torch.equal(inside, expected)
    assert torch.equal(gradmix.sample_gradients(model, made, sketch="identity").vectors, expected)


@pytest.mark.parametrize("without_rule", ["error", "exact"])
def test_a_frozen_backbone_that_runs_in_inference_mode(without_rule: str) -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone, self.fc = nn.Linear(8, 6).requires_grad_(False), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                h = self.backbone(x).tanh()
            return self.fc(h.clone())

    model = Probe().double()
    result = gradmix.sample_gradients(model, (X, Y), sketch="identity", without_rule=without_rule)
    h = model.backbone(X).tanh()
    expected = (model.fc(h).softmax(1) - F.one_hot(Y, 4))[:, :, None] * torch.cat([h, torch.ones(N, 1)], 1)[:, None]
    assert torch.allclose(result.layer("fc"), expected, rtol=1e-9, atol=1e-12)


def test_images_of_bytes_are_the_models_business() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(3, 2, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x.to(self.fc.weight.dtype) / 255).flatten(1))

    model, images = Scaled().double(), whole(256, N, 3, 4, 4, dtype=torch.uint8)
    result = gradmix.sample_gradients(model, (images, Y), sketch="identity")
    assert_layers_equal(result, single(model, images, Y, cross_entropy), EXACT)
