"""``gradmix compare``: tables and a plot over runs that were saved before."""

from __future__ import annotations

import sys
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gradmix.cli.errors import UsageError, require
from gradmix.runtime.names import shown

if TYPE_CHECKING:
    from gradmix.training.runs.results import RunResult


def main(args: list[str]) -> int:
    """Print the comparison; save it too if ``--output`` is given."""
    require("compare", "tyro", "yaml", "matplotlib", "scipy")
    import tyro

    from gradmix.training.reports import tables
    from gradmix.training.reports.saving import save_summary
    from gradmix.training.runs.results import load_runs, refuse_occupied, to_json

    options: Any = tyro.cli(_flags(), prog="gradmix compare", args=args, config=(tyro.conf.DisallowNone,))
    if not options.runs:
        raise UsageError("compare: got no run folder, expected at least one")
    if options.output is not None:
        refuse_occupied(options.output)
    found: dict[Path, RunResult] = {}
    for folder in options.runs:
        # A run named twice, or named besides its parent, counts once.
        found.update({path.resolve(): result for path, result in load_runs(folder).items()})
    results = list(found.values())
    summary = tables.summarise(results)
    if options.output is not None:
        save_summary(results, options.output)
    renderings = {
        "text": lambda: tables.to_text(summary),
        "markdown": lambda: tables.to_markdown(summary),
        "json": lambda: to_json(tables.to_json_dict(summary)),
    }
    print(renderings[options.format](), end="")
    if options.output is not None:
        print(f"\nSaved in {shown(str(options.output))}", file=sys.stderr)
    return 0


def _flags() -> type:
    import tyro

    runs = Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="RUN [RUN ...]",
            help="Run folders, or folders with run folders in them.",
            help_behavior_hint="",
        ),
    ]
    output = Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FOLDER",
            help="New folder for summary.json, summary.md and compare.png.",
            help_behavior_hint="(default: none is written)",
        ),
    ]
    form = Annotated[Literal["text", "markdown", "json"], tyro.conf.arg(help="How the tables are printed.")]
    flags = make_dataclass(
        "Compare",
        [("runs", runs), ("output", output, field(default=None)), ("format", form, field(default="text"))],
        frozen=True,
    )
    flags.__doc__ = "Tabulate and plot runs that were saved before."
    return flags
