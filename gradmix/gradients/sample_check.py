"""The check in every pass that samples have the same outputs alone, and are where the plan expects them.

The treatment of the samples may depend on their values, so that one check is not enough. In every pass two samples,
others each time, are forwarded once more, alone and in the opposite order. The outputs of the layers and of the model
must be the same as among the other samples. The output of a layer at a sample's place is then that of the sample: it
has not moved, as in a model that sorts its samples (two samples in the opposite order are not both in order), and other
samples do not influence it, whether autograd sees the influence or not (through ``detach()``, for example). For the
first batch of each shape the logits of all samples are compared, sqrt(N) samples at a time.

Where values differ by more than rounding, the cause is determined: the samples are forwarded among other samples in a
batch of the same size, with the same random numbers. There the outputs are the same in a model that draws random
numbers, or that rounds to a grid.

Not found are:

- an influence smaller than the tolerance (:func:`tolerance_of`);
- an influence among a few of the samples, if it is not found in the first batch (where two of N samples are forwarded
  together with a probability of 1/sqrt(N), and are then influenced as before), as long as none of these is checked;
- an influence on gradients that no value shows, unless the trace or the backward passes of the first batch show it;
- in batches after the first, samples that change places by a key that is equal for the two samples checked, in a way
  that :mod:`gradmix.gradients.backward` does not see. It verifies the places by gradients if the model has read other
  values than before, or has moved entries by an index; compiled code or a product with a permutation matrix does
  neither.

On a GPU, where two samples take almost as much time as a batch of 32, the first 8 passes of a plan and then every
fourth are checked. A batch of one sample is not checked.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isqrt

import torch
from torch import Tensor, nn

from gradmix.gradients.batch_axis import BatchAxis
from gradmix.gradients.exceptions import CoupledSamplesError, MovedSamplesError, OutdatedPlanError
from gradmix.gradients.intercept import Interceptor, Parameters
from gradmix.gradients.plan import Plan
from gradmix.gradients.rules import Rule
from gradmix.gradients.trace import forward
from gradmix.model.inputs import InputTree, first_tensor, num_samples
from gradmix.model.unchanged import RandomState
from gradmix.ops.dtypes import work_dtype

_COARSE = 0.25
"""Relative difference (of Euclidean norms) that rounding does not explain."""

_EVERY_FIRST, _EVERY = 8, 4
"""On a GPU, where two samples need as many launches as all: the first passes of a plan are checked, then every n-th."""


class PlannedCalls(Interceptor):
    """Makes the calls of a plan, and keeps the outputs of some samples in the calls of selected parameters.

    Args:
        parameters: the parameters to look for.
        plan: the model's.
        samples: N, batch size.
        kept: indices of the samples whose outputs are kept.

    Attributes:
        outputs: for each call of selected parameters, the kept outputs.
        dtypes: the dtypes of the outputs of all calls.
    """

    def __init__(self, parameters: Parameters, plan: Plan, samples: int, kept: Tensor) -> None:
        super().__init__(parameters)
        self.outputs: list[Tensor] = []
        self.dtypes: set[torch.dtype] = set()
        self._plan, self._samples, self._kept = plan, samples, kept
        self._wanted = set(plan.parameters())
        self._next = 0

    def run_planned(self, rule: Rule) -> tuple[Tensor, BatchAxis | None]:
        """Make the next call; return its output and, if its parameters are selected, its batch axis.

        Raises:
            OutdatedPlanError: the plan has another call here.
        """
        planned = self._plan.calls[self._next] if self._next < len(self._plan.calls) else None
        self._next += 1
        parameters = tuple(view.name for view in rule.views)
        if planned is None or planned.rule is not type(rule) or planned.parameters != parameters:
            raise OutdatedPlanError("another call than planned")
        if planned.expands_input:
            rule.expand_input(self._samples)
        output = rule.run()
        self.dtypes.add(output.dtype)
        if not any(name in self._wanted for name in parameters):
            return output, None
        axis = planned.batch_axis
        if axis is None or output.shape[axis.dim] != self._samples * axis.positions:
            raise OutdatedPlanError(f"an output of shape {tuple(output.shape)} for {self._samples} samples")
        if len(self._kept):
            self.outputs.append(axis.split(output.detach(), self._samples).index_select(0, self._kept))
        return output, axis

    def intercept(self, rule: Rule) -> Tensor:
        """Make the call."""
        return self.run_planned(rule)[0]

    def check_complete(self) -> None:
        """Check that all calls of the plan were made.

        Raises:
            OutdatedPlanError: a call is missing, or ``batch_norm`` was called otherwise.
        """
        if self._next != len(self._plan.calls):
            raise OutdatedPlanError(f"{self._next} calls instead of {len(self._plan.calls)}")
        if tuple(value.shape for value in self.parameters.standardised) != self._plan.standardised:
            raise OutdatedPlanError("other calls of batch_norm than planned")


def samples_to_check(plan: Plan, samples: int, device: torch.device) -> list[int]:
    """Return two samples of a batch, ascending and others in each pass; one for a batch of two, none for one."""
    plan.passes += 1
    if device.type == "cuda" and plan.verified and plan.passes > _EVERY_FIRST and plan.passes % _EVERY:
        return []
    return sorted(random.Random(plan.passes).sample(range(samples), min(2, samples - 1)))


def tolerance_of(outputs: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest entry, that rounding may cause between batch sizes.

    The batch size changes the order of sums. The tolerance is 16 units of rounding in half precision; 2e-4 in float32,
    or 1e-2 where a GPU may round factors to TensorFloat-32; 1e-6 in float64, since parts may be of float32.
    """
    worst = max((torch.finfo(output.dtype).eps for output in outputs), default=0.0)
    if worst > torch.finfo(torch.float32).eps:
        return 16 * worst
    if any(output.is_cuda for output in outputs):
        return 1e-2
    return 2e-4 if worst == torch.finfo(torch.float32).eps else 1e-6


