"""The ways to align all pairs of mixed samples: the package's, plain torch's, and what one would use otherwise.

Each takes a :class:`_selection_problem.Problem` and gives inner products and, but for a few, cosines of all its pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _measure import free_memory, seconds_of, show_bytes
from _selection_peers import INNER_ONLY, LABELS, PeerWay, usable
from _selection_problem import Alignments, Problem, as_float32, label_vectors, mixed_pairs
from torch import Tensor

from gradmix import kernels
from gradmix.ops.mixed_alignment import OPERATOR, Side, cosine, mixed_alignment, mixed_alignment_reference

INTERPRETED = "it would run in Triton's interpreter, which is for tests"


@dataclass(frozen=True)
class Rival:
    """One way to do the work.

    Attributes:
        name: its key in the result file.
        label: its name in the tables.
        run: from a problem to (inner, cosine), both (N, M).
        through_head: it runs the head on mixed features, and never sees the logits.
        sample: None, or the (samples, candidates) whose pairs are timed and taken for all.
        chunk: None, or the pairs or samples it takes at a time.
        precision: of its products, one of :data:`_rates.PRECISIONS`.
        has_cosine: whether it gives cosines as well.
        in_torch: whether its memory is torch's, which counts it.
    """

    name: str
    label: str
    run: Callable[[Problem], Alignments]
    through_head: bool = False
    sample: tuple[int, int] | None = None
    chunk: int | None = None
    precision: str = "ieee"
    has_cosine: bool = True
    in_torch: bool = True

    def timed(self, problem: Problem) -> Problem:
        """The part of the problem that is timed."""
        return problem if self.sample is None else problem.first(*self.sample)


@dataclass(frozen=True)
class OutOfMemory:
    """A way that this device has no room for.

    Attributes:
        name, label: as :class:`Rival`.
        needed: bytes of its largest tensor, or None where it was tried and the allocator gave up.
        room: bytes that it may take.
    """

    name: str
    label: str
    needed: int | None
    room: int

    def __str__(self) -> str:
        if self.needed is None:
            return "out of memory when tried"
        return f"out of memory: would need {show_bytes(self.needed)}, has {show_bytes(self.room)}"


@dataclass(frozen=True)
class Field:
    """Who takes part, who cannot, and how that was decided.

    Attributes:
        rivals: each at its best chunk.
        out_of_memory: those that there is no room for.
        refused: backends and libraries that cannot run, and why.
        auto: the backend that ``auto`` takes.
        searched: for each way that has a chunk to choose, seconds a pair by chunk.
    """

    rivals: list[Rival]
    out_of_memory: list[OutOfMemory]
    refused: dict[str, str]
    auto: str
    searched: dict[str, dict[int, float]] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------ the ways of all


def sides_of(p: Problem) -> tuple[Side, Side]:
    """Both sides of the pairs, as the package's operator takes them."""
    return Side(p.features_a, p.logits_a, p.labels_a), Side(p.features_b, p.logits_b, p.labels_b)


def by_gradmix(problem: Problem, backend: str, precision: str) -> Alignments:
    """The package's operator."""
    p = problem
    how: Any = {"precision": precision, "backend": backend}
    inner, norm = mixed_alignment(*sides_of(p), p.reference, p.lam, **how)
    return inner, cosine(inner, norm, p.reference.norm())


def by_plain_torch(problem: Problem) -> Alignments:
    """The factorised form as one writes it down: four products over classes, and gathers for the labels.

    No label is left out of the products and no pair is computed again, so that residuals of well-fitted pairs lose
    digits, and pairs whose products of exponentials underflow come out as NaN.
    """
    p = as_float32(problem)
    lam, mu = p.lam, 1.0 - p.lam
    u_a, u_b = projections(p)
    a = torch.exp(lam * (p.logits_a - p.logits_a.amax(1, keepdim=True)))
    b = torch.exp(mu * (p.logits_b - p.logits_b.amax(1, keepdim=True)))
    z = a @ b.T
    at_a, at_b = p.labels_a[:, None], p.labels_b[:, None]
    expected = torch.addmm((a * u_a) @ b.T, a, (b * u_b).T, beta=lam, alpha=mu) / z
    labelled = (
        lam * (lam * u_a.gather(1, at_a) + mu * u_b[:, p.labels_a].T)
        + mu * (lam * u_a[:, p.labels_b] + mu * u_b.gather(1, at_b).T)
    )  # fmt: skip
    inner = expected - labelled
    at_labels = lam * a.gather(1, at_a) * b[:, p.labels_a].T + mu * a[:, p.labels_b] * b.gather(1, at_b).T
    same = (at_a == p.labels_b).float()
    square = (a.square() @ b.square().T) / z.square() - 2 * at_labels / z + (lam * lam + mu * mu + 2 * lam * mu * same)
    norm = square.clamp_(min=0).sqrt_() * feature_norms(p)
    return inner, cosine(inner, norm, p.reference.norm())


