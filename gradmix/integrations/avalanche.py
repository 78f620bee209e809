"""An Avalanche plugin that puts mixed samples into the loss of a strategy with replay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradmix.integrations._adapting import capture_outputs, check_settings, not_installed, selects_for
from gradmix.mixer import GradMix
from gradmix.model.head_capture import HeadCapture
from gradmix.model.unchanged import unwrap

try:
    from avalanche.benchmarks import OnlineCLExperience
    from avalanche.core import SupervisedPlugin
    from avalanche.models import MultiTaskModule
    from avalanche.training.storage_policy import ExemplarsBuffer
    from avalanche.training.templates.update_type.sgd_update import SGDUpdate
except ModuleNotFoundError as error:
    raise not_installed(__name__, "pip install avalanche-lib", error) from error

REFRESH = 20
"""Steps between two passes over the buffer of a storage policy, whose samples are read one by one."""


class GradMixPlugin(SupervisedPlugin):
    """Train on selectively mixed samples, with any replay that puts stored samples into the mini-batches.

    ::

        plugins = [ReplayPlugin(mem_size=200), GradMixPlugin()]
        strategy = Naive(model=model, optimizer=optimizer, plugins=plugins)

    Replayed samples are those whose class is not in the present experience; their mean gradient is the reference. Where
    classes come back in later experiences that rule fails, and the plugin needs the storage policy, whose whole buffer,
    with its transformations of evaluation, then gives the reference. It is read anew in every experience, and
    when ``refresh`` steps have passed, by default 20; in online streams, whose experiences are a few samples each, by
    ``refresh`` alone. Until there are samples of earlier experiences, all pairs may be mixed.

    With originals the loss is (L(original) + L(mixed)) / 2, with L the strategy's criterion, which must take label
    vectors (N, C), as cross-entropy does. Pairs are selected from the outputs of the strategy's own forward pass;
    ``mb_x``, ``mb_y`` and ``mb_output`` stay those of the originals, for metrics and other plugins, which may add to
    the loss before or after. Without originals ``mb_x`` and ``mb_y`` are the mixed samples.

    An ``IncrementalClassifier`` may grow, and mask units that no sample has had yet. Models with one classifier for
    each task label are refused: gradients of different classifiers have no parameters in common.

    Args:
        storage_policy: an ``ExemplarsBuffer``, such as ``replay.storage_policy``; None: by class.
        originals: whether to train on the unmixed samples too.
        **settings: keyword arguments of :class:`gradmix.GradMix`.

    Attributes:
        mixup: the :class:`gradmix.GradMix`; None before the first mini-batch.

    Raises:
        ValueError, TypeError: as :class:`gradmix.GradMix`; or ``storage_policy`` is no such policy.
    """

    def __init__(
        self, storage_policy: ExemplarsBuffer | None = None, *, originals: bool = True, **settings: Any
    ) -> None:
        super().__init__()
        check_settings(settings)
        if storage_policy is not None and not isinstance(storage_policy, ExemplarsBuffer):
            raise TypeError(
                f"storage_policy: got {type(storage_policy).__name__}, expected an ExemplarsBuffer of "
                "avalanche.training.storage_policy, such as ReplayPlugin's storage_policy"
            )
        self._policy, self._originals = storage_policy, originals
        self._settings = settings if storage_policy is None else {"refresh": REFRESH, **settings}
        self._classes: dict[int, set[int]] = {}
        self._capture: HeadCapture | None = None
        self._context: Any = None
        self.mixup: GradMix | None = None

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse strategies and models that the plugin cannot serve exactly.

        Raises:
            TypeError: the strategy does not train by ``loss += criterion()``, or the model has classifiers by task.
        """
        if getattr(type(strategy), "training_epoch", None) is not SGDUpdate.training_epoch:
            raise TypeError(
                f"strategy: got {type(strategy).__name__}, whose training_epoch computes a loss of its own, expected "
                "one that trains by strategy.criterion(), such as Naive with ReplayPlugin"
            )
        if isinstance(unwrap(strategy.model), MultiTaskModule):
            raise TypeError(
                f"strategy.model: got {type(unwrap(strategy.model)).__name__}, which has a classifier for each task, "
                "expected one classifier for all classes, such as IncrementalClassifier"
            )

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Note the experience's classes, and let the next selection read the buffer anew.

        Raises:
            ValueError: without a storage policy, classes of an earlier experience come back.
        """
        if self.mixup is not None and not isinstance(strategy.experience, OnlineCLExperience):
            self.mixup.start_epoch()
        if self._policy is not None:
            return
        experience, number = _whole_experience(strategy.experience)
        if not hasattr(experience, "classes_in_this_experience"):
            raise ValueError(
                f"experience: got {type(experience).__name__} without classes_in_this_experience, expected them, as of "
                "avalanche.benchmarks.with_classes_timeline(benchmark), or storage_policy= of the plugin"
            )
        classes = self._classes[number] = set(experience.classes_in_this_experience)
        again = sorted(classes & set().union(*(c for n, c in self._classes.items() if n != number)))
        if again:
            raise ValueError(
                f"storage_policy: got None, but classes of earlier experiences come back ({again[:8]}), so that "
                "their class does not mark replayed samples, expected the policy that stores them, such as "
                "replay.storage_policy"
            )

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Begin an epoch of the selection, for ``refresh="epoch"``."""
        if self.mixup is not None and self._settings.get("refresh") == "epoch":
            self.mixup.start_epoch()

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Record the coming pass; without originals mix the mini-batch."""
        mixup = self._of(strategy.model)
        if not self._originals:
            pairs = mixup.select(strategy.mb_x, strategy.mb_y, replayed=self._marks(strategy))
            strategy.mbatch[0], strategy.mbatch[1] = pairs.mix()
            return
        self._context = capture_outputs(mixup, strategy.model, strategy.mb_x)
        self._capture = self._context.__enter__()

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        """End the record."""
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Put the loss of the mixed samples in the place of half the originals'."""
        if not self._originals:
            return
        outputs, self._capture = None if self._capture is None else self._capture.output, None
        pairs = self._of(strategy.model).select(
            strategy.mb_x, strategy.mb_y, outputs=outputs, replayed=self._marks(strategy)
        )
        x, y = pairs.mix()
        mixed = strategy._criterion(strategy.model(x), y)
        strategy.loss = strategy.loss + (mixed - strategy.criterion()) / 2

    def _of(self, model: nn.Module) -> GradMix:
        if not selects_for(self.mixup, model):
            self.mixup = GradMix(model, None if self._policy is None else self._samples, **self._settings)
        return self.mixup

    def _samples(self) -> _Samples:
        """Return the storage policy's samples of now; many policies make a new data set for every read."""
        assert self._policy is not None
        return _Samples(self._policy.buffer)

    def _marks(self, strategy: Any) -> Tensor | None:
        """Return (N,) bool, which of the mini-batch's samples have a class of an earlier experience."""
        if self._policy is not None:
            return None
        _, number = _whole_experience(strategy.experience)
        y = strategy.mb_y
        return ~torch.isin(y, torch.tensor(sorted(self._classes[number]), device=y.device))


class _Samples:
    """The samples (x, y) of an Avalanche data set, whose entries have more after them, such as a task label."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.eval() if len(dataset) else dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x, y, *_ = self._dataset[index]
        return x, y


def _whole_experience(experience: Any) -> tuple[Any, int]:
    """Return the experience that an online one is a part of, or itself, and its number in the stream."""
    if getattr(experience, "access_task_boundaries", True):
        experience = getattr(experience, "origin_experience", experience)
    return experience, int(experience.current_experience)
