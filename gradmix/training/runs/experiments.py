"""Specifications of experiments: methods and settings, over seeds, as one YAML file.

An experiment is a list of arms, each a method with settings of its own; every arm is run with every seed and, if
something is varied, at every value. What an experiment asks for is a list of :class:`Run`. Two runs that ask for the
same training have the same :attr:`Run.folder`, in whatever experiment they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

from gradmix.runtime.validation import did_you_mean
from gradmix.training.config import MethodName, TrainConfig, from_dict, parse_yaml
from gradmix.training.former_keys import current_keys
from gradmix.training.loop.trainer import resolve_config
from gradmix.training.method_names import COMPOSITIONS, choices, current_name, stable_name
from gradmix.training.reports.cells import setting
from gradmix.training.runs.settings import flatten, identity, settings_of

SECTIONS = ("data", "optim", "replay", "mix")
"""Parts of a configuration that an arm may set."""

_BASE = (*SECTIONS, "device", "threads", "checkpoint")
_KEYS = ("title", "about", "seeds", "base", "arms", "vary", "differences", "reference")
_ARM_KEYS = ("name", "method", *SECTIONS)
# Longer names of folders are cut.
_PART_UP_TO = 60
_REFERENCE_KEYS = ("label", "metric", "value", "source", "differs", "arm")


@dataclass(frozen=True)
class Arm:
    """A method with settings of its own.

    Attributes:
        name: Its name in tables and plots.
        method: The method.
        settings: What it sets apart from the base: section, then field.
    """

    name: str
    method: MethodName
    settings: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Reference:
    """A figure published elsewhere, to stand beside the experiment's own.

    Attributes:
        label: What was measured.
        metric: Key of :data:`~gradmix.training.runs.results.METRIC_LABELS`.
        value: The figure, an accuracy in [0, 1].
        source: Where it is published.
        differs: What differs from this experiment's protocol.
        arm: Name of the arm it stands beside; None: no single one.
    """

    label: str
    metric: str
    value: float
    source: str
    differs: str = ""
    arm: str | None = None


@dataclass(frozen=True)
class Run:
    """One training run that an experiment asks for.

    Attributes:
        arm: Name of the arm.
        values: The varied settings' values, by key; empty if nothing is varied.
        config: Resolved and narrowed to one method and one seed.
    """

    arm: str
    values: Mapping[str, Any]
    config: TrainConfig

    @property
    def label(self) -> str:
        """The arm and the varied values, e.g. ``er, replay.size 8``."""
        return label_of(self.arm, self.values)

    @property
    def method(self) -> MethodName:
        """The method."""
        return self.config.methods[0]

    @property
    def seed(self) -> int:
        """The training seed."""
        return self.config.seeds[0]

    @property
    def folder(self) -> Path:
        """The run's folder, relative to the folder of all runs: ``BENCHMARK-METHOD-HASH/seed-K``.

        Like the hash it has the method's :func:`~gradmix.training.method_names.stable_name`, so a run that was made
        before a method was renamed is found.
        """
        benchmark, method = self.config.data.benchmark.replace(":", "-"), stable_name(self.method)
        return Path(f"{benchmark}-{method}-{content_hash(self.config)}") / f"seed-{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """A specification.

    Attributes:
        name: Name of its file, without the suffix.
        title: One line.
        about: One paragraph, for the report.
        seeds: Training seeds.
        base: Settings of all arms, as nested dictionaries.
        arms: The arms.
        vary: Values by setting, at most two settings, e.g. ``{"replay.size": (8, 32)}``.
        differences: Pairs of arms' names, of which the first minus the second is reported.
        references: Figures published elsewhere.
        source: The file as given or the name of a shipped one, to be named in commands.
        part: What :meth:`narrow` made of it, e.g. ``seeds-0-arms-er``; empty: all.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    about: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    base: Mapping[str, Any] = field(default_factory=dict)
    vary: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    differences: tuple[tuple[str, str], ...] = ()
    references: tuple[Reference, ...] = ()
    source: str = ""
    part: str = ""

    @property
    def folder(self) -> Path:
        """The folder of its report, beside the folder of all runs: ``NAME``, or of a part ``NAME/PART``.

        So the report on a few seeds or arms never takes the place of the one on all of them.
        """
        return Path(self.name) / self.part

    @property
    def points(self) -> tuple[dict[str, Any], ...]:
        """The combinations of the varied values; one empty one if nothing is varied."""
        return points_of(self.vary)

    def narrow(self, seeds: Sequence[int] | None = None, arms: Sequence[str] | None = None) -> Experiment:
        """The same with other seeds, or with some of the arms; differences and references of the others go.

        Raises:
            ValueError: There is no such arm; or none, or the same seed or arm twice, is asked for.
        """
        changed = self
        others: dict[str, Sequence[Any]] = {}
        if seeds is not None:
            changed = replace(changed, seeds=_seeds(list(seeds)))
            if set(seeds) != set(self.seeds):
                others["seeds"] = sorted(seeds)
        if arms is not None:
            known = {arm.name: arm for arm in self.arms}
            for name in arms:
                if name not in known:
                    expected = f"expected some of {', '.join(map(repr, known))}"
                    raise ValueError(f"arms: got {name!r}, {expected}{did_you_mean(name, known)}")
            if not arms or len(set(arms)) != len(arms):
                raise ValueError(f"arms: got {list(arms)}, expected at least one, none of them twice")
            changed = replace(
                changed,
                arms=tuple(arm for arm in self.arms if arm.name in arms),
                differences=tuple(pair for pair in self.differences if set(pair) <= set(arms)),
                references=tuple(r for r in self.references if r.arm is None or r.arm in arms),
            )
            if set(arms) != set(known):
                others["arms"] = [arm.name for arm in changed.arms]
        return replace(changed, part="-".join(filter(None, (self.part, _part(others)))))

    def runs(self, **circumstances: Any) -> tuple[Run, ...]:
        """All runs: seeds outermost, so that one seed of everything comes first; then values, then arms.

        Args:
            circumstances: ``device``, ``threads``, ``checkpoint`` or ``data_dir``, in place of the base's.

        Raises:
            ValueError: A setting is refused; the message names the arm, the key, the value given and what is expected.
        """
        made = {
            (arm.name, position): _config(self, arm, point, position, circumstances)
            for position, point in enumerate(self.points)
            for arm in self.arms
        }
        return tuple(
            Run(arm.name, point, replace(made[arm.name, position], seeds=(seed,)))
            for seed in self.seeds
            for position, point in enumerate(self.points)
            for arm in self.arms
        )


