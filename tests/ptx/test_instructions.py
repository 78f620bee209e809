"""Instructions that a lane executes by itself, on random bit patterns and awkward values, against numpy and libm."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from .elementwise import TYPES
from .formats import Array, fma32
from .program import PTXError, parse
from .snippets import execute, kernel

AWKWARD = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 3.0, 1e-3, 88.0, -104.0, 1e30, -3e-5]
LIMITS = {
    "f32": [1e-45, -1e-45, 1.1754943e-38, 1.17549421e-38, 3.4028235e38, 1 + 2**-23, 1 - 2**-24, 2**24 + 1],
    "f64": [5e-324, 2.2250738585072014e-308, 2.225e-308, 1.7976931348623157e308, 1 + 2**-52, 2**-600, 2**600],
}


def values(kind: str, seed: int, count: int = 1024) -> Array:
    """Awkward values, random bit patterns, and for floating-point types numbers of ordinary size."""
    dtype = TYPES[kind]
    g = np.random.default_rng(seed)
    found = g.integers(0, 256, (count, dtype.itemsize), np.uint8).view(dtype)[:, 0].copy()
    if dtype.kind == "f":
        special = np.array(AWKWARD + LIMITS[kind], np.float64).astype(dtype)
        found[: count // 2] = g.standard_normal(count // 2).astype(dtype) * 4
    else:
        ends = np.iinfo(dtype)
        special = np.array([0, 1, 2, 7, 31, 32, 33, ends.max, ends.min, ends.max - 1], dtype)
    found[: len(special) * 8] = g.choice(special, len(special) * 8)
    return found


def assert_equal(result: Array, expected: Array) -> None:
    """Equal bits, but that any NaN is as good as another."""
    assert result.dtype == expected.dtype
    if result.dtype.kind == "f":
        same = (result == expected) & (np.signbit(result) == np.signbit(expected))
        assert (same | (np.isnan(result) & np.isnan(expected))).all()
    else:
        np.testing.assert_array_equal(result, expected)


def run(name: str, kinds: str, result: str, seed: int = 0) -> tuple[list[Array], Array]:
    """Operands of the types, and the instruction's result."""
    operands = [values(kind, seed + at) for at, kind in enumerate(kinds.split())]
    return operands, one(name, operands, result)


def one(name: str, operands: list[Array], result: str) -> Array:
    text = ", ".join(["%d0", *(f"%a{at}" for at in range(len(operands)))])
    return execute(f"{name} {text};", operands, [result])[0]


def flush(x: Array) -> Array:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


def as_signed(x: Array, bits: int) -> list[int]:
    return [int(v) - (1 << bits) * (int(v) >> (bits - 1) & 1) for v in x]


