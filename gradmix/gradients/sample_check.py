"""Whether each row of a batch is what it is by itself, and where the plan says: checked in every pass, on values.

What a model does to its rows may depend on what is in them, and cannot be told once and for all. So in every pass two
rows, other ones each time, are forwarded once more, by themselves and in the opposite order. What comes out of the
layers and of the model has to be what came out for them among the other rows. A layer's output at a row's place is
then that row's: it has not moved, as in a model that sorts its rows (two rows in the opposite order are not both in
order), and other rows do not influence it, whether autograd sees how or not (through ``detach()``, say). Of the first
batch of each shape the logits of all rows are compared, sqrt(N) rows at a time.

Where numbers differ by more than rounding, the reason is looked for: the rows are forwarded among other rows in a batch
of the same size, with the same random numbers. There they come out the same in a model that draws random numbers, or
that rounds to a grid.

What can escape:

- an influence smaller than the tolerance (:func:`tolerance_of`);
- an influence among a few of the rows, if it is not found in the first batch (two of N rows are forwarded together
  there with a probability of 1/sqrt(N), and others influence them as before), as long as none of these is looked at;
- an influence on gradients that no value shows, unless the probe or the backward passes of the first batch show it;
- in batches after the first, rows that change places by a key that is equal for the two rows looked at, by means that
  :mod:`gradmix.gradients.backward` does not see: it checks by gradients where the rows of a batch are if the model read
  other values than before, or moved entries by an index, but compiled code or a product with a permutation matrix is
  neither.

On a GPU, where two rows are forwarded in hardly less time than a batch of 32, the first 8 passes of a plan and then
every fourth are checked so. In a batch of one row there is nothing to check.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isqrt

import torch
from torch import Tensor, nn

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.intercept import Parameters, Watch
from gradmix.gradients.plan import (
    CoupledRowsError,
    MovedRowsError,
    OutdatedPlanError,
    Plan,
    forward,
)
from gradmix.gradients.rules.base import Rule
from gradmix.inputs import InputTree, first_tensor, num_samples
from gradmix.ops.dtypes import work_dtype
from gradmix.probe import RandomState

_COARSE = 0.25
"""Relative difference (of Euclidean norms) that is no matter of rounding."""


_EVERY_FIRST, _EVERY = 8, 4
"""On a GPU two rows cost as many launches as all: the first passes of a plan are checked, then every so many-th."""


class Follow(Watch):
    """Makes the calls of a plan, and keeps some rows of what comes out of those that are wanted.

    Args:
        parameters: what to look for.
        plan: the model's.
        samples: N, rows of the batch.
        kept: indices of the rows to be kept.
    """

    def __init__(self, parameters: Parameters, plan: Plan, samples: int, kept: Tensor) -> None:
        super().__init__(parameters)
        self.outputs: list[Tensor] = []
        self.dtypes: set[torch.dtype] = set()
        self._plan, self._samples, self._kept = plan, samples, kept
        self._wanted = set(plan.selected())
        self._next = 0

    def follow(self, rule: Rule) -> tuple[Tensor, BatchAxis | None]:
        """Make the call; returns what came out and, if the call is wanted, where the samples are in it.

        Raises:
            OutdatedPlanError: it is not the call that the plan says.
        """
        planned = self._plan.calls[self._next] if self._next < len(self._plan.calls) else None
        self._next += 1
        if planned is None or planned.rule is not type(rule) or planned.parameters != tuple(r.name for r in rule.refs):
            raise OutdatedPlanError("another call than planned")
        if planned.spread:
            rule.spread(self._samples)
        output = rule.run()
        self.dtypes.add(output.dtype)
        if not any(ref.name in self._wanted for ref in rule.refs):
            return output, None
        if planned.place is None or output.shape[planned.place.axis.dim] != self._samples * planned.place.folded:
            raise OutdatedPlanError(f"an output of shape {tuple(output.shape)} for {self._samples} rows")
        if len(self._kept):
            self.outputs.append(planned.place.axis.split(output.detach(), self._samples).index_select(0, self._kept))
        return output, planned.place.axis

    def seen(self, rule: Rule) -> Tensor:
        """Make the call."""
        return self.follow(rule)[0]

    def check_complete(self) -> None:
        """Raise unless all calls of the plan were met."""
        if self._next != len(self._plan.calls):
            raise OutdatedPlanError(f"{self._next} calls instead of {len(self._plan.calls)}")
        if tuple(value.shape for value in self.parameters.standardised) != self._plan.standardised:
            raise OutdatedPlanError("other calls of batch_norm than planned")


def rows_to_check(plan: Plan, samples: int, device: torch.device) -> list[int]:
    """Two rows of a batch, in their order, or one of two; none of a batch of one. Other ones in every pass."""
    plan.passes += 1
    if device.type == "cuda" and plan.verified and plan.passes > _EVERY_FIRST and plan.passes % _EVERY:
        return []
    return sorted(random.Random(plan.passes).sample(range(samples), min(2, samples - 1)))


def tolerance_of(outputs: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest entry, that batches of different sizes may make by rounding.

    Sums are added up in another order then. In half precision it is 16 of its steps, and in float32 2e-4, or 1e-2 where
    a GPU may round to TensorFloat-32 what it multiplies; in float64 1e-6, since parts may be of float32.
    """
    worst = max((torch.finfo(output.dtype).eps for output in outputs), default=0.0)
    if worst > torch.finfo(torch.float32).eps:
        return 16 * worst
    if any(output.is_cuda for output in outputs):
        return 1e-2
    return 2e-4 if worst == torch.finfo(torch.float32).eps else 1e-6


