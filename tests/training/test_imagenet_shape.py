"""The run at ImageNet's shape: its JPEGs, its plan of steps, and the figures it makes of them. No time is judged."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from bench_modules import load

from gradmix import ReplayBuffer
from gradmix.training.config import MixConfig
from gradmix.training.loop.clock import Clock
from gradmix.training.loop.reading import Reading
from gradmix.training.methods import METHODS, Context, StepSamples
from gradmix.training.streams import class_incremental

pytest.importorskip("PIL", reason="the images are written and read by Pillow")
CPU = torch.device("cpu")


@pytest.fixture
def jpegs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_jpegs")


@pytest.fixture
def shape(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "imagenet_shape")


def small(shape: ModuleType, **changed: Any) -> Any:
    given = {"image": 16, "classes": 4, "tasks": 2, "train": 3, "buffer": 2, "batch": 4, "replay": 2, "steps": 1}
    return shape.replace(shape.QUICK, **{**given, "rounds": 1, "shortest": 24, "longest": 40, **changed})


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------------------- images


def test_files_are_the_same_however_many_processes_write_them(jpegs: ModuleType, tmp_path: Path) -> None:
    folder = jpegs.Folder(classes=3, train=2, val=1, shortest=20, longest=30, seed=5)
    sizes = [jpegs.write_folder(tmp_path / str(k), folder, processes) for k, processes in enumerate((1, 2))]
    first, second = (contents(tmp_path / str(k)) for k in range(2))
    assert first == second and sizes[0] == sizes[1] == sum(map(len, first.values()))
    assert sorted(first) == [
        *(f"train/n0000000{c}/n0000000{c}_{k}.JPEG" for c in range(3) for k in range(2)),
        *(f"val/n0000000{c}/n0000000{c}_0.JPEG" for c in range(3)),
    ]
    assert len(set(first.values())) == 9


@pytest.mark.parametrize("changed", [{"seed": 6}, {"split": "val"}, {"number": 1}, {"index": 1}], ids=str)
def test_every_image_is_another(jpegs: ModuleType, changed: dict[str, Any]) -> None:
    given = {"seed": 5, "split": "train", "number": 0, "index": 0}

    def drawn(seed: int, **which: Any) -> np.ndarray:
        return jpegs.pattern(jpegs.Folder(4, 2, 2, 20, 20, seed), **which)

    assert np.array_equal(drawn(**given), drawn(**given))
    assert not np.array_equal(drawn(**given), drawn(**{**given, **changed}))


def test_sides_and_sizes_are_those_of_photographs(jpegs: ModuleType, tmp_path: Path) -> None:
    from PIL import Image

    count = 6
    size = jpegs.write_folder(tmp_path, jpegs.Folder(2, count // 2, 0))
    sides = []
    for path in tmp_path.rglob("*.JPEG"):
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.mode == "RGB"
            sides += image.size
    assert len(sides) == 2 * count and min(sides) >= 300 and max(sides) <= 500 and len(set(sides)) > 6
    assert 60e3 < size / count < 140e3


def test_classes_can_be_learnt_from_other_images_of_theirs(jpegs: ModuleType) -> None:
    folder = jpegs.Folder(8, 4, 4, 32, 32)

    def rows(split: str) -> np.ndarray:
        images = [[jpegs.pattern(folder, split, c, k).ravel() for k in range(4)] for c in range(8)]
        return np.array(images, dtype=np.float64)

    centres = rows("train").mean(1)
    distance = ((rows("val")[:, :, None] - centres) ** 2).sum(-1)
    assert (distance.argmin(-1) == np.arange(8)[:, None]).mean() > 0.9


# --------------------------------------------------------------------------------------------------------------- steps


def test_the_plan_is_rounds_of_all_ways_each_with_another_first(shape: ModuleType) -> None:
    plan = shape.segments(small(shape, steps=3, rounds=2), workers=2, earlier=7)
    names = list(shape.WAYS)
    assert [(s.way, s.steps) for s in plan[:7]] == [(names[k % 5], 1) for k in range(7)]
    rounds = [plan[start : start + 5] for start in (7, 12, 17)]
    assert [found[0].way for found in rounds] == names[:3]
    assert all({s.way for s in found} == set(names) and {s.steps for s in found} == {3} for found in rounds)
    kept = [s.kept for s in plan]
    assert kept == [False] * 12 + [True] * 10 + [False, True]
    # Four batches lie ready when reading alone begins, and one is being handed over.
    assert [(s.way, s.steps) for s in plan[22:]] == [(shape.READING, 5), (shape.READING, 4)]


def context_of(seed: int = 0) -> Context:
    torch.manual_seed(seed)
    buffer = ReplayBuffer(2)
    buffer.add(torch.randn(6, 5), torch.arange(6) % 3)
    generator = torch.Generator().manual_seed(3)
    mix = MixConfig(reference="replayed", estimator="feature", refresh=1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    return Context(model, buffer, 3, mix, generator, Clock(CPU))


ROWS = StepSamples(
    torch.randn(6, 5, generator=torch.Generator().manual_seed(1)),
    torch.tensor([0, 1, 2, 0, 1, 2]),
    torch.full((6,), 1 / 3),
    None,
    torch.arange(6) >= 3,
)


@pytest.mark.parametrize("way", ["er", "mixup", "selection", "mixup-originals", "selection-originals"])
def test_every_way_is_the_method_of_the_package(shape: ModuleType, way: str) -> None:
    told = shape.WAYS[way]
    alone, shared = context_of(), context_of()
    alone.mix = shape.replace(alone.mix, originals=told.originals)
    expected = METHODS[told.method](alone).backward(ROWS)
    course = shape.Course([shape.Segment(way, 1, True)], CPU, [])
    loss = shape.InTurn(shared, course).backward(ROWS)
    # One in two parts adds the same losses up in another order.
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(shared.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
        assert wanted.grad is not None and bool(wanted.grad.any())
    course.on_step(None)
    (block,) = course.blocks
    assert (block.way, block.rows, block.loss) == (way, 6, float(loss))
    assert (block.selecting > 0) == ("selection" in way)


def test_reading_alone_leaves_the_network_as_it_is(shape: ModuleType) -> None:
    context = context_of()
    shape.InTurn(context, shape.Course([shape.Segment(shape.READING, 1, True)], CPU, [])).backward(ROWS)
    assert all(p.grad is None for p in context.model.parameters())


def test_a_block_has_what_was_added_while_it_went_on(shape: ModuleType) -> None:
    class Reader:
        seconds_waiting = 5.0

    readers = [Reader()]
    plan = [shape.Segment("er", 1, False), shape.Segment("mixup", 2, True), shape.Segment("er", 1, True)]
    course, context = shape.Course(plan, CPU, readers), context_of()
    course.follow(context)
    assert course.parameters == 5 * 4 + 4 + 4 * 3 + 3
    ways = []
    for step in range(4):
        ways.append(course.way)
        readers[0].seconds_waiting += 2.0**step
        if step == 2:
            readers.append(Reader())  # whose start was waited for
        context.clock.load_state_dict({"data": 3.0 * step, "selection": 0.5 * step})
        course.trained(10 + step, torch.tensor(float(step)))
        course.on_step(None)
    assert ways == ["er", "mixup", "mixup", "er"]
    first, second = course.blocks
    assert (first.way, first.rows, first.loss, first.waiting) == ("mixup", 11 + 12, 2.0, 2.0 + 4.0 + 5.0)
    assert (first.data, first.selecting, second.data, second.selecting) == (6.0, 1.0, 3.0, 0.5)
    assert (second.way, second.rows, second.waiting) == ("er", 13, 8.0) and second.seconds > 0


@pytest.mark.parametrize("raises", [False, True])
def test_what_is_changed_for_the_run_is_put_back(shape: ModuleType, raises: bool) -> None:
    names, make = list(METHODS), Reading.reader
    try:
        with shape.readers_made() as made, shape.in_turn(shape.Course([], CPU, [])) as name:
            assert name in METHODS and name not in names
            reader = Reading(0, skip_damaged=False, device=CPU).reader(torch.arange(3.0), [torch.tensor([1])])
            assert made == [reader] and [b.samples.tolist() for b in reader] == [[1.0]]
            if raises:
                raise RuntimeError("out of memory")
    except RuntimeError:
        assert raises
    assert list(METHODS) == names and Reading.reader is make


def test_the_last_task_reads_its_files_again(shape: ModuleType) -> None:
    x, y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 0, 1, 1, 2, 2])
    stream = class_incremental((x, y), (x, y), classes_per_task=[2, 1])
    long = shape.with_long_end(stream, 5)
    assert long.tasks[0] is stream.tasks[0] and long.tasks[1].test is stream.tasks[1].test
    assert long.tasks[1].train.x[:, 0].tolist() == [8.0, 10.0, 8.0, 10.0, 8.0]
    assert long.tasks[1].train.y.tolist() == [2] * 5


def test_summary_pairs_blocks_of_one_round(shape: ModuleType) -> None:
    def block(way: str, seconds: float, memory: int = 7) -> Any:
        return shape.Block(way, 100, seconds, seconds / 2, seconds / 4, seconds / 10, memory, seconds)

    seconds = {"er": (1.0, 2.0), "mixup": (2.0, 4.0), "selection": (2.5, 5.0)}
    first = [block(way, seconds.get(way, (8.0, 8.0))[0]) for way in shape.WAYS]
    second = [block(way, seconds.get(way, (8.0, 8.0))[1], 9) for way in reversed(shape.WAYS)]
    found = shape.summary([*first, *second, block(shape.READING, 0.25)])
    ratios = {name: ratio["p50"] for name, ratio in found["rate_over"].items()}
    assert ratios == {"selection": pytest.approx(0.8), "selection-originals": 1.0, "mixup": 0.5}
    figures = found["ways"]["selection"]
    assert (figures["images_per_second"]["max"], figures["images_per_second"]["min"]) == (40.0, 20.0)
    shares = [figures[name]["p50"] for name in ("data_share", "waiting_share", "selection_share")]
    assert shares == pytest.approx([0.5, 0.25, 0.1])
    assert (figures["blocks"], figures["peak_memory_bytes"], figures["last_loss"]) == (2, 9, 5.0)
    assert found["reading_images_per_second"] == 400.0


@pytest.mark.parametrize(("storage", "workers"), [("files", 0), ("files", 1), ("memory", 0), ("disk", 0)])
def test_a_run_from_end_to_end(
    shape: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    storage: str,
    workers: int,
) -> None:
    monkeypatch.setattr(shape, "QUICK", small(shape, storage=storage))
    folder = tmp_path / "images"
    given = ["--quick", "--folder", str(folder), "--workers", str(workers)]
    assert shape.main([*given, "--json", str(tmp_path / "x.json")]) == 0
    result = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    run = result["run"]
    # Two rounds of five ways, then reading: those ahead and one that do not count, and those that do.
    alone = max(1, 2 * workers)
    last = 10 + 2 * workers + 1 + alone
    assert (run["images"], run["buffer_rows"], run["steps"], run["steps_of_last_task"]) == (12, 4, 2 + last, last)
    assert [block["rows"] for block in run["blocks"]] == [6] * 5 + [6 * alone]
    assert {block["way"] for block in run["blocks"][:5]} == set(shape.WAYS)
    for block in run["blocks"]:
        assert 0 < block["waiting"] <= block["data"] <= block["seconds"] and block["peak_memory"] > 0
        assert (block["selecting"] > 0) == ("selection" in block["way"]) and np.isfinite(block["loss"])
    assert len(list(folder.rglob("*.JPEG"))) == 16 and result["image_bytes"] == sum(map(len, contents(folder).values()))
    assert "images/s" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        shape.parse(["--quick", "--folder", str(folder)])
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--tasks", "3"], "expected a divisor of 1000"),
        (["--tasks", "1"], "at least 2"),
        (["--workers", "-1"], "expected an integer >= 0"),
        (["--buffer", "21"], "at most the 20 images"),
        (["--json", "no/such/x.json"], "no folder"),
        (["--batch", "0"], "expected an integer >= 1"),
    ],
)
def test_what_makes_no_sense_is_refused(
    shape: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    with pytest.raises(SystemExit):
        shape.parse(arguments)
    assert word in capsys.readouterr().err
