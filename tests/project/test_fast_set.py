"""The list of fast tests names what there is, and ``-m fast`` selects it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from fast_set import FAST, NOT_FAST, is_fast, pytest_ignore_collect

HERE = Path(__file__).parents[1]


def test_every_name_exists() -> None:
    files = {file.stem: file for file in HERE.rglob("test_*.py")}
    assert files.keys() >= FAST
    for name in NOT_FAST:
        file, function = name.split("::")
        assert file in FAST, name
        defined = [node.name for node in ast.parse(files[file].read_text()).body if isinstance(node, ast.FunctionDef)]
        assert function in defined, name


def test_files_and_cases() -> None:
    assert is_fast("test_selection", "test_only_helpful_partners_are_chosen")
    assert not is_fast("test_selection", "test_any_rows")
    assert not is_fast("test_trainer", "test_a_run_is_complete")


@pytest.mark.parametrize(
    "expression, ignored", [("fast", True), ("fast and not gpu", None), ("slow", None), ("", None)]
)
def test_other_files_are_not_read_where_only_fast_tests_are_wanted(
    pytestconfig, monkeypatch, expression, ignored
) -> None:
    monkeypatch.setattr(pytestconfig.option, "markexpr", expression)
    assert pytest_ignore_collect(HERE / "test_trainer.py", pytestconfig) is ignored
    assert pytest_ignore_collect(HERE / "test_selection.py", pytestconfig) is None
    assert pytest_ignore_collect(HERE / "models.py", pytestconfig) is None
