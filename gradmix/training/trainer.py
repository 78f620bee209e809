"""Class-incremental training with replay: one method, one seed, from the first task to the accuracy matrix.

A run can be left at any step and taken up again, to the bit (on one machine, with the same versions and number of
threads; a GPU's own kernels may round differently from one time to the next). Everything that the rest of the run
depends on is in the state that :class:`_Run` gives to :mod:`gradmix.training.checkpoint`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gradmix.buffers import ReplayBuffer
from gradmix.probe import preserved_rng
from gradmix.training import checkpoint as checkpoints
from gradmix.training.benchmarks import Task, TaskStream, resolve, stream_of
from gradmix.training.clock import Clock
from gradmix.training.config import MethodName, TrainConfig, to_dict
from gradmix.training.environment import describe_environment, pick_device
from gradmix.training.evaluation import evaluate
from gradmix.training.memory import peak_memory, start_peak_memory
from gradmix.training.methods import METHODS, Context, Method, Pixels, StepRows
from gradmix.training.models import build_model
from gradmix.training.optimiser import make_optimiser, make_schedule
from gradmix.training.random_state import restore_rng, rng_state
from gradmix.training.results import AlignmentRecord, RunResult, Timing
from gradmix.training.sampler import StepSampler
from gradmix.training.seeds import derived_seed, generator_for

LOSS_EVERY = 25
"""Steps between two losses shown: reading one waits for the device."""

CIRCUMSTANCES = ("methods", "seeds", "output", "device", "threads", "checkpoint", "data.data_dir")
"""Settings that do not tell one run from another: they change where and how it is made, not what is learnt."""


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


def settled(config: TrainConfig, method: str, seed: int) -> TrainConfig:
    """The complete configuration of one run: narrowed to it, and nothing left to the benchmark's or method's default.

    Raises:
        ValueError: an unknown method, or a setting out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(map(repr, METHODS))}")
    config = resolve(replace(config, methods=(cast(MethodName, method),), seeds=(seed,)))
    return METHODS[method].settled(config)


