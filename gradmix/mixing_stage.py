"""Former place of gradmix.model.mixed_forward."""

from __future__ import annotations

from gradmix._moved import moved

__getattr__ = moved(__name__, "gradmix.model.mixed_forward", {"mixed_forward": "mixed_forward"})
