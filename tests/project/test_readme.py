"""The Python of the README and of the pages runs as it stands, block after block.

Pages whose blocks are complete run by themselves; the others are given a model and samples by a test of their own.
"""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, MLP, rows

import gradmix
from gradmix.training import config
from gradmix.training.config import TrainConfig
from gradmix.training.runs import experiments

ROOT = Path(__file__).parents[2]
EXCERPTS = {"CONTRIBUTING.md", "docs/style.md"}
"""Pages that show parts of files, before and after a change, which are no programs."""
GIVEN_NAMES = {"README.md", "docs/own-loop.md", "docs/gradients.md", "docs/own-data.md", "docs/integrations.md"}
"""Pages whose blocks have a test of their own, here or in ``tests/integrations``."""


def blocks(page: str, language: str = "python") -> list[str]:
    """The blocks of a language, without the indentation they have inside a list."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.M | re.S)
    return ["\n".join(line.removeprefix(indent) for line in code.splitlines()) for indent, code in found]


def pages_with(language: str) -> set[str]:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("examples/*.md")]
    pages = {file.relative_to(ROOT).as_posix() for file in files}
    return {page for page in pages if blocks(page, language)}


@pytest.mark.parametrize("page", sorted(pages_with("python") - EXCERPTS - GIVEN_NAMES))
def test_the_blocks_of_a_page_run_one_after_the_other(page: str) -> None:
    names: dict = {}
    for code in blocks(page):
        exec(compile(code, page, "exec"), names)


def names_of_a_loop() -> dict:
    x, y = rows(12, 1)
    return {"gradmix": gradmix, "F": F, "torch": torch, "model": MLP(), "x": x, "y": y, "buffer": rows(6, 2)}


def test_the_quick_start_is_the_example() -> None:
    (code,) = blocks("README.md")
    assert (ROOT / "examples/quickstart.py").read_text(encoding="utf-8").split("\n\n", 1)[1].strip() == code.strip()


def test_the_loops_run() -> None:
    names = names_of_a_loop()
    x, y = names["x"], names["y"]
    names["tasks"] = [
        SimpleNamespace(loader=[(x[k::3], y[k::3] % 2 + 2 * task) for k in range(3)]) for task in range(2)
    ]
    loop, marked, captured = blocks("docs/own-loop.md")
    exec(loop, names)
    assert names["buffer"].classes == (0, 1, 2, 3) and names["mixup"].refreshes == 6
    names.update(x=x, y=y)
    exec(marked, names)
    assert names["mixed_x"].shape == x.shape and len(names["pairs"]) == 12
    exec(captured, names)
    assert names["loss"].requires_grad and names["mixed_y"].shape == (12, CLASSES)


def test_the_gradients_page_runs() -> None:
    names = names_of_a_loop()
    (code,) = blocks("docs/gradients.md")
    exec(code, names)
    assert names["per_class"].cosine().shape == (names["per_class"].classes.numel(),) * 2
    assert len(names["per_sample"]) == 12 and int(names["merged"].counts.sum()) == 18


def test_a_data_set_of_one_s_own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ModuleType("mynets")
    network.build = lambda input_shape, num_classes: torch.nn.Sequential(
        torch.nn.Linear(*input_shape, 8), torch.nn.ReLU(), torch.nn.Linear(8, num_classes)
    )
    monkeypatch.setitem(sys.modules, "mynets", network)
    own = torch.randn(50, 4), torch.arange(50) % 10
    names = {"train_set": own, "test_set": own}
    anything, module = blocks("docs/own-data.md")
    exec(anything, names)
    assert names["result"].status == "complete" and names["result"].tasks == 5
    exec(module, names)
    assert len(names["make_stream"](TrainConfig()).tasks) == 3


def test_the_options_named_exist() -> None:
    """Every value in the table of options is accepted."""
    text = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.M))
    assert {"criterion", "estimator", "policy", "threshold", "refresh", "alpha"} <= set(table)
    for option in ("criterion", "estimator", "policy"):
        for value in re.findall(r"`(\w+)`", table[option]):
            pairs = gradmix.select_pairs(MLP(), rows(6, 2), rows(4, 1), **{option: value})
            assert len(pairs) == 4


def test_the_yaml_of_the_pages_is_accepted() -> None:
    assert pages_with("yaml") == {"docs/experiments.md", "docs/reference/config.md"}
    (text,) = blocks("docs/reference/config.md", "yaml")
    assert config.from_yaml(text).mix.originals
    (text,) = blocks("docs/experiments.md", "yaml")
    experiment = experiments.from_yaml(text, "mine")
    assert len(experiment.runs()) == 3 * 3 * 3 and len(experiment.differences) == 2


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 120
