"""The bridge torch -> DLPack -> C++ -> torch, and what happens where the extension is missing or does not fit."""

from __future__ import annotations

import ctypes
import gc
import importlib.machinery
import json
import os
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from fresh import run_python

import gradmix
from gradmix import _extension

EXTENSION = _extension.load()
NEEDS_EXTENSION = pytest.mark.skipif(
    EXTENSION is None, reason=f"no compiled extension: {_extension.unavailable_reason()}"
)


def test_a_demanded_extension_is_there():
    """GRADMIX_EXTENSION=1, which makes the build demand it, makes the tests demand it too."""
    if os.environ.get("GRADMIX_EXTENSION") != "1":
        pytest.skip("GRADMIX_EXTENSION=1 is not set, so the extension is optional")
    assert EXTENSION is not None, _extension.unavailable_reason()


def test_load_and_reason_agree():
    assert (_extension.load() is None) == (_extension.unavailable_reason() is not None)
    assert _extension.load() is _extension.load()


@NEEDS_EXTENSION
def test_build_info():
    info = EXTENSION.build_info()
    assert info["version"] == gradmix.__version__
    assert info["python_abi"] == f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert info["cxx_standard"] >= 201703
    assert info["build_type"] == "Release"
    assert info["instruction_set"] in ("base", "avx2", "avx512")
    assert isinstance(info["cuda"], bool)
    assert info["cuda"] == bool(info["cuda_architectures"]) == (info["cuda_version"] is not None)


@NEEDS_EXTENSION
def test_the_build_report_agrees_with_the_extension():
    report, info = _extension.build_report(), EXTENSION.build_info()
    assert report["extension"] == {"built": True, "reason": None}
    assert report["version"] == info["version"] and report["compiler"] == info["compiler"]
    assert report["openmp"]["built"] == bool(info["openmp"])
    assert report["cuda"]["built"] == info["cuda"]
    for part in ("openmp", "cuda"):
        assert report[part]["built"] != bool(report[part]["reason"])


@NEEDS_EXTENSION
def test_the_device_query_answers_on_any_machine():
    answer = EXTENSION.cuda_devices()
    assert set(answer) == {"error", "runtime", "driver", "devices"}
    assert answer["devices"] or answer["error"]
    if not EXTENSION.build_info()["cuda"]:
        assert answer["error"] == "the extension was built without CUDA"


# ------------------------------------------------------------------------------------------------ the arguments' checks


def arguments(**change):
    usual = dict(
        deltas=torch.ones(4, 2, 3),
        activations=torch.ones(4, 2, 5),
        labels=torch.tensor([0, 1, 1, 0]),
        sums=torch.zeros(2, 3, 5),
        squares=torch.zeros(2),
        num_threads=1,
    )
    return usual | change


class Exports:
    """A tensor whose export goes wrong, or is of a special kind."""

    def __init__(self, capsule, device=(1, 0)):
        self.capsule, self.device = capsule, device

    def __dlpack__(self):
        return self.capsule() if callable(self.capsule) else self.capsule

    def __dlpack_device__(self):
        return self.device


def fails():
    raise BufferError("not today")


def used_up():
    capsule = torch.ones(4, 2, 3).__dlpack__()
    torch.utils.dlpack.from_dlpack(capsule)
    return capsule


def versioned(array):
    return Exports(lambda: array.__dlpack__(max_version=(1, 0)))


def read_only(*shape):
    array = np.zeros(shape, dtype=np.float32)
    array.flags.writeable = False
    return array


