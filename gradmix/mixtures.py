"""The input of a selection: the checked arguments (:class:`Request`), and all mixtures of two sets of samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor

from gradmix.labelled_samples import AnySamples, LabelledSamples
from gradmix.model.head import HeadOutput
from gradmix.model.inputs import InputTree, floating_dtype
from gradmix.ops.dtypes import work_dtype
from gradmix.ops.mixed_alignment import Weight


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of one selection, checked and on one device.

    Attributes:
        batch: the samples to mix.
        candidates: the samples that partners come from; None: the batch itself, without the sample.
        outputs: the head's input and output for the batch, from an earlier pass; None: a pass is made.
        marked: (N,) bool, the samples whose mean gradient is the reference; None: the reference is given otherwise.
    """

    batch: LabelledSamples
    candidates: LabelledSamples | None = None
    outputs: HeadOutput | tuple[Tensor, Tensor] | None = None
    marked: Tensor | None = None

    @property
    def partners(self) -> LabelledSamples:
        """The candidates, or the batch itself."""
        return self.batch if self.candidates is None else self.candidates


def labels_dtype(x: InputTree) -> torch.dtype:
    """Return the dtype of mixed labels and weights: float64 for float64 inputs, else float32."""
    return work_dtype(floating_dtype(x) or torch.float32)


@dataclass(frozen=True, eq=False)
class Mixtures(Generic[AnySamples]):
    """All mixtures lam a + (1 - lam) b of a sample a of the batch and a candidate b.

    Attributes:
        batch: N samples.
        candidates: M samples; None: the batch itself.
        lam: weight of the batch's sample, a number in [0, 1] or a scalar tensor.
        num_classes: C, length of a label vector.
        chunk_size: samples of one forward pass.
        weights: dtype of the mixing weights that are returned (:func:`labels_dtype`).
    """

    batch: AnySamples
    candidates: AnySamples | None
    lam: Weight
    num_classes: int
    chunk_size: int
    weights: torch.dtype = torch.float32

    @property
    def own(self) -> bool:
        """Whether the partners come from the batch itself."""
        return self.candidates is None

    @property
    def partners(self) -> AnySamples:
        """The candidates, or the batch itself."""
        return self.batch if self.candidates is None else self.candidates

    def without_inputs(self) -> Mixtures[AnySamples]:
        """Return the mixtures without the samples' inputs."""
        candidates = None if self.candidates is None else self.candidates.without_inputs()
        return replace(self, batch=self.batch.without_inputs(), candidates=candidates)
