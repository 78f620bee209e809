"""The library's own random generator, which draws where the caller gives none."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

_SEED_LIMIT = 1 << 62

_private: tuple[int, torch.Generator] | None = None


def default_generator() -> torch.Generator:
    """The CPU generator that draws where the caller gives none.

    It is the library's own, so that selecting pairs leaves the global generators alone, and it is seeded by
    ``torch.initial_seed()``: what follows a call of ``torch.manual_seed(s)`` is repeated by another such call.

    That the same seed was set again cannot be seen in the global generator, whose state may be that of before in
    either case. So from the first use on ``torch.manual_seed`` tells; of a seed set by another name, such as
    ``torch.default_generator.manual_seed``, only a change is noticed.
    """
    global _private
    _hear_of_seeds()
    seed = torch.initial_seed()
    if _private is None or _private[0] != seed:
        _private = (seed, torch.Generator("cpu").manual_seed(seed % _SEED_LIMIT))
    return _private[1]


def _hear_of_seeds() -> None:
    """Have ``torch.manual_seed`` restart the generator of the seed that is set."""
    original = torch.manual_seed
    if getattr(original, "heard_by", None) is _hear_of_seeds:
        return

    @wraps(original)
    def manual_seed(seed: Any) -> torch.Generator:
        global _private
        generator = original(seed)
        if _private is not None and _private[0] == torch.initial_seed():
            _private = None
        return generator

    manual_seed.heard_by = _hear_of_seeds  # type: ignore[attr-defined]
    torch.manual_seed = torch.random.manual_seed = manual_seed
