"""The command line on data of the user's own: folders of images, texts, and modules in the current folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_pictures import draw_small_pictures

from gradmix import cli
from gradmix.cli.flags import _split_help
from gradmix.training.runs.results import load_run, load_runs

OWN = """
import torch
from torch import nn
from gradmix.training.streams import class_incremental

def make(num_classes, input_shape):
    return nn.Sequential(nn.Linear(input_shape[0], 8), nn.ReLU(), nn.Linear(8, num_classes))

def stream(data):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 4
    x = torch.randn(48, 6, generator=g) + 3 * torch.eye(4, 6)[y]
    return class_incremental((x, y), (x, y), tasks=data.tasks, class_order_seed=data.class_order_seed, name="mine")
"""
FAST = ("--seeds", "0", "--epochs", "1", "--threads", "1", "--batch", "8", "--device", "cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a module, in which nothing looks that was not started there."""
    package = tmp_path / "mine_for_tests"
    package.mkdir()
    (package / "things.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    draw_small_pictures(monkeypatch)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("mine_for_tests")]:
        del sys.modules[name]


def run(*args: str) -> int:
    return cli.main(list(args))


def test_modules_of_the_current_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = ("--benchmark", "mine_for_tests.things:stream", "--model", "mine_for_tests.things:make")
    before = list(sys.path)
    assert (
        run("train", *named, *FAST, "--methods", "er", "gradmix-class", "--tasks", "2", "--class-order-seed", "3") == 0
    )
    assert sys.path == [*before, str(folder)], "after all others, which are found as before"
    (output,) = (folder / "runs").iterdir()
    assert output.name.startswith("mine_for_tests.things-stream-"), "a name that every file system takes"
    runs = load_runs(output)
    assert [run.method for run in runs.values()] == ["er", "gradmix-class"]
    for found in runs.values():
        assert found.benchmark == "mine" and found.accuracy.shape == (2, 2)
        assert found.config.data.benchmark == named[1] and found.config.optim.model == named[3]
    capsys.readouterr()
    assert run("train", "--resume", str(output)) == 0
    assert "all 2 runs" in capsys.readouterr().out
    again = folder / "again"
    assert run("train", "--config", str(output / "config.yaml"), "--methods", "er", "--output", str(again)) == 0
    assert (load_run(again / "er" / "seed-0").accuracy == load_run(output / "er" / "seed-0").accuracy).all()
    assert run("compare", str(output)) == 0


def test_the_search_path_stays_where_no_module_is_named(folder: Path) -> None:
    before = list(sys.path)
    assert run("train", "--benchmark", "split-wine", *FAST, "--methods", "er", "--output", "out") == 0
    assert sys.path == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--benchmark", "mine_for_tests.absent:stream"), "data.benchmark: mine_for_tests.absent:stream was not found"),
        (("--benchmark", "mine_for_tests.things:OWN"), "data.benchmark: mine_for_tests.things:OWN was not found"),
        (("--model", "mine_for_tests.things:absent"), "mine_for_tests.things has no absent"),
        (("--benchmark", "image-folder", "--data-dir", "absent"), "absent/train: missing"),
    ],
    ids=["no module", "no function", "no model", "no folder"],
)
def test_what_is_not_there_is_named(
    flags: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", *flags, *FAST, "--methods", "er", "--output", "out") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gradmix: error: ")]
    assert message in line
    assert not list(Path("out").glob("*/*/metrics.json"))


def test_an_experiment_on_a_module_of_the_current_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.yaml").write_text(
        "title: Own data\nabout: Two arms.\nseeds: [0]\n"
        "base: {data: {benchmark: 'mine_for_tests.things:stream', tasks: 2}, threads: 1,\n"
        "       optim: {model: 'mine_for_tests.things:make', epochs: 1, batch: 8}}\n"
        "arms: [{name: er, method: er}, {name: gradmix, method: gradmix-sample}]\n",
        encoding="utf-8",
    )
    assert run("experiment", "own.yaml", "--output", "out", "--jobs", "1") == 0
    names = sorted(name for name in os.listdir("out/runs") if not name.startswith("."))
    assert [name.rsplit("-", 1)[0] for name in names] == [
        "mine_for_tests.things-stream-er",
        "mine_for_tests.things-stream-gradmix-sample",
    ]


def test_texts_by_their_name(folder: Path) -> None:
    flags = ("--benchmark", "split-descriptions", "--tasks", "2", "--growing-head", "--accumulate", "2")
    assert run("train", *flags, *FAST, "--methods", "mixup", "gradmix-sample", "--output", "out") == 0
    found = load_run("out/gradmix-sample/seed-0")
    assert (found.config.mix.space, found.config.optim.accumulate) == ("embedding", 2)
    assert found.config.optim.growing_head and found.accuracy.shape == (2, 2)


def test_folders_of_images_by_their_name(folder: Path) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    generator = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(("ape", "bee", "cat", "dog")):
            (folder / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(60 * label, 60 * label + 40, (14, 18, 3)).astype(np.uint8)
                image_module.fromarray(pixels).save(folder / "images" / part / name / f"{number}.jpg")
    flags = ("--benchmark", "image-folder", "--data-dir", "images", "--image-size", "8", "--model", "resnet8")
    more = ("--replay-batch", "4", "--workers", "0", "--skip-damaged", "--classes-per-task", "2")
    assert run("train", *flags, *more, *FAST, "--methods", "gradmix-sample", "--output", "out") == 0
    found = load_run("out/gradmix-sample/seed-0")
    assert found.class_names == ("ape", "bee", "cat", "dog") and found.task_classes == ((0, 1), (2, 3))
    assert (found.config.mix.reference, found.config.data.image_size) == ("replayed", 8)
    assert found.timing.seconds_data > 0


HELP = {
    "a number in the default": (
        "Weight. None: the method's own: 0.5 for der++.",
        ("Weight.", "the method's own: 0.5 for der++"),
    ),
    "a key in the default": (
        "Steps; 0: once. None: 20 with data.online, else 0.",
        ("Steps; 0: once.", "20 with data.online, else 0"),
    ),
    "more behind it": ("An order; None: as it is. Apart from seeds.", ("An order. Apart from seeds.", "as it is")),
    "no default": ("A number of 0.5. Or none.", ("A number of 0.5. Or none.", None)),
}


@pytest.mark.parametrize("case", HELP)
def test_the_default_is_taken_out_of_a_description(case: str) -> None:
    doc, expected = HELP[case]
    assert _split_help(doc) == expected


def test_help_says_what_is_off_and_whose_default_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run("train", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in (
        "--mix-refresh INT Steps between two computations of the reference gradient (and class table); 0: once per "
        "epoch. (default: the method's own: 0 for gradmix-class (20 with data.online), 1 for gradmix-sample)",
        "(default: the method's own: 0.5 for der++ and what builds on it, nothing for others)",
        "--blur FLOAT Standard deviation, in tasks, by which samples stray from the place of their task in the stream, "
        "so that tasks pass over into each other. (default: not at all)",
        "pairs are chosen among all of them. (default: one pass)",
        "--online, --no-online One pass over a stream without known boundaries",
        "Or package.module:function, which is called with this section and returns the stream. (default: split-digits)",
    ):
        assert text in shown
