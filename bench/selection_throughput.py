"""Times the alignment of all pairs of mixed samples against the ways to have it otherwise.

Every row of the first table does the same work: from features, logits and labels of N samples and M candidates and a
reference gradient, the inner product and the cosine of each of the N x M mixed last-layer gradients with the reference.
See bench/README.md for the rules.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
    queued_seconds,
    run_values,
    say,
    seconds_of,
    show_bytes,
    show_count,
    show_table,
    show_time,
    warm_up,
)
from _peers import versions
from _rates import PRECISIONS, Product, measure_rates
from _selection_problem import (
    LAM,
    PRESETS,
    QUICK,
    Alignments,
    Problem,
    Sizes,
    as_float32,
    make_problem,
    truth,
    with_logits_up_to,
)
from _selection_rivals import Field, OutOfMemory, Rival, feature_norms, make_field, projections, ran_out, room
from _selection_sweep import check_picture, draw, sweep
from torch import nn

import gradmix
from gradmix.model.head_capture import HeadCapture
from gradmix.ops.mixed_alignment import Side, mixed_alignment
from gradmix.references import reference_gradient

BAND = 1e-6
"""A pair whose inner product is smaller than this share of the largest is too close to zero for its decision to count;
likewise the cosine of a gradient whose norm is."""

HUGE_LOGIT = 1e4
HUGE_ROWS = 64
"""Size of the largest logit, and samples on each side, of the second set of inputs."""

CHECKED_ROWS = 64
CHECKED_ELEMENTS = 1 << 25
"""Samples on each side whose pairs are compared with float64, and the most elements of their mixed logits."""

SLOW = 1.0
"""Seconds a call, from which on it is timed in rounds of its own, of which there are fewer."""

SWEPT = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000)
SWEPT_QUICK = (10, 30, 100)
"""Numbers of classes of a sweep unless named."""

TABLE_LAMS = (0.125, 0.375, 0.625, 0.875)
TABLE_CLASSES = 1000
"""Mixing weights and most classes of the class table that is timed."""

BASELINES = ("row_loop", "row_loop_tuned")
"""The rivals that speed-ups are given over."""


# -------------------------------------------------------------------------------------------------------- measurements


def errors(rival: Rival, problem: Problem) -> dict[str, Any]:
    """The errors of a rival against float64 on the pairs of the first samples, and whether its decisions are the same.

    An error that is not a number, or infinite, is None, and a decision made of one is not the same.
    """
    most = max(1, min(CHECKED_ROWS, math.isqrt(CHECKED_ELEMENTS // len(problem.bias))))
    rows = min(len(problem.labels_a), most), min(len(problem.labels_b), most)
    # The pair-by-pair ones are too slow for that many.
    part = problem.first(min(rows[0], 8), min(rows[1], 8)) if rival.sample else problem
    found, found_angle = rival.run(part)
    inner = found[: rows[0], : rows[1]].cpu().double()
    exact = truth(problem.first(*rows), rival.through_head)
    largest, largest_norm = float(exact[0].abs().max()), float(exact[1].max())
    exact_inner, exact_norm, exact_angle = (v[: len(inner), : inner.shape[1]] for v in exact)
    clear = exact_inner.abs() > BAND * largest
    same = (((inner >= 0) == (exact_inner >= 0)) & inner.isfinite())[clear]
    angle_error = None
    if found_angle is not None:
        angle = found_angle[: rows[0], : rows[1]].cpu().double()
        differences = (angle - exact_angle).abs()[exact_norm > BAND * largest_norm]
        angle_error = float(differences.max()) if len(differences) else 0.0
    return {
        "pairs": inner.numel(),
        "inner": _finite(float((inner - exact_inner).abs().max()) / largest),
        "cosine": _finite(angle_error),
        "pairs_outside_band": int(clear.sum()),
        "decisions_agree": float(same.double().mean()) if len(same) else 1.0,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def in_rounds(
    calls: Mapping[str, Call], always: Sequence[str], device: torch.device, *, repeats: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Samples of every call, taken in turn, the slow ones' in rounds of their own; by call, those of its rounds.

    Args:
        calls: by name; warmed up before.
        always: names of calls that take part in all rounds, whatever they take, since others are compared with them.
        device: where they run.
        repeats, seconds: as for :func:`_measure.interleaved`; slow ones are called 5 times at least, others 10.
    """
    slow = {name for name, call in calls.items() if name not in always and seconds_of(call, device) >= SLOW}
    rounds = [([name for name in calls if name not in slow], 10), ([*always, *slow], 5)]
    taken: dict[str, dict[str, list[float]]] = {}
    for names, least in rounds:
        if all(name in taken for name in names):
            continue
        share = seconds if not slow else seconds / 2
        samples = interleaved(
            {name: calls[name] for name in names}, device, repeats=repeats, seconds=share, least=min(least, repeats)
        )
        taken |= {name: samples for name in names if name not in taken}
    return taken


