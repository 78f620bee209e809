"""Figures as files: PNG and SVG, each whole or not at all, and what is left of one that fails."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from gradmix.runtime import names
from gradmix.training.runs.whole_files import replace_file, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
NOT_DRAWN = "not_drawn.txt"
"""The file that names the pictures of a folder which could not be drawn, and why."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def as_text(drawing: Callable[_P, _T]) -> Callable[_P, _T]:
    """Has dollar signs and the like drawn, and not read as formulae: matplotlib decides it when a text is made."""

    @functools.wraps(drawing)
    def draw_as_text(*args: _P.args, **named: _P.kwargs) -> _T:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
            # A sign that the font lacks is drawn as a box.
            warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
            return drawing(*args, **named)

    return draw_as_text


@as_text
def to_svg(figure: Figure, name: str, *, themed: bool = False) -> str:
    """Render a figure as an SVG element, the same text for the same figure.

    Args:
        figure: The figure.
        name: Its name on the page; the names of its parts are made of it, so that they do not mix with others'.
        themed: Without ground, and with the colour of the text around it for its own text and lines, so that it suits a
            light page and a dark one.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    text = io.StringIO()
    # Names of parts are digests of this salt and the part; without one, they differ from call to call.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", transparent=themed, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # Black letters have no colour of their own in it, other black things have.
    return svg.replace("#000000", "currentColor").replace("<svg", '<svg fill="currentColor"', 1) if themed else svg


@as_text
def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with replace_file(Path(path)) as staging:
        # Without the writer's name and version, the same run gives the same bytes.
        figure.savefig(staging, format="png", dpi=DPI, metadata={"Software": None})


def draw(pictures: Mapping[str, Callable[[], Figure]], folder: str | Path) -> None:
    """Draw pictures, given by the names of their files, into a folder, each whole or not at all.

    One that fails, for whatever reason, costs nothing but itself: it is said in a warning, and in :data:`NOT_DRAWN`
    beside the others.
    """
    folder = Path(folder)
    failed = []
    for name, figure in pictures.items():
        try:
            save(figure(), folder / name)
        except Exception as error:
            failed.append(not_drawn(name, error))
    try:
        (folder / NOT_DRAWN).unlink(missing_ok=True)
        if failed:
            write_text(folder / NOT_DRAWN, "".join(f"{reason}\n" for reason in failed))
    except OSError as error:
        failed.append(f"{NOT_DRAWN} could not be written ({error.strerror})")
    if failed:
        warnings.warn(f"{folder}: {'; '.join(failed)}", stacklevel=2)


def not_drawn(name: str, error: Exception) -> str:
    """Say in a line that a picture is missing, and why."""
    reason = names.shown(" ".join(str(error).split())) or "no reason given"
    return f"{name} could not be drawn ({type(error).__name__}: {reason}); no figures are lost with it"