class _Tensor(ctypes.Structure):
    """DLTensor and what manages it, of DLPack's first version, as a producer in C would fill them in."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


KEPT = []


def odd(shape, strides=None, data=True):
    """A float32 tensor that says it has this shape and these strides, over a few bytes of memory."""
    memory = (ctypes.c_float * 64)()
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    steps = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
    address = ctypes.addressof(memory) if data else None
    tensor = _Tensor(address, (1, 0), len(shape), 2, 32, 1, sizes, steps, 0, None, None)
    KEPT.append((memory, sizes, steps, tensor))  # a capsule does not
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return Exports(lambda: new(ctypes.addressof(tensor), b"dltensor", None))


SHARED = torch.zeros(64)

BAD = {
    "not a tensor": (dict(deltas=[1.0]), TypeError, "deltas: got list, expected a tensor with __dlpack__"),
    "None": (dict(labels=None), TypeError, "labels: got NoneType"),
    "other device": (dict(deltas=Exports(None, (2, 0))), TypeError, r"deltas: .*device type 2, expected a CPU tensor"),
    "meta device": (
        dict(activations=torch.ones(4, 2, 5, device="meta")),
        TypeError,
        "activations: got Tensor that cannot",
    ),
    "odd device": (dict(deltas=Exports(None, "cpu")), TypeError, "deltas: got Exports with an odd __dlpack_device__"),
    "failing export": (dict(deltas=Exports(fails)), TypeError, r"deltas: got Exports .*not today"),
    "tracked tensor": (dict(deltas=torch.ones(4, 2, 3, requires_grad=True)), TypeError, "deltas: .*without gradient"),
    "no capsule": (dict(deltas=Exports(17)), TypeError, "deltas: got int from __dlpack__"),
    "used capsule": (
        dict(deltas=Exports(used_up)),
        TypeError,
        "deltas: got PyCapsule from __dlpack__, expected an unused",
    ),
    "integer deltas": (
        dict(deltas=torch.ones(4, 2, 3, dtype=torch.int32)),
        TypeError,
        "deltas: got dtype int32, expected",
    ),
    "complex deltas": (
        dict(deltas=torch.ones(4, 2, 3, dtype=torch.complex64)),
        TypeError,
        "deltas: got dtype complex64",
    ),
    "boolean labels": (
        dict(labels=torch.ones(4, dtype=torch.bool)),
        TypeError,
        "labels: got dtype bool, expected int64",
    ),
    "unsigned labels": (
        dict(labels=np.zeros(4, dtype=np.uint64)),
        TypeError,
        "labels: got dtype uint64, expected int64",
    ),
    "mixed dtypes": (
        dict(activations=torch.ones(4, 2, 5, dtype=torch.float64)),
        TypeError,
        "activations: got dtype float64, expected float32",
    ),
    "sums of deltas' half type": (
        dict(
            deltas=torch.ones(4, 2, 3).bfloat16(),
            activations=torch.ones(4, 2, 5).bfloat16(),
            sums=torch.ones(2, 3, 5).bfloat16(),
        ),
        TypeError,
        "sums: got dtype bfloat16, expected float32",
    ),
    "too few axes": (
        dict(deltas=torch.ones(4, 3)),
        ValueError,
        r"deltas: got shape \(4, 3\), expected shape \(N, T, K\)",
    ),
    "one axis": (dict(sums=torch.ones(4)), ValueError, r"sums: got shape \(4,\), expected shape \(P, K, J\)"),
    "scalar labels": (dict(labels=torch.tensor(0)), ValueError, r"labels: got shape \(\), expected shape \(N,\)"),
    "strided": (
        dict(deltas=torch.ones(4, 2, 6)[:, :, ::2]),
        ValueError,
        r"deltas: got strides \(12, 6, 2\) for shape \(4, 2, 3\), expected a contiguous tensor",
    ),
    "expanded": (dict(deltas=torch.ones(1, 2, 3).expand(4, 2, 3)), ValueError, "deltas: got strides"),
    "transposed sums": (dict(sums=torch.zeros(2, 5, 3).transpose(1, 2)), ValueError, "sums: got strides"),
    "other N": (
        dict(activations=torch.ones(3, 2, 5)),
        ValueError,
        r"activations: got shape \(3, 2, 5\), expected 4 in axis 0",
    ),
    "other T": (dict(activations=torch.ones(4, 1, 5)), ValueError, r"expected 2 in axis 1 \(T of deltas\)"),
    "other label count": (dict(labels=torch.zeros(5, dtype=torch.int64)), ValueError, r"labels: got shape \(5,\)"),
    "other K": (
        dict(sums=torch.zeros(2, 4, 5)),
        ValueError,
        r"sums: got shape \(2, 4, 5\), expected 3 in axis 1 \(K of deltas\)",
    ),
    "other J": (dict(sums=torch.zeros(2, 3, 4)), ValueError, r"expected 5 in axis 2 \(J of activations\)"),
    "label out of range": (dict(labels=torch.tensor([0, 1, 2, -7])), ValueError, r"labels: got 2 in row 2, .*\[0, 2\)"),
    "other P": (
        dict(squares=torch.zeros(3)),
        ValueError,
        r"squares: got shape \(3,\), expected 2 in axis 0 \(P of sums\)",
    ),
    "double squares": (
        dict(squares=torch.zeros(2).double()),
        TypeError,
        "squares: got dtype float64, expected float32",
    ),
    "read-only sums": (dict(sums=versioned(read_only(2, 3, 5))), ValueError, "sums: got a read-only tensor"),
    "sums over deltas": (
        dict(deltas=SHARED[:24].view(4, 2, 3), sums=SHARED[20:50].view(2, 3, 5)),
        ValueError,
        "sums: got memory shared with deltas",
    ),
    "squares over sums": (
        dict(sums=SHARED[:30].view(2, 3, 5), squares=SHARED[29:31]),
        ValueError,
        "squares: got memory shared with sums",
    ),
    "no threads": (dict(num_threads=0), ValueError, "num_threads: got 0, expected at least 1"),
    "half a thread": (dict(num_threads=0.5), TypeError, "num_threads: got float, expected an int or None"),
    "threads beyond int": (dict(num_threads=1 << 31), ValueError, "num_threads: got 2147483648, expected at most 2147"),
    "threads beyond 64 bits": (dict(num_threads=1 << 80), ValueError, r"num_threads: got 12089\d+, expected at most"),
    "fewer threads than 64 bits hold": (dict(num_threads=-(1 << 80)), ValueError, r"num_threads: got -12\d+, expected"),
    "a shape of 2^64 elements": (
        dict(deltas=odd((1 << 32, 1 << 32, 1))),
        ValueError,
        r"deltas: got shape \(4294967296, 4294967296, 1\), expected a product of sizes that memory can be addressed by",
    ),
    "a shape whose product wraps around to 24": (
        dict(deltas=odd((1 << 62, 4, 3))),
        ValueError,
        "deltas: got shape .*, expected a product of sizes",
    ),
    "bytes beyond 64 bits": (dict(deltas=odd((1 << 61, 2, 1))), ValueError, "deltas: got shape .*, expected a product"),
    "no entries of 2^64": (dict(deltas=odd((0, 1 << 32, 1 << 32))), ValueError, "deltas: got shape .* a product"),
    "a negative size": (
        dict(deltas=odd((-4, 2, -3))),
        ValueError,
        r"deltas: got shape \(-4, 2, -3\), expected sizes of at least 0",
    ),
    "no memory": (dict(deltas=odd((4, 2, 3), data=False)), ValueError, "deltas: got a tensor without memory"),
}


@NEEDS_EXTENSION
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    if case.startswith("read-only") and np.lib.NumpyVersion(np.__version__) < "2.1.0":
        pytest.skip("numpy before 2.1 makes no DLPack capsule that says it is read-only")
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        EXTENSION.class_sketch(**arguments(**change))


def projection(**change):
    return dict(x=torch.ones(4, 2, 3), key=5, ones=False, out=torch.zeros(4, 2, 8), num_threads=1) | change


BAD_PROJECTION = {
    "integer x": (dict(x=torch.ones(4, 2, 3, dtype=torch.int32)), TypeError, "x: got dtype int32, expected"),
    "x of two axes": (dict(x=torch.ones(4, 2)), ValueError, r"x: got shape \(4, 2\), expected shape \(N, T, D\)"),
    "neither axis contiguous": (
        dict(x=torch.ones(4, 2, 3, 2)[..., 0]),
        ValueError,
        r"x: got strides \(12, 6, 2\) for shape \(4, 2, 3\), expected T or D to be contiguous",
    ),
    "other N": (dict(out=torch.zeros(3, 2, 8)), ValueError, r"out: got shape \(3, 2, 8\), expected 4 in axis 0"),
    "other T": (dict(out=torch.zeros(4, 3, 8)), ValueError, r"out: got shape \(4, 3, 8\), expected 2 in axis 1"),
    "double out": (dict(out=torch.zeros(4, 2, 8).double()), TypeError, "out: got dtype float64, expected float32"),
    "transposed out": (dict(out=torch.zeros(4, 8, 2).mT), ValueError, "out: got strides"),
    "out over x": (
        dict(x=SHARED[:24].view(4, 2, 3), out=SHARED[:64].view(4, 2, 8)),
        ValueError,
        "out: got memory shared with x",
    ),
    "out between x": (
        # No element is shared, but the memory is: what lies between a strided tensor's elements is taken for its own.
        dict(x=torch.as_strided(SHARED, (2, 2, 2), (20, 1, 2)), out=SHARED[8:16].view(2, 2, 2)),
        ValueError,
        "out: got memory shared with x",
    ),
    "strides beyond 64 bits": (
        dict(x=odd((4, 2, 3), (1 << 61, 3, 1))),
        ValueError,
        r"x: got strides \(2305843009213693952, 3, 1\) for shape \(4, 2, 3\), expected strides that memory",
    ),
    "negative strides beyond 64 bits": (dict(x=odd((4, 2, 3), (-(1 << 63), 3, 1))), ValueError, "x: got strides"),
    "threads beyond int": (dict(num_threads=1 << 31), ValueError, "num_threads: got 2147483648, expected at most"),
    "key beyond 64 bits": (dict(key=1 << 63), TypeError, "incompatible function arguments"),
    "no threads": (dict(num_threads=0), ValueError, "num_threads: got 0, expected at least 1"),
}


@NEEDS_EXTENSION
@pytest.mark.parametrize("case", BAD_PROJECTION)
def test_bad_arguments_of_sketch_project_are_named(case):
    change, error, message = BAD_PROJECTION[case]
    with pytest.raises(error, match=message):
        EXTENSION.sketch_project(**projection(**change))


@NEEDS_EXTENSION
def test_strides_of_axes_that_do_not_matter():
    """Of an axis of one entry, and of a tensor without any, no stride is ever used."""
    for shape in ((4, 1, 3), (1, 2, 3), (4, 2, 1), (4, 2, 0), (0, 2, 3), (4, 0, 3)):
        x = torch.ones(shape)
        odd = torch.as_strided(
            x, shape, [7 if size == 1 or 0 in shape else x.stride(i) for i, size in enumerate(shape)]
        )
        results = [torch.zeros(*shape[:2], 8) for _ in range(2)]
        for value, out in zip((x, odd), results, strict=True):
            EXTENSION.sketch_project(**projection(x=value, out=out, ones=True))
        assert torch.equal(*results) and (results[0].abs() > 0).any() == (shape[0] * shape[1] > 0)


@NEEDS_EXTENSION
def test_negative_strides_from_numpy():
    """The memory before a tensor's first element is its own too."""
    memory = np.arange(40, dtype=np.float32)
    forward, backward = memory[8:32].reshape(4, 2, 3), memory[8:32].reshape(4, 2, 3)[::-1]
    results = [np.zeros((4, 2, 8), dtype=np.float32) for _ in range(2)]
    for value, out in zip((forward, backward), results, strict=True):
        EXTENSION.sketch_project(**projection(x=value, out=out))
    assert np.array_equal(results[0], results[1][::-1]) and results[0].any()
    with pytest.raises(ValueError, match="out: got memory shared with x"):
        EXTENSION.sketch_project(**projection(x=backward[:, :, :1], out=memory[8:16].reshape(4, 2, 1)))


