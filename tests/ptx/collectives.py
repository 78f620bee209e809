"""Instructions that the lanes of a warp execute together: shuffles, reductions, ldmatrix, mma.

Arrays of lanes are taken as (warps, 32). A warp of which only a part has come is refused, as the manual leaves the
result open, or the device hangs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .formats import Array, from_bfloat16, read_tf32
from .operands import reader, writer
from .program import Instruction, Pair, Vector

if TYPE_CHECKING:
    from .machine import Step, Warps

WARP = 32
LANE = np.arange(WARP)


def whole_warps(instruction: Instruction, warps: Warps, mask: Array | None) -> Array:
    """Which of the (warps,) have come."""
    if mask is None:
        return np.arange(warps.lanes // WARP)
    here = mask.reshape(-1, WARP)
    if (here.any(1) != here.all(1)).any():
        raise instruction.refuse("only a part of a warp has come")
    return np.flatnonzero(here[:, 0])


# ---------------------------------------------------------------------------------------------- shuffles and reductions


def shuffle(instruction: Instruction) -> Step:
    if instruction.modifiers[0] != "sync" or instruction.modifiers[2:] != ("b32",):
        raise instruction.refuse("modifiers that are not known")
    mode = instruction.modifiers[1]
    target, source, which, clamp, members = instruction.operands
    destination, valid = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write = writer(instruction, destination)
    write_valid = None if valid is None else writer(instruction, valid)
    read, number, limit, member = (reader(instruction, part, "u32") for part in (source, which, clamp, members))

    def step(warps: Warps, mask: Array | None) -> None:
        whole_warps(instruction, warps, mask)
        active = slice(None) if mask is None else mask
        if (member(warps)[active] != 0xFFFFFFFF).any():
            raise instruction.refuse("a shuffle among some of the lanes")
        lane = np.tile(LANE, warps.lanes // WARP)
        b, c = number(warps).astype(np.int64) & 31, limit(warps).astype(np.int64)
        segment, bound = (c >> 8) & 31, c & 31
        lowest, highest = lane & segment, (lane & segment) | (bound & ~segment)
        if mode == "up":
            other = lane - b
            found = other >= highest
        elif mode in ("down", "bfly"):
            other = lane + b if mode == "down" else lane ^ b
            found = other <= highest
        elif mode == "idx":
            other = lowest | (b & ~segment)
            found = other <= highest
        else:
            raise instruction.refuse("modifiers that are not known")
        other = np.where(found, other, lane) + np.arange(warps.lanes) // WARP * WARP
        write(warps, read(warps)[other], mask)
        if write_valid is not None:
            write_valid(warps, found, mask)

    return step


_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


def reduce(instruction: Instruction) -> Step:
    """``redux.sync``, over the lanes that each lane's mask of members names."""
    *_, name, kind = instruction.modifiers
    if instruction.modifiers[0] != "sync" or len(instruction.modifiers) != 3 or name not in _REDUCTIONS:
        raise instruction.refuse("modifiers that are not known")
    write, read, member = (
        writer(instruction, instruction.operands[0]),
        reader(instruction, instruction.operands[1], kind),
        reader(instruction, instruction.operands[2], "u32"),
    )
    function = _REDUCTIONS[name]

    def step(warps: Warps, mask: Array | None) -> None:
        here = np.ones(warps.lanes, np.bool_) if mask is None else mask
        values, members = read(warps).copy(), member(warps).reshape(-1, WARP)
        result = values.reshape(-1, WARP)
        active = here.reshape(-1, WARP)
        for warp in np.flatnonzero(active.any(1)):
            for asked in np.unique(members[warp][active[warp]]):
                lanes = (int(asked) >> LANE) & 1 == 1
                if (lanes & ~(active[warp] & (members[warp] == asked))).any() or not lanes.any():
                    raise instruction.refuse(f"lanes of the mask {int(asked):#x} have not come, or with another mask")
                result[warp, lanes] = function.reduce(result[warp, lanes])
        write(warps, values, mask)

    return step


# ------------------------------------------------------------------------------------------------------------- matrices


