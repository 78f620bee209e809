"""Shared parts of the benchmarks: the description of the machine, timing, peak memory, tables and result files."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gradmix
from gradmix.calibration.measuring import CudaTimer
from gradmix.runtime.allocator import keep_freed_memory

Call = Callable[[], object]

LEVELS = {"min": 0.0, "p5": 0.05, "p20": 0.2, "p50": 0.5, "p80": 0.8, "p95": 0.95, "max": 1.0}
"""The quantiles kept of a set of samples."""

SLOW = 0.1
"""Seconds a call, from which on it counts as slow and is warmed up less."""


# ------------------------------------------------------------------------------------------------------------- machine


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """The machine of the times: processor, accelerator if ``device`` is one, versions, date and load."""
    described: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradmix": gradmix.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load": load_average(),
    }
    if device is not None and device.type == "cuda":
        described["accelerator"] = torch.cuda.get_device_name(device)
        described["accelerator_runtime"] = torch.version.cuda or torch.version.hip
    return described


def prepare_machine(device: torch.device) -> dict[str, Any]:
    """Have the C library keep freed memory, so that no time depends on what ran before; describe the machine."""
    return {**machine(device), "keeps_freed_memory": keep_freed_memory()}


def load_average() -> float | None:
    """Processes that ran or waited over the last minute, on average; None if the system does not report it."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def machine_line(described: Mapping[str, Any]) -> str:
    """The description in one line."""
    parts = [f"{described['cpu']}, {described['cores']} cores, torch threads {described['threads']}"]
    if "accelerator" in described:
        parts.append(f"{described['accelerator']} (runtime {described['accelerator_runtime']})")
    parts.append(f"{described['system']}, torch {described['torch']}, python {described['python']}")
    parts.append(f"gradmix {described['gradmix']}, {described['date']}, load {described['load']}")
    return " | ".join(parts)


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Cores this process may run on, which in a container are often fewer than the machine's."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``; 4 GiB if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


# -------------------------------------------------------------------------------------------------------------- timing


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(call: Call, device: torch.device, calls: int = 1) -> float:
    """Seconds of one call, up to the end of what it queued on the device; the mean of so many calls back to back.

    On a CUDA device its own clock is read, before the first call and after the last; the device is idle before, so that
    the time a host needs to get the work queued counts.
    """
    if device.type == "cuda":
        return CudaTimer(device).seconds(call, calls)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def queued_seconds(call: Call, device: torch.device) -> float:
    """Seconds a CUDA device takes for one call while the host is ahead of it, as in a training step: what it queued.

    A call that waits for the device is shown with its waiting.
    """
    return CudaTimer(device).seconds_ahead(call, 1, ahead=2 * seconds_of(call, device) + 1e-4)


def back_to_back(call: Call, device: torch.device) -> int:
    """Calls that make one sample: on a CUDA device enough for 2 ms, at most 100, else one."""
    if device.type != "cuda":
        return 1
    return max(1, min(100, math.ceil(2e-3 / seconds_of(call, device))))


def warm_up(call: Call, device: torch.device, most: int = 10) -> int:
    """Run ``call`` until it is warm: ``most`` times, at least two, or three if it is slow; returns how often."""
    first = seconds_of(call, device)
    # The first call may have been slow only because it was the first.
    if min(first, seconds_of(call, device)) >= SLOW:
        most = min(most, 3)
    for _ in range(most - 2):
        call()
    return max(2, most)


