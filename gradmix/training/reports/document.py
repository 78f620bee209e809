"""Documents of headings, text, tables and plots, as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from gradmix.names import markdown, markdown_cell, shown
from gradmix.training.reports import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Heading:
    """A heading; the first of a document, of level 1, is its title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """A command."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list: what is said, and a formula behind it that is set as code; either may be empty."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table with a caption; its first ``text_columns`` are text, the others figures."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Picture:
    """A plot; ``name`` is its file's, without the suffix, and ``alt`` says what it shows to who does not see it.

    ``drawing`` is the figure, or what makes it: then it is made when it is wanted, and may fail (:func:`drawn`).
    """

    name: str
    title: str
    alt: str
    drawing: Figure | Callable[[], Figure]

    @cached_property
    def figure(self) -> Figure:
        """The plot."""
        return self.drawing() if callable(self.drawing) else self.drawing

    @cached_property
    def svg(self) -> tuple[str, str]:
        """The plot as :func:`~gradmix.training.reports.plots.to_svg` renders it: by itself, and themed, for a page."""
        themed = plots.to_svg(self.figure, self.name, themed=True)
        return plots.to_svg(self.figure, self.name), themed


Block = Heading | Text | Code | Items | Table | Picture


def drawn(blocks: Sequence[Block]) -> list[Block]:
    """The same document with a note, and a warning, in place of every picture that cannot be drawn."""
    found: list[Block] = []
    for block in blocks:
        if isinstance(block, Picture):
            try:
                block.svg  # noqa: B018 - drawn now, and kept
            except Exception as error:
                note = plots.not_drawn(f"{block.name}.svg", error)
                warnings.warn(note, stacklevel=2)
                block = Text(f"{block.title} [{note}]")
        found.append(block)
    return found


def to_markdown(blocks: Sequence[Block]) -> str:
    """Render GitHub-flavoured Markdown, with links to the plots as ``NAME.svg``."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {markdown(block.text)}")
        elif isinstance(block, Text):
            parts.append(markdown(block.text))
        elif isinstance(block, Code):
            # A fence longer than any in the text.
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
            parts.append(f"{fence}bash\n{shown(block.text)}\n{fence}")
        elif isinstance(block, Items):
            parts.append("\n".join(f"- {markdown(t)}{f'`{code}`' if code else ''}" for t, code in block.items))
        elif isinstance(block, Table):
            rule = ["---" if i < block.text_columns else "---:" for i in range(len(block.header))]
            cells = [[markdown_cell(c) for c in row] for row in (block.header, *block.rows)]
            lines = [cells[0], rule, *cells[1:]]
            table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            parts.append(f"{markdown(block.caption)}\n\n{table}")
        else:
            alt = markdown(block.alt.replace("[", "(").replace("]", ")"))
            parts.append(f"{markdown(block.title)}\n\n![{alt}]({block.name}.svg)")
    return "\n\n".join(parts) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """Render one HTML page that needs nothing else, light or dark as the reader has it."""
    parts = []
    heading = next(block.text for block in blocks if isinstance(block, Heading))
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h{block.level}>{_said(block.text)}</h{block.level}>")
        elif isinstance(block, Text):
            parts.append(f"<p>{_said(block.text)}</p>")
        elif isinstance(block, Code):
            parts.append(f"<pre><code>{_said(block.text)}</code></pre>")
        elif isinstance(block, Items):
            items = [f"<li>{_said(t)}{f'<code>{_said(code)}</code>' if code else ''}</li>" for t, code in block.items]
            parts.append("<ul>\n" + "\n".join(items) + "\n</ul>")
        elif isinstance(block, Table):
            parts.append(_html_table(block))
        else:
            title, alt = _said(block.title), _said(block.alt)
            labelled = _coloured(block.svg[1]).replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
            parts.append(
                f'<figure>\n<figcaption>{title}</figcaption>\n<div class="wide" tabindex="0" role="region" '
                f'aria-label="{title}">\n{labelled}</div>\n</figure>'
            )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_said(heading)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


# Plots have one set of colours; on a dark ground these two are too dark to be told from it.
_LIGHTER = {"#0072b2": ("--blue", "#6f97f5"), "#009e73": ("--green", "#2cc49a")}

