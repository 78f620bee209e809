"""Instructions that each lane executes by itself: arithmetic, comparisons, bits, conversions.

``find(instruction)`` gives the type of the result, those of the operands and a function of arrays, or None where the
instruction is of another kind. What a table's row does not name is refused: a modifier that is not looked at would be
an instruction that does something else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from .formats import (
    Array,
    approximate,
    disturbance,
    flush,
    fma32,
    fma64,
    fma_bfloat16,
    from_bfloat16,
    round_to_tf32,
    to_bfloat16,
)
from .program import Instruction

_SIZES = (1, 2, 4, 8)
TYPES = {
    "pred": np.dtype(np.bool_),
    "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64),
    **{f"{kind}{8 * size}": np.dtype(f"{'i' if kind == 's' else 'u'}{size}") for kind in "bus" for size in _SIZES},
}  # fmt: skip
TYPES |= {"bf16": TYPES["b16"], "tf32": TYPES["f32"], "bf16x2": TYPES["b32"]}


class Elementwise(NamedTuple):
    """The function of ``result = function(*operands)``, with the types."""

    result: np.dtype
    operands: tuple[np.dtype, ...]
    function: Callable[..., Array]


def find(instruction: Instruction) -> Elementwise | None:
    """Return how the instruction is executed, None if it is not elementwise.

    Raises:
        PTXError: it is, with modifiers that are not known.
    """
    name, modifiers = instruction.name, instruction.modifiers
    if name in _FAMILIES:
        found = _FAMILIES[name](name, modifiers)
        if found is None:
            raise instruction.refuse("modifiers that are not known")
        return found
    return None


def _is_integer(kind: str) -> bool:
    return kind[0] in "sub" and kind[1:].isdigit()


# ----------------------------------------------------------------------------------------------------------- arithmetic


def _larger(a: Array, b: Array) -> Array:
    """The larger, the other one of a NaN; +0 is larger than -0."""
    larger = np.fmax(a, b)
    return np.where((a == 0) & (b == 0), a + b, larger)


def _smaller(a: Array, b: Array) -> Array:
    return -_larger(-a, -b)


_BINARY: dict[str, Callable[..., Array]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_EXTREMES = {"max": (_larger, np.maximum), "min": (_smaller, np.minimum)}


def _with_flush(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *operands: flush(function(*map(flush, operands)))


def _float(kind: str, modifiers: tuple[str, ...], function: Callable[..., Array], count: int) -> Elementwise | None:
    """A function of float32, with ``.ftz`` or without, of float16 or of float64, rounded to the nearest."""
    if set(modifiers) - {"rn", "ftz"} or ("ftz" in modifiers and kind != "f32"):
        return None
    dtype = TYPES[kind]
    return Elementwise(dtype, (dtype,) * count, _with_flush(function) if "ftz" in modifiers else function)


def _sum_or_product(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    *rest, kind = modifiers
    if kind in ("f16", "f32", "f64"):
        return _float(kind, tuple(rest), _BINARY[name], 2)
    if not _is_integer(kind):
        return None
    dtype = TYPES[kind]
    if name != "mul":
        return Elementwise(dtype, (dtype, dtype), _BINARY[name]) if not rest else None
    if rest == ["lo"]:
        return Elementwise(dtype, (dtype, dtype), np.multiply)
    if rest == ["wide"] and dtype.itemsize < 8:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        return Elementwise(wide, (dtype, dtype), lambda a, b: a.astype(wide) * b)
    if rest == ["hi"] and dtype.itemsize == 4:
        wide = np.dtype(f"{dtype.kind}8")
        return Elementwise(dtype, (dtype, dtype), lambda a, b: (a.astype(wide) * b >> wide.type(32)).astype(dtype))
    return None


def _multiply_add(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    *rest, kind = modifiers
    if name == "fma" and modifiers == ("rn", "bf16"):
        return Elementwise(TYPES["bf16"], (TYPES["bf16"],) * 3, fma_bfloat16)
    if name == "fma":
        fused = {"f32": fma32, "f64": fma64}.get(kind)
        return _float(kind, tuple(rest), fused, 3) if fused and "rn" in rest else None
    product = _sum_or_product("mul", modifiers)
    if product is None or not _is_integer(kind) or "hi" in rest:
        return None
    return Elementwise(
        product.result, (*product.operands, product.result), lambda a, b, c: product.function(a, b) + c
    )  # fmt: skip


def _extreme(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    *rest, kind = modifiers
    of_floats, of_integers = _EXTREMES[name]
    if kind in ("f32", "f64"):
        return _float(kind, tuple(rest), of_floats, 2) if "rn" not in rest else None
    dtype = TYPES[kind]
    return Elementwise(dtype, (dtype, dtype), of_integers) if _is_integer(kind) and not rest else None


def _sign(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    *rest, kind = modifiers
    function = np.abs if name == "abs" else np.negative
    if kind in ("f32", "f64"):
        return _float(kind, tuple(rest), function, 1) if "rn" not in rest else None
    dtype = TYPES[kind]
    return Elementwise(dtype, (dtype,), function) if kind.startswith("s") and not rest else None


def _quotient(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    kind = modifiers[-1]
    if modifiers in (("rn", "f32"), ("rn", "f64"), ("rn", "ftz", "f32")):
        return _float(kind, modifiers[:-1], np.divide, 2)
    if modifiers in (("full", "f32"), ("full", "ftz", "f32")):  # within 2 units in the last place
        f32 = TYPES["f32"]
        function = lambda a, b: approximate(a.astype(np.float64) / b, 2.0**-23, a, b)  # noqa: E731
        return Elementwise(f32, (f32, f32), _with_flush(function) if "ftz" in modifiers else function)
    if len(modifiers) == 1 and _is_integer(kind):
        dtype = TYPES[kind]
        return Elementwise(dtype, (dtype, dtype), _divide_integers if name == "div" else _remainder)
    return None


def _divide_integers(a: Array, b: Array) -> Array:
    """Towards zero. By zero the result is not specified; here it is all ones."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    below = a // divisor  # numpy's quotient is rounded down
    inexact = below * divisor != a
    quotient = below + (inexact & ((a < 0) != (b < 0)))
    return np.where(b == 0, np.invert(np.zeros_like(a)), quotient).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return (a - _divide_integers(a, b) * b).astype(a.dtype)


