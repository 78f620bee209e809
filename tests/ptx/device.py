"""A Triton driver whose device is the machine: kernels are compiled for sm_80 up to PTX, and executed here.

Triton's own code specialises the arguments, compiles and launches, as for a GPU. In place of machine code it keeps the
PTX, and a launch executes that on the memory of CPU tensors. Only for a process of its own: ``install`` replaces what
Triton's CUDA backend does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from .elementwise import TYPES
from .machine import Code, Launch, Order
from .memory import GlobalMemory
from .program import parse

MOST_SHARED = 166_912
"""Bytes of shared memory of a block, of an A100."""


@dataclass
class Device:
    """The order of execution, and what was launched.

    Attributes:
        order: of the launches from now on.
        launched: (name, blocks, warps of a block) of each launch so far.
    """

    order: Order = field(default_factory=Order)
    launched: list[tuple[str, int, int]] = field(default_factory=list)


class Utilities:
    """The part of a driver that Triton asks for properties and loads programs with."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": MOST_SHARED}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, Code, int, int, int]:
        return name, Code(parse(binary.decode())), 0, 0, 1024


class Driver(DriverBase):
    def __init__(self, device: Device) -> None:
        self.utils = Utilities()
        self.launcher_cls = lambda source, metadata: Launcher(device, source, metadata)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the machine's time is no device's")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launcher:
    """Executes one compiled kernel."""

    def __init__(self, device: Device, source: Any, metadata: Any) -> None:
        self.device = device
        self.types = list(source.signature.values())
        self.shared = metadata.shared
        if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
            raise NotImplementedError("scratch memory and clusters of blocks")

    def __call__(
        self, x: int, y: int, z: int, stream: int, code: Code, metadata: Any, launch: Any, enter: Any, leave: Any,
        *arguments: Any,
    ) -> None:  # fmt: skip
        given = [value for value, kind in zip(arguments, self.types, strict=True) if kind != "constexpr"]
        memory = GlobalMemory()
        addresses = _addresses(memory, [value for value in given if isinstance(value, Tensor)])
        values = [addresses[id(value)] if isinstance(value, Tensor) else value for value in given]
        # The last two lead to scratch memory, of which there is none.
        values += [0] * (len(code.program.parameters) - len(values))
        declared = code.program.parameters.items()
        parameters = {name: _number(value, kind) for (name, kind), value in zip(declared, values, strict=True)}
        self.device.launched.append((code.program.name, x * y * z, code.program.threads // 32))
        Launch(code, (x, y, z), parameters, memory, self.shared).run(self.device.order)


def _number(value: float, kind: str) -> Any:
    dtype = TYPES[kind]
    return np.array(value if dtype.kind == "f" else int(value) % (1 << 8 * dtype.itemsize), dtype)


def _addresses(memory: GlobalMemory, tensors: list[Tensor]) -> dict[int, int]:
    """An address for each tensor, by id. Those that share memory share it here; no other byte of it may be touched."""
    valid: dict[int, Tensor] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        mine = valid.setdefault(storage.data_ptr(), torch.zeros(len(storage), dtype=torch.bool))
        size = tensor.element_size()
        strides = [size * stride for stride in tensor.stride()]
        mine.as_strided((*tensor.shape, size), (*strides, 1), size * tensor.storage_offset()).fill_(True)
    begins: dict[int, int] = {}
    addresses = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start not in begins:
            octets = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            begins[start] = memory.add(octets, valid[start].numpy(), start % 512)
        addresses[id(tensor)] = begins[start] + tensor.storage_offset() * tensor.element_size()
    return addresses


def install() -> Device:
    """Makes the machine Triton's active device."""
    device = Device()
    CUDABackend.make_cubin = lambda self, source, metadata, options, capability: source.encode()
    triton.runtime.driver.set_active(Driver(device))
    return device
