"""Time of the ways to align mixed pairs over the number of classes, up to where each runs out of memory; its plot."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _measure import machine_line, quantiles, seconds_of
from _selection_problem import Problem, Sizes, make_problem
from _selection_rivals import OutOfMemory, Rival, make_field, ran_out, room

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEFT_OUT = ("reference",)
"""The package's own reference is for tests, and no way to do the work."""

_ENDINGS = (".png", ".svg", ".pdf")
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def sweep(
    sizes: Sizes,
    classes: Sequence[int],
    device: torch.device,
    seed: int,
    *,
    dtype: torch.dtype,
    precisions: Sequence[str],
    peers: bool,
    repeats: int,
) -> dict[str, Any]:
    """Times of all ways at every number of classes, the other sizes as given.

    Each way looks for its best chunk anew. A point holds quantiles of the seconds for all pairs, or None and what it
    would need where there is no room; a way is absent from numbers of classes that it was not tried with.
    """
    ways: dict[str, dict[str, Any]] = {}
    for number in classes:
        problem = make_problem(replace(sizes, classes=number), seed).to(device).stored_in(dtype)
        field = make_field(problem, device, precisions=precisions, peers=peers)
        everyone: list[Rival | OutOfMemory] = [*field.rivals, *field.out_of_memory]
        for found in everyone:
            if found.name in LEFT_OUT:
                continue
            # The chunk differs from point to point, so it is no part of the curve's name.
            label = found.label.split(", ")
            chunked = isinstance(found, Rival) and found.chunk is not None
            way = ways.setdefault(found.name, {"name": found.name, "label": "", "points": {}})
            way["label"] = ", ".join(label[:-1]) if chunked else found.label
            way["points"][number] = _point(found, problem, device, repeats)
        del problem, field, everyone, found
        gc.collect()
    for way in ways.values():
        way["points"] = [way["points"].get(number, _none(number)) for number in classes]
    return {"classes": list(classes), "ways": list(ways.values())}


def _point(way: Rival | OutOfMemory, problem: Problem, device: torch.device, repeats: int) -> dict[str, Any]:
    number = len(problem.bias)
    if isinstance(way, OutOfMemory):
        return {**_none(number), "out_of_memory": str(way), "needed": way.needed}
    part = way.timed(problem)
    try:
        first = seconds_of(lambda: way.run(part), device)
        samples = [seconds_of(lambda: way.run(part), device) for _ in range(repeats if first < 1 else 2)]
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return {**_none(number), "out_of_memory": str(OutOfMemory(way.name, way.label, None, room(device)))}
    return {
        "classes": number,
        "seconds": quantiles([s * problem.pairs / part.pairs for s in samples]),
        "samples": len(samples),
        "chunk": way.chunk,
        "pairs_timed": part.pairs,
        "extrapolated": part.pairs < problem.pairs,
        "out_of_memory": None,
        "needed": None,
    }


def _none(number: int) -> dict[str, Any]:
    return {
        "classes": number,
        "seconds": None,
        "samples": 0,
        "chunk": None,
        "pairs_timed": 0,
        "extrapolated": False,
        "out_of_memory": None,
        "needed": None,
    }


# ------------------------------------------------------------------------------------------------------------- picture


def check_picture(path: Path) -> str | None:
    """None, or why no picture can be written there."""
    if path.suffix.lower() not in _ENDINGS:
        return f"got {path.name!r}, expected a name that ends in {', '.join(_ENDINGS)}"
    if not path.absolute().parent.is_dir():
        return f"no folder {path.absolute().parent}"
    if importlib.util.find_spec("matplotlib") is None:
        return "it needs matplotlib, which is not installed"
    return None


def draw(path: Path, result: dict[str, Any]) -> None:
    """Write the picture of a result's sweep: medians, and as bands the 20 and 80 % quantiles; whole or not at all."""
    from matplotlib.figure import Figure

    sizes = Sizes(**result["sizes"])
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    axes = figure.add_subplot()
    for index, way in enumerate(result["sweep"]["ways"]):
        _curve(axes, way, index)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("classes")
    axes.set_ylabel(f"seconds for all {sizes.pairs:,} pairs")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title(
        f"Alignment of all mixed pairs, N = {sizes.n}, M = {sizes.m}, d = {sizes.features}, "
        f"{result['arguments']['dtype']} on {result['arguments']['device']}\n"
        "dashed: extrapolated from a sample of pairs; ×: the last size that there was memory for",
        fontsize=10,
    )
    figure.supxlabel(machine_line(result["machine"]), fontsize=6)
    kind = path.suffix.lower().removeprefix(".")
    temporary = path.with_name(path.name + ".part")
    try:
        figure.savefig(temporary, format=kind, dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _curve(axes: Axes, way: dict[str, Any], index: int) -> None:
    points = [point for point in way["points"] if point["seconds"] is not None]
    if not points:
        return
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    x = [point["classes"] for point in points]
    low, middle, high = ([point["seconds"][level] for point in points] for level in ("p20", "p50", "p80"))
    dashed = any(point["extrapolated"] for point in points)
    ours = way["label"].startswith("gradmix")
    axes.plot(
        x,
        middle,
        color=colour,
        marker=marker,
        markersize=4,
        linestyle="--" if dashed else "-",
        linewidth=2.5 if ours else 1.2,
        label=way["label"],
    )
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if any(point["out_of_memory"] for point in way["points"]):
        axes.plot(x[-1:], middle[-1:], color=colour, marker="x", markersize=10, markeredgewidth=2)
