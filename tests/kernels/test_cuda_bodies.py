"""The CUDA bodies without a GPU: the very same kernel sources run on the CPU by tests/cuda_on_host, and by sanitizers.

What is left to tests/kernels/test_gpu_operators.py is what CUDA itself does: launches, streams, devices, speed.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradmix import _extension
from gradmix.ops import _cuda
from gradmix.ops.counter_random import random_matrix

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "cuda_on_host"
KERNELS = [ROOT / "csrc" / "class_sketch_cuda.cu", ROOT / "csrc" / "sketch_project_cuda.cu"]
COMPILER = os.environ.get("CXX") or shutil.which("g++")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

EXTENSION = _extension.load()

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}  # as Dtype of csrc/dtype.hpp counts
# Largest error allowed, relative to the largest entry of the truth. The half types are exact in float32.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def compile_on_host(folder: Path, name: str, sources: list[str], *flags: str, fibers: tuple[str, ...] = ()) -> Path:
    """One program or library of the kernels and tests/cuda_on_host; `fibers` are the flags of what runs the threads."""
    if COMPILER is None:
        pytest.skip("no C++ compiler (g++ or CXX) to compile the kernels for the CPU with")
    common = [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", f"-I{HERE}"]
    subprocess.run(
        [*common, "-O1", *fibers, "-c", str(HERE / "fibers.cpp"), "-o", str(folder / "fibers.o")], check=True
    )
    kernels = ["-x", "c++", *map(str, KERNELS), "-x", "none"]
    rest = [str(folder / "fibers.o"), *(str(HERE / source) for source in sources)]
    subprocess.run([*common, f"-I{ROOT / 'csrc'}", *flags, *kernels, *rest, "-o", str(folder / name)], check=True)
    return folder / name


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("cuda_on_host")
    library = ctypes.CDLL(str(compile_on_host(folder, "operators.so", ["operators.cpp"], "-O1", "-shared")))
    for name in ("class_sketch", "sketch_project"):
        getattr(library, f"on_host_{name}").restype = ctypes.c_char_p
        getattr(library, f"on_host_{name}_workspace").restype = ctypes.c_int64
    return library


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def sizes(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=result_dtype(dtype))


def assert_close(result: Tensor, expected: Tensor, dtype: torch.dtype, unit: float | None = None) -> None:
    assert result.shape == expected.shape
    if expected.numel():
        scale = expected.abs().max().clamp_min(1e-30) if unit is None else unit
        assert (result.double() - expected).abs().max() <= TOLERANCE[dtype] * scale


def random(*shape: int, dtype: torch.dtype, seed: int = 0, odd: bool = False) -> Tensor:
    """Contiguous; with `odd` one element behind a 16-byte boundary."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    if not odd:
        return values
    room = torch.empty(values.numel() + 1, dtype=dtype)
    return room[1:].view(shape).copy_(values)


# -------------------------------------------------------------------------------------------------------- class_sketch

CLASS_SKETCH = {
    # name: (N, T, K, J, P)
    "one row": (1, 1, 1, 1, 1),
    "linear": (64, 1, 16, 16, 10),
    "linear, classes across blocks": (100, 1, 16, 16, 3),
    "linear, one class": (70, 1, 20, 12, 1),
    "linear, more classes than rows": (5, 1, 8, 8, 40),
    "linear, many tiles": (24, 1, 70, 130, 3),
    "two positions": (9, 2, 16, 16, 3),
    "odd sizes": (7, 5, 13, 19, 3),
    "a read and one position": (3, 65, 16, 16, 2),
    "several reads": (3, 200, 16, 12, 2),
    "single column": (9, 2, 5, 1, 2),
    "single row of the output": (9, 20, 1, 24, 2),
    "tile 32": (6, 33, 32, 20, 2),
    "just above tile 32": (3, 17, 33, 30, 2),
    "tile 64": (3, 18, 64, 64, 2),
    "several tiles": (4, 6, 65, 129, 3),
    "positions cut": (2, 1030, 16, 16, 3),
    "positions cut unevenly": (3, 777, 5, 9, 2),
    "positions cut, larger output": (1, 600, 40, 40, 2),
    "several samples a block": (1100, 2, 3, 4, 7),
    "no samples": (0, 4, 3, 5, 6),
    "no positions": (4, 0, 3, 5, 6),
    "no rows": (4, 2, 0, 5, 6),
    "no columns": (4, 2, 3, 0, 6),
    "no classes": (0, 2, 3, 4, 0),
}


