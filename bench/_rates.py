"""The machine's limits: the rates of its matrix products and of its memory, and the least time for a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from _measure import interleaved, quantiles, warm_up
from torch import Tensor

PRECISIONS = ("ieee", "tf32x3", "tf32")
"""Precisions of products of float32 numbers: in full; three TF32 products each; one TF32 product each."""


@dataclass(frozen=True)
class Rates:
    """The rates measured.

    Attributes:
        flops_per_second: by precision of the products, of :data:`PRECISIONS`; a device without TF32 has ``ieee`` only.
        bytes_per_second: read and written by a copy of a tensor that no cache holds.
    """

    flops_per_second: Mapping[str, float]
    bytes_per_second: float

    def attainable_seconds(self, flops: float, least_bytes: float, precision: str) -> float:
        """The least time for so many flops and so much traffic, were both to overlap wholly.

        A precision that was not measured is taken for ``ieee``. One that three quick products stand for may also be had
        by a product in full, so the better of the two rates counts.
        """
        rate = self.flops_per_second.get(precision, self.flops_per_second["ieee"])
        return max(flops / rate, least_bytes / self.bytes_per_second)

    def with_products_at(self, flops_per_second: float) -> Rates:
        """The same with another rate of products in full, and of three quick ones where that is now the better."""
        flops = {**self.flops_per_second, "ieee": flops_per_second}
        if "tf32" in flops:
            flops["tf32x3"] = max(flops_per_second, flops["tf32"] / 3)
        return Rates(flops, self.bytes_per_second)

    def as_figures(self) -> dict[str, object]:
        """For a result file."""
        return {"flops_per_second": dict(self.flops_per_second), "bytes_per_second": self.bytes_per_second}


@dataclass(frozen=True)
class Product:
    """A large ``torch.mm`` of float32, to be timed.

    Attributes:
        side: rows and columns of both matrices: a product takes about a tenth of a second on a CPU, 20 ms on a GPU.
        left, right: the matrices.
        tf32: whether a GPU may round their entries to TF32.
    """

    side: int
    left: Tensor
    right: Tensor
    tf32: bool = False

    @classmethod
    def on(cls, device: torch.device, quick: bool) -> Product:
        """One for this device, with products in full."""
        side = 1024 if quick else 8192 if device.type == "cuda" else 2048
        return cls(side, torch.rand(side, side, device=device), torch.rand(side, side, device=device))

    def __call__(self) -> Tensor:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        try:
            return torch.mm(self.left, self.right)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    @property
    def flops(self) -> int:
        """Operations of one call."""
        return 2 * self.side**3

    def __str__(self) -> str:
        return f"torch.mm of ({self.side} x {self.side}) ({self.side} x {self.side}), float32"


def measure_rates(product: Product, device: torch.device, quick: bool) -> Rates:
    """The rates: of products in full and, on a CUDA device, with TF32; of copying a tensor that is larger than caches.

    Medians of samples taken in turn.
    """
    cuda = device.type == "cuda"
    size = (1 << 25) if quick else (1 << 30) if cuda else (1 << 28)
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"ieee": product, "copy": lambda: target.copy_(source)}
    if cuda:
        calls["tf32"] = replace(product, tf32=True)
    for call in calls.values():
        warm_up(call, device, 3)
    taken = interleaved(calls, device, repeats=5 if quick else 15, seconds=5, least=5)
    seconds = {name: quantiles(samples)["p50"] for name, samples in taken.items()}
    flops = {name: product.flops / seconds[name] for name in calls if name != "copy"}
    return Rates(flops, 2 * size / seconds["copy"]).with_products_at(flops["ieee"])
