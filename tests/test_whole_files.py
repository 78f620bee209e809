"""A file is replaced whole, or stays as it was with nothing left beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradmix.training.whole_files import replacing, write_text


@pytest.mark.parametrize("before", [None, "old"], ids=["new", "replaced"])
def test_written(before: str | None, tmp_path: Path) -> None:
    file = tmp_path / "a.b.txt"
    if before is not None:
        file.write_text(before)
    (tmp_path / ".a.b.txt").write_text("left by a process that was killed")
    write_text(file, "Zoë −\n")
    assert file.read_bytes() == "Zoë −\n".encode()
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("before", [None, "old"], ids=["new", "replaced"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_failed(error: BaseException, before: str | None, tmp_path: Path) -> None:
    file = tmp_path / "file"
    if before is not None:
        file.write_text(before)
    with pytest.raises(type(error)), replacing(file) as staging:
        staging.write_text("hal")
        raise error
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else ["old"])


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "old"


def test_text_that_cannot_be_encoded(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "\ud800")
    assert list(tmp_path.iterdir()) == []