def points_of(vary: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], ...]:
    """The combinations of values by key, the last key's changing first; one empty one if there is no key.

    Example:
        >>> points_of({"replay.size": [2, 8]})
        ({'replay.size': 2}, {'replay.size': 8})
    """
    return tuple(dict(zip(vary, values, strict=True)) for values in product(*vary.values()))


def label_of(arm: str, values: Mapping[str, Any]) -> str:
    """The name of an arm at some varied values.

    Example:
        >>> label_of("er", {"replay.size": 8})
        'er, replay.size 8'
    """
    return ", ".join([arm, *(f"{key} {setting(value, ',')}" for key, value in values.items())])


def content_hash(config: TrainConfig) -> str:
    """Return twelve hexadecimal digits that differ between configurations under which something else is learnt.

    Every field of a resolved configuration counts, except the seed, the runtime fields (device, threads, folders) and
    what is off (null, false or ``none``). So a feature added later, which is off in all former runs, leaves their
    hashes as they are, and runs made under a former default keep their hash when the default changes. A method counts
    by its :func:`~gradmix.training.method_names.stable_name`.
    """
    told = {k: v for k, v in flatten(identity(config)) if k != "seed" and not (v is None or v is False or v == "none")}
    text = json.dumps(told, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def protocol(runs: Iterable[Run]) -> dict[str, Any]:
    """The settings that all runs have in common, by key and as plain values; circumstances left out."""
    common: dict[str, Any] | None = None
    for run in runs:
        flat = settings_of(run.config)
        common = flat if common is None else {k: v for k, v in common.items() if flat[k] == v}
    return common or {}


# ------------------------------------------------------------------------------------------------------------- reading


def builtin_titles() -> dict[str, str]:
    """The titles of the experiments that come with the package, by name."""
    return {name: load(name).title for name in _builtin_names()}


def load(name_or_file: str | Path) -> Experiment:
    """Read an experiment that comes with the package, or a file of one's own (any name with a dot or a slash).

    Raises:
        FileNotFoundError: There is no such file, or none of that name is shipped.
        ValueError: The file is no such specification; the message begins with its path or name.
    """
    given = str(name_or_file)
    if Path(given).name == given and "." not in given:
        names = _builtin_names()
        if given not in names:
            raise FileNotFoundError(
                f"{given}: no such experiment, expected one of {', '.join(names)}, or a YAML file"
                f"{did_you_mean(given, names)}"
            )
        text, name = (resources.files("gradmix") / "experiments" / f"{given}.yaml").read_text(encoding="utf-8"), given
    else:
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            text, name = path.read_text(encoding="utf-8"), path.stem
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {error}") from error
    try:
        return from_yaml(text, name, source=given)
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from error


def from_yaml(text: str, name: str, *, source: str = "") -> Experiment:
    """Read a specification, and check every arm at every value before anything could be run.

    Args:
        text: YAML.
        name: The experiment's name, from which its folder is called.
        source: What commands call it; empty: the name.

    Raises:
        ValueError: Naming the key, the value given and what is expected.
    """
    values = current_keys(parse_yaml(text))
    _mapping(values, "the top", _KEYS)
    if name in ("", "runs") or name.startswith("."):
        raise ValueError(f"name: got {name!r}, expected one that can be a folder beside 'runs'")
    base = values.get("base", {})
    _mapping(base, "base", _BASE)
    _sections(base, "base")
    arms = tuple(_arm(value, f"arms[{i}]") for i, value in enumerate(_list(values.get("arms"), "arms")))
    names = [arm.name for arm in arms]
    for one in names:
        if names.count(one) > 1:
            raise ValueError(f"arms: got the name {one!r} twice, expected a name of its own for each")
    experiment = Experiment(
        name=name,
        title=_string(values.get("title"), "title"),
        about=" ".join(_string(values.get("about", "-"), "about").split()) if "about" in values else "",
        seeds=_seeds(_list(values.get("seeds", [0, 1, 2]), "seeds")),
        base=base,
        arms=arms,
        vary=_vary(values.get("vary", {})),
        differences=tuple(
            _difference(value, f"differences[{i}]", names)
            for i, value in enumerate(_list(values.get("differences", []), "differences", empty=True))
        ),
        references=tuple(
            _reference(value, f"reference[{i}]", names)
            for i, value in enumerate(_list(values.get("reference", []), "reference", empty=True))
        ),
        source=source or name,
    )
    runs = experiment.runs()
    first: dict[Path, str] = {}
    for run in runs:
        # The same training under two names would be reported as two results that agree.
        if first.setdefault(run.folder, run.label) != run.label:
            raise ValueError(f"arms: {run.label!r} has the same settings as {first[run.folder]!r}, expected others")
    return experiment


def _builtin_names() -> list[str]:
    files = (resources.files("gradmix") / "experiments").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _part(others: Mapping[str, Sequence[Any]]) -> str:
    """A name of a folder for lists of seeds and arms: readable, and another one for other lists."""
    words = [word for key, listed in others.items() for word in (key, *map(str, listed))]
    plain = [re.sub(r"[^a-z0-9._]+", "_", word.lower()) for word in words]
    told = "-".join(plain)
    if plain == words and len(told) <= _PART_UP_TO:
        return told
    digest = hashlib.blake2b(json.dumps(words).encode(), digest_size=4).hexdigest()
    return f"{told[:_PART_UP_TO]}-{digest}"


def _config(
    experiment: Experiment, arm: Arm, point: Mapping[str, Any], position: int, circumstances: Mapping[str, Any]
) -> TrainConfig:
    values: dict[str, Any] = {key: value for key, value in experiment.base.items() if key not in SECTIONS}
    for section in SECTIONS:
        merged = {**(experiment.base.get(section) or {}), **(arm.settings.get(section) or {})}
        if merged:
            values[section] = merged
    for key, value in point.items():
        section, _, name = key.partition(".")
        if name in (arm.settings.get(section) or {}):
            raise ValueError(f"arms: {arm.name!r} sets {key}, which is varied")
        values.setdefault(section, {})[name] = value
    others = dict(circumstances)
    if "data_dir" in others:
        values.setdefault("data", {})["data_dir"] = str(others.pop("data_dir"))
    try:
        config = from_dict({**values, **others, "methods": [arm.method], "seeds": [experiment.seeds[0]]})
        return resolve_config(config, arm.method, experiment.seeds[0])
    except ValueError as error:
        raise ValueError(f"{label_of(arm.name, point)}: {error}") from error


def _arm(value: Any, key: str) -> Arm:
    _mapping(value, key, _ARM_KEYS)
    name = _string(value.get("name"), f"{key}.name")
    method = value.get("method")
    method = current_name(method) if isinstance(method, str) else method
    if method not in COMPOSITIONS:
        raise ValueError(f"{key}.method: got {method!r}, {choices(method)}")
    _sections(value, key)
    if "benchmark" in value.get("data", {}):
        raise ValueError(f"{key}.data.benchmark: one experiment has one benchmark, expected it in base.data")
    return Arm(name, method, {section: value[section] for section in SECTIONS if section in value})


def _sections(value: Mapping[str, Any], key: str) -> None:
    hints = get_type_hints(TrainConfig)
    for section in SECTIONS:
        _mapping(value.get(section, {}), f"{key}.{section}", tuple(f.name for f in fields(hints[section])))


def _vary(value: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(value, Mapping) or len(value) > 2:
        raise ValueError(f"vary: got {value!r}, expected a mapping of one or two settings to lists of values")
    hints = get_type_hints(TrainConfig)
    for key, values in value.items():
        section, _, name = str(key).partition(".")
        if section not in SECTIONS or name not in {f.name for f in fields(hints[section])}:
            settings = [f"{section}.{f.name}" for section in SECTIONS for f in fields(hints[section])]
            expected = "expected a setting such as replay.size or mix.threshold"
            raise ValueError(f"vary: got {key!r}, {expected}{did_you_mean(key, settings)}")
        if key in ("data.benchmark", "data.data_dir"):
            raise ValueError(f"vary: got {key!r}, which cannot vary within one experiment")
        listed = _list(values, f"vary.{key}")
        if any(isinstance(v, Mapping) for v in listed) or any(v in listed[:i] for i, v in enumerate(listed)):
            raise ValueError(f"vary.{key}: got {listed}, expected values, none of them twice")
    return {str(key): tuple(values) for key, values in value.items()}


def _difference(value: Any, key: str, names: Sequence[str]) -> tuple[str, str]:
    pair = _list(value, key)
    if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(names):
        raise ValueError(f"{key}: got {value!r}, expected two of the arms {', '.join(names)}")
    return pair[0], pair[1]


def _reference(value: Any, key: str, names: Sequence[str]) -> Reference:
    from gradmix.training.runs.results import METRIC_LABELS

    _mapping(value, key, _REFERENCE_KEYS)
    metric, figure, arm = value.get("metric"), value.get("value"), value.get("arm")
    if metric not in METRIC_LABELS:
        expected = f"expected one of {', '.join(METRIC_LABELS)}"
        raise ValueError(f"{key}.metric: got {metric!r}, {expected}{did_you_mean(metric, METRIC_LABELS)}")
    if isinstance(figure, bool) or not isinstance(figure, (int, float)) or not -1 <= figure <= 1:
        raise ValueError(f"{key}.value: got {figure!r}, expected a number from -1 to 1")
    if arm is not None and arm not in names:
        raise ValueError(f"{key}.arm: got {arm!r}, expected one of {', '.join(names)}{did_you_mean(arm, names)}")
    label, source = (_string(value.get(name), f"{key}.{name}") for name in ("label", "source"))
    return Reference(label, metric, float(figure), source, str(value.get("differs", "")), arm)


def _seeds(value: list[Any]) -> tuple[int, ...]:
    whole = all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    if not value or not whole or len(set(value)) != len(value):
        raise ValueError(f"seeds: got {value}, expected integers of at least 0, at least one and none of them twice")
    return tuple(value)


def _mapping(value: Any, key: str, allowed: Sequence[str]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}: got {value!r}, expected a mapping of {', '.join(allowed)}")
    for name in value:
        if name not in allowed:
            expected = f"expected some of {', '.join(allowed)}"
            raise ValueError(f"{key}: got the key {name!r}, {expected}{did_you_mean(name, allowed)}")


def _list(value: Any, key: str, empty: bool = False) -> list[Any]:
    if not isinstance(value, list) or not (value or empty):
        raise ValueError(f"{key}: got {value!r}, expected a list{'' if empty else ', not an empty one'}")
    return value


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: got {value!r}, expected a text")
    return value.strip()
