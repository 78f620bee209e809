"""Stubs at old import paths (gradmix/_moved.py)."""

from __future__ import annotations

import pytest

from gradmix._moved import moved


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
