"""Old import paths: the modules that lay in this folder before it had rooms.

``from gradmix.training.trainer import train_one`` still works, with a DeprecationWarning that names the new path.
"""

from __future__ import annotations

import sys
from types import ModuleType

from gradmix._moved import moved

FORMER_MODULES = {
    "augment": "data.augment",
    "batch_reader": "data.batch_reader",
    "class_names": "data.class_names",
    "datasets": "data.image_arrays",
    "image_files": "data.image_files",
    "pickled_arrays": "data.pickled_arrays",
    "pixels": "data.pixels",
    "rows": "data.samples",
    "tabular_data": "data.tabular",
    "text_data": "data.texts",
    "benchmarks": "streams.benchmarks",
    "protocols": "streams.protocols",
    "heads": "models.growing_head",
    "single_rows": "models.single_sample",
    "mixing_space": "methods.mixing_space",
    "trainer": "loop.trainer",
    "sampler": "loop.sampler",
    "reading_sampler": "loop.reading_sampler",
    "keeping_sampler": "loop.keeping_sampler",
    "reading": "loop.reading",
    "preparation": "loop.preparation",
    "evaluation": "loop.evaluation",
    "optimiser": "loop.optimiser",
    "clock": "loop.clock",
    "memory": "loop.memory",
    "divergence": "loop.divergence",
    "distributed": "loop.distributed",
    "sharding": "loop.sharding",
    "checkpoint": "loop.checkpoint",
    "run_state": "loop.state_checks",
    "random_state": "loop.random_state",
    "environment": "loop.environment",
    "results": "runs.results",
    "experiments": "runs.experiments",
    "running": "runs.running",
    "settings": "runs.settings",
    "metrics": "runs.metrics",
    "whole_files": "runs.whole_files",
    "report": "reports.report",
    "document": "reports.document",
    "plots": "reports.plots",
    "tables": "reports.tables",
    "cells": "reports.cells",
    "findings": "reports.findings",
    "significance": "reports.significance",
}
"""The new place of each former module, relative to this package."""


_RENAMED = {
    "rows": {"Rows": "Samples", "TensorRows": "TensorSamples", "StoredRows": "StoredSamples", "rows_of": "samples_of"},
    "results": {name: f"gradmix.training.reports.saving:{name}" for name in ("save_run", "draw_run", "save_summary")},
    "image_files": {
        name: f"gradmix.training.data.image_layouts:{name}"
        for name in ("EXTENSIONS", "TINY_IMAGENET", "image_folder", "imagenet", "tiny_imagenet")
    },
    "plots": {name: f"gradmix.training.reports.figures:{name}" for name in ("NOT_DRAWN", "draw", "save", "to_svg")}
    | {"seen_accuracy": "gradmix.training.runs.metrics:seen_accuracy"},
    "trainer": {
        "settled": "resolved_config",
        "CIRCUMSTANCES": "gradmix.training.runs.settings:RUNTIME_FIELDS",
        "identity": "gradmix.training.runs.settings:identity",
        "LOSS_EVERY": "gradmix.training.loop.run:LOSS_EVERY",
    },
}
"""What has another name in its new module, by former module."""


class _SameNames(dict[str, str]):
    """A mapping of every name that it does not have to itself, for :func:`~gradmix._moved.moved`.

    Special names are left out.
    """

    def __contains__(self, name: object) -> bool:
        return not str(name).startswith("__")

    def __missing__(self, name: str) -> str:
        return name


def register() -> None:
    """Put a stub that forwards and warns in the place of every former module."""
    package = __name__.rpartition(".")[0]
    for old, new in FORMER_MODULES.items():
        stub = ModuleType(f"{package}.{old}", f"Moved to :mod:`{package}.{new}`.")
        stub.__dict__["__getattr__"] = moved(stub.__name__, f"{package}.{new}", _SameNames(_RENAMED.get(old, {})))
        sys.modules[stub.__name__] = stub
        setattr(sys.modules[package], old, stub)
