"""The library's own random generator, which draws where the caller gives none."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

_SEED_LIMIT = 1 << 62

_private: tuple[int, torch.Generator] | None = None


def default_generator() -> torch.Generator:
    """The CPU generator that draws where the caller gives none.

    It is the library's own, so that a selection does not change the global generators. It is seeded by
    ``torch.initial_seed()``: after each call of ``torch.manual_seed(s)`` the draws are the same.

    The global generator does not show that the same seed was set again. Therefore, from the first use on,
    ``torch.manual_seed`` is wrapped; of a seed set in another way, such as by ``torch.default_generator.manual_seed``,
    only a change is noticed.
    """
    global _private
    _wrap_manual_seed()
    seed = torch.initial_seed()
    if _private is None or _private[0] != seed:
        _private = (seed, torch.Generator("cpu").manual_seed(seed % _SEED_LIMIT))
    return _private[1]


def _wrap_manual_seed() -> None:
    """Wrap ``torch.manual_seed``, once, so that it restarts the library's generator."""
    original = torch.manual_seed
    if getattr(original, "wrapped_by", None) is _wrap_manual_seed:
        return

    @wraps(original)
    def manual_seed(seed: Any) -> torch.Generator:
        global _private
        generator = original(seed)
        if _private is not None and _private[0] == torch.initial_seed():
            _private = None
        return generator

    manual_seed.wrapped_by = _wrap_manual_seed  # type: ignore[attr-defined]
    torch.manual_seed = torch.random.manual_seed = manual_seed
