"""What an installed gradmix brings along, and that its pieces agree: version, metadata, kernels, types, constraints."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
from fresh import run_python

import gradmix

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(gradmix.__file__).parent
RUNS_FROM_CHECKOUT = PACKAGE == ROOT / "gradmix"

try:
    DISTRIBUTION = importlib.metadata.distribution("gradmix")
except importlib.metadata.PackageNotFoundError:
    DISTRIBUTION = None

INSTALLED = pytest.mark.skipif(DISTRIBUTION is None, reason="gradmix is not installed; it runs from a bare checkout")


def toml():
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no tomllib")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def modules():
    """Every module of the package, found by its files: an editable install's search path is wider than the package."""
    files = [file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py")]
    names = {".".join(["gradmix", *(part for part in file.parts if part != "__init__")]) for file in files}
    if importlib.util.find_spec("gradmix.kernels"):
        names.add("gradmix.kernels")
    return sorted(names)


@INSTALLED
def test_version_is_the_same_everywhere():
    assert DISTRIBUTION.version == gradmix.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", gradmix.__version__)


@INSTALLED
def test_metadata():
    metadata = DISTRIBUTION.metadata
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    core = [r for r in DISTRIBUTION.requires if "extra ==" not in r]
    assert sorted(re.match(r"[a-z]+", r)[0] for r in core) == ["numpy", "torch"]
    assert set(metadata.get_all("Provides-Extra")) == {
        "train",
        "gradients",
        "policies",
        "images",
        "bench",
        "docs",
        "test",
        "dev",
    }


@INSTALLED
def test_the_command_is_declared():
    scripts = {e.name: e.value for e in DISTRIBUTION.entry_points if e.group == "console_scripts"}
    assert scripts == {"gradmix": "gradmix.cli:main"}


@INSTALLED
def test_kernels_are_a_subpackage():
    kernels = importlib.import_module("gradmix.kernels")
    reason = kernels.unavailable_reason()
    assert reason is None or len(reason) > 5


def test_kernels_reason(monkeypatch):
    spec = importlib.util.spec_from_file_location("gradmix_kernels_here", ROOT / "kernels" / "__init__.py")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert kernels.unavailable_reason() == "triton is not installed"
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels.importlib.metadata, "version", lambda name: "3.1.0")
    assert kernels.unavailable_reason() == "triton 3.1.0 is installed, 3.6 or later is needed"
    monkeypatch.setattr(kernels.importlib.metadata, "version", lambda name: "3.10.0+git")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.unavailable_reason() is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert kernels.unavailable_reason() == "no CUDA or ROCm device is visible to torch"
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: True)
    assert kernels.unavailable_reason() is None


def test_types_are_marked():
    assert (PACKAGE / "py.typed").is_file()


@INSTALLED
@pytest.mark.skipif(RUNS_FROM_CHECKOUT, reason="the package runs from the checkout")
def test_no_sources_or_tests_are_installed():
    files = [str(file) for file in DISTRIBUTION.files or []]
    if not any(file.startswith("gradmix/ops/") for file in files):
        pytest.skip("an editable install holds no sources of its own")
    top = {file.split("/")[0] for file in files if ".." not in file}
    assert {name for name in top if ".dist-info" not in name and name != "__pycache__"} == {"gradmix"}
    assert not [file for file in files if file.endswith((".cpp", ".cu", ".hpp", "CMakeLists.txt"))]
    assert any("license" in file.lower() for file in files)


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith("gradmix.integrations."):
            raise
        pytest.skip(str(error))  # an adapter whose framework is not installed
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


def test_constraints_pin_every_requirement():
    project = toml()["project"]
    pins = dict(
        re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line).groups()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    pinned = {name.lower().replace("_", "-") for name in pins}
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {re.match(r"[A-Za-z0-9._-]+", r)[0].lower() for r in wanted} - {"gradmix"}
    assert names - pinned == set()
    assert not [name for name in pinned if name.startswith(("nvidia", "torchvision", "timm"))]


def test_the_doctor_knows_every_extra():
    from gradmix import doctor

    extras = toml()["project"]["optional-dependencies"]
    known = {name: {doctor._DISTRIBUTIONS.get(m, m) for m in modules} for name, modules in doctor._EXTRAS.items()}
    declared = {
        name: {re.match(r"[A-Za-z0-9._-]+", r)[0].lower() for r in requirements} - {"gradmix", "types-pyyaml"}
        for name, requirements in extras.items()
    }
    assert known == declared


def test_a_bare_checkout_imports_without_its_kernels(tmp_path):
    shutil.copytree(ROOT / "gradmix", tmp_path / "gradmix", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    code = (
        "import gradmix; from gradmix.ops import draw_partners, mixed_alignment;"
        "print(gradmix.__file__); print(draw_partners.OPERATOR.explain()[0][1])"
    )
    where, why = run_python(code, PYTHONPATH=str(tmp_path))
    assert where.startswith(str(tmp_path))
    assert why == "gradmix.kernels is not installed (a bare checkout does not have it)"
