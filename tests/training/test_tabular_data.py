"""Readers of tabular data on tiny files in the true layout, and damaged ones."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gradmix.training.data.image_arrays import DataError, rank_in_class
from gradmix.training.data.tabular import COVERTYPES, covertype, read_integers, wine


def cover_rows(n: int = 70) -> np.ndarray:
    """(n, 55) in the layout of covtype.data: ten numbers, 4 + 40 indicators, the label."""
    g = np.random.default_rng(0)
    rows = np.zeros((n, 55), dtype=np.int64)
    rows[:, :10] = g.integers(-170, 7174, (n, 10))
    rows[np.arange(n), 10 + g.integers(0, 4, n)] = 1
    rows[np.arange(n), 14 + g.integers(0, 40, n)] = 1
    rows[:, 9] = 5  # a column without spread
    rows[:, -1] = np.minimum(1 + g.integers(0, 9, n), 7)
    return rows


def written(path: Path, rows: np.ndarray | str) -> Path:
    text = rows if isinstance(rows, str) else "".join(",".join(map(str, row)) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["covtype.data", "covtype.data.gz", "covertype/covtype.data.gz"])
def test_covertype_in_its_layouts(tmp_path: Path, name: str) -> None:
    rows = cover_rows()
    written(tmp_path / name, rows)
    data = covertype(tmp_path)
    assert data.class_names == COVERTYPES and len(COVERTYPES) == 7
    test = (rank_in_class(torch.from_numpy(rows[:, -1])) % 5 == 4).numpy()
    for x, y, of in ((data.train_x, data.train_y, rows[~test]), (data.test_x, data.test_y, rows[test])):
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert np.array_equal(x[:, 10:].numpy(), of[:, 10:-1]) and np.array_equal(y.numpy(), of[:, -1] - 1)
        mean, std = rows[~test][:, :10].mean(0), rows[~test][:, :10].std(0)
        std[9] = 1  # nothing to divide by
        np.testing.assert_allclose(x[:, :10].numpy(), (of[:, :10] - mean) / std, rtol=1e-5, atol=1e-6)
    assert 0 < len(data.test_y) < len(data.train_y)


def test_standardising() -> None:
    data = wine()
    assert data.train_x.shape == (144, 13) and data.test_x.shape == (34, 13) and len(data.class_names) == 3
    x = data.train_x
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean(0), torch.zeros(13), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, unbiased=False), torch.ones(13), atol=1e-5, rtol=0)
    assert 0.5 < data.test_x.std() < 1.5 and abs(data.test_x.mean()) < 0.3


def test_wine_is_split_class_by_class() -> None:
    data = wine()
    assert np.bincount(data.train_y).tolist() == [48, 57, 39] and np.bincount(data.test_y).tolist() == [11, 14, 9]


GOOD = "1,-2,3\n4,5,60000\n"
FILES = {
    "plain": (GOOD, [[1, -2, 3], [4, 5, 60000]]),
    "no line end at the end": (GOOD[:-1], [[1, -2, 3], [4, 5, 60000]]),
    "carriage returns": (GOOD.replace("\n", "\r\n"), [[1, -2, 3], [4, 5, 60000]]),
    "one line": ("7,8,9", [[7, 8, 9]]),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("case", FILES)
def test_integers(tmp_path: Path, case: str, suffix: str) -> None:
    text, expected = FILES[case]
    values = read_integers(written(tmp_path / f"rows.data{suffix}", text), 3)
    assert values.dtype == np.int32 and values.tolist() == expected


DAMAGED = {
    "empty": ("", "not lines of 3 integers"),
    "a short line": ("1,2,3\n4,5\n6,7,8\n", "not lines of 3 integers .*columns changed from 3 to 2 at row 2"),
    "an empty field": ("1,,3\n", "not lines of 3 integers"),
    "a word": ("1,2,3\n4,five,6\n", "not lines of 3 integers .*'five'"),
    "a fraction": ("1,2.5,3\n", "not lines of 3 integers .*2.5"),
    "beyond 32 bits": ("1,2,99999999999\n", "not lines of 3 integers"),
    "a comment": ("1,2,3 # three\n", "not lines of 3 integers"),
    "other columns throughout": ("1,2\n3,4\n", "rows.data: lines of 2 integers, expected 3"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(tmp_path: Path, case: str) -> None:
    text, message = DAMAGED[case]
    with pytest.raises(DataError, match=f"rows.data: {message}" if "rows" not in message else message):
        read_integers(written(tmp_path / "rows.data", text), 3)


def test_damaged_gzip_wrong_labels_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Covertype: missing .*covtype.data\[.gz\]; the file is published at"):
        covertype(tmp_path)
    path = written(tmp_path / "covtype.data.gz", cover_rows())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no gzip", whole[:-6] + b"\0" * 6):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"covtype.data.gz: damaged gzip file"):
            covertype(tmp_path)
    for label in (0, 8):
        rows = cover_rows()
        rows[3, -1] = label
        written(path, rows)
        with pytest.raises(DataError, match=f"line 4 has the label {label}, expected 1 to 7"):
            covertype(tmp_path)


def test_missing_scikit_learn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn, .* pip install 'gradmix\[train\]'"):
        wine()
