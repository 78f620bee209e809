"""``GradMixMixin`` in transformers' own Trainer: the loss of every step is that of the pairs of ``select_pairs``."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from frameworks import CLASSES, framework, generator, network, task
from torch import nn

import gradmix
from gradmix.integrations.transformers import GradMixMixin

framework("transformers")
framework("accelerate")

from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]

LENGTH, PAD = 8, 0


class GradMixTrainer(GradMixMixin, Trainer):
    """What a user writes."""


def bert(dropout: float = 0.0):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
    )
    return BertForSequenceClassification(config)


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


class Plain(nn.Module):
    """A classifier of one's own, whose ``forward`` takes any keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, features, labels=None, **kwargs):
        logits = self.net(features)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def texts(number, count=24):
    """Token ids of two of four classes, each with tokens of its own, padded to one length, with attention masks."""
    generator = torch.Generator().manual_seed(number)
    _, y = task(number, count)
    lengths = torch.randint(3, LENGTH + 1, (count, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    ids = (1 + 5 * y[:, None] + torch.randint(0, 6, (count, LENGTH), generator=generator)) * mask
    return {"input_ids": ids, "attention_mask": mask}, y


def images(number, count=24):
    generator = torch.Generator().manual_seed(number)
    _, y = task(number, count)
    pictures = torch.randn(count, 3, 8, 8, generator=generator)
    return {"pixel_values": pictures + 2 * F.one_hot(y, 8).float()[:, None, :, None]}, y


def vectors(number, count=24):
    x, y = task(number, count)
    return {"features": x}, y


def items(samples, **more):
    """A data set of dicts, as transformers has them."""
    x, y = samples
    columns = {**x, "labels": y, **more}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(y))]


def train(model, data, folder, *, kind=GradMixTrainer, steps=4, settings=None, **arguments):
    own = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **(settings or {}),
    )
    trainer = kind(model, own, train_dataset=data, **arguments)
    trainer.train()
    return trainer


class Witness(GradMixTrainer):
    """Computes every loss a second time, by ``select_pairs`` and the passes of single samples and their partners."""

    def __init__(self, *args, reference, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.reference, self.own_generator, self.rejections, self.steps = reference, generator(), 0, 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        before = {name: value.clone() for name, value in inputs.items()}
        y = before.pop("labels")
        marks = before.pop("replayed", None)
        inner = self.model
        reference = self.reference if marks is None else marks
        pairs = gradmix.select_pairs(inner, reference, (before, y), generator=self.own_generator)
        self.rejections += int((~pairs.helpful).sum())
        with torch.no_grad():
            mixed = F.cross_entropy(
                self.mixed_logits(inner, before, pairs),
                pairs.mix_labels(),
                label_smoothing=self.args.label_smoothing_factor,
            )
            own = F.cross_entropy(inner(**before).logits, y, label_smoothing=self.args.label_smoothing_factor)
        loss = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        torch.testing.assert_close(loss.detach(), (own + mixed) / 2 if self._originals else mixed)
        assert all(torch.equal(inputs[name], value) for name, value in before.items()), "the batch is left as it was"
        self.steps += 1
        return loss

    def mixed_logits(self, model, x, pairs):
        if "input_ids" not in x:
            return model(**pairs.mix()[0]).logits
        # One text at a time, each with its own mask and without padding.
        features = []
        for ids, mask in zip(x["input_ids"], x["attention_mask"], strict=True):
            length = int(mask.sum())
            pooled = model.bert(input_ids=ids[None, :length], attention_mask=mask[None, :length])
            features.append(pooled.pooler_output[0])
        h = torch.stack(features)
        return model.classifier(pairs.lam[:, None] * h + (1 - pairs.lam[:, None]) * h[pairs.partner])


CASES = {
    "texts": (bert, texts, 0.0),
    "texts, smoothed labels": (bert, texts, 0.1),
    "images": (vit, images, 0.0),
    "images, smoothed labels": (vit, images, 0.1),
    "vectors": (Plain, vectors, 0.0),
}


@pytest.mark.parametrize("originals", [True, False])
@pytest.mark.parametrize(("model", "samples", "smoothing"), CASES.values(), ids=CASES)
def test_every_loss_is_that_of_the_selected_pairs(model, samples, smoothing, originals, tmp_path) -> None:
    buffer = samples(0, 10)
    trainer = train(
        model(),
        items(samples(1)) + items(buffer),
        tmp_path,
        kind=Witness,
        settings={"label_smoothing_factor": smoothing},
        reference=buffer,
        replay_dataset=items(buffer),
        originals=originals,
        gradmix={"generator": generator()},
    )
    assert trainer.steps == 4 and trainer.rejections > 0


def test_marks_in_the_batches(tmp_path) -> None:
    data = items(texts(1), replayed=torch.zeros(24, dtype=torch.bool))
    data += items(texts(0, 10), replayed=torch.ones(10, dtype=torch.bool))
    arguments = {"settings": {"remove_unused_columns": False}, "gradmix": {"generator": generator()}}
    trainer = train(bert(), data, tmp_path, kind=Witness, reference=None, **arguments)
    assert trainer.steps == 4 and trainer.rejections > 0


@pytest.mark.parametrize(
    "buffer",
    [lambda s: s, lambda s: items(s), lambda s: filled(s)],
    ids=["a pair", "dicts", "a ReplayBuffer"],
)
def test_every_buffer_gives_the_same_reference(buffer, tmp_path) -> None:
    samples, model = texts(0, 10), bert()
    expected = gradmix.reference_gradient(model, samples)
    trainer = GradMixTrainer(model, arguments_of(tmp_path), replay_dataset=buffer(samples))
    trainer._of(model).select(*texts(1, 8))
    torch.testing.assert_close(trainer.mixup.reference, expected)


def arguments_of(folder):
    return TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)


