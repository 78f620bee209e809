"""Arguments of the measured calls, and what their results are held to: each operator's documented bound.

The truth is torch's implementation in float64, on the same device and for the same numbers; of a captured graph it is
what the calls give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmix import captured_selection
from gradmix.calibration.verdicts import Cell
from gradmix.ops import (
    class_pairs,
    class_sketch,
    cosine_alignment,
    draw_partners,
    last_layer_gradient,
    mix_labels,
    mix_samples,
    mixed_alignment,
    sketch_project,
)
from gradmix.ops.backends import Backend, Operator

Arguments = tuple[Any, ...]
Results = tuple[Tensor, ...]

BAND = 1e-6
"""Inner products below this share of the largest one may have either sign."""

_LAM = 0.3


class Deviation(NamedTuple):
    """Distance of a result from the truth.

    Attributes:
        name: of the result.
        error: (), the largest error.
        bound: (), what it may be.
    """

    name: str
    error: Tensor
    bound: Tensor


class Problem(NamedTuple):
    """An operator, and how it is measured.

    Attributes:
        operator: with its implementations.
        arguments: makes the arguments of a cell on the CPU; random numbers are drawn from the generator.
        deviations: compares results with the truth, given the arguments in float64.
        decides: whether the sign of the first result decides about pairs.
        accumulates: whether the first argument is the result, to which the call adds.
        in_float64: whether the truth is computed in float64; else in the arguments' dtype, of implementations that must
            give the same bits.
    """

    operator: Operator
    arguments: Callable[[Cell, torch.Generator], Arguments]
    deviations: Callable[[Arguments, Results, Results], list[Deviation]]
    decides: bool = False
    accumulates: bool = False
    in_float64: bool = True

    def run(self, implementation: Backend, arguments: Arguments) -> Results:
        """Return the results of an implementation; integer results are part of them."""
        if self.accumulates:
            out = torch.zeros_like(arguments[0])
            implementation.run(out, *arguments[1:])
            return (out,)
        results = implementation.run(*arguments)
        return (results,) if isinstance(results, Tensor) else tuple(results)


def of_largest(*names: str, unit: float = 1e-5) -> Callable[[Arguments, Results, Results], list[Deviation]]:
    """Errors are held to a share of the largest entry of the truth."""

    def deviations(_arguments: Arguments, results: Results, truths: Results) -> list[Deviation]:
        return [
            Deviation(name, _largest_error(result, truth), unit * truth.nan_to_num().abs().max())
            for name, result, truth in zip(names, results, truths, strict=True)
        ]

    return deviations


def _largest_error(result: Tensor, truth: Tensor) -> Tensor:
    return (result.double() - truth).nan_to_num().abs().max()


def _side(rows: int, cell: Cell, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Features, logits and labels: some samples are sure of their class, some are wrong, some are in doubt."""
    dtype, classes, width = getattr(torch, cell.dtype), cell.sizes["classes"], cell.sizes["features"]
    features = torch.randn(rows, width, generator=g).relu_().to(dtype)
    labels = torch.randint(classes, (rows,), generator=g)
    logits = 2 * torch.randn(rows, classes, generator=g)
    logits[torch.arange(rows), labels] += 8 * torch.rand(rows, generator=g)
    if cell.kind.startswith("label vectors"):
        labels = torch.softmax(3 * torch.randn(rows, classes, generator=g), 1)
    return features, logits.to(dtype), labels


