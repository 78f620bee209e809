"""Table of measurements, and its file in the user's cache folder.

Every key has a file of its own, so that several environments and machines can share the folder. A file is written
under a temporary name and renamed: a reader meets the former file or the new one, and of two writers the later one's
file stays. Tables that come with the package lie in its folder ``calibration/tables``; they count where the user has
none.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gradmix.calibration.key import COMPONENTS, Key, difference, digest, slug
from gradmix.calibration.verdicts import Measurement, Verdicts

SCHEMA = 1
"""Number of the file's format. A file with another number is not read."""

ENVIRONMENT_VARIABLE = "GRADMIX_CACHE_DIR"
"""Names the cache folder of gradmix, in place of the platform's."""

SHIPPED = Path(__file__).with_name("tables")
"""Folder of the tables that come with the package."""

_OWN = ("memory", "driver", "build")
"""Components of a key in which a table that comes with the package may differ from the user's installation.

Without the same build, its measurements of compiled kernels do not count."""

COMPILED = "cuda"
"""Name of the implementations that are part of the compiled extension."""


class TableError(ValueError):
    """A file that holds no table that this version reads; the message begins with the file's name."""


@dataclass(frozen=True)
class Table:
    """Measurements of one device.

    Attributes:
        key: the device and the installation, as :func:`gradmix.calibration.key.key_of` returns them.
        measured: date and time (UTC, ISO 8601).
        seconds: duration of all measurements.
        quick: whether only a dozen cells were measured.
        verdicts: the measurements.
    """

    key: Key
    measured: str
    seconds: float
    quick: bool
    verdicts: Verdicts

    def as_text(self) -> str:
        """Return the content of the file."""
        values = {
            "schema": SCHEMA,
            "key": dict(self.key),
            "measured": self.measured,
            "seconds": round(self.seconds, 1),
            "quick": self.quick,
            "lost": dict(self.verdicts.lost),
            "measurements": [m.as_values() for m in self.verdicts.measurements],
        }
        return json.dumps(values, indent=1, allow_nan=False) + "\n"


class Found(NamedTuple):
    """The result of a search for a table.

    Attributes:
        table: the table, or None.
        path: file of the table, or of the one that is not used; None if there is none.
        problem: a sentence why a file is not used; None if there is no such file.
    """

    table: Table | None
    path: Path | None
    problem: str | None


def cache_folder() -> Path:
    """Return the cache folder of gradmix: ``GRADMIX_CACHE_DIR``, or ``gradmix`` in the user's cache folder.

    That is ``XDG_CACHE_HOME`` or ``~/.cache``, on macOS ``~/Library/Caches``, on Windows ``%LOCALAPPDATA%``.

    Raises:
        TableError: the user's home folder is needed, and is not known.
    """
    try:
        return _cache_folder()
    except RuntimeError as error:
        raise TableError(f"environment variable {ENVIRONMENT_VARIABLE}: expected a folder, as {error}") from None


def _cache_folder() -> Path:
    given = os.environ.get(ENVIRONMENT_VARIABLE)
    if given:
        return Path(given).expanduser()
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the specification has relative names ignored
        return Path(named, "gradmix")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gradmix"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "gradmix" / "Cache"
    return Path.home() / ".cache" / "gradmix"


def path_of(key: Key) -> Path:
    """Return the file of a key's table in the user's cache folder, whether or not it exists."""
    return cache_folder() / "calibration" / f"{slug(key['device'])}-{digest(key)}.json"


def read(path: Path) -> Table:
    """Read a table.

    Raises:
        TableError: the file is no table, or one of another schema.
        OSError: the file cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TableError(f"{path}: damaged: {error}") from None
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise TableError(f"{path}: got schema {schema}, expected {SCHEMA}, which this version of gradmix reads")
    try:
        return _from_values(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TableError(f"{path}: damaged: {type(error).__name__}: {error}") from None


def _from_values(values: dict[str, Any]) -> Table:
    key, lost, measured = dict(values["key"]), dict(values["lost"]), values["measured"]
    for name, text in {"measured": measured, **key, **lost}.items():
        if not isinstance(text, str):
            raise TypeError(f"{name}: got {type(text).__name__}, expected a string")
    if key.keys() != COMPONENTS.keys():
        raise ValueError(f"key: got {', '.join(key)}, expected {', '.join(COMPONENTS)}")
    measurements = tuple(Measurement.from_values(m) for m in values["measurements"])
    return Table(key, measured, float(values["seconds"]), bool(values["quick"]), Verdicts(measurements, lost))


def check_writable(path: Path) -> None:
    """Make the folder of a file, and a file in it.

    Raises:
        OSError: that is not possible.
    """
    _replace(path, None)


def write(table: Table, path: Path) -> None:
    """Write a table in the place of what the file holds.

    Raises:
        OSError: the file cannot be written; what it held is unchanged.
    """
    _replace(path, table.as_text())


def _replace(path: Path, text: str | None) -> None:
    """Write a file beside ``path``, and rename it unless the text is None."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text or "")
                file.flush()
                os.fsync(file.fileno())
            if text is not None:
                os.replace(name, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)
    except OSError as error:
        # The name of the temporary file would tell the user nothing.
        error.filename, error.filename2 = str(path), None
        raise


def find(key: Key) -> Found:
    """Find the table that is valid for a key: the user's, or else one that comes with the package."""
    try:
        path = path_of(key)
    except TableError as error:
        return _find_shipped(key) or Found(None, None, str(error))
    own = _try_read(path)
    if own.table is not None:
        reason = difference(own.table.key, key)
        own = own if reason is None else Found(None, path, f"{path}: {reason}")
    elif own.problem is None:
        own = _stale(path, key)
    return own if own.table is not None else _find_shipped(key) or own


def _try_read(path: Path) -> Found:
    try:
        return Found(read(path), path, None)
    except (FileNotFoundError, NotADirectoryError):
        return Found(None, None, None)
    except OSError as error:
        return Found(None, path, f"{path}: it cannot be read: {error.strerror or error}")
    except TableError as error:
        return Found(None, path, str(error))


def _files(folder: Path, key: Key) -> list[Path]:
    try:
        return sorted(folder.glob(f"{slug(key['device'])}-*.json"))
    except OSError:
        return []


def _stale(path: Path, key: Key) -> Found:
    """Return why the user's latest table of such a device is not valid here."""
    others = [_try_read(file) for file in _files(path.parent, key)]
    tables = [(found.table.measured, found) for found in others if found.table is not None]
    tables = [(when, found) for when, found in tables if found.table and found.table.key["device"] == key["device"]]
    if not tables:
        return Found(None, None, None)
    latest = max(tables, key=lambda pair: pair[0])[1]
    assert latest.table is not None
    return Found(None, latest.path, f"{latest.path}: {difference(latest.table.key, key) or 'it was renamed'}")


def _find_shipped(key: Key) -> Found | None:
    """Return a table that comes with the package and is valid for a key, without what the user's build may change."""
    components = [name for name in COMPONENTS if name not in _OWN]
    for path in _files(SHIPPED, key):
        table = _try_read(path).table
        if table is None or difference(table.key, key, components) is not None:
            continue
        if table.key["build"] == key["build"]:
            return Found(table, path, None)
        kept = tuple(m for m in table.verdicts.measurements if m.cell.backend != COMPILED)
        verdicts = Verdicts(kept, table.verdicts.lost)
        return Found(Table(table.key, table.measured, table.seconds, table.quick, verdicts), path, None)
    return None