EXACT: dict[str, tuple[str, str, Callable[..., Array]]] = {
    "add.f32": ("f32 f32", "f32", np.add),
    "sub.f32": ("f32 f32", "f32", np.subtract),
    "mul.f32": ("f32 f32", "f32", np.multiply),
    "mul.rn.f32": ("f32 f32", "f32", np.multiply),
    "add.ftz.f32": ("f32 f32", "f32", lambda a, b: flush(flush(a) + flush(b))),
    "mul.ftz.f32": ("f32 f32", "f32", lambda a, b: flush(flush(a) * flush(b))),
    "add.rn.f64": ("f64 f64", "f64", np.add),
    "sub.f64": ("f64 f64", "f64", np.subtract),
    "mul.f64": ("f64 f64", "f64", np.multiply),
    "div.rn.f32": ("f32 f32", "f32", np.divide),
    "div.rn.f64": ("f64 f64", "f64", np.divide),
    "rcp.rn.f32": ("f32", "f32", lambda a: np.float32(1) / a),
    "sqrt.rn.f32": ("f32", "f32", np.sqrt),
    "sqrt.rn.f64": ("f64", "f64", np.sqrt),
    "sqrt.rn.ftz.f32": ("f32", "f32", lambda a: np.sqrt(flush(a))),
    "div.rn.ftz.f32": ("f32 f32", "f32", lambda a, b: flush(flush(a) / flush(b))),
    "fma.rn.ftz.f32": ("f32 f32 f32", "f32", lambda a, b, c: flush(fma32(flush(a), flush(b), flush(c)))),
    "abs.f32": ("f32", "f32", np.abs),
    "abs.ftz.f32": ("f32", "f32", lambda a: np.abs(flush(a))),
    "abs.f64": ("f64", "f64", np.abs),
    "neg.f32": ("f32", "f32", np.negative),
    "neg.f64": ("f64", "f64", np.negative),
    "neg.s32": ("s32", "s32", np.negative),
    "add.s32": ("s32 s32", "s32", np.add),
    "add.s64": ("s64 s64", "s64", np.add),
    "sub.s32": ("s32 s32", "s32", np.subtract),
    "mul.lo.s32": ("s32 s32", "s32", np.multiply),
    "mul.lo.s64": ("s64 s64", "s64", np.multiply),
    "mul.wide.s32": ("s32 s32", "s64", lambda a, b: a.astype(np.int64) * b),
    "mul.wide.u32": ("u32 u32", "u64", lambda a, b: a.astype(np.uint64) * b),
    "mul.hi.u32": ("u32 u32", "u32", lambda a, b: _upper(a, b)),
    "mul.hi.s32": ("s32 s32", "s32", lambda a, b: _upper(a, b)),
    "mad.lo.s64": ("s64 s64 s64", "s64", lambda a, b, c: a * b + c),
    "mad.wide.s32": ("s32 s32 s64", "s64", lambda a, b, c: a.astype(np.int64) * b + c),
    "mad.wide.u32": ("u32 u32 u64", "u64", lambda a, b, c: a.astype(np.uint64) * b + c),
    "div.s32": ("s32 s32", "s32", lambda a, b: _whole(a, b)[0]),
    "div.u32": ("u32 u32", "u32", lambda a, b: _whole(a, b)[0]),
    "rem.s32": ("s32 s32", "s32", lambda a, b: _whole(a, b)[1]),
    "rem.u64": ("u64 u64", "u64", lambda a, b: _whole(a, b)[1]),
    "max.s32": ("s32 s32", "s32", np.maximum),
    "min.s32": ("s32 s32", "s32", np.minimum),
    "max.s64": ("s64 s64", "s64", np.maximum),
    "min.s64": ("s64 s64", "s64", np.minimum),
    "max.u32": ("u32 u32", "u32", np.maximum),
    **{
        f"{name}.{kind}": (f"{kind} {kind}", kind, function)
        for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor))
        for kind in ("b16", "b32", "b64")
    },
    "not.b32": ("b32", "b32", np.invert),
    "popc.b32": ("b32", "u32", lambda a: np.array([bin(x).count("1") for x in a], np.uint32)),
    "popc.b64": ("b64", "u32", lambda a: np.array([bin(x).count("1") for x in a], np.uint32)),
    "cvt.u64.u32": ("u32", "u64", lambda a: a.astype(np.uint64)),
    "cvt.s64.s32": ("s32", "s64", lambda a: a.astype(np.int64)),
    "cvt.u32.u64": ("u64", "u32", lambda a: a.astype(np.uint32)),
    "cvt.u32.u16": ("u16", "u32", lambda a: a.astype(np.uint32)),
    "cvt.f64.f32": ("f32", "f64", lambda a: a.astype(np.float64)),
    "cvt.rn.f32.f64": ("f64", "f32", lambda a: a.astype(np.float32)),
    "cvt.rn.f32.s32": ("s32", "f32", lambda a: a.astype(np.float32)),
    "cvt.rn.f64.s32": ("s32", "f64", lambda a: a.astype(np.float64)),
    "cvt.f32.bf16": ("b16", "f32", lambda a: _torch(a.view(np.int16), torch.bfloat16)),
    "cvt.f32.f16": ("b16", "f32", lambda a: a.view(np.float16).astype(np.float32)),
    "cvt.f64.f16": ("b16", "f64", lambda a: a.view(np.float16).astype(np.float64)),
    "cvt.rn.f16.f32": ("f32", "b16", lambda a: a.astype(np.float16).view(np.uint16)),
}  # fmt: skip


