"""Times the bodies of sketch_project against a product with a stored matrix: `python bench/sketch_project.py`.

The rival is what an engine does without the operator: it makes the random matrix once, keeps it, and multiplies by it
(`project`, which in turn takes the quicker of two ways that torch has, see `gradmix/ops/sketch_project.py`). All rows
are run in one process, in turn; a ratio is the median of the ratios of a round, with its 20 % and 80 % quantiles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measure import (
    interleaved,
    load_average,
    machine_line,
    paired_ratio,
    prepare_machine,
    quantiles,
    show_table,
    show_time,
    warm_up,
    write_json,
)

from gradmix import _extension
from gradmix.ops.counter_random import random_matrix
from gradmix.ops.sketch_project import OPERATOR, is_stored_quicker, project

LAYERS = {
    # name: (N, T, D, layout)
    "ResNet-18 layer 1": (32, 1024, 64, "planes"),
    "ResNet-18 layer 2": (32, 256, 128, "planes"),
    "ResNet-18 layer 3": (32, 64, 256, "planes"),
    "ResNet-18 layer 4": (32, 16, 512, "planes"),
    "ResNet-18 layer 1, channels last": (32, 1024, 64, "rows"),
    "ResNet-18 layer 2, channels last": (32, 256, 128, "rows"),
    "ResNet-18 layer 3, channels last": (32, 64, 256, "rows"),
    "ResNet-18 layer 4, channels last": (32, 16, 512, "rows"),
    "ResNet-18 classifier": (32, 1, 512, "rows"),
    "ViT-B attention, fc1": (8, 197, 768, "rows"),
    "ViT-B qkv's gradient": (8, 197, 2304, "rows"),
    "ViT-B fc2": (8, 197, 3072, "rows"),
    "MLP, batch of 256": (256, 1, 512, "rows"),
    "one row": (1, 1, 512, "rows"),
    "small image": (4, 49, 16, "planes"),
}
"""Both sides of a layer are such inputs: its activations, and the gradients of its outputs."""

KEY = 5


def measure(
    name: str, rank: int, dtype: torch.dtype, device: torch.device, bodies: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Times of the stored matrix and of every body, ratios stored / body, and the largest errors from float64."""
    n, t, d, layout = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    values = (
        torch.randn(n, d, t, generator=generator) if layout == "planes" else torch.randn(n, t, d, generator=generator)
    )
    x = values.to(device, dtype)
    x = x.mT if layout == "planes" else x
    half = dtype in (torch.bfloat16, torch.float16)
    kept = dtype if not half or device.type == "cuda" else torch.float32
    matrix = random_matrix(rank, d, KEY, dtype=kept, device=device)
    calls = {"stored": partial(project, x, matrix)}
    # The bodies themselves, as the gradient engine calls them: the registered operator adds some 20 us of Python.
    arguments = (x, rank, KEY, False, "rademacher")
    calls |= {body: partial(OPERATOR.choose(body, *arguments).run, *arguments) for body in bodies}
    exact = project(x.double(), random_matrix(rank, d, KEY, dtype=torch.float64, device=device))
    errors = {body: float((call() - exact).abs().max() / exact.abs().max()) for body, call in calls.items()}
    for call in calls.values():
        warm_up(call, device)
    samples = interleaved(calls, device, repeats=1000, seconds=seconds, least=20)
    return {
        "layer": name,
        "size": {"N": n, "T": t, "D": d, "rank": rank},
        "layout": layout,
        "engine": "stored" if is_stored_quicker(x, rank) else OPERATOR.choose("auto", *arguments).name,
        "rounds": len(samples["stored"]),
        "seconds": {body: quantiles(taken) for body, taken in samples.items()},
        "stored_over": {body: paired_ratio(samples["stored"], samples[body]) for body in bodies},
        "relative_error": errors,
    }


def main() -> int:
    """Run the benchmark; 2 if there is no native body to time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--threads", type=int, help="CPU threads for all rows (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each size (default: 0.5)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64], help="default: 16 32 64")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    native = "cuda" if options.device.type == "cuda" else "cpp"
    reasons = {b.name: b.available() for b in OPERATOR.backends}
    if reasons.get(native, "there is none") is not None:
        print(f"no {native} body to time: {reasons.get(native, 'there is none')}", file=sys.stderr)
        return 2
    extension: Any = _extension.load()
    described = prepare_machine(options.device) | {
        name: extension.build_info()[name] for name in ("instruction_set", "compiler", "cuda_version")
    }
    print(machine_line(described))
    rows = []
    table = []
    for name in LAYERS:
        for rank in options.ranks:
            dtype = getattr(torch, options.dtype)
            row = measure(name, rank, dtype, options.device, ["torch", native], options.seconds)
            rows.append(row)
            times = [show_time(row["seconds"][body]["p50"]) for body in ("stored", "torch", native)]
            ratio = row["stored_over"][native]
            spread = f"{ratio['p50']:.2f}x ({ratio['p20']:.2f}-{ratio['p80']:.2f})"
            size = "x".join(str(row["size"][axis]) for axis in "NTD")
            error = f"{row['relative_error'][native]:.0e}"
            table.append([name, f"{size}, {row['layout']}", str(rank), *times, spread, row["engine"], error])
    columns = [
        "layer",
        "N x T x D",
        "rank",
        "matrix stored",
        "matrix made",
        native,
        f"stored / {native}",
        "engine takes",
        "error",
    ]
    notes = ["matrix stored and matrix made: torch; the latter, as the body of the operator, makes it in each call"]
    show_table(f"sketch_project, {options.dtype}, rademacher", columns, table, notes)
    if options.json:
        described["load_afterwards"] = load_average()
        content = {"benchmark": "sketch_project", "machine": described, "dtype": options.dtype, "rows": rows}
        write_json(options.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
