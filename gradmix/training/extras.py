"""Packages that an extra brings, imported when they are needed."""

from __future__ import annotations

import importlib
from itertools import accumulate
from typing import Any


def import_extra(module: str, need: str, extra: str = "train") -> Any:
    """Import a module that comes with an extra.

    Args:
        module: The module.
        need: What needs the package, as the error says it.
        extra: The extra.

    Raises:
        ModuleNotFoundError: The package is not installed; the message says how to install it.
    """
    try:
        # Packages before what is in them: one that cannot be imported is not passed over for a module at hand.
        *_, found = (importlib.import_module(name) for name in accumulate(module.split("."), "{}.{}".format))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{need}: pip install 'gradmix[{extra}]'", name=error.name) from error
    return found