def _alignment(cell: Cell, g: torch.Generator) -> Arguments:
    batch = _side(cell.sizes["samples"], cell, g)
    # Of the grid's sizes a batch is mixed with itself, of odd sizes with other candidates.
    other = batch if cell.timed else _side(cell.sizes["samples"] // 2, cell, g)
    reference = torch.randn(cell.sizes["classes"], cell.sizes["features"] + 1, generator=g)
    lams = torch.tensor([_LAM], dtype=torch.float64)
    return (*batch, *other, reference, lams, cell.kind.endswith("norms") or not cell.timed, "tf32x3")


def _alignment_deviations(arguments: Arguments, results: Results, truths: Results) -> list[Deviation]:
    names = ("inner product", "norm") if results[1].numel() else ("inner product",)
    found = of_largest(*names)(arguments, results[: len(names)], truths[: len(names)])
    if len(found) == 2 and arguments[2].is_floating_point():
        # ||p - y||^2 by its three terms: where it is all but zero, its root has half the digits.
        error = _largest_error(results[1].double().square(), truths[1].square())
        longest = torch.cat([arguments[0], arguments[3]]).square().sum(1).max() + 1
        found[1] = Deviation("squared norm", error, 2e-6 * longest)
    return found


def _class_pairs(cell: Cell, g: torch.Generator) -> Arguments:
    features, logits, labels = _side(cell.sizes["samples"], cell, g)
    reference = torch.randn(cell.sizes["classes"], cell.sizes["features"] + 1, generator=g)
    lams = torch.linspace(0, 1, cell.sizes["weights"], dtype=torch.float64)
    return features, logits, labels, labels, cell.sizes["classes"], reference, lams


def _last_layer(cell: Cell, g: torch.Generator) -> Arguments:
    features, logits, labels = _side(cell.sizes["samples"], cell, g)
    out = torch.zeros(cell.sizes["classes"], cell.sizes["features"] + 1)
    return out, features, logits, labels, "tf32x3"


def _last_layer_deviations(arguments: Arguments, results: Results, truths: Results) -> list[Deviation]:
    """Rounding is relative to the sum of the lengths of the samples' gradients; a residual is no longer than sqrt 2."""
    lengths = 2 * (arguments[1].square().sum(1) + 1).sqrt().sum()
    return [Deviation("gradient", _largest_error(results[0], truths[0]), 5e-7 * lengths)]


def _draw(cell: Cell, g: torch.Generator) -> Arguments:
    rows = cell.sizes["samples"]
    allowed = torch.rand(rows, rows, generator=g) < 0.4
    score = torch.randn(rows, rows, generator=g).to(getattr(torch, cell.dtype)) if cell.kind == "best" else None
    drawn = torch.rand(rows, generator=g, dtype=torch.float64)
    if cell.kind == "permute":
        drawn = torch.randperm(rows, generator=g)
    return allowed, drawn, score, rows, cell.kind, True


def _selection(cell: Cell, g: torch.Generator) -> Arguments:
    side = _side(cell.sizes["samples"], cell, g)
    reference = torch.randn(cell.sizes["classes"], cell.sizes["features"] + 1, generator=g)
    return (*side, len(side[0]), reference, torch.rand(len(side[0]), generator=g, dtype=torch.float64))


def _mixed_samples(cell: Cell, g: torch.Generator) -> Arguments:
    rows, dtype = cell.sizes["samples"], getattr(torch, cell.dtype)
    x = torch.randn(rows, cell.sizes["values"], generator=g).to(dtype)
    return x, x, torch.randint(rows, (rows,), generator=g), torch.rand(rows, generator=g)


def _mixed_labels(cell: Cell, g: torch.Generator) -> Arguments:
    rows, classes = cell.sizes["samples"], cell.sizes["classes"]
    labels = torch.randint(classes, (rows,), generator=g)
    lam = torch.rand(rows, generator=g).to(getattr(torch, cell.dtype))
    return labels, labels, torch.randint(rows, (rows,), generator=g), lam, classes


def _vectors(cell: Cell, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    shape = cell.sizes["layers"], cell.sizes["samples"], cell.sizes["entries"]
    x, y, reference = (torch.randn(s, generator=g).to(getattr(torch, cell.dtype)) for s in (shape, shape, shape[::2]))
    return x, y, reference


def _cosine(cell: Cell, g: torch.Generator) -> Arguments:
    return (*_vectors(cell, g)[:2], "tf32x3")


def _cosine_deviations(_arguments: Arguments, results: Results, truths: Results) -> list[Deviation]:
    error = _largest_error(results[0], truths[0])
    return [Deviation("cosine", error, torch.full_like(error, 1e-6))]


def _mixed_gram(cell: Cell, g: torch.Generator) -> Arguments:
    return (*_vectors(cell, g), torch.tensor([_LAM], dtype=torch.float64), "tf32x3")


def _class_sketch(cell: Cell, g: torch.Generator) -> Arguments:
    shape = cell.sizes["samples"], cell.sizes["positions"], cell.sizes["rank"]
    deltas, activations = (torch.randn(shape, generator=g).to(getattr(torch, cell.dtype)) for _ in range(2))
    classes = cell.sizes["classes"]
    return deltas, activations, torch.randint(classes, shape[:1], generator=g), classes


def _sketch_project(cell: Cell, g: torch.Generator) -> Arguments:
    samples, positions, entries = (cell.sizes[axis] for axis in ("samples", "positions", "entries"))
    shape = (samples, positions, entries) if cell.kind == "rows" else (samples, entries, positions)
    x = torch.randn(shape, generator=g).to(getattr(torch, cell.dtype))
    return x if cell.kind == "rows" else x.mT, cell.sizes["rank"], 11, True, "rademacher"


def _sketch_project_deviations(arguments: Arguments, results: Results, truths: Results) -> list[Deviation]:
    """Rounding is relative to the longest vector that is projected, and grows with the root of the number of terms."""
    longest = (arguments[0].square().sum(2).max() + 1).sqrt()
    unit = 2**-23 * max(16.0, math.sqrt(arguments[0].shape[2]))
    return [Deviation("projection", _largest_error(results[0], truths[0]), unit * longest)]


def _integers(_arguments: Arguments, _results: Results, _truths: Results) -> list[Deviation]:
    """Integers are equal or wrong, which is checked of all results."""
    return []


_ALIGNMENT = ("inner product", "norm")

PROBLEMS: Mapping[str, Problem] = {
    problem.operator.name: problem
    for problem in (
        Problem(mixed_alignment.OPERATOR, _alignment, _alignment_deviations, decides=True),
        Problem(class_pairs.OPERATOR, _class_pairs, of_largest(*_ALIGNMENT), decides=True),
        Problem(last_layer_gradient.OPERATOR, _last_layer, _last_layer_deviations, accumulates=True),
        Problem(draw_partners.OPERATOR, _draw, _integers),
        Problem(captured_selection.OPERATOR, _selection, _integers, in_float64=False),
        Problem(mix_samples.OPERATOR, _mixed_samples, of_largest("mixture", unit=0.0), in_float64=False),
        Problem(mix_labels.OPERATOR, _mixed_labels, of_largest("label vector", unit=0.0), in_float64=False),
        Problem(cosine_alignment.OPERATOR, _cosine, _cosine_deviations, decides=True),
        Problem(cosine_alignment.MIXED_OPERATOR, _mixed_gram, of_largest(*_ALIGNMENT), decides=True),
        Problem(class_sketch.OPERATOR, _class_sketch, of_largest("sum", "sum of squares", unit=2e-6)),
        Problem(sketch_project.OPERATOR, _sketch_project, _sketch_project_deviations),
    )
}
"""By the operators' names."""