def _whole(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotient, towards zero, and remainder; by zero all ones, and what is divided."""
    quotients, remainders = np.full_like(a, -1 if a.dtype.kind == "i" else np.iinfo(a.dtype).max), a.copy()
    for at, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        if y:
            quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
            quotients[at] = np.array(quotient % (1 << 8 * a.itemsize), f"u{a.itemsize}").view(a.dtype)  # -2^31 / -1
            remainders[at] = x - quotient * y
    return quotients, remainders


def _upper(a: Array, b: Array) -> Array:
    return np.array([int(x) * int(y) >> 32 for x, y in zip(a, b, strict=True)], a.dtype)


def _torch(bits: Array, dtype: torch.dtype) -> Array:
    return torch.from_numpy(bits.copy()).view(dtype).float().numpy()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_exact_instructions(name: str) -> None:
    kinds, result, expected = EXACT[name]
    operands, found = run(name, kinds, result)
    exact = expected(*operands)
    if name == "cvt.rn.f16.f32":  # of NaN any
        nan = np.isnan(operands[0])
        assert np.isnan(found[nan].view(np.float16)).all()
        found, exact = found[~nan], exact[~nan]
    assert_equal(found, exact)


def test_rounding_to_bfloat16_is_torchs() -> None:
    operands, found = run("cvt.rn.bf16.f32", "f32", "b16")
    ties = np.float32([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.3961775e38] * 8)
    for x, result in ((operands[0], found), (ties, one("cvt.rn.bf16.f32", [ties], "b16"))):
        assert_equal(_torch(result.view(np.int16), torch.bfloat16), torch.from_numpy(x).bfloat16().float().numpy())
    upper, lower = values("f32", 5), values("f32", 6)
    packed = one("cvt.rn.bf16x2.f32", [upper, lower], "b32")
    for x, half in ((upper, packed >> 16), (lower, packed & 0xFFFF)):
        assert_equal(half.astype(np.uint16), one("cvt.rn.bf16.f32", [x], "b16"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rounding_to_tf32_is_to_the_nearest_and_away_from_zero_in_a_tie() -> None:
    ties = np.float32(
        [1 + 2**-11, -1 - 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 - 2**-23, 3.4028235e38, 2**-140, -(2**-149), np.inf]
    )
    for x in (values("f32", 3), np.tile(np.float32(ties), 4)):
        found = one("cvt.rna.tf32.f32", [x], "f32")
        exact = x.astype(np.float64)
        _, exponent = np.frexp(exact)
        unit = np.ldexp(1.0, np.maximum(exponent, -125) - 11)
        expected = np.copysign(np.floor(np.abs(exact) / unit + 0.5) * unit, exact).astype(np.float32)
        assert_equal(found, np.where(np.isinf(x), x, expected))
        assert not (found[~np.isnan(x)].view(np.uint32) & 0x1FFF).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["s32", "s64", "u32"])
def test_whole_parts_saturate_and_are_zero_of_nan(kind: str) -> None:
    ends = np.iinfo(TYPES[kind])
    for rounding, whole in (("rzi", np.trunc), ("rni", np.rint)):
        (x,), found = run(f"cvt.{rounding}.{kind}.f64", "f64", kind)
        expected = [0 if np.isnan(v) else int(min(max(whole(v), ends.min), ends.max)) for v in x]
        # The upper end of 64 bits is no float64.
        assert found.tolist() == [min(v, int(ends.max)) for v in expected]


# ------------------------------------------------------------------------------------------------------ fused, extremes


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fused_multiply_add_rounds_once_as_libm_does(kind: str) -> None:
    c_type, name = (ctypes.c_float, "fmaf") if kind == "f32" else (ctypes.c_double, "fma")
    fma = getattr(ctypes.CDLL(ctypes.util.find_library("m")), name)
    fma.argtypes, fma.restype = [c_type] * 3, c_type
    a, b, c = (values(kind, at, 2048) for at in range(3))
    with np.errstate(all="ignore"):
        c[:512] = -(a * b)[:512]  # all but the rounding cancels
        c[512:1024] = a[512:1024] * b[512:1024] * np.ldexp(1.0, np.random.default_rng(0).integers(-60, 60, 512))
    found = one(f"fma.rn.{kind}", [a, b, c], kind)
    expected = np.array([fma(*map(float, v)) for v in zip(a, b, c, strict=True)], TYPES[kind])
    assert_equal(found, expected)


def test_arithmetic_of_float16_is_torchs() -> None:
    a, b = (np.random.default_rng(seed).integers(0, 1 << 16, 4096).astype(np.uint16) for seed in range(2))
    x, y = (torch.from_numpy(bits.view(np.int16)).view(torch.float16) for bits in (a, b))
    for name, expected in (("add", x + y), ("sub", x - y), ("mul", x * y)):
        assert_equal(one(f"{name}.rn.f16", [a, b], "b16").view(np.float16), expected.numpy())


def test_fused_multiply_add_of_bfloat16_rounds_once() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 1 << 16, 4096).astype(np.uint16) for _ in range(2))
    # Near each other, so that a sum is not one of its terms.
    b[:2048] = (a[:2048].astype(np.int64) + rng.integers(-2000, 2000, 2048)).clip(0, (1 << 16) - 1).astype(np.uint16)
    x, y = (torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16) for bits in (a, b))
    one_of_each, minus_zero = np.full_like(a, 0x3F80), np.full_like(a, 0x8000)
    for operands, expected in (([a, b, minus_zero], x * y), ([a, one_of_each, b], x + y)):
        found = torch.from_numpy(one("fma.rn.bf16", operands, "b16").view(np.int16)).view(torch.bfloat16)
        assert_equal(found.float().numpy(), expected.float().numpy())
    # What the rounding of a product leaves is a number of eight digits.
    product = x * y
    rest = torch.from_numpy(
        one("fma.rn.bf16", [a, b, (-product).view(torch.int16).numpy().view(np.uint16)], "b16").view(np.int16)
    ).view(torch.bfloat16)
    known = product.isfinite() & (product.abs() > 1e-25)
    assert torch.equal(rest.double()[known], (x.double() * y.double() - product.double())[known])


def test_extremes_leave_out_nan_and_order_zeros() -> None:
    for kind in ("f32", "f64"):
        for name, better in (("max", np.greater), ("min", np.less)):
            a, b = values(kind, 0), values(kind, 1)
            a[:4], b[:4] = [0.0, 0.0, -0.0, -0.0], [0.0, -0.0, 0.0, -0.0]
            found = one(f"{name}.{kind}", [a, b], kind)
            zeros = (a == 0) & (b == 0)
            first = np.signbit(b) if name == "max" else np.signbit(a)
            with np.errstate(invalid="ignore"):
                expected = np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.where(better(a, b), a, b)))
            assert_equal(found, np.where(zeros, np.where(first, a, b), expected))
            assert zeros.any() and (np.isnan(a) != np.isnan(b)).any()


# ---------------------------------------------------------------------------------------------------------- approximate


APPROXIMATE: dict[str, tuple[Callable[..., Any], float]] = {
    "ex2.approx.f32": (np.exp2, 2.0**-22),
    "ex2.approx.ftz.f32": (lambda x: np.exp2(flush(x).astype(np.float64)), 2.0**-22),
    "rcp.approx.f32": (lambda x: 1.0 / x, 2.0**-23),
    "rsqrt.approx.f32": (lambda x: 1.0 / np.sqrt(x), 2.0**-22.9),
    "sqrt.approx.f32": (np.sqrt, 2.0**-23),
    "sqrt.approx.ftz.f32": (lambda x: np.sqrt(flush(x).astype(np.float64)), 2.0**-23),
}


@pytest.mark.parametrize("name", APPROXIMATE)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_approximate_instructions_err_within_the_manuals_bound_and_up_to_it(name: str) -> None:
    function, bound = APPROXIMATE[name]
    (x,), found = run(name, "f32", "f32")
    _, again = run(name, "f32", "f32")
    assert_equal(found, again)
    exact = function(x.astype(np.float64))
    if "ftz" in name:
        exact = flush(exact)
    normal = np.isfinite(exact) & (np.abs(exact) > 2.0**-125) & (np.abs(exact) < 3e38)
    errors = np.abs(found[normal] / exact[normal] - 1)
    assert 0.5 * bound < errors.max() <= bound
    others = ~normal & (np.isnan(exact) | np.isinf(exact) | (exact == 0))
    assert_equal(found[others], exact[others].astype(np.float32))
    assert others.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_approximate_logarithm_quotient_and_reciprocal_of_a_double() -> None:
    x = np.abs(values("f32", 1))
    found, exact = one("lg2.approx.f32", [x], "f32").astype(np.float64), np.log2(x.astype(np.float64))
    finite = np.isfinite(exact)
    allowed = 2.0**-22 * np.where((x > 0.5) & (x < 2), 1, np.abs(exact))
    assert (np.abs(found - exact) <= allowed)[finite].all() and (found == exact)[np.isinf(exact)].all()
    (a, b), found32 = run("div.full.f32", "f32 f32", "f32")
    quotient = a.astype(np.float64) / b
    normal = (np.abs(quotient) > 2.0**-126) & (np.abs(quotient) < 3.4e38)
    ulp = np.spacing(np.abs(quotient[normal]).astype(np.float32)).astype(np.float64)
    errors = np.abs(found32[normal] - quotient[normal]) / ulp
    assert 0.5 < errors.max() <= 2.0
    (x64,), gross = run("rcp.approx.ftz.f64", "f64", "f64")
    inside = (np.abs(x64) > 1e-300) & (np.abs(x64) < 1e300)
    assert (np.abs(gross * x64 - 1)[inside] < 2.0**-19).all() and not (gross.view(np.uint64) & 0xFFFFFFFF)[inside].any()
    assert (np.isinf(gross) & (np.signbit(gross) == np.signbit(x64)))[np.abs(x64) < 2.0**-1022].all()


# ------------------------------------------------------------------------------------------------- bits and comparisons


def test_shifts_beyond_the_width_leave_zero_or_the_sign() -> None:
    for kind in ("b16", "b32", "b64"):
        bits = int(kind[1:])
        (x, n), left = run(f"shl.{kind}", f"{kind} u32", kind)
        assert left.tolist() == [int(v) << min(int(k), bits) & ((1 << bits) - 1) for v, k in zip(x, n, strict=True)]
        (x, n), right = run(f"shr.u{bits}", f"{kind} u32", kind)
        assert right.tolist() == [int(v) >> min(int(k), bits) for v, k in zip(x, n, strict=True)]
        (x, n), right = run(f"shr.s{bits}", f"s{bits} u32", f"s{bits}")
        assert right.tolist() == [int(v) >> min(int(k), bits) for v, k in zip(x, n, strict=True)]


def test_bit_fields() -> None:
    g = np.random.default_rng(0)
    start, length = (g.integers(0, 40, 1024).astype(np.uint32) for _ in range(2))
    x = values("u32", 0)
    found, expected = one("bfe.u32", [x, start, length], "u32"), []
    for v, p, n in zip(x.tolist(), start.tolist(), length.tolist(), strict=True):
        expected.append((v >> p) & ((1 << n) - 1))
    assert found.tolist() == expected
    found, expected = one("bfe.s32", [x.view(np.int32), start, length], "s32"), []
    for v, p, n in zip(x.tolist(), start.tolist(), length.tolist(), strict=True):
        sign = v >> min(p + n - 1, 31) & 1 if n else 0  # fills what the field lacks to 32 bits
        field = sum((v >> p + at & 1 if p + at < 32 else sign) << at for at in range(min(n, 32)))
        expected.append(as_signed([field | (sign * (0xFFFFFFFF << n) & 0xFFFFFFFF if n < 32 else 0)], 32)[0])
    assert found.tolist() == expected


def test_octets_are_chosen_from_two_words() -> None:
    low, high, selector = (values("b32", seed) for seed in range(3))
    found, expected = one("prmt.b32", [low, high, selector], "b32"), []
    for a, b, s in zip(low.tolist(), high.tolist(), selector.tolist(), strict=True):
        octets = (a | b << 32).to_bytes(8, "little")
        chosen = [(octets[s >> 4 * k & 7], s >> 4 * k & 8) for k in range(4)]
        expected.append(int.from_bytes([(255 if v > 127 else 0) if sign else v for v, sign in chosen], "little"))
    assert found.tolist() == expected


def test_comparisons_with_nan_and_selection() -> None:
    names = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    (a, b) = values("f32", 0), values("f32", 1)
    unordered = np.isnan(a) | np.isnan(b)
    for name, sign in names.items():
        plain = eval(f"a {sign} b") & ~unordered
        assert (one(f"setp.{name}.f32", [a, b], "pred") == plain).all()
        assert (one(f"setp.{name}u.f32", [a, b], "pred") == plain | unordered).all()
    assert (one("setp.num.f32", [a, b], "pred") == ~unordered).all()
    assert (one("setp.nan.f32", [a, b], "pred") == unordered).all()
    for kind in ("s32", "u32", "s64", "f64", "b16", "b32", "b64"):
        c, d = values(kind, 0), values(kind, 1)
        d[::2] = c[::2]
        known = ~(np.isnan(c) | np.isnan(d)) if kind == "f64" else True
        for name in ("eq", "ne") if kind[0] == "b" else names:
            assert (one(f"setp.{name}.{kind}", [c, d], "pred") == (eval(f"c {names[name]} d") & known)).all()
        body = f".reg .pred %p;\nsetp.lt.s32 %p, %thread, 9;\nselp.{kind} %d0, %a0, %a1, %p;"
        assert_equal(execute(body, [c, d], [kind])[0], np.where(np.arange(len(c)) % 32 < 9, c, d))
    body = ".reg .pred %p;\nsetp.lt.f32 %p, %a0, %a1;\nselp.f32 %d0, %a0, 0f40000000, %p;\n@!%p neg.f32 %d0, %d0;"
    with np.errstate(invalid="ignore"):
        assert_equal(execute(body, [a, b], ["f32"])[0], np.where(a < b, a, np.float32(-2)))


def test_predicates_and_immediates() -> None:
    body = """
    .reg .pred %p; .reg .pred %q; .reg .pred %r; .reg .b16 %h;
    mov.u64 %far, 0x0; mov.u16 %h, 0x1; cvt.u32.u16 %d3, %h;
    setp.lt.s32 %p, %a0, 10; mov.pred %q, -1; xor.pred %q, %q, %p; not.pred %r, %p; and.pred %r, %r, %q;
    or.pred %r, %r, %r;
    selp.b32 %d0, -1, 0x10, %r; mov.b64 %d1, 0d3FF8000000000000; mov.b16 %d2, -128;
    """
    lanes = np.arange(32, dtype=np.int32)
    chosen, double, short, one_ = execute(body, [lanes], ["s32", "f64", "s16", "u32"])
    assert (one_ == 1).all()
    assert chosen.tolist() == [16] * 10 + [-1] * 22 and (double == 1.5).all() and (short == -128).all()


def test_halves_are_packed_and_unpacked() -> None:
    x = values("b64", 0)
    body = "{ .reg .b32 tmp; mov.b64 {tmp, %d0}, %a0; }\nmov.b64 {%d1, _}, %a0;\nmov.b64 %d2, {%d1, %d0};"
    high, low, both = execute(body, [x], ["b32", "b32", "b64"])
    assert (high == x >> np.uint64(32)).all() and (low == x.astype(np.uint32)).all() and (both == x).all()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "text, reason",
    [
        ("tanh.approx.f32 %d0, %a0;", "an instruction that is not known"),
        ("add.sat.f32 %d0, %a0, %a0;", "modifiers that are not known"),
        ("max.NaN.f32 %d0, %a0, %a0;", "modifiers that are not known"),
        ("cvt.rz.f32.f64 %d0, %a0;", "modifiers that are not known"),
        ("fma.rz.f32 %d0, %a0, %a0, %a0;", "modifiers that are not known"),
        ("add.f32 %d0, %a0;", "2 operands, expected 3"),
        ("add.f32 %d0, %a0, %nosuch;", "a name that is not known: %nosuch"),
        ("add.f64 %d0, %a0, %a0;", "a register of 32 bits is read as float64"),
        ("bar.sync 1;", "a barrier other than that of the whole block"),
        ("ld.local.b32 %d0, [%at];", "modifiers that are not known"),
        ("cp.async.bulk.commit_group;", "modifiers that are not known"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%d0}, {%a0}, {%a0}, {%d0};", "modifiers"),
    ],
)
def test_what_is_not_known_is_refused_with_its_line(text: str, reason: str) -> None:
    program = kernel(text, ["f32"], ["f32"], 32)
    line = next(at for at, found in enumerate(program.splitlines(), 1) if text in found)
    with pytest.raises(PTXError, match=f"line {line}: .*{reason}"):
        execute(text, [np.zeros(32, np.float32)], ["f32"])


def test_texts_that_are_no_kernel_are_refused() -> None:
    with pytest.raises(PTXError, match="got 0 kernels, expected one"):
        parse(".version 8.7")
    with pytest.raises(PTXError, match="line .*: .reg .b7 %x: a declaration that is not understood"):
        parse(kernel(".reg .b7 %x;", [], [], 32))
    with pytest.raises(PTXError, match="does not say how many threads"):
        parse(kernel("", [], [], 32).replace(".reqntid 32", ""))
