"""``gradmix compare``: tables and a plot over runs that were saved before."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from gradmix.cli.columns import text_width
from gradmix.cli.errors import UsageError
from gradmix.runtime.names import shown

if TYPE_CHECKING:
    from gradmix.training.runs.results import RunResult


@dataclass(frozen=True)
class _Flags:
    """Tabulate and plot runs that were saved before."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
    """Run folders, or folders with run folders in them."""
    output: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: none is written)")] = None
    """New folder for summary.json, summary.md and compare.png."""
    format: Literal["text", "markdown", "json"] = "text"
    """How the tables are printed."""


def main(args: list[str]) -> int:
    """Print the comparison; save it too if ``--output`` is given."""
    from gradmix.training.reports import tables
    from gradmix.training.reports.saving import save_summary
    from gradmix.training.runs.repeats import drop_repeats
    from gradmix.training.runs.results import refuse_occupied, to_json

    options = tyro.cli(_Flags, prog="gradmix compare", args=args, config=(tyro.conf.DisallowNone,))
    if not options.runs:
        raise UsageError("compare: got no run folder, expected at least one")
    if options.output is not None:
        refuse_occupied(options.output)
    found, empty = _load(options.runs)
    results, notes = drop_repeats(found)
    for note in [f"left out, no finished run in it: {', '.join(map(str, empty))}"] * bool(empty) + notes:
        print(f"gradmix: {shown(note)}", file=sys.stderr)
    summary = tables.summarise(results)
    if options.output is not None:
        save_summary(results, options.output)
    renderings = {
        "text": lambda: tables.to_text(summary, text_width(), bold=sys.stdout.isatty()),
        "markdown": lambda: tables.to_markdown(summary),
        "json": lambda: to_json(tables.to_json_dict(summary)),
    }
    print(renderings[options.format](), end="")
    if options.output is not None:
        print(f"\nSaved in {shown(str(options.output))}", file=sys.stderr)
    return 0


def _load(folders: Sequence[Path]) -> tuple[list[RunResult], list[Path]]:
    """Read the runs of all folders; of several folders, return those without a finished run too."""
    from gradmix.training.runs.results import NoRunError, load_runs

    found: dict[Path, RunResult] = {}
    empty = []
    for folder in folders:
        try:
            # A run named twice, or named besides its parent, counts once.
            found.update({path.resolve(): result for path, result in load_runs(folder).items()})
        except NoRunError:
            if len(folders) == 1:
                raise
            empty.append(folder)
    if not found:
        raise UsageError(f"compare: no finished run in {', '.join(map(str, empty))}, expected one in one of them")
    return list(found.values()), empty
