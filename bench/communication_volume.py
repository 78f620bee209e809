"""Computes the bytes that several processes exchange in a step with selection, and the operations of each.

Nothing is measured here: it is arithmetic from the sizes of network, batch and data, as Markdown tables, which
docs/scaling.md shows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT = 4
"""Bytes of a value; gradients, features, logits and references are sent in float32."""

NVLINK, INFINIBAND = 450e9, 50e9
"""Bytes a second that a GPU sends: NVLink 4 inside a machine (900 GB/s for both directions), NDR InfiniBand outside."""

MACHINE = 8
"""GPUs of a machine; more processes talk over InfiniBand."""

IMAGE = 3 * 224 * 224
"""Values of an input sample."""

TABLE_ROWS, CLASS_SAMPLES = 2048, 32
"""Samples behind a class table at the most, and of each class."""


@dataclass(frozen=True)
class Network:
    """A network: parameters theta, features d before its head, and operations of one sample's forward pass."""

    name: str
    parameters: int
    features: int
    forward_flops: float


NETWORKS = (
    Network("ResNet-50", 25_557_032, 2048, 8.178e9),
    Network("ViT-B/16", 86_567_656, 768, 35.13e9),
)


@dataclass(frozen=True)
class Setting:
    """A run: W processes, N samples of a step over all of them, C classes and K samples of the buffer."""

    network: Network
    processes: int
    rows: int
    classes: int = 1000
    buffer: int = 20_000

    @property
    def bandwidth(self) -> float:
        """Bytes a second at which a process sends."""
        return NVLINK if self.processes <= MACHINE else INFINIBAND

    # ------------------------------------------------------------------------------------ bytes that a process sends

    def all_reduced(self, values: float) -> float:
        """Bytes that a process sends to have so many float32 values summed over all: ring, 2 (W - 1) / W of them."""
        return 2 * (self.processes - 1) / self.processes * FLOAT * values

    def all_gathered(self, size: float) -> float:
        """Bytes that a process sends (and receives) until all have all ``size`` bytes: (W - 1) / W of them."""
        return (self.processes - 1) / self.processes * size

    @property
    def gradients(self) -> float:
        """The network's gradients, averaged: 2 theta (W - 1) / W values."""
        return self.all_reduced(self.network.parameters)

    @property
    def outputs(self) -> float:
        """Features and logits of all samples: N (d + C) values."""
        return self.all_gathered(FLOAT * self.rows * (self.network.features + self.classes))

    @property
    def inputs(self) -> float:
        """Inputs of all samples to all processes: N Q bytes."""
        return self.all_gathered(FLOAT * self.rows * IMAGE)

    @property
    def partners(self) -> float:
        """One partner's input for each of a process's N / W samples, from wherever it lies."""
        return self.all_gathered(FLOAT * self.rows / self.processes * IMAGE)

    @property
    def reference(self) -> float:
        """The reference gradient, once a refresh: C (d + 1) values."""
        return self.all_reduced(self.classes * (self.network.features + 1))

    @property
    def table(self) -> float:
        """Features and logits of the samples behind a class table, once a refresh: R (d + C) values."""
        rows = self.classes * max(1, min(CLASS_SAMPLES, TABLE_ROWS // self.classes))
        return self.all_gathered(FLOAT * rows * (self.network.features + self.classes))

    # ----------------------------------------------------------------------------------- operations of each process

    @property
    def step_flops(self) -> float:
        """Forward and backward pass of a process's mixed samples, the backward one counted twice."""
        return 3 * self.network.forward_flops * self.rows / self.processes

    @property
    def selection_flops(self) -> float:
        """All pairs of the N samples, on every process: 8 N N C + 2 N C (d + 1) + 2 N N d."""
        return _aligned(self.rows, self.rows, self)

    @property
    def own_selection_flops(self) -> float:
        """The pairs of a process's N / W samples with all N: what its own decisions need."""
        return _aligned(self.rows / self.processes, self.rows, self)

    @property
    def local_selection_flops(self) -> float:
        """The pairs of a process's N / W samples with one another."""
        return _aligned(self.rows / self.processes, self.rows / self.processes, self)

    @property
    def refresh_flops(self) -> float:
        """A process's share of a pass over the buffer: its forward passes and 2 K C (d + 1)."""
        one = self.network.forward_flops + 2 * self.classes * (self.network.features + 1)
        return one * self.buffer / self.processes


def _aligned(rows: float, candidates: float, setting: Setting) -> float:
    classes, width = setting.classes, setting.network.features
    return 8 * rows * candidates * classes + 2 * candidates * classes * (width + 1) + 2 * rows * candidates * width


BATCH = 512
"""256 new and 256 replayed samples."""

SPLIT = (2, 8, 64)
GROWN = (2, 8, 64, 1024)
"""Processes that share one batch of 512 samples, and that have 512 samples each; 1024 cannot share 512 samples."""


def settings(network: Network) -> list[Setting]:
    """The rows of a network's tables."""
    return [Setting(network, w, BATCH) for w in SPLIT] + [Setting(network, w, BATCH * w) for w in GROWN]


def show_size(size: float) -> str:
    """Bytes with kB, MB, GB or TB: powers of ten, as bandwidths are stated."""
    return _shown(size, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def show_seconds(seconds: float) -> str:
    """A time with the unit that suits."""
    return _shown(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)), "s")


def show_flops(flops: float) -> str:
    """Operations with the prefix that suits."""
    return _shown(flops, (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)), "")


