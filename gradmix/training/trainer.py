"""Class-incremental training with replay: one method, one seed, from the first task to the accuracy matrix."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import gradmix
from gradmix.buffers import ReplayBuffer
from gradmix.head import logits_of
from gradmix.probe import preserved_rng, untouched
from gradmix.training.augment import random_crop_flip
from gradmix.training.benchmarks import Task, TaskStream, make_stream, resolve
from gradmix.training.clock import Clock
from gradmix.training.config import MethodName, OptimConfig, TrainConfig
from gradmix.training.methods import METHODS, Context, Method, StepRows
from gradmix.training.models import build_model
from gradmix.training.results import AlignmentRecord, RunResult, Timing

EVALUATION_ROWS = 1024
"""Rows forwarded at a time when scoring."""

LOSS_EVERY = 25
"""Steps between two losses shown: reading one waits for the device."""


@dataclass(frozen=True)
class Progress:
    """Where a run is, after a step. ``loss`` is None but for every :data:`LOSS_EVERY`-th step; counts start at 1."""

    method: str
    seed: int
    task: int
    tasks: int
    epoch: int
    epochs: int
    step: int
    steps_total: int
    loss: float | None


def train_one(
    config: TrainConfig,
    method: str,
    seed: int,
    *,
    stream: TaskStream | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> RunResult:
    """Train one method with one seed on all tasks of a benchmark.

    Two methods with the same seed start from the same weights, see the same batches in the same order and hold the same
    buffer: their difference is the method's.

    Args:
        config: fields left open are taken from the benchmark's protocol; ``methods`` and ``seeds`` are not read.
        method: key of :data:`gradmix.training.methods.METHODS`.
        seed: the training seed.
        stream: the benchmark's tasks if they were read already.
        on_step: called after every step.

    Returns:
        The result; of status ``interrupted``, with what was reached, if a KeyboardInterrupt came.

    Raises:
        ValueError: a setting out of range, or damaged data.
        FileNotFoundError: missing data.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(map(repr, METHODS))}")
    config = resolve(replace(config, methods=(cast(MethodName, method),), seeds=(seed,)))
    config = replace(config, mix=METHODS[method].settled(config.mix))
    data = config.data
    if stream is None:
        stream = make_stream(
            data.benchmark, data.data_dir, class_order_seed=data.class_order_seed, validation=data.validation
        )
    device = pick_device(config.device)
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        with preserved_rng(device):
            torch.manual_seed(derived_seed(seed, "global"))
            return _Run(config, method, seed, stream, device, on_step).result()
    finally:
        torch.set_num_threads(threads)