@np.errstate(divide="ignore", invalid="ignore")
def by_plain_numpy(problem: Problem) -> Alignments:
    """:func:`by_plain_torch` in numpy, on the CPU."""
    p = as_float32(problem)
    lam, mu = np.float32(p.lam), np.float32(1.0 - p.lam)
    h_a, z_a, h_b, z_b, reference = (
        v.numpy() for v in (p.features_a, p.logits_a, p.features_b, p.logits_b, p.reference)
    )
    y_a, y_b = p.labels_a.numpy(), p.labels_b.numpy()
    n, m = np.arange(len(y_a)), np.arange(len(y_b))
    u_a = h_a @ reference[:, :-1].T + reference[:, -1]
    u_b = u_a if p.own_rows else h_b @ reference[:, :-1].T + reference[:, -1]
    a = np.exp(lam * (z_a - z_a.max(1, keepdims=True)))
    b = np.exp(mu * (z_b - z_b.max(1, keepdims=True)))
    z = a @ b.T
    expected = (lam * ((a * u_a) @ b.T) + mu * (a @ (b * u_b).T)) / z
    inner = expected - lam * (lam * u_a[n, y_a][:, None] + mu * u_b[:, y_a].T)
    inner -= mu * (lam * u_a[:, y_b] + mu * u_b[m, y_b])
    at_labels = lam * a[n, y_a][:, None] * b[:, y_a].T + mu * a[:, y_b] * b[m, y_b]
    same = (y_a[:, None] == y_b).astype(np.float32)
    square = ((a * a) @ (b * b).T) / (z * z) - 2 * at_labels / z + (lam * lam + mu * mu + 2 * lam * mu * same)
    mixed = lam * lam * (h_a * h_a).sum(1)[:, None] + mu * mu * (h_b * h_b).sum(1) + 2 * lam * mu * (h_a @ h_b.T) + 1
    norm = np.sqrt(np.maximum(square, 0)) * np.sqrt(np.maximum(mixed, 0))
    angle = np.divide(inner, norm * np.linalg.norm(reference), out=np.zeros_like(inner), where=norm > 0)
    return torch.from_numpy(inner), torch.from_numpy(np.clip(angle, -1, 1))


def by_reference(problem: Problem) -> Alignments:
    """The package's reference: the formula, pair by pair."""
    p = as_float32(problem)
    inner, norm = mixed_alignment_reference(*sides_of(p), p.reference, p.lam)
    return inner, cosine(inner, norm, p.reference.norm())


def projections(p: Problem) -> tuple[Tensor, Tensor]:
    """[h; 1] G^T of both sides, (N, C) and (M, C)."""
    weight, bias = p.reference[:, :-1], p.reference[:, -1]
    u_a = F.linear(p.features_a, weight, bias)
    return u_a, u_a if p.own_rows else F.linear(p.features_b, weight, bias)


def feature_norms(p: Problem) -> Tensor:
    """||[h; 1]|| of all mixtures, (N, M), from the Gram product."""
    lam, mu = p.lam, 1.0 - p.lam
    square_a, square_b = p.features_a.square().sum(1), p.features_b.square().sum(1)
    square = torch.addmm(
        (lam * lam * square_a)[:, None] + mu * mu * square_b, p.features_a, p.features_b.T, alpha=2 * lam * mu
    )
    return square.clamp_(min=0).add_(1).sqrt_()


def by_gradient_row_loop(problem: Problem) -> Alignments:
    """Sample by sample, G^T r multiplied by the mixed features: nothing is shared between samples."""
    p = as_float32(problem)
    lam, mu = p.lam, 1.0 - p.lam
    y_a, y_b = label_vectors(p)
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
    """Sample by sample, as one writes it once it is seen that [h; 1] G^T need be had only once for every sample."""
    p = as_float32(problem)
    lam, mu = p.lam, 1.0 - p.lam
    u_a, u_b = projections(p)
    y_a, y_b = label_vectors(p)
    inner, norm = [], []
    for h, z, y, u in zip(p.features_a, p.logits_a, y_a, u_a, strict=True):
        residual = torch.softmax(lam * z + mu * p.logits_b, 1) - (lam * y + mu * y_b)
        inner.append((residual * (lam * u + mu * u_b)).sum(1))
        norm.append(residual.norm(dim=1) * ((lam * h + mu * p.features_b).square().sum(1) + 1).sqrt())
    whole = torch.stack(inner)
    return whole, cosine(whole, torch.stack(norm), p.reference.norm())


