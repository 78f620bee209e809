"""Runs the tests marked ``gpu``, a process per core, until its time is over; the result file grows with what is found.

Triton compiles thousands of kernels for these tests, each on one core: one process would need longer than a lent device
is at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import machine, machine_line, positive, write_json
from _outcomes import SHOWN, VARIABLE

ROOT = Path(__file__).resolve().parent.parent

PARTS_A_CORE = 2
"""Parts of the tests per process: a process that met the quick ones takes a second part."""


@dataclass(frozen=True)
class Part:
    """What became of a part of the tests.

    Attributes:
        outcomes: by node id: ``passed``, ``failed`` or ``skipped``.
        failures: by node id, the end of the message.
    """

    outcomes: dict[str, str]
    failures: dict[str, str]


def files_with_gpu_tests(tests: Path) -> list[Path]:
    """Files that mark a test ``gpu`` or take a CUDA device as a parameter; others may need packages of other extras."""
    files = sorted(tests.glob("*/test_*.py"))
    return [file for file in files if any(word in file.read_text("utf-8") for word in ("mark.gpu", '"cuda"'))]


def collect(files: Sequence[Path], expression: str) -> list[str]:
    """Node ids of the tests marked ``gpu``, in pytest's order.

    Args:
        files: where to look.
        expression: as pytest's ``-k``; all if empty.

    Raises:
        RuntimeError: pytest could not collect them.
    """
    options = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-k", expression]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, files)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"pytest could not collect the tests:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return [line for line in done.stdout.splitlines() if "::" in line and not line.startswith(" ")]


def split(tests: Sequence[str], parts: int) -> list[list[str]]:
    """Neighbours stay together, since they often share a kernel; no part is empty."""
    size = max(1, -(-len(tests) // parts))
    return [list(tests[start : start + size]) for start in range(0, len(tests), size)]


def run_part(tests: Sequence[str], end: float, log: Path) -> Part:
    """Run a part in a process of its own.

    Args:
        tests: their node ids.
        end: time of :func:`time.monotonic` at which it is ended.
        log: where the tests' outcomes are written.
    """
    options = ["-q", "--maxfail=20", "-p", "no:cacheprovider", "-p", "_outcomes"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), VARIABLE: str(log)}
    stopped = False
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            stopped = True
            process.kill()
    outcomes, failures = read_log(log)
    if not stopped and process.returncode not in (0, 1):
        failures[tests[0]] = f"pytest ended with {process.returncode}: {printed[-SHOWN:]}"
    return Part(outcomes, failures)


def read_log(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Outcome of every test in a log, and the messages of those that failed."""
    outcomes, failures = {}, {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            name, outcome, text = json.loads(line)
        except ValueError:
            continue  # the process was ended while it wrote
        outcomes[name] = outcome
        if outcome == "failed":
            failures[name] = text
    return outcomes, failures


def by_file(parts: Sequence[Part]) -> dict[str, dict[str, int]]:
    """How many tests of each file had which outcome."""
    counts: dict[str, Counter[str]] = {}
    for part in parts:
        for name, outcome in part.outcomes.items():
            counts.setdefault(Path(name.partition("::")[0]).stem, Counter())[outcome] += 1
    return {file: dict(count) for file, count in sorted(counts.items())}


def summary(parts: Sequence[Part], tests: int) -> dict[str, Any]:
    """The part of the result file that grows."""
    totals = Counter(outcome for part in parts for outcome in part.outcomes.values())
    failures = {name: text for part in parts for name, text in part.failures.items()}
    reached = sum(len(part.outcomes) for part in parts)
    return {
        "tests": tests,
        **{outcome: totals[outcome] for outcome in ("passed", "failed", "skipped")},
        "not_reached": tests - reached,
        "by_file": by_file(parts),
        "failures": failures,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="those of one operator only: a look whether they run")
    parser.add_argument("--seconds", type=positive, default=600.0, help="end then, whatever is left")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="at a time")
    parser.add_argument("--json", type=Path, help="also write what was found to this file", default=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the tests; 1 if one failed or was not reached."""
    begun = time.monotonic()
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"benchmark": "gpu_truth", "machine": machine(device)}
    print(machine_line(result["machine"]))
    tests = collect(files_with_gpu_tests(ROOT / "tests"), "draw_partners" if options.quick else "")
    shares = split(tests, PARTS_A_CORE * options.processes)
    print(f"{len(tests)} tests in {len(shares)} parts, {options.processes} at a time", flush=True)
    parts: list[Part] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.processes) as pool:
        end = begun + options.seconds
        running = [pool.submit(run_part, share, end, Path(folder) / f"{k}.jsonl") for k, share in enumerate(shares)]
        for finished in as_completed(running):
            parts.append(finished.result())
            result |= {"seconds": time.monotonic() - begun, **summary(parts, len(tests))}
            if "json" in options:
                write_json(options.json, result)
    for name, text in result.get("failures", {}).items():
        print(f"\n{name}\n{text}")
    counts = ", ".join(
        f"{result.get(key, 0)} {key.replace('_', ' ')}" for key in ("passed", "failed", "skipped", "not_reached")
    )
    print(f"\n{counts}, {time.monotonic() - begun:.0f} s")
    return int(bool(result.get("failed") or result.get("failures") or result.get("not_reached")))


if __name__ == "__main__":
    sys.exit(main())