class _Run:
    """The state of one run."""

    def __init__(
        self,
        config: TrainConfig,
        method: str,
        seed: int,
        stream: TaskStream,
        device: torch.device,
        on_step: Callable[[Progress], None] | None,
    ) -> None:
        self.config, self.seed, self.stream, self.device, self.on_step = config, seed, stream, device, on_step
        self.method_name = method
        optim, replay = config.optim, config.replay
        assert optim.model and optim.epochs and optim.batch and replay.policy and replay.size and replay.batch
        self.epochs, self.batch, self.replay_batch = optim.epochs, optim.batch, replay.batch
        self.model = build_model(optim.model, stream.input_shape, stream.num_classes, seed=seed).to(device)
        self.buffer = ReplayBuffer(replay.size, policy=replay.policy, device=device, seed=seed)
        self.clock = Clock(device)
        self.batches = generator_for(seed, "batches")
        self.augmenting = generator_for(seed, "augmentation")
        self.candidates = generator_for(seed, "candidates")
        self.method: Method = METHODS[method](
            Context(self.model, self.buffer, stream.num_classes, config.mix, generator_for(seed, "mixing"), self.clock)
        )
        tasks = len(stream.tasks)
        self.accuracy = np.full((tasks, tasks), np.nan)
        self.mixed_share = [float("nan")] * tasks
        self.alignments: list[AlignmentRecord] = []
        self.steps = 0
        self.steps_total = sum(self.epochs * -(-len(task.train_y) // self.batch) for task in stream.tasks)

    def result(self) -> RunResult:
        """Run to the end, or to a KeyboardInterrupt."""
        start = time.perf_counter()
        environment = describe_environment(self.device)
        status: Any = "complete"
        try:
            for task in self.stream.tasks:
                self.learn(task)
                with self.clock("evaluation"):
                    self.accuracy[task.index] = evaluate(self.model, self.stream, self.device)
        except KeyboardInterrupt:
            status = "interrupted"
        return RunResult(
            benchmark=self.stream.name,
            method=self.method_name,
            seed=self.seed,
            status=status,
            class_names=self.stream.class_names,
            task_classes=tuple(task.classes for task in self.stream.tasks),
            accuracy=self.accuracy,
            timing=Timing(
                steps=self.steps,
                seconds_total=time.perf_counter() - start,
                seconds_step=self.clock.seconds("step"),
                seconds_selection=self.clock.seconds("selection"),
                seconds_evaluation=self.clock.seconds("evaluation"),
            ),
            config=self.config,
            mixed_share=tuple(self.mixed_share),
            alignments=tuple(self.alignments),
            environment=environment,
        )

    def learn(self, task: Task) -> None:
        """Train on one task, record its class table, then show it to the buffer."""
        x, y = task.train_x.to(self.device), task.train_y.to(self.device)
        optimiser = make_optimiser(self.model, self.config.optim)
        schedule = make_schedule(optimiser, self.config.optim, self.epochs)
        mixed, seen = torch.zeros((), dtype=torch.int64, device=self.device), 0
        rows: StepRows | None = None
        self.model.train()
        for epoch in range(self.epochs):
            self.method.start_epoch()
            for index in self.epoch_batches(len(y)):
                with self.clock("step"):
                    rows = self.step_rows(x, y, index.to(self.device), task)
                    loss = self.method.loss(rows)
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    optimiser.step()
                count = self.method.mixed_rows()
                if count is not None:
                    mixed, seen = mixed + count, seen + len(rows.y)
                self.steps += 1
                self.report(task, epoch, loss)
            schedule.step()
        if seen:
            self.mixed_share[task.index] = int(mixed) / seen
        if rows is not None:
            self.record_table(task, rows)
        self.buffer.add(x, y)

    def epoch_batches(self, count: int) -> Iterator[Tensor]:
        """Indices of the batches of one epoch; the last one may be smaller."""
        return iter(torch.randperm(count, generator=self.batches).split(self.batch))

    def step_rows(self, x: Tensor, y: Tensor, index: Tensor, task: Task) -> StepRows:
        """The step's current rows, then its replayed ones, with the weights of their losses."""
        step_x, step_y = x[index], y[index]
        current = len(step_y)
        weight = torch.full((current,), 1.0 / current, device=self.device)
        if self.method.replays and len(self.buffer):
            replay_x, replay_y = self.buffer.sample(self.replay_batch)
            step_x, step_y = torch.cat([step_x, replay_x]), torch.cat([step_y, replay_y])
            tau = self.config.replay.tau
            weight = torch.cat([weight, torch.full((len(replay_y),), tau / len(replay_y), device=self.device)])
        candidates = None
        if self.config.mix.candidates == "balanced":
            candidates = self.draw_candidates(x, y, task, len(step_y))
        if self.config.optim.augment == "crop-flip":
            step_x = random_crop_flip(step_x, generator=self.augmenting)
            if candidates is not None:
                candidates = (random_crop_flip(candidates[0], generator=self.augmenting), candidates[1])
        return StepRows(step_x, step_y, weight, candidates)

    def draw_candidates(self, x: Tensor, y: Tensor, task: Task, count: int) -> tuple[Tensor, Tensor]:
        """``count`` rows, each of a class drawn uniformly from those seen; old classes' rows come from the buffer."""
        old = len(self.buffer.classes) if self.method.replays else 0
        drawn = torch.randint(old + len(task.classes), (count,), generator=self.candidates)
        from_buffer = int((drawn < old).sum())
        picked = []
        for label, number in zip(*torch.unique(drawn[drawn >= old] - old, return_counts=True), strict=True):
            members = (y == task.classes[int(label)]).nonzero().squeeze(1)
            chosen = torch.randint(len(members), (int(number),), generator=self.candidates).to(self.device)
            picked.append(members[chosen])
        index = torch.cat(picked) if picked else torch.empty(0, dtype=torch.int64, device=self.device)
        parts = [(x[index], y[index])]
        if from_buffer:
            parts.append(self.buffer.draw_balanced(from_buffer, self.candidates))
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def record_table(self, task: Task, rows: StepRows) -> None:
        """Keep the class-pair alignment in force at the end of a task."""
        table = self.method.class_table(rows)
        if table is None or table.classes is None:
            return
        threshold = self.config.mix.threshold
        self.alignments.append(
            AlignmentRecord(
                task=task.index,
                classes=table.classes.cpu().numpy(),
                cosine=table.cosine.double().cpu().numpy(),
                helpful=table.helpful(threshold).cpu().numpy(),
                threshold=threshold,
            )
        )

    def report(self, task: Task, epoch: int, loss: Tensor) -> None:
        """Tell the caller where the run is."""
        if self.on_step is None:
            return
        shown = float(loss.detach()) if self.steps % LOSS_EVERY == 0 else None
        self.on_step(
            Progress(
                self.method_name,
                self.seed,
                task.index + 1,
                len(self.stream.tasks),
                epoch + 1,
                self.epochs,
                self.steps,
                self.steps_total,
                shown,
            )
        )


def evaluate(model: nn.Module, stream: TaskStream, device: torch.device) -> list[float]:
    """Accuracy on the test rows of every task, future ones included, among all classes; each in [0, 1]."""
    accuracies = []
    with untouched(model):
        for task in stream.tasks:
            correct = 0
            for x, y in zip(task.test_x.split(EVALUATION_ROWS), task.test_y.split(EVALUATION_ROWS), strict=True):
                correct += int((logits_of(model(x.to(device))).argmax(1) == y.to(device)).sum())
            accuracies.append(correct / len(task.test_y))
    return accuracies


def make_optimiser(model: nn.Module, optim: OptimConfig) -> torch.optim.SGD:
    """SGD as configured, with no momentum left over from the task before."""
    assert optim.lr is not None and optim.momentum is not None and optim.weight_decay is not None
    return torch.optim.SGD(model.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)


def make_schedule(
    optimiser: torch.optim.Optimizer, optim: OptimConfig, epochs: int
) -> torch.optim.lr_scheduler.MultiStepLR:
    """The learning rate divided by ten after each milestone, a share of the task's epochs."""
    milestones = sorted({max(1, round(share * epochs)) for share in optim.lr_milestones or ()})
    return torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.1)


def pick_device(name: str) -> torch.device:
    """The torch device called ``name``; for ``auto`` a GPU if there is one, else the CPU.

    Raises:
        ValueError: no such device, or it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: got {name!r}, expected auto, cpu or a device torch can use here ({reason})"
        ) from None
    return device


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, so that drawing more for one leaves the others as they are."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose of a run."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose))


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, threads and date, as plain values."""
    return {
        "gradmix": gradmix.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
