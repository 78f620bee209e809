"""Shuffles, reductions and matrix instructions of a warp, against loops over lanes and matrices."""

from __future__ import annotations

import numpy as np
import pytest

from .formats import Array, from_bfloat16, to_bfloat16
from .program import PTXError
from .snippets import execute

LANES = np.arange(64)


def other_lane(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The lane that a shuffle reads, and whether there is one, as the manual's program finds it."""
    segment, bound = c >> 8 & 31, c & 31
    highest, lowest = lane & segment | bound & ~segment, lane & segment
    if mode == "up":
        j, found = lane - b, lane - b >= highest
    elif mode == "down":
        j, found = lane + b, lane + b <= highest
    elif mode == "bfly":
        j, found = lane ^ b, lane ^ b <= highest
    else:
        j = lowest | b & ~segment & 31
        found = j <= highest
    return (j if found else lane), found


@pytest.mark.parametrize("clamp", [31, 0, 0x1807, 0x181F])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str, clamp: int) -> None:
    x = np.random.default_rng(0).integers(0, 1 << 32, 64, np.uint32)
    for b in (0, 1, 5, 16, 31):
        which = (LANES * 7 % 32 if mode == "idx" and b == 5 else np.full(64, b)).astype(np.uint32)
        body = f"shfl.sync.{mode}.b32 %d0|%d1, %a0, %a1, {clamp}, -1;"
        found, there = execute(body, [x, which], ["b32", "pred"])
        for lane in range(64):
            j, valid = other_lane(mode, lane % 32, int(which[lane]), clamp)
            assert found[lane] == x[lane // 32 * 32 + j] and there[lane] == valid


def test_reductions_over_the_lanes_of_a_mask() -> None:
    x = np.random.default_rng(0).integers(-1000, 1000, 64, np.int32)
    masks = np.where(LANES % 32 < 8, 0xFF, np.where(LANES % 2, 0xAAAAAA00, 0x55555500)).astype(np.uint32)
    for name, function in (("add", np.sum), ("max", np.max), ("min", np.min)):
        (found,) = execute(f"redux.sync.{name}.s32 %d0, %a0, %a1;", [x, masks], ["s32"])
        for lane in range(64):
            mine = [j for j in range(32) if int(masks[lane]) >> j & 1]
            assert found[lane] == function(x[lane // 32 * 32 :][mine])
    with pytest.raises(PTXError, match="lanes of the mask 0xff have not come, or with another mask"):
        execute("redux.sync.add.s32 %d0, %a0, %a1;", [x, np.where(LANES == 3, 0x8, 0xFF).astype(np.uint32)], ["s32"])


@pytest.mark.parametrize(
    "text",
    ["shfl.sync.bfly.b32 %d0, %a0, 1, 31, -1;", "redux.sync.add.s32 %d0, %a0, -1;", "bar.warp.sync -1;"],
)
def test_a_part_of_a_warp_is_refused(text: str) -> None:
    body = f".reg .pred %p;\nsetp.lt.s32 %p, %a0, 7;\nmov.b32 %d0, %a0;\n@%p {text}"
    with pytest.raises(PTXError, match="has come|have not come"):
        execute(body, [LANES.astype(np.int32)], ["s32"])
    halves = "mov.b32 %d0, %a0;\nshfl.sync.bfly.b32 %d0, %a0, 1, 31, 65535;"
    with pytest.raises(PTXError, match="a shuffle among some of the lanes"):
        execute(halves, [LANES.astype(np.int32)], ["s32"])


# ------------------------------------------------------------------------------------------------------------- matrices


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, transposed: bool) -> None:
    """Two blocks of 32 rows of 16 bytes; each lane names another row than its own."""
    rows = np.random.default_rng(0).integers(0, 1 << 64, (64, 2), np.uint64)
    named = np.concatenate([np.random.default_rng(s).permutation(32) for s in (1, 2)]).astype(np.uint32)
    registers = ", ".join(f"%d{at}" for at in range(count))
    body = f"""
    .reg .b32 %x;
    mad.lo.s32 %x, %thread, 16, %base;
    st.shared.v2.b64 [%x], {{%a0, %a1}};
    bar.warp.sync -1;
    mad.lo.s32 %x, %a2, 16, %base;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{registers}}}, [%x + 0];
    """
    operands = [np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1]), named]
    found = execute(body, operands, ["b32"] * count, shared=512)
    for block in range(2):
        numbers = rows[32 * block :][named[32 * block : 32 * block + 32]].view(np.uint16).reshape(4, 8, 8)
        for matrix in range(count):
            halves = found[matrix][32 * block : 32 * block + 32].view(np.uint16).reshape(32, 2)
            for lane in range(32):
                for half in range(2):
                    row, column = lane // 4, 2 * (lane % 4) + half
                    at = (column, row) if transposed else (row, column)
                    assert halves[lane, half] == numbers[matrix][at]


