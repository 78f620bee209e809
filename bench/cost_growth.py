"""Times how a step's cost grows with classes, samples, buffer and width, and compares it with the formulas of the work.

Two layers: selection alone, from features and logits that are given; and a whole training step with and without
selection, in turn, in one process. See bench/README.md for the rules.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _growth_picture import draw
from _measure import (
    Call,
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
    show_bytes,
    show_count,
    show_table,
    show_time,
    warm_up,
)
from _networks import NETWORKS
from _selection_problem import LAM, Problem, Sizes, make_problem
from _selection_rivals import ran_out
from _selection_sweep import check_picture
from torch import Tensor, nn
from training_step import Case, Loop

import gradmix
from gradmix.class_table import TABLE_LAMS
from gradmix.mixer import GradMix
from gradmix.model.head import HeadOutput
from gradmix.ops.class_pairs import class_pair_alignment
from gradmix.ops.last_layer_gradient import last_layer_gradient
from gradmix.ops.mixed_alignment import Side, mixed_alignment
from gradmix.pairs import Pairs

INTERVAL = 20
"""Steps over which the cost of a refresh is spread in the middle one of the ways to have a reference."""

CLASS_SAMPLES = 32
"""Samples of each class behind a class table, fewer where there are many classes."""

TABLE_SAMPLES = 2048
"""Most samples of which all pairs are taken here; a class table takes some of the pairs from fewer samples on."""

CHUNK = 256
"""Samples of the buffer whose gradient is added at a time."""

LEAST = 5
"""Rounds made in any case."""


@dataclass(frozen=True)
class Plan:
    """The points to measure: a base point and the values of every axis; along an axis the other sizes are the base's.

    Attributes:
        sizes: of the selection alone; its samples are their own candidates.
        case: of the training step, half of whose samples are replayed.
        alone: by axis of the first layer, its values: ``classes``, ``rows``, ``features``, ``buffer`` (samples whose
            gradient is the reference) and ``table`` (classes of a class table).
        step: by axis of the second layer, its values: ``classes``, ``rows`` and ``buffer``.
    """

    sizes: Sizes
    case: Case
    alone: Mapping[str, Sequence[int]] = field(default_factory=dict)
    step: Mapping[str, Sequence[int]] = field(default_factory=dict)


_CLASSES = (10, 30, 100, 300, 1000, 3000, 10_000, 21_841)
_ROWS = (64, 128, 256, 512, 1024)
_BUFFER = (64, 256, 1024, 4096, 20_000)
_ALONE = {
    "classes": _CLASSES,
    "rows": _ROWS,
    "features": (64, 128, 256, 512, 1024, 2048),
    "buffer": _BUFFER,
    "table": (10, 30, 100, 300),
}
_STEP = {"classes": (10, 100, 1000, 10_000, 21_841), "rows": _ROWS, "buffer": _BUFFER}
_BASE = Sizes(256, 256, 1000, 2048, own_rows=True)

PLANS = {
    "cpu": Plan(_BASE, Case("resnet-tiny", 32, 32, 512, 100), _ALONE, _STEP),
    "resnet50": Plan(_BASE, Case("resnet50", 128, 128, 2048, 1000, "bfloat16", steps=3), _ALONE, _STEP),
    "vit-b": Plan(
        replace(_BASE, features=768), Case("vit-b", 128, 128, 2048, 1000, "bfloat16", steps=3), _ALONE, _STEP
    ),
}
QUICK = Plan(
    Sizes(32, 32, 50, 64, own_rows=True),
    Case("resnet-tiny", 8, 8, 32, 10),
    {
        "classes": (10, 100, 1000),
        "rows": (16, 32, 64),
        "features": (16, 64, 256),
        "buffer": (64, 512),
        "table": (5, 10, 20),
    },
    {"classes": (10, 1000), "rows": (8, 32), "buffer": (32, 128)},
)

# ------------------------------------------------------------------------------------------------------------- formulas


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a point: all that the factorised form needs, and its four products 8 N M C."""

    all: int
    products: int


