"""Every Triton kernel compiles ahead of time for sm_80 and sm_90, within its limits of registers, memory and spills.

Every variant is compiled for one of the two, in turn, and the last of each module, which is the largest, for both. All
of them for both take two minutes more: set ``GRADMIX_ALL_VARIANTS``.
"""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

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
import importlib, json, os, sys
from gradmix.kernels.compiling import compiled_figures
capability = int(sys.argv[1])
for name in sys.argv[2:]:
    variants = list(importlib.import_module(f"gradmix.kernels.{name}").variants())
    if "GRADMIX_ALL_VARIANTS" not in os.environ:
        first = 1 if capability == 80 else 0
        variants = [*variants[:-1][first::2], variants[-1]]
    for variant in variants:
        limits = [variant.max_registers, variant.max_shared, variant.max_spills]
        print(json.dumps([variant.name, limits, compiled_figures(variant, capability)._asdict()]), flush=True)
"""


def test_there_are_kernels() -> None:
    assert "mixed_alignment" in MODULES


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory):
    """One process for each capability, all at once. The interpreter must be off when a kernel's module is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folder = tmp_path_factory.mktemp("triton")  # not the checkout, whose gradmix/ would be imported
    environment["TRITON_CACHE_DIR"] = str(folder)
    started = {
        capability: subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(capability), *MODULES],
            env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for capability in CAPABILITIES
    }  # fmt: skip
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_variants_keep_their_limits(capability: int, running: dict) -> None:
    output, errors = running[capability].communicate(timeout=PATIENCE)
    assert running[capability].returncode == 0, errors
    lines = [json.loads(line) for line in output.splitlines()]
    assert len({name for name, _, _ in lines}) == len(lines) >= len(MODULES)
    print(f"\nsm_{capability}: registers, shared bytes, spilt bytes, spills in loops of products, matrix instructions")
    for name, _, taken in lines:
        print(f"  {name:70}", *(f"{taken[key]:>7}" for key in list(taken)[:4]), taken["matrix_instructions"])
    beyond = {
        name: (taken, limits)
        for name, limits, taken in lines
        if any(taken[key] > limit for key, limit in zip(("registers", "shared", "spills"), limits, strict=True))
    }
    assert not beyond


def test_the_interpreter_is_refused_by_name(tmp_path: Path) -> None:
    program = (
        "from gradmix.kernels import compiling, draw_partners\n"
        "compiling.compiled_figures(next(draw_partners.variants()), 80)"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "unset TRITON_INTERPRET to compile it" in done.stderr
