"""Times the bodies of class_sketch against each other: `python bench/class_sketch.py [--json PATH] [--threads N]`.

Every size is run in one process, the bodies in turn, so that all meet the same machine. Reported are medians, and the
median of the ratio torch / cpp with the range that holds the middle half of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _measure import machine, write_json

from gradmix import _extension
from gradmix.ops.class_sketch import class_sketch

SIZES = (
    # N, T, K, J, P
    (1, 1, 8, 8, 2),
    (8, 4, 8, 8, 4),
    (8, 8, 16, 16, 4),
    (16, 49, 8, 8, 10),
    (32, 64, 16, 16, 10),
    (64, 196, 1, 16, 10),
    (32, 1, 16, 16, 10),
    (64, 1, 16, 16, 10),
    (256, 1, 16, 16, 10),
    (256, 1, 16, 16, 1000),
    (64, 196, 16, 16, 100),
    (32, 1024, 16, 16, 10),
    (256, 49, 32, 32, 1000),
    (256, 1, 64, 64, 10),
    (256, 1, 64, 64, 1000),
    (4096, 1, 32, 32, 10),
    (128, 196, 64, 64, 10),
    (64, 49, 17, 33, 10),
    (64, 64, 256, 256, 10),
)


def here() -> dict[str, Any]:
    """What the times were taken on."""
    extension: Any = _extension.load()
    built = {name: extension.build_info()[name] for name in ("instruction_set", "compiler")}
    return {**machine(), **built}


def measure(size: tuple[int, int, int, int, int], dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Medians in microseconds, the ratio torch / cpp with its quartiles, and the largest difference from float64."""
    n, t, k, j, p = size
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(n, t, k, generator=generator).to(dtype)
    activations = torch.randn(n, t, j, generator=generator).to(dtype)
    labels = torch.randint(0, p, (n,), generator=generator)

    def once(backend: str) -> float:
        start = time.perf_counter()
        class_sketch(deltas, activations, labels, p, backend=backend)
        return time.perf_counter() - start

    exact = class_sketch(deltas.double(), activations.double(), labels, p, backend="torch")
    errors = {}
    for backend in ("torch", "cpp"):
        error = class_sketch(deltas, activations, labels, p, backend=backend) - exact
        errors[backend] = float(error.abs().max() / exact.abs().max())
    times: dict[str, list[float]] = {"torch": [], "cpp": []}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times["cpp"]) < 20:
        for backend, taken in times.items():
            taken.append(once(backend))
    ratios = [a / b for a, b in zip(times["torch"], times["cpp"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "size": dict(zip("NTKJP", size, strict=True)),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": len(ratios),
        "torch_us": statistics.median(times["torch"]) * 1e6,
        "cpp_us": statistics.median(times["cpp"]) * 1e6,
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "relative_error": errors,
    }


def main() -> int:
    """Run the benchmark; 2 if there is no extension to time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--threads", type=int, help="CPU threads for both bodies (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each size (default: 0.5)")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    reason = _extension.unavailable_reason()
    if reason:
        print(f"no C++ body to time: {reason}", file=sys.stderr)
        return 2
    described = here()
    print("machine: " + ", ".join(f"{name} {value}" for name, value in described.items()))
    print(f"dtype: {options.dtype}")
    print("    N     T    K    J     P   torch us     cpp us  torch/cpp   middle half")
    rows = []
    for size in SIZES:
        row = measure(size, getattr(torch, options.dtype), options.seconds)
        rows.append(row)
        n, t, k, j, p = size
        low, high = row["ratio_quartiles"]
        print(
            f"{n:5} {t:5} {k:4} {j:4} {p:5} {row['torch_us']:10.0f} {row['cpp_us']:10.0f} {row['ratio']:9.2f}x"
            f"   {low:.2f} .. {high:.2f}"
        )
    if options.json:
        write_json(options.json, {"machine": described, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