@dataclass
class SampleCheck:
    """The check of a pass, which forwards samples of its batch again.

    Attributes:
        model: the model.
        named: its trainable parameters.
        plan: the model's plan.
        x: (N, ...) the batch.
        random_state: the random number generators before the pass.
        tolerance: largest relative difference by rounding.
    """

    model: nn.Module
    named: Mapping[str, nn.Parameter]
    plan: Plan
    x: InputTree
    random_state: RandomState
    tolerance: float = 0.0

    def check(self, samples: list[int], logits: Tensor, outputs: Sequence[Tensor], *, all_samples: bool) -> None:
        """Check that samples have the same outputs alone; call it with autograd on.

        Args:
            samples: those of :func:`samples_to_check`.
            logits: (N, ...) of the pass.
            outputs: the outputs of the calls of selected parameters, for ``samples``.
            all_samples: whether to compare the logits of all samples.

        Raises:
            CoupledSamplesError: the logits differ.
            MovedSamplesError: only the outputs at the samples' places in some layer differ.
            OutdatedPlanError: the model makes other calls for fewer samples.
        """
        logits = logits.detach()
        expected = [logits[samples], *outputs]
        self.tolerance = tolerance_of(expected)
        if all_samples and not self.plan.draws_random_numbers:
            self._check_all_logits(logits)
        reversed_order = range(len(samples))[::-1]
        if self.plan.draws_random_numbers or _differ(
            expected, self._outputs(samples[::-1], reversed_order), self.tolerance
        ):
            self._explain(samples, expected)

    def _check_all_logits(self, logits: Tensor) -> None:
        for part in _parts(len(logits)):
            again = self._logits(part)
            if again.shape[1:] != logits.shape[1:]:
                continue  # as where a batch is cut to its longest sample
            difference = (logits[part] - again).abs().reshape(len(part), -1).nan_to_num(0.0).amax(1)
            if bool((difference > self.tolerance * logits.abs().amax()).any()):
                worst = part[int(difference.argmax())]
                self._explain([worst], [logits[[worst]]])

    def _outputs(self, batch: Sequence[int], kept: Sequence[int]) -> list[Tensor]:
        """Return logits and outputs at the places ``kept`` of a batch of samples of x, given by their indices."""
        index = torch.tensor(kept, device=first_tensor(self.x).device)
        logits, outputs = self._run(batch, index)
        return [logits[index], *outputs]

    def _logits(self, batch: Sequence[int]) -> Tensor:
        """Return all logits of such a batch."""
        return self._run(batch, torch.empty(0, dtype=torch.int64, device="cpu"))[0]

    def _run(self, batch: Sequence[int], kept: Tensor) -> tuple[Tensor, list[Tensor]]:
        calls = PlannedCalls(Parameters(self.named), self.plan, len(batch), kept)
        with calls:
            logits = forward(self.model, self.x, torch.tensor(batch, device="cpu"))
        calls.check_complete()
        return logits.detach(), calls.outputs

    def _explain(self, samples: list[int], expected: list[Tensor]) -> None:
        """Raise if the outputs of ``samples`` differ from ``expected`` for another reason than rounding."""

        def run_again(batch: list[int], kept: Sequence[int]) -> list[Tensor]:
            self.random_state.restore()
            return self._outputs(batch, kept)[: len(expected)]

        # 1. In a batch of the same size, at the same places: only the other samples differ.
        filled = [n if n in samples else samples[n % len(samples)] for n in range(num_samples(self.x))]
        _require_same(samples, expected, run_again(filled, samples), self.tolerance, inf, "samples around it")
        if self.random_state.has_advanced():
            self.plan.draws_random_numbers = True  # for fewer samples it draws other numbers
            return
        # 2. At each other's places, and each sample alone: this may change the rounding of sums a little.
        for place, n in zip(samples, samples[::-1], strict=True):
            filled[place] = n
        swapped = run_again(filled, samples[::-1])
        _require_same(samples, expected, swapped, _COARSE, 2.0, "order of the samples around it")
        alone = [torch.cat(parts) for parts in zip(*(run_again([n], [0]) for n in samples), strict=True)]
        _require_same(samples, expected, alone, _COARSE, 2.0, "number of samples around it")


