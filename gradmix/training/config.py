"""The configuration of a run: typed, complete, and the same on the command line and in ``config.yaml``.

A field that is ``None`` is filled from the benchmark's protocol
(:func:`~gradmix.training.streams.benchmarks.resolve`). In a resolved configuration only those fields are ``None`` for
which it has a meaning of its own.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from gradmix._moved import alias_argument, alias_attribute
from gradmix.runtime.validation import did_you_mean
from gradmix.training.former_keys import current_keys
from gradmix.training.method_names import COMPOSITIONS, choices, current_name

MethodName: TypeAlias = str
"""A method's name, a key of :data:`gradmix.training.method_names.COMPOSITIONS`."""
BENCHMARK_NAMES = (
    "split-digits",
    "split-mnist",
    "split-fashion-mnist",
    "split-cifar10",
    "split-cifar100",
    "split-tiny-imagenet",
    "split-imagenet",
    "image-folder",
    "split-20newsgroups",
    "text-folder",
    "split-descriptions",
    "split-covertype",
    "split-wine",
    "arrays",
)
"""Keys of :data:`gradmix.training.streams.benchmarks.BENCHMARKS`."""
MODEL_NAMES = (
    "mlp",
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet18",
    "resnet18-imagenet",
    "resnet50",
    "vit-tiny",
    "vit-b16",
    "text-transformer",
)
"""Names of :mod:`gradmix.training.models`."""


@dataclass(frozen=True)
class DataConfig:
    """The data set, and the order in which its classes are learnt."""

    benchmark: str = "split-digits"
    """The data set, cut into tasks that each bring new classes. Images: split-digits, split-mnist, split-fashion-mnist,
    split-cifar10, split-cifar100; read from files: split-tiny-imagenet, split-imagenet, image-folder. Texts:
    split-20newsgroups, text-folder, split-descriptions. Tables: split-covertype, split-wine.
    One's own: arrays, a file of x_train, y_train, x_test, y_test (.npz or .safetensors) given as data_dir. Or
    package.module:function, which is called with this section and returns the stream."""
    data_dir: Path = Path("data")
    """Where the data lie, in their standard layout (what comes with scikit-learn needs none)."""
    class_order_seed: int | None = None
    """Shuffles the order in which classes arrive; None: in the order of their labels. Apart from the training seeds."""
    validation: float = 0.0
    """Share of each class's training samples held out and scored in place of the test set, for choosing settings."""
    tasks: int | None = None
    """Stop after this many tasks; the classes of later ones are left out. None: all of them."""
    normalise: bool | None = None
    """Subtract the data set's mean pixel and divide by its standard deviation, by channel; otherwise pixels are in
    [0, 1]. None: the benchmark's own: yes for CIFAR."""
    samples_per_class: int | None = None
    """Keep this many training samples of each class, the first ones. None: all of them."""
    classes_per_task: int | None = None
    """New classes in each task; the last may have fewer. None: the benchmark's."""
    online: bool = False
    """One pass over a stream without known boundaries: the buffer takes in each step's samples after the step, and
    nothing but the scoring knows where a task ends."""
    blur: float | None = None
    """Standard deviation, in tasks, by which samples stray from the place of their task in the stream, so that tasks
    pass over into each other. None: not at all."""
    image_size: int | None = None
    """Side in pixels of the images that the model sees, where they are read from files. None: the benchmark's."""
    workers: int | None = None
    """Processes that read samples from files; 0: none but the training's own. None: one for each processor but one, at
    most 16, shared by the run's processes on one machine."""
    skip_damaged: bool = False
    """Leave out files that cannot be decoded, and name them; otherwise the first one ends the run."""

    rows_per_class = alias_attribute("DataConfig", "rows_per_class", "samples_per_class")


_accept_former = alias_argument("DataConfig", "rows_per_class", "samples_per_class")
DataConfig.__init__ = _accept_former(DataConfig.__init__)  # type: ignore[method-assign]


