"""A Lightning callback that mixes the batches of training."""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence
from typing import Any

from gradmix.integrations._adapting import check_settings, not_installed, selects_for
from gradmix.mixer import GradMix
from gradmix.model.inputs import concatenate
from gradmix.model.unchanged import unwrap
from gradmix.ops.labels import dense_labels
from gradmix.replay.sources import SampleSource

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError as error:
    raise not_installed(__name__, "pip install lightning", error) from error


class GradMixCallback(Callback):
    """Mix every training batch before ``training_step`` gets it.

    ::

        trainer = Trainer(callbacks=[GradMixCallback(buffer)])

    The batch's labels become label vectors (N, C), which ``F.cross_entropy(self(x), y)`` takes; a metric of hard labels
    takes ``y.argmax(1)``. With originals, a batch of N samples becomes one of 2 N: the samples as they are, then the
    mixed ones, so that a mean loss weighs both alike. Other entries of the batch stay as they are.

    Under mixed precision, the selection's forward pass has the trainer's precision. With accumulated gradients each
    batch is mixed by itself; the model does not change within a step, so that ``refresh=accumulate_grad_batches`` saves
    passes over the buffer. Validation, testing and prediction are left alone. Checkpoints hold the state of the
    selection, as :meth:`gradmix.GradMix.state_dict`.

    Args:
        buffer: as :class:`gradmix.GradMix`: the replay buffer, read at every refresh; None: the batch has an entry that
            marks replayed samples. While it is empty, all pairs may be mixed.
        x, y: index or key of the inputs and of the labels in the batch, a list or a dict.
        replayed: index or key of the marks of replayed samples, (N,) bool; None: there are none.
        model: name of the network in the LightningModule, which returns logits (N, C); None: the LightningModule's own
            ``forward`` returns them.
        originals: whether to train on the unmixed samples too.
        **settings: keyword arguments of :class:`gradmix.GradMix`.

    Attributes:
        mixup: the :class:`gradmix.GradMix`; None before the first batch.

    Raises:
        ValueError, TypeError: as :class:`gradmix.GradMix`; or there is neither a buffer nor an entry of marks.
    """

    def __init__(
        self,
        buffer: SampleSource | None,
        *,
        x: int | str = 0,
        y: int | str = 1,
        replayed: int | str | None = None,
        model: str | None = None,
        originals: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        check_settings(settings)
        if buffer is None and replayed is None:
            raise ValueError("buffer: got None, expected a buffer, or replayed=, the batch's entry of marks")
        self._buffer, self._settings = buffer, settings
        self._x, self._y, self._replayed = x, y, replayed
        self._name, self._originals = model, originals
        self._state: dict[str, Any] | None = None
        self.mixup: GradMix | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refresh what is kept between steps at the next batch: the task, and with it the buffer, may be new."""
        if self.mixup is not None:
            self.mixup.start_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put mixed samples in the places of the batch's inputs and labels.

        Args:
            trainer: the trainer.
            pl_module: the LightningModule.
            batch: a list or dict with x (N, ...) and y, (N,) class indices or (N, C) label vectors.
            batch_idx: unused.

        Raises:
            TypeError: the batch is neither a list nor a dict, so that nothing can be put in its places.
            ValueError, TypeError: as :meth:`gradmix.GradMix.select`.
        """
        if not isinstance(batch, (MutableSequence, MutableMapping)):
            raise TypeError(
                f"batch: got {type(batch).__name__}, expected a list or a dict, in which a callback can put mixed "
                "samples; a collate_fn may return [x, y]"
            )
        entries: Any = batch
        mixup = self._of(pl_module)
        x, y = entries[self._x], entries[self._y]
        marks = None if self._replayed is None else entries[self._replayed]
        with trainer.precision_plugin.forward_context():
            pairs = mixup.select(x, y, replayed=marks)
        mixed_x, mixed_y = pairs.mix()
        if self._originals:
            own = dense_labels(pairs.batch.y, pairs.num_classes, mixed_y.dtype)
            mixed_x, mixed_y = concatenate([x, mixed_x]), concatenate([own, mixed_y])
        entries[self._x], entries[self._y] = mixed_x, mixed_y

    def _of(self, module: LightningModule) -> GradMix:
        model = unwrap(module if self._name is None else module.get_submodule(self._name))
        if not selects_for(self.mixup, model):
            if self._name is None and type(module).forward is LightningModule.forward:
                raise ValueError(
                    f"model: got None for {type(module).__name__}, which has no forward, expected the name of the "
                    "network in it, which returns logits, such as model='net'"
                )
            self.mixup = GradMix(model, self._buffer, **self._settings)
            if self._state is not None:
                self.mixup.load_state_dict(self._state)
                self._state = None
        return self.mixup

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the selection, empty before the first batch."""
        return {} if self.mixup is None else self.mixup.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state of :meth:`state_dict` for the first batch."""
        self._state = state_dict or None
