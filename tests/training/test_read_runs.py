"""Whole runs over images that stay in their files, in the true layouts, with generated JPEGs."""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import thinning
import torch
from forked import run_code
from patience import PATIENCE
from resuming import StopAt, assert_same_result, goes_on_to_the_bit, interrupted_run, same, undisturbed_run

from gradmix.training.config import DataConfig, OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.data.image_files import DamagedImageError
from gradmix.training.data.samples import StoredSamples
from gradmix.training.loop import checkpoint
from gradmix.training.loop.reading import MOST_WORKERS, Reading
from gradmix.training.loop.run import Run
from gradmix.training.loop.trainer import Progress, train_one
from gradmix.training.streams import TaskStream, class_incremental
from gradmix.training.streams.benchmarks import make_stream

Image = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow, which is not installed")

NAMES = ("ape", "bee", "cat", "dog")
TRAIN_ROWS, TEST_ROWS, BATCH, EPOCHS = 7, 3, 6, 2
STEPS_PER_EPOCH = -(-2 * TRAIN_ROWS // BATCH)
STEPS_PER_TASK = EPOCHS * STEPS_PER_EPOCH
STEPS = 2 * STEPS_PER_TASK


def picture(path: Path, label: int, number: int) -> None:
    """A JPEG of its class's colours and of a size of its own."""
    generator = np.random.default_rng([label, number])
    pixels = generator.integers(0, 50, (13 + number % 5, 17 - label, 3))
    pixels[..., label % 3] += 60 + 40 * label
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, "JPEG", quality=95)


def image_folder(root: Path) -> Path:
    for part, count in (("train", TRAIN_ROWS), ("val", TEST_ROWS)):
        for label, name in enumerate(NAMES):
            for number in range(count):
                picture(root / part / name / f"{number}.jpg", label, number + 50 * (part == "val"))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


def config_of(folder: Path, workers: int = 0, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        data=DataConfig("image-folder", folder, classes_per_task=2, image_size=8, workers=workers, class_order_seed=1),
        optim=OptimConfig(model="mlp", epochs=EPOCHS, batch=BATCH, lr=0.05),
        replay=ReplayConfig(size=3, batch=5),
        threads=1,
    )
    for section, values in changes.items():
        base = replace(base, **{section: replace(getattr(base, section), **values)})
    return base


def stream_of(folder: Path, **options: Any) -> TaskStream:
    return make_stream("image-folder", folder, classes_per_task=2, image_size=8, class_order_seed=1, **options)


def whole_buffer(stream: TaskStream) -> TaskStream:
    """The same images with the reference gradient taken over the whole buffer."""
    return replace(stream, protocol=replace(stream.protocol, reference=None), name="own images")


@pytest.fixture(autouse=True)
def no_process_is_left() -> Any:
    yield
    until = time.monotonic() + PATIENCE
    while multiprocessing.active_children() and time.monotonic() < until:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []


# Method, whether the reference gradient is the whole buffer's, and settings.
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "er": ("er", False, {}),
    "er, no augmentation": ("er", False, {"optim": {"augment": "none"}}),
    "er, crops": ("er", False, {"optim": {"augment": "crop-flip"}}),
    "a-gem": ("a-gem", False, {}),
    "der++": ("der++", False, {}),
    "mixup, balanced candidates": ("mixup", False, {"mix": {"candidates": "balanced"}}),
    "mixup, replayed candidates, originals": ("mixup", False, {"mix": {"candidates": "replayed", "originals": True}}),
    "one shuffled stream": ("er", False, {"replay": {"stream": "shuffled"}}),
    "by sample, one shuffled stream": ("gradmix-sample", False, {"replay": {"stream": "shuffled"}}),
    "by sample, replayed reference": ("gradmix-sample", False, {}),
    "by sample, whole buffer": ("gradmix-sample", True, {"mix": {"refresh": 2, "candidates": "balanced"}}),
    "by class, replayed reference": ("gradmix-class", False, {"mix": {"estimator": "feature"}}),
    "by class, whole buffer": ("gradmix-class", True, {}),
    "der++ with gradmix, reservoir": (
        "der++-gradmix-sample", True, {"replay": {"policy": "reservoir", "size": 7}, "optim": {"accumulate": 2}},
    ),
    "growing head, blurred": ("der++", False, {"optim": {"growing_head": True}, "data": {"blur": 0.2}}),
    "online": ("gradmix-sample", True, {"data": {"online": True, "blur": 0.2}, "optim": {"epochs": None}}),
    "online, growing head": (
        "der++", False,
        {"data": {"online": True}, "optim": {"epochs": None, "growing_head": True}, "replay": {"storage": "memory"}},
    ),
}  # fmt: skip


