"""Pickles of arrays: everything numpy writes is read, everything else is refused without being touched."""

from __future__ import annotations

import copyreg
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradmix.training.data import pickled_arrays
from gradmix.training.data.image_arrays import DataError, load_cifar10, read_pickle

# ---------------------------------------------------------------------------------------------------- what is read

ARRAYS = {
    "bytes": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "flags": np.array([True, False]),
    "16 bits, big end first": np.array([-300, 700], dtype=">i2"),
    "64 bits": np.array([2**63], dtype=np.uint64),
    "half precision": np.array([1.5, -2.25], dtype=np.float16),
    "double precision": np.array([[1e300], [-0.0]]),
    "columns first": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "axes exchanged": np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(1, 0, 2),
    "every second": np.arange(10)[::2],
    "one number": np.array(7),
    "no samples": np.zeros((0, 5), dtype=np.float32),
}


@pytest.mark.parametrize("protocol", range(6))
def test_what_numpy_writes_is_read(protocol: int) -> None:
    plain = {
        "text": "Müller\n",
        "raw": b"\0\xff",
        "none": None,
        "numbers": [1, -1, 70000, 2**40, 0.5, True],
        "nothing": [],
    }
    scalars = [np.int64(-3), np.float32(0.5), np.bool_(True), np.uint8(200)]
    content = {**plain, **ARRAYS, "scalars": scalars, "twice": [ARRAYS["bytes"]] * 2, "nested": {"a": [[1], {"b": 2}]}}
    found = pickled_arrays.loads(pickle.dumps(content, protocol))
    assert list(found) == list(content)
    assert {key: found[key] for key in plain} == plain and found["nested"] == content["nested"]
    assert found["scalars"] == scalars and [type(number) for number in found["scalars"]] == [int, float, bool, int]
    assert found["twice"][0] is found["twice"][1]
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name
        assert found[name].shape == array.shape and not found[name].flags.writeable


# --------------------------------------------------------------------------------------------- what is refused

UINT8 = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"


def array_of(shape: bytes, dtype: bytes = UINT8, data: bytes = b"U\x01a") -> bytes:
    """The instructions for an array."""
    return EMPTY + b"(K\x01" + shape + dtype + b"I00\n" + data + b"tb"


def entry(value: bytes) -> bytes:
    """A dictionary with one entry."""
    return b"\x80\x02}U\x01a" + value + b"s."


class Called:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def nested(depth: int) -> bytes:
    return entry(b"]" * depth + b"a" * (depth - 1))


