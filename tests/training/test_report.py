"""Reports: the figures behind them, what they say, and that both renderings say the same."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from small_pictures import draw_small_pictures
from synthetic_runs import make_result

from gradmix.training.reports import arms as of_arms
from gradmix.training.reports import figures, plots, report
from gradmix.training.reports.saving import save_run
from gradmix.training.reports.significance import holm
from gradmix.training.runs.experiments import Experiment, from_yaml
from gradmix.training.runs.metrics import Interval, mean_interval, paired_difference
from gradmix.training.runs.results import METRIC_LABELS, SteadySteps, metric_values
from gradmix.training.runs.running import RUNS_AT_A_TIME

TEXT = """
title: Digits & <company>
about: A *paragraph* with a|b_c.
seeds: [0, 1, 2]
base: {data: {benchmark: split-digits}}
arms:
  - {name: mixup, method: mixup}
  - {name: er, method: er}
  - {name: gradmix, method: gradmix-class}
differences: [[gradmix, mixup], [mixup, er], [gradmix, er]]
reference: [{label: Mixup, metric: average_accuracy, value: 0.896, source: "a paper, 2025", differs: all, arm: mixup}]
"""


def made(text: str, folder: Path, skip: tuple[tuple[str, int], ...] = (), seeds: Any = None) -> dict[str, Any]:
    """The values of a report over made-up runs, saved under ``folder``; those in ``skip`` are missing."""
    experiment = from_yaml(text, "table").narrow(seeds=seeds)
    runs = experiment.runs()
    levels = {"er": 0.8, "mixup": 0.85, "gradmix-class": 0.9}
    for number, run in enumerate(runs):
        if (run.arm, run.seed) not in skip:
            result = make_result(run.method, run.seed, level=levels.get(run.method, 0.7) + 0.001 * (number % 7))
            save_run(replace(result, config=run.config), folder / run.folder, pictures=False)
    return of_arms.collect(experiment, runs, folder)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return made(TEXT, tmp_path_factory.mktemp("complete"))


@pytest.fixture
def values(complete: dict[str, Any]) -> dict[str, Any]:
    """The values of all runs, for the test alone."""
    return copy.deepcopy(complete)


@pytest.fixture(scope="module")
def html(complete: dict[str, Any]) -> str:
    """The page of all runs: to draw its pictures takes most of a test's time."""
    return report.to_html(copy.deepcopy(complete))


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of tables and text."""
    draw_small_pictures(monkeypatch)


class Page(HTMLParser):
    """The tags of a page, checked to be closed in order, the rows of its tables, and its text."""

    EMPTY = ("meta", "br", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "svg" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def test_figures(values: dict[str, Any]) -> None:
    rows, differences = of_arms.summarise(values)
    assert [row.arm for row in rows] == ["mixup", "er", "gradmix"], "as the specification has them"
    by_arm = {row.arm: row for row in rows}
    for name in METRIC_LABELS:
        found = [run["metrics"][name] for run in values["runs"] if run["arm"] == "er"]
        assert by_arm["er"].metrics[name] == mean_interval(found)
    assert by_arm["gradmix"].mixed_share == 0.75 and math.isnan(by_arm["er"].mixed_share)
    assert by_arm["gradmix"].step_ms == 2.0 and by_arm["gradmix"].shares["selection"] == pytest.approx(0.4)
    of = {
        arm: [run["metrics"]["average_accuracy"] for run in values["runs"] if run["arm"] == arm]
        for arm in ("er", "mixup", "gradmix")
    }
    first = differences[0]
    assert (first.arm, first.minus, first.seeds) == ("gradmix", "mixup", (0, 1, 2))
    assert first.metrics["average_accuracy"] == paired_difference(of["gradmix"], of["mixup"])
    assert [d.holm for d in differences] == holm([d.p for d in differences])


@pytest.mark.usefixtures("small_pictures")
def test_a_file_older_than_a_metric_is_read(values: dict[str, Any], tmp_path: Path) -> None:
    old = copy.deepcopy(values)
    for run in old["runs"]:
        del run["metrics"]["learning_accuracy"]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(old))
    read = of_arms.from_results(file)
    rows, differences = of_arms.summarise(read)
    assert all(math.isnan(row.metrics["learning_accuracy"].mean) for row in rows)
    assert [row.metrics["forgetting"] for row in rows] == [
        r.metrics["forgetting"] for r in of_arms.summarise(values)[0]
    ]
    assert [d.p for d in differences] == [d.p for d in of_arms.summarise(values)[1]]
    report.to_html(read)


def test_both_renderings_have_the_same_tables(values: dict[str, Any], html: str) -> None:
    page = Page(html)
    lines = [line for line in report.to_markdown(values).splitlines() if line.startswith("| ")]
    cells = [re.split(r" (?<!\\)\| ", line.removeprefix("| ").removesuffix(" |")) for line in lines]
    plain = [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in cells if not row[0].startswith("---")]
    assert plain == [row for table in page.tables for row in table]
    header, first = page.tables[0][:2]
    assert header == ["arm", *(METRIC_LABELS[name] for name in report.SHOWN), "samples mixed", "seeds"]
    mean, std, half = mean_interval([r["metrics"]["average_accuracy"] for r in values["runs"] if r["arm"] == "mixup"])
    assert first[:2] == ["mixup", f"{mean:.3f} ± {std:.3f} [{mean - half:.3f}, {mean + half:.3f}]"] and first[-2:] == [
        "-",
        "3",
    ]
    reference = page.tables[1][1]
    assert reference[:2] == ["Mixup", "a paper, 2025"] and reference[-2:] == ["0.896", f"{mean:.3f} (mixup)"]


def test_what_is_said(html: str) -> None:
    page = Page(html)
    for part in (
        "Digits & <company>",
        "A *paragraph* with a|b_c.",
        "gradmix experiment table",
        "mean over t of mean_{j<=t} R[t,j]",
        "12 intervals are shown",
        "Significant: Holm's p, adjusted for the 3 comparisons, is below 0.05.",
        "3 tests of average accuracy",
        "torch: 2.0",
        "Seeds: 0, 1, 2.",
    ):
        assert part in page.text
    assert "missing" not in page.text
    cost = next(t for t in page.tables if t[0][1] == "ms/step")
    assert cost[0][4] == "× er", "plain replay is what others are measured by, wherever it stands"
    assert [row[1:5] for row in cost[1:]] == [["2.00", "2.00 to 2.00", "2.50", "1.00"]] * 3
    assert "Runs at a time: unknown." in page.text


@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize(
    ("device", "memory", "shown"),
    [("cpu", 3, "≤ 3"), ("a GPU", 9, "9")],
    ids=["the closest bound of a process", "the most that tensors took"],
)
def test_costs_are_medians(device: str, memory: int, shown: str, tmp_path: Path) -> None:
    experiment = from_yaml(TEXT, "table").narrow(arms=["er"])
    runs = experiment.runs()
    for run, seconds, mib in zip(runs, (0.1, 0.3, 9.0), (3, 5, 9), strict=True):
        result = make_result(run.method, run.seed)
        steady = SteadySteps(100, seconds / 200, seconds, 0.0, 0.1)
        timing = replace(result.timing, steady=steady, peak_memory_bytes=mib * 2**20)
        environment = {"device": device, RUNS_AT_A_TIME: 2}
        made = replace(result, config=run.config, timing=timing, environment=environment)
        save_run(made, tmp_path / run.folder, pictures=False)
    values = of_arms.collect(experiment, runs, tmp_path)
    ((row,), _) = of_arms.summarise(json.loads(json.dumps(values)))
    assert row.step_ms == pytest.approx(1.5), "one disturbed run moves a mean, not the median"
    assert row.mean_step_ms == pytest.approx(3.0)
    assert row.step_range == pytest.approx((0.5, 45.0)) and row.shares["data"] == pytest.approx(1 / 3)
    assert row.peak_memory == memory * 2**20
    page = Page(report.to_html(values))
    cost = next(t for t in page.tables if t[0][1] == "ms/step")
    assert cost[1][2] == "0.50 to 45.0" and cost[1][-1] == shown
    assert "Runs at a time: 2." in page.text


def test_settings_that_are_unset_are_told_from_those_that_are_not(values: dict[str, Any], html: str) -> None:
    page = Page(html)
    shared = next(t for t in page.tables if t[0] == ["of", "settings", "unset"])
    lines = {row[0]: row[1:] for row in shared[1:]}
    assert "benchmark split-digits" in lines["data"][0] and "tasks" in lines["data"][1].split(", ")
    named = {f"{section}.{name}" for section, (_, unset) in lines.items() for name in unset.split(", ") if name != "-"}
    assert named == {key for key, value in values["protocol"].items() if value is None}


@pytest.mark.usefixtures("small_pictures")
def test_the_findings_come_first(values: dict[str, Any]) -> None:
    text = report.to_markdown(values)
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads[:2] == ["## What the figures say", "## Results"]
    _, differences = of_arms.summarise(values)
    told = sum(d.holm < 0.05 for d in differences)
    assert told and len(re.findall(r"^- \w+ is (?:above|below) ", text, re.M)) >= told


def test_the_page_needs_nothing_else_and_is_accessible(html: str) -> None:
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")]
    assert not re.search(r"(?:src|href)=\"(?!#)", html.replace("http://www.w3.org", "")) and "@import" not in html
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 3
    assert all(a["role"] == "img" and re.search(r"0\.\d{3}", a["aria-label"]) for a in pictures)
    assert {a.get("scope") for tag, a in page.tags if tag == "th"} == {"col", "row"}
    assert sum(tag == "caption" for tag, _ in page.tags) == len(page.tables)
    assert ("html", {"lang": "en"}) in page.tags and "prefers-color-scheme: dark" in html and "@media print" in html
    assert "#000000" not in html.partition("</style>")[2] and "currentColor" in html


@pytest.mark.usefixtures("small_pictures")
def test_what_is_unknown_of_some_runs_is_said(values: dict[str, Any]) -> None:
    for number, run in enumerate(values["runs"]):
        run["environment"] = {"date": f"2025-01-0{number + 1}"} | ({RUNS_AT_A_TIME: 2} if number < 4 else {})
    text = report.to_markdown(values)
    assert "- date: 2025-01-01 to 2025-01-09\n" in text
    assert "- runs at a time: 2 (of 5 of 9 runs it is unknown)\n" in text


@pytest.mark.usefixtures("small_pictures")
def test_missing_runs_are_named(tmp_path: Path) -> None:
    values = made(TEXT, tmp_path, skip=(("er", 1), ("mixup", 0), ("mixup", 1), ("mixup", 2)))
    page = Page(report.to_html(values))
    assert "4 of 9 runs are missing" in page.text
    assert "er, seed 1: not begun" in page.text and "mixup, seed 2: not begun" in page.text
    rows, differences = of_arms.summarise(values)
    assert [(row.arm, len(row.runs)) for row in rows] == [("er", 2), ("gradmix", 3)]
    assert [(d.label, d.seeds) for d in differences] == [("gradmix − er", (0, 2))], "paired over the seeds they share"


def test_failures_are_told(tmp_path: Path) -> None:
    experiment = from_yaml(TEXT, "table")
    runs = experiment.runs()
    values = of_arms.collect(experiment, runs, tmp_path, failed=[(runs[1], "out of memory")], command="make it")
    text = report.to_markdown(values)
    assert "er, seed 0: failed: out of memory" in text and "No run is complete" in text and "make it" in text
    Page(report.to_html(values))


@pytest.mark.parametrize("seeds", [[0], [0, 1]], ids=["one seed", "two"])
def test_few_seeds(seeds: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if len(seeds) > 1:  # of one seed there is no interval to draw
        draw_small_pictures(monkeypatch)
    values = made(TEXT, tmp_path, seeds=seeds)
    text = report.to_markdown(values)
    assert "nan" not in text.lower().replace("nanmax", "")
    Page(report.to_html(values))


VARIED = {
    "one": TEXT + "vary: {replay.size: [128, 2, 8]}\n",
    "two": TEXT + "vary: {replay.size: [2, 8], mix.policy: [uniform, best]}\n",
    "words": TEXT + "vary: {mix.policy: [uniform, permute]}\n",
    "unset": TEXT + "vary: {data.class_order_seed: [null, 3]}\n",
}


@pytest.mark.parametrize("text", VARIED.values(), ids=VARIED.keys())
def test_varied_settings(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if text not in (VARIED["two"], VARIED["unset"]):  # numbers and words are drawn by test_varied_values_are_spaced
        draw_small_pictures(monkeypatch)
    values = made(text, tmp_path, skip=(("er", 0),))
    experiment = from_yaml(text, "table")
    rows, differences = of_arms.summarise(values)
    assert len(rows) == 3 * len(experiment.points) and len(differences) == len(rows)
    assert all(len(d.seeds) == (2 if "er" in (d.arm, d.minus) else 3) for d in differences)
    page = Page(report.to_html(values))
    assert page.tables[0][0][1 : 1 + len(experiment.vary)] == list(experiment.vary)
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert any(label.startswith(f"Lines over {next(iter(experiment.vary))}") for label in labels)


def test_thirty_arms_stay_readable(tmp_path: Path) -> None:
    arms = "\n".join(
        f"  - {{name: arm number {k}, method: gradmix-class, mix: {{threshold: {k / 100}}}}}" for k in range(30)
    )
    pairs = ", ".join(f"[arm number {k}, arm number 0]" for k in range(1, 4))
    text = f"title: Many\nseeds: [0, 1]\nbase: {{}}\narms:\n{arms}\ndifferences: [{pairs}]\n"
    values = made(text, tmp_path)
    page = Page(report.to_html(values))
    assert len(page.tables[0]) == 31
    figures = {p.name: p.drawing() for p in report.pictures(values, *of_arms.summarise(values))}
    assert float(figures["average_accuracy"].get_figheight()) > 8
    lines = {line.get_label() for line in figures["after_tasks"].axes[0].lines}
    assert lines == {f"arm number {k}" for k in range(4)}, "only those that are compared"
    shown = [t.get_text() for t in figures["after_tasks"].axes[0].texts]
    assert len(shown) == 4 and all(re.fullmatch(r"arm number \d  0\.\d{3}", text) for text in shown)
    many = ", ".join(f"[arm number {2 * k}, arm number {2 * k + 1}]" for k in range(6))
    values = of_arms.collect(from_yaml(text.replace(pairs, many), "table"), (), tmp_path) | {"runs": values["runs"]}
    rows, _ = of_arms.summarise(values)
    assert list(report._lines(values, rows)) == [f"arm number {k}" for k in range(8)], "the first eight, not none"


def test_written_and_made_again(values: dict[str, Any], tmp_path: Path) -> None:
    folder = report.write(values, tmp_path / "deep" / "report")
    names = {"report.md", "report.html", "results.json", "average_accuracy.svg", "after_tasks.svg", "differences.svg"}
    assert {p.name for p in folder.iterdir()} == names
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert all(f"({name})" in text for name in names if name.endswith(".svg"))
    stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows, differences = of_arms.summarise(values)
    assert stored["summary"]["rows"][0]["metrics"]["forgetting"]["mean"] == rows[0].metrics["forgetting"].mean
    assert stored["summary"]["differences"][0]["p_holm"] == differences[0].holm
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    again = report.write(of_arms.from_results(folder / "results.json"), tmp_path / "again")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == before, "from the JSON alone, to the byte"
    (folder / "varied.svg").write_text("an earlier report's")
    report.write(values, folder)
    assert {p.name for p in folder.iterdir()} == names


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda v: "no JSON", "damaged"),
        (lambda v: [], "format, name"),
        (lambda v: {k: v[k] for k in v if k != "runs"}, "runs missing"),
        (lambda v: v | {"format": 99}, "format 99, expected 1"),
        (lambda v: v | {"runs": [{"arm": "er", "seed": 0}]}, "'values' is missing"),
        (lambda v: v | {"runs": 5}, "damaged"),
    ],
    ids=["no JSON", "a list", "a key", "later", "a run", "runs"],
)
def test_damaged_results(damage: Any, said: str, values: dict[str, Any], tmp_path: Path) -> None:
    found = damage(values)
    path = tmp_path / "results.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        of_arms.from_results(path)
    assert str(caught.value).startswith(str(path))
    with pytest.raises(FileNotFoundError, match="absent"):
        of_arms.from_results(tmp_path / "absent.json")


@pytest.mark.usefixtures("small_pictures")
def test_a_metric_without_a_value_is_a_dash(tmp_path: Path) -> None:
    experiment: Experiment = from_yaml(TEXT, "table").narrow(arms=["er", "mixup"])
    runs = experiment.runs()
    for run in runs:
        result = make_result(run.method, run.seed, tasks=1)
        assert math.isnan(metric_values(result)["forgetting"])
        save_run(replace(result, config=run.config), tmp_path / run.folder, pictures=False)
    page = Page(report.to_html(of_arms.collect(experiment, runs, tmp_path)))
    assert [row[3] for row in page.tables[0][1:]] == ["-", "-"]


def test_forest_marks_what_leaves_out_0() -> None:
    told, not_told, lone = Interval(0.1, 0.1, 0.05), Interval(-0.1, 0.1, 0.2), Interval(0.1, math.nan, math.nan)
    figure = plots.forest(["a", "b", "c", "d"], [told, not_told, told, lone], "difference", [True, False, False, False])
    drawn = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert [line.get_markerfacecolor() != "none" for line in drawn] == [True, False, False, False]
    colours = [line.get_color() for line in drawn]
    assert colours[0] == colours[2] != colours[1] == colours[3], "told by itself is hollow, but not grey"
    assert [t.get_text() for t in figure.axes[0].texts[1:3]] == ["+0.100 [+0.050, +0.150]", "−0.100 [−0.300, +0.100]"]
    assert figure.axes[0].texts[4].get_text() == "+0.100"
    assert plots.forest(["a"], [told], "x").axes[0].lines[1].get_markerfacecolor() != "none"
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1], "the first stands on top"


@pytest.mark.parametrize(
    ("values", "scale"), [([8, 16, 128], "log"), ([1, 2, 3], "linear"), ([0, 8], "linear"), (["a", "b"], "linear")]
)
def test_varied_values_are_spaced(values: list[Any], scale: str) -> None:
    lines = {"er": [Interval(0.5 + 0.1 * k, 0.1, 0.1) for k in range(len(values))]}
    axes = plots.sweep("replay.size", values, {"average accuracy": lines}).axes[0]
    assert axes.get_xscale() == scale
    assert [t.get_text() for t in axes.get_xticklabels()] == [str(v) for v in values]


def test_svg_is_the_same_each_time() -> None:
    draw = [figures.to_svg(plots.dots(["a"], [[0.1, 0.2]], "x"), "name") for _ in range(2)]
    assert draw[0] == draw[1] and draw[0].startswith("<svg") and "currentColor" not in draw[0]


def test_published_figures_are_starred(values: dict[str, Any]) -> None:
    figure = next(report.pictures(values, *of_arms.summarise(values))).drawing()
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    stars = [c for c in figure.axes[0].collections if isinstance(c, PathCollection) and len(c.get_offsets()) == 1]
    assert [tuple(np.asarray(star.get_offsets())[0]) for star in stars] == [(0.896, labels.index("mixup"))]
    assert "Star: the published figure." in report.to_markdown(values)


@pytest.mark.parametrize("lines", [2, 8], ids=["few", "many"])
def test_names_at_the_ends_of_lines_do_not_touch(lines: int) -> None:
    rng = np.random.default_rng(0)
    data = {f"line {k}": 0.8 + 0.001 * k + rng.normal(0, 0.001, (3, 5)) for k in range(lines)}
    figure = plots.after_tasks(data)
    figure.draw_without_rendering()
    boxes = sorted((t.get_window_extent() for t in figure.axes[0].texts), key=lambda box: float(box.y0))
    assert len(boxes) == lines and all(a.y1 <= b.y0 for a, b in pairwise(boxes))
    assert figure.axes[0].get_legend() is None
    assert len(figure.axes[0].collections) == (lines if lines <= plots.BANDS_UP_TO else 0), "bands of few lines only"


@pytest.mark.parametrize(
    ("places", "expected"),
    [([], []), ([5.0], [5.0]), ([0.0, 9.0], [0.0, 9.0]), ([1.0, 1.0], [-0.5, 2.5]), ([0, 1, 2, 20], [-2, 1, 4, 20])],
)
def test_apart(places: list[float], expected: list[float]) -> None:
    assert plots.apart(np.array(places), 3.0).tolist() == pytest.approx(expected)


def test_the_key_of_varied_settings_hides_no_line() -> None:
    lines = {f"arm {k}": [Interval(0.5 + 0.1 * k, 0.1, 0.1)] * 2 for k in range(3)}
    figure = plots.sweep("replay.size", [8, 16], {"average accuracy": lines, "final accuracy": lines})
    figure.draw_without_rendering()
    (key,) = figure.legends
    assert [t.get_text() for t in key.get_texts()] == list(lines)
    assert all(key.get_window_extent().y1 < axes.get_window_extent().y0 for axes in figure.axes)


def test_colours_that_are_too_dark_follow_the_page(html: str) -> None:
    style, _, body = html.partition("</style>")
    assert "var(--blue)" in body and "#0072b2" not in body.lower()
    assert len(re.findall(r"--blue: #\w{6};", style)) == 3, "of light pages, dark ones, and print"
