"""Measurements of a kernel, and the rule by which they switch it on or off for a call.

A kernel is on for a call of a kind and dtype if every cell of that dtype was right, and if at all cells that enclose
the call's sizes it was faster than torch by :data:`LEAST_SPEEDUP`, in the lower quantile of the ratios. Cells enclose a
call if, on every axis, they have the largest measured size that is not above it, the smallest that is not below, and
those in between; outside of the measured sizes a kernel is off. An axis may be the extent of several dimensions (the
samples of both sides of the pairs), and then ranges from the smallest to the largest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, get_args

LEAST_SPEEDUP = 1.05
"""Torch's time over the kernel's: what is gained below this is within the spread between two runs."""

Status = Literal["right", "wrong", "crashed", "skipped"]


class Speedup(NamedTuple):
    """Torch's time divided by the kernel's in the same round.

    Attributes:
        low: 20 % quantile over the rounds.
        median: 50 % quantile.
        high: 80 % quantile.
    """

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Cell:
    """A call that is measured.

    Attributes:
        operator: name of the operator.
        backend: name of the implementation.
        kind: variant of the call that has a speed of its own, such as labels that are vectors.
        dtype: of the inputs, as ``"float32"``.
        sizes: size of each axis of the operator.
        seed: of the random inputs.
        timed: whether it is timed, and not only checked: sizes between those of the grid are checked alone.
    """

    operator: str
    backend: str
    kind: str
    dtype: str
    sizes: Mapping[str, int]
    seed: int = 0
    timed: bool = True

    def __str__(self) -> str:
        kind = f"{self.kind}, " if self.kind else ""
        return f"{kind}{self.dtype}, {describe_sizes(self.sizes)}"


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """Return sizes in words.

    >>> describe_sizes({"samples": 64, "classes": 1000})
    'samples 64, classes 1,000'
    """
    return ", ".join(f"{axis} {size:,}" for axis, size in sizes.items())


@dataclass(frozen=True)
class Measurement:
    """The result for one cell.

    Attributes:
        cell: what was called.
        status: ``"right"``; ``"wrong"``: results, decisions or their repetition are not what they must be;
            ``"crashed"``: it raised; ``"skipped"``: it was not measured.
        reason: for every other status than right, a sentence.
        error: largest error, as a share of its bound; None if it was not computed or is not finite.
        compile_seconds: time of the first call.
        torch_ms: median time of torch's implementation.
        kernel_ms: median time of the kernel.
        speedup: torch's time over the kernel's.
        rounds: number of rounds timed.
    """

    cell: Cell
    status: Status
    reason: str | None = None
    error: float | None = None
    compile_seconds: float | None = None
    torch_ms: float | None = None
    kernel_ms: float | None = None
    speedup: Speedup | None = None
    rounds: int = 0

    @property
    def is_faulty(self) -> bool:
        """Whether the kernel must not be used."""
        return self.status in ("wrong", "crashed")

    def as_values(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self) | {"speedup": self.speedup and list(self.speedup)}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Measurement:
        """Return the measurement of :meth:`as_values`.

        Raises:
            KeyError, TypeError, ValueError: the values are not those of a measurement.
        """
        speedup = values["speedup"]
        found = cls(**dict(values) | {"cell": Cell(**values["cell"]), "speedup": speedup and Speedup(*speedup)})
        if found.status not in get_args(Status):
            raise ValueError(f"status: got {found.status!r}, expected one of {', '.join(get_args(Status))}")
        if not all(isinstance(size, int) for size in found.cell.sizes.values()):
            raise TypeError(f"sizes: got {found.cell.sizes}, expected integers")
        if found.speedup is not None and not all(isinstance(ratio, float) for ratio in found.speedup):
            raise TypeError(f"speedup: got {found.speedup}, expected numbers")
        return found


class Call(NamedTuple):
    """A call that is looked up.

    Attributes:
        dtype: of the inputs, as in :class:`Cell`.
        kind: as in :class:`Cell`.
        ranges: smallest and largest extent of every axis.
    """

    dtype: str
    kind: str
    ranges: Mapping[str, tuple[int, int]]


Point = tuple[int, ...]


@dataclass(frozen=True)
class Verdicts:
    """The measurements of one device, and the operators whose process ended early.

    Attributes:
        measurements: of all cells.
        lost: by ``"operator backend"``, the sentence why an operator could not be measured to the end.
    """

    measurements: Sequence[Measurement]
    lost: Mapping[str, str] = field(default_factory=dict)

    def of(self, operator: str, backend: str, dtype: str | None = None) -> list[Measurement]:
        """Return the measurements of an implementation, in one dtype or in all."""
        return [
            m
            for m in self.measurements
            if (m.cell.operator, m.cell.backend) == (operator, backend) and dtype in (None, m.cell.dtype)
        ]

    def fault(self, operator: str, backend: str, dtype: str) -> str | None:
        """Return why an implementation must not be used in a dtype at any size; None if nothing speaks against it."""
        lost = self.lost.get(f"{operator} {backend}")
        if lost is not None:
            return lost
        faulty = [m for m in self.of(operator, backend, dtype) if m.is_faulty]
        return f"{faulty[0].status} at {faulty[0].cell}: {faulty[0].reason}" if faulty else None

    def refusal(self, operator: str, backend: str, call: Call) -> str | None:
        """Return why an implementation is off for a call on this device; None if it is on."""
        fault = self.fault(operator, backend, call.dtype)
        if fault is not None:
            return f"it is off on this device: {fault}"
        measured = {
            tuple(m.cell.sizes.values()): m.speedup
            for m in self.of(operator, backend, call.dtype)
            if m.cell.kind == call.kind and m.speedup is not None and [*m.cell.sizes] == [*call.ranges]
        }
        if not measured:
            what = f"{call.kind}, {call.dtype}" if call.kind else call.dtype
            return f"it has not been measured on this device for {what}"
        corners = []
        for at, (axis, (least, most)) in enumerate(call.ranges.items()):
            sizes = sorted({point[at] for point in measured})
            if least < sizes[0] or most > sizes[-1]:
                outside = least if least < sizes[0] else most
                span = f"the {sizes[0]:,} to {sizes[-1]:,}" if len(sizes) > 1 else f"the {sizes[0]:,}"
                return f"{axis} {outside:,} is outside of {span} that were measured on this device"
            below, above = max(s for s in sizes if s <= least), min(s for s in sizes if s >= most)
            corners.append([size for size in sizes if below <= size <= above])
        return _slowest(list(call.ranges), itertools.product(*corners), measured)


def _slowest(axes: list[str], corners: Iterable[Point], measured: Mapping[Point, Speedup]) -> str | None:
    """Return why the measurements at these points do not suffice; None if they do."""
    for point in corners:
        where = describe_sizes(dict(zip(axes, point, strict=True)))
        if point not in measured:
            return f"it has not been measured on this device at {where}"
        if measured[point].low < LEAST_SPEEDUP:
            return (
                f"on this device it was {measured[point].low:.2f} times as fast as torch at {where}, "
                f"and is used from {LEAST_SPEEDUP:.2f} on"
            )
    return None
