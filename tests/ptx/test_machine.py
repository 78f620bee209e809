"""Memory, asynchronous copies, branches, barriers and the order of warps."""

from __future__ import annotations

import re

import numpy as np
import pytest

from .formats import Array
from .machine import Code, Launch, Order
from .memory import GlobalMemory
from .program import PTXError, parse
from .snippets import execute, kernel

LANES = np.arange(64, dtype=np.int32)
FLOATS = np.random.default_rng(0).standard_normal(256).astype(np.float32)


# -------------------------------------------------------------------------------------------------------- global memory


def launch(body: str, octets: Array, valid: Array | None = None, threads: int = 32) -> None:
    """One block; ``[%far]`` is the first of ``octets``."""
    memory = GlobalMemory()
    address = memory.add(octets, np.ones(len(octets), np.bool_) if valid is None else valid)
    text = kernel(f"ld.param.b64 %far, [p0];\n{body}", ["b8"], [], threads).replace("ld.global.b8 %a0, [%at];", "")
    Launch(Code(parse(text)), (1, 1, 1), {"p0": np.array(address, np.uint64)}, memory, 0).run()


def test_loads_and_stores_of_every_width_with_hints_and_predicates() -> None:
    octets = np.arange(64 * 32, dtype=np.uint16).astype(np.uint8)
    before = octets.copy()
    launch(
        """
        .reg .b32 %w<4>; .reg .b64 %q<2>; .reg .b16 %h<2>; .reg .pred %p; .reg .b64 %policy;
        mad.wide.s32 %at, %thread, 16, %far;
        createpolicy.fractional.L2::evict_first.b64 %policy, 1.0;
        setp.lt.s32 %p, %thread, 20;
        mov.b32 %w0, 0; mov.b32 %w1, 0; mov.b32 %w2, 0; mov.b32 %w3, 0;
        @%p ld.global.L1::evict_last.L2::cache_hint.v4.b32 { %w0, %w1, %w2, %w3 }, [ %at + 0 ], %policy;
        ld.global.v2.b16 { %h0, %h1 }, [%at + 4];
        st.global.L1::evict_first.v4.b32 [%at + 512], { %w3, %w2, %w1, %w0 };
        st.global.v2.b16 [%at+1024], { %h1, %h0 };
        ld.global.b64 %q0, [%at];
        @!%p st.global.b64 [%at+1536], { %q0 };
        ld.global.b8 %w0, [%at+15];
        st.global.b8 [%at+1551], %w0;
        """,
        octets,
    )
    rows = octets.view(np.uint32).reshape(4, 32, 4)
    assert (rows[0] == before.view(np.uint32).reshape(4, 32, 4)[0]).all()
    assert (rows[1, :20] == rows[0, :20, ::-1]).all() and (rows[1, 20:] == 0).all()
    halves, source = octets[1024:].view(np.uint16).reshape(2, 32, 8)[0], before.view(np.uint16).reshape(4, 32, 8)[0]
    assert (halves[:, :2] == source[:, 3:1:-1]).all()
    assert (octets[1536:].reshape(32, 16)[20:, :8] == before.reshape(4, 32, 16)[0, 20:, :8]).all()
    assert (octets[1536:].reshape(32, 16)[:20, :8] == before[1536:].reshape(32, 16)[:20, :8]).all()
    assert (octets[1536:].reshape(32, 16)[:, 15] == before.reshape(4, 32, 16)[0, :, 15]).all()


def test_a_wider_register_is_filled_by_the_sign_of_what_is_loaded() -> None:
    x = np.arange(-16, 16, dtype=np.int16)
    body = "ld.global.s16 %d0, [%at];\nld.global.u16 %d1, [%at];\nld.global.s16 %d2, [%at];"
    signed, unsigned, double = execute(
        "ld.param.b64 %far, [p0];\nmad.wide.s32 %at, %place, 2, %far;\n" + body, [x], ["s32", "s32", "s64"]
    )
    assert (signed == x).all() and (double == x).all() and (unsigned == x.view(np.uint16)).all()


