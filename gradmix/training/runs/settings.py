"""Settings of runs by dotted key, and those of them that tell runs apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradmix.training.config import TrainConfig, to_dict
from gradmix.training.loop.trainer import RUNTIME_FIELDS


def distinguishing(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what is learnt, as plain values by key: those of a configuration, but not
    :data:`~gradmix.training.loop.trainer.RUNTIME_FIELDS`, which hold methods and seeds too.
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