def _parts(count: int) -> list[list[int]]:
    """Return all samples in about sqrt(count) parts of that size, with other neighbours and order than in the batch."""
    order = random.Random(count).sample(range(count), count)
    parts = max(2, isqrt(count))
    return [order[first::parts] for first in range(min(parts, count))]


def _require_same(
    samples: list[int], expected: list[Tensor], other: list[Tensor], tolerance: float, order: float, reason: str
) -> None:
    if not _differ(expected, other, tolerance, order):
        return
    if _differ(expected[:1], other[:1], tolerance, order):
        raise CoupledSamplesError(
            f"model: the output of sample {samples[0]} depends on the {reason}, expected samples that do not influence "
            "each other, so that each has a gradient of its own"
        )
    raise MovedSamplesError(
        f"model: what a layer computes at the place of sample {samples[0]} depends on the {reason}; samples seem to be "
        "sorted or routed, expected an order of samples that does not depend on what is in them"
    )


def _differ(expected: Sequence[Tensor], other: Sequence[Tensor], tolerance: float, order: float = inf) -> bool:
    """Whether a tensor of ``expected`` differs from that of ``other`` by more than ``tolerance`` of its norm.

    Tensors of other shapes are not compared, as where a batch is cut to its longest sample.
    """
    pairs = [(a, b) for a, b in zip(expected, other, strict=True) if a.shape == b.shape and a.numel()]
    if not pairs:
        return False
    first, second = ([t.to(work_dtype(t.dtype)) for t in tensors] for tensors in zip(*pairs, strict=True))
    sizes, differences = (_norms(values, order) for values in (first, torch._foreach_sub(first, second)))
    return bool((differences > tolerance * sizes).any())  # a NaN is not larger


def _norms(values: Sequence[Tensor], order: float) -> Tensor:
    if order == inf and not values[0].is_cuda:
        return torch.stack([value.abs().amax() for value in values])  # an eighth of the time on a CPU
    return torch.stack(torch._foreach_norm(list(values), order))
