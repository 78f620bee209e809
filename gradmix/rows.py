"""Moved to :mod:`gradmix.replay.sources`."""

from gradmix._moved import moved

__getattr__ = moved(
    __name__,
    "gradmix.replay.sources",
    {
        "CHUNK": "CHUNK",
        "RowSource": "SampleSource",
        "as_pair": "as_pair",
        "chunks_of": "chunks_of",
        "has_rows": "has_samples",
        "numbered_chunks": "chunks_with_numbers",
    },
)
