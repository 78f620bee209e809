"""Times the native body of class_sketch against torch's: `python bench/class_sketch.py [--json PATH] [--threads N]`.

Every size is run in one process, the bodies in turn, so that all meet the same machine. Reported are medians, and the
median of the ratio of both times with the range that holds the middle half of it. Both compute sums and squares.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measure import interleaved, machine, warm_up, write_json

from gradmix import _extension
from gradmix.ops.class_sketch import OPERATOR, class_sketch

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
    (64, 2, 16, 16, 10),
    (64, 4, 16, 16, 10),
    (64, 16, 16, 16, 10),
    (64, 4, 32, 32, 10),
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


def measure(
    size: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, native: str, seconds: float
) -> dict[str, Any]:
    """Medians in microseconds, the ratio torch / native with its quartiles, and the largest errors from float64."""
    n, t, k, j, p = size
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(n, t, k, generator=generator).to(device, dtype)
    activations = torch.randn(n, t, j, generator=generator).to(device, dtype)
    labels = torch.randint(0, p, (n,), generator=generator).to(device)
    calls = {
        backend: partial(class_sketch, deltas, activations, labels, p, backend=backend) for backend in ("torch", native)
    }
    exact = class_sketch(deltas.double(), activations.double(), labels, p, backend="torch")
    errors = {}
    for backend, call in calls.items():
        errors[backend] = max(
            float((found - truth).abs().max() / truth.abs().max()) for found, truth in zip(call(), exact, strict=True)
        )
        warm_up(call, device)
    times = interleaved(calls, device, repeats=1 << 20, seconds=seconds, least=20)
    ratios = [a / b for a, b in zip(times["torch"], times[native], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "size": dict(zip("NTKJP", size, strict=True)),
        "dtype": str(dtype).removeprefix("torch."),
        "auto": OPERATOR.choose("auto", deltas, activations, labels, p).name,
        "repeats": len(ratios),
        "torch_us": statistics.median(times["torch"]) * 1e6,
        f"{native}_us": statistics.median(times[native]) * 1e6,
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "relative_error": errors,
    }


def main() -> int:
    """Run the benchmark; 2 if there is no native body to time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--threads", type=int, help="CPU threads for both bodies (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each size (default: 0.5)")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    native = "cuda" if options.device.type == "cuda" else "cpp"
    reason = {b.name: b.available() for b in OPERATOR.backends}.get(native, "the operator has none")
    if reason:
        print(f"no {native} body to time: {reason}", file=sys.stderr)
        return 2
    extension: Any = _extension.load()
    described = machine(options.device) | {
        name: extension.build_info()[name] for name in ("instruction_set", "compiler", "cuda_version")
    }
    print("machine: " + ", ".join(f"{name} {value}" for name, value in described.items()))
    print(f"dtype: {options.dtype}")
    print(f"    N     T    K    J     P   torch us {native:>7} us      ratio   middle half   auto")
    rows = []
    for size in SIZES:
        row = measure(size, getattr(torch, options.dtype), options.device, native, options.seconds)
        rows.append(row)
        n, t, k, j, p = size
        low, high = row["ratio_quartiles"]
        print(
            f"{n:5} {t:5} {k:4} {j:4} {p:5} {row['torch_us']:10.0f} {row[f'{native}_us']:10.0f} {row['ratio']:9.2f}x"
            f"   {low:.2f} .. {high:.2f}  {row['auto']}"
        )
    if options.json:
        write_json(options.json, {"machine": described, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
