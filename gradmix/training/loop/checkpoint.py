"""Files from which an interrupted run goes on: written whole or not at all, and checked to the last bit when read.

A checkpoint is an ordinary file of :func:`torch.save` whose zip archive ends in a comment: the SHA-256 digest of all
bytes before it. The checksums inside the archive cover its entries only, neither their headers nor the padding.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmix._version import __version__
from gradmix.training.runs.whole_files import draft_of, make_folder, replace_file

FORMAT = 1
"""Version of what a checkpoint holds. A reader refuses a later one."""

_SEAL = b"gradmix checkpoint sha256 "
_SEAL_BYTES = len(_SEAL) + 64
_END_RECORD = b"PK\x05\x06"
_END_RECORD_BYTES = 22
_LINES_SHOWN = 6


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; the message names the file, the reason and a way out."""


def save(state: dict[str, Any], path: str | Path, *, run: str | None = None) -> None:
    """Write a checkpoint, whole or not at all: a file of that name stays as it is until the new one is complete.

    The bytes go to a hidden file in the same folder, which is flushed to the disk and then takes the name. So it is
    whatever ends the process in between, a full disk, Ctrl-C or SIGKILL alike. One process at a time may write to
    ``path``.

    Args:
        state: tensors, str, int, float, bool, None, and lists, tuples and dicts of them, nested at will; keys of dicts
            are str or int. An OrderedDict, as modules return it, is read back as a dict. A tensor that shows a part of
            a larger storage is saved without the rest.
        path: where to; missing folders are made.
        run: text that tells this run from others, line by line; :func:`load` compares it.

    Raises:
        TypeError: ``state`` holds something else, or is no dict; the message has the keys that lead there.
        CheckpointError: the file could not be written (its ``__cause__`` is the system's OSError); what was there
            before is untouched.
    """
    path = Path(path)
    if not isinstance(state, dict):
        raise TypeError(f"state: got {type(state).__name__}, expected a dict")
    content = {"format": FORMAT, "gradmix": str(__version__), "run": run, "state": _plain(state, "state")}
    archive = io.BytesIO()
    torch.save(content, archive)
    try:
        make_folder(path.parent)
        with replace_file(path) as staging:
            staging.write_bytes(_add_seal(archive.getvalue()))
    except OSError as error:
        kept = "the previous checkpoint is intact" if path.is_file() else "there is no earlier checkpoint"
        raise CheckpointError(
            f"{path}: the checkpoint could not be written ({error.strerror or error}); {kept}"
        ) from error


