"""A file is replaced whole, or stays as it was with nothing left beside it."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import run_code
from synthetic_runs import make_result

from gradmix import cli
from gradmix.training.reports import saving
from gradmix.training.reports.saving import save_run
from gradmix.training.runs.results import load_run
from gradmix.training.runs.whole_files import replace_file, write_text


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
    with pytest.raises(type(error)), replace_file(file) as staging:
        staging.write_text("hal")
        raise error
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else ["old"])


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileNotFoundError), replace_file(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "old"


def test_text_that_cannot_be_encoded(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_system_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as found, replace_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert found.value.filename == str(tmp_path / "file") and found.value.errno == errno.ENOSPC
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError) as found:
        write_text(tmp_path / "taken" / "file", "text")
    assert found.value.filename == str(tmp_path / "taken" / "file")


@pytest.mark.skipif(sys.platform != "linux", reason="counts on limits as Linux has them")
@pytest.mark.parametrize("what", ["run", "text", "summary", "report"])
def test_a_disk_that_is_full_leaves_nothing_half_written(what: str, tmp_path: Path) -> None:
    # A limit of the size of files fails as a full disk does: in the middle of a write, without the file's name.
    code = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from synthetic_runs import make_result
from gradmix.training.reports import report, saving
from gradmix.training.runs import whole_files
folder = Path({str(tmp_path)!r})
(folder / "text").write_text("old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
values = {{"format": 1, "name": "n", "title": "t", "about": "x" * 9000, "command": "c", "seeds": [0],
          "arms": [], "vary": {{}}, "differences": [], "references": [], "protocol": {{}}, "runs": [], "missing": []}}
resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
try:
    if {what!r} == "run":
        saving.save_run(make_result(), folder / "run")
    elif {what!r} == "text":
        whole_files.write_text(folder / "text", "new" * 1000)
    elif {what!r} == "summary":
        saving.save_summary([make_result()], folder / "summary")
    else:
        report.write(values, folder / "report")
except OSError as error:
    print(error.filename)
"""
    (said,) = run_code(code, tmp_path)
    expected = {"run": "run", "text": "text", "summary": "summary/summary.json", "report": "report/results.json"}
    assert said == str(tmp_path / expected[what])
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["text"]
    assert (tmp_path / "text").read_text() == "old"


def test_content_reaches_the_disk_before_its_name_and_folders_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    def replaced(a: Any, b: Any) -> None:
        done.append(("replace", os.path.basename(b)))
        replace(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_text(tmp_path / "file", "text")
    assert done == [("sync", ".file"), ("replace", "file"), ("sync", tmp_path.name)]
    done.clear()
    save_run(make_result(), tmp_path / "deep" / "run", pictures=False)
    order = [what for what in done if what[0] == "replace" or what[1] in ("metrics.json", "config.yaml", "deep")]
    assert sorted(order[:2]) == [("sync", "config.yaml"), ("sync", "metrics.json")]
    assert order[2:] == [("replace", "run"), ("sync", "deep")]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_run_that_cannot_be_saved_keeps_its_checkpoint(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--methods", "er", "--seeds", "0", "--epochs", "1", "--tasks", "2", "--samples-per-class", "20")
    real, full = getattr(os, step), []

    def fail(*args: Any) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    save = saving.save_run

    def saved(*args: Any, **named: Any) -> Path:
        full.append(True)
        try:
            return save(*args, **named)
        finally:
            full.clear()

    monkeypatch.setattr(os, step, fail)
    monkeypatch.setattr(saving, "save_run", saved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", io.StringIO())
        assert cli.main(["train", *flags, "--checkpoint", "0.001", "--output", "out"]) == 2
        said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert said == "gradmix: error: out/er/seed-0: No space left on device\n"
    assert list(Path("out/.checkpoints").glob("*.pt")) and not list(Path("out").rglob("metrics.json"))
    assert not [p for p in Path("out/er").iterdir()]
    monkeypatch.setattr(saving, "save_run", save)
    assert cli.main(["train", "--resume", "out"]) == 0
    assert load_run("out/er/seed-0").status == "complete" and not Path("out/.checkpoints").exists()
