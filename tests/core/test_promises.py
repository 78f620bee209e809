"""What stays untouched, also after a failure: tensors, gradients, statistics, flags, hooks and random state."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import NETWORKS, ConvNet, rows
from torch import Tensor, nn

import gradmix
from gradmix.model.unchanged import leave_unchanged


def photograph(model: nn.Module, tensors: tuple[Tensor, ...]) -> dict:
    """Everything that must not change."""
    modules = list(model.modules())
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "versions": {k: v._version for k, v in model.state_dict(keep_vars=True).items()},
        "grad": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "training": [m.training for m in modules],
        "hooks": [
            {k: len(v) for k, v in vars(m).items() if k.endswith("_hooks") and isinstance(v, dict)} for m in modules
        ],
        "tensors": [t.clone() for t in tensors],
        "tensor versions": [t._version for t in tensors],
        "tensor flags": [(t.requires_grad, t.grad_fn) for t in tensors],
        "torch rng": torch.get_rng_state(),
        "numpy rng": np.random.get_state()[1].copy(),
        "python rng": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(v, w) for v, w in zip(a, b, strict=True))
    return a == b


def prepared(name: str) -> nn.Module:
    """A model in the middle of training: gradients there, one module in evaluation mode, one parameter frozen."""
    model = NETWORKS[name]()
    model.train()
    next(m for m in model.modules() if not list(m.children())).eval()
    out = model(rows(4, 9)[0])
    (out if isinstance(out, Tensor) else out.logits).sum().backward()
    next(model.parameters()).requires_grad_(False)
    return model


class NoisyDataset(torch.utils.data.Dataset):
    """Draws from every global generator, as augmenting data sets do."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return self.x[index] + 1e-3 * noise, self.y[index]


CALLS: dict[str, Callable] = {
    "select_pairs": lambda model, buffer, batch: gradmix.select_pairs(model, buffer, batch).mix(),
    "by class": lambda model, buffer, batch: gradmix.select_pairs(model, buffer, batch, criterion="class").mix(),
    "mixed inputs": lambda model, buffer, batch: gradmix.select_pairs(model, buffer, batch, estimator="mixed").mix(),
    "noisy data set": lambda model, buffer, batch: gradmix.select_pairs(model, NoisyDataset(*buffer), batch).mix(),
    "shuffling loader": lambda model, buffer, batch: gradmix.select_pairs(
        model, torch.utils.data.DataLoader(NoisyDataset(*buffer), batch_size=3, shuffle=True), batch
    ).mix(),
    "empty buffer": lambda model, buffer, batch: gradmix.select_pairs(model, gradmix.ReplayBuffer(1), batch).mix(),
    "GradMix": lambda model, buffer, batch: gradmix.GradMix(model, buffer)(*batch),
    "GradMix by class": lambda model, buffer, batch: gradmix.GradMix(model, buffer, criterion="class")(*batch),
    "reference_gradient": lambda model, buffer, batch: gradmix.reference_gradient(model, buffer),
    "alignment_matrix": lambda model, buffer, batch: gradmix.alignment_matrix(model, buffer, batch, lam=0.5),
    "sample_gradients": lambda model, buffer, batch: gradmix.sample_gradients(model, batch, rank=4, chunk_size=4),
    "class_gradients": lambda model, buffer, batch: gradmix.class_gradients(model, buffer, rank=4, chunk_size=3),
    "class_gradients of a noisy data set": lambda model, buffer, batch: gradmix.class_gradients(
        model, NoisyDataset(*buffer), rank=4
    ),
}


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_nothing_is_touched(name: str, call: str) -> None:
    model, batch, buffer = prepared(name), rows(6, 1), rows(8, 2)
    batch[0].requires_grad_()
    before = photograph(model, (*batch, *buffer))
    CALLS[call](model, buffer, batch)
    after = photograph(model, (*batch, *buffer))
    changed = [k for k in before if not same(before[k], after[k])]
    assert not changed


class Failing(ConvNet):
    """Raises at its ``when``-th forward pass from now, half-way through."""

    when = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        self.when -= 1
        if self.when == 0:
            raise RuntimeError("out of luck")
        return self.fc(h)


