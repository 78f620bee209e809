"""Kills training again and again and compares its end with an undisturbed run's: `python bench/kill_and_resume.py`.

`gradmix train` runs in a process of its own, which is killed (SIGKILL) and taken up by `gradmix train --resume`, as
often as `--kills` says: while it starts, at random moments of its training, and while it writes a checkpoint, which is
told by the temporary file. Whenever a run gets to its end, its metrics.json must be that of a run left in peace, to the
last bit; only times and the description of the machine are left out. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from _measure import count, machine, machine_line, positive, write_json

from gradmix.training.loop import checkpoint

Kind = Literal["start", "step", "write"]

DECK: tuple[Kind, ...] = ("start", "step", "step", "write", "write")
"""Kinds of moments, dealt in random order, again and again: so each comes up in a short trial too."""

LEFT_OUT = ("timing", "environment")
"""Parts of metrics.json about time and machine, not about what was learnt; of the timing the steps are compared."""

PATIENCE = 600.0
"""Seconds without any sign of progress after which a process is given up."""

POLL = 0.0002
"""Seconds between two looks at the folder: writing a checkpoint takes a few milliseconds."""


@dataclass(frozen=True)
class Kill:
    """One kill: ``step`` and ``leftover`` say what lay in the folder afterwards."""

    run: int
    kind: Kind
    seconds: float
    """From the start of the process."""
    resumed: int | None
    """Step of the checkpoint that the process had begun from; None: from the beginning."""
    step: int | None
    """Step of the checkpoint that it left; None: it left none."""
    leftover: bool
    """Whether it left a part of another one."""


class Failure(Exception):
    """A process that ended by itself with an error, or did not go on."""


class Training:
    """One run in a folder, by a process that can be killed and started again."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        name = f"{options.method}-seed-{options.run_seed}"
        self.checkpoint = folder / ".checkpoints" / f"{name}.pt"
        self.metrics = folder / options.method / f"seed-{options.run_seed}" / "metrics.json"
        self.log = folder.with_name(f"{folder.name}.log")

    def start(self) -> subprocess.Popen[bytes]:
        """Start anew, or go on where there is something to go on from."""
        arguments = ["--resume", str(self.folder)]
        if not (self.folder / "config.yaml").is_file():
            # Killed before it had written what there is to do.
            shutil.rmtree(self.folder, ignore_errors=True)
            options = self.options
            arguments = ["--benchmark", options.benchmark, "--methods", options.method, "--threads", "1"]
            arguments += ["--seeds", str(options.run_seed), "--checkpoint", str(options.checkpoint)]
            arguments += ["--data-dir", str(options.data_dir.absolute()), "--output", str(self.folder)]
            arguments += options.train_flags
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "gradmix.cli", "train", *arguments],
                cwd=self.folder.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def finish(self) -> tuple[float, float]:
        """Run to the end; seconds to the first checkpoint, and from there to the last."""
        begin, mark, times = time.perf_counter(), self.mark(), []
        process = self.start()
        while process.poll() is None:
            if (now := self.mark()) not in (None, mark):
                mark = now
                times.append(time.perf_counter())
            time.sleep(POLL)
        self.check(process.wait())
        times = times or [time.perf_counter()]
        return times[0] - begin, times[-1] - times[0]

    def check(self, status: int) -> None:
        """Raise a Failure unless a process that ended by itself ended well."""
        if status:
            raise Failure(f"gradmix train ended with status {status}: {self.log.read_text(errors='replace').strip()}")

    def result(self) -> dict[str, Any]:
        """The content of metrics.json without times and machine."""
        values: dict[str, Any] = json.loads(self.metrics.read_text(encoding="utf-8"))
        return {"steps": values["timing"]["steps"]} | {k: v for k, v in values.items() if k not in LEFT_OUT}

    def mark(self) -> tuple[int, int] | None:
        """Something that is another with every checkpoint."""
        try:
            found = self.checkpoint.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def step(self) -> int | None:
        """Step of the checkpoint that is there; None if there is none. A damaged one is an error."""
        return int(checkpoint.load(self.checkpoint)["steps"]) if self.checkpoint.is_file() else None

    def temporaries(self) -> set[int]:
        """Times of change of a checkpoint half written, if there is one."""
        try:
            return {self.checkpoint.with_name(f".{self.checkpoint.name}").stat().st_mtime_ns}
        except FileNotFoundError:
            return set()

    def killed(self, run: int, kind: Kind, delay: float) -> Kill | None:
        """Start the process and kill it; None if it came to its end before that.

        Args:
            run: number of the run, for the record.
            kind: start: ``delay`` after the start of the process; step: ``delay`` after its first checkpoint; write:
                as soon as a temporary file turns up after that.
            delay: seconds.
        """
        resumed, before, left_before = self.step(), self.mark(), self.temporaries()
        begin = time.perf_counter()
        process = self.start()
        try:
            if kind != "start":
                self.wait(process, lambda: self.mark() != before)
            until = time.perf_counter() + delay
            self.wait(process, lambda: time.perf_counter() >= until)
            if kind == "write":
                self.wait(process, lambda: bool(self.temporaries() - left_before))
            ended = process.poll()
        finally:
            process.kill()
            process.wait()
        if ended is not None:
            self.check(ended)
            return None
        return Kill(run, kind, time.perf_counter() - begin, resumed, self.step(), bool(self.temporaries()))

    @staticmethod
    def wait(process: subprocess.Popen[bytes], happened: Any) -> None:
        """Wait until something happened or the process ended."""
        until = time.perf_counter() + PATIENCE
        while process.poll() is None and not happened():
            if time.perf_counter() > until:
                raise Failure(f"nothing happened for {PATIENCE:.0f} s")
            time.sleep(POLL)


