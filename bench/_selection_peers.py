"""Other libraries' ways to the alignment of mixed pairs: per-sample gradients of the head at the mixed features.

None of them scores pairs; each is given the mixed features as samples of a batch, some thousand pairs at a time. Where
a library is missing, or refuses, :class:`_peers.Absent` says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _peers import Absent, backpack_gradients, kronfluence_inner, opacus_gradients
from _selection_problem import Alignments, Problem, as_float32, label_vectors, mixed_pairs
from torch import Tensor, nn

from gradmix.ops.mixed_alignment import cosine

GRADIENTS: Mapping[str, Callable[..., Callable[[Tensor, Tensor], dict[str, Tensor]]]] = {
    "opacus": opacus_gradients,
    "backpack": backpack_gradients,
}
"""Those that make whole per-sample gradients."""

LABELS = {"opacus": "opacus GradSampleModule", "backpack": "backpack BatchGrad", "kronfluence": "kronfluence, identity"}
"""Their names in the tables."""

INNER_ONLY = frozenset({"kronfluence"})
"""Those that give no norms, so no cosines."""


class PeerWay:
    """One library's way, a chunk of pairs at a time; its hooks are set up once for each head and left out of the time.

    Args:
        peer: one of :data:`LABELS`.
    """

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._for: tuple[Tensor, Tensor] | None = None
        self._way: Callable[[Tensor, Tensor], Any] | None = None

    def __call__(self, problem: Problem, chunk: int) -> Alignments:
        """Inner products and, where the library has norms, cosines of all pairs, (N, M).

        Raises:
            Absent: the library is not installed or cannot serve the head.
        """
        p = as_float32(problem)
        way, y_a, y_b = self._ready(p), *label_vectors(p)
        toward_weight, toward_bias = p.reference[:, :-1].flatten(), p.reference[:, -1].contiguous()
        inner, norm = [], []
        for pairs in torch.arange(p.pairs, device=y_a.device).split(chunk):
            h, y = mixed_pairs(p, pairs, y_a, y_b)
            # Its hooks may warn about inputs without gradients; these are meant to have none.
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = way(h, y)
            if self._peer in INNER_ONLY:
                inner.append(found.detach())
                continue
            flat, g_bias = found["0.weight"].flatten(1), found["0.bias"]
            inner.append(flat @ toward_weight + g_bias @ toward_bias)
            norm.append(torch.hypot(torch.linalg.vector_norm(flat, dim=1), torch.linalg.vector_norm(g_bias, dim=1)))
        shape = (len(y_a), len(y_b))
        whole = torch.cat(inner).view(shape)
        if not norm:
            return whole, None
        return whole, cosine(whole, torch.cat(norm).view(shape), p.reference.norm())

    def _ready(self, p: Problem) -> Callable[[Tensor, Tensor], Any]:
        given = (p.weight, p.reference)
        if self._way is None or self._for is None or any(a is not b for a, b in zip(self._for, given, strict=True)):
            classes, width = p.weight.shape
            layer = nn.Linear(width, classes, device=p.weight.device)
            head = nn.Sequential(layer)
            with torch.no_grad():
                layer.weight.copy_(p.weight)
                layer.bias.copy_(p.bias)
            first = torch.arange(min(2, p.pairs), device=p.weight.device)
            x, y = mixed_pairs(p, first, *label_vectors(p))
            with torch.enable_grad():
                if self._peer in GRADIENTS:
                    self._way = GRADIENTS[self._peer](head, x, y)
                else:
                    direction = {"0.weight": p.reference[:, :-1].contiguous(), "0.bias": p.reference[:, -1]}
                    self._way = kronfluence_inner(head, x, y, direction)
            self._for = given
        return self._way


def usable(problem: Problem) -> tuple[dict[str, PeerWay], dict[str, str]]:
    """The libraries that can do it, tried on a few pairs, and the reasons of the others."""
    ways: dict[str, PeerWay] = {}
    refused: dict[str, str] = {}
    part = problem.first(min(2, len(problem.labels_a)), min(2, len(problem.labels_b)))
    for peer in LABELS:
        way = PeerWay(peer)
        try:
            way(part, 4)
        except Absent as reason:
            refused[peer] = str(reason)
        else:
            ways[peer] = way
    return ways, refused
