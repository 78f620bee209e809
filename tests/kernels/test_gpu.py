"""Selection and training on a GPU: the same values, decisions and draws as in float64 on the CPU."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu import no_waiting
from models import NETWORKS, rows
from test_mixed_alignment import CASES, FAST, in_double, largest_inner, make, sides
from torch import Tensor, nn
from truth import assert_decisions_agree

import gradmix
from gradmix.ops.mixed_alignment import mixed_alignment, mixed_alignment_reference
from gradmix.training.config import DataConfig, MixConfig, OptimConfig, TrainConfig
from gradmix.training.loop.clock import Clock
from gradmix.training.loop.run import Run
from gradmix.training.loop.trainer import Progress, train_one
from gradmix.training.methods import METHODS
from gradmix.training.runs.metrics import average_accuracy
from gradmix.training.streams.benchmarks import make_stream

pytestmark = pytest.mark.gpu
BUFFER = rows(12, 3)


def on_gpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.cuda() for t in tensors)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_values_and_decisions(backend: str, case: str, dtype: torch.dtype) -> None:
    arguments = make(**CASES[case], dtype=dtype)
    truth = mixed_alignment_reference(*sides(in_double(arguments)), 0.3)
    result = mixed_alignment(*sides(on_gpu(*arguments)), 0.3, backend=backend)
    unit = 1e-12 if dtype == torch.float64 else 2e-6
    assert result.inner.is_cuda
    assert (result.inner.cpu() - truth.inner).abs().max() <= unit * largest_inner(arguments)
    if CASES[case].get("scale", 1.0) <= 30:
        assert_decisions_agree(result.inner.cpu(), truth.inner, band=1e-6 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_another_stream_and_back_to_back_calls(backend: str) -> None:
    arguments = on_gpu(*make(n=65, m=130, classes=257, d=33, dtype=torch.float32))
    expected = mixed_alignment(*sides(arguments), 0.3, backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results = [mixed_alignment(*sides(arguments), 0.3, backend=backend) for _ in range(10)]
    stream.synchronize()
    assert all(torch.equal(r.inner, expected.inner) and torch.equal(r.norm, expected.norm) for r in results)


@pytest.mark.parametrize("criterion", ["class", "sample"])
@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_a_cpu_generator_draws_the_same_pairs_on_both_devices(name: str, criterion: str) -> None:
    model, batch = NETWORKS[name]().double(), rows(9, 1, torch.float64)
    buffer = (BUFFER[0].double(), BUFFER[1])
    expected = gradmix.select_pairs(model, buffer, batch, criterion=criterion, generator=generator())
    there = copy.deepcopy(model).cuda()
    # The buffer stays on the CPU: its chunks are moved.
    pairs = gradmix.select_pairs(there, buffer, on_gpu(*batch), criterion=criterion, generator=generator())
    assert torch.equal(pairs.partner.cpu(), expected.partner) and torch.equal(pairs.lam.cpu(), expected.lam)
    x, y = pairs.mix()
    assert x.is_cuda and y.is_cuda
    torch.testing.assert_close(x.cpu(), expected.mix()[0])


@pytest.mark.parametrize("policy", ["uniform", "permute", "best"])
@pytest.mark.parametrize("estimator", ["feature", "mixed"])
def test_a_generator_of_the_gpu_serves_too(estimator: str, policy: str) -> None:
    model, batch = NETWORKS["convnet with batch norm"]().cuda(), on_gpu(*rows(9, 1))
    drawn = []
    for _ in range(2):
        source = torch.Generator("cuda").manual_seed(1)
        mixup = gradmix.GradMix(model, on_gpu(*BUFFER), estimator=estimator, policy=policy, generator=source)
        mixup(*batch)
        drawn.append(mixup.pairs.partner)
    assert torch.equal(*drawn)


def test_the_random_state_of_the_gpu_is_left_alone() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1) + 1e-3 * torch.randn(len(x), 192, device=x.device))

    model = Noisy().cuda()
    state = torch.cuda.get_rng_state()
    gradmix.select_pairs(model, BUFFER, on_gpu(*rows(6, 1)))
    assert torch.equal(torch.cuda.get_rng_state(), state)


def needs_kornia(method: str) -> None:
    if method.endswith("augment"):
        pytest.importorskip("kornia", reason="policies are drawn with kornia, which is not installed")


@pytest.mark.parametrize("method", METHODS)
def test_training_runs_and_is_timed_on_the_device(method: str) -> None:
    needs_kornia(method)
    config = TrainConfig(optim=OptimConfig(epochs=1), mix=MixConfig(originals=True), device="cuda")
    result = train_one(config, method, 0, stream=make_stream("split-digits"))
    assert result.status == "complete" and np.isfinite(result.accuracy).all()
    assert 0 < result.timing.seconds_step < result.timing.seconds_total
    assert 0 < result.timing.seconds_data < result.timing.seconds_step
    assert 2**20 < result.timing.peak_memory_bytes < 2**34


@pytest.mark.parametrize("method", ["er", "mixup", "a-gem", "gradmix-class", "gradmix-sample", "der++-gradmix-sample"])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns_as_float32_does(method: str, amp: str) -> None:
    stream = make_stream("split-digits")
    scores = []
    for precision in ("none", amp):
        config = TrainConfig(optim=OptimConfig(epochs=2, amp=precision), device="cuda")
        scores.append(average_accuracy(train_one(config, method, 0, stream=stream).accuracy))
    assert abs(scores[0] - scores[1]) < 0.08


@pytest.mark.parametrize("method", ["er", "gradmix-sample"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # what torch.compile itself imports
def test_the_path_of_cifar(method: str, compiled: bool) -> None:
    """Half precision, channels last, crops and flips, batch normalisation, a buffer on the device."""
    optim = OptimConfig(
        model="resnet8", epochs=6, lr=0.02, amp="bf16", channels_last=True, compile=compiled, augment="crop-flip"
    )
    stream = make_stream("split-digits", tasks=2)
    config = TrainConfig(data=DataConfig(tasks=2), optim=optim, device="cuda")
    result = train_one(config, method, 0, stream=stream)
    assert result.status == "complete" and result.accuracy[0, 0] > 0.6


WAIT_FOR_NOTHING = (
    "er",
    "mixup",
    "manifold-mixup",
    "cutmix",
    "remix",
    "balanced-mixup",
    "a-gem",
    "der++",
    "gradmix-class",
)


@pytest.mark.parametrize("method", [*WAIT_FOR_NOTHING, "gradmix-sample"])
def test_the_host_runs_ahead_of_the_steps(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step waits for the device, but for an epoch's first, in which a class table is made."""
    taken, watched = Run.step, []

    def step(run: Run, index: Tensor) -> object:
        if run.batches_done == 0:
            return taken(run, index)
        with no_waiting():
            watched.append(run.steps)
            return taken(run, index)

    monkeypatch.setattr(Run, "step", step)
    optim = OptimConfig(model="resnet8", epochs=2, amp="bf16", channels_last=True, augment="crop-flip")
    config = TrainConfig(data=DataConfig(tasks=2, samples_per_class=40), optim=optim, device="cuda")
    result = train_one(config, method, 0, stream=make_stream("split-digits", tasks=2, samples_per_class=40))
    assert result.status == "complete" and len(watched) == result.timing.steps - 4