def interleaved(
    calls: Mapping[str, Call], device: torch.device, *, repeats: int, seconds: float, least: int = 10
) -> dict[str, list[float]]:
    """Samples of every call in seconds, taken in turn, so that whatever slows the machine down slows all of them.

    Sample k of one call belongs to the same round as sample k of any other, and may be paired with it. Each round
    begins with another call, so that none always finds the caches as the same neighbour left them.

    Args:
        calls: by name; warmed up before.
        device: where they run; a sample on a CUDA device is the mean of :func:`back_to_back` calls.
        repeats: rounds.
        seconds: once this much time has gone by, rounds stop, though not before ``least`` of them.
        least: rounds made in any case, unless ``repeats`` is less.
    """
    names = list(calls)
    in_a_row = {name: back_to_back(call, device) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for done in range(repeats):
        if done >= least and time.perf_counter() >= end:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(seconds_of(calls[name], device, in_a_row[name]))
    return samples


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The quantiles of :data:`LEVELS`, by name."""
    return {name: float(np.quantile(samples, level)) for name, level in LEVELS.items()}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Quantiles of the ratios of samples taken in the same round."""
    return quantiles([a / b for a, b in zip(numerator, denominator, strict=True)])


# -------------------------------------------------------------------------------------------------------------- memory


def peak_memory(call: Call, device: torch.device) -> int:
    """Most bytes of tensors alive at a time during ``call`` beyond those alive before it, its result included.

    It counts what torch allocates, scratch space inside the matrix library not included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return int(torch.cuda.max_memory_allocated(device) - before)
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its own stages on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (e["ts"], e["args"].get("Ev Idx", 0), e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"
    )
    alive = peak = 0
    for _, _, change in changes:
        alive += change
        peak = max(peak, alive)
    return int(peak)


# -------------------------------------------------------------------------------------------------------------- output


def say(text: str) -> None:
    """Tell a waiting person what is going on."""
    print(f"... {text}", file=sys.stderr, flush=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table, its first column flush left; by rich where that is installed."""
    if importlib.util.find_spec("rich") is None:
        _plain_table(title, columns, rows)
    else:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for position, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if position else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(Text, row))
        # A table squeezed into the width of a pipe or a narrow window would lose its figures.
        needed = Console(width=1000).measure(table).maximum
        console = Console(width=max(Console().width, needed))
        console.print(table)
    for note in notes:
        print(f"  {note}")
    print()


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[k]) for row in [columns, *rows]) for k in range(len(columns))]
    print(title)
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    print()


def show_time(seconds: float) -> str:
    """About three digits, with the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds * 1e9)} ns"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def show_count(value: float, unit: str = "") -> str:
    """A large number with k, M or G."""
    for letter, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{_three_digits(value / scale)} {letter}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def show_bytes(value: float) -> str:
    """Bytes in KiB, MiB or GiB."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value / 1024:.1f} KiB"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- arguments


def count(text: str) -> int:
    """An argument that is an integer of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer >= 1")
    return value


def positive(text: str) -> float:
    """An argument that is a positive number, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number")
    return value


def check_places(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Stop with a plain word if ``--json`` is in no folder, or ``--device`` cannot be used."""
    if "json" in options and not options.json.absolute().parent.is_dir():
        parser.error(f"argument --json: no folder {options.json.absolute().parent}")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: got {options.device!r}: {str(error).splitlines()[0]}")


def add_run_arguments(
    parser: argparse.ArgumentParser,
    *,
    quick_repeats: int,
    seconds: float,
    stop: str,
    seed: str,
    devices: str = "cpu, cuda, cuda:1",
) -> None:
    """Add the options of every benchmark with rounds: duration, device, seed, and the file of the figures.

    Args:
        parser: to add to; :func:`check_run` completes what it has parsed.
        quick_repeats: rounds under ``--quick``.
        seconds: default of ``--seconds``.
        stop: what ``--seconds`` does.
        seed: what ``--seed`` is of.
        devices: examples of ``--device``.
    """
    absent = argparse.SUPPRESS
    parser.add_argument("--repeats", type=count, help=f"rounds (default: 60, quick: {quick_repeats})", default=absent)
    parser.add_argument("--seconds", type=positive, default=seconds, help=stop)
    parser.add_argument("--device", default="cpu", help=devices)
    parser.add_argument("--threads", type=count, help="CPU threads (default: torch's own choice)", default=absent)
    parser.add_argument("--seed", type=int, default=0, help=seed)
    parser.add_argument("--json", type=Path, help="also write all figures to this file", default=absent)
    parser.set_defaults(quick_repeats=quick_repeats)


def check_run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in the rounds, and stop with a plain word where :func:`check_places` does."""
    options.repeats = getattr(options, "repeats", options.quick_repeats if options.quick else 60)
    check_places(parser, options)


def begin(options: argparse.Namespace) -> torch.device:
    """Set threads and TF32 by the options, and return the device."""
    if "threads" in options:
        torch.set_num_threads(options.threads)
    if "tf32" in options:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    return torch.device(options.device)


def run_values(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a run, for its result file."""
    values = {name: getattr(options, name) for name in ("quick", "device", "seed", "repeats", "seconds")}
    return values | {"threads": getattr(options, "threads", None)}


def finish(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the result file, if one was asked for."""
    if "json" in options:
        write_json(options.json, result)
        print(f"written to {options.json}")
