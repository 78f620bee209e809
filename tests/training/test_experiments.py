"""Specifications of experiments: what they ask for, how runs are shared, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gradmix
from gradmix.training.config import DataConfig, MixConfig, ReplayConfig, TrainConfig, from_dict
from gradmix.training.loop.trainer import resolve_config
from gradmix.training.runs.experiments import builtin_titles, content_hash, from_yaml, load, protocol

TEXT = """
title: A table
about: >-
  Two lines
  of it.
seeds: [3, 5]
base: {data: {benchmark: split-digits}, optim: {lr: 1e-2}, mix: {alpha: 0.5}, threads: 1}
arms:
  - {name: er, method: er}
  - {name: "threshold 0.1", method: gradmix-sample, mix: {threshold: 0.1}, optim: {lr: 0.02}}
vary: {replay.size: [2, 8]}
differences: [["threshold 0.1", er]]
reference:
  - {label: Mixup, metric: average_accuracy, value: 0.9, source: a paper, differs: the model, arm: er}
"""


def changed(**parts: str) -> str:
    """The specification with some of its keys' lines replaced, or left out where empty."""
    import yaml

    values = yaml.safe_load(TEXT)
    for key, text in parts.items():
        values.pop(key, None)
        if text:
            values[key] = yaml.safe_load(text)
    return str(yaml.safe_dump(values))


def test_what_is_asked_for() -> None:
    experiment = from_yaml(TEXT, "table")
    assert experiment.about == "Two lines of it." and experiment.source == "table"
    assert experiment.differences == (("threshold 0.1", "er"),)
    assert experiment.references[0].arm == "er" and experiment.references[0].value == 0.9
    runs = experiment.runs()
    assert [(r.seed, r.values["replay.size"], r.arm) for r in runs] == [
        (seed, size, arm) for seed in (3, 5) for size in (2, 8) for arm in ("er", "threshold 0.1")
    ]
    first, second = runs[:2]
    assert (first.config.optim.lr, second.config.optim.lr) == (0.01, 0.02)
    assert (first.config.mix.alpha, second.config.mix.alpha) == (0.5, 0.5), "an arm's section adds to the base's"
    assert (second.config.mix.threshold, second.config.mix.estimator) == (0.1, "feature")
    assert first.config.methods == ("er",) and first.config.seeds == (3,) and first.config.threads == 1
    assert first.config.optim.epochs == 10, "resolved"
    assert first.label == "er, replay.size 2"
    assert str(first.folder) == f"split-digits-er-{content_hash(first.config)}/seed-3"
    assert len({run.folder for run in runs}) == len(runs)
    common = protocol(runs)
    assert common["mix.alpha"] == 0.5 and not {"optim.lr", "replay.size", "mix.threshold", "threads"} & set(common)


def test_circumstances_are_taken_from_the_caller() -> None:
    run = from_yaml(TEXT, "table").runs(device="cpu", threads=3, data_dir=Path("there"))[0]
    assert (run.config.device, run.config.threads, run.config.data.data_dir) == ("cpu", 3, Path("there"))
    assert run.folder == from_yaml(TEXT, "table").runs()[0].folder


BASE = resolve_config(TrainConfig(), "gradmix-sample", 0)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (replace(BASE, seeds=(7,)), True),
        (replace(BASE, device="cuda:0", threads=5, checkpoint=0.0, output=Path("x")), True),
        (replace(BASE, data=replace(BASE.data, data_dir=Path("elsewhere"))), True),
        (resolve_config(TrainConfig(mix=MixConfig(estimator="feature", refresh=1)), "gradmix-sample", 0), True),
        (resolve_config(TrainConfig(replay=ReplayConfig(size=4)), "gradmix-sample", 0), True),
        (resolve_config(TrainConfig(replay=ReplayConfig(size=5)), "gradmix-sample", 0), False),
        (resolve_config(TrainConfig(), "gradmix-class", 0), False),
        (resolve_config(TrainConfig(data=DataConfig(class_order_seed=0)), "gradmix-sample", 0), False),
        (resolve_config(TrainConfig(mix=MixConfig(threshold=-0.0001)), "gradmix-sample", 0), False),
        (resolve_config(TrainConfig(mix=MixConfig(originals=True)), "gradmix-sample", 0), False),
    ],
    ids=["seed", "circumstances", "data dir", "said again", "protocol's", "size", "method", "order", "small", "flag"],
)
def test_runs_are_shared_if_the_same_is_learnt(other: TrainConfig, same: bool) -> None:
    assert (content_hash(other) == content_hash(BASE)) is same


