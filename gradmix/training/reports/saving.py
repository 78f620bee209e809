"""Save runs and summaries with their pictures; :mod:`gradmix.training.runs.results` writes a run's files alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gradmix.training.reports import figures, plots, tables
from gradmix.training.runs.results import RunResult, to_json, write_run
from gradmix.training.runs.whole_files import make_folder, write_text


def save_run(result: RunResult, folder: str | Path, *, pictures: bool = True) -> Path:
    """Write one run's folder, by :func:`~gradmix.training.runs.results.write_run`, and its pictures if they are wanted.

    When this returns, or goes on to the pictures, which take about a second, all other files are on the disk.
    """
    folder = write_run(result, folder)
    if pictures:
        draw_run(result, folder)
    return folder


def draw_run(result: RunResult, folder: str | Path) -> None:
    """Draw ``curve.png``, ``heatmap.png`` and, where pairs were selected by class, ``alignment.png`` of a saved run.

    A picture that fails costs nothing but itself, as :func:`gradmix.training.reports.figures.draw` says. A run that
    has diverged has none.
    """
    if result.status == "diverged":
        return
    pictures = {"curve.png": plots.curve, "heatmap.png": plots.heatmap}
    if result.alignments:
        pictures["alignment.png"] = plots.alignment
    figures.draw({name: partial(figure, result) for name, figure in pictures.items()}, folder)


def save_summary(results: Sequence[RunResult], folder: str | Path) -> None:
    """Write ``summary.json``, ``summary.md`` and ``compare.png`` over several runs; existing ones are replaced.

    A picture that fails costs nothing but itself (:func:`gradmix.training.reports.figures.draw`). There is none if all
    runs have diverged.

    Raises:
        ValueError: The runs cannot be compared, as :func:`~gradmix.training.reports.tables.summarise` says.
        OSError: A file could not be written; the error names it.
    """
    folder = Path(folder)
    summary = tables.summarise(results)
    make_folder(folder)
    write_text(folder / "summary.json", to_json(tables.to_json_dict(summary)))
    write_text(folder / "summary.md", tables.to_markdown(summary))
    (folder / "compare.png").unlink(missing_ok=True)
    if any(result.status != "diverged" for result in results):
        figures.draw({"compare.png": partial(plots.compare, results)}, folder)
