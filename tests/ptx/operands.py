"""Operands as functions: what reads one of all lanes, and what writes one of some."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from .elementwise import TYPES
from .formats import Array
from .memory import POISON, SHARED_BASE
from .program import Address, Immediate, Instruction, Operand, Register, Special

if TYPE_CHECKING:
    from .machine import Warps

Reader = Callable[["Warps"], Array]
Writer = Callable[["Warps", Array, "Array | None"], None]


def lanes_of(mask: Array | None) -> Array | slice:
    """An index of the lanes of a mask, None being all."""
    return slice(None) if mask is None else np.flatnonzero(mask)


def convert(value: Array, dtype: np.dtype) -> Array:
    """A register's value as one of ``dtype``: the same bits, the lower ones of a wider register."""
    if value.dtype == dtype:
        return value
    if value.itemsize > dtype.itemsize:
        value = value.view(f"u{value.itemsize}").astype(f"u{dtype.itemsize}")
    return value.view(dtype)


def reader(instruction: Instruction, operand: Operand, kind: str | np.dtype) -> Reader:
    """A function that reads (lanes,) of an operand as a type of PTX, or of numpy."""
    dtype = TYPES[kind] if isinstance(kind, str) else kind
    if isinstance(operand, Register):
        number, bits = operand.number, operand.bits
        if (bits == 1) != (dtype == np.bool_) or bits < 8 * dtype.itemsize * (bits > 1):
            raise instruction.refuse(f"a register of {bits} bits is read as {dtype}")
        return lambda warps: convert(warps.registers[number], dtype)
    if isinstance(operand, Immediate):
        value = immediate(operand.text, dtype)
        filled: dict[int, Array] = {}

        def read(warps: Warps) -> Array:
            if warps.lanes not in filled:
                filled[warps.lanes] = np.full(warps.lanes, value)
            return filled[warps.lanes]

        return read
    if isinstance(operand, Special):
        name = operand.name
        if name == "global_smem":
            return lambda warps: np.full(warps.lanes, SHARED_BASE, dtype)
        if name not in SPECIAL:
            raise instruction.refuse(f"a name that is not known: {name}")
        return lambda warps: warps.special(name).astype(dtype)
    if isinstance(operand, Address):
        base, offset = reader(instruction, operand.base, dtype), dtype.type(operand.offset)
        return lambda warps: base(warps) + offset
    raise instruction.refuse("a group of registers where one is expected")


SPECIAL = frozenset(
    {"%laneid", "%warpid", *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz")}
)


def immediate(text: str, dtype: np.dtype) -> Array:
    """A number in the text of a program."""
    if text[:2] in ("0f", "0F"):
        return np.array(struct.unpack(">f", bytes.fromhex(text[2:]))[0], np.float32).view(dtype)
    if text[:2] in ("0d", "0D"):
        return np.array(struct.unpack(">d", bytes.fromhex(text[2:]))[0], np.float64).view(dtype)
    if dtype == np.bool_:
        return np.array(int(text, 0) != 0)
    if dtype.kind == "f":
        return np.array(float(text), dtype)
    return np.array(int(text, 0) % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)


def writer(instruction: Instruction, operand: Operand) -> Writer:
    """A function that writes (lanes,) to a register where a mask is set; a wider register is filled by the sign."""
    if isinstance(operand, Special) and operand.name == "_":
        return lambda warps, value, mask: None
    if not isinstance(operand, Register):
        raise instruction.refuse("the destination is no register")
    number, width = operand.number, operand.bits // 8

    def write(warps: Warps, value: Array, mask: Array | None) -> None:
        if value.itemsize < width:
            value = value.view(f"{'i' if value.dtype.kind == 'i' else 'u'}{value.itemsize}")
            value = value.astype(f"{value.dtype.kind}{width}")
        if mask is not None:
            value = np.where(mask, value, convert(warps.registers[number], value.dtype))
        warps.registers[number] = value

    if operand.bits == 1:
        return _write_predicate(number)
    return write


def _write_predicate(number: int) -> Writer:
    def write(warps: Warps, value: Array, mask: Array | None) -> None:
        warps.registers[number] = value if mask is None else np.where(mask, value, warps.registers[number])

    return write


@cache
def poison(bits: int, lanes: int) -> Array:
    """The value of a register that nothing was written to; one array for all."""
    if bits == 1:
        return np.zeros(lanes, np.bool_)
    return np.full((lanes, bits // 8), POISON, np.uint8).view(f"u{bits // 8}")[:, 0]
