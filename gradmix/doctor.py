"""The report of ``gradmix doctor``: versions, devices, the extension, and the implementations of every operator.

Where something is not available, the report gives the reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import torch

from gradmix import _extension, captured_selection
from gradmix._version import __version__
from gradmix.calibration.key import with_index
from gradmix.calibration.lookup import CalibratedWorth, state_of
from gradmix.calibration.summary import lines_of, origin_of
from gradmix.ops import (
    class_pairs,
    class_sketch,
    cosine_alignment,
    draw_partners,
    last_layer_gradient,
    mix_labels,
    mix_samples,
    mixed_alignment,
    sketch_project,
)
from gradmix.ops.backends import ENVIRONMENT_VARIABLE, Operator, get_backend

OPERATORS: tuple[Operator, ...] = (
    mixed_alignment.OPERATOR,
    class_pairs.OPERATOR,
    last_layer_gradient.OPERATOR,
    draw_partners.OPERATOR,
    captured_selection.OPERATOR,
    mix_samples.OPERATOR,
    mix_labels.OPERATOR,
    cosine_alignment.OPERATOR,
    cosine_alignment.MIXED_OPERATOR,
    class_sketch.OPERATOR,
    sketch_project.OPERATOR,
)

# Import names of the packages of an extra; some are installed under other names.
_EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("tyro", "rich", "yaml", "matplotlib", "sklearn", "scipy", "PIL", "jinja2", "markdown_it"),
    "gradients": ("safetensors",),
    "policies": ("kornia",),
    "images": ("PIL",),
    "bench": ("rich",),
    "docs": ("sphinx", "myst_parser", "furo"),
    "test": ("pytest", "xdist", "hypothesis", "triton"),
    "dev": ("ruff", "mypy", "build"),
}
_DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "markdown_it": "markdown-it-py",
    "myst_parser": "myst-parser",
    "xdist": "pytest-xdist",
}


def report() -> dict[str, Any]:
    """Return everything that :func:`format_report` prints, as plain values that JSON can hold.

    Returns:
        Keys ``versions``, ``machine``, ``devices``, ``extension``, ``triton``, ``operators``, ``backend``,
        ``calibration`` and ``extras``. Where something is not available, a ``reason`` says why; it is None where all
        is well.
    """
    return {
        "versions": _versions(),
        "machine": _machine(),
        "devices": _devices(),
        "extension": _extension_state(),
        "triton": _triton_state(),
        "operators": [_operator(operator) for operator in OPERATORS],
        "backend": _backend(),
        "calibration": _calibration(),
        "extras": _extras(),
    }


def format_report(report: dict[str, Any]) -> str:
    """Return the report of :func:`report` as plain text, with lines indented under headings.

    >>> from gradmix import doctor
    >>> print(doctor.format_report(doctor.report()).splitlines()[0])
    versions
    """
    text = _Text()
    text.heading("versions")
    for name, version in report["versions"].items():
        text.entry(name, version)
    text.heading("machine")
    for name, value in report["machine"].items():
        text.entry(name.replace("_", " "), str(value))
    _add_devices(text, report["devices"])
    _add_extension(text, report["extension"])
    triton = report["triton"]
    text.heading("triton")
    text.entry("usable", _yes_no(triton["reason"] is None, triton["reason"], triton["detail"]))
    _add_operators(text, report["operators"], report["backend"])
    _add_calibration(text, report["calibration"])
    text.heading("extras")
    for extra in report["extras"]:
        missing = f"missing {', '.join(extra['missing'])}: {extra['install']}"
        text.entry(extra["name"], missing if extra["missing"] else "complete")
    return "\n".join(text.lines) + "\n"


class _Text:
    """Lines of text under headings."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def heading(self, text: str) -> None:
        """Add a heading, after an empty line unless it is the first."""
        if self.lines:
            self.lines.append("")
        self.lines.append(text)

    def entry(self, name: str, text: str) -> None:
        """Add an indented line: a name, and a text in the second column."""
        self.lines.append(f"  {name:<16} {text}".rstrip())


def _add_devices(text: _Text, devices: dict[str, Any]) -> None:
    text.heading("devices")
    text.entry("cpu", f"{devices['threads']} torch threads")
    for device in devices["torch"]:
        memory = f"{device['memory'] / 2**30:.1f} GiB"
        text.entry(device["device"], f"{device['name']}, capability {device['capability']}, {memory}")
    if devices["torch_reason"]:
        text.entry("torch", f"no GPU: {devices['torch_reason']}")
    native = devices["extension"]
    if native:
        for index, device in enumerate(native["devices"]):
            text.entry(f"extension:{index}", f"{device['name']}, capability {device['capability']}")
        if not native["devices"]:
            why = "no CUDA driver is installed" if native["runtime"] and not native["driver"] else native["error"]
            text.entry("extension", f"no GPU: {why or 'the driver reports none'}")


def _add_extension(text: _Text, extension: dict[str, Any]) -> None:
    text.heading("extension gradmix._C")
    if extension["available"]:
        built = extension["build"]
        kernels = f"kernels for {built['instruction_set']}"
        text.entry("available", f"yes: {built['compiler']}, for {built['python_abi']}, {kernels}")
    else:
        text.entry("available", f"no: {extension['reason']}")
    for part in ("openmp", "cuda"):
        state = extension[part]
        text.entry(part, _yes_no(state["built"], state["reason"], state["detail"]))


