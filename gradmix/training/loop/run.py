"""One training run: its parts, its steps, and the state from which it goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradmix.calibration.agreement import agree
from gradmix.model.head import resolve_head
from gradmix.model.unchanged import ModelNotFiniteError
from gradmix.replay.buffer import ReplayBuffer
from gradmix.replay.sources import SampleSource
from gradmix.runtime.collectives import Group, all_reduce_sum, any_rank, broadcast_object, rank_of, size_of
from gradmix.training.config import TrainConfig
from gradmix.training.data.samples import StoredSamples
from gradmix.training.loop import checkpoint as checkpoints
from gradmix.training.loop import distributed, run_state
from gradmix.training.loop.clock import Clock
from gradmix.training.loop.divergence import DivergedError, LossWatch
from gradmix.training.loop.environment import describe_environment
from gradmix.training.loop.evaluation import evaluate
from gradmix.training.loop.keeping_sampler import KeepingSampler
from gradmix.training.loop.memory import peak_memory, start_peak_memory
from gradmix.training.loop.optimiser import make_optimiser, make_schedule
from gradmix.training.loop.preparation import Preparation
from gradmix.training.loop.reading import KeptSamples, Reading
from gradmix.training.loop.reading_sampler import ReadingSampler
from gradmix.training.loop.run_parts import Position, Records
from gradmix.training.loop.sampler import ResidentSampler, StepSampler
from gradmix.training.methods import Context, Method, Passes, Pixels, StepSamples, find_method
from gradmix.training.models import build_model
from gradmix.training.models.growing_head import extend_state, grow_head
from gradmix.training.models.single_sample import serve_single_samples
from gradmix.training.runs.results import AlignmentRecord, RunResult, Timing
from gradmix.training.runs.settings import identity
from gradmix.training.seeds import derive_seed, generator_for
from gradmix.training.streams import Task, TaskStream

LOSS_EVERY = 25
"""Steps between two losses shown, or looked at for not being finite: reading one waits for a GPU."""


@dataclass(frozen=True)
class Progress:
    """The position of a run after a step. ``loss`` is None but for every :data:`LOSS_EVERY`-th; counts start at 1."""

    method: str
    seed: int
    task: int
    tasks: int
    epoch: int
    epochs: int
    step: int
    steps_total: int
    loss: float | None


class Run:
    """One run: its parts, and where it is.

    Args:
        config: the complete configuration, of one method and one seed.
        stream: the tasks.
        device: where it is computed.
        on_step: called after every step.
        group: the processes that make every step together; None: this one alone.
        folder: where a buffer on disk lies.
    """

    def __init__(
        self,
        config: TrainConfig,
        stream: TaskStream,
        device: torch.device,
        on_step: Callable[[Progress], None] | None,
        group: Group = None,
        folder: Path | None = None,
    ) -> None:
        self.config, self.stream, self.device, self.on_step, self.group = config, stream, device, on_step, group
        (self.method_name,), (self.seed,) = config.methods, config.seeds
        optim, replay = config.optim, config.replay
        assert optim.model and optim.epochs and optim.batch and replay.policy and replay.size
        self.epochs, self.online = optim.epochs, config.data.online
        channels_last = optim.channels_last and len(stream.input_shape) == 3
        width = len(stream.tasks[0].classes) if optim.growing_head else stream.num_classes
        self.model = build_model(
            optim.model, stream.input_shape, width, seed=self.seed, vocabulary=stream.vocabulary
        ).to(device)
        if channels_last:
            # torch's annotation lacks the overload without a device.
            self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.width = width
        # Of samples that are read from files the buffer holds the numbers, which are looked up on the host.
        self.keeps_numbers = stream.is_read and replay.storage is None and not config.data.online
        self.buffer = ReplayBuffer(
            replay.size,
            policy=replay.policy,
            device=torch.device("cpu") if self.keeps_numbers else device,
            seed=self.seed,
            folder=folder if replay.storage == "disk" else None,
        )
        self.clock = Clock(device)
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        self.preparation = Preparation(stream, optim.augment, channels_last=channels_last, dtype=dtype)
        self.reading = Reading(config.data.workers, skip_damaged=config.data.skip_damaged, device=device)
        source = self._make_sampler()
        self.generators = {**self.sampler.generators, "mixing": generator_for(self.seed, "mixing")}
        self.scaler = torch.amp.GradScaler(device.type, enabled=optim.amp == "fp16")
        self.counts = torch.zeros(stream.num_classes, dtype=torch.int64, device=device)
        if group is not None:
            self.model = distributed.with_shared_statistics(self.model, device)
        serve_single_samples(self.model)
        self.differing = [] if group is None else distributed.local_buffers(self.model)
        self.method: Method = find_method(self.method_name)(self._context(source))
        self.records = Records(len(stream.tasks))
        self.position = Position(mixed=torch.zeros((), dtype=torch.int64, device=device))
        self.steps_total = sum(self.epochs * -(-samples // optim.batch) for samples in self.samples_per_epoch())
        self.seconds_before, self.peak_before = 0.0, 0
        self.losses = LossWatch(device, group)
        self.optimiser: torch.optim.SGD | None = None
        self.schedule: torch.optim.lr_scheduler.MultiStepLR
        self.checkpoint: Path | None = None
        self.checkpoint_seconds = 0.0
        self.wants_to_stop = self.all_stop = False

    def _make_sampler(self) -> SampleSource | None:
        """Make the sampler of steps; return what the reference gradient reads, if that is not the buffer itself."""
        kind: type[StepSampler] = ResidentSampler
        if self.stream.is_read:
            kind = ReadingSampler if self.keeps_numbers else KeepingSampler
        self.sampler = kind(self.config, self.buffer, self.clock, self.preparation, self.reading, self.group)
        train = self.stream.tasks[0].train
        if not self.stream.is_read and not self.preparation.changes(train):
            return None
        items = cast(StoredSamples, train).items if self.keeps_numbers else None
        return KeptSamples(self.buffer, self.preparation, self.reading, items).as_source()

    def _context(self, source: SampleSource | None) -> Context:
        """Return what the method is built from."""
        mean, std = self.stream.mean, self.stream.std
        return Context(
            model=self.wrap_model(),
            buffer=self.buffer,
            num_classes=self.stream.num_classes,
            mix=self.config.mix,
            generator=self.generators["mixing"],
            clock=self.clock,
            replay=self.config.replay,
            counts=self.counts,
            draw_replayed=self.sampler.draw_replayed,
            pixels=None if mean is None or std is None else Pixels(mean, std),
            source=source,
            passes=Passes(self.autocast, self.scaler, self.config.optim.accumulate or 1, self.group),
            growing=self.config.optim.growing_head,
        )

    def wrap_model(self) -> nn.Module:
        """The model as the loss is to see it: compiled, and its gradients averaged over the processes."""
        model = cast(nn.Module, torch.compile(self.model)) if self.config.optim.compile else self.model
        return model if self.group is None else distributed.wrap(model, self.device, self.group)

    # ---------------------------------------------------------------------------------------------------- the course

    def result(self) -> RunResult:
        """Run to the end, or until it is interrupted or has diverged."""
        self.start = self.checkpoint_time = time.perf_counter()
        start_peak_memory(self.device)
        agree(self.group, self.device)  # before it is recorded which kernels are used
        environment = describe_environment(self.device) | distributed.environment(self.config.optim.batch, self.group)
        status: Any = "complete"
        try:
            while self.position.task < len(self.stream.tasks):
                task = self.stream.tasks[self.position.task]
                self.learn(task)
                with self.clock("evaluation"):
                    self.records.accuracy[task.index] = evaluate(
                        self.model,
                        self.stream,
                        self.device,
                        self.autocast,
                        self.preparation.for_testing,
                        self.reading,
                        self.group,
                    )
                self.position.task += 1
        except KeyboardInterrupt:
            status = "interrupted"
        except (DivergedError, ModelNotFiniteError):
            # Selection notices it before there is a loss.
            status = "diverged"
        finally:
            self.sampler.close()
        return RunResult(
            benchmark=self.stream.name,
            method=self.method_name,
            seed=self.seed,
            status=status,
            class_names=self.stream.class_names,
            task_classes=tuple(task.classes for task in self.stream.tasks),
            accuracy=self.records.accuracy,
            timing=Timing(
                steps=self.position.steps,
                seconds_total=self.seconds_total(),
                seconds_step=self.clock.seconds("step"),
                seconds_selection=self.clock.seconds("selection"),
                seconds_evaluation=self.clock.seconds("evaluation"),
                seconds_data=self.clock.seconds("data"),
                peak_memory_bytes=self.peak_memory(),
                steady=self.clock.steps.steady(),
            ),
            config=self.config,
            mixed_share=tuple(self.records.mixed_share),
            alignments=tuple(self.records.alignments),
            environment=environment,
        )

    def learn(self, task: Task) -> None:
        """Train on one task, or on what is left of it, then show it to the buffer; online, that step by step."""
        position = self.position
        self.sampler.start_task(task, self.method)
        self.count_classes(task.train.y)
        if position.order is None:
            if not self.online:
                # Online, the head grows with the first sample of a class.
                self.grow(task.train.y)
            if self.optimiser is None or not self.online:
                self.start_optimiser()
            position.mixed.zero_()
            position.seen = 0
        self.model.train()
        if self.config.optim.compile:
            # A batch with replayed samples, or another head, is compiled anew.
            self.clock.warm_up()
        while position.epoch < self.epochs:
            if position.order is None:
                if not self.online or task.index == 0:
                    self.method.start_epoch()
                position.order = self.sampler.epoch_order()
            steps = self.sampler.steps_of(position.order)
            self.sampler.start_epoch(position.order, position.batches_done)
            while position.batches_done < steps:
                samples, loss = self.step()
                position.batches_done += 1
                position.steps += 1
                self.losses.note(loss)
                if self.online:
                    self.show(*self.sampler.step_samples())
                    self.schedule.step()
                if position.batches_done == steps or position.steps % LOSS_EVERY == 0:
                    self.losses.look()
                if position.batches_done == steps:
                    if not self.online:
                        self.schedule.step()
                    if position.epoch == self.epochs - 1:
                        self.records.mixed_share[task.index] = (
                            int(position.mixed) / position.seen if position.seen else float("nan")
                        )
                        self.record_table(task, samples)
                # The last thing in a step: here a run may be left, and nothing is to be done twice or left out.
                self.after_step(task, loss)
            position.epoch, position.batches_done, position.order = position.epoch + 1, 0, None
        if not self.online:
            for x, y in self.sampler.own_samples():
                self.show(x, y)
        position.epoch = 0

    def step(self) -> tuple[StepSamples, Tensor]:
        """One step of the optimiser on the next samples; returns them and their loss, detached."""
        if self.group is not None:
            # Other numbers in every process, for dropout, that follow from where the run is.
            torch.manual_seed(derive_seed(self.seed, f"global/{rank_of(self.group)}/{self.position.steps}"))
        with self.clock("step"):
            with self.clock("data"):
                samples = self.sampler.samples()
            if self.online:
                # By all current samples: of a step that several processes share, this one may have some only.
                _, y = self.sampler.step_samples()
                self.grow(y)
                self.counts += torch.bincount(y, minlength=len(self.counts))
            assert self.optimiser is not None
            self.optimiser.zero_grad(set_to_none=True)
            if self.is_empty(samples):
                return samples, torch.zeros((), device=self.device)
            loss = self.method.backward(samples)
            self.scaler.step(self.optimiser)
            self.scaler.update()
            if self.differing:
                distributed.share_buffers(self.differing, self.group)
        count = self.method.mixed_samples()
        if count is not None:
            self.position.mixed += count
            self.position.seen += len(samples.y)
        return samples, loss

    def is_empty(self, samples: StepSamples) -> bool:
        """Whether a step has no samples at all, as where all of them were damaged: then nothing is learnt in it.

        Of several processes that are given their shares alone none knows it of the others.
        """
        return not len(samples.y) and (self.group is None or self.method.needs.whole_step)

    def show(self, x: Tensor, y: Tensor) -> None:
        """Show samples to the buffer, with what the method wants to keep with them."""
        self.buffer.add(x, y, **self.extras(x, y))

    def extras(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The extras that the method keeps with samples, or with those that are to be read from files."""
        if not self.method.needs.extras:
            return {}
        if not self.keeps_numbers:
            return self.method.extras(self.preparation.for_testing(x.to(self.device)), y.to(self.device))
        samples = StoredSamples(cast(StoredSamples, self.stream.tasks[0].train).items, y, x)
        parts = [
            self.method.extras(self.preparation.for_testing(read.to(self.device)), labels.to(self.device))
            for read, labels in self.reading.batches(samples, 256)
        ]
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    def grow(self, y: Tensor) -> None:
        """Give a growing head an output for each of the classes ``y`` that are new."""
        if not self.config.optim.growing_head or self.width == self.stream.num_classes or not len(y):
            return
        needed = int(y.max()) + 1
        if needed > self.width:
            self.grow_to(needed)

    def grow_to(self, width: int) -> None:
        """Replace the head by one of ``width`` outputs, with the optimiser's state and the method's model."""
        sample = self.stream.tasks[0].train.read(torch.zeros(1, dtype=torch.int64)).to(self.device)
        old = resolve_head(self.model, None, self.preparation.for_testing(sample)).module
        new = grow_head(self.model, width, seed=self.seed, head=old)
        self.width = width
        if self.optimiser is not None:
            extend_state(self.optimiser, old, new)
        if self.group is not None:
            # Its gradients are gathered for the parameters it was made with.
            self.method.context.model = self.wrap_model()
        # What is kept of the head's gradient has the former width.
        self.method.start_epoch()

    def after_step(self, task: Task, loss: Tensor) -> None:
        """Tell the caller where the run is, and keep a checkpoint if it is due or the caller wants to stop."""
        try:
            self.report(task, loss)
        except KeyboardInterrupt:
            self.wants_to_stop = True
        # Several processes stop at the same step, which they have to agree on.
        if self.group is not None and self.position.steps % distributed.AGREE_EVERY == 0:
            wanted = torch.tensor([self.wants_to_stop], device=self.device)
            self.wants_to_stop = self.all_stop = bool(any_rank(wanted, self.group))
        if self.wants_to_stop and (self.group is None or self.all_stop):
            self.save()
            raise KeyboardInterrupt
        if self.checkpoint is not None and time.perf_counter() - self.checkpoint_time >= self.checkpoint_seconds:
            self.save()

    def report(self, task: Task, loss: Tensor) -> None:
        """Call ``on_step``; the loss, a mean over the processes, only in every :data:`LOSS_EVERY`-th step."""
        if self.position.steps % LOSS_EVERY == 0 and self.group is not None:
            (total,) = all_reduce_sum([loss], self.group)
            loss = total / size_of(self.group)
        if self.on_step is None:
            return
        shown = float(loss) if self.position.steps % LOSS_EVERY == 0 else None
        self.on_step(
            Progress(
                self.method_name,
                self.seed,
                task.index + 1,
                len(self.stream.tasks),
                self.position.epoch + 1,
                self.epochs,
                self.position.steps,
                self.steps_total,
                shown,
            )
        )

    # ---------------------------------------------------------------------------------------- what a step is made of

    def count_classes(self, own_y: Tensor) -> None:
        """Bring the samples of each class that training draws from up to date; online, those that have come so far."""
        if self.online:
            for label, count in self.buffer.seen_per_class.items():
                self.counts[label] = count
            return
        replays = self.method.needs.replayed and len(self.buffer)
        labels = torch.cat([own_y, self.buffer.y.cpu()]) if replays else own_y
        self.counts.copy_(torch.bincount(labels, minlength=len(self.counts)))

    def samples_per_epoch(self) -> list[int]:
        """Samples of one epoch, by task."""
        own = [len(task.train) for task in self.stream.tasks]
        if self.config.replay.stream != "shuffled" or not self.method.needs.replayed:
            return own
        # What the buffer will hold depends on nothing but the labels, so a buffer of labels tells.
        assert self.config.replay.size is not None and self.config.replay.policy is not None
        labels = ReplayBuffer(self.config.replay.size, policy=self.config.replay.policy)
        samples = []
        for task, count in zip(self.stream.tasks, own, strict=True):
            samples.append(count + len(labels))
            labels.add(task.train.y.float(), task.train.y)
        return samples

    def start_optimiser(self) -> None:
        """Make the optimiser and the schedule of its learning rate."""
        self.optimiser = make_optimiser(self.model, self.config.optim)
        length = self.steps_total if self.online else self.epochs
        self.schedule = make_schedule(self.optimiser, self.config.optim, length)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.optim.amp]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def record_table(self, task: Task, samples: StepSamples) -> None:
        """Keep the class-pair alignment in force at the end of a task, whose last step's samples these are."""
        if self.is_empty(samples):
            return
        with self.autocast():
            table = self.method.class_table(samples)
        if table is None or table.classes is None:
            return
        threshold = self.config.mix.threshold
        self.records.alignments.append(
            AlignmentRecord(
                task=task.index,
                classes=table.classes.cpu().numpy(),
                cosine=table.cosine.double().cpu().numpy(),
                helpful=table.helpful(threshold).cpu().numpy(),
                threshold=threshold,
            )
        )

    def seconds_total(self) -> float:
        """Return the run's seconds so far, those before a checkpoint included."""
        return self.seconds_before + time.perf_counter() - self.start

    def peak_memory(self) -> int:
        """Return the run's peak memory so far, in bytes."""
        return max(self.peak_before, peak_memory(self.device))

    # --------------------------------------------------------------------------------------------------- checkpoints

    def keep_at(self, path: Path, seconds: float) -> None:
        """Keep checkpoints at ``path``, and go on from the one that is there."""
        self.checkpoint, self.checkpoint_seconds = path, seconds
        self.description = json.dumps(identity(self.config), indent=1)

        state: dict[str, Any] | None = None
        failure = ""
        try:
            # Of several processes only the first one need find it.
            if rank_of(self.group) == 0 and path.is_file():
                state = checkpoints.load(path, run=self.description)
        except checkpoints.CheckpointError as error:
            failure = str(error)
        state, failure = broadcast_object((state, failure), self.group)
        if failure:
            raise checkpoints.CheckpointError(failure)
        if state is not None:
            try:
                run_state.load_state_dict(self, state)
            except KeyError as error:
                raise checkpoints.CheckpointError(
                    f"{path}: whole, but of an earlier version of gradmix, which did not keep {error}; go on with that "
                    "version, or remove the file to start the run again"
                ) from error
            except OSError:
                raise
            except Exception as error:
                raise checkpoints.CheckpointError(
                    f"{path}: whole, but no state of this run ({error}); remove the file to start the run again"
                ) from error

    def save(self) -> None:
        """Replace the checkpoint, if one is to be kept."""
        if self.checkpoint is not None and rank_of(self.group) == 0:
            checkpoints.save(run_state.state_dict(self), self.checkpoint, run=self.description)
        self.checkpoint_time = time.perf_counter()
