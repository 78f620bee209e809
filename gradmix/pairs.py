"""The result of a selection: partners, mixing weights, and the mixtures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradmix._moved import alias_attribute
from gradmix.criteria import Alignment
from gradmix.estimators.base import Screening
from gradmix.labelled_samples import LabelledSamples
from gradmix.mixtures import labels_dtype
from gradmix.model.inputs import InputTree, check_alike, check_inputs, floating_dtype, mix_trees, take
from gradmix.ops.labels import as_class_indices, check_label_range, dense_labels
from gradmix.ops.mix_labels import mix_labels
from gradmix.ops.mix_samples import mix_samples
from gradmix.runtime.deferred_checks import can_sync


@dataclass(frozen=True, eq=False)
class Pairs:
    """The partner chosen for each of N samples among M candidates.

    Attributes:
        partner: (N,) int64, index of the candidate; without a partner the sample's own index, or 0 if candidates were
            given.
        lam: (N,) weight of the sample itself; 1 where it has no partner.
        helpful: (N,) bool, whether the sample has a partner.
        alignment: cosines of the mixtures' gradients with the reference gradient: (N, M), or (P, P) by class; NaN where
            a mixture was not evaluated, 0 throughout while the buffer is empty. Where no decision needed them they are
            computed when they are first read, from the features and logits of the selection.
        classes: None, or (P,) int64 class labels of ``alignment``: those of the samples; or of a kept class table, if
            it has no more classes than there are samples.
        num_classes: length of a mixed label vector.
        screening: None, or for the estimator ``sketch`` how many pairs were scored by sketches, how many of them again
            by forwarded mixtures, and how many are in doubt (:class:`gradmix.estimators.Screening`).
    """

    partner: Tensor
    lam: Tensor
    helpful: Tensor
    num_classes: int
    _alignment: Alignment | Callable[[], Alignment] = field(repr=False)
    _batch: LabelledSamples = field(repr=False)
    _candidates: LabelledSamples | None = field(repr=False)
    screening: Screening | None = None

    @cached_property
    def _full_alignment(self) -> Alignment:
        return self._alignment() if callable(self._alignment) else self._alignment

    @cached_property
    def _compact(self) -> Alignment:
        # Only on request, as the host waits for a GPU to learn the number of classes.
        return self._full_alignment.compact()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles: with the alignment in place of the function that computes it."""
        return {**vars(self), "_alignment": self._full_alignment}

    @property
    def alignment(self) -> Tensor:
        """Cosines of the mixtures' gradients with the reference gradient, (N, M), or (P, P) by class."""
        return self._compact.cosine

    @property
    def classes(self) -> Tensor | None:
        """Class labels of :attr:`alignment`, (P,) int64 in ascending order, or None."""
        return self._compact.classes

    def __len__(self) -> int:
        return len(self.partner)

    @property
    def batch(self) -> LabelledSamples:
        """The batch that the pairs were selected for."""
        return self._batch

    @property
    def candidates(self) -> LabelledSamples:
        """The candidates, or the batch itself."""
        return self._batch if self._candidates is None else self._candidates

    def by_pair(self, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the decisions for each pair of samples, also if the criterion is ``class``.

        Args:
            threshold: smallest cosine of a helpful mixture.

        Returns:
            (N, M) bool, whether the mixture of sample i and candidate j is helpful; and (N, M), its cosine or that of
            its classes, NaN where none was evaluated.
        """
        return self._full_alignment.by_pair(self._batch.y, self.candidates.y, threshold)

    by_row = alias_attribute("Pairs", "by_row", "by_pair")

    def mix(self, x: InputTree | None = None, y: Tensor | None = None) -> tuple[Any, Tensor]:
        """Return the mixed samples, lam x_i + (1 - lam) x_partner, with labels mixed in the same way.

        In a mapping, tuple or list of tensors, those of a floating-point dtype are mixed; the others must be equal for
        a sample and its partner, and stay.

        Args:
            x: (N, ...) to mix in place of the batch's inputs, for instance normalised ones or embeddings. Given
                candidates keep their own inputs, so that the shapes must agree.
            y: (N,) or (N, C) in place of the batch's labels.

        Returns:
            x (N, ...) of the input's dtype, a mapping as a dict; y (N, num_classes) label vectors, float64 for float64
            inputs, else float32.

        Raises:
            TypeError: inputs that cannot be mixed, such as token ids; see :func:`gradmix.mixed_forward`.
            ValueError: a wrong number of samples, or shapes that do not fit.
        """
        own = self._samples(x, y)
        other = own if self._candidates is None else self._candidates
        if self._candidates is not None and floating_dtype(own.x) is not None:
            check_alike("x", own.x, other.x, "the candidates")
        mixed = mix_trees(own.x, other.x, self.partner, self.lam)
        return mixed, self._mixed_labels(own, other)

    def mix_labels(self, y: Tensor | None = None) -> Tensor:
        """Return the labels of the mixed samples, for inputs that are mixed elsewhere (:func:`gradmix.mixed_forward`).

        Args:
            y: (N,) or (N, C) in place of the batch's labels, as in :meth:`mix`.

        Returns:
            (N, num_classes) label vectors, float64 for float64 inputs, else float32.

        Raises:
            ValueError: a wrong number of samples.
        """
        own = self._samples(None, y)
        return self._mixed_labels(own, own if self._candidates is None else self._candidates)

    def other_x(self, x: InputTree | None = None) -> Any:
        """Return each sample's partner, (N, ...), unmixed; without one, the sample itself or the first given candidate.

        Args:
            x: (N, ...) in place of the batch's inputs, if partners come from the batch itself.

        Raises:
            ValueError: a wrong number of samples, or ``x`` with partners from given candidates.
        """
        if self._candidates is None:
            return take(self._samples(x, None).x, self.partner)
        if x is not None:
            count = check_inputs("x", x)
            raise ValueError(f"x: got {count} samples, expected None, as partners are among the candidates")
        return take(self._candidates.x, self.partner)

    def _mixed_labels(self, own: LabelledSamples, other: LabelledSamples) -> Tensor:
        dtype = labels_dtype(own.x)
        if not (own.y.is_floating_point() or other.y.is_floating_point()):
            return mix_labels(own.y, other.y, self.partner, self.lam.to(dtype), self.num_classes)
        y, other_y = (dense_labels(samples.y, self.num_classes, dtype) for samples in (own, other))
        return mix_samples(y, other_y, self.partner, self.lam)

    def as_tuple(self) -> tuple[Any, Tensor, Tensor, Tensor]:
        """``(x, y_a, y_b, lam)``: mixed inputs, both labels and lam (N,): loss = lam CE(y_a) + (1 - lam) CE(y_b)."""
        return self.mix()[0], self._batch.y, self.candidates.y[self.partner], self.lam

    def summary(self) -> dict[str, float]:
        """Return plain figures.

        Returns:
            ``samples``: their number (``rows`` is its former name); ``mixed``: how many have a partner,
            ``mixed_share``: their share, ``lam``: their weight (1 if there are none); of the evaluated mixtures, or
            class pairs, ``positive_share``: the share with a non-negative cosine, ``mean_cosine``: the mean; for the
            estimator ``sketch`` the counts ``screened``, ``rechecked`` and ``uncertain`` of
            :class:`gradmix.estimators.Screening`.
        """
        mixed = int(self.helpful.sum())
        known = self.alignment[~torch.isnan(self.alignment)]
        return {
            **({} if self.screening is None else asdict(self.screening)),
            "samples": len(self),
            "rows": len(self),
            "mixed": mixed,
            "mixed_share": mixed / len(self),
            "lam": float(self.lam[self.helpful][0]) if mixed else 1.0,
            "positive_share": float((known >= 0).double().mean()),
            "mean_cosine": float(known.double().mean()),
        }

    def _samples(self, x: InputTree | None, y: Tensor | None) -> LabelledSamples:
        """Return the batch with the given inputs and labels in place of its own."""
        samples = LabelledSamples(
            self._batch.x if x is None else x, self._batch.y if y is None else as_class_indices("y", y)
        )
        if y is not None and (samples.y.is_floating_point() or can_sync(samples.y.device)):
            check_label_range("y", samples.y, self.num_classes)
        for name, count in (("x", check_inputs("x", samples.x)), ("y", check_inputs("y", samples.y))):
            if count != len(self):
                raise ValueError(f"{name}: got {count} samples, expected the {len(self)} that pairs were selected for")
        return samples
