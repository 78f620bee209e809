"""The configuration: YAML there and back, and what is refused."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

from gradmix import ReplayBuffer, select_pairs
from gradmix.cli.flags import field_docs
from gradmix.training.config import (
    DataConfig,
    MixConfig,
    OptimConfig,
    ReplayConfig,
    TrainConfig,
    check,
    from_dict,
    from_yaml,
    load_config,
    to_dict,
    to_yaml,
)
from gradmix.training.methods import find_method
from gradmix.training.models import build_model
from gradmix.training.runs import experiments
from gradmix.training.streams.benchmarks import make_stream

FULL = TrainConfig(
    methods=("gradmix-sample", "er"),
    seeds=(7, 0),
    data=DataConfig("split-cifar100", Path("some where/data"), class_order_seed=3, validation=0.1),
    optim=OptimConfig("resnet18", 0.1, 0.9, 2e-4, (0.5, 0.75), 20, 128, "crop-flip"),
    replay=ReplayConfig("balanced", 2000, 128, 0.5),
    mix=MixConfig(0.2, True, "mixed", "best", -0.25, 5, "balanced", 8),
    device="cuda:0",
    threads=2,
    output=Path("out"),
)


@pytest.mark.parametrize("config", [TrainConfig(), FULL], ids=["defaults", "everything set"])
def test_yaml_there_and_back(config: TrainConfig) -> None:
    assert from_yaml(to_yaml(config)) == config
    assert from_dict(to_dict(config)) == config


def test_yaml_writes_every_field() -> None:
    def count(value: object) -> int:
        return sum(count(getattr(value, f.name)) for f in fields(value)) if is_dataclass(value) else 1  # type: ignore[arg-type]

    def leaves(value: object) -> int:
        return sum(map(leaves, value.values())) if isinstance(value, dict) else 1

    assert leaves(to_dict(FULL)) == count(FULL)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("", TrainConfig()),
        ("methods: [er]\nseeds: [4]", TrainConfig(methods=("er",), seeds=(4,))),
        ("optim: {lr: 1e-3}", TrainConfig(optim=OptimConfig(lr=1e-3))),
        ("optim: {lr: 1}", TrainConfig(optim=OptimConfig(lr=1.0))),
        ("optim: {lr_milestones: []}", TrainConfig(optim=OptimConfig(lr_milestones=()))),
        ("mix: {refresh: null, threshold: -1}", TrainConfig(mix=MixConfig(threshold=-1.0))),
    ],
    ids=["empty", "lists", "exponent without a dot", "integer for a number", "empty list", "null"],
)
def test_partial_yaml(text: str, changed: TrainConfig) -> None:
    assert from_yaml(text) == changed


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("epochs: 3", ["epochs", "unknown key", "optim"]),
        ("mix: {aplha: 1}", ["mix.aplha", "unknown key", "alpha"]),
        ("mix: 3", ["mix", "3 (int)", "mapping"]),
        ("[1]", ["[1] (list)", "mapping"]),
        ("mix: {alpha: big}", ["mix.alpha", "'big' (str)", "number"]),
        ("mix: {alpha: true}", ["mix.alpha", "True (bool)", "number"]),
        ("mix: {alpha: .nan}", ["mix.alpha", "nan", "finite"]),
        ("mix: {originals: 1}", ["mix.originals", "1 (int)", "true or false"]),
        ("optim: {epochs: 2.5}", ["optim.epochs", "2.5 (float)", "integer"]),
        ("optim: {epochs: true}", ["optim.epochs", "True (bool)", "integer"]),
        ("optim: {epochs: 0}", ["optim.epochs", "0 (int)", "at least 1"]),
        ("optim: {lr: -1}", ["optim.lr", "-1.0", "above 0"]),
        ("optim: {lr_milestones: [0.7, 0.5]}", ["optim.lr_milestones", "0.7", "increasing"]),
        ("data: {benchmark: mnist}", ["data.benchmark", "'mnist'", "split-mnist"]),
        ("data: {benchmark: [split-mnist]}", ["data.benchmark", "list", "split-mnist"]),
        ("data: {data_dir: 3}", ["data.data_dir", "3 (int)", "path"]),
        ("data: {data_dir: null}", ["data.data_dir", "null", "path"]),
        ("methods: er", ["methods", "'er' (str)", "list"]),
        ("methods: [er, erx]", ["methods[1]", "'erx'", "gradmix-sample"]),
        ("methods: [er, er]", ["methods", "twice"]),
        ("seeds: []", ["seeds", "at least one"]),
        ("seeds: [-1]", ["seeds", "-1", "at least 0"]),
        ("a: [", ["YAML"]),
        ("!!python/object:os.system {}", ["YAML"]),
    ],
)
def test_refusals_name_key_value_and_expectation(text: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        from_yaml(text)
    for part in parts:
        assert part in str(caught.value)


def test_load_config(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(FULL), encoding="utf-8")
    assert load_config(path) == FULL
    path.write_text("mix: {alpha: 0}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"c\.yaml: mix\.alpha"):
        load_config(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"c\.yaml"):
        load_config(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_config(tmp_path / "absent.yaml")


def test_replayed_candidates_need_rows_told_apart() -> None:
    with pytest.raises(ValueError, match=r"mix\.candidates: got 'replayed' with replay\.stream 'shuffled'"):
        from_yaml("{mix: {candidates: replayed}, replay: {stream: shuffled}}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_check_refuses_what_yaml_did_not_bring(value: float) -> None:
    with pytest.raises(ValueError, match=r"replay\.tau"):
        check(replace(TrainConfig(), replay=ReplayConfig(tau=value)))


@pytest.mark.parametrize("cls", [TrainConfig, DataConfig, OptimConfig, ReplayConfig, MixConfig])
def test_every_setting_is_described(cls: type) -> None:
    sections = {"data", "optim", "replay", "mix"} if cls is TrainConfig else set()
    assert {f.name for f in fields(cls)} - sections == set(field_docs(cls))


# A wrong name, where it is looked up, and the known one that is nearest.
MISSPELT = {
    "key": (lambda: from_dict({"mix": {"aplha": 1.0}}), "alpha"),
    "key of a section": (lambda: from_dict({"epochs": 3}), "optim.epochs"),
    "choice": (lambda: from_dict({"replay": {"policy": "reservior"}}), "reservoir"),
    "method": (lambda: from_dict({"methods": ["gradmix-clas"]}), "gradmix-class"),
    "method alone": (lambda: find_method("manifold_mixup"), "manifold-mixup"),
    "benchmark": (lambda: from_dict({"data": {"benchmark": "split-cifar11"}}), "split-cifar10"),
    "benchmark alone": (lambda: make_stream("split-digit"), "split-digits"),
    "model": (lambda: from_dict({"optim": {"model": "resnet-20"}}), "resnet20"),
    "model alone": (lambda: build_model("vit_tiny", (3, 8, 8), 2), "vit-tiny"),
    "experiment": (lambda: experiments.load("digit"), "digits"),
    "key of an experiment": (lambda: experiments.from_yaml("title: t\nseed: [0]", "t"), "seeds"),
    "varied setting": (
        lambda: experiments.from_yaml("title: t\narms: [{name: a, method: er}]\nvary: {mix.treshold: [0]}", "t"),
        "mix.threshold",
    ),
    "policy": (lambda: ReplayBuffer(2, policy="balance"), "balanced"),
    "estimator": (lambda: select_pairs(*SELECTION, estimator="sketched"), "sketch"),
    "backend": (lambda: select_pairs(*SELECTION, backend="tritn"), "triton"),
}
SELECTION = torch.nn.Linear(2, 2), None, (torch.rand(2, 2), torch.tensor([0, 1]))


@pytest.mark.parametrize("case", MISSPELT)
def test_an_unknown_name_comes_with_the_nearest_known_one(case: str) -> None:
    look_up, nearest = MISSPELT[case]
    with pytest.raises((ValueError, FileNotFoundError), match=rf"; did you mean '{nearest}'\?$"):
        look_up()


def test_a_name_that_is_far_from_all_comes_without() -> None:
    with pytest.raises(ValueError, match=r"unknown key, expected one of [^;?]*$"):
        from_dict({"xyzzy": 1})
