"""Files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a hidden name beside ``path`` to write to; what is there when the block ends takes the place of ``path``.

    A block that fails leaves ``path`` as it was, and nothing else behind.
    """
    staging = path.with_name(f".{path.name}")
    try:
        yield staging
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8 in the place of what ``path`` holds."""
    with replacing(path) as staging:
        staging.write_text(text, encoding="utf-8")