def filled(samples):
    buffer = gradmix.ReplayBuffer(capacity=20)
    buffer.add(*samples)
    return buffer


def gradients(model, folder, accumulate, **arguments):
    """The change of the weights in one step of plain gradient descent over 16 samples."""
    model = copy.deepcopy(model)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    settings = {
        "gradient_accumulation_steps": accumulate,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    data = [items(vectors(1, 8))[0]] * (8 * accumulate)
    train(model, data, folder, steps=1, settings=settings, **arguments)
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


def test_accumulated_gradients_are_a_mean_also_where_forward_takes_any_keyword(tmp_path) -> None:
    """Batches of one and the same sample: a step over four of them is a step over one."""
    arguments = {"replay_dataset": items(vectors(0, 6))}
    one, four = (gradients(Plain(), tmp_path, steps, **arguments) for steps in (1, 4))
    assert one.abs().max() > 1e-4
    torch.testing.assert_close(four, one)


def test_mixed_precision(tmp_path) -> None:
    dtypes, model = set(), bert()
    model.classifier.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    train(model, items(texts(1)), tmp_path, settings={"bf16": True}, replay_dataset=items(texts(0, 6)))
    assert dtypes == {torch.bfloat16}


def test_evaluation_is_left_alone(tmp_path) -> None:
    trainer = train(bert(), items(texts(1)), tmp_path, replay_dataset=items(texts(0, 6)))
    pairs = trainer.mixup.pairs
    x, y = texts(1)
    found = trainer.evaluate(items((x, y)))["eval_loss"]
    with torch.no_grad():
        assert found == pytest.approx(float(F.cross_entropy(trainer.model(**x).logits, y)), rel=1e-4)
    assert trainer.mixup.pairs is pairs


def test_outputs_are_those_of_the_originals(tmp_path) -> None:
    model = bert().train()
    for originals in (True, False):
        trainer = GradMixTrainer(model, arguments_of(tmp_path), replay_dataset=[], originals=originals)
        x, y = texts(1, 8)
        loss, outputs = trainer.compute_loss(model, {**x, "labels": y}, return_outputs=True)
        assert loss.requires_grad and torch.equal(outputs.logits, model(**x).logits)


WRONG = {
    "no buffer and no marks": ({}, {}, ValueError, "replay_dataset: got None"),
    "label vectors": ({"labels": torch.zeros(8, CLASSES)}, {"replay_dataset": []}, ValueError, "labels: got"),
    "no labels": ({"labels": None}, {"replay_dataset": []}, ValueError, "labels: got NoneType"),
}


@pytest.mark.parametrize(("change", "arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_batches_are_refused(change, arguments, error, message, tmp_path) -> None:
    x, y = texts(1, 8)
    model = bert().train()
    trainer = GradMixTrainer(model, arguments_of(tmp_path), **arguments)
    with pytest.raises(error, match=message):
        trainer.compute_loss(model, {**x, "labels": y, **change})


def test_wrong_arguments_are_refused(tmp_path) -> None:
    with pytest.raises(TypeError, match="alpa"):
        GradMixTrainer(bert(), arguments_of(tmp_path), gradmix={"alpa": 1.0})
    with pytest.raises(ValueError, match="compute_loss_func: got a function, expected None"):
        GradMixTrainer(bert(), arguments_of(tmp_path), compute_loss_func=lambda *_, **__: 0)


def test_two_tasks_are_learnt(tmp_path) -> None:
    """The buffer is empty in the first task; then it is assigned anew. Dropout is on."""
    torch.manual_seed(0)
    model = bert(dropout=0.1)
    trainer = train(model, items(texts(0, 40)), tmp_path, steps=60, replay_dataset=[])
    assert trainer.mixup.reference is None and trainer.mixup.pairs.helpful.all()
    buffer = items(texts(0, 10))
    trainer.train_dataset, trainer.replay_dataset = items(texts(1, 40)) + buffer, buffer
    trainer.args.max_steps = 100
    trainer.train()
    assert trainer.mixup.reference is not None
    (old, old_y), (new, new_y) = texts(0), texts(1)
    x, y = {name: torch.cat([old[name], new[name]]) for name in old}, torch.cat([old_y, new_y])
    with torch.no_grad():
        assert (model.eval()(**x).logits.argmax(1) == y).float().mean() > 0.8
