"""The page of a report in a browser: no screen from 360 pixels up has to be scrolled sideways to read it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_runs import make_result

from gradmix.training.reports import arms, report
from gradmix.training.reports.saving import save_run
from gradmix.training.runs.experiments import from_yaml

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (360, 390, 1280)
LONG = "without-a-space-" * 8
TEXT = f"""
title: {LONG}
about: "{LONG} and `{LONG}`"
seeds: [0, 1]
arms: [{{name: {LONG}, method: gradmix-sample}}, {{name: er, method: er}}, {{name: mixup, method: mixup}}]
differences: [[{LONG}, er], [{LONG}, mixup]]
"""
# The widths of each frame's content, its scroll bar left aside, as the browser has laid it out.
MEASURE = """
<pre id="widths"></pre><script>
onload = () => document.getElementById("widths").textContent = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument.documentElement;
  return `${frame.width} ${page.scrollWidth - page.clientWidth}`;
}).join(";");
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium to lay the page out")
def test_the_page_is_not_scrolled_sideways(tmp_path: Path) -> None:
    experiment = from_yaml(TEXT, "table")
    runs = experiment.runs()
    for run in runs:
        result = make_result(run.method, run.seed)
        save_run(replace(result, config=run.config, environment={"path": LONG}), tmp_path / run.folder, pictures=False)
    page = report.to_html(arms.collect(experiment, runs, tmp_path))
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    # A page that is too wide for all of them shows that the browser measures.
    (tmp_path / "wide.html").write_text("<div style='width: 1400px'>wide</div>", encoding="utf-8")
    for name, beyond in (("report", 0), ("wide", 1)):
        frames = "".join(f'<iframe src="{name}.html" width="{width}" height="900"></iframe>' for width in WIDTHS)
        (tmp_path / "frames.html").write_text(frames + MEASURE, encoding="utf-8")
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom")
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [str(BROWSER), *flags, profile, "--virtual-time-budget=9000", (tmp_path / "frames.html").as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        (found,) = re.findall(r'id="widths">([^<]*)<', dom)
        widths = [tuple(map(int, pair.split())) for pair in found.split(";")]
        assert [width for width, _ in widths] == list(WIDTHS)
        assert all((more > 0) == bool(beyond) for _, more in widths), found
