"""Times the alignment of all pairs of mixed rows against the ways to have it otherwise.

Every row of the first table does the same work: from features, logits and labels of N rows and M candidates and a
reference gradient, the inner product and the cosine of each of the N x M mixed last-layer gradients with the reference.
See bench/README.md for the rules.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _measure import (
    check_places,
    count,
    free_memory,
    interleaved,
    keep_freed_memory,
    load_average,
    machine,
    machine_line,
    paired_ratio,
    peak_memory,
    positive,
    quantiles,
    seconds_of,
    show_bytes,
    show_count,
    show_table,
    show_time,
    warm_up,
    write_json,
)
from torch import Tensor, nn

import gradmix
from gradmix.alignment import reference_gradient
from gradmix.head import HeadCapture
from gradmix.ops.mixed_alignment import OPERATOR, cosine, mixed_alignment, mixed_alignment_reference

BAND = 1e-6
"""A pair whose inner product is smaller than this share of the largest is too close to zero for its decision to count;
likewise the cosine of a gradient whose norm is."""

LAM = 0.3
"""The mixing weight; not 0.5, at which swapped weights would go unnoticed."""

HUGE_LOGIT = 1e4
HUGE_ROWS = 64
"""Size of the largest logit, and rows on each side, of the second set of inputs."""

CHECKED_ROWS = 64
"""Rows on each side whose pairs are compared with float64."""


BASELINES = ("row_loop", "row_loop_tuned")
"""The rivals that speed-ups are given over."""


@dataclass(frozen=True)
class Sizes:
    """N rows, M candidates, C classes, d features, and whether the candidates are the rows themselves."""

    n: int
    m: int
    classes: int
    features: int
    own_rows: bool = False

    @property
    def pairs(self) -> int:
        """How many there are."""
        return self.n * self.m

    @property
    def flops(self) -> int:
        """What the factorised form needs: its four products over classes, the projections U, and the Gram product."""
        products = 8 * self.n * self.m * self.classes
        projected = self.n if self.own_rows else self.n + self.m
        projections = 2 * projected * self.classes * (self.features + 1)
        gram = 2 * self.n * self.m * self.features
        return products + projections + gram


PRESETS = {
    "imagenet": Sizes(256, 256, 1000, 2048, own_rows=True),
    "tiny-imagenet": Sizes(256, 256, 200, 512, own_rows=True),
    "cifar100": Sizes(256, 256, 100, 512, own_rows=True),
    "cifar10": Sizes(256, 256, 10, 512, own_rows=True),
}
"""The candidates are the batch's own rows, as ``select_pairs`` has them unless told otherwise."""
QUICK = Sizes(32, 24, 20, 64)


# -------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Problem:
    """One set of inputs, all float32 on one device.

    Attributes:
        features_a, logits_a, labels_a: (N, d), (N, C), (N,): the rows.
        features_b, logits_b, labels_b: (M, d), (M, C), (M,): the candidates; the same tensors if they are the rows.
        weight, bias: (C, d), (C,): the head that made the logits.
        reference: (C, d + 1): the mean gradient of further rows.
        lam: the weight of the row in a mixture.
    """

    features_a: Tensor
    logits_a: Tensor
    labels_a: Tensor
    features_b: Tensor
    logits_b: Tensor
    labels_b: Tensor
    weight: Tensor
    bias: Tensor
    reference: Tensor
    lam: float = LAM

    @property
    def pairs(self) -> int:
        """How many there are."""
        return len(self.labels_a) * len(self.labels_b)

    @property
    def own_rows(self) -> bool:
        """Whether the candidates are the rows themselves."""
        return self.features_a is self.features_b

    def first(self, n: int, m: int) -> Problem:
        """The same with the first n rows and the first m candidates only, which may then share no tensors."""
        if self.own_rows and n == m == len(self.labels_a):
            return self
        return replace(
            self,
            features_a=self.features_a[:n],
            logits_a=self.logits_a[:n],
            labels_a=self.labels_a[:n],
            features_b=self.features_b[:m],
            logits_b=self.logits_b[:m],
            labels_b=self.labels_b[:m],
        )

    def to(self, target: torch.device | torch.dtype) -> Problem:
        """The same on another device or, but for the labels, in another dtype."""
        moved: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if isinstance(target, torch.dtype):
            moved = {name: value for name, value in moved.items() if value.is_floating_point()}
        return _share(replace(self, **{name: value.to(target) for name, value in moved.items()}), self.own_rows)


