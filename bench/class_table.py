"""Times the class tables of an epoch beside the epoch: what does selection by class cost with many classes?

A perceptron learns the last task of a class-incremental stream of frozen features: a tenth of the classes is new, the
others are in the buffer. Epochs of plain Mixup and of GradMix by class are timed in turn, in one process. See
bench/README.md for the rules.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from _measure import (
    add_run_arguments,
    begin,
    check_run,
    count,
    finish,
    load_average,
    machine_line,
    paired_ratio,
    prepare_machine,
    quantiles,
    run_values,
    say,
    show_table,
    show_time,
    synchronize,
)
from torch import Tensor, nn

from gradmix.class_table import TABLE_SAMPLES
from gradmix.estimators import feature
from gradmix.mixer import GradMix

CLASSES = {10: 5000, 100: 500, 200: 500, 1000: 1300}
"""Numbers of classes, each with samples of a class, as CIFAR-10, CIFAR-100, Tiny ImageNet and ImageNet have them."""
STEPS = 50
"""Steps timed of an epoch, whose first ones hold all of its tables; the rest is proportional."""
DISTINCT = 50
"""Samples of a class that are kept in memory; the others are copies of them."""
ROUNDS = 3
"""Rounds made in any case."""
FORMER_SAMPLES = 2048
"""Most samples of a table in feature space before tables were sampled; all their pairs were taken, at five weights."""
SOME = 20
"""Classes of which a table of mixed inputs is timed: of all it is proportional to their square."""


@dataclass(frozen=True)
class Case:
    """The last task of a stream.

    Attributes:
        classes: of the whole stream.
        per_class: training samples of each new class.
        kept: samples in the buffer of each other class.
        batch: new samples of a step, and as many replayed ones.
        features: length of a sample.
    """

    classes: int
    per_class: int
    kept: int = 20
    batch: int = 64
    features: int = 1280

    @property
    def new(self) -> int:
        """Classes of the last task."""
        return max(2, self.classes // 10)


class TimedGradMix(GradMix):
    """A GradMix that adds up the time of its class tables.

    Attributes:
        spent: seconds of every table made or extended.
    """

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.spent: list[float] = []

    @contextmanager
    def _time(self, device: torch.device) -> Iterator[None]:
        synchronize(device)
        start = time.perf_counter()
        yield
        synchronize(device)
        self.spent.append(time.perf_counter() - start)

    def _refresh_kept(self, request: Any) -> None:
        with self._time(request.batch.y.device):
            super()._refresh_kept(request)

    def _extend_table(self, request: Any) -> None:
        with self._time(request.batch.y.device):
            super()._extend_table(request)


class Loop:
    """A perceptron in training, the samples of a task, and the buffer."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(case.classes, case.features, generator=generator)

        def samples(y: Tensor) -> tuple[Tensor, Tensor]:
            return (centres[y] + torch.randn(len(y), case.features, generator=generator)).to(device), y.to(device)

        old = case.classes - case.new
        self.x, _ = samples(torch.arange(old, case.classes).repeat_interleave(DISTINCT))
        self.y = torch.arange(old, case.classes).repeat_interleave(case.per_class).to(device)
        self.buffer = samples(torch.arange(old).repeat_interleave(case.kept))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            width = 256
            self.model = nn.Sequential(
                nn.Linear(case.features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                nn.Linear(width, case.classes),
            ).to(device)  # fmt: skip
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.generator = generator

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: new samples in random order, and random ones of the buffer."""
        for new in torch.randperm(len(self.y), generator=self.generator).split(self.case.batch):
            replayed = torch.randint(len(self.buffer[1]), (self.case.batch,), generator=self.generator)
            yield (
                torch.cat([self.x[(self.y[new] - self.y[0]) * DISTINCT + new % DISTINCT], self.buffer[0][replayed]]),
                torch.cat([self.y[new], self.buffer[1][replayed]]),
            )

    def old_steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the buffer alone."""
        while True:
            index = torch.randint(len(self.buffer[1]), (2 * self.case.batch,), generator=self.generator)
            yield self.buffer[0][index], self.buffer[1][index]

    def mixup(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The samples mixed by plain Mixup (Zhang et al. 2018): one weight, one permutation."""
        lam = float(torch.rand((), generator=self.generator))
        partner = torch.randperm(len(x), generator=self.generator).to(self.device)
        labels = F.one_hot(y, self.case.classes).float()
        return lam * x + (1 - lam) * x[partner], lam * labels + (1 - lam) * labels[partner]

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.y) // self.case.batch)

    def train(self, mixup: GradMix | None) -> float:
        """Make the first :data:`STEPS` of an epoch, with plain Mixup if ``mixup`` is None; return their seconds."""
        synchronize(self.device)
        start = time.perf_counter()
        if mixup is not None:
            mixup.start_epoch()
        for x, y in islice(self.steps(), STEPS):
            self.optimiser.zero_grad(set_to_none=True)
            mixed_x, mixed_y = self.mixup(x, y) if mixup is None else mixup(x, y)
            F.cross_entropy(self.model(mixed_x), mixed_y).backward()
            self.optimiser.step()
        synchronize(self.device)
        return time.perf_counter() - start

    def selective(self, estimator: Any = "feature", class_samples: int = 32) -> TimedGradMix:
        """A GradMix by class, with a table anew each epoch."""
        return TimedGradMix(
            self.model,
            self.buffer,
            criterion="class",
            estimator=estimator,
            refresh="epoch",
            class_samples=class_samples,
            generator=self.generator,
        )

    def one_table(self, mixup: TimedGradMix) -> float:
        """Seconds of one table."""
        mixup.start_epoch()
        mixup(*next(self.steps()))
        return mixup.spent[-1]

    def former_tables(self) -> dict[str, float]:
        """Seconds of one table as they were made: of all pairs in feature space, and of mixed inputs."""
        vars(feature)["TABLE_SAMPLES"] = sys.maxsize
        try:
            limit = max(1, min(32, FORMER_SAMPLES // self.case.classes))
            pairs = self.one_table(self.selective(class_samples=limit))
        finally:
            vars(feature)["TABLE_SAMPLES"] = TABLE_SAMPLES
        # Reading the buffer is in all of them, and is not multiplied.
        buffer = self.one_table(self.selective(class_samples=1))
        whole, some = self.buffer, min(SOME, self.case.classes - self.case.new)
        try:
            of_some = self.buffer[1] < some
            self.buffer = (whole[0][of_some], whole[1][of_some])
            few = self.selective("mixed")
            batch = next(self.old_steps())
            few(*batch)
            few.start_epoch()
            few(*batch)
            reading = self.selective(class_samples=1)
            reading(*batch)
            reading.start_epoch()
            reading(*batch)
        finally:
            self.buffer = whole
        forwards = few.spent[-1] - reading.spent[-1]
        return {"feature": pairs, "mixed": buffer + forwards * (self.case.classes / some) ** 2}


def measure(case: Case, device: torch.device, seed: int, repeats: int, seconds: float) -> dict[str, Any]:
    """All figures of a case, with the samples in quantiles."""
    loop = Loop(case, device, seed)
    mixup = loop.selective()
    say(f"{case.classes} classes: warming up")
    loop.one_table(mixup)
    samples: dict[str, list[float]] = {"mixup": [], "gradmix": [], "tables": []}
    made = []
    end = time.perf_counter() + seconds
    for done in range(repeats):
        if done >= ROUNDS and time.perf_counter() >= end:
            break
        say(f"{case.classes} classes: round {done + 1}")
        # In turn, so that neither always finds the caches as the other left them.
        for name in ("mixup", "gradmix") if done % 2 else ("gradmix", "mixup"):
            mixup.spent.clear()
            total = loop.train(mixup if name == "gradmix" else None)
            tables = sum(mixup.spent)
            samples[name].append((total - tables) * loop.epoch_steps / min(STEPS, loop.epoch_steps) + tables)
            if name == "gradmix":
                samples["tables"].append(tables)
                made.append(len(mixup.spent))
    say(f"{case.classes} classes: tables as they were made")
    former = loop.former_tables()
    # Every batch with an unknown class had the whole table made anew.
    times = sum(made) / len(made)
    epoch = quantiles(samples["mixup"])["p50"]
    return {
        "case": vars(case),
        "steps": loop.epoch_steps,
        "rounds": len(made),
        "tables_per_epoch": times,
        "mixup_epoch_seconds": quantiles(samples["mixup"]),
        "gradmix_epoch_seconds": quantiles(samples["gradmix"]),
        "tables_seconds": quantiles(samples["tables"]),
        "tables_share": paired_ratio(samples["tables"], samples["mixup"]),
        "epoch_ratio": paired_ratio(samples["gradmix"], samples["mixup"]),
        "former_table_seconds": former,
        "former_tables_share": {name: value * times / epoch for name, value in former.items()},
    }


def print_report(result: dict[str, Any]) -> None:
    """The table of a result, for a person."""
    print()
    print(machine_line(result["machine"]))
    first = Case(**result["cases"][0]["case"])
    print(
        f"perceptron {first.features}-256-256-classes, {first.batch} new + {first.batch} replayed samples a step, "
        f"{first.kept} samples kept of each class but the new ones\n"
    )

    def spread(values: dict[str, float], scale: str) -> str:
        return f"{values['p50']:{scale}} ({values['p20']:{scale}}-{values['p80']:{scale}})"

    show_table(
        "Class tables of an epoch, over an epoch of plain Mixup",
        [
            "classes",
            "samples of one",
            "steps",
            "Mixup's epoch",
            "tables",
            "now",
            "before, feature",
            "before, mixed",
            "epoch / Mixup's",
        ],
        [
            [
                f"{found['case']['classes']}",
                f"{found['case']['per_class']}",
                f"{found['steps']}",
                show_time(found["mixup_epoch_seconds"]["p50"]),
                f"{found['tables_per_epoch']:.1f}",
                spread(found["tables_share"], ".1%"),
                f"{found['former_tables_share']['feature']:.0%}",
                f"{found['former_tables_share']['mixed']:.0%}",
                spread(found["epoch_ratio"], ".2f"),
            ]
            for found in result["cases"]
        ],
        [
            "now: seconds of all tables made or extended in an epoch of GradMix, over Mixup's epoch of the same round",
            "before: one table as it was made, times the tables of an epoch, as every unknown class had it made anew; "
            f"of mixed inputs that of at most {SOME} classes is timed, times the square of how many more there are",
            "epoch / Mixup's: the whole epoch of GradMix over that of Mixup, of the same round",
            f"the first {STEPS} steps of an epoch are timed, which hold all tables; the others are taken to be alike",
            "median (20 to 80 %)",
        ],
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--classes", type=count, nargs="+", help="numbers of classes", default=argparse.SUPPRESS)
    parser.add_argument(
        "--per-class",
        type=count,
        help="training samples of each new class (default: 5,000 of 10 classes, else 500)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument("--kept", type=count, help="samples in the buffer of each other class", default=20)
    parser.add_argument("--quick", action="store_true", help="few classes and rounds: a look, not a measurement")
    add_run_arguments(
        parser,
        quick_repeats=ROUNDS,
        seconds=60.0,
        stop=f"stop the rounds of a case then, though not before {ROUNDS}",
        seed="of weights, samples and selection",
    )
    options = parser.parse_args(arguments)
    options.classes = getattr(options, "classes", (10, 40) if options.quick else tuple(CLASSES))
    check_run(parser, options)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    device = begin(options)
    result: dict[str, Any] = {
        "benchmark": "class_table",
        "machine": prepare_machine(device),
        "arguments": run_values(options),
        "cases": [
            measure(
                Case(classes, getattr(options, "per_class", CLASSES.get(classes, 500)), options.kept),
                device,
                options.seed,
                options.repeats,
                options.seconds,
            )
            for classes in options.classes
        ],
    }
    result["machine"]["load_after"] = load_average()
    print_report(result)
    finish(options, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
