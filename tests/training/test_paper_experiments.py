"""The experiments of the paper's data sets run through, on generated images in the layouts of the real ones."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from generated_images import WRITERS
from small_pictures import draw_small_pictures

from gradmix import cli
from gradmix.training.config import parse_yaml
from gradmix.training.reports.arms import from_results
from gradmix.training.runs.experiments import load
from gradmix.training.runs.settings import settings_of

TRAIN, TEST = 6, 2
"""Images of each class."""
FEW_CLASSES: dict[str, dict[str, Any]] = {"split-tiny-imagenet": {"classes": 4}, "split-imagenet": {"classes": 4}}
SMALL: dict[str, dict[str, Any]] = {
    "data": {"tasks": 2, "classes_per_task": 2},
    "optim": {"epochs": 1, "batch": 8},
    "replay": {"batch": 8, "size": 4},
}
SMALL_NETWORK: dict[str, dict[str, Any]] = {"optim": {"model": "resnet8"}}
SMALL_IMAGES: dict[str, dict[str, Any]] = {**SMALL_NETWORK, "data": {"image_size": 16, "workers": 0}}
SHORTENED: dict[str, dict[str, dict[str, Any]]] = {
    "fashion-mnist": {},
    "cifar10": SMALL_NETWORK,
    "cifar100": SMALL_NETWORK,
    "tiny-imagenet": SMALL_IMAGES,
    "imagenet": SMALL_IMAGES,
}
"""By experiment: the settings that make its runs small, besides those of SMALL."""


def shorten(name: str) -> dict[str, Any]:
    """The experiment's own file as a mapping, with one seed and the settings that make it small."""
    values: dict[str, Any] = parse_yaml((resources.files("gradmix") / "experiments" / f"{name}.yaml").read_text())
    for settings in (SMALL, SHORTENED[name]):
        for section, changes in settings.items():
            values["base"][section] = {**values["base"].get(section, {}), **changes}
    return {**values, "seeds": [0], "base": {**values["base"], "threads": 1}}


@pytest.mark.parametrize("name", SHORTENED)
def test_an_experiment_of_the_paper_runs_through(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    for package in ("kornia",) if name == "fashion-mnist" else ("PIL",):
        pytest.importorskip(package)
    draw_small_pictures(monkeypatch)
    experiment = load(name)
    benchmark = experiment.base["data"]["benchmark"]
    WRITERS[benchmark](tmp_path / "data", TRAIN, TEST, **FEW_CLASSES.get(benchmark, {}))
    specification, output = tmp_path / f"{name}.yaml", tmp_path / "out"
    specification.write_text(yaml.safe_dump(shorten(name)))
    folders = ["--data-dir", str(tmp_path / "data"), "--output", str(output)]
    assert cli.main(["experiment", str(specification), *folders]) == 0

    values = from_results(output / name / "results.json")
    arms = [arm.name for arm in experiment.arms]
    assert [run["arm"] for run in values["runs"]] == arms and values["missing"] == []
    for run in values["runs"]:
        assert all(math.isfinite(run["metrics"][key]) for key in ("average_accuracy", "final_accuracy", "forgetting"))
        assert run["timing"]["steps"] == 2 * math.ceil(2 * TRAIN / 8)
        assert (run["timing"]["seconds_selection"] > 0) == ("gradmix" in run["method"]), "pairs are selected"
    report = (output / name / "report.md").read_text(encoding="utf-8")
    assert experiment.title in report and all(f"| {arm} |" in report.replace("`", "") for arm in arms)
    assert (output / name / "report.html").stat().st_size > 5_000


@pytest.mark.parametrize("name", SHORTENED)
def test_it_is_shortened_only_by_what_makes_it_small(name: str, tmp_path: Path) -> None:
    import yaml

    specification = tmp_path / f"{name}.yaml"
    specification.write_text(yaml.safe_dump(shorten(name)))
    changed = {f"{part}.{key}" for parts in (SMALL, SHORTENED[name]) for part, keys in parts.items() for key in keys}
    for run, small in zip(load(name).narrow(seeds=[0]).runs(), load(specification).runs(), strict=True):
        ours, theirs = settings_of(run.config), settings_of(small.config)
        assert {key for key in ours if ours[key] != theirs[key]} <= changed