def _share(problem: Problem, own_rows: bool) -> Problem:
    """The same with the rows for candidates, if they are to be their own."""
    if not own_rows:
        return problem
    p = problem
    return replace(p, features_b=p.features_a, logits_b=p.logits_a, labels_b=p.labels_a)


def make_problem(sizes: Sizes, seed: int) -> Problem:
    """Rows as a network in training has them, on the CPU; equal for equal seeds.

    The features are what a ReLU lets through of noise and a share of the class's own direction, which differs from row
    to row; the head's rows are these directions. The logits are scaled so that the median row gives its favourite class
    a probability of 0.6, which leaves some rows almost certain and some undecided.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(sizes.classes, sizes.features, generator=generator)
    bias = 0.1 * torch.randn(sizes.classes, generator=generator)

    def rows(number: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(sizes.classes, (number,), generator=generator)
        share = torch.rand(number, 1, generator=generator)
        noise = torch.randn(number, sizes.features, generator=generator)
        return torch.relu(noise + share * direction[labels]), labels

    (features_a, labels_a), (features_b, labels_b), (features_r, labels_r) = rows(sizes.n), rows(sizes.m), rows(sizes.n)
    unit = direction / math.sqrt(sizes.features)
    weight = _scale(F.linear(features_a, unit), bias) * unit
    logits_a, logits_b, logits_r = (F.linear(h, weight, bias) for h in (features_a, features_b, features_r))
    residual = torch.softmax(logits_r, 1) - F.one_hot(labels_r, sizes.classes).float()
    reference = residual.T @ F.pad(features_r, (0, 1), value=1.0) / sizes.n
    problem = Problem(features_a, logits_a, labels_a, features_b, logits_b, labels_b, weight, bias, reference)
    return _share(problem, sizes.own_rows)


def _scale(unscaled: Tensor, bias: Tensor) -> float:
    low, high = 1e-3, 1e3
    for _ in range(40):
        middle = math.sqrt(low * high)
        favourite = torch.softmax(middle * unscaled + bias, 1).amax(1).median()
        low, high = (low, middle) if favourite > 0.6 else (middle, high)
    return low


def with_logits_up_to(problem: Problem, largest: float) -> Problem:
    """The same with head and logits multiplied such that the largest logit has this size; the reference stays."""
    p = problem
    factor = largest / max(float(p.logits_a.abs().max()), float(p.logits_b.abs().max()))
    scaled = {name: factor * getattr(p, name) for name in ("weight", "bias", "logits_a", "logits_b")}
    return _share(replace(p, **scaled), p.own_rows)


def truth(problem: Problem, through_head: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(inner, norm, cosine), (N, M) float64 on the CPU, from the softmax of every mixture's logits.

    Args:
        problem: the inputs, taken as exact.
        through_head: the logits of a mixture are the head's of the mixed features, rather than the mixed logits. The
            two differ by the rounding of the logits given, which matters where these are huge.
    """
    p = problem.to(torch.device("cpu")).to(torch.float64)
    lam, mu, (classes, _) = p.lam, 1.0 - p.lam, p.reference.shape
    h = _mix(p.features_a, p.features_b, lam).flatten(0, 1)
    z = F.linear(h, p.weight, p.bias) if through_head else _mix(p.logits_a, p.logits_b, lam).flatten(0, 1)
    y_a, y_b = (F.one_hot(labels, classes).double() for labels in (p.labels_a, p.labels_b))
    residual = torch.softmax(z, 1) - (lam * y_a[:, None] + mu * y_b).flatten(0, 1)
    h = F.pad(h, (0, 1), value=1.0)
    inner = ((residual @ p.reference) * h).sum(1)
    norm = residual.norm(dim=1) * h.norm(dim=1)
    shape = (len(p.labels_a), len(p.labels_b))
    angle = cosine(inner, norm, p.reference.norm())
    return inner.view(shape), norm.view(shape), angle.view(shape)


def _mix(a: Tensor, b: Tensor, lam: float) -> Tensor:
    """(N, M, ...): all mixtures of rows."""
    return lam * a[:, None] + (1.0 - lam) * b


# -------------------------------------------------------------------------------------------------------------- rivals


Alignments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rival:
    """One way to do the work.

    Attributes:
        name: its key in the result file.
        label: its name in the tables.
        run: from a problem to (inner, cosine), both (N, M).
        through_head: it runs the head on mixed features, and never sees the logits.
        sample: None, or the (rows, candidates) whose pairs are timed and taken for all.
        chunk: None, or the pairs or rows it takes at a time.
    """

    name: str
    label: str
    run: Callable[[Problem], Alignments]
    through_head: bool = False
    sample: tuple[int, int] | None = None
    chunk: int | None = None

    def timed(self, problem: Problem) -> Problem:
        """The part of the problem that is timed."""
        return problem if self.sample is None else problem.first(*self.sample)


