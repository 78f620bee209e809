"""Readers of texts on tiny files in the true layouts, damaged ones, and words as numbers."""

from __future__ import annotations

import codecs
import doctest
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gradmix.training.data import texts as text_data
from gradmix.training.data.image_arrays import DataError
from gradmix.training.data.texts import (
    DESCRIPTIONS,
    NEWSGROUPS,
    HashedVocabulary,
    descriptions,
    newsgroups20,
    text_folder,
    without_footer,
    without_header,
    without_quotes,
    words,
)

# -------------------------------------------------------------------------------------------------------------- words


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(text_data).failed == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n--- ___ !?", []),
        ("Été à ÉVRY: 2nd_hand", ["été", "à", "évry", "2nd", "hand"]),
        ("x" * 3 + "\x00y", ["xxx", "y"]),
    ],
    ids=["empty", "no word", "letters of any script", "control characters"],
)
def test_words(text: str, expected: list[str]) -> None:
    assert list(words(text)) == expected


def test_encoding_is_word_by_word_cut_and_padded() -> None:
    vocabulary = HashedVocabulary(50)
    ids = vocabulary.encode(["One two. ONE?", "", "a b c d e"], 4)
    one, two = vocabulary.id_of("one"), vocabulary.id_of("two")
    assert ids.dtype == torch.int64 and ids.shape == (3, 4)
    assert ids[0].tolist() == [one, two, one, 0] and ids[1].tolist() == [0] * 4
    assert ids[2].tolist() == [vocabulary.id_of(word) for word in "abcd"]
    assert vocabulary.encode([], 3).shape == (0, 3)


def test_numbers_fill_the_vocabulary_and_leave_0_to_padding() -> None:
    vocabulary = HashedVocabulary(64)
    ids = [vocabulary.id_of(f"word{i}") for i in range(6300)]
    counts = np.bincount(ids, minlength=64)
    assert len(counts) == 64 and counts[0] == 0
    assert counts[1:].min() > 60 and counts[1:].max() < 150  # 100 on average
    assert HashedVocabulary(2).encode(["a b"], 3).tolist() == [[1, 1, 0]]


def crc32(data: bytes) -> int:
    """Bit by bit, as ISO-HDLC defines it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("size", [2, 100, 1 << 15, 1 << 20])
@pytest.mark.parametrize("word", ["a", "newsgroup", "ñandú", "\ud800"])
def test_numbers_are_checksums_and_so_the_same_everywhere(word: str, size: int) -> None:
    expected = 1 + crc32(word.encode("utf-8", "surrogatepass")) % (size - 1)
    assert HashedVocabulary(size).id_of(word) == expected


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: HashedVocabulary(1), ValueError, "size: got 1, expected an integer >= 2"),
        (lambda: HashedVocabulary(2.5), TypeError, "size: got float"),
        (lambda: HashedVocabulary().encode(["a"], 0), ValueError, "length: got 0"),
        (lambda: HashedVocabulary().encode("abc", 4), TypeError, "texts: got str, expected a sequence of texts"),
    ],
    ids=["one number", "a fraction", "no length", "one text"],
)
def test_refused(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------------------ 20 Newsgroups

POST = """From: someone@here (Some One)
Subject: Re: {group}

In article <1@there> other@there writes:
> quoted words
| quoted too
Answer about number {number}, caf\u00e9.

