"""Triton kernels for the tile-regular operators, one module for each: ``gradmix.kernels.<operator>``.

Such a module imports Triton at its top, so it is imported only by the function that runs it; this one imports neither.
Besides its functions it offers ``variants()``: every specialisation of its kernels that is worth compiling ahead of
time, with the registers, shared memory and spills it may take.

The package is kept in ``kernels/`` of the source tree and installed as ``gradmix.kernels``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch


class Variant(NamedTuple):
    """One specialisation of a kernel, as it is compiled ahead of time, and the limits it is held to.

    Attributes:
        name: what it is, for a table.
        function: the function under ``triton.jit``.
        signature: type of every parameter by name, ``"constexpr"`` for the constants.
        constexprs: value of every constant by name.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
        max_registers: registers a thread may take.
        max_shared: bytes of shared memory a program may take; the default is what sm_80 has.
        max_spills: bytes a thread may spill.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int = 255
    max_shared: int = 166_912
    max_spills: int = 0


def unit_of(*numbers: int) -> int:
    """Return the largest common divisor of sizes and strides, up to 16: a constant of a kernel, which multiplies by it.

    So the compiler knows that rows of 1,000 numbers begin at multiples of 8, and reads 16 bytes at a time. By itself
    Triton tells multiples of 16 apart from all other numbers alone.

    >>> unit_of(1000, 2048)
    8
    """
    return math.gcd(16, *numbers)


OLDEST = (3, 6)
"""The oldest Triton that the kernels were compiled with; 3.1 refuses them."""


def is_interpreted() -> bool:
    """Whether Triton's kernels are run by its interpreter, on the CPU: ``TRITON_INTERPRET=1`` is set."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def unavailable_reason() -> str | None:
    """Why no Triton kernel can run on this machine, or None where one could.

    Without a GPU that is where the interpreter is asked for: it is slow, and for tests. Triton itself is not imported:
    finding it is enough, and importing it takes long.

    >>> reason = unavailable_reason()
    >>> reason is None or isinstance(reason, str)
    True
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = None  # a build of one's own, without metadata
    if version is not None and _numbers(version) < OLDEST:
        return f"triton {version} is installed, {'.'.join(map(str, OLDEST))} or later is needed"
    if not is_interpreted() and not torch.cuda.is_available():
        return "no CUDA or ROCm device is visible to torch"
    return None
