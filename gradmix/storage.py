"""Moved to :mod:`gradmix.replay.sample_files`."""

from gradmix._moved import moved

__getattr__ = moved(
    __name__,
    "gradmix.replay.sample_files",
    {
        "RowFiles": "SampleFiles",
        "Column": "gradmix.replay.layout:Column",
        "DESCRIPTION": "DESCRIPTION",
        "STAMPS": "STAMPS",
    },
)
