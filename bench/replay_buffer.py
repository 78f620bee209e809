"""Draws from a replay buffer in memory, on disk, and made ahead: `python bench/replay_buffer.py [--rows 20000]`.

Samples of 3 x 224 x 224 bytes. Three tables: seconds of a draw alone; seconds of a step with a draw, next to the step
alone, where the draw made ahead must not be felt; and the most memory that a process of its own had resident while it
filled a buffer and drew from it, beyond what it had before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from _measure import (
    Call,
    count,
    machine,
    machine_line,
    paired_ratio,
    positive,
    quantiles,
    show_bytes,
    show_table,
    show_time,
    write_json,
)

from gradmix import ReplayBuffer

SHAPE = (3, 224, 224)
CLASSES = 1000
AT_ONCE = 256
"""Samples added at a time: how a buffer is filled must not be what its memory is."""

MEMORY_DRAWS = 30
"""Draws of the process whose memory is watched."""


def filled(options: argparse.Namespace, folder: Path | None) -> ReplayBuffer:
    """A buffer of random images, in memory or in ``folder``."""
    generator = torch.Generator().manual_seed(options.seed)
    buffer = ReplayBuffer(options.rows, policy="reservoir", folder=folder)
    for start in range(0, options.rows, AT_ONCE):
        n = min(AT_ONCE, options.rows - start)
        x = torch.randint(256, (n, *SHAPE), dtype=torch.uint8, generator=generator)
        buffer.add(x, torch.randint(CLASSES, (n,), generator=generator))
    return buffer


def forget(folder: Path) -> bool:
    """Have the system drop what it keeps of the files in memory; whether it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.glob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def step_of(seconds: float) -> Callable[[], None]:
    """Products of matrices that take about so long."""
    a = torch.randn(512, 512)
    for _ in range(20):
        a @ a
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    times = max(1, round(seconds / ((time.perf_counter() - start) / 20)))

    def step() -> None:
        for _ in range(times):
            a @ a

    return step


def rounds(calls: Mapping[str, Call], before: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, all in turn, each round beginning with another; ``before`` has what is not timed."""
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for done in range(-1, repeats):  # the first round is a warm-up
        first = done % len(names)
        for name in names[first:] + names[:first]:
            before.get(name, lambda: None)()
            start = time.perf_counter()
            calls[name]()
            if done >= 0:
                samples[name].append(time.perf_counter() - start)
    return samples


def resident() -> dict[str, int]:
    """Bytes of this process in memory: now, and at the most so far; empty if the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("now", "VmRSS"), ("most", "VmHWM"))}


def watch_memory(options: argparse.Namespace) -> None:
    """Fill a buffer, draw, read everything once, and print the memory, in a process of its own."""
    filled(argparse.Namespace(rows=AT_ONCE, seed=options.seed), None).sample(options.draw)
    before = resident()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        buffer = filled(options, Path(name) if options.watch == "on disk" else None)
        for _ in range(MEMORY_DRAWS):
            buffer.prefetch(options.draw)
            buffer.sample(options.draw)
        for start in range(0, len(buffer), AT_ONCE):
            buffer.part(start, start + AT_ONCE)[0].max()
        after = resident()
        del buffer
    print(json.dumps(after["most"] - before["now"] if after else None))


