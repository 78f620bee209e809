"""Documents: Markdown and page say the same, of text that either could take for its own."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest

from gradmix.training.reports import document, plots
from gradmix.training.reports.document import Markdown, Picture, Table, to_html

NASTY = 'a*b_c|d`e`<f>&"g"'


def body(text: str, pictures: Any = None) -> str:
    """The page of a Markdown text, from its title on."""
    return to_html("# Title\n\n" + text, pictures or {}).partition("</h1>\n")[2]


@pytest.fixture
def escaped() -> Any:
    """Renders a template of one expression."""
    environment = document._markdown_templates()
    return lambda expression, **values: environment.from_string("{{ " + expression + " }}").render(**values)


@pytest.mark.parametrize(
    ("start", "expression", "page"),
    [
        ("## ", "text | block", "<h2>{}</h2>"),
        ("", "text | block", "<p>{}</p>"),
        ("- ", "text | block", "<ul>\n<li>{}</li>\n</ul>"),
        ("Said: ", "text", "<p>Said: {}</p>"),
        ("", "text | command", '<pre><code class="language-bash">{}\n</code></pre>'),
    ],
    ids=["heading", "paragraph", "item", "within", "command"],
)
@pytest.mark.parametrize("text", [NASTY, "2 < 3", "# a", "- a", "1. a", "=== x", "[a](b) ![c](d)", "run --a 'b c'"])
def test_texts_are_shown_as_they_are(text: str, start: str, expression: str, page: str, escaped: Any) -> None:
    found = body(start + escaped(expression, text=text))
    before, after = page.split("{}")
    assert found.startswith(before)
    assert unescape(found.removeprefix(before).partition(after)[0]) == text


def test_a_fence_is_longer_than_any_in_the_command(escaped: Any) -> None:
    text = escaped("text | command", text="a ```` b")
    assert text == "`````bash\na ```` b\n`````" and "a ```` b" in body(text)


def test_one_table_as_text_markdown_and_html() -> None:
    table = Table(["a|b", "c\nd"], [["x_y", "1.5"], ["two\nlines", "12"]])
    rule = "-----  ---"
    lines = ["a|b      c", "         d", rule, "x_y    1.5", "two     12", "lines"]
    assert table.text().splitlines() == [rule, *lines, rule]
    flat = Table(["a|b", "c"], [["x_y", "1.5"]])
    assert flat.markdown() == "| a\\|b | c |\n| --- | ---: |\n| x\\_y | 1.5 |"
    page = body("The caption\n\n" + flat.markdown())
    assert '<th scope="col" class="text">a|b</th>\n<th scope="col">c</th>' in page
    assert '<th scope="row" class="text">x_y</th>\n<td>1.5</td>' in page
    assert "<caption><span>The caption</span></caption>" in page and 'aria-label="The caption"' in page


def test_figures_stay_under_one_another() -> None:
    rows = [["x", "+0.1 *", "1"], ["y *", "+0.2", "2"]]
    page = body("caption\n\n" + Table(["a", "b", "c"], rows).markdown())
    assert '<td>+0.1<span class="star"> *</span></td>' in page and "<td>+0.2</td>" in page
    assert '<th scope="row" class="text">y *</th>' in page, "a name keeps its own"


def test_a_picture_stands_in_the_page_and_beside_the_markdown() -> None:
    picture = Picture("shown", "a [0.15] & b", lambda: plots.dots(["a"], [[0.1, 0.2]], "x"))
    places, drawn = document.draw([picture])
    assert places == {"shown": "![a (0.15) & b](shown.svg)"}
    page = body(f"What\\_it is\n\n{places['shown']}", drawn)
    assert "<figcaption>What_it is</figcaption>" in page
    assert re.search(r'<svg role="img" aria-label="a \(0\.15\) &amp; b"', page)
    assert "shown.svg" not in page


def test_only_what_is_markdown_already_is_inserted_as_it_is(escaped: Any) -> None:
    assert escaped("text", text=Markdown("*a*")) == "*a*" and escaped("text", text="*a*") == r"\*a\*"
