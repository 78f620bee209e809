"""Checks an installed wheel: its extension loads. Run by cibuildwheel, away from the checkout.

With ``--alone`` only the extension is loaded: where torch has no wheels the package cannot be imported.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path


def load_alone() -> object:
    """Load the extension by its file, without the package around it."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    file = Path(sysconfig.get_path("platlib"), "gradmix", f"_C{suffix}")
    spec = importlib.util.spec_from_file_location("gradmix._C", file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_info()


def load() -> object:
    """Import the package, and load the extension as it does."""
    import gradmix
    from gradmix import _extension

    assert "site-packages" in gradmix.__file__, gradmix.__file__
    extension = _extension.load()
    assert extension is not None, _extension.unavailable_reason()
    return extension.build_info()


if __name__ == "__main__":
    print(load_alone() if "--alone" in sys.argv else load())
