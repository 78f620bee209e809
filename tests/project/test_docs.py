"""The documentation site: reference and navigation are complete, and what is generated is what the package has.

The site itself is built by ``.ci/run`` and ``nox -s docs``, with warnings as errors and links checked.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from test_readme import blocks, pages_with

import gradmix.gradients

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SECTIONS = ("", "data", "optim", "replay", "mix")


@cache
def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gradmix_docs_{name}", DOCS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(found)
    finally:
        sys.path[:] = path
        sys.modules.pop("generate", None)
    return found


@cache
def help_of(command: str) -> str:
    return module("generate").cli(command)


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    described = set(re.findall(r"^\.\. auto\w+:: gradmix\.(?:gradients\.)?(\w+)$", text, re.M))
    assert {*gradmix.__all__, *gradmix.gradients.__all__} - described == {"__version__"}


def test_every_page_is_in_the_navigation() -> None:
    navigated = {DOCS / "index.md"}
    for page in pages():
        for entries in re.findall(r"^```{toctree}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            names = [line for line in entries.splitlines() if line and not line.startswith(":")]
            navigated |= {file for name in names for file in page.parent.glob(f"{name}.md")}
    assert sorted(set(pages()) - navigated) == [], "not in a toctree of docs/index.md"


def test_pages_begin_with_what_the_reader_can_do_after_them() -> None:
    for page in pages():
        title, _, rest = page.read_text(encoding="utf-8").partition("\n\n")
        if page.parent.name == "decisions" and page.name != "README.md":
            continue  # records, each with a fixed form
        if page.parent.name == "results" and page.name != "index.md":
            continue  # questions, each with its answer first: test_result_pages.py
        if not title.startswith("<!-- insert"):
            assert "After this page you " in rest[:500], page.name


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_the_flag_that_the_command_has(section: str) -> None:
    text = module("generate").config(section)
    flags = re.findall(r"^`(--[\w-]+)`", text, re.M)
    assert len(flags) == text.count("### ") > 5
    for flag in flags:
        assert re.search(rf"^ +{flag}\b", help_of("train"), re.M), flag


def test_every_variable_of_the_environment_is_listed() -> None:
    read = set()
    for pattern, names in (
        (r'"(GRADMIX_[A-Z_]+)"', (ROOT / "gradmix").rglob("*.py")),
        (r'getenv\("(\w+)"\)', (ROOT / "csrc").rglob("*.cpp")),
        (r"^gradmix_switch\((\w+)\)", [ROOT / "CMakeLists.txt"]),
    ):
        for file in names:
            read |= set(re.findall(pattern, file.read_text(encoding="utf-8"), re.M))
    page = (DOCS / "reference/environment.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(GRADMIX_\w+)`", page, re.M)) == read


def commands() -> list[tuple[str, str, str]]:
    """The lines of the pages that call gradmix: page, command, arguments."""
    found = []
    for page in sorted(pages_with("bash")):
        for line in "\n".join(blocks(page, "bash")).splitlines():
            call = re.search(r"(?:^|&& |--no-python )gradmix ([a-z]+)(.*)|-m gradmix\.cli ([a-z]+)(.*)", line)
            if call:
                found.append((page, call[1] or call[3], (call[2] or call[4] or "").partition(" #")[0]))
    return found


def test_commands_in_the_pages_have_flags_that_exist() -> None:
    assert len(commands()) > 20
    for page, command, arguments in commands():
        for flag in re.findall(r"--[\w-]+", arguments):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(command)), f"{page}: gradmix {command} {flag}"


def test_links_of_inserted_files_are_mended() -> None:
    conf = module("conf")
    text = "[a](docs/gpu.md#the-table) [b](bench/README.md) [c](https://x.org/) [d](bench)\n```\n[e](bench)\n```"
    assert conf.mend_links(text, ROOT / "CONTRIBUTING.md", DOCS / "contributing.md") == (
        "[a](gpu.md#the-table) [b](benchmarks.md) [c](https://x.org/) d\n```\n[e](bench)\n```"
    )
    assert conf.section("# A\n\n## Quick start\n\nb\n\n## C\n", "quick-start") == "## Quick start\n\nb\n\n"
    with pytest.raises(ValueError, match="insert: got the section 'missing'"):
        conf.section("# A\n", "missing")
    for file, page in conf.INSERTED.items():
        assert (ROOT / file).is_file() and f"<!-- insert {file} -->" in (DOCS / page).read_text(encoding="utf-8")


def test_pages_that_the_site_fills_in_lead_a_forge_s_reader_on() -> None:
    drop = module("conf").drop_forge_notes
    assert drop("a\n<!-- on a forge -->\nb\nc\n\nd\n") == "a\n\nd\n"
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if re.search(r"^<!-- (?:insert|generated) |^```{eval-rst}", text, re.M):
            assert len(drop(text)) < len(text), f"{page.name} is hollow on a forge, and has no note"
    for file, page in module("conf").INSERTED.items():
        assert f"](../{file})" in (DOCS / page).read_text(encoding="utf-8")
