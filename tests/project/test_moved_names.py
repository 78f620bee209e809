"""Stubs at old import paths (gradmix/_moved.py)."""

from __future__ import annotations

import importlib

import pytest

from gradmix._moved import moved
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


def test_an_import_statement_finds_a_former_module() -> None:
    with pytest.warns(DeprecationWarning, match=r"gradmix\.training\.trainer\.train_one has moved to"):
        from gradmix.training.trainer import train_one
    from gradmix.training import trainer
    from gradmix.training.loop.trainer import resolved_config
    from gradmix.training.loop.trainer import train_one as now

    assert train_one is now
    with pytest.warns(DeprecationWarning, match=r"trainer\.settled has moved to .*trainer\.resolved_config"):
        assert trainer.settled is resolved_config
    assert not hasattr(trainer, "__file__")


def test_streams_serves_its_public_names_without_a_warning() -> None:
    from gradmix.training.streams import class_incremental
    from gradmix.training.streams.stream import class_incremental as now

    assert class_incremental is now
