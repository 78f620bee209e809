"""Labelled texts from the files in which their data sets are published, and their words as numbers.

A file that is missing raises :class:`FileNotFoundError` with the path expected; a damaged one raises
:class:`gradmix.training.data.image_arrays.DataError`.
"""

from __future__ import annotations

import codecs
import gzip
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from gradmix.runtime.validation import check_count
from gradmix.training.data.class_names import look_alikes, printable, same_names
from gradmix.training.data.image_arrays import DataError, LabelledData, up_to
from gradmix.training.extras import import_extra

NEWSGROUPS = (
    "alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware",
    "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey",
    "sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns",
    "talk.politics.mideast", "talk.politics.misc", "talk.religion.misc",
)  # fmt: skip
"""The groups of 20 Newsgroups, in the order of their labels."""

DESCRIPTIONS = (
    "breast_cancer", "california_housing", "covtype", "diabetes", "digits", "iris", "kddcup99", "lfw",
    "olivetti_faces", "rcv1", "twenty_newsgroups", "wine_data",
)  # fmt: skip
"""The data sets whose descriptions :func:`descriptions` reads, in the order of their labels."""

_PASSAGE = 16  # words
_PASSAGES = 32  # of one description at most


# -------------------------------------------------------------------------------------------------------------- words

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> Iterator[str]:
    """The words of a text, lower-cased: runs of letters and digits.

    >>> list(words("It's 3 o'clock, SIR_Isaac."))
    ['it', 's', '3', 'o', 'clock', 'sir', 'isaac']
    """
    return (match.group() for match in _WORD.finditer(text.lower()))


@dataclass(frozen=True)
class HashedVocabulary:
    """Numbers for words, by a checksum, with no list of words behind them (Weinberger et al. 2009).

    A vocabulary counted on training texts would have to be counted on the first task's, to whose words later classes
    bring unknown ones, or on all of them, and so tell the first task's model of classes to come. A checksum needs to
    see no text at all: a word has the same number in every task, process and version of Python. The price is that
    words share numbers; of 2^15, two given words do with a probability of 1 in 32,767.

    Args:
        size: how many numbers there are, 0 for padding among them: what an embedding must provide for.

    Raises:
        TypeError, ValueError: ``size`` is no integer of at least 2.
    """

    size: int = 1 << 15

    def __post_init__(self) -> None:
        check_count("size", self.size)
        if self.size < 2:
            raise ValueError(f"size: got {self.size}, expected an integer >= 2, as 0 is padding")

    def id_of(self, word: str) -> int:
        """The number of a word, in ``[1, size)``: 1 + CRC-32 of its UTF-8 bytes mod (size - 1).

        >>> HashedVocabulary(100).id_of("mixup")
        76
        """
        return 1 + zlib.crc32(word.encode("utf-8", "surrogatepass")) % (self.size - 1)

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """The first ``length`` words of every text as numbers, shorter texts padded with 0 at the end.

        Args:
            texts: N texts.
            length: T.

        Returns:
            ``(N, T)`` int64. A text without a word is a row of 0.

        Raises:
            TypeError, ValueError: ``length`` is no positive integer, or ``texts`` is one text.
        """
        check_count("length", length)
        if isinstance(texts, str):
            raise TypeError("texts: got str, expected a sequence of texts")
        known: dict[str, int] = {}
        ids = np.zeros((len(texts), length), dtype=np.int64)
        for place, text in enumerate(texts):
            found = []
            for word in islice(words(text), length):
                number = known.get(word)
                if number is None:
                    number = known[word] = self.id_of(word)
                found.append(number)
            ids[place, : len(found)] = found
        return torch.from_numpy(ids)


# ------------------------------------------------------------------------------------------------------ 20 Newsgroups


