"""Trains at ImageNet's shape on generated JPEGs, with and without selection in turn: images a second of each way.

JPEGs are written in the layout of an image folder, and the package trains on them as it always does: tasks of new
classes, a replay buffer, samples decoded by worker processes and augmented on the device. In the last task, blocks of
steps by several methods take turns on one network. See bench/README.md for the rules.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _jpegs import Folder, write_folder
from _measure import (
    begin,
    check_places,
    count,
    finish,
    load_average,
    machine,
    machine_line,
    paired_ratio,
    quantiles,
    say,
    show_bytes,
    show_table,
    show_time,
    synchronize,
)
from torch import Tensor

from gradmix.training.config import DataConfig, MixConfig, OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.data.batch_reader import BatchReader
from gradmix.training.loop.clock import Clock
from gradmix.training.loop.memory import peak_memory, start_peak_memory
from gradmix.training.loop.reading import MOST_WORKERS, Reading
from gradmix.training.loop.trainer import Progress, train_one
from gradmix.training.methods import METHODS, Context, Method, StepSamples
from gradmix.training.streams import TaskStream
from gradmix.training.streams.benchmarks import stream_of

AHEAD = 2
"""Batches that every worker process has in the making."""


@dataclass(frozen=True)
class Way:
    """A way to make a step.

    Attributes:
        label: what it is called in the table.
        method: key of :data:`gradmix.training.methods.METHODS`; None: samples are read and made ready, no more.
        originals: whether the unmixed samples are trained on too, which takes two passes as large as the others' one.
    """

    label: str
    method: str | None
    originals: bool = False

    @property
    def parts(self) -> int:
        """Parts in which a step's passes are made: one with the originals is not to need twice the memory."""
        return 2 if self.originals else 1


WAYS = {
    "er": Way("replay alone", "er"),
    "mixup": Way("plain Mixup", "mixup"),
    "selection": Way("with selection", "gradmix-sample"),
    "mixup-originals": Way("plain Mixup and the originals", "mixup", True),
    "selection-originals": Way("with selection and the originals", "gradmix-sample", True),
}
"""The ways that take turns."""

READING = "reading"
PAIRS = {
    "selection": ("selection", "mixup"),
    "selection-originals": ("selection-originals", "mixup-originals"),
    "mixup": ("mixup", "er"),
}
"""The comparisons, block by block."""


@dataclass(frozen=True)
class Shape:
    """The run.

    Attributes:
        model: a name that ``gradmix train --model`` takes.
        image: side of the images that it sees.
        classes, tasks: in all; every task brings as many.
        train: images of each class, all of which are trained on once.
        buffer: images kept of each class.
        storage: where the buffer's samples lie: ``files``, to be read again, ``memory`` or ``disk``, decoded.
        batch, replay: new and replayed samples of a step.
        amp: ``none`` or ``bf16``, as ``gradmix train --amp``.
        steps: steps of a block, whose seconds are one sample.
        rounds: blocks of each way, besides one to begin with, which is left out.
        shortest, longest: sides of the JPEGs.
    """

    model: str = "resnet50"
    image: int = 224
    classes: int = 1000
    tasks: int = 10
    train: int = 20
    buffer: int = 20
    storage: str = "files"
    batch: int = 256
    replay: int = 256
    amp: str = "bf16"
    steps: int = 12
    rounds: int = 5
    shortest: int = 300
    longest: int = 500

    @property
    def rows(self) -> int:
        """Samples of a step of the last task."""
        return self.batch + self.replay


QUICK = Shape("resnet8", 64, 50, 5, 8, 4, "files", 16, 16, "none", 4, 4, 80, 120)


# ----------------------------------------------------------------------------------------------------------- the course


@dataclass(frozen=True)
class Segment:
    """Some steps of one way in a row; ``kept`` says whether their time is a sample."""

    way: str
    steps: int
    kept: bool


def segments(shape: Shape, workers: int, earlier: int) -> list[Segment]:
    """All steps of a run: those of the earlier tasks, every one another way; then, in the last task, a round to warm
    up, the rounds that count, each beginning with another way, and reading alone.

    Reading alone begins with as many batches as were made ahead of it, which do not count.
    """
    names = list(WAYS)
    found = [Segment(names[number % len(names)], 1, False) for number in range(earlier)]
    for number in range(1 + shape.rounds):
        first = number % len(names)
        found += [Segment(name, shape.steps, number > 0) for name in names[first:] + names[:first]]
    ahead = AHEAD * workers
    return [*found, Segment(READING, ahead + 1, False), Segment(READING, max(ahead, shape.steps), True)]


