"""``GradMixCallback`` in Lightning's own loop: the batch of every step holds the pairs of ``select_pairs``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from frameworks import CLASSES, framework, generator, network, task
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import gradmix
from gradmix.ops.labels import dense_labels

framework("lightning.pytorch")

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402

from gradmix.integrations.lightning import GradMixCallback  # noqa: E402

# Lightning's own advice, about workers of loaders and steps between two logs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
]


class Module(pl.LightningModule):
    """A user's module: ``forward`` returns logits, the loss takes label vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch[:2] if isinstance(batch, (list, tuple)) else (batch["image"], batch["label"])
        self.seen.append((x.clone(), y.clone()))
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Validated(Module):
    def validation_step(self, batch, batch_idx):
        assert batch[1].dtype == torch.int64 and len(batch[1]) <= 8
        self.validated = True


class WithoutForward(Module):
    forward = pl.LightningModule.forward

    def training_step(self, batch, batch_idx):
        self.seen.append((batch[0].clone(), batch[1].clone()))
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Witness(Callback):
    """Selects by ``select_pairs`` what the callback after it selects."""

    def __init__(self, read, **settings) -> None:
        self.read, self.settings, self.batches, self.generator = read, settings, [], generator()
        self.rejections = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        x, y, reference = self.read(batch)
        pairs = gradmix.select_pairs(pl_module.net, reference, (x, y), generator=self.generator, **self.settings)
        self.rejections += int((~pairs.helpful).sum())
        mixed_x, mixed_y = pairs.mix()
        own = dense_labels(y, CLASSES, mixed_y.dtype)
        self.batches.append((x.clone(), own, mixed_x, mixed_y))


def trainer(*callbacks, **settings):
    settings = {"max_epochs": 2, **settings}
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )


def loader(*samples, collate=None):
    return DataLoader(TensorDataset(*samples), batch_size=8, shuffle=True, collate_fn=collate)


def full_buffer():
    buffer = gradmix.ReplayBuffer(capacity=5)
    buffer.add(*task(0))
    return buffer


def by_name(samples):
    image, label, old = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"image": image, "label": label, "old": old}


BATCHES = {
    "a list": ({}, None, lambda b: (b[0], b[1])),
    "a list with marks": ({"replayed": 2}, None, lambda b: (b[0], b[1], b[2])),
    "a dict": ({"x": "image", "y": "label"}, by_name, lambda b: (b["image"], b["label"])),
    "a dict with marks": (
        {"x": "image", "y": "label", "replayed": "old"},
        by_name,
        lambda b: (b["image"], b["label"], b["old"]),
    ),
}


@pytest.mark.parametrize("originals", [True, False])
@pytest.mark.parametrize(("keys", "collate", "read"), BATCHES.values(), ids=BATCHES)
def test_every_step_trains_on_what_select_pairs_selects(keys, collate, read, originals: bool) -> None:
    buffer = None if "replayed" in keys else full_buffer()
    x, y = (torch.cat(parts) for parts in zip(task(1, 20), task(0, 10), strict=True))
    witness = Witness(lambda batch: (*read(batch), buffer)[:3])
    module = Validated()
    callback = GradMixCallback(buffer, originals=originals, generator=generator(), **keys)
    trainer(witness, callback).fit(module, loader(x, y, y < 2, collate=collate), DataLoader(TensorDataset(x, y), 8))
    assert module.validated
    assert len(module.seen) == len(witness.batches) == 8 and witness.rejections > 0
    for (seen_x, seen_y), (own_x, own_y, mixed_x, mixed_y) in zip(module.seen, witness.batches, strict=True):
        expected = (torch.cat([own_x, mixed_x]), torch.cat([own_y, mixed_y])) if originals else (mixed_x, mixed_y)
        assert torch.equal(seen_x, expected[0]) and torch.equal(seen_y, expected[1])