def newsgroups20(root: str | Path, *, strip: bool = True, test: bool = True) -> LabelledData:
    """Read 20 Newsgroups, the version split by date: 11,314 training and 7,532 test posts.

    They are read from the folders ``20news-bydate-train/<group>/<post>`` and ``20news-bydate-test/<group>/<post>`` in
    ``root`` or in ``root/20news-bydate``; where there are none, from the archive ``20news-bydate.tar.gz`` there, of
    which nothing is unpacked. Posts are decoded as Latin-1, or as the Unicode of which they bear the byte order mark;
    line ends of Windows (CR LF) and of old Macs (CR) become LF. The order is that of groups and posts by name.

    Args:
        root: The data directory.
        strip: Whether to remove headers, footers and quotes (:func:`without_header`, :func:`without_footer`,
            :func:`without_quotes`, in this order), as scikit-learn's reader does on request. With them a model learns
            the posters and their sites, not what the posts are about. What is left of some posts is empty; they stay.
        test: Whether the test posts are read; otherwise they need not be there, and there are none.

    Raises:
        FileNotFoundError: There are neither the folders nor the archive.
        DataError: The archive is damaged, a group or all its posts are missing, or no post of a group has a word.
    """
    root = Path(root)
    parts = ("20news-bydate-train", "20news-bydate-test")[: 1 + test]
    for folder in (root, root / "20news-bydate"):
        if all((folder / part).is_dir() for part in parts):
            posts = [_posts_in(folder / part) for part in parts]
            return _newsgroups(folder, dict(zip(parts, posts, strict=True)), strip)
    for folder in (root, root / "20news-bydate"):
        archive = folder / "20news-bydate.tar.gz"
        if archive.is_file():
            return _newsgroups(archive, _posts_of_archive(archive, parts), strip)
    raise FileNotFoundError(
        f"20 Newsgroups: missing {' and '.join(str(root / part) for part in parts)}, and "
        f"{root / '20news-bydate.tar.gz'}; the archive is published at http://qwone.com/~jason/20Newsgroups/: put it "
        f"there, packed or unpacked, and give {root} as the data directory"
    )


_Posts = dict[tuple[str, str], bytes]


def _posts_in(folder: Path) -> _Posts:
    return {
        (group.name, post.name): post.read_bytes()
        for group in folder.iterdir()
        if group.is_dir()
        for post in group.iterdir()
        if post.is_file()
    }


_MOST_BYTES = 1 << 28
"""Bytes that the archive may unpack to, several times as many as it does: one made to fill memory is refused."""


