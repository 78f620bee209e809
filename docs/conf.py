"""The documentation site: ``sphinx-build -W docs site`` builds it, with ``pip install ".[docs]"``.

Pages are the Markdown files of this folder, which forges show too. Comments, each on a line of its own, are
replaced when a page is read, so that nothing is written twice and nothing can go stale:

- ``<!-- insert FILE -->``, ``<!-- insert FILE#SECTION -->``: a file of the checkout, such as CONTRIBUTING.md, or a
  section of the second level, its links mended;
- ``<!-- generated FUNCTION ARGUMENTS -->``: what a function of ``generate.py`` returns;
- ``<!-- on a forge -->``: the paragraph below it is for forges, where nothing is filled in; the site leaves it out.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402

import gradmix  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "gradmix"
author = "The gradmix authors"
copyright = "the gradmix authors, Apache-2.0"
version = release = gradmix.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_*"]
smartquotes_action = "D"  # dashes; quotes stay as they are written
myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_mock_imports = ["avalanche", "lightning"]  # a build needs no framework
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 76

nitpicky = True  # a reference in a docstring that leads nowhere is an error
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|collections|pathlib)\..*"),  # their pages are elsewhere; a build fetches nothing
    ("py:class", r"[a-z_]+|Inputs"),  # a parameter that is described as that of another function; a type's alias
    ("py:.*", r"gradmix\.(labelled_samples\.HeadSamples|estimators\.base\.Screening|gradients\.backward)"),
    ("py:func", r"(classes_of|tolerance_of)"),  # the package's own
]

html_theme = "furo"
html_title = "gradmix"
html_static_path = ["_static"]
html_css_files = ["gradmix.css"]
html_copy_source = False
html_show_sphinx = False

INSERTED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "REPRODUCIBILITY.md": "reproducibility.md",
    "bench/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
}
"""Files of the checkout, each with the page of this folder that shows it."""


def mend_links(text: str, source: Path, page: Path) -> str:
    """Make the relative links of ``source`` those of ``page``, and lead them to pages where the site has them.

    Of a link to a folder, which no site can show, the text stays.
    """

    def mend(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        file = (source.parent / target).resolve()
        if file.is_dir():
            return words
        inserted = INSERTED.get(file.relative_to(ROOT).as_posix())
        file = HERE / inserted if inserted else file
        return f"[{words}]({os.path.relpath(file, page.parent)}{anchor})"

    parts = re.split(r"(^ *```.*?^ *```)", text, flags=re.M | re.S)  # code stays as it is
    parts[::2] = [re.sub(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)", mend, part) for part in parts[::2]]
    return "".join(parts)


def section(text: str, anchor: str) -> str:
    """Return a section of the second level, by the anchor of its heading."""
    for part in re.split(r"^(?=## )", text, flags=re.M)[1:]:
        if re.sub(r"[^\w ]", "", part.splitlines()[0]).strip().lower().replace(" ", "-") == anchor:
            return part
    raise ValueError(f"insert: got the section {anchor!r}, which the file does not have")


def drop_forge_notes(text: str) -> str:
    """Leave out the paragraphs that say where a forge's reader finds what the site fills in."""
    return re.sub(r"^<!-- on a forge -->\n(?:.+\n?)+", "", text, flags=re.M)


def fill_in(app: Sphinx, name: str, content: list[str]) -> None:
    """Replace the comments of a page, before it is parsed."""
    page = Path(app.env.doc2path(name))

    def insert(match: re.Match[str]) -> str:
        source = ROOT / match[1]
        app.env.note_dependency(str(source))
        text = source.read_text(encoding="utf-8")
        return mend_links(section(text, match[2]) if match[2] else text, source, page)

    def generated(match: re.Match[str]) -> str:
        function, *arguments = match[1].split()
        return str(getattr(generate, function)(*arguments))

    text = mend_links(drop_forge_notes(content[0]), page, page)
    text = re.sub(r"^<!-- insert ([^\s#]+)(?:#(\S+))? -->$", insert, text, flags=re.M)
    content[0] = re.sub(r"^<!-- generated (.+) -->$", generated, text, flags=re.M)


def hide_constructor(app: Sphinx, what: str, *given: Any) -> tuple[str, None] | None:
    """Leave out the signature of a class that the package alone makes: one with private parameters."""
    signature = given[-2] or ""
    return ("", None) if what == "class" and re.search(r"[(, ]_\w", signature) else None


def skip_former_names(app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out names of earlier versions, which still work and warn."""
    return True if str(getattr(member, "__doc__", "")).startswith("Former name of") else None


def setup(app: Sphinx) -> None:
    """Connect the hooks."""
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-signature", hide_constructor)
    app.connect("autodoc-skip-member", skip_former_names)
