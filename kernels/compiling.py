"""The GPU resources of a kernel, found by compiling it ahead of time: no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from gradmix.kernels import Variant
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_ALIGNED = 16


class Figures(NamedTuple):
    """The resources of a compiled kernel.

    Attributes:
        registers: of a thread.
        shared: bytes of shared memory of a program.
        spills: bytes a thread keeps in memory for want of registers: its stack and local memory.
        spilt_in_loop: instructions that spill or fetch what was spilt, within the innermost loops of matrix products.
        matrix_instructions: instructions for the matrix units in the machine code, as ``"HGMMA 100"``, or ``"none"``.
        copies: copies from global to shared memory by bits, as ``"128: 8, 64: 4"``, or ``"none"``.
    """

    registers: int
    shared: int
    spills: int
    spilt_in_loop: int
    matrix_instructions: str
    copies: str


def resource_usage(variant: Variant, capability: int) -> Figures:
    """Compile a variant for a compute capability, and read what it takes from the machine code.

    Pointers are taken to be aligned as torch allocates, and no size or stride that is passed to be a multiple of
    anything.

    Args:
        variant: what to compile.
        capability: 80 for sm_80, 90 for sm_90.

    Raises:
        RuntimeError: the interpreter is on, under which Triton compiles nothing.
    """
    if not isinstance(variant.function, triton.JITFunction):
        raise RuntimeError(f"{variant.name}: it was defined for the interpreter; unset TRITON_INTERPRET to compile it")
    types = list(variant.signature.values())
    aligned: dict[Any, Any] = {
        (at,): [["tt.divisibility", _ALIGNED]] for at, kind in enumerate(types) if kind.startswith("*")
    }
    source = ASTSource(variant.function, variant.signature, variant.constexprs, aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        code = _cuobjdump("-sass", cubin)
    taken = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    copies = re.findall(r"\bLDGSTS\.[.\w]+", code)
    widths = {width: sum(copy.endswith(f".{width}") for copy in copies) for width in (128, 64)}
    widths[32] = len(copies) - sum(widths.values())
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "HMMA")}
    return Figures(
        registers=taken["REG"],
        shared=int(compiled.metadata.shared),
        spills=taken["STACK"] + taken["LOCAL"],
        spilt_in_loop=_spilt_in_loop(code),
        matrix_instructions=", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none",
        copies=", ".join(f"{width}: {count}" for width, count in widths.items() if count) or "none",
    )


def _spilt_in_loop(code: str) -> int:
    """Spilling instructions within the innermost backward jumps that have matrix instructions between their ends."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    loops = []
    for at, text in lines:
        jump = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            inside = [t for where, t in lines if int(jump[1], 16) <= where <= at]
            if any("HGMMA" in t or "HMMA" in t for t in inside):
                loops.append((int(jump[1], 16), at, inside))
    innermost = [
        inside
        for first, last, inside in loops
        if not any((f, e) != (first, last) and first <= f and e <= last for f, e, _ in loops)
    ]
    return sum(len(re.findall(r"\b(?:STL|LDL)\b", t)) for inside in innermost for t in inside)


def _cuobjdump(option: str, cubin: Path) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(program), option, str(cubin)], check=True, capture_output=True, text=True).stdout
