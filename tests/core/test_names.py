"""Names that others gave: kept as they are, and shown as text, in plots, Markdown, HTML, CSV and on the terminal."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from synthetic_runs import make_result

from gradmix import cli
from gradmix.cli.progress import Reporter
from gradmix.runtime import names
from gradmix.training.loop.trainer import Progress
from gradmix.training.reports import arms as of_arms
from gradmix.training.reports import document, figures, plots, report, tables
from gradmix.training.reports.document import Table
from gradmix.training.reports.saving import save_run, save_summary
from gradmix.training.runs.experiments import from_yaml
from gradmix.training.runs.metrics import mean_interval
from gradmix.training.runs.results import load_run

ODD = [
    r"$\foo$", "a ${b", r"$\frac{1}{$", "US$ and A$", "_hidden", "a_b^c{", "back\\slash\\", "two\nlines", "tab\tand\r",
    "smile \U0001f600", "\u05e9\u05dc\u05d5\u05dd", "turned \u202eover", "bell\x07nul\x00", "\x1b[31mred\x1b[0m", "a|b",
    "`code` ```", "<script>alert(1)</script>", "=1+1", "+1", "-1", "@SUM(A1)", "no utf-8 \udc80\udcff", "[red]x[/]",
    "[/]", ":smile:", "[a](javascript:alert(1))", "![i](x)", "# heading", "- item", "1. item", "&lt;&#x41;", "~~gone~~",
    "--> <!--", "x" * 3000, "", "  ", "\u2028line", "e\u0301", "zero\u200dwidth", "a, b",
]  # fmt: skip


def steers(text: str) -> list[str]:
    """The characters of a text, its lines apart, that a terminal would obey or that cannot be encoded."""
    return [c for line in text.split("\n") for c in line if not c.isprintable() and c not in "\u200d\u200c"]


@pytest.mark.parametrize("start", range(0, len(ODD), 14))
def test_a_run_and_its_pictures_are_saved(start: int, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class_names = tuple(ODD[start : start + 14])
    result = make_result("gradmix-class", tasks=2, per_task=len(class_names) // 2, class_names=class_names)
    result = replace(result, benchmark="".join(class_names))
    folder = save_run(result, tmp_path / "run")
    assert {p.name for p in folder.glob("*.png")} == {"curve.png", "heatmap.png", "alignment.png"}
    assert not (folder / figures.NOT_DRAWN).exists() and not recwarn.list
    there = load_run(folder)
    assert (there.class_names, there.benchmark) == (class_names, result.benchmark)
    text = (folder / "accuracy_matrix.csv").read_text(encoding="utf-8")
    rows = list(csv.reader(io.StringIO(text)))
    assert len(rows) == 3 and not steers(text)
    assert all(cell[:1] not in ("=", "+", "-", "@", "\t", "\r") for row in rows for cell in row)
    save_summary([result], tmp_path / "summary")
    summary = (tmp_path / "summary/summary.md").read_text(encoding="utf-8")
    assert not steers(summary) and not steers(tables.to_text(tables.summarise([result])))


def test_an_experiment_with_such_arms(tmp_path: Path) -> None:
    arms = [name for name in ODD if name.strip() and len(name) < 100]
    values: dict[str, Any] = {
        "title": "odd $\\names$ <b>",
        "about": "- about | `it` \x1b[1m",
        "seeds": [0, 1],
        "base": {"data": {"benchmark": "split-digits"}},
        "arms": [{"name": arm, "method": "mixup", "mix": {"alpha": 0.01 * (k + 1)}} for k, arm in enumerate(arms)],
        "differences": [[arms[k], arms[0]] for k in range(1, 8)],
        "vary": {"replay.size": [8, 16]},
    }
    experiment = from_yaml(yaml.safe_dump(values), "odd")
    runs = experiment.runs()
    for run in runs:
        result = replace(make_result("mixup", run.seed), config=run.config)
        save_run(result, tmp_path / "runs" / run.folder, pictures=False)
    collected = of_arms.collect(experiment, runs, tmp_path / "runs", command="gradmix experiment `x`")
    folder = report.write(collected, tmp_path / "report")
    assert {p.name for p in folder.iterdir()} >= {
        "results.json",
        "report.md",
        "report.html",
        "varied.svg",
        "differences.svg",
    }
    told = [arm["name"] for arm in of_arms.from_results(folder / "results.json")["arms"]]
    assert told == [arm.name for arm in experiment.arms] == [arm.strip() for arm in arms]
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not steers(markdown) and not steers(page)
    assert "<script>" not in page and "<script>" not in markdown.replace("\\<", "")
    assert "](javascript" not in markdown.replace("\\]", "") and "could not be drawn" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    cells = {len(line.replace("\\\\", "").replace("\\|", "").split("|")) for line in rows[: 2 * len(arms) + 1]}
    assert len(cells) == 1, "no name makes cells of its own"


def test_names_are_drawn_letter_by_letter() -> None:
    labels = [r"$\alpha$", "_under", "50$ or 60$"]
    figure = plots.dots(labels, [[0.1, 0.2]] * 3, "accuracy")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())
    intervals = [mean_interval([0.1, 0.2])] * 2
    legend = plots.sweep("replay.size", [1, 2], {"x": {"_under": intervals, "plain": intervals}}).legends[0]
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_under", "plain"]


@pytest.mark.parametrize("name", [name for name in ODD if name.strip()], ids=ascii)
def test_on_a_terminal_no_name_is_markup(name: str) -> None:
    out = io.StringIO()
    reporter = Reporter(1, 10)
    # As on a terminal, whose escapes are told from those of the name by their absence in plain output.
    reporter.console = Console(file=out, force_terminal=True, color_system=None, width=5000, highlight=False)
    reporter.bar = reporter.bar or object()  # type: ignore[assignment]
    reporter.say(f"{name} is complete")
    assert out.getvalue() == f"{names.shown(name)} is complete\n"


@pytest.mark.parametrize("name", ["[red]x[/]", "\\[red]x", "[/]", "x\\", "\x1b[31m"])
def test_the_bar_shows_names_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda _: True))
    reporter = Reporter(2, 5)
    assert reporter.bar is not None
    reporter.start(name, 3)
    reporter.step(Progress("er", 3, 1, 2, 1, 1, 5, 10, 0.5))
    column, task = reporter.bar.columns[0], reporter.bar.tasks[0]
    assert str(column.render(task)).startswith(f"[1/2] {names.shown(name)}")  # type: ignore[attr-defined]


def test_the_time_left_is_shown_beside_a_long_name(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=out, force_terminal=True, width=80))
    name = "der++-trivialaugment-gradmix-sample"
    reporter = Reporter(20, len(name))
    assert reporter.bar is not None
    reporter.start(name, 3)
    reporter.step(Progress(name, 3, 4, 5, 1, 1, 250, 500, 0.5))
    Console(file=out, width=80).print(reporter.bar.make_tasks_table(reporter.bar.tasks))
    line = out.getvalue().splitlines()[-1]
    assert len(line) <= 80 and "…  seed 3  task 4/5  loss 0.500" in line and "50%" in line
    assert line.rstrip().endswith("-:--:--"), "no speed is known yet"


def test_errors_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "\x1b]0;title\x07.yaml"
    assert cli.main(["experiment", str(missing)]) == 2
    captured = capsys.readouterr().err
    assert not steers(captured) and r"\x1b]0;title\x07.yaml" in captured


@pytest.mark.skipif(sys.platform == "win32", reason="such a folder cannot be made")
def test_folders_do_not_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out, data, tables = "out\x1b[31m", "data\x1b[32m", "tables\x1b[33m"
    few = ("--methods", "er", "--seeds", "0", "--epochs", "1", "--tasks", "2", "--rows-per-class", "10")
    assert cli.main(["train", *few, "--output", out]) == 0
    assert cli.main(["train", "--resume", out, "--data-dir", data]) == 0
    assert cli.main(["compare", out, "--output", tables]) == 0
    captured = capsys.readouterr()
    assert not steers(captured.out + captured.err)
    for name in (out, data, tables):
        assert names.shown(name) in captured.out + captured.err


@pytest.mark.parametrize("word", ["plain", "two words", "it's", "$HOME", "\x1b[1m", "a\nb", "\udc80", "q'\\\x01"])
def test_commands_are_read_by_the_shell_as_they_were_meant(word: str) -> None:
    text = names.shell(word)
    assert not steers(text) and "\n" not in text
    done = subprocess.run(["bash", "-c", f"printf %s {text}"], capture_output=True, check=True)
    assert done.stdout == word.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("a_b*c`d`<e>", r"a\_b\*c\`d\`\<e>"),
        ("$x$ ~~y~~", r"\$x\$ \~\~y\~\~"),
        ("[a](b) [c][d] [e]: f [0.1, 0.2]", r"[a\](b) [c\][d] [e\]: f [0.1, 0.2]"),
        ("&lt; & &#x41;", r"\&lt; & \&#x41;"),
        ("# a", r"\# a"), ("> a", r"\> a"), ("- a", r"\- a"), ("12. a", r"12\. a"), ("2) a", r"2\) a"),
        ("--- ", r"\--- "), ("   code", "code"), ("a\nb", r"a\\nb"), ("\udc80", r"\\udc80"),
    ],
)  # fmt: skip
def test_markdown_shows_the_text(text: str, markdown: str) -> None:
    assert names.markdown(text) == markdown


def test_documents_of_odd_text() -> None:
    template = document._markdown_templates().from_string(
        "# {{ x | block }}\n\n{{ x | block }}\n\n- {{ x | block }}\n- a {{ x }}\n\n{{ x | command }}\n\n"
        "{{ x | block }}\n\n{{ t }}"
    )
    for name in ODD:
        text = template.render(x=name, t=Table([name, "b"], [[name, name]]))
        assert not steers(text) and not steers(document.to_html(text, {}))


# ------------------------------------------------------------------------------------------------- pictures that fail


def test_a_failing_picture_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no\nink")

    monkeypatch.setattr(plots, "heatmap", fail)
    with pytest.warns(UserWarning, match="heatmap.png could not be drawn .RuntimeError: no ink"):
        folder = save_run(make_result(), tmp_path / "run")
    assert load_run(folder).status == "complete"
    assert {p.name for p in folder.glob("*.png")} == {"curve.png", "alignment.png"}
    assert "heatmap.png could not be drawn" in (folder / figures.NOT_DRAWN).read_text()
    monkeypatch.setattr(plots, "compare", fail)
    with pytest.warns(UserWarning, match="compare.png could not be drawn"):
        save_summary([make_result()], tmp_path / "all")
    assert json.loads((tmp_path / "all/summary.json").read_text())["rows"]


def test_results_are_there_before_any_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "curve", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_run(make_result(), tmp_path / "run")
    assert load_run(tmp_path / "run").status == "complete"


@pytest.mark.parametrize("where", ["made", "rendered"])
def test_a_report_without_one_of_its_pictures(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = yaml.safe_dump(
        {"title": "T", "seeds": [0], "arms": [{"name": "er", "method": "er"}, {"name": "m", "method": "mixup"}]}
    )
    experiment = from_yaml(text, "t")
    runs = experiment.runs()
    for run in runs:
        save_run(replace(make_result(run.method), config=run.config), tmp_path / run.folder, pictures=False)
    values = of_arms.collect(experiment, runs, tmp_path)
    real = figures.to_svg

    def fail(*args: Any, **named: Any) -> str:
        if where == "made" or args[1] == "after_tasks":
            raise ValueError("no ink")
        return real(*args, **named)

    monkeypatch.setattr(*((plots, "after_tasks") if where == "made" else (figures, "to_svg")), fail)
    with pytest.warns(UserWarning, match="after_tasks.svg could not be drawn"):
        folder = report.write(values, tmp_path / "report")
    assert (folder / "average_accuracy.svg").is_file() and not (folder / "after_tasks.svg").exists()
    for name in ("report.md", "report.html"):
        assert "could not be drawn (ValueError: no ink)" in (folder / name).read_text(encoding="utf-8").replace(
            "\\", ""
        )
    assert "after_tasks.svg)" not in (folder / "report.md").read_text(encoding="utf-8")
