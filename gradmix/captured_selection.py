"""A selection as one captured graph: where ``cuda_graph="auto"`` captures, and what ``gradmix calibrate`` measures.

Measured is what follows the samples' forward pass: all pairs are scored by the estimator ``feature``, and partners are
drawn. Its two implementations are the calls, and the graph that is captured of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradmix.calibration.lookup import CalibratedWorth, Extent
from gradmix.estimators import Network
from gradmix.estimators.feature import Feature
from gradmix.labelled_samples import HeadSamples
from gradmix.mixtures import Mixtures
from gradmix.ops.backends import Backend, Operator, get_backend
from gradmix.references import Reference
from gradmix.runtime import cuda_graphs
from gradmix.runtime.cuda_graphs import Graphs, Inputs, call
from gradmix.selector import Rule, Selector


class MeasuredGraphs(Graphs):
    """Graphs where they were measured to be right and faster on the device; calls elsewhere."""

    _captures = False
    """The verdict on the last selection."""

    def __call__(self, function: Callable[..., Any], inputs: Inputs) -> Any:
        """See :class:`gradmix.runtime.cuda_graphs.Graphs`. What has no sizes of its own follows the last selection."""
        mixtures = _mixtures_in(inputs)
        if mixtures is not None:
            self._captures = _is_worth_capturing(mixtures)
        return super().__call__(function, inputs) if self._captures else function(*inputs)


def _mixtures_in(inputs: Inputs) -> Mixtures[Any] | None:
    """Return the mixtures that a selection, perhaps with checks, is called with; None: there are none."""
    first = inputs[0]
    while isinstance(first, tuple) and first:
        first = first[0]
    return first if isinstance(first, Mixtures) else None


def _is_worth_capturing(mixtures: Mixtures[Any]) -> bool:
    batch = mixtures.batch
    # Verdicts are about the implementations that ``auto`` chooses, and about scores of pairs, which need features.
    if not isinstance(batch, HeadSamples) or not cuda_graphs.supports(batch.features.device):
        return False
    return get_backend() == "auto" and _WORTH(batch.features, batch.logits, batch.y, len(mixtures.partners)) is None


def _extent(features: Tensor, logits: Tensor, labels: Tensor, candidates: int, *_: Tensor) -> Extent:
    kind = "label vectors" if labels.is_floating_point() else "class indices"
    return features.device, features.dtype, kind, len(features), candidates, logits.shape[1], features.shape[1]


_WORTH = CalibratedWorth("selection", "cuda_graph", ("samples", "samples", "classes", "features"), _extent)
_SELECTOR = Selector(Feature(Network(nn.Identity(), None, None, 1, "auto")), Rule("sample", 0.0, "uniform"))
_GRAPHS = Graphs()


def _select_by(run: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the measured function, with the selector called by ``run``.

    It returns partners, (N,) int64, and whether there are some, (N,) bool. Its arguments are features (N, d), logits
    (N, C), labels, the number of candidates, which are the samples themselves, the reference (C, d + 1), and the random
    numbers of the draw, (N,).
    """

    def select(
        features: Tensor, logits: Tensor, labels: Tensor, _candidates: int, reference: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor]:
        samples = HeadSamples(None, labels, features, logits)
        mixtures = Mixtures(samples, None, 0.3, logits.shape[1], 1)
        decision = run(_SELECTOR, (mixtures, numbers, Reference(reference)))
        return decision.partner, decision.helpful

    return select


def _unavailable_reason() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA or ROCm device is visible to torch"


def _can_run(features: Tensor, *_: Any) -> str | None:
    if cuda_graphs.supports(features.device):
        return None
    return f"it serves GPUs, and the samples are on {features.device}"


OPERATOR = Operator(
    "selection",
    (
        Backend(
            "cuda_graph",
            _select_by(_GRAPHS),
            can_run=_can_run,
            available=_unavailable_reason,
            worth=_WORTH,
        ),
        Backend("torch", _select_by(call)),
    ),
)
"""The calls of a selection (``torch``), and their graph."""
