"""Number formats of the machine, on arrays: what numpy does not have of them.

An approximate instruction is wrong on purpose. Its result is the exact one times 1 + e, with e a hash of the operands
that is spread over all of the error that the PTX manual allows. So no test passes by results that are better than a
device's, and the same operands give the same bits.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LEAST_NORMAL = np.float32(2.0**-126)


def flush(x: Array) -> Array:
    """Subnormal float32 numbers as zeros of their sign (``.ftz``)."""
    return np.where(np.abs(x) < LEAST_NORMAL, np.copysign(np.float32(0), x), x)


def round_to_tf32(x: Array) -> Array:
    """``cvt.rna.tf32.f32``: the nearest number of 10 mantissa bits, ties away from zero; as float32."""
    bits = x.view(np.uint32)
    rounded = np.where(np.isinf(x), bits, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), rounded).view(np.float32)


def read_tf32(bits: Array) -> Array:
    """The value that a matrix instruction reads: it ignores the 13 bits below the mantissa of a TF32 operand."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: Array) -> Array:
    """The nearest, ties to even; as bits."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


# --------------------------------------------------------------------------------------------------- fused multiply-add


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, rounded, and what the rounding left (Knuth)."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a b, rounded, and what the rounding left (Dekker, Veltkamp), for factors below 2^990."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _split(x: Array) -> tuple[Array, Array]:
    large = x * float(2**27 + 1)
    high = large - (large - x)
    return high, x - high


def round_to_odd(total: Array, rest: Array) -> Array:
    """total + rest, of which total is the nearest, rounded to the neighbour with an odd last bit where inexact.

    A second rounding, to two bits less or more, then gives what a single one gives.
    """
    bits = total.view(np.int64)
    inexact = (rest != 0) & np.isfinite(total) & (bits & 1 == 0)
    return (bits + np.where(inexact, np.where((rest > 0) == (total > 0), 1, -1), 0)).view(np.float64)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a b + c with one rounding. In float64 the product is exact."""
    return round_to_odd(*two_sum(a.astype(np.float64) * b, c.astype(np.float64))).astype(np.float32)


def fma_bfloat16(a: Array, b: Array, c: Array) -> Array:
    """a b + c of numbers in bits, with one rounding; as bits. A product is exact in float64."""
    x, y, z = (from_bfloat16(bits).astype(np.float64) for bits in (a, b, c))
    exact = round_to_odd(*two_sum(x * y, z))
    near = exact.astype(np.float32)
    with np.errstate(invalid="ignore"):
        rest = exact - near
    bits = near.view(np.int32)
    inexact = (rest != 0) & np.isfinite(rest) & (near != 0) & (bits & 1 == 0)
    step = np.where(inexact, np.where((rest > 0) == (near > 0), 1, -1), 0)
    return to_bfloat16((bits + step).astype(np.int32).view(np.float32))


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a b + c with one rounding, after Boldo and Melquiond (2008); what is near float64's limits, by fractions."""
    product = a * b
    size = np.abs(product)
    plain = ~np.isfinite(a) | ~np.isfinite(b) | ~np.isfinite(c) | (a == 0) | (b == 0)
    most = np.maximum(np.maximum(np.abs(a), np.abs(b)), np.abs(c))
    inside = (size > 2.0**-900) & (size < 2.0**900) & (most < 2.0**990)
    high, low = two_product(a, b)
    upper, lower = two_sum(c, low)
    total, rest = two_sum(high, upper)
    # An infinite c is the result, also where a b is beyond the range.
    simple = np.where(np.isfinite(a) & np.isfinite(b) & np.isinf(c), c, product + c)
    result = np.where(plain, simple, total + round_to_odd(*two_sum(lower, rest)))
    for at in np.flatnonzero(~plain & ~inside):
        result[at] = _fraction_fma(float(a[at]), float(b[at]), float(c[at]))
    return result


def _fraction_fma(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return float(exact) if exact else a * b + c  # the sign of a zero
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


# -------------------------------------------------------------------------------------------------------- approximation


def disturbance(*operands: Array) -> Array:
    """Numbers in [-1, 1) that look random and depend on the operands alone."""
    mixed = np.zeros(operands[0].shape, np.uint64)
    for operand in operands:
        bits = operand.view(f"u{operand.itemsize}").astype(np.uint64)
        mixed = (mixed ^ bits) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
    return (mixed & np.uint64(0xFFFFFF)).astype(np.float64) * 2.0**-23 - 1.0


def approximate(exact: Array, relative: float, *operands: Array) -> Array:
    """A float32 result that is up to ``relative`` from the exact one, its rounding included."""
    return (exact * (1.0 + (relative - 2.0**-24) * disturbance(*operands))).astype(np.float32)
