"""Import paths of version 0.1, whose modules lay in this folder before it had rooms.

``from gradmix.training.trainer import train_one`` still works, with a DeprecationWarning that names the new path.
"""

from __future__ import annotations

import sys
from types import ModuleType

from gradmix._moved import moved

FORMER_MODULES = {
    "augment": "data.augment",
    "datasets": "data.image_arrays",
    "benchmarks": "streams.benchmarks",
    "trainer": "loop.trainer",
    "clock": "loop.clock",
    "results": "runs.results",
    "metrics": "runs.metrics",
    "plots": "reports.plots",
    "tables": "reports.tables",
}
"""The new place of each former module, relative to this package."""

_ELSEWHERE = {
    "LOSS_EVERY": "gradmix.training.loop.run:LOSS_EVERY",
    "EVALUATION_ROWS": "gradmix.training.loop.evaluation:EVALUATION_SAMPLES",
    "evaluate": "gradmix.training.loop.evaluation:evaluate",
    "describe_environment": "gradmix.training.loop.environment:describe_environment",
    "save_run": "gradmix.training.reports.saving:save_run",
    "save_summary": "gradmix.training.reports.saving:save_summary",
    "resolved_config": "gradmix.training.loop.trainer:resolve_config",
    "LabelledImages": "gradmix.training.data.image_arrays:LabelledData",
    "save": "gradmix.training.reports.figures:save",
    "known_mean": "gradmix.training.runs.metrics:mean_of_known",
    "seen_accuracy": "gradmix.training.runs.metrics:accuracy_on_seen",
}
"""What is in another module now than its neighbours, or has another name."""


class _Names(dict[str, str]):
    """Every name but special ones, at its new place: :data:`_ELSEWHERE`, or under itself."""

    def __contains__(self, name: object) -> bool:
        return not str(name).startswith("__")

    def __missing__(self, name: str) -> str:
        return _ELSEWHERE.get(name, name)


def register() -> None:
    """Put a stub that forwards and warns in the place of every former module."""
    package = __name__.rpartition(".")[0]
    for old, new in FORMER_MODULES.items():
        stub = ModuleType(f"{package}.{old}", f"Moved to :mod:`{package}.{new}`.")
        stub.__dict__["__getattr__"] = moved(stub.__name__, f"{package}.{new}", _Names())
        sys.modules[stub.__name__] = stub
        setattr(sys.modules[package], old, stub)
