"""Whole runs over streams of all kinds: own data and own models, growing heads, one pass online, texts and tables."""

from __future__ import annotations

import re
import tarfile
import types
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resuming import assert_same_result, goes_on_to_the_bit
from thinning import part
from torch import Tensor, nn

import gradmix
from gradmix.estimators import last_layer
from gradmix.replay.buffer import BufferSamples, ReplayBuffer
from gradmix.training.config import (
    DataConfig,
    MixConfig,
    OptimConfig,
    ReplayConfig,
    TrainConfig,
    from_yaml,
    to_dict,
    to_yaml,
)
from gradmix.training.data.augment import as_floats
from gradmix.training.data.tabular import COVERTYPES
from gradmix.training.data.texts import NEWSGROUPS
from gradmix.training.loop import sampler
from gradmix.training.loop.clock import Clock
from gradmix.training.loop.run import Run
from gradmix.training.loop.trainer import Progress, resolve_config, train_one
from gradmix.training.methods import METHODS, Context, Passes, StepSamples
from gradmix.training.models import build_model
from gradmix.training.runs.experiments import content_hash
from gradmix.training.streams import TaskStream, class_incremental
from gradmix.training.streams.benchmarks import make_stream, resolve, stream_of
from gradmix.training.streams.protocols import Protocol

PER_CLASS, CLASSES, WIDTH, BATCH = 10, 6, 5, 7
# 20 rows a task: three steps, the last of six rows.
STEPS_PER_EPOCH, TASKS = 3, 3