def class_sketch(library: ctypes.CDLL, deltas: Tensor, activations: Tensor, labels: Tensor, classes: int):
    n, t, k = deltas.shape
    j = activations.shape[2]
    dtype = deltas.dtype
    ordered = _cuda.sort_by_class(labels, classes)
    elements = library.on_host_class_sketch_workspace(DTYPES[dtype], *sizes(n, t, k, j))
    workspace = poisoned(elements, dtype=dtype)
    sums, squares = poisoned(classes, k, j, dtype=dtype), poisoned(classes, dtype=dtype)
    error = library.on_host_class_sketch(
        DTYPES[dtype],
        *map(pointer, (deltas, activations, *ordered, sums, squares, workspace)),
        *sizes(n, t, k, j, classes),
    )
    assert error == b""
    return sums, squares


def class_sketch_truth(deltas: Tensor, activations: Tensor, labels: Tensor, classes: int):
    """Sums, squares, and the squares' unit: what they are made of before anything cancels."""
    products = torch.einsum("ntk,ntj->nkj", deltas.double(), activations.double())
    chosen = (labels[:, None] == torch.arange(classes)).double()
    squares = chosen.T @ products.square().sum((1, 2))
    return torch.einsum("np,nkj->pkj", chosen, products), squares


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("case", CLASS_SKETCH)
def test_class_sketch_equals_the_formula(on_host, case, dtype):
    n, t, k, j, classes = CLASS_SKETCH[case]
    deltas, activations = random(n, t, k, dtype=dtype), random(n, t, j, dtype=dtype, seed=1)
    labels = torch.randint(0, max(classes, 1), (n,))
    results = class_sketch(on_host, deltas, activations, labels, classes)
    for result, expected in zip(results, class_sketch_truth(deltas, activations, labels, classes), strict=True):
        assert_close(result, expected, dtype)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("case", ["linear", "several reads", "tile 64", "positions cut"])
def test_class_sketch_of_unaligned_memory(on_host, case, dtype):
    n, t, k, j, classes = CLASS_SKETCH[case]
    deltas = random(n, t, k, dtype=dtype, odd=True)
    activations = random(n, t, j, dtype=dtype, seed=1, odd=True)
    labels = torch.randint(0, classes, (n,))
    aligned = class_sketch(on_host, deltas.clone(), activations.clone(), labels, classes)
    results = class_sketch(on_host, deltas, activations, labels, classes)
    assert all(torch.equal(a, b) for a, b in zip(results, aligned, strict=True))