# ---------------------------------------------------------------------------------------------------------- approximate


_APPROXIMATE: dict[str, tuple[Callable[[Array], Array], float]] = {
    "ex2": (np.exp2, 2.0**-22),
    "rcp": (np.reciprocal, 2.0**-23),
    "sqrt": (np.sqrt, 2.0**-23),
    "rsqrt": (lambda x: 1.0 / np.sqrt(x), 2.0**-22.9),
}
"""The exact function, and the largest relative error by the PTX manual."""


def _root_or_power(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    f32, f64 = TYPES["f32"], TYPES["f64"]
    if modifiers in (("approx", "f32"), ("approx", "ftz", "f32")):
        function = _logarithm if name == "lg2" else partial(_approximate, *_APPROXIMATE[name])
        return Elementwise(f32, (f32,), _with_flush(function) if "ftz" in modifiers else function)
    if name == "sqrt" and modifiers in (("rn", "f32"), ("rn", "f64"), ("rn", "ftz", "f32")):
        return _float(modifiers[-1], modifiers[:-1], np.sqrt, 1)
    if name == "rcp" and modifiers == ("rn", "f32"):
        return Elementwise(f32, (f32,), np.reciprocal)
    if name == "rcp" and modifiers == ("approx", "ftz", "f64"):
        return Elementwise(f64, (f64,), _gross_reciprocal)
    return None


def _approximate(exact: Callable[[Array], Array], error: float, x: Array) -> Array:
    return approximate(exact(x.astype(np.float64)), error, x)


def _logarithm(x: Array) -> Array:
    """Between 0.5 and 2 the error is an absolute one."""
    exact = np.log2(x.astype(np.float64))
    error = 2.0**-22 - 2.0**-24
    near = (x > 0.5) & (x < 2)
    return (exact + error * disturbance(x) * np.where(near, 1.0, np.where(np.isfinite(exact), exact, 0))).astype(
        np.float32
    )


def _gross_reciprocal(x: Array) -> Array:
    """The reciprocal of the upper 32 bits, subnormal numbers flushed; the lower 32 bits of the result are zero."""
    upper = (x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
    upper = np.where(np.abs(upper) < 2.0**-1022, np.copysign(0.0, x), upper)
    result = (1.0 / upper) * (1.0 + 2.0**-20 * disturbance(upper))
    result = np.where(np.abs(result) < 2.0**-1022, np.copysign(0.0, x), result)
    cut = (result.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
    return np.where(np.isnan(x), np.nan, cut)


# ----------------------------------------------------------------------------------------------------------------- bits


_LOGIC: dict[str, Callable[..., Array]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _logic(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    if len(modifiers) != 1 or modifiers[0][0] not in "bp":
        return None
    dtype = TYPES[modifiers[0]]
    if name == "not":
        return Elementwise(dtype, (dtype,), np.invert)
    return Elementwise(dtype, (dtype, dtype), _LOGIC[name])


def _shift(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    if len(modifiers) != 1:
        return None
    dtype = TYPES[modifiers[0]]
    last = dtype.type(8 * dtype.itemsize - 1)

    def function(x: Array, count: Array) -> Array:
        most = np.minimum(count, np.uint32(last)).astype(dtype)
        if name == "shl":
            return np.where(count > last, dtype.type(0), x << most)
        return np.where(count > last, x >> last if dtype.kind == "i" else dtype.type(0), x >> most)

    return Elementwise(dtype, (dtype, TYPES["u32"]), function)


def _bit_field(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    if modifiers not in (("u32",), ("s32",)):
        return None
    dtype, u32 = TYPES[modifiers[0]], TYPES["u32"]

    def function(x: Array, start: Array, length: Array) -> Array:
        field = x.astype(np.int64) >> np.minimum(start & 255, 63).astype(np.int64)
        length = np.minimum(length & 255, 32).astype(np.int64)
        above = 64 - np.maximum(length, 1)
        signed, unsigned = field << above >> above, field & ((np.int64(1) << length) - 1)
        taken = signed if dtype.kind == "i" else unsigned
        return np.where(length == 0, 0, taken).astype(dtype)

    return Elementwise(dtype, (dtype, u32, u32), function)


def _permutation(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    if modifiers != ("b32",):
        return None
    b32 = TYPES["b32"]

    def function(low: Array, high: Array, selector: Array) -> Array:
        octets = np.stack([word >> np.uint32(8 * k) & np.uint32(255) for word in (low, high) for k in range(4)])
        result = np.zeros_like(low)
        for k in range(4):
            chosen = selector >> np.uint32(4 * k) & np.uint32(15)
            octet = np.take_along_axis(octets, (chosen & 7).astype(np.int64)[None], 0)[0]
            signs = np.where(octet & 128, np.uint32(255), np.uint32(0))
            octet = np.where(chosen & 8, signs, octet)
            result |= octet << np.uint32(8 * k)
        return result

    return Elementwise(b32, (b32, b32, b32), function)


def _population(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    if modifiers not in (("b32",), ("b64",)):
        return None

    def function(x: Array) -> Array:
        octets = np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)
        return np.unpackbits(octets, axis=1).sum(1, dtype=np.uint32)

    return Elementwise(TYPES["u32"], (TYPES[modifiers[0]],), function)


# --------------------------------------------------------------------------------------------- comparison and selection


_COMPARISONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _comparison(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    if len(modifiers) != 2:
        return None
    asked, kind = modifiers
    dtype = TYPES[kind]
    if asked in _COMPARISONS:
        compare = _COMPARISONS[asked]
        if asked == "ne" and dtype.kind == "f":  # false of a NaN, as all that do not end in u
            function = lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)  # noqa: E731
        else:
            function = compare
    elif dtype.kind == "f" and asked[:-1] in _COMPARISONS and asked.endswith("u"):
        compare = _COMPARISONS[asked[:-1]]
        function = lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)  # noqa: E731
    elif dtype.kind == "f" and asked in ("num", "nan"):
        function = lambda a, b: (np.isnan(a) | np.isnan(b)) == (asked == "nan")  # noqa: E731
    else:
        return None
    return Elementwise(TYPES["pred"], (dtype, dtype), function)


def _selection(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    if len(modifiers) != 1:
        return None
    dtype = TYPES[modifiers[0]]
    return Elementwise(dtype, (dtype, dtype, TYPES["pred"]), lambda a, b, condition: np.where(condition, a, b))


# ---------------------------------------------------------------------------------------------------------- conversions


def _pack(upper: Array, lower: Array) -> Array:
    return to_bfloat16(upper).astype(np.uint32) << np.uint32(16) | to_bfloat16(lower)


_CONVERSIONS: dict[tuple[str, ...], Callable[..., Array]] = {
    ("rna", "tf32", "f32"): round_to_tf32,
    ("rn", "bf16", "f32"): to_bfloat16,
    ("rn", "bf16x2", "f32"): _pack,
    ("f32", "bf16"): from_bfloat16,
    ("rn", "f16", "f32"): lambda x: x.astype(np.float16),
    ("f32", "f16"): lambda x: x.astype(np.float32),
    ("f64", "f32"): lambda x: x.astype(np.float64),
    ("f64", "f16"): lambda x: x.astype(np.float64),
    ("rn", "f32", "f64"): lambda x: x.astype(np.float32),
}


def _conversion(name: str, modifiers: tuple[str, ...]) -> Elementwise | None:
    if modifiers in _CONVERSIONS:
        to, source = modifiers[-2:]
        count = 2 if to == "bf16x2" else 1
        return Elementwise(TYPES[to], (TYPES[source],) * count, _CONVERSIONS[modifiers])
    *rest, to, source = modifiers
    result, operand = TYPES[to], TYPES[source]
    if _is_integer(to) and _is_integer(source) and not rest:
        return Elementwise(result, (operand,), lambda x: x.astype(result))
    if to in ("f32", "f64") and _is_integer(source) and rest == ["rn"]:
        return Elementwise(result, (operand,), lambda x: x.astype(result))
    if _is_integer(to) and source in ("f32", "f64") and rest in (["rzi"], ["rni"]):
        whole = np.trunc if rest == ["rzi"] else np.rint
        return Elementwise(result, (operand,), lambda x: _saturate(whole(x), result))
    return None


def _saturate(x: Array, dtype: np.dtype) -> Array:
    """Whole numbers as integers: NaN is 0, what is beyond the range its end."""
    limits = np.iinfo(dtype)
    low, high = x <= float(limits.min), x >= float(limits.max)
    inside = np.where(np.isnan(x) | low | high, 0, x).astype(dtype)
    return np.where(low, dtype.type(limits.min), np.where(high, dtype.type(limits.max), inside))


_FAMILIES: dict[str, Callable[[str, tuple[str, ...]], Elementwise | None]] = {
    **dict.fromkeys(("add", "sub", "mul"), _sum_or_product),
    **dict.fromkeys(("fma", "mad"), _multiply_add),
    **dict.fromkeys(("max", "min"), _extreme),
    **dict.fromkeys(("abs", "neg"), _sign),
    **dict.fromkeys(("div", "rem"), _quotient),
    **dict.fromkeys(("ex2", "lg2", "rcp", "rsqrt", "sqrt"), _root_or_power),
    **dict.fromkeys(("and", "or", "xor", "not"), _logic),
    **dict.fromkeys(("shl", "shr"), _shift),
    "bfe": _bit_field,
    "popc": _population,
    "prmt": _permutation,
    "setp": _comparison,
    "selp": _selection,
    "cvt": _conversion,
}