def by_tuned_row_loop(problem: Problem) -> Alignments:
    """The per-sample loop with as few passes over memory as plain torch allows; the norms from a Gram product."""
    p = as_float32(problem)
    lam, mu = p.lam, 1.0 - p.lam
    u_a, u_b = projections(p)
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
    return inner, cosine(inner, norm.mul_(feature_norms(p)), p.reference.norm())


def by_broadcast(problem: Problem, rows: int) -> Alignments:
    """The tuned per-sample loop for several samples at a time, by broadcasting to (samples, M, C)."""
    p = as_float32(problem)
    lam, mu = p.lam, 1.0 - p.lam
    u_a, u_b = projections(p)
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
    return (whole := torch.cat(inner)), cosine(whole, torch.cat(norm).mul_(feature_norms(p)), p.reference.norm())


def by_broadcast_at_once(problem: Problem) -> Alignments:
    """:func:`by_broadcast` with every sample at a time."""
    return by_broadcast(problem, len(problem.labels_a))


# ------------------------------------------------------------------------------------------------ the ways of gradients


def by_embeddings(problem: Problem, chunk: int) -> Alignments:
    """The last-layer formula of CORDS and DeepCore: the gradients r [h; 1]^T themselves, then their products with G."""
    p = as_float32(problem)
    lam, mu = p.lam, 1.0 - p.lam
    y_a, y_b = label_vectors(p)
    toward = p.reference.flatten()
    inner, norm = [], []
    for pairs in torch.arange(p.pairs, device=y_a.device).split(chunk):
        i, j = pairs // len(y_b), pairs % len(y_b)
        h, y = mixed_pairs(p, pairs, y_a, y_b)
        residual = torch.softmax(lam * p.logits_a[i] + mu * p.logits_b[j], 1) - y
        embeddings = torch.einsum("kc,kd->kcd", residual, F.pad(h, (0, 1), value=1.0)).flatten(1)
        inner.append(embeddings @ toward)
        norm.append(torch.linalg.vector_norm(embeddings, dim=1))
    shape = (len(y_a), len(y_b))
    whole = torch.cat(inner).view(shape)
    return whole, cosine(whole, torch.cat(norm).view(shape), p.reference.norm())


def by_embeddings_at_once(problem: Problem) -> Alignments:
    """:func:`by_embeddings` with every pair at a time, as these libraries keep the embeddings of all their samples."""
    return by_embeddings(problem, problem.pairs)


def _loss(weight: Tensor, bias: Tensor, features: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, weight, bias), label)