@NEEDS_EXTENSION
def test_what_cannot_be_caught_passes():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EXTENSION.class_sketch(**arguments(deltas=Exports(interrupted)))


@NEEDS_EXTENSION
def test_offsets_numpy_and_both_kinds_of_capsule():
    values = torch.arange(40.0)
    expected = torch.zeros(2, 3, 5)
    usual = arguments(deltas=values[7:31].view(4, 2, 3), sums=expected)
    EXTENSION.class_sketch(**usual)
    assert torch.equal(expected[0], values[7:31].view(4, 2, 3)[[0, 3]].sum((0, 1))[:, None].expand(3, 5))

    as_numpy = {name: value.numpy() for name, value in usual.items() if name != "num_threads"}
    as_numpy["sums"] = np.zeros((2, 3, 5), dtype=np.float32)
    EXTENSION.class_sketch(**as_numpy)
    assert np.array_equal(as_numpy["sums"], expected.numpy())

    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        out = np.zeros((2, 3, 5), dtype=np.float32)
        wrapped = {name: versioned(value) for name, value in as_numpy.items()} | {"sums": versioned(out)}
        EXTENSION.class_sketch(**wrapped)
        assert np.array_equal(out, expected.numpy())


@NEEDS_EXTENSION
def test_default_number_of_threads():
    usual = arguments()
    del usual["num_threads"]
    EXTENSION.class_sketch(**usual)
    assert torch.equal(usual["sums"], torch.full((2, 3, 5), 4.0))


