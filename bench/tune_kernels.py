"""Times every configuration of the Triton kernels at the benchmark's sizes, and says what the committed choice loses.

The kernels never time themselves: which configuration runs is a function of the sizes, read off a small table in each
kernel's module. This script gives the figures by which that table is set. See bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _measure import (
    check_places,
    count,
    interleaved,
    load_average,
    machine,
    machine_line,
    paired_ratio,
    positive,
    quantiles,
    say,
    show_bytes,
    show_table,
    show_time,
    warm_up,
    write_json,
)
from _rates import PRECISIONS
from alignment_kernels import COLD, MOST_SETS, Task, Way, captured, each, on, tasks

from gradmix.ops import _triton

MODULES = {
    "mixed_alignment": "mixed_alignment",
    "class_pair_sums": "mixed_alignment",
    "cosine_alignment": "cosine_alignment",
    "mixed_gram_alignment": "cosine_alignment",
    "last_layer_gradient": "last_layer_gradient",
    "draw_partners": "draw_partners",
}
"""The kernel module behind a task's operator."""

TABLES = {"mixed_alignment": "HARD"}
"""Names of modules' tables of configurations other than CONFIGURATIONS."""

GRIDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "mixed_alignment": tuple(
        (*tile, warps, stages)
        for tile, warps, stages in product(((32, 32), (64, 32), (64, 64), (128, 64)), (4, 8), (2, 1, 3))
    ),
    "cosine_alignment": tuple(product((32, 64, 128), (4, 8), (3, 2, 4))),
    "last_layer_gradient": tuple(
        (*tile, warps, stages)
        for tile, warps, stages in product(((32, 64), (64, 64), (64, 128), (128, 128)), (4, 8), (2, 3))
    ),
    "draw_partners": tuple(product((256, 512, 1024, 2048, 4096), (1, 2, 4, 8))),
}
"""Configurations beyond a module's table, tried while time is left: its fields in order."""

WHOLE = "sums whole"
"""What is said of the chosen configuration where its sums are not split, beside the parts that it takes by itself."""

CAPABILITIES = (80, 90)
"""Compute capabilities that kernels are compiled for: of an A100, and of an H100 or H200."""


# -------------------------------------------------------------------------------------------------------------- choose


def module_of(task: Task) -> Any:
    """The kernel module that a task's Triton ways run."""
    return importlib.import_module(f"gradmix.kernels.{MODULES[operator_of(task)]}")


def operator_of(task: Task) -> str:
    """The operator's name, a policy left out."""
    return task.operator.partition(",")[0]


def way_of(task: Task, precision: str) -> Way | None:
    """The way that runs the kernel with the least beside it, or None where no kernel can run."""
    found = {way.name: way for way in task.ways}
    for name in (f"kernel_{precision}", f"triton_{precision}", "triton"):
        if name in found:
            return found[name]
    return None


@contextlib.contextmanager
def forced(module: Any, choice: tuple[int, ...], whole: bool = False) -> Iterator[None]:
    """Have a kernel module take one configuration for all sizes and, if ``whole``, split no sums."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "configuration", lambda *_sizes: choice))
        if whole:
            stack.enter_context(mock.patch.object(module, "parts", lambda *_sizes: 1))
        yield


def results_of(module: Any, name: str, run: Callable[[], object]) -> set[Any]:
    """The results of a kernel module's function ``name`` while ``run`` is called; none if there is no such function."""
    if not hasattr(module, name):
        return set()
    found, function = set(), getattr(module, name)

    def note(*sizes: Any) -> Any:
        found.add(result := function(*sizes))
        return result

    with mock.patch.object(module, name, note):
        run()
    return found


def choice_of(module: Any, run: Callable[[], object]) -> tuple[int, ...]:
    """The configuration that ``run`` takes by itself, of the table's own type."""
    taken: set[tuple[int, ...]] = results_of(module, "configuration", run)
    assert len(taken) == 1, f"one call took the configurations {taken}"
    return taken.pop()


def candidates(module: Any, name: str, wide: bool) -> list[Any]:
    """The table's configurations, then those of the grid; of the table's own type."""
    table = list(getattr(module, TABLES.get(name, "CONFIGURATIONS")))
    if not wide:
        return table
    kind = type(table[0])
    made = [kind(*fields) if hasattr(kind, "_fields") else fields for fields in GRIDS[name]]
    return table + [choice for choice in made if choice not in table]


# ---------------------------------------------------------------------------------------------------------------- tune


