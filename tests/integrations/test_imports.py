"""Frameworks stay out until an adapter is imported; without the framework that says how to install it."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import requires

import pytest
from fresh import run_python

FRAMEWORKS = ("avalanche", "lightning", "timm", "torchvision", "transformers", "accelerate")
ADAPTERS = {"avalanche": "pip install avalanche-lib", "lightning": "pip install lightning"}
"""Modules that derive from a class of their framework, with what installs it."""

NEEDLESS = ("timm", "transformers")
"""Modules that need nothing."""


def test_no_framework_is_imported_by_the_package_or_by_adapters_that_need_none() -> None:
    code = "import sys, gradmix, gradmix.integrations; "
    code += "".join(f"import gradmix.integrations.{name}; " for name in NEEDLESS)
    (found,) = run_python(code + f"print(sorted(set({FRAMEWORKS!r}) & set(sys.modules)))")
    assert found == "[]"


@pytest.mark.parametrize(("name", "command"), ADAPTERS.items())
def test_without_the_framework_the_error_names_the_command(name: str, command: str) -> None:
    """Also where it is installed: ``None`` in ``sys.modules`` stands for a module that is not there."""
    code = f"import sys; sys.modules[{name!r}] = None\ntry:\n    import gradmix.integrations.{name}\n"
    code += "except ModuleNotFoundError as error:\n    print(error)"
    (found,) = run_python(code)
    assert found.startswith(f"gradmix.integrations.{name}: found no module '{name}") and found.endswith(command)


@pytest.mark.parametrize("name", ADAPTERS)
def test_where_the_framework_is_not_installed(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ModuleNotFoundError, match=ADAPTERS[name]):
        importlib.import_module(f"gradmix.integrations.{name}")


def test_no_requirement_of_the_package_is_a_framework() -> None:
    """An extra with one would bring its own torch and torchvision along, and replace a CPU build."""
    names = {requirement.split(";")[0].lower() for requirement in requires("gradmix") or []}
    assert names and not [name for name in names if any(name.startswith(framework) for framework in FRAMEWORKS)]