@pytest.mark.parametrize("when", range(1, 6))
@pytest.mark.parametrize("call", [c for c in CALLS if c != "empty buffer"], ids=str)
def test_nothing_is_touched_when_the_model_raises(call: str, when: int) -> None:
    model, batch, buffer = Failing().train(), rows(6, 1), rows(8, 2)
    model.body[1].eval()
    before = photograph(model, (*batch, *buffer))
    object.__setattr__(model, "when", when)
    try:
        CALLS[call](model, buffer, batch)
        assert model.when > 0 or when > 1  # fewer forward passes than that
    except RuntimeError as error:
        assert str(error) == "out of luck"
    after = photograph(model, (*batch, *buffer))
    assert [k for k in before if not same(before[k], after[k])] == []


def test_the_failures_above_do_happen() -> None:
    model = Failing()
    for when in (1, 2, 3):
        model.when = when
        with pytest.raises(RuntimeError, match="out of luck"):
            gradmix.select_pairs(model, rows(8, 2), rows(6, 1), estimator="mixed")
        gradmix.model.head._found.pop(model, None)


def test_a_refresh_that_fails_leaves_what_was_kept() -> None:
    model, buffer = Failing(), rows(8, 2)
    mixup = gradmix.GradMix(model, buffer, generator=torch.Generator().manual_seed(0), criterion="class")
    mixup(*rows(6, 1))
    reference, table, state = mixup.reference, mixup.table, mixup.state_dict()
    model.when = 2
    with pytest.raises(RuntimeError, match="out of luck"):
        mixup(*rows(6, 3))
    assert mixup.reference is reference and mixup.table is table
    assert same(mixup.state_dict(), state)


def test_batch_norm_reads_its_running_statistics_and_dropout_is_off() -> None:
    model = ConvNet().train()
    model(rows(16, 4)[0] * 3)
    first, second = (gradmix.reference_gradient(model, rows(6, 1)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, gradmix.reference_gradient(model.eval(), rows(6, 1)))


def test_models_that_override_train_are_not_called_back() -> None:
    class Merging(ConvNet):
        """Merges adapters in train() and eval(), as low-rank adapters do."""

        calls = 0

        def train(self, mode: bool = True) -> nn.Module:
            self.calls += 1
            return super().train(mode)

    model = Merging()
    calls = model.calls
    gradmix.select_pairs(model, rows(5, 2), rows(4, 1))
    assert model.calls == calls


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compiled", "parallel"]
)
@pytest.mark.parametrize("estimator", ["feature", "mixed"])
def test_wrapped_models_are_looked_into_and_their_wrapper_is_not_called(estimator: str, wrap: Callable) -> None:
    model, buffer, batch = ConvNet(), rows(8, 2), rows(6, 1)
    wrapped, calls = wrap(model), []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    given = {"estimator": estimator, "lam": 0.3, "criterion": "sample"}
    expected = gradmix.select_pairs(model, buffer, batch, **given)
    result = gradmix.select_pairs(wrapped, buffer, batch, **given)
    assert torch.equal(result.alignment, expected.alignment)
    assert gradmix.GradMix(wrapped, buffer, estimator=estimator)(*batch)[0].shape == batch[0].shape
    assert torch.equal(gradmix.reference_gradient(wrapped, buffer), gradmix.reference_gradient(model, buffer))
    by_class = [gradmix.class_gradients(m, buffer, rank=3).vectors for m in (wrapped, model)]
    assert torch.equal(*by_class)
    assert calls == []


def test_untouched_restores_after_an_exception() -> None:
    model = ConvNet().train()
    with pytest.raises(KeyError), leave_unchanged(model):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        torch.rand(3)
        raise KeyError
    assert all(m.training for m in model.modules()) and torch.is_grad_enabled()


