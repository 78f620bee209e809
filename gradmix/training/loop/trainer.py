"""Class-incremental training with replay: one method, one seed, from the first task to the accuracy matrix.

A run can be left at any step and taken up again, to the bit (on one machine, with the same versions and number of
threads; a GPU's own kernels may round differently from one time to the next). All that the rest of the run
depends on is in :mod:`gradmix.training.loop.run_state`, and saved by :mod:`gradmix.training.loop.checkpoint`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from gradmix._moved import moved
from gradmix.model.unchanged import preserve_rng
from gradmix.runtime.collectives import Group, rank_of
from gradmix.training.config import TrainConfig
from gradmix.training.loop import checkpoint as checkpoints
from gradmix.training.loop.environment import pick_device, pick_threads
from gradmix.training.loop.run import Progress, Run
from gradmix.training.method_names import current_name
from gradmix.training.methods import find_method
from gradmix.training.runs.results import RunResult
from gradmix.training.seeds import derive_seed
from gradmix.training.streams import TaskStream, blur_boundaries
from gradmix.training.streams.benchmarks import resolve, stream_of

__all__ = ["Progress", "resolve_config", "train_one"]

__getattr__ = moved(__name__, __name__, {"resolved_config": "resolve_config"})


def resolve_config(config: TrainConfig, method: str, seed: int, stream: TaskStream | None = None) -> TrainConfig:
    """The complete configuration of one run: narrowed to it, and nothing left to the benchmark's or method's default.

    The arguments are those of :func:`train_one`.

    Raises:
        ValueError: an unknown method, or a setting out of range.
    """
    found = find_method(method)
    method = current_name(method, warn=False)
    filled = found.resolve_config(resolve(replace(config, methods=(method,), seeds=(seed,)), stream))
    # What the method does not read is nothing, as in runs of earlier versions, so that those are found again.
    mix = filled.mix
    estimator = None if mix.estimator == "auto" else mix.estimator
    reference = None if mix.reference == "auto" else mix.reference
    return replace(filled, mix=replace(mix, estimator=estimator, reference=reference))


def train_one(
    config: TrainConfig,
    method: str,
    seed: int,
    *,
    stream: TaskStream | None = None,
    on_step: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    group: Group = None,
) -> RunResult:
    """Train one method with one seed on all tasks of a benchmark.

    Two methods with the same seed start from the same weights, see the same batches in the same order and hold the same
    buffer: their difference is the method's.

    Args:
        config: fields left open are taken from the benchmark's protocol; ``methods`` and ``seeds`` are not read.
        method: a name that :func:`gradmix.training.methods.find_method` knows.
        seed: the training seed.
        stream: the benchmark's tasks if they were read already; or any other stream
            (:func:`gradmix.training.streams.class_incremental`), whose protocol then fills what is left open.
        on_step: called after every step.
        checkpoint: a file. If it is there, the run goes on from it. It is replaced, whole or not at all, every
            ``checkpoint_seconds``, and when ``on_step`` raises KeyboardInterrupt; it is the caller's to remove.
        checkpoint_seconds: seconds between two checkpoints, at least; 0: after every step.
        group: a process group of ``torch.distributed`` whose processes make every step together, each on its share of
            the samples (:mod:`gradmix.training.loop.distributed`). All call this with the same arguments. ``on_step``
            is called and the result returned in each; the first one keeps the checkpoint.

    Returns:
        The result; of status ``interrupted``, with what was reached, if a KeyboardInterrupt came; of status
        ``diverged``, with the accuracies after the tasks before, if the loss or the model's outputs were not finite.

    Raises:
        ValueError: a setting out of range, damaged data, or a checkpoint that is damaged, of another run or cannot be
            written (:class:`gradmix.training.loop.checkpoint.CheckpointError`).
        FileNotFoundError: missing data.
    """
    if stream is None:
        stream = stream_of(config.data)
    config = resolve_config(config, method, seed, stream)
    if config.data.blur is not None:
        stream = blur_boundaries(stream, config.data.blur, seed)
    device = pick_device(config.device)
    before, threads = torch.get_num_threads(), pick_threads(config, device)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with preserve_rng(device):
            torch.manual_seed(derive_seed(seed, "global") + rank_of(group))
            with _buffer_folder(config, checkpoint, group) as folder:
                run = Run(config, stream, device, on_step, group, folder)
                try:
                    if checkpoint is not None:
                        run.keep_at(Path(checkpoint), checkpoint_seconds)
                    return run.result()
                finally:
                    # Now, and not when the run is done away with: it may be taken up again at once.
                    run.buffer.close()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _buffer_folder(config: TrainConfig, checkpoint: str | Path | None, group: Group) -> Iterator[Path | None]:
    """Give the folder of a buffer on disk: beside the checkpoint that it belongs to, or for the run's time only."""
    if config.replay.storage != "disk":
        yield None
    elif checkpoint is not None and group is not None:
        # Only the first process's samples would be those that the checkpoint speaks of.
        raise ValueError(
            "replay.storage: got 'disk' with several processes and a checkpoint, expected 'memory' or nothing, or "
            "checkpoint 0: no checkpoint is kept"
        )
    elif checkpoint is None:
        with tempfile.TemporaryDirectory(prefix="gradmix-buffer-") as temporary:
            yield Path(temporary) / "samples"
    else:
        folder = checkpoints.samples_beside(checkpoint) / str(rank_of(group))
        if not Path(checkpoint).is_file():
            # What a run left that never came to its first checkpoint.
            shutil.rmtree(folder, ignore_errors=True)
        yield folder