def test_parameters_are_numbers_or_addresses() -> None:
    out = np.zeros(64, np.int64)
    memory = GlobalMemory()
    parameters = {"p0": np.array(memory.add(out.view(np.uint8), np.ones(512, np.bool_)), np.uint64)}
    parameters["number"] = np.array(2**32 - 5, np.uint32)
    text = kernel("ld.param.s32 %d0, [number]; ld.param.b32 %x, [number];", [], ["s64"], 32)
    text = text.replace("align 1 p0", "align 1 p0,\n.param .u32 number").replace(
        "mov.u32 %thread,", ".reg .b32 %x; mov.u32 %thread,"
    )
    text = text.replace("ld.param.b64 %far", "cvt.s64.s32 %far, %x; add.s64 %d0, %d0, %far; ld.param.b64 %far")
    Launch(Code(parse(text)), (2, 1, 1), parameters, memory, 0).run()
    assert (out == -10).all()


@pytest.mark.parametrize(
    "body, message",
    [
        ("ld.global.b32 %block, [%far + 128];", "4 bytes at byte 128 of the memory of argument number 0"),
        ("sub.s64 %far, %far, 4; ld.global.b32 %block, [%far];", "is in no argument"),
        ("st.global.b32 [%far + 64], %block;", "4 bytes at byte 64"),  # between two rows
        ("ld.global.b32 %block, [%far + 2];", "an access of 4 bytes is not aligned to them"),
        ("mov.b64 %far, 16; ld.global.b32 %block, [%far];", "global address 0x10 is in no argument"),
        ("ld.shared.b32 %block, [%base];", "4 bytes at a shared address are outside of its 0 bytes"),
    ],
)
def test_accesses_that_are_not_the_arguments_are_refused(body: str, message: str) -> None:
    valid = np.ones(128, np.bool_)
    valid[64:68] = False
    with pytest.raises(PTXError, match=f"line .*: (ld|st).*{re.escape(message)}"):
        launch(body, np.zeros(128, np.uint8), valid)


def test_atomic_addition_counts_every_lane() -> None:
    octets = np.zeros(16, np.uint8)
    launch(
        "atom.global.gpu.relaxed.add.u32 %block, [%far], 3;\natom.global.add.f32 %base, [%far+4], 0f3F000000;", octets
    )
    assert octets.view(np.uint32)[0] == 96 and octets.view(np.float32)[1] == 16
    x = np.zeros(64, np.uint32)
    body = "ld.param.b64 %far, [p1];\natom.global.add.u32 %d0, [%far], 2;"
    before, _ = execute(body, [LANES, x], ["u32", "u32"])
    assert before.tolist() == list(range(0, 128, 2))


# -------------------------------------------------------------------------------------------------- asynchronous copies


COPY = """
.reg .b32 %x; .reg .b32 %y;
ld.param.b64 %far, [p0]; mad.wide.s32 %at, %place, 4, %far;
mad.lo.s32 %x, %thread, 8, %base; add.s32 %y, %x, 4;
cp.async.ca.shared.global.L2::128B [ %x + 0 ], [ %at + 0 ], 0x4, %a1;
cp.async.commit_group;
cp.async.ca.shared.global [ %x + 4 ], [ %at + 0 ], 0x4;
cp.async.commit_group;
"""


def run_copies(wait: str, sizes: Array | None = None) -> list[Array]:
    """Return what is there of the two groups after the wait."""
    sizes = np.full(64, 4, np.uint32) if sizes is None else sizes
    body = f"{COPY}\n{wait}\nld.shared.b32 %d0, [%x];\nld.shared.b32 %d1, [%y];"
    return execute(body, [FLOATS[:64], sizes], ["f32", "f32"], shared=256)


