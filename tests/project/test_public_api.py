"""The public interface is the one on record (public_api.json)."""

from __future__ import annotations

import json

from public_api import RECORD, interface


def test_public_names_and_signatures_are_those_on_record() -> None:
    assert interface() == json.loads(RECORD.read_text())


def test_the_record_would_notice_a_changed_default() -> None:
    found = interface()["gradmix"]
    assert "policy='uniform'" in found["select_pairs"] and "mix" in found["Pairs"]