FORK = """
import os, signal
import torch
from gradmix.ops.class_sketch import class_sketch
from gradmix.ops.sketch_project import sketch_project
torch.set_num_threads(2)
x, labels = torch.randn(64, 8, 48), torch.arange(64) % 3
def both():
    return [*class_sketch(x, x, labels, 3, backend="cpp"), sketch_project(x, 32, 1, backend="cpp")]
expected = both()  # the pool of threads is there from here on
if (child := os.fork()) == 0:
    signal.alarm(300)  # whoever waits for a thread that is not there waits forever
    same = all(bool((a.numpy() == b.numpy()).all()) for a, b in zip(both(), expected))
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@NEEDS_EXTENSION
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_of_a_process_with_threads_computes_the_same():
    assert run_python(FORK) == ["0"]


# ------------------------------------------------------------------------------------------------------------ ownership


@NEEDS_EXTENSION
def test_every_capsule_is_released():
    """The storages die with their last Python reference, after good calls and after refused ones alike."""
    import weakref

    for bad in (False, True):
        arrays = {
            "deltas": np.ones((4, 2, 3), dtype=np.float32),
            "activations": np.ones((4, 2, 5), dtype=np.float32),
            "labels": np.zeros(4, dtype=np.int64),
            "sums": np.zeros((3 if not bad else 2, 3, 5 if not bad else 6), dtype=np.float32),
            "squares": np.zeros(3 if not bad else 2, dtype=np.float32),
        }
        counts = {name: sys.getrefcount(array) for name, array in arrays.items()}
        for _ in range(100):
            if bad:
                with pytest.raises(ValueError, match="sums: got shape"):
                    EXTENSION.class_sketch(**arrays)
            else:
                EXTENSION.class_sketch(**arrays)
        gc.collect()
        assert {name: sys.getrefcount(array) for name, array in arrays.items()} == counts
        watches = [weakref.ref(array) for array in arrays.values()]
        arrays.clear()
        gc.collect()
        assert [watch() for watch in watches] == [None] * 5


@NEEDS_EXTENSION
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc/self/statm to read memory from")
def test_memory_does_not_grow():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def call(times: int) -> None:
        for _ in range(times):
            x = torch.ones(64, 64, 32)  # half a MiB
            EXTENSION.class_sketch(x, x, torch.zeros(64, dtype=torch.int64), torch.empty(1, 32, 32), torch.empty(1), 1)

    call(20)
    before = resident()
    call(200)
    assert resident() - before < 30 * 2**20  # a leak would be 100 MiB


@NEEDS_EXTENSION
def test_other_threads_run_meanwhile():
    """The interpreter's lock is released: a Python thread counts on while the extension computes."""
    x = torch.ones(64, 512, 128)
    labels, sums, squares = torch.zeros(64, dtype=torch.int64), torch.empty(1, 128, 128), torch.empty(1)
    state = {"count": 0, "stop": False}

    def count() -> None:
        while not state["stop"]:
            state["count"] += 1
            time.sleep(0)

    before = sys.getswitchinterval()
    # With so long an interval a thread gets its turn only where the lock is given up.
    sys.setswitchinterval(100.0)
    try:
        thread = threading.Thread(target=count)
        thread.start()
        seen = []
        for _ in range(20):
            start = state["count"]
            EXTENSION.class_sketch(x, x, labels, sums, squares, 1)
            seen.append(state["count"] - start)
    finally:
        state["stop"] = True
        sys.setswitchinterval(before)
        thread.join()
    assert max(seen) > 5


