"""A mixin for Hugging Face's ``Trainer``: classification of texts or images, with mixed samples in the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradmix.integrations._adapting import capture_outputs, check_settings, selects_for
from gradmix.mixer import GradMix
from gradmix.model.head import logits_of
from gradmix.model.inputs import tensors_of
from gradmix.model.mixed_forward import mixed_forward
from gradmix.pairs import Pairs
from gradmix.replay.sources import CHUNK, SampleSource

LABELS, MARKS = "labels", "replayed"


class GradMixMixin:
    """Selective Mixup in ``Trainer.compute_loss``; a mixin, so that it serves ``Trainer`` and any subclass.

    ::

        class GradMixTrainer(GradMixMixin, Trainer): ...


        trainer = GradMixTrainer(model, args, train_dataset=data, replay_dataset=buffer)

    Inputs of floating-point numbers alone, as ``pixel_values``, are mixed as they are. Others, as token ids with their
    attention mask, are mixed at the classifier's input: every sample is encoded by itself, with a mask of its own, and
    the mixture is what the estimator ``feature`` judges.

    The loss is the mean over the batch, divided by the accumulation steps. With originals, half of it is the model's
    own loss of the unmixed samples, from whose forward pass pairs are selected. ``label_smoothing_factor`` holds for
    both halves. Evaluation is left alone.

    Args:
        *args: the trainer's.
        **kwargs: the trainer's.
        replay_dataset: the buffer of samples of earlier tasks: a data set of dicts, as ``train_dataset``, which the
            trainer's ``data_collator`` makes batches of; or any buffer that :class:`gradmix.GradMix` takes, with a dict
            of tensors as x. It may be assigned anew. While it is empty, all pairs may be mixed. None: batches have
            marks of their replayed samples, ``replayed`` (N,) bool, which needs ``remove_unused_columns=False``.
        originals: whether to train on the unmixed samples too.
        gradmix: keyword arguments of :class:`gradmix.GradMix`.

    Attributes:
        mixup: the :class:`gradmix.GradMix`; None before the first step.

    Raises:
        ValueError, TypeError: as :class:`gradmix.GradMix`; or the trainer has a loss function of its own, which gets
            class indices.
    """

    args: Any
    data_collator: Any

    def __init__(
        self,
        *args: Any,
        replay_dataset: SampleSource | None = None,
        originals: bool = True,
        gradmix: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._settings = dict(gradmix or {})
        check_settings(self._settings)
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if getattr(trainer, "compute_loss_func", None) is not None:
            raise ValueError(
                "compute_loss_func: got a function, expected None, as mixed samples have label vectors (N, C)"
            )
        # The loss is a mean over the batch, which the trainer then divides by the accumulation steps. Models that take
        # any keyword would be asked for a sum over all batches of the step instead, which few classifiers return.
        trainer.model_accepts_loss_kwargs = False
        self.replay_dataset, self._originals = replay_dataset, originals
        self.mixup: GradMix | None = None

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the loss of a batch, in training with mixed samples in it.

        Args:
            model: the model, possibly wrapped.
            inputs: the model's arguments (N, ...), ``labels`` (N,) among them, possibly ``replayed`` (N,) bool.
            return_outputs: whether to return the model's outputs, too: those of the unmixed samples.
            **kwargs: the trainer's.

        Raises:
            ValueError, TypeError: as :meth:`gradmix.GradMix.select`; or the labels are no class indices.
        """
        trainer: Any = super()
        own = {name: value for name, value in inputs.items() if name != MARKS}
        if not model.training:
            return trainer.compute_loss(model, own, return_outputs=return_outputs, **kwargs)
        y = own.get(LABELS)
        if not isinstance(y, Tensor) or y.ndim != 1 or y.is_floating_point():
            got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"labels: got {got}, expected class indices (N,)")
        x = {name: value for name, value in own.items() if isinstance(value, Tensor) and name != LABELS}
        mixup = self._of(model)
        loss: Any = None
        outputs = selected = None
        if self._originals or return_outputs:
            with capture_outputs(mixup, model, x) as capture:
                loss, outputs = trainer.compute_loss(model, own, return_outputs=True, **kwargs)
            selected = None if capture is None else capture.output
        pairs = mixup.select(x, y, outputs=selected, replayed=inputs.get(MARKS))
        mixed = F.cross_entropy(
            self._mixed_logits(model, x, pairs), pairs.mix_labels(), label_smoothing=self.args.label_smoothing_factor
        )
        loss = (loss + mixed) / 2 if self._originals else mixed
        return (loss, outputs) if return_outputs else loss

    def _of(self, model: nn.Module) -> GradMix:
        if not selects_for(self.mixup, model):
            self.mixup = GradMix(model, self._read_buffer, **self._settings)
        return self.mixup

    def _mixed_logits(self, model: nn.Module, x: dict[str, Tensor], pairs: Pairs) -> Tensor:
        if all(leaf.is_floating_point() for leaf in tensors_of(x)):
            return logits_of(model(**pairs.mix()[0]))
        head = self._settings.get("head")
        return mixed_forward(model, "feature", x, None, pairs.lam, partner=pairs.partner, head=head)

    def _read_buffer(self) -> Any:
        """Return the present buffer, of dicts with labels in them as batches (x, y)."""
        source: Any = self.replay_dataset
        if source is None:
            raise ValueError(
                "replay_dataset: got None and a batch without marks, expected the samples of earlier tasks (an empty "
                f"list while there are none), or {MARKS!r}, (N,) bool, in every batch"
            )
        if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")) or len(source) == 0:
            return source
        if isinstance(source, tuple) or not isinstance(source[0], Mapping):
            return source
        return DataLoader(source, batch_size=CHUNK, collate_fn=self._collate)

    def _collate(self, samples: list[Any]) -> tuple[dict[str, Tensor], Tensor]:
        batch = dict(self.data_collator(samples))
        y = batch.pop(LABELS)
        return {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != MARKS}, y
