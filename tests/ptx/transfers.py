"""Instructions that move data: parameters, loads and stores, asynchronous copies, atomic addition.

An asynchronous copy reads global memory when it is issued. Its destination is poisoned until the thread that issued it
waits for its group; for other warps it is then there after a barrier, as any store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .elementwise import TYPES
from .formats import Array
from .memory import POISON
from .operands import lanes_of, reader, writer
from .program import Address, Instruction, Vector

if TYPE_CHECKING:
    from .machine import Step, Warps

_CACHING = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "relaxed", "weak", "gpu", "cta"}


class Access(NamedTuple):
    """The meaning of the modifiers of a load or store."""

    space: str
    count: int
    kind: str


def _access(instruction: Instruction) -> Access:
    spaces = [m for m in instruction.modifiers if m in ("global", "shared", "param")]
    counts = [int(m[1:]) for m in instruction.modifiers if m in ("v2", "v4")]
    kinds = [m for m in instruction.modifiers if m in TYPES and m != "pred"]
    known = len(spaces) + len(counts) + len(kinds)
    hints = [m for m in instruction.modifiers if m in _CACHING or m.startswith(("L1::", "L2::"))]
    if len(spaces) != 1 or len(kinds) != 1 or len(counts) > 1 or known + len(hints) != len(instruction.modifiers):
        raise instruction.refuse("modifiers that are not known")
    return Access(spaces[0], (counts or [1])[0], kinds[0])


def load(instruction: Instruction) -> Step:
    space, count, kind = _access(instruction)
    destination, source = instruction.operands[:2]  # a third is a cache policy
    assert isinstance(source, Address)
    destinations = destination.parts if isinstance(destination, Vector) else (destination,)
    if len(destinations) != count:
        raise instruction.refuse(f"{len(destinations)} destinations for {count} values")
    dtype = TYPES[kind]
    writes = [writer(instruction, part) for part in destinations]
    if space == "param":
        name = source.base.name  # type: ignore[union-attr]
        return lambda warps, mask: writes[0](warps, np.full(warps.lanes, warps.parameters[name].view(dtype)), mask)
    address = reader(instruction, source, "u64" if space == "global" else "u32")
    size = count * dtype.itemsize

    def step(warps: Warps, mask: Array | None) -> None:
        lanes = lanes_of(mask)
        values = np.full((warps.lanes, size), POISON, np.uint8)
        values[lanes] = warps.read(space, lanes, address(warps)[lanes], size)
        parts = values.view(dtype)
        for at, write in enumerate(writes):
            write(warps, np.ascontiguousarray(parts[:, at]), mask)

    return step


def store(instruction: Instruction) -> Step:
    space, count, kind = _access(instruction)
    destination, source = instruction.operands[:2]
    sources = source.parts if isinstance(source, Vector) else (source,)
    if len(sources) != count or space == "param":
        raise instruction.refuse(f"{len(sources)} values, expected {count}, to global or shared memory")
    address = reader(instruction, destination, "u64" if space == "global" else "u32")
    reads = [reader(instruction, part, kind) for part in sources]

    def step(warps: Warps, mask: Array | None) -> None:
        lanes = lanes_of(mask)
        values = np.stack([read(warps)[lanes] for read in reads], 1)
        octets = np.ascontiguousarray(values).view(np.uint8)
        warps.write(space, lanes, address(warps)[lanes], octets)

    return step


# --------------------------------------------------------------------------------------------------------- asynchronous


class Copy(NamedTuple):
    """A copy under way, of some lanes."""

    lanes: Array
    groups: Array  # the number of the group that each lane's copy will belong to
    addresses: Array
    octets: Array


def copy_async(instruction: Instruction) -> Step:
    """``cp.async`` with its forms ``commit_group``, ``wait_group`` and ``wait_all``."""
    kind = instruction.modifiers[1]
    if kind == "commit_group":
        return lambda warps, mask: warps.commit(mask)
    if kind in ("wait_group", "wait_all"):
        left = int(instruction.operands[0].text) if kind == "wait_group" else None  # type: ignore[union-attr]
        return lambda warps, mask: warps.wait(mask, left)
    if kind not in ("ca", "cg") or "global" not in instruction.modifiers:
        raise instruction.refuse("modifiers that are not known")
    to, source, size_text, *rest = instruction.operands
    size = int(size_text.text, 0)  # type: ignore[union-attr]
    if size not in (4, 8, 16) or (kind == "cg" and size != 16):
        raise instruction.refuse(f"a copy of {size} bytes")
    shared, addresses = reader(instruction, to, "u32"), reader(instruction, source, "u64")
    taken = reader(instruction, rest[0], "u32") if rest else None

    def step(warps: Warps, mask: Array | None) -> None:
        lanes = np.arange(warps.lanes) if mask is None else np.flatnonzero(mask)
        octets = np.zeros((len(lanes), size), np.uint8)
        sizes = np.full(len(lanes), size) if taken is None else taken(warps)[lanes]
        for number in set(sizes.tolist()) - {0}:
            if number > size:
                raise instruction.refuse(f"a copy takes {number} of {size} bytes")
            some = np.flatnonzero(sizes == number)
            at = addresses(warps)[lanes[some]]
            octets[some, :number] = warps.memory.read(at, number)
        there = shared(warps)[lanes]
        warps.write("shared", lanes, there, np.full((len(lanes), size), POISON, np.uint8))
        warps.copies.append(Copy(lanes, warps.committed[lanes], there, octets))

    return step


# --------------------------------------------------------------------------------------------------------------- atomic


def atomic_add(instruction: Instruction) -> Step:
    """``atom.add``: lane after lane."""
    hints = {"global", "add", "relaxed", "acq_rel", "gpu", "sys", "cta"}
    kinds = [m for m in instruction.modifiers if m not in hints]
    if not {"global", "add"} <= set(instruction.modifiers) or len(kinds) != 1 or kinds[0][0] not in "usf":
        raise instruction.refuse("modifiers that are not known")
    destination, to, source = instruction.operands
    dtype = TYPES[kinds[0]]
    write, address, read = (
        writer(instruction, destination), reader(instruction, to, "u64"), reader(instruction, source, kinds[0]),
    )  # fmt: skip

    def step(warps: Warps, mask: Array | None) -> None:
        result = np.zeros(warps.lanes, dtype)
        addresses, values = address(warps), read(warps)
        for lane in np.arange(warps.lanes)[lanes_of(mask)]:
            at = addresses[lane : lane + 1]
            before = warps.memory.read(at, dtype.itemsize).view(dtype)[:, 0]
            result[lane] = before[0]
            after = before + values[lane : lane + 1]
            warps.memory.write(at, after[:, None].view(np.uint8))
        write(warps, result, mask)

    return step


def make_policy(instruction: Instruction) -> Step:
    """``createpolicy``: how the cache is used is not modelled."""
    write = writer(instruction, instruction.operands[0])
    return lambda warps, mask: write(warps, np.zeros(warps.lanes, np.uint64), mask)
