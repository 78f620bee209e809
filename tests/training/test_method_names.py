"""Names of methods, their compositions, and runs that were saved under a former name."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_runs import make_result

from gradmix import cli
from gradmix.replay.buffer import BufferSamples, ReplayBuffer
from gradmix.training.config import (
    DataConfig,
    MixConfig,
    OptimConfig,
    ReplayConfig,
    TrainConfig,
    from_dict,
    from_yaml,
    to_yaml,
)
from gradmix.training.loop.clock import Clock
from gradmix.training.loop.trainer import resolve_config, train_one
from gradmix.training.method_names import (
    COMPOSITIONS,
    PRESETS,
    Axes,
    FormerNameWarning,
    current_name,
    stable_name,
)
from gradmix.training.methods import (
    METHODS,
    Context,
    DarkReplay,
    GradMixClass,
    StepSamples,
    TrivialAugment,
    composition,
    find_method,
)
from gradmix.training.models import build_model
from gradmix.training.reports import arms as of_arms
from gradmix.training.reports import report
from gradmix.training.reports.saving import save_run
from gradmix.training.runs import experiments
from gradmix.training.runs.experiments import Run, content_hash
from gradmix.training.runs.results import load_run
from gradmix.training.runs.running import checkpoint_of, state_of
from gradmix.training.runs.settings import identity

FORMER = {
    "gradmix": "gradmix-class",
    "der++-gradmix": "der++-gradmix-class",
    "trivialaugment-gradmix": "trivialaugment-gradmix-class",
}
TINY = TrainConfig(
    data=DataConfig("split-digits", tasks=2, samples_per_class=40),
    optim=OptimConfig(epochs=1, batch=16, lr=0.05, model="resnet8"),
    replay=ReplayConfig(size=6, batch=8, stream="dual"),
    device="cpu",
    threads=1,
)


# --------------------------------------------------------------------------------------------------------------- names


def test_listed_methods_keep_their_names() -> None:
    assert list(PRESETS) == [
        "finetune", "er", "a-gem", "der++", "autoaugment", "randaugment", "trivialaugment", "mixup", "manifold-mixup",
        "cutmix", "remix", "balanced-mixup", "gradmix-class", "gradmix-sample", "der++-mixup", "der++-gradmix-class",
        "der++-gradmix-sample", "trivialaugment-mixup", "trivialaugment-gradmix-class",
        "trivialaugment-gradmix-sample",
    ]  # fmt: skip
    assert list(METHODS) == list(PRESETS)


def test_a_name_is_derived_from_the_axes_and_leads_back_to_them() -> None:
    assert Axes("der++", "trivialaugment", "cutmix").name == "der++-trivialaugment-cutmix"
    assert all(axes.name == name for name, axes in COMPOSITIONS.items())
    assert len(COMPOSITIONS) == 2 * 4 * 8 + 2, "er and DER++ with everything; A-GEM and finetuning alone"


def test_every_axis_has_its_classes() -> None:
    axes = [set(values) for values in zip(*COMPOSITIONS.values(), strict=True)]
    assert axes[0] == set(composition.REPLAY) | set(composition.DISTILLATION)
    assert axes[1] == set(composition.AUGMENTATION) | {"none"}
    assert axes[2] == set(composition.MIXING) | {"none"}


def test_the_layers_of_a_composition() -> None:
    method = find_method("der++-trivialaugment-gradmix-class")
    assert isinstance(method, composition.Composition)
    assert (method.core, method.wrappers) == (GradMixClass, (TrivialAugment, DarkReplay))
    assert method.needs.second_batch and method.needs.extras and method.needs.whole_step and method.needs.replayed
    assert not METHODS["finetune"].needs.replayed and METHODS["manifold-mixup"].needs.one_process
    config = method.resolve_config(TrainConfig())
    assert (config.replay.distillation, config.mix.estimator) == (0.5, "feature"), "each layer's own"


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_makes_a_step(name: str) -> None:
    pytest.importorskip("kornia")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(12, 1, 8, 8, generator=generator), torch.arange(12) % 3
    buffer = ReplayBuffer(4)
    context = Context(
        model=build_model("resnet8", (1, 8, 8), 3, seed=0),
        buffer=buffer,
        num_classes=3,
        mix=MixConfig(),
        generator=generator,
        clock=Clock(torch.device("cpu")),
        counts=torch.tensor([4, 4, 4]),
        draw_replayed=lambda: BufferSamples(buffer.x[:4], buffer.y[:4], {k: v[:4] for k, v in buffer.extras.items()}),
    )
    method = find_method(name)(context)
    buffer.add(x, y, **method.extras(x, y))
    loss = method.backward(StepSamples(x, y, torch.full((12,), 1 / 12), candidates=(x.flip(0), y.flip(0))))
    gradients = [p.grad for p in context.model.parameters() if p.grad is not None]
    assert loss.isfinite() and gradients and all(g.isfinite().all() for g in gradients)


def test_an_unknown_name_is_refused_with_all_that_there_are() -> None:
    for refused in (
        lambda: find_method("gem"),
        lambda: train_one(TINY, "gem", 0),
        lambda: from_dict({"methods": ["er", "gem"]}),
        lambda: experiments.from_yaml("title: t\narms: [{name: a, method: gem}]", "t"),
    ):
        with pytest.raises(ValueError, match=r"method.*got 'gem'.*expected one of finetune, er") as caught:
            refused()
        assert all(name in str(caught.value) for name in PRESETS)
        assert "or a composition such as der++-trivialaugment-mixup" in str(caught.value)


# -------------------------------------------------------------------------------------------------------- former names


@pytest.mark.parametrize(("former", "current"), FORMER.items())
def test_a_former_name_warns_and_says_which_one_it_is(former: str, current: str) -> None:
    said = re.escape(f"method '{former}' is now called '{current}': pairs are judged by class")
    with pytest.warns(FormerNameWarning, match=said):
        assert find_method(former) is METHODS[current]
    with pytest.warns(FormerNameWarning, match=said):
        assert TrainConfig(methods=("er", former)).methods == ("er", current)
    with pytest.warns(FormerNameWarning, match=said):
        assert from_dict({"methods": [former]}).methods == (current,)
    with pytest.warns(FormerNameWarning, match=said):
        assert resolve_config(TINY, former, 0).methods == (current,)
    with pytest.warns(FormerNameWarning, match=said):
        read = experiments.from_yaml(f"title: t\nbase: {{threads: 1}}\narms: [{{name: a, method: {former}}}]", "t")
    assert read.arms[0].method == current


def test_only_the_end_of_a_name_is_a_former_name() -> None:
    assert [current_name(name) for name in ("er", "gradmix-sample", "gradmix-class", "cutmix-gradmix")] == [
        "er", "gradmix-sample", "gradmix-class", "cutmix-gradmix",
    ]  # fmt: skip
    assert {stable_name(name) for name in FORMER.values()} == set(FORMER)
    assert stable_name("gradmix-sample") == "gradmix-sample"


# ------------------------------------------------------------------------------------------------- runs of before


HASHES = {
    "gradmix-class": "7aa57d1c4276",
    "der++-gradmix-class": "3d0d54d421f9",
    "trivialaugment-gradmix-class": "46f48ea6c59c",
    "gradmix-sample": "492a2dd8f11b",
}
"""Hashes of :data:`TINY` as version 0.2 computed them, under the former names."""

DEFAULTS_OF_BEFORE = from_yaml("mix: {estimator: null, reference: null}", saved=True).mix
"""What a configuration saved by version 0.2 says of settings that were left to the method."""


@pytest.mark.parametrize(
    ("name", "now", "before"),
    [
        ("gradmix-class", ("feature", None), ("mixed", None)),
        ("gradmix-sample", ("feature", "replayed"), ("feature", None)),
        ("er", (None, None), (None, None)),
    ],
)
def test_a_saved_run_goes_on_with_the_defaults_it_was_started_with(name: str, now: Any, before: Any) -> None:
    for mix, expected in ((MixConfig(), now), (DEFAULTS_OF_BEFORE, before)):
        saved = from_yaml(to_yaml(replace(TINY, mix=mix)), saved=True)
        found = resolve_config(saved, name, 0)
        assert (found.mix.estimator, found.mix.reference) == expected
        assert resolve_config(found, name, 0) == found, "what is resolved stays"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{mix: {refresh: 1}, replay: {stream: dual}}", "replayed"),
        ("mix: {refresh: 1}", None),  # of digits
        ("data: {online: true}", "replayed"),
        ("mix: {refresh: 5}", None),
        ("mix: {refresh: 0}", None),
        ("replay: {stream: shuffled}", None),
        ("mix: {reference: buffer}", "buffer"),
        ("{mix: {reference: replayed, refresh: 5}, replay: {stream: shuffled}}", "replayed"),
    ],
)
def test_the_reference_is_that_of_the_replayed_samples_where_every_step_has_some(text: str, expected: Any) -> None:
    assert resolve_config(from_yaml(text), "gradmix-sample", 0).mix.reference == expected
    by_class = None if expected == "replayed" and "reference" not in text else expected
    assert resolve_config(from_yaml(text), "gradmix-class", 0).mix.reference == by_class


@pytest.mark.parametrize(("name", "expected"), HASHES.items())
def test_hashes_and_folders_are_those_of_before(name: str, expected: str) -> None:
    config = resolve_config(replace(TINY, mix=DEFAULTS_OF_BEFORE), name, 3)
    former = {current: former for former, current in FORMER.items()}.get(name, name)
    assert content_hash(config) == expected
    assert Run("arm", {}, config).folder == Path(f"split-digits-{former}-{expected}/seed-3")
    assert identity(config)["method"] == former, "which a checkpoint is compared by"


def as_before(folder: Path) -> None:
    """Put the former names into a saved run, as versions before the new names wrote it."""
    for name in ("config.yaml", "metrics.json"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "gradmix-class" in text
        (folder / name).write_text(text.replace("gradmix-class", "gradmix"), encoding="utf-8")


def test_a_saved_run_of_before_is_read_without_a_warning(tmp_path: Path) -> None:
    save_run(make_result("gradmix-class"), tmp_path / "run", pictures=False)
    expected = load_run(tmp_path / "run")
    as_before(tmp_path / "run")
    read = load_run(tmp_path / "run")
    assert (read.method, read.config.methods) == ("gradmix-class", ("gradmix-class",))
    assert read.config == expected.config
    assert from_yaml(to_yaml(read.config).replace("gradmix-class", "gradmix"), saved=True) == read.config


def test_an_experiment_of_before_is_found_and_reported(tmp_path: Path) -> None:
    text = "title: t\nseeds: [0, 1]\nbase: {data: {benchmark: split-digits}}\narms:\n"
    text += "  - {name: er, method: er}\n  - {name: gradmix, method: gradmix-class}\ndifferences: [[gradmix, er]]\n"
    experiment = experiments.from_yaml(text, "t")
    for run in experiment.runs():
        folder = tmp_path / run.folder
        save_run(replace(make_result(run.method, run.seed), config=run.config), folder, pictures=False)
        if run.arm == "gradmix":
            assert folder.parent.name.startswith("split-digits-gradmix-") and "class" not in folder.parent.name
            as_before(folder)
        assert state_of(run, tmp_path) == "complete"
        assert checkpoint_of(run, tmp_path).name == f"{folder.parent.name}-seed-{run.seed}.pt"
    values = of_arms.collect(experiment, experiment.runs(), tmp_path)
    assert not values["missing"]
    assert [entry["method"] for entry in values["runs"]] == ["er", "gradmix-class"] * 2

    saved = report.write(values, tmp_path / "report") / "results.json"
    report.write(of_arms.from_results(saved), saved.parent)
    text = saved.read_text(encoding="utf-8")
    saved.write_text(text.replace('"gradmix-class"', '"gradmix"'), encoding="utf-8")
    again = of_arms.from_results(saved)
    assert [arm["method"] for arm in again["arms"]] == ["er", "gradmix-class"]
    report.write(again, saved.parent)
    assert saved.read_text(encoding="utf-8") == text


# ------------------------------------------------------------------------------------------------------- command line


FEW = ("--seeds", "0", "1", "--epochs", "1", "--tasks", "2", "--samples-per-class", "20", "--threads", "1")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gradmix.training.reports.figures.draw", lambda *_: None)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_the_command_line_says_it_once(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["train", "--methods", "gradmix", *FEW, "--output", "out"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "is now called" in line]
    assert said == [
        "gradmix: method 'gradmix' is now called 'gradmix-class': pairs are judged by class, as in the paper; by "
        "sample it is 'gradmix-sample'"
    ]
    assert load_run("out/gradmix-class/seed-0").method == "gradmix-class"


@pytest.mark.usefixtures("here")
def test_a_folder_of_before_is_gone_on_with(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["train", "--methods", "gradmix-class", *FEW, "--output", "whole"]) == 0
    stopping = [0]

    def stop(*_: object) -> None:
        stopping[0] += 1
        if stopping[0] == 5:
            raise KeyboardInterrupt

    from gradmix.cli.progress import Interruption

    # The second run is interrupted in its fifth step, when the first has been saved.
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "check", lambda *_: stop() if Path("out/gradmix-class/seed-0").exists() else None)
        assert cli.main(["train", "--methods", "gradmix-class", *FEW, "--output", "out"]) == 130
    Path("out/gradmix-class").rename("out/gradmix")
    as_before(Path("out/gradmix/seed-0"))
    config = Path("out/config.yaml")
    config.write_text(config.read_text().replace("gradmix-class", "gradmix"))
    checkpoint = Path("out/.checkpoints/gradmix-class-seed-1.pt")
    checkpoint.rename(checkpoint.with_name("gradmix-seed-1.pt"))
    capsys.readouterr()
    assert cli.main(["train", "--resume", "out"]) == 0
    assert "is now called" not in capsys.readouterr().err
    assert sorted(path.name for path in Path("out").iterdir() if path.is_dir()) == ["gradmix"]
    for seed in (0, 1):
        first, second = load_run(f"whole/gradmix-class/seed-{seed}"), load_run(f"out/gradmix/seed-{seed}")
        assert (second.status, second.method) == ("complete", "gradmix-class")
        assert (first.accuracy == second.accuracy).all() and first.mixed_share == second.mixed_share
