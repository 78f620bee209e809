"""Times what the selection of pairs adds to a real training step of a replay method.

A step mixes new samples and replayed samples, trains on the mixtures by SGD, and in one variant on the samples
themselves as well. It is timed with plain Mixup and with GradMix, in turn, in one process. See bench/README.md for the
rules.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _measure import (
    add_run_arguments,
    begin,
    check_run,
    count,
    finish,
    interleaved,
    load_average,
    machine_line,
    paired_ratio,
    peak_memory,
    prepare_machine,
    quantiles,
    run_values,
    say,
    seconds_of,
    show_bytes,
    show_table,
    show_time,
    warm_up,
)
from _networks import NETWORKS, make_network
from torch import Tensor, nn

from gradmix.mixer import GradMix
from gradmix.model.head import HeadOutput
from gradmix.model.head_capture import HeadCapture

CRITERIA = ("class", "sample")

REFRESHES = 3
"""Number of times that a refresh is timed; it is long."""

ROUNDS = 5
"""Rounds made in any case."""


@dataclass(frozen=True)
class Case:
    """A training step.

    Attributes:
        network: one of :data:`_networks.NETWORKS`.
        batch: new samples of a step.
        replay: samples replayed from the buffer in a step.
        buffer: samples of the buffer, whose gradient is the reference.
        classes: width of the network's output.
        dtype: of the forward pass, by autocast if it is not float32.
        refresh: steps between two refreshes, over which their cost is spread.
        steps: steps a sample, made without waiting for the device in between.
    """

    network: str = "resnet18"
    batch: int = 32
    replay: int = 32
    buffer: int = 500
    classes: int = 100
    dtype: str = "float32"
    refresh: int = 100
    steps: int = 1

    @property
    def rows(self) -> int:
        """Samples that are mixed in a step, with one another."""
        return self.batch + self.replay


PRESETS = {
    "cpu": Case(),
    "perceptron": Case("perceptron", 64, 64, 320, 10, refresh=1, steps=10),
    "resnet50": Case("resnet50", 256, 256, 20_000, 1000, "bfloat16", 100, 3),
    "vit-b": Case("vit-b", 256, 256, 20_000, 1000, "bfloat16", 100, 3),
}
QUICK = Case("resnet-tiny", 5, 4, 24, 6)


# ---------------------------------------------------------------------------------------------------------------- step


class Loop:
    """A network in training, its optimiser, the samples of a step and the buffer.

    The samples are the same in every step: random images, whose values do not matter for the time.
    """

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(seed)
        model = make_network(case.network, seed=seed)
        assert isinstance(model.head, nn.Linear)
        model.head = nn.Linear(model.head.in_features, case.classes)
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.model = model.to(device).to(memory_format=layout).train()  # type: ignore[call-overload]
        # So small a rate that random labels are not learnt: the softmax stays as it is over thousands of steps.
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        side = NETWORKS[case.network].image
        self.autocast = None if case.dtype == "float32" else getattr(torch, case.dtype)

        def images(rows: int, dtype: torch.dtype) -> Tensor:
            # Drawn on the device: 20,000 large images would take the CPU's generator half a minute.
            drawn = torch.Generator(device).manual_seed(seed + rows)
            parts = [
                torch.randn(len(part), 3, side, side, generator=drawn, device=device).to(dtype)
                for part in torch.arange(rows).split(512)
            ]
            return torch.cat(parts).contiguous(memory_format=layout)

        self.x = images(case.rows, torch.float32)
        self.y = torch.randint(case.classes, (case.rows,), generator=generator).to(device)
        # Every class is there, so that the class table knows those of the step's samples.
        kept = torch.arange(max(case.buffer, case.classes)) % case.classes
        self.buffer = (images(len(kept), self.autocast or torch.float32), kept.to(device))
        self._mixes = np.random.default_rng(seed)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x, in a context of its own: autocast keeps the weights it cast until its end."""
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits: Tensor = self.model(x)
        return logits

    def evaluate(self) -> Tensor:
        """One forward pass of a step's samples that trains nothing: what a selection without outputs at hand makes."""
        self.model.eval()
        with torch.no_grad():
            logits = self.forward(self.x)
        self.model.train()
        return logits

    def outputs(self) -> HeadOutput:
        """Features and logits from a training step's forward pass of the samples, for the selection."""
        with torch.no_grad(), HeadCapture(self.model, "head") as capture:
            self.forward(self.x)
        return capture.output

    def select(self, mixup: GradMix, outputs: HeadOutput | None) -> tuple[Tensor, Tensor]:
        """The samples mixed as the selection says: inputs and label vectors."""
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return mixup.select(self.x, self.y, outputs=outputs).mix()

    def mixup(self) -> tuple[Tensor, Tensor]:
        """The samples mixed by plain Mixup (Zhang et al. 2018): one weight, one permutation."""
        lam = float(self._mixes.beta(1.0, 1.0))
        partner = torch.randperm(len(self.x), device=self.device)
        labels = F.one_hot(self.y, self.case.classes).float()
        return lam * self.x + (1 - lam) * self.x[partner], lam * labels + (1 - lam) * labels[partner]

    def step(self, mixup: GradMix | None, originals: bool) -> None:
        """One training step; ``mixup`` None: plain Mixup.

        With ``originals``, the samples themselves are trained on first, and the selection is given what their forward
        pass put out.
        """
        self.optimiser.zero_grad(set_to_none=True)
        outputs = None
        if originals:
            if mixup is None:
                logits = self.forward(self.x)
            else:
                with HeadCapture(self.model, "head") as capture:
                    logits = self.forward(self.x)
                outputs = capture.output
            F.cross_entropy(logits.float(), self.y).backward()
        x, y = self.mixup() if mixup is None else self.select(mixup, outputs)
        F.cross_entropy(self.forward(x).float(), y).backward()
        self.optimiser.step()


