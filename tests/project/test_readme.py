"""The Python of the README and of the pages runs as it stands, block after block, given a model and samples."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, MLP, rows

import gradmix
from gradmix.training.models import build_model

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(page: str, language: str = "python") -> list[str]:
    """The blocks of a language, without the indentation they have inside a list."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.M | re.S)
    return ["\n".join(line.removeprefix(indent) for line in code.splitlines()) for indent, code in found]


def names_of_a_loop() -> dict:
    x, y = rows(12, 1)
    return {"gradmix": gradmix, "F": F, "torch": torch, "model": MLP(), "x": x, "y": y, "buffer": rows(6, 2)}


def test_the_quick_start_is_the_example() -> None:
    (code,) = blocks("README.md")
    assert (ROOT / "examples/quickstart.py").read_text(encoding="utf-8").split("\n\n", 1)[1].strip() == code.strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_the_examples_run(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = example.read_text(encoding="utf-8").replace("SEEDS = 3", "SEEDS = 1")
    exec(compile(code, str(example), "exec"), {"__name__": "__main__"})
    accuracies = [float(value) for value in re.findall(r"\b[01]\.\d+", capsys.readouterr().out)]
    # All ten classes: guessing gives 0.1, and the last task alone 0.2.
    assert accuracies and accuracies[-1] > 0.5


def test_the_loops_run() -> None:
    names = names_of_a_loop()
    x, y = names["x"], names["y"]
    names["tasks"] = [
        SimpleNamespace(loader=[(x[k::3], y[k::3] % 2 + 2 * task) for k in range(3)]) for task in range(2)
    ]
    loop, marked, captured, tokens = blocks("docs/own-loop.md")
    exec(loop, names)
    assert names["buffer"].classes == (0, 1, 2, 3) and names["mixup"].refreshes == 6
    names.update(x=x, y=y)
    exec(marked, names)
    assert names["mixed_x"].shape == x.shape and len(names["pairs"]) == 12
    exec(captured, names)
    assert names["loss"].requires_grad and names["mixed_y"].shape == (12, CLASSES)

    ids = torch.randint(1, 20, (12, 5))
    model = build_model("text-transformer", (5,), CLASSES, vocabulary=20)
    names.update(model=model, buffer=(ids[:4], y[:4]), tokens=ids, y=y)
    exec(tokens, names)
    assert names["logits"].shape == (12, CLASSES) and names["loss"].requires_grad


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
    (code,) = blocks("docs/training.md")
    exec(code, names)
    assert names["result"].status == "complete" and names["result"].tasks == 5


def test_the_options_named_exist() -> None:
    """Every value in the table of options is accepted."""
    text = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.M))
    assert {"criterion", "estimator", "policy", "threshold", "refresh", "alpha"} <= set(table)
    for option in ("criterion", "estimator", "policy"):
        for value in re.findall(r"`(\w+)`", table[option]):
            pairs = gradmix.select_pairs(MLP(), rows(6, 2), rows(4, 1), **{option: value})
            assert len(pairs) == 4


def test_the_experiment_is_accepted() -> None:
    from gradmix.training.runs.experiments import from_yaml

    (text,) = blocks("docs/training.md", "yaml")
    experiment = from_yaml(text, "mine")
    assert len(experiment.runs()) == 3 * 3 * 3 and len(experiment.differences) == 2


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 120
