"""Settings of runs by dotted key, and those of them that distinguish runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradmix.training.config import TrainConfig, to_dict
from gradmix.training.former_keys import restore_keys
from gradmix.training.method_names import stable_name

RUNTIME_FIELDS = (
    "methods",
    "seeds",
    "output",
    "device",
    "threads",
    "checkpoint",
    "data.data_dir",
    "data.workers",
)
"""Settings that do not distinguish runs: they change where and how a run is made, not what is learnt."""


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return what distinguishes a run: method, seed and the resolved configuration without :data:`RUNTIME_FIELDS`.

    The method stands under its :func:`~gradmix.training.method_names.stable_name`.
    """
    plain = restore_keys(to_dict(config))
    for key in RUNTIME_FIELDS:
        section, _, name = key.rpartition(".")
        del (plain[section] if section else plain)[name]
    return {"method": stable_name(config.methods[0]), "seed": config.seeds[0], **plain}


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what is learnt, as plain values by key: those of a configuration, but not
    :data:`RUNTIME_FIELDS`, which hold methods and seeds too.
    """
    return {key: value for key, value in flatten(to_dict(config)) if key not in RUNTIME_FIELDS}


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dictionaries as pairs of a dotted key and a value.

    Example:
        >>> flatten({"mix": {"alpha": 1.0}, "device": "cpu"})
        [('mix.alpha', 1.0), ('device', 'cpu')]
    """
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        flat += flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return flat