def train_one(
    config: TrainConfig,
    method: str,
    seed: int,
    *,
    stream: TaskStream | None = None,
    on_step: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
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
        checkpoint: a file. If it is there, the run goes on from it. It is replaced, whole or not at all, every
            ``checkpoint_seconds``, and when ``on_step`` raises KeyboardInterrupt; it is the caller's to remove.
        checkpoint_seconds: seconds between two checkpoints, at least; 0: after every step.

    Returns:
        The result; of status ``interrupted``, with what was reached, if a KeyboardInterrupt came.

    Raises:
        ValueError: a setting out of range, damaged data, or a checkpoint that is damaged, of another run or cannot be
            written (:class:`gradmix.training.checkpoint.CheckpointError`).
        FileNotFoundError: missing data.
    """
    config = settled(config, method, seed)
    if stream is None:
        stream = stream_of(config.data)
    device = pick_device(config.device)
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        with preserved_rng(device):
            torch.manual_seed(derived_seed(seed, "global"))
            run = _Run(config, method, seed, stream, device, on_step)
            if checkpoint is not None:
                run.keep_at(Path(checkpoint), checkpoint_seconds)
            return run.result()
    finally:
        torch.set_num_threads(threads)


def identity(config: TrainConfig) -> dict[str, Any]:
    """What makes a run the one it is: its settled configuration without :data:`CIRCUMSTANCES`, but method and seed."""
    plain = to_dict(config)
    for key in CIRCUMSTANCES:
        section, _, name = key.rpartition(".")
        del (plain[section] if section else plain)[name]
    return {"method": config.methods[0], "seed": config.seeds[0], **plain}


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
        assert optim.model and optim.epochs and optim.batch and replay.policy and replay.size
        self.epochs, self.batch = optim.epochs, optim.batch
        channels_last = optim.channels_last and len(stream.input_shape) == 3
        self.model = build_model(optim.model, stream.input_shape, stream.num_classes, seed=seed).to(device)
        if channels_last:
            # torch's annotation lacks the overload without a device.
            self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.buffer = ReplayBuffer(replay.size, policy=replay.policy, device=device, seed=seed)
        self.clock = Clock(device)
        self.sampler = StepSampler(config, seed, self.buffer, self.clock, device, channels_last=channels_last)
        self.generators = {**self.sampler.generators, "mixing": generator_for(seed, "mixing")}
        self.scaler = torch.amp.GradScaler(device.type, enabled=optim.amp == "fp16")
        self.counts = torch.zeros(stream.num_classes, dtype=torch.int64, device=device)
        self.method: Method = METHODS[method](
            Context(
                model=cast(nn.Module, torch.compile(self.model)) if optim.compile else self.model,
                buffer=self.buffer,
                num_classes=stream.num_classes,
                mix=config.mix,
                generator=self.generators["mixing"],
                clock=self.clock,
                replay=replay,
                counts=self.counts,
                draw_replayed=self.sampler.replayed,
                pixels=None if stream.mean is None or stream.std is None else Pixels(stream.mean, stream.std),
                autocast=self.autocast,
                scaler=self.scaler,
            )
        )
        tasks = len(stream.tasks)
        self.accuracy = np.full((tasks, tasks), np.nan)
        self.mixed_share = [float("nan")] * tasks
        self.alignments: list[AlignmentRecord] = []
        self.steps = 0
        self.steps_total = sum(self.epochs * -(-rows // self.batch) for rows in self.rows_per_epoch())
        self.seconds_before, self.peak_before = 0.0, 0
        # Where the run is: steps done of an epoch whose rows come in `order`; None: the task has not begun.
        self.task, self.epoch, self.batches_done = 0, 0, 0
        self.order: Tensor | None = None
        self.mixed, self.seen = torch.zeros((), dtype=torch.int64, device=device), 0
        self.optimiser: torch.optim.SGD
        self.schedule: torch.optim.lr_scheduler.MultiStepLR
        self.checkpoint: Path | None = None
        self.checkpoint_seconds = 0.0

    # ---------------------------------------------------------------------------------------------------- the course

    def result(self) -> RunResult:
        """Run to the end, or to a KeyboardInterrupt."""
        self.start = self.checkpoint_time = time.perf_counter()
        start_peak_memory(self.device)
        environment = describe_environment(self.device)
        status: Any = "complete"
        try:
            while self.task < len(self.stream.tasks):
                task = self.stream.tasks[self.task]
                self.learn(task)
                with self.clock("evaluation"):
                    self.accuracy[task.index] = evaluate(self.model, self.stream, self.device, self.autocast)
                self.task += 1
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
                seconds_total=self.seconds_total(),
                seconds_step=self.clock.seconds("step"),
                seconds_selection=self.clock.seconds("selection"),
                seconds_evaluation=self.clock.seconds("evaluation"),
                seconds_data=self.clock.seconds("data"),
                peak_memory_bytes=self.peak_memory(),
            ),
            config=self.config,
            mixed_share=tuple(self.mixed_share),
            alignments=tuple(self.alignments),
            environment=environment,
        )

    def learn(self, task: Task) -> None:
        """Train on one task, or on what is left of it, then show it to the buffer."""
        balanced = self.config.mix.candidates == "balanced" or self.method.wants_balanced
        own_x, own_y = self.sampler.start_task(task, replays=self.method.replays, balanced=balanced)
        self.count_classes(own_y)
        if self.order is None:
            self.start_optimiser()
            self.mixed.zero_()
            self.seen = 0
        self.model.train()
        while self.epoch < self.epochs:
            if self.order is None:
                self.method.start_epoch()
                self.order = self.sampler.epoch_order()
            batches = self.sampler.batches(self.order)
            for index in batches[self.batches_done :]:
                rows, loss = self.step(index)
                self.batches_done += 1
                self.steps += 1
                if self.batches_done == len(batches):
                    self.schedule.step()
                    if self.epoch == self.epochs - 1:
                        self.mixed_share[task.index] = int(self.mixed) / self.seen if self.seen else float("nan")
                        self.record_table(task, rows)
                # The last thing in a step: here a run may be left, and nothing is to be done twice or left out.
                self.after_step(task, loss)
            self.epoch, self.batches_done, self.order = self.epoch + 1, 0, None
        self.buffer.add(own_x, own_y, **self.method.extras(own_x, own_y))
        self.epoch = 0

    def step(self, index: Tensor) -> tuple[StepRows, Tensor]:
        """One step of the optimiser on the rows at ``index``; returns them and their loss, detached."""
        with self.clock("step"):
            with self.clock("data"):
                rows = self.sampler.rows(index)
            self.optimiser.zero_grad(set_to_none=True)
            loss = self.method.backward(rows)
            self.scaler.step(self.optimiser)
            self.scaler.update()
        count = self.method.mixed_rows()
        if count is not None:
            self.mixed += count
            self.seen += len(rows.y)
        return rows, loss

    def after_step(self, task: Task, loss: Tensor) -> None:
        """Tell the caller where the run is, and keep a checkpoint if it is due or the caller wants to stop."""
        try:
            self.report(task, loss)
        except KeyboardInterrupt:
            self.save()
            raise
        if self.checkpoint is not None and time.perf_counter() - self.checkpoint_time >= self.checkpoint_seconds:
            self.save()

    def report(self, task: Task, loss: Tensor) -> None:
        if self.on_step is None:
            return
        shown = float(loss) if self.steps % LOSS_EVERY == 0 else None
        self.on_step(
            Progress(
                self.method_name,
                self.seed,
                task.index + 1,
                len(self.stream.tasks),
                self.epoch + 1,
                self.epochs,
                self.steps,
                self.steps_total,
                shown,
            )
        )

    # ---------------------------------------------------------------------------------------- what a step is made of

    def count_classes(self, own_y: Tensor) -> None:
        """Bring the rows of each class that training draws from up to date."""
        labels = torch.cat([own_y, self.buffer.y]) if self.method.replays and len(self.buffer) else own_y
        self.counts.copy_(torch.bincount(labels, minlength=len(self.counts)))

    def rows_per_epoch(self) -> list[int]:
        """Rows of one epoch, by task."""
        own = [len(task.train_y) for task in self.stream.tasks]
        if self.config.replay.stream != "shuffled" or not self.method.replays:
            return own
        # What the buffer will hold depends on nothing but the labels, so a buffer of labels tells.
        assert self.config.replay.size is not None and self.config.replay.policy is not None
        labels = ReplayBuffer(self.config.replay.size, policy=self.config.replay.policy)
        rows = []
        for task, count in zip(self.stream.tasks, own, strict=True):
            rows.append(count + len(labels))
            labels.add(task.train_y.float(), task.train_y)
        return rows

    def start_optimiser(self) -> None:
        self.optimiser = make_optimiser(self.model, self.config.optim)
        self.schedule = make_schedule(self.optimiser, self.config.optim, self.epochs)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.optim.amp]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def record_table(self, task: Task, rows: StepRows) -> None:
        """Keep the class-pair alignment in force at the end of a task."""
        with self.autocast():
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

    def seconds_total(self) -> float:
        return self.seconds_before + time.perf_counter() - self.start

    def peak_memory(self) -> int:
        return max(self.peak_before, peak_memory(self.device))

    # --------------------------------------------------------------------------------------------------- checkpoints

    def keep_at(self, path: Path, seconds: float) -> None:
        """Keep checkpoints at ``path``, and go on from the one that is there."""
        self.checkpoint, self.checkpoint_seconds = path, seconds
        self.description = json.dumps(identity(self.config), indent=1)
        if path.is_file():
            self.load_state_dict(checkpoints.load(path, run=self.description))

    def save(self) -> None:
        """Replace the checkpoint, if one is to be kept."""
        if self.checkpoint is not None:
            checkpoints.save(self.state_dict(), self.checkpoint, run=self.description)
        self.checkpoint_time = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on, between two steps."""
        schedule = self.schedule.state_dict()
        return {
            "task": self.task,
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "order": self.order,
            "steps": self.steps,
            "mixed": int(self.mixed),
            "seen": self.seen,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            # A Counter is no plain dictionary.
            "schedule": {**schedule, "milestones": dict(schedule["milestones"])},
            "scaler": self.scaler.state_dict(),
            "buffer": self.buffer.state_dict(),
            "method": self.method.state_dict(),
            "generators": {purpose: generator.get_state() for purpose, generator in self.generators.items()},
            "global_generators": rng_state(self.device),
            "accuracy": torch.from_numpy(self.accuracy),
            "mixed_share": self.mixed_share,
            "alignments": [
                {
                    "task": record.task,
                    "classes": torch.from_numpy(record.classes),
                    "cosine": torch.from_numpy(record.cosine),
                    "helpful": torch.from_numpy(record.helpful),
                    "threshold": record.threshold,
                }
                for record in self.alignments
            ],
            "clock": self.clock.state_dict(),
            "seconds_total": self.seconds_total(),
            "peak_memory": self.peak_memory(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`."""
        self.task, self.epoch, self.batches_done = state["task"], state["epoch"], state["batches_done"]
        self.order, self.steps = state["order"], state["steps"]
        self.mixed.fill_(state["mixed"])
        self.seen = state["seen"]
        self.model.load_state_dict(state["model"])
        self.start_optimiser()
        self.optimiser.load_state_dict(state["optimiser"])
        milestones = type(self.schedule.milestones)(state["schedule"]["milestones"])
        self.schedule.load_state_dict({**state["schedule"], "milestones": milestones})
        self.scaler.load_state_dict(state["scaler"])
        self.buffer.load_state_dict(state["buffer"])
        self.method.load_state_dict(_moved(state["method"], self.device))
        for purpose, generator in self.generators.items():
            generator.set_state(state["generators"][purpose])
        restore_rng(state["global_generators"], self.device)
        self.accuracy = state["accuracy"].numpy()
        self.mixed_share = list(state["mixed_share"])
        self.alignments = [
            AlignmentRecord(
                task=record["task"],
                classes=record["classes"].numpy(),
                cosine=record["cosine"].numpy(),
                helpful=record["helpful"].numpy(),
                threshold=record["threshold"],
            )
            for record in state["alignments"]
        ]
        self.clock.load_state_dict(state["clock"])
        self.seconds_before, self.peak_before = state["seconds_total"], state["peak_memory"]


def _moved(value: Any, device: torch.device) -> Any:
    """A state with its tensors on a device; generators' states, which are bytes, belong on the CPU."""
    if isinstance(value, Tensor):
        return value if value.dtype == torch.uint8 else value.to(device)
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return [_moved(v, device) for v in value] if isinstance(value, list) else value