def selection_work(sizes: Sizes) -> Work:
    """The work of the alignment of all pairs: 8 N M C, the projections 2 N C (d + 1) and the Gram product 2 N M d."""
    return Work(sizes.flops, 8 * sizes.n * sizes.m * sizes.classes)


def reference_work(sizes: Sizes, rows: int) -> Work:
    """The work of the last-layer gradient of K = ``rows`` samples whose outputs are given: 2 K C (d + 1)."""
    return Work(2 * rows * sizes.classes * (sizes.features + 1), 0)


def table_rows(classes: int) -> int:
    """Samples behind a class table of so many classes."""
    return classes * max(1, min(CLASS_SAMPLES, TABLE_SAMPLES // classes))


def table_work(sizes: Sizes, classes: int) -> Work:
    """The work of a class table: alignment of all pairs of its R = :func:`table_rows` samples at each of L weights."""
    rows = table_rows(classes)
    one = selection_work(replace(sizes, n=rows, m=rows))
    # Projections and the Gram product do not depend on the weight.
    return Work(one.all + (len(TABLE_LAMS) - 1) * one.products, len(TABLE_LAMS) * one.products)


def last_decade(values: Sequence[int]) -> list[int]:
    """Places of the values that are at least a tenth of the largest."""
    return [place for place, value in enumerate(values) if 10 * value >= max(values)]


def slope(values: Sequence[float], results: Sequence[float]) -> float:
    """The exponent p of results ~ values^p: the least-squares slope of their logarithms.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    x, y = np.log(np.asarray(values, dtype=float)), np.log(np.asarray(results, dtype=float))
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def exponent(points: Sequence[dict[str, Any]], samples: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Growth over the last decade of an axis, measured and by formula; None with fewer than two points there.

    Args:
        points: with ``value``, and possibly ``flops`` and ``product_flops``.
        samples: seconds, one sequence a point; the k-th ones of all points make the k-th slope.
    """
    places = last_decade([point["value"] for point in points])
    if len(places) < 2:
        return None
    values = [points[place]["value"] for place in places]
    rounds = zip(*(samples[place] for place in places), strict=False)
    found: dict[str, Any] = {
        "from": values[0],
        "to": values[-1],
        "measured": quantiles([slope(values, taken) for taken in rounds]),
    }
    for name in ("flops", "product_flops"):
        if all(points[place].get(name) for place in places):
            found[name] = slope(values, [points[place][name] for place in places])
    return found


# ---------------------------------------------------------------------------------------------------- selection alone


@dataclass(frozen=True)
class _Point:
    """One value of an axis: what is called, by name, the first of them being the one that the formula is of."""

    value: int
    calls: dict[str, Call]
    work: Work


def _selecting(problem: Problem, seed: int) -> Call:
    """The whole selection for given outputs: alignment, decisions, one drawn partner a sample."""
    classes, features = problem.weight.shape
    head = nn.Linear(features, classes, device="meta")
    head.weight, head.bias = nn.Parameter(problem.weight), nn.Parameter(problem.bias)
    outputs = HeadOutput(problem.features_a, problem.logits_a)
    rows = problem.features_a, problem.labels_a
    generator = torch.Generator().manual_seed(seed)

    def select() -> Pairs:
        return gradmix.select_pairs(
            head,
            rows,
            rows,
            criterion="sample",
            lam=LAM,
            head=head,
            generator=generator,
            reference=problem.reference,
            outputs=outputs,
        )

    return select


def _aligning(problem: Problem) -> Call:
    p = problem
    a, b = Side(p.features_a, p.logits_a, p.labels_a), Side(p.features_b, p.logits_b, p.labels_b)
    return lambda: mixed_alignment(a, b, p.reference, p.lam)


def _summing(problem: Problem, rows: int) -> Call:
    """The reference gradient of the first ``rows`` samples from their outputs, a chunk at a time."""
    parts = [v[:rows].split(CHUNK) for v in (problem.features_a, problem.logits_a, problem.labels_a)]

    def add_up() -> Tensor:
        total: Tensor | None = None
        for features, logits, labels in zip(*parts, strict=True):
            total = last_layer_gradient(features, logits, labels, out=total)
        assert total is not None
        return total / rows

    return add_up


def _tabulating(problem: Problem, classes: int) -> Call:
    """The class table of so many classes, of all pairs of samples whose labels go round."""
    rows = table_rows(classes)
    labels = torch.arange(rows, device=problem.labels_a.device) % classes
    side = Side(problem.features_a[:rows], problem.logits_a[:rows], labels)
    lams = torch.tensor(TABLE_LAMS, dtype=torch.float64)
    return lambda: class_pair_alignment(side, labels, classes, problem.reference, lams)


def points_of(axis: str, values: Sequence[int], base: Sizes, device: torch.device, seed: int) -> list[_Point]:
    """The calls along one axis of the first layer."""
    if axis == "buffer":
        problem = make_problem(replace(base, n=max(values), m=1, own_rows=False), seed).to(device)
        return [_Point(v, {"reference": _summing(problem, v)}, reference_work(base, v)) for v in values]
    if axis == "table":
        problem = make_problem(replace(base, n=max(map(table_rows, values)), m=1, own_rows=False), seed).to(device)
        return [_Point(v, {"table": _tabulating(problem, v)}, table_work(base, v)) for v in values]
    points = []
    for value in values:
        sizes = replace(base, n=value, m=value) if axis == "rows" else replace(base, **{axis: value})  # type: ignore[arg-type]
        problem = make_problem(sizes, seed).to(device)
        calls = {"alignment": _aligning(problem), "selection": _selecting(problem, seed)}
        points.append(_Point(value, calls, selection_work(sizes)))
    return points


def measure_alone(
    axis: str, values: Sequence[int], base: Sizes, device: torch.device, seed: int, *, repeats: int, seconds: float
) -> dict[str, Any]:
    """One axis of the first layer, all of its points in turn."""
    points = points_of(axis, values, base, device, seed)
    calls = {f"{name} {point.value}": call for point in points for name, call in point.calls.items()}
    for call in calls.values():
        warm_up(call, device, 3)
    samples = interleaved(calls, device, repeats=repeats, seconds=seconds, least=min(LEAST, repeats))
    curves = []
    for name in points[0].calls:
        taken = [samples[f"{name} {point.value}"] for point in points]
        rows = [
            {
                "value": point.value,
                "seconds": quantiles(times),
                "samples": len(times),
                "flops": point.work.all,
                "product_flops": point.work.products,
                "flops_per_second": point.work.all / float(np.median(times)),
                "peak_memory_bytes": peak_memory(point.calls[name], device),
            }
            for point, times in zip(points, taken, strict=True)
        ]
        curves.append({"name": name, "points": rows, "exponent": exponent(rows, taken)})
    return {"axis": axis, "curves": curves}


# -------------------------------------------------------------------------------------------------------- whole steps


@dataclass(frozen=True)
class Way:
    """A way to make the step: its name in the result and in the table."""

    name: str
    label: str


WAYS = (
    Way("plain", "plain Mixup"),
    Way("kept", "selection, reference kept"),
    Way("replayed", "selection, reference of the step's replayed samples"),
    Way("each", "selection, the buffer read in every step"),
)


class ReplayedReference:
    """Selects as GradMix does, with the mean gradient of the step's own replayed samples for reference."""

    def __init__(self, loop: Loop, seed: int) -> None:
        self._loop, self._generator = loop, torch.Generator().manual_seed(seed)

    def select(self, x: Tensor, y: Tensor, *, outputs: HeadOutput) -> Pairs:
        """The pairs; the samples behind the first ``batch`` ones are those replayed."""
        loop = self._loop
        return gradmix.select_pairs(
            loop.model,
            torch.arange(len(y), device=y.device) >= loop.case.batch,
            (x, y),
            criterion="sample",
            head="head",
            generator=self._generator,
            outputs=outputs,
        )


def make_loop(case: Case, device: torch.device, seed: int) -> Loop:
    """The step's network and samples, with a buffer of the given size, whether or not it contains every class."""
    loop = Loop(case, device, seed)
    loop.buffer = loop.buffer[0][: case.buffer], loop.buffer[1][: case.buffer]
    return loop


def steps_of(loop: Loop, seed: int) -> dict[str, Callable[[], object]]:
    """The step in all :data:`WAYS`, trained on the samples themselves too, whose outputs the selection is given."""

    def mixup(refresh: Any) -> GradMix:
        generator = torch.Generator().manual_seed(seed)
        return GradMix(loop.model, loop.buffer, criterion="sample", refresh=refresh, head="head", generator=generator)

    by_rows: Any = ReplayedReference(loop, seed)
    return {
        "plain": partial(loop.step, None, True),
        "kept": partial(loop.step, mixup("epoch"), True),
        "replayed": partial(loop.step, by_rows, True),
        "each": partial(loop.step, mixup(1), True),
    }


def changed_case(case: Case, axis: str, value: int) -> Case:
    """The case at one value of an axis; of ``rows``, half are replayed."""
    if axis == "rows":
        return replace(case, batch=value - value // 2, replay=value // 2)
    return replace(case, **{axis: value})  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Steps:
    """One value of an axis of the second layer: its loop and the step in all :data:`WAYS`."""

    value: int
    loop: Loop
    single: dict[str, Callable[[], object]]

    def call(self, name: str) -> None:
        """As many steps of this way as make a sample."""
        for _ in range(self.loop.case.steps):
            self.single[name]()


def _prepared(axis: str, value: int, case: Case, device: torch.device, seed: int) -> _Steps | None:
    """A point with every way warmed up, or None if it runs out of memory."""
    say(f"preparing a step, {axis} = {value}")
    try:
        loop = make_loop(changed_case(case, axis, value), device, seed)
        found = _Steps(value, loop, steps_of(loop, seed))
        for name in found.single:
            warm_up(partial(found.call, name), device, 3)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return None
    return found


def measure_steps(
    axis: str, values: Sequence[int], case: Case, device: torch.device, seed: int, *, repeats: int, seconds: float
) -> dict[str, Any]:
    """One axis of the second layer, all points and ways in turn; a point that runs out of memory is named as such."""
    points: dict[int, dict[str, Any]] = {value: {"value": value, "ways": None} for value in values}
    there = [found for value in values if (found := _prepared(axis, value, case, device, seed)) is not None]
    calls = {f"{name} {steps.value}": partial(steps.call, name) for steps in there for name in steps.single}
    taken = interleaved(calls, device, repeats=repeats, seconds=seconds, least=min(LEAST, repeats)) if calls else {}
    by_way: dict[str, list[list[float]]] = {}
    for steps in there:
        samples = {name: [s / case.steps for s in taken[f"{name} {steps.value}"]] for name in steps.single}
        # A refresh in one of so many steps, from the same round's steps with and without.
        samples["interval"] = [
            kept + (each - kept) / INTERVAL for kept, each in zip(samples["kept"], samples["each"], strict=True)
        ]
        for name, seconds_taken in samples.items():
            by_way.setdefault(name, []).append(seconds_taken)
        points[steps.value] = described(steps, samples, device)
    shown = [points[steps.value] for steps in there]
    exponents = {name: exponent(shown, found) for name, found in by_way.items()}
    return {"axis": axis, "points": list(points.values()), "exponents": exponents}


def described(steps: _Steps, samples: Mapping[str, Sequence[float]], device: torch.device) -> dict[str, Any]:
    """The figures of one point: seconds, and of every way but plain Mixup's what it takes beyond that."""
    plain, loop = samples["plain"], steps.loop
    ways: dict[str, dict[str, Any]] = {}
    for name, found in samples.items():
        ways[name] = {"seconds": quantiles(found)}
        if name != "plain":
            extra = [a - b for a, b in zip(found, plain, strict=True)]
            ways[name] |= {"over_plain": paired_ratio(found, plain), "share": paired_ratio(extra, found)}
        if name in steps.single:
            loop.optimiser.zero_grad(set_to_none=True)  # what a step finds and frees would count against its peak
            ways[name]["peak_memory_bytes"] = peak_memory(steps.single[name], device)
    return {
        "value": steps.value,
        "parameters": sum(p.numel() for p in loop.model.parameters()),
        "features": loop.outputs().features.shape[1],
        "samples": len(plain),
        "ways": ways,
    }


# -------------------------------------------------------------------------------------------------------------- report


def show_exponent(found: dict[str, Any] | None) -> str:
    """The exponent with the middle of its spread, and those of the formulas."""
    if found is None:
        return "too few points"
    middle = found["measured"]
    text = f"{middle['p50']:.2f} ({middle['p20']:.2f} to {middle['p80']:.2f}) from {found['from']} to {found['to']}"
    formulas = {"flops": "all flops", "product_flops": "8NMC"}
    told = [f"{label} {found[name]:.2f}" for name, label in formulas.items() if name in found]
    return f"{text}; by formula: {', '.join(told)}" if told else text


def show_axis(axis: str) -> str:
    """Return the heading of an axis, whose name in the result file may be a former one."""
    return "samples" if axis == "rows" else axis


def alone_table(curve: Mapping[str, Any], axis: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of one curve of the first layer."""
    heads = [show_axis(axis), "median", "20 to 80 %", "operations", "rate", "peak memory"]
    return heads, [
        [
            f"{point['value']:,}",
            show_time(point["seconds"]["p50"]),
            f"{show_time(point['seconds']['p20'])} to {show_time(point['seconds']['p80'])}",
            show_count(point["flops"], "flop"),
            show_count(point["flops_per_second"], "flop/s"),
            show_bytes(point["peak_memory_bytes"]),
        ]
        for point in curve["points"]
    ]


def step_table(axis: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of one axis of the second layer."""
    shown = {
        "replayed": "of replayed samples",
        "kept": "kept",
        "interval": f"every {INTERVAL} steps",
        "each": "each step",
    }
    heads = [
        show_axis(axis["axis"]),
        "plain Mixup",
        *(f"reference {label}" for label in shown.values()),
        "peak memory",
        "with selection",
    ]
    rows = []
    for point in axis["points"]:
        ways = point["ways"]
        if ways is None:
            rows.append([f"{point['value']:,}", "out of memory", *[""] * (len(heads) - 2)])
            continue
        rows.append(
            [
                f"{point['value']:,}",
                show_time(ways["plain"]["seconds"]["p50"]),
                *(show_factor(ways[name]["over_plain"]) for name in shown),
                show_bytes(ways["plain"]["peak_memory_bytes"]),
                show_bytes(ways["replayed"]["peak_memory_bytes"]),
            ]
        )
    return heads, rows


def show_factor(ratio: Mapping[str, float]) -> str:
    """The median and, in brackets, the middle of its spread."""
    digits = 1 if ratio["p50"] >= 10 else 2
    return f"{ratio['p50']:.{digits}f} ({ratio['p20']:.{digits}f} to {ratio['p80']:.{digits}f})"


TITLES = {
    ("classes", "alignment"): "Alignment of all pairs over the classes C",
    ("classes", "selection"): "Whole selection over the classes C",
    ("rows", "alignment"): "Alignment of all pairs over the samples N",
    ("rows", "selection"): "Whole selection over the samples N",
    ("features", "alignment"): "Alignment of all pairs over the features' width d",
    ("features", "selection"): "Whole selection over the features' width d",
    ("buffer", "reference"): "Reference gradient over the buffer's samples K, outputs given",
    ("table", "table"): "Class table over its classes P",
}


def print_report(result: dict[str, Any]) -> None:
    """The tables of a result, for a person."""
    sizes, case = Sizes(**result["sizes"]), Case(**result["case"])
    print(f"\n{machine_line(result['machine'])}\n")
    for axis in result["alone"]:
        for curve in axis["curves"]:
            heads, rows = alone_table(curve, axis["axis"])
            notes = [f"exponent over the last decade: {show_exponent(curve['exponent'])}"]
            show_table(TITLES[axis["axis"], curve["name"]], heads, rows, notes)
    if result["alone"]:
        print(f"  else N = {sizes.n}, C = {sizes.classes}, d = {sizes.features}, float32\n")
    for axis in result["step"]:
        notes = [
            f"{way}: exponent over the last decade {show_exponent(found)}" for way, found in axis["exponents"].items()
        ]
        show_table(f"A training step over {axis['axis']}", *step_table(axis), notes)
    if result["step"]:
        print(
            f"  a step with selection over one without, of the same round; else {case.network}, {case.batch} new + "
            f"{case.replay} replayed samples, buffer {case.buffer}, C = {case.classes}, {case.dtype}\n"
        )


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a page."""
    lines = [list(heads), ["---", *["--:"] * (len(heads) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page_tables(result: dict[str, Any]) -> list[str]:
    """The tables that a page shows of a result: of the first layer without the mere alignment's, then of the second."""
    tables = [
        markdown(*alone_table(curve, axis["axis"])) + f"\n\nExponent: {show_exponent(curve['exponent'])}."
        for axis in result["alone"]
        for curve in axis["curves"]
        if curve["name"] != "alignment"
    ]
    return tables + [markdown(*step_table(axis)) for axis in result["step"]]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message if it makes no sense."""
    absent = argparse.SUPPRESS
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PLANS), help="base point and axes (default: cpu)", default=absent)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three rounds: a look, not a measurement")
    parser.add_argument("--network", choices=list(NETWORKS), help="of the training step", default=absent)
    parser.add_argument(
        "--layers", nargs="+", choices=["alone", "step"], default=["alone", "step"], help="what to time"
    )
    parser.add_argument("--axes", nargs="+", choices=list(_ALONE), default=list(_ALONE), help="along which axes")
    parser.add_argument("--most-classes", type=count, help="leave out larger numbers of classes", default=absent)
    parser.add_argument("--most-buffer", type=count, help="leave out larger buffers", default=absent)
    parser.add_argument("--plot", type=Path, help="draw the curves to this .svg or .png", default=absent)
    parser.add_argument("--tf32", action="store_true", help="let float32 products on a GPU use TF32")
    add_run_arguments(
        parser,
        quick_repeats=3,
        seconds=25.0,
        stop=f"stop the rounds of an axis then, though not before {LEAST} of each point",
        seed="of inputs, weights and selection",
    )
    options = parser.parse_args(arguments)
    plan = PLANS[options.preset] if "preset" in options else QUICK if options.quick else PLANS["cpu"]
    if "network" in options:
        plan = replace(plan, case=replace(plan.case, network=options.network))
    options.plan = plan
    if "plot" in options:
        refused = check_picture(options.plot)
        if refused is None and options.plot.suffix.lower() == ".pdf":
            refused = f"got {options.plot.name!r}, expected a name that ends in .png, .svg"
        if refused is not None:
            parser.error(f"argument --plot: {refused}")
    check_run(parser, options)
    return options


def chosen(values: Mapping[str, Sequence[int]], options: argparse.Namespace) -> dict[str, list[int]]:
    """The axes asked for, without the values that are more than asked for."""
    most = {
        "classes": getattr(options, "most_classes", math.inf),
        "buffer": getattr(options, "most_buffer", math.inf),
    }
    kept = {axis: [v for v in found if v <= most.get(axis, math.inf)] for axis, found in values.items()}
    return {axis: found for axis, found in kept.items() if axis in options.axes and found}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    device = begin(options)
    plan, times = options.plan, {"repeats": options.repeats, "seconds": options.seconds}
    result: dict[str, Any] = {
        "benchmark": "cost_growth",
        "machine": prepare_machine(device),
        "arguments": {
            **run_values(options),
            "preset": getattr(options, "preset", None),
            "tf32": options.tf32,
        },
        "sizes": vars(plan.sizes),
        "case": vars(plan.case),
        "interval": INTERVAL,
        "alone": [],
        "step": [],
    }
    if "alone" in options.layers:
        for axis, values in chosen(plan.alone, options).items():
            say(f"selection alone over {axis}")
            result["alone"].append(measure_alone(axis, values, plan.sizes, device, options.seed, **times))
            gc.collect()
    if "step" in options.layers:
        for axis, values in chosen(plan.step, options).items():
            result["step"].append(measure_steps(axis, values, plan.case, device, options.seed, **times))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    result["machine"]["load_at_end"] = load_average()
    print_report(result)
    finish(options, result)
    if "plot" in options:
        draw(options.plot, result)
        print(f"drawn to {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