def check_rows(
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    plan: Plan,
    x: InputTree,
    logits: Tensor,
    outputs: Sequence[Tensor],
    rows: list[int],
    before: RandomState,
    *,
    all_rows: bool,
) -> None:
    """Check that rows of a batch come out the same by themselves; call it with autograd on.

    Args:
        model, plan: what was run.
        named: the model's trainable parameters.
        x: the batch.
        logits: (N, ...) what came out.
        outputs: of the calls that are wanted, what was kept for ``rows``.
        rows: those of :func:`rows_to_check`.
        before: the random number generators as they were before the pass.
        all_rows: whether to compare the logits of all rows.

    Raises:
        CoupledRowsError: the logits differ.
        MovedRowsError: only what is at the rows' places in some layer does.
        OutdatedPlanError: the model makes other calls for fewer rows.
    """
    logits = logits.detach()
    whole = [logits[rows], *outputs]
    check = _Check(model, named, plan, x, before, tolerance_of(whole))
    if all_rows and not plan.noisy:
        for part in _parts(len(logits)):
            difference = (logits[part] - check.logits(part)).abs().reshape(len(part), -1).nan_to_num(0.0).amax(1)
            if bool((difference > check.tolerance * logits.abs().amax()).any()):
                worst = part[int(difference.argmax())]
                check.explain([worst], [logits[[worst]]])
    if plan.noisy or _differ(whole, check.outputs(rows[::-1], range(len(rows))[::-1]), check.tolerance):
        check.explain(rows, whole)


def _parts(count: int) -> list[list[int]]:
    """All rows in parts of other mates and order than in the batch, about as many as each has rows."""
    order = random.Random(count).sample(range(count), count)
    parts = max(2, isqrt(count))
    return [order[first::parts] for first in range(min(parts, count))]


@dataclass
class _Check:
    """What :func:`check_rows` is given, with the tolerance."""

    model: nn.Module
    named: Mapping[str, nn.Parameter]
    plan: Plan
    x: InputTree
    before: RandomState
    tolerance: float

    def outputs(self, batch: Sequence[int], kept: Sequence[int]) -> list[Tensor]:
        """Logits and outputs at the places ``kept`` of a batch made of rows of x, by their indices."""
        index = torch.tensor(kept, device=first_tensor(self.x).device)
        logits, outputs = self._run(batch, index)
        return [logits[index], *outputs]

    def logits(self, batch: Sequence[int]) -> Tensor:
        """All logits of such a batch."""
        return self._run(batch, torch.empty(0, dtype=torch.int64, device="cpu"))[0]

    def _run(self, batch: Sequence[int], kept: Tensor) -> tuple[Tensor, list[Tensor]]:
        follow = Follow(Parameters(self.named), self.plan, len(batch), kept)
        with follow:
            logits = forward(self.model, self.x, torch.tensor(batch, device="cpu"))
        follow.check_complete()
        return logits.detach(), follow.outputs

    def explain(self, rows: list[int], whole: list[Tensor]) -> None:
        """Raise if ``rows``, for which ``whole`` came out, come out differently for another reason than rounding."""

        def found(batch: list[int], kept: Sequence[int]) -> list[Tensor]:
            self.before.restore()
            return self.outputs(batch, kept)[: len(whole)]

        # In a batch of the same size, at the same places: only the other rows are other ones.
        filled = [row if row in rows else rows[row % len(rows)] for row in range(num_samples(self.x))]
        _require_same(rows, whole, found(filled, rows), self.tolerance, inf, "rows around it")
        if self.before.has_moved():
            self.plan.noisy = True  # what it draws it does not draw for fewer rows
            return
        # At each other's places, and each row alone: that may change how sums are rounded, but not by much.
        for place, row in zip(rows, rows[::-1], strict=True):
            filled[place] = row
        _require_same(rows, whole, found(filled, rows[::-1]), _COARSE, 2.0, "order of the rows around it")
        alone = [torch.cat(parts) for parts in zip(*(found([row], [0]) for row in rows), strict=True)]
        _require_same(rows, whole, alone, _COARSE, 2.0, "number of rows around it")


def _require_same(
    rows: list[int], whole: list[Tensor], other: list[Tensor], tolerance: float, order: float, reason: str
) -> None:
    if not _differ(whole, other, tolerance, order):
        return
    if _differ(whole[:1], other[:1], tolerance, order):
        raise CoupledRowsError(
            f"model: the output of row {rows[0]} depends on the {reason}, expected rows that do not influence each "
            "other, so that each has a gradient of its own"
        )
    raise MovedRowsError(
        f"model: what a layer computes at the place of row {rows[0]} depends on the {reason}; rows seem to be sorted "
        "or routed, expected an order of rows that does not depend on what is in them"
    )


def _differ(whole: Sequence[Tensor], other: Sequence[Tensor], tolerance: float, order: float = inf) -> bool:
    """Whether a tensor of ``whole`` differs from that of ``other`` by more than ``tolerance`` of its norm.

    Not compared is what has another shape, as where a batch is cut to its longest row.
    """
    pairs = [(a, b) for a, b in zip(whole, other, strict=True) if a.shape == b.shape and a.numel()]
    if not pairs:
        return False
    first, second = ([t.to(work_dtype(t.dtype)) for t in side] for side in zip(*pairs, strict=True))
    sizes, differences = (_norms(values, order) for values in (first, torch._foreach_sub(first, second)))
    return bool((differences > tolerance * sizes).any())  # a NaN is not larger


def _norms(values: Sequence[Tensor], order: float) -> Tensor:
    if order == inf and not values[0].is_cuda:
        return torch.stack([value.abs().amax() for value in values])  # on a CPU an eighth of the time
    return torch.stack(torch._foreach_norm(list(values), order))