# -------------------------------------------------------------------------------------- missing, foreign, broken, stale


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package as if it lay in an empty folder, with the extension not looked for yet."""
    monkeypatch.setattr(gradmix, "__path__", [str(tmp_path)])
    # An editable install brings a finder of its own, which knows the extension whatever the path says.
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    monkeypatch.delattr(gradmix, "_C", raising=False)
    monkeypatch.delitem(sys.modules, "gradmix._C", raising=False)
    _extension._load.cache_clear()
    yield tmp_path
    _extension._load.cache_clear()


def test_reason_without_any_build(package):
    assert _extension.load() is None
    assert "not installed" in _extension.unavailable_reason()
    assert _extension.build_report() is None


def test_reason_from_the_build_report(package):
    report = {"extension": {"built": False, "reason": "no working C++ compiler was found"}}
    (package / "_build_report.json").write_text(json.dumps(report))
    assert _extension.load() is None
    assert _extension.unavailable_reason() == "it was not built: no working C++ compiler was found"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"extension": 3}'])
def test_a_damaged_build_report_does_no_harm(package, content):
    (package / "_build_report.json").write_text(content)
    assert _extension.load() is None
    assert "_C" in _extension.unavailable_reason() or "not built" in _extension.unavailable_reason()


def test_reason_for_another_python(package):
    (package / "_C.cpython-27-somewhere.so").write_bytes(b"")
    assert _extension.load() is None
    reason = _extension.unavailable_reason()
    assert "built for another Python: _C.cpython-27-somewhere.so" in reason
    assert importlib.machinery.EXTENSION_SUFFIXES[0] in reason


def test_reason_for_a_broken_file(package):
    (package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    assert _extension.load() is None
    assert _extension.unavailable_reason().startswith("it does not load: ")


def test_reason_when_the_installed_file_is_gone(package):
    (package / "_build_report.json").write_text(json.dumps({"extension": {"built": True, "reason": None}}))
    assert _extension.load() is None
    assert "missing from the installed package" in _extension.unavailable_reason()


def test_another_version_is_refused(package, monkeypatch):
    stale = types.ModuleType("gradmix._C")
    stale.build_info = lambda: {"version": "0.0.9"}
    monkeypatch.setitem(sys.modules, "gradmix._C", stale)
    assert _extension.load() is None
    assert f"built for gradmix 0.0.9, but this is gradmix {gradmix.__version__}" in _extension.unavailable_reason()


def test_a_module_that_is_not_ours_is_refused(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradmix._C", types.ModuleType("gradmix._C"))
    assert _extension.load() is None
    assert "does not load: AttributeError" in _extension.unavailable_reason()


# --------------------------------------------------------------------------------------------------------------- import

IMPORT = """
import sys, json
import numpy, torch
before = set(sys.modules)
import gradmix
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
native = "gradmix._C" in sys.modules
if sys.platform == "linux":
    native = native or any("gradmix/_C" in line for line in open("/proc/self/maps"))