def differences(expected: Any, found: Any, key: str = "") -> list[str]:
    """Keys at which two results differ; numbers are compared to the last bit."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = [*expected, *(k for k in found if k not in expected)]
        return [d for k in keys for d in differences(expected.get(k), found.get(k), f"{key}.{k}" if key else str(k))]
    return [] if type(expected) is type(found) and expected == found else [key]


def row(number: int, kill: Kill, steps: int) -> str:
    """A kill as a line of the table."""
    resumed = "the beginning" if kill.resumed is None else f"step {kill.resumed}"
    left = "nothing" if kill.step is None else f"step {kill.step} of {steps}"
    half = ", and a part of the next" if kill.leftover else ""
    return f"{number:4}  {kill.run:3}  {kill.kind:<5}  {kill.seconds:7.2f}  {resumed:<14}  {left}{half}"


def options_of(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; those that it does not know are given to gradmix train."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="other flags are those of gradmix train", allow_abbrev=False
    )
    parser.add_argument("--kills", type=count, default=20, help="default: 20")
    parser.add_argument("--benchmark", default="split-digits", help="default: split-digits")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets lie (default: data)")
    parser.add_argument("--method", default="gradmix-sample", help="default: gradmix-sample")
    parser.add_argument("--run-seed", type=int, default=0, help="seed of the training (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument(
        "--moments", nargs="+", choices=get_args(Kind), default=get_args(Kind), help="what is disturbed (default: all)"
    )
    parser.add_argument("--checkpoint", type=positive, default=0.02, help="seconds between two (default: 0.02)")
    parser.add_argument("--json", type=Path, help="also write kills and verdict to this file")
    options, others = parser.parse_known_args(argv)
    options.train_flags = others
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the trial; 1 if a run that was killed ended differently."""
    options = options_of(argv)
    described = machine()
    print(machine_line(described))
    moments = random.Random(options.seed)
    deck: list[Kind] = []
    kills: list[Kill] = []
    verdicts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as name:
        undisturbed = Training(Path(name) / "undisturbed", options)
        starting, training = undisturbed.finish()
        expected = undisturbed.result()
        print(
            f"undisturbed: first checkpoint after {starting:.1f} s, step {expected['steps']} after {training:.1f} more"
        )
        print("kill  run  while  after s  began at        left")
        run = Training(Path(name) / "run-1", options)
        while True:
            if len(kills) < options.kills:
                deck = deck or [kind for kind in moments.sample(DECK, len(DECK)) if kind in options.moments]
                kind = deck.pop()
                # Short enough that about all kills find place in one run.
                span = starting if kind == "start" else training * min(1.0, 2.0 / options.kills)
                kill = run.killed(len(verdicts) + 1, kind, moments.uniform(0.0, span))
                if kill is not None:
                    kills.append(kill)
                    print(row(len(kills), kill, expected["steps"]), flush=True)
                    continue
            else:
                run.finish()
            differing = differences(expected, run.result())
            in_run = sum(kill.run == len(verdicts) + 1 for kill in kills)
            verdicts.append({"run": len(verdicts) + 1, "kills": in_run, "differing": differing})
            said = f"DIFFERS in {', '.join(differing)}" if differing else "the same to the last bit"
            print(f"run {len(verdicts)}, killed {in_run} times: {said}", flush=True)
            if len(kills) == options.kills:
                break
            run = Training(Path(name) / f"run-{len(verdicts) + 1}", options)
    same = not any(verdict["differing"] for verdict in verdicts)
    print(f"{len(kills)} kills, {len(verdicts)} runs: {'all the same' if same else 'NOT all the same'}")
    if options.json:
        told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"}
        result = {"options": told, "machine": described, "steps": expected["steps"], "same": same}
        write_json(options.json, result | {"runs": verdicts, "kills": [asdict(kill) for kill in kills]})
    return 0 if same else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Failure, checkpoint.CheckpointError) as error:
        print(f"kill_and_resume: {error}", file=sys.stderr)
        sys.exit(1)
