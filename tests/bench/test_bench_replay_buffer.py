"""bench/replay_buffer.py: it runs, and what it writes is whole. No time is judged."""

from __future__ import annotations

import json
from pathlib import Path

from forked import run_script

import gradmix

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "replay_buffer.py"
LEVELS = ["min", "p5", "p20", "p50", "p80", "p95", "max"]


def test_every_figure_is_there(tmp_path: Path) -> None:
    short = ("--rows", "40", "--draw", "8", "--step", "0.005", "--repeats", "3", "--threads", "1")
    done = run_script(SCRIPT, *short, "--folder", str(tmp_path), "--json", str(tmp_path / "result.json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]  # no rows are left behind
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["options"]["rows"] == 40 and result["machine"]["gradmix"] == gradmix.__version__
    assert {"in memory", "on disk, in the system's cache"} <= result["draws"].keys()
    assert [*result["steps"]] == ["the step alone", "a draw in memory", "a draw on disk", "a draw on disk, made ahead"]
    for table in ("draws", "steps"):
        for name, row in result[table].items():
            assert [*row["seconds"]] == LEVELS and [*row["ratio"]] == LEVELS
            assert 0 < row["seconds"]["min"] <= row["seconds"]["max"]
            assert name in done.stdout
    assert [*result["resident_bytes"]] == ["in memory", "on disk"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = run_script(SCRIPT, "--folder", str(tmp_path / "none"), cwd=tmp_path)
    assert done.returncode == 2 and "argument --folder: no folder" in done.stderr