def by_autograd(problem: Problem) -> Alignments:
    """Pair by pair: ``torch.autograd.grad`` of the loss of the mixed features."""
    p = as_float32(problem)
    lam, mu = p.lam, 1.0 - p.lam
    parameters = p.weight.clone().requires_grad_(), p.bias.clone().requires_grad_()
    toward_weight, toward_bias = p.reference[:, :-1].flatten(), p.reference[:, -1].contiguous()
    y_a, y_b = label_vectors(p)
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
    p = as_float32(problem)
    gradients = torch.func.vmap(torch.func.grad(_loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    toward_weight, toward_bias = p.reference[:, :-1].flatten(), p.reference[:, -1].contiguous()
    y_a, y_b = label_vectors(p)
    inner, norm = [], []
    for pairs in torch.arange(p.pairs, device=y_a.device).split(chunk):
        g_weight, g_bias = gradients(p.weight, p.bias, *mixed_pairs(p, pairs, y_a, y_b))
        flat = g_weight.flatten(1)
        inner.append(flat @ toward_weight + g_bias @ toward_bias)
        norm.append(torch.hypot(torch.linalg.vector_norm(flat, dim=1), torch.linalg.vector_norm(g_bias, dim=1)))
    shape = (len(y_a), len(y_b))
    whole = torch.cat(inner).view(shape)
    return whole, cosine(whole, torch.cat(norm).view(shape), p.reference.norm())


def by_jvp(problem: Problem, chunk: int) -> Alignments:
    """``torch.func.jvp`` of the losses of a chunk of pairs along the reference: inner products and nothing else."""
    p = as_float32(problem)
    y_a, y_b = label_vectors(p)
    along = p.reference[:, :-1], p.reference[:, -1]
    inner = []
    for pairs in torch.arange(p.pairs, device=y_a.device).split(chunk):
        h, y = mixed_pairs(p, pairs, y_a, y_b)
        losses = _Losses(h, y)
        inner.append(torch.func.jvp(losses, (p.weight, p.bias), along)[1])
    return torch.cat(inner).view(len(y_a), len(y_b)), None


@dataclass(frozen=True)
class _Losses:
    """Cross-entropy of each sample of features (K, d) with label vectors (K, C), as a function of the head."""

    h: Tensor
    y: Tensor

    def __call__(self, weight: Tensor, bias: Tensor) -> Tensor:
        return -(torch.log_softmax(F.linear(self.h, weight, bias), 1) * self.y).sum(1)


# ------------------------------------------------------------------------------------------------------- who takes part


@dataclass(frozen=True)
class _Chunked:
    """A way that takes some pairs at a time."""

    name: str
    label: str
    run: Callable[[Problem, Any], Alignments]
    bytes_a_pair: int
    chunks: Sequence[int] = (1, 4, 16, 64, 256, 1024, 4096)
    through_head: bool = True
    has_cosine: bool = True


def make_field(
    problem: Problem, device: torch.device, *, precisions: Iterable[str] = ("tf32x3",), peers: bool = True
) -> Field:
    """The rivals on this device, each at its best chunk.

    Args:
        problem: what they will be given.
        device: where it lies.
        precisions: of the Triton body's products, one row each.
        peers: whether to ask for other libraries.
    """
    p = problem
    n, m, (classes, width) = len(p.labels_a), len(p.labels_b), p.reference.shape
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    of_torch = "tf32" if tf32 else "ieee"
    rivals, out_of_memory, searched = [], [], {}
    ours, refused, auto = _backends(p, precisions, of_torch)
    rivals += [
        *ours,
        Rival("plain_torch", "factorised, plain torch", by_plain_torch),
        *([Rival("plain_numpy", "factorised, numpy", by_plain_numpy, in_torch=False)] if device.type == "cpu" else []),
        Rival("row_loop", "per-sample loop", by_row_loop),
        Rival("row_loop_tuned", "per-sample loop, tuned", by_tuned_row_loop),
        Rival("row_loop_gradients", "per-sample loop, from gradients", by_gradient_row_loop, sample=(min(n, 4), m)),
    ]
    # Tensors of a size that stays in reach of the caches are quicker on a CPU; a GPU wants large ones.
    most = room(device)
    chunk_bytes = min(most // 4, (1 << 29) if device.type == "cpu" else (1 << 34))

    rows = _within((2, 8, 32, 128, 512), n, chunk_bytes // (m * classes * 4))
    best, searched["broadcast"] = _best(by_broadcast, {k: p for k in rows}, device)
    if best is None:
        out_of_memory.append(OutOfMemory("broadcast", "broadcast, some samples at a time", None, most))
    else:
        bound = Bound(by_broadcast, best)
        rivals.append(Rival("broadcast", f"broadcast, {best} samples at a time", bound, chunk=best))

    gradient = 4 * classes * width
    forward = 4 * 6 * classes + 4 * 2 * width  # features, logits and what a pass keeps of them
    ways = [
        _Chunked("embeddings", "last-layer formula (CORDS, DeepCore)", by_embeddings, gradient, through_head=False),
        _Chunked("vmap_grad", "vmap(grad)", by_vmap, gradient),
        _Chunked("jvp", "func.jvp, inner products only", by_jvp, forward, (256, 1024, 4096, 16384), has_cosine=False),
    ]
    if peers:
        found, absent = usable(p)
        refused |= absent
        ways += [_of_peer(peer, way, gradient, forward) for peer, way in found.items()]
    for way in ways:
        if way.bytes_a_pair > most:
            out_of_memory.append(OutOfMemory(way.name, way.label, way.bytes_a_pair, most))
            continue
        # Enough pairs that the cost of a call is not all there is, and not many where each takes long.
        least = max(2, min(16, (1 << 28) // way.bytes_a_pair))
        chunks = _within(way.chunks, n * m, chunk_bytes // way.bytes_a_pair)
        parts = {k: p.first(*block(max(k, least), n, m)) for k in chunks}
        best, searched[way.name] = _best(way.run, parts, device)
        if best is None:
            out_of_memory.append(OutOfMemory(way.name, way.label, None, most))
            continue
        rivals.append(
            Rival(
                way.name,
                f"{way.label}, {best} pair{'s' if best > 1 else ''} at a time",
                Bound(way.run, best),
                way.through_head,
                block(max(best, least), n, m),
                best,
                has_cosine=way.has_cosine,
            )
        )

    at_once = {
        # The mixed logits and the residual.
        "broadcast_at_once": ("broadcast, all samples at once", by_broadcast_at_once, 2 * 4 * n * m * classes),
        "embeddings_at_once": ("last-layer formula, all pairs at once", by_embeddings_at_once, n * m * gradient),
    }
    for name, (label, run, needed) in at_once.items():
        if needed > most:
            out_of_memory.append(OutOfMemory(name, label, needed, most))
        else:
            rivals.append(Rival(name, label, run))
    few = block(16, n, m)
    rivals += [
        Rival("autograd", "autograd.grad, pair by pair", by_autograd, through_head=True, sample=few),
        Rival("reference", "gradmix, backend reference", by_reference, sample=few),
    ]
    if tf32:
        rivals = [rival if rival in ours else _at(rival, of_torch) for rival in rivals]
    return Field(rivals, out_of_memory, refused, auto, searched)


def _backends(p: Problem, precisions: Iterable[str], of_torch: str) -> tuple[list[Rival], dict[str, str], str]:
    lams = torch.tensor([p.lam], dtype=torch.float64, device=p.reference.device)
    arguments = (p.features_a, p.logits_a, p.labels_a, p.features_b, p.logits_b, p.labels_b, p.reference, lams)
    rivals, refused = [], {}
    for body in OPERATOR.backends:
        if body.name == "reference":
            continue
        reason = body.available() or body.can_run(*arguments)
        if body.name == "triton" and kernels.is_interpreted():
            reason = INTERPRETED
        if reason:
            refused[f"backend {body.name}"] = reason
        elif body.name == "triton":
            for precision in precisions:
                name, label = f"triton_{precision}", f"gradmix, backend triton, {precision}"
                rivals.append(Rival(name, label, _Gradmix("triton", precision), precision=precision))
        else:
            label = f"gradmix, backend {body.name}"
            rivals.append(Rival(body.name, label, _Gradmix(body.name, "tf32x3"), precision=of_torch))
    return rivals, refused, OPERATOR.choose("auto", *arguments).name


def _of_peer(peer: str, way: PeerWay, gradient: int, forward: int) -> _Chunked:
    if peer in INNER_ONLY:
        label = f"{LABELS[peer]}, inner products only"
        return _Chunked(peer, label, way, forward, (256, 1024, 4096, 16384), has_cosine=False)
    return _Chunked(peer, LABELS[peer], way, gradient)


def _at(rival: Rival, precision: str) -> Rival:
    return Rival(**{**vars(rival), "precision": precision})


@dataclass(frozen=True)
class _Gradmix:
    """:func:`by_gradmix` by one body."""

    backend: str
    precision: str

    def __call__(self, problem: Problem) -> Alignments:
        return by_gradmix(problem, self.backend, self.precision)


@dataclass(frozen=True)
class Bound:
    """``run`` with its second argument fixed."""

    run: Callable[[Problem, Any], Alignments]
    argument: Any

    def __call__(self, problem: Problem) -> Alignments:
        return self.run(problem, self.argument)


def room(device: torch.device) -> int:
    """Bytes that one way may take: of a CPU's free memory half, since a container may be granted less than it shows."""
    return int(free_memory(device) * (0.9 if device.type == "cuda" else 0.5))


def ran_out(error: RuntimeError) -> bool:
    """Whether torch's allocator gave up."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _within(chunks: Sequence[int], most: int, fitting: int) -> list[int]:
    """The chunks that fit, none larger than the work; 1 if none does."""
    return sorted({min(chunk, most) for chunk in chunks if min(chunk, most) <= fitting}) or [1]


def block(pairs: int, n: int, m: int) -> tuple[int, int]:
    """Samples and candidates, about as many of each, with so many pairs or all there are."""
    side = min(n, max(math.isqrt(pairs - 1) + 1, -(-pairs // m)))
    return side, min(m, -(-pairs // side))


def _best(
    run: Callable[[Problem, Any], Alignments], parts: dict[int, Problem], device: torch.device
) -> tuple[int | None, dict[int, float]]:
    """The chunk with the least time a pair, None if none fits; and that time for all that fit."""
    times: dict[int, float] = {}
    for chunk, part in parts.items():
        try:
            times[chunk] = seconds_of_pairs(Bound(run, chunk), part, device)
        except RuntimeError as error:
            if not ran_out(error):
                raise
    return (min(times, key=lambda k: times[k]) if times else None), times


def seconds_of_pairs(run: Callable[[Problem], Alignments], problem: Problem, device: torch.device) -> float:
    """Seconds a pair: the best of three calls after one to warm up, or of one where that took over a second."""
    first = seconds_of(lambda: run(problem), device)
    return min(seconds_of(lambda: run(problem), device) for _ in range(1 if first > 1 else 3)) / problem.pairs