def test_a_hash_stays_what_it_is() -> None:
    # Were it to change, no run made before would be found again. All that is not off is written out, so that other
    # defaults make no difference here.
    config = from_dict(
        {
            "methods": ["er"],
            "data": {"benchmark": "split-digits", "validation": 0.0, "normalise": False},
            "optim": {
                "model": "mlp", "lr": 0.02, "momentum": 0.9, "weight_decay": 0.0, "lr_milestones": [], "epochs": 10,
                "batch": 16, "augment": "none",
            },
            "replay": {"policy": "class", "size": 4, "batch": 16, "tau": 1.0, "stream": "dual"},
            "mix": {
                "alpha": 1.0, "originals": False, "policy": "uniform", "threshold": 0.0, "candidates": "batch",
                "class_samples": 32, "estimator": None, "reference": None,
            },
        }
    )  # fmt: skip
    assert content_hash(config) == "cc04f0c501cb"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"title": ""}, ["title", "a text"]),
        ({"arms": ""}, ["arms", "a list"]),
        ({"arms": "[]"}, ["arms", "not an empty one"]),
        ({"seeds": "[1, 1]"}, ["seeds", "twice"]),
        ({"seeds": "[true]"}, ["seeds", "integers"]),
        ({"colour": "red"}, ["'colour'", "title"]),
        ({"base": "{methods: [er]}"}, ["base", "'methods'", "data"]),
        ({"base": "{optim: {rl: 1}}"}, ["base.optim", "'rl'", "lr"]),
        ({"base": "{optim: 5}"}, ["base.optim", "5", "a mapping"]),
        ({"base": "{optim: {lr: fast}}"}, ["er, replay.size 2", "optim.lr", "'fast'", "number"]),
        ({"base": "{optim: {lr: -1}}"}, ["optim.lr", "above 0"]),
        ({"arms": "[{name: er, method: re}]"}, ["arms[0].method", "'re'", "finetune, er"]),
        ({"arms": "[{method: er}]"}, ["arms[0].name"]),
        ({"arms": "[{name: er, method: er}, {name: er, method: mixup}]"}, ["'er'", "twice"]),
        ({"arms": "[{name: er, method: er, lr: 1}]"}, ["arms[0]", "'lr'", "optim"]),
        ({"arms": "[{name: er, method: er, data: {benchmark: split-mnist}}]"}, ["arms[0].data.benchmark", "base.data"]),
        ({"arms": "[{name: er, method: er}, {name: b, method: er}]", "differences": ""}, ["'b, ", "same settings"]),
        ({"arms": "[{name: er, method: er, replay: {size: 3}}]", "differences": ""}, ["replay.size", "varied"]),
        ({"vary": "{size: [1]}"}, ["vary", "'size'", "replay.size"]),
        ({"vary": "{replay.size: [1, 1]}"}, ["vary.replay.size", "twice"]),
        ({"vary": "{replay.size: []}"}, ["vary.replay.size", "list"]),
        ({"vary": "{replay.size: [0]}"}, ["replay.size", "at least 1"]),
        ({"vary": "{replay.size: [1], mix.alpha: [1], mix.threshold: [0]}"}, ["vary", "one or two"]),
        ({"vary": "{data.benchmark: [split-mnist]}"}, ["data.benchmark", "cannot vary"]),
        ({"differences": "[[er, er]]"}, ["differences[0]", "two of the arms"]),
        ({"differences": "[[er, mixup]]"}, ["differences[0]", "mixup"]),
        ({"reference": "[{label: a, metric: accuracy, value: 0, source: b}]"}, ["reference[0].metric", "'accuracy'"]),
        ({"reference": "[{label: a, metric: forgetting, value: 70, source: b}]"}, ["reference[0].value", "70"]),
        ({"reference": "[{label: a, metric: forgetting, value: 0.7}]"}, ["reference[0].source"]),
    ],
    ids=str,
)
def test_refused(parts: dict[str, str], said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        from_yaml(changed(**parts), "table")
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "title: [", "5"])
def test_no_mapping(text: str) -> None:
    with pytest.raises(ValueError, match="mapping|YAML"):
        from_yaml(text, "table")


