"""Streams of tasks, and the benchmarks: each a data set with a protocol."""

from gradmix._moved import moved
from gradmix.training.streams.stream import (
    Task,
    TaskStream,
    blur_boundaries,
    class_groups,
    class_incremental,
    concatenate,
    first_tasks,
)

__all__ = ["Task", "TaskStream", "blur_boundaries", "class_groups", "class_incremental", "concatenate", "first_tasks"]

__getattr__ = moved(
    __name__, "gradmix.training.streams.stream", {"blurred": "blur_boundaries", "concatenated": "concatenate"}
)