def load_matrix(instruction: Instruction) -> Step:
    """``ldmatrix``: lanes 8 i to 8 i + 7 name the rows of matrix i; a lane gets two neighbours of a row, or column."""
    shape = [m for m in instruction.modifiers if m in ("x1", "x2", "x4")]
    transposed = "trans" in instruction.modifiers
    known = {"sync", "aligned", "m8n8", "shared", "b16", "trans", *shape}
    target, source = instruction.operands
    count = int(shape[0][1:]) if shape else 0
    if {*instruction.modifiers, "trans"} != known or len(target.parts) != count:  # type: ignore[union-attr]
        raise instruction.refuse("modifiers that are not known")
    writes = [writer(instruction, part) for part in target.parts]  # type: ignore[union-attr]
    address = reader(instruction, source, "u32")

    def step(warps: Warps, mask: Array | None) -> None:
        here = whole_warps(instruction, warps, mask)
        lanes = (here[:, None] * WARP + np.arange(8 * count)).ravel()
        rows = warps.read("shared", lanes, address(warps)[lanes], 16)
        matrices = rows.view(np.uint16).reshape(len(here), count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        halves = np.ascontiguousarray(matrices).reshape(len(here), count, WARP, 2).view(np.uint32)[..., 0]
        for at, write in enumerate(writes):
            value = np.zeros((warps.lanes // WARP, WARP), np.uint32)
            value[here] = halves[:, at]
            write(warps, value.ravel(), mask)

    return step


_FORMATS = {"tf32": 1, "bf16": 2, "f16": 2}
"""Numbers in a register, by format."""


def multiply_matrices(instruction: Instruction) -> Step:
    """``mma.sync``: D (16, 8) = A (16, K) B (K, 8) + C in float32, K = 8 of TF32 or 16 of bfloat16 and float16."""
    kind = instruction.modifiers[6] if len(instruction.modifiers) == 9 else ""
    per = _FORMATS.get(kind, 0)
    expected = ("sync", "aligned", f"m16n8k{8 * per}", "row", "col", "f32", kind, kind, "f32")
    vectors = instruction.operands
    if instruction.modifiers != expected or not all(isinstance(vector, Vector) for vector in vectors):
        raise instruction.refuse("modifiers that are not known")
    d, a, b, c = (vector.parts for vector in vectors)  # type: ignore[union-attr]
    if (len(d), len(a), len(b), len(c)) != (4, 4, 2, 4):
        raise instruction.refuse("fragments of another size")
    writes = [writer(instruction, part) for part in d]
    reads_a, reads_b = ([reader(instruction, part, "u32") for part in parts] for parts in (a, b))
    reads_c = [reader(instruction, part, "f32") for part in c]

    def step(warps: Warps, mask: Array | None) -> None:
        whole_warps(instruction, warps, mask)
        n = warps.lanes // WARP
        # Lane 4 g + t has numbers of row g or column g, neighbours of t times their count in a register.
        left, right = np.empty((n, 2, 8, 2, 4, per)), np.empty((n, 2, 4, per, 8))
        for at, read in enumerate(reads_a):
            for half, value in enumerate(_numbers(read(warps), kind)):
                left[:, at % 2, :, at // 2, :, half] = value.reshape(n, 8, 4)
        for at, read in enumerate(reads_b):
            for half, value in enumerate(_numbers(read(warps), kind)):
                right[:, at, :, half] = value.reshape(n, 8, 4).swapaxes(1, 2)
        result = np.empty((n, 2, 8, 4, 2), np.float32)
        for at, read in enumerate(reads_c):
            result[:, at // 2, :, :, at % 2] = read(warps).reshape(n, 8, 4)
        left, right, total = left.reshape(n, 16, -1), right.reshape(n, -1, 8), result.reshape(n, 16, 8)
        for start in range(0, 8 * per, 4 * per):
            total = _block(left[:, :, start : start + 4 * per], right[:, start : start + 4 * per], total)
        result = total.reshape(n, 2, 8, 4, 2)
        for at, write in enumerate(writes):
            write(warps, result[:, at // 2, :, :, at % 2].reshape(-1), mask)

    return step


def _numbers(bits: Array, kind: str) -> list[Array]:
    if kind == "tf32":
        return [read_tf32(bits)]
    halves = bits.view(np.uint16).reshape(-1, 2)
    if kind == "bf16":
        return [from_bfloat16(halves[:, at]) for at in range(2)]
    return [np.ascontiguousarray(halves[:, at]).view(np.float16).astype(np.float32) for at in range(2)]


def _block(left: Array, right: Array, addend: Array) -> Array:
    """left (n, 16, k) right (n, k, 8) + addend, as the tensor cores of an A100 were found to sum.

    Products are exact. They and the addend are cut off, towards zero, 24 bits below the leading one of the largest of
    them and summed, and the sum is cut to float32 (Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA
    tensor cores, 2021). So a sum loses up to a unit in the last place and more, always towards zero.
    """
    terms = [left[:, :, k, None] * right[:, k, None, :] for k in range(left.shape[2])]
    terms.append(addend.astype(np.float64))
    largest = np.abs(terms[0])
    for term in terms[1:]:
        largest = np.maximum(largest, np.abs(term))
    # The leading bit: the exponent without the mantissa. Zero has none.
    leading = (np.maximum(largest, 2.0**-400).view(np.int64) & 0x7FF0000000000000).view(np.float64)
    scale = 2.0**24 / leading
    total = sum(np.trunc(term * scale) for term in terms) / scale
    special = ~np.isfinite(largest)
    if special.any():
        total = np.where(special, sum(terms), total)
    # Without what float32 has no room for.
    return (total.view(np.int64) & ~0x1FFFFFFF).view(np.float64).astype(np.float32)
