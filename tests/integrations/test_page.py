"""The Python of docs/integrations.md runs as it stands, block after block, given a model, samples and a buffer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from frameworks import framework, network, task
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradmix

framework("avalanche.training")
framework("lightning.pytorch")
framework("transformers")

import lightning.pytorch as pl  # noqa: E402
import transformers  # noqa: E402
from avalanche.training import Naive  # noqa: E402
from avalanche.training.plugins import ReplayPlugin  # noqa: E402

BLOCKS = re.findall(
    r"^```python\n(.*?)^```",
    (Path(__file__).parents[2] / "docs/integrations.md").read_text(encoding="utf-8"),
    re.M | re.S,
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
]


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def names() -> dict:
    model, buffer = network(), gradmix.ReplayBuffer(capacity=4)
    buffer.add(*task(0))
    return {"model": model, "buffer": buffer, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def test_there_is_a_block_for_each_adapter() -> None:
    found = [re.search(r"from gradmix\.integrations\.(\w+)", block) for block in BLOCKS]
    assert [match and match[1] for match in found] == ["avalanche", "lightning", "transformers", "timm"]


def test_avalanche() -> None:
    known = names() | {"Naive": Naive, "ReplayPlugin": ReplayPlugin}
    exec(BLOCKS[0], known)
    assert [type(plugin).__name__ for plugin in known["strategy"].plugins[:2]] == ["ReplayPlugin", "GradMixPlugin"]


def test_lightning(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # of the trainer's log and checkpoint
    known = names() | {"Trainer": lambda **given: pl.Trainer(max_epochs=1, logger=False, **given)}
    exec(BLOCKS[1], known)
    known["trainer"].fit(Module(), DataLoader(TensorDataset(*task(1)), 8))
    (callback,) = [found for found in known["trainer"].callbacks if type(found).__name__ == "GradMixCallback"]
    assert callback.mixup.pairs.helpful.any()


def test_transformers(tmp_path) -> None:
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    items = [{"input_ids": torch.tensor([1 + n % 8, 2]), "labels": torch.tensor(n % 2)} for n in range(16)]
    known = {
        "Trainer": transformers.Trainer,
        "model": transformers.BertForSequenceClassification(config),
        "args": transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True),
        "dataset": items,
        "kept": items[:4],
    }
    exec(BLOCKS[2], known)
    known["trainer"].train()
    assert known["trainer"].mixup.reference is not None


def test_timm() -> None:
    known = names()
    exec(BLOCKS[3], known)
    x, y = known["mixup_fn"](*task(1))
    assert x.shape == (40, 6) and y.shape == (40, 4)
