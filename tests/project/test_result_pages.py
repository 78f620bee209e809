"""The pages of results: a question, its answer with a figure, and tables that say what the files of runs have."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from gradmix.training.reports.arms import from_results, summarise
from gradmix.training.runs.metrics import Interval, mean_interval

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/results"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.name != "index.md")
METRICS = {
    "average accuracy": "average_accuracy",
    "difference of average accuracy": "average_accuracy",
    "final accuracy": "final_accuracy",
    "forgetting": "forgetting",
    "learning accuracy": "learning_accuracy",
}
"""Columns of tables, each with its name in the files. Of differences the interval's half stands after ±."""


def tables(text: str) -> list[list[list[str]]]:
    """The cells of the tables, by table and line; the second line, of dashes, is left out."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    lines = [[line.strip("|").split("|") for line in block.splitlines()] for block in blocks]
    return [[[cell.strip().strip("`") for cell in line] for line in [block[0], *block[2:]]] for block in lines]


def figures(file: Path) -> dict[tuple[str, str], str]:
    """The figures of a file of runs as the pages write them: by row and metric."""
    summary = json.loads(file.read_text(encoding="utf-8"))["summary"]
    found = {}
    for kind, spread, sign in (("rows", "std", ""), ("differences", "half_width", "+")):
        for row in summary[kind]:
            for name, value in row["metrics"].items():
                if value[spread] is not None:  # of one seed there is none
                    mean = f"{value['mean']:{sign}.3f}".replace("-", "−")
                    found[row["label"], name] = f"{mean} ± {value[spread]:.3f}"
    return found


def shares_of_selection(file: Path) -> dict[tuple[str, str], str]:
    """The share of a step that selection took, as the report computes it, by row and average accuracy."""
    found = {}
    for row in summarise(from_results(file))[0]:
        accuracy, share = row.metrics["average_accuracy"], row.shares["selection"]
        for label in (row.label, re.sub("^gradmix$", "gradmix-class", row.label)):
            found[label, f"{accuracy.mean:.3f} ± {accuracy.std:.3f}"] = f"{100 * share:.0f} %" if share > 0 else ""
    return found


def cells_of(page: Path) -> list[tuple[str, str, str]]:
    """Row, metric and figure of the tables with a column of a metric, or of differences."""
    found = []
    for head, *lines in tables(page.read_text(encoding="utf-8")):
        for place, column in enumerate(head):
            if place == 0 and column in METRICS:  # "difference of average accuracy", its figure in the next column
                found += [(line[0], METRICS[column], line[1]) for line in lines]
            elif column in METRICS:
                found += [(line[0], METRICS[column], line[place]) for line in lines]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_a_question_its_answer_and_the_command(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    title, answer, *_ = text.split("\n\n")
    assert title.startswith("# ") and title.endswith("?")
    assert re.search(r"\d", answer), "an answer has a figure"
    conditions, command = text.index("\n## Conditions\n"), re.search(r"\n## Commands?\n\n", text)
    assert command is not None and conditions < command.start()
    assert "```bash\n" in text[command.start() :]
    assert f"]({page.name})" in (FOLDER / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_say_what_the_runs_gave(page: Path) -> None:
    """A row that a file named on the page has, by its label, has that file's figures."""
    names = re.findall(r"`(bench/results/experiments/[\w-]+\.json)`", page.read_text(encoding="utf-8"))
    files = [figures(ROOT / name) for name in names]
    for row, metric, figure in cells_of(page):
        expected = {file[row, metric] for file in files if (row, metric) in file}
        assert not expected or figure in expected, f"{row}, {metric}"


@pytest.mark.parametrize("page", [*PAGES, FOLDER / "index.md"], ids=lambda page: page.stem)
def test_tables_of_methods_say_what_selection_takes_of_a_step(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"`(bench/results/experiments/[\w-]+\.json)`", text) or ["bench/results/experiments/mnist.json"]
    known: dict[tuple[str, str], set[str]] = {}
    for name in names:
        for row, share in shares_of_selection(ROOT / name).items():
            known.setdefault(row, set()).add(share)
    for head, *lines in tables(text):
        for line in lines if "average accuracy" in head[1:] else ():
            row = line[0].partition("`")[0], line[head.index("average accuracy")].strip("*")
            assert row not in known or line[head.index("selection")] in known[row], row