@pytest.mark.parametrize(
    "case", ["linear, classes across blocks", "odd sizes", "several samples a block", "positions cut"]
)
def test_class_sketch_leaves_out_labels_out_of_range(on_host, case):
    """Nothing is written or read outside; the caller refuses such labels where it can wait."""
    n, t, k, j, classes = CLASS_SKETCH[case]
    deltas, activations = random(n, t, k, dtype=torch.float32), random(n, t, j, dtype=torch.float32, seed=1)
    labels = torch.randint(-2, classes + 2, (n,))
    labels[-1] = 1 << 62
    results = class_sketch(on_host, deltas, activations, labels, classes)
    for result, expected in zip(results, class_sketch_truth(deltas, activations, labels, classes), strict=True):
        assert_close(result, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("samples", [1, 20, 127, 256, 1024, 5000])
@pytest.mark.parametrize(
    ("rows", "columns"), [(16, 16), (17, 30), (64, 64), (65, 64), (512, 512), (512, 4609), (1, 20_000)]
)
def test_class_sketch_takes_no_more_memory_than_it_says(on_host, rows, columns, samples, dtype):
    for positions in (1, 49, 3136):
        elements = on_host.on_host_class_sketch_workspace(DTYPES[dtype], *sizes(samples, positions, rows, columns))
        arguments = samples * positions * (rows + columns)
        assert elements * dtype.itemsize <= (40 << 20) + (2 * rows * columns + arguments) * dtype.itemsize


@pytest.mark.parametrize("positions", [1, 3])
def test_class_sketch_zeroes_empty_classes_and_keeps_infinities_apart(on_host, positions):
    deltas, activations = random(4, positions, 5, dtype=torch.float32), random(4, positions, 6, dtype=torch.float32)
    deltas[2, 0, 1] = torch.inf
    sums, squares = class_sketch(on_host, deltas, activations, torch.tensor([4, 1, 3, 1]), 6)
    empty = torch.tensor([0, 2, 5])
    assert (sums[empty] == 0).all() and (squares[empty] == 0).all()
    assert squares[3] == torch.inf and not sums[3, 1].isfinite().any()
    assert sums[torch.tensor([1, 4])].isfinite().all() and squares[torch.tensor([1, 4])].isfinite().all()
    assert sums[3, torch.tensor([0, 2, 3, 4])].isfinite().all()


# ------------------------------------------------------------------------------------------------------ sketch_project

SKETCH_PROJECT = {
    # name: (N, T, D, rank)
    "one number": (1, 1, 1, 1),
    "linear": (33, 1, 64, 16),
    "a tile of positions": (2, 64, 20, 16),
    "a position more than a tile": (3, 43, 20, 16),
    "odd sizes": (3, 49, 27, 5),
    "seven by seven": (2, 49, 64, 16),
    "positions by four": (2, 28, 40, 32),
    "positions by eight": (3, 40, 40, 32),
    "rank of three quarters": (2, 16, 24, 48),
    "two blocks of rows": (2, 20, 18, 70),
    "three blocks of rows": (1, 9, 12, 130),
    "columns cut": (2, 3, 530, 20),
    "columns cut unevenly": (1, 5, 1001, 16),
    "many blocks": (70, 130, 10, 4),
    "a span and one column": (2, 12, 65, 33),
    "no samples": (0, 3, 5, 4),
    "no positions": (3, 0, 5, 4),
    "no columns": (3, 2, 0, 4),
}


def sketch_project(library: ctypes.CDLL, x: Tensor, rank: int, key: int, ones: bool) -> Tensor:
    n, t, d = x.shape
    elements = library.on_host_sketch_project_workspace(DTYPES[x.dtype], *sizes(n, t, d, rank))
    workspace, out = poisoned(elements, dtype=x.dtype), poisoned(n, t, rank, dtype=x.dtype)
    memory = [pointer(out), pointer(workspace)]
    error = library.on_host_sketch_project(
        DTYPES[x.dtype], pointer(x), *sizes(*x.stride()), *memory, *sizes(n, t, d, rank, key), int(ones)
    )
    assert error == b""
    return out


def sketch_project_truth(x: Tensor, rank: int, key: int, ones: bool) -> tuple[Tensor, float]:
    """The result, and its unit: the root of the mean square it has at random."""
    matrix = random_matrix(rank, x.shape[2] + ones, key, dtype=torch.float64)
    x = torch.cat((x.double(), torch.ones(*x.shape[:2], int(ones), dtype=torch.float64)), 2)
    return x @ matrix.T, float(x.square().sum(2).max().sqrt()) if x.numel() else 1.0


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("case", SKETCH_PROJECT)
def test_sketch_project_equals_the_formula(on_host, case, layout, dtype):
    n, t, d, rank = SKETCH_PROJECT[case]
    x = random(n, t, d, dtype=dtype) if layout == "rows" else random(n, d, t, dtype=dtype).mT
    key = -(7**20) if t % 2 else 11
    for ones in (False, True):
        expected, unit = sketch_project_truth(x, rank, key, ones)
        assert_close(sketch_project(on_host, x, rank, key, ones), expected, dtype, unit)


STRIDED = {
    "rows with gaps": lambda dtype: random(3, 40, 24, dtype=dtype)[:, :, :16],
    "rows with gaps, unaligned": lambda dtype: random(3, 20, 37, dtype=dtype)[:, :, 3:30],
    "every other position": lambda dtype: random(3, 40, 16, dtype=dtype)[:, ::2],
    "samples inside positions": lambda dtype: random(20, 3, 16, dtype=dtype).transpose(0, 1),
    "one position for all": lambda dtype: random(3, 1, 16, dtype=dtype).expand(3, 7, 16),
    "planes with gaps": lambda dtype: random(2, 24, 48, dtype=dtype)[:, 3:12, 8:40].mT,
    "planes with gaps, unaligned": lambda dtype: random(2, 24, 48, dtype=dtype)[:, 3:12, 5:40].mT,
    "every other plane": lambda dtype: random(2, 24, 32, dtype=dtype)[:, ::2].mT,
    "rows one element off": lambda dtype: random(3, 5, 16, dtype=dtype, odd=True),
    "planes one element off": lambda dtype: random(3, 16, 32, dtype=dtype, odd=True).mT,
    "one sample of a batch inside": lambda dtype: random(5, 3, 16, dtype=dtype)[:, 1:2],
}


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("case", STRIDED)
def test_sketch_project_reads_strided_memory_where_it_lies(on_host, case, dtype):
    x = STRIDED[case](dtype)
    expected, unit = sketch_project_truth(x, 20, 5, True)
    assert_close(sketch_project(on_host, x, 20, 5, True), expected, dtype, unit)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_sketch_project_gives_the_same_bits_for_both_layouts_and_alignments(on_host, dtype):
    x = random(2, 40, 300, dtype=dtype)
    expected = sketch_project(on_host, x, 33, 9, True)
    off = random(2, 300, 40, dtype=dtype, odd=True)
    for other in (x.mT.contiguous().mT, off.copy_(x.mT).mT):
        assert torch.equal(sketch_project(on_host, other, 33, 9, True), expected)


def test_more_blocks_than_a_launch_may_have_are_refused_with_the_sizes(on_host):
    x, out = random(1, 1, 1, dtype=torch.float32), poisoned(1, dtype=torch.float32)
    memory = pointer(out), pointer(out)  # nothing is read or written
    error = on_host.on_host_sketch_project(
        DTYPES[torch.float32], pointer(x), *sizes(1, 1, 1), *memory, *sizes(1 << 39, 1, 1, 16, 0), 0
    )
    expected = rb"sketch_project rows \(positions=549755813888 D=1 rank=16; grid 4294967296 x 1\): more blocks than"
    assert re.search(expected, error)


# ------------------------------------------------------------------------------- order, races, memory, what nvcc makes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_order_of_threads_and_blocks_changes_no_bit(on_host, dtype, monkeypatch):
    results = []
    for order in ("forward", "backward"):
        # ctypes' own view of the environment is the process's.
        monkeypatch.setenv("GRADMIX_ORDER", order)
        torch.manual_seed(0)
        for n, t, k, j, classes in (CLASS_SKETCH[name] for name in ("several reads", "positions cut", "several tiles")):
            arguments = random(n, t, k, dtype=dtype), random(n, t, j, dtype=dtype), torch.randint(0, classes, (n,))
            results.append((order, class_sketch(on_host, *arguments, classes)))
        x = random(3, 49, 300, dtype=dtype)
        results.append((order, (sketch_project(on_host, x, 20, 1, True), sketch_project(on_host, x.mT, 20, 1, True))))
    forward, backward = ([r for order, r in results if order == name] for name in ("forward", "backward"))
    assert all(torch.equal(a, b) for f, g in zip(forward, backward, strict=True) for a, b in zip(f, g, strict=True))


SANITIZERS = {
    # name: (flags, flags of the fibers, how it reports, what it reports each wrong kernel as)
    "address": (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        ["-DGRADMIX_ASAN"],
        {"outside": "heap-buffer-overflow", "torn": "only a part of the threads"},
    ),
    "thread": (["-fsanitize=thread"], ["-DGRADMIX_TSAN"], {"race": "data race"}),
}


def _without_randomness() -> bool:
    """Whether a program can be started without its memory being placed at random."""
    return shutil.which("setarch") is not None and not subprocess.run(["setarch", "-R", "true"]).returncode


@pytest.mark.slow
@pytest.mark.parametrize("name", SANITIZERS)
def test_a_sanitizer_finds_nothing_in_the_kernels_and_something_in_wrong_ones(name, tmp_path):
    flags, fibers, wrong = SANITIZERS[name]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if (
        COMPILER is None
        or subprocess.run([COMPILER, *flags, probe, "-o", tmp_path / "probe"], capture_output=True).returncode
    ):
        pytest.skip(f"no C++ compiler with {' '.join(flags)}")
    program = compile_on_host(tmp_path, name, ["sanitized.cpp"], "-O0", "-g1", *flags, fibers=tuple(fibers))
    # A thread sanitizer may find its addresses taken where the system places memory at random.
    command = ["setarch", "-R", str(program)] if name == "thread" and _without_randomness() else [str(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "0 failures" in result.stdout, result.stdout + result.stderr
    for kind, report in wrong.items():
        result = subprocess.run([*command, kind], capture_output=True, text=True)
        assert result.returncode != 0 and report in result.stderr, f"{kind}: {result.stderr}"


REGISTERS = {"products_kernel": 168, "project_kernel": 168}
"""Most registers of a thread, by kernel, so that three blocks of 128 fit a multiprocessor; 64 for the others."""


ARCHITECTURES = ("80", "90a")


def machine_code(folder: Path) -> list[Path]:
    """Files with the kernels' machine code: the extension; if it has none, nvcc compiles for half a minute."""
    built = EXTENSION.build_info()["cuda_architectures"] if EXTENSION is not None else ()
    if {f"{number}-real" for number in ARCHITECTURES} <= set(built):
        return [Path(EXTENSION.__file__)]
    # Of a fat binary, as of the extension, cuobjdump says which architecture it is at.
    architectures = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
    files = {kernel: folder / f"{kernel.stem}.fatbin" for kernel in KERNELS}
    for kernel, file in files.items():
        subprocess.run([NVCC, "-std=c++17", *architectures, "-fatbin", str(kernel), "-o", str(file)], check=True)
    return list(files.values())


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc (looked in PATH and /usr/local/cuda/bin)")
def test_nvcc_spills_nothing_and_stays_within_registers_and_shared_memory(tmp_path):
    compiling = pytest.importorskip("gradmix.kernels.compiling", reason="Triton, which has cuobjdump, is not installed")
    seen = set()
    for file in machine_code(tmp_path):
        report = compiling._cuobjdump("-res-usage", file)
        for number, kernels in re.findall(r"^arch = sm_(\w+)$(.*?)(?=^arch|\Z)", report, re.DOTALL | re.MULTILINE):
            for name, registers, stack, shared, local in re.findall(
                r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", kernels
            ):
                short = next((part for part in REGISTERS if part in name), None)
                seen.add((number, short))
                # What is spilt lies on the stack.
                assert (int(stack), int(local)) == (0, 0), f"sm_{number}: {name} spills"
                assert int(registers) <= REGISTERS.get(short, 64), f"sm_{number}: {name} takes {registers} registers"
                assert int(shared) <= 32 << 10, f"sm_{number}: {name} takes {shared} bytes of shared memory"
    assert seen >= {(number, short) for number in ARCHITECTURES for short in REGISTERS}


# --------------------------------------------------------------------------------------- the Python side, without a GPU

NEEDS_CUDA_PART = pytest.mark.skipif(
    EXTENSION is None or not EXTENSION.build_info()["cuda"], reason="the extension was built without CUDA"
)


def test_the_reason_is_a_sentence_and_none_only_with_a_device():
    reason = _cuda.unavailable_reason()
    assert (reason is None) == (
        EXTENSION is not None
        and hasattr(EXTENSION, "class_sketch_cuda")
        and torch.cuda.is_available()
        and not torch.version.hip
    )
    assert reason is None or len(reason) > 10


def test_what_the_bodies_cannot_take_is_told():
    x, labels = torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)
    assert "cpu" in _cuda.class_sketch_can_run(x, x, labels, 1)
    assert "cpu" in _cuda.sketch_project_can_run(x, 4, 0, False, "rademacher")
    assert "gaussian" in _cuda.sketch_project_can_run(x, 4, 0, False, "gaussian")
    with pytest.raises(ValueError, match="entries: got 'gaussian'"):
        _cuda.sketch_project_cuda(x, 4, 0, False, "gaussian")


def test_labels_are_sorted_by_class():
    labels = torch.tensor([2, 0, 2, -1, 7, 0])
    order, ordered, starts = _cuda.sort_by_class(labels, 4)
    assert order.tolist() == [3, 1, 5, 0, 2, 4] and ordered.tolist() == [-1, 0, 0, 2, 2, 7]
    assert starts.tolist() == [1, 3, 3, 5, 5]
    assert _cuda.sort_by_class(labels[:0], 2).starts.tolist() == [0, 0, 0]


@pytest.fixture
def forgotten(monkeypatch):
    monkeypatch.setattr(_cuda, "_known", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_sorted_labels_are_kept_for_the_same_tensor_only(forgotten):
    labels = torch.tensor([1, 0, 1])
    first = _cuda._sort_once(labels, 2, stream=0)
    assert _cuda._sort_once(labels, 2, stream=0) is first
    for other in (
        _cuda._sort_once(labels, 3, stream=0),
        _cuda._sort_once(labels, 2, stream=5),
        _cuda._sort_once(labels[:], 2, 0),
    ):
        assert other is not first
    _cuda._sort_once(labels, 2, stream=0)
    labels[0] = 0
    assert _cuda._sort_once(labels, 2, stream=0).starts.tolist() == [0, 2, 3]
    del labels
    assert _cuda._known is None


def test_labels_of_inference_mode_are_sorted_each_time(forgotten):
    with torch.inference_mode():
        labels = torch.tensor([1, 0, 1])
        _cuda._sort_once(labels, 2, stream=0)
        labels[0] = 0
        assert _cuda._sort_once(labels, 2, stream=0).starts.tolist() == [0, 2, 3]


def test_labels_out_of_range_are_refused_by_row(forgotten, monkeypatch):
    labels = torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match=r"labels: got 3 in row 2, expected labels in \[0, 3\)"):
        _cuda._sort_once(labels, 3, stream=0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # where nothing may wait
    assert _cuda._sort_once(labels, 3, stream=0).starts.tolist() == [0, 1, 2, 2]


@NEEDS_CUDA_PART
def test_the_extension_refuses_tensors_of_the_cpu():
    x, numbers = torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="deltas: got a tensor of DLPack device type 1, expected a CUDA tensor"):
        EXTENSION.class_sketch_cuda(x, x, numbers, numbers, numbers, x, x, x, 0)
    with pytest.raises(TypeError, match="x: got a tensor of DLPack device type 1, expected a CUDA tensor"):
        EXTENSION.sketch_project_cuda(x, 1, False, x, x, 0)


@NEEDS_CUDA_PART
def test_the_extension_agrees_about_the_workspace(on_host):
    for n, t, k, j, _ in CLASS_SKETCH.values():
        expected = on_host.on_host_class_sketch_workspace(DTYPES[torch.float32], *sizes(n, t, k, j))
        assert EXTENSION.class_sketch_cuda_workspace("float32", n, t, k, j) == expected
    for shape in SKETCH_PROJECT.values():
        expected = on_host.on_host_sketch_project_workspace(DTYPES[torch.float64], *sizes(*shape))
        assert EXTENSION.sketch_project_cuda_workspace("float64", *shape) == expected
    with pytest.raises(ValueError, match="dtype: got 'int8'"):
        EXTENSION.class_sketch_cuda_workspace("int8", 1, 1, 1, 1)
    with pytest.raises(ValueError, match="rank: got 0"):
        EXTENSION.sketch_project_cuda_workspace("float32", 1, 1, 1, 0)
