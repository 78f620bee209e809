"""Estimators over all parameters: real mixed inputs exactly (``jvp``), or sketched gradients of the rows (``sketch``).

The reference is the mean gradient of the buffer with respect to all parameters
(:func:`gradmix.gradients.mean_gradient`).

``jvp`` forwards mixed inputs and takes the derivative of their loss along the reference, exactly. ``sketch`` forwards
the rows alone: with the sketches S_a, S_b of two rows' gradients (or of two classes' mean gradients), a mixture's is
taken to be lam S_a + (1 - lam) S_b, so that all pairs follow from one inner product a row and a Gram matrix. The inner
products come with standard errors; what lies within so many of them of the threshold is a guess, and is checked again
by ``jvp``, up to a budget, the least certain first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gradmix.checks import check_count
from gradmix.gradients.directions import derivatives_of, mean_gradient_of
from gradmix.gradients.engine import Engine
from gradmix.gradients.layers import WithoutRule
from gradmix.gradients.losses import Scaler
from gradmix.gradients.settings import EngineSettings
from gradmix.gradients.sketches import Sketch
from gradmix.gradients.standard_errors import standard_errors
from gradmix.inputs import InputTree, first_tensor, floating_dtype, mix_samples, take
from gradmix.ops.dtypes import work_dtype
from gradmix.ops.labels import class_of, dense_labels
from gradmix.probe import device_of, require_finite
from gradmix.processes import Group
from gradmix.refusals import naming_dtypes
from gradmix.rows import chunks_of

WholeReference: TypeAlias = Mapping[str, Tensor]
"""A gradient with respect to all parameters, by name."""


@dataclass(frozen=True)
class JvpEstimator:
    """Exact alignment of real mixed inputs, over all parameters.

    A mixed row costs a forward pass, one more call of each layer, a backward pass without weight gradients, and about
    as much again for its gradient's norm.

    Attributes:
        layers, without_rule, scaler: as :func:`gradmix.class_gradients`.
        memory: bytes that a pass may take, roughly; None: half of what is free on a GPU, 4 GiB on a CPU.
    """

    layers: str | Sequence[str] = "all"
    without_rule: WithoutRule = "error"
    scaler: Scaler = None
    memory: int | None = None

    def __post_init__(self) -> None:
        _check_memory(self.memory)


@dataclass(frozen=True)
class SketchEstimator:
    """Alignment from sketched gradients of the rows, over all parameters, checked again where it is in doubt.

    Attributes:
        rank, seed, sketch, layers, without_rule, scaler: as :func:`gradmix.class_gradients`.
        errors: standard errors around the threshold within which a decision is in doubt.
        budget: mixed rows that may be forwarded to check decisions again; 0: none.
        rows_per_class: mixed rows whose mean checks the decision on a pair of classes.
        memory: as :class:`JvpEstimator`.

    Raises:
        TypeError, ValueError: ``errors``, ``budget`` or ``rows_per_class`` is no such number.
    """

    rank: int | Mapping[str, int] = 32
    seed: int = 0
    sketch: str | Sketch = "rademacher"
    layers: str | Sequence[str] = "all"
    without_rule: WithoutRule = "error"
    scaler: Scaler = None
    errors: float = 2.0
    budget: int = 64
    rows_per_class: int = 8
    memory: int | None = None

    def __post_init__(self) -> None:
        _check_memory(self.memory)
        if isinstance(self.errors, bool) or not isinstance(self.errors, (int, float)):
            raise TypeError(f"errors: got {type(self.errors).__name__}, expected a number >= 0")
        if not 0 <= self.errors < float("inf"):
            raise ValueError(f"errors: got {self.errors}, expected a number >= 0")
        check_count("budget", self.budget, least=0)
        check_count("rows_per_class", self.rows_per_class)


WholeEstimator: TypeAlias = "JvpEstimator | SketchEstimator"


def _check_memory(memory: object) -> None:
    if memory is None:
        return
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"memory: got {type(memory).__name__}, expected a number of bytes or None")
    if memory < 1:
        raise ValueError(f"memory: got {memory}, expected a number of bytes >= 1")


class Extent(NamedTuple):
    """What the model's plan says of passes to come.

    Attributes:
        chunk: rows to take at a time.
        width: number of the model's classes.
    """

    chunk: int
    width: int


def extent_of(model: nn.Module, estimator: WholeEstimator, x: Any, chunk: int) -> Extent:
    """``chunk`` rows at a time, or as many as the estimator's memory allows, and how many classes there are.

    Args:
        x: (N, ...) rows like those to come: the batch.

    Raises:
        ValueError: a row holds a NaN or an infinity.
    """
    require_finite(0, batch=x)
    memory = estimator.memory
    device = first_tensor(x).device
    if memory is None:
        memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 4 << 30
    settings = EngineSettings(
        layers=estimator.layers, without_rule=estimator.without_rule, scaler=estimator.scaler, chunk_size=chunk
    )
    engine = Engine(model, settings)
    with naming_dtypes("batch", engine.model, lambda: x):
        plan = engine.plan_of(x)
    return Extent(engine.samples_within(memory, plan), plan.num_classes)


@dataclass(frozen=True)
class Screening:
    """How the decisions of the estimator ``sketch`` were made.

    Attributes:
        screened: pairs of rows, or of classes, that were judged by sketches.
        rechecked: those in doubt that were then judged by real mixed inputs.
        uncertain: those left in doubt, because the budget was spent.
    """

    screened: int
    rechecked: int
    uncertain: int


@dataclass
class Cells:
    """Inner products and norms of pairs of rows (N, M), or of classes (P, P), with standard errors.

    Attributes:
        inner, norm: of the mixtures' gradients; NaN where a pair was not evaluated.
        error: of ``inner``, one standard error.
        classes: (P,), or None for pairs of rows.
    """

    inner: Tensor
    norm: Tensor
    error: Tensor
    classes: Tensor | None


def whole_reference(
    model: nn.Module,
    estimator: WholeEstimator,
    source: object,
    chunk: int,
    group: Group = None,
    *,
    name: str = "buffer",
    shared: bool = True,
) -> dict[str, Tensor] | None:
    """The mean gradient of the buffer; None if it is empty.

    Args:
        group, shared: as :func:`gradmix.gradients.directions.mean_gradient_of`.
        name: how errors call the rows.
    """
    settings = EngineSettings(
        layers=estimator.layers, without_rule=estimator.without_rule, scaler=estimator.scaler, chunk_size=chunk
    )
    engine = Engine(model, settings)

    def first() -> InputTree:
        return next((x for x, _ in chunks_of(name, source, 1, device_of(engine.model))), ())

    with engine.probing(), naming_dtypes(name, engine.model, first):
        return mean_gradient_of(engine, name, source, group, shared=shared)


def reference_norm(reference: WholeReference) -> Tensor:
    """||G||, a scalar tensor."""
    return torch.stack([g.square().sum() for g in reference.values()]).sum().sqrt()


def check_whole_reference(reference: object) -> WholeReference:
    """The reference, if it is what :func:`gradmix.gradients.mean_gradient` gives.

    Raises:
        TypeError: it is not.
    """
    if isinstance(reference, Mapping) and all(isinstance(value, Tensor) for value in reference.values()):
        return reference
    raise TypeError(
        f"reference: got {type(reference).__name__}, expected the gradient with respect to all parameters by name, as "
        "gradmix.gradients.mean_gradient gives it, for this estimator"
    )


# ------------------------------------------------------------------------------------------------------------------ jvp


def jvp_alignment(
    model: nn.Module,
    estimator: WholeEstimator,
    rows: tuple[InputTree, Tensor],
    partners: tuple[InputTree, Tensor],
    pairs: Tensor,
    reference: WholeReference,
    lam: float,
    width: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """(inner, norm), both (K,), of the pairs (i, j) in ``pairs`` (K, 2), each mixed and forwarded.

    Args:
        width: number of classes.
    """
    settings = EngineSettings(
        layers=list(reference), without_rule=estimator.without_rule, scaler=estimator.scaler, chunk_size=chunk
    )
    engine = Engine(model, settings)
    (x, y), (other_x, other_y) = rows, partners
    dtype = work_dtype(floating_dtype(x) or torch.float32)
    inner, norm = [y.new_zeros(0, dtype=dtype)], [y.new_zeros(0, dtype=dtype)]
    with engine.probing():
        for start in range(0, len(pairs), chunk):
            i, j = pairs[start : start + chunk].unbind(1)
            own, other = dense_labels(y[i], width, dtype), dense_labels(other_y[j], width, dtype)
            mixed = mix_samples(take(x, i), take(other_x, j), lam), lam * own + (1 - lam) * other
            for part in derivatives_of(engine, "the mixed rows", mixed, reference, norms=True):
                assert part.norm is not None
                inner.append(part.inner)
                norm.append(part.norm)
    return torch.cat(inner), torch.cat(norm)


# --------------------------------------------------------------------------------------------------------------- sketch


class RowSketches:
    """Sketched gradients of rows, or of their classes, and what they have to do with the reference.

    Args:
        model: the unwrapped model.
        estimator: its settings.
        sources: (name, (x, y)) of the rows, one after the other.
        reference: the buffer's gradient.
        by_class: whether the rows are wanted by class, as means.
        chunk: rows of one pass.
        backend: of the operators.

    Attributes:
        classes: (P,), or None.
        vectors: (P, D) class means, or (N, D).
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: SketchEstimator,
        sources: Sequence[tuple[str, tuple[InputTree, Tensor]]],
        reference: WholeReference,
        *,
        by_class: bool,
        chunk: int,
        backend: str,
    ) -> None:
        settings = EngineSettings(
            layers=list(reference),
            rank=estimator.rank,
            seed=estimator.seed,
            sketch=estimator.sketch,
            without_rule=estimator.without_rule,
            scaler=estimator.scaler,
            chunk_size=chunk,
            backend=backend,
        )
        engine = Engine(model, settings)
        self.classes: Tensor | None = None
        with engine.probing():
            if by_class:
                total = None
                for name, pair in sources:
                    part = engine.classes(name, pair)
                    assert part is not None
                    total = part if total is None else total.add_(part)
                assert total is not None
                self.classes, self.vectors = total.classes, total.mean()
            else:
                self.vectors = torch.cat([v for name, pair in sources for *_, v in engine.samples(name, pair)])
            target = engine.sketch_of(reference).to(self.vectors.dtype)
        self.inner = self.vectors @ target
        self.error = standard_errors(self.vectors, target, engine.layout)

    def cells(self, lam: float, rows: slice = slice(None), partners: slice = slice(None)) -> Cells:
        """All pairs of ``rows`` and ``partners`` at one mixing weight.

        The gradient lam S_a + mu S_b has the inner product lam s_a + mu s_b, whose standard error is at most
        lam e_a + mu e_b, and the squared norm lam^2 |S_a|^2 + 2 lam mu <S_a, S_b> + mu^2 |S_b|^2.
        """
        mu = 1 - lam
        a, b = self.vectors[rows], self.vectors[partners]
        square = lam**2 * a.square().sum(1)[:, None] + 2 * lam * mu * (a @ b.T) + mu**2 * b.square().sum(1)
        return Cells(
            lam * self.inner[rows][:, None] + mu * self.inner[partners],
            square.clamp_(min=0).sqrt(),
            lam * self.error[rows][:, None] + mu * self.error[partners],
            self.classes,
        )