print(json.dumps({"new": sorted(new), "native": native}))
"""


def test_import_brings_torch_and_numpy_only_and_no_native_code():
    (line,) = run_python(IMPORT)
    found = json.loads(line)
    assert found["native"] is False
    # torch imports some of its own requirements late; nothing else may come.
    allowed = {
        "gradmix",
        "torch",
        "numpy",
        "sympy",
        "mpmath",
        "gmpy2",
        "networkx",
        "filelock",
        "fsspec",
        "jinja2",
        "markupsafe",
        "typing_extensions",
        "torchgen",
    }
    assert set(found["new"]) - allowed == set()


def test_import_survives_a_broken_extension():
    code = (
        "import importlib.abc, sys\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'gradmix._C': raise ImportError('libgone.so: cannot open shared object file')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "import gradmix, torch\n"
        "from gradmix import _extension\n"
        "from gradmix.ops.class_sketch import class_sketch\n"
        "x = torch.ones(256, 1, 16)\n"
        "print(class_sketch(x, x, torch.zeros(256, dtype=torch.int64), 1).sums.sum().item())\n"
        "print(_extension.unavailable_reason())\n"
    )
    assert run_python(code) == [
        "65536.0",
        "it does not load: ImportError: libgone.so: cannot open shared object file",
    ]