def memory_of(options: argparse.Namespace, where: str) -> int | None:
    """Most bytes resident of a process that holds and draws so many samples, beyond what it had before."""
    command = [sys.executable, __file__, "--watch", where, "--rows", str(options.rows), "--draw", str(options.draw)]
    command += ["--seed", str(options.seed), "--folder", str(options.folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told: int | None = json.loads(done.stdout)
    return told


def options_of(argv: list[str] | None) -> argparse.Namespace:
    """The parsed arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=count, default=2000, help="samples held, 150 kB each (default: 2000)")
    parser.add_argument("--draw", type=count, default=256, help="samples drawn at a time (default: 256)")
    parser.add_argument("--step", type=positive, default=0.2, help="seconds of a step (default: 0.2)")
    parser.add_argument("--repeats", type=count, default=30, help="rounds (default: 30)")
    parser.add_argument("--threads", type=count, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk to use")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--watch", choices=["in memory", "on disk"], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for name in ("folder", "json"):
        path = getattr(options, name)
        folder = path if path is None or name == "folder" else path.absolute().parent
        if folder is not None and not folder.is_dir():
            parser.error(f"argument --{name}: no folder {folder}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = options_of(argv)
    if options.watch:
        watch_memory(options)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    described = machine()
    print(machine_line(described))
    row_bytes = torch.Size(SHAPE).numel()
    print(f"{options.rows} samples, {show_bytes(options.rows * row_bytes)}; {options.draw} samples a draw\n")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        memory, disk = filled(options, None), filled(options, folder / "rows")
        disk.state_dict()  # written, not only on its way to the disk
        for one, other in zip(memory.sample(options.draw), disk.sample(options.draw), strict=True):
            assert torch.equal(one, other)

        def cold() -> None:
            forget(folder / "rows")

        draws: dict[str, Call] = {
            "in memory": lambda: memory.sample(options.draw),
            "on disk, in the system's cache": lambda: disk.sample(options.draw),
        }
        if forget(folder / "rows"):
            draws["on disk, not in the cache"] = lambda: disk.sample(options.draw)
        warm_first = {
            "on disk, in the system's cache": lambda: [disk.part(k, k + AT_ONCE) for k in range(0, len(disk), AT_ONCE)]
        }
        samples = rounds(draws, {**warm_first, "on disk, not in the cache": cold}, options.repeats)
        step = step_of(options.step)

        def with_draw(buffer: ReplayBuffer, ahead: bool = False) -> Call:
            def call() -> None:
                buffer.sample(options.draw)
                if ahead:
                    buffer.prefetch(options.draw)
                step()

            return call

        steps: dict[str, Call] = {
            "the step alone": step,
            "a draw in memory": with_draw(memory),
            "a draw on disk": with_draw(disk),
            "a draw on disk, made ahead": with_draw(disk, ahead=True),
        }
        begun: dict[str, Call] = {
            # The draw that its step takes was begun in the step before, as in training; no other step takes it.
            "a draw on disk, made ahead": lambda: begin(disk, options.draw, step),
            "a draw on disk": lambda: disk.sample(options.draw),
        }
        stepped = rounds(steps, begun, options.repeats)
    watched = {where: memory_of(options, where) for where in ("in memory", "on disk")}
    return report(options, described, samples, stepped, watched)


def begin(buffer: ReplayBuffer, n: int, step: Callable[[], None]) -> None:
    """A step during which a draw is made ahead."""
    buffer.prefetch(n)
    step()


def report(
    options: argparse.Namespace,
    described: dict[str, Any],
    samples: dict[str, list[float]],
    stepped: dict[str, list[float]],
    watched: dict[str, int | None],
) -> int:
    """Print the tables, and write the file."""
    tables: dict[str, dict[str, Any]] = {}
    for title, key, found in (
        ("seconds of a draw", "draws", samples),
        (f"a step of about {show_time(options.step)}, and a draw", "steps", stepped),
    ):
        first = next(iter(found))
        tables[key] = {
            name: {"seconds": quantiles(times), "ratio": paired_ratio(times, found[first])}
            for name, times in found.items()
        }
        shown = [
            [
                name,
                show_time(row["seconds"]["p50"]),
                f"{row['ratio']['p50']:.2f}x ({row['ratio']['p20']:.2f}-{row['ratio']['p80']:.2f})",
            ]
            for name, row in tables[key].items()
        ]
        show_table(title, ["", "median", f"of {first}"], shown)
    show_table(
        "most memory of a process that fills it, draws and reads it all",
        ["", "beyond the beginning"],
        [[where, "not told" if most is None else show_bytes(most)] for where, most in watched.items()],
    )
    if options.json:
        told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("json", "watch")}
        write_json(options.json, {"options": told, "machine": described, **tables, "resident_bytes": watched})
        print(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