# ---------------------------------------------------------------------------------------------------------------- ways


@dataclass(frozen=True)
class Way:
    """A way to make the step: with or without training on the originals, criterion None being plain Mixup."""

    originals: bool
    criterion: str | None
    graph: bool = False

    @property
    def name(self) -> str:
        """Its name in the result."""
        variant = "originals" if self.originals else "mixed"
        return f"{variant}_{self.criterion or 'plain'}{'_graph' if self.graph else ''}"

    @property
    def label(self) -> str:
        """Its name in the table."""
        kind = "plain Mixup" if self.criterion is None else f"GradMix, {self.criterion}"
        return kind + (", CUDA graph" if self.graph else "")


def ways_for(device: torch.device) -> tuple[list[Way], dict[str, str]]:
    """The ways timed on this device, and by name the others, each with its reason."""
    ways, absent = [], {}
    for originals in (False, True):
        ways.append(Way(originals, None))
        ways += [Way(originals, criterion) for criterion in CRITERIA]
    for criterion in CRITERIA:
        way = Way(True, criterion, graph=True)
        if device.type != "cuda":
            absent[way.name] = f"CUDA graphs need a CUDA device, got {device.type}"
        elif "cuda_graph" not in inspect.signature(GradMix).parameters:
            absent[way.name] = "this version's GradMix has no cuda_graph"
        else:
            ways.append(way)
    return ways, absent


def make_mixup(loop: Loop, way: Way, seed: int, state: dict[str, Any] | None = None) -> GradMix:
    """A GradMix that refreshes only on request; given the ``state`` of another, it needs no refresh of its own."""
    captures = "cuda_graph" in inspect.signature(GradMix).parameters
    graph: dict[str, Any] = {"cuda_graph": way.graph} if captures else {}
    mixup = GradMix(
        loop.model,
        loop.buffer,
        criterion=way.criterion,  # type: ignore[arg-type]
        estimator="feature",
        refresh="epoch",
        head="head",
        generator=torch.Generator().manual_seed(seed),
        **graph,
    )
    if state is not None:
        mixup.load_state_dict(state)
    return mixup


def repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def measure(case: Case, device: torch.device, seed: int, repeats: int, warmups: int, seconds: float) -> dict[str, Any]:
    """All figures of a case, with the samples in quantiles."""
    loop = Loop(case, device, seed)
    outputs = loop.outputs()
    ways, absent = ways_for(device)

    refreshes: dict[str, list[float]] = {}
    states: dict[str, dict[str, Any]] = {}
    for criterion in CRITERIA:
        say(f"refresh, criterion {criterion}: {len(loop.buffer[1])} samples")
        mixup = make_mixup(loop, Way(True, criterion), seed)
        loop.select(mixup, outputs)  # the first one warms up
        refreshes[criterion] = []
        for _ in range(REFRESHES):
            mixup.start_epoch()
            before = seconds_of(partial(loop.select, mixup, outputs), device)
            refreshes[criterion].append(before - seconds_of(partial(loop.select, mixup, outputs), device))
        states[criterion] = mixup.state_dict()

    mixups: dict[str, GradMix] = {}
    calls: dict[str, Callable[[], object]] = {}
    single: dict[str, Callable[[], object]] = {}

    def add(name: str, call: Callable[[], object]) -> None:
        single[name], calls[name] = call, partial(repeat, call, case.steps)

    for way in ways:
        given = None
        if way.criterion is not None:
            given = mixups[way.name] = make_mixup(loop, way, seed, states[way.criterion])
        add(way.name, partial(loop.step, given, way.originals))
    add("forward", loop.evaluate)
    for way in ways:
        if way.criterion is not None:
            # Not the step's own GradMix: a graph captured for a step's samples is best left to them.
            mixup = make_mixup(loop, way, seed, states[way.criterion])
            add("select_" + way.name, partial(loop.select, mixup, outputs if way.originals else None))
    done = {}
    for name in list(calls):
        say(f"warming up {name}")
        try:
            done[name] = warm_up(calls[name], device, warmups)
        except (RuntimeError, NotImplementedError) as error:
            # Only a graph may fail to be captured; whatever else fails is an error of the benchmark.
            if not name.endswith("_graph"):
                raise
            absent[name] = str(error).splitlines()[0]
            del calls[name], single[name]
    say("timing")
    samples = interleaved(calls, device, repeats=repeats, seconds=seconds, least=ROUNDS)
    samples = {name: [sample / case.steps for sample in taken] for name, taken in samples.items()}
    present = [way for way in ways if way.name in samples]
    say("peak memory")
    refresh = {name: quantiles(taken) for name, taken in refreshes.items()}
    rows = []
    for way in present:
        loop.optimiser.zero_grad(set_to_none=True)  # what a step finds and frees would count against its peak
        plain = samples[Way(way.originals, None).name]
        row = {
            "name": way.name,
            "label": way.label,
            "originals": way.originals,
            "criterion": way.criterion,
            "cuda_graph": way.graph,
            "warmups": done[way.name],
            "samples": len(samples[way.name]),
            "seconds": quantiles(samples[way.name]),
            "peak_memory_bytes": peak_memory(single[way.name], device),
        }
        if way.criterion is not None:
            extra = [a - b for a, b in zip(samples[way.name], plain, strict=True)]
            selection = samples.get("select_" + way.name)
            row |= {
                "extra_seconds": quantiles(extra),
                "share": paired_ratio(extra, samples[way.name]),
                "extra_over_forward": paired_ratio(extra, samples["forward"]),
                "selection_seconds": None if selection is None else quantiles(selection),
                "selection_over_forward": None if selection is None else paired_ratio(selection, samples["forward"]),
                **spread_refresh(
                    float(np.median(samples[way.name])),
                    float(np.median(plain)),
                    refresh[way.criterion]["p50"],
                    case.refresh,
                ),
                "all_finite": bool(torch.isfinite(mixups[way.name].pairs.lam).all()),  # type: ignore[union-attr]
                "mixed_share": mixups[way.name].pairs.summary()["mixed_share"],  # type: ignore[union-attr]
            }
        rows.append(row)
    return {
        "parameters": sum(p.numel() for p in loop.model.parameters()),
        "features": outputs.features.shape[1],
        "buffer_rows": len(loop.buffer[1]),
        "rows": rows,
        "absent": absent,
        "forward_seconds": quantiles(samples["forward"]),
        "refresh_seconds": refresh,
        "refresh_samples": REFRESHES,
    }


def spread_refresh(with_selection: float, without: float, refresh: float, interval: int) -> dict[str, float]:
    """A refresh's cost spread over its interval.

    Args:
        with_selection: seconds of a step with selection, no refresh in it.
        without: seconds of a step without.
        refresh: seconds of a refresh.
        interval: steps from one to the next.

    Returns:
        ``refresh_share``: the refresh's part of a step; ``share_with_refresh``: that and the selection's;
        ``steps_for_one_percent``: the interval at which a refresh is 1 % of the steps' own time.

    >>> figures = spread_refresh(1.0, 0.9, 10.0, 40)
    >>> [round(figures[name], 3) for name in ("refresh_share", "share_with_refresh", "steps_for_one_percent")]
    [0.2, 0.28, 1000.0]
    """
    part = refresh / interval
    return {
        "refresh_share": part / (with_selection + part),
        "share_with_refresh": (with_selection - without + part) / (with_selection + part),
        "steps_for_one_percent": refresh / (0.01 * with_selection),
    }


# -------------------------------------------------------------------------------------------------------------- report


def show_share(share: dict[str, float]) -> str:
    """The median in percent and, in brackets, the middle of its spread."""
    return f"{share['p50']:.1%} ({share['p20'] * 100:.1f} to {share['p80'] * 100:.1f})"


def show_factor(ratio: dict[str, float]) -> str:
    """The median and, in brackets, the middle of its spread."""
    return f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def show_seconds(seconds: float) -> str:
    """A time, which as a difference of two may be negative."""
    return ("-" if seconds < 0 else "") + show_time(abs(seconds))


