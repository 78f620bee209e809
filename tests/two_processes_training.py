"""What each of two processes does in the tests of training together; both can import it from here."""

from __future__ import annotations

import gc
import traceback
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from gradmix.runtime.collectives import rank_of
from gradmix.training.config import DataConfig, MixConfig, OptimConfig, ReplayConfig, TrainConfig
from gradmix.training.data.image_files import DamagedImageError
from gradmix.training.loop.trainer import train_one
from gradmix.training.streams import TaskStream, class_incremental
from gradmix.training.streams.benchmarks import make_stream

ROWS = 28
"""Of a class; a task has two classes."""

BASE = TrainConfig(
    data=DataConfig(tasks=3, samples_per_class=ROWS, workers=0),
    optim=OptimConfig(epochs=2, lr=0.05, batch=15),
    replay=ReplayConfig(batch=9, size=5, stream="dual"),
    threads=1,
)
ORIGINALS = replace(BASE, mix=MixConfig(originals=True))
REPLAYED = replace(BASE, mix=MixConfig(reference="replayed"))
BALANCED = replace(BASE, mix=MixConfig(candidates="balanced"))
NOTHING = replace(
    BASE, optim=replace(BASE.optim, batch=2 * ROWS - 1), replay=ReplayConfig(batch=1, size=5, stream="dual")
)

# Method and settings; shares are uneven throughout: 15 and 9 rows, 28 x 2 a task.
CASES: dict[str, tuple[str, TrainConfig]] = {
    "er": ("er", BASE),
    "finetune": ("finetune", BASE),
    "a-gem": ("a-gem", BASE),
    "der++": ("der++", BASE),
    "mixup": ("mixup", BASE),
    "mixup, balanced candidates": ("mixup", BALANCED),
    "remix, originals": ("remix", ORIGINALS),
    "gradmix by sample": ("gradmix-sample", BASE),
    "by sample, replayed reference": ("gradmix-sample", REPLAYED),
    "by sample, originals": ("gradmix-sample", ORIGINALS),
    "by sample, balanced candidates": ("gradmix-sample", BALANCED),
    "by sample, in three parts": ("gradmix-sample", replace(BASE, optim=replace(BASE.optim, accumulate=3))),
    "by sample, growing head": ("gradmix-sample", replace(BASE, optim=replace(BASE.optim, growing_head=True))),
    "by sample, online": (
        "gradmix-sample",
        replace(BASE, data=replace(BASE.data, online=True, blur=0.2), optim=replace(BASE.optim, epochs=None)),
    ),
    "by class": ("gradmix-class", BASE),
    "by class, every third step": ("gradmix-class", replace(BASE, mix=MixConfig(refresh=3, class_samples=4))),
    "der++ with gradmix": ("der++-gradmix-sample", BASE),
    "der++, growing head": ("der++", replace(BASE, optim=replace(BASE.optim, growing_head=True))),
    "er, online, growing head": (
        "er",
        replace(BASE, data=replace(BASE.data, online=True), optim=replace(BASE.optim, epochs=None, growing_head=True)),
    ),
    "cutmix": ("cutmix", replace(BASE, optim=replace(BASE.optim, augment="crop-flip"))),
    "balanced-mixup": ("balanced-mixup", BASE),
    # Of 56 rows the last step has one, as it has of the buffer, and the first process none.
    **{
        f"{method}, nothing for one process": (method, NOTHING)
        for method in ("er", "a-gem", "der++", "mixup", "gradmix-sample", "gradmix-class")
    },
    "er, nothing for one process, in two parts": (
        "er",
        replace(NOTHING, optim=replace(NOTHING.optim, accumulate=2)),
    ),
    "by sample, originals, nothing for one process": (
        "gradmix-sample",
        replace(NOTHING, mix=MixConfig(originals=True)),
    ),
}
READ_CASES = {
    "er": CASES["er"],
    "der++ with gradmix": CASES["der++ with gradmix"],
    "by sample, replayed reference": CASES["by sample, replayed reference"],
    "by sample, crops": (
        "gradmix-sample",
        replace(REPLAYED, optim=replace(BASE.optim, augment="crop-flip", model="mlp")),
    ),
    "er, crops": ("er", replace(BASE, optim=replace(BASE.optim, augment="crop-flip", model="mlp"))),
    "mixup, one shuffled stream": ("mixup", replace(BASE, replay=ReplayConfig(size=5, stream="shuffled"))),
    "er, rows kept in memory": ("er", replace(BASE, replay=replace(BASE.replay, storage="memory"))),
    "by sample, rows kept on disk": ("gradmix-sample", replace(BASE, replay=replace(BASE.replay, storage="disk"))),
    "by sample, online": CASES["by sample, online"],
    "mixup, damaged rows kept": (
        "mixup",
        replace(BASE, data=replace(BASE.data, skip_damaged=True), replay=replace(BASE.replay, storage="memory")),
    ),
    "mixup, damaged rows": ("mixup", replace(BASE, data=replace(BASE.data, skip_damaged=True))),
    "er, nothing for one process": CASES["er, nothing for one process"],
    "der++ with gradmix, nothing for one process": ("der++-gradmix-sample", NOTHING),
}