def by_gradmix(problem: Problem, backend: str) -> Alignments:
    """The package's operator."""
    p = problem
    inner, norm = mixed_alignment(
        p.features_a, p.logits_a, p.labels_a, p.features_b, p.logits_b, p.labels_b, p.reference, p.lam, backend=backend
    )
    return inner, cosine(inner, norm, p.reference.norm())


def by_reference(problem: Problem) -> Alignments:
    """The package's reference: the formula, pair by pair."""
    p = problem
    inner, norm = mixed_alignment_reference(
        p.features_a, p.logits_a, p.labels_a, p.features_b, p.logits_b, p.labels_b, p.reference, p.lam
    )
    return inner, cosine(inner, norm, p.reference.norm())


def _projections(p: Problem) -> tuple[Tensor, Tensor]:
    """[h; 1] G^T of both sides, (N, C) and (M, C)."""
    weight, bias = p.reference[:, :-1], p.reference[:, -1]
    u_a = F.linear(p.features_a, weight, bias)
    return u_a, u_a if p.own_rows else F.linear(p.features_b, weight, bias)


def _one_hot(p: Problem) -> tuple[Tensor, Tensor]:
    """Label vectors of both sides, (N, C) and (M, C)."""
    classes = len(p.bias)
    return F.one_hot(p.labels_a, classes).float(), F.one_hot(p.labels_b, classes).float()


def _feature_norms(p: Problem) -> Tensor:
    """||[h; 1]|| of all mixtures, (N, M), from the Gram product."""
    lam, mu = p.lam, 1.0 - p.lam
    square_a, square_b = p.features_a.square().sum(1), p.features_b.square().sum(1)
    square = torch.addmm(
        (lam * lam * square_a)[:, None] + mu * mu * square_b, p.features_a, p.features_b.T, alpha=2 * lam * mu
    )
    return square.clamp_(min=0).add_(1).sqrt_()


def by_gradient_row_loop(problem: Problem) -> Alignments:
    """Row by row, G^T r multiplied by the mixed features: nothing is shared between rows."""
    p = problem
    lam, mu = p.lam, 1.0 - p.lam
    y_a, y_b = _one_hot(p)
    inner, norm = [], []
    for h_a, z_a, y in zip(p.features_a, p.logits_a, y_a, strict=True):
        h = lam * h_a + mu * p.features_b
        residual = torch.softmax(lam * z_a + mu * p.logits_b, 1) - (lam * y + mu * y_b)
        toward = residual @ p.reference
        inner.append((toward[:, :-1] * h).sum(1) + toward[:, -1])
        norm.append(residual.norm(dim=1) * (h.square().sum(1) + 1).sqrt())
    whole = torch.stack(inner)
    return whole, cosine(whole, torch.stack(norm), p.reference.norm())


def by_row_loop(problem: Problem) -> Alignments:
    """Row by row, as one writes it once it is seen that [h; 1] G^T need be had only once for every row."""
    p = problem
    lam, mu = p.lam, 1.0 - p.lam
    u_a, u_b = _projections(p)
    y_a, y_b = _one_hot(p)
    inner, norm = [], []
    for h, z, y, u in zip(p.features_a, p.logits_a, y_a, u_a, strict=True):
        residual = torch.softmax(lam * z + mu * p.logits_b, 1) - (lam * y + mu * y_b)
        inner.append((residual * (lam * u + mu * u_b)).sum(1))
        norm.append(residual.norm(dim=1) * ((lam * h + mu * p.features_b).square().sum(1) + 1).sqrt())
    whole = torch.stack(inner)
    return whole, cosine(whole, torch.stack(norm), p.reference.norm())


def by_tuned_row_loop(problem: Problem) -> Alignments:
    """The row loop with as few passes over memory as plain torch allows; the features' norms from a Gram product."""
    p = problem
    lam, mu = p.lam, 1.0 - p.lam
    u_a, u_b = _projections(p)
    z_b = mu * p.logits_b
    own = torch.arange(len(p.labels_b), device=z_b.device)
    inner = torch.empty(len(p.labels_a), len(p.labels_b), device=z_b.device)
    norm = torch.empty_like(inner)
    for i, label in enumerate(p.labels_a.tolist()):
        residual = torch.softmax(torch.add(z_b, p.logits_a[i], alpha=lam), 1)
        residual[own, p.labels_b] -= mu
        residual[:, label] -= lam
        inner[i] = lam * (residual @ u_a[i]) + mu * torch.linalg.vecdot(residual, u_b)
        norm[i] = torch.linalg.vector_norm(residual, dim=1)
    return inner, cosine(inner, norm.mul_(_feature_norms(p)), p.reference.norm())


