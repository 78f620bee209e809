"""Former place of gradmix.model.head."""

from __future__ import annotations

from gradmix._moved import moved

__getattr__ = moved(
    __name__,
    "gradmix.model.head",
    {
        "HeadCapture": "gradmix.model.head_capture:HeadCapture",
        "HeadNotFoundError": "HeadNotFoundError",
        "HeadOutput": "HeadOutput",
        "logits_of": "logits_of",
        "resolve_head": "resolve_head",
    },
)
