"""A few instructions on given values: a kernel around them that loads their operands and stores their results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .elementwise import TYPES
from .formats import Array
from .machine import Code, Launch, Order
from .memory import GlobalMemory
from .program import parse

HEAD = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet({parameters})
.reqntid {threads}
{{
    .reg .b32 %thread;
    .reg .b32 %block;
    .reg .b32 %place;
    .reg .b32 %base;
    .reg .b64 %at;
    .reg .b64 %far;
"""


def kernel(body: str, operands: Sequence[str], results: Sequence[str], threads: int) -> str:
    """Text of a kernel: operands are in ``%a0``, ``%a1``, ..., results are taken from ``%d0``, ..."""
    names = [f"p{at}" for at in range(len(operands) + len(results))]
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 {name}" for name in names)
    lines = [HEAD.format(parameters=parameters, threads=threads)]
    for prefix, kinds in (("a", operands), ("d", results)):
        lines += [f".reg .{'pred' if k == 'pred' else f'b{_bits(k)}'} %{prefix}{at};" for at, k in enumerate(kinds)]
    lines += [
        "mov.u32 %thread, %tid.x;", "mov.u32 %block, %ctaid.x;",
        f"mad.lo.s32 %place, %block, {threads}, %thread;", "mov.b32 %base, global_smem;",
    ]  # fmt: skip
    for at, kind in enumerate(operands):
        lines += [*_address(names[at], kind), f"ld.global.{_bits_type(kind)} %a{at}, [%at];"]
    lines.append(body)
    for at, kind in enumerate(results):
        lines += _address(names[len(operands) + at], "b32" if kind == "pred" else kind)
        if kind == "pred":
            lines += [f"selp.b32 %base, 1, 0, %d{at};", "st.global.b32 [%at], %base;"]
        else:
            lines.append(f"st.global.{_bits_type(kind)} [%at], %d{at};")
    return "\n".join([*lines, "ret;", "}"])


def _bits(kind: str) -> int:
    return max(16, 8 * TYPES[kind].itemsize)


def _bits_type(kind: str) -> str:
    return f"b{8 * TYPES[kind].itemsize}"


def _address(name: str, kind: str) -> list[str]:
    size = TYPES[kind].itemsize
    return [f"ld.param.b64 %far, [{name}];", f"mad.wide.s32 %at, %place, {size}, %far;"]


def execute(
    body: str,
    operands: Sequence[Array],
    results: Sequence[str],
    *,
    threads: int = 32,
    shared: int = 0,
    order: Order = Order(),  # noqa: B008 - it is frozen
) -> list[Array]:
    """The results of each thread.

    Args:
        body: instructions.
        operands: (n,) each, of the dtype of the instruction's operands; n is a multiple of ``threads``.
        results: types.
        threads: of a block.
        shared: bytes of shared memory.
        order: how it is executed.
    """
    count = len(operands[0]) if operands else threads
    memory = GlobalMemory()
    outputs = [np.zeros(count, np.uint32 if kind == "pred" else TYPES[kind]) for kind in results]
    addresses = [
        memory.add(o.view(np.uint8), np.ones(o.nbytes, np.bool_)) for o in (*map(np.array, operands), *outputs)
    ]
    parameters = {f"p{at}": np.array(address, np.uint64) for at, address in enumerate(addresses)}
    kinds = [o.dtype.str[1:].replace("i", "s") for o in operands]
    text = kernel(body, [f"{k[0]}{8 * int(k[1:])}" for k in kinds], results, threads)
    Launch(Code(parse(text)), (count // threads, 1, 1), parameters, memory, shared).run(order)
    return [o.astype(np.bool_) if kind == "pred" else o for o, kind in zip(outputs, results, strict=True)]