def by_broadcast(problem: Problem, rows: int) -> Alignments:
    """The tuned row loop for several rows at a time, by broadcasting to (rows, M, C)."""
    p = problem
    lam, mu = p.lam, 1.0 - p.lam
    u_a, u_b = _projections(p)
    z_a, z_b = lam * p.logits_a, mu * p.logits_b
    inner, norm = [], []
    for start in range(0, len(z_a), rows):
        part = slice(start, start + rows)
        residual = torch.softmax(z_a[part, None] + z_b, 2)
        shape = residual.shape[:2]
        for labels, weight in ((p.labels_a[part, None], lam), (p.labels_b, mu)):
            residual.scatter_add_(2, labels.expand(shape)[..., None], residual.new_full((*shape, 1), -weight))
        inner.append(lam * torch.linalg.vecdot(residual, u_a[part, None]) + mu * torch.linalg.vecdot(residual, u_b))
        norm.append(torch.linalg.vector_norm(residual, dim=2))
    return (whole := torch.cat(inner)), cosine(whole, torch.cat(norm).mul_(_feature_norms(p)), p.reference.norm())


def _loss(weight: Tensor, bias: Tensor, features: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, weight, bias), label)


def by_autograd(problem: Problem) -> Alignments:
    """Pair by pair: ``torch.autograd.grad`` of the loss of the mixed features."""
    p = problem
    lam, mu = p.lam, 1.0 - p.lam
    parameters = p.weight.clone().requires_grad_(), p.bias.clone().requires_grad_()
    toward_weight, toward_bias = p.reference[:, :-1].flatten(), p.reference[:, -1].contiguous()
    y_a, y_b = _one_hot(p)
    inner = torch.empty(len(y_a), len(y_b), device=y_a.device)
    norm = torch.empty_like(inner)
    for i in range(len(y_a)):
        for j in range(len(y_b)):
            h = lam * p.features_a[i] + mu * p.features_b[j]
            with torch.enable_grad():
                loss = _loss(*parameters, h, lam * y_a[i] + mu * y_b[j])
            g_weight, g_bias = torch.autograd.grad(loss, parameters)
            inner[i, j] = g_weight.flatten() @ toward_weight + g_bias @ toward_bias
            norm[i, j] = torch.hypot(g_weight.norm(), g_bias.norm())
    return inner, cosine(inner, norm, p.reference.norm())