def case_of(case: str, folder: Path, workers: int) -> tuple[TrainConfig, str, TaskStream]:
    method, whole, changes = CASES[case]
    stream = stream_of(folder)
    return config_of(folder, workers, **changes), method, whole_buffer(stream) if whole else stream


def steps_of(case: str) -> int:
    if "online" in case:
        return STEPS // EPOCHS
    # In one stream the six rows kept of the first task make the second one's epochs longer by a step.
    return STEPS + EPOCHS * ("shuffled" in case)


def mostly_slow(cases: Iterable[str], *quick: str) -> list[Any]:
    """Worker processes take their time to start: of the slow cases every third, or all."""
    chosen = [*quick, *thinning.part((case for case in cases if case not in quick), 3)]
    return [pytest.param(case, marks=[pytest.mark.slow] * (case not in quick)) for case in chosen]


@pytest.mark.parametrize("case", mostly_slow(CASES, "mixup, balanced candidates", "der++ with gradmix, reservoir"))
def test_workers_change_nothing(case: str, folder: Path, tmp_path: Path) -> None:
    ends = []
    for workers in (0, 2):
        config, method, stream = case_of(case, folder, workers)
        ends.append(undisturbed_run(config, method, stream, tmp_path / f"{workers}.pt", steps_of(case)))
    (alone, state), (helped, other_state) = ends
    assert_same_result(helped, alone)
    same(other_state, state, "state")
    assert alone.benchmark == stream.name and alone.class_names == tuple(NAMES[label] for label in stream.class_order)
    assert alone.timing.seconds_data > 0 and helped.timing.seconds_data > 0
    if "gradmix" in method:
        # Online there is a buffer before the first task's end.
        assert [record.task for record in alone.alignments] == ([0, 1] if "online" in case else [1])


def test_images_are_learnt_as_their_colours_tell(folder: Path) -> None:
    result = train_one(config_of(folder, optim={"epochs": 8, "augment": "none"}), "er", 0)
    assert result.config.mix.reference == "replayed" and result.accuracy[1].mean() > 0.6


@pytest.mark.parametrize("case", ["er, crops", "der++", "by sample, whole buffer", "one shuffled stream"])
def test_reading_is_as_having_read(case: str, folder: Path, tmp_path: Path) -> None:
    """The same run as over the same images in memory."""
    config, method, stream = case_of(case, folder, 0)
    config = replace(config, optim=replace(config.optim, augment="none"), mix=replace(config.mix, candidates="batch"))
    images = [stream.tasks[0].train.items.data, stream.tasks[0].test.items.data]  # type: ignore[attr-defined]
    options: dict[str, Any] = {"mean": stream.mean, "std": stream.std, "input_shape": stream.input_shape}
    options |= {"classes_per_task": 2, "class_order_seed": 1, "protocol": stream.protocol, "name": stream.name}
    states = []
    for in_memory in (True, False):
        own = class_incremental(*images, in_memory=in_memory, **options)
        assert own.is_read is not in_memory and own.class_names == stream.class_names
        states.append(undisturbed_run(config, method, own, tmp_path / f"{in_memory}.pt", steps_of(case))[1])
    same(states[1]["model"], states[0]["model"], "model")
    same(states[1]["generators"], states[0]["generators"], "generators")
    assert torch.equal(states[1]["buffer"]["y"], states[0]["buffer"]["y"])


# --------------------------------------------------------------------------------------------------------- going on

RESUMED = [
    "er",
    "der++",
    "mixup, balanced candidates",
    "by sample, one shuffled stream",
    "by class, whole buffer",
    "growing head, blurred",
    "online",
    "online, growing head",
]


@pytest.mark.parametrize("case", mostly_slow(RESUMED, "mixup, balanced candidates"))
def test_runs_go_on_to_the_bit_with_steps_drawn_ahead(case: str, folder: Path, tmp_path: Path) -> None:
    # One worker draws ahead as two do; a fork of a process of many tests takes long.
    config, method, stream = case_of(case, folder, 2 if case == "mixup, balanced candidates" else 1)
    stops = [2, STEPS_PER_EPOCH + 1, steps_of(case)]
    if "online" not in case:
        stops[1:2] = [STEPS_PER_TASK, STEPS_PER_TASK + 1]
    goes_on_to_the_bit(config, method, stream, tmp_path, stops)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(folder: Path, tmp_path: Path) -> None:
    config, method, stream = case_of("mixup, balanced candidates", folder, 2)
    expected = train_one(config, method, 1, stream=stream)
    path = tmp_path / "run.pt"
    for workers, stop in ((2, 1), (0, 4), (1, STEPS_PER_TASK + 2), (2, STEPS)):
        changed = replace(config, data=replace(config.data, workers=workers))
        left = train_one(changed, method, 1, stream=stream, on_step=StopAt([stop]), checkpoint=path)
        assert left.status == "interrupted" and left.timing.steps == stop
    assert_same_result(train_one(config, method, 1, stream=stream, checkpoint=path), expected)