def _shown(value: float, units: Sequence[tuple[str, float]], smallest: str) -> str:
    for unit, scale in units:
        if value >= scale:
            number = value / scale
            return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
    return f"{value:.3g} {smallest}".rstrip()


def show_share(part: float, whole: float) -> str:
    """Percent, or how many times as much."""
    share = part / whole
    return f"{share:.1f}x" if share >= 1 else f"{share * 100:.2g} %"


def bytes_table(network: Network) -> str:
    """Bytes that a process sends, by exchange."""
    heads = [
        "processes",
        "samples, all",
        "gradients",
        "outputs",
        "all inputs",
        "partners' inputs",
        "reference",
        "table",
    ]
    lines = [
        [
            str(s.processes),
            f"{s.rows:,}",
            *map(show_size, (s.gradients, s.outputs, s.inputs, s.partners, s.reference, s.table)),
        ]
        for s in settings(network)
    ]
    return _markdown(heads, lines)


def seconds_table(network: Network) -> str:
    """Time of these bytes at the link's bandwidth."""
    heads = ["processes", "samples, all", "link", "gradients", "outputs", "all inputs", "partners' inputs", "reference"]
    lines = []
    for s in settings(network):
        sent = (s.gradients, s.outputs, s.inputs, s.partners, s.reference)
        link = "NVLink" if s.bandwidth == NVLINK else "InfiniBand"
        lines.append([str(s.processes), f"{s.rows:,}", link, *(show_seconds(size / s.bandwidth) for size in sent)])
    return _markdown(heads, lines)


def flops_table(network: Network) -> str:
    """Operations of a process, selection and refresh as shares of its forward and backward pass."""
    heads = [
        "processes",
        "samples, all",
        "forward and backward",
        "all pairs on every process",
        "own samples with all",
        "own samples only",
        "refresh",
        "one (N, N) matrix",
    ]
    lines = []
    for s in settings(network):
        parts = (s.selection_flops, s.own_selection_flops, s.local_selection_flops, s.refresh_flops)
        shown = [f"{show_flops(part)} ({show_share(part, s.step_flops)})" for part in parts]
        lines.append([str(s.processes), f"{s.rows:,}", show_flops(s.step_flops), *shown, show_size(FLOAT * s.rows**2)])
    return _markdown(heads, lines)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["--:"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page_tables() -> list[str]:
    """All tables, in the order in which the page shows them."""
    return [make(network) for make in (bytes_table, seconds_table, flops_table) for network in NETWORKS]


def main() -> int:
    """Print the tables."""
    for make in (bytes_table, seconds_table, flops_table):
        for network in NETWORKS:
            print(f"{network.name}: {(make.__doc__ or '').splitlines()[0]}\n\n{make(network)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