@pytest.mark.parametrize("name", ["runs", "", ".hidden"])
def test_a_name_that_is_no_folder(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        from_yaml(TEXT, name)


def test_files_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(TEXT)
    experiment = load("mine.yaml")
    assert (experiment.name, experiment.source) == ("mine", "mine.yaml")
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        load("nothing.yaml")
    with pytest.raises(FileNotFoundError, match="mine: no such experiment, expected one of .*digits"):
        load("mine")
    Path("bad.yaml").write_text("title: x\n")
    with pytest.raises(ValueError, match=r"^bad\.yaml: arms"):
        load("bad.yaml")
    Path("bad.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"^bad\.yaml: "):
        load("bad.yaml")


def test_narrowed() -> None:
    experiment = from_yaml(TEXT, "table")
    less = experiment.narrow(seeds=[9], arms=["threshold 0.1"])
    assert less.seeds == (9,) and [a.name for a in less.arms] == ["threshold 0.1"]
    assert less.differences == () and less.references == ()
    assert experiment.narrow() == experiment
    for arms in ([], ["ER"], ["er", "er"]):
        with pytest.raises(ValueError, match="arms"):
            experiment.narrow(arms=arms)
    with pytest.raises(ValueError, match="seeds"):
        experiment.narrow(seeds=[-1])


@pytest.mark.parametrize(
    ("others", "part"),
    [
        ({}, ""),
        ({"seeds": [5, 3], "arms": ["threshold 0.1", "er"]}, ""),
        ({"seeds": [9, 3]}, "seeds-3-9"),
        ({"seeds": [3, 5, 9], "arms": ["er"]}, "seeds-3-5-9-arms-er"),
        ({"arms": ["threshold 0.1"]}, r"arms-threshold_0\.1-[0-9a-f]{8}"),
        ({"seeds": list(range(100))}, r"seeds-0-1-2-[-\d]*-[0-9a-f]{8}"),
    ],
    ids=["nothing", "all, in another order", "seeds", "both", "no name of a folder", "many"],
)
def test_a_part_is_told_by_its_folder(others: dict[str, Any], part: str) -> None:
    folder = from_yaml(TEXT, "table").narrow(**others).folder
    assert re.fullmatch(f"table/{part}" if part else "table", folder.as_posix()) and len(folder.name) < 80


def test_parts_have_folders_of_their_own() -> None:
    names = ["a", "b", "A", "a-b", "a_b", "a b", "a/b", "../a", "ä", "a" * 300, "a" * 301]
    # The method is the same for all: what tells them apart is a setting.
    arms = ", ".join(
        f"{{name: {name!r}, method: gradmix-class, mix: {{threshold: 0.{k}1}}}}" for k, name in enumerate(names)
    )
    experiment = from_yaml(f"title: x\nbase: {{}}\narms: [{arms}]\n", "table")
    narrowed = [experiment.narrow(arms=chosen) for chosen in ([name] for name in names)]
    narrowed += [experiment.narrow(arms=["a", "b"]), narrowed[0].narrow(seeds=[1]), narrowed[0].narrow(seeds=[2])]
    folders = [part.folder for part in narrowed]
    assert len({folder.as_posix().lower() for folder in folders}) == len(folders)
    assert all(len(folder.parts) == 2 and folder.name.isascii() for folder in folders)


@pytest.mark.parametrize("name", builtin_titles())
def test_shipped_ones_can_be_run(name: str) -> None:
    experiment: Any = load(name)
    assert experiment.title and experiment.about and experiment.name == name
    assert len(experiment.runs()) == len(experiment.seeds) * len(experiment.points) * len(experiment.arms)
    assert all(line.strip() == line for line in (experiment.title, experiment.about))


def test_shipped_ones_are_the_files_of_the_package() -> None:
    folder = Path(gradmix.__file__).parent / "experiments"
    assert "digits" in builtin_titles()
    assert sorted(builtin_titles()) == sorted(path.stem for path in folder.glob("*.yaml"))