def test_copies_arrive_when_their_group_is_waited_for() -> None:
    for wait, there in (("", (0, 0)), ("cp.async.wait_group 2;", (0, 0)), ("cp.async.wait_group 1;", (1, 0)),
                        ("cp.async.wait_group 0;", (1, 1)), ("cp.async.wait_all;", (1, 1))):  # fmt: skip
        for part, arrived in zip(run_copies(wait), there, strict=True):
            assert (part == FLOATS[:64]).all() if arrived else np.isnan(part).all()


def test_what_a_copy_leaves_out_is_zero_and_not_read() -> None:
    first, _ = run_copies("cp.async.wait_group 0;", np.where(LANES % 3 == 0, 4, 0).astype(np.uint32))
    assert (first == np.where(LANES % 3 == 0, FLOATS[:64], 0)).all()
    beyond = COPY.replace("%place, 4", "%place, 65536")
    zeros = np.zeros(64, np.uint32)
    body = "{}cp.async.wait_group 0;\nld.shared.b32 %d0, [%x];"
    alone = re.sub(r"cp.async.ca.shared.global \[ %x \+ 4.*", "", beyond)
    assert (execute(body.format(alone), [FLOATS[:64], zeros], ["f32"], shared=256)[0] == 0).all()
    with pytest.raises(PTXError, match="cp.async.ca.*are not all its own"):
        execute(body.format(alone), [FLOATS[:64], zeros + 4], ["f32"], shared=256)


def test_other_warps_meet_a_copy_after_a_barrier() -> None:
    body = """
    .reg .b32 %x; .reg .b32 %y;
    ld.param.b64 %far, [p0]; mad.wide.s32 %at, %place, 4, %far; mad.lo.s32 %x, %thread, 4, %base;
    cp.async.ca.shared.global [%x], [%at], 4; cp.async.commit_group; cp.async.wait_group 0;
    {}
    xor.b32 %y, %thread, 63; mad.lo.s32 %y, %y, 4, %base; ld.shared.b32 %d0, [%y];
    """
    (found,) = execute(body.format("bar.sync 0;"), [FLOATS[:64]], ["f32"], threads=64, shared=256)
    assert (found == FLOATS[63::-1]).all()
    with pytest.raises(PTXError, match="warp 1: a .* another warp .* since the last barrier"):
        execute(body.format(""), [FLOATS[:64]], ["f32"], threads=64, shared=256)


# ------------------------------------------------------------------------------------------------------------- branches


def test_lanes_part_and_meet_again_where_all_paths_meet() -> None:
    """The lanes' loops have different lengths, and the place where they meet stands before what some do in between."""
    body = """
    .reg .pred %p; .reg .pred %q; .reg .b32 %n; .reg .b32 %s;
    mov.b32 %n, 0; mov.b32 %s, 0;
    $LOOP:
    and.b32 %s, %n, 1; setp.eq.s32 %q, %s, 0; add.s32 %n, %n, 1;
    @%q bra $EVEN;
    $MEET:
    setp.lt.s32 %p, %n, %a0;
    @%p bra $LOOP;
    shfl.sync.bfly.b32 %d0, %n, 1, 31, -1;
    bra.uni $END;
    $EVEN:
    setp.gt.s32 %q, %a0, 5;
    @%q bra $FAR;
    bra.uni $MEET;
    $FAR:
    bra.uni $MEET;
    $END:
    mov.b32 %d1, %n;
    """
    counts = np.random.default_rng(0).integers(1, 9, 64).astype(np.int32)
    other, own = execute(body, [counts], ["s32", "s32"])
    assert (own == counts).all() and (other == counts[LANES ^ 1]).all()


