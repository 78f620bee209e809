"""What the files around the package say of versions agrees with pyproject.toml and constraints.txt."""

from __future__ import annotations

import re
import runpy
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
    rows = {
        cells[1]: cells[2:4] for line in page.splitlines() if len(cells := [c.strip() for c in line.split("|")]) == 6
    }
    assert set(re.findall(r"3\.\d+", " ".join(rows["Python"]))) == set(stated)
    pinned = re.findall(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert pinned[0] in rows["torch"][0].partition(", all tests")[0] and rows["torch"][1] == f"{torch}, and the newest"
    assert rows["numpy"][1] == f"{numpy} and later"


def test_the_release_has_a_wheel_for_every_python_and_platform() -> None:
    jobs = load(".github/workflows/release.yml")["jobs"]
    (table,) = re.findall(r"^\[tool\.cibuildwheel\]\nbuild = \[(.*?)\]", PYPROJECT, re.M)
    pythons = re.findall(r'"cp3(\d+)-\*"', table)
    assert [f"3.{minor}" for minor in pythons] == re.findall(r"Python :: (3\.\d+)", PYPROJECT)
    platforms = {entry["name"] for entry in jobs["wheels"]["strategy"]["matrix"]["include"]}
    assert platforms == {"Linux x86-64", "Linux aarch64", "macOS x86-64", "macOS arm64"}
    commands = " ".join(step.get("run", "") for step in jobs["check"]["steps"])
    assert f'ls dist/*.whl | wc -l)" = {len(pythons) * len(platforms)}' in commands
    assert "twine check --strict dist/*" in commands


def test_a_release_is_published_without_a_password_and_by_one_job_alone() -> None:
    workflow = load(".github/workflows/release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}, "YAML reads the key `on` as true"
    assert workflow["permissions"] == {"contents": "read"}
    assert [name for name, job in workflow["jobs"].items() if "permissions" in job] == ["publish"]
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "check"
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")


def test_the_readme_of_a_release_has_no_relative_link() -> None:
    links = runpy.run_path(str(ROOT / ".github/readme_links.py"))["make_absolute"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    made = links(text, "https://forge/me/it", "v1")
    assert {target for target in re.findall(r"\]\(([^)]*)\)", made) if not target.startswith("https://")} == set()
    assert "![Mix two samples" in made and "(https://forge/me/it/raw/v1/docs/images/select.svg)" in made
    assert "[Concepts](https://forge/me/it/blob/v1/docs/concepts.md)" in made
    code = re.compile(r"^```.*?^```$", re.M | re.S)
    assert code.findall(made) == code.findall(text) != []
    assert links(made, "https://forge/other", "v2") == made, "absolute links stay"
    in_code = "```\nf[x](y)\n```"
    assert links(in_code, "https://forge/me/it", "v1") == in_code


def test_the_citation_names_this_project_and_its_paper() -> None:
    citation = load("CITATION.cff")
    (name,) = re.findall(r'^name = "(\w+)"$', PYPROJECT, re.M)
    (authors,) = re.findall(r'authors = \[\{ name = "(.*?)" \}\]', PYPROJECT)
    (licence,) = re.findall(r'^license = "(.*?)"$', PYPROJECT, re.M)
    assert citation["title"].partition(":")[0] == name
    assert (citation["authors"], citation["license"]) == ([{"name": authors}], licence)
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2505.08528"
    released = re.findall(r"^## \[([\d.]+)\] - ([\d-]+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert (citation["version"], str(citation["date-released"])) == released[0], "the newest version of the changelog"
    page = (ROOT / "docs/cite.md").read_text(encoding="utf-8")
    assert f"{{{citation['title']}}}" in page and f"{{{citation['version']}}}" in page