def measure_alignment(
    sizes: Sizes,
    device: torch.device,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    precisions: Sequence[str] = ("tf32x3",),
    peers: bool = True,
    quick: bool = False,
    repeats: int,
    warmups: int,
    seconds: float,
) -> dict[str, Any]:
    """The first two tables: times, memory and errors of every rival."""
    problem = make_problem(sizes, seed).to(device).stored_in(dtype)
    huge = with_logits_up_to(problem.first(HUGE_ROWS, HUGE_ROWS), HUGE_LOGIT)
    say("the machine's own rates")
    product = Product.on(device, quick)
    rates = measure_rates(product, device, quick)
    say("looking for the best chunk sizes")
    field = make_field(problem, device, precisions=precisions, peers=peers)
    say("warming up")
    calls: dict[str, Call] = {rival.name: _Call(rival.run, rival.timed(problem)) for rival in field.rivals}
    # Before the shared products, which leave the inputs in the caches as the first rival's other neighbours do.
    calls["matrix product"] = product
    wide = as_float32(problem)
    calls["shared products"] = lambda: (projections(wide), feature_norms(wide))
    field, warmed = warmed_up(field, calls, device, warmups)
    say(f"timing, {repeats} rounds or {seconds:.0f} s")
    taken = in_rounds(calls, BASELINES, device, repeats=repeats, seconds=seconds)
    # Beside the rivals, so that whatever slows the machine down slows the rate as well.
    rates = rates.with_products_at(product.flops / quantiles(taken["matrix product"]["matrix product"])["p50"])
    say("errors and memory")
    flops, least = sizes.flops, sizes.least_bytes(dtype.itemsize)
    rows = []
    for rival in field.rivals:
        rounds = taken[rival.name]
        whole = [s * sizes.pairs / rival.timed(problem).pairs for s in rounds[rival.name]]
        time_of_all = quantiles(whole)
        attainable = rates.attainable_seconds(flops, least, rival.precision)
        row = {
            "name": rival.name,
            "label": rival.label,
            "precision": rival.precision,
            "chunk": rival.chunk,
            "pairs_timed": rival.timed(problem).pairs,
            "extrapolated": rival.timed(problem).pairs < sizes.pairs,
            "has_cosine": rival.has_cosine,
            "samples": len(whole),
            "warmups": warmed[rival.name],
            "seconds": time_of_all,
            "pairs_per_second": sizes.pairs / time_of_all["p50"],
            "speedup_over": {name: paired_ratio(rounds[name], whole) for name in BASELINES},
            "attainable_seconds": attainable,
            "share_of_attainable": attainable / time_of_all["p50"],
            "peak_memory_bytes": peak_memory(calls[rival.name], device) if rival.in_torch else None,
            "error": errors(rival, problem),
            "error_huge_logits": errors(rival, huge),
        }
        if device.type == "cuda":
            queued = [queued_seconds(calls[rival.name], device) for _ in range(min(repeats, 20))]
            factor = sizes.pairs / rival.timed(problem).pairs
            row["queued_seconds"] = quantiles([factor * s for s in queued])
        rows.append(row)
    favourite = torch.softmax(problem.logits_a.float(), 1).amax(1).double()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "flops": flops,
        "flops_formula": f"8 N M C + 2 {'N' if sizes.own_rows else '(N + M)'} C (d + 1) + 2 N M d",
        "least_bytes": least,
        "rates": {"product": str(product), **rates.as_figures()},
        "shared_products": {"seconds": quantiles(taken["shared products"]["shared products"])},
        "favourite_probability": {f"p{k}": float(favourite.quantile(k / 100)) for k in (5, 20, 50, 80, 95)},
        "huge_logits": {"largest": HUGE_LOGIT, "rows": len(huge.labels_a), "candidates": len(huge.labels_b)},
        "refused": field.refused,
        "out_of_memory": [{**vars(way), "reason": str(way)} for way in field.out_of_memory],
        "auto_backend": field.auto,
        "seconds_a_pair_by_chunk": {
            way: {str(chunk): value for chunk, value in by_chunk.items()} for way, by_chunk in field.searched.items()
        },
        "rows": rows,
    }