def test_blocks_that_take_different_ways_use_their_own_barriers() -> None:
    """Each block sums its values over as many rounds as its number says, by way of shared memory."""
    body = """
    .reg .pred %p; .reg .b32 %x; .reg .b32 %y; .reg .b32 %n; .reg .b32 %v;
    mad.lo.s32 %x, %thread, 4, %base; xor.b32 %y, %thread, 63; mad.lo.s32 %y, %y, 4, %base;
    mov.b32 %d0, %a0; mov.b32 %n, 0;
    $LOOP:
    st.shared.b32 [%x], %d0;
    bar.sync 0;
    ld.shared.b32 %v, [%y];
    bar.sync 0;
    add.s32 %d0, %d0, %v; add.s32 %n, %n, 1; setp.lt.s32 %p, %n, %block;
    @%p bra $LOOP;
    mov.b32 %d1, %n;
    """
    x = np.random.default_rng(0).integers(0, 100, 256).astype(np.int32)
    found, rounds = execute(body, [x], ["s32", "s32"], threads=64, shared=256)
    expected = x.reshape(4, 64).copy()
    for block in range(4):
        for _ in range(max(1, block)):
            expected[block] += expected[block, ::-1].copy()
    assert (found.reshape(4, 64) == expected).all() and rounds[::64].tolist() == [1, 1, 2, 3]


def test_threads_that_miss_a_barrier_are_refused() -> None:
    body = ".reg .pred %p;\nsetp.lt.s32 %p, %thread, 32;\n@%p bra $OUT;\nbar.sync 0;\n$OUT:\nmov.b32 %d0, 1;"
    with pytest.raises(PTXError, match="some threads of a block wait at a barrier, others elsewhere"):
        execute(body, [LANES], ["s32"], threads=64)


