"""The generated parts of pages, as Markdown: the command's own help, the configuration's keys, the example scripts.

Each function is named in a comment ``<!-- generated FUNCTION ARGUMENTS -->`` of a page; ``conf.py`` calls it.
"""

from __future__ import annotations

import contextlib
import io
import os
import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from unittest import mock

from gradmix.cli import main
from gradmix.cli.flags import PREFIXES, field_docs
from gradmix.training.config import TrainConfig

COLUMNS = "92"
"""Width of the help, in characters: what fits beside the navigation on a page."""


def cli(command: str = "") -> str:
    """Return what ``gradmix COMMAND --help`` prints."""
    out = io.StringIO()
    plain = {"COLUMNS": COLUMNS, "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.dict(os.environ, plain), contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, "--help"] if command else ["--help"])
    lines = [line.rstrip() for line in out.getvalue().strip("\n").splitlines()]
    assert len(lines) > 3, f"gradmix {command} --help printed {lines}"
    return "\n".join(["```text", *lines, "```"])


def examples() -> str:
    """Return the scripts of ``examples/``, each under its name."""
    files = sorted(Path(__file__).parents[1].glob("examples/*.py"))
    return "\n\n".join(f"## {file.name}\n\n```python\n{file.read_text(encoding='utf-8')}```" for file in files)


def config(section: str = "") -> str:
    """Return an entry for each key of a section of the configuration; without a name, of the keys beside them."""
    cls = typing.get_type_hints(TrainConfig)[section] if section else TrainConfig
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    entries = [
        _entry(f"{section}.{item.name}" if section else item.name, _flag(section, item), hints[item.name], item, docs)
        for item in fields(cls)
        if not is_dataclass(hints[item.name])
    ]
    return "\n\n".join(entries)


def _entry(key: str, flag: str, hint: object, item: Field[object], docs: dict[str, str]) -> str:
    default = item.default if item.default is not MISSING else None
    shown = default if isinstance(default, str) else str(default.as_posix() if isinstance(default, Path) else default)
    if isinstance(default, tuple):
        shown = " ".join(map(str, default))
    ends = "none" if default is None else f"`{shown}`"
    return f"### {key}\n\n`{flag}` · {_values(hint)} · default {ends}\n\n{docs[item.name]}"


def _flag(section: str, item: Field[object]) -> str:
    return "--" + (PREFIXES.get(section, "") + item.name).replace("_", "-")


def _values(hint: object) -> str:
    """Name the values of a type, for a reader who knows no Python."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_values(value) for value in arguments if value is not types.NoneType)
    if origin is tuple:
        return f"one or more: {_values(arguments[0])}"
    names = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
    return names[typing.cast(type, hint)]
