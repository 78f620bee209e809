"""Triton kernels compile ahead of time for sm_80 and sm_90, within their limits of registers, memory and spills.

A variant of the largest kernel takes eight seconds to compile, so that by default not all are: of each module as many
as it takes to have every type, tile, precision and option in one of them, and each of these for one of the two
capabilities, in turn. ``GRADMIX_ALL_VARIANTS=1`` compiles every variant for both, which takes some minutes; do so after
a change of a kernel.
"""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from typing import Any

import pytest
from patience import PATIENCE

from gradmix import kernels

# With the interpreter or a GPU set aside, what is left is whether there is a Triton that serves.
REASON = kernels.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None and "triton" in REASON, reason=str(REASON))
CAPABILITIES = (80, 90)
NOT_KERNELS = {"compiling"}
MODULES = sorted(m.name for m in pkgutil.iter_modules(kernels.__path__) if m.name not in NOT_KERNELS)

PROGRAM = """
import importlib, itertools, json, os, sys
from gradmix.kernels.compiling import resource_usage

def traits(variant):
    values = {**variant.signature, **variant.constexprs, "warps": variant.num_warps, "stages": variant.num_stages}
    return {(variant.function.fn.__name__, name, value) for name, value in values.items()}

def cover(variants):
    chosen, left = [], set().union(*map(traits, variants))
    while left:
        chosen.append(max(variants, key=lambda variant: len(traits(variant) & left)))
        left -= traits(chosen[-1])
    return chosen

capabilities, modules = json.loads(sys.argv[1])
for capability, name in itertools.product(capabilities, modules):
    variants = list(importlib.import_module(f"gradmix.kernels.{name}").variants())
    if "GRADMIX_ALL_VARIANTS" not in os.environ:
        variants = cover(variants)[int(capability == 80)::2]
    for variant in variants:
        limits = [variant.max_registers, variant.max_shared, variant.max_spills]
        figures = resource_usage(variant, capability)._asdict()
        print(json.dumps([capability, variant.name, limits, figures]), flush=True)
"""


def test_there_are_kernels() -> None:
    assert "mixed_alignment" in MODULES


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, list[int], dict[str, Any]]]:
    """Capability, name, limits and figures of what is compiled: all in one process, which imports torch and Triton."""
    # A process of its own: the interpreter must be off when a kernel's module is imported. It does not run in the
    # checkout, whose gradmix/ would be imported.
    folder = tmp_path_factory.mktemp("compiled")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([CAPABILITIES, MODULES])], cwd=folder,
        env=environment | {"TRITON_CACHE_DIR": str(folder)}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_variants_keep_their_limits(
    capability: int, compiled: list[tuple[int, str, list[int], dict[str, Any]]]
) -> None:
    lines = [line[1:] for line in compiled if line[0] == capability]
    assert len({name for name, _, _ in lines}) == len(lines) >= len(MODULES)
    print(f"\nsm_{capability}: registers, shared bytes, spilt bytes, spills in loops of products, matrix instructions,")
    print("  copies to shared memory by bits")
    for name, _, taken in lines:
        figures = (f"{taken[key]:>7}" for key in list(taken)[:4])
        print(f"  {name:70}", *figures, f"{taken['matrix_instructions']}; {taken['copies']}")
    beyond = {
        name: (taken, limits)
        for name, limits, taken in lines
        if any(taken[key] > limit for key, limit in zip(("registers", "shared", "spills"), limits, strict=True))
    }
    assert not beyond


def test_rows_of_a_thousand_classes_are_read_by_sixteen_bytes(
    compiled: list[tuple[int, str, list[int], dict[str, Any]]],
) -> None:
    """1000 is no multiple of 16, the only one that Triton tells apart by itself; of odd numbers nothing is known."""
    rows = [(name, taken) for _, name, _, taken in compiled if "class indices, tf32" in name and "finish" not in name]
    copies = {name: taken["copies"] for name, taken in rows}
    odd = {name: widths for name, widths in copies.items() if "units of 1 and 1" in name}
    assert odd and len(odd) < len(copies)
    for name, widths in copies.items():
        assert ("128: " in widths) == (name not in odd), (name, widths)


def test_the_interpreter_is_refused_by_name() -> None:
    from gradmix.kernels import compiling, draw_partners

    variant = next(draw_partners.variants())
    if not kernels.is_interpreted():
        variant = variant._replace(function=len)  # what is defined for the interpreter is no JITFunction either
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET to compile it"):
        compiling.resource_usage(variant, 80)