@dataclass(frozen=True)
class OptimConfig:
    """Model and optimiser; what is not given is taken from the benchmark's protocol."""

    model: str | None = None
    """mlp: two hidden layers of 256; resnet8, resnet20, resnet32: the narrow ones made for CIFAR; resnet18: the wide
    one, with a stem for small images; resnet18-imagenet, resnet50: with the stem for large ones; vit-tiny, vit-b16:
    vision transformers; text-transformer: a small one for texts; torchvision:NAME, timm:NAME, transformers:NAME, or
    package.module:callable: any other."""
    lr: float | None = None
    """Learning rate of SGD."""
    momentum: float | None = None
    """Momentum of SGD."""
    weight_decay: float | None = None
    """Weight decay of SGD."""
    lr_milestones: tuple[float, ...] | None = None
    """Shares of a task's epochs after which the learning rate is divided by ten, e.g. 0.5 0.75."""
    epochs: int | None = None
    """Epochs per task; with data.online there is one."""
    batch: int | None = None
    """Samples of the current task in a step, over all processes if there are several."""
    augment: Literal["none", "crop-flip", "resized-crop-flip"] | None = None
    """crop-flip: padded random crop and horizontal flip of every training sample; resized-crop-flip: a random part of
    the image, scaled to the model's size, and a flip."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Automatic mixed precision of the forward passes; fp16 with a loss scale that adapts itself."""
    channels_last: bool = False
    """Keep images and convolutions in channels-last layout, which GPUs' half-precision convolutions want."""
    compile: bool = False
    """Compile the model by torch.compile."""
    accumulate: int | None = None
    """Forward and backward passes a step is made in, each of a part of its samples, to save memory; pairs are chosen
    among all of them. None: one pass."""
    growing_head: bool = False
    """Begin with a classifier for the first task's classes, which grows as classes arrive; otherwise it has an output
    for every class from the start."""


@dataclass(frozen=True)
class ReplayConfig:
    """The replay buffer; what is not given is taken from the benchmark's protocol."""

    policy: Literal["class", "balanced", "reservoir"] | None = None
    """class: a fixed number per class; balanced: a fixed total, shared equally by the classes seen; reservoir: a
    uniform sample of everything seen."""
    size: int | None = None
    """Samples kept: per class for policy class, in total otherwise."""
    batch: int | None = None
    """Replayed samples in a step, over all processes if there are several."""
    tau: float = 1.0
    """Weight of the replayed samples' loss: loss = CE(current) + tau * CE(replayed)."""
    stream: Literal["dual", "shuffled"] | None = None
    """dual: every step holds current and replayed samples, in fixed numbers; shuffled: the current task's samples and
    the buffer's are shuffled into one stream, of which a step takes the next samples, all of one weight. None: the
    benchmark's: shuffled for split-digits, otherwise dual."""
    distillation: float | None = None
    """Weight of DER++'s squared error between the logits of replayed samples and those kept with them. None: the
    method's own: 0.5 for der++ and what builds on it, nothing for others."""
    storage: Literal["memory", "disk"] | None = None
    """Where the buffer's samples lie: memory; or disk, beside the run's checkpoint. None: in memory; of samples that
    are read from files, which they are, to be read again (online: the samples)."""