def warmed_up(field: Field, calls: dict[str, Call], device: torch.device, warmups: int) -> tuple[Field, dict[str, int]]:
    """The field without those that run out of memory, which leave ``calls``, and how often each call was warmed up."""
    warmed: dict[str, int] = {}
    lost: dict[str, OutOfMemory] = {}
    labels = {rival.name: rival.label for rival in field.rivals}
    for name, call in list(calls.items()):
        try:
            warmed[name] = warm_up(call, device, warmups)
        except RuntimeError as error:
            if name not in labels or not ran_out(error):
                raise
            lost[name] = OutOfMemory(name, labels[name], None, room(device))
            del calls[name]
    rivals = [rival for rival in field.rivals if rival.name not in lost]
    return replace(field, rivals=rivals, out_of_memory=[*field.out_of_memory, *lost.values()]), warmed


@dataclass(frozen=True)
class _Call:
    """A rival's run on its problem."""

    run: Callable[[Problem], Alignments]
    problem: Problem

    def __call__(self) -> Alignments:
        return self.run(self.problem)


def measure_selection(
    sizes: Sizes, device: torch.device, seed: int, repeats: int, warmups: int, seconds: float
) -> dict[str, Any]:
    """The third table: the whole call on a small network, against that network's own forward pass and training step."""
    say(f"select_pairs on a small network, {sizes.buffer} samples in the buffer")
    d, classes = sizes.features, sizes.classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, classes)).to(device)
    generator = torch.Generator().manual_seed(seed)
    rows = (sizes.n, sizes.buffer)
    x, buffer_x = (torch.randn(number, d, generator=generator).to(device) for number in rows)
    y, buffer_y = (torch.randint(classes, (number,), generator=generator).to(device) for number in rows)
    buffer = (buffer_x, buffer_y)
    reference = reference_gradient(model, buffer)
    with torch.no_grad(), HeadCapture(model, example=x[:1]) as capture:
        model(x)
    outputs = capture.output

    def forward() -> object:
        with torch.no_grad():
            return model(x)

    def step() -> object:
        return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))

    draw_from = torch.Generator().manual_seed(seed)

    def select(criterion: Any, **given: Any) -> Call:
        return lambda: gradmix.select_pairs(
            model, buffer, (x, y), criterion=criterion, lam=LAM, generator=draw_from, **given
        )

    captures = "cuda_graph" in inspect.signature(gradmix.GradMix).parameters

    def kept(graph: bool = False) -> Call:
        # By sample: it has no table of classes, whose first computation takes long where there are many.
        more: dict[str, Any] = {"cuda_graph": graph} if captures else {}
        mixup = gradmix.GradMix(model, buffer, criterion="sample", refresh="epoch", generator=draw_from, **more)
        return lambda: mixup.select(x, y, lam=LAM, outputs=outputs)

    def class_table() -> object:
        side = Side(*prototypes)
        return mixed_alignment(side, side, reference, table_lams)

    many = min(classes, TABLE_CLASSES)
    with torch.no_grad():
        hidden = model[:2](torch.randn(many, d, generator=generator).to(device))
        prototypes = hidden, model[2](hidden), torch.arange(many, device=device)
    table_lams = torch.tensor(TABLE_LAMS, dtype=torch.float64, device=device)
    given = {"reference": reference, "outputs": outputs}
    calls: dict[str, tuple[str, Call]] = {
        "forward": ("forward pass of the batch", forward),
        "step": ("forward and backward pass of the batch", step),
        "reference": ("reference gradient of the buffer", lambda: reference_gradient(model, buffer)),
        "sample": ("select_pairs, sample", select("sample")),
        "class": ("select_pairs, class", select("class")),
        "sample_given": ("select_pairs, sample, reference and outputs given", select("sample", **given)),
        "class_given": ("select_pairs, class, reference and outputs given", select("class", **given)),
        "kept": ("GradMix, sample, reference kept and outputs given", kept()),
        "class_table": (f"class table, {many} x {many} classes, {len(TABLE_LAMS)} lam", class_table),
    }
    refused = {}
    if device.type != "cuda":
        refused["GradMix, CUDA graph"] = f"CUDA graphs need a CUDA device, and this is {device}"
    elif not captures:
        refused["GradMix, CUDA graph"] = "this version of gradmix has no cuda_graph"
    else:
        graph = kept(graph=True)
        calls["graph"] = ("GradMix, sample, CUDA graph, reference kept and outputs given", graph)
    runs = {name: call for name, (_, call) in calls.items()}
    warmed = {name: warm_up(call, device, warmups) for name, call in runs.items()}
    taken = in_rounds(runs, ("forward",), device, repeats=repeats, seconds=seconds)
    return {
        "model": f"Linear({d}, {d}), ReLU, Linear({d}, {classes})",
        "batch_rows": sizes.n,
        "buffer_rows": sizes.buffer,
        "refused": refused,
        "rows": [
            {
                "name": name,
                "label": label,
                "samples": len(taken[name][name]),
                "warmups": warmed[name],
                "seconds": quantiles(taken[name][name]),
                "this_over_forward": paired_ratio(taken[name][name], taken[name]["forward"]),
                **_queued(runs[name], device, min(repeats, 20)),
            }
            for name, (label, _) in calls.items()
        ],
    }