KILLED = """
import os, signal, time
from pathlib import Path
import numpy as np
import torch
from gradmix.training.loop import checkpoint
from gradmix.training.streams.benchmarks import make_stream
from gradmix.training.config import DataConfig, OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.loop.trainer import train_one

torch.set_num_threads(1)
path = Path({path!r})
config = TrainConfig(
    data=DataConfig("image-folder", Path({folder!r}), classes_per_task=2, image_size=8, workers=2),
    optim=OptimConfig(model="mlp", epochs=3, batch=6), replay=ReplayConfig(size=3, batch=5), threads=1,
)
for kill in range(3):
    before = path.stat().st_ino if path.is_file() else None
    if (child := os.fork()) == 0:
        train_one(config, "der++-gradmix-sample", 3, checkpoint=path, checkpoint_seconds=0)
        os._exit(0)
    until = time.monotonic() + {patience}
    while (not path.is_file() or path.stat().st_ino == before) and time.monotonic() < until:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.001)
    time.sleep(0.02 * kill)
    os.kill(child, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("killed" if killed == -9 else killed, checkpoint.load(path)["steps"])
resumed = train_one(config, "der++-gradmix-sample", 3, checkpoint=path)
whole = train_one(config, "der++-gradmix-sample", 3)
print("same", np.array_equal(resumed.accuracy, whole.accuracy) and resumed.timing.steps == whole.timing.steps
      and np.array_equal(resumed.mixed_share, whole.mixed_share, equal_nan=True))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the run that is killed is in a forked process")
def test_a_killed_run_ends_as_one_left_in_peace(folder: Path, tmp_path: Path) -> None:
    *kills, verdict = (
        line.split()
        for line in run_code(
            KILLED.format(path=str(tmp_path / "run.pt"), folder=str(folder), patience=PATIENCE), tmp_path
        )
    )
    assert [word for word, _ in kills] == ["killed"] * 3
    steps = [int(step) for _, step in kills]
    assert 0 < steps[0] < steps[1] < steps[2]
    assert verdict == ["same", "True"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_worker_is_left_behind(error: type[BaseException], folder: Path) -> None:
    seen: list[int] = []

    def stop(progress: Progress) -> None:
        seen.append(len(multiprocessing.active_children()))
        if progress.step == 2:
            raise error("stop")

    config = config_of(folder, 2)
    if error is KeyboardInterrupt:
        assert train_one(config, "er", 0, on_step=stop).status == "interrupted"
    else:
        with pytest.raises(RuntimeError, match="^stop$"):
            train_one(config, "er", 0, on_step=stop)
    assert seen == [2, 2] and multiprocessing.active_children() == []


def test_as_many_workers_as_there_are_processors_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    for processors, workers in ((1, 0), (2, 1), (9, 8), (200, MOST_WORKERS)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, n=processors: set(range(n)), raising=False)
        assert Reading(None, skip_damaged=False, device=torch.device("cpu")).workers == workers
    assert Reading(30, skip_damaged=False, device=torch.device("cpu")).workers == 30


# ------------------------------------------------------------------------------------------- where kept rows lie


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize(
    "case", mostly_slow(["er, crops", "a-gem", "by class, whole buffer", "growing head, blurred"], "er, crops")
)
def test_it_makes_no_difference_where_kept_rows_lie(
    case: str, storage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config, method, stream = case_of(case, folder, 0)
    kept = replace(config, replay=replace(config.replay, storage=storage))
    expected, other = undisturbed_run(config, method, stream, tmp_path / "numbers.pt", STEPS)
    assert_same_result(train_one(kept, method, 1, stream=stream), expected)
    assert os.listdir(tmp_path) == ["numbers.pt"], "what lay there for the run's time"
    # With a checkpoint, which the rows lie beside.
    stops = [2, STEPS_PER_TASK, STEPS_PER_TASK + 2, STEPS]
    result, state = interrupted_run(kept, method, stream, tmp_path / "kept.pt", stops)
    assert_same_result(result, expected)
    same(state["model"], other["model"], "model")
    same(state["optimiser"], other["optimiser"], "optimiser")
    assert torch.equal(state["buffer"]["y"], other["buffer"]["y"])
    assert set(os.listdir(tmp_path)) == {"kept.pt", "numbers.pt"} | ({"kept.pt.rows"} if storage == "disk" else set())
    checkpoint.remove(tmp_path / "kept.pt")
    assert os.listdir(tmp_path) == ["numbers.pt"]


@pytest.mark.parametrize(
    "changes", [{"mix": {"candidates": "balanced"}}, {"replay": {"stream": "shuffled"}}], ids=["balanced", "shuffled"]
)
def test_kept_rows_leave_out_what_needs_all_rows_at_hand(changes: dict[str, Any], folder: Path) -> None:
    config = config_of(folder, **changes)
    config = replace(config, replay=replace(config.replay, storage="memory"))
    with pytest.raises(ValueError, match="replay.storage: got samples that are read from files and kept, with"):
        train_one(config, "er", 0)


def test_online_with_a_buffer_on_disk(folder: Path, tmp_path: Path) -> None:
    config, method, stream = case_of("online", folder, 0)
    expected = train_one(config, method, 1, stream=stream)
    disk = replace(config, replay=replace(config.replay, storage="disk"))
    result, _ = interrupted_run(disk, method, stream, tmp_path / "run.pt", [1, 2, 4])
    assert_same_result(result, expected)


# ------------------------------------------------------------------------------------------------------ damaged files


# By the version of Pillow.
CAUSES = "(cannot be decoded|is no image of a kind that is read)"


def spoilt(folder: Path, *files: str) -> Path:
    image_folder(folder)
    for file in files:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("file", ["train/bee/3.jpg", "val/cat/1.jpg"])
def test_a_damaged_file_stops_the_run_by_its_name(file: str, workers: int, tmp_path: Path) -> None:
    config = config_of(spoilt(tmp_path, file), workers)
    with pytest.raises(DamagedImageError, match=re.escape(f"{tmp_path / file}: ") + CAUSES):
        train_one(config, "gradmix-sample", 0)


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("method", ["er", "der++", "gradmix-class"])
def test_online_damaged_files_are_left_out(method: str, growing: bool, tmp_path: Path) -> None:
    config = config_of(
        spoilt(tmp_path, "train/ape/1.jpg", "train/dog/2.jpg"), 0, data={"skip_damaged": True, "online": True},
        # A row a step, by which larger rates diverge.
        optim={"model": "resnet8", "batch": 1, "lr": 0.01, "epochs": None, "growing_head": growing},
        replay={"size": 20, "batch": 2},
    )  # fmt: skip
    counts: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train_one(config, method, 0, on_step=lambda p: counts.append(p.step))
    assert result.status == "complete" and counts[-1] == len(NAMES) * TRAIN_ROWS
    assert sorted(re.findall(r"train/\w+/\d\.jpg", str([str(w.message) for w in caught]))) == [
        "train/ape/1.jpg",
        "train/dog/2.jpg",
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("method", ["der++-gradmix-sample", "er"])
def test_damaged_files_are_left_out_and_named_once(
    method: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = ("train/bee/3.jpg", "train/bee/0.jpg", "train/dog/6.jpg")
    config = config_of(spoilt(tmp_path, *damaged), workers, data={"skip_damaged": True}, replay={"size": 20})
    runs: list[Any] = []
    make = Run.__init__

    def note(self: Any, *args: Any) -> None:
        make(self, *args)
        runs.append(self)

    monkeypatch.setattr(Run, "__init__", note)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train_one(config, method, 0)
    assert result.status == "complete" and result.timing.steps == STEPS
    said = [str(warning.message) for warning in caught]
    assert sorted(re.findall(r"train/\w+/\d\.jpg", " ".join(said))) == sorted(damaged), "each once"
    files = runs[0].stream.tasks[0].train.items.data
    held = [os.path.relpath(files.path(int(number)), tmp_path) for number in runs[0].buffer.x]
    assert len(held) == len(set(held)) == len(NAMES) * TRAIN_ROWS - 3 and not set(held) & set(damaged)
    assert runs[0].reading.faults_of(runs[0].stream.tasks[0].train.items).keys() == {
        number for number in range(len(files)) if os.path.relpath(files.path(number), tmp_path) in damaged
    }


def test_a_damaged_test_image_counts_as_wrong(tmp_path: Path) -> None:
    config = config_of(image_folder(tmp_path / "whole"), data={"skip_damaged": True}, optim={"epochs": 8})
    whole = train_one(config, "er", 0)
    spoil = spoilt(tmp_path / "spoilt", "val/ape/0.jpg", "val/ape/1.jpg", "val/ape/2.jpg")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train_one(replace(config, data=replace(config.data, data_dir=spoil)), "er", 0)
    assert [Path(str(warning.message).split(": ")[1]).stem for warning in caught] == ["0", "1", "2"]
    task = next(n for n, classes in enumerate(result.task_classes) if "ape" in [result.class_names[k] for k in classes])
    assert (result.accuracy[:, task] <= 0.5).all() and (result.accuracy <= whole.accuracy).all()
    assert np.array_equal(result.accuracy[:, 1 - task], whole.accuracy[:, 1 - task]), "training was the same"


@pytest.mark.parametrize("method", ["er", "mixup", "gradmix-sample", "der++"])
def test_a_step_whose_rows_are_all_damaged_is_passed_over(method: str, tmp_path: Path) -> None:
    # One row a step, and batch normalisation, which takes no empty batch.
    config = config_of(
        spoilt(tmp_path, "train/bee/3.jpg", "train/dog/2.jpg"), 0, data={"skip_damaged": True},
        optim={"model": "resnet8", "batch": 1, "epochs": 1}, replay={"batch": 1},
    )  # fmt: skip
    runs: list[Any] = []
    with pytest.warns(UserWarning, match=r"is left out: .*\.jpg: " + CAUSES):
        result = train_one(config, method, 0, on_step=lambda p: runs.append(p.step))
    assert result.status == "complete" and runs == list(range(1, 4 * TRAIN_ROWS + 1))
    assert np.isfinite(result.accuracy).all() and result.accuracy[0, 0] > 0


# ----------------------------------------------------------------------------------------------------------- layouts


def tiny_imagenet(root: Path) -> str:
    base = root / "tiny-imagenet-200"
    for label in range(4):
        for number in range(TRAIN_ROWS):
            picture(base / "train" / f"n0{label}" / "images" / f"n0{label}_{number}.JPEG", label, number)
        (base / "train" / f"n0{label}" / f"n0{label}_boxes.txt").write_text("0\n", encoding="utf-8")
        for number in range(TEST_ROWS):
            picture(base / "val" / "images" / f"val_{label + 4 * number}.JPEG", label, 50 + number)
    (base / "wnids.txt").write_text("".join(f"n0{label}\n" for label in range(4)), encoding="utf-8")
    (base / "words.txt").write_text(
        "".join(f"n0{label}\t{name}\n" for label, name in enumerate(NAMES)), encoding="utf-8"
    )
    (base / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{n}.JPEG\tn0{n % 4}\t0\t0\t9\t9\n" for n in range(4 * TEST_ROWS)), encoding="utf-8"
    )
    return "split-tiny-imagenet"


def imagenet(root: Path) -> str:
    rows = ["ImageId,PredictionString"]
    for label in range(4):
        for number in range(TRAIN_ROWS):
            picture(root / "ILSVRC/Data/CLS-LOC/train" / f"n0{label}" / f"n0{label}_{number}.JPEG", label, number)
        for number in range(TEST_ROWS):
            name = f"ILSVRC2012_val_{label + 4 * number:08d}"
            picture(root / "ILSVRC/Data/CLS-LOC/val" / f"{name}.JPEG", label, 50 + number)
            rows.append(f"{name},n0{label} 1 2 3 4")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return "split-imagenet"


@pytest.mark.parametrize("layout", [tiny_imagenet, imagenet])
def test_two_tasks_in_the_true_layout(layout: Any, tmp_path: Path) -> None:
    benchmark = layout(tmp_path)
    config = config_of(tmp_path, 0, data={"benchmark": benchmark}, optim={"model": "resnet8", "augment": None})
    result = train_one(config, "gradmix-sample", 0)
    assert result.status == "complete" and result.accuracy.shape == (2, 2) and result.benchmark == benchmark
    assert result.config.optim.augment == ("crop-flip" if "tiny" in benchmark else "resized-crop-flip")
    assert result.config.mix.reference == "replayed" and 0 < result.mixed_share[1] <= 1
    names = NAMES if "tiny" in benchmark else tuple(f"n0{label}" for label in range(4))
    assert sorted(result.class_names) == sorted(names)
    stream = make_stream(benchmark, tmp_path, classes_per_task=3, image_size=8)
    assert [len(task.train) for task in stream.tasks] == [3 * TRAIN_ROWS, TRAIN_ROWS]
    rows = stream.tasks[0].train
    assert isinstance(rows, StoredSamples) and rows.read(torch.tensor([0])).dtype == torch.uint8