def tune(
    task: Task, device: torch.device, precision: str, wide: bool, repeats: int, seconds: float, until: float
) -> dict[str, Any] | None:
    """The times of all configurations for a task, or None if no kernel can run it.

    Args:
        task: of :func:`alignment_kernels.tasks`.
        device: where its inputs go.
        precision: of the products.
        wide: whether the grid is tried after the table.
        repeats: rounds.
        seconds: of all rounds.
        until: no further configuration of the grid is compiled after this time (``time.perf_counter``).
    """
    way = way_of(task, precision)
    if way is None:
        return None
    module, name = module_of(task), MODULES[operator_of(task)]
    first = task.make(0)
    bytes_of_one = sum(value.numel() * value.element_size() for value in first)
    number = min(MOST_SETS, 1 + COLD // bytes_of_one) if device.type == "cuda" else 1
    sets = [on(device, first)] + [on(device, task.make(k)) for k in range(1, number)]
    once = partial(way.run, sets[0])
    chosen = choice_of(module, once)
    committed = " ".join(map(str, chosen))
    expected = [value.clone() for value in way.run(sets[0])]
    every = candidates(module, name, wide)
    table = {tuple(choice) for choice in candidates(module, name, False)}
    if chosen not in {tuple(choice) for choice in every}:
        every.insert(0, chosen)
    calls: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    differences: dict[str, float] = {}
    settings: dict[str, tuple[int, ...]] = {}
    trials = [(" ".join(map(str, choice)), choice, False) for choice in every]
    undivided = f"{committed}, {WHOLE}"
    if max(results_of(module, "parts", once), default=1) > 1:
        trials.insert(0, (undivided, chosen, True))
    for label, choice, whole in trials:
        if tuple(choice) not in table and time.perf_counter() > until:
            failed[label] = "no time was left"
            continue
        settings[label] = tuple(choice)
        try:
            with forced(module, choice, whole):
                results = way.run(sets[0])
                warm_up(partial(each, way.run, sets), device, 3)
                graph = captured(way.run, sets) if device.type == "cuda" else partial(each, way.run, sets)
        except Exception as error:
            # Triton's own errors have no common class: too many registers, too much shared memory, a failed assertion.
            failed[label] = f"{type(error).__name__}: {(str(error) or 'no word').splitlines()[0]}"
            continue
        if isinstance(graph, str):
            failed[label] = graph
            continue
        differences[label] = max(
            float((a.double() - b.double()).abs().max()) for a, b in zip(results, expected, strict=True)
        )
        calls[label] = graph if device.type == "cuda" else partial(_under, module, choice, whole, graph)
    samples = interleaved(calls, device, repeats=repeats, seconds=seconds, least=5)
    rows: list[dict[str, Any]] = [
        {
            "configuration": label,
            "fields": settings[label],
            "in_table": settings[label] in table,
            "chosen": label == committed,
            "seconds": quantiles([sample / number for sample in taken]),
            "largest_difference": differences[label],
        }
        for label, taken in samples.items()
    ]
    rows.sort(key=lambda row: row["seconds"]["p50"])
    best = str(rows[0]["configuration"])
    return {
        "title": task.title,
        "operator": task.operator,
        "sizes": task.sizes,
        "way": way.name,
        "chosen": committed,
        "best": best,
        "chosen_over_best": paired_ratio(samples[committed], samples[best]) if committed in samples else None,
        "whole_over_split": paired_ratio(samples[undivided], samples[committed])
        if {undivided, committed} <= samples.keys()
        else None,
        "rows": rows,
        "failed": failed,
    }


def _under(module: Any, choice: tuple[int, ...], whole: bool, call: Callable[[], object]) -> None:
    with forced(module, choice, whole):
        call()


def show_tuned(found: dict[str, Any]) -> None:
    """The table of a task, for a person."""
    ratio, splitting = found["chosen_over_best"], found["whole_over_split"]
    show_table(
        f"{found['title']} ({found['way']})",
        ["configuration", "p20", "p50", "p80", "difference", ""],
        [
            [
                row["configuration"],
                *(show_time(row["seconds"][level]) for level in ("p20", "p50", "p80")),
                f"{row['largest_difference']:.0e}",
                "chosen" if row["chosen"] else "in the table" if row["in_table"] else "",
            ]
            for row in found["rows"]
        ],
        [
            *([f"chosen / best: {ratio['p50']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})"] if ratio else []),
            *(
                [f"{WHOLE} / chosen: {splitting['p50']:.2f} ({splitting['p20']:.2f}-{splitting['p80']:.2f})"]
                if splitting
                else []
            ),
            "difference: the largest from the results of the configuration chosen",
            *(f"{label} left out: {reason}" for label, reason in found["failed"].items()),
        ],
    )


# ------------------------------------------------------------------------------------------------------------- compile


def compiled(capabilities: tuple[int, ...], only: str = "") -> list[dict[str, Any]]:
    """Registers, shared memory and spills of every variant whose name holds ``only``; needs no GPU."""
    compiling: Any = importlib.import_module("gradmix.kernels.compiling")
    rows = []
    for name in sorted(set(MODULES.values())):
        module: Any = importlib.import_module(f"gradmix.kernels.{name}")
        for variant in (v for v in module.variants() if only in v.name):
            for capability in capabilities:
                figures = compiling.resource_usage(variant, capability)
                rows.append({"variant": variant.name, "capability": capability, **figures._asdict()})
    return rows


def show_compiled(rows: list[dict[str, Any]]) -> None:
    """The table of the variants, for a person."""
    show_table(
        "Compiled ahead of time",
        ["variant", "for", "registers", "shared memory", "spills", "matrix instructions"],
        [
            [
                row["variant"],
                f"sm_{row['capability']}",
                str(row["registers"]),
                show_bytes(row["shared"]),
                f"{row['spills']} bytes",
                row["matrix_instructions"],
            ]
            for row in rows
        ],
    )


# -------------------------------------------------------------------------------------------------------------- script


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", help="tasks in whose title, and variants in whose name, this occurs", default="")
    parser.add_argument("--precision", choices=PRECISIONS, default="tf32x3", help="of the products")
    parser.add_argument("--wide", action="store_true", help="also configurations beyond the tables, while time is left")
    parser.add_argument("--compile-only", action="store_true", help="only the figures that need no GPU")
    parser.add_argument("--no-compile", action="store_true", help="without these figures")
    parser.add_argument("--repeats", type=count, default=40, help="rounds of a task")
    parser.add_argument("--seconds", type=positive, default=2.0, help="stop a task's rounds then, though not before 5")
    parser.add_argument(
        "--limit", type=positive, default=240.0, help="seconds after which nothing beyond the tables is compiled"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1")
    parser.add_argument("--json", type=Path, help="also write all figures to this file", default=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compile_only and options.no_compile:
        parser.error("arguments --compile-only and --no-compile leave nothing to do")
    if options.compile_only:
        options.device = "cpu"
    check_places(parser, options)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the script; 2 if there is no kernel to time or to compile."""
    options = parse(arguments)
    device = torch.device(options.device)
    if _triton.is_interpreted():
        print("TRITON_INTERPRET is set: kernels are interpreted, neither compiled nor worth timing", file=sys.stderr)
        return 2
    described = machine(device)
    print(machine_line(described) + "\n")
    start = time.perf_counter()
    result: dict[str, Any] = {
        "benchmark": "tune_kernels",
        "machine": described,
        "arguments": {
            name: getattr(options, name)
            for name in ("only", "precision", "wide", "repeats", "seconds", "limit", "device")
        },
        "tasks": [],
        "absent": {},
        "compiled": [],
    }

    def keep() -> None:
        described["load_at_end"] = load_average()
        if "json" in options:  # after each part, so that a run cut short is not lost
            write_json(options.json, result)

    if not options.compile_only:
        chosen = [task for task in tasks(device, False) if options.only in task.title]
        for done, task in enumerate(chosen):
            say(task.title)
            # Every task gets its share of the time that is left.
            until = start + options.limit * (done + 1) / len(chosen)
            tuned = tune(task, device, options.precision, options.wide, options.repeats, options.seconds, until)
            if tuned is None:
                result["absent"][task.title] = task.refused.get("triton", "it has no kernel")
                print(f"{task.title} left out: {result['absent'][task.title]}\n")
                continue
            result["tasks"].append(tuned)
            show_tuned(tuned)
            keep()
        if not result["tasks"]:
            print("no kernel to time", file=sys.stderr)
            return 2
    if not options.no_compile:
        say("compiling")
        result["compiled"] = compiled(CAPABILITIES, options.only)
        if not result["compiled"]:
            print(f"argument --only: no variant's name holds {options.only!r}", file=sys.stderr)
            return 2
        show_compiled(result["compiled"])
        keep()
    if "json" in options:
        print(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
