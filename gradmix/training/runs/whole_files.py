"""Files and folders written whole or not at all, and on the disk before anything that they take the place of goes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def draft_of(path: Path) -> Path:
    """The name beside ``path`` that a file has while it is written."""
    return path.with_name(f".{path.name}")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a hidden name beside ``path`` to write to; what is there when the block ends takes the place of ``path``.

    When it has, it is on the disk. A block that fails leaves ``path`` as it was, and nothing else behind.

    Raises:
        OSError: The system's, with ``path`` as its file.
    """
    staging = draft_of(path)
    with name_in_errors(path):
        try:
            yield staging
            # Otherwise the name could reach the disk before the bytes do.
            sync(staging)
            os.replace(staging, path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                staging.unlink(missing_ok=True)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder, which may be there if it is empty; its parents are made."""
    with name_in_errors(folder):
        make_folder(folder.parent)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield staging
            for path in (*staging.iterdir(), staging):
                sync(path)
            staging.chmod(0o777 & ~_umask())
            if folder.is_dir():
                folder.rmdir()
            os.replace(staging, folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 in the place of what ``path`` holds, by :func:`replace_file`."""
    with replace_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents if they are not there, flush their entries to the disk, and return the new ones."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)
    return missing


def sync(path: Path) -> None:
    """Flush what a file or folder holds to the disk, or raise an OSError; folders as far as the file system can."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except OSError:
        if folder:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems cannot sync a folder: a loss of power may then bring back what was there before.
        if not folder:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Name ``path`` in errors of the system, which name a hidden file or, from a full disk, none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise


def _umask() -> int:
    # There is no way to read the mask but to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