class _Limited:
    """A file of which no more than :data:`_MOST_BYTES` are read, however much a compressed one holds."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left = file, _MOST_BYTES

    def read(self, count: int) -> bytes:
        found = bytes(up_to(self._file, min(count, self._left + 1)))
        self._left -= len(found)
        if self._left < 0:
            raise tarfile.ReadError(f"it unpacks to more than {_MOST_BYTES} bytes")
        return found


def _posts_of_archive(path: Path, parts: tuple[str, ...]) -> dict[str, _Posts]:
    posts: dict[str, _Posts] = {part: {} for part in parts}
    try:
        # Decompressed here: of an archive that is cut short, tarfile's own reader makes a shorter one.
        with gzip.open(path) as packed:
            content = _Limited(cast(IO[bytes], packed))
            with tarfile.open(fileobj=cast(Any, content), mode="r|") as archive:
                for member in archive:
                    names = member.name.removeprefix("./").split("/")
                    # Of a sparse file the size is what it pretends, not what is there.
                    if member.isfile() and not member.issparse() and len(names) == 3 and names[0] in posts:
                        file = archive.extractfile(member)
                        assert file is not None
                        posts[names[0]][names[1], names[2]] = file.read()
                while content.read(1 << 20):  # to the checksum at the end
                    pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: damaged archive ({error}); fetch it again") from error
    return posts


def _newsgroups(source: Path, posts: dict[str, _Posts], strip: bool) -> LabelledData:
    columns: list[tuple[list[str], Tensor]] = []
    for part, found in posts.items():
        there = {name for name, _ in found}
        missing = [group for group in NEWSGROUPS if group not in there]
        if missing:
            alike = look_alikes(missing, sorted(there - set(NEWSGROUPS)), part)
            raise DataError(f"{source}: {part} has no posts of {', '.join(missing)}{alike}")
        kept = sorted((group, name) for group, name in found if group in NEWSGROUPS)
        texts = [_post(found[key], source, f"{part}/{'/'.join(key)}") for key in kept]
        if strip:
            texts = [without_quotes(without_footer(without_header(text))) for text in texts]
        labels = torch.tensor([NEWSGROUPS.index(group) for group, _ in kept])
        _need_words(f"{source}: {part}", texts, labels, NEWSGROUPS)
        columns.append((texts, labels))
    (train, train_y), (test, test_y) = (*columns, ([], torch.empty(0, dtype=torch.int64)))[:2]
    return LabelledData(train, train_y, test, test_y, NEWSGROUPS)


_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before that of UTF-16, with which it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def _post(content: bytes, source: Path, name: str) -> str:
    encoding = next((found for mark, found in _MARKS.items() if content.startswith(mark)), "latin-1")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: {printable(name)} is not the {encoding} text that it begins as ({error})"
        ) from error
    # A file that was made one of Windows twice has two CR before each LF.
    return re.sub("\r+\n|\r", "\n", text)


def _need_words(where: str, texts: Sequence[str], labels: Tensor, names: Sequence[str]) -> None:
    """Refuse texts of which a class has none with a word in it: a model would learn nothing of them."""
    spoken = {label for text, label in zip(texts, labels.tolist(), strict=True) if next(words(text), None) is not None}
    silent = [names[label] for label in sorted(set(labels.tolist()) - spoken)]
    if silent:
        raise DataError(f"{where} has no text with a word in it of {', '.join(map(repr, silent))}")


_QUOTED = re.compile(r"writes in|writes:|wrote:|says:|said:|^(?:In article|Quoted from|[|>])")


def without_header(text: str) -> str:
    """The text after the first empty line of a post; empty, if there is none."""
    return text.partition("\n\n")[2]


def without_footer(text: str) -> str:
    """A post without its last paragraph, which often is a signature, set off by an empty line or one of dashes.

    A post of one paragraph stays as it is.
    """
    lines = text.strip().split("\n")
    for place in reversed(range(len(lines))):
        if not lines[place].strip().strip("-"):
            return "\n".join(lines[:place]) if place else text
    return text


def without_quotes(text: str) -> str:
    """A post without lines that quote another (``>`` or ``|`` first) or say whom they quote (``... writes:``)."""
    return "\n".join(line for line in text.split("\n") if not _QUOTED.search(line))


# ----------------------------------------------------------------------------------------------------- folders of files


def text_folder(root: str | Path, *, encoding: str = "utf-8", test: bool = True) -> LabelledData:
    """Read texts of one's own from ``root/train/<class>/*.txt`` and ``root/test/<class>/*.txt``.

    Labels follow the classes' names in order, texts the files' names. Names that begin with a dot are passed over. A
    folder of test texts is of the class whose name is the same, be its letters composed or not.

    Args:
        root: The folder.
        encoding: Of all files.
        test: Whether the test texts are read; otherwise they need not be there, and there are none.

    Raises:
        FileNotFoundError: ``root/train`` or ``root/test`` is missing.
        ValueError: There is no such encoding.
        DataError: There are no classes, a class has no training text or none with a word, or test texts are of a class
            that has none; or a file is not in the encoding.
    """
    root = Path(root)
    try:
        codecs.lookup(encoding)
    except LookupError as error:
        raise ValueError(f"encoding: got {encoding!r}, expected one that Python knows, such as 'utf-8'") from error
    parts = ("train", "test")[: 1 + test]
    found: dict[str, dict[str, list[Path]]] = {}
    for part in parts:
        if not (root / part).is_dir():
            beside = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
            raise FileNotFoundError(
                f"texts: missing {root / part}; expected {root}/train/<class>/*.txt and {root}/test/<class>/*.txt"
                f"{look_alikes([part], beside, str(root))}"
            )
        found[part] = {
            folder.name: sorted(
                path
                for path in folder.iterdir()
                if path.name.lower().endswith(".txt") and path.is_file() and not path.name.startswith(".")
            )
            for folder in sorted(root.joinpath(part).iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
        }
    names = tuple(sorted(found["train"]))
    if not names:
        raise DataError(f"{root / 'train'}: holds no folders, expected one for each class")
    for name in names:
        if not found["train"][name]:
            raise DataError(f"{root / 'train' / name}: holds no .txt files")
    if test:
        pairs = same_names(names, found["test"])
        unknown = sorted(set(found["test"]) - set(pairs))
        if unknown:
            alike = look_alikes(unknown, names, str(root / "train"))
            raise DataError(
                f"{root / 'test' / unknown[0]}: no such class among the training texts: {', '.join(names)}{alike}"
            )
        found["test"] = {pairs[name]: files for name, files in found["test"].items()}
    shown = tuple(map(printable, names))
    columns: list[tuple[list[str], Tensor]] = []
    for part in parts:
        paths = [(label, path) for label, name in enumerate(names) for path in found[part].get(name, [])]
        texts = [_decode(path, encoding) for _, path in paths]
        labels = torch.tensor([label for label, _ in paths], dtype=torch.int64)
        _need_words(str(root / part), texts, labels, shown)
        columns.append((texts, labels))
    (train, train_y), (held_out, held_out_y) = (*columns, ([], torch.empty(0, dtype=torch.int64)))[:2]
    return LabelledData(train, train_y, held_out, held_out_y, class_names=shown)


def _decode(path: Path, encoding: str) -> str:
    try:
        text = path.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{printable(str(path))}: not {encoding} text ({error}); convert it, or give the encoding of all files"
        ) from error
    if "\0" in text:
        raise DataError(
            f"{printable(str(path))}: holds NUL characters, as text in UTF-16 read as {encoding} does; convert it, or "
            "give the encoding of all files"
        )
    return text.removeprefix("\ufeff")


# -------------------------------------------------------------------------------------------------------- descriptions


def descriptions() -> LabelledData:
    """Passages of the descriptions that come with scikit-learn's data sets; the class is the data set described.

    Twelve descriptions (:data:`DESCRIPTIONS`), cut into passages of 16 words of letters alone, lower-cased; of a
    longer one the first 32. Of every description each fourth passage is a test text. How many there are depends a
    little on scikit-learn's version; with 1.9, 187 training and 57 test texts, 7 to 24 and 2 to 8 a class. A logistic
    regression on counts of hashed words, all classes at once, has an accuracy of 0.60 there; the largest class has a
    share of 0.14.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        DataError: its installation has no description of one of the data sets.
    """
    need = "descriptions needs scikit-learn, with which its texts come"
    (folder,) = import_extra("sklearn.datasets.descr", need).__path__
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, name in enumerate(DESCRIPTIONS):
        path = Path(folder) / f"{name}.rst"
        if not path.is_file():
            raise DataError(f"{path}: missing from this version of scikit-learn")
        for number, passage in enumerate(_passages(path.read_text(encoding="utf-8"))):
            (test if number % 4 == 3 else train).append((passage, label))
    labels = (torch.tensor([label for _, label in part]) for part in (train, test))
    return LabelledData(
        [text for text, _ in train], next(labels), [text for text, _ in test], next(labels), class_names=DESCRIPTIONS
    )


def _passages(text: str) -> Iterable[str]:
    found = re.findall(r"[^\W\d_]+", text.lower())[: _PASSAGE * _PASSAGES]
    starts = range(0, len(found) - _PASSAGE + 1, _PASSAGE)
    return (" ".join(found[start : start + _PASSAGE]) for start in starts)
