"""Modes that a program may be in: inference mode, and a default device that is not the CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CLASSES, MLP, ConvNet, rows
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradmix
from gradmix import GradMix, ReplayBuffer, alignment_matrix, mixed_forward, reference_gradient, select_pairs

BUFFER, BATCH, CANDIDATES = rows(12, 3), rows(8, 1), rows(5, 2)
ESTIMATORS = ["feature", "mixed", "jvp", "sketch"]


def generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def selected(model: nn.Module, estimator: str, criterion: str, **more: Any) -> list[Any]:
    """What every public call of a selection gives."""
    how: dict[str, Any] = {"estimator": estimator, "criterion": criterion, "policy": "permute"} | more
    pairs = select_pairs(model, BUFFER, BATCH, candidates=CANDIDATES, generator=generator(), **how)
    mixup = GradMix(model, BUFFER, generator=generator(), refresh=2, **how)
    kept = [mixup.select(*BATCH), mixup.select(*BATCH)]
    mixup.load_state_dict(mixup.state_dict())
    kept.append(mixup.select(*BATCH))
    how.pop("policy")
    matrix = alignment_matrix(model, BUFFER, BATCH, lam=0.3, **how)
    found: list[Any] = [matrix.inner, reference_gradient(model, TensorDataset(*BUFFER))]
    for each in (pairs, *kept):
        found += [each.partner, each.lam, each.alignment, *each.mix()]
    return found


def assert_same(got: list[Any], expected: list[Any]) -> None:
    for value, known in zip(got, expected, strict=True):
        torch.testing.assert_close(value, known, equal_nan=True)


# ------------------------------------------------------------------------------------------------------- inference mode


@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_selection_in_inference_mode(estimator: str, criterion: str) -> None:
    model = ConvNet()
    expected = selected(model, estimator, criterion)
    with torch.inference_mode():
        got = selected(model, estimator, criterion)
    assert_same(got, expected)


def test_what_was_found_in_inference_mode_can_be_trained_with() -> None:
    model = MLP()
    mixup = GradMix(model, BUFFER, refresh="epoch", criterion="class")
    with torch.inference_mode():
        pairs = mixup.select(*BATCH)
    x = BATCH[0].clone().requires_grad_()
    mixed, labels = pairs.mix(x)
    torch.nn.functional.cross_entropy(model(mixed), labels).backward()
    assert x.grad is not None and model.fc.weight.grad is not None
    mixup(*BATCH)
    assert not mixup.reference.is_inference()


def test_tensors_of_inference_mode_are_rows() -> None:
    with torch.inference_mode():
        x, y = BATCH[0].clone(), BATCH[1].clone()
        buffer = BUFFER[0].clone(), BUFFER[1].clone()
    model = MLP()
    for estimator in ESTIMATORS:
        got, expected = (
            select_pairs(model, kept, pair, lam=0.4, estimator=estimator).alignment
            for kept, pair in ((buffer, (x, y)), (BUFFER, BATCH))
        )
        torch.testing.assert_close(got, expected, equal_nan=True)


class FrozenBody(nn.Module):
    """Runs its body in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP()

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            h = self.net.body(x)
        return self.net.fc(h.clone())


@pytest.mark.parametrize("estimator", ["feature", "mixed"])
def test_a_body_in_inference_mode(estimator: str) -> None:
    model = FrozenBody()
    for criterion in ("sample", "class"):
        assert_same(selected(model, estimator, criterion), selected(model.net, estimator, criterion))


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
def test_a_buffer_is_filled_in_inference_mode_and_outside(in_folder: bool, tmp_path: Path) -> None:
    def made(name: str) -> ReplayBuffer:
        return ReplayBuffer(4, policy="balanced", folder=tmp_path / name if in_folder else None)

    def read(buffer: ReplayBuffer) -> None:
        buffer.sample(3), buffer.x, buffer.part(0, 2), buffer.state_dict()

    one, other = made("one"), made("other")
    for seed in range(6):
        with torch.inference_mode(seed % 2 == 0):
            one.add(*rows(5, seed))
            read(one)
        other.add(*rows(5, seed))
        read(other)
        if seed == 2:
            with torch.inference_mode():
                one.to("cpu")
    assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)
    state = other.state_dict()
    other.close()
    with torch.inference_mode():
        again = made("other")
        again.load_state_dict(state)
    one.add(*rows(5, 9))
    again.add(*rows(5, 9))
    assert torch.equal(one.x, again.x)
    (one.x * torch.ones(1, requires_grad=True)).sum().backward()  # ordinary tensors
    one.close()
    again.close()