def recheck(
    model: nn.Module,
    estimator: SketchEstimator,
    cells: Cells,
    judged: Tensor,
    threshold: float,
    rows: tuple[InputTree, Tensor],
    partners: tuple[InputTree, Tensor],
    reference: WholeReference,
    lam: float,
    width: int,
    chunk: int,
    generator: torch.Generator,
) -> Screening:
    """Judge cells in doubt by real mixed inputs, writing into ``cells``, as far as the budget goes.

    Args:
        judged: bool, of the cells' shape: those that matter.
        threshold: the cosine that decides.
        rows, partners: what cells are pairs of, or where classes are drawn from.
        generator: draws the rows of classes.
    """
    norm = reference_norm(reference).to(cells.inner)
    distance = (cells.inner - threshold * cells.norm * norm).abs()
    doubtful = judged & (distance <= estimator.errors * cells.error) & (cells.error > 0)
    found = doubtful.nonzero()
    screened, doubts = int(judged.sum()), len(found)
    each = 1 if cells.classes is None else estimator.rows_per_class
    most = estimator.budget // each
    if doubts == 0 or most == 0:
        return Screening(screened, 0, doubts)
    if doubts > most:
        ratio = distance[doubtful] / cells.error[doubtful]
        found = found[ratio.argsort(stable=True)[:most]]
    pairs = found
    if cells.classes is not None:
        pairs = rows_of_classes(found, cells.classes, class_of(rows[1]), class_of(partners[1]), each, generator)
    inner, norms = jvp_alignment(model, estimator, rows, partners, pairs, reference, lam, width, chunk)
    at = found.unbind(1)
    cells.inner[at] = inner.view(-1, each).mean(1).to(cells.inner)
    cells.norm[at] = norms.view(-1, each).mean(1).to(cells.norm)
    return Screening(screened, len(found), doubts - len(found))


def rows_of_classes(
    cells: Tensor, classes: Tensor, y: Tensor, other_y: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """(K count, 2) indices of rows drawn with replacement, ``count`` for each pair of classes in ``cells`` (K, 2).

    Args:
        cells: positions among ``classes``: of the class of the first index, which is of ``y``, and of the second.
        classes: (P,) int64.
        y, other_y: (N,) and (M,) class labels.
        count: draws for each pair.
        generator: source of the draws.
    """
    drawn = torch.rand(2, len(cells), count, generator=generator, device=generator.device).to(y.device)
    columns = []
    for u, column, labels in zip(drawn, cells.unbind(1), (y, other_y), strict=True):
        order = torch.argsort(labels, stable=True)
        counts = (labels[:, None] == classes).sum(0)
        first, size = (v[column, None] for v in (counts.cumsum(0) - counts, counts))
        columns.append(order[first + (u * size).long().clamp_(max=size - 1)].reshape(-1))
    return torch.stack(columns, 1)
