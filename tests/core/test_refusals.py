"""What the forward passes of a selection refuse: statistics of the batch, and worker processes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from gradmix import GradMix, alignment_matrix, reference_gradient, select_pairs
from gradmix.gradients import BatchStatisticsError, CoupledSamplesError

CLASSES = 4


def rows(n: int, seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *(shape or (3, 6, 6)), generator=generator)
    return x + torch.arange(n).view(-1, *[1] * (x.ndim - 1)) / 5, torch.arange(n) % CLASSES


def images(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )


class Functional(nn.Module):
    """Normalises by a function, by statistics of the batch also in evaluation mode."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.shape = function, shape
        self.body, self.fc = nn.Linear(12, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.function(self.body(x)).relu())


def emptied() -> nn.Module:
    """BatchNorm as torch.func's replace_all_batch_norm_modules_ leaves it."""
    model = images(nn.BatchNorm2d(8))
    torch.func.replace_all_batch_norm_modules_(model)
    return model


VECTORS = (12,)
COUPLED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm2d": (lambda: images(nn.BatchNorm2d(8, track_running_stats=False)), ()),
    "emptied by torch.func": (emptied, ()),
    "SyncBatchNorm": (lambda: images(nn.SyncBatchNorm(8, track_running_stats=False)), ()),
    "BatchNorm1d": (
        lambda: nn.Sequential(
            nn.Linear(12, 16), nn.BatchNorm1d(16, track_running_stats=False), nn.ReLU(), nn.Linear(16, CLASSES)
        ),
        VECTORS,
    ),
    "F.batch_norm": (lambda: Functional(lambda h: F.batch_norm(h, None, None, training=True)), VECTORS),
    "torch.batch_norm": (
        lambda: Functional(lambda h: torch.batch_norm(h, None, None, None, None, True, 0.1, 1e-5, False)),
        VECTORS,
    ),
    "F.batch_norm over positions": (
        lambda: Functional(lambda h: F.batch_norm(h.unflatten(1, (4, 4)), None, None, training=True).flatten(1)),
        VECTORS,
    ),
}


@pytest.mark.parametrize("estimator", ["feature", "mixed", "jvp", "sketch"])
@pytest.mark.parametrize("case", COUPLED)
def test_statistics_of_the_batch_are_refused(case: str, estimator: str) -> None:
    make, shape = COUPLED[case]
    buffer, batch = rows(12, 1, *shape), rows(6, 2, *shape)
    # What is no function of torch.nn.functional the engine knows by what it does.
    refused = (BatchStatisticsError, CoupledSamplesError) if case == "torch.batch_norm" else BatchStatisticsError
    for head in (None, "fc" if case.startswith(("F.", "torch.")) else str(len(make()) - 1)):  # type: ignore[arg-type]
        for call in (
            lambda head=head: reference_gradient(make(), buffer, head=head),
            lambda head=head: select_pairs(make(), buffer, batch, estimator=estimator, head=head),
            lambda head=head: select_pairs(make(), batch[1] == 1, batch, estimator=estimator, head=head),
            lambda head=head: GradMix(make(), buffer, estimator=estimator, criterion="class", head=head)(*batch),
            lambda head=head: alignment_matrix(make(), buffer, batch, lam=0.5, estimator=estimator, head=head),
        ):
            with pytest.raises(refused, match="statistics of the batch, expected running|depends on other samples"):
                call()