def _queued(call: Call, device: torch.device, samples: int) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    return {"queued_seconds": quantiles([queued_seconds(call, device) for _ in range(samples)])}


# -------------------------------------------------------------------------------------------------------------- report


def show_ratio(ratio: dict[str, float]) -> str:
    """The median and, in brackets, the middle of its spread."""
    digits = [
        f"{ratio[level]:.2g}" if ratio[level] < 99.5 else f"{ratio[level]:.0f}" for level in ("p50", "p20", "p80")
    ]
    return f"{digits[0]}x ({digits[1]}-{digits[2]})"


def show_error(error: float | None, has: bool = True) -> str:
    """An error, with a word where there is none because a result was not finite, or a dash where there is no result."""
    if error is None:
        return "not finite" if has else "-"
    return f"{error:.1e}"


def _show_queued(row: dict[str, Any]) -> list[str]:
    return [show_time(row["queued_seconds"]["p50"])] if "queued_seconds" in row else []


def show_part(title: str, columns: list[str], rows: list[list[str]], notes: list[str], brief: Sequence[int]) -> None:
    """Show a table; if ``brief``, those columns only, with short labels, as a terminal of 80 columns has room for."""
    if brief:
        columns = [columns[place] for place in brief]
        notes = [note for note in notes if not note.startswith(("of attainable", "huge logits", "  "))]
        rows = [[re.sub(r", \d+ (samples|pairs) at a time", "", row[0]), *(row[k] for k in brief[1:])] for row in rows]
    show_table(title, columns, rows, notes)