@pytest.mark.parametrize("method", ["mixup", "gradmix-class", "gradmix-sample", "der++-gradmix-class"])
def test_a_run_goes_on_from_its_checkpoint(method: str, tmp_path: Path) -> None:
    """The same steps and, up to the rounding of sums whose order a GPU does not fix, the same accuracies."""
    stream = make_stream("split-digits", tasks=3)
    config = TrainConfig(data=DataConfig(tasks=3), optim=OptimConfig(epochs=2, amp="fp16"), device="cuda")
    whole = train_one(config, method, 0, stream=stream)

    def stop(progress: Progress) -> None:
        if progress.step in (1, 40, 61):
            raise KeyboardInterrupt

    path, parts = tmp_path / "run.pt", []
    for _ in range(4):
        parts.append(train_one(config, method, 0, stream=stream, on_step=stop, checkpoint=path))
    assert [part.status for part in parts] == ["interrupted"] * 3 + ["complete"]
    assert parts[-1].timing.steps == whole.timing.steps
    np.testing.assert_allclose(parts[-1].accuracy, whole.accuracy, atol=0.08)


def test_the_clock_reads_events() -> None:
    clock = Clock(torch.device("cuda"))
    x = torch.randn(2048, 2048, device="cuda")
    for _ in range(3):
        with clock("product"):
            x @ x
    assert 0 < clock.seconds("product") < 10 and clock.seconds("nothing") == 0