@dataclass(frozen=True)
class Block:
    """A segment as it went.

    Attributes:
        way: its way.
        rows: samples trained on, new and replayed.
        seconds: in all.
        data: of them, from asking for a step's samples to having them augmented; on a GPU by the device's own clock.
        waiting: of them, in which the host waited for the worker processes; a GPU may be busy meanwhile.
        selecting: of them, choosing pairs, and the pass that this takes without the originals.
        peak_memory: as :func:`gradmix.training.loop.memory.peak_memory`, bytes.
        loss: of the last step.
    """

    way: str
    rows: int
    seconds: float
    data: float
    waiting: float
    selecting: float
    peak_memory: int
    loss: float

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.rows / self.seconds


class Course:
    """Says which way a step is made, and takes the time of every segment.

    Args:
        plan: all steps of the run.
        device: where it is made.
        readers: those of the run, as they are made.

    Attributes:
        blocks: what was kept so far.
        parameters: of the network.
    """

    def __init__(self, plan: Sequence[Segment], device: torch.device, readers: Sequence[BatchReader]) -> None:
        self._plan, self._device, self._readers = plan, device, readers
        self.blocks: list[Block] = []
        self.parameters = 0
        self._clock: Clock | None = None
        self._segment, self._steps, self._rows = 0, 0, 0
        self._loss = torch.zeros(())
        self._start, self._before = 0.0, (0.0, 0.0, 0.0)

    @property
    def way(self) -> str:
        """The way of the next step."""
        return self._plan[self._segment].way

    def follow(self, context: Context) -> None:
        """Begin with a run that a method was made for."""
        self._clock = context.clock
        self.parameters = sum(p.numel() for p in context.model.parameters())

    def trained(self, rows: int, loss: Tensor) -> None:
        """Take note of a step's samples and of its loss."""
        self._rows, self._loss = self._rows + rows, loss

    def on_step(self, _progress: Progress) -> None:
        """Called by :func:`gradmix.training.loop.trainer.train_one` after every step."""
        self._steps += 1
        if self._steps == self._plan[self._segment].steps:
            self._end()

    def _end(self) -> None:
        synchronize(self._device)
        now, sums = time.perf_counter(), self._sums()
        segment = self._plan[self._segment]
        if segment.kept:
            data, waiting, selecting = (after - before for after, before in zip(sums, self._before, strict=True))
            block = Block(
                segment.way,
                self._rows,
                now - self._start,
                data,
                waiting,
                selecting,
                peak_memory(self._device),
                float(self._loss),
            )
            self.blocks.append(block)
            say(f"{segment.way}: {block.rate:.0f} images/s")
        self._segment, self._steps, self._rows = self._segment + 1, 0, 0
        start_peak_memory(self._device)
        self._before, self._start = sums, time.perf_counter()

    def _sums(self) -> tuple[float, float, float]:
        assert self._clock is not None
        waiting = sum(reader.seconds_waiting for reader in self._readers)
        return self._clock.seconds("data"), waiting, self._clock.seconds("selection")


class InTurn(Method):
    """Makes every step as a course says, by the package's own methods, which share network, optimiser and samples."""

    def __init__(self, context: Context, course: Course) -> None:
        super().__init__(context)
        self._course = course
        course.follow(context)
        self._methods = {
            name: METHODS[way.method](
                replace(
                    context,
                    mix=replace(context.mix, originals=way.originals),
                    passes=replace(context.passes, accumulate=way.parts),
                )
            )
            for name, way in WAYS.items()
            if way.method is not None
        }

    def losses(self, rows: StepSamples) -> Iterator[Tensor]:
        """Those of the course's way."""
        return self._methods[self._course.way].losses(rows)

    def backward(self, rows: StepSamples) -> Tensor:
        """Leave the gradients of the course's way, and inform the course of the step."""
        way = self._course.way
        # Without gradients the optimiser leaves the network as it is.
        loss = rows.weight.new_zeros(()) if way == READING else self._methods[way].backward(rows)
        self._course.trained(len(rows.y), loss)
        return loss

    def start_epoch(self) -> None:
        """Pass it on to all ways."""
        for method in self._methods.values():
            method.start_epoch()


@contextmanager
def in_turn(course: Course) -> Iterator[str]:
    """A method for :func:`gradmix.training.loop.trainer.train_one` that follows a course; its name."""
    name = "in-turn"

    class Following(InTurn):
        """The one that is made with nothing but a context."""

        def __init__(self, context: Context) -> None:
            super().__init__(context, course)

    METHODS[name] = Following
    try:
        yield name
    finally:
        del METHODS[name]


@contextmanager
def readers_made() -> Iterator[list[BatchReader]]:
    """The readers that training makes meanwhile, which know how long they were waited for."""
    made: list[BatchReader] = []
    make = Reading.reader

    def kept(self: Reading, items: Any, plans: Iterable[Tensor]) -> BatchReader:
        made.append(make(self, items, plans))
        return made[-1]

    Reading.reader = kept  # type: ignore[method-assign]
    try:
        yield made
    finally:
        Reading.reader = make  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------------------- the run