def _add_operators(text: _Text, operators: list[dict[str, Any]], backend: dict[str, Any]) -> None:
    text.heading("operators")
    for operator in operators:
        for body in operator["bodies"]:
            mark = "  <- auto" if body["backend"] == operator["auto"] else ""
            answer = _yes_no(body["reason"] is None, body["reason"])
            text.entry(operator["name"], f"{body['backend']:<10} {answer}{mark}")
    text.entry("preference", backend["reason"] or f"{backend['preferred']} ({backend['source']})")
    text.lines.append("  auto still looks at each call's device, dtype and size.")


def _add_calibration(text: _Text, calibration: dict[str, Any]) -> None:
    text.heading("calibration")
    if calibration["reason"]:
        text.entry("kernels", calibration["reason"])
    for device in calibration["devices"]:
        text.entry(device["device"], device["origin"])
        for line in device["verdicts"]:
            text.entry(line["operator"], f"{line['backend']:<10} {line['dtype']}: {line['text']}")


def _yes_no(yes: bool, reason: str | None, detail: str | None = None) -> str:
    if yes:
        return f"yes: {detail}" if detail else "yes"
    return f"no: {reason}" if reason else "no"


def _version_of(module: str) -> str | None:
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    versions = {
        "gradmix": f"{__version__}, {Path(__file__).parent}",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    modules = dict.fromkeys(module for extra in _EXTRAS.values() for module in extra)
    for module in ("triton", *modules):
        version = _version_of(module)
        if version is not None:
            versions[_DISTRIBUTIONS.get(module, module)] = version
    return versions


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": f"{processor_name()} ({platform.machine()})",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def processor_name() -> str:
    """The processor's model, as Linux has it; elsewhere as Python has it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _devices() -> dict[str, Any]:
    found = []
    reason = None
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                {
                    "device": f"cuda:{index}",
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory": properties.total_memory,
                }
            )
    elif torch.version.cuda is None and torch.version.hip is None:
        reason = "this torch is built for the CPU only"
    else:
        reason = "torch is built for one, but sees no usable device or driver"
    extension: Any = _extension.load()
    return {
        "threads": torch.get_num_threads(),
        "torch": found,
        "torch_reason": reason,
        "extension": dict(extension.cuda_devices()) if extension is not None else None,
    }


def _extension_state() -> dict[str, Any]:
    extension: Any = _extension.load()
    reason = _extension.unavailable_reason()
    written = _extension.build_report() or {}
    build = dict(extension.build_info()) if extension is not None else None

    def part(name: str, detail: str | None) -> dict[str, Any]:
        if build is not None:
            built = bool(build[name])
            why = (written.get(name) or {}).get("reason") or "the build left no reason"
            return {"built": built, "reason": None if built else why, "detail": detail if built else None}
        return {"built": False, "reason": "there is no extension to have it", "detail": None}

    openmp = cuda = None
    if build is not None:
        build["cuda_architectures"] = list(build["cuda_architectures"])
        openmp = f"version {build['openmp']}"
        cuda = f"nvcc {build['cuda_version']}, architectures {', '.join(build['cuda_architectures'])}"
    return {
        "available": extension is not None,
        "reason": reason,
        "build": build,
        "report": written or None,
        "openmp": part("openmp", openmp),
        "cuda": part("cuda", cuda),
    }


def _triton_state() -> dict[str, Any]:
    detail = "this version of gradmix ships no Triton kernel"
    try:
        kernels = importlib.import_module("gradmix.kernels")
    except ImportError:
        return {"reason": "gradmix.kernels is not installed (a bare checkout does not have it)", "detail": detail}
    return {"reason": kernels.unavailable_reason(), "detail": detail}


def _operator(operator: Operator) -> dict[str, Any]:
    bodies = operator.explain()
    return {
        "name": operator.name,
        "bodies": [{"backend": name, "reason": reason} for name, reason in bodies],
        "auto": next((name for name, reason in bodies if reason is None and name not in _off(operator)), None),
    }


def _off(operator: Operator) -> set[str]:
    """Return the implementations that ``auto`` uses at no size on the current device."""
    judged = {body.name for body in operator.backends if isinstance(body.worth, CalibratedWorth)}
    if not judged or not torch.cuda.is_available():
        return judged
    table = state_of(with_index(torch.device("cuda"))).table
    lines = lines_of(table) if table is not None else []
    return judged - {line.backend for line in lines if line.operator == operator.name and line.on}


def _calibration() -> dict[str, Any]:
    reason = None if torch.cuda.is_available() else "nothing to calibrate without a device"
    devices = []
    for index in range(torch.cuda.device_count() if reason is None else 0):
        state = state_of(torch.device("cuda", index))
        verdicts = [line._asdict() for line in lines_of(state.table)] if state.table is not None else []
        devices.append({"device": f"cuda:{index}", "origin": origin_of(state), "verdicts": verdicts})
    return {"reason": reason, "devices": devices}


def _backend() -> dict[str, Any]:
    try:
        preferred = get_backend()
    except ValueError as error:
        return {"preferred": None, "source": ENVIRONMENT_VARIABLE, "reason": str(error)}
    source = "set_backend"
    if preferred == os.environ.get(ENVIRONMENT_VARIABLE):
        source = ENVIRONMENT_VARIABLE
    elif preferred == "auto":
        source = "the default"
    return {"preferred": preferred, "source": source, "reason": None}


def _extras() -> list[dict[str, Any]]:
    extras = []
    for name, modules in _EXTRAS.items():
        missing = [_DISTRIBUTIONS.get(m, m) for m in modules if not _is_importable(m)]
        install = f'pip install "gradmix[{name}]"' if missing else None
        extras.append({"name": name, "missing": missing, "install": install})
    return extras


def _is_importable(module: str) -> bool:
    if module in sys.modules:
        return True
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    # A folder that happens to bear the name (build/, say) is found too, but as a namespace without an origin.
    return spec is not None and spec.origin is not None