_STYLE = (
    f"""\
:root {{ color-scheme: light dark;
  --ink: #1b1b1b; --ground: #ffffff; --quiet: #5c5c5c; --rule: #d4d4d4; --band: #f5f5f5;
  {" ".join(f"{name}: {dark};" for dark, (name, _) in _LIGHTER.items())} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8e8e8; --ground: #17181a; --quiet: #a8a8a8; --rule: #3c3e42; --band: #202226;
    {" ".join(f"{name}: {light};" for name, light in _LIGHTER.values())} }}
}}
"""
    + """\
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 88rem; color: var(--ink); background: var(--ground);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.75rem; }
p, ul, figcaption { max-width: 46rem; }
p:has(+ ul) { margin-bottom: 0.3rem; }
p + ul { margin-top: 0.3rem; }
ul { padding-left: 1.2rem; }
li { margin: 0.3rem 0; }
pre { padding: 0.6rem 0.9rem; overflow-x: auto; background: var(--band); border-radius: 4px; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em; }
.wide { overflow-x: auto; }
.table { margin: 1rem 0 1.5rem; }
/* Collapsed, the lines below cells would not move with those that stay; with broken heights they would not meet. */
table { border-collapse: separate; border-spacing: 0; font-size: 0.875rem; line-height: 1.375rem; }
caption { caption-side: top; text-align: left; color: var(--quiet); padding-bottom: 0.4rem; }
/* What is wider than the screen is scrolled, its caption and its first column stay. */
caption span { display: block; position: sticky; left: 0; max-width: min(46rem, calc(100vw - 2.5rem)); }
th, td { padding: 0.25rem 0 0.25rem 1rem; text-align: right; border-bottom: 1px solid var(--rule);
  vertical-align: top; white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child { position: sticky; left: 0; padding-left: 0; padding-right: 0.4rem; background: var(--ground); }
th { font-weight: 600; }
thead th { border-bottom: 2px solid var(--rule); vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 500; min-width: 12rem; }
tbody tr:hover > * { background: var(--band); }
th.text, td.text { text-align: left; white-space: normal; }
.star { display: inline-block; width: 0.9em; text-align: left; white-space: pre; }
figure { margin: 1.5rem 0; }
figure svg { width: 100%; max-width: 54rem; min-width: 34rem; height: auto; display: block; }
figcaption { color: var(--quiet); font-size: 0.9rem; margin-bottom: 0.4rem; }
@media (max-width: 40rem) {
  tbody th:first-child { min-width: 8rem; max-width: 11rem; }
  td.text { min-width: 9rem; }
}
@media print {
  :root { --ink: #000000; --ground: #ffffff; --quiet: #333333; --rule: #999999; --band: #ffffff;
    --blue: #0072b2; --green: #009e73; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  table { font-size: 7.5pt; line-height: 1.4; }
  tbody th { min-width: 0; }
  th, td { padding-left: 0.8em; }
  .wide { overflow: visible; }
  th:first-child, caption span { position: static; }
  caption, figcaption { font-size: 8.5pt; }
  figure svg { min-width: 0; max-width: 16cm; max-height: 23cm; }
  figure, tr, li { break-inside: avoid; }
  h2, figcaption, caption, p:has(+ ul) { break-after: avoid; }
}
"""
)


def _html_table(block: Table) -> str:
    # Figures stay under one another, with a star behind them or without.
    starred = {i for row in block.rows for i, text in enumerate(row) if text.endswith(" *")}

    def cell(kind: str, column: int, text: str, scope: str = "") -> str:
        named = ' class="text"' if column < block.text_columns else ""
        content = _said(text)
        if column in starred and kind == "td":
            star = " *" if text.endswith(" *") else ""
            content = f'{_said(text.removesuffix(" *"))}<span class="star">{star}</span>'
        return f"<{kind}{scope}{named}>{content}</{kind}>"

    head = "".join(cell("th", i, text, ' scope="col"') for i, text in enumerate(block.header))
    rows = [
        "<tr>"
        + "".join(
            cell("th" if i == 0 else "td", i, text, ' scope="row"' if i == 0 else "") for i, text in enumerate(row)
        )
        + "</tr>"
        for row in block.rows
    ]
    # What is wider than the page can be scrolled, by keyboard too.
    said = _said(block.caption)
    return (
        f'<div class="wide table" tabindex="0" role="region" aria-label="{said}">\n<table>\n'
        f"<caption><span>{said}</span></caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table>\n</div>"
    )


def _coloured(svg: str) -> str:
    """Leave to the page those colours that it has in two brightnesses."""
    for dark, (name, _) in _LIGHTER.items():
        svg = re.sub(f"(?i){dark}", f"var({name})", svg)
    return svg


def _said(text: str) -> str:
    return html.escape(shown(text))
