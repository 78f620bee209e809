"""Stubs at old import paths (gradmix/_moved.py)."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from gradmix._moved import alias_argument, alias_attribute, moved
from gradmix.training._former_modules import FORMER_MODULES


def test_an_old_name_is_served_with_a_warning_that_says_where_it_is_now() -> None:
    find = moved(
        "gradmix.old", "gradmix.selection", {"choose": "select_pairs", "Buffer": "gradmix.replay.buffer:ReplayBuffer"}
    )
    import gradmix

    with pytest.warns(DeprecationWarning, match=r"gradmix\.old\.choose has moved to gradmix\.selection\.select_pairs"):
        assert find("choose") is gradmix.select_pairs
    with pytest.warns(DeprecationWarning, match=r"has moved to gradmix\.replay\.buffer\.ReplayBuffer"):
        assert find("Buffer") is gradmix.ReplayBuffer


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'gradmix\.old' has no attribute 'nothing'"):
        moved("gradmix.old", "gradmix.selection", {})("nothing")


@pytest.mark.parametrize(("old", "new"), FORMER_MODULES.items(), ids=list(FORMER_MODULES))
def test_former_modules_of_training_forward_to_their_rooms(old: str, new: str) -> None:
    stub = importlib.import_module(f"gradmix.training.{old}")
    module = importlib.import_module(f"gradmix.training.{new}")
    name = next(name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    with pytest.warns(DeprecationWarning, match=rf"gradmix\.training\.{old}\.{name} has moved to {module.__name__}"):
        assert getattr(stub, name) is getattr(module, name)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("streams", "blurred", "blur_boundaries"),
        ("streams", "concatenated", "concatenate"),
        ("loop.trainer", "resolved_config", "resolve_config"),
        ("metrics", "known_mean", "runs.metrics:mean_of_known"),
        ("metrics", "seen_accuracy", "runs.metrics:accuracy_on_seen"),
    ],
)
def test_former_names_of_functions_of_training(module: str, old: str, new: str) -> None:
    home, _, name = new.rpartition(":")
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} has moved to .*\.{name}; the old path is removed"):
        found = getattr(importlib.import_module(f"gradmix.training.{module}"), old)
    assert found is getattr(importlib.import_module(f"gradmix.training.{home or module}"), name)


def test_an_import_statement_finds_a_former_module() -> None:
    with pytest.warns(DeprecationWarning, match=r"gradmix\.training\.trainer\.train_one has moved to"):
        from gradmix.training.trainer import train_one
    from gradmix.training import trainer
    from gradmix.training.loop.evaluation import evaluate
    from gradmix.training.loop.trainer import train_one as now

    assert train_one is now
    with pytest.warns(DeprecationWarning, match=r"trainer\.evaluate has moved to .*evaluation\.evaluate"):
        assert trainer.evaluate is evaluate
    assert not hasattr(trainer, "__file__")


def test_streams_serves_its_public_names_without_a_warning() -> None:
    from gradmix.training.streams import class_incremental
    from gradmix.training.streams.stream import class_incremental as now

    assert class_incremental is now


class Named:
    """A class whose method, attribute and argument have new names."""

    def __init__(self, new_argument: int = 0) -> None:
        self.new_attribute = new_argument

    def new_method(self, value: int) -> int:
        return self.new_attribute + value

    old_attribute = alias_attribute("Named", "old_attribute", "new_attribute")
    old_method = alias_attribute("Named", "old_method", "new_method")
    __init__ = alias_argument("Named", "old_argument", "new_argument")(__init__)  # type: ignore[assignment]


def test_an_old_attribute_method_and_argument_are_served_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"Named\(old_argument=\) is now Named\(new_argument=\)") as seen:
        named = Named(old_argument=2)  # type: ignore[call-arg]
    assert seen[0].filename == __file__
    with pytest.warns(
        DeprecationWarning, match=r"Named\.old_attribute is now Named\.new_attribute; .* removed"
    ) as seen:
        assert named.old_attribute == 2
    assert seen[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"Named\.old_method is now Named\.new_method"):
        assert named.old_method(3) == 5
    assert Named(4).new_attribute == Named(new_argument=4).new_attribute == 4
    with pytest.raises(TypeError, match="got old_argument and new_argument, expected new_argument alone"):
        Named(new_argument=1, old_argument=2)  # type: ignore[call-arg]


def test_former_names_of_samples_are_served() -> None:
    import gradmix
    import gradmix.gradients
    import gradmix.replay.buffer

    with pytest.warns(DeprecationWarning, match="CoupledSamplesError"):
        assert gradmix.gradients.CoupledRowsError is gradmix.gradients.CoupledSamplesError
    with pytest.warns(DeprecationWarning, match="BufferSamples"):
        assert gradmix.replay.buffer.BufferRows is gradmix.replay.buffer.BufferSamples
    with pytest.warns(DeprecationWarning, match="mixtures_per_class_pair"):
        settings = gradmix.SketchEstimator(rows_per_class=3)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="mixtures_per_class_pair"):
        assert settings.rows_per_class == settings.mixtures_per_class_pair == 3
    assert dataclasses.replace(settings, rank=4) == gradmix.SketchEstimator(rank=4, mixtures_per_class_pair=3)
    buffer = gradmix.ReplayBuffer(2)
    buffer.add(torch.rand(3, 2), torch.tensor([0, 0, 1]))
    with pytest.warns(DeprecationWarning, match=r"ReplayBuffer\.sample_with_extras"):
        assert len(buffer.sample_rows(2).y) == 2
    pairs = gradmix.select_pairs(torch.nn.Linear(2, 2), buffer, (torch.rand(3, 2), torch.tensor([0, 1, 1])))
    with pytest.warns(DeprecationWarning, match=r"Pairs\.by_pair"):
        assert torch.equal(pairs.by_row()[0], pairs.by_pair()[0])
    with gradmix.HeadCapture(torch.nn.Linear(2, 2), example=torch.rand(3, 2)) as capture:
        capture._model(torch.rand(3, 2))
    with pytest.warns(DeprecationWarning, match=r"HeadCapture\.read_output"):
        assert capture.checked().logits.shape == (3, 2)


def test_former_names_of_samples_in_training_are_served(capsys: pytest.CaptureFixture[str]) -> None:
    from gradmix.cli.flags import parse_train
    from gradmix.cli.former_names import print_former_names
    from gradmix.training import methods
    from gradmix.training.config import DataConfig, TrainConfig, from_dict, to_dict
    from gradmix.training.method_names import FormerNameWarning
    from gradmix.training.runs import experiments
    from gradmix.training.runs.settings import identity
    from gradmix.training.streams import class_incremental

    with pytest.warns(DeprecationWarning, match=r"StepSamples"):
        assert methods.StepRows is methods.StepSamples
    with pytest.warns(DeprecationWarning, match=r"DataConfig\(samples_per_class=\)"):
        data = DataConfig(rows_per_class=3)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match=r"DataConfig\.samples_per_class"):
        assert data.rows_per_class == data.samples_per_class == 3
    with pytest.warns(DeprecationWarning, match=r"class_incremental\(samples_per_class=\)"):
        stream = class_incremental(*[(torch.rand(8, 2), torch.arange(8) % 2)] * 2, rows_per_class=1)  # type: ignore[call-arg]
    assert len(stream.tasks[0].train) == 2
    config = TrainConfig(data=data)
    saved = {"data": {"rows_per_class": 3}}
    assert from_dict(saved, saved=True) == config and to_dict(config)["data"]["samples_per_class"] == 3
    with pytest.warns(FormerNameWarning, match="rows_per_class is now called samples_per_class"):
        assert from_dict(saved) == config
    yaml = "title: t\nbase: {data: {rows_per_class: 3}}\narms: [{name: a, method: er}]"
    with pytest.warns(FormerNameWarning, match="rows_per_class is now called samples_per_class"):
        experiment = experiments.from_yaml(yaml, "t")
    assert experiment == experiments.from_yaml(yaml.replace("rows_", "samples_"), "t")
    assert list(identity(config)["data"])[5] == "rows_per_class", "by which checkpoints and folders of runs are found"
    for flags in (["--rows-per-class", "3"], ["--rows-per-class=3"]):
        with print_former_names():
            assert parse_train(flags) == config
        assert capsys.readouterr().err == "gradmix: --rows-per-class is now called --samples-per-class\n"