def test_threads_and_blocks_know_their_places() -> None:
    names = ["%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%ntid.x", "%laneid", "%warpid"]
    body = "\n".join(f"mov.u32 %d{at}, {name};" for at, name in enumerate(names))
    memory = GlobalMemory()
    outputs = [np.zeros(64 * 24, np.uint32) for _ in names]
    parameters = {
        f"p{at}": np.array(memory.add(o.view(np.uint8), np.ones(o.nbytes, np.bool_)), np.uint64)
        for at, o in enumerate(outputs)
    }
    text = kernel(f".reg .b32 %y; .reg .b32 %z;\n{body}", [], ["u32"] * len(names), 64).replace(
        "mad.lo.s32 %place, %block, 64, %thread;",
        """.reg .b32 %yy; .reg .b32 %zz; mov.u32 %yy, %ctaid.y; mov.u32 %zz, %ctaid.z; mad.lo.s32 %zz, %zz, 3, %yy;
        mad.lo.s32 %zz, %zz, 2, %block; mad.lo.s32 %place, %zz, 64, %thread;""",
    )
    Launch(Code(parse(text)), (2, 3, 4), parameters, memory, 0).run(Order(seed=0))
    z, y, x, thread = np.meshgrid(*map(np.arange, (4, 3, 2, 64)), indexing="ij")
    ones = np.ones_like(x)
    for found, expected in zip(
        outputs, (thread, x, y, z, 2 * ones, 3 * ones, 64 * ones, thread % 32, thread // 32), strict=True
    ):
        assert (found == expected.ravel()).all()


# --------------------------------------------------------------------------------------------------- barriers and races


REVERSE = """
.reg .b32 %x; .reg .b32 %y;
mad.lo.s32 %x, %thread, 4, %base; xor.b32 %y, %thread, 127; mad.lo.s32 %y, %y, 4, %base;
st.shared.b32 [%x], %a0;
bar.sync 0;
ld.shared.b32 %d0, [%y];
"""


def reverse(body: str, order: Order) -> Array:
    return execute(body, [FLOATS], ["f32"], threads=128, shared=512, order=order)[0].reshape(2, 128)


def test_every_order_of_warps_gives_the_same_and_none_without_barriers() -> None:
    expected = FLOATS.reshape(2, 128)[:, ::-1]
    assert (reverse(REVERSE, Order(together=True)) == expected).all()
    for seed in (None, 0, 1, 2):
        assert (reverse(REVERSE, Order(seed)) == expected).all()
        raced = reverse(REVERSE, Order(seed, ignore_barriers=True))
        assert np.isnan(raced).any() and (np.isnan(raced) | (raced == expected)).all()


def test_orders_differ_by_their_seed() -> None:
    """Without the check, a race has as many outcomes as there are orders."""
    body = "ld.param.b64 %far, [p0];\natom.global.add.u32 %d0, [%far], 1;"
    x = np.zeros(128, np.uint32)
    outcomes = {tuple(execute(body, [x], ["u32"], threads=128, order=Order(seed))[0].tolist()) for seed in range(5)}
    assert len(outcomes) > 2


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_shared_memory_of_every_width(size: int, count: int) -> None:
    """Each thread stores values side by side and loads those of the thread opposite."""
    if size * count > 16:
        return  # no instruction moves more
    vector = f".v{count}" if count > 1 else ""
    kind, width = f"b{8 * size}", size * count
    given = np.random.default_rng(0).integers(0, 256, (count, 128, size), np.uint8).view(f"u{size}")[..., 0]

    def group(prefix: str) -> str:
        return "{ " + ", ".join(f"%{prefix}{at}" for at in range(count)) + " }"

    body = f"""
    .reg .b32 %x; .reg .b32 %y;
    mad.lo.s32 %x, %thread, {width}, %base; xor.b32 %y, %thread, 63; mad.lo.s32 %y, %y, {width}, %base;
    st.shared{vector}.{kind} [ %x + 0 ], {group("a") if count > 1 else "%a0"};
    bar.sync 0;
    ld.shared{vector}.{kind} {group("d") if count > 1 else "%d0"}, [%y];
    """
    found = execute(body, [np.ascontiguousarray(part) for part in given], [kind] * count, threads=64, shared=64 * width)
    for part, result in zip(given, found, strict=True):
        assert (result.reshape(2, 64) == part.reshape(2, 64)[:, ::-1]).all()


@pytest.mark.parametrize(
    "second, message",
    [
        ("ld.shared.b32 %d0, [%y];", "a (read of what another warp wrote|write over what another warp read)"),
        ("st.shared.b32 [%y], %a0;", "a write over what another warp wrote"),
        ("st.shared.b8 [%y], %a0;", "a write over what another warp wrote"),
        (
            "bar.sync 0;\nld.shared.b32 %d0, [%y];\nst.shared.b32 [%x], %d0;",
            "a (write over what another warp read|read of what another warp wrote)",
        ),
    ],
)
def test_races_are_found_in_every_order(second: str, message: str) -> None:
    body = REVERSE.replace("bar.sync 0;\nld.shared.b32 %d0, [%y];", f"mov.b32 %d0, 0;\n{second}")
    for seed in (None, 0, 1):
        with pytest.raises(PTXError, match=f"shared.*{message} since the last barrier"):
            reverse(body, Order(seed))


def test_the_same_value_from_two_warps_is_no_race() -> None:
    body = "mov.b32 %d0, %a0;\nst.shared.b32 [%base], 7;\nbar.sync 0;\nld.shared.b32 %d0, [%base];"
    assert (execute(body, [LANES], ["s32"], threads=64, shared=4)[0] == 7).all()


def test_bytes_of_one_word_belong_to_warps_one_by_one() -> None:
    """Four warps write and read each a byte of the same words."""
    body = """
    .reg .b32 %x; .reg .b32 %w;
    and.b32 %x, %thread, 31; shr.u32 %w, %thread, 5; mad.lo.s32 %x, %x, 4, %w; add.s32 %x, %x, %base;
    st.shared.b8 [%x], %a0; ld.shared.b8 %d0, [%x];
    """
    x = np.arange(128, dtype=np.int32)
    assert (execute(body, [x], ["s32"], threads=128, shared=128)[0] == x).all()


def test_registers_that_were_not_written_are_poisoned() -> None:
    body = (
        ".reg .pred %p;\nsetp.lt.s32 %p, %a0, 3;\n@%p mov.b32 %d0, 0f3F800000;\n@!%p mov.b64 %d1, 0d0000000000000000;"
    )
    single, double = execute(body, [LANES], ["f32", "f64"])
    assert (single[:3] == 1).all() and np.isnan(single[3:]).all()
    assert np.isnan(double[:3]).all() and (double[3:] == 0).all()