@dataclass(frozen=True)
class MixConfig:
    """The mixing of samples and the selection of pairs."""

    alpha: float = 1.0
    """The mixing weight is drawn from Beta(alpha, alpha), one per step."""
    originals: bool = False
    """Train on the unmixed samples too, half the weight each; the selection then reuses their forward pass (but not a
    compiled one's)."""
    estimator: Literal["auto", "feature", "mixed", "jvp", "sketch"] | None = "auto"
    """For the last layer's gradient feature: mixed in feature space, no forward pass of its own; mixed: real mixed
    inputs are forwarded. For all parameters' jvp: real mixed inputs, exactly; sketch: sketched gradients of samples,
    decisions in doubt checked by jvp. auto: feature. Nothing (null) is the default of earlier versions: mixed for
    gradmix-class, feature for gradmix-sample."""
    policy: Literal["uniform", "permute", "best"] = "uniform"
    """How a partner is chosen: uniform over the helpful ones; permute: one at random, kept if helpful; best aligned."""
    threshold: float = 0.0
    """A pair is helpful if its cosine with the reference gradient is at least this; 0 is an angle of 90 degrees."""
    refresh: int | None = None
    """Steps between two computations of the reference gradient (and class table); 0: once per epoch. None: the method's
    own: 0 for gradmix-class (20 with data.online), 1 for gradmix-sample."""
    candidates: Literal["batch", "balanced", "replayed"] = "batch"
    """Where partners come from: batch: the step's own samples; balanced: a class-balanced draw from the current task
    and the buffer; replayed: the step's replayed samples."""
    class_samples: int = 32
    """Samples per class behind a class-pair decision."""
    control: Literal[
        "none",
        "random",
        "random-partner",
        "partner-class",
        "replayed-partner",
        "learnt",
        "anti",
        "small-gradient",
        "large-gradient",
    ] = "none"
    """What a selective method is held against: random: as many samples as it would mix, any samples, with any partners;
    random-partner: the same samples with any partners; partner-class: with any of the class of the partner chosen;
    replayed-partner: with any of the buffer's classes; learnt: its own pairs, of samples that the network gets right by
    now; anti: detrimental partners only; small-gradient, large-gradient: as many pairs, by the norm of the mixture's
    gradient."""
    control_rate: float | None = None
    """Share of a step's samples that the control random mixes. None: as many as would be in that very step."""
    reference: Literal["auto", "buffer", "replayed"] | None = "auto"
    """buffer: the reference gradient is that of the whole buffer; replayed: that of the step's replayed samples, which
    costs no pass over the buffer. auto: replayed where samples are read from files, and for gradmix-sample with
    mix.refresh 1 and replay.stream dual; else buffer. Nothing (null) is the default of earlier versions:
    replayed where samples are read from files, else buffer."""
    remix_labels: bool = False
    """Label the pairs that gradmix-class and gradmix-sample select as remix does: by the rarer class alone where that
    has more than half of the weight, and the other one at least three times as many samples."""
    space: Literal["embedding", "feature"] | None = None
    """Where samples are mixed that cannot be mixed themselves: embedding: where the model says; feature: at the input
    of its classifier. None: the inputs are mixed, unless they are texts."""


@dataclass(frozen=True)
class TrainConfig:
    """Class-incremental training with replay, by one or several methods over several seeds."""

    methods: tuple[MethodName, ...] = ("er", "mixup", "gradmix-class", "gradmix-sample")
    """finetune: no replay; er: experience replay; a-gem: projected gradients; der++: replay with kept logits;
    autoaugment, randaugment, trivialaugment: replay, augmented by policy; mixup: replay, random partners;
    manifold-mixup, cutmix, remix, balanced-mixup: variants of it; gradmix-class: partners selected by class pair;
    gradmix-sample: partners selected sample by sample. der++, a policy and a way of mixing can be combined, in this
    order: der++-gradmix-class, trivialaugment-mixup, der++-trivialaugment-cutmix."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Training seeds: initial weights, batches, buffer and mixing."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    device: str = "auto"
    """auto: a GPU if there is one; or a torch device such as cpu or cuda:0."""
    threads: int | None = None
    """CPU threads for torch; None: one for the model mlp, torch's own choice for others and under OMP_NUM_THREADS."""
    checkpoint: float = 60.0
    """Seconds between two checkpoints, from which an interrupted run goes on; 0: none are kept."""
    output: Path | None = None
    """Run folder, new or empty; None: runs/BENCHMARK-DATE-TIME."""

    def __post_init__(self) -> None:
        methods = tuple(current_name(name, stacklevel=4) for name in self.methods)
        if methods != self.methods:
            object.__setattr__(self, "methods", methods)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Turn a configuration into nested dictionaries of plain values, the form ``config.yaml`` has."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return plain


def from_dict(values: Mapping[str, Any], *, saved: bool = False) -> TrainConfig:
    """Build a configuration from nested dictionaries; what is missing takes its default.

    Args:
        values: the dictionaries.
        saved: whether they are the record of a run, in which former names are no reason for a warning.

    Raises:
        ValueError: A key is unknown, or a value has the wrong type or is out of range. The message names the key, the
            value given and what is expected.
    """
    values = current_keys(values, warn=not saved)
    if saved and isinstance(values, Mapping) and isinstance(values.get("replay"), Mapping):
        # Runs from before the setting was recorded.
        values = {**values, "replay": {"stream": "dual", **values["replay"]}}
    if isinstance(values, Mapping) and isinstance(values.get("methods"), (list, tuple)):
        values = {**values, "methods": _method_names(values["methods"], warn=not saved)}
    config = _build(TrainConfig, values, "")
    check(config)
    return config