def print_report(result: dict[str, Any]) -> None:
    """The tables of a result, for a person; of a quick one the columns that matter first."""
    sizes = Sizes(**result["sizes"])
    arguments, alignment, selection = result["arguments"], result["alignment"], result["select_pairs"]
    rows = alignment["rows"]
    on_device = ["on device"] if "queued_seconds" in rows[0] else []
    print()
    print(machine_line(result["machine"]))
    favourite = alignment["favourite_probability"]
    print(
        f"N = {sizes.n}, M = {sizes.m} ({'the same' if sizes.own_rows else 'other'} samples), C = {sizes.classes}, "
        f"d = {sizes.features}, "
        f"{alignment['dtype']} on {arguments['device']}, TF32 in torch {'on' if arguments['tf32'] else 'off'}; "
        f"favourite class's probability "
        f"{favourite['p20']:.2f} / {favourite['p50']:.2f} / {favourite['p80']:.2f} (p20 / p50 / p80)\n"
    )
    rates = alignment["rates"]
    by_precision = ", ".join(f"{name} {show_count(rate, 'flop/s')}" for name, rate in rates["flops_per_second"].items())
    timed = sorted({row["pairs_timed"] for row in rows if row["extrapolated"]})
    samples = sorted({row["samples"] for row in rows})
    lost = alignment["out_of_memory"]
    columns = ["", "p20", "p50", "p80", *on_device, "pairs/s", "over loop", "over tuned loop", "of attainable"]
    quick = arguments["quick"]
    show_part(
        "All pairs: inner products and cosines"
        if quick
        else "All pairs: inner products and cosines; speed-up over the per-sample loop and the tuned one (20-80 %)",
        [*columns, "peak memory"],
        [
            [
                row["label"] + (" *" if row["extrapolated"] else ""),
                *(show_time(row["seconds"][level]) for level in ("p20", "p50", "p80")),
                *_show_queued(row),
                show_count(row["pairs_per_second"]),
                *(show_ratio(row["speedup_over"][name]) for name in BASELINES),
                f"{row['share_of_attainable']:.2%}",
                "-" if row["peak_memory_bytes"] is None else show_bytes(row["peak_memory_bytes"]),
            ]
            for row in rows
        ],
        [
            *(f"{way['label']}: {way['reason']}" for way in lost),
            f"projections and Gram product, part of the time of gradmix and the tuned loop: "
            f"{show_time(alignment['shared_products']['seconds']['p50'])}",
            f"* extrapolated from {' or '.join(map(str, timed))} of the {sizes.pairs} pairs; memory of that sample",
            f"{' or '.join(map(str, samples))} samples a row, taken in turn, after {min(r['warmups'] for r in rows)} "
            f"to {max(r['warmups'] for r in rows)} calls to warm up; ratios are of samples of the same round",
            f"of attainable: max(flops / rate of products, bytes / bandwidth) = "
            f"{show_time(min(r['attainable_seconds'] for r in rows))} over the row's time; every row is charged the "
            f"work of the factorised form,",
            f"  {alignment['flops_formula']} = {show_count(alignment['flops'], 'flop')} and "
            f"{show_bytes(alignment['least_bytes'])} (inputs read once, results written once)",
            f"  measured in this run: {by_precision} by {rates['product']}; "
            f"{show_count(rates['bytes_per_second'], 'B/s')} read and written by a copy",
            f"auto takes backend {alignment['auto_backend']}",
            *(f"{name} left out: {reason}" for name, reason in alignment["refused"].items()),
            *(["on device: while the host is ahead of it, so without the time to queue the work"] if on_device else []),
        ],
        [0, 2, len(columns) - 3] if quick else [],
    )
    show_part(
        "Error against float64, and decisions (sign of the inner product) that agree",
        ["", "pairs", "inner", "cosine", "decisions", "huge logits: inner", "cosine", "decisions"],
        [
            [
                row["label"],
                str(row["error"]["pairs"]),
                *(
                    text
                    for error in (row["error"], row["error_huge_logits"])
                    for text in (
                        show_error(error["inner"]),
                        show_error(error["cosine"], row["has_cosine"]),
                        f"{error['decisions_agree']:.2%}",
                    )
                ),
            ]
            for row in rows
        ],
        [
            f"inner: max |S - S64| / max |S64|; decisions: where |S64| > {BAND:g} max |S64|",
            f"cosine: largest difference, where the gradient's norm is above {BAND:g} of the largest; - has none",
            f"huge logits: the largest is {alignment['huge_logits']['largest']:.0f}; up to {HUGE_ROWS} samples a side",
        ],
        [0, 2, 3, 4] if quick else [],
    )
    show_part(
        f"The whole call: batch of {selection['batch_rows']} samples, buffer of {selection['buffer_rows']}, "
        f"{selection['model']}",
        ["", "p20", "p50", "p80", *on_device, "this / forward (20-80 %)"],
        [
            [
                row["label"],
                *(show_time(row["seconds"][level]) for level in ("p20", "p50", "p80")),
                *_show_queued(row),
                show_ratio(row["this_over_forward"]),
            ]
            for row in selection["rows"]
        ],
        [
            "estimator feature, candidates are the batch's own samples; "
            f"{' or '.join(map(str, sorted({r['samples'] for r in selection['rows']})))} samples a row",
            *(f"{name} left out: {reason}" for name, reason in selection["refused"].items()),
        ],
        [0, 2, -1] if quick else [],
    )
    if "sweep" in result:
        swept = result["sweep"]["classes"]
        show_table(
            f"Median time of all {sizes.pairs} pairs over the number of classes",
            ["", *map(str, swept)],
            [[way["label"], *(_show_point(point) for point in way["points"])] for way in result["sweep"]["ways"]],
            ["* extrapolated from a sample of pairs", "in brackets: out of memory, the bytes it would need"],
        )