class Own:
    """A data set as a user writes it: rows of numbers around a centre of their class, labels that are no range."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = [3 + 2 * (n % CLASSES) for n in range(PER_CLASS * CLASSES)]
        centres = torch.randn(99, WIDTH, generator=torch.Generator().manual_seed(9))
        self.x = torch.stack([2 * centres[y] + torch.randn(WIDTH, generator=generator) for y in self.targets])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.x[index].numpy(), self.targets[index]


class Net(nn.Module):
    """A user's network, whose classifier is not its last child."""

    def __init__(self, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.classify = nn.Linear(12, num_classes)
        self.body = nn.Sequential(nn.Linear(input_shape[0], 12), nn.Tanh(), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.body(x))


def own_stream(_data: DataConfig | None = None) -> TaskStream:
    return class_incremental(Own(0), Own(1), tasks=TASKS, in_memory=True, class_order_seed=4)


MODULE = {"Net": Net, "stream": own_stream, "number": 3, "nothing": lambda _data: None, "nested": Own}


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's, ``own.things``."""
    package, module = types.ModuleType("own"), types.ModuleType("own.things")
    package.__path__ = []  # type: ignore[attr-defined]
    vars(module).update(MODULE)
    monkeypatch.setitem(__import__("sys").modules, "own", package)
    monkeypatch.setitem(__import__("sys").modules, "own.things", module)


@pytest.fixture(scope="module")
def stream() -> TaskStream:
    return own_stream()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs made, which can be looked into."""
    runs: list[Any] = []
    make = Run.__init__

    def note(self: Any, *args: Any) -> None:
        make(self, *args)
        runs.append(self)

    monkeypatch.setattr(Run, "__init__", note)
    return runs


OPTIM = OptimConfig(epochs=2, batch=BATCH, lr=0.05, momentum=0.9, model="mlp")
BASE = TrainConfig(optim=OPTIM, replay=ReplayConfig(size=4, batch=5), threads=1)
ONLINE = replace(
    BASE,
    data=DataConfig(online=True, blur=0.3),
    optim=replace(OPTIM, epochs=None, growing_head=True, lr_milestones=(0.5,)),
)

# ------------------------------------------------------------------------------------------ own data and own models

GROWING: dict[str, tuple[str, dict[str, Any]]] = {
    "er": ("er", {}),
    "a-gem": ("a-gem", {}),
    "der++": ("der++", {}),
    "der++ with gradmix by class": ("der++-gradmix-class", {"mix": MixConfig(estimator="feature")}),
    "gradmix by class, mixed inputs": ("gradmix-class", {}),
    "by sample, originals": ("gradmix-sample", {"mix": MixConfig(originals=True)}),
    "by sample, replayed reference": ("gradmix-sample", {"mix": MixConfig(reference="replayed")}),
    "by sample, balanced candidates": ("gradmix-sample", {"mix": MixConfig(candidates="balanced")}),
    "in feature space": ("gradmix-sample", {"mix": MixConfig(space="feature")}),
    "remix": ("remix", {}),
    "manifold-mixup": ("manifold-mixup", {}),
}


QUICK = ("er", "der++ with gradmix by class", "by sample, replayed reference")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in GROWING]
)
def test_own_data_and_model_with_a_growing_head(
    case: str, own_module: None, stream: TaskStream, made: list[Any], tmp_path: Path
) -> None:
    method, settings = GROWING[case]
    config = replace(BASE, optim=replace(OPTIM, model="own.things:Net", growing_head=True), **settings)
    widths: list[int] = []
    optimisers: list[Any] = []

    def look(_progress: Progress) -> None:
        widths.append(made[0].model.classify.out_features)
        optimisers.append(made[0].optimiser)
        moments = optimisers[-1].state[made[0].model.classify.weight]["momentum_buffer"]
        assert moments.shape == made[0].model.classify.weight.shape

    result = train_one(config, method, 1, stream=stream, on_step=look)
    per_task = 2 * STEPS_PER_EPOCH
    assert widths == [2] * per_task + [4] * per_task + [6] * per_task
    assert len({id(optimiser) for optimiser in optimisers}) == TASKS, "a new one for each task"
    assert result.status == "complete" and result.benchmark == "custom"
    assert np.all(result.accuracy[np.triu_indices(TASKS, 1)] == 0), "no output, no answer"
    assert result.accuracy[-1].mean() > 0.3, "better than one of six"
    if "gradmix" in method:
        assert [len(record.classes) for record in result.alignments] == [4, 6]
    goes_on_to_the_bit(config, method, stream, tmp_path, [2, per_task, per_task + 1, per_task + 4, 3 * per_task])


def test_a_growing_head_starts_as_the_wide_one_would_not(stream: TaskStream, made: list[Any]) -> None:
    train_one(replace(BASE, optim=replace(OPTIM, growing_head=True)), "er", 1, stream=stream)
    train_one(BASE, "er", 1, stream=stream)
    grown, wide = (run.model.head.weight for run in made)
    assert grown.shape == wide.shape and not torch.equal(grown, wide)


@pytest.mark.parametrize("method", ["er", "der++", "gradmix-class", "gradmix-sample", "der++-gradmix-sample"])
def test_bytes_in_memory_reach_every_part_of_a_run_as_floats(method: str, made: list[Any]) -> None:
    """Images kept as bytes, larger than the model sees them: buffer, reference gradient and kept logits included."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (40, 3, 10, 10), generator=generator, dtype=torch.uint8)
    y = torch.arange(40) % 4
    options: dict[str, Any] = {"tasks": 2, "mean": (0.4,) * 3, "std": (0.3,) * 3}
    small = x[:, :, 1:9, 1:9]
    config = replace(BASE, mix=MixConfig(estimator="feature"))
    results = [
        train_one(config, method, 0, stream=stream)
        for stream in (
            class_incremental((x, y), (x, y), input_shape=(3, 8, 8), **options),
            class_incremental(*[(as_floats(small, (0.4,) * 3, (0.3,) * 3), y)] * 2, tasks=2),
        )
    ]
    assert made[0].buffer.x.dtype == torch.uint8 and made[0].buffer.x.shape[1:] == (3, 10, 10)
    for one, other in zip(made[0].model.parameters(), made[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert results[0].accuracy.tolist() == results[1].accuracy.tolist()


# ------------------------------------------------------------------------------------------ streams by import path


def test_a_function_makes_the_stream_and_a_class_the_model(own_module: None) -> None:
    config = replace(BASE, data=DataConfig(benchmark="own.things:stream"), optim=replace(OPTIM, model="own.things:Net"))
    made = train_one(config, "gradmix-sample", 0)
    assert made.status == "complete" and made.config.data.benchmark == "own.things:stream"
    given = train_one(config, "gradmix-sample", 0, stream=own_stream())
    assert_same_result(made, given)
    assert content_hash(made.config) == content_hash(given.config)
    assert resolve(made.config) == made.config and from_yaml(to_yaml(made.config)) == made.config


BAD_PATHS = {
    "absent:stream": "data.benchmark: absent:stream was not found (No module named 'absent'), expected package.module:",
    "own.absent:stream": "data.benchmark: own.absent:stream was not found (No module named 'own.absent')",
    "own.things:absent": "data.benchmark: own.things:absent was not found (module 'own.things' has no attribute 'absen",
    "own.things:": "data.benchmark: own.things: was not found",
    ":stream": "data.benchmark: :stream was not found",
    "own.things:number": "data.benchmark: own.things:number is of type int, expected a function",
}


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_without_a_function_is_refused(path: str, own_module: None) -> None:
    config = replace(BASE, data=DataConfig(benchmark=path))
    for refuse in (lambda: stream_of(config.data), lambda: resolve(config), lambda: train_one(config, "er", 0)):
        with pytest.raises(ValueError, match=re.escape(BAD_PATHS[path])):
            refuse()


def test_a_function_that_makes_something_else_is_refused(own_module: None) -> None:
    with pytest.raises(TypeError, match="data.benchmark: own.things:nothing returned NoneType, expected a TaskStream"):
        stream_of(DataConfig(benchmark="own.things:nothing"))


def test_what_fails_in_the_function_is_not_hidden(own_module: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_data: DataConfig) -> None:
        raise AttributeError("of its own")

    monkeypatch.setitem(vars(__import__("sys").modules["own.things"]), "fails", fail)
    with pytest.raises(AttributeError, match="^of its own$"):
        stream_of(DataConfig(benchmark="own.things:fails"))


# ----------------------------------------------------------------------------------------------------- configuration


def test_a_given_stream_fills_what_is_left_open(stream: TaskStream) -> None:
    own = Protocol(
        None,
        None,
        "mlp",
        0.5,
        3,
        8,
        9,
        2,
        momentum=0.1,
        buffer_policy="balanced",
        space="feature",
        reference="replayed",
    )
    resolved = resolve(TrainConfig(), replace(stream, protocol=own, name="mine"))
    assert resolved.data.benchmark == "stream:mine"
    optim, replay, mix = resolved.optim, resolved.replay, resolved.mix
    assert (optim.lr, optim.epochs, optim.batch, optim.momentum) == (0.5, 3, 8, 0.1)
    assert (replay.policy, replay.size, replay.batch) == ("balanced", 2, 9)
    assert (mix.space, mix.reference) == ("feature", "replayed")
    assert resolve(resolved, replace(stream, protocol=own, name="mine")) == resolved
    other = TrainConfig(replay=ReplayConfig(policy="class"))
    assert resolve(other, replace(stream, protocol=replace(own, buffer_size=60))).replay.size == 60 // CLASSES
    with pytest.raises(ValueError, match="data.benchmark: got 'stream:mine', which stands for a stream that was given"):
        stream_of(resolved.data)
    # A benchmark's own stream is still the benchmark's.
    digits = make_stream("split-digits", samples_per_class=3, tasks=2)
    assert resolve(TrainConfig(), digits).data.benchmark == "split-digits"


FIELDS = {
    "data": {
        "samples_per_class": 3, "classes_per_task": 2, "online": True, "blur": 0.25, "image_size": 32, "workers": 0,
        "skip_damaged": True, "tasks": 2,
    },
    "optim": {"compile": True, "accumulate": 2, "growing_head": True, "model": "own.things:Net", "amp": "fp16"},
    "mix": {
        "reference": "replayed", "space": "feature", "control_rate": 0.5, "control": "random", "remix_labels": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(("section", "name"), [(section, name) for section in FIELDS for name in FIELDS[section]])
def test_every_field_is_written_and_read(section: str, name: str) -> None:
    value = FIELDS[section][name]
    config = TrainConfig()
    changes = {name: value} | ({"control": "random"} if name == "control_rate" else {})
    config = replace(config, **{section: replace(getattr(config, section), **changes)})
    assert config != TrainConfig()
    assert from_yaml(to_yaml(config)) == config
    assert to_dict(config)[section][name] == value


BAD_FIELDS = {
    "accumulate": ("optim: {accumulate: 1}", "optim.accumulate: got 1 (int), expected an integer of at least 2, or"),
    "accumulate nothing": ("optim: {accumulate: 0}", "optim.accumulate: got 0 (int)"),
    "blur": ("data: {blur: 0}", "data.blur: got 0.0 (float), expected a number of tasks above 0"),
    "workers": ("data: {workers: -1}", "data.workers: got -1 (int), expected an integer of at least 0"),
    "image size": ("data: {image_size: 7}", "data.image_size: got 7 (int), expected an integer of at least 8"),
    "classes": ("data: {classes_per_task: 0}", "data.classes_per_task: got 0 (int), expected an integer of at least 1"),
    "reference": (
        "mix: {reference: batch}",
        "mix.reference: got 'batch' (str), expected one of auto, buffer, replayed",
    ),
    "space": ("mix: {space: input}", "mix.space: got 'input' (str), expected one of embedding, feature"),
    "epochs online": ("{data: {online: true}, optim: {epochs: 2}}", "optim.epochs: got 2 (int) with data.online, exp"),
    "shuffled online": (
        "{data: {online: true}, replay: {stream: shuffled}}",
        "replay.stream: got 'shuffled' with data",
    ),
    "a benchmark": ("data: {benchmark: own}", "data.benchmark: got 'own' (str), expected one of split-digits"),
    "a model": ("optim: {model: own}", "optim.model: got 'own' (str), expected one of mlp"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_values_that_no_run_can_have_are_refused(case: str) -> None:
    text, message = BAD_FIELDS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        from_yaml(text)


DUAL = ReplayConfig(stream="dual")
"""The stream of digits before it was shuffled."""


def test_what_is_off_has_no_part_in_the_hash_of_a_run() -> None:
    # Runs made before there were these settings are found again.
    base = resolve_config(TrainConfig(replay=DUAL, mix=MixConfig(estimator=None, reference=None)), "gradmix-class", 0)
    assert content_hash(base) == "64995f35fc45"
    assert content_hash(resolve_config(TrainConfig(replay=DUAL), "er", 3)) == "cc04f0c501cb"
    assert content_hash(replace(base, data=replace(base.data, workers=3))) == content_hash(base)
    hashes = [content_hash(base)]
    for section in FIELDS:
        for name, value in FIELDS[section].items():
            if name != "workers":
                hashes.append(
                    content_hash(replace(base, **{section: replace(getattr(base, section), **{name: value})}))
                )
    assert len(set(hashes)) == len(hashes)


# ------------------------------------------------------------------------------------------------ one pass, online


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[StepSamples]:
    """The rows of every step."""
    steps: list[StepSamples] = []
    rows = sampler.ResidentSampler.samples

    def note(self: Any) -> StepSamples:
        steps.append(rows(self))
        return steps[-1]

    monkeypatch.setattr(sampler.ResidentSampler, "samples", note)
    return steps


@pytest.mark.parametrize("blur", [None, 0.3])
@pytest.mark.parametrize("method", ["er", "gradmix-sample", "der++"])
def test_online_every_row_is_seen_once_and_then_kept(
    method: str, blur: float | None, stream: TaskStream, made: list[Any], drawn: list[StepSamples]
) -> None:
    seen: list[int] = []
    config = replace(ONLINE, data=DataConfig(online=True, blur=blur))
    result = train_one(config, method, 2, stream=stream, on_step=lambda _p: seen.append(made[0].buffer.seen))
    current = [rows.x[~rows.replayed] for rows in drawn]
    everything = torch.cat(current)
    known = torch.cat([task.train.x for task in stream.tasks])
    matches = (everything[:, None] == known).all(2)
    assert bool((matches.sum(0) == 1).all()) and len(everything) == len(known)
    assert seen == np.cumsum([len(x) for x in current]).tolist(), "shown to the buffer after every step"
    assert result.timing.steps == len(drawn) == TASKS * STEPS_PER_EPOCH
    held: Tensor = torch.empty(0, WIDTH)
    for step, rows in enumerate(drawn):
        replayed = rows.x[rows.replayed]
        assert len(replayed) == (0 if step == 0 else 5)
        before = torch.cat([held, *current[:step]])
        assert bool((replayed[:, None] == before).all(2).any(1).all()), "of what had come before"
    labels = [int(stream.class_order.index(label)) for label in stream.class_order]
    assert sorted(made[0].buffer.classes) == labels


def test_online_in_the_order_of_a_blurred_stream(stream: TaskStream, drawn: list[StepSamples]) -> None:
    from gradmix.training.streams import blur_boundaries

    train_one(ONLINE, "er", 2, stream=stream)
    expected = torch.cat([task.train.x for task in blur_boundaries(stream, 0.3, 2).tasks])
    assert torch.equal(torch.cat([rows.x[~rows.replayed] for rows in drawn]), expected)


def test_online_the_head_grows_inside_a_task_and_the_optimiser_goes_on(
    stream: TaskStream, made: list[Any], drawn: list[StepSamples]
) -> None:
    widths, optimisers, moments = [], [], []

    def look(_progress: Progress) -> None:
        run = made[0]
        widths.append(run.model.head.out_features)
        optimisers.append(id(run.optimiser))
        state = run.optimiser.state
        moments.append((state[run.model.head.weight]["momentum_buffer"].clone(), run.model.head.weight.grad.clone()))

    result = train_one(ONLINE, "er", 2, stream=stream, on_step=look)
    largest = np.maximum.accumulate([int(rows.y.max()) + 1 for rows in drawn])
    assert widths == np.maximum(2, largest).tolist()
    grown = [step for step in range(1, len(widths)) if widths[step] > widths[step - 1]]
    assert any(step % STEPS_PER_EPOCH for step in [0, *grown] if widths[step] > 2), "not at a task's begin"
    assert len(set(optimisers)) == 1
    for step in grown:
        (before, _), (after, gradient) = moments[step - 1], moments[step]
        torch.testing.assert_close(after[: len(before)], 0.9 * before + gradient[: len(before)])
        torch.testing.assert_close(after[len(before) :], gradient[len(before) :])
    assert result.accuracy[-1].mean() > 0.3


def test_online_the_learning_rate_falls_over_the_whole_stream(stream: TaskStream, made: list[Any]) -> None:
    rates: list[float] = []

    def look(_progress: Progress) -> None:
        rates.append(made[0].optimiser.param_groups[0]["lr"])

    train_one(ONLINE, "er", 2, stream=stream, on_step=look)
    # As it is after each step; half of nine steps is rounded to four.
    assert rates == pytest.approx([0.05] * 3 + [0.005] * 6)


def refreshes(method: str, config: TrainConfig, stream: TaskStream, made: list[Any]) -> list[int]:
    """How often the reference gradient had been computed after each step."""
    counts: list[int] = []
    train_one(config, method, 2, stream=stream, on_step=lambda _p: counts.append(made[-1].method._mixup.refreshes))
    return counts


def test_online_the_reference_gradient_follows_the_stream(stream: TaskStream, made: list[Any]) -> None:
    one_head = replace(ONLINE, optim=replace(ONLINE.optim, growing_head=False, batch=2))
    whole = replace(one_head, mix=MixConfig(reference="buffer"))
    by_sample = refreshes("gradmix-sample", whole, stream, made)
    assert np.diff(by_sample).tolist() == [1] * (len(by_sample) - 1)
    assert set(refreshes("gradmix-sample", one_head, stream, made)) == {0}, "made of the step's own samples"
    often = refreshes("gradmix-class", replace(one_head, mix=MixConfig(refresh=3)), stream, made)
    assert all(later > earlier for earlier, later in zip(often, often[3:], strict=False))


def test_online_class_tables_are_made_anew_without_epochs(stream: TaskStream, made: list[Any]) -> None:
    # Hardly any order of classes: all are met soon, which is when a table is made anew in any case.
    mingled = replace(ONLINE, data=DataConfig(online=True, blur=50.0), optim=replace(ONLINE.optim, batch=1))
    counts = refreshes(
        "gradmix-class", replace(mingled, optim=replace(mingled.optim, growing_head=False)), stream, made
    )
    assert len(counts) == PER_CLASS * CLASSES
    assert (made[-1].config.mix.refresh, made[-1].config.mix.estimator) == (20, "feature")
    met = [step for step in range(1, len(counts)) if counts[step] > counts[step - 1]]
    assert np.diff(met).max() == 20 and met[-1] > len(counts) - 20


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        "er",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("a-gem", "gradmix-class", "remix")),
        "der++-gradmix-sample",
    ],
)
def test_online_goes_on_to_the_bit(method: str, growing: bool, stream: TaskStream, tmp_path: Path) -> None:
    config = replace(ONLINE, optim=replace(ONLINE.optim, growing_head=growing))
    goes_on_to_the_bit(config, method, stream, tmp_path, [1, 2, 3, 4, 7, 9])


def test_a_blurred_stream_in_epochs_goes_on_to_the_bit(stream: TaskStream, tmp_path: Path) -> None:
    config = replace(BASE, data=DataConfig(blur=0.3), optim=replace(OPTIM, growing_head=True))
    goes_on_to_the_bit(config, "der++-gradmix-sample", stream, tmp_path, [2, 7, 13, 18])


# ------------------------------------------------------------------------------------------------- several passes


def step_of(n: int = 11, replayed: int = 4, seed: int = 0) -> StepSamples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (n,), generator=generator)
    weight = torch.rand(n, generator=generator, dtype=torch.float64)
    return StepSamples(x, y, weight, replayed=torch.arange(n) >= n - replayed)


def context_of(accumulate: int, mix: MixConfig) -> Context:
    generator = torch.Generator().manual_seed(1)
    buffer = ReplayBuffer(3)
    x, y = torch.randn(30, WIDTH, generator=generator, dtype=torch.float64), torch.arange(30) % CLASSES
    logits = torch.randn(30, CLASSES, generator=generator)
    buffer.add(x, y, logits=logits)
    return Context(
        model=build_model("mlp", (WIDTH,), CLASSES, seed=2).double(),
        buffer=buffer,
        num_classes=CLASSES,
        mix=mix,
        generator=torch.Generator().manual_seed(3),
        clock=Clock(torch.device("cpu")),
        counts=torch.ones(CLASSES, dtype=torch.int64),
        draw_replayed=lambda: BufferSamples(x[:6], y[:6], {"logits": logits[:6]}),
        passes=Passes(accumulate=accumulate),
    )


ACCUMULATED: dict[str, tuple[str, MixConfig]] = {
    "er": ("er", MixConfig()),
    "mixup": ("mixup", MixConfig()),
    "mixup, originals": ("mixup", MixConfig(originals=True)),
    "mixup in feature space": ("mixup", MixConfig(space="feature")),
    "remix in feature space": ("remix", MixConfig(space="feature", originals=True)),
    "by sample": ("gradmix-sample", MixConfig()),
    "by sample, originals": ("gradmix-sample", MixConfig(originals=True)),
    "by sample in feature space": ("gradmix-sample", MixConfig(space="feature", originals=True)),
    "by sample, replayed reference": ("gradmix-sample", MixConfig(reference="replayed")),
    "by class": ("gradmix-class", MixConfig(estimator="feature")),
    "a-gem": ("a-gem", MixConfig()),
    "der++": ("der++", MixConfig()),
    "der++ with gradmix": ("der++-gradmix-sample", MixConfig(originals=True)),
}


@pytest.mark.parametrize("parts", [2, 3, 11, 50])
@pytest.mark.parametrize("case", ACCUMULATED)
def test_several_passes_add_up_to_one(case: str, parts: int) -> None:
    name, mix = ACCUMULATED[case]
    gradients, losses, largest = [], [], []
    for accumulate in (1, parts):
        method = METHODS[name](context_of(accumulate, mix))
        sizes: list[int] = []
        model = method.context.model
        handle = model.register_forward_hook(
            lambda m, i, _o, sizes=sizes: sizes.append(len(i[0])) if m.training else None
        )
        losses.append(method.backward(step_of()))
        handle.remove()
        gradients.append([parameter.grad for parameter in model.parameters()])
        largest.append(max(sizes))
    # Kept logits and a-gem's other rows, six of them, are forwarded at once.
    assert largest[0] == 11 and largest[1] <= max(-(-11 // parts), 6 if name in ("a-gem",) or "der" in name else 0)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0, check_dtype=False)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["er", "gradmix-sample", "der++"])
def test_runs_of_several_passes_are_complete(method: str, stream: TaskStream) -> None:
    config = replace(BASE, optim=replace(OPTIM, accumulate=3))
    one, three = train_one(BASE, method, 0, stream=stream), train_one(config, method, 0, stream=stream)
    assert one.timing.steps == three.timing.steps
    np.testing.assert_allclose(one.accuracy, three.accuracy, atol=0.051, err_msg="one of twenty may fall otherwise")


# --------------------------------------------------------------------------------- the reference of replayed rows


@pytest.mark.parametrize(("name", "criterion"), [("gradmix-sample", "sample"), ("gradmix-class", "class")])
def test_the_replayed_rows_may_be_the_reference(name: str, criterion: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    context, rows = context_of(1, MixConfig(reference="replayed", estimator="feature")), step_of(40, 15)
    monkeypatch.setattr(last_layer, "read_buffer", lambda *_a, **_k: pytest.fail("the buffer is read"))
    method: Any = METHODS[name](context)
    method.backward(rows)
    monkeypatch.undo()
    marked = (rows.x[rows.replayed], rows.y[rows.replayed])
    if criterion == "sample":
        expected = gradmix.select_pairs(
            context.model,
            marked,
            (rows.x, rows.y),
            criterion="sample",
            lam=float(method._pairs.lam[method._pairs.lam < 1][0]),
        )
        torch.testing.assert_close(method._pairs.alignment, expected.alignment)
    expected_reference = gradmix.reference_gradient(context.model, marked)
    if criterion == "class":
        torch.testing.assert_close(method._mixup.reference, expected_reference)


@pytest.mark.parametrize("method", ["gradmix-sample", "gradmix-class"])
def test_a_run_by_replayed_rows_leaves_the_buffer_alone(
    method: str, stream: TaskStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = last_layer.read_buffer

    def count(*args: Any, **named: Any) -> Any:
        reads.append(1)
        return read(*args, **named)

    monkeypatch.setattr(last_layer, "read_buffer", count)
    config = replace(BASE, mix=MixConfig(reference="replayed"))
    result = train_one(config, method, 0, stream=stream)
    # By sample, once for the record at the end of each task.
    assert len(reads) == (TASKS if method == "gradmix-sample" else 0)
    assert [record.task for record in result.alignments] == [1, 2]
    assert 0 < result.mixed_share[1] <= 1


# ---------------------------------------------------------------------------------------------- texts and tables

MIXING = [name for name in METHODS if "mix" in name and "augment" not in name]


@pytest.fixture(scope="module")
def texts() -> TaskStream:
    return make_stream("split-descriptions", tasks=2)


@pytest.mark.parametrize("space", ["embedding", "feature"])
@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in MIXING if name != "cutmix"])
def test_texts_are_mixed_inside_the_model(method: str, space: Any, texts: TaskStream) -> None:
    config = TrainConfig(optim=OptimConfig(epochs=1), mix=MixConfig(space=space), threads=1)
    config = replace(config, data=DataConfig("split-descriptions", tasks=2))
    result = train_one(config, method, 0, stream=texts)
    assert result.status == "complete" and result.config.mix.space == space
    assert result.config.optim.model == "text-transformer"
    if "gradmix" in method:
        assert result.config.mix.estimator == "feature"
        assert 0 <= result.mixed_share[1] <= 1 and len(result.alignments) == 1


@pytest.mark.parametrize("method", ["er", "gradmix-sample"])
def test_texts_are_learnt(method: str, texts: TaskStream) -> None:
    config = TrainConfig(data=DataConfig("split-descriptions", tasks=2), threads=1)
    result = train_one(config, method, 0, stream=texts)
    assert result.config.mix.space == "embedding", "the benchmark's own"
    assert result.accuracy[0, 0] > 0.7, "ten texts of two classes"
    assert result.accuracy[1, 0] > 0.5, "not forgotten"


REFUSED_MIXING = {
    "cutmix of texts": ("split-descriptions", "cutmix", MixConfig(), "mix.space: got 'embedding' for CutMix, expected"),
    "mixed inputs of texts": (
        "split-descriptions", "gradmix-class", MixConfig(estimator="mixed"),
        "mix.estimator: got 'mixed', which judges mixed inputs, expected 'feature' with mix.space: embedding",
    ),
    "a perceptron's embedding": (
        "split-wine", "mixup", MixConfig(space="embedding"), "mix.space: got 'embedding' for MLP with no module",
    ),
    "cutmix of a table": ("split-wine", "cutmix", MixConfig(), "expected images (N, C, H, W) for cutmix"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_MIXING)
def test_what_cannot_be_mixed_so_is_refused(case: str) -> None:
    benchmark, method, mix, message = REFUSED_MIXING[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        train_one(TrainConfig(data=DataConfig(benchmark), mix=mix, threads=1), method, 0)


def test_texts_given_as_they_are_cannot_be_mixed_at_the_input(texts: TaskStream) -> None:
    stream = replace(texts, protocol=replace(texts.protocol, space=None), name="own texts")
    for method in ("mixup", "gradmix-sample", "manifold-mixup"):
        with pytest.raises(TypeError, match=r"x: got samples of dtype torch.int64, .* mix.space: embedding or feature"):
            train_one(replace(BASE, optim=OptimConfig(epochs=1)), method, 0, stream=stream)


LEARN_WINES = [name for name in METHODS if "augment" not in name and name != "cutmix"]


@pytest.mark.parametrize("method, space", part(product(LEARN_WINES, [None, "feature"]), 3))
def test_wines_are_learnt_by_every_method(method: str, space: Any) -> None:
    config = TrainConfig(data=DataConfig("split-wine"), mix=MixConfig(space=space), threads=1)
    result = train_one(config, method, 0)
    assert result.class_names == ("class_0", "class_1", "class_2") and result.accuracy.shape == (3, 3)
    assert result.accuracy[0, 0] == 1
    if method not in ("finetune", "a-gem"):
        assert result.accuracy[-1].mean() > 0.8


def covertype_file(folder: Path) -> None:
    generator = np.random.default_rng(0)
    rows = np.zeros((420, 55), dtype=np.int64)
    rows[:, -1] = 1 + np.arange(420) % 7
    rows[:, :10] = generator.normal(0, 30, (420, 10)) + 100 * np.eye(10)[rows[:, -1]]
    rows[:, 10] = rows[:, 20] = 1
    (folder / "covtype.data").write_text("".join(",".join(map(str, row)) + "\n" for row in rows), encoding="ascii")


def newsgroups_archive(folder: Path) -> None:
    import io

    with tarfile.open(folder / "20news-bydate.tar.gz", "w:gz") as archive:
        for part, posts in (("20news-bydate-train", 6), ("20news-bydate-test", 3)):
            for number, group in enumerate(NEWSGROUPS):
                for post in range(posts):
                    own = f"word{number} thing{number} matter{post}"
                    text = f"From: somebody\nSubject: {group}\n\n{own} and {own} more\n".encode("latin-1")
                    info = tarfile.TarInfo(f"{part}/{group}/{1000 + post}")
                    info.size = len(text)
                    archive.addfile(info, io.BytesIO(text))


FILES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], tuple[int, ...]]] = {
    "split-covertype": (covertype_file, COVERTYPES, (2, 2, 2, 1)),
    "split-20newsgroups": (newsgroups_archive, tuple(NEWSGROUPS), (2,) * 10),
}


@pytest.mark.parametrize("benchmark", ["split-covertype", pytest.param("split-20newsgroups", marks=pytest.mark.slow)])
def test_files_in_their_layouts_are_learnt(benchmark: str, tmp_path: Path) -> None:
    write, names, sizes = FILES[benchmark]
    write(tmp_path)
    data = DataConfig(benchmark, tmp_path, tasks=2)
    whole = stream_of(replace(data, tasks=None))
    assert whole.class_names == names and tuple(len(task.classes) for task in whole.tasks) == sizes
    config = TrainConfig(
        data=data, optim=OptimConfig(epochs=4, batch=16), replay=ReplayConfig(batch=8, size=4), threads=1
    )
    result = train_one(config, "gradmix-sample", 0)
    assert result.accuracy.shape == (2, 2) and result.accuracy[1].mean() > 0.55
    assert result.class_names == names[:4]
