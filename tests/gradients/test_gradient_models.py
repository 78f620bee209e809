"""The gradient engine on whole networks: exact without a sketch, close with one, in no more memory than it states."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gradient_networks import ARCHITECTURES, Case, ResNet, group_norm
from gradient_truth import assert_layers_equal, assert_vectors_are_the_layers, by_class, cosines, flat
from gradient_truth import sample_gradients as truth
from torch import Tensor, nn

import gradmix
from gradmix.gradients.standard_errors import standard_errors

EXACT = 1e-9


@pytest.mark.parametrize("name", ARCHITECTURES, ids=str)
def test_exact_without_a_sketch(name: str) -> None:
    case = ARCHITECTURES[name]
    model, batch = case.model(), case.batch()
    gradients = truth(model, *batch)
    result = gradmix.sample_gradients(model, batch, sketch="identity")
    assert_layers_equal(result, gradients, EXACT)
    assert_vectors_are_the_layers(result, len(batch[1]))
    assert {p for layer in result.layout for p in layer.parameters} == gradients.keys()
    whole = flat(gradients)
    assert (result.cosine() - cosines(whole, whole)).abs().max() <= EXACT
    inner, cosine = result.align(result[:2])
    reference = whole[:2].mean(0)
    assert (inner - whole @ reference).abs().max() <= EXACT * (whole.norm(dim=1) * reference.norm()).max()
    assert (cosine - cosines(whole, reference[None])[:, 0]).abs().max() <= EXACT


@pytest.mark.parametrize("name", ARCHITECTURES, ids=str)
def test_classes_without_a_sketch(name: str) -> None:
    case = ARCHITECTURES[name]
    model, (x, y) = case.model(), case.batch()
    result = gradmix.class_gradients(model, (x, y), sketch="identity", chunk_size=3)
    whole = flat(by_class(truth(model, x, y), y, result.classes))
    assert (result.cosine() - cosines(whole, whole)).abs().max() <= EXACT
    assert (result.square_norms.sum(1) >= 0).all()


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("name", ARCHITECTURES, ids=str)
def test_sketched_products_are_within_their_standard_errors(name: str, kind: str) -> None:
    """Of all pairs over ten seeds nine in ten within two standard errors; cosines no worse than one over root k."""
    case = ARCHITECTURES[name]
    model, batch = case.model(), case.batch()
    exact = gradmix.sample_gradients(model, batch, sketch="identity")
    rows = len(exact)
    i, j = torch.triu_indices(rows, rows, 1)
    within, errors = [], []
    for seed in range(10):
        result = gradmix.sample_gradients(model, batch, rank=6, sketch=kind, seed=seed)
        v = result.vectors
        standard = torch.stack([standard_errors(v, reference, result.layout) for reference in v])
        within.append(((v @ v.T - exact.vectors @ exact.vectors.T).abs() <= 2 * standard)[i, j])
        errors.append((result.cosine() - exact.cosine())[i, j])
    assert torch.stack(within).double().mean() >= 0.9
    assert torch.stack(errors).square().mean().sqrt() <= 1 / math.sqrt(6)


@pytest.mark.parametrize("norm", [group_norm, nn.BatchNorm2d], ids=["group norm", "batch norm"])
def test_resnet_18_of_full_width(norm: Callable[[int], nn.Module]) -> None:
    """Float32, rank 16: 11 million parameters in vectors of 12 thousand."""
    case = Case(lambda: ResNet(norm), (3, 32, 32), rows=4, classes=10)
    model, (x, _) = case.model(torch.float32), case.batch(dtype=torch.float32)
    y = torch.tensor([0, 3, 3, 7])
    exact = gradmix.class_gradients(model, (x, y), sketch="identity")
    result = gradmix.class_gradients(model, (x, y), rank=16)
    assert exact.vectors.shape[1] == sum(p.numel() for p in model.parameters()) > 11e6
    assert result.vectors.shape[1] < 13_000
    assert result.counts.tolist() == [1, 2, 1] and torch.isfinite(result.vectors).all()
    # The sum over layers of squared norms, each off by about 1/16, and the cosines.
    assert torch.allclose(result.square_norms.sum(1), exact.square_norms.sum(1), rtol=0.5)
    assert (result.cosine() - exact.cosine()).abs().max() <= 4 / 16


def test_under_autocast_a_network_keeps_its_cosines() -> None:
    case = ARCHITECTURES["vit"]
    model, (x, y) = case.model(torch.float32), case.batch(dtype=torch.float32)
    expected = gradmix.sample_gradients(model, (x, y), rank=8).cosine()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            result = gradmix.sample_gradients(model, (x, y), rank=8)
        assert result.vectors.dtype == torch.float32
        assert (result.cosine() - expected).abs().max() <= 0.05


@pytest.mark.parametrize("name", ["vit", "resnet-18 with batch norm"])
def test_compiled_and_wrapped_networks(name: str) -> None:
    case = ARCHITECTURES[name]
    model, batch = case.model(), case.batch(4)
    expected = gradmix.sample_gradients(model, batch, rank=3)
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        result = gradmix.sample_gradients(wrapped, batch, rank=3)
        assert result.layout == expected.layout and torch.equal(result.vectors, expected.vectors)


def test_a_training_loop_with_a_buffer() -> None:
    """Learning goes on undisturbed while class gradients are watched: the same weights as without."""
    case = ARCHITECTURES["tabular mlp"]

    def train(watched: bool) -> list[Tensor]:
        model = case.model(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        buffer = gradmix.ReplayBuffer(3)
        average = gradmix.gradients.ClassGradientAverage(0.5)
        for step in range(4):
            x, y = case.batch(6, step, torch.float32)
            buffer.add(x, y)
            if watched:
                reference = gradmix.class_gradients(model, buffer, rank=4)
                aligned = gradmix.sample_gradients(model, (x, y), rank=4).align(reference)
                assert aligned.cosine.abs().max() <= 1
                average.update(reference)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("_measure")


def conv_stack(channels: int, size: int, depth: int) -> Case:
    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1)]
        for _ in range(depth):
            layers += [nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))

    return Case(build, (3, size, size), rows=32, classes=10)


def perceptron(width: int, depth: int) -> Case:
    def build() -> nn.Module:
        layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(width, 10))

    return Case(build, (width,), rows=64, classes=10)


def stated(model: nn.Module, x: Tensor, result: gradmix.ClassGradients) -> int:
    """Bytes by the formula in the docstring of class_gradients, from the sizes of layers and activations alone."""
    batch, kept, largest = len(x), 0, 0
    positions: dict[str, int] = {}

    def look(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal kept, largest
            if isinstance(module, (nn.ReLU, nn.Tanh)):  # these keep their output for the backward pass
                kept += 4 * output.numel()
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                positions[name] = math.prod(output.shape[2:])
                largest = max(largest, 4 * (inputs[0].numel() + output.numel()))

        return hook

    handles = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if name]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    sketched = sum(4 * batch * positions[s.name] * s.columns for s in result.layout)
    working = max(4 * batch * (positions[s.name] * (s.rows + s.columns) + s.rows * s.columns) for s in result.layout)
    sums = 4 * len(result) * (result.vectors.shape[1] + len(result.layout))
    matrices = sum(
        4 * size * dim
        for s in result.layout
        for size, dim in ((s.rows, s.shape[0]), (s.columns, s.shape[1]))
        if size < dim
    )
    return kept + sketched + working + largest + sums + matrices


STACKS = {
    "narrow convolutions": conv_stack(32, 32, 4),
    "wide convolutions": conv_stack(96, 16, 3),
    "perceptron": perceptron(512, 8),
}


@pytest.mark.parametrize("name", STACKS)
def test_peak_memory_is_what_the_docstring_states(name: str, measure: ModuleType) -> None:
    case = STACKS[name]
    model, batch = case.model(torch.float32), case.batch(dtype=torch.float32)
    result = gradmix.class_gradients(model, batch, rank=16)
    peak = measure.peak_memory(lambda: gradmix.class_gradients(model, batch, rank=16), torch.device("cpu"))
    assert 0.5 <= peak / stated(model, batch[0], result) <= 1.1


def test_peak_memory_does_not_grow_with_the_rows(measure: ModuleType) -> None:
    case = STACKS["narrow convolutions"]
    model, (x, y) = case.model(torch.float32), case.batch(64, dtype=torch.float32)

    def peak(rows: int) -> int:
        part = (x[:rows], y[:rows])
        gradmix.class_gradients(model, part, chunk_size=8)
        return measure.peak_memory(lambda: gradmix.class_gradients(model, part, chunk_size=8), torch.device("cpu"))

    # Classes come with rows: all ten are there in either case, or there would be more to sum.
    y[:16] = torch.arange(16) % 10
    assert peak(64) <= 1.05 * peak(16)


def test_no_gradient_of_a_weight_is_ever_formed(measure: ModuleType) -> None:
    """One layer's weight alone is larger than all the memory used."""
    case = perceptron(2048, 1)
    model, batch = case.model(torch.float32), case.batch(4, dtype=torch.float32)
    gradmix.class_gradients(model, batch, rank=8)
    peak = measure.peak_memory(lambda: gradmix.class_gradients(model, batch, rank=8), torch.device("cpu"))
    assert peak < 4 * 2048 * 2048 / 10