def _optim(**changes: Any) -> TrainConfig:
    return replace(BASE, optim=replace(BASE.optim, **{"epochs": 1, **changes}))


# In these a process computes something else than one process would, or in other numbers; still both are to agree.
OPTION_CASES: dict[str, tuple[str, TrainConfig]] = {
    "batch normalisation": ("gradmix-sample", _optim(model="resnet8")),
    "batch normalisation, rows of one process": ("er", replace(NOTHING, optim=replace(NOTHING.optim, model="resnet8"))),
    "dropout": ("gradmix-sample", _optim(model="two_processes_training:with_dropout")),
    # The gradient of a share's replayed samples is rounded otherwise in bfloat16, and decisions differ.
    "bf16": ("gradmix-sample", replace(_optim(amp="bf16"), mix=MixConfig(reference="buffer"))),
    "fp16": ("a-gem", _optim(amp="fp16")),
    "fp16, in parts, originals": (
        "gradmix-sample",
        replace(_optim(amp="fp16", accumulate=2), mix=MixConfig(originals=True)),
    ),
    "compiled": ("gradmix-sample", _optim(compile=True, growing_head=True)),
    "channels last": ("gradmix-sample", _optim(model="resnet8", channels_last=True, augment="crop-flip")),
}
AT_STEP = 5


def with_dropout(num_classes: int) -> torch.nn.Module:
    layers = torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Dropout(0.3), torch.nn.ReLU()
    return torch.nn.Sequential(*layers, torch.nn.Linear(32, num_classes))


class Digits:
    """Digits as items that are read one by one, bytes as images are."""

    def __init__(self, x: torch.Tensor, damaged: frozenset[int] = frozenset()) -> None:
        self.x = (x * 255).to(torch.uint8)
        self.damaged = damaged

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self.damaged:
            raise DamagedImageError(f"{index}.jpg: cut short")
        return self.x[index]


@cache
def resident() -> TaskStream:
    return make_stream("split-digits", tasks=3, samples_per_class=ROWS)


def read(name: str) -> TaskStream:
    damaged = frozenset(range(7, 6 * ROWS, 29)) if "damaged" in name else frozenset()
    whole = resident()
    sides = []
    for side in ("train", "test"):
        rows = [getattr(task, side) for task in whole.tasks]
        x = torch.cat([part.x for part in rows])
        sides.append((Digits(x, damaged if side == "train" else frozenset()), torch.cat([part.y for part in rows])))
    (train, train_y), (test, test_y) = sides
    return class_incremental(
        train, test, labels=(train_y, test_y), classes_per_task=2, protocol=whole.protocol, name="read digits"
    )


def outcome(case: tuple[str, TrainConfig], stream: TaskStream, group: Any = None, **options: Any) -> dict[str, Any]:
    """What a run comes to: its accuracies, the last model's parameters, the rows held."""
    from gradmix.training.loop.run import Run

    method, config = case
    runs: list[Any] = []
    made = Run.__init__

    def note(self: Any, *args: Any) -> None:
        made(self, *args)
        runs.append(self)

    Run.__init__ = note  # type: ignore[method-assign]
    try:
        result = train_one(config, method, 3, stream=stream, group=group, **options)
    finally:
        Run.__init__ = made  # type: ignore[method-assign]
    return {
        "accuracy": torch.from_numpy(result.accuracy),
        "status": result.status,
        "mixed": list(result.mixed_share),
        "parameters": [parameter.detach().clone() for parameter in runs[0].model.parameters()],
        "buffers": [buffer.clone() for buffer in runs[0].model.buffers()],
        "held": runs[0].buffer.y.clone(),
    }


def resumed(case: tuple[str, TrainConfig], file: Path, group: Any) -> dict[str, Any]:
    """What a run comes to that one process, the second, wanted to leave, and that was taken up again."""

    def leave(progress: Any) -> None:
        if progress.step >= AT_STEP and rank_of(group) == 1:
            raise KeyboardInterrupt

    left = outcome(case, resident(), group, on_step=leave, checkpoint=file)
    assert left["status"] == "interrupted"
    again = outcome(case, resident(), group, checkpoint=file)
    torch.distributed.barrier()
    file.unlink(missing_ok=True)
    torch.distributed.barrier()
    return again


def process(rank: int, folder: str, names: list[str], read_names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    # The compiler is slow, and what it makes of the model is not the matter.
    torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]
    told: dict[str, Any] = {}
    try:
        for name in names:
            told[name] = outcome(CASES[name], resident(), group)
        for name in read_names:
            told[f"read: {name}"] = outcome(READ_CASES[name], read(name), group)
        for name, case in OPTION_CASES.items():
            told[f"option: {name}"] = outcome(case, resident(), group)
            told[f"resumed: {name}"] = resumed(case, Path(folder) / "checkpoint.pt", group)
    except Exception:
        told["failure"] = traceback.format_exc()
    torch.save(told, Path(folder) / f"rank{rank}.pt")
    if "failure" not in told:
        gc.collect()  # no reducer must outlive the group: it would end gloo's threads with Python's lock held
        torch.distributed.destroy_process_group()
