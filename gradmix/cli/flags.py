"""The flags of ``gradmix train``, made from the fields of the configuration."""

from __future__ import annotations

import argparse
import re
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

if TYPE_CHECKING:
    from gradmix.training.config import TrainConfig

# The parser wraps no paragraph, so each is short enough by itself.
_DESCRIPTION = """\
Train methods class-incrementally, over several seeds, and compare them.

With nothing given, er, mixup and both GradMix learn scikit-learn's digits."""

_METAVARS = {"methods": "METHOD [METHOD ...]"}


def parse_train(args: list[str]) -> TrainConfig:
    """Parse the flags of ``train``; the others are taken from ``--config``, or have their defaults.

    Raises:
        FileNotFoundError: There is no such configuration file.
        ValueError: The configuration file is refused.
        SystemExit: A flag is refused, or help was asked for; the parser has said so.
    """
    import tyro

    from gradmix.training.config import TrainConfig, load_config

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


def _config_file(args: list[str]) -> str | None:
    """Find ``--config`` before the other flags are parsed, since it changes their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="gradmix train")
    parser.add_argument("--config", metavar="FILE")
    found = parser.parse_known_args(args)[0].config
    return None if found is None else str(found)


def _flags_of(base: TrainConfig) -> type:
    """Make the dataclass that tyro turns into flags, with the values of ``base`` as defaults.

    Names get a prefix where a bare one would say too little: ``replay.batch`` is ``--replay-batch``.
    """
    import tyro

    config_type = Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FILE",
            help="Configuration to start from, such as the config.yaml of a run folder; flags given too override it.",
            help_behavior_hint="(default: none)",
        ),
    ]
    resume_type = Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FOLDER",
            help="Go on with the unfinished runs of a run folder, with its own settings: besides this only --data-dir, "
            "--device and --threads may be given.",
            help_behavior_hint="(default: start anew)",
        ),
    ]
    members: list[Any] = [
        ("config", config_type, field(default=None)),
        ("resume", resume_type, field(default=None)),
    ]
    prefixes = {"data": "", "optim": "", "replay": "replay-", "mix": "mix-"}
    for item in fields(base):
        section = getattr(base, item.name)
        if is_dataclass(section):
            cls = _section(type(section), section, prefixes[item.name])
            members.append((item.name, cls, field(default_factory=cls)))
    top = _section(type(base), base, "", nested=False)
    members[2:2] = [(f.name, get_type_hints(top, include_extras=True)[f.name], f) for f in fields(top)]
    return make_dataclass("Train", [(name, kind, _fresh(default)) for name, kind, default in members], frozen=True)


def _section(cls: type, values: Any, prefix: str, nested: bool = True) -> type:
    """Make a dataclass with the fields of a section of the configuration, each with its flag and its help."""
    import tyro

    from gradmix.training.config import field_docs

    docs, hints = field_docs(cls), get_type_hints(cls)
    members: list[Any] = []
    for item in fields(cls):
        value = getattr(values, item.name)
        if is_dataclass(value):
            continue
        text, unset = _split_help(docs.get(item.name, ""))
        hint = f"(default: {unset or 'the benchmark' + chr(39) + 's'})" if value is None else None
        metavar = _METAVARS.get(item.name) or {Path: "FOLDER"}.get(_bare(hints[item.name]))
        flag = tyro.conf.arg(
            name=(prefix + item.name).replace("_", "-"),
            prefix_name=False,
            help=text,
            help_behavior_hint=hint,
            metavar=metavar,
        )
        members.append((item.name, Annotated[hints[item.name], flag], field(default=value)))
    made = make_dataclass(cls.__name__.removesuffix("Config"), members, frozen=True)
    made.__doc__ = cls.__doc__ if nested else ""
    return made


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


def _bare(hint: Any) -> Any:
    return next((a for a in getattr(hint, "__args__", ()) if a is Path), hint)


def _fresh(default: Any) -> Any:
    # A field belongs to one class only.
    if default.default_factory is not MISSING:
        return field(default_factory=default.default_factory)
    return field(default=default.default)