def _show_point(point: dict[str, Any]) -> str:
    if point["seconds"] is None:
        return f"({show_bytes(point['needed'])})" if point["needed"] else "(out of memory)"
    return show_time(point["seconds"]["p50"]) + (" *" if point["extrapolated"] else "")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    absent = argparse.SUPPRESS
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="sizes of a common case (default: imagenet)", default=absent
    )
    parser.add_argument("--n", type=count, help="rows", default=absent)
    parser.add_argument("--m", type=count, help="candidates, other samples than the samples to mix", default=absent)
    parser.add_argument("--foreign", action="store_true", help="candidates are other samples, though as many")
    parser.add_argument("--classes", type=count, help="classes", default=absent)
    parser.add_argument("--features", type=count, help="features the head sees", default=absent)
    parser.add_argument("--buffer", type=count, help="samples of the buffer of the whole call", default=absent)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of features and logits")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["tf32x3"], help="of the Triton body, a row each"
    )
    parser.add_argument("--tf32", action="store_true", help="let torch's float32 products on a GPU use TF32")
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes unless named, few repeats: a look, not a measurement"
    )
    parser.add_argument(
        "--classes-sweep", type=count, nargs="*", metavar="C", help="time over these numbers of classes", default=absent
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the sweep: .png, .svg or .pdf; implies one", default=absent
    )
    add_run_arguments(
        parser,
        quick_repeats=5,
        seconds=75.0,
        stop="stop the rounds of a table then, though not before 10",
        seed="of the inputs",
        devices="cpu, cuda, cuda:1, mps",
    )
    options = parser.parse_args(arguments)
    base = PRESETS[options.preset] if "preset" in options else QUICK if options.quick else PRESETS["imagenet"]
    given = ("n", "m", "classes", "features", "buffer")
    named = {name: getattr(options, name) for name in given if name in options}
    own_rows = base.own_rows and "m" not in options and not options.foreign
    if own_rows and "n" in options:
        named["m"] = options.n
    options.sizes = replace(base, **named, own_rows=own_rows)
    swept = getattr(options, "classes_sweep", [] if "plot" in options else None)
    if swept is not None:
        swept = sorted(set(swept or (SWEPT_QUICK if options.quick else SWEPT)))
    options.classes_sweep = swept
    if "plot" in options:
        complaint = check_picture(options.plot)
        if complaint:
            parser.error(f"argument --plot: {complaint}")
    check_run(parser, options)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    device = begin(options)
    warmups = 2 if options.quick else 10
    result: dict[str, Any] = {
        "benchmark": "selection_throughput",
        "machine": prepare_machine(device),
        "arguments": {
            **run_values(options),
            "preset": getattr(options, "preset", None),
            "dtype": options.dtype,
            "precision": options.precision,
            "tf32": options.tf32,
            "peers": not options.no_peers,
            "classes_sweep": options.classes_sweep,
        },
        "peers": versions(),
        "sizes": vars(options.sizes),
        "lam": LAM,
        "band": BAND,
        "alignment": measure_alignment(
            options.sizes,
            device,
            options.seed,
            dtype=getattr(torch, options.dtype),
            precisions=options.precision,
            peers=not options.no_peers,
            quick=options.quick,
            repeats=options.repeats,
            warmups=warmups,
            seconds=options.seconds,
        ),
        "select_pairs": measure_selection(
            options.sizes, device, options.seed, options.repeats, warmups, options.seconds / 3
        ),
    }
    if options.classes_sweep:
        say(f"sweep over {', '.join(map(str, options.classes_sweep))} classes")
        result["sweep"] = sweep(
            options.sizes,
            options.classes_sweep,
            device,
            options.seed,
            dtype=getattr(torch, options.dtype),
            precisions=options.precision,
            peers=not options.no_peers,
            repeats=3 if options.quick else 7,
        )
    result["machine"]["load_at_end"] = load_average()
    print_report(result)
    finish(options, result)
    if "plot" in options:
        draw(options.plot, result)
        print(f"drawn to {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
