"""The wordings of docs/style.md, rules 2 and 3: none to avoid in the packages, without exceptions."""

from __future__ import annotations

from pathlib import Path

import english
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["gradmix", "kernels"])
def test_nothing_is_to_be_written_otherwise(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, "the tests measure the package's source beside them"
    found = []
    for file in files:
        source = file.read_text(encoding="utf-8")
        found += [
            f"{file.relative_to(ROOT)}: {line}" for line in (*english.findings(source), *english.participles(source))
        ]
    assert not found, "\n" + "\n".join(found)


def test_wordings_are_found_in_docstrings_comments_and_names() -> None:
    source = '"""What came."""\ndef sent(x):\n    """Return what the host was told."""\n    y = "nobody"  # maybe\n'
    assert english.findings(source) == [
        "'What came': write the value given",
        "'told': write is given, states",
        "'maybe': write possibly",
        "'What came.': begin with the noun or the imperative",
    ]
    assert english.participles(source) == ["def sent: a verb, or what it returns"]
    assert english.findings('def send(x):\n    """Copy to the device, if possible."""  # without a wait\n') == []


@pytest.mark.parametrize(
    ("name", "found"),
    {
        "running": True,
        "checked_request": True,
        "_unseen": True,
        "sampled_scores": True,
        "__getattr__": False,
        "mixed_forward": False,
        "mixed": True,
        "heading": False,
        "send": False,
        "bring": False,
        "seed_of": False,
    }.items(),
)
def test_participles_are_found_at_the_beginning_of_names(name: str, found: bool) -> None:
    assert english.is_participle(name) == found
    assert bool(english.participles(f"class A:\n    def {name}(self): ...")) == found
