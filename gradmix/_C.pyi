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
    deltas: _Tensor,
    activations: _Tensor,
    labels: _Tensor,
    sums: _Tensor,
    squares: _Tensor,
    num_threads: int | None = None,
) -> None: ...
def sketch_project(x: _Tensor, key: int, ones: bool, out: _Tensor, num_threads: int | None = None) -> None: ...

# With the CUDA part only; `stream` is the CUDA stream's handle.
def class_sketch_cuda_workspace(dtype: str, samples: int, positions: int, rows: int, columns: int) -> int: ...
def class_sketch_cuda(
    deltas: _Tensor,
    activations: _Tensor,
    order: _Tensor,
    labels: _Tensor,
    starts: _Tensor,
    sums: _Tensor,
    squares: _Tensor,
    workspace: _Tensor,
    stream: int,
) -> None: ...
def sketch_project_cuda_workspace(dtype: str, samples: int, positions: int, dim: int, rank: int) -> int: ...
def sketch_project_cuda(x: _Tensor, key: int, ones: bool, out: _Tensor, workspace: _Tensor, stream: int) -> None: ...
