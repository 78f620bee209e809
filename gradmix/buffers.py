"""Moved to :mod:`gradmix.replay.buffer`."""

from gradmix._moved import moved

__getattr__ = moved(
    __name__,
    "gradmix.replay.buffer",
    {
        "ReplayBuffer": "ReplayBuffer",
        "BufferRows": "BufferSamples",
        "BufferPolicy": "gradmix.replay.ledger:BufferPolicy",
    },
)