def by_vmap(problem: Problem, chunk: int) -> Alignments:
    """``torch.func``'s vmap(grad) of the loss, ``chunk`` pairs of mixed features at a time."""
    p = problem
    lam, mu = p.lam, 1.0 - p.lam
    gradients = torch.func.vmap(torch.func.grad(_loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    toward_weight, toward_bias = p.reference[:, :-1].flatten(), p.reference[:, -1].contiguous()
    y_a, y_b = _one_hot(p)
    inner, norm = [], []
    for pairs in torch.arange(p.pairs, device=y_a.device).split(chunk):
        i, j = pairs // len(y_b), pairs % len(y_b)
        h = lam * p.features_a[i] + mu * p.features_b[j]
        g_weight, g_bias = gradients(p.weight, p.bias, h, lam * y_a[i] + mu * y_b[j])
        flat = g_weight.flatten(1)
        inner.append(flat @ toward_weight + g_bias @ toward_bias)
        norm.append(torch.hypot(torch.linalg.vector_norm(flat, dim=1), torch.linalg.vector_norm(g_bias, dim=1)))
    shape = (len(y_a), len(y_b))
    whole = torch.cat(inner).view(shape)
    return whole, cosine(whole, torch.cat(norm).view(shape), p.reference.norm())


def make_rivals(problem: Problem, device: torch.device) -> tuple[list[Rival], dict[str, Any]]:
    """The rivals on this device, each at its best chunk, and how the rest of it was decided."""
    n, m, (classes, width) = len(problem.labels_a), len(problem.labels_b), problem.reference.shape
    p = problem
    arguments = (p.features_a, p.logits_a, p.labels_a, p.features_b, p.logits_b, p.labels_b, p.reference, p.lam)
    refused = {}
    rivals = []
    for body in OPERATOR.backends:
        if body.name == "reference":
            continue
        reason = body.available() or body.can_run(*arguments)
        if reason:
            refused[body.name] = reason
            continue
        rivals.append(Rival(body.name, f"gradmix, backend {body.name}", _Bound(by_gradmix, body.name)))
    rivals += [
        Rival("row_loop", "row loop", by_row_loop),
        Rival("row_loop_tuned", "row loop, tuned", by_tuned_row_loop),
        Rival("row_loop_gradients", "row loop, from gradients", by_gradient_row_loop, sample=(min(n, 4), m)),
    ]

    # Tensors of a size that stays in reach of the caches are quicker on a CPU; a GPU wants large ones.
    memory = min(free_memory(device) // 8, (1 << 29) if device.type == "cpu" else (1 << 34))
    row_chunks = _within((2, 8, 32, 128, 512), n, memory // (m * classes * 4))
    row_times = {k: seconds_of_pairs(_Bound(by_broadcast, k), p, device) for k in row_chunks}
    best_rows = min(row_times, key=lambda k: row_times[k])
    rivals.append(
        Rival("broadcast", f"broadcast, {best_rows} rows at a time", _Bound(by_broadcast, best_rows), chunk=best_rows)
    )

    pair_chunks = _within((1, 4, 16, 64, 256, 1024, 4096), n * m, memory // (classes * width * 4))
    pair_times = {
        k: seconds_of_pairs(_Bound(by_vmap, k), p.first(*_block(max(k, 16), n, m)), device) for k in pair_chunks
    }
    best_pairs = min(pair_times, key=lambda k: pair_times[k])
    rivals += [
        Rival(
            "vmap_grad",
            f"vmap(grad), {best_pairs} pairs at a time",
            _Bound(by_vmap, best_pairs),
            through_head=True,
            sample=_block(max(best_pairs, 16), n, m),
            chunk=best_pairs,
        ),
        Rival("autograd", "autograd.grad, pair by pair", by_autograd, through_head=True, sample=_block(16, n, m)),
        Rival("reference", "gradmix, backend reference", by_reference, sample=_block(16, n, m)),
    ]
    decided = {
        "refused_backends": refused,
        "auto_backend": OPERATOR.choose("auto", *arguments).name,
        "broadcast_seconds_a_pair": {str(k): v for k, v in row_times.items()},
        "vmap_grad_seconds_a_pair": {str(k): v for k, v in pair_times.items()},
    }
    return rivals, decided


@dataclass(frozen=True)
class _Bound:
    """``run`` with its second argument fixed."""

    run: Callable[[Problem, Any], Alignments]
    argument: Any

    def __call__(self, problem: Problem) -> Alignments:
        return self.run(problem, self.argument)


def _within(chunks: tuple[int, ...], most: int, fitting: int) -> list[int]:
    """The chunks that fit, none larger than the work; 1 if none does."""
    return sorted({min(chunk, most) for chunk in chunks if min(chunk, most) <= fitting}) or [1]


def _block(pairs: int, n: int, m: int) -> tuple[int, int]:
    """Rows and candidates, about as many of each, with so many pairs or all there are."""
    side = min(n, math.isqrt(pairs - 1) + 1)
    return side, min(m, -(-pairs // side))


def seconds_of_pairs(run: Callable[[Problem], Alignments], problem: Problem, device: torch.device) -> float:
    """Seconds a pair: the best of three calls, after one to warm up."""
    run(problem)
    return min(seconds_of(lambda: run(problem), device) for _ in range(3)) / problem.pairs


# -------------------------------------------------------------------------------------------------------- measurements


def errors(rival: Rival, problem: Problem) -> dict[str, float]:
    """How far a rival is from float64 on the pairs of the first rows, and whether its decisions are the same."""
    rows = min(len(problem.labels_a), CHECKED_ROWS), min(len(problem.labels_b), CHECKED_ROWS)
    # The pair-by-pair ones are too slow for that many.
    part = problem.first(min(rows[0], 8), min(rows[1], 8)) if rival.sample else problem
    inner, angle = (v[: rows[0], : rows[1]].cpu().double() for v in rival.run(part))
    exact = truth(problem.first(*rows), rival.through_head)
    largest, largest_norm = float(exact[0].abs().max()), float(exact[1].max())
    exact_inner, exact_norm, exact_angle = (v[: len(inner), : inner.shape[1]] for v in exact)
    clear = exact_inner.abs() > BAND * largest
    same = ((inner >= 0) == (exact_inner >= 0))[clear]
    angle_errors = (angle - exact_angle).abs()[exact_norm > BAND * largest_norm]
    return {
        "pairs": inner.numel(),
        "inner": float((inner - exact_inner).abs().max()) / largest,
        "cosine": float(angle_errors.max()) if len(angle_errors) else 0.0,
        "pairs_outside_band": int(clear.sum()),
        "decisions_agree": float(same.double().mean()) if len(same) else 1.0,
    }


def measure_alignment(
    sizes: Sizes, device: torch.device, seed: int, repeats: int, warmups: int, seconds: float
) -> dict[str, Any]:
    """The first two tables: times, memory and errors of every rival."""
    problem = make_problem(sizes, seed).to(device)
    huge = with_logits_up_to(problem.first(HUGE_ROWS, HUGE_ROWS), HUGE_LOGIT)
    say("looking for the best chunk sizes")
    rivals, decided = make_rivals(problem, device)
    calls: dict[str, Callable[[], object]] = {}
    for rival in rivals:
        calls[rival.name] = _Call(rival.run, rival.timed(problem))
    # As large as the projection of the rows, but not so small that it would measure the cost of a call.
    shape = max(sizes.n, 256), max(sizes.features, 512), max(sizes.classes, 512)
    left, right = torch.rand(shape[:2], device=device), torch.rand(shape[1:], device=device)
    product_flops = 2 * math.prod(shape)
    calls["shared products"] = lambda: (_projections(problem), _feature_norms(problem))
    calls["matrix product"] = lambda: torch.mm(left, right)
    say("warming up")
    warmed = {name: warm_up(call, device, warmups) for name, call in calls.items()}
    say(f"timing, {repeats} rounds or {seconds:.0f} s")
    samples = interleaved(calls, device, repeats=repeats, seconds=seconds)
    product = quantiles(samples["matrix product"])
    rate = product_flops / product["p50"]
    rows = []
    say("errors and memory")
    by_name = {
        rival.name: [s * sizes.pairs / rival.timed(problem).pairs for s in samples[rival.name]] for rival in rivals
    }
    for rival in rivals:
        time_of_all = quantiles(by_name[rival.name])
        rows.append(
            {
                "name": rival.name,
                "label": rival.label,
                "chunk": rival.chunk,
                "pairs_timed": rival.timed(problem).pairs,
                "extrapolated": rival.timed(problem).pairs < sizes.pairs,
                "samples": len(samples[rival.name]),
                "warmups": warmed[rival.name],
                "seconds": time_of_all,
                "pairs_per_second": sizes.pairs / time_of_all["p50"],
                "speedup_over": {name: paired_ratio(by_name[name], by_name[rival.name]) for name in BASELINES},
                "share_of_product_rate": sizes.flops / time_of_all["p50"] / rate,
                "peak_memory_bytes": peak_memory(calls[rival.name], device),
                "error": errors(rival, problem),
                "error_huge_logits": errors(rival, huge),
            }
        )
    favourite = torch.softmax(problem.logits_a, 1).amax(1).double()
    return {
        "flops": sizes.flops,
        "flops_formula": f"8 N M C + 2 {'N' if sizes.own_rows else '(N + M)'} C (d + 1) + 2 N M d",
        "shared_products": {"seconds": quantiles(samples["shared products"])},
        "matrix_product": {
            "shape": f"({shape[0]} x {shape[1]}) ({shape[1]} x {shape[2]})",
            "flops": product_flops,
            "seconds": product,
            "flops_per_second": rate,
        },
        "favourite_probability": {f"p{k}": float(favourite.quantile(k / 100)) for k in (5, 20, 50, 80, 95)},
        "huge_logits": {"largest": HUGE_LOGIT, "rows": len(huge.labels_a), "candidates": len(huge.labels_b)},
        **decided,
        "rows": rows,
    }


@dataclass(frozen=True)
class _Call:
    """A rival's run on its problem."""

    run: Callable[[Problem], Alignments]
    problem: Problem

    def __call__(self) -> Alignments:
        return self.run(self.problem)


def measure_selection(
    sizes: Sizes, device: torch.device, seed: int, repeats: int, warmups: int, seconds: float
) -> dict[str, Any]:
    """The third table: the whole call on a small network, against that network's own forward pass and training step."""
    say("select_pairs on a small network")
    d, classes = sizes.features, sizes.classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, classes)).to(device)
    generator = torch.Generator().manual_seed(seed)
    x, buffer_x = (torch.randn(sizes.n, d, generator=generator).to(device) for _ in range(2))
    y, buffer_y = (torch.randint(classes, (sizes.n,), generator=generator).to(device) for _ in range(2))
    buffer = (buffer_x, buffer_y)
    reference = reference_gradient(model, buffer)
    with torch.no_grad(), HeadCapture(model, example=x[:1]) as capture:
        model(x)
    outputs = capture.output

    def forward() -> object:
        with torch.no_grad():
            return model(x)

    def step() -> object:
        return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))

    draw = torch.Generator().manual_seed(seed)

    def select(criterion: Any, **given: Any) -> Callable[[], object]:
        return lambda: gradmix.select_pairs(
            model, buffer, (x, y), criterion=criterion, lam=LAM, generator=draw, **given
        )

    calls: dict[str, tuple[str, Callable[[], object]]] = {
        "forward": ("forward pass of the batch", forward),
        "step": ("forward and backward pass of the batch", step),
        "sample": ("select_pairs, sample", select("sample")),
        "class": ("select_pairs, class", select("class")),
        "sample_given": (
            "select_pairs, sample, reference and outputs given",
            select("sample", reference=reference, outputs=outputs),
        ),
        "class_given": (
            "select_pairs, class, reference and outputs given",
            select("class", reference=reference, outputs=outputs),
        ),
    }
    runs = {name: call for name, (_, call) in calls.items()}
    warmed = {name: warm_up(call, device, warmups) for name, call in runs.items()}
    samples = interleaved(runs, device, repeats=repeats, seconds=seconds)
    return {
        "model": f"Linear({d}, {d}), ReLU, Linear({d}, {classes})",
        "batch_rows": sizes.n,
        "buffer_rows": sizes.n,
        "rows": [
            {
                "name": name,
                "label": label,
                "samples": len(samples[name]),
                "warmups": warmed[name],
                "seconds": quantiles(samples[name]),
                "this_over_forward": paired_ratio(samples[name], samples["forward"]),
            }
            for name, (label, _) in calls.items()
        ],
    }


# -------------------------------------------------------------------------------------------------------------- report


def say(text: str) -> None:
    """Tell a waiting person what is going on."""
    print(f"... {text}", file=sys.stderr, flush=True)


def show_ratio(ratio: dict[str, float]) -> str:
    """The median and, in brackets, the middle of its spread."""
    digits = [f"{ratio[level]:.2g}" if ratio[level] < 100 else f"{ratio[level]:.0f}" for level in ("p50", "p20", "p80")]
    return f"{digits[0]}x ({digits[1]}-{digits[2]})"


def print_report(result: dict[str, Any]) -> None:
    """The tables of a result, for a person."""
    sizes = Sizes(**result["sizes"])
    alignment, selection = result["alignment"], result["select_pairs"]
    rows = alignment["rows"]
    print()
    print(machine_line(result["machine"]))
    favourite = alignment["favourite_probability"]
    print(
        f"N = {sizes.n}, M = {sizes.m} ({'the same rows' if sizes.own_rows else 'other rows'}), C = {sizes.classes}, "
        f"d = {sizes.features}, "
        f"float32 on {result['arguments']['device']}; favourite class's probability "
        f"{favourite['p20']:.2f} / {favourite['p50']:.2f} / {favourite['p80']:.2f} (p20 / p50 / p80)\n"
    )
    product = alignment["matrix_product"]
    refused = [f"backend {name} left out: {reason}" for name, reason in alignment["refused_backends"].items()]
    timed = sorted({row["pairs_timed"] for row in rows if row["extrapolated"]})
    show_table(
        "All pairs: inner products and cosines; speed-up over the row loop and the tuned one (20-80 %)",
        ["", "p20", "p50", "p80", "pairs/s", "over loop", "over tuned loop", "product rate", "peak memory"],
        [
            [
                row["label"] + (" *" if row["extrapolated"] else ""),
                *(show_time(row["seconds"][level]) for level in ("p20", "p50", "p80")),
                show_count(row["pairs_per_second"]),
                *(show_ratio(row["speedup_over"][name]) for name in BASELINES),
                f"{row['share_of_product_rate']:.1%}",
                show_bytes(row["peak_memory_bytes"]),
            ]
            for row in rows
        ],
        [
            f"projections and Gram product, part of the time of gradmix and the tuned loop: "
            f"{show_time(alignment['shared_products']['seconds']['p50'])}",
            f"* extrapolated from {' or '.join(map(str, timed))} of the {sizes.pairs} pairs; memory of that sample",
            f"{rows[0]['samples']} samples a row, taken in turn, after {min(r['warmups'] for r in rows)} to "
            f"{max(r['warmups'] for r in rows)} calls to warm up; ratios are of samples of the same round",
            f"product rate: {show_count(product['flops_per_second'], 'flop/s')} by torch.mm {product['shape']} in the "
            f"same rounds",
            f"flops counted for every row: {alignment['flops_formula']} = {show_count(alignment['flops'], 'flop')}",
            f"auto takes backend {alignment['auto_backend']}",
            *refused,
        ],
    )
    show_table(
        "Error against float64, and decisions (sign of the inner product) that agree",
        ["", "pairs", "inner", "cosine", "decisions", "huge logits: inner", "cosine", "decisions"],
        [
            [
                row["label"],
                str(row["error"]["pairs"]),
                *(
                    text
                    for error in (row["error"], row["error_huge_logits"])
                    for text in (f"{error['inner']:.1e}", f"{error['cosine']:.1e}", f"{error['decisions_agree']:.2%}")
                ),
            ]
            for row in rows
        ],
        [
            f"inner: max |S - S64| / max |S64|; decisions: where |S64| > {BAND:g} max |S64|",
            f"cosine: largest difference, where the gradient's norm is above {BAND:g} of the largest",
            f"huge logits: the largest is {alignment['huge_logits']['largest']:.0f}; up to {HUGE_ROWS} rows a side",
        ],
    )
    show_table(
        f"The whole call: batch of {selection['batch_rows']} rows, buffer of {selection['buffer_rows']}, "
        f"{selection['model']}",
        ["", "p20", "p50", "p80", "this / forward (20-80 %)"],
        [
            [
                row["label"],
                *(show_time(row["seconds"][level]) for level in ("p20", "p50", "p80")),
                show_ratio(row["this_over_forward"]),
            ]
            for row in selection["rows"]
        ],
        [f"estimator feature, candidates are the batch's own rows; {selection['rows'][0]['samples']} samples a row"],
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="sizes of a common case (default: imagenet)", default=argparse.SUPPRESS
    )
    parser.add_argument("--n", type=count, help="rows", default=argparse.SUPPRESS)
    parser.add_argument(
        "--m", type=count, help="candidates, other rows than the rows to mix", default=argparse.SUPPRESS
    )
    parser.add_argument("--foreign", action="store_true", help="candidates are other rows, though as many")
    parser.add_argument("--classes", type=count, help="classes", default=argparse.SUPPRESS)
    parser.add_argument("--features", type=count, help="features the head sees", default=argparse.SUPPRESS)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes unless named, few repeats: a look, not a measurement"
    )
    parser.add_argument("--repeats", type=count, help="rounds (default: 60, quick: 5)", default=argparse.SUPPRESS)
    parser.add_argument(
        "--seconds", type=positive, default=75.0, help="stop the rounds of a table then, though not before 10"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--threads", type=count, help="CPU threads (default: torch's own choice)", default=argparse.SUPPRESS
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--json", type=Path, help="also write all figures to this file", default=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    base = PRESETS[options.preset] if "preset" in options else QUICK if options.quick else PRESETS["imagenet"]
    named = {name: getattr(options, name) for name in ("n", "m", "classes", "features") if name in options}
    own_rows = base.own_rows and "m" not in options and not options.foreign
    if own_rows and "n" in options:
        named["m"] = options.n
    options.sizes = replace(base, **named, own_rows=own_rows)
    options.repeats = getattr(options, "repeats", 5 if options.quick else 60)
    check_places(parser, options)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    device = torch.device(options.device)
    if "threads" in options:
        torch.set_num_threads(options.threads)
    warmups = 2 if options.quick else 10
    keeps = keep_freed_memory()
    result: dict[str, Any] = {
        "benchmark": "selection_throughput",
        "machine": {**machine(device), "keeps_freed_memory": keeps},
        "arguments": {
            "quick": options.quick,
            "preset": getattr(options, "preset", None),
            "device": options.device,
            "threads": getattr(options, "threads", None),
            "seed": options.seed,
            "repeats": options.repeats,
            "seconds": options.seconds,
        },
        "sizes": vars(options.sizes),
        "lam": LAM,
        "band": BAND,
        "alignment": measure_alignment(options.sizes, device, options.seed, options.repeats, warmups, options.seconds),
        "select_pairs": measure_selection(
            options.sizes, device, options.seed, options.repeats, warmups, options.seconds / 3
        ),
    }
    result["machine"]["load_at_end"] = load_average()
    print_report(result)
    if "json" in options:
        write_json(options.json, result)
        print(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
