"""Types of the compiled extension."""

from typing import Protocol, TypedDict

class _Tensor(Protocol):
    def __dlpack__(self) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_standard: int
    build_type: str
    python_abi: str
    openmp: int | None
    instruction_set: str
    cuda: bool
    cuda_version: str | None
    cuda_architectures: tuple[str, ...]

class CudaDevice(TypedDict):
    name: str
    capability: str
    memory: int

class CudaDevices(TypedDict):
    error: str | None
    runtime: str | None
    driver: str | None
    devices: list[CudaDevice]

def build_info() -> BuildInfo: ...
def cuda_devices() -> CudaDevices: ...
def class_sketch(
    deltas: _Tensor, activations: _Tensor, labels: _Tensor, out: _Tensor, num_threads: int | None = None
) -> None: ...