def fragments(matrix: Array, per: int, second: bool) -> list[Array]:
    """Registers that hold A (16, K), or B (K, 8) as its transpose, a lane at a time: the figures of the manual."""
    registers = []
    for at in range(2 if second else 4):
        lanes = []
        for lane in range(32):
            g, t = lane // 4, lane % 4
            row = g if second else g + 8 * (at % 2)
            first = t * per + 4 * per * (at if second else at // 2)
            lanes.append([matrix[row, first + half] for half in range(per)])
        registers.append(np.array(lanes))
    return registers


FORMATS = {
    "tf32": (1, lambda x: x, lambda x: (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)),
    "bf16": (2, to_bfloat16, from_bfloat16),
    "f16": (2, lambda x: x.astype(np.float16), lambda x: x.astype(np.float32)),
}
"""Numbers in a register, their bits, and what the bits mean."""


def multiply(kind: str, a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """The machine's A (16, K) B (K, 8) + C, and the exact one of the operands as they are read."""
    per, encode, decode = FORMATS[kind]
    words = [
        np.ascontiguousarray(part).view(np.uint32).ravel()
        for matrix, second in ((a, False), (b.T.copy(), True))
        for part in fragments(encode(matrix.ravel()).reshape(matrix.shape), per, second)
    ]
    places = [(LANES[:32] // 4 + 8 * (at // 2), 2 * (LANES[:32] % 4) + at % 2) for at in range(4)]
    body = (
        f"mma.sync.aligned.m16n8k{8 * per}.row.col.f32.{kind}.{kind}.f32 {{ %d0, %d1, %d2, %d3 }}, "
        "{ %a0, %a1, %a2, %a3 }, { %a4, %a5 }, { %a6, %a7, %a8, %a9 };"
    )
    found = execute(body, [*words, *(c[place] for place in places)], ["f32"] * 4)
    result = np.empty((16, 8), np.float32)
    for place, part in zip(places, found, strict=True):
        result[place] = part
    read_a, read_b = (decode(encode(m.ravel())).reshape(m.shape).astype(np.float64) for m in (a, b))
    return result, read_a @ read_b + c


@pytest.mark.parametrize("kind", FORMATS)
def test_matrix_products(kind: str) -> None:
    g, size = np.random.default_rng(0), 8 * FORMATS[kind][0]
    a, b = (g.standard_normal(shape).astype(np.float32) for shape in ((16, size), (size, 8)))
    c = g.standard_normal((16, 8)).astype(np.float32)
    result, exact = multiply(kind, a, b, c)
    largest = np.abs(a).max() * np.abs(b).max() + np.abs(c).max()
    assert 0 < np.abs(result - exact).max() <= 2.0**-20 * largest
    whole = [np.round(4 * m) for m in (a, b, c)]
    result, exact = multiply(kind, *whole)
    assert (result == exact).all()


def test_matrix_products_cut_off_operands_and_sums() -> None:
    a, b, c = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32), np.zeros((16, 8), np.float32)
    a[:, 0], b[0] = 1 + 2**-10 + 2**-11, 1  # TF32 has no room for the last bit, which is not rounded up
    assert (multiply("tf32", a, b, c)[0] == np.float32(1 + 2**-10)).all()
    a[:, 0], a[:, 1], b[1] = 1, 2.0**-24 * 1.5, 1  # more than half a unit of the sum, and still cut off
    assert (multiply("tf32", a, b, c)[0] == 1).all()
    a[:, 1] *= -1  # also from below: towards zero
    assert (multiply("tf32", a, b, c)[0] == np.float32(1 - 2**-24)).all()
    a[:, 0], b[0] = 2.0**100, 2.0**100
    assert (multiply("tf32", a, b, c)[0] == np.inf).all()
    c[0, 0], c[0, 1] = np.nan, -np.inf
    result = multiply("tf32", np.zeros_like(a), b, c)[0]
    assert np.isnan(result[0, 0]) and result[0, 1] == -np.inf and (result[1:] == 0).all()
