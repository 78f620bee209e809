"""The flags of ``gradmix train``, made from the fields of the configuration."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import tyro
from tyro.conf import arg

from gradmix.cli.errors import UsageError
from gradmix.runtime.validation import did_you_mean

if TYPE_CHECKING:
    from gradmix.training.config import TrainConfig

# The parser wraps no paragraph, so each is short enough by itself.
_DESCRIPTION = """\
Train methods class-incrementally, over several seeds, and compare them.

With nothing given, er, mixup and both GradMix learn digits, few of them old."""

_METAVARS = {"methods": "METHOD [METHOD ...]", "data_dir": "FOLDER", "output": "FOLDER"}


def parse_train(args: list[str]) -> TrainConfig:
    """Parse the flags of ``train``; the others are taken from ``--config``, or have their defaults.

    Raises:
        FileNotFoundError: There is no such configuration file.
        ValueError: The configuration file is refused.
        UsageError: A flag is unknown.
        SystemExit: A flag's value is refused, or help was asked for; the parser has said so.
    """
    from gradmix.training.config import TrainConfig, load_config

    args = [_current_flag(flag) for flag in args]
    refuse_unknown_flags("train", args, _flag_names())
    file = _config_file(args)
    base = TrainConfig() if file is None else load_config(file)
    parsed: Any = tyro.cli(
        _flags_of(base),
        prog="gradmix train",
        description=_DESCRIPTION,
        args=args,
        config=(tyro.conf.DisallowNone,),
    )
    return _from_flags(base, parsed)


_ELSEWHERE = {
    "learning-rate": "lr",
    "buffer": "replay-size",
    "buffer-size": "replay-size",
    "memory-size": "replay-size",
    "dataset": "benchmark",
}
"""Names that other programs have, and no flag's name is near; or only that of a flag of another meaning."""


def refuse_unknown_flags(command: str, args: Sequence[str], known: Sequence[str]) -> None:
    """Refuse the first flag that a command does not have, with the one that is nearest.

    Args:
        command: The command, for the error.
        args: Its arguments.
        known: Names of its flags, without the hyphens at their beginning.

    Raises:
        UsageError: A flag is unknown.
    """
    for flag in args:
        name = flag[2:].partition("=")[0].replace("_", "-")
        own = name in known or name.removeprefix("no-") in known
        if not flag.startswith("--") or not name or own or name == "help" or name.startswith("tyro-"):
            continue
        near = did_you_mean(f"--{name}", [f"--{other}" for other in known])
        if name in _ELSEWHERE and _ELSEWHERE[name] in known:
            near = f"; did you mean '--{_ELSEWHERE[name]}'?"
        raise UsageError(
            f"{command}: got the unknown flag --{name}, expected one of those of gradmix {command} --help{near}"
        )


def _flag_names() -> list[str]:
    from gradmix.training.config import TrainConfig

    base = TrainConfig()
    names = [item.name for item in (*fields(_Start), *fields(base)) if item.name not in PREFIXES]
    names += [prefix + item.name for section, prefix in PREFIXES.items() for item in fields(getattr(base, section))]
    return [name.replace("_", "-") for name in names]


def _current_flag(flag: str) -> str:
    """Return a flag under its present name, with a warning if it was given by a former one."""
    from gradmix.training.former_keys import FORMER_KEYS
    from gradmix.training.method_names import FormerNameWarning

    name, equals, value = flag.partition("=")
    current = FORMER_KEYS.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
    if current is None:
        return flag
    current = f"--{current.replace('_', '-')}"
    warnings.warn(f"{name} is now called {current}", FormerNameWarning, stacklevel=2)
    return current + equals + value


def _config_file(args: list[str]) -> str | None:
    """Find ``--config`` before the other flags are parsed, since it changes their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="gradmix train")
    parser.add_argument("--config", metavar="FILE")
    found = parser.parse_known_args(args)[0].config
    return None if found is None else str(found)


@dataclass(frozen=True)
class _Start:
    """Flags that say where to start from."""

    config: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Configuration to start from, such as the config.yaml of a run folder; flags given too override it."""
    resume: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: start anew)")] = None
    """Go on with the unfinished runs of a run folder, with its own
    settings: besides this only --data-dir, --device and --threads may be given."""


# A bare name would say too little in some: replay.batch is --replay-batch.
PREFIXES = {"data": "", "optim": "", "replay": "replay-", "mix": "mix-"}


def _flags_of(base: TrainConfig) -> type:
    """Make the dataclass that tyro turns into flags, with the values of ``base`` as defaults."""
    members = _members(base, "")
    for name, prefix in PREFIXES.items():
        section = getattr(base, name)
        cls = make_dataclass(type(section).__name__.removesuffix("Config"), _members(section, prefix), frozen=True)
        cls.__doc__ = type(section).__doc__
        members.append((name, cls, field(default_factory=cls)))
    return make_dataclass("Train", members, bases=(_Start,), frozen=True)


def _members(section: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    """The fields of a section of the configuration, each with its flag and its help."""
    docs, hints = field_docs(type(section)), get_type_hints(type(section))
    members = []
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            continue
        text, unset = _split_help(docs.get(item.name, ""))
        hint = f"(default: {unset or 'the benchmark' + chr(39) + 's'})" if value is None else None
        flag = arg(
            name=(prefix + item.name).replace("_", "-"),
            prefix_name=False,
            help=text,
            help_behavior_hint=hint,
            metavar=_METAVARS.get(item.name),
        )
        members.append((item.name, Annotated[hints[item.name], flag], field(default=value)))
    return members


def _from_flags(base: TrainConfig, parsed: Any) -> TrainConfig:
    changes: dict[str, Any] = {}
    for item in fields(base):
        section, given = getattr(base, item.name), getattr(parsed, item.name)
        if is_dataclass(section) and not isinstance(section, type):
            given = replace(section, **{f.name: getattr(given, f.name) for f in fields(section)})
        changes[item.name] = given
    return replace(base, **changes)


def _split_help(doc: str) -> tuple[str, str | None]:
    """Split ``None: what it means`` off a field's docstring: the help shows it as the default."""
    # To the end of the sentence: a dot within it belongs to a number or a key.
    found = re.search(r"[;.] None: (.+?)(?:\.(?=\s|$)|$)", doc)
    if found is None:
        return doc, None
    rest = doc[found.end() :].strip()
    return f"{doc[: found.start()]}. {rest}".strip(), found[1]


def field_docs(cls: type) -> dict[str, str]:
    """Collect the docstrings that stand under a dataclass's fields, one line each; a field without one is left out."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in pairwise(body.body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[statement.target.id] = " ".join(following.value.value.split())
    return docs
