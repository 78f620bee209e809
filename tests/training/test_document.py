"""Documents: both renderings of every kind of block, with text that either could take for its own."""

from __future__ import annotations

import re

import pytest

from gradmix.training.reports import plots
from gradmix.training.reports.document import Block, Code, Heading, Items, Picture, Table, Text, to_html, to_markdown

NASTY = 'a*b_c|d`e`<f>&"g"'


@pytest.mark.parametrize(
    ("block", "markdown", "page"),
    [
        (Heading(NASTY, 2), r"## a\*b\_c|d\`e\`\<f>&", "<h2>a*b_c|d`e`&lt;f&gt;&amp;&quot;g&quot;</h2>"),
        (Text("2 < 3"), r"2 \< 3", "<p>2 &lt; 3</p>"),
        (Code("run --a 'b c'"), "```bash\nrun --a 'b c'\n```", "<pre><code>run --a &#x27;b c&#x27;</code></pre>"),
        (Items([("mean: ", "R[i,j]"), ("", "x<y")]), "- mean: `R[i,j]`\n- `x<y`\n", "x&lt;y</code></li>"),
        (Table("c_d", ["a|b", "c"], [["x", "1"]]), "c\\_d\n\n| a\\|b | c |\n| --- | ---: |\n| x | 1 |", ">c_d</span>"),
    ],
    ids=["heading", "paragraph", "command", "list", "table"],
)  # fmt: skip
def test_both_renderings(block: Block, markdown: str, page: str) -> None:
    blocks = [Heading("Title", 1), block]
    assert markdown in to_markdown(blocks)
    assert page in to_html(blocks)


def test_figures_stay_under_one_another() -> None:
    rows = [["x", "+0.1 *", "1"], ["y *", "+0.2", "2"]]
    page = to_html([Heading("Title", 1), Table("caption", ["a", "b", "c"], rows)])
    star = '<span class="star">{}</span>'
    assert f"<td>+0.1{star.format(' *')}</td>" in page and f"<td>+0.2{star.format('')}</td>" in page
    assert "<td>1</td>" in page and "<td>2</td>" in page, "no room is kept where no figure has a star"
    assert '<th scope="row" class="text">y *</th>' in page


def test_a_picture_stands_in_the_page_and_beside_the_markdown() -> None:
    figure = plots.dots(["a"], [[0.1, 0.2]], "x")
    blocks = [Heading("Title", 1), Picture("shown", "What_it is", "a [0.15] & b", figure)]
    assert to_markdown(blocks).endswith("What\\_it is\n\n![a (0.15) & b](shown.svg)\n")
    page = to_html(blocks)
    assert "<figcaption>What_it is</figcaption>" in page
    assert re.search(r'<svg role="img" aria-label="a \[0\.15\] &amp; b"', page)
    assert "shown.svg" not in page