def configuration(shape: Shape, root: Path, device: torch.device, workers: int) -> TrainConfig:
    """The configuration as ``gradmix train`` would get it."""
    return TrainConfig(
        data=DataConfig(
            benchmark="image-folder",
            data_dir=root,
            classes_per_task=shape.classes // shape.tasks,
            image_size=shape.image,
            workers=workers,
        ),
        optim=OptimConfig(
            model=shape.model,
            # Below the protocol's, as ways that train unlike follow each other within an epoch.
            lr=0.02,
            epochs=1,
            batch=shape.batch,
            amp=shape.amp,  # type: ignore[arg-type]
            channels_last=device.type == "cuda",
        ),
        replay=ReplayConfig(
            policy="class",
            size=shape.buffer,
            batch=shape.replay,
            storage=None if shape.storage == "files" else shape.storage,  # type: ignore[arg-type]
        ),
        mix=MixConfig(reference="replayed"),
        device=str(device),
        threads=torch.get_num_threads(),
        checkpoint=0.0,
    )


def with_long_end(stream: TaskStream, rows: int) -> TaskStream:
    """The stream with so many training samples in its last task: its files over and over."""
    last = stream.tasks[-1]
    places = torch.arange(rows) % len(last.train)
    return replace(stream, tasks=(*stream.tasks[:-1], replace(last, train=last.train.take(places))))