REFUSED = {
    "an array of objects": (entry(array_of(b"(K\x01t", UINT8.replace(b"u1", b"O8"))), "a dtype O8, expected numbers"),
    "an array of texts": (pickle.dumps({"a": np.array(["x"])}), "a dtype U1, expected numbers"),
    "an array of dates": (pickle.dumps({"a": np.array(["2020"], "M8[Y]")}), "a dtype M8, expected numbers"),
    "an array of records": (pickle.dumps({"a": np.zeros(1, [("x", "i4")])}), "a dtype V4, expected numbers"),
    "numpy's array called": (
        pickle.dumps({"a": Called(np.ndarray, (1,), np.dtype("u1"), b"a")}),
        "a call of ndarray with other arguments",
    ),
    "a dtype with fields": (
        entry(array_of(b"(K\x01t", UINT8.replace(b"NNN", b"N(U\x01xt}"))),
        "a state that is none of a Dtype",
    ),
    "more values than bytes": (entry(array_of(b"(K\x02t")), r"shape \(2,\) and uint8 with 1 bytes"),
    "fewer values than bytes": (entry(array_of(b"(K\x00t")), r"shape \(0,\) and uint8 with 1 bytes"),
    "a size below 0": (entry(array_of(b"(J\xff\xff\xff\xfft")), "an array whose shape is none"),
    "a size beyond memory": (entry(array_of(b"(\x8a\x08\0\0\0\0\0\0\0\x7ft")), "an array whose shape is none"),
    "sizes whose product is": (entry(array_of(b"(" + b"\x8a\x06\0\0\0\0\0\x40" * 9 + b"t")), r"with 1 bytes"),
    "none of sizes beyond memory": (
        entry(array_of(b"(K\x00" + b"\x8a\x06\0\0\0\0\0\x40" * 9 + b"t", data=b"U\0")),
        "damaged",
    ),
    "more dimensions than numpy has": (entry(array_of(b"(" + b"K\x01" * 65 + b"t")), "an array whose shape is none"),
    "a shape of texts": (entry(array_of(b"(U\x01at")), "an array whose shape is none"),
    "data that are a list": (entry(array_of(b"(K\x01t", data=b"]")), "an array whose data are a list"),
    "flags that are none": (entry(array_of(b"(K\x01t", UINT8.replace(b"u1", b"b1"))), "other bytes than 0 and 1"),
    "an array not built": (entry(EMPTY), "a value that is a Unbuilt"),
    "an array built twice": (
        entry(array_of(b"(K\x01t").replace(EMPTY, EMPTY + b"q\x09h\x09") + b"h\x090"),
        "not admitted",
    ),
    "a name alone": (entry(b"cnumpy\ndtype\n"), "a value that is a Name"),
    "a dtype alone": (pickle.dumps({"a": np.dtype("u1")}), "a value that is a Dtype"),
    "a name within a tuple": (entry(b"(cnumpy\ndtype\nt"), "a value that is a Arguments"),
    "a function of the file's choice": (
        pickle.dumps({"a": Called(eval, "1")}),
        "names builtins.eval, which is not adm",
    ),
    "a class": (pickle.dumps({"a": Path("x")}), "which is not admitted"),
    "a name that is a number": (b"\x80\x04K\x01K\x02\x93.", "which is not admitted"),
    "a call of a text": (entry(b"U\x01a)R"), "a call of a str"),
    "arguments that are a list": (entry(b"cnumpy\ndtype\n]R"), "a call of a _?Name"),
    "a registered extension": (entry(b"\x82\x01"), "the instruction EXT1 is not admitted"),
    "an object by its class": (pickle.dumps({"a": {1, 2}}, 4), "is not admitted"),
    "a persistent name": (b"Pa\n.", "is not admitted"),
    "bytes of another file": (b"\x80\x05\x97.", "NEXT_BUFFER is not admitted"),
    "a state for a list": (entry(b"]]b"), "a state that is a list"),
    "items for a text": (entry(b"U\x01a]a"), "items for a str"),
    "a key that is a tuple": (b"})K\x01s.", "a key that is a tuple, expected a text"),
    "a key without a value": (b"}(U\x01au.", "1 keys and values"),
    "a long number": (b"\x8b\xff\xff\0\0" + b"\1" * 65535 + b".", "a number is too long"),
    "a long decimal": (b"I" + b"9" * 10**6 + b"\n.", "damaged"),
    "bytes beyond the end": (b"\x8e" + b"\xff" * 7 + b"\x7fa.", "expected 9223372036854775807 bytes"),
    "a text beyond the end": (b"T\xff\xff\xff\xffa.", "string4 byte count < 0: -1"),
    "an array of bytes beyond the end": (b"\x96" + b"\xff" * 7 + b"\x7fa.", "expected 9223372036854775807 bytes"),
    "what was not kept": (b"r\xff\xff\xff\xff", "damaged"),
    "a place not kept": (b"h\x05.", "KeyError"),
    "an empty stack": (b"0a.", "damaged"),
    "a mark that is none": (b"t.", "damaged"),
    "marks without end": (b"(" * 10**5, "more than 100 marks are open"),
    "lists within lists": (nested(10**5), "more than 1000 lists and dictionaries"),
    "dictionaries without end": (b"}" * 10**6, "more than 1000 lists and dictionaries"),
    "tuples within tuples": (entry(b")" + b"\x85" * 10**5), "arguments within arguments"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_everything_else_is_refused(tmp_path: Path, case: str) -> None:
    raw, message = REFUSED[case]
    path = tmp_path / "batch"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        read_pickle(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


def test_a_registered_extension_is_not_looked_up(tmp_path: Path) -> None:
    called: list[int] = []
    copyreg.add_extension("builtins", "print", 0x77)
    try:
        (tmp_path / "batch").write_bytes(entry(b"\x82\x77U\x01a\x85R"))
        with pytest.raises(DataError, match="not admitted"):
            read_pickle(tmp_path / "batch")
    finally:
        copyreg.remove_extension("builtins", "print", 0x77)
    assert not called


def test_bytes_are_made_of_those_at_hand_only_once() -> None:
    text = b"X" + struct.pack("<I", 1000) + b"a" * 1000 + b"q\x01"
    encoded = b"c_codecs\nencode\nq\x02h\x01X\x06\0\0\0latin1q\x03\x86R"
    again = b"h\x02h\x01h\x03\x86R"
    assert pickled_arrays.loads(b"(" + text + encoded + b"l.")[1] == b"a" * 1000
    with pytest.raises(pickle.UnpicklingError, match="it makes more bytes than it has"):
        pickled_arrays.loads(b"(" + text + encoded + again * 10 + b"l.")


def test_labels_that_unfold_without_end_are_refused(tmp_path: Path) -> None:
    levels: list[Any] = [0, 1]
    for _ in range(60):
        levels = [levels, levels]
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(k) for k in range(10)]}))
    batch = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": levels})
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(batch)
    with pytest.raises(DataError, match="'labels' is not a list of integers, it holds a list, expected 2 integers"):
        load_cifar10(tmp_path)


