"""The Markdown pages: links lead somewhere, Python in docs/ runs, and paths named in them exist."""

from __future__ import annotations

import doctest
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    file for pattern in ("*.md", "docs/**/*.md", "bench/*.md", ".github/**/*.md") for file in ROOT.glob(pattern)
)
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, as forges do it."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_paths_in_the_pages_exist(page: Path) -> None:
    """What looks like a path of this repository, in code type, and has no placeholder."""
    if page.name == "CHANGELOG.md":
        pytest.skip("it tells of former paths")
    folders = "gradmix|tests|bench|docs|csrc|kernels|cmake"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", prose(page)):
        if "NAME" in name:
            continue
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", [p for p in PAGES if ">>> " in p.read_text(encoding="utf-8")], ids=lambda p: p.name)
def test_examples_run(page: Path) -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testfile(str(page), module_relative=False, optionflags=flags, encoding="utf-8").failed == 0


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_names_of_the_package_exist(page: Path) -> None:
    """Dotted names in code type, such as ``gradmix.ReplayBuffer``; a former name would warn, which is an error."""
    if page.name == "CHANGELOG.md":
        pytest.skip("it tells of former names")
    for name in sorted(set(re.findall(r"`(gradmix(?:\.[A-Za-z_]\w*)+)", prose(page)))):
        pkgutil.resolve_name(name)