def to_yaml(config: TrainConfig) -> str:
    """Render a configuration as YAML, every field written out."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes lists on one line and mappings in blocks."""

    Dumper.add_representer(list, lambda d, v: d.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))
    return str(yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True))


def from_yaml(text: str, *, saved: bool = False) -> TrainConfig:
    """Read a configuration from YAML; what is missing takes its default, and ``saved`` is that of :func:`from_dict`.

    Raises:
        ValueError: The text is no YAML mapping, or :func:`from_dict` refuses it.
    """
    values = parse_yaml(text)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(f"got {_show(values)} at the top, expected a mapping of {_names(TrainConfig)}")
    return from_dict(values, saved=saved)


def parse_yaml(text: str) -> Any:
    """Read plain values from YAML.

    Raises:
        ValueError: The text is no YAML; the message, of one line, says where.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"no valid YAML: {' '.join(str(error).split())}") from error


def load_config(path: str | Path, *, saved: bool = False) -> TrainConfig:
    """Read a configuration file; ``saved`` is that of :func:`from_dict`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not UTF-8, or :func:`from_yaml` refuses it; the message begins with the path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        return from_yaml(path.read_text(encoding="utf-8"), saved=saved)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check(config: TrainConfig) -> None:
    """Refuse values that no run can have.

    Raises:
        ValueError: Naming the key, the value given and what is expected.
    """
    for key, expected, holds in _RANGES:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}: got {_show(value)}, expected a finite number")
        if value is not None and not holds(value):
            raise ValueError(f"{key}: got {_show(value)}, expected {expected}")
    for key, name, names, other in (
        ("data.benchmark", config.data.benchmark, BENCHMARK_NAMES, "package.module:function"),
        ("optim.model", config.optim.model, MODEL_NAMES, "package.module:callable"),
    ):
        if name is not None and ":" not in name and name not in names:
            expected = f"expected one of {', '.join(names)}; or {other}"
            raise ValueError(f"{key}: got {_show(name)}, {expected}{did_you_mean(name, names)}")
    if config.mix.candidates == "replayed" and config.replay.stream == "shuffled":
        raise ValueError(
            "mix.candidates: got 'replayed' with replay.stream 'shuffled', expected 'batch' or 'balanced': replayed "
            "samples are not distinguished in one stream"
        )
    if config.data.online and config.optim.epochs not in (None, 1):
        raise ValueError(
            f"optim.epochs: got {_show(config.optim.epochs)} with data.online, expected 1 or nothing: samples come once"
        )
    if config.data.online and config.replay.stream == "shuffled":
        raise ValueError(
            "replay.stream: got 'shuffled' with data.online, expected 'dual': the samples to come are not known"
        )
    if config.mix.control_rate is not None and config.mix.control != "random":
        raise ValueError(
            f"mix.control_rate: got {_show(config.mix.control_rate)} with mix.control {config.mix.control!r}, expected "
            "nothing, or the control 'random', which alone is given a rate"
        )


def _is_increasing(values: tuple[float, ...]) -> bool:
    return all(0 < v < 1 for v in values) and all(a < b for a, b in pairwise(values))


def _distinct(values: tuple[Any, ...]) -> bool:
    return 0 < len(values) == len(set(values))


_RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("methods", "at least one method, none of them twice", _distinct),
    ("seeds", "at least one seed, none of them twice", _distinct),
    ("seeds", "integers of at least 0", lambda v: min(v) >= 0),
    ("data.class_order_seed", "an integer of at least 0", lambda v: v >= 0),
    ("data.validation", "a share from 0 to less than 1", lambda v: 0 <= v < 1),
    ("data.tasks", "an integer of at least 1", lambda v: v >= 1),
    ("data.samples_per_class", "an integer of at least 1", lambda v: v >= 1),
    ("data.classes_per_task", "an integer of at least 1", lambda v: v >= 1),
    ("data.image_size", "an integer of at least 8", lambda v: v >= 8),
    ("data.workers", "an integer of at least 0", lambda v: v >= 0),
    ("data.blur", "a number of tasks above 0", lambda v: v > 0),
    ("optim.accumulate", "an integer of at least 2, or nothing", lambda v: v >= 2),
    ("optim.lr", "a number above 0", lambda v: v > 0),
    ("optim.momentum", "a number from 0 to less than 1", lambda v: 0 <= v < 1),
    ("optim.weight_decay", "a number of at least 0", lambda v: v >= 0),
    ("optim.lr_milestones", "increasing shares between 0 and 1", _is_increasing),
    ("optim.epochs", "an integer of at least 1", lambda v: v >= 1),
    ("optim.batch", "an integer of at least 1", lambda v: v >= 1),
    ("replay.size", "an integer of at least 1", lambda v: v >= 1),
    ("replay.batch", "an integer of at least 1", lambda v: v >= 1),
    ("replay.tau", "a number of at least 0", lambda v: v >= 0),
    ("replay.distillation", "a number of at least 0", lambda v: v >= 0),
    ("mix.alpha", "a number above 0", lambda v: v > 0),
    ("mix.threshold", "a cosine from -1 to 1", lambda v: -1 <= v <= 1),
    ("mix.refresh", "an integer of at least 0", lambda v: v >= 0),
    ("mix.class_samples", "an integer of at least 1", lambda v: v >= 1),
    ("checkpoint", "a number of seconds, or 0", lambda v: v >= 0),
    ("mix.control_rate", "a share from 0 to 1", lambda v: 0 <= v <= 1),
    ("device", "a device's name, such as auto, cpu or cuda:0", lambda v: bool(v.strip())),
    ("threads", "an integer of at least 1", lambda v: v >= 1),
)

# YAML 1.1 reads 1e-3, which has no dot, as a string.
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")

_T = TypeVar("_T")


def _method_names(names: Sequence[Any], *, warn: bool) -> list[Any]:
    """Put current names in the place of former ones, and refuse unknown ones; other types are refused later."""
    current = [current_name(name, warn=warn, stacklevel=4) if isinstance(name, str) else name for name in names]
    for index, name in enumerate(current):
        if name not in COMPOSITIONS:
            raise ValueError(f"methods[{index}]: got {_show(name)}, {choices(name)}")
    return current


def _build(cls: type[_T], values: Any, key: str) -> _T:
    if not isinstance(values, Mapping):
        raise ValueError(f"{key}: got {_show(values)}, expected a mapping of {_names(cls)}")
    hints = get_type_hints(cls)
    prefix = f"{key}." if key else ""
    for name in values:
        if name not in hints:
            nested = (f"{s}.{n}" for s, kind in hints.items() if is_dataclass(kind) for n in get_type_hints(kind))
            near = did_you_mean(name, [*hints, *nested])
            raise ValueError(f"{prefix}{name}: unknown key, expected one of {_names(cls)}{near}")
    return cls(**{name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _convert(kind: Any, value: Any, key: str) -> Any:
    """Check ``value``, as YAML gives it, against the type ``kind`` and return it in that type."""
    if is_dataclass(kind) and isinstance(kind, type):
        return _build(kind, value, key)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = (a for a in args if a is not type(None))
        return _convert(inner, value, key)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}: got {_show(value)}, expected a list")
        return tuple(_convert(args[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if not (isinstance(value, str) and value in args):
            raise ValueError(f"{key}: got {_show(value)}, expected one of {', '.join(args)}{did_you_mean(value, args)}")
        return value
    if kind is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    accepted, expected = _SCALARS[kind]
    fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if not fits or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{key}: got {_show(value)}, expected {expected}")
    return kind(value)


_SCALARS: dict[Any, tuple[Any, str]] = {
    float: ((int, float), "a finite number"),
    int: (int, "an integer"),
    bool: (bool, "true or false"),
    Path: ((str, Path), "a path"),
    str: ((str, Path), "a string"),
}
"""What a value of each type may be in YAML, and how an error calls it."""


def _show(value: Any) -> str:
    return "nothing (null)" if value is None else f"{value!r} ({type(value).__name__})"


def _names(cls: type) -> str:
    return ", ".join(get_type_hints(cls))
