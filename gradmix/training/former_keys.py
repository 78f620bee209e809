"""Former names of settings, in configurations, results and on the command line."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from gradmix.training.method_names import FormerNameWarning

FORMER_KEYS = {"rows_per_class": "samples_per_class"}
"""Present names of settings by former ones. Hashes and checkpoints have the former, so that saved runs are found."""


def current_keys(values: Any, *, warn: bool = True) -> Any:
    """Return nested dictionaries and lists with :data:`FORMER_KEYS` under their present names.

    Args:
        values: what YAML or JSON gives.
        warn: whether a former key is worth a :class:`FormerNameWarning`.
    """
    if isinstance(values, list):
        return [current_keys(value, warn=warn) for value in values]
    if not isinstance(values, Mapping):
        return values
    found = {}
    for key, value in values.items():
        section, dot, name = str(key).rpartition(".")
        if name in FORMER_KEYS:
            key = section + dot + FORMER_KEYS[name]
            if warn:
                warnings.warn(f"{name} is now called {FORMER_KEYS[name]}", FormerNameWarning, stacklevel=2)
        found[key] = current_keys(value, warn=warn)
    return found


def restore_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries with settings under their former names, in the same order."""
    former = {current: old for old, current in FORMER_KEYS.items()}
    return {former.get(k, k): restore_keys(v) if isinstance(v, Mapping) else v for k, v in values.items()}
