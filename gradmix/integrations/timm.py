"""A callable with the whole call shape of timm's ``Mixup`` and torchvision's ``MixUp``; it needs neither of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradmix.mixer import GradMix
from gradmix.model.inputs import map_tensors, tensors_of
from gradmix.replay.sources import SampleSource
from gradmix.runtime.workers import refuse_worker

LabelsGetter = Callable[[Any], Tensor]


class GradMixup(GradMix):
    """Selective Mixup in place of ``timm.data.Mixup`` or ``torchvision.transforms.v2.MixUp`` in a training loop.

    ::

        mixup_fn = GradMixup(model, buffer, num_classes=1000, label_smoothing=0.1)
        for x, y in loader:
            x, y = mixup_fn(x, y)

    It takes ``mixup_fn(x, y)``, ``mixup_fn((x, y, ...))`` and ``mixup_fn({"image": x, "label": y, ...})`` and returns
    the same structure. In a tuple or list, entries after the labels pass through unchanged. In a mapping, the input is
    made of all tensors but the labels: the tensor itself if there is one, else a dict of them, as the model's
    ``forward`` takes it; other values pass through. Unlike timm's, batches of an odd size are taken, and inputs are not
    written in place. Subclasses of tensors, as torchvision's ``Image``, keep their class.

    With ``mixup_enabled`` set to False, as timm's training script does for its last epochs, inputs are returned as they
    are, with label vectors.

    Call it in the training loop, and not as the collate function of a DataLoader with workers, as torchvision's guide
    and timm's ``FastCollateMixup`` do: their copy of the model is not trained. Such a call is refused.

    Args:
        model, buffer: as :class:`gradmix.GradMix`.
        label_smoothing: s in [0, 1): label vectors become (1 - s) y + s / C, as timm's.
        labels_getter: a function of the sample that returns the labels, one of its entries; or ``"default"``: the
            second entry of a tuple or list, in a mapping the entry ``labels`` in any case, else the first whose name
            contains ``label``, else ``target``.
        **settings: keyword arguments of :class:`gradmix.GradMix`.

    Raises:
        ValueError, TypeError: as :class:`gradmix.GradMix`; or ``label_smoothing`` is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        buffer: SampleSource | None,
        *,
        label_smoothing: float = 0.0,
        labels_getter: LabelsGetter | Literal["default"] = "default",
        **settings: Any,
    ) -> None:
        super().__init__(model, buffer, **settings)
        if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
            raise TypeError(f"label_smoothing: got {type(label_smoothing).__name__}, expected a number in [0, 1)")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: got {label_smoothing}, expected a number in [0, 1)")
        if labels_getter != "default" and not callable(labels_getter):
            raise ValueError(f"labels_getter: got {labels_getter!r}, expected 'default' or a function of the sample")
        self.label_smoothing = label_smoothing
        self._labels_getter = labels_getter

    def __call__(self, *sample: Any, replayed: Tensor | None = None) -> Any:
        """Return the sample with mixed inputs (N, ...) and label vectors (N, C) in their places.

        Args:
            *sample: x (N, ...) and y, (N,) class indices or (N, C) label vectors; or one tuple, list or mapping that
                contains them.
            replayed: (N,) bool, as :meth:`gradmix.GradMix.select`.

        Raises:
            ValueError, TypeError: as :class:`gradmix.GradMix`; or the sample has no labels.
            RuntimeError: called in a worker process of a DataLoader.
        """
        refuse_worker("GradMixup")
        given = sample[0] if len(sample) == 1 else sample
        labels = _default_labels(given) if self._labels_getter == "default" else self._labels_getter(given)
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels: got {type(labels).__name__}, expected a tensor (N,) or (N, C)")
        if isinstance(given, Mapping):
            return self._mix_mapping(given, labels, replayed)
        x, position = given[0], next((i for i, entry in enumerate(given) if entry is labels), None)
        if position is None or position == 0:
            raise ValueError("labels_getter: returned no entry after the first of the sample, expected one of them")
        entries = list(given)
        entries[0], entries[position] = self._mix(x, labels, replayed)
        if isinstance(given, list):
            return entries
        return type(given)(*entries) if hasattr(given, "_fields") else tuple(entries)

    def _mix_mapping(self, given: Mapping[str, Any], labels: Tensor, replayed: Tensor | None) -> dict[str, Any]:
        key = next((key for key, entry in given.items() if entry is labels), None)
        inputs = {name: entry for name, entry in given.items() if isinstance(entry, Tensor) and name != key}
        if key is None or not inputs:
            raise ValueError(
                f"sample: got the entries {', '.join(map(repr, given))}, expected labels among them and a tensor beside"
            )
        x: Any = next(iter(inputs.values())) if len(inputs) == 1 else inputs
        mixed, y = self._mix(x, labels, replayed)
        return {**given, **(dict.fromkeys(inputs, mixed) if len(inputs) == 1 else mixed), key: y}

    def _mix(self, x: Any, labels: Tensor, replayed: Tensor | None) -> tuple[Any, Tensor]:
        plain = map_tensors(_plain, x)
        mixed, y = super().__call__(plain, labels.as_subclass(Tensor), replayed=replayed)
        if self.label_smoothing:
            y = y * (1 - self.label_smoothing) + self.label_smoothing / y.shape[1]
        kinds = iter([type(leaf) for leaf in tensors_of(x)])
        return map_tensors(lambda leaf: leaf.as_subclass(next(kinds)), mixed), y


def _plain(leaf: Any) -> Any:
    return leaf.as_subclass(Tensor) if isinstance(leaf, Tensor) else leaf


def _default_labels(given: Any) -> Any:
    if isinstance(given, Mapping):
        names = [name for name in given if isinstance(name, str)]
        tests = (
            lambda name: name.lower() == "labels",
            lambda name: "label" in name.lower(),
            lambda name: "target" in name.lower(),
        )
        for test in tests:
            for name in filter(test, names):
                return given[name]
        raise ValueError(
            f"sample: got the entries {', '.join(map(repr, given))}, expected one whose name contains 'label' or "
            "'target', or labels_getter="
        )
    if isinstance(given, (tuple, list)) and len(given) > 1 and not isinstance(given, torch.Size):
        return given[1]
    kind = f"{type(given).__name__} of {len(given)}" if isinstance(given, (tuple, list)) else type(given).__name__
    raise TypeError(f"sample: got {kind}, expected x and y, or a tuple, list or mapping that contains them")
