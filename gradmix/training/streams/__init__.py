"""Streams of tasks, and the benchmarks: each a data set with a protocol."""

from gradmix.training.streams.stream import (
    Task,
    TaskStream,
    blurred,
    class_groups,
    class_incremental,
    concatenated,
    first_tasks,
)

__all__ = ["Task", "TaskStream", "blurred", "class_groups", "class_incremental", "concatenated", "first_tasks"]