def test_a_network_without_forward_is_named() -> None:
    samples = loader(*task(1))
    with pytest.raises(ValueError, match="model: got None for WithoutForward.*model='net'"):
        trainer(GradMixCallback(full_buffer())).fit(WithoutForward(), samples)
    module = WithoutForward()
    trainer(GradMixCallback(full_buffer(), model="net")).fit(module, samples)
    assert module.seen[0][1].shape == (16, CLASSES)


def test_a_tuple_is_refused() -> None:
    samples = loader(*task(1), collate=lambda items: tuple(torch.utils.data.default_collate(items)))
    with pytest.raises(TypeError, match="batch: got tuple, expected a list or a dict"):
        trainer(GradMixCallback(full_buffer())).fit(Module(), samples)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="buffer: got None, expected a buffer, or replayed="):
        GradMixCallback(None)
    with pytest.raises(TypeError, match="alpa"):
        GradMixCallback(full_buffer(), alpa=1.0)
    with pytest.raises(ValueError, match="alpha: got -1"):
        GradMixCallback(full_buffer(), alpha=-1.0)


class Bfloat16(Module):
    """Notes the dtype in which the classifier computed, with autograd in training and without in the selection."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = set()
        self.net[2].register_forward_hook(lambda module, args, output: self.dtypes.add(output.dtype))


def test_mixed_precision_and_accumulated_gradients() -> None:
    module, callback = Bfloat16(), GradMixCallback(full_buffer(), refresh=2)
    trainer(callback, precision="bf16-mixed", accumulate_grad_batches=2, max_epochs=1).fit(module, loader(*task(1)))
    assert module.dtypes == {torch.bfloat16} and module.seen[0][0].dtype == torch.float32
    assert callback.mixup.refreshes == 3  # of five batches


def test_a_loop_of_two_tasks_learns_and_a_checkpoint_goes_on(tmp_path) -> None:
    """The buffer changes between the tasks; the second one is begun again from the first one's checkpoint."""
    torch.manual_seed(0)
    module, buffer = Module(), gradmix.ReplayBuffer(capacity=5)
    callback = GradMixCallback(buffer)
    fit = trainer(callback, max_epochs=30)
    fit.fit(module, loader(*task(0)))
    assert callback.mixup.reference is None and callback.mixup.pairs.helpful.all()
    fit.save_checkpoint(tmp_path / "task.ckpt")
    buffer.add(*task(0))
    x, y = (torch.cat(parts) for parts in zip(task(0), task(1), strict=True))
    state = callback.state_dict()
    resumed = GradMixCallback(buffer)
    for one, checkpoint in ((callback, None), (resumed, tmp_path / "task.ckpt")):
        stream = DataLoader(ConcatDataset([TensorDataset(*task(1)), TensorDataset(buffer.x, buffer.y)]), 16, True)
        trainer(one, max_epochs=60).fit(module, stream, ckpt_path=checkpoint)
        assert (module(x).argmax(1) == y).float().mean() > 0.8
        assert one.mixup.reference is not None and one.mixup.refreshes > state["refreshes"]


def test_a_module_of_another_run_is_taken() -> None:
    callback = GradMixCallback(full_buffer())
    for module in (Module(), Module()):
        trainer(callback, max_epochs=1).fit(module, loader(*task(1)))
        assert callback.mixup._model is module


def test_one_selection_serves_a_compiled_network() -> None:
    module, callback = WithoutForward(), GradMixCallback(full_buffer(), model="net")
    module.net = torch.compile(module.net, backend="eager")
    trainer(callback, max_epochs=1).fit(module, loader(*task(1)))
    assert callback.mixup.refreshes == 5 and callback.mixup._model is module.net._orig_mod


def test_networks_with_batch_statistics_are_served() -> None:
    module = Module()
    module.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, CLASSES))
    trainer(GradMixCallback(full_buffer())).fit(module, loader(*task(1)))
    # Three batches of a step's own pass, two epochs of five: the selection's passes leave the statistics alone.
    assert int(module.net[1].num_batches_tracked) == 10