def measure(shape: Shape, root: Path, device: torch.device, seed: int, workers: int) -> dict[str, Any]:
    """Train through all tasks; all figures."""
    config = configuration(shape, root, device, workers)
    stream = stream_of(config.data)
    images = sum(len(task.train) for task in stream.tasks)
    earlier = sum(-(-len(task.train) // shape.batch) for task in stream.tasks[:-1])
    plan = segments(shape, workers, earlier)
    steps = sum(segment.steps for segment in plan[earlier:])
    stream = with_long_end(stream, steps * shape.batch)
    with readers_made() as readers:
        course = Course(plan, device, readers)
        with in_turn(course) as method:
            result = train_one(config, method, seed, stream=stream, on_step=course.on_step)
    if result.status != "complete":
        raise KeyboardInterrupt
    return {
        "parameters": course.parameters,
        "images": images,
        "buffer_rows": shape.buffer * (shape.classes - shape.classes // shape.tasks),
        "steps": result.timing.steps,
        "steps_of_last_task": steps,
        "seconds": result.timing.seconds_total,
        "seconds_evaluation": result.timing.seconds_evaluation,
        **summary(course.blocks),
        "blocks": [asdict(block) for block in course.blocks],
    }


def summary(blocks: Sequence[Block]) -> dict[str, Any]:
    """Quantiles over the blocks of each way, and of the ratios of blocks of one round.

    >>> def block(way, seconds):
    ...     return Block(way, 100, seconds, 0.5, 0.4, 0.1, 7, 1.0)
    >>> found = summary([*(block(way, 2.0) for way in WAYS), block(READING, 0.5)])
    >>> found["ways"]["er"]["images_per_second"]["p50"], found["ways"]["er"]["data_share"]["p50"]
    (50.0, 0.25)
    >>> found["rate_over"]["selection"]["p50"], found["reading_images_per_second"]
    (1.0, 200.0)
    """
    by_way = {way: [block for block in blocks if block.way == way] for way in WAYS}
    (reading,) = (block for block in blocks if block.way == READING)
    return {
        "ways": {way: _figures(found) for way, found in by_way.items()},
        "rate_over": {
            name: paired_ratio([block.rate for block in by_way[one]], [block.rate for block in by_way[other]])
            for name, (one, other) in PAIRS.items()
        },
        "reading_images_per_second": reading.rate,
    }


def _figures(blocks: Sequence[Block]) -> dict[str, Any]:
    return {
        "blocks": len(blocks),
        "images_per_second": quantiles([block.rate for block in blocks]),
        "data_share": quantiles([block.data / block.seconds for block in blocks]),
        "waiting_share": quantiles([block.waiting / block.seconds for block in blocks]),
        "selection_share": quantiles([block.selecting / block.seconds for block in blocks]),
        "peak_memory_bytes": max(block.peak_memory for block in blocks),
        "last_loss": blocks[-1].loss,
    }


# -------------------------------------------------------------------------------------------------------------- report


def print_report(result: dict[str, Any]) -> None:
    """The table of a result, for a person."""
    shape, found = Shape(**result["shape"]), result["run"]
    print(f"\n{machine_line(result['machine'])}\n")
    show_table(
        f"{shape.model} at {shape.image}, {shape.classes} classes in {shape.tasks} tasks, {shape.batch} new + "
        f"{shape.replay} replayed samples, amp {shape.amp}, buffer in {shape.storage}",
        ["", "images/s, p20", "p50", "p80", "samples' share", "waiting", "selection", "peak memory"],
        [[WAYS[way].label, *_cells(figures)] for way, figures in found["ways"].items()],
        [
            *(
                f"images/s {WAYS[one].label} over {WAYS[other].label}: " + _spread(found["rate_over"][name])
                for name, (one, other) in PAIRS.items()
            ),
            f"reading and augmenting alone: {found['reading_images_per_second']:,.0f} images/s, by {result['workers']} "
            "worker processes",
            f"{found['steps']} steps in {show_time(found['seconds'])}, {found['steps_of_last_task']} of them in the "
            f"last task, blocks of {shape.steps}; {found['buffer_rows']:,} images in the buffer",
            f"{found['images']:,} training images, {show_bytes(result['image_bytes'])} with those of val, written in "
            f"{show_time(result['writing_seconds'])}",
        ],
    )


def _cells(figures: Mapping[str, Any]) -> list[str]:
    return [
        *(f"{figures['images_per_second'][level]:,.0f}" for level in ("p20", "p50", "p80")),
        *(f"{figures[name]['p50']:.1%}" for name in ("data_share", "waiting_share", "selection_share")),
        show_bytes(figures["peak_memory_bytes"]),
    ]


def _spread(ratio: Mapping[str, float]) -> str:
    return "{p50:.3f} ({p20:.3f} to {p80:.3f})".format(**ratio)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message if it makes no sense."""
    absent = argparse.SUPPRESS
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small network, small images, 50 classes")
    parser.add_argument("--model", help="the network, as gradmix train takes it", default=absent)
    helps = {
        "image": "side of the images",
        "classes": "in all",
        "tasks": "that bring as many classes each",
        "train": "images of each class",
        "buffer": "images kept of each class",
        "batch": "new samples of a step",
        "replay": "replayed samples of a step",
        "steps": "of a block",
        "rounds": "blocks of each way",
    }
    for name, text in helps.items():
        parser.add_argument(f"--{name}", type=count, help=text, default=absent)
    storages = ["files", "memory", "disk"]
    parser.add_argument("--storage", choices=storages, help="where the buffer's samples lie", default=absent)
    parser.add_argument("--amp", choices=["none", "bf16"], help="of the passes", default=absent)
    parser.add_argument(
        "--workers", type=int, help=f"processes that decode (default: a core each but one, {MOST_WORKERS} at most)"
    )
    parser.add_argument("--folder", type=Path, help="write the images there and leave them", default=absent)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=count, help="CPU threads (default: torch's own choice)", default=absent)
    parser.add_argument("--seed", type=int, default=0, help="of images, weights, order and selection")
    parser.add_argument("--json", type=Path, help="also write all figures to this file", default=absent)
    options = parser.parse_args(arguments)
    base = QUICK if options.quick else Shape()
    options.shape = replace(base, **{name: getattr(options, name) for name in vars(base) if name in options})
    shape = options.shape
    if options.workers is None:
        options.workers = max(1, min(MOST_WORKERS, machine()["cores"] - 1))
    if options.workers < 0:
        parser.error(f"argument --workers: got {options.workers}, expected an integer >= 0")
    if shape.classes % shape.tasks or shape.tasks < 2:
        parser.error(f"argument --tasks: got {shape.tasks}, expected a divisor of {shape.classes} that is at least 2")
    if shape.buffer > shape.train:
        parser.error(f"argument --buffer: got {shape.buffer}, expected at most the {shape.train} images of a class")
    if "folder" in options and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"argument --folder: {options.folder} is not empty")
    check_places(parser, options)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    device, shape = begin(options), options.shape
    folder = Folder(shape.classes, shape.train, 1, shape.shortest, shape.longest, options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = getattr(options, "folder", Path(temporary))
        say(f"writing {shape.classes * (shape.train + 1):,} JPEGs")
        start = time.perf_counter()
        size = write_folder(root, folder, max(1, options.workers))
        written = time.perf_counter() - start
        say(f"training on them, task {shape.tasks} being the one that is timed")
        result: dict[str, Any] = {
            "benchmark": "imagenet_shape",
            "machine": machine(device),
            "arguments": {name: getattr(options, name, None) for name in ("quick", "device", "seed", "threads")},
            "shape": vars(shape),
            "workers": options.workers,
            "image_bytes": size,
            "writing_seconds": written,
            "run": measure(shape, root, device, options.seed, options.workers),
        }
    result["machine"]["load_at_end"] = load_average()
    print_report(result)
    finish(options, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