@pytest.mark.parametrize("criterion", ["class", "sample"])
@pytest.mark.parametrize("policy", ["uniform", "permute", "best"])
def test_the_same_generator_gives_the_same_result(policy: str, criterion: str) -> None:
    model, buffer, batch = ConvNet(), rows(8, 2), rows(9, 1)

    def draw(seed: int) -> tuple:
        pairs = gradmix.select_pairs(
            model, buffer, batch, policy=policy, criterion=criterion, generator=torch.Generator().manual_seed(seed)
        )
        return pairs.partner.tolist(), pairs.lam.tolist()

    torch.manual_seed(1)
    first = draw(7)
    torch.manual_seed(2)
    assert draw(7) == first
    assert any(draw(seed) != first for seed in range(8, 12))


def test_without_a_generator_the_global_seed_makes_a_program_repeatable() -> None:
    model, buffer, batch = ConvNet(), rows(8, 2), rows(9, 1)

    def program(seed: int) -> list:
        torch.manual_seed(seed)
        return [gradmix.select_pairs(model, buffer, batch).lam.tolist() for _ in range(3)]

    first = program(11)
    other = program(12)
    assert first == program(11) != other
    assert first[0] != first[1]


def test_autograd_of_the_callers_step_goes_on() -> None:
    model = ConvNet()
    x, y = gradmix.select_pairs(model, rows(8, 2), rows(6, 1)).mix()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_inside_autocast_the_callers_context_is_left() -> None:
    model = ConvNet()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = gradmix.select_pairs(model, rows(8, 2), rows(6, 1))
        assert model(rows(2)[0]).dtype == torch.bfloat16
        gradients = gradmix.class_gradients(model, rows(8, 2), rank=4)
        assert model(rows(2)[0]).dtype == torch.bfloat16
    assert pairs.alignment.dtype == gradients.vectors.dtype == torch.float32


@pytest.mark.parametrize(
    "use", ["select_pairs", "GradMix", "class_gradients", "sample_gradients", "reference_gradient"]
)
def test_inside_autocast_the_callers_next_pass_still_has_gradients(use: str) -> None:
    """Half-precision copies of weights that a pass without autograd made must not serve the caller's own pass."""
    model, batch, buffer = ConvNet().eval(), rows(8, 2), rows(6, 1)
    calls = {
        "select_pairs": lambda: gradmix.select_pairs(model, buffer, batch),
        "GradMix": lambda: gradmix.GradMix(model, buffer, criterion="sample")(*batch),
        "class_gradients": lambda: gradmix.class_gradients(model, batch, rank=4),
        "sample_gradients": lambda: gradmix.sample_gradients(model, batch, rank=4),
        "reference_gradient": lambda: gradmix.reference_gradient(model, buffer),
    }
    found = []
    for called in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.is_autocast_cache_enabled()
            if called:
                calls[use]()
            assert torch.is_autocast_cache_enabled()
            loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().sum() > 0 for g in found[0])
    assert all(torch.equal(alone, after) for alone, after in zip(*found, strict=True))


class InPlace(nn.Module):
    """Normalises its input in place, as it may in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x.sub_(0.5).mul_(2)).tanh())


@pytest.mark.parametrize("estimator", ["feature", "mixed", "jvp", "sketch"])
@pytest.mark.parametrize("criterion", ["sample", "class"])
def test_a_model_that_writes_into_its_input_changes_copies(estimator: Any, criterion: Any) -> None:
    model = InPlace().double()
    given = {name: (torch.randn(9, 6).double(), torch.arange(9) % 4) for name in ("buffer", "batch", "candidates")}
    before = {name: x.clone() for name, (x, _) in given.items()}

    for call in (
        lambda: gradmix.select_pairs(model, **given, estimator=estimator, criterion=criterion),
        lambda: gradmix.alignment_matrix(model, **given, lam=0.3, estimator=estimator, criterion=criterion),
        lambda: gradmix.GradMix(model, given["buffer"], estimator=estimator, criterion=criterion)(*given["batch"]),
        lambda: gradmix.reference_gradient(model, given["buffer"]),
        lambda: gradmix.HeadCapture(model, example=given["batch"][0]),
    ):
        call()
        assert all(torch.equal(given[name][0], x) for name, x in before.items())