def test_the_tables_are_read() -> None:
    page = FOLDER / "mnist.md"
    assert ("er", "forgetting", "0.262 ± 0.013") in cells_of(page)
    assert ("gradmix-sample − remix", "average_accuracy", "−0.008 ± 0.003") in cells_of(page)
    known = figures(ROOT / "bench/results/experiments/mnist.json")
    assert len(cells_of(page)) == 20 * 3 + 14 and {(row, metric) for row, metric, _ in cells_of(page)} <= set(known)


def test_every_file_of_runs_is_named_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = [file.relative_to(ROOT).as_posix() for file in (ROOT / "bench/results/experiments").glob("*.json")]
    assert [name for name in files if f"`{name}`" not in text] == [] and len(files) > 10


def runs_by_setting() -> dict[tuple[str, str, str], dict[int, float]]:
    """Average accuracy by seed, of all files: by method, settings of data, training and replay, settings of mixing."""
    found: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    # Of runs of the same setting and seed, made on several machines, the last file's count.
    for file in sorted((ROOT / "bench/results/experiments").glob("*.json")):
        dataset = file.stem.partition("-")[0]  # the benchmark "arrays" is several
        for run in json.loads(file.read_text(encoding="utf-8"))["runs"]:
            config = run["config"]
            shared = {key: config[key] for key in config if re.match(r"(data|optim|replay)\.", key)} | {"of": dataset}
            mixing = {key: config[key] for key in config if key.startswith("mix.")}
            found[run["method"], json.dumps(shared), json.dumps(mixing)][run["seed"]] = run["metrics"][
                "average_accuracy"
            ]
    return found


def is_plain(method: str, mixing: dict, other: str, other_mixing: dict) -> bool:
    """Whether ``other`` is the method without selection: without mixing, or Mixup with like settings."""
    base = method.removesuffix("gradmix-sample")
    alike = all(mixing[key] == other_mixing[key] for key in ("mix.alpha", "mix.originals", "mix.candidates"))
    return other == (base.removesuffix("-") or "er") or (other == f"{base}mixup" and alike)


def selection_minus_plain() -> list[tuple[str, Interval]]:
    """Differences of all settings of selection by sample with ``policy="uniform"``, over three seeds or more."""
    found, runs = [], runs_by_setting()
    for (method, shared, text), own in runs.items():
        mixing = json.loads(text)
        default = mixing["mix.policy"] == "uniform" and mixing["mix.control"] == "none"
        if method.endswith("gradmix-sample") and default:
            for (other, other_shared, other_text), theirs in runs.items():
                seeds = own.keys() & theirs.keys()
                if (
                    shared == other_shared
                    and is_plain(method, mixing, other, json.loads(other_text))
                    and len(seeds) >= 3
                ):
                    found.append((f"{method} − {other}", mean_interval([own[seed] - theirs[seed] for seed in seeds])))
    return found


def test_what_never_hurts() -> None:
    """The page's first sentence, and its table: each figure is that of some setting."""
    page = (FOLDER / "never-hurts.md").read_text(encoding="utf-8")
    differences = selection_minus_plain()
    below = [(name, f"{-mean:.3f} ± {half:.3f}") for name, (mean, _, half) in differences if mean + half < 0]
    assert below == [("gradmix-sample − mixup", "0.038 ± 0.024"), ("der++-gradmix-sample − der++", "0.002 ± 0.002")]
    answer = page.split("\n\n")[1]
    assert f"in two of {len(differences)} comparisons" in answer and all(loss in answer for _, loss in below)
    known = {f"{mean:+.3f} ± {half:.3f}".replace("-", "−") for _, (mean, _, half) in differences}
    (table,) = tables(page)
    assert {figure for line in table[1:] for figure in line[1:]} <= known and len(table) > 20
