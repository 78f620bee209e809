"""The table of faults, ``kinds.md``: every test that it names exists."""

import re
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("kinds.md").read_text(encoding="utf-8")
ROWS = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in TABLE.splitlines() if line.startswith("|")][
    2:
]


@pytest.mark.parametrize("file", sorted({test.strip("`").split("::")[0] for _, _, test in ROWS}))
def test_every_test_that_is_named_exists(file: str) -> None:
    (found,) = Path(__file__).parents[1].rglob(file)
    text = found.read_text(encoding="utf-8")
    known = set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE))
    assert {test.strip("`").split("::")[1] for _, _, test in ROWS if test.startswith(f"`{file}::")} <= known


def test_every_row_says_what_it_is_about() -> None:
    assert ROWS[0][0]
    assert all(sibling and re.fullmatch(r"`test_\w+\.py::test_\w+`", test) for _, sibling, test in ROWS)
