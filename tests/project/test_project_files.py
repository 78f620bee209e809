"""What the files around the package say of versions agrees with pyproject.toml and constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FORGE = sorted((ROOT / ".github").rglob("*.yml"))

if not FORGE:
    pytest.skip("the files of the forge are not here", allow_module_level=True)


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FORGE, ids=lambda file: file.name)
def test_the_forges_files_are_yaml(file: Path) -> None:
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


def test_hooks_have_the_versions_of_the_constraints() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    hooks = load(".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "mypy", "clang-format", "codespell"}
    for hook in hooks:
        for requirement in hook.get("additional_dependencies", []):
            name, _, version = requirement.partition("==")
            assert pins.get(name, version) == version, requirement


def test_the_workflow_covers_every_python_and_the_lowest_torch() -> None:
    jobs = load(".github/workflows/ci.yml")["jobs"]
    entries = jobs["fast"]["strategy"]["matrix"]["include"]
    stated = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT))
    assert {entry["python"] for entry in entries} == stated
    (bound,) = re.findall(r'"torch>=([\d.]+)"', PYPROJECT)
    lowest = [entry for entry in entries if entry["torch"] != "torch"]
    assert [(entry["torch"], entry["python"]) for entry in lowest] == [
        (f"torch=={bound}.*", min(stated, key=lambda v: int(v[2:])))
    ]
    assert {entry["os"] for entry in entries} == {"ubuntu-latest", "macos-latest"}


def test_the_page_on_compatibility_has_the_versions_of_the_metadata() -> None:
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    stated = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    torch, numpy = re.findall(r'"(?:torch|numpy)>=([\d.]+)"', PYPROJECT)
    assert f"| Python | {', '.join(stated)} |" in page
    assert f"| torch | {torch}, and the newest |" in page and f"| numpy | {numpy} and later, 2 included |" in page


def test_the_citation_names_this_project_and_its_paper() -> None:
    citation = load("CITATION.cff")
    (name,) = re.findall(r'^name = "(\w+)"$', PYPROJECT, re.M)
    (authors,) = re.findall(r'authors = \[\{ name = "(.*?)" \}\]', PYPROJECT)
    (licence,) = re.findall(r'^license = "(.*?)"$', PYPROJECT, re.M)
    assert (citation["title"], citation["authors"], citation["license"]) == (name, [{"name": authors}], licence)
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2505.08528"