# ------------------------------------------------------------------------------------------------------------ fuzzing

FUZZ = """
import random, sys, resource
import pickle, numpy as np
from pathlib import Path
from gradmix.training.data.image_arrays import DataError, read_pickle

count, path = int(sys.argv[1]), Path(sys.argv[2])
rng = random.Random(count)
content = {
    "data": np.arange(48, dtype=np.uint8).reshape(4, 12), "labels": [0, 1, 300, -5], "names": ["a", "bc"],
    "scalars": [np.int64(3), np.float32(1)], "big": np.array([1, 2], ">i8"), "mirrored": np.arange(4)[::-1],
    "raw": b"xyz", "flags": np.array([True]), "nested": {"a": [1.5, None, True]},
}
seeds = [pickle.dumps(content, protocol) for protocol in range(6)]
seeds.append(seeds[2].replace(b"numpy._core.", b"numpy.core."))
pieces = [bytes([k]) for k in range(256)] + [b"\\xff" * 4, b"\\xff" * 8, b"\\0" * 8, b"\\x7f\\xff\\xff\\xff"]
pieces += [b"cnumpy\\nndarray\\n", b"cnumpy\\ndtype\\n", b"cbuiltins\\neval\\n", b"O8", b"V8", b"U1"]

def mutated():
    raw = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(raw):
            raw[at] = rng.randrange(256)
        elif kind == 2:
            raw[at:at] = rng.choice(pieces) * rng.choice([1, 1, 1, 50])
        elif kind == 3:
            other, end = rng.choice(seeds), rng.randrange(1, 60)
            start = rng.randrange(len(other))
            raw[at:at] = other[start : start + end] * rng.choice([1, 1, 20])
        elif kind == 4:
            del raw[at : at + rng.randrange(1, 40)]
        else:
            del raw[at:]
    return bytes(raw)

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20),) * 2)
read = refused = 0
for _ in range(count):
    path.write_bytes(mutated())
    try:
        found = read_pickle(path)
    except DataError as error:
        assert str(path) in str(error)
        refused += 1
        continue
    read += 1
    waiting = list(found.values())
    while waiting:
        value = waiting.pop()
        if type(value) is list:
            waiting += value
        elif type(value) is dict:
            assert all(type(key) in (str, bytes) for key in value)
            waiting += value.values()
        elif type(value) is tuple:
            assert all(type(each) in (type(None), bool, int, float, str, bytes) for each in value)
        elif type(value) is np.ndarray:
            assert value.dtype.kind in "biuf"
            value.sum(), value.tolist()
        else:
            assert type(value) in (type(None), bool, int, float, str, bytes), type(value)
print(read, refused)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory by what /proc tells")
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused_in_little_memory(tmp_path: Path, count: int) -> None:
    command = [sys.executable, "-c", FUZZ, str(count), str(tmp_path / "batch")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused = map(int, done.stdout.split())
    assert read + refused == count and read > count // 50 and refused > count // 2
