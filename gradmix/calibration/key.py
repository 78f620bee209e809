"""Key of a table: the device and the installation for which its measurements are valid."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch

from gradmix import _extension
from gradmix._version import __version__

Key = Mapping[str, str]
"""Value of every component of :data:`COMPONENTS`."""

COMPONENTS = {
    "device": "the device",
    "capability": "compute capability",
    "multiprocessors": "multiprocessors",
    "memory": "bytes of memory",
    "driver": "driver",
    "torch": "torch",
    "runtime": "the CUDA or ROCm of torch",
    "triton": "triton",
    "gradmix": "gradmix",
    "kernels": "sources of the kernels",
    "build": "build of the extension",
}
"""Components of a key, each with its name in messages."""

_HASHES = ("kernels", "build")
_CALLERS = ("ops", "estimators", "runtime")
_SUFFIXES = (".so", ".pyd")


@lru_cache(maxsize=16)
def key_of(device: torch.device) -> Key:
    """Return the key of a CUDA or ROCm device with a number, and of this installation.

    The values are read once in a process.
    """
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": str(properties.total_memory),
        "driver": _driver(),
        "torch": torch.__version__,
        "runtime": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
        "triton": _triton(),
        "gradmix": __version__,
        "kernels": _hash_of_kernels(),
        "build": _hash_of_build(),
    }


def with_index(device: torch.device) -> torch.device:
    """Return the device with its number: that of the current device where it has none."""
    if device.type == "cuda" and ":" not in str(device):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def digest(key: Key) -> str:
    """Return twelve hexadecimal digits that stand for a key."""
    return hashlib.sha256(json.dumps(dict(sorted(key.items()))).encode()).hexdigest()[:12]


def difference(made: Key, here: Key, components: Iterable[str] = tuple(COMPONENTS)) -> str | None:
    """Return a sentence about the first component that differs; None if none does.

    >>> difference({"triton": "3.6.0"}, {"triton": "3.7.1"}, ["triton"])
    'it was made with triton 3.6.0, this is 3.7.1'
    """
    for name in components:
        if made.get(name) != here.get(name):
            if name in _HASHES:
                return f"it was made with another {COMPONENTS[name]}"
            return f"it was made with {COMPONENTS[name]} {made.get(name)}, this is {here.get(name)}"
    return None


def slug(name: str) -> str:
    """Return a device's name as part of a file's name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"


def _driver() -> str:
    """Return the version of the kernel module, where the system has it, and of the CUDA that the driver serves."""
    found = []
    for file, pattern in (
        (Path("/proc/driver/nvidia/version"), r"Kernel Module\D*?\s(\d[\d.]+)"),
        (Path("/sys/module/amdgpu/version"), r"(\S+)"),
    ):
        try:
            match = re.search(pattern, file.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if match:
            found.append(match[1])
    served = getattr(torch._C, "_cuda_getDriverVersion", None)
    if served is not None and torch.version.cuda:
        found.append(f"CUDA {served()}")
    return ", ".join(found) or "unknown"


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec("triton") else "none"


def _hash_of_kernels() -> str:
    """Return the hash of the Triton kernels, and of the operators and the selection that call them."""
    found = importlib.util.find_spec("gradmix.kernels")
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    own = _extension.folders()
    selection = _hash(own, (".py",), deep=False).encode()
    return _hash([*folders, *(folder / part for folder in own for part in _CALLERS)], (".py",), selection)


def _hash_of_build() -> str:
    """Return the hash of the compiled extension and of the report of its build."""
    report = json.dumps(_extension.build_report(), sort_keys=True).encode()
    return _hash(_extension.folders(), _SUFFIXES, report, deep=False)


def _hash(folders: Iterable[Path], suffixes: tuple[str, ...], start: bytes = b"", *, deep: bool = True) -> str:
    total = hashlib.sha256(start)
    for folder in folders:
        for file in sorted(folder.rglob("*") if deep else folder.glob("*")):
            if file.suffix in suffixes:
                total.update(file.relative_to(folder).as_posix().encode())
                total.update(file.read_bytes())
    return total.hexdigest()[:16]
