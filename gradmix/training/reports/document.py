"""Documents: Markdown made by a template, and the self-contained HTML page that it renders to.

The templates lie in ``templates/``. What they insert is escaped, so that it is shown as the text that it is; a
:class:`Table` is inserted as a table. A paragraph right before a table or a picture is its caption on the page.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from gradmix.runtime import names
from gradmix.training.reports import cells, figures

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure


class Markdown(str):
    """A text that is Markdown already, and is inserted as it is."""


@dataclass(frozen=True)
class Table:
    """A table; its first ``text_columns`` are text, the others figures; cells ``best``, by row and column, are bold."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    best: frozenset[tuple[int, int]] = frozenset()

    def markdown(self) -> Markdown:
        """Render as GitHub-flavoured Markdown."""
        rule = ["---" if i < self.text_columns else "---:" for i in range(len(self.header))]
        header, *rows = [[names.markdown_cell(cell).strip() for cell in row] for row in (self.header, *self.rows)]
        for row, column in self.best:
            rows[row][column] = f"**{rows[row][column]}**"
        return Markdown("\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows)))

    def text(self, *, bold: bool = False) -> str:
        """Render as plain text; a cell may have several lines. With ``bold`` a terminal shows the best cells so."""
        rows = [[[names.shown(line) for line in cell.split("\n")] for cell in row] for row in (self.header, *self.rows)]
        widths = [max(len(line) for cell in column for line in cell) for column in zip(*rows, strict=True)]
        rule = "  ".join("-" * width for width in widths)
        lines = [rule]
        for number, row in enumerate(rows):
            for i in range(max(map(len, row))):
                parts = [cell[i] if i < len(cell) else "" for cell in row]
                aligned = [
                    part.ljust(width) if column < self.text_columns else part.rjust(width)
                    for column, (part, width) in enumerate(zip(parts, widths, strict=True))
                ]
                if bold:
                    best = [(number - 1, column) in self.best for column in range(len(row))]
                    aligned = [f"\x1b[1m{part}\x1b[0m" if b else part for part, b in zip(aligned, best, strict=True)]
                lines.append("  ".join(aligned).rstrip())
            if number == 0:
                lines.append(rule)
        return "\n".join([*lines, rule])


@dataclass(frozen=True)
class Picture:
    """A plot; ``name`` is its file's, without the suffix, and ``alt`` says what it shows to who does not see it."""

    name: str
    alt: str
    drawing: Callable[[], Figure]


@dataclass(frozen=True)
class Svg:
    """A plot as SVG: by itself, and themed, for a page."""

    plain: str
    themed: str


def draw(pictures: Iterable[Picture]) -> tuple[dict[str, Markdown], dict[str, Svg]]:
    """Draw pictures; one that fails costs nothing but itself, and is said in a warning and in its place.

    Returns:
        What stands in each picture's place in Markdown, and the plots that could be drawn, by name.
    """
    places, drawn = {}, {}
    for picture in pictures:
        try:
            figure = picture.drawing()
            themed = figures.to_svg(figure, picture.name, themed=True)
            drawn[picture.name] = Svg(figures.to_svg(figure, picture.name), themed)
            alt = names.markdown(picture.alt.replace("[", "(").replace("]", ")"))
            places[picture.name] = Markdown(f"![{alt}]({picture.name}.svg)")
        except Exception as error:
            note = figures.not_drawn(f"{picture.name}.svg", error)
            warnings.warn(note, stacklevel=2)
            places[picture.name] = Markdown(names.markdown(f"[{note}]"))
    return places, drawn


def render(template: str, **values: Any) -> str:
    """Render a template as Markdown, with one empty line between blocks."""
    text = _markdown_templates().get_template(template).render(**values)
    return re.sub("\n{3,}", "\n\n", text).strip() + "\n"


@cache
def _markdown_templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("gradmix.training.reports"),
        undefined=StrictUndefined,
        finalize=_to_markdown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A text at the begin of a block could be taken for a heading, a list or the like.
    environment.filters["block"] = lambda text: Markdown(names.markdown(text))
    environment.filters["command"] = _command
    environment.filters["verbatim"] = Markdown
    environment.filters["setting"] = cells.setting
    return environment


def _to_markdown(value: Any) -> str:
    if isinstance(value, Table):
        return value.markdown()
    return value if isinstance(value, Markdown) else names.markdown_cell(str(value))


def _command(text: str) -> Markdown:
    # A fence longer than any in the text.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markdown(f"{fence}bash\n{names.shown(text)}\n{fence}")


# ------------------------------------------------------------------------------------------------------------ the page

# Plots have one set of colours; on a dark ground these two are too dark, so that the page has them in two brightnesses.
_PAGE_COLOURS = {"#0072b2": "var(--blue)", "#009e73": "var(--green)"}

# What markdown-it writes; in texts it escapes angle brackets and quotation marks.
_TABLE = re.compile(r"<p>([^\n]*)</p>\n<table>\n(.*?)</table>", re.DOTALL)
_PICTURE = re.compile(r'<p>([^\n]*)</p>\n<p><img src="(\w+)\.svg" alt="([^"]*)" ?/?></p>')


def to_html(text: str, pictures: Mapping[str, Svg]) -> str:
    """Render Markdown that :func:`render` made as one HTML page, light or dark as the reader has it.

    Args:
        text: The Markdown; it begins with its title.
        pictures: The plots that it links to, by name.
    """
    from jinja2 import Environment, PackageLoader
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    body = MarkdownIt("commonmark").enable("table").render(text)
    title = body[body.index("<h1>") + 4 : body.index("</h1>")]
    body = _PICTURE.sub(lambda found: _html_figure(found[1], pictures[found[2]], found[3]), body)
    body = _TABLE.sub(lambda found: _html_table(found[1], found[2]), body)
    templates = Environment(loader=PackageLoader("gradmix.training.reports"), autoescape=True)
    return templates.get_template("page.html.jinja").render(title=Markup(title), body=Markup(body)) + "\n"


def _html_figure(caption: str, picture: Svg, alt: str) -> str:
    svg = picture.themed.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
    for colour, variable in _PAGE_COLOURS.items():
        svg = re.sub(f"(?i){colour}", variable, svg)
    # What is wider than the page can be scrolled, by keyboard too.
    return (
        f'<figure>\n<figcaption>{caption}</figcaption>\n<div class="wide" tabindex="0" role="region" '
        f'aria-label="{caption}">\n{svg}</div>\n</figure>'
    )


def _html_table(caption: str, rows: str) -> str:
    rows = re.sub(r"<th(?=[ >])", '<th scope="col"', rows)
    rows = re.sub(r"<tr>\n<td(.*?)>(.*?)</td>", r'<tr>\n<th scope="row"\1>\2</th>', rows)
    rows = re.sub(r'<(th|td)( scope="\w+")?>', r'<\1\2 class="text">', rows).replace(' style="text-align:right"', "")
    rows = rows.replace(" *</td>", '<span class="star"> *</span></td>')
    return (
        f'<div class="wide table" tabindex="0" role="region" aria-label="{caption}">\n<table>\n'
        f"<caption><span>{caption}</span></caption>\n{rows}</table>\n</div>"
    )
