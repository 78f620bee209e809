"""The README's Python runs as it stands, block after block, given a model and rows."""

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

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str = "python") -> list[str]:
    """The blocks of a language, without the indentation they have inside a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", README.read_text(encoding="utf-8"), re.M | re.S)
    return ["\n".join(line.removeprefix(indent) for line in code.splitlines()) for indent, code in found]


def test_the_python_blocks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(12, 1)
    tasks = [
        SimpleNamespace(loader=[(x[k::3], y[k::3] % 2 + 2 * task) for k in range(3)], rows=(x, y % 2 + 2 * task))
        for task in range(2)
    ]
    names = {"gradmix": gradmix, "F": F, "torch": torch, "model": MLP(), "tasks": tasks, "x": x, "y": y}
    names["buffer"] = rows(6, 2)
    code = blocks()
    assert len(code) == 6
    exec(code[0], names)
    assert names["loss"].requires_grad and names["y"].shape == (12, CLASSES)
    exec(code[1], names)
    assert names["buffer"].classes == (0, 1, 2, 3) and names["mixup"].refreshes == 6
    names.update(x=x, y=y)
    exec(code[2], names)
    assert names["logits"].requires_grad and len(names["pairs"]) == 12

    tokens = torch.randint(1, 20, (12, 5))
    model = build_model("text-transformer", (5,), CLASSES, vocabulary=20)
    names.update(model=model, buffer=(tokens[:4], y[:4]), tokens=tokens, y=y)
    exec(code[3], names)
    assert names["logits"].shape == (12, CLASSES) and names["loss"].requires_grad

    names.update(model=MLP(), buffer=rows(6, 2), x=x, y=y)
    exec(code[4], names)
    assert names["per_class"].cosine().shape == (names["per_class"].classes.numel(),) * 2
    assert len(names["per_row"]) == 12 and int(names["merged"].counts.sum()) == 18

    network = ModuleType("mynets")
    network.build = lambda input_shape, num_classes: torch.nn.Sequential(
        torch.nn.Linear(*input_shape, 8), torch.nn.ReLU(), torch.nn.Linear(8, num_classes)
    )
    monkeypatch.setitem(sys.modules, "mynets", network)
    own = torch.randn(50, 4), torch.arange(50) % 10
    names = {"train_set": own, "test_set": own}
    exec(code[5], names)
    assert names["result"].status == "complete" and names["result"].tasks == 5


def test_the_options_named_exist() -> None:
    """Every value in the table of choices is accepted."""
    text = README.read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.M))
    assert {"criterion", "estimator", "policy", "threshold", "refresh"} <= set(table)
    for option in ("criterion", "estimator", "policy"):
        for value in re.findall(r"`(\w+)`", table[option]):
            pairs = gradmix.select_pairs(MLP(), rows(6, 2), rows(4, 1), **{option: value})
            assert len(pairs) == 4


def test_the_experiment_is_accepted() -> None:
    from gradmix.training.runs.experiments import from_yaml

    (text,) = blocks("yaml")
    experiment = from_yaml(text, "mine")
    assert len(experiment.runs()) == 3 * 3 * 3 and len(experiment.differences) == 2