--
Some One
"""


def posts(train: int = 2, test: int = 1) -> dict[str, bytes]:
    """Files by path, not in order."""
    return {
        f"20news-bydate-{part}/{group}/{number}": POST.format(group=group, number=number).encode("latin-1")
        for part, count in (("test", test), ("train", train))
        for group in reversed(NEWSGROUPS)
        for number in range(99 + count, 99, -1)
    }


def as_folders(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def as_archive(root: Path, files: dict[str, bytes], prefix: str = "") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    path = root / "20news-bydate.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("20news-bydate-train/sci.space/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        outside = tarfile.TarInfo("../../outside")
        archive.addfile(outside, io.BytesIO())
    return path


LAYOUTS = {
    "folders": lambda root: as_folders(root, posts()),
    "folders one below": lambda root: as_folders(root / "20news-bydate", posts()),
    "archive": lambda root: as_archive(root, posts()),
    "archive one below, names with ./": lambda root: as_archive(root / "20news-bydate", posts(), "./"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_newsgroups_in_their_layouts(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    texts = newsgroups20(tmp_path)
    assert texts.class_names == NEWSGROUPS
    assert texts.train_y.tolist() == [label for label in range(20) for _ in range(2)]
    assert texts.test_y.tolist() == list(range(20)) and texts.train_y.dtype == torch.int64
    assert [text.strip() for text in texts.train_x] == [f"Answer about number {100 + i % 2}, café." for i in range(40)]
    whole = newsgroups20(tmp_path, strip=False)
    assert whole.test_x == [POST.format(group=group, number=100) for group in NEWSGROUPS]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked


AWKWARD_POSTS = {
    "whole": POST,
    "empty": "",
    "no header": "only one line",
    "header alone": "From: a\nTo: b\n",
    "header and empty line": "From: a\n\n",
    "one paragraph": "From: a\n\nline\nline two",
    "signature after dashes": "From: a\n\ntext\nmore\n----\nme",
    "dashes first": "From: a\n\n---\ntext",
    "all quoted": "From: a\n\n> b\n>> c\n| d",
    "attributions": "From: a\n\nJoe said:\nhe writes in his book\nQuoted from X\n In article 3\nIn article 3\nI say",
    "carriage returns": "From: a\r\n\r\ntext\r\n\n\nend",
    "blank lines with spaces": "From: a\n\ntext\n   \nsig\n \n\n",
}


@pytest.mark.parametrize("case", AWKWARD_POSTS)
def test_stripping_is_that_of_scikit_learn(case: str) -> None:
    from sklearn.datasets import _twenty_newsgroups as theirs

    text = AWKWARD_POSTS[case]
    for part in (text, without_header(text)):
        assert without_header(part) == theirs.strip_newsgroup_header(part)
        assert without_footer(part) == theirs.strip_newsgroup_footer(part)
        assert without_quotes(part) == theirs.strip_newsgroup_quoting(part)


def without_group(files: dict[str, bytes], part: str, group: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if f"{part}/{group}/" not in name}


def test_newsgroups_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"20 Newsgroups: missing .*20news-bydate-train .*20news-bydate.tar.gz"):
        newsgroups20(tmp_path)
    as_folders(tmp_path / "a", without_group(posts(), "train", "sci.med"))
    with pytest.raises(DataError, match="20news-bydate-train has no posts of sci.med"):
        newsgroups20(tmp_path / "a")
    archive = as_archive(tmp_path / "b", without_group(posts(), "test", "rec.autos"))
    with pytest.raises(DataError, match=r"20news-bydate.tar.gz: 20news-bydate-test has no posts of rec.autos"):
        newsgroups20(tmp_path / "b")
    whole = archive.read_bytes()
    flipped = bytearray(whole)
    flipped[-8] ^= 1  # of the checksum
    for content in (whole[: len(whole) // 2], whole[:-9], whole[:-4], bytes(flipped), b"no archive", b""):
        archive.write_bytes(content)
        with pytest.raises(DataError, match=r"20news-bydate.tar.gz: damaged archive"):
            newsgroups20(tmp_path / "b")


# ----------------------------------------------------------------------------------------------------- folders of files


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    as_folders(
        tmp_path,
        {
            "train/b/2.txt": b"second",
            "train/b/1.txt": "erste Zeile\nübrig".encode(),
            "train/a c/x.txt": b"other",
            "train/a c/y.txt": b"",
            "train/b/notes.md": b"no text",
            "train/.hidden/x.txt": b"\xff",
            "train/b/.x.txt": b"\xff",
            "train/readme.txt": b"no class",
            "test/b/9.txt": b"last",
        },
    )
    texts = text_folder(tmp_path)
    assert texts.class_names == ("a c", "b")
    assert texts.train_x == ["other", "", "erste Zeile\nübrig", "second"] and texts.train_y.tolist() == [0, 0, 1, 1]
    assert texts.test_x == ["last"] and texts.test_y.tolist() == [1]


FOLDERS = {
    "no test part": ({"train/a/1.txt": b"x"}, FileNotFoundError, "texts: missing .*test; expected"),
    "no classes": ({"train/1.txt": b"x", "test/a/1.txt": b"x"}, DataError, "train: holds no folders"),
    "an empty class": (
        {"train/a/1.txt": b"x", "train/b/1.md": b"x", "test/a/1.txt": b"x"},
        DataError,
        r"train/b: holds no .txt files",
    ),
    "a class of the test part alone": (
        {"train/a/1.txt": b"x", "test/z/1.txt": b"x"},
        DataError,
        "test/z: no such class among the training texts: a",
    ),
    "another encoding": (
        {"train/a/1.txt": b"x", "test/a/1.txt": b"caf\xe9"},
        DataError,
        r"test/a/1.txt: not utf-8 text",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_refused(tmp_path: Path, case: str) -> None:
    files, error, message = FOLDERS[case]
    as_folders(tmp_path, files)
    with pytest.raises(error, match=message):
        text_folder(tmp_path)


def test_another_encoding_on_request(tmp_path: Path) -> None:
    as_folders(tmp_path, {"train/a/1.txt": b"caf\xe9", "test/a/1.txt": b"x"})
    assert text_folder(tmp_path, encoding="latin-1").train_x == ["café"]


# -------------------------------------------------------------------------------------------------------- descriptions


ENDS = {
    "of Windows": lambda text: text.replace("\n", "\r\n").encode("latin-1"),
    "of Windows, made twice": lambda text: text.replace("\n", "\r\r\n").encode("latin-1"),
    "of old Macs": lambda text: text.replace("\n", "\r").encode("latin-1"),
    "of Windows in UTF-16": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "in UTF-16, big end first": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "in UTF-32": lambda text: text.encode("utf-32"),
    "in UTF-8 with a mark": lambda text: text.encode("utf-8-sig"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", ENDS)
def test_newsgroups_with_other_line_ends_and_encodings(tmp_path: Path, case: str, packed: bool) -> None:
    files = {name: ENDS[case](content.decode("latin-1")) for name, content in posts().items()}
    (as_archive if packed else as_folders)(tmp_path / "other", files)
    as_folders(tmp_path / "usual", posts())
    for strip in (True, False):
        found, expected = (newsgroups20(tmp_path / which, strip=strip) for which in ("other", "usual"))
        assert found.train_x == expected.train_x and found.test_x == expected.test_x


def test_a_mark_that_lies_names_the_post(tmp_path: Path) -> None:
    files = posts() | {"20news-bydate-train/sci.med/100": codecs.BOM_UTF16_LE + b"odd"}
    as_folders(tmp_path, files)
    with pytest.raises(DataError, match="20news-bydate-train/sci.med/100 is not the utf-16 text that it begins as"):
        newsgroups20(tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_group_without_a_word_is_refused(tmp_path: Path, part: str) -> None:
    empty = {name: b"From: a\n\n> all quoted\n" for name in posts() if f"{part}/sci.med/" in name}
    as_folders(tmp_path, posts() | empty)
    with pytest.raises(DataError, match=f"20news-bydate-{part} has no text with a word in it of 'sci.med'"):
        newsgroups20(tmp_path)
    assert newsgroups20(tmp_path, strip=False).class_names == NEWSGROUPS
    as_folders(tmp_path / "folder", {f"{side}/{c}/1.txt": b"word" for side in ("train", "test") for c in "ab"})
    (tmp_path / "folder" / part / "b" / "1.txt").write_bytes(b"\r\n ...\r\n")
    with pytest.raises(DataError, match=f"folder/{part} has no text with a word in it of 'b'"):
        text_folder(tmp_path / "folder")


def test_a_group_by_another_name_is_named(tmp_path: Path) -> None:
    as_folders(tmp_path, {name.replace("sci.med", "Sci.Med"): content for name, content in posts().items()})
    with pytest.raises(DataError, match=r"has no posts of sci.med; 20news-bydate-train has 'Sci.Med' for 'sci.med'"):
        newsgroups20(tmp_path)


def test_texts_that_are_in_another_encoding_are_refused_and_read_by_what_is_advised(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "latin-1"):
        root = tmp_path / encoding
        as_folders(root, {f"{part}/a/1.txt": "eine Übung\r\n".encode(encoding) for part in ("train", "test")})
        with pytest.raises(DataError, match=r"1.txt: (not utf-8 text|holds NUL).*give the encoding of all files"):
            text_folder(root)
        assert text_folder(root, encoding=encoding).train_x == ["eine Übung\r\n"]
    as_folders(tmp_path / "mark", {f"{part}/a/1.TXT": b"\xef\xbb\xbfword" for part in ("train", "test")})
    assert text_folder(tmp_path / "mark").train_x == ["word"]
    with pytest.raises(ValueError, match="encoding: got 'latin-99', expected one that Python knows"):
        text_folder(tmp_path / "mark", encoding="latin-99")


def test_descriptions_are_passages_of_twelve_classes() -> None:
    texts = descriptions()
    assert texts.class_names == DESCRIPTIONS and len(DESCRIPTIONS) == 12
    for part, labels, least in ((texts.train_x, texts.train_y, 6), (texts.test_x, texts.test_y, 2)):
        assert len(part) == len(labels)
        assert all(len(list(words(text))) == 16 for text in part)
        assert np.bincount(labels, minlength=12).min() >= least
    assert not set(texts.train_x) & set(texts.test_x)
    assert 150 <= len(texts.train_x) <= 300 and len(texts.train_x) / len(texts.test_x) == pytest.approx(3, rel=0.2)
    again = descriptions()
    assert again.train_x == texts.train_x and torch.equal(again.test_y, texts.test_y)


def test_descriptions_can_be_told_apart() -> None:
    """By the nearest class mean of word counts: several times better than the largest class."""
    texts, vocabulary = descriptions(), HashedVocabulary(2048)

    def counts(part: list[str]) -> torch.Tensor:
        ids = vocabulary.encode(part, 16)
        found = torch.zeros(len(part), 2048).scatter_add_(1, ids, torch.ones(ids.shape))
        return torch.nn.functional.normalize(found)

    means = torch.stack([counts(texts.train_x)[texts.train_y == label].mean(0) for label in range(12)])
    predicted = (counts(texts.test_x) @ torch.nn.functional.normalize(means).T).argmax(1)
    accuracy = (predicted == texts.test_y).double().mean()
    assert accuracy > 0.4


def test_missing_scikit_learn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn, .* pip install 'gradmix\[train\]'"):
        descriptions()