def test_a_refusal_leaves_no_hook() -> None:
    model = images(nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(BatchStatisticsError):
        select_pairs(model, rows(12, 1), rows(6, 2))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Standardised(nn.Conv2d):
    """A convolution whose weights are standardised by batch_norm, scaled before or not."""

    gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm((self.weight * self.gain).reshape(1, len(self.weight), -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


class Unused(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)
        self.body = images(nn.GroupNorm(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


SERVED: dict[str, Callable[[], nn.Module]] = {
    "running statistics": lambda: images(nn.BatchNorm2d(8)),
    "GroupNorm": lambda: images(nn.GroupNorm(2, 8)),
    "InstanceNorm": lambda: images(nn.InstanceNorm2d(8, track_running_stats=False)),
    "standardised weights": lambda: nn.Sequential(Standardised(3, 8, 3), *images(nn.Identity())[1:]),
    "a layer that is not used": Unused,
}


@pytest.mark.parametrize("case", SERVED)
def test_rows_that_do_not_depend_on_each_other_are_served(case: str) -> None:
    model = SERVED[case]()
    buffer, batch = rows(12, 1), rows(6, 2)
    whole, parts = (reference_gradient(model, buffer, chunk_size=size) for size in (12, 5))
    torch.testing.assert_close(whole, parts)
    a, b = (select_pairs(model, buffer, batch, lam=0.6, chunk_size=size).alignment for size in (12, 1))
    torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------------------- workers

X, Y = rows(8, 1, 12)
BUFFER = rows(12, 2, 12)
MODEL = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES))
IN_WORKERS: dict[str, Callable[[Any, Any], Any]] = {
    "select_pairs": lambda x, y: select_pairs(MODEL, BUFFER, (x, y)).mix(),
    "GradMix": GradMix(MODEL, BUFFER),
    "GradMix ": lambda x, y: GradMix(MODEL, BUFFER).select(x, y).mix(),
    "reference_gradient": lambda x, y: reference_gradient(MODEL, BUFFER),
    "alignment_matrix": lambda x, y: alignment_matrix(MODEL, BUFFER, (x, y), lam=0.5).inner,
}


@pytest.mark.parametrize("call", IN_WORKERS)
def test_a_worker_process_is_refused(call: str) -> None:
    def collate(pairs: list[Any]) -> Any:
        return IN_WORKERS[call](*default_collate(pairs))

    how: dict[str, Any] = {"batch_size": 8, "collate_fn": collate}
    with pytest.raises(RuntimeError, match=f"{call.strip()}: was called in a worker process of a DataLoader"):
        next(iter(DataLoader(TensorDataset(X, Y), num_workers=1, multiprocessing_context="fork", **how)))
    next(iter(DataLoader(TensorDataset(X, Y), **how)))  # in the process itself it is as good as in the loop
    for x, y in DataLoader(TensorDataset(X, Y), 8, num_workers=1, multiprocessing_context="fork"):
        IN_WORKERS[call](x, y)  # what the error says to do


@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("estimator", ["feature", "mixed", "jvp", "sketch"])
def test_a_buffer_of_another_shape_is_named(estimator: str, criterion: str) -> None:
    model, buffer = nn.Linear(4, CLASSES), rows(8, 0, 5)
    batch = rows(6, 1, 4)
    expected = r"^buffer: got samples of shape \(5,\), expected \(4,\) as the batch \(mat1 and mat2 shapes"
    with pytest.raises(ValueError, match=expected):
        GradMix(model, buffer, estimator=estimator, criterion=criterion)(*batch)
    with pytest.raises(ValueError, match=expected):
        select_pairs(model, DataLoader(TensorDataset(*buffer), 8), batch, estimator=estimator, criterion=criterion)
    with pytest.raises(ValueError, match=r"^buffer: got samples of shape \(4,\), expected \(5,\) as the batch"):
        select_pairs(model, batch, buffer, estimator=estimator, criterion=criterion)


def test_shapes_that_the_model_takes_may_differ() -> None:
    model = images(nn.GroupNorm(2, 8))
    large, small = rows(8, 0, 3, 9, 9), rows(6, 1)
    assert len(select_pairs(model, large, small)) == 6
    with pytest.raises(ValueError, match=r"^buffer: got samples of shape \(3, 9, 9\), expected \(3, 6, 6\) as the"):
        GradMix(model, large, estimator="mixed", criterion="class")(*small)


def test_another_failure_of_the_model_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="^mat1 and mat2 shapes"):
        select_pairs(nn.Linear(3, CLASSES), rows(8, 0, 4), rows(6, 1, 4))
