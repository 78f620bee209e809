"""The C library's memory, kept for the next call."""

from __future__ import annotations

import ctypes

_LARGEST_BLOCK = 1 << 30
_NEVER = (1 << 31) - 1
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for this process, where it can be asked to (glibc); whether it will.

    Otherwise it returns blocks of over 32 MiB, and at times smaller ones, to the system, and fetches them again page by
    page, cleared. The activations and gradients of a convolutional network are such blocks: training one on a CPU can
    spend half of its time in that. The process then keeps the most memory that it ever had.
    """
    try:
        library = ctypes.CDLL(None)
        # 1 is success; the thresholds are those of trimming the heap and of mapping blocks outside it.
        return all(
            library.mallopt(option, value) == 1
            for option, value in ((_TRIM_THRESHOLD, _NEVER), (_MMAP_THRESHOLD, _LARGEST_BLOCK))
        )
    except (OSError, TypeError, AttributeError):
        return False
