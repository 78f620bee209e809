"""Compressed files that unpack to more than they promise: refused before much memory is taken."""

from __future__ import annotations

import gzip
import random
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gradmix.training.data import texts as text_data
from gradmix.training.data.image_arrays import DataError, read_idx
from gradmix.training.data.tabular import covertype, read_integers
from gradmix.training.data.texts import newsgroups20

SIZE = 1 << 27


def packed(path: Path, start: bytes = b"", filler: bytes = b"\0", end: bytes = b"") -> Path:
    """A gzip file of ``start``, much of ``filler`` and ``end``."""
    part = filler * ((1 << 20) // len(filler))
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(SIZE >> 20):
            file.write(part)
        file.write(end)
    return path


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The head of a file in an archive, whatever follows it."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


POST = "20news-bydate-train/sci.med/1"
BOMBS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "an image file with more than its head says": (
        "read_idx",
        lambda root: packed(root / "x.gz", struct.pack(">HBBIII", 0, 8, 3, 10, 28, 28)),
        "at least 7857 bytes long, expected 7856",
    ),
    "one without a head": ("read_idx", lambda root: packed(root / "x.gz"), "not an IDX file"),
    "one that promises more than there is": (
        "read_idx",
        lambda root: (root / "x.gz").write_bytes(gzip.compress(struct.pack(">HBBIII", 0, 8, 3, *[1 << 31] * 3))),
        "16 bytes long, expected 9903520314283042199192993808",
    ),
    "a table in one line": (
        "covertype",
        lambda root: packed(root / "covtype.data.gz", b"1"),
        "line 1 has more than 1100 c",
    ),
    "a table of one column": (
        "covertype",
        lambda root: packed(root / "covtype.data.gz", filler=b"1\n"),
        "than 581012 lines",
    ),
    "an archive of one post": (
        "newsgroups20",
        lambda root: packed(root / "20news-bydate.tar.gz", member(POST, SIZE + 1)),
        "it unpacks to more than 16777216 bytes",
    ),
    "an archive of a long name": (
        "newsgroups20",
        lambda root: packed(root / "20news-bydate.tar.gz", member(POST, SIZE + 1, tarfile.GNUTYPE_LONGNAME)),
        "it unpacks to more than 16777216 bytes",
    ),
    "an archive of much after its end": (
        "newsgroups20",
        lambda root: packed(root / "20news-bydate.tar.gz", member(POST, 0)),
        "it unpacks to more than 16777216 bytes",
    ),
}

READ = """
import resource, sys
from pathlib import Path
import gradmix.training.data.texts as text_data
from gradmix.training.data.image_arrays import DataError, read_idx
from gradmix.training.data.tabular import covertype
text_data._MOST_BYTES = 1 << 24
readers = {"read_idx": lambda p: read_idx(p / "x.gz"), "covertype": covertype, "newsgroups20": text_data.newsgroups20}
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (96 << 20),) * 2)
for line in sys.stdin.read().splitlines():
    reader, path = line.split("\\t")
    try:
        print("read", readers[reader](Path(path)))
    except DataError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory by what /proc tells")
def test_no_more_is_unpacked_than_was_promised(tmp_path: Path) -> None:
    orders = []
    for number, (reader, make, _) in enumerate(BOMBS.values()):
        root = tmp_path / str(number)
        root.mkdir()
        make(root)
        orders.append(f"{reader}\t{root}")
    done = subprocess.run([sys.executable, "-c", READ], input="\n".join(orders), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for (case, (_, _, message)), said in zip(BOMBS.items(), done.stdout.splitlines(), strict=True):
        assert message in said, case


def test_a_sparse_post_is_no_post(tmp_path: Path) -> None:
    # Its head says that a terabyte of zeros belongs between its parts.
    head = bytearray(member(POST, 0, tarfile.GNUTYPE_SPARSE))
    head[386 : 386 + 24] = b"%011o\0" % (1 << 30) + b"%011o\0" % 0
    head[483 : 483 + 12] = b"%011o\0" % (1 << 30)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    (tmp_path / "20news-bydate.tar.gz").write_bytes(gzip.compress(bytes(head) + b"\0" * 1024))
    with pytest.raises(DataError, match="20news-bydate-train has no posts of alt.atheism"):
        newsgroups20(tmp_path)


@pytest.mark.parametrize("ndim", [65, 255])
def test_more_dimensions_than_numpy_has(tmp_path: Path, ndim: int) -> None:
    for sizes in (b"\0\0\0\1" * ndim, b"\0\0\0\0" + b"\xff" * 4 * (ndim - 1)):
        path = tmp_path / "x"
        path.write_bytes(b"\0\0\x08" + bytes([ndim]) + sizes + b"\7" * (sizes[3] == 1))
        with pytest.raises(DataError, match=f"an array of {ndim} dimensions, which numpy does not take"):
            read_idx(path)


def test_rows_at_most(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbf1,2\r\n3,4\r\n")
    assert read_integers(path, 2).tolist() == read_integers(path, 2, 2).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(DataError, match="not lines of 2 integers set apart by commas .more than 1 lines"):
        read_integers(path, 2, 1)
    path.write_bytes(b"1," + b"0" * 40 + b"2\n")
    with pytest.raises(DataError, match="line 1 has more than 40 characters"):
        read_integers(path, 2)


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_data, "_MOST_BYTES", 1 << 20)
    rng = random.Random(count)
    folder = tmp_path / "news"
    folder.mkdir()
    with tarfile.open(folder / "plain.tar", "w") as archive:
        for name in (POST, POST + "x" * 200, "20news-bydate-test/sci.med/2"):
            archive.addfile(tarfile.TarInfo(name))
    tar = (folder / "plain.tar").read_bytes()[:6144]
    table = "".join(",".join(map(str, row)) + "\n" for row in np.arange(165).reshape(3, 55) % 7 + 1).encode()
    idx = struct.pack(">HBBII", 0, 8, 2, 2, 3) + b"abcdef"
    targets = {
        folder / "20news-bydate.tar.gz": (tar, lambda: newsgroups20(folder)),
        tmp_path / "covtype.data": (table, lambda: covertype(tmp_path)),
        tmp_path / "x": (idx, lambda: read_idx(tmp_path / "x")),
        tmp_path / "x.gz": (idx, lambda: read_idx(tmp_path / "x.gz")),
    }
    refused = 0
    for turn in range(count):
        path, (content, read) = list(targets.items())[turn % len(targets)]
        raw = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(min(len(raw), 2048))
            raw[at : at + rng.choice([0, 1, 4])] = rng.choice(
                [b"\xff", b"\xff" * 4, b"7777777", b"\0", b"-", b"\n", b"x"]
            )
        packed_ = bytearray(gzip.compress(bytes(raw)) if path.suffix == ".gz" else raw)
        if rng.random() < 0.2:
            packed_[rng.randrange(len(packed_))] ^= 1 << rng.randrange(8)
        path.write_bytes(packed_)
        try:
            read()
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > count // 2