def load(path: str | Path, *, run: str | None = None, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint that :func:`save` wrote.

    Args:
        path: the file.
        run: the text given to :func:`save`; None: the checkpoint may be of any run.
        map_location: where its tensors go.

    Returns:
        The state.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged in any bit, cut off, of another kind or of a later format, or it belongs to
            another run; then the lines that differ are named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: the checkpoint could not be read ({error.strerror or error})") from error
    _check_seal(data, path)
    try:
        content = torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
    except Exception as error:
        # What a crafted file raises is up to whoever made it.
        raise CheckpointError(f"{path}: whole, but torch {torch.__version__} cannot read it ({error})") from error
    _check_content(content, path)
    if content["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: written by gradmix {content['gradmix']} in format {content['format']}, expected at most "
            f"{FORMAT}; go on with that version, or remove the file to start the run again"
        )
    if run is not None and content["run"] != run:
        raise CheckpointError(
            f"{path}: belongs to another run: {_differences(content['run'] or '', run)}; go on with the configuration "
            "it was made with, or remove the file to start the run again"
        )
    state: dict[str, Any] = content["state"]
    return state


def remove(path: str | Path) -> None:
    """Remove a checkpoint, what a killed process left of an attempt to write it, and the samples that lie beside it.

    No error if there is none.
    """
    path = Path(path)
    path.unlink(missing_ok=True)
    draft_of(path).unlink(missing_ok=True)
    shutil.rmtree(samples_beside(path), ignore_errors=True)


def samples_beside(path: str | Path) -> Path:
    """The folder for samples that belong to a checkpoint and are too many to be part of it."""
    path = Path(path)
    return path.with_name(f"{path.name}.rows")


def _add_seal(archive: bytes) -> bytes:
    """The zip archive with the digest of its bytes as its comment."""
    assert archive[-_END_RECORD_BYTES:].startswith(_END_RECORD), "torch.save wrote no zip archive without a comment"
    body = archive[:-2] + _SEAL_BYTES.to_bytes(2, "little")
    return body + _seal_of(body)


def _seal_of(body: bytes | memoryview) -> bytes:
    return _SEAL + hashlib.sha256(body).hexdigest().encode()


def _check_seal(data: bytes, path: Path) -> None:
    """Raise a CheckpointError unless ``data`` is, to the bit, what was written."""
    way_out = "remove the file to start the run again, or put a copy in its place"
    if not data:
        raise CheckpointError(f"{path}: the checkpoint is empty; {way_out}")
    body, seal = memoryview(data)[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if not seal.startswith(_SEAL):
        kind = "cut off, or " if data.startswith(b"PK") else ""
        raise CheckpointError(f"{path}: {kind}not a checkpoint of gradmix, its closing digest is missing; {way_out}")
    if _seal_of(body) != seal:
        raise CheckpointError(f"{path}: the checkpoint is damaged, its bytes do not match its digest; {way_out}")


def _check_content(content: Any, path: Path) -> None:
    """Raise a CheckpointError unless the file holds what :func:`save` writes."""
    kinds = {"format": (int,), "gradmix": (str,), "run": (str, type(None)), "state": (dict,)}
    if (
        type(content) is not dict
        or not set(content) >= set(kinds)
        or not all(type(content[name]) in allowed for name, allowed in kinds.items())
    ):
        raise CheckpointError(
            f"{path}: whole, but it holds something else than a checkpoint; remove the file to start the run again"
        )


def _plain(value: Any, key: str) -> Any:
    """A copy of ``value`` in plain types; tensors are shared where that costs nothing."""
    # By exact type: a subclass (NumPy's float64, torch.__version__, a named tuple) would not be read back as itself.
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple):
        return kind(_plain(item, f"{key}[{index}]") for index, item in enumerate(value))
    if kind in (dict, OrderedDict):
        for name in value:
            if type(name) not in (str, int):
                raise TypeError(f"{key}: got a key {name!r} ({type(name).__name__}), expected str or int")
        return {name: _plain(item, f"{key}[{name!r}]") for name, item in value.items()}
    if kind in (Tensor, nn.Parameter):
        if value.layout is not torch.strided or value.is_meta:
            raise TypeError(f"{key}: got a tensor of layout {value.layout} on {value.device}, expected dense values")
        value = value.detach()
        whole = value.untyped_storage().nbytes() <= value.numel() * value.element_size()
        return value if whole else value.clone()
    raise TypeError(
        f"{key}: got {kind.__module__}.{kind.__qualname__}, expected a tensor, str, int, float, bool, None, or a list, "
        "tuple or dict of them"
    )


def _differences(there: str, here: str) -> str:
    """Lines that only one of two texts has, in words."""
    before, now = _full_lines(there), _full_lines(here)
    sides = {
        "the checkpoint": [line for line in before if line not in now],
        "this run": [line for line in now if line not in before],
    }
    return "; ".join(f"{side} has {_quote(lines)}" for side, lines in sides.items() if lines) or "the lines' order"


def _quote(lines: list[str]) -> str:
    more = f" and {len(lines) - _LINES_SHOWN} more" if len(lines) > _LINES_SHOWN else ""
    return ", ".join(f"'{line}'" for line in lines[:_LINES_SHOWN]) + more


def _full_lines(text: str) -> list[str]:
    """The lines of a text; of YAML or JSON, each is led by the sections it stands in: ``optim.lr: 0.1``."""
    full: list[str] = []
    sections: list[tuple[int, str]] = []
    for line in text.splitlines():
        words = line.strip().rstrip(",").replace('"', "")
        depth = len(line) - len(line.lstrip())
        while sections and sections[-1][0] >= depth:
            sections.pop()
        if words.endswith((":", "{", "[")):
            sections.append((depth, words.rstrip(":{[ ")))
        elif words.strip("}]"):
            full.append(".".join([name for _, name in sections if name] + [words]))
    return full