# ------------------------------------------------------------------------------------------------------- default device


@pytest.fixture
def elsewhere() -> Iterator[Callable[[], None]]:
    """Makes ``meta`` the default device, on which nothing has values."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "sketch of low rank"])
def test_selection_does_not_depend_on_the_default_device(
    estimator: str, criterion: str, elsewhere: Callable[[], None]
) -> None:
    model = ConvNet()
    given: Any = gradmix.SketchEstimator(rank=3) if estimator.endswith("rank") else estimator
    expected = selected(model, given, criterion)
    elsewhere()
    model.register_buffer("new", torch.zeros(1, device="cpu"))  # a plan made before is of no use
    assert_same(selected(model, given, criterion), expected)


@pytest.mark.parametrize("sketch", ["rademacher", "gaussian", "rows", "identity"])
@pytest.mark.parametrize("without_rule", ["error", "exact"])
def test_gradients_do_not_depend_on_the_default_device(
    sketch: str, without_rule: str, elsewhere: Callable[[], None]
) -> None:
    how: dict[str, Any] = {"sketch": sketch, "rank": 4, "without_rule": without_rule}
    expected = [f(ConvNet(), BUFFER, **how).cosine().shape for f in (gradmix.class_gradients, gradmix.sample_gradients)]
    model, other = ConvNet(), ConvNet()
    other.load_state_dict(model.state_dict())
    known = gradmix.class_gradients(other, BUFFER, **how).cosine()
    elsewhere()
    torch.testing.assert_close(gradmix.class_gradients(model, BUFFER, **how).cosine(), known)
    assert gradmix.sample_gradients(model, BUFFER, **how).cosine().shape == expected[1]


@pytest.mark.parametrize("policy", ["class", "balanced", "reservoir"])
@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
def test_buffers_do_not_depend_on_the_default_device(
    in_folder: bool, policy: Any, tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    parts = [(*rows(6, seed), torch.rand(6, CLASSES)) for seed in range(4)]

    def filled(name: str) -> list[Any]:
        buffer = ReplayBuffer(3, policy=policy, folder=tmp_path / name if in_folder else None)
        assert len(buffer.x) == 0 and len(buffer.y) == 0
        for x, y, logits in parts:
            buffer.add(x, y, logits=logits)
        drawn = [*buffer.sample(4), *buffer.draw_balanced(5), *buffer.part(0, 2), buffer.x, buffer.y]
        drawn += [buffer.extras["logits"], *buffer.draw_balanced(0)]
        buffer.prefetch(2)
        drawn += [*buffer.sample(2)]
        state = buffer.state_dict()
        buffer.close()
        again = ReplayBuffer(3, policy=policy, folder=tmp_path / name if in_folder else None)
        again.load_state_dict(state)
        again.add(*parts[0][:2], logits=parts[0][2])
        drawn += [*again.sample(3), reference_gradient(model, again)]
        again.close()
        return drawn

    model = MLP()
    expected = filled("one")
    elsewhere()
    for value, known in zip(filled("other"), expected, strict=True):
        assert torch.equal(value, known)


def test_other_calls_do_not_depend_on_the_default_device(elsewhere: Callable[[], None]) -> None:
    model, (x, y) = MLP(), BATCH
    elsewhere()
    numbers = [(x[k].numpy(), int(y[k])) for k in range(8)]
    torch.testing.assert_close(reference_gradient(model, numbers), reference_gradient(model, BATCH))
    assert mixed_forward(model, "body.1", x, x, 0.3).device.type == "cpu"
    pairs = select_pairs(model, ReplayBuffer(3), BATCH)
    assert pairs.mix()[0].device.type == pairs.lam.device.type == "cpu" and pairs.summary()
    mixup = GradMix(model, BUFFER)
    mixup.mixup_enabled = False
    assert mixup(x, y)[1].device.type == "cpu"