def print_report(result: dict[str, Any]) -> None:
    """The tables of a result, for a person."""
    case, found = Case(**result["case"]), result["step"]
    print()
    print(machine_line(result["machine"]))
    print(
        f"{case.network}, {found['parameters'] / 1e6:.1f} M parameters, {case.classes} classes, d = "
        f"{found['features']}; {case.batch} new + {case.replay} replayed samples a step, {case.dtype}, on "
        f"{result['arguments']['device']}\n"
    )
    for originals in (False, True):
        rows = [row for row in found["rows"] if row["originals"] is originals]
        show_table(
            f"A training step on the mixed samples{' and on the originals' if originals else ''}",
            ["", "p20", "p50", "p80", "share of the step", "extra / forward", "with refreshes", "peak memory"],
            [
                [
                    row["label"],
                    *(show_time(row["seconds"][level]) for level in ("p20", "p50", "p80")),
                    *(
                        ["", "", ""]
                        if row["criterion"] is None
                        else [
                            show_share(row["share"]),
                            show_factor(row["extra_over_forward"]),
                            f"{row['share_with_refresh']:.1%}",
                        ]
                    ),
                    show_bytes(row["peak_memory_bytes"]),
                ]
                for row in rows
            ],
            [
                "share: (with - plain) / with, of the same round, in brackets 20 to 80 %",
                "extra / forward: (with - plain) over one forward pass of the step's samples in the same round, "
                f"{show_time(found['forward_seconds']['p50'])}",
                *(
                    ["the selection is given the outputs of the originals' forward pass"]
                    if originals
                    else ["by class it needs no forward pass between refreshes, by sample one of its own"]
                ),
                f"{rows[0]['samples']} samples a row, taken in turn, each of {case.steps} step(s) without a wait",
            ],
        )
    show_table(
        f"The selection alone, and a refresh from {found['buffer_rows']} samples",
        ["", "selection", "of a forward pass", "refresh", f"of a step, every {case.refresh}", "1 % every"],
        [
            [
                f"{row['label']}, outputs {'given' if row['originals'] else 'not given'}",
                "" if row["selection_seconds"] is None else show_time(row["selection_seconds"]["p50"]),
                "" if row["selection_over_forward"] is None else show_factor(row["selection_over_forward"]),
                show_seconds(found["refresh_seconds"][row["criterion"]]["p50"]),
                f"{row['refresh_share']:.1%}",
                f"{row['steps_for_one_percent']:.0f} steps",
            ]
            for row in found["rows"]
            if row["criterion"] is not None
        ],
        [
            f"a forward pass of the step's {case.rows} samples: {show_time(found['forward_seconds']['p50'])}",
            f"selection with mixing, nothing due; a refresh is the median of {found['refresh_samples']}",
            *(f"{name} left out: {reason}" for name, reason in found["absent"].items()),
        ],
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="a common case (default: cpu)", default=argparse.SUPPRESS
    )
    parser.add_argument("--network", choices=list(NETWORKS), help="the network", default=argparse.SUPPRESS)
    parser.add_argument("--batch", type=count, help="new samples of a step", default=argparse.SUPPRESS)
    parser.add_argument("--replay", type=count, help="replayed samples of a step", default=argparse.SUPPRESS)
    parser.add_argument("--buffer", type=count, help="samples of the buffer", default=argparse.SUPPRESS)
    parser.add_argument("--classes", type=count, help="width of the network's output", default=argparse.SUPPRESS)
    parser.add_argument("--refresh", type=count, help="steps between two refreshes", default=argparse.SUPPRESS)
    parser.add_argument("--steps", type=count, help="steps a sample", default=argparse.SUPPRESS)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the forward pass, by autocast",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny network unless named, few repeats: a look, not a measurement"
    )
    parser.add_argument("--tf32", action="store_true", help="let float32 products on a GPU use TF32")
    add_run_arguments(
        parser,
        quick_repeats=3,
        seconds=90.0,
        stop=f"stop the rounds then, though not before {ROUNDS}",
        seed="of weights, samples and selection",
    )
    options = parser.parse_args(arguments)
    base = PRESETS[options.preset] if "preset" in options else QUICK if options.quick else PRESETS["cpu"]
    options.case = replace(base, **{name: getattr(options, name) for name in vars(base) if name in options})
    check_run(parser, options)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    device = begin(options)
    result: dict[str, Any] = {
        "benchmark": "training_step",
        "machine": prepare_machine(device),
        "arguments": {
            **run_values(options),
            "preset": getattr(options, "preset", None),
            "tf32": options.tf32,
        },
        "case": vars(options.case),
        "step": measure(
            options.case, device, options.seed, options.repeats, 2 if options.quick else 5, options.seconds
        ),
    }
    result["machine"]["load_at_end"] = load_average()
    print_report(result)
    finish(options, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
