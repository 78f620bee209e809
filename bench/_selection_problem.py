"""The problem that the ways to align mixed pairs are given: its sizes, its inputs, and the truth in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmix.ops.mixed_alignment import cosine

LAM = 0.3
"""The mixing weight; not 0.5, at which swapped weights would go unnoticed."""

Alignments = tuple[Tensor, Tensor | None]
"""Inner products and cosines of all pairs, (N, M) float32; no cosines from a way that has no norms."""


@dataclass(frozen=True)
class Sizes:
    """N samples, M candidates, C classes, d features, whether the candidates are the samples, the buffer's samples."""

    n: int
    m: int
    classes: int
    features: int
    own_rows: bool = False
    buffer: int = 2000

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return self.n * self.m

    @property
    def flops(self) -> int:
        """Operations of the factorised form: four products over classes, the projections U, and the Gram product."""
        products = 8 * self.n * self.m * self.classes
        projected = self.n if self.own_rows else self.n + self.m
        projections = 2 * projected * self.classes * (self.features + 1)
        gram = 2 * self.n * self.m * self.features
        return products + projections + gram

    def least_bytes(self, element: int) -> int:
        """Every input read once and every result written once.

        Args:
            element: bytes of a feature or a logit; the reference and the results are float32, labels int64.
        """
        rows = self.n if self.own_rows else self.n + self.m
        read = rows * ((self.features + self.classes) * element + 8) + 4 * self.classes * (self.features + 1)
        return read + 2 * 4 * self.n * self.m


PRESETS = {
    "imagenet": Sizes(256, 256, 1000, 2048, own_rows=True, buffer=20_000),
    "imagenet-vit": Sizes(256, 256, 1000, 768, own_rows=True, buffer=20_000),
    "imagenet21k": Sizes(256, 256, 21_841, 768, own_rows=True, buffer=20_000),
    "tiny-imagenet": Sizes(256, 256, 200, 512, own_rows=True, buffer=2000),
    "cifar100": Sizes(256, 256, 100, 512, own_rows=True, buffer=2000),
    "cifar10": Sizes(256, 256, 10, 512, own_rows=True, buffer=500),
    # The perceptron of the accuracy tables: 64 samples of the task and 64 replayed ones.
    "perceptron": Sizes(128, 128, 10, 256, own_rows=True, buffer=320),
}
"""The candidates are the batch's own samples, as in ``select_pairs`` by default."""
QUICK = PRESETS["perceptron"]


@dataclass(frozen=True)
class Problem:
    """One set of inputs on one device, all float32 but for features and logits, which may be half as wide.

    Attributes:
        features_a, logits_a, labels_a: (N, d), (N, C), (N,): the samples.
        features_b, logits_b, labels_b: (M, d), (M, C), (M,): the candidates; the same tensors if they are the samples.
        weight, bias: (C, d), (C,): the head that made the logits.
        reference: (C, d + 1): the mean gradient of further samples.
        lam: the weight of the sample in a mixture.
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
        """Number of pairs."""
        return len(self.labels_a) * len(self.labels_b)

    @property
    def own_rows(self) -> bool:
        """Whether the candidates are the samples themselves."""
        return self.features_a is self.features_b

    def first(self, n: int, m: int) -> Problem:
        """The same with the first n samples and the first m candidates only, which may then share no tensors."""
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

    def stored_in(self, dtype: torch.dtype) -> Problem:
        """The same with features and logits rounded to ``dtype``."""
        names = ("features_a", "logits_a", "features_b", "logits_b")
        return _share(replace(self, **{name: getattr(self, name).to(dtype) for name in names}), self.own_rows)


def as_float32(problem: Problem) -> Problem:
    """The same with features and logits in float32; itself if they are."""
    return problem if problem.features_a.dtype == torch.float32 else problem.to(torch.float32)


def _share(problem: Problem, own_rows: bool) -> Problem:
    """The same with the samples for candidates, if they are to be their own."""
    if not own_rows:
        return problem
    p = problem
    return replace(p, features_b=p.features_a, logits_b=p.logits_a, labels_b=p.labels_a)


def make_problem(sizes: Sizes, seed: int) -> Problem:
    """Samples as a network in training has them, on the CPU; equal for equal seeds.

    The features are the ReLU of noise plus a share of the class's own direction, a share that differs from sample to
    sample; the rows of the head's weight are these directions. The logits are scaled so that the median of the samples'
    largest probabilities is 0.6, which leaves some samples almost certain and some undecided.
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
    """(N, M, ...): all mixtures of samples."""
    return lam * a[:, None] + (1.0 - lam) * b


def label_vectors(p: Problem) -> tuple[Tensor, Tensor]:
    """One-hot labels of both sides, (N, C) and (M, C) float32."""
    classes = len(p.bias)
    return F.one_hot(p.labels_a, classes).float(), F.one_hot(p.labels_b, classes).float()


def mixed_pairs(p: Problem, pairs: Tensor, y_a: Tensor, y_b: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed features (K, d) and label vectors (K, C) of the pairs numbered ``pairs`` (K,), sample by sample."""
    i, j = pairs // len(y_b), pairs % len(y_b)
    mu = 1.0 - p.lam
    return p.lam * p.features_a[i] + mu * p.features_b[j], p.lam * y_a[i] + mu * y_b[j]
